"""Every kind of bad input: read right where it can be, else left out, counted and logged."""

import json
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import dog_sets
import numpy as np
import pytest
from dog_sets import BOX, SIZE, Dog, annotate, as_folders, encode, make_dog, make_dogs, paint
from dog_sets import photo_of as photo
from PIL import Image, ImageFile

import train_dogs
from train_dogs import BadItem, UserError, find_photos, prepare_crops

pytestmark = pytest.mark.usefixtures("light")

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
    levels = np.asarray(halves().convert("L")).astype(np.uint16) * 256 + 99
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


def test_suffixes_of_any_case_are_pictures(tmp_path):
    suffixes = [".JPG", ".jpeg", ".png", ".Webp", ".tiff"]
    odd = [make_dog(99 + k, suffix=suffix) for k, suffix in enumerate(suffixes)]
    made = prepare(as_folders(tmp_path, [*make_dogs(16), *odd]))
    assert len(made.first) == 21 and made.skipped == []


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


def test_a_picture_whose_exif_can_be_read_but_not_written_again_is_turned_too():
    """As Pillow's `exif_transpose` would, which fails here: a resolution's unit is a fraction."""
    tags = struct.pack(">HHHIHHHHIIIII", 2, 0x0112, 3, 1, 6, 0, 0x0128, 5, 1, 38, 0, 72, 1)
    picture = paint(5, TURNED).transpose(Image.Transpose.ROTATE_90)
    data = encode(picture, exif=b"Exif\0\0MM\0*\0\0\0\x08" + tags)
    plain = paint(5, TURNED).resize((64, 64), Image.Resampling.LANCZOS)
    assert np.abs(crop(data, None, "whole") - np.asarray(plain, np.int16)).mean() < 2


# ---------------------------------------------- what cannot be read: left out and counted


def huge_png() -> bytes:
    """A PNG whose header claims 50,000 x 50,000 pixels."""
    data = bytearray(encode(paint(1), "PNG"))
    data[16:24] = struct.pack(">II", 50_000, 50_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def cut(form: str, picture: Image.Image | None = None) -> bytes:
    data = encode(picture or paint(1), form)
    return data[: int(len(data) * 0.6)]


BAD_PICTURES: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "not a picture"),
    "truncated JPEG": (lambda: cut("JPEG"), "damaged"),
    "truncated PNG": (lambda: cut("PNG"), "damaged"),
    "truncated palette PNG": (lambda: cut("PNG", paint(1).quantize(64)), "damaged"),
    "truncated WebP": (lambda: cut("WEBP"), "damaged"),
    "a web page": (lambda: b"<html>404</html>" * 99, "not a picture"),
    "PostScript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
    "a PNG of 50000x50000": (huge_png, "too many pixels"),
}


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_a_bad_picture_is_refused_by_its_reason(name, monkeypatch):
    """A picture of too many pixels is not decoded first."""
    make, reason = BAD_PICTURES[name]
    if "pixels" in reason:
        monkeypatch.setattr(ImageFile.ImageFile, "load", None)  # would fail if it were called
    for annotation in (ONE_BOX, None):
        with pytest.raises(BadItem, match=reason):
            crop(make(), annotation)


GOOD = "<bndbox><xmin>9</xmin><ymin>9</ymin><xmax>60</xmax><ymax>60</ymax></bndbox>"
BODY = f"<annotation><object>{GOOD}</object></annotation>"
BAD_XML: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "broken"),
    "text": (b"no xml at all", "broken"),
    "cut": (BODY[:-20].encode(), "broken"),
    "bytes of no encoding": (BODY.replace("9", "\xff").encode("latin-1"), "broken"),
    "unknown encoding": (f'<?xml version="1.0" encoding="x-dog"?>{BODY}'.encode(), "broken"),
    "undefined entity": (BODY.replace("9", "&dog;", 1).encode(), "broken"),
    "no boxes": (b"<annotation><object/></annotation>", "without boxes"),
    "nan": (annotate([("nan", 9, 60, 60)]), "empty"),
    "words": (annotate([("left", "top", "right", "bottom")]), "broken"),
    "no corners": (b"<annotation><object><bndbox/></object></annotation>", "broken"),
    "left and right swapped": (annotate([(60, 9, 9, 60)]), "reversed"),
    "top and bottom swapped": (annotate([(9, 60, 60, 9)]), "reversed"),
    "no width": (annotate([(9, 9, 9, 60)]), "empty"),
    "no height": (annotate([(9, 30, 60, 30)]), "empty"),
    "right of the picture": (annotate([(SIZE[0] + 4, 9, SIZE[0] + 60, 60)]), "outside"),
    "above the picture": (annotate([(9, -60, 60, -9)]), "outside"),
    "half a pixel inside": (annotate([(SIZE[0] - 0.5, 9, SIZE[0] + 60, 60)]), "outside"),
}


@pytest.mark.parametrize("name", BAD_XML)
def test_a_bad_annotation_is_refused_by_its_reason(name):
    xml, reason = BAD_XML[name]
    with pytest.raises(BadItem, match=reason):
        crop(encode(paint(1)), xml)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
def test_annotations_in_other_encodings_are_read(encoding):
    name = encoding.removesuffix("-sig")
    xml = f'<?xml version="1.0" encoding="{name}"?><annotation><name>Löwchen</name>{GOOD}'
    boxes = train_dogs.parse_annotation((xml + "</annotation>").encode(encoding))
    assert boxes == [(9.0, 9.0, 60.0, 60.0)]


def test_a_box_partly_outside_is_cut_at_the_edge():
    picture = encode(paint(3), "PNG")
    for far in (1e6, "inf"):
        over = crop(picture, annotate([(-30, 20, SIZE[0] + 500, far)]))
        assert (over == crop(picture, annotate([(0, 20, *SIZE)]))).all()


def test_each_good_box_of_a_photo_is_a_dog_and_each_bad_one_is_counted(tmp_path):
    """By the crops, by what both programs read, and through the whole of finding and cropping."""
    boxes = [(0, 0, 40, 40), (60, 9, 9, 60), (50, 0, 96, 40), (20, 30, 90, 80)]
    good = [boxes[0], *boxes[2:]]
    picture, xml = encode(paint(7), "PNG"), annotate(boxes)
    dogs, reasons = train_dogs.crop_photo(photo(picture, xml), ["box"])
    assert len(dogs) == 3 and reasons == ["reversed box"]
    for dog, box in zip(dogs, good):
        assert (dog[0][0] == paint(7).resize((64, 64), Image.Resampling.LANCZOS, box=box)).all()
    read, found = train_dogs.read_photo(photo(picture, xml))
    assert found == good and (np.asarray(read) == paint(7)).all()
    made = prepare(as_folders(tmp_path, [*make_dogs(20), make_dog(99, boxes)]))
    assert len(made.first) == 23 and [reason for _, reason in made.skipped] == ["reversed box"]


# ------------------------------------------------------------------------ whatever else


def corrupted(data: bytes, chance: random.Random, cut: bool = True) -> bytes:
    """Some bytes changed, near the beginning more often; one in three is cut too."""
    data = bytearray(data[: chance.randrange(len(data))] if cut and chance.random() < 0.3 else data)
    for _ in range(chance.choice([1, 1, 3, 10]) if data else 0):
        at = chance.randrange(min(len(data), chance.choice([40, 200, len(data)])))
        new = (0, 255, chance.randrange(256), data[at] ^ 128, chance.randrange(48, 58))
        data[at] = chance.choice(new)
    return bytes(data)


EXIF = Image.Exif()
EXIF[0x0112], EXIF[0x010E], EXIF[0x011A], EXIF[0x8825] = 6, "a dog", 1.5, {1: "N", 2: (1.0, 2.0)}
WHOLE = {
    **{form: encode(paint(1), form, exif=EXIF) for form in ("JPEG", "PNG", "WEBP")},
    **{form: encode(paint(1), form) for form in ("BMP", "GIF", "TIFF")},
    "palette": encode(paint(1).quantize(16), "PNG"),
    "16-bit grey": grey16("PNG"),
}
DIGITS = annotate([[f"{edge}.{'0' * 40}" for edge in BOX]])  # most of it may change and be read
DAMAGED: dict[str, Callable[[random.Random], train_dogs.Photo]] = {
    **{form: lambda chance, whole=whole: photo(corrupted(whole, chance), None)
       for form, whole in WHOLE.items()},
    **{f"EXIF of {form}": lambda chance, form=form: photo(encode(
           paint(1), form, exif=corrupted(EXIF.tobytes(), chance, cut=False)), None)
       for form in ("JPEG", "PNG", "WEBP")},
    "annotation": lambda chance: photo(WHOLE["JPEG"], corrupted(DIGITS, chance)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", DAMAGED)
def test_no_damage_stops_the_run(what):
    """Each gives crops or a reason; nothing else escapes; damaged EXIF never costs the picture."""
    chance, seen = random.Random(what), set()
    for _ in range(150):
        try:
            dogs, _ = train_dogs.crop_photo(DAMAGED[what](chance), ["square"])
            assert dogs[0][0].shape == (1, 64, 64, 3)
            seen.add("read")
        except BadItem as bad:
            seen.add(str(bad))
    assert seen == {"read"} if "EXIF" in what else "read" in seen and len(seen) > 1


# ------------------------------------------------------------------- limits, summary, log


def test_five_percent_bad_passes_and_one_more_stops_with_2(tmp_path, capsys):
    """Bad items of every reason count."""
    bad = [make_dog(200, picture=b""), make_dog(201, picture=None), make_dog(202, annotation=None)]
    bad += [make_dog(203 + k, annotation=b"") for k in range(2)]
    root = as_folders(tmp_path / "fits", make_dogs(95) + bad)
    assert len(prepare(root).first) == 95
    root = as_folders(tmp_path / "more", make_dogs(94) + bad + [make_dog(99, picture=b"")])
    assert train_dogs.main(["--data", str(root), "--out", str(tmp_path / "out"), *SMALL]) == 2
    error = capsys.readouterr().err
    for part in ("6 of 100", "2 damaged or not a picture", "2 broken annotation", "5 %"):
        assert part in error
    assert not (tmp_path / "out/images.zip").exists()


def test_sixteen_dogs_are_enough_and_fifteen_are_not(tmp_path):
    root = as_folders(tmp_path / "16", [make_dog(k, [BOX, (1, 1, 40, 40)]) for k in range(8)])
    assert len(prepare(root).first) == 16  # two in each photo
    with pytest.raises(UserError, match="15 dogs.* 16:"):
        prepare(as_folders(tmp_path / "15", make_dogs(15)))


def test_a_run_counts_bad_items_by_reason_and_lists_them_in_its_log(tmp_path, capsys):
    """Through the whole program: one line for people, the list in log.jsonl, data untouched."""
    bad: list[Dog] = [
        make_dog(200, picture=b""),
        make_dog(201, picture=cut("JPEG")),
        make_dog(202, picture=huge_png()),
        make_dog(203, annotation=b""),
        *(make_dog(204 + k, [(60, 9, 9, 60)]) for k in range(2)),
        make_dog(206, picture=None),
    ]
    root, out = as_folders(tmp_path / "100 % dogs", [*make_dogs(140), *bad]), tmp_path / "out"
    before = dog_sets.snapshot(root)
    for _ in range(2):  # the second time from the cache, resumed from the first
        flags = ["--data", str(root), "--out", str(out), "--batch-size", "4", *SMALL]
        assert train_dogs.main(flags) == 0
        (line,) = [s for s in capsys.readouterr().out.splitlines() if "reversed box" in s]
        for part in ("2 reversed box", "2 damaged or not a picture", "140 dogs", "3 breeds"):
            assert part in line
    assert dog_sets.snapshot(root) == before
    log = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
    lists = [entry["skipped"] for entry in log if "skipped" in entry]
    assert len(lists) == 2
    for listed in lists:
        assert sorted(name.split("_")[-1][:4] for name, _ in listed) == sorted(
            dog.stem.split("_")[-1] for dog in bad
        )
