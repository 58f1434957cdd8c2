"""Every kind of bad input: read right where it can be, else left out, counted and logged."""

import io
import json
import math
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
from PIL import Image

import train_dogs
from train_dogs import BadItem, UserError, find_photos, prepare_crops

LEFT, RIGHT = (200, 30, 40), (20, 60, 190)
SMALL = ["--device", "cpu", "--width", "1", "--latent-dim", "4", "--images", "4", "--steps", "1"]


def halves(size: tuple[int, int] = SIZE) -> Image.Image:
    """Red on the left, blue on the right."""
    picture = Image.new("RGB", size, LEFT)
    picture.paste(RIGHT, (size[0] // 2, 0, *size))
    return picture


def photo(picture: bytes, annotation: bytes | None = annotate([BOX])) -> train_dogs.Photo:
    """A photo of these bytes, as one found in a set."""
    entries = [
        None if data is None else train_dogs.Entry("x", len(data), 0, lambda data=data: data)
        for data in (picture, annotation)
    ]
    return train_dogs.Photo("x/x.jpg", "x", *entries)


def crop(
    picture: bytes, annotation: bytes | None = annotate([BOX]), kind: str = "box"
) -> np.ndarray:
    """The first crop of the first dog of a photo, int16 (64, 64, 3)."""
    dogs, _ = train_dogs.crop_photo(photo(picture, annotation), [kind])
    assert dogs[0][0].shape[1:] == (64, 64, 3) and dogs[0][0].dtype == np.uint8
    return dogs[0][0][0].astype(np.int16)


def prepared(tmp_path: Path, bad: list[Dog], good: int = 20) -> train_dogs.CropSet:
    """A set of good dogs and these, through the whole of finding and cropping."""
    root = as_folders(tmp_path / "set", [*make_dogs(good), *bad])
    made = prepare_crops(find_photos([root]), "square", show=False)
    assert len(made.crops) == len(made.first) == len(made.breed)
    return made


# ------------------------------------------- what is odd but can be read: the content is right


def palette(form: str = "PNG", **options: object) -> bytes:
    return encode(halves().quantize(8), form, **options)


def translucent(mode: str) -> bytes:
    """Red and blue; the lower half fully transparent, over a black that must not show."""
    picture = halves().convert("RGBA")
    picture.paste((0, 0, 0, 0), (0, SIZE[1] // 2, *SIZE))
    if mode == "LA":
        picture = picture.convert("LA")
    if mode == "P":  # the palette's last colour is the transparent one
        solid = Image.new("P", SIZE, 0)
        solid.putpalette([*LEFT, *RIGHT, 0, 0, 0])
        solid.paste(1, (SIZE[0] // 2, 0, *SIZE))
        solid.paste(2, (0, SIZE[1] // 2, *SIZE))
        return encode(solid, "PNG", transparency=2)
    return encode(picture, "PNG")


def grey16(form: str) -> bytes:
    levels = np.asarray(halves().convert("L")).astype(np.uint16) * 257
    return encode(Image.fromarray(levels), form)


COLOURED = {
    "a PNG named .jpg": lambda: encode(halves(), "PNG"),
    "a GIF named .jpg": lambda: palette("GIF"),
    "a WebP named .jpg": lambda: encode(halves(), "WEBP", quality=95),
    "a BMP named .jpg": lambda: encode(halves(), "BMP"),
    "a TIFF named .jpg": lambda: encode(halves(), "TIFF"),
    "CMYK JPEG": lambda: encode(halves().convert("CMYK")),
    "palette": palette,
    "progressive JPEG": lambda: encode(halves(), progressive=True),
    "JPEG without chroma halving": lambda: encode(halves(), subsampling=0),
    "two pictures in one JPEG": lambda: encode(
        halves(), "MPO", save_all=True, append_images=[halves()], quality=95
    ),
    "JPEG with bytes after its end": lambda: encode(halves()) + b"\0" * 999,
}
GREY = {
    "grey JPEG": lambda: encode(halves().convert("L")),
    "grey PNG": lambda: encode(halves().convert("L"), "PNG"),
    "16-bit grey PNG": lambda: grey16("PNG"),
    "16-bit grey TIFF": lambda: grey16("TIFF"),
}


def expect_halves(
    seen: np.ndarray, left: object, right: object, rows: slice = slice(4, 60)
) -> None:
    assert np.abs(seen[rows, 4:26] - left).max() < 12
    assert np.abs(seen[rows, 38:60] - right).max() < 12


@pytest.mark.parametrize("name", COLOURED)
def test_odd_encodings_keep_their_colours(name, tmp_path):
    expect_halves(crop(COLOURED[name]()), LEFT, RIGHT)
    made = prepared(tmp_path, [make_dog(99)._replace(picture=COLOURED[name]())], 16)
    assert len(made.first) == 17 and made.skipped == []


@pytest.mark.parametrize("name", GREY)
def test_grey_pictures_keep_their_levels(name):
    levels = [np.asarray(Image.new("RGB", (1, 1), c).convert("L"))[0, 0] for c in (LEFT, RIGHT)]
    expect_halves(crop(GREY[name]()), *levels)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(mode):
    seen = crop(translucent(mode))
    left, right = LEFT, RIGHT
    if mode == "LA":
        left, right = (
            np.asarray(Image.new("RGB", (1, 1), c).convert("L"))[0, 0] for c in (LEFT, RIGHT)
        )
    expect_halves(seen, left, right, slice(4, 26))
    assert seen[40:60].min() > 245


def test_black_and_white_pictures_stay_so():
    seen = crop(encode(halves().convert("L").point(lambda v: 255 * (v > 70)).convert("1"), "PNG"))
    expect_halves(seen, 255, 0)


@pytest.mark.parametrize("suffix", [".JPG", ".jpeg", ".JPEG", ".png", ".Webp"])
def test_suffixes_of_any_case_are_pictures(suffix, tmp_path):
    made = prepared(tmp_path, [make_dog(99)._replace(suffix=suffix)], 16)
    assert len(made.first) == 17 and made.skipped == []


# --------------------------------------------------------------------------- EXIF rotation

TURNED = (480, 320)  # large enough that a JPEG is decoded at half its size
CORNER = (30, 10, 370, 280)  # in the upright picture, nearer to its left and top


def upright() -> Image.Image:
    """Four colours and a frame of noise, so that no turn of it looks like another."""
    picture = paint(5, TURNED)
    left, top, right, bottom = CORNER
    x, y = (left + right) // 2, (top + bottom) // 2
    for colour, box in (
        ((220, 30, 30), (left, top, x, y)),
        ((30, 200, 30), (x, top, right, y)),
        ((30, 30, 220), (left, y, x, bottom)),
        ((230, 220, 30), (x, y, right, bottom)),
    ):
        picture.paste(colour, box)
    return picture


def stored(orientation: int) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """The picture as a camera stores it, and the box in it, by moving a mask the same way."""
    mask = Image.new("L", TURNED)
    mask.paste(255, CORNER)
    undo = {  # what the viewer's turn takes back, from the EXIF standard's table
        1: [],
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],  # shown after a clockwise quarter turn
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }[orientation]
    picture = upright()
    for turn in undo:
        picture, mask = picture.transpose(turn), mask.transpose(turn)
    return picture, mask.getbbox()


@pytest.mark.parametrize("kind", ["box", "square", "whole"])
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_in_stored_coordinates_follow_the_picture_upright(orientation, form, kind):
    picture, box = stored(orientation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = crop(encode(picture, form, exif=exif), annotate([box], picture.size), kind)
    plain = crop(encode(upright(), form), annotate([CORNER], TURNED), kind)
    assert np.abs(turned - plain).mean() < 2


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_boxes_stated_for_the_picture_as_shown_are_left_alone(orientation):
    picture, _ = stored(orientation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = crop(encode(picture, exif=exif), annotate([CORNER], TURNED))
    plain = crop(encode(upright()), annotate([CORNER], TURNED))
    assert np.abs(turned - plain).mean() < 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_without_annotations_are_turned_upright_too(orientation):
    picture, _ = stored(orientation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = crop(encode(picture, exif=exif), None, "whole")
    assert np.abs(turned - crop(encode(upright()), None, "whole")).mean() < 2


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("exif", [b"Exif\0\0XX*\0\0\0\0\x08", b"Exif\0\0II*\0\x08\0\0\0\xff", b"M"])
def test_damaged_exif_leaves_a_good_picture(form, exif):
    expect_halves(crop(encode(halves(), form, exif=exif)), LEFT, RIGHT)


# ---------------------------------------------- what cannot be read: left out and counted


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def huge_png(side: int = 50_000) -> bytes:
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 1000)
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def huge_bmp(side: int = 50_000) -> bytes:
    data = bytearray(encode(paint(1), "BMP"))
    data[18:26] = struct.pack("<ii", side, side)
    return bytes(data)


def huge_jpeg(side: int = 65_000) -> bytes:
    data = bytearray(encode(paint(1)))
    at = data.find(b"\xff\xc0") + 5  # the frame's header: height, width
    data[at : at + 4] = struct.pack(">HH", side, side)
    return bytes(data)


def cut(data: bytes, share: float = 0.6) -> bytes:
    return data[: int(len(data) * share)]


BAD_PICTURES: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "empty"),
    "truncated JPEG": (lambda: cut(encode(paint(1))), "truncated|damaged"),
    "truncated PNG": (lambda: cut(encode(paint(1), "PNG")), "truncated|damaged"),
    "truncated palette PNG": (lambda: cut(encode(paint(1).quantize(64), "PNG")), "truncat|damag"),
    "truncated WebP": (lambda: cut(encode(paint(1), "WEBP")), "truncated|damaged|not a picture"),
    "only the first bytes": (lambda: encode(paint(1))[:20], "truncated|damaged|not a picture"),
    "a web page": (lambda: b"<html>404</html>" * 99, "not a picture"),
    "zeros": (lambda: b"\0" * 5000, "not a picture"),
    "a PDF": (lambda: b"%PDF-1.4\n" + b"x" * 999, "not a picture"),
    "a PNG of 50000x50000": (huge_png, "pixel"),
    "a PNG of 9500x9500": (lambda: huge_png(9_500), "pixel"),
    "a BMP of 50000x50000": (huge_bmp, "pixel"),
    "a JPEG of 65000x65000": (huge_jpeg, "pixel"),
    "a TIFF with PostScript in it": (lambda: b"%!PS-Adobe\n" + b"x" * 99, "not a picture"),
}


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_a_bad_picture_is_left_out_and_counted(name, tmp_path):
    make, reason = BAD_PICTURES[name]
    begin = time.process_time()
    made = prepared(tmp_path, [make_dog(99)._replace(picture=make())])
    assert time.process_time() - begin < 5
    assert len(made.first) == 20
    ((item, said),) = made.skipped
    assert make_dog(99).stem in item and re.search(reason, said)


GOOD_BOX = "<bndbox><xmin>9</xmin><ymin>9</ymin><xmax>60</xmax><ymax>60</ymax></bndbox>"
BODY = f"<annotation><object>{GOOD_BOX}</object></annotation>"
BOMB = (
    '<!DOCTYPE bomb [<!ENTITY a0 "dog">'
    + "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 10))
    + "]>"
    + BODY.replace("<object>", "<object>&a9;")
)
BAD_XML: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "broken"),
    "text": (b"no xml at all", "broken"),
    "cut": (BODY[:-20].encode(), "broken"),
    "bytes of no encoding": (BODY.replace("9", "\xff").encode("latin-1"), "broken"),
    "unknown encoding": (f'<?xml version="1.0" encoding="x-dog"?>{BODY}'.encode(), "broken"),
    "a picture": (encode(paint(1)), "broken"),
    "DOCTYPE": (f"<!DOCTYPE annotation>{BODY}".encode(), "DOCTYPE"),
    "DOCTYPE of a file": (
        f'<!DOCTYPE x [<!ENTITY y SYSTEM "file:///etc/passwd">]>{BODY}'.encode(),
        "DOCTYPE",
    ),
    "DOCTYPE in UTF-16": (f"<!DOCTYPE annotation>{BODY}".encode("utf-16"), "DOCTYPE"),
    "DOCTYPE in UTF-16 BE": (f"\ufeff<!DOCTYPE x>{BODY}".encode("utf-16-be"), "DOCTYPE"),
    "DOCTYPE after a comment": (f"<!-- {'x' * 9000} -->\n<!DOCTYPE x>{BODY}".encode(), "DOCTYPE"),
    "entity bomb": (BOMB.encode(), "DOCTYPE"),
    "entity bomb in UTF-16": (BOMB.encode("utf-16"), "DOCTYPE"),
    "undefined entity": (BODY.replace("9", "&dog;", 1).encode(), "broken"),
    "no boxes": (b"<annotation><object/></annotation>", "without boxes"),
    "nested 100,000 deep": (b"<a>" * 100_000 + b"</a>" * 100_000, "without boxes|broken"),
    "nan": (annotate([("nan", 9, 60, 60)]), "number"),
    "infinite": (annotate([(0, 0, "inf", "1e999")]), "number"),
    "words": (annotate([("left", "top", "right", "bottom")]), "number"),
    "no corners": (b"<annotation><object><bndbox/></object></annotation>", "number"),
    "one corner": (
        b"<annotation><object><bndbox><xmin>3</xmin></bndbox></object></annotation>",
        "number",
    ),
    "left and right swapped": (annotate([(60, 9, 9, 60)]), "reversed"),
    "top and bottom swapped": (annotate([(9, 60, 60, 9)]), "reversed"),
    "no width": (annotate([(9, 9, 9, 60)]), "empty"),
    "no height": (annotate([(9, 30, 60, 30)]), "empty"),
    "a point": (annotate([(9, 9, 9, 9)]), "empty"),
    "right of the picture": (annotate([(SIZE[0] + 4, 9, SIZE[0] + 60, 60)]), "outside"),
    "above the picture": (annotate([(9, -60, 60, -9)]), "outside"),
    "touching the picture's edge": (annotate([(SIZE[0], 9, SIZE[0] + 60, 60)]), "outside"),
}


@pytest.mark.parametrize("name", BAD_XML)
def test_a_bad_annotation_is_left_out_and_counted(name, tmp_path):
    xml, reason = BAD_XML[name]
    begin = time.process_time()
    made = prepared(tmp_path, [make_dog(99)._replace(annotation=xml)])
    assert time.process_time() - begin < 5
    assert len(made.first) == 20
    ((item, said),) = made.skipped
    assert make_dog(99).stem in item and reason and re.search(reason, said)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
def test_annotations_in_other_encodings_are_read(encoding):
    name = encoding.removesuffix("-sig")
    xml = f'<?xml version="1.0" encoding="{name}"?><annotation><name>Löwchen</name>{GOOD_BOX}'
    boxes = train_dogs.parse_annotation((xml + "</annotation>").encode(encoding))[1]
    assert boxes == [(9.0, 9.0, 60.0, 60.0)]


@pytest.mark.parametrize("size", [None, (0, 0), ("", ""), ("nan", "inf"), ("1e999", 80), (-3, "x")])
def test_a_senseless_stated_size_changes_nothing(size):
    picture = encode(paint(3))
    assert (crop(picture, annotate([BOX], size)) == crop(picture)).all()


def test_a_box_partly_outside_is_cut_at_the_edge():
    picture = encode(paint(3), "PNG")
    over = crop(picture, annotate([(-30, 20, SIZE[0] + 500, 1e6)]))
    assert (over == crop(picture, annotate([(0, 20, *SIZE)]))).all()


def test_one_bad_box_of_two_costs_that_dog_alone(tmp_path):
    two = make_dog(99)._replace(annotation=annotate([(60, 9, 9, 60), BOX]))
    made = prepared(tmp_path, [two])
    assert len(made.first) == 21
    assert [reason for _, reason in made.skipped] == ["reversed box"]


def test_every_box_of_every_dog_is_used_not_the_last(tmp_path):
    boxes = [(0, 0, 40, 40), (50, 0, 96, 40), (20, 30, 90, 80)]
    picture = encode(paint(7), "PNG")
    dogs, reasons = train_dogs.crop_photo(photo(picture, annotate(boxes)), ["box"])
    assert len(dogs) == 3 and reasons == []
    for dog, box in zip(dogs, boxes):
        plain = Image.open(io.BytesIO(picture)).resize((64, 64), Image.Resampling.LANCZOS, box=box)
        assert (dog[0][0] == np.asarray(plain)).all()


def test_one_half_missing_is_counted(tmp_path):
    lonely = [make_dog(98)._replace(picture=None), make_dog(99)._replace(annotation=None)]
    made = prepared(tmp_path, lonely, 40)
    assert len(made.first) == 40
    assert sorted(reason for _, reason in made.skipped) == [
        "annotation without picture",
        "picture without annotation",
    ]


# ------------------------------------------------------------------------ whatever else


def corrupted(data: bytes, chance: random.Random) -> bytes:
    """Some bytes changed, near the beginning more often; one in three is cut too."""
    data = bytearray(data if chance.random() < 0.7 else data[: chance.randrange(len(data))])
    for _ in range(chance.choice([0, 1, 1, 3, 10]) if data else 0):
        at = chance.randrange(min(len(data), chance.choice([40, 200, len(data)])))
        data[at] = chance.choice(
            [0, 255, chance.randrange(256), data[at] ^ 1 << chance.randrange(8)]
        )
    return bytes(data)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "form", ["JPEG", "CMYK", "PNG", "palette", "grey", "WEBP", "BMP", "GIF", "TIFF"]
)
def test_no_damage_to_a_picture_stops_the_run(form):
    """1,800 damaged files: each gives crops or a reason, and nothing else escapes."""
    chance, exif = random.Random(form), Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a dog"
    whole = {
        "CMYK": lambda: encode(paint(1).convert("CMYK")),
        "palette": lambda: encode(paint(1).quantize(16), "PNG"),
        "grey": lambda: grey16("PNG"),
        "JPEG": lambda: encode(paint(1), exif=exif),
        "PNG": lambda: encode(paint(1), "PNG", exif=exif),
        "WEBP": lambda: encode(paint(1), "WEBP", exif=exif),
    }.get(form, lambda: encode(paint(1), form))()
    seen = set()
    for _ in range(200):
        try:
            dogs, _ = train_dogs.crop_photo(photo(corrupted(whole, chance)), ["square"])
            assert dogs[0][0].shape == (1, 64, 64, 3)
            seen.add("read")
        except BadItem as bad:
            seen.add(str(bad))
    assert "read" in seen and len(seen) >= 2


def test_no_damage_to_an_annotation_stops_the_run():
    chance, xml, seen = random.Random(0), annotate([BOX, (5, 5, 50, 50)]), set()
    picture = encode(paint(1))
    for _ in range(600):
        try:
            train_dogs.crop_photo(photo(picture, corrupted(xml, chance)), ["box", "head"])
            seen.add("read")
        except BadItem as bad:
            seen.add(str(bad))
    assert {"read", "broken annotation"} <= seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_no_damage_to_exif_stops_the_run(form):
    exif, chance = Image.Exif(), random.Random(form)
    exif[0x0112], exif[0x010E], exif[0x011A] = 6, "a dog", 1.5
    exif[0x8769] = {0x9000: b"0230", 0x829A: 0.5}
    exif[0x8825] = {1: "N", 2: (1.0, 2.0, 3.0)}
    whole = exif.tobytes()
    for _ in range(300):
        block = bytearray(whole)
        for _ in range(chance.choice([1, 1, 2, 4])):
            at = chance.randrange(len(block))
            block[at] = chance.choice([0, 255, chance.randrange(256), block[at] ^ 128])
        dogs, _ = train_dogs.crop_photo(
            photo(encode(paint(1), form, exif=bytes(block))), ["square"]
        )
        assert dogs[0][0].shape == (1, 64, 64, 3)


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ((math.nan, 0, 5, 5), "number"),
        ((0, 0, math.inf, 5), "number"),
        ((5, 0, 2, 5), "reversed"),
        ((0, 5, 5, 2), "reversed"),
        ((3, 3, 3, 9), "empty"),
        ((100, 0, 120, 50), "outside"),
        ((-9, -9, 0, 50), "outside"),
        ((99.5, 0, 120, 50), "outside"),
    ],
)
def test_clip_box_says_why_it_refuses(box, reason):
    with pytest.raises(BadItem, match=reason):
        train_dogs.clip_box(box, 100, 50)


# ------------------------------------------------------------------- limits, summary, log


def with_bad(good: int, bad: int) -> list[Dog]:
    return make_dogs(good) + [make_dog(good + k)._replace(picture=b"") for k in range(bad)]


def test_five_percent_bad_passes_and_one_more_stops_with_2(tmp_path, capsys):
    root = as_folders(tmp_path / "fits", with_bad(95, 5))
    assert len(prepare_crops(find_photos([root]), "square", show=False).first) == 95
    root = as_folders(tmp_path / "more", with_bad(94, 6))
    with pytest.raises(UserError, match="6 of 100"):
        prepare_crops(find_photos([root]), "square", show=False)
    assert train_dogs.main(["--data", str(root), "--out", str(tmp_path / "out"), *SMALL]) == 2
    said = capsys.readouterr().err
    assert "6 empty file" in said and "5 %" in said
    assert not (tmp_path / "out/images.zip").exists()


def test_bad_items_of_every_reason_count_towards_the_five_percent(tmp_path):
    lonely = [
        make_dog(100 + k)._replace(**({"picture": None} if k % 2 else {"annotation": None}))
        for k in range(6)
    ]
    root = as_folders(tmp_path / "set", make_dogs(90) + lonely)
    with pytest.raises(UserError, match="3 (annotation|picture) without"):
        prepare_crops(find_photos([root]), "square", show=False)


def test_sixteen_dogs_are_enough_and_fifteen_end_with_2(tmp_path, capsys):
    root = as_folders(tmp_path / "16", make_dogs(16))
    assert len(prepare_crops(find_photos([root]), "square", show=False).first) == 16
    root = as_folders(tmp_path / "15", make_dogs(15))
    assert train_dogs.main(["--data", str(root), "--out", str(tmp_path / "out"), *SMALL]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "15 dogs" in said and "16" in said


def test_two_dogs_in_one_photo_count_as_two(tmp_path):
    dogs = [make_dog(k)._replace(annotation=annotate([BOX, (1, 1, 40, 40)])) for k in range(8)]
    root = as_folders(tmp_path / "set", dogs)
    assert len(prepare_crops(find_photos([root]), "square", show=False).first) == 16


def test_a_run_counts_bad_items_by_reason_and_lists_them_in_its_log(tmp_path, capsys):
    """Through the whole program: one line for people, the list in log.jsonl, data untouched."""
    bad = [
        make_dog(200)._replace(picture=b""),
        make_dog(201)._replace(picture=cut(encode(paint(1)))),
        make_dog(202)._replace(picture=huge_png()),
        make_dog(203)._replace(annotation=BOMB.encode()),
        make_dog(204)._replace(annotation=annotate([(60, 9, 9, 60)])),
        make_dog(205)._replace(annotation=annotate([(60, 9, 9, 60)])),
        make_dog(206)._replace(picture=None),
    ]
    root, out = as_folders(tmp_path / "100 % dogs", [*make_dogs(140), *bad]), tmp_path / "out"
    before = dog_sets.snapshot(root)
    flags = ["--data", str(root), "--out", str(out), "--batch-size", "4", *SMALL]
    for _ in range(2):  # the second time from the cache, resumed from the first
        assert train_dogs.main(flags) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if "reversed box" in line]
        assert len(lines) == 1 and "140 dogs" in lines[0] and "3 breeds" in lines[0]
        for counted in ("2 reversed box", "1 empty file", "1 annotation without picture"):
            assert counted in lines[0]
    assert dog_sets.snapshot(root) == before
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    for listed in [entry["skipped"] for entry in log if "skipped" in entry]:
        assert len(listed) == len(bad)
        for dog in bad:
            assert sum(dog.stem in name for name, _ in listed) == 1
