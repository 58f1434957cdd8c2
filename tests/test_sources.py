"""Pictures in MNIST's format, and dogs that are in the data twice."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from runs import SAMPLE, assert_one_sentence, run_here

import train_dogs
from train_dogs import find_photos, near_duplicates, prepare_crops

PLACES = ("/usr/share/datasets/fashion-mnist", f"{os.environ.get('DOGS_DATA', '')}/fashion-mnist")


def idx(array: np.ndarray, claimed: tuple[int, ...] | None = None, kind: int = 8) -> bytes:
    """An array as the format's description says: a magic number, the shape, the bytes."""
    head = struct.pack(">BBBB", 0, 0, kind, array.ndim)
    return head + struct.pack(f">{array.ndim}I", *(claimed or array.shape)) + array.tobytes()


@pytest.fixture
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Twenty grey pictures of 28 x 28 and their labels, 0 to 3."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (20, 28, 28), dtype=np.uint8), np.arange(20, dtype=np.uint8) % 4


# ----------------------------------------------------------------------------------- IDX files


@pytest.mark.parametrize("end", ["", ".gz"])
def test_labels_of_idx_pictures_are_their_classes(digits, end, tmp_path):
    pack = gzip.compress if end else bytes
    for name, array in zip(("train-images-idx3-ubyte", "train-labels-idx1-ubyte"), digits):
        (tmp_path / (name + end)).write_bytes(pack(idx(array)))
    found = find_photos([tmp_path / f"train-images-idx3-ubyte{end}"])
    crops, order = prepare_crops(found, "square", show=False), np.argsort(digits[1], kind="stable")
    assert crops.breeds == ["0", "1", "2", "3"] and crops.breed.tolist() == [*digits[1][order]]
    for crop, digit in zip(crops.pixels.numpy(), digits[0][order], strict=True):
        scaled = Image.fromarray(digit).convert("RGB").resize((64, 64), Image.Resampling.LANCZOS)
        assert (crop == np.asarray(scaled)).all()


def test_of_a_folder_the_pictures_to_train_on_are_taken(digits, tmp_path):
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(digits[0]))
    assert len(find_photos([tmp_path]).photos) == 20
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(digits[0][:17]))
    found = find_photos([tmp_path])
    assert len(found.photos) == 17 and {photo.breed for photo in found.photos} == {"dog"}
    assert "train-images" in found.where and "one class" in found.where


def test_broken_idx_files_are_one_sentence(digits, tmp_path):
    place = tmp_path / "train-images-idx3-ubyte"
    whole = idx(digits[0])
    broken = {
        "short": whole[:-1], "empty": b"", "head": whole[:9],
        "claims": idx(digits[0], (2**32 - 1, 2**32 - 1, 28)), "long": whole + b"more",
        "floats": idx(digits[0], kind=13), "labels": idx(digits[1]),
    }  # fmt: skip
    for data in broken.values():
        place.write_bytes(data)
        with pytest.raises(train_dogs.UserError, match="IDX file"):
            find_photos([place])
    place.with_name(place.name + ".gz").write_bytes(gzip.compress(whole)[:-9])
    with pytest.raises(train_dogs.UserError, match="IDX file"):
        find_photos([place.with_name(place.name + ".gz")])
    place.write_bytes(whole)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(digits[1][:19]))
    with pytest.raises(train_dogs.UserError, match="20 pictures, but 19 labels"):
        find_photos([place])


def test_labels_added_later_and_other_pixels_of_the_same_time_are_seen(digits, tmp_path):
    place = tmp_path / "train-images-idx3-ubyte"
    place.write_bytes(idx(digits[0]))
    stat = place.stat()
    first = prepare_crops(find_photos([place]), "square", show=False)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(digits[1]))
    labelled = prepare_crops(find_photos([place]), "square", show=False)
    assert first.breeds == ["dog"] and len(labelled.breeds) > 1
    place.write_bytes(idx(255 - digits[0]))
    os.utime(place, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other = prepare_crops(find_photos([place]), "square", show=False)
    assert not torch.equal(first.pixels, other.pixels)


def test_breeds_cannot_be_told_apart_where_there_is_one(tmp_path, capsys):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(np.zeros((20, 28, 28), np.uint8)))
    for condition in ("breed", "classes"):
        flags = {"condition": condition, "classify": 1, "data": tmp_path}
        assert run_here(tmp_path / "out", **flags) == 2
        last = capsys.readouterr().err.splitlines()[-1]  # after the bar of cropping
        assert_one_sentence(last, "several breeds", f"--condition {condition}")


def test_a_preset_that_uses_breeds_trains_without_where_there_is_one(tmp_path, capsys):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(np.zeros((20, 28, 28), np.uint8)))
    flags = {"preset": "improved", "data": tmp_path, "images": 3, "batch_size": 4}
    flags |= {"minibatch_features": 0, "g_norm": "batch"}  # for speed alone
    for steps in (1, 2):  # started and resumed
        assert run_here(tmp_path / "out", steps=steps, **flags) == 0
    said = capsys.readouterr().out
    assert "one breed: without the preset's --condition" in said and "resumed at step 1" in said
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert (written["condition"], written["classify"]) == ("none", 0.0)
    assert run_here(tmp_path / "out", "--dry-run", **flags) == 0
    assert '"condition": "none"' in capsys.readouterr().out
    assert run_here(tmp_path / "out", "--fresh", labelled=0.5, steps=1, **flags) == 2


def test_digits_are_not_mirrored_by_the_preset(digits, tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(digits[0]))
    crops = prepare_crops(find_photos([tmp_path]), "square", show=False)
    share = train_dogs.parse(["--preset", "mnist"]).config.mirror
    batches = train_dogs.Batches(
        crops, train_dogs.Config(batch_size=20, latent_dim=1, mirror=share), torch.Generator()
    )
    reals = batches.draw()[0]
    plain = crops.pixels.permute(0, 3, 1, 2).float().div(127.5).sub(1)
    assert share == 0 and torch.equal(reals, plain)


@pytest.mark.skipif(
    not any(Path(place).is_dir() for place in PLACES),
    reason="Fashion-MNIST is not here: install Debian's dataset-fashion-mnist",
)
def test_the_real_fashion_mnist_is_found_with_its_ten_classes():
    found = find_photos([next(place for place in PLACES if Path(place).is_dir())])
    assert len(found.photos) == 60_000
    assert sorted({photo.breed for photo in found.photos}) == [str(k) for k in range(10)]


# ----------------------------------------------------------------------------------- duplicates


@pytest.fixture(scope="module")
def views(own_cache: Path) -> list[np.ndarray]:
    """A crop of each drawn dog."""
    return list(prepare_crops(find_photos([SAMPLE]), "square", show=False).pixels.numpy())


def changed(view: np.ndarray, how: str) -> np.ndarray:
    """A copy of a crop, as copies in the wild are."""
    picture = Image.fromarray(view)
    if how == "recoded":
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=60)
        picture = Image.open(buffer)
    elif how == "scaled":
        picture = picture.resize((40, 40)).resize((64, 64))
    elif how == "mirrored":
        picture = ImageOps.mirror(picture)
    elif how == "grey":
        picture = picture.convert("L").convert("RGB")
    elif how == "brighter":
        picture = picture.point(lambda level: min(255, level * 0.8 + 40))
    elif how == "cut":  # other edges, by a sixteenth
        picture = picture.crop((4, 4, 64, 64)).resize((64, 64))
    return np.asarray(picture)


@pytest.mark.parametrize("how", ["recoded", "scaled", "mirrored", "grey", "brighter"])
def test_a_changed_copy_is_found(views, how):
    copies = [changed(view, how) for view in views[:10]]
    before = near_duplicates(views, 0.97)
    found = near_duplicates([*views, *copies], 0.97)
    first = {k: before.get(k, k) for k in range(10)}  # of the drawn dogs some are alike
    assert {k: found[len(views) + k] for k in range(10)} == first


def test_another_cut_of_a_photo_stays_and_at_a_cosine_of_1_all_do(views):
    assert near_duplicates([views[0], changed(views[0], "cut")], 0.97) == {}
    assert near_duplicates([*views[:20], *views[:20]], 1.0) == {}


def test_near_duplicates_are_those_of_a_plain_loop(views):
    def thumbnail(view: np.ndarray) -> np.ndarray:
        small = view.astype(float).mean(2).reshape(16, 4, 16, 4).mean((1, 3))
        return small - small.mean()

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())

    small, repeats = [thumbnail(view) for view in views[:60]], {}
    for k, one in enumerate(small):
        for j, other in enumerate(small[:k]):
            if j not in repeats and max(cosine(one, other), cosine(one, other[:, ::-1])) > 0.8:
                repeats.setdefault(k, j)
    for block in (7, 1024):
        assert near_duplicates(views[:60], 0.8, block) == repeats and len(repeats) > 1


def test_a_run_says_which_dogs_it_left_out_as_near_duplicates(tmp_path):
    (tmp_path / "photos").mkdir()
    for k, file in enumerate(sorted((SAMPLE / "Images").rglob("*.jpg"))[:40]):
        shutil.copy(file, tmp_path / "photos" / f"{k:02d}.jpg")
    ImageOps.mirror(Image.open(tmp_path / "photos" / "07.jpg")).save(tmp_path / "photos" / "99.png")
    found = find_photos([tmp_path / "photos"])
    plain = prepare_crops(found, "whole", show=False)
    fewer = prepare_crops(found, "whole", show=False, dedupe=0.99)
    assert len(plain.first) == 41 and plain.key != fewer.key
    assert ("photos/99.png, of photos/07.jpg", "near-duplicates") in fewer.skipped
    assert len(fewer.first) == 41 - len(fewer.skipped)
    assert train_dogs.count_reasons(fewer.skipped).endswith("near-duplicates")
    again = prepare_crops(found, "whole", show=False, dedupe=0.99)
    assert again.key == fewer.key and len(prepare_crops(found, "whole", show=False).first) == 41
