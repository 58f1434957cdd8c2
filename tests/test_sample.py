"""The committed sample is what `draw_sample.py` draws, in the layout of Stanford Dogs."""

import io
from pathlib import Path
from xml.etree import ElementTree

import draw_sample
import numpy as np
import pytest
from PIL import Image

PLANS = [draw_sample.plan(k) for k in range(draw_sample.PICTURES)]


@pytest.fixture(scope="module")
def pairs(sample_dogs: Path) -> list[tuple[Path, Path]]:
    """Every image with its annotation, in the order of `PLANS`."""
    return [
        (sample_dogs / "Images" / p.folder / f"{p.stem}.jpg",
         sample_dogs / "Annotation" / p.folder / p.stem)
        for p in PLANS
    ]  # fmt: skip


def test_120_pictures_of_6_breeds_in_under_a_megabyte(sample_dogs, pairs):
    files = [p for p in sample_dogs.rglob("*") if p.is_file()]
    assert sorted(files) == sorted(p for pair in pairs for p in pair)
    assert len(pairs) == len({image.name for image, _ in pairs}) == 120
    assert sum(p.stat().st_size for p in files) < 1_000_000
    folders = {image.parent.name for image, _ in pairs}
    assert len(folders) == 6 and all("-Drawn_" in folder for folder in folders)


def test_every_box_lies_inside_its_picture(pairs):
    for image, note in pairs:
        with Image.open(image) as opened:
            opened.load()
            assert (opened.format, opened.mode) == ("JPEG", "RGB"), image
            width, height = opened.size
        tree = ElementTree.parse(note)
        assert tree.findtext("filename") == image.stem
        assert [int(tree.findtext(f"size/{n}")) for n in ("width", "height")] == [width, height]
        for box in tree.iter("bndbox"):
            left, top, right, bottom = (int(corner.text) for corner in box)
            assert 0 <= left < right <= width and 0 <= top < bottom <= height, note
            assert min(right - left, bottom - top) >= 48, note


def test_pictures_vary_in_number_of_dogs_shape_and_cut():
    assert sum(len(p.boxes) for p in PLANS) == 135
    assert sum(len(p.boxes) == 2 for p in PLANS) == 15
    assert sum(p.width > p.height for p in PLANS) >= 20
    assert sum(p.width < p.height for p in PLANS) >= 20
    assert sum(0 in box[:2] or box[3] == p.height for p in PLANS for box in p.boxes) >= 10


@pytest.mark.parametrize("k", range(0, 120, 13))
def test_boxes_hold_the_dogs(k):
    """Without its dogs, a picture changes inside the boxes, and beyond them in shadow only."""
    full, empty = (
        np.asarray(draw_sample.drawn(PLANS[k], with_dogs), np.float32)
        for with_dogs in (True, False)
    )
    changed = np.abs(full - empty).max(2)
    outside = np.ones(changed.shape, bool)
    for left, top, right, bottom in PLANS[k].boxes:
        outside[top:bottom, left:right] = False
        dog = changed[top:bottom, left:right] > 20
        assert dog.mean() > 0.4
        for side in (dog[:3], dog[-3:], dog[:, :3], dog[:, -3:]):  # nor is a box too large
            assert side.any()
    assert (changed[outside] > 90).mean() < 0.002


def test_redrawing_gives_the_same_annotations(pairs):
    for picture, (_, note) in zip(PLANS, pairs, strict=True):
        assert draw_sample.annotation(picture) == note.read_text()


@pytest.mark.parametrize("k", range(0, 120, 13))
def test_redrawing_gives_nearly_the_same_pixels(k, pairs):
    """Every breed and scene, through this machine's own JPEG encoder, which may be another."""
    buffer = io.BytesIO()
    draw_sample.drawn(PLANS[k]).save(buffer, "JPEG", quality=draw_sample.QUALITY)
    new, old = (np.asarray(Image.open(f), np.float32) for f in (buffer, pairs[k][0]))
    assert new.shape == old.shape
    difference = np.abs(new - old)
    assert difference.mean() < 2.5
    assert np.percentile(difference, 99) < 30
