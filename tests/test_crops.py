"""Crops: exact geometry, true pixels, a cache whose damage is noticed, draws by weights."""

import io
import itertools
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import dog_sets
import numpy as np
import PIL
import pytest
import torch
from dog_sets import annotate, as_folders, encode, make_dog, make_dogs, paint, photo_of
from PIL import Image, JpegImagePlugin

import mifid
import train_dogs
from train_dogs import CROPS, BadItem, CropSet, UserError, clip_box, find_photos, prepare_crops

Box = tuple[float, float, float, float]

# ------------------------------------------------------------------------------- geometry


def test_all_boxes_of_all_small_frames():
    """Every box of every frame up to 7 x 7 against a search over all squares at half pixels."""
    for width, height in itertools.product(range(1, 8), repeat=2):
        spans = [list(itertools.combinations(range(n + 1), 2)) for n in (width, height)]
        for (left, right), (top, bottom) in itertools.product(*spans):
            box = (left, top, right, bottom)
            views = {kind: crop(box, width, height) for kind, crop in CROPS.items()}
            long, short = sorted((right - left, bottom - top), reverse=True)
            middle = ((left + right) / 2, (top + bottom) / 2)

            side = max(n for n in range(1, 8) if n <= min(width, height, long))
            x, y = (
                min((k / 2 for k in range(2 * (n - side) + 1)), key=lambda s: abs(s + side / 2 - m))
                for n, m in zip((width, height), middle)
            )
            assert views["square"] == [(x, y, x + side, y + side)]
            if long <= min(width, height):  # it covers the box
                assert x <= left and right <= x + side and y <= top and bottom <= y + side

            starts = sorted({left, middle[0] - short / 2, right - short})
            assert views["head"] == [(x, top, x + short, top + short) for x in starts]
            assert (views["box"], views["whole"]) == ([box], [(0, 0, width, height)])


def notebook_context(box: Box, width: int, height: int) -> Box:
    """The fourth kind of crop of Morxrc's notebook, case by case as there."""
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    half = min(width - x, height - y, x, y)
    x1, y1, x2, y2 = x - half, y - half, x + half, y + half
    if x1 == 0:
        more = int(min(width - x2, height - y2, y1) * 0.28)
        return (x1, y1 - more, x2 + 2 * more, y2 + more)
    if x2 == width:
        more = int(min(x1, height - y2, y1) * 0.28)
        return (x1 - 2 * more, y1 - more, x2, y2 + more)
    if y1 == 0:
        more = int(min(x1, width - x2, height - y2) * 0.28)
        return (x1 - more, y1, x2 + more, y2 + 2 * more)
    more = int(min(x1, width - x2, y1) * 0.28)
    return (x1 - more, y1 - 2 * more, x2 + more, y2)


def test_context_is_the_fourth_crop_of_the_notebook():
    chance = random.Random(0)
    for _ in range(3000):
        frame = [chance.randint(20, 800) for _ in range(2)]
        (left, right), (top, bottom) = (sorted(chance.sample(range(n + 1), 2)) for n in frame)
        (view,) = CROPS["context"]((left, top, right, bottom), *frame)
        assert view == notebook_context((left, top, right, bottom), *frame)


def test_views_of_large_frames_lie_inside_hold_a_pixel_and_are_square():
    """Boxes between pixels, in frames of up to 5,000."""
    chance = random.Random(0)
    for _ in range(3000):
        frame = [chance.choice([chance.randint(1, 40), chance.randint(1, 5000)]) for _ in range(2)]
        edges = [sorted((chance.uniform(0, n), chance.uniform(0, n))) for n in frame]
        if min(high - low for low, high in edges) < 1:
            continue
        for kind, crop in CROPS.items():
            for left, top, right, bottom in crop(tuple(itertools.chain(*zip(*edges))), *frame):
                assert -1e-6 <= left and right <= frame[0] + 1e-6, kind
                assert -1e-6 <= top and bottom <= frame[1] + 1e-6, kind
                assert min(right - left, bottom - top) >= 1 - 1e-6, kind
                assert kind in ("box", "whole") or abs(right - left - bottom + top) < 1e-6, kind


def test_a_clipped_box_is_the_set_of_its_pixels_inside():
    """Every box around a frame of 4 x 3 against its pixels, one by one along each side."""
    for box in itertools.product(range(-2, 7), repeat=4):
        columns = [x for x in range(box[0], box[2]) if 0 <= x < 4]
        rows = [y for y in range(box[1], box[3]) if 0 <= y < 3]
        if columns and rows:
            inside = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            assert clip_box(box, 4, 3) == inside
        else:
            with pytest.raises(BadItem):
                clip_box(box, 4, 3)


def test_crops_are_parsed_into_shares():
    assert train_dogs.parse_crops("square") == {"square": 1.0}
    assert train_dogs.parse_crops("square:3,context:1") == {"square": 0.75, "context": 0.25}
    assert train_dogs.parse_crops(" box , head ") == {"box": 0.5, "head": 0.5}


@pytest.mark.parametrize(
    "text",
    ["", "dog", "square,", "square:0", "square:-1", "square:nan", "square:inf", "square:x"]
    + ["square,square", "square:1:2", "Square"],
)
def test_senseless_crops_are_refused_and_the_kinds_are_named(text):
    with pytest.raises(UserError, match="box, square, head, context, whole"):
        train_dogs.parse_crops(text)


# --------------------------------------------------------------------------------- pixels


def crop_one(picture: bytes, box: Box, kinds: list[str]) -> list[np.ndarray]:
    """The views of the one dog in a photo, for each kind."""
    (dog,), reasons = train_dogs.crop_photo(photo_of(picture, annotate([box])), kinds)
    assert reasons == []
    return dog


def resample_rows(pixels: np.ndarray, start: float, end: float, count: int) -> np.ndarray:
    """Axis 0 from [start, end) to `count` samples, by a plain loop: sinc(x) sinc(x / 3)."""
    step = (end - start) / count
    reach, rows = max(step, 1.0), []
    for k in range(count):
        away = (np.arange(len(pixels)) + 0.5 - (start + (k + 0.5) * step)) / reach
        near = np.abs(away) < 3
        weights = np.sinc(away[near]) * np.sinc(away[near] / 3)
        rows.append(np.tensordot(weights / weights.sum(), pixels[near], 1))
    return np.stack(rows)


@pytest.mark.parametrize(
    "box", [(10, 7, 190, 140), (60, 30, 90, 75), (0, 0, 64, 64), (1, 2, 9, 150)]
)
def test_crops_are_lanczos_with_antialiasing(box):
    """Against a slow loop in float64, on noise, for shrinking and for growing crops."""
    noise = np.random.default_rng(0).integers(0, 256, (150, 200, 3), dtype=np.uint8)
    dog = crop_one(encode(Image.fromarray(noise), "PNG"), box, list(CROPS))
    for kind, seen in zip(CROPS, dog):
        for view, (left, top, right, bottom) in zip(seen, CROPS[kind](box, 200, 150), strict=True):
            across = resample_rows(noise.swapaxes(0, 1).astype(float), left, right, 64)
            across = np.clip(np.rint(across), 0, 255)  # Pillow rounds between its two passes
            exact = resample_rows(across.swapaxes(0, 1), top, bottom, 64)
            assert np.abs(np.clip(exact, 0, 255) - view).max() <= 1.5


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(255**2 / max(1e-9, np.mean((a.astype(float) - b) ** 2)))


def plain_crop(picture: bytes, box: Box) -> np.ndarray:
    """The usual way: open, decode in full, cut the pixels out, resize."""
    cut = Image.open(io.BytesIO(picture)).convert("RGB").crop(tuple(map(int, box)))
    return np.asarray(cut.resize((64, 64), Image.Resampling.LANCZOS))


@pytest.mark.parametrize("size", [(1001, 751), (1999, 1333), (513, 385), (4097, 1025), (130, 131)])
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
        ((seen,),) = crop_one(picture, box, ["box"])
        assert psnr(seen, plain_crop(picture, box)) > 50


def test_a_large_jpeg_is_decoded_at_reduced_scale_and_never_below_twice_the_crop(monkeypatch):
    widths, load = [], JpegImagePlugin.JpegImageFile.load
    monkeypatch.setattr(
        JpegImagePlugin.JpegImageFile, "load", lambda p: (widths.append(p.width), load(p))[1]
    )
    picture = encode(paint(1, (2048, 1536)))
    sides = {1536: 256, 1024: 256, 1023: 512, 512: 512, 300: 1024, 200: 2048}
    for side, width in sides.items():
        crop_one(picture, (100, 0, 100 + side, side), ["box"])
        assert widths[-1] == width and side * width / 2048 >= 128
    crop_one(picture, (0, 0, 1536, 200), ["whole", "box"])  # the narrowest counts
    assert widths[-1] == 2048


@pytest.mark.parametrize("folder", ["real_originals", "real_dogs", "sample_dogs"])
def test_median_psnr_against_full_decoding_is_45_db(folder, request):
    found = find_photos([request.getfixturevalue(folder)])
    values = []
    for photo in found.photos[:: max(1, len(found.photos) // 120)]:
        picture, boxes = train_dogs.read_photo(photo)
        for (seen,), box in zip(train_dogs.crop_photo(photo, ["square"])[0], boxes, strict=True):
            (square,) = CROPS["square"](box, *picture.size)
            values.append(psnr(seen[0], plain_crop(photo.picture.read(), square)))
    assert len(values) >= 100 and np.median(values) >= 45


# ------------------------------------------------------------------ the prepared set, its cache


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache for this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "train_dogs"


@pytest.fixture
def dogs_root(tmp_path) -> Path:
    return as_folders(tmp_path / "set", make_dogs(20))


def prepare(root: Path, kinds: str = "square") -> CropSet:
    return prepare_crops(find_photos([root]), kinds, show=False)


def same(a: CropSet, b: CropSet) -> bool:
    """Equal in everything a run sees."""
    tensors = ("pixels", "first", "count", "weights", "breed")
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in tensors) and (
        (a.breeds, a.skipped, a.key) == (b.breeds, b.skipped, b.key)
    )


def test_each_dog_has_each_kind_and_head_its_views(tmp_path, cache):
    boxes = [(10, 12, 86, 70), (20, 5, 50, 75)]  # a wide one and a tall one
    dogs = [make_dog(k, boxes) for k in range(16)]
    made = prepare(as_folders(tmp_path / "set", dogs), "square:2,head:1,whole:1")
    assert made.pixels.dtype == torch.uint8 and made.pixels.shape == (16 * (5 + 3), 64, 64, 3)
    assert sorted(made.count.tolist()) == [[1, 1, 1]] * 16 + [[3, 1, 1]] * 16
    assert made.first.flatten().tolist() == [0, *made.count.flatten().cumsum(0).tolist()[:-1]]
    assert made.weights.tolist() == [0.25, 0.5, 0.25]  # head, square, whole
    whole = made.pixels[made.first[:, 2]]
    assert torch.equal(whole[::2], whole[1::2])  # two dogs of one photo
    assert [made.breeds[i] for i in made.breed] == sorted(d.breed for d in dogs for _ in boxes)


def test_a_second_start_is_equal_and_reads_no_picture(dogs_root, cache, monkeypatch):
    """Also after the crops in memory, which are mapped from the cache, were changed."""
    first, (kept,) = prepare(dogs_root), cache.iterdir()
    written = kept.stat().st_mtime_ns
    monkeypatch.setattr(Image, "open", None)  # would fail if it were called
    prepare(dogs_root).pixels.zero_()
    assert same(first, prepare(dogs_root))
    assert list(cache.iterdir()) == [kept] and kept.stat().st_mtime_ns == written


def test_a_refused_set_is_refused_again_and_an_interrupt_leaves_nothing_in_the_cache(
    tmp_path, dogs_root, cache, monkeypatch
):
    few = as_folders(tmp_path / "few", make_dogs(3))
    for _ in range(2):
        with pytest.raises(UserError, match="at least 16"):
            prepare(few)

    def interrupted(table: dict, file: io.BufferedWriter) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", interrupted)
        prepare(dogs_root)
    assert list(cache.iterdir()) == []


def a_picture(root: Path) -> Path:
    return min((root / "Images").rglob("*.jpg"))


def move_a_box(root: Path) -> None:
    """A box moved where the file keeps its size."""
    path = min(p for p in (root / "Annotation").rglob("*") if p.is_file())
    moved = path.read_bytes().replace(b"<xmin>10<", b"<xmin>20<")
    assert moved != path.read_bytes()
    path.write_bytes(moved)


def cut_a_picture(root: Path) -> None:
    """Shorter, but as old as it was."""
    path, old = a_picture(root), a_picture(root).stat()
    os.truncate(path, old.st_size // 2)
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))


def move_a_dog(root: Path) -> None:
    """The last dog of one breed becomes the first of the next: only the breed is another."""
    for half in ("Images", "Annotation"):
        (path,) = (root / half / dog_sets.BREEDS[0]).glob("*_1018*")
        path.rename(root / half / dog_sets.BREEDS[1] / path.name)


CHANGES: dict[str, Callable[[Path], object]] = {
    "a box moved at equal size": move_a_box,
    "a dog more": lambda r: as_folders(r, [make_dog(50)]),
    "a picture cut": cut_a_picture,
    "a dog of another breed": move_a_dog,
    "a breed renamed": lambda r: [
        (r / half / dog_sets.BREEDS[0]).rename(r / half / "n1-Wolf") for half in os.listdir(r)
    ],
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_the_crops_changes_the_key(change, dogs_root, cache):
    first = prepare(dogs_root)
    CHANGES[change](dogs_root)
    again = prepare(dogs_root)
    assert again.key != first.key and not same(first, again)
    shutil.rmtree(cache)
    assert same(again, prepare(dogs_root))  # what a fresh cache gives


def test_the_same_dogs_elsewhere_or_later_have_the_same_key(dogs_root, cache, tmp_path):
    """A resumed run may find them on another disk, touched, with more that is left out."""
    first = prepare(dogs_root)
    copied = shutil.copytree(dogs_root, tmp_path / "kaggle" / "dogs", copy_function=shutil.copyfile)
    assert prepare(copied).key == first.key
    as_folders(copied, [make_dog(50)._replace(annotation=None)])
    made = prepare(copied)
    assert made.key == first.key and len(made.skipped) == 1
    assert len(list(cache.iterdir())) == 3


def test_the_cache_knows_kinds_and_pillows_version_but_not_weights(dogs_root, cache, monkeypatch):
    prepare(dogs_root, "square:1,head:1")
    assert sorted(prepare(dogs_root, "head:3,square:1").weights.tolist()) == [0.25, 0.75]
    assert len(list(cache.iterdir())) == 1
    prepare(dogs_root, "square")
    assert len(list(cache.iterdir())) == 2
    monkeypatch.setattr(PIL, "__version__", "99.0")
    prepare(dogs_root, "square")
    assert len(list(cache.iterdir())) == 3


def flip_a_pixel(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda p: os.truncate(p, p.stat().st_size // 2),
    "text": lambda p: p.write_text("no torch file"),
    "one bit of a pixel": flip_a_pixel,
    "an object": lambda p: torch.save(Path("x"), p),
    "other keys": lambda p: torch.save({"key": "", "pixels": torch.zeros(1)}, p),
    "a count less": lambda p: torch.save((t := torch.load(p)) | {"count": t["count"][:-1]}, p),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_made_anew(damage, dogs_root, cache, monkeypatch):
    first, (kept,) = prepare(dogs_root), cache.iterdir()
    DAMAGES[damage](kept)
    assert same(first, prepare(dogs_root))
    monkeypatch.setattr(Image, "open", None)
    assert same(first, prepare(dogs_root))


def test_what_a_killed_run_left_in_the_cache_is_removed_but_not_a_running_ones(dogs_root, cache):
    old, new = (cache / f".{name}.pt.1-abcdef.part" for name in ("killed", "running"))
    for part in (old, new):
        dog_sets.write(part, b"half")
    os.utime(old, (0, time.time() - 86_400))
    prepare(dogs_root)
    assert not old.exists() and new.exists()


def test_a_cache_that_cannot_be_written_is_a_note(dogs_root, cache, monkeypatch, capsys):
    whole = prepare(dogs_root)
    dog_sets.write(cache.parent / "blocked", b"a file where a folder is needed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent / "blocked"))
    assert capsys.readouterr().out == "" and same(prepare(dogs_root), whole)
    (line,) = capsys.readouterr().out.splitlines()
    assert "XDG_CACHE_HOME" in line


RACER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch, train_dogs
save, root, own, other = torch.save, *map(Path, sys.argv[2:])

def save_and_wait(*args):
    save(*args)
    own.touch()
    while not other.exists():
        time.sleep(0.01)

torch.save = save_and_wait
made = train_dogs.prepare_crops(train_dogs.find_photos([root]), "square,head", show=False)
print(made.key)
"""


def test_two_runs_that_prepare_the_same_crops_at_the_same_time_share_the_cache(
    dogs_root, cache, tmp_path, monkeypatch
):
    """Each waits with a whole unnamed file until the other has one too; then both rename theirs."""
    flags = [tmp_path / "a", tmp_path / "b"]
    command = [sys.executable, "-c", RACER, str(Path(train_dogs.__file__).parent), str(dogs_root)]
    racers = [
        subprocess.Popen([*command, *map(str, order)], stdout=subprocess.PIPE, text=True)
        for order in (flags, flags[::-1])
    ]
    try:
        keys = [racer.communicate(timeout=240)[0].strip() for racer in racers]
    finally:
        for racer in racers:
            racer.kill()
    assert [racer.returncode for racer in racers] == [0, 0]
    assert len(list(cache.iterdir())) == 1
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", None)  # would fail if it were called
        kept = prepare(dogs_root, "square,head")
    shutil.rmtree(cache)
    assert keys == [kept.key] * 2 and same(kept, prepare(dogs_root, "square,head"))


def test_an_error_in_a_thread_drops_what_is_still_waiting():
    begun, go = [], threading.Event()

    def work(k: int) -> None:
        begun.append(k)
        if k == 0:
            raise KeyboardInterrupt
        go.wait(60)

    with pytest.raises(KeyboardInterrupt):
        list(train_dogs.in_threads(work, range(500)))
    go.set()
    assert len(begun) <= 9  # one for each of at most eight threads, and the one that failed


@pytest.mark.parametrize("ahead", [train_dogs.in_threads, mifid.submit_ahead])
def test_closing_a_generator_of_threads_does_not_wait_for_their_work(ahead):
    go = threading.Event()
    results = ahead(lambda k: k == 0 or go.wait(), range(3))
    next(results)
    closing = threading.Thread(target=results.close, daemon=True)
    closing.start()
    closing.join(60)
    waits = closing.is_alive()
    go.set()
    assert not waits


@pytest.mark.parametrize("ahead", [train_dogs.in_threads, mifid.submit_ahead])
def test_threads_take_no_more_items_than_they_are_ahead(ahead):
    taken = []
    next(ahead(lambda k: k, (taken.append(k) for k in range(99)), ahead=4))
    assert len(taken) == 5


# ------------------------------------------------------------------------- drawing batches


def numbered(weights: list[float], counts: list[list[int]]) -> CropSet:
    """Crops of two columns: the left one says which view they are, the right one is 255."""
    pixels = torch.arange(sum(map(sum, counts)), dtype=torch.uint8)
    pixels = pixels[:, None, None, None].repeat(1, 2, 2, 3)
    pixels[:, :, 1] = 255
    count = torch.tensor(counts)
    first = (count.flatten().cumsum(0) - count.flatten()).reshape(count.shape)
    breed = torch.zeros(len(counts), dtype=torch.int64)
    return CropSet(pixels, first, count, torch.tensor(weights), breed, ["x"], [], "key")


@pytest.mark.parametrize(
    ("row", "expected"),  # by hand: a kind's weight, evenly over its views
    [
        (0, {0: 0.5, 1: 0.1, 2: 0.1, 3: 0.1, 4: 0.2}),
        (1, {5: 0.5 / 3, 6: 0.5 / 3, 7: 0.5 / 3, 8: 0.3, 9: 0.1, 10: 0.1}),
    ],
)
def test_kinds_are_drawn_by_weight_views_evenly_and_each_of_them_mirrored_half_the_time(
    row, expected
):
    dogs, draws = numbered([0.5, 0.3, 0.2], [[1, 3, 1], [3, 1, 2]]), 40_000
    generator = torch.Generator().manual_seed(1)
    batch = train_dogs.draw_reals(dogs, torch.full((draws,), row), generator)
    left, right = (batch[:, 0, 0, x].add(1).mul(127.5).round().int().numpy() for x in (0, 1))
    mirrored = left == 255
    views = np.where(mirrored, right, left)
    assert set(views) == set(expected)
    for view, share in expected.items():  # five standard deviations
        assert abs((views == view).mean() - share) < 5 * (share / draws) ** 0.5
        count = (views == view).sum()
        assert abs(mirrored[views == view].mean() - 0.5) < 2.5 / count**0.5


def test_the_weights_of_crops_reach_the_batches_whatever_their_order(tmp_path, cache):
    root = as_folders(tmp_path / "set", make_dogs(16))
    for kinds in ("whole:1,box:3", "box:3,whole:1"):
        rows = torch.zeros(1000, dtype=torch.int64)
        made = prepare(root, kinds)
        drawn = train_dogs.draw_reals(made, rows, torch.Generator().manual_seed(0))
        picture = Image.open(a_picture(root)).resize((64, 64), Image.Resampling.LANCZOS)
        whole = torch.from_numpy(np.asarray(picture) / 127.5 - 1).permute(2, 0, 1)
        off = torch.minimum((drawn - whole).abs().mean((1, 2, 3)),
            (drawn - whole.flip(2)).abs().mean((1, 2, 3)))  # fmt: skip
        assert abs((off < 0.01).float().mean() - 0.25) < 0.07


def test_draws_repeat_with_the_generators_seed_and_change_from_call_to_call(dogs_root, cache):
    made, rows = prepare(dogs_root, "square,head,whole"), torch.arange(20)
    a, b = (torch.Generator().manual_seed(3) for _ in range(2))
    state = torch.get_rng_state()
    first = train_dogs.draw_reals(made, rows, a)
    assert first.shape == (20, 3, 64, 64) and first.dtype == torch.float32
    assert first.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(first, train_dogs.draw_reals(made, rows, b))
    assert not torch.equal(first, train_dogs.draw_reals(made, rows, a))
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's randomness was used
