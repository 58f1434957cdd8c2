"""Dogs are found in every published layout, in order, in place, and nothing is altered."""

import io
import os
import re
import struct
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import dog_sets
import numpy as np
import pytest
from dog_sets import Dog, as_flat, as_folders, make_dog, make_dogs, tar_folder, zip_folder
from PIL import Image

import train_dogs
from train_dogs import UserError, find_photos, prepare_crops


def crops_by_name(root: Path, kinds: str = "square") -> dict[str, tuple[str, bytes]]:
    """Each photo's breed and pixels; the sets here have one box for each photo."""
    found = find_photos([root])
    made = prepare_crops(found, kinds, show=False)
    assert len(found.photos) == len(made.first)
    breeds = [made.breeds[i] for i in made.breed]
    return {
        photo.name: (breed, made.crops[first[0]].numpy().tobytes())
        for photo, breed, first in zip(found.photos, breeds, made.first)
    }


def two_zips(root: Path, dogs: list[Dog], prefixes: tuple[str, str], method: int) -> Path:
    loose = as_flat(root.parent / f"loose {root.name}", dogs, "p", "a")
    root.mkdir(parents=True, exist_ok=True)
    zip_folder(loose / "p", root / "all-dogs.zip", prefixes[0], method)
    zip_folder(loose / "a", root / "Annotation.zip", prefixes[1], method)
    return root


def two_tars(root: Path, dogs: list[Dog], prefixes: tuple[str, str]) -> Path:
    loose = as_folders(root.parent / f"loose {root.name}", dogs)
    root.mkdir(parents=True, exist_ok=True)
    tar_folder(loose / "Images", root / "images.tar", prefixes[0])
    tar_folder(loose / "Annotation", root / "annotation.tar", prefixes[1])
    return root


def folders_and_tar(root: Path, dogs: list[Dog]) -> Path:
    as_folders(root, dogs)
    tar_folder(root / "Annotation", root / "annotation.tar", "Annotation/")
    (root / "Annotation").rename(root.parent / "elsewhere")
    return root


STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
LAYOUTS: dict[str, Callable[[Path, list[Dog]], Path]] = {
    "kaggle nested": lambda r, d: as_flat(r, d, "all-dogs/all-dogs", "annotation/Annotation"),
    "kaggle flat": lambda r, d: as_flat(r, d, "all-dogs", "Annotation"),
    "kaggle mixed": lambda r, d: as_flat(r, d, "all-dogs/all-dogs", "Annotation"),
    "zips with folders": lambda r, d: two_zips(r, d, ("all-dogs/", "Annotation/"), STORED),
    "zips doubled": lambda r, d: two_zips(
        r, d, ("all-dogs/all-dogs/", "annotation/Annotation/"), DEFLATED
    ),
    "zips bare": lambda r, d: two_zips(r, d, ("", ""), DEFLATED),
    "tars": lambda r, d: two_tars(r, d, ("Images/", "Annotation/")),
    "tars from here": lambda r, d: two_tars(r, d, ("./Images/", "./Annotation/")),
    "folders and tar": folders_and_tar,
    "one level down": lambda r, d: as_folders(r / "stanford dogs", d).parent,
}


@pytest.fixture(scope="module")
def dogs() -> list[Dog]:
    return make_dogs(20)


@pytest.fixture(scope="module")
def expected(dogs, tmp_path_factory) -> dict[str, tuple[str, bytes]]:
    """What the plain folders give, the other layouts' oracle."""
    return crops_by_name(as_folders(tmp_path_factory.mktemp("folders"), dogs))


@pytest.fixture
def no_mounts(tmp_path, monkeypatch) -> Path:
    """This process sees an empty /kaggle/input, no data/ here, and none beside the program.

    Returns the folder that stands for /kaggle/input.
    """
    mounts, below = tmp_path / "kaggle/input", train_dogs.places_below
    mounts.mkdir(parents=True)

    def redirected(folder: Path, levels: int) -> object:
        if Path(folder) == Path("/kaggle/input"):
            assert levels == 4
            folder = mounts
        return below(folder, levels)

    monkeypatch.setattr(train_dogs, "places_below", redirected)
    (tmp_path / "here").mkdir()
    (tmp_path / "program").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(train_dogs, "__file__", str(tmp_path / "program/train_dogs.py"))
    return mounts


# ---------------------------------------------------------------------------------- layouts


def test_folders_give_each_dog_its_breed_and_its_pixels(dogs, expected):
    assert {name: breed for name, (breed, _) in expected.items()} == {
        f"{d.breed}/{d.stem}.jpg": d.breed for d in dogs
    }
    assert len({pixels for _, pixels in expected.values()}) == len(dogs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_breeds_and_pixels(layout, dogs, expected, tmp_path):
    root = LAYOUTS[layout](tmp_path / "set", dogs)
    assert crops_by_name(root) == expected


@pytest.mark.parametrize("layout", ["zips doubled", "tars", "kaggle flat"])
def test_sets_are_read_in_place_and_left_as_they_are(layout, dogs, tmp_path, monkeypatch):
    cache, work, data = tmp_path / "cache", tmp_path / "work", tmp_path / "data"
    work.mkdir()
    data.mkdir()
    root = LAYOUTS[layout](data / "set", dogs)
    monkeypatch.chdir(work)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("TMPDIR", str(work))
    if os.geteuid() != 0:
        for path in [*root.rglob("*"), root]:
            path.chmod(0o555 if path.is_dir() else 0o444)
    before = dog_sets.snapshot(data)
    try:
        made = prepare_crops(find_photos([root]), "square,head", show=False)
        assert len(made.first) == len(dogs)
        assert dog_sets.snapshot(data) == before
    finally:
        for path in [root, *root.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)
    assert list(work.iterdir()) == []
    kept = [path for path in cache.rglob("*") if path.is_file()]
    pictures = sum(path.stat().st_size for path in kept if path.suffix in {".jpg", ".zip", ".tar"})
    assert kept and pictures == 0


def test_the_zip_keeps_its_breeds_from_the_annotations_folder(dogs, tmp_path):
    root = LAYOUTS["zips with folders"](tmp_path / "set", dogs)
    breeds = Counter(photo.breed for photo in find_photos([root]).photos)
    assert breeds == Counter(dog.breed for dog in dogs)


def test_the_two_archives_may_be_named_one_by_one(dogs, expected, tmp_path):
    for layout, names in (
        ("tars", ("images.tar", "annotation.tar")),
        ("zips with folders", ("Annotation.zip", "all-dogs.zip")),
    ):
        root = LAYOUTS[layout](tmp_path / layout, dogs)
        found = find_photos([root / name for name in names])
        assert {photo.name for photo in found.photos} == set(expected)
        assert found.annotated and found.skipped == []


def test_the_order_of_photos_does_not_depend_on_the_order_on_disk(dogs, tmp_path):
    a = find_photos([as_folders(tmp_path / "a", dogs)])
    b = find_photos([as_folders(tmp_path / "b", dogs[::-1])])
    assert [p.name for p in a.photos] == [p.name for p in b.photos]


def test_annotations_named_xml_are_matched(dogs, tmp_path):
    root = as_folders(tmp_path / "set", dogs)
    for _, path in dog_sets.files_of(root / "Annotation"):
        path.rename(path.with_name(path.name + ".xml"))
    found = find_photos([root])
    assert len(found.photos) == len(dogs) and found.skipped == []


def test_the_real_photos_are_all_found(real_dogs):
    found = find_photos([real_dogs])
    assert len(found.photos) == len(list(real_dogs.glob("Images/*/*.jpg")))
    assert len({p.breed for p in found.photos}) == len(list((real_dogs / "Images").iterdir()))
    assert found.skipped == [] and found.annotated


# ------------------------------------------------------------------------- where is looked


@pytest.mark.parametrize(
    "mount",
    [
        "generative-dog-images",
        "competitions/generative-dog-images",
        "datasets/somebody/dogs",
        "datasets/somebody/dogs/versions",
    ],
)
@pytest.mark.parametrize("layout", ["kaggle nested", "zips with folders"])
def test_kaggle_mounts_are_found_down_to_depth_4(mount, layout, dogs, no_mounts, tmp_path):
    (no_mounts / mount).parent.mkdir(parents=True, exist_ok=True)
    LAYOUTS[layout](tmp_path / "made", dogs).rename(no_mounts / mount)
    found = find_photos()
    assert len(found.photos) == len(dogs)
    assert str(no_mounts / mount) in found.where


def test_kaggle_mounts_below_depth_4_are_not_searched(dogs, no_mounts):
    as_folders(no_mounts / "1/2/3/4/5", dogs)
    with pytest.raises(UserError, match="no dogs found"):
        find_photos()


def test_the_search_stops_at_the_shallowest_and_then_the_first_by_name(dogs, no_mounts):
    as_folders(no_mounts / "a/deeper/still", dogs[:17])
    as_folders(no_mounts / "c", dogs[:18])
    as_folders(no_mounts / "b", dogs)
    found = find_photos()
    assert len(found.photos) == len(dogs) and str(no_mounts / "b") in found.where


def test_data_beats_the_mount_and_the_mount_beats_the_folder_here(dogs, no_mounts, tmp_path):
    here = as_folders(Path("data"), dogs[:17])
    assert len(find_photos().photos) == 17
    as_folders(no_mounts / "slug", dogs[:18])
    assert len(find_photos().photos) == 18
    given = as_folders(tmp_path / "given", dogs[:19])
    assert len(find_photos([given]).photos) == 19
    assert len(find_photos([str(here)]).photos) == 17


@pytest.mark.parametrize("layout", ["tars", "zips with folders", "kaggle flat"])
def test_data_here_or_beside_the_program_is_found(layout, dogs, no_mounts, tmp_path):
    LAYOUTS[layout](tmp_path / "program/data", dogs)
    assert len(find_photos().photos) == len(dogs)
    as_folders(tmp_path / "here/data", dogs[:17])
    assert len(find_photos().photos) == 17


def test_in_a_notebook_cell_without_a_file_data_here_is_found(dogs, no_mounts, monkeypatch):
    monkeypatch.delattr(train_dogs, "__file__")
    with pytest.raises(UserError, match="no dogs found"):
        find_photos()
    as_folders(Path("data"), dogs)
    assert len(find_photos().photos) == len(dogs)


def test_no_dogs_ends_with_2_and_names_both_remedies(no_mounts, capsys):
    assert train_dogs.main(["--device", "cpu", "--out", "out"]) == 2
    said = capsys.readouterr().err
    assert "data/download.py" in said and "--data data/sample" in said
    assert len(said.strip().splitlines()) == 1


def test_drawn_dogs_are_used_only_when_named(no_mounts, sample_dogs, tmp_path):
    for place in (Path("data"), tmp_path / "program/data"):
        place.mkdir()
        (place / "sample").symlink_to(sample_dogs, target_is_directory=True)
    with pytest.raises(UserError, match="data/sample"):
        find_photos()
    assert len(find_photos(["data/sample"]).photos) == 120


def test_drawn_dogs_are_not_found_in_the_project_mounted_on_kaggle(no_mounts, sample_dogs):
    (no_mounts / "train-dogs/data").mkdir(parents=True)
    (no_mounts / "train-dogs/data/sample").symlink_to(sample_dogs, target_is_directory=True)
    with pytest.raises(UserError, match="no dogs found"):
        find_photos()


def test_drawn_dogs_are_not_found_by_naming_the_folder_that_holds_data(no_mounts, sample_dogs):
    Path("data").mkdir()
    Path("data/sample").symlink_to(sample_dogs, target_is_directory=True)
    with pytest.raises(UserError):
        prepare_crops(find_photos(["data"]), "square", show=False)


# --------------------------------------------------------- pictures without annotations


def plain(root: Path, count: int = 20, first: int = 0) -> Path:
    for k in range(first, first + count):
        dog_sets.write(root / f"{'sub/' if k % 2 else ''}{k}.jpg", make_dog(k).picture)
    return root


def test_a_folder_without_annotations_is_one_class_of_whole_pictures_and_said(tmp_path, capsys):
    root = plain(tmp_path / "dogs")
    (root / "notes.txt").write_text("no dog")
    found = find_photos([root])
    assert {p.breed for p in found.photos} and len({p.breed for p in found.photos}) == 1
    assert re.search("(no|without) annotations", found.where)
    made = prepare_crops(found, "square:3,head", show=False)
    assert made.weights.tolist() == [1.0] and len(made.breeds) == 1
    for photo, (first,) in zip(found.photos, made.first.tolist()):
        whole = Image.open(io.BytesIO(photo.read())).convert("RGB")
        squashed = np.asarray(whole.resize((64, 64), Image.Resampling.LANCZOS), np.int16)
        assert np.abs(squashed - made.crops[first].numpy()).max() <= 1
    small = ["--width", "1", "--latent-dim", "4", "--images", "4", "--batch-size", "4"]
    assert train_dogs.main(["--data", str(root), "--dry-run", "--device", "cpu", *small]) == 0
    assert re.search("(no|without) annotations", capsys.readouterr().out)


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_an_archive_of_plain_pictures_is_one_class_too(kind, tmp_path):
    root = plain(tmp_path / "dogs")
    archive = tmp_path / f"dogs.{kind}"
    zip_folder(root, archive, "x/") if kind == "zip" else tar_folder(root, archive, "x/")
    a, b = (prepare_crops(find_photos([p]), "square", show=False) for p in (root, archive))
    assert len(b.breeds) == 1
    assert a.crops.numpy().tobytes() == b.crops.numpy().tobytes()


def test_one_breeds_folder_of_pictures_may_be_given_alone(dogs, tmp_path):
    root = as_folders(tmp_path / "set", dogs)
    assert len(find_photos([root / "Images"]).photos) == len(dogs)
    with pytest.raises(UserError, match="16"):  # 7 dogs of that breed
        prepare_crops(find_photos([root / "Images" / dogs[0].breed]), "square", show=False)


# ------------------------------------------------------------------- more than one --data


def test_several_data_are_joined(dogs, tmp_path):
    a = as_folders(tmp_path / "a", dogs[:9])
    b = LAYOUTS["zips bare"](tmp_path / "b", dogs[9:])
    found = find_photos([a, b])
    assert {p.name for p in found.photos} == {f"{d.breed}/{d.stem}.jpg" for d in dogs}
    assert str(a) in found.where and str(b) in found.where


def test_the_same_photo_in_two_sets_is_used_once_and_counted(dogs, tmp_path):
    a, b = as_folders(tmp_path / "a", dogs), as_folders(tmp_path / "b", dogs[:1])
    found = find_photos([a, b])
    assert len(found.photos) == len(dogs)
    assert [reason for _, reason in found.skipped] == ["duplicate name"]


def test_different_plain_folders_may_use_the_same_names(tmp_path):
    a, b = plain(tmp_path / "a/dogs", 16), tmp_path / "b/dogs"
    for k in range(16):
        (b / "sub").mkdir(parents=True, exist_ok=True)
        (b / f"{'sub/' if k % 2 else ''}{k}.jpg").write_bytes(make_dog(100 + k).picture)
    made = prepare_crops(find_photos([a, b]), "whole", show=False)
    assert len(made.first) == 32 and made.skipped == []


def test_sets_with_and_without_annotations_do_not_mix(dogs, tmp_path):
    a, b = as_folders(tmp_path / "a", dogs), plain(tmp_path / "b")
    with pytest.raises(UserError, match="annotation"):
        prepare_crops(find_photos([a, b]), "square", show=False)


def test_a_path_that_is_not_there_ends_with_2(tmp_path, capsys):
    out = ["--out", str(tmp_path / "out"), "--device", "cpu"]
    assert train_dogs.main(["--data", str(tmp_path / "nowhere"), *out]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_a_folder_without_pictures_ends_with_2(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("no dog")
    (tmp_path / "Images").mkdir()
    (tmp_path / "Annotation").mkdir()
    out = ["--out", str(tmp_path / "out"), "--device", "cpu"]
    for given in (tmp_path, tmp_path / "Images"):
        assert train_dogs.main(["--data", str(given), *out]) == 2
        assert str(given) in capsys.readouterr().err


# ------------------------------------------------------------- names, links, hidden files

ODD = [
    "a b",
    "naïve-Hund",
    "犬",
    "it's",
    '"quoted"',
    "100%",
    "%s%d",
    "a.b.c",
    "#?&;",
    "-dash",
    "{0}",
]


@pytest.mark.parametrize("layout", ["folders", "kaggle flat", "zips with folders", "tars"])
def test_odd_names_are_read_like_any_other(layout, tmp_path):
    dogs = [make_dog(k) for k in range(2 * len(ODD))]
    dogs = [
        dog._replace(breed=f"n1-{ODD[k % len(ODD)]}", stem=f"{ODD[k // 2]} {k}")
        for k, dog in enumerate(dogs)
    ]
    make = {"folders": as_folders, **LAYOUTS}[layout]
    crops = crops_by_name(make(tmp_path / "odd 100% 犬", dogs))
    assert set(crops) == {f"{d.breed}/{d.stem}.jpg" for d in dogs}
    assert {breed for breed, _ in crops.values()} == {d.breed for d in dogs}


@pytest.mark.skipif(sys.platform != "linux", reason="file names of any bytes exist on Linux alone")
def test_names_that_are_no_text_do_not_stop_a_run(dogs, tmp_path):
    root = as_folders(tmp_path / "set", dogs)
    raw = os.fsencode(root / "Images" / dogs[0].breed) + b"/n1_\xff\xfe.jpg"
    Path(os.fsdecode(raw)).write_bytes(dogs[0].picture)
    made = prepare_crops(find_photos([root]), "square", show=False)
    assert len(made.first) == len(dogs)
    assert [reason for _, reason in made.skipped] == ["picture without annotation"]
    again = prepare_crops(find_photos([root]), "square", show=False)
    assert again.skipped == made.skipped


def test_hidden_and_macos_files_are_passed_over_in_silence(dogs, tmp_path):
    root = as_folders(tmp_path / "set", dogs)
    for name in ("._n1_1.jpg", ".DS_Store", ".ipynb_checkpoints/n1_2.jpg", "__MACOSX/n1_3.jpg"):
        dog_sets.write(root / "Images" / dogs[0].breed / name, dogs[0].picture)
        dog_sets.write(root / "Annotation" / dogs[0].breed / name, b"not xml")
        dog_sets.write(root / "Images/.git/x.jpg", b"")
    found = find_photos([root])
    assert len(found.photos) == len(dogs) and found.skipped == []
    archive = tmp_path / "all.zip"
    zip_folder(root / "Images", archive, "")
    assert len(find_photos([archive]).photos) == len(dogs)


def test_pictures_of_cameras_that_begin_with_an_underscore_are_kept(tmp_path):
    root = tmp_path / "dogs"
    for k in range(16):
        dog_sets.write(root / f"_roll{k % 2}/_DSC{k:04d}.JPG", make_dog(k).picture)
    assert len(find_photos([root]).photos) == 16


def test_a_hidden_or_macos_folder_is_never_taken_for_the_set(dogs, no_mounts):
    as_folders(no_mounts / ".trash", dogs[:16])
    as_folders(no_mounts / "__MACOSX", dogs[:17])
    as_folders(no_mounts / "dogs", dogs)
    assert len(find_photos().photos) == len(dogs)


def test_links_to_folders_are_followed(dogs, tmp_path):
    real, root = as_folders(tmp_path / "real", dogs), tmp_path / "set"
    root.mkdir()
    (root / "Images").symlink_to(real / "Images", target_is_directory=True)
    (root / "Annotation").mkdir()
    for breed in (real / "Annotation").iterdir():
        (root / "Annotation" / breed.name).symlink_to(breed, target_is_directory=True)
    (root / "Images" / dogs[0].breed / "gone.jpg").symlink_to(tmp_path / "gone")
    found = find_photos([root])
    assert len(found.photos) == len(dogs)


def test_a_link_to_its_own_parent_does_not_multiply_the_dogs(dogs, tmp_path):
    root = plain(tmp_path / "dogs")
    (root / "again").symlink_to(root, target_is_directory=True)
    assert len(find_photos([root]).photos) == 20
    annotated = as_folders(tmp_path / "set", dogs)
    for half in ("Images", "Annotation"):
        (annotated / half / "again").symlink_to(annotated / half, target_is_directory=True)
    found = find_photos([annotated])
    assert len(found.photos) == len(dogs) and found.skipped == []


def test_a_pair_apart_is_matched_by_name_and_two_candidates_are_refused(tmp_path):
    dogs = make_dogs(20)
    root = as_flat(tmp_path / "set", dogs, "all-dogs", "Annotation")
    twin = root / "Annotation" / dogs[1].breed / dogs[0].stem
    dog_sets.write(twin, dogs[0].annotation)
    found = find_photos([root])
    assert len(found.photos) == 19
    reasons = Counter(reason for _, reason in found.skipped)
    assert reasons["several annotations"] == 1 and dogs[0].stem in str(found.skipped)


def test_a_zip_that_holds_a_name_twice_gives_that_photo_once(dogs, tmp_path):
    root = LAYOUTS["zips with folders"](tmp_path / "set", dogs)
    with zipfile.ZipFile(root / "all-dogs.zip", "a") as archive, pytest.warns(UserWarning):
        archive.writestr(f"all-dogs/{dogs[0].stem}.jpg", dogs[0].picture)
    found = find_photos([root])
    assert len(found.photos) == len(dogs)
    assert [reason for _, reason in found.skipped] == ["duplicate name"]


def test_one_half_missing_is_counted_by_reason(dogs, tmp_path):
    lonely = [dogs[0]._replace(annotation=None), dogs[1]._replace(picture=None), *dogs[2:]]
    found = find_photos([as_folders(tmp_path / "set", lonely)])
    assert len(found.photos) == 18
    assert {(Path(name).stem, reason) for name, reason in found.skipped} == {
        (dogs[0].stem, "picture without annotation"),
        (dogs[1].stem, "annotation without picture"),
    }


# ------------------------------------------------------------------- archives gone wrong


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "empty":
        data.clear()
    elif how == "text":
        data[:] = b"<html>404 not found</html>" * 99
    elif how == "cut":
        del data[len(data) // 2 :]
    elif how == "directory":  # a zip's list of members, a tar's first header
        at = data.find(b"PK\x01\x02") if path.suffix == ".zip" else 0
        data[at : at + 46] = b"\xff" * 46
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["empty", "text", "cut", "directory"])
@pytest.mark.parametrize("layout", ["zips with folders", "tars"])
def test_a_damaged_archive_ends_with_2_and_names_it(layout, how, dogs, tmp_path, capsys):
    root = LAYOUTS[layout](tmp_path / "set", dogs)
    broken = next(p for p in root.iterdir() if p.stem in ("all-dogs", "images"))
    damage(broken, how)
    assert train_dogs.main(["--data", str(root), "--device", "cpu", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert broken.name in said and len(said.strip().splitlines()) == 1


def test_a_compressed_tar_is_refused_in_a_sentence(dogs, tmp_path):
    root = plain(tmp_path / "dogs")
    tar_folder(root, tmp_path / "dogs.tar.gz", "dogs/", "w:gz")
    with pytest.raises(UserError, match="uncompressed"):
        find_photos([tmp_path / "dogs.tar.gz"])


def test_damaged_members_of_a_deflated_zip_are_counted_not_fatal(tmp_path):
    dogs = make_dogs(60)
    root = LAYOUTS["zips bare"](tmp_path / "set", dogs)
    path = root / "all-dogs.zip"
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()[:3]
    for member, fill in zip(members, (b"\xff", b"\x00", b"\x55")):
        start = member.header_offset + 30 + len(member.filename)
        data[start : start + 400] = fill * 400
    path.write_bytes(data)
    made = prepare_crops(find_photos([root]), "square", show=False)
    assert len(made.first) == 57 and len(made.skipped) == 3


def test_an_encrypted_zip_ends_with_2(dogs, tmp_path, capsys):
    root = LAYOUTS["zips bare"](tmp_path / "set", dogs)
    path = root / "all-dogs.zip"
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        offsets = [member.header_offset for member in archive.infolist()]
    for at in offsets:  # the flag that says so, in both places where a zip keeps it
        data[at + 6] |= 1
    at = -1
    while (at := data.find(b"PK\x01\x02", at + 1)) >= 0:
        data[at + 8] |= 1
    path.write_bytes(data)
    assert train_dogs.main(["--data", str(root), "--device", "cpu", "--out", str(tmp_path)]) == 2
    assert "20" in capsys.readouterr().err


def test_oversized_members_are_counted_without_being_read(tmp_path):
    dogs = make_dogs(60)
    big = 70 << 20
    zipped = LAYOUTS["zips bare"](tmp_path / "zip", dogs)
    path = zipped / "all-dogs.zip"
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, data.find(b"PK\x01\x02") + 24, big)  # size when unpacked
    path.write_bytes(data)
    tarred = LAYOUTS["tars"](tmp_path / "tar", dogs)
    with tarfile.open(tarred / "images.tar", "a") as archive:
        end = archive.offset  # before the empty blocks that mark it
    with open(tarred / "images.tar", "r+b") as file:  # a hole in the file takes no room on disk
        member = tarfile.TarInfo(f"Images/{dogs[0].breed}/zzz.jpg")
        member.size = big
        file.seek(end)
        file.write(member.tobuf())
        file.truncate(end + 512 + big + 1024)
    dog_sets.write(tmp_path / "more" / dogs[0].breed / "zzz", dogs[0].annotation)
    with tarfile.open(tarred / "annotation.tar", "a") as archive:
        archive.add(tmp_path / "more", "Annotation")
    loose = as_folders(tmp_path / "loose", dogs)
    os.truncate(loose / "Images" / dogs[0].breed / (dogs[0].stem + ".jpg"), big)
    for root, left in ((zipped, 59), (tarred, 60), (loose, 59)):
        made = prepare_crops(find_photos([root]), "square", show=False)
        assert len(made.first) == left
        assert [reason for _, reason in made.skipped] == ["file larger than 64 MB"]
