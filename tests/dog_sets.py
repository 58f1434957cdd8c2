"""Small sets of drawn dogs in every published layout, for the tests of the data half."""

import io
import os
import tarfile
import zipfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

import train_dogs

BREEDS = ("n90000001-Chihuahua", "n90000002-Shih-Tzu", "n90000003-Saint_Bernard")
SIZE = (96, 80)
BOX = (10, 12, 86, 70)

Boxes = list[tuple[object, object, object, object]]


class Dog(NamedTuple):
    """A picture and its annotation as files of a set; None where one is missing."""

    breed: str
    stem: str
    picture: bytes | None
    annotation: bytes | None
    suffix: str = ".jpg"


def paint(seed: int, size: tuple[int, int] = SIZE) -> Image.Image:
    """A smooth picture in colours of its own; no two seeds look alike."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def encode(picture: Image.Image, form: str = "JPEG", **options: object) -> bytes:
    """The picture as bytes of a file."""
    buffer = io.BytesIO()
    picture.save(buffer, form, **({"quality": 92} if form == "JPEG" else {}) | options)
    return buffer.getvalue()


def annotate(boxes: Boxes, size: tuple[object, object] = SIZE) -> bytes:
    """A PASCAL-VOC annotation, tags in the order and nesting of Stanford Dogs."""
    corners = ("xmin", "ymin", "xmax", "ymax")
    objects = "".join(
        "<object><name>dog</name><bndbox>"
        + "".join(f"<{tag}>{value}</{tag}>" for tag, value in zip(corners, box))
        + "</bndbox></object>"
        for box in boxes
    )
    frame = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
    return f"<annotation><folder>x</folder>{frame}{objects}</annotation>".encode()


def make_dog(k: int, boxes: Boxes = (BOX,), **changes: object) -> Dog:
    """Dog number `k`, a good JPEG with one box, unless `changes` say otherwise."""
    breed = BREEDS[k % len(BREEDS)]
    stem = f"{breed.partition('-')[0]}_{1000 + k}"
    dog = Dog(breed, stem, encode(paint(k)), annotate(boxes))
    return dog._replace(**changes)


def make_dogs(count: int = 40) -> list[Dog]:
    """`count` good dogs of three breeds."""
    return [make_dog(k) for k in range(count)]


def photo_of(picture: bytes, annotation: bytes | None) -> train_dogs.Photo:
    """A photo of these bytes, as one found in a set."""
    entries = [
        None if data is None else train_dogs.Entry("x", len(data), 0, partial(io.BytesIO, data))
        for data in (picture, annotation)
    ]
    return train_dogs.Photo("x/x.jpg", "x", *entries)


def write(path: Path, data: bytes) -> None:
    """A file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def as_folders(
    root: Path, dogs: list[Dog], pictures: str = "Images/{}", annotations: str = "Annotation/{}"
) -> Path:
    """Two folders, the breed in the place of {}: by default the layout of the official archives."""
    for dog in dogs:
        if dog.picture is not None:
            write(root / pictures.format(dog.breed) / (dog.stem + dog.suffix), dog.picture)
        if dog.annotation is not None:
            write(root / annotations.format(dog.breed) / dog.stem, dog.annotation)
    return root


def as_pictures(root: Path, count: int = 20, first: int = 0) -> Path:
    """Pictures alone."""
    for k in range(count):
        write(root / f"{k}.jpg", make_dog(first + k).picture)
    return root


def zip_folder(folder: Path, place: Path, prefix: str, method: int = zipfile.ZIP_STORED) -> None:
    """A folder as a zip with an entry for the folder too, as most tools write them."""
    with zipfile.ZipFile(place, "w", method) as archive:
        if prefix:
            archive.writestr(zipfile.ZipInfo(prefix), b"")
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            archive.write(path, prefix + path.relative_to(folder).as_posix())


def tar_folder(folder: Path, place: Path, prefix: str, mode: str = "w") -> None:
    """A folder as a tar whose members begin with `prefix`."""
    with tarfile.open(place, mode) as archive:
        archive.add(folder, prefix.rstrip("/"))


def snapshot(root: Path) -> list[tuple[str, int, int, int]]:
    """Name, size, time of change and mode of every file and folder: what writing would alter."""
    paths = [root, *sorted(root.rglob("*"))]
    states = [os.lstat(p) for p in paths]
    return [(str(p), s.st_size, s.st_mtime_ns, s.st_mode) for p, s in zip(paths, states)]
