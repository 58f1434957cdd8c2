"""Dogs are found in every published layout, in order, and the data is only read."""

import gzip
import os
import struct
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import dog_sets
import numpy as np
import pytest
from dog_sets import Dog, as_folders, as_pictures, make_dog, make_dogs, tar_folder, zip_folder
from PIL import Image
from runs import assert_one_sentence
from torchvision.datasets import ImageFolder

import train_dogs
from train_dogs import PhotoSet, UserError, find_photos, prepare_crops

pytestmark = pytest.mark.usefixtures("light")

DEFLATED = zipfile.ZIP_DEFLATED


def prepare(*roots: Path, kinds: str = "square") -> train_dogs.CropSet:
    return prepare_crops(find_photos(roots), kinds, show=False)


def reasons_of(found: PhotoSet | train_dogs.CropSet) -> dict[str, int]:
    return dict(Counter(reason for _, reason in found.skipped))


def crops_by_name(root: Path) -> dict[str, tuple[str, bytes]]:
    """Each photo's breed and pixels; the sets here have one box for each photo."""
    found, made = find_photos([root]), prepare(root)
    assert len(found.photos) == len(made.first)
    return {
        photo.name: (made.breeds[breed], made.pixels[first[0]].numpy().tobytes())
        for photo, breed, first in zip(found.photos, made.breed, made.first)
    }


def archives(pack: Callable, names: tuple[str, str], prefixes: tuple[str, str]) -> Callable:
    """A maker of sets of two archives, of pictures and of annotations."""

    def make(root: Path, dogs: list[Dog]) -> Path:
        flat = "Images" if names[0].endswith("zip") else "Images/{}"  # Kaggle's zip has no breeds
        loose = as_folders(root.parent / f"loose {root.name}", dogs, flat)
        root.mkdir(parents=True, exist_ok=True)
        for half, name, prefix in zip(("Images", "Annotation"), names, prefixes):
            pack(loose / half, root / name, prefix)
        return root

    return make


def flat(pictures: str, annotations: str) -> Callable:
    """A maker of sets in Kaggle's form: the breed in the annotation's folder alone."""
    return lambda root, dogs: as_folders(root, dogs, pictures, annotations + "/{}")


def folders_and_tar(root: Path, dogs: list[Dog]) -> Path:
    as_folders(root, dogs)
    tar_folder(root / "Annotation", root / "annotation.tar", "Annotation/")
    (root / "Annotation").rename(root.parent / "elsewhere")
    return root


ZIPS, TARS = ("all-dogs.zip", "Annotation.zip"), ("images.tar", "annotation.tar")
deflate, lzma = (partial(zip_folder, method=m) for m in (DEFLATED, zipfile.ZIP_LZMA))
LAYOUTS: dict[str, Callable[[Path, list[Dog]], Path]] = {
    "kaggle nested": flat("all-dogs/all-dogs", "annotation/Annotation"),
    "kaggle flat": flat("all-dogs", "Annotation"),
    "kaggle mixed": flat("all-dogs/all-dogs", "Annotation"),
    "zips with folders": archives(zip_folder, ZIPS, ("all-dogs/", "Annotation/")),
    "zips doubled": archives(deflate, ZIPS, ("all-dogs/all-dogs/", "annotation/Annotation/")),
    "zips bare": archives(lzma, ZIPS, ("", "")),
    "tars": archives(tar_folder, TARS, ("Images/", "Annotation/")),
    "tars from here": archives(tar_folder, TARS, ("./Images/", "./Annotation/")),
    "folders and tar": folders_and_tar,
    "one level down": lambda r, d: as_folders(r / "stanford dogs", d).parent,
}


@pytest.fixture(scope="module")
def dogs() -> list[Dog]:
    return make_dogs(20)


@pytest.fixture(scope="module")
def expected(dogs, tmp_path_factory) -> dict[str, tuple[str, bytes]]:
    """What the plain folders give, the other layouts' oracle."""
    crops = crops_by_name(as_folders(tmp_path_factory.mktemp("folders"), dogs))
    breeds = {f"{dog.breed}/{dog.stem}.jpg": dog.breed for dog in dogs}
    assert {name: breed for name, (breed, _) in crops.items()} == breeds
    assert len({pixels for _, pixels in crops.values()}) == len(dogs)
    return crops


@pytest.fixture
def mounts(tmp_path, monkeypatch) -> Path:
    """An empty folder in place of /kaggle/input; no data/ here or next to the program."""
    mounts, below = tmp_path / "kaggle/input", train_dogs.find_set
    monkeypatch.setattr(
        train_dogs,
        "find_set",
        lambda folder, levels: below(mounts if str(folder) == "/kaggle/input" else folder, levels),
    )
    for folder in (mounts, tmp_path / "here", tmp_path / "program"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(train_dogs, "__file__", str(tmp_path / "program/train_dogs.py"))
    return mounts


# ---------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_breeds_and_pixels_in_place(
    layout, dogs, expected, tmp_path, monkeypatch
):
    cache, work = tmp_path / "cache", tmp_path / "work"
    work.mkdir()
    root = LAYOUTS[layout](tmp_path / "data/set", dogs)
    for name, folder in (("XDG_CACHE_HOME", cache), ("TMPDIR", work)):
        monkeypatch.setenv(name, str(folder))
    monkeypatch.chdir(work)
    before = dog_sets.snapshot(tmp_path / "data")
    assert crops_by_name(root) == expected
    assert dog_sets.snapshot(tmp_path / "data") == before
    assert list(work.iterdir()) == [] and len(list(cache.rglob("*.*"))) == 1  # nothing is unpacked


@pytest.mark.parametrize(("layout", "names"), [("tars", TARS), ("zips with folders", ZIPS[::-1])])
def test_the_two_archives_may_be_named_one_by_one(layout, names, dogs, expected, tmp_path):
    root = LAYOUTS[layout](tmp_path / layout, dogs)
    found = find_photos([root / name for name in names])
    assert {photo.name for photo in found.photos} == set(expected)
    assert found.annotated and found.skipped == []


def test_annotations_named_xml_and_halves_that_are_links_are_read(dogs, tmp_path):
    """Also links to breeds, dead links, and a link back to where it is."""
    real, root = as_folders(tmp_path / "real", dogs[::-1]), tmp_path / "set"
    (root / "Annotation").mkdir(parents=True)
    (root / "Images").symlink_to(real / "Images", target_is_directory=True)
    for path in [p for p in (real / "Annotation").rglob("*") if p.is_file()]:
        path.rename(path.with_name(path.name + ".xml"))
    for breed in (real / "Annotation").iterdir():
        (root / "Annotation" / breed.name).symlink_to(breed, target_is_directory=True)
    (real / "Images" / dogs[0].breed / "gone.jpg").symlink_to(tmp_path / "gone")
    (real / "Images" / "again").symlink_to(real / "Images", target_is_directory=True)
    found, plain = find_photos([root]), find_photos([as_folders(tmp_path / "plain", dogs)])
    assert found.annotated and found.skipped == []
    assert [p.name for p in found.photos] == [p.name for p in plain.photos]  # not the disk's order


# ------------------------------------------------------------------------- where is looked


def test_kaggle_mounts_are_found_down_to_depth_4(dogs, mounts, tmp_path):
    made = LAYOUTS["zips with folders"](tmp_path / "made", dogs)
    for mount in ("slug", "competitions/slug", "datasets/somebody/slug", "1/2/3/4"):
        (mounts / mount).parent.mkdir(parents=True, exist_ok=True)
        made = made.rename(mounts / mount)
        found = find_photos()
        assert len(found.photos) == len(dogs) and str(mounts / mount) in found.where
    as_folders(mounts / "1/2/3/other/5", dogs)
    made.rename(tmp_path / "gone")
    with pytest.raises(UserError, match="no dogs found"):
        find_photos()


def test_the_search_stops_at_the_shallowest_and_then_the_first_by_name(dogs, mounts):
    as_folders(mounts / ".trash", dogs[:15])
    as_folders(mounts / "__MACOSX", dogs[:16])
    as_folders(mounts / "a/deeper/still", dogs[:17])
    as_folders(mounts / "c", dogs[:18])
    as_folders(mounts / "b", dogs)
    found = find_photos()
    assert len(found.photos) == len(dogs) and str(mounts / "b") in found.where


def test_data_beats_mounts_and_they_beat_data_here_and_beside_the_program(
    dogs, mounts, tmp_path, monkeypatch
):
    LAYOUTS["tars"](tmp_path / "program/data", dogs[:16])
    assert len(find_photos().photos) == 16
    here = LAYOUTS["kaggle flat"](Path("data"), dogs[:17])
    assert len(find_photos().photos) == 17
    as_folders(mounts / "slug", dogs[:18])
    assert len(find_photos().photos) == 18
    assert len(find_photos([as_folders(tmp_path / "given", dogs[:19])]).photos) == 19
    assert len(find_photos([str(here)]).photos) == 17
    (mounts / "slug").rename(tmp_path / "gone")
    monkeypatch.delattr(train_dogs, "__file__")  # as in a notebook cell
    assert len(find_photos().photos) == 17


def test_without_dogs_both_remedies_are_named_and_drawn_dogs_are_used_only_when_named(
    mounts, sample_dogs, tmp_path, capsys
):
    for place in (Path("data"), tmp_path / "program/data"):
        place.mkdir()
        (place / "sample").symlink_to(sample_dogs, target_is_directory=True)
    assert train_dogs.main(["--device", "cpu", "--out", "out"]) == 2
    assert_one_sentence(capsys.readouterr().err, "data/download.py", "--data data/sample")
    assert len(find_photos(["data/sample"]).photos) == 120


# --------------------------------------------------------- pictures without annotations


def test_a_folder_without_annotations_is_one_class_of_whole_pictures(tmp_path):
    root = as_pictures(tmp_path / "dogs")
    (root / "notes.txt").write_text("no dog")
    found, made = find_photos([root]), prepare(root, kinds="square:3,head")
    assert made.weights.tolist() == [1.0] and made.breeds == ["dog"]
    assert "no annotations: whole pictures, one class" in found.where
    for photo, (first,) in zip(found.photos, made.first.tolist(), strict=True):
        whole = Image.open(root.parent / photo.name)
        squashed = np.asarray(whole.resize((64, 64), Image.Resampling.LANCZOS))
        assert (squashed == made.pixels[first].numpy()).all()


@pytest.mark.parametrize("pack", [None, zip_folder, tar_folder])
def test_folders_of_pictures_are_classes_as_for_torchvision(pack, tmp_path):
    """Of a folder in place, and in archives."""
    root, place = tmp_path / "animals", tmp_path / "animals"
    for name, first in (("dog", 0), ("cat", 9)):
        as_pictures(root / name, 9, first)
    if pack:
        pack(root, place := tmp_path / "packed.archive", "x/")
    found, oracle = find_photos([place]), ImageFolder(root)
    assert "2 classes" in found.where and not found.annotated
    made = prepare(place)
    assert (made.breeds, made.breed.tolist()) == (oracle.classes, oracle.targets)
    assert made.key == prepare(root).key


def test_a_file_named_annotations_is_no_half_of_a_set(tmp_path):
    dog_sets.write(as_pictures(tmp_path / "images").parent / "annotations.json", b"{}")
    found = find_photos([tmp_path])
    assert len(found.photos) == 20 and not found.annotated


@pytest.mark.parametrize("out", ["output", "."])
def test_the_programs_own_results_are_no_data(out, tmp_path, monkeypatch):
    """`cd photos; train_dogs.py --data .`, twice: the sheets of the first run are no dogs."""
    monkeypatch.chdir(as_pictures(tmp_path / "photos"))
    flags = ["--data", ".", "--out", out, "--device", "cpu", "--width", "1", "--images", "4"]
    for _ in range(2):  # with other dogs the second would be refused
        assert train_dogs.main([*flags, "--latent-dim", "4", "--steps", "1"]) == 0
    assert {p.suffix for p in Path(out).rglob("*.*")} >= {".png", ".webp"}
    assert len(find_photos([tmp_path]).photos) == 20  # as a run with another --out sees it


# ------------------------------------------------------------------- more than one --data


def test_several_data_are_joined_and_a_photo_in_two_counts_once(dogs, tmp_path):
    a, b = as_folders(tmp_path / "a", dogs[:10]), LAYOUTS["zips bare"](tmp_path / "b", dogs[9:])
    found = find_photos([a, b])
    names = [p.name for p in found.photos]
    assert sorted(names) == sorted(f"{d.breed}/{d.stem}.jpg" for d in dogs)
    assert str(a) in found.where and str(b) in found.where and found.skipped == []
    assert [p.name for p in find_photos([a, b, a]).photos] == names


def test_different_plain_folders_may_use_the_same_names(tmp_path):
    roots = [as_pictures(tmp_path / name / "dogs", 16, 100 * k) for k, name in enumerate("ab")]
    made = prepare(*roots)
    assert len(made.first) == 32 and made.skipped == []
    assert len({pixels.numpy().tobytes() for pixels in made.pixels}) == 32


def test_sets_with_and_without_annotations_do_not_mix(dogs, tmp_path):
    with pytest.raises(UserError, match="annotation"):
        prepare(as_folders(tmp_path / "a", dogs), as_pictures(tmp_path / "b"))


# ------------------------------------------------------------- names, links, hidden files

ODD = ["a b", "naïve-Hund", "犬", "it's", '"', "100%", "%s%d", "a.b.c", "#?&;", "-dash", "{0}"]


@pytest.mark.parametrize("layout", ["one level down", "kaggle flat", "zips with folders", "tars"])
def test_odd_names_are_read_like_any_other(layout, tmp_path):
    names = [(f"n1-{ODD[k % len(ODD)]}", f"{ODD[k // 2]} {k}") for k in range(2 * len(ODD))]
    dogs = [make_dog(k, breed=breed, stem=stem) for k, (breed, stem) in enumerate(names)]
    crops = crops_by_name(LAYOUTS[layout](tmp_path / "odd 100% 犬", dogs))
    assert {name: breed for name, (breed, _) in crops.items()} == {
        f"{d.breed}/{d.stem}.jpg": d.breed for d in dogs
    }


def test_where_two_breeds_use_a_name_the_pictures_folder_decides(tmp_path):
    breeds = ("n1-a", "n2-b") * 8
    dogs = [make_dog(k, breed=breed, stem=f"{k // 2}") for k, breed in enumerate(breeds)]
    crops = crops_by_name(LAYOUTS["one level down"](tmp_path, dogs))
    assert {name: breed for name, (breed, _) in crops.items()} == {
        f"{d.breed}/{d.stem}.jpg": d.breed for d in dogs
    }


@pytest.mark.skipif(sys.platform != "linux", reason="file names of any bytes exist on Linux alone")
def test_names_that_are_no_text_do_not_stop_a_run(dogs, tmp_path):
    root = as_folders(tmp_path / "set", dogs)
    raw = os.fsencode(root / "Images" / dogs[0].breed) + b"/n1_\xff\xfe.jpg"
    Path(os.fsdecode(raw)).write_bytes(dogs[0].picture)
    first, again = prepare(root), prepare(root)  # made, and from the cache
    assert len(first.first) == len(dogs) and first.skipped == again.skipped
    assert reasons_of(first) == {"picture without annotation": 1}


def test_hidden_and_macos_files_are_passed_over_in_silence(dogs, tmp_path, monkeypatch):
    root = as_folders(tmp_path / "set", dogs)
    for name in ("._n1_1.jpg", ".DS_Store", ".ipynb_checkpoints/n1_2.jpg", "__MACOSX/n1_3.jpg"):
        for half in ("Images", "Annotation"):
            dog_sets.write(root / half / dogs[0].breed / name, b"no dog")
    zip_folder(root / "Images", tmp_path / "all.zip", "")
    monkeypatch.chdir(root / "Images")
    for place in (root, root / "Images", Path("."), tmp_path / "all.zip"):
        found = find_photos([place])
        assert len(found.photos) == len(dogs) and found.skipped == []


def test_a_named_folder_may_be_hidden_but_none_below_it_is_data(tmp_path, monkeypatch):
    root = as_pictures(tmp_path / ".dogs", 16)
    as_pictures(root / ".trash")
    dog_sets.write(root / "_roll1/_DSC0001.JPG", make_dog(1).picture)  # as cameras name them
    monkeypatch.chdir(root)
    assert len(find_photos([root]).photos) == len(find_photos(["."]).photos) == 17


def test_what_cannot_be_paired_is_left_out_by_reason(tmp_path):
    """Two annotations of one name, a half missing; what comes twice counts once."""
    dogs = make_dogs(20)
    lonely = [dogs[1]._replace(annotation=None), dogs[2]._replace(picture=None)]
    root = archives(zip_folder, ZIPS, ("", ""))(tmp_path / "set", [dogs[0], *lonely, *dogs[3:]])
    with zipfile.ZipFile(root / ZIPS[1], "a") as archive:
        archive.writestr(f"n9-Other/{dogs[0].stem}", dogs[0].annotation)
    with zipfile.ZipFile(root / ZIPS[0], "a") as archive, pytest.warns(UserWarning):
        archive.writestr(f"{dogs[5].stem}.jpg", dogs[5].picture)
    found = find_photos([root])
    assert len(found.photos) == 18 and len(found.skipped) == 3
    left = {(Path(name).stem, reason) for name, reason in found.skipped}
    assert left == {
        (dogs[0].stem, "annotation without picture"),
        (dogs[1].stem, "picture without annotation"),
        (dogs[2].stem, "annotation without picture"),
    }


# ------------------------------------------------------------------- archives gone wrong


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Callable[[str], bytearray]:
    """60 pictures as a zip, a deflated zip or a tar, to be damaged."""
    folder = tmp_path_factory.mktemp("packed")
    loose = as_pictures(folder / "loose", 60)
    zip_folder(loose, folder / "zip", "")
    zip_folder(loose, folder / "deflated", "", DEFLATED)
    tar_folder(loose, folder / "tar", "x")
    return lambda kind: bytearray((folder / kind).read_bytes())


def patched(data: bytearray, at: int, new: bytes) -> bytearray:
    data[at : at + len(new)] = new
    return data


def listed(data: bytearray, offset: int, new: bytes) -> bytearray:
    """A zip with other bytes in its list of members, for the first of them."""
    return patched(data, data.index(b"PK\x01\x02") + offset, new)


BROKEN_ARCHIVES: dict[str, Callable[[Callable], bytes]] = {
    "a compressed tar": lambda packed: gzip.compress(packed("tar")),
    "empty": lambda packed: b"",
    "a web page": lambda packed: b"<html>404 not found</html>" * 99,
    "a cut zip": lambda packed: packed("zip")[:-300],
    "a cut tar": lambda packed: packed("tar")[:-12_000],
    "a size that is no number": lambda packed: patched(packed("tar"), 124, b"x" * 11),
}


@pytest.mark.parametrize("name", BROKEN_ARCHIVES)
def test_a_broken_archive_ends_with_2_and_names_it(name, packed, tmp_path, capsys):
    place = tmp_path / "broken.archive"
    place.write_bytes(BROKEN_ARCHIVES[name](packed))
    flags = ["--data", str(place), "--device", "cpu", "--out", str(tmp_path / "out")]
    assert train_dogs.main(flags) == 2
    assert_one_sentence(capsys.readouterr().err, "broken.archive", "uncompressed tar")


@pytest.mark.parametrize("what", ["nowhere", "notes.txt", "empty folder"])
def test_what_is_no_data_is_refused(what, tmp_path):
    (tmp_path / "notes.txt").write_text("no dog")
    (tmp_path / "empty folder").mkdir()
    with pytest.raises(UserError, match=what):
        find_photos([tmp_path / what])


def first_member(data: bytearray, offset: int, new: bytes) -> bytearray:
    """A zip with other bytes in the header of its first member, also in the list."""
    return patched(listed(data, offset + 2, new), offset, new)


BAD_MEMBERS: dict[str, Callable[[Callable], bytes]] = {
    "deflated garbage": lambda packed: patched(packed("deflated"), 36, b"\xff" * 400),
    "encrypted": lambda packed: first_member(packed("zip"), 6, b"\x01\0"),
    "an unknown method": lambda packed: first_member(packed("zip"), 8, b"\x4d\0"),
    "a wrong size": lambda packed: listed(packed("zip"), 24, struct.pack("<I", 1000)),
}


@pytest.mark.parametrize("name", BAD_MEMBERS)
def test_a_bad_member_of_a_zip_is_counted(name, packed, tmp_path):
    place = tmp_path / "dogs.zip"
    place.write_bytes(BAD_MEMBERS[name](packed))
    made = prepare(place)
    assert len(made.first) == 59 and reasons_of(made) == {"unreadable file": 1}
