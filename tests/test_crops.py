"""Crops: exact geometry by properties, true pixels, a cache used but never trusted blindly."""

import io
import itertools
import json
import multiprocessing
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import dog_sets
import numpy as np
import PIL
import pytest
import torch
from dog_sets import annotate, as_folders, encode, make_dog, make_dogs, paint
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

import train_dogs
from train_dogs import CROPS, BadItem, UserError, clip_box, find_photos, prepare_crops

Frame = tuple[int, int]
Box = tuple[float, float, float, float]

# ---------------------------------------------------------------------- geometry by properties

SIDES = st.one_of(st.integers(1, 40), st.integers(1, 5000))
MANY = settings(max_examples=800)


@st.composite
def frames_and_boxes(draw: st.DrawFn, whole: bool = True) -> tuple[Box, int, int]:
    """A frame and a box that clip_box has let through, in whole pixels or not."""
    width, height = draw(SIDES), draw(SIDES)
    number = st.integers if whole else st.floats
    left, top = draw(number(0, width - 1)), draw(number(0, height - 1))
    right = width if left + 1 >= width else draw(number(left + 1, width))
    bottom = height if top + 1 >= height else draw(number(top + 1, height))
    assume(right - left >= 1 and bottom - top >= 1)  # rounding may have taken an atom of it
    return clip_box((left, top, right, bottom), width, height), width, height


def views(kind: str, case: tuple[Box, int, int]) -> list[Box]:
    return CROPS[kind](*case)


@MANY
@given(case=frames_and_boxes())
def test_every_view_lies_inside_the_frame_and_holds_a_pixel(case):
    _, width, height = case
    for kind in CROPS:
        for left, top, right, bottom in views(kind, case):
            assert 0 <= left < right <= width and 0 <= top < bottom <= height, kind
            assert right - left >= 1 and bottom - top >= 1, kind


@MANY
@given(case=frames_and_boxes(whole=False))
def test_the_same_for_boxes_between_pixels_to_rounding(case):
    _, width, height = case
    near = 1e-9 * max(width, height)
    for kind in CROPS:
        for left, top, right, bottom in views(kind, case):
            assert -near <= left and right <= width + near, kind
            assert -near <= top and bottom <= height + near, kind
            assert right - left >= 1 - near and bottom - top >= 1 - near, kind
            if kind not in ("box", "whole"):
                assert abs(right - left - bottom + top) <= near, kind


@MANY
@given(case=frames_and_boxes())
def test_square_kinds_are_square_exactly(case):
    for kind in ("square", "head", "context"):
        for left, top, right, bottom in views(kind, case):
            assert right - left == bottom - top, kind


def test_all_boxes_of_all_small_frames():
    """Every box of every frame up to 7 x 7 against a search over all squares at half pixels."""
    for width, height in itertools.product(range(1, 8), repeat=2):
        spans = [list(itertools.combinations(range(n + 1), 2)) for n in (width, height)]
        for (left, right), (top, bottom) in itertools.product(*spans):
            case = ((left, top, right, bottom), width, height)
            long, short = sorted((right - left, bottom - top), reverse=True)
            fits = [side for side in range(1, 8) if side <= min(width, height)]
            ((x, y, x2, y2),) = views("square", case)
            assert x2 - x == y2 - y == max(side for side in fits if side <= long)
            if long in fits:
                assert x <= left and right <= x2 and y <= top and bottom <= y2
            ((x, y, x2, y2),) = views("context", case)
            grown = [
                half / 2
                for half in range(15)
                if half / 2 <= (left + right) / 2 <= width - half / 2
                and half / 2 <= (top + bottom) / 2 <= height - half / 2
            ]
            assert x2 - x == y2 - y == 2 * max(grown)
            for x, y, x2, y2 in views("head", case):
                assert (y, x2 - x, y2 - y) == (top, short, short) and left <= x and x2 <= right
            for kind in CROPS:
                for x, y, x2, y2 in views(kind, case):
                    assert 0 <= x <= x2 - 1 <= width - 1 and 0 <= y <= y2 - 1 <= height - 1


@MANY
@given(case=frames_and_boxes())
def test_box_is_the_box_and_whole_is_the_frame(case):
    box, width, height = case
    assert views("box", case) == [box]
    assert views("whole", case) == [(0, 0, width, height)]


@MANY
@given(case=frames_and_boxes())
def test_square_covers_the_box_where_it_fits_and_is_no_larger_than_it_must(case):
    box, width, height = case
    (square,) = views("square", case)
    long = max(box[2] - box[0], box[3] - box[1])
    assert square[2] - square[0] == min(long, width, height)
    if long <= min(width, height):
        assert square[0] <= box[0] and square[1] <= box[1]
        assert square[2] >= box[2] and square[3] >= box[3]


@MANY
@given(case=frames_and_boxes())
def test_square_is_moved_no_further_than_the_frame_demands(case):
    box, width, height = case
    (square,) = views("square", case)
    for low, high, size in ((0, 2, width), (1, 3, height)):
        off = (square[low] + square[high] - box[low] - box[high]) / 2
        if off > 0:  # pushed right or down: it touches the left or upper edge
            assert square[low] == 0
        if off < 0:
            assert square[high] == size
        if box[high] - box[low] > min(width, height):  # a part of the box's long side
            assert square[low] >= box[low] and square[high] <= box[high]


@MANY
@given(case=frames_and_boxes())
def test_head_is_the_short_side_at_the_top_of_the_box_left_middle_and_right(case):
    box, *_ = case
    wide, high = box[2] - box[0], box[3] - box[1]
    heads = views("head", case)
    for left, top, right, bottom in heads:
        assert right - left == min(wide, high) and top == box[1]
        assert box[0] <= left and right <= box[2] and bottom <= box[3]
    if wide > high:
        assert [h[0] for h in heads] == [box[0], (box[0] + box[2] - high) / 2, box[2] - high]
    else:
        assert heads == [(box[0], box[1], box[2], box[1] + wide)]


@MANY
@given(case=frames_and_boxes())
def test_context_is_centred_on_the_box_and_cannot_grow(case):
    box, width, height = case
    ((left, top, right, bottom),) = views("context", case)
    assert left + right == box[0] + box[2] and top + bottom == box[1] + box[3]
    assert left == 0 or top == 0 or right == width or bottom == height


@MANY
@given(
    box=st.tuples(*[st.integers(-300, 900)] * 4),
    width=st.integers(1, 600),
    height=st.integers(1, 600),
)
def test_a_clipped_box_is_the_set_of_its_pixels_inside(box, width, height):
    """Against a slow oracle: the pixels of the box, one by one along each side."""
    columns = [x for x in range(box[0], box[2]) if 0 <= x < width]
    rows = [y for y in range(box[1], box[3]) if 0 <= y < height]
    if columns and rows:
        inside = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        assert clip_box(box, width, height) == inside
    else:
        with pytest.raises(BadItem):
            clip_box(box, width, height)


@pytest.mark.parametrize(
    ("kind", "box", "expected"),
    [  # worked out by hand, in a frame of 100 x 60
        ("square", (10, 20, 30, 30), [(10, 15, 30, 35)]),
        ("square", (0, 10, 10, 50), [(0, 10, 40, 50)]),
        ("square", (95, 0, 100, 30), [(70, 0, 100, 30)]),
        ("square", (10, 50, 50, 60), [(10, 20, 50, 60)]),
        ("square", (5, 10, 95, 50), [(20, 0, 80, 60)]),
        ("head", (10, 10, 30, 50), [(10, 10, 30, 30)]),
        ("head", (10, 10, 70, 30), [(10, 10, 30, 30), (30, 10, 50, 30), (50, 10, 70, 30)]),
        ("context", (40, 20, 60, 40), [(20, 0, 80, 60)]),
        ("context", (80, 20, 100, 40), [(80, 20, 100, 40)]),
        ("context", (0, 0, 10, 20), [(0, 5, 10, 15)]),
        ("whole", (1, 2, 3, 4), [(0, 0, 100, 60)]),
        ("box", (1, 2, 3, 4), [(1, 2, 3, 4)]),
    ],
)
def test_crops_worked_out_by_hand(kind, box, expected):
    assert CROPS[kind](box, 100, 60) == expected


# ---------------------------------------------------------------------- kinds and weights


def test_crops_are_parsed_into_shares():
    assert train_dogs.parse_crops("square") == {"square": 1.0}
    assert train_dogs.parse_crops("square:3,context:1") == {"square": 0.75, "context": 0.25}
    assert train_dogs.parse_crops(" box , head ") == {"box": 0.5, "head": 0.5}
    assert sum(train_dogs.parse_crops("box:1,square:2,head:3,context:4,whole:.5").values()) == 1


@pytest.mark.parametrize(
    "text",
    ["", "dog", "square,", "square:0", "square:-1", "square:nan", "square:inf", "square:x"]
    + ["square,square", "square:1:2", "Square"],
)
def test_senseless_crops_end_with_2_and_name_the_kinds(text, capsys):
    assert train_dogs.main([f"--crops={text}", "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert all(kind in said for kind in ("box", "square", "head", "context", "whole"))


# ---------------------------------------------------------------------------- pixels


def crop_one(picture: bytes, box: Box, kinds: list[str], size: Frame) -> list[np.ndarray]:
    entries = [
        train_dogs.Entry("x", len(data), 0, lambda data=data: data)
        for data in (picture, annotate([box], size))
    ]
    (dog,), reasons = train_dogs.crop_photo(train_dogs.Photo("x", "x", *entries), kinds)
    assert reasons == []
    return dog


def lanczos(x: float) -> float:
    """sinc(x) sinc(x / 3), the kernel of three lobes."""
    return float(np.sinc(x) * np.sinc(x / 3)) if abs(x) < 3 else 0.0


def resample_rows(pixels: np.ndarray, start: float, end: float, count: int) -> np.ndarray:
    """Axis 0 from [start, end) to `count` samples, by a plain loop: widened Lanczos."""
    step = (end - start) / count
    reach, rows = max(step, 1.0), []
    for k in range(count):
        centre = start + (k + 0.5) * step
        near = [n for n in range(len(pixels)) if abs((n + 0.5 - centre) / reach) < 3]
        weights = np.array([lanczos((n + 0.5 - centre) / reach) for n in near])
        rows.append(np.tensordot(weights / weights.sum(), pixels[near], 1))
    return np.stack(rows)


@pytest.mark.parametrize(
    "box", [(10, 7, 190, 140), (60, 30, 90, 75), (0, 0, 64, 64), (1, 2, 9, 150)]
)
def test_crops_are_lanczos_with_antialiasing(box):
    """Against a slow loop in float64, on noise, for shrinking and for growing crops."""
    noise = np.random.default_rng(0).integers(0, 256, (150, 200, 3), dtype=np.uint8)
    kinds = ["box", "context", "head", "square", "whole"]
    dog = crop_one(encode(Image.fromarray(noise), "PNG"), box, kinds, (200, 150))
    for kind, seen in zip(kinds, dog):
        for view, (left, top, right, bottom) in zip(seen, CROPS[kind](box, 200, 150), strict=True):
            across = resample_rows(noise.swapaxes(0, 1).astype(float), left, right, 64)
            across = np.clip(np.rint(across), 0, 255)  # Pillow rounds between its two passes
            exact = resample_rows(across.swapaxes(0, 1), top, bottom, 64)
            assert np.abs(np.clip(exact, 0, 255) - view).max() <= 1.5


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(255**2 / max(1e-9, np.mean((a.astype(float) - b) ** 2)))


def plain_crop(picture: bytes, box: Box) -> np.ndarray:
    """The usual way: open, decode in full, cut the pixels out, resize."""
    cut = Image.open(io.BytesIO(picture)).convert("RGB").crop(tuple(map(round, box)))
    return np.asarray(cut.resize((64, 64), Image.Resampling.LANCZOS))


@pytest.mark.parametrize(
    "size", [(1001, 751), (1999, 1333), (513, 385), (1025, 1025), (4097, 1025), (130, 131)]
)
def test_reduced_decoding_shifts_nothing_at_any_size(size):
    """Odd sizes, whose scaled JPEG ends in a part of a pixel, and boxes at the far corner.

    Coordinates scaled by the rounded-up widths, not by the decoder's own factor, give 29 to 45 dB.
    """
    width, height = size
    cells = np.random.default_rng(0).integers(0, 256, (16 * height // width, 16, 3), dtype=np.uint8)
    picture = encode(Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC), quality=95)
    half, side = min(size) // 2, min(size)
    for box in (
        (0, 0, half, half),
        (width - half, height - half, width, height),
        (width - side, 0, width, side),
        (0, 0, *size),
    ):
        ((seen,),) = crop_one(picture, box, ["box"], size)
        assert psnr(seen, plain_crop(picture, box)) > 50


def test_a_large_jpeg_is_decoded_at_reduced_scale_and_never_below_twice_the_crop(monkeypatch):
    asked, decode = [], train_dogs.decode_picture

    def watched(picture: Image.Image, *scale: int) -> Image.Image:
        made = decode(picture, *scale)
        asked.append(made.size)
        return made

    monkeypatch.setattr(train_dogs, "decode_picture", watched)
    picture = encode(paint(1, (2048, 1536)))
    for side, width in (
        (1536, 256),
        (1024, 256),
        (1023, 512),
        (512, 512),
        (300, 1024),
        (200, 2048),
    ):
        crop_one(picture, (100, 0, 100 + side, side), ["box"], (2048, 1536))
        assert asked[-1][0] == width and side * asked[-1][0] / 2048 >= 128
    crop_one(picture, (0, 0, 1536, 200), ["whole", "box"], (2048, 1536))  # the narrowest counts
    assert asked[-1] == (2048, 1536)


@pytest.mark.parametrize("folder", ["real_originals", "real_dogs", "sample_dogs"])
def test_median_psnr_against_full_decoding_is_45_db(folder, request):
    found = find_photos([request.getfixturevalue(folder)])
    photos = found.photos[:: max(1, len(found.photos) // 120)]
    assert len(photos) >= 100
    values = []
    for photo in photos:
        xml, data = photo.read_annotation(), photo.read()
        frame = Image.open(io.BytesIO(data)).size
        dogs, reasons = train_dogs.crop_photo(photo, ["square"])
        assert reasons == []
        for dog, box in zip(dogs, train_dogs.parse_annotation(xml)[1], strict=True):
            ((left, top, right, bottom),) = train_dogs.crop_square(clip_box(box, *frame), *frame)
            plain = plain_crop(data, (int(left), int(top), int(right), int(bottom)))
            values.append(psnr(dog[0][0], plain))
    assert np.median(values) >= 45


# ------------------------------------------------------------------ the prepared set, its cache


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache for this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "train_dogs"


@pytest.fixture
def dogs_root(tmp_path) -> Path:
    return as_folders(tmp_path / "set", make_dogs(20))


def prepare(root: Path, kinds: str = "square") -> train_dogs.CropSet:
    return prepare_crops(find_photos([root]), kinds, show=False)


def same(a: train_dogs.CropSet, b: train_dogs.CropSet) -> bool:
    """Equal in everything a run sees."""
    tensors = ("crops", "first", "count", "weights", "breed")
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in tensors) and (
        (a.breeds, a.skipped, a.key) == (b.breeds, b.skipped, b.key)
    )


def kept(cache: Path) -> dict[str, int]:
    """The cache's files and when they were written."""
    return {str(p): p.stat().st_mtime_ns for p in cache.rglob("*") if p.is_file()}


def test_each_dog_has_each_kind_and_head_its_views(tmp_path, cache):
    boxes = [(10, 12, 86, 70), (20, 5, 50, 75)]  # a wide one and a tall one
    dogs = [make_dog(k)._replace(annotation=annotate(boxes)) for k in range(16)]
    made = prepare(as_folders(tmp_path / "set", dogs), "square:2,head:1,whole:1")
    assert made.crops.dtype == torch.uint8 and made.crops.shape == (16 * (5 + 3), 64, 64, 3)
    assert made.weights.tolist() == [0.25, 0.5, 0.25]  # head, square, whole
    assert made.count.tolist() == [[3, 1, 1], [1, 1, 1]] * 16
    whole = made.crops[made.first[:, 2]]
    assert torch.equal(whole[::2], whole[1::2])  # two dogs of one photo
    assert [made.breeds[i] for i in made.breed] == sorted(d.breed for d in dogs for _ in boxes)


def test_a_second_start_is_equal_and_reads_no_picture(dogs_root, cache, monkeypatch):
    first = prepare(dogs_root)
    before = kept(cache)
    monkeypatch.setattr(train_dogs, "crop_photo", None)  # would fail if it were called
    again = prepare(dogs_root)
    assert same(first, again) and kept(cache) == before and len(before) >= 1
    assert sum(p.stat().st_size for p in cache.rglob("*.bin")) == 20 * 64 * 64 * 3


def test_a_second_start_is_fast_and_light_for_22000_dogs(tmp_path, cache, monkeypatch):
    """As many entries as Stanford Dogs, all of them the same small photo."""
    picture, xml = encode(paint(1, (64, 64)), quality=50), annotate([(0, 0, 64, 64)], (64, 64))
    photos = [
        train_dogs.Photo(
            f"breed{k % 120}/{k}.jpg",
            f"breed{k % 120}",
            train_dogs.Entry(f"Images/breed{k % 120}/{k}.jpg", len(picture), k, lambda: picture),
            train_dogs.Entry(f"Annotation/breed{k % 120}/{k}", len(xml), k, lambda: xml),
        )
        for k in range(22_000)
    ]
    dogs = train_dogs.PhotoSet("many", photos, [], True)
    crop = np.zeros((1, 64, 64, 3), np.uint8)
    with monkeypatch.context() as patch:  # the first start's time is the benchmark's affair
        patch.setattr(train_dogs, "crop_photo", lambda *_: ([[crop]], []))
        prepare_crops(dogs, "square", show=False)
    monkeypatch.setattr(train_dogs, "crop_photo", None)
    begin = time.monotonic()
    made = prepare_crops(dogs, "square", show=False)
    assert time.monotonic() - begin < 5
    assert len(made.crops) == 22_000 and int(made.crops[-1].sum()) == 0


def test_the_crops_can_be_moved_and_changed_without_touching_the_cache(dogs_root, cache):
    made = prepare(dogs_root)
    copy = made.crops.clone()
    made.crops.zero_()
    assert torch.equal(prepare(dogs_root).crops, copy)
    assert made.to(torch.device("cpu")).key == made.key


def change_content(root: Path) -> None:
    path = next((root / "Images").rglob("*.jpg"))
    path.write_bytes(encode(paint(77), quality=60))


def change_same_size(root: Path) -> None:
    path = next((root / "Annotation").rglob("*_*"))
    path = next(p for p in (root / "Annotation").rglob("*") if p.is_file())
    path.write_bytes(path.read_bytes().replace(b"<xmin>10<", b"<xmin>20<"))
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 10**9))


def change_name(root: Path) -> None:
    path = next((root / "Images").rglob("*.jpg"))
    path.rename(path.with_suffix(".jpeg"))


def add_a_dog(root: Path) -> None:
    as_folders(root, [make_dog(50)])


def add_a_lonely_one(root: Path) -> None:
    as_folders(root, [make_dog(50)._replace(annotation=None)])


@pytest.mark.parametrize(
    "change", [change_content, change_same_size, change_name, add_a_dog, add_a_lonely_one]
)
def test_any_change_of_the_files_makes_new_crops(change, dogs_root, cache, tmp_path):
    first = prepare(dogs_root)
    change(dogs_root)
    again = prepare(dogs_root)
    assert not same(first, again) or change is change_name
    assert len(list(cache.rglob("*.bin"))) == 2
    shutil.rmtree(cache)
    assert same(again, prepare(dogs_root))  # what a fresh cache gives


def test_a_touched_file_is_read_again(dogs_root, cache):
    prepare(dogs_root)
    path = next((dogs_root / "Images").rglob("*.jpg"))
    os.utime(path, ns=(1, 10**18))
    prepare(dogs_root)
    assert len(list(cache.rglob("*.bin"))) == 2


def test_the_key_holds_kinds_and_pillows_version_but_not_weights(dogs_root, cache, monkeypatch):
    prepare(dogs_root, "square:1,head:1")
    assert prepare(dogs_root, "head:3,square:1").weights.tolist() == [0.75, 0.25]
    assert len(list(cache.rglob("*.bin"))) == 1
    prepare(dogs_root, "square")
    assert len(list(cache.rglob("*.bin"))) == 2
    monkeypatch.setattr(PIL, "__version__", "99.0")
    prepare(dogs_root, "square")
    assert len(list(cache.rglob("*.bin"))) == 3


def test_the_same_dogs_elsewhere_have_the_same_key_for_a_resumed_run(dogs_root, cache, tmp_path):
    copied = shutil.copytree(dogs_root, tmp_path / "kaggle" / "dogs", copy_function=shutil.copyfile)
    assert prepare(copied).key == prepare(dogs_root).key
    change_content(copied)
    assert prepare(copied).key != prepare(dogs_root).key


def spoil(cache: Path, how: str) -> None:
    pixels, index = next(cache.rglob("*.bin")), next(cache.rglob("*.json"))
    if how == "pixels cut":
        os.truncate(pixels, pixels.stat().st_size // 2)
    elif how == "pixels too many":
        pixels.write_bytes(pixels.read_bytes() + bytes(64))
    elif how == "pixels empty":
        pixels.write_bytes(b"")
    elif how == "pixels gone":
        pixels.unlink()
    elif how == "index gone":
        index.unlink()
    elif how == "index cut":
        os.truncate(index, index.stat().st_size // 2)
    elif how == "index binary":
        index.write_bytes(bytes(range(256)))
    elif how in ("null", "[]", "{}", "3"):
        index.write_text(how)
    elif how == "index of other shape":
        table = json.loads(index.read_text())
        table["count"][0] = [1, 2, 3]
        index.write_text(json.dumps(table))


@pytest.mark.parametrize(
    "how",
    [
        "pixels cut",
        "pixels too many",
        "pixels empty",
        "pixels gone",
        "index gone",
        "index cut",
        "index binary",
        "null",
    ]
    + ["[]", "{}", "3", "index of other shape"],
)
def test_a_damaged_cache_is_made_anew(how, dogs_root, cache, monkeypatch):
    first = prepare(dogs_root)
    first = replace(first, crops=first.crops.clone())  # not a view of the file that is spoiled
    spoil(cache, how)
    assert same(first, prepare(dogs_root))
    monkeypatch.setattr(train_dogs, "crop_photo", None)
    assert same(first, prepare(dogs_root))


def prepare_elsewhere(root: str, cache: str, ready: object) -> int:
    os.environ["XDG_CACHE_HOME"] = cache
    found = find_photos([root])
    ready.wait(60)
    return int(prepare_crops(found, "square", show=False).crops.sum(dtype=torch.int64))


def test_two_processes_that_prepare_at_once_both_succeed(dogs_root, cache, tmp_path):
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        ready = manager.Barrier(2)
        arguments = (str(dogs_root), str(cache.parent), ready)
        with context.Pool(2) as pool:
            sums = pool.starmap(prepare_elsewhere, [arguments] * 2)
    assert sums[0] == sums[1] == int(prepare(dogs_root).crops.sum(dtype=torch.int64))
    assert len(list(cache.iterdir())) == 1  # nothing half-made stays behind


def test_many_threads_that_prepare_at_once_all_succeed(dogs_root, cache):
    found = find_photos([dogs_root])
    for _ in range(5):
        shutil.rmtree(cache, ignore_errors=True)
        with ThreadPoolExecutor(6) as pool:
            made = list(pool.map(lambda _: prepare_crops(found, "square", show=False), range(6)))
        assert all(same(made[0], other) for other in made)
        assert len(list(cache.iterdir())) == 1


def test_a_refused_set_and_an_interrupt_leave_nothing_in_the_cache(
    tmp_path, dogs_root, cache, monkeypatch
):
    with pytest.raises(UserError):
        prepare(as_folders(tmp_path / "few", make_dogs(3)))
    crop = train_dogs.crop_photo

    def interrupted(photo: train_dogs.Photo, kinds: list[str]) -> object:
        if photo.name.endswith("1013.jpg"):
            raise KeyboardInterrupt
        return crop(photo, kinds)

    monkeypatch.setattr(train_dogs, "crop_photo", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(dogs_root)
    assert list(cache.iterdir()) == []
    monkeypatch.setattr(train_dogs, "crop_photo", crop)
    assert len(prepare(dogs_root).first) == 20


def test_a_cache_that_cannot_be_written_ends_with_2_and_names_the_variable(
    dogs_root, tmp_path, monkeypatch, capsys
):
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where a folder is needed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    flags = ["--device", "cpu", "--out", str(tmp_path / "out")]
    assert train_dogs.main(["--data", str(dogs_root), *flags]) == 2
    assert "XDG_CACHE_HOME" in capsys.readouterr().err.strip().splitlines()[-1]
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o555)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "locked"))
        assert train_dogs.main(["--data", str(dogs_root), *flags]) == 2


def test_the_cache_lies_where_xdg_says_else_under_home(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert train_dogs.cache_folder() == tmp_path / "train_dogs"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    if not Path("/kaggle").is_dir():
        assert train_dogs.cache_folder() == tmp_path / ".cache/train_dogs"


def test_pictures_are_read_in_several_threads_and_kept_in_order(dogs_root, cache, monkeypatch):
    import threading

    seen, crop = set(), train_dogs.crop_photo

    def watched(photo: train_dogs.Photo, kinds: list[str]) -> object:
        seen.add(threading.get_ident())
        time.sleep(0.002 * (int(photo.name[-5]) % 3))  # finished in another order than begun
        return crop(photo, kinds)

    monkeypatch.setattr(train_dogs, "crop_photo", watched)
    made = prepare(dogs_root)
    if (os.cpu_count() or 1) > 1:
        assert len(seen) > 1 and threading.get_ident() not in seen
    for photo, (first,) in zip(find_photos([dogs_root]).photos, made.first.tolist()):
        alone = crop(photo, ["square"])[0][0][0]
        assert (made.crops[first].numpy() == alone).all()


def test_an_error_in_a_thread_drops_what_is_still_waiting():
    begun = []

    def work(k: int) -> None:
        begun.append(k)
        time.sleep(0.01)
        if k == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(train_dogs.in_threads(work, range(500)))
    assert len(begun) < 250


# ------------------------------------------------------------------------- drawing batches


def numbered(weights: list[float], counts: list[list[int]]) -> train_dogs.CropSet:
    """Crops of two columns: the left one says which view they are, the right one is 255."""
    views = sum(map(sum, counts))
    crops = torch.arange(views, dtype=torch.uint8)[:, None, None, None].repeat(1, 2, 2, 3)
    crops[:, :, 1] = 255
    count = torch.tensor(counts)
    first = (count.flatten().cumsum(0) - count.flatten()).reshape(count.shape)
    breed = torch.zeros(len(counts), dtype=torch.int64)
    return train_dogs.CropSet(crops, first, count, torch.tensor(weights), breed, ["x"], [], "key")


def drawn_views(dogs: train_dogs.CropSet, row: int, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Which views were drawn for a dog, and which of them mirrored."""
    rows = torch.full((draws,), row)
    batch = train_dogs.draw_reals(dogs, rows, torch.Generator().manual_seed(1))
    left, right = (batch[:, 0, 0, x].add(1).mul(127.5).round().numpy() for x in (0, 1))
    mirrored = left == 255
    return np.where(mirrored, right, left).astype(int), mirrored


def test_kinds_are_drawn_by_their_weights_and_views_of_a_kind_evenly():
    dogs = numbered([0.5, 0.3, 0.2], [[1, 3, 1], [3, 1, 2]])
    for row, expected in (
        (0, {0: 0.5, 1: 0.1, 2: 0.1, 3: 0.1, 4: 0.2}),
        (1, {5: 0.5 / 3, 6: 0.5 / 3, 7: 0.5 / 3, 8: 0.3, 9: 0.1, 10: 0.1}),
    ):
        views, _ = drawn_views(dogs, row, 40_000)
        assert set(views) == set(expected)
        for view, share in expected.items():  # five standard deviations
            assert abs((views == view).mean() - share) < 5 * (share / 40_000) ** 0.5


def test_half_of_the_draws_are_mirrored_whatever_the_kind():
    dogs = numbered([0.5, 0.5], [[1, 1]])
    views, mirrored = drawn_views(dogs, 0, 40_000)
    for view in (0, 1):
        assert abs(mirrored[views == view].mean() - 0.5) < 0.02


def test_a_draw_is_a_view_or_its_mirror_image_scaled_to_one(dogs_root, cache):
    made = prepare(dogs_root)
    rows = torch.tensor([0, 7, 19, 7])
    batch = train_dogs.draw_reals(made, rows, torch.Generator().manual_seed(0))
    assert batch.shape == (4, 3, 64, 64) and batch.dtype == torch.float32
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert -1 <= batch.min() < -0.5 and 0.5 < batch.max() <= 1
    for image, row in zip(batch, rows):
        plain = made.crops[made.first[row, 0]].numpy().astype(np.float32) / 127.5 - 1
        seen = image.permute(1, 2, 0).numpy()
        assert min(np.abs(seen - plain).max(), np.abs(seen[:, ::-1] - plain).max()) < 1e-6


def test_draws_span_minus_one_to_one():
    dogs = numbered([1.0], [[1]])
    batch = train_dogs.draw_reals(dogs, torch.zeros(8, dtype=torch.int64), None)
    assert batch.min() == -1 and batch.max() == 1


def test_draws_repeat_with_the_generators_seed_and_change_from_call_to_call(dogs_root, cache):
    made, rows = prepare(dogs_root, "square,head,whole"), torch.arange(20)
    a, b = (torch.Generator().manual_seed(3) for _ in range(2))
    state = torch.get_rng_state()
    first = train_dogs.draw_reals(made, rows, a)
    assert torch.equal(first, train_dogs.draw_reals(made, rows, b))
    assert not torch.equal(first, train_dogs.draw_reals(made, rows, a))
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's randomness was used


def test_the_real_originals_are_prepared_whole_and_left_as_they_are(real_originals, cache):
    before = dog_sets.snapshot(real_originals)
    found = find_photos([real_originals])
    made = prepare_crops(found, "square,head", show=False)
    boxes = sum(
        len(train_dogs.parse_annotation(photo.read_annotation())[1]) for photo in found.photos
    )
    assert len(made.first) == boxes >= len(found.photos) and made.skipped == []
    assert made.crops.float().std() > 30
    assert dog_sets.snapshot(real_originals) == before
