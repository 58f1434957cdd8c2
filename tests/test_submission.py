"""The zip that the competition takes: names, format, exact levels, same bytes, never half of it."""

import io
import os
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train_dogs
from train_dogs import to_bytes, write_zip


def pictures(count: int, seed: int = 0) -> np.ndarray:
    """Smooth random pictures, uint8 (count, 64, 64, 3)."""
    noise = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(n).resize((64, 64))) for n in noise])


def batches(images: np.ndarray, size: int = 128) -> Iterator[np.ndarray]:
    yield from (images[k : k + size] for k in range(0, len(images), size))


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return pictures(300)


@pytest.fixture
def written(images, tmp_path) -> Path:
    path = tmp_path / "a b" / "ü" / "images.zip"  # a folder that does not exist yet
    write_zip(path, batches(images))
    return path


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


# ---------------------------------------------------------------------------------- the zip


def test_each_file_is_an_rgb_png_of_64_by_64_with_8_bits_and_the_exact_pixels(written, images):
    with zipfile.ZipFile(written) as archive:
        for k, name in enumerate(archive.namelist()):
            with Image.open(io.BytesIO(archive.read(name))) as picture:
                assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (64, 64))
                assert (np.asarray(picture) == images[k]).all()
            header = struct.unpack(">IIBBBBB", archive.read(name)[16:29])
            assert header == (64, 64, 8, 2, 0, 0, 0)  # 8 bits, RGB, not interlaced


def test_members_are_stored_bare_and_readable_with_nothing_of_the_clock_or_machine(written, images):
    with zipfile.ZipFile(written) as archive:
        assert archive.namelist() == [f"{k:05d}.png" for k in range(len(images))]
        assert archive.testzip() is None and archive.comment == b""
        for member in archive.infolist():
            assert member.compress_type == zipfile.ZIP_STORED
            assert member.file_size == member.compress_size < 64 * 64 * 3
            assert member.create_version <= 20 and not member.flag_bits  # any unzip can read it
            assert member.date_time == (1980, 1, 1, 0, 0, 0) and member.extra == b""
            assert member.external_attr >> 16 & 0o777 == 0o644


def test_the_same_images_give_the_same_bytes_however_they_are_batched(written, images, tmp_path):
    for size in (1, 77, 300):
        write_zip(tmp_path / "again.zip", batches(images, size))
        assert (tmp_path / "again.zip").read_bytes() == written.read_bytes()


# -------------------------------------------------------------------------- nothing half-written


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError, OSError])
@pytest.mark.parametrize("before", [b"the previous zip", None])
def test_an_error_midway_leaves_what_was_there_and_no_other_file(error, before, images, tmp_path):
    place = tmp_path / "images.zip"
    if before:
        place.write_bytes(before)

    def failing() -> Iterator[np.ndarray]:
        yield images[:200]
        raise error

    with pytest.raises(error):
        write_zip(place, failing())
    with pytest.raises((TypeError, ValueError)):  # what cannot be encoded
        write_zip(place, [images, images[:1].astype(np.complex64)])
    assert names_in(tmp_path) == (["images.zip"] if before else [])
    assert before is None or place.read_bytes() == before


def test_a_file_is_on_the_disk_before_it_is_renamed_and_its_folder_afterwards(
    images, tmp_path, monkeypatch
):
    done: list[tuple[str, str]] = []
    sync, replace = os.fsync, os.replace

    def synced(number: int) -> None:
        done.append(("sync", Path(f"/proc/self/fd/{number}").resolve().name))
        sync(number)

    def renamed(source: Path, target: Path) -> None:
        done.append(("rename", Path(target).name))
        replace(source, target)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("no /proc here to name an open file")
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    write_zip(tmp_path / "images.zip", [images[:2]])
    (first, part), *others = done
    assert first == "sync" and part.startswith(".images.zip.") and part.endswith(".part")
    assert others == [("rename", "images.zip"), ("sync", tmp_path.name)]


def test_two_writers_of_one_file_do_not_meet_and_the_last_whole_one_stays(images, tmp_path):
    place = tmp_path / "images.zip"

    def disturbed() -> Iterator[np.ndarray]:
        yield images[:3]
        assert len(names_in(tmp_path)) == 1  # the part
        write_zip(place, [images[:5]])
        assert len(zipfile.ZipFile(place).namelist()) == 5
        yield images[3:4]

    write_zip(place, disturbed())
    with zipfile.ZipFile(place) as archive:
        assert archive.testzip() is None and len(archive.namelist()) == 4
    assert names_in(tmp_path) == ["images.zip"]


def test_what_killed_writers_left_is_removed_once_it_is_old_enough(tmp_path):
    names = (".images.zip.7-ab.part", "kept.part", ".kept.zip")
    for name in names:
        (tmp_path / name).write_bytes(b"torn")
    train_dogs.remove_parts(tmp_path, older=60)
    assert sorted(names_in(tmp_path)) == sorted(names)
    train_dogs.remove_parts(tmp_path)
    assert sorted(names_in(tmp_path)) == [".kept.zip", "kept.part"]


# ------------------------------------------------------------------------ from tanh to levels


def as_images(values: np.ndarray) -> torch.Tensor:
    """A row of numbers as (1, 3, 1, n) images."""
    return torch.from_numpy(values.astype(np.float32)).reshape(1, 1, 1, -1).repeat(1, 3, 1, 1)


def test_levels_are_the_nearest_to_127_5_x_plus_127_5():
    """Against Python's own arithmetic, away from the halves, where either neighbour is right."""
    values = np.random.default_rng(0).uniform(-1, 1, 5000).astype(np.float32)
    exact = [float(x) * 127.5 + 127.5 for x in values]
    for level, value in zip(to_bytes(as_images(values))[0, 0, :, 1].tolist(), exact):
        assert abs(level - value) <= 0.5 + 1e-5
    levels = np.arange(256)
    assert (to_bytes(as_images(levels / 127.5 - 1))[0, 0, :, 0] == levels).all()


def test_values_beyond_the_range_are_clamped_not_wrapped():
    values = np.array([-1e9, -3, -1.004, -1, 1, 1.004, 1.01, 3, 1e9, -np.inf, np.inf])
    expected = [0, 0, 0, 0, 255, 255, 255, 255, 255, 0, 255]
    assert to_bytes(as_images(values))[0, 0, :, 2].tolist() == expected


def test_the_real_crops_survive_the_way_to_the_zip_and_back(sample_dogs, tmp_path):
    """What the networks see of a dog, written as a submission, is the crop itself or its mirror."""
    dogs = train_dogs.prepare_crops(train_dogs.find_photos([sample_dogs]), "square", show=False)
    rows = torch.arange(len(dogs.first))
    batch = train_dogs.draw_reals(dogs, rows, torch.Generator().manual_seed(0))
    write_zip(tmp_path / "images.zip", [to_bytes(batch)])
    with zipfile.ZipFile(tmp_path / "images.zip") as archive:
        for name, crop in zip(archive.namelist(), dogs.pixels.numpy(), strict=True):
            seen = np.asarray(Image.open(io.BytesIO(archive.read(name))))
            assert (seen == crop).all() or (seen[:, ::-1] == crop).all()


# ------------------------------------------------------------------------------------ sheets


def test_a_sheet_shows_every_image_once_in_reading_order():
    images = pictures(23, seed=3)
    sheet = np.asarray(train_dogs.draw_sheet(images, columns=10))
    assert sheet.shape[0] < sheet.shape[1] and sheet.shape[2] == 3
    places = []
    for image in images:
        corners = np.argwhere((sheet == image[0, 0]).all(-1)).tolist()
        seen = [(y, x) for y, x in corners if np.array_equal(sheet[y : y + 64, x : x + 64], image)]
        assert len(seen) == 1
        places += seen
    assert places == sorted(places)
    assert len({y for y, _ in places}) == 3 and len({x for _, x in places}) == 10


# ---------------------------------------------------------------------------- seeds and reserves


def test_what_is_drawn_of_one_seed_is_drawn_of_its_own_part_of_it(tmp_path, monkeypatch):
    used = []

    def spy(seed: int, use: str) -> int:
        used.append(use)
        return seed

    monkeypatch.setattr(train_dogs, "seed_for", spy)
    G = train_dogs.BreedGenerator(4, 1, "paper", breeds=3).eval()
    config = train_dogs.Config(latent_dim=4, images=2, out=str(tmp_path))
    for draw, uses in (
        (lambda: train_dogs.draw_labels(G, 3, 0), ["breeds"]),
        (lambda: train_dogs.estimate_norms(G, 1, config), ["norms", "breeds"]),
        (lambda: train_dogs.sheet_images(G, config), ["sheet", "breeds"]),
        (lambda: train_dogs.write_images(G, config), ["submission", "breeds"]),
    ):
        used.clear()
        draw()
        assert used == uses
