"""The committed sample is what `draw_sample.py` draws, in the layout of Stanford Dogs."""

import io
from pathlib import Path
from xml.etree import ElementTree

import draw_sample
import numpy as np
import pytest
from PIL import Image


def boxes(path: Path) -> list[list[int]]:
    """(xmin, ymin, xmax, ymax) of every dog in an annotation."""
    tree = ElementTree.parse(path)
    corners = ("xmin", "ymin", "xmax", "ymax")
    return [[int(box.findtext(c)) for c in corners] for box in tree.iter("bndbox")]


@pytest.fixture(scope="module")
def pairs(sample_dogs: Path) -> list[tuple[Path, Path]]:
    """Every image with its annotation."""
    images = sorted((sample_dogs / "Images").glob("*/*.jpg"))
    return [(p, sample_dogs / "Annotation" / p.parent.name / p.stem) for p in images]


def test_about_120_dogs_of_6_breeds_in_under_a_megabyte(sample_dogs, pairs):
    files = [p for p in sample_dogs.rglob("*") if p.is_file()]
    assert len(pairs) == draw_sample.PICTURES == 120
    assert sorted(files) == sorted(p for pair in pairs for p in pair)
    assert sum(p.stat().st_size for p in files) < 1_000_000
    folders = {image.parent.name for image, _ in pairs}
    assert len(folders) == 6
    assert all("-Drawn_" in folder for folder in folders)
    assert len({image.name for image, _ in pairs}) == 120


def test_every_image_opens_and_every_box_lies_inside_it(pairs):
    for image, note in pairs:
        with Image.open(image) as opened:
            opened.load()
            assert (opened.format, opened.mode) == ("JPEG", "RGB"), image
            width, height = opened.size
        tree = ElementTree.parse(note)
        assert tree.findtext("filename") == image.stem
        assert tree.findtext("size/width") == str(width)
        assert tree.findtext("size/height") == str(height)
        for xmin, ymin, xmax, ymax in boxes(note):
            assert 0 <= xmin < xmax <= width and 0 <= ymin < ymax <= height, note
            assert min(xmax - xmin, ymax - ymin) >= 16, note


def test_pictures_vary_in_number_of_dogs_shape_and_cut(pairs):
    sizes = {image: Image.open(image).size for image, _ in pairs}
    dogs = {image: boxes(note) for image, note in pairs}
    assert {len(found) for found in dogs.values()} == {1, 2}
    assert sum(len(found) == 2 for found in dogs.values()) >= 10
    assert sum(w > h for w, h in sizes.values()) >= 20
    assert sum(w < h for w, h in sizes.values()) >= 20
    at_edge = [
        image
        for image, found in dogs.items()
        for box in found
        if 0 in box[:2] or box[2] == sizes[image][0] or box[3] == sizes[image][1]
    ]
    assert len(at_edge) >= 10


def test_boxes_hold_the_dogs(pairs):
    """Without its dogs, a picture changes inside the boxes, and beyond them in shadow only."""
    for k in range(0, draw_sample.PICTURES, 17):
        with_dogs, without = draw_sample.plan(k), draw_sample.plan(k)
        full = np.asarray(draw_sample.drawn(with_dogs), np.float32)
        paint, draw_sample.paint_dogs = draw_sample.paint_dogs, lambda *_: None
        try:
            empty = np.asarray(draw_sample.drawn(without), np.float32)
        finally:
            draw_sample.paint_dogs = paint
        brighter = (full - empty).max(2) > 40  # a shadow never is
        inside = np.zeros(brighter.shape, bool)
        for xmin, ymin, xmax, ymax in with_dogs.boxes:
            inside[ymin:ymax, xmin:xmax] = True
            changed = np.abs(full - empty).max(2)[ymin:ymax, xmin:xmax] > 25
            assert changed.mean() > 0.2
        assert (brighter & ~inside).mean() < 0.002


def test_redrawing_gives_the_same_annotations(pairs):
    for k in range(draw_sample.PICTURES):
        picture = draw_sample.plan(k)
        note = pairs[0][1].parents[1] / picture.folder / picture.stem
        assert draw_sample.annotation(picture) == note.read_text()


def test_redrawing_gives_nearly_the_same_pixels(pairs):
    """Every breed and scene, through this machine's own JPEG encoder, which may be another."""
    for k in range(0, draw_sample.PICTURES, 13):
        picture = draw_sample.plan(k)
        buffer = io.BytesIO()
        draw_sample.drawn(picture).save(buffer, "JPEG", quality=draw_sample.QUALITY)
        new = np.asarray(Image.open(buffer), np.float32)
        path = pairs[0][0].parents[1] / picture.folder / f"{picture.stem}.jpg"
        old = np.asarray(Image.open(path), np.float32)
        assert new.shape == old.shape
        difference = np.abs(new - old)
        assert difference.mean() < 2.5, path
        assert np.percentile(difference, 99) < 30, path
