"""Small sets of drawn dogs in every published layout, for the tests of the data half."""

import io
import os
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

BREEDS = ("n90000001-Chihuahua", "n90000002-Shih-Tzu", "n90000003-Saint_Bernard")
SIZE = (96, 80)
BOX = (10, 12, 86, 70)

Boxes = list[tuple[object, object, object, object]]


class Dog(NamedTuple):
    """A picture and its annotation as files of a set."""

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


def annotate(boxes: Boxes, size: tuple[object, object] | None = SIZE) -> bytes:
    """A PASCAL-VOC annotation, tags in the order and nesting of Stanford Dogs."""
    corners = ("xmin", "ymin", "xmax", "ymax")
    frame = (
        "" if size is None else f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
    )
    objects = "".join(
        "<object><name>dog</name><bndbox>"
        + "".join(f"<{tag}>{value}</{tag}>" for tag, value in zip(corners, box))
        + "</bndbox></object>"
        for box in boxes
    )
    return f"<annotation><folder>x</folder>{frame}{objects}</annotation>".encode()


def make_dog(k: int, boxes: Boxes = (BOX,), **changes: object) -> Dog:
    """Dog number `k`, a good JPEG with one box, unless `changes` say otherwise."""
    breed = BREEDS[k % len(BREEDS)]
    stem = f"{breed.partition('-')[0]}_{1000 + k}"
    return Dog(breed, stem, encode(paint(k)), annotate(boxes))._replace(**changes)


def make_dogs(count: int = 40) -> list[Dog]:
    """`count` good dogs of three breeds."""
    return [make_dog(k) for k in range(count)]


def write(path: Path, data: bytes) -> None:
    """A file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def as_folders(root: Path, dogs: list[Dog]) -> Path:
    """`Images/<breed>/*.jpg` and `Annotation/<breed>/*`: the layout of the official archives."""
    for dog in dogs:
        if dog.picture is not None:
            write(root / "Images" / dog.breed / (dog.stem + dog.suffix), dog.picture)
        if dog.annotation is not None:
            write(root / "Annotation" / dog.breed / dog.stem, dog.annotation)
    return root


def as_flat(root: Path, dogs: list[Dog], pictures: str, annotations: str) -> Path:
    """Kaggle's form: all pictures in one folder, the breed in the annotation's folder alone."""
    for dog in dogs:
        if dog.picture is not None:
            write(root / pictures / (dog.stem + dog.suffix), dog.picture)
        if dog.annotation is not None:
            write(root / annotations / dog.breed / dog.stem, dog.annotation)
    return root


def files_of(folder: Path) -> list[tuple[str, Path]]:
    """Every file below a folder with its name relative to it."""
    return [(p.relative_to(folder).as_posix(), p) for p in sorted(folder.rglob("*")) if p.is_file()]


def zip_folder(folder: Path, place: Path, prefix: str, method: int = zipfile.ZIP_STORED) -> None:
    """A folder as a zip with entries for the folders too, as most tools write them."""
    with zipfile.ZipFile(place, "w", method) as archive:
        if prefix:
            archive.writestr(zipfile.ZipInfo(prefix), b"")
        for name, path in files_of(folder):
            archive.write(path, prefix + name)


def tar_folder(folder: Path, place: Path, prefix: str, mode: str = "w") -> None:
    """A folder as a tar whose members begin with `prefix`."""
    with tarfile.open(place, mode) as archive:
        archive.add(folder, prefix.rstrip("/"))


def snapshot(root: Path) -> list[tuple[str, int, int, int]]:
    """Name, size, time of change and mode of every file and folder: what writing would alter."""
    paths = [root, *sorted(root.rglob("*"))]
    states = [os.lstat(p) for p in paths]
    return [(str(p), s.st_size, s.st_mtime_ns, s.st_mode) for p, s in zip(paths, states)]
