"""Every kind of bad input: read right where it can be, else left out, counted and logged."""

import io
import json
import random
import re
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import dog_sets
import numpy as np
import pytest
from dog_sets import BOX, SIZE, Dog, annotate, as_folders, encode, make_dog, make_dogs, paint
from dog_sets import photo_of as photo
from PIL import Image, PngImagePlugin

import train_dogs
from train_dogs import BadItem, UserError, find_photos, prepare_crops

LEFT, RIGHT = (200, 30, 40), (20, 60, 190)
SMALL = ["--device", "cpu", "--width", "1", "--latent-dim", "4", "--images", "4", "--steps", "1"]
ONE_BOX = annotate([BOX])


def halves() -> Image.Image:
    """Red on the left, blue on the right."""
    picture = Image.new("RGB", SIZE, LEFT)
    picture.paste(RIGHT, (SIZE[0] // 2, 0, *SIZE))
    return picture


def crop(picture: bytes, annotation: bytes | None = ONE_BOX, kind: str = "box") -> np.ndarray:
    """The first crop of the first dog of a photo, int16 (64, 64, 3)."""
    dogs, _ = train_dogs.crop_photo(photo(picture, annotation), [kind])
    assert dogs[0][0].shape[1:] == (64, 64, 3) and dogs[0][0].dtype == np.uint8
    return dogs[0][0][0].astype(np.int16)


def prepare(root: Path) -> train_dogs.CropSet:
    return prepare_crops(find_photos([root]), "square", show=False)


# ------------------------------------------- what is odd but can be read: the content is right


def translucent(mode: str) -> bytes:
    """Red and blue; the lower half fully transparent, over a black that must not show."""
    picture = halves().convert("RGBA")
    picture.paste((0, 0, 0, 0), (0, SIZE[1] // 2, *SIZE))
    if mode == "P":  # the palette's last colour is the transparent one
        solid = Image.new("P", SIZE, 0)
        solid.putpalette([*LEFT, *RIGHT, 0, 0, 0])
        solid.paste(1, (SIZE[0] // 2, 0, *SIZE))
        solid.paste(2, (0, SIZE[1] // 2, *SIZE))
        return encode(solid, "PNG", transparency=2)
    return encode(picture.convert(mode), "PNG")


def grey16(form: str) -> bytes:
    levels = np.asarray(halves().convert("L")).astype(np.uint16) * 257
    return encode(Image.fromarray(levels), form)


COLOURED = {
    **{f"a {form} named .jpg": lambda form=form: encode(halves(), form, quality=95)
       for form in ("PNG", "WEBP", "BMP", "TIFF")},
    "a GIF named .jpg": lambda: encode(halves().quantize(8), "GIF"),
    "palette": lambda: encode(halves().quantize(8), "PNG"),
    "CMYK JPEG": lambda: encode(halves().convert("CMYK")),
    "progressive JPEG": lambda: encode(halves(), progressive=True),
    "two pictures in one JPEG": lambda: encode(
        halves(), "MPO", save_all=True, append_images=[halves()], quality=95),
    "JPEG with bytes after its end": lambda: encode(halves()) + b"\0" * 999,
    "RGBA": lambda: translucent("RGBA"),
    "palette with transparency": lambda: translucent("P"),
}  # fmt: skip
GREY = {
    "grey JPEG": lambda: encode(halves().convert("L")),
    "16-bit grey PNG": lambda: grey16("PNG"),
    "16-bit grey TIFF": lambda: grey16("TIFF"),
    "grey with transparency": lambda: translucent("LA"),
}


@pytest.mark.parametrize("name", [*COLOURED, *GREY])
def test_odd_encodings_keep_their_colours_and_transparency_is_laid_on_white(name):
    seen = crop((COLOURED | GREY)[name]())
    left, right = LEFT, RIGHT
    if name in GREY:  # ITU-R 601
        left, right = (0.299 * r + 0.587 * g + 0.114 * b for r, g, b in (LEFT, RIGHT))
    clear = "transparency" in name or name == "RGBA"
    rows = slice(4, 26 if clear else 60)
    assert np.abs(seen[rows, 4:26] - left).max() < 12
    assert np.abs(seen[rows, 38:60] - right).max() < 12
    assert not clear or seen[40:60].min() > 245


@pytest.mark.parametrize("suffix", [".JPG", ".jpeg", ".png", ".Webp", ".tiff"])
def test_suffixes_of_any_case_are_pictures(suffix, tmp_path):
    made = prepare(as_folders(tmp_path, [*make_dogs(16), make_dog(99, suffix=suffix)]))
    assert len(made.first) == 17 and made.skipped == []


# --------------------------------------------------------------------------- EXIF rotation

TURNED = (480, 320)  # large enough that a JPEG is decoded at half its size
UNDO = {  # how a camera stores what a viewer turns back, from the EXIF standard's table
    1: [],
    2: [Image.Transpose.FLIP_LEFT_RIGHT],
    3: [Image.Transpose.ROTATE_180],
    4: [Image.Transpose.FLIP_TOP_BOTTOM],
    5: [Image.Transpose.TRANSPOSE],
    6: [Image.Transpose.ROTATE_90],  # shown after a clockwise quarter turn
    7: [Image.Transpose.TRANSVERSE],
    8: [Image.Transpose.ROTATE_270],
}


def stored(orientation: int, form: str = "JPEG") -> tuple[Image.Image, bytes]:
    """A picture as a camera stores it, and as a file that says how to turn it."""
    picture, exif = paint(5, TURNED), Image.Exif()
    exif[0x0112] = orientation
    for turn in UNDO[orientation]:
        picture = picture.transpose(turn)
    return picture, encode(picture, form, exif=exif)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", UNDO)
def test_pictures_without_annotations_are_turned_upright(orientation, form):
    _, data = stored(orientation, form)
    upright = paint(5, TURNED)
    plain = np.asarray(upright.resize((64, 64), Image.Resampling.LANCZOS), np.int16)
    assert np.abs(crop(data, None, "whole") - plain).mean() < 2
    picture, boxes = train_dogs.read_photo(photo(data, None))
    assert picture.size == TURNED and boxes == [(0, 0, *TURNED)]
    assert np.abs(np.asarray(picture, np.int16) - upright).mean() < 4


@pytest.mark.parametrize("orientation", UNDO)
def test_boxes_and_pictures_of_annotated_sets_are_read_as_stored(orientation):
    """Boxes of Stanford Dogs were drawn on the stored pixels, whatever EXIF says of them."""
    picture, data = stored(orientation)
    box = (30, 10, 290, 280)
    plain = picture.resize((64, 64), Image.Resampling.LANCZOS, box=box)
    assert np.abs(crop(data, annotate([box])) - np.asarray(plain, np.int16)).mean() < 2
    read, boxes = train_dogs.read_photo(photo(data, annotate([box])))
    assert read.size == picture.size and boxes == [box]


# Read as orientation 6, but its other tags cannot be written again, which is what Pillow's
# `exif_transpose` does: TypeError, struct.error, ValueError.
TWISTED = {"type": (131, 0x80), "struct": (32, 0x28), "value": (133, 0x44)}
EXIF = bytes.fromhex(
    "4578696600004d4d002a000000080005010e0002000000060000004a011200030000000100060000011a0005000000"
    "010000005087690004000000010000005888250004000000010000007e000000006120646f67000000000300000002"
    "0002829a000c0000000100000076900000070000000430323330000000003fe00000000000000002000100020000000"
    "24e00000000020005000000030000009c00000000000000010000000100000002000000010000000300000001"
)
