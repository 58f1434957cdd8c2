"""The zip that the competition takes: names, format, exact levels, same bytes, never half of it."""

import io
import os
import struct
import threading
import zipfile
import zlib
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
    assert write_zip(tmp_path / "images.zip", batches(images)) == len(images)
    return tmp_path / "images.zip"


def decode_png(data: bytes) -> np.ndarray:
    """A PNG by hand, from the specification: chunks, inflate, the five filters; 8-bit RGB only."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, pixels, kinds = 8, b"", []
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length :][:4])[0] == zlib.crc32(kind + body)
        kinds.append(kind)
        if kind == b"IHDR":  # width, height, 8 bits, colour type 2 (RGB), no interlace
            assert struct.unpack(">IIBBBBB", body) == (64, 64, 8, 2, 0, 0, 0)
        pixels += body if kind == b"IDAT" else b""
        at += 12 + length
    assert kinds[0] == b"IHDR" and kinds[-1] == b"IEND" and b"PLTE" not in kinds
    rows = np.frombuffer(zlib.decompress(pixels), np.uint8).reshape(64, 1 + 64 * 3).astype(int)
    above, image = np.zeros((65, 3), int), []
    for kind, *line in rows.tolist():
        row = np.zeros((65, 3), int)  # one pixel of zeros to the left
        for x, raw in enumerate(np.reshape(line, (64, 3)), start=1):
            a, b, c = row[x - 1], above[x], above[x - 1]
            p = a + b - c
            da, db, dc = abs(p - a), abs(p - b), abs(p - c)
            paeth = np.where((da <= db) & (da <= dc), a, np.where(db <= dc, b, c))
            row[x] = (raw + [0, a, b, (a + b) // 2, paeth][kind]) % 256
        image.append(row[1:])
        above = row
    return np.array(image, np.uint8)


# ---------------------------------------------------------------------------------- the zip


def test_names_count_from_00000_at_the_root_and_nothing_else_is_there(written, images):
    with zipfile.ZipFile(written) as archive:
        assert archive.namelist() == [f"{k:05d}.png" for k in range(len(images))]
        assert archive.testzip() is None


def test_each_file_is_an_rgb_png_of_64_by_64_with_8_bits_and_the_exact_pixels(written, images):
    with zipfile.ZipFile(written) as archive:
        for k, name in enumerate(archive.namelist()):
            with Image.open(io.BytesIO(archive.read(name))) as picture:
                assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (64, 64))
                assert (np.asarray(picture) == images[k]).all()
        for k in (0, 128, 299):
            assert (decode_png(archive.read(f"{k:05d}.png")) == images[k]).all()


def test_pngs_are_stored_not_deflated_twice(written):
    with zipfile.ZipFile(written) as archive:
        for member in archive.infolist():
            assert member.compress_type == zipfile.ZIP_STORED
            assert member.file_size == member.compress_size < 64 * 64 * 3
            assert member.create_version <= 20 and not member.flag_bits  # any unzip can read it


def test_the_same_images_give_the_same_bytes_however_they_are_batched(written, images, tmp_path):
    for size in (1, 77, 300):
        write_zip(tmp_path / "again.zip", batches(images, size))
        assert (tmp_path / "again.zip").read_bytes() == written.read_bytes()


def test_nothing_of_the_clock_or_the_machine_is_in_the_zip(written):
    with zipfile.ZipFile(written) as archive:
        assert {member.date_time for member in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert {member.extra for member in archive.infolist()} == {b""}
        assert archive.comment == b""


def test_files_unpacked_can_be_read_by_their_owner_and_others(written):
    with zipfile.ZipFile(written) as archive:
        assert {member.external_attr >> 16 & 0o777 for member in archive.infolist()} == {0o644}


def test_only_the_zip_is_left_and_no_folder_of_loose_files(written):
    assert [path.name for path in written.parent.iterdir()] == ["images.zip"]


def test_while_writing_at_most_one_more_file_exists(images, tmp_path):
    seen = set()

    def watched() -> Iterator[np.ndarray]:
        for batch in batches(images, 50):
            seen.update(path.name for path in tmp_path.iterdir())
            yield batch

    write_zip(tmp_path / "images.zip", watched())
    assert len(seen | {"images.zip"}) <= 2


def test_one_image_and_10000_are_both_counted_right(tmp_path):
    assert write_zip(tmp_path / "one.zip", [pictures(1)]) == 1
    block = np.repeat(pictures(1), 1000, axis=0)
    assert write_zip(tmp_path / "many.zip", [block] * 10) == 10_000
    with zipfile.ZipFile(tmp_path / "many.zip") as archive:
        names = archive.namelist()
    assert (len(names), names[0], names[-1]) == (10_000, "00000.png", "09999.png")


def test_pngs_are_encoded_in_parallel_threads(images, tmp_path, monkeypatch):
    seen, encode = set(), train_dogs.encode_png

    def watched(image: np.ndarray) -> bytes:
        seen.add(threading.get_ident())
        return encode(image)

    monkeypatch.setattr(train_dogs, "encode_png", watched)
    write_zip(tmp_path / "images.zip", batches(images))
    assert threading.get_ident() not in seen
    assert len(seen) > 1 or os.cpu_count() == 1


# -------------------------------------------------------------------------- nothing half-written


class Broken(Exception):
    pass


def breaking(images: np.ndarray) -> Iterator[np.ndarray]:
    yield images[:100]
    yield images[100:200]
    raise Broken


@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt, MemoryError, OSError])
def test_an_error_midway_leaves_the_previous_zip_whole_and_no_other_file(error, written, images):
    before = written.read_bytes()

    def failing() -> Iterator[np.ndarray]:
        yield images[:200]
        raise error

    with pytest.raises(error):
        write_zip(written, failing())
    assert written.read_bytes() == before
    assert [path.name for path in written.parent.iterdir()] == ["images.zip"]


def test_an_error_midway_without_a_previous_zip_leaves_nothing(images, tmp_path):
    with pytest.raises(Broken):
        write_zip(tmp_path / "images.zip", breaking(images))
    assert list(tmp_path.iterdir()) == []


def test_an_image_that_cannot_be_encoded_leaves_nothing_either(images, tmp_path):
    with pytest.raises((TypeError, ValueError)):
        write_zip(tmp_path / "images.zip", [images, images[:1].astype(np.complex64)])
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_midway_leaves_the_previous_zip_whole(written, images, monkeypatch):
    before, write = written.read_bytes(), zipfile.ZipFile.writestr

    def full(archive: zipfile.ZipFile, name: object, data: bytes) -> None:
        if getattr(name, "filename", name) == "00150.png":
            raise OSError(28, "No space left on device")
        write(archive, name, data)

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    with pytest.raises(OSError, match="No space"):
        write_zip(written, batches(images))
    assert written.read_bytes() == before
    assert [path.name for path in written.parent.iterdir()] == ["images.zip"]


def test_a_new_zip_takes_the_place_of_the_old_one_and_of_a_torn_attempt(written, images):
    for path in written.parent.glob("*"):
        path.with_name(f".{path.name}.part").write_bytes(b"torn")
    assert write_zip(written, [images[:5]]) == 5
    with zipfile.ZipFile(written) as archive:
        assert len(archive.namelist()) == 5
    assert [path.name for path in written.parent.iterdir()] == ["images.zip"]


def test_the_folder_is_made_where_there_is_none(images, tmp_path):
    write_zip(tmp_path / "a b" / "ü" / "images.zip", [images[:2]])
    assert zipfile.is_zipfile(tmp_path / "a b" / "ü" / "images.zip")


# ------------------------------------------------------------------------ from tanh to levels


def as_images(values: np.ndarray) -> torch.Tensor:
    """A row of numbers as (1, 3, 1, n) images."""
    return torch.from_numpy(values.astype(np.float32)).reshape(1, 1, 1, -1).repeat(1, 3, 1, 1)


def test_every_level_comes_back_from_its_own_value():
    levels = np.arange(256)
    assert (to_bytes(as_images(levels / 127.5 - 1))[0, 0, :, 0] == levels).all()


def test_levels_are_the_nearest_to_127_5_x_plus_127_5():
    """Against Python's own arithmetic, away from the halves, where either neighbour is right."""
    values = np.random.default_rng(0).uniform(-1, 1, 5000).astype(np.float32)
    exact = [float(x) * 127.5 + 127.5 for x in values]
    for level, value in zip(to_bytes(as_images(values))[0, 0, :, 1].tolist(), exact):
        assert abs(level - value) <= 0.5 + 1e-5


def test_values_beyond_the_range_are_clamped_not_wrapped():
    values = np.array([-1e9, -3, -1.004, -1, 1, 1.004, 1.01, 3, 1e9, -np.inf, np.inf])
    expected = [0, 0, 0, 0, 255, 255, 255, 255, 255, 0, 255]
    assert to_bytes(as_images(values))[0, 0, :, 2].tolist() == expected


def test_channels_and_places_stay_where_they_were():
    images = torch.zeros(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    images[0, 0, 5, 9], images[1, 2, 60, 1] = 1.0, -1.0
    levels = to_bytes(images)
    assert levels.shape == (2, 64, 64, 3) and levels.dtype == np.uint8
    assert levels[0, 5, 9].tolist() == [255, 128, 128]
    assert levels[1, 60, 1].tolist() == [128, 128, 0]
    assert (levels == 128).sum() == levels.size - 2


def test_the_real_crops_survive_the_way_to_the_zip_and_back(sample_dogs, tmp_path):
    """What the networks see of a dog, written as a submission, is the crop itself or its mirror."""
    dogs = train_dogs.prepare_crops(train_dogs.find_photos([sample_dogs]), "square", show=False)
    rows = torch.arange(len(dogs.first))
    batch = train_dogs.draw_reals(dogs, rows, torch.Generator().manual_seed(0))
    write_zip(tmp_path / "images.zip", [to_bytes(batch)])
    with zipfile.ZipFile(tmp_path / "images.zip") as archive:
        for name, crop in zip(archive.namelist(), dogs.crops.numpy(), strict=True):
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


def test_the_sheet_of_reals_is_the_first_a_run_leaves_and_the_animation_shows_the_others(tmp_path):
    sheets = [train_dogs.draw_sheet(pictures(20, seed)) for seed in range(3)]
    train_dogs.save_picture(tmp_path / "samples" / "real.png", sheets[:1])
    with Image.open(tmp_path / "samples" / "real.png") as seen:
        assert (seen.format, seen.mode) == ("PNG", "RGB")
        assert (np.asarray(seen) == np.asarray(sheets[0])).all()
    train_dogs.save_picture(tmp_path / "progress.webp", sheets)
    with Image.open(tmp_path / "progress.webp") as seen:
        assert seen.format == "WEBP" and seen.n_frames == 3
        for k, sheet in enumerate(sheets):
            seen.seek(k)
            frame = np.asarray(seen.convert("RGB"), int)
            assert np.abs(frame - np.asarray(sheet)).mean() < 12


def test_a_sheet_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "progress.webp"
    train_dogs.save_picture(path, [train_dogs.draw_sheet(pictures(4))])
    before = path.read_bytes()
    with pytest.raises((OSError, ValueError, AttributeError, TypeError, IndexError)):
        train_dogs.save_picture(path, [None])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["progress.webp"]
