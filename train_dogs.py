"""Train a DCGAN on Stanford Dogs within a time budget and write `images.zip`: 10,000 new dogs.

One file, from JPEGs and boxes to the zip that Kaggle's *Generative Dog Images* would accept. Split
batch norm in the discriminator, a margin loss, and an averaged generator (SWA or EMA) whose batch
norm statistics are re-estimated. Runs on a CUDA GPU from compute capability 6.0 on, or on a CPU; as
a script, as a Kaggle kernel, or pasted into a notebook cell (there with options by
`main(["--minutes", "30"])`).

    python train_dogs.py --data PATH/TO/stanford-dogs     # 8.5 hours, everything in output/
    python train_dogs.py --data data/sample --width 16 --minutes 3     # drawn dogs, no GPU needed

What it costs is counted: 8.49 P100-hours for the default recipe. What it scores after them has not
been measured yet; after 0.4 % of the images, at a third of the width, FID was 200 (n = 1; README).

Read from top to bottom, it follows one photo from its JPEG to the networks, and one latent from the
networks to its PNG.
"""

from __future__ import annotations

import argparse
import copy
import errno
import hashlib
import io
import json
import lzma
import math
import os
import pickle
import shutil
import signal
import struct
import sys
import tarfile
import tempfile
import threading
import time
import timeit
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

IMAGE_SIZE = 64
SAMPLE_BATCH = 128  # latents per forward when sampling; fixed, so that an image never depends on N
P100_FLOPS = 7.4e12  # sustained FLOP/s of a P100 on a DCGAN: the unit of "P100-hours"


# --------------------------------------------------------------------------------- 1. Configuration


class UserError(Exception):
    """What the user or the machine must change: one sentence with the remedy; exit code 2."""


def option(default: object, group: str, text: str, fixed: bool = True) -> object:
    """A field of `Config`; `fixed` ones may not change when a run is resumed."""
    return field(default=default, metadata={"group": group, "help": text, "fixed": fixed})


@dataclass(frozen=True)
class Config:
    """The only source of options: each field is a flag and goes into the checkpoint and log."""

    data: tuple[str, ...] = option((), "files", "folder, zip or tar of dogs; repeatable", False)
    out: str = option("", "files", "folder for results (/kaggle/working or output)", False)

    crops: str = option("square", "data", "crop kinds with weights, as in square:3,context:1")

    noise: float = option(
        0.0, "data", "reals get uniform noise from 0 to this; [-1, 1] is the range"
    )
    augment: str = option(
        "", "data", "differentiable augmentation of reals and fakes: color,translation,cutout"
    )

    layers: str = option("deep", "networks", "deep, or paper: the DCGAN of 2015")
    latent_dim: int = option(256, "networks", "numbers in a latent z")
    width: int = option(48, "networks", "channels per unit of G's table (and D's)")
    d_width: int = option(0, "networks", "the same for D alone; 0 = width")
    init_std: float = option(0.0, "networks", "std of normal initial weights; 0 = PyTorch's own")
    condition: str = option("none", "networks", "what G and D are told of a dog: none or breed")

    margin: float = option(0.8, "loss", "probability past which a real costs nothing; 1 = never")
    smoothing: float = option(
        0.0, "loss", "one-sided label smoothing: the reals' label is 1 - this"
    )
    classify: float = option(0.0, "loss", "weight of telling breeds apart, if conditioned on them")
    r1: float = option(0.0, "loss", "gamma of the R1 gradient penalty on reals")

    batch_size: int = option(32, "optimisation", "reals (and fakes) per step")
    g_lr: float = option(5e-4, "optimisation", "Adam's learning rate for G")
    d_lr: float = option(5e-4, "optimisation", "Adam's learning rate for D")
    beta1: float = option(0.3, "optimisation", "Adam's beta1")
    beta2: float = option(0.999, "optimisation", "Adam's beta2")
    lr_decay_start: float = option(1.0, "optimisation", "progress where lr begins to fall to 0")

    average: str = option("swa", "averaging", "weights to submit: swa, ema or none", False)
    swa_start: float = option(0.5, "averaging", "progress at which SWA begins, 0 to 1")
    swa_every: int = option(20, "averaging", "steps between updates of the averages")
    ema_beta: float = option(
        0.9995, "averaging", "EMA's decay per step; 0 = stepped, 0.9 to 0.9999"
    )
    truncation: float = option(
        0.0, "averaging", "latents beyond this are drawn anew; 0 = none", False
    )

    steps: int = option(397_000, "length", "steps of the whole recipe", False)
    hours: float = option(8.5, "length", "wall-clock budget of all parts, zip included", False)
    part_hours: float = option(0.0, "length", "end this part after so long, to be resumed", False)

    seed: int = option(0, "run", "seed of everything random")
    device: str = option("auto", "run", "auto, cpu, cuda or cuda:N", False)
    precision: str = option("auto", "run", "of convolutions: auto, fp32, tf32, bf16 or fp16", False)
    images: int = option(10_000, "run", "images in the zip", False)
    checkpoint_seconds: float = option(300.0, "run", "seconds between checkpoints", False)


# dogs: ours. first-public: the notebook that says it was first in public, crops by nearest kinds,
# without its quirks (a margin for G too, rotation that leaves black wedges, samples in training
# mode). dcgan: the networks and settings of Radford et al. 2015 (arXiv 1511.06434).
PRESET_NAMES = ("dogs", "first-public", "dcgan")
PRESET_TABLE = {  # field: its value in each preset
    "layers":     ("deep",    "deep",                      "paper"),
    "latent_dim": (256,       256,                         100),
    "width":      (48,        48,                          128),
    "init_std":   (0.0,       0.0,                         0.02),
    "crops":      ("square",  "head:2,square:1,context:1", "square"),
    "margin":     (0.8,       0.8,                         1.0),
    "smoothing":  (0.0,       0.05,                        0.0),
    "batch_size": (32,        32,                          128),
    "g_lr":       (5e-4,      5e-4,                        2e-4),
    "d_lr":       (5e-4,      5e-4,                        2e-4),
    "beta1":      (0.3,       0.3,                         0.5),
    "average":    ("swa",     "ema",                       "none"),
    "swa_every":  (20,        1,                           20),
    "ema_beta":   (0.9995,    0.0,                         0.9995),
    "steps":      (397_000,   397_000,                     197_000),  # 8.5 P100-hours at most
}  # fmt: skip
PRESETS = {
    name: {field: values[k] for field, values in PRESET_TABLE.items()}
    for k, name in enumerate(PRESET_NAMES)
}

CHOICES = {
    "layers": ("deep", "paper"), "condition": ("none", "breed"), "average": ("swa", "ema", "none"),
    "precision": ("auto", "fp32", "tf32", "bf16", "fp16"),
}  # fmt: skip
RANGES = {  # field: (least, most)
    "noise": (0, 1), "latent_dim": (1, 4096), "width": (1, 1024), "d_width": (0, 1024),
    "init_std": (0, 1), "margin": (0.01, 1), "smoothing": (0, 0.5), "classify": (0, 10),
    "r1": (0, 1000), "truncation": (0, 100), "batch_size": (2, 65536), "g_lr": (0, 1),
    "d_lr": (0, 1), "beta1": (0, 0.9999), "beta2": (0, 0.999999), "lr_decay_start": (0, 1),
    "swa_start": (0, 1), "swa_every": (1, 10**9), "ema_beta": (0, 0.9999999), "steps": (1, 10**9),
    "hours": (0, 1e6), "part_hours": (0, 1e6), "seed": (0, 2**32 - 1), "images": (1, 99_999),
    "checkpoint_seconds": (0, 1e9),
}  # fmt: skip


def check_config(config: Config) -> Config:
    """Raise `UserError` for a value out of its range; return `config` otherwise."""
    for name, (least, most) in RANGES.items():
        value = getattr(config, name)
        if not least <= value <= most:  # also catches nan
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} {value} is out of range: give {least} to {most}.")
    for name, choices in CHOICES.items():
        if getattr(config, name) not in choices:
            raise UserError(
                f"--{name} {getattr(config, name)} is unknown: give one of {', '.join(choices)}."
            )
    if config.classify and config.condition != "breed":
        raise UserError("--classify tells breeds apart: give --condition breed with it.")
    parse_crops(config.crops)
    parse_augment(config.augment)
    return config


class Options(NamedTuple):
    """A parsed command line: the configuration, which fields were named, and what to do."""

    config: Config
    named: frozenset[str]
    dry_run: bool
    fresh: bool
    resume: str
    sample_only: bool
    breed: str


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"{message}; see --help.")


def parse(argv: Sequence[str]) -> Options:
    """The command line, made from `Config`; `--steps` alone lifts the time limit."""
    parser = _Parser(prog="train_dogs.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    actions = parser.add_argument_group("actions")
    actions.add_argument(
        "--preset",
        default="dogs",
        metavar="NAME",
        help=f"recipe, of {', '.join(PRESETS)}; default dogs",
    )
    actions.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    actions.add_argument("--fresh", action="store_true", help="ignore the checkpoint in --out")
    actions.add_argument("--resume", default="", metavar="FILE", help="start from this checkpoint")
    actions.add_argument(
        "--sample-only", action="store_true", help="write images.zip from what was trained"
    )
    actions.add_argument(
        "--breed", default="", metavar="NAME", help="the same, of this breed alone, as in Pug"
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    for f in fields(Config):
        name = f.metadata["group"]
        group = groups.setdefault(name, parser.add_argument_group(name))
        shown = f.metadata["help"] + (f"; default {f.default}" if f.default not in ("", ()) else "")
        group.add_argument(
            "--" + f.name.replace("_", "-"),
            type=str if f.default == () else type(f.default),
            action="append" if f.default == () else "store",
            default=argparse.SUPPRESS,
            metavar={int: "N", float: "X", str: "TEXT", tuple: "PATH"}[type(f.default)],
            help=shown.replace("%", "%%"),
        )
    groups["length"].add_argument(
        "--minutes", type=float, default=argparse.SUPPRESS, metavar="X", help="--hours, in minutes"
    )
    given = vars(parser.parse_args(list(argv)))
    acts = {
        k: given.pop(k) for k in ("preset", "dry_run", "fresh", "resume", "sample_only", "breed")
    }
    if "minutes" in given:
        if "hours" in given:
            raise UserError("--hours and --minutes are the same budget: give one of them.")
        given["hours"] = given.pop("minutes") / 60
    if not given.get("hours", 1) > 0:
        raise UserError(f"a budget of {given['hours']:g} hours is none: give more than 0.")
    if "steps" in given and "hours" not in given:
        given["hours"] = 0.0  # no limit
    if acts["preset"] not in PRESETS:
        raise UserError(f"--preset {acts['preset']} is unknown: give one of {', '.join(PRESETS)}.")
    if "data" in given:
        given["data"] = tuple(given["data"])
    config = check_config(replace(Config(**PRESETS[acts.pop("preset")]), **given))
    if not config.out:
        kaggle = Path("/kaggle/working")
        config = replace(config, out=str(kaggle if kaggle.is_dir() else "output"))
    return Options(config, frozenset(given), **acts)


# ---------------------------------------------------------------------------------------- 2. Device


def architecture_is_built(capability: tuple[int, int], built: Sequence[str]) -> bool:
    """Whether a GPU of `capability` can run kernels of a torch built for `built`.

    `built` is `torch.cuda.get_arch_list()`: binaries ("sm_70") run on the same major version from
    their minor version on; intermediate code ("compute_70") runs on anything as new or newer.
    """
    major, minor = capability
    for name in built:
        kind, _, digits = name.partition("_")
        digits = digits.rstrip("af")
        if digits.isdigit():
            built_major, built_minor = int(digits[:-1]), int(digits[-1])
            if kind == "sm" and built_major == major and built_minor <= minor:
                return True
            if kind == "compute" and (built_major, built_minor) <= (major, minor):
                return True
    return False


def choose_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` as a device on which a real kernel has run.

    Raises `UserError` where there is no such GPU, or the installed torch has no kernels for it (a
    P100 under a CUDA 12.8+ build reports itself as available, and its first kernel dies).
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    kind, _, index = name.partition(":")
    if kind != "cuda" or (index and not index.isdigit()):
        raise UserError(f"--device {name} is unknown: give auto, cpu, cuda or cuda:N.")
    device = torch.device("cuda", int(index or 0))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.index >= gpus:
        raise UserError(
            f"--device {name}: {gpus} CUDA GPUs are usable here; give one of them from cuda:0 on,"
            " or --device cpu, or turn a GPU on."
        )
    capability = torch.cuda.get_device_capability(device)
    remedy = (
        "choose a T4 or L4 instead, or pin the notebook to its original 2025 environment, or"
        " install a CUDA 12.6 build of torch 2.14 or older (pip install --no-index"
        " --find-links=FOLDER torch)."
    )
    if not architecture_is_built(capability, torch.cuda.get_arch_list()):
        raise UserError(
            f"this GPU's architecture is sm_{capability[0]}{capability[1]}, for which the installed"
            f" torch {torch.__version__} has no kernels: {remedy}"
        )
    try:
        torch.cuda.set_device(device)
        torch.ones(8, device=device).sum().item()
    except RuntimeError as error:
        first_line = str(error).splitlines()[0]
        raise UserError(f"the GPU cannot run a kernel ({first_line}): {remedy}") from error
    return device


def describe_device(device: torch.device) -> str:
    """One line for the log: device, capability, torch and CUDA versions."""
    if device.type == "cpu":
        return f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"
    major, minor = torch.cuda.get_device_capability(device)
    name = torch.cuda.get_device_name(device)
    return f"{name} (sm_{major}{minor}), torch {torch.__version__}, CUDA {torch.version.cuda}"


# ---------------------------------------------------------------------------- 3. Data: finding dogs


class BadItem(Exception):
    """A picture, annotation or box that is left out; the text is the reason it is counted under."""


LARGEST_FILE = 64 << 20  # bytes; an archive member that claims more is a mistake or an attack
DAMAGE = (  # what zipfile, Pillow and torch raise for damaged files
    OSError, RuntimeError, ValueError, SyntaxError, TypeError, EOFError, LookupError,
    ArithmeticError, struct.error, zlib.error, lzma.LZMAError, zipfile.BadZipFile,
)  # fmt: skip


class Entry(NamedTuple):
    """A file in a folder or an archive."""

    path: str  # below its root, with forward slashes
    size: int  # bytes
    stamp: int  # modification time in ns, or the archive's
    load: Callable[[], bytes]

    def read(self) -> bytes:
        """Its bytes. Raises `BadItem` where it is too large or damaged."""
        if self.size > LARGEST_FILE:
            raise BadItem("file larger than 64 MB")
        try:
            return self.load()
        except DAMAGE as error:
            raise BadItem("unreadable file") from error


@dataclass(frozen=True)
class Photo:
    """One picture and its annotation, not yet read."""

    name: str  # unique in its set, as in n02085620-Chihuahua/n02085620_10074.jpg
    breed: str
    picture: Entry
    annotation: Entry | None

    def read(self) -> bytes:
        """The encoded picture. Raises `BadItem`."""
        return self.picture.read()

    def read_annotation(self) -> bytes | None:
        """The annotation's XML, or None in a set without annotations. Raises `BadItem`."""
        return None if self.annotation is None else self.annotation.read()


@dataclass(frozen=True)
class DogSet:
    """The photos found, in a fixed order, and what was left out already."""

    where: str
    photos: list[Photo]
    skipped: list[tuple[str, str]]  # (name, reason)
    annotated: bool


PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
PICTURE_PLACES = (  # where a set keeps its pictures: the official layout, and Kaggle's since 2019
    "Images", "images/Images", "all-dogs/all-dogs", "all-dogs", "all-dogs.zip", "images.tar",
)  # fmt: skip
ANNOTATION_PLACES = (
    "Annotation", "annotation/Annotation", "annotations/Annotation", "Annotation.zip",
    "annotation.zip", "annotation.tar",
)  # fmt: skip


def list_files(place: Path) -> list[Entry]:
    """All visible files of a folder, zip or uncompressed tar, sorted; nothing is unpacked."""
    try:
        if place.is_dir():
            entries = _folder_entries(place)
        else:
            entries = _zip_entries(place) if zipfile.is_zipfile(place) else _tar_entries(place)
        return sorted((e for e in entries if is_shown(e.path)), key=lambda e: e.path)
    except (OSError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise UserError(
            f"{place} cannot be read as a folder, zip or uncompressed tar ({error}): give another."
        ) from error


def is_shown(path: str) -> bool:
    """Whether a file is the user's own, not the system's: no dot-file, no `__MACOSX`."""
    return not any(part.startswith((".", "__MACOSX")) for part in path.split("/")[1:])


def _folder_entries(place: Path) -> Iterator[Entry]:
    def stop(error: OSError) -> None:
        raise error

    seen = set()
    for folder, inner, names in os.walk(place, followlinks=True, onerror=stop):
        if (real := os.path.realpath(folder)) in seen:  # a link back
            inner.clear()
            continue
        seen.add(real)
        inner[:] = [name for name in inner if not is_drawn(Path(folder, name))]
        below = Path(place.name, Path(folder).relative_to(place))
        for name in names:
            file = Path(folder, name)
            if file.is_file():
                status = file.stat()
                path = (below / name).as_posix()
                yield Entry(path, status.st_size, status.st_mtime_ns, file.read_bytes)


def is_drawn(folder: Path) -> bool:
    """Whether a folder below a named one is `data/sample`, whose dogs count only when named."""
    return folder.name == "sample" and (folder / "Annotation").is_dir()


def _zip_entries(place: Path) -> Iterator[Entry]:
    archive, stamp = zipfile.ZipFile(place), place.stat().st_mtime_ns
    for info in archive.infolist():
        if not info.is_dir():
            path = f"{place.stem}/{info.filename.removeprefix('./')}"
            yield Entry(path, info.file_size, stamp, partial(archive.read, info))


def _tar_entries(place: Path) -> Iterator[Entry]:
    def read(info: tarfile.TarInfo) -> bytes:
        with place.open("rb") as file:  # a file of its own: threads do not share a position
            file.seek(info.offset_data)
            return file.read(info.size)

    stamp = place.stat().st_mtime_ns
    with tarfile.open(place, "r:") as archive:
        for info in archive:
            if info.isreg():
                path = f"{place.stem}/{info.name.removeprefix('./')}"
                yield Entry(path, info.size, stamp, partial(read, info))


def places_below(folder: Path, levels: int) -> list[Path]:
    """Pictures and annotations of the first set in a breadth-first walk; [] where there is none."""
    level = [folder]
    for _ in range(levels + 1):
        for candidate in level:
            pictures = [candidate / p for p in PICTURE_PLACES if (candidate / p).exists()]
            annotations = [candidate / p for p in ANNOTATION_PLACES if (candidate / p).exists()]
            if pictures and annotations:
                return [pictures[0], annotations[0]]
        inner = (p for c in level if os.access(c, os.R_OK) and c.is_dir() for p in c.iterdir())
        level = sorted(
            p for p in inner if p.is_dir() and is_shown(f"/{p.name}") and not is_drawn(p)
        )
    return []


def find_dogs(paths: Sequence[str | Path] = ()) -> DogSet:
    """The photos of Stanford Dogs in `paths`, else on Kaggle's mounts, else in `data/`.

    A path may be a folder that holds the set in any of its published forms (folders, Kaggle's flat
    form, two zips, the two official tars), an archive, or a folder of pictures. Where there is no
    annotation at all, the pictures are one class. Raises `UserError` where there are no dogs.
    """
    places = [p for path in map(Path, paths) for p in places_below(path, 4) or [path]]
    if not paths:
        own = [Path(__file__).resolve().parent / "data"] if "__file__" in globals() else []
        searches = ((Path("/kaggle/input"), 4), (Path("data"), 0), *((p, 0) for p in own))
        places = next(filter(None, (places_below(*search) for search in searches)), [])
    if not places:
        raise UserError(
            "no dogs found: fetch them with `python data/download.py`, give --data PATH, or try the"
            " drawn ones with --data data/sample."
        )
    pictures, annotations = [], {}
    for entry in (e for place in places for e in list_files(place)):
        folder, _, name = entry.path.rpartition("/")
        if Path(name).suffix.lower() in PICTURE_SUFFIXES:
            pictures.append(entry)
        elif {"annotation", "annotations"} & set(folder.lower().split("/")):
            same_name = annotations.setdefault(name.removesuffix(".xml"), {})
            same_name.setdefault(Path(folder).name, entry)  # a set given twice counts once
    photos, skipped = match_photos(pictures, annotations)
    where = " and ".join(map(str, places)) + (
        "" if annotations else " (no annotations: whole pictures, one class)"
    )
    if not photos:
        raise UserError(f"no pictures of dogs in {where}: give another --data.")
    return DogSet(where, photos, skipped, annotated=bool(annotations))


def match_photos(
    pictures: list[Entry], annotations: dict[str, dict[str, Entry]]
) -> tuple[list[Photo], list[tuple[str, str]]]:
    """Pair pictures with the annotations of their name (by stem), and say what is left over.

    `annotations`: by stem and folder. Of several of a stem the one whose folder is named like the
    picture's counts. The breed is that folder, since Kaggle's flat form has no other. A name counts
    once.
    """
    photos: dict[str, Photo] = {}
    skipped, used = [], set()
    for picture in pictures:
        path = Path(picture.path)
        named = annotations.get(path.stem, {})
        fitting = [path.parent.name] if path.parent.name in named else list(named)
        used.update((path.stem, folder) for folder in fitting)
        breed = fitting[0] if fitting else "dog"
        name = f"{breed}/{path.name}" if fitting else picture.path
        if annotations and len(fitting) != 1:
            reason = "several annotations" if fitting else "picture without annotation"
            skipped.append((name, reason))
        elif name in photos and annotations:
            skipped.append((name, "duplicate name"))
        else:  # without annotations, equal paths come from different --data
            name += f" ({len(photos)})" if name in photos else ""
            photos[name] = Photo(name, breed, picture, named.get(breed))
    left = ((s, f) for s, folders in annotations.items() for f in folders if (s, f) not in used)
    skipped += [(f"{folder}/{stem}", "annotation without picture") for stem, folder in left]
    return list(photos.values()), skipped


# --------------------------------------------------------------------------- 4. Data: reading a dog

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels, right and bottom out
LARGEST_PICTURE = 80_000_000  # pixels; Pillow warns from 89 million on
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")


class _NoDoctype(ElementTree.TreeBuilder):
    def doctype(self, name: str, pubid: str, system: str) -> None:
        raise BadItem("annotation with a DOCTYPE")  # the way in for entity bombs


def parse_annotation(xml: bytes) -> tuple[tuple[float, float], list[Box]]:
    """The picture's width and height as the annotation states them, and its boxes.

    Raises `BadItem` for XML that is broken, hostile, or has no box. What is no number is kept as
    nan: such a size equals no picture's, such a box `clip_box` refuses.
    """
    try:
        root = ElementTree.fromstring(xml, ElementTree.XMLParser(target=_NoDoctype()))
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise BadItem("broken annotation") from error

    def number(parent: ElementTree.Element, tag: str) -> float:
        try:
            return float(parent.findtext(tag) or "nan")
        except ValueError:
            return math.nan

    corners = ("xmin", "ymin", "xmax", "ymax")
    boxes = [tuple(number(box, corner) for corner in corners) for box in root.iter("bndbox")]
    if not boxes:
        raise BadItem("annotation without boxes")
    return (number(root, "size/width"), number(root, "size/height")), boxes


def clip_box(box: Box, width: int, height: int) -> Box:
    """The part of a box inside a frame. Raises `BadItem` if reversed, empty, or wholly outside."""
    left, top, right, bottom = box
    if not all(map(math.isfinite, box)):
        raise BadItem("box without numbers")
    if right < left or bottom < top:
        raise BadItem("reversed box")
    if right - left < 1 or bottom - top < 1:
        raise BadItem("empty box")
    left, top, right, bottom = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
    if right - left < 1 or bottom - top < 1:
        raise BadItem("box outside the picture")
    return (left, top, right, bottom)


def open_picture(data: bytes) -> Image.Image:
    """A picture whose header is read and believable, not yet decoded. Raises `BadItem`."""
    if not data:
        raise BadItem("empty file")
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadItem("absurd pixel count") from error
    except DAMAGE as error:
        raise BadItem("not a picture") from error
    if picture.width * picture.height > LARGEST_PICTURE:
        raise BadItem("absurd pixel count")
    return picture


def decode_picture(picture: Image.Image, shrink: int = 1) -> Image.Image:
    """Decode to upright RGB, a JPEG at 1/`shrink` (1, 2, 4, 8) of its size by its DCT scaling.

    EXIF rotation is applied, transparency is laid on white. Raises `BadItem` where it is truncated.
    """
    try:
        if shrink > 1:  # a no-op for anything but a JPEG
            picture.draft("RGB", (picture.width // shrink, picture.height // shrink))
        picture.load()
        for wanted, turn in zip(turns_of(picture), TURNS):
            picture = picture.transpose(turn) if wanted else picture
        if picture.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
            picture = Image.fromarray((np.asarray(picture) // 256).astype(np.uint8))
        if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture)
        return picture.convert("RGB")
    except DAMAGE as error:
        raise BadItem("truncated or damaged picture") from error


def decode_photo(data: bytes) -> Image.Image:
    """Encoded bytes to an upright RGB picture at full size. Raises `BadItem`."""
    return decode_picture(open_picture(data))


TURNS = (
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.TRANSPOSE,
)  # fmt: skip
ORIENTATIONS = {  # of EXIF: which of the turns, one after another, make a picture upright
    2: (True, False, False), 3: (True, True, False), 4: (False, True, False),
    5: (False, False, True), 6: (False, True, True), 7: (True, True, True), 8: (True, False, True),
}  # fmt: skip


def turns_of(picture: Image.Image) -> tuple[bool, bool, bool]:
    """Whether to mirror a picture in x, in y, and to swap x and y; damaged EXIF turns nothing."""
    try:
        return ORIENTATIONS.get(picture.getexif().get(0x0112), (False, False, False))
    except DAMAGE:
        return (False, False, False)


def upright_boxes(picture: Image.Image, stated: tuple[float, float], boxes: list[Box]) -> list[Box]:
    """Boxes in the upright picture, turned where the annotation states the size as it is stored.

    Boxes of Stanford Dogs were drawn in browsers that showed pictures as they are stored.
    """
    if stated != picture.size:
        return boxes
    width, height = picture.size
    mirror_x, mirror_y, swap = turns_of(picture)
    turned = []
    for left, top, right, bottom in boxes:
        if mirror_x:
            left, right = width - right, width - left
        if mirror_y:
            top, bottom = height - bottom, height - top
        turned.append((top, left, bottom, right) if swap else (left, top, right, bottom))
    return turned


# -------------------------------------------------------------------------------- 5. Data: cropping


def crop_box(box: Box, width: int, height: int) -> list[Box]:
    """The box itself, to be squashed."""
    return [box]


def crop_square(box: Box, width: int, height: int) -> list[Box]:
    """The box widened on its short side to a square, moved inside the frame.

    Covers the box, unless its long side is longer than the frame's short one: then the square is as
    large as fits, in the middle of the box.
    """
    left, top, right, bottom = box
    side = min(max(right - left, bottom - top), width, height)
    x = min(max((left + right - side) / 2, 0), width - side)
    y = min(max((top + bottom - side) / 2, 0), height - side)
    return [(x, y, x + side, y + side)]


def crop_head(box: Box, width: int, height: int) -> list[Box]:
    """The square of the box's short side at its top; of a wide box left, middle and right."""
    left, top, right, bottom = box
    side = min(right - left, bottom - top)
    slack = right - left - side
    starts = [left + slack * share for share in (0, 0.5, 1)] if slack >= 1 else [left]
    return [(x, top, x + side, top + side) for x in starts]


def crop_context(box: Box, width: int, height: int) -> list[Box]:
    """The largest square centred on the box that fits the frame."""
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    half = min(x, y, width - x, height - y)
    return [(x - half, y - half, x + half, y + half)]


def crop_whole(box: Box, width: int, height: int) -> list[Box]:
    """The whole frame, to be squashed."""
    return [(0, 0, width, height)]


CROPS: dict[str, Callable[[Box, int, int], list[Box]]] = {
    "box": crop_box,
    "square": crop_square,
    "head": crop_head,
    "context": crop_context,
    "whole": crop_whole,
}


def parse_crops(text: str) -> dict[str, float]:
    """`"square:3,context"` to `{"square": 0.75, "context": 0.25}`. Raises `UserError`."""
    weights: dict[str, float] = {}
    for part in text.replace("=", ":").split(","):
        kind, _, weight = part.strip().partition(":")
        try:
            value = float(weight or 1)
        except ValueError:
            value = math.nan
        if kind not in CROPS or kind in weights or not 0 < value < math.inf:
            raise UserError(
                f"--crops {text}: give kinds out of {', '.join(CROPS)}, once each, with weights"
                " above 0 if any, as in square:3,context:1."
            )
        weights[kind] = value
    return {kind: weight / sum(weights.values()) for kind, weight in weights.items()}


def crop_photo(photo: Photo, kinds: Sequence[str]) -> tuple[list[list[np.ndarray]], list[str]]:
    """The crops of every dog in a photo, and the reasons for the boxes left out.

    Returns, for each dog and each kind, uint8 of shape (views, 64, 64, 3). JPEGs are decoded at the
    smallest DCT scale that leaves every crop at least 128 px: twice the resolution it ends with,
    which keeps the median PSNR against full decoding above 45 dB (`tests/bench_data.py`).
    Raises `BadItem` where the photo gives no dog.
    """
    picture = open_picture(photo.read())
    xml = photo.read_annotation()
    *_, swap = turns_of(picture)
    frame = picture.size[::-1] if swap else picture.size
    if xml is None:
        boxes: list[Box] = [(0, 0, *frame)]
    else:
        boxes = upright_boxes(picture, *parse_annotation(xml))
    dogs, reasons = [], []
    for box in boxes:
        try:
            clipped = clip_box(box, *frame)
            dogs.append([CROPS[kind](clipped, *frame) for kind in kinds])
        except BadItem as bad:
            reasons.append(str(bad))
    if not dogs:
        raise BadItem(reasons[0])
    least = min(min(c[2] - c[0], c[3] - c[1]) for dog in dogs for views in dog for c in views)
    shrink = next((s for s in (8, 4, 2) if least / s >= 2 * IMAGE_SIZE), 1)
    upright = decode_picture(picture, shrink)
    scale = 1 / shrink if upright.width < frame[0] else 1.0  # only JPEGs have shrunk

    def resize(crop: Box) -> np.ndarray:
        left, top, right, bottom = (edge * scale for edge in crop)
        inside = (max(left, 0), max(top, 0), min(right, upright.width), min(bottom, upright.height))
        size = (IMAGE_SIZE, IMAGE_SIZE)
        return np.asarray(upright.resize(size, Image.Resampling.LANCZOS, box=inside))

    return [[np.stack([resize(c) for c in views]) for views in dog] for dog in dogs], reasons


# ------------------------------------------------------------------- 6. Data: the prepared crop set


@dataclass(frozen=True)
class CropSet:
    """All crops: `crops[first[i, k] : first[i, k] + count[i, k]]` shows dog i as kind k."""

    crops: Tensor  # uint8 (views, 64, 64, 3)
    first: Tensor  # int64 (dogs, kinds)
    count: Tensor  # int64 (dogs, kinds)
    weights: Tensor  # float32 (kinds,): how often each kind is drawn
    breed: Tensor  # int64 (dogs,)
    breeds: list[str]
    skipped: list[tuple[str, str]]  # (name, reason)
    key: str  # of what determines the crops; a resumed run must find the same

    def to(self, device: torch.device) -> CropSet:
        """The same with its tensors on `device`."""
        names = ("crops", "first", "count", "weights", "breed")
        return replace(self, **{n: getattr(self, n).to(device) for n in names})


def in_threads(function: Callable, items: Iterable) -> Iterator:
    """`map` in order by a thread for each core; an interrupt drops what is still waiting."""
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        yield from pool.map(function, items)
    finally:
        pool.shutdown(cancel_futures=True)


def cache_folder() -> Path:
    """Where prepared crops are kept: `$XDG_CACHE_HOME/train_dogs`; on Kaggle its scratch disk."""
    usual = Path("/kaggle/temp") if Path("/kaggle").is_dir() else Path.home() / ".cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or usual, "train_dogs")


def prepare_crops(dogs: DogSet, crops: str, show: bool = True) -> CropSet:
    """Crop every dog once, or find that done in the cache; the tensors lie on the CPU.

    Raises `UserError` above 5 % bad items, or with fewer than 16 dogs.
    """
    weights = parse_crops(crops if dogs.annotated else "whole")
    pairs = [[e for e in (p.picture, p.annotation) if e] for p in dogs.photos]
    names = [
        sorted(weights),
        [(p.name, [e.size for e in pair]) for p, pair in zip(dogs.photos, pairs)],
    ]
    stamps = [[e.stamp for e in pair] for pair in pairs]
    folder = cache_folder() / digest([names, stamps, dogs.skipped, PIL.__version__, "version 1"])
    if found := load_crops(folder, weights, digest(names)):
        return found
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=folder.parent) as scratch:
            made = Path(scratch, "crops")
            made.mkdir()
            crop_into(made, dogs, sorted(weights), show)
            try:
                made.rename(folder)
            except OSError:  # something is there: another run's, or damaged
                if load_crops(folder, weights, digest(names)) is None:
                    shutil.rmtree(folder, ignore_errors=True)
                    made.rename(folder)
        if found := load_crops(folder, weights, digest(names)):
            return found
        raise OSError(errno.EIO, "what was written cannot be read back")
    except OSError as error:
        raise UserError(
            f"the crops cannot be kept in {folder.parent} ({error.strerror}): set XDG_CACHE_HOME to"
            " a folder with 1 GB free for each kind of crop."
        ) from error


def in_notebook() -> bool:
    """Whether this runs in a Jupyter kernel, not merely beside an imported one."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return type(shell).__name__ == "ZMQInteractiveShell"


def is_live() -> bool:
    """Whether somebody watches: a terminal or a notebook, not a log file as in a Kaggle commit."""
    live = sys.stderr.isatty() or in_notebook()
    return live and os.environ.get("KAGGLE_KERNEL_RUN_TYPE") != "Batch"


def digest(value: object) -> str:
    """A short name for a value of plain types."""
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=12).hexdigest()


def crop_into(folder: Path, dogs: DogSet, kinds: list[str], show: bool) -> None:
    """Write the crops of all photos to `crops.bin` and their table to `index.json` in `folder`."""

    def attempt(photo: Photo) -> tuple[list, list[str]]:
        try:
            return crop_photo(photo, kinds)
        except BadItem as bad:
            return [], [str(bad)]

    count, breed, skipped = [], [], list(dogs.skipped)
    breeds = sorted({p.breed for p in dogs.photos})
    bar = {"unit": " photos", "disable": not show, "mininterval": 0.1 if is_live() else 60}
    with open(folder / "crops.bin", "wb") as file:
        results = tqdm(in_threads(attempt, dogs.photos), "cropping", len(dogs.photos), **bar)
        for (found, reasons), photo in zip(results, dogs.photos):
            skipped += [(photo.name, reason) for reason in reasons]
            for dog in found:
                count.append([len(views) for views in dog])
                breed.append(breeds.index(photo.breed))
                file.write(np.concatenate(dog).tobytes())
    items = len(skipped) + len(count)
    if len(skipped) > 0.05 * items:
        raise UserError(
            f"{len(skipped)} of {items} items in {dogs.where} are bad ({count_reasons(skipped)}):"
            " repair the set or give another --data; at most 5 % may be."
        )
    if len(count) < 16:
        raise UserError(f"{dogs.where} holds {len(count)} dogs: at least 16 are needed to train.")
    table = {"count": count, "breed": breed, "breeds": breeds, "skipped": skipped}
    (folder / "index.json").write_text(json.dumps(table))


def count_reasons(skipped: list[tuple[str, str]]) -> str:
    """How many were left out for which reason, as in "2 empty file, 1 reversed box"."""
    reasons = Counter(reason for _, reason in skipped).most_common()
    return ", ".join(f"{n} {reason}" for reason, n in reasons)


def load_crops(folder: Path, weights: dict[str, float], key: str) -> CropSet | None:
    """A prepared crop set, its pixels mapped from disk; None where there is no whole one."""
    try:
        table = json.loads((folder / "index.json").read_text())
        count = torch.tensor(table["count"])
        shape = (int(count.sum()), IMAGE_SIZE, IMAGE_SIZE, 3)
        if (folder / "crops.bin").stat().st_size != math.prod(shape):
            return None
        pixels = np.memmap(folder / "crops.bin", np.uint8, "c", shape=shape)
        return CropSet(
            crops=torch.from_numpy(pixels),
            first=count.flatten().cumsum(0).view_as(count) - count,
            count=count,
            weights=torch.tensor([weights[kind] for kind in sorted(weights)]),
            breed=torch.tensor(table["breed"]),
            breeds=table["breeds"],
            skipped=[tuple(item) for item in table["skipped"]],
            key=key,
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def draw_reals(dogs: CropSet, rows: Tensor, generator: torch.Generator | None) -> Tensor:
    """One view of each dog in `rows`, its kind drawn anew, half of them mirrored.

    `rows`: int64 (B,). Returns float32 (B, 3, 64, 64) in [-1, 1], channels last in memory.
    """
    device = rows.device
    chance = torch.rand((3, len(rows)), generator=generator, device=device)
    kind = torch.bucketize(chance[0], dogs.weights.cumsum(0)[:-1], right=True)
    view = (chance[1] * dogs.count[rows, kind]).long() + dogs.first[rows, kind]
    pixels = dogs.crops[view].permute(0, 3, 1, 2)
    mirrored = (chance[2] < 0.5)[:, None, None, None]
    return torch.where(mirrored, pixels.flip(3), pixels).float().div(127.5).sub(1)


# ---------------------------------------------------------------------------------- 7. Augmentation

# Differentiable, for reals and fakes alike, in D's step and in G's, drawn anew for every image:
# Zhao et al. 2020 (DiffAugment, arXiv 2006.10738). Each maps float32 (N, 3, 64, 64) to the same.


def augment_color(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Brightness by up to 0.5, saturation times 0 to 2, contrast times 0.5 to 1.5."""
    shape = (3, len(x), 1, 1, 1)
    brightness, saturation, contrast = torch.rand(shape, generator=generator, device=x.device)
    x = x + (brightness - 0.5)
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * (2 * saturation)
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (x - mean) * (contrast + 0.5)


def augment_translation(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """A shift by up to 8 pixels each way, mirrored at the border: no black wedges to learn.

    Two products with shift matrices: exact, and with a gradient that is the same in every run,
    where that of an indexed copy is summed in any order.
    """
    side = x.shape[-1]
    reach = side // 8
    chance = torch.rand((2, len(x), 1), generator=generator, device=x.device)
    shift = (chance * (2 * reach + 1)).long() - reach
    pixel = torch.arange(side, device=x.device)
    source = (pixel + shift).abs()
    source = side - 1 - (side - 1 - source).abs()
    rows, columns = (source[..., None] == pixel).to(x.dtype)[:, :, None]  # each (N, 1, 64, 64)
    return rows @ x @ columns.mT


def augment_cutout(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """A grey square of half the side, its centre anywhere."""
    side = x.shape[-1]
    chance = torch.rand((2, len(x), 1), generator=generator, device=x.device)
    centre = (chance * (side + 1)).floor()
    pixel = torch.arange(side, device=x.device)
    rows, columns = (pixel >= centre - side // 4) & (pixel < centre + side // 4)
    hole = rows[:, None, :, None] & columns[:, None, None, :]
    return x.masked_fill(hole, 0.0)


AUGMENTS = {
    "color": augment_color,
    "translation": augment_translation,
    "cutout": augment_cutout,
}


def parse_augment(text: str) -> tuple[str, ...]:
    """`"color,cutout"` to `("color", "cutout")`, `""` to `()`. Raises `UserError`."""
    names = tuple(name.strip() for name in text.split(",") if text)
    if not set(names) <= set(AUGMENTS) or len(set(names)) < len(names):
        raise UserError(f"--augment {text}: give some of {', '.join(AUGMENTS)}, once each.")
    return names


def augment(x: Tensor, names: Sequence[str], generator: torch.Generator | None) -> Tensor:
    """`x` through the augmentations `names`, drawn anew for each image."""
    for name in names:
        x = AUGMENTS[name](x, generator)
    return x


# -------------------------------------------------------------------------------------- 8. Networks

# From the latent or to the logit: (channels per unit of width, kernel); a 4 doubles or halves the
# side, a 3 keeps it. "rgb": the kernel of G's last layer. D norms all but its first "plain" layers.
LAYERS = {
    "deep": {  # made deeper and wider, as in the notebook of preset first-public
        "G": ((32, 4), (16, 4), (8, 4), (8, 3), (4, 4), (4, 3), (2, 4)), "rgb": 3,
        "D": ((2, 4), (4, 4), (4, 3), (8, 4), (8, 3), (16, 4)), "plain": 2,
    },
    "paper": {  # Radford et al. 2015 (arXiv 1511.06434)
        "G": ((8, 4), (4, 4), (2, 4), (1, 4)), "rgb": 4,
        "D": ((1, 4), (2, 4), (4, 4), (8, 4)), "plain": 1,
    },
}  # fmt: skip


class BreedBatchNorm2d(nn.Module):
    """Batch norm with a gain and a bias for each breed (Dumoulin et al. 2017, arXiv 1610.07629)."""

    def __init__(self, num_features: int, breeds: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(num_features, affine=False)
        self.weight = nn.Parameter(torch.ones(breeds, num_features))
        self.bias = nn.Parameter(torch.zeros(breeds, num_features))

    def forward(self, x: Tensor, breed: Tensor) -> Tensor:
        """`x`: (N, num_features, H, W), `breed`: int64 (N,)."""
        weight, bias = (F.embedding(breed, p)[:, :, None, None] for p in (self.weight, self.bias))
        return torch.addcmul(bias, self.norm(x), weight)


class Generator(nn.Module):
    """DCGAN: transposed convolutions, batch norm, ReLU, and tanh at the end."""

    def __init__(
        self, latent_dim: int = 256, width: int = 48, layers: str = "deep", breeds: int = 0
    ) -> None:
        """`breeds`: how many it is conditioned on; 0 = it draws a dog of any."""
        super().__init__()
        self.shape = {
            "latent_dim": latent_dim, "width": width, "layers": layers, "breeds": breeds,
        }  # fmt: skip
        self.latent_dim, self.breeds = latent_dim, breeds
        # The share of each breed in the data, so that dogs can be drawn as often as they occur.
        self.register_buffer("frequency", torch.full((breeds,), 1 / max(1, breeds)))
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        source, stride, padding = latent_dim, 1, 0
        for units, kernel in LAYERS[layers]["G"]:
            target = units * width
            if self.convs:
                stride, padding = kernel - 2, 1
            self.convs.append(
                nn.ConvTranspose2d(source, target, kernel, stride, padding, bias=False)
            )
            norm = BreedBatchNorm2d(target, breeds) if breeds else nn.BatchNorm2d(target)
            self.norms.append(norm)
            source = target
        last = LAYERS[layers]["rgb"]
        self.to_rgb = nn.ConvTranspose2d(source, 3, last, last - 2, 1)

    def forward(self, z: Tensor, breed: Tensor | None = None) -> Tensor:
        """(N, latent_dim) standard normal latents to (N, 3, 64, 64) images in [-1, 1].

        `breed`: int64 (N,), needed if, and only if, it is conditioned on breeds.
        """
        if (breed is None) == bool(self.breeds):
            raise ValueError(f"a generator of {self.breeds} breeds got breed={breed}")
        x = z[:, :, None, None]
        given = () if breed is None else (breed,)
        for conv, norm in zip(self.convs, self.norms):
            x = F.relu(norm(conv(x), *given), inplace=True)
        return self.to_rgb(x).tanh()


class SplitBatchNorm2d(nn.Module):
    """Batch norm that gives reals and fakes in one batch their own statistics, but one affine pair.

    Equal to two separate forwards through an ordinary batch norm in training mode, in one forward
    of everything around it. Keeps no running statistics: D is never evaluated. Statistics of their
    own for a second distribution: Xie et al. 2020 (AdvProp, arXiv 1911.09665).
    """

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.eps = eps

    def forward(self, x: Tensor, num_real: int) -> Tensor:
        """`x`: (N, num_features, H, W), the `num_real` reals first; 0 or N make one group."""
        if not 0 <= num_real <= len(x):
            raise ValueError(f"num_real is {num_real}, but the batch holds {len(x)}")
        groups = [g for g in x.split([num_real, len(x) - num_real]) if len(g)]
        normed = [
            F.batch_norm(g, None, None, self.weight, self.bias, training=True, eps=self.eps)
            for g in groups
        ]
        return normed[0] if len(normed) == 1 else torch.cat(normed)


class Discriminator(nn.Module):
    """G's mirror: convolutions, split batch norm, leaky ReLU; of breeds, a projection besides.

    Projection: Miyato and Koyama 2018 (arXiv 1802.05637); the classifier: Odena et al. 2017
    (AC-GAN, arXiv 1610.09585).
    """

    def __init__(
        self, width: int = 48, layers: str = "deep", breeds: int = 0, classify: bool = False
    ) -> None:
        super().__init__()
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        source = 3
        for k, (units, kernel) in enumerate(LAYERS[layers]["D"]):
            target = units * width
            self.convs.append(nn.Conv2d(source, target, kernel, kernel - 2, 1, bias=False))
            plain = k < LAYERS[layers]["plain"]
            self.norms.append(nn.Identity() if plain else SplitBatchNorm2d(target))
            source = target
        self.head = nn.Conv2d(source, 1, 4)
        # From 0: D begins as if it were told nothing.
        self.projection = nn.Parameter(torch.zeros(breeds, source)) if breeds else None
        self.classifier = nn.Linear(source, breeds) if classify else None

    def features(self, images: Tensor, num_real: int) -> Tensor:
        """(N, 3, 64, 64) images in [-1, 1], the reals first, to (N, channels, 4, 4)."""
        x = images
        for conv, norm in zip(self.convs, self.norms):
            x = conv(x)
            if isinstance(norm, SplitBatchNorm2d):
                x = norm(x, num_real)
            x = F.leaky_relu(x, 0.2, inplace=True)
        return x

    def judge(self, features: Tensor, breed: Tensor | None = None) -> Tensor:
        """Features to float32 (N,) logits of being real, and of its breed if it is told one."""
        logits = widened(self.head(features).flatten())
        if self.projection is not None:
            logits = logits + (F.embedding(breed, self.projection) * features.mean((2, 3))).sum(1)
        return logits

    def classify(self, features: Tensor) -> Tensor:
        """Features to float32 (N, breeds) logits of the breeds."""
        return widened(self.classifier(features.mean((2, 3))))

    def forward(self, images: Tensor, num_real: int, breed: Tensor | None = None) -> Tensor:
        """(N, 3, 64, 64) images in [-1, 1], the reals first, to (N,) logits of being real."""
        return self.judge(self.features(images, num_real), breed)


def networks(config: Config, breeds: int) -> tuple[Generator, Discriminator]:
    """G and D as `config` describes them, for `breeds` breeds if it conditions on them."""
    breeds = breeds if config.condition == "breed" else 0
    D_width = config.d_width or config.width
    G = Generator(config.latent_dim, config.width, config.layers, breeds)
    return G, Discriminator(D_width, config.layers, breeds, config.classify > 0)


def build_networks(
    config: Config, device: torch.device, breeds: int = 0
) -> tuple[Generator, Discriminator]:
    """G and D with weights from `config.seed`, the same on any device."""
    norms = (nn.BatchNorm2d, SplitBatchNorm2d, BreedBatchNorm2d)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        G, D = networks(config, breeds)
        if config.init_std:  # DCGAN's own: weights N(0, std), norms N(1, std), no bias
            for module in (*G.modules(), *D.modules()):
                if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                    nn.init.normal_(module.weight, 0.0, config.init_std)
                elif isinstance(module, norms) and module.weight is not None:
                    nn.init.normal_(module.weight, 1.0, config.init_std)
    layout = memory_layout(device)
    return G.to(device, memory_format=layout), D.to(device, memory_format=layout)


def memory_layout(device: torch.device) -> torch.memory_format:
    """Channels last but on GPUs without tensor cores, whose convolutions want it contiguous."""
    old_gpu = device.type == "cuda" and torch.cuda.get_device_capability(device) < (7, 0)
    return torch.contiguous_format if old_gpu else torch.channels_last


def widened(x: Tensor) -> Tensor:
    """Half-precision numbers as float32; others as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


PRECISIONS = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_precision(name: str, device: torch.device) -> str:
    """`auto` as fp32, tf32, bf16 or fp16: the fastest that `device` has in hardware.

    bf16 from Ampere (capability 8.0) on, fp16 on Volta and Turing (T4), fp32 on Pascal (P100) and
    on a CPU, but for those with bf16 instructions. Others emulate it, whatever torch says.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return "bf16" if capability >= (8, 0) else "fp16" if capability >= (7, 0) else "fp32"
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:  # no Linux
        flags = set()
    return "bf16" if flags & {"avx512_bf16", "amx_bf16"} else "fp32"


# ---------------------------------------------------------------------------------------- 9. Losses


def discriminator_loss(
    real_logits: Tensor, fake_logits: Tensor, margin: float, smoothing: float
) -> Tensor:
    """Logistic loss whose real side is exactly 0, with gradient 0, once sigmoid(logit) > `margin`.

    real: (1 - s) * max(0, softplus(-l) - softplus(-l_m)) + s * softplus(l), l_m = logit(margin)
    fake: softplus(l)

    The constant makes the floor 0; below the margin the gradient is the logistic loss's own. The
    margin keeps D from over-fitting reals it already knows. With smoothing s > 0 a real past the
    margin is still pushed down by the second term, so that the two work against each other.
    """
    floor = -math.log(margin)  # softplus(-logit(m)) = -log m
    real = (F.softplus(-real_logits) - floor).relu().mean()
    if smoothing:
        real = (1 - smoothing) * real + smoothing * F.softplus(real_logits).mean()
    return real + F.softplus(fake_logits).mean()


def generator_loss(fake_logits: Tensor) -> Tensor:
    """The non-saturating loss softplus(-l), Goodfellow et al. 2014; its gradient is never 0."""
    return F.softplus(-fake_logits).mean()


def gradient_penalty(real_logits: Tensor, images: Tensor) -> Tensor:
    """R1: the mean over reals of |dD/dx|^2 / 2 (Mescheder et al. 2018, arXiv 1801.04406).

    `images`: the reals, and any fakes behind them, whose slope is 0 and which count as nothing.
    """
    (slope,) = torch.autograd.grad(real_logits.sum(), images, create_graph=True)
    return slope.square().sum() / (2 * len(real_logits))


# ------------------------------------------------------------------------------ 10. Training a step


class Trainer:
    """G, D, their optimisers and averages, and all random state: one run, on one device.

    `step()` does one update of D and one of G. On CUDA it is captured once as a graph and replayed;
    elsewhere the same code runs eagerly. Everything that a replay touches is a tensor that stays
    where it is: rollback and resume copy into it.
    """

    STATS = ("d_loss", "g_loss", "d_real", "d_fake", "past_margin")

    def __init__(self, config: Config, dogs: CropSet, device: torch.device) -> None:
        self.config, self.device, self.dogs = config, device, dogs.to(device)
        self.G, self.D = build_networks(config, device, len(dogs.breeds))
        if self.G.breeds:
            self.G.frequency.copy_(torch.bincount(dogs.breed, minlength=self.G.breeds))
            self.G.frequency.div_(self.G.frequency.sum())
        self.layout = memory_layout(device)
        self.precision = choose_precision(config.precision, device)
        torch.backends.cudnn.allow_tf32 = self.precision != "fp32"
        self.augments = parse_augment(config.augment)
        self.loss_scale = torch.full((), 65536.0, device=device)  # used with fp16 alone
        on_gpu = device.type == "cuda"
        # A captured graph knows the default CUDA generator; on a CPU the run has one of its own.
        self.rng = torch.cuda.default_generators[device.index] if on_gpu else torch.Generator()
        self.rng.manual_seed(config.seed)
        self.opt_g = self._adam(self.G, config.g_lr)
        self.opt_d = self._adam(self.D, config.d_lr)
        self.ema = [p.detach().clone() for p in self.G.parameters()]
        self.swa = [p.detach().clone() for p in self.G.parameters()]
        self.order = torch.arange(len(dogs.first), device=device)
        self.cursor = torch.zeros((), dtype=torch.int64, device=device)
        self.sums = torch.zeros(len(self.STATS), device=device)
        self.steps_done = self.averages_done = self.swa_count = self.rollbacks = self.summed = 0
        self._rate_share = 1.0
        self._means = dict.fromkeys(self.STATS, 0.0)
        self._replay: Callable[[], None] | None = None
        self._in_flight: deque[torch.cuda.Event] = deque()

    def _adam(self, network: nn.Module, lr: float) -> torch.optim.Adam:
        on_gpu = self.device.type == "cuda"
        adam = torch.optim.Adam(
            network.parameters(),
            lr=torch.tensor(lr, device=self.device) if on_gpu else lr,
            betas=(self.config.beta1, self.config.beta2),
            capturable=on_gpu,
            fused=True,
        )
        for parameter in network.parameters():  # a first step of nothing makes its state exist
            parameter.grad = torch.zeros_like(parameter)
        adam.step()
        for state in adam.state.values():
            state["step"].zero_()
        return adam

    def _one_step(self) -> None:
        config, batch = self.config, self.config.batch_size
        rows = self.order[(self.cursor + torch.arange(batch, device=self.device)) % len(self.order)]
        self.cursor += batch
        reals = draw_reals(self.dogs, rows, self.rng).contiguous(memory_format=self.layout)
        if config.noise:
            noise = torch.rand(reals.shape, generator=self.rng, device=self.device)
            reals = reals + config.noise * noise
        z = torch.randn(batch, config.latent_dim, generator=self.rng, device=self.device)
        breed = self.dogs.breed[rows] if self.G.breeds else None  # of a real and of its fake
        with self.autocast():
            fakes = widened(self.G(z, breed))  # one forward serves both steps
            d_loss, real_logits, fake_logits = self._judge_both(reals, fakes.detach(), breed)
        update(self.opt_d, d_loss, self.scale)
        with self.autocast():  # its own: autocast remembers the weights from before the update
            features = self.D.features(self._augment(fakes), num_real=0)
            g_loss = generator_loss(self.D.judge(features, breed))
            if config.classify:
                g_loss = g_loss + config.classify * F.cross_entropy(
                    self.D.classify(features), breed
                )
        update(self.opt_g, g_loss, self.scale)
        past = (real_logits > logit(config.margin)).float().mean()
        stats = [d_loss, g_loss, real_logits.mean(), fake_logits.mean(), past]
        self.sums += torch.stack(stats).detach()

    def _judge_both(
        self, reals: Tensor, fakes: Tensor, breed: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """D's loss on a batch of reals and one of fakes, and its logits of both."""
        config, batch = self.config, len(reals)
        images = self._augment(torch.cat([reals, fakes]))
        images.requires_grad_(config.r1 > 0)
        features = self.D.features(images, num_real=batch)
        both = None if breed is None else torch.cat([breed, breed])
        real_logits, fake_logits = self.D.judge(features, both).split(batch)
        loss = discriminator_loss(real_logits, fake_logits, config.margin, config.smoothing)
        if config.r1:
            loss = loss + config.r1 * gradient_penalty(real_logits, images)
        if config.classify:  # of reals alone: fakes of no clear breed shall not be learnt from
            told_apart = F.cross_entropy(self.D.classify(features[:batch]), breed)
            loss = loss + config.classify * told_apart
        return loss, real_logits, fake_logits

    def _augment(self, images: Tensor) -> Tensor:
        return augment(images, self.augments, self.rng).contiguous(memory_format=self.layout)

    def autocast(self) -> torch.autocast:
        """The context in which networks compute in this run's precision."""
        dtype = PRECISIONS[self.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    @property
    def scale(self) -> Tensor | None:
        """The factor of a loss that keeps half-precision gradients off 0; only fp16 needs one."""
        return self.loss_scale if self.precision == "fp16" else None

    def step(self, progress: float) -> None:
        """One update of D and of G; returns with at most 4 steps in flight on the device."""
        if self.steps_done % max(1, len(self.order) // self.config.batch_size) == 0:
            shuffled = torch.randperm(len(self.order), generator=self.rng, device=self.device)
            self.order.copy_(shuffled)
            self.cursor.zero_()
        self._set_rates(progress)
        (self._replay or self._one_step)()
        self.steps_done += 1
        self.summed += 1
        if self.device.type == "cuda":
            self._in_flight.append(torch.cuda.Event())
            self._in_flight[-1].record()
            if len(self._in_flight) > 4:
                self._in_flight.popleft().synchronize()

    def _set_rates(self, progress: float) -> None:
        """The full rates until `lr_decay_start`, then linearly down to 0."""
        start = self.config.lr_decay_start
        share = min(1.0, (1 - progress) / (1 - start)) if start < 1 else 1.0
        if share == self._rate_share:
            return
        self._rate_share = share
        for adam, lr in ((self.opt_g, self.config.g_lr), (self.opt_d, self.config.d_lr)):
            group = adam.param_groups[0]
            if isinstance(group["lr"], Tensor):  # what a captured step reads
                group["lr"].fill_(lr * share)
            else:
                group["lr"] = lr * share

    def capture(self) -> None:
        """Capture `_one_step` as a CUDA graph; weights and random state stay as they were."""
        if self.device.type != "cuda":
            return
        before = self.state_dict()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._one_step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._one_step()
        self.load_state_dict(before)
        self._replay = graph.replay

    def average(self, progress: float) -> None:
        """Update the EMA, and from `swa_start` on the equal-weight SWA (arXiv 1803.05407).

        Weights that are not finite are left out, which is decided on the device.
        """
        finite = self._finite()
        self.averages_done += 1
        # Early on an average over the last tenth of the updates: no trace of the initial weights.
        warm = (1 + self.averages_done) / (10 + self.averages_done)
        beta = self.config.ema_beta or stepped_beta(progress)
        beta = min(beta**self.config.swa_every, warm)
        self._lerp(self.ema, 1 - beta, finite)
        if progress >= self.config.swa_start:
            self.swa_count += 1
            self._lerp(self.swa, 1 / self.swa_count, finite)

    @torch.no_grad()
    def _lerp(self, average: list[Tensor], share: float, finite: Tensor) -> None:
        targets = [torch.where(finite, p, a) for p, a in zip(self.G.parameters(), average)]
        torch._foreach_lerp_(average, targets, share)

    @torch.no_grad()
    def _finite(self) -> Tensor:
        tensors = [*self.G.parameters(), *self.D.parameters(), self.sums]
        return torch.stack(torch._foreach_norm(tensors)).isfinite().all()

    def is_finite(self) -> bool:
        """Whether all weights and losses are finite; waits for the device."""
        return bool(self._finite())

    def read_stats(self) -> dict[str, float]:
        """The means of `STATS` over the steps since the last call; waits for the device."""
        if self.summed:
            self._means = dict(zip(self.STATS, (self.sums / self.summed).tolist()))
            self.sums.zero_()
            self.summed = 0
        return self._means

    def submitted(self) -> str:
        """Which weights would be submitted now."""
        return weights_to_submit(self.config.average, self.swa_count, self.averages_done)

    def averaged_generator(self, choice: str, batches: int) -> Generator:
        """A G with the weights of `choice`, its norms re-estimated over `batches`, in eval mode."""
        weights = {"swa": self.swa, "ema": self.ema, "none": list(self.G.parameters())}[choice]
        return averaged_generator(self.G, weights, batches, self.config)

    def _tensors(self) -> dict[str, Tensor]:
        found = {f"G.{k}": v for k, v in self.G.state_dict().items()}
        found |= {f"D.{k}": v for k, v in self.D.state_dict().items()}
        for name, adam in (("opt_g", self.opt_g), ("opt_d", self.opt_d)):
            for i, state in enumerate(adam.state.values()):
                found |= {f"{name}.{i}.{k}": v for k, v in state.items()}
        found |= {f"ema.{i}": v for i, v in enumerate(self.ema)}
        found |= {f"swa.{i}": v for i, v in enumerate(self.swa)}
        found |= {"order": self.order, "cursor": self.cursor, "sums": self.sums}
        return found | {"loss_scale": self.loss_scale}

    COUNTERS = ("steps_done", "averages_done", "swa_count", "rollbacks", "summed")

    def state_dict(self) -> dict[str, object]:
        """Everything that a bit-equal continuation needs, on the CPU, in plain types."""
        tensors = {k: v.detach().to("cpu", copy=True) for k, v in self._tensors().items()}
        counters = {k: getattr(self, k) for k in self.COUNTERS}
        rng = self.rng.get_state()
        data = {"data_key": self.dogs.key, "breeds": self.dogs.breeds}
        return {"tensors": tensors, "rng": rng, **data, **counters}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Copy a `state_dict` into the tensors that are there."""
        with torch.no_grad():
            for name, tensor in self._tensors().items():
                tensor.copy_(state["tensors"][name])
        self.rng.set_state(state["rng"])
        for name in self.COUNTERS:
            setattr(self, name, state[name])


def logit(probability: float) -> float:
    """log(p / (1 - p)); inf for 1."""
    return math.inf if probability >= 1 else math.log(probability / (1 - probability))


def stepped_beta(progress: float) -> float:
    """An EMA's decay that rises at epochs 200, 300 and 400 of 620, as first-public's did."""
    return 1 - 0.1 ** (1 + sum(progress >= epoch / 620 for epoch in (200, 300, 400)))


def update(adam: torch.optim.Adam, loss: Tensor, scale: Tensor | None = None) -> None:
    """One Adam step on `loss`; `autograd.grad` leaves the other network's weights alone.

    `scale`: a factor of the loss that fused Adam divides out of the gradients. Where they overflow
    the step is skipped and the scale halved; else it grows, twofold in 2,000 calls.
    """
    parameters = adam.param_groups[0]["params"]
    gradients = torch.autograd.grad(loss if scale is None else loss * scale, parameters)
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient
    if scale is None:
        adam.step()
        return
    finite = torch.stack(torch._foreach_norm(gradients)).isfinite().all()
    adam.grad_scale, adam.found_inf = scale, (~finite).float()
    adam.step()
    scale.mul_(0.5 + finite * (2 ** (1 / 2000) - 0.5))  # no `where`: it would copy from the host


WEIGHTS = {"swa": "SWA generator", "ema": "EMA generator", "none": "raw generator"}


def weights_to_submit(average: str, swa_count: int, averages_done: int) -> str:
    """Which weights are submitted, by a rule that needs no look at the images.

    `average` says it; but SWA only from 10 snapshots on (until then the EMA stands in), and the EMA
    only from its first update on (until then the raw weights do).
    """
    if average == "swa" and swa_count < 10:
        average = "ema"
    return "none" if average == "ema" and averages_done == 0 else average


def flops_per_image(config: Config) -> dict[str, int]:
    """FLOPs per image-step by torch's counter: G's forward, the D step, the G step's other part.

    Counted on meta tensors; norms, activations, augmentation and optimisers count as nothing.
    """
    batch = 4
    with torch.device("meta"):
        G, D = networks(
            replace(config, classify=0.0), 120
        )  # Stanford's; a classifier costs nothing
        z, images = torch.empty(batch, config.latent_dim), torch.empty(2 * batch, 3, 64, 64)
        breed = torch.zeros(2 * batch, dtype=torch.int64) if G.breeds else None
    images = images.requires_grad_(config.r1 > 0).mul(1)  # no leaf: the counter wants none
    counted = {}
    with FlopCounterMode(display=False) as counter:
        fakes = G(z, breed if breed is None else breed[:batch])
        counted["G forward"] = counter.get_total_flops()
        logits = D(images, batch, breed)
        loss = logits.sum()
        if config.r1:
            loss = loss + gradient_penalty(logits[:batch], images)
        torch.autograd.grad(loss, list(D.parameters()))
        counted["D step"] = counter.get_total_flops() - sum(counted.values())
        logits = D(fakes, 0, breed if breed is None else breed[:batch])
        torch.autograd.grad(logits.sum(), list(G.parameters()))
        counted["G step"] = counter.get_total_flops() - sum(counted.values())
    return {name: total // batch for name, total in counted.items()}


def p100_hours(config: Config, steps: int) -> float:
    """Equivalent P100-hours of `steps`: images x FLOPs per image-step / 7.4e12 / 3600."""
    images = steps * config.batch_size
    return images * sum(flops_per_image(config).values()) / P100_FLOPS / 3600


# ------------------------------------------------------------------------- 11. Sampling, submission


def draw_latents(count: int, latent_dim: int, seed: int, truncation: float = 0.0) -> Tensor:
    """float32 (count, latent_dim), standard normal; row k is the same whatever `count` is.

    `truncation` t > 0: normal given |z| <= t, by the inverse of its distribution function.
    """
    generator = torch.Generator().manual_seed(seed)
    shape, batches = (SAMPLE_BATCH, latent_dim), math.ceil(count / SAMPLE_BATCH)
    z = torch.cat([torch.randn(shape, generator=generator) for _ in range(batches)])[:count]
    if truncation:
        least = torch.special.ndtr(torch.tensor(-truncation, dtype=torch.float64))
        share = least + torch.special.ndtr(z.double()) * (1 - 2 * least)
        z = torch.special.ndtri(share).float()
    return z


def draw_breeds(G: Generator, count: int, seed: int) -> Tensor | None:
    """int64 (count,), as often as in the data; row k is the same whatever `count` is.

    None for a G that is not conditioned on breeds.
    """
    if not G.breeds:
        return None
    generator = torch.Generator().manual_seed(stream(seed, "breeds"))
    chance = torch.rand(count, generator=generator)
    return torch.bucketize(chance, G.frequency.cpu().cumsum(0)[:-1], right=True)


def draw_inputs(G: Generator, config: Config, count: int) -> tuple[Tensor, Tensor | None]:
    """The latents, and breeds if G takes them, of the first `count` images of a submission."""
    seed = stream(config.seed, "submission")
    latents = draw_latents(count, G.latent_dim, seed, config.truncation)
    return latents, draw_breeds(G, count, config.seed)


STREAMS = ("training", "submission", "norms", "sheet", "reals", "breeds")


def stream(seed: int, name: str) -> int:
    """A seed for one use of randomness, far from those of the others."""
    return seed + (STREAMS.index(name) << 32)


def averaged_generator(
    like: Generator, weights: Sequence[Tensor], batches: int, config: Config
) -> Generator:
    """A copy of `like` with `weights` as its parameters, norms re-estimated, in eval mode."""
    G = copy.deepcopy(like)
    with torch.no_grad():
        for target, source in zip(G.parameters(), weights, strict=True):
            target.copy_(source)
    return estimate_norms(G, batches, config.seed, config.truncation)


def estimate_norms(G: Generator, batches: int, seed: int, truncation: float = 0.0) -> Generator:
    """Re-estimate G's batch-norm statistics over `batches` x 128 latents; returns it in eval mode.

    Averaged weights have no statistics of their own: those of any single G are wrong for them
    (Izmailov et al. 2018, section 3.2). Cumulative means, as PreciseBN (arXiv 2105.07576).
    """
    device = next(G.parameters()).device
    for module in G.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    G.train()
    count = batches * SAMPLE_BATCH
    latents = draw_latents(count, G.latent_dim, stream(seed, "norms"), truncation)
    with full_precision(), torch.no_grad():
        for inputs in in_batches(latents, draw_breeds(G, count, seed)):
            G(*(x.to(device) for x in inputs))
    return G.eval()


def in_batches(latents: Tensor, breeds: Tensor | None) -> Iterator[tuple[Tensor, ...]]:
    """What a G takes, in batches of 128, the last one filled up."""
    for k in range(0, len(latents), SAMPLE_BATCH):
        rows = torch.arange(k, k + SAMPLE_BATCH).clamp(max=len(latents) - 1)
        yield (latents[rows],) if breeds is None else (latents[rows], breeds[rows])


def full_precision() -> AbstractContextManager:
    """Plain float32 convolutions by one fixed algorithm, for images that do not vary."""
    return torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    )


def sample_images(
    G: Generator, latents: Tensor, breeds: Tensor | None = None
) -> Iterator[np.ndarray]:
    """uint8 (n, 64, 64, 3) batches of images, in the order of `latents` and of their `breeds`.

    Every forward has 128 latents, the last one filled up, and G must be in eval mode: an image
    depends on its own latent alone.
    """
    device, left = next(G.parameters()).device, len(latents)
    with full_precision(), torch.no_grad():
        for inputs in in_batches(latents, breeds):
            yield to_bytes(G(*(x.to(device) for x in inputs)))[:left]
            left -= SAMPLE_BATCH


def to_bytes(images: Tensor) -> np.ndarray:
    """(N, 3, 64, 64) in [-1, 1] to uint8 (N, 64, 64, 3): round(127.5 x + 127.5), clamped."""
    levels = images.mul(127.5).add(127.5).round().clamp(0, 255).byte()
    return levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; renamed into place if the block ends well, else removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def save(path: Path, value: object) -> None:
    """`torch.save` that leaves the old file whole on any error (a full disk raises `OSError`)."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    with whole_file(path) as part:
        part.write_bytes(buffer.getbuffer())


def encode_png(image: np.ndarray) -> bytes:
    """uint8 (64, 64, 3) to a PNG. Run-length coding (3) at level 1 is 1.4 times as fast as Pillow's
    default here, and 5 % smaller (`tests/bench_zip.py`: 0.42 against 0.60 ms, 8.3 against 8.8 kB).
    """
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1, compress_type=3)
    return buffer.getvalue()


def write_submission(path: Path, batches: Iterable[np.ndarray]) -> int:
    """Write `00000.png`... at the root of a zip, encoded in threads; returns how many.

    `batches`: uint8 (n, 64, 64, 3) arrays. Stored, not deflated: PNGs do not shrink again.
    """
    count = 0
    # A task of 32 images keeps the threads out of each other's way; one image is too little work.
    tasks = (batch[k : k + 32] for batch in batches for k in range(0, len(batch), 32))
    with whole_file(path) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
        for png in chain.from_iterable(in_threads(lambda task: [*map(encode_png, task)], tasks)):
            name = zipfile.ZipInfo(f"{count:05d}.png", date_time=(1980, 1, 1, 0, 0, 0))
            name.external_attr = 0o644 << 16
            archive.writestr(name, png)
            count += 1
    return count


# ------------------------------------------------------------------- 12. Time, checkpoints, the log

NORM_BATCHES = 32  # x 128 latents, to re-estimate the norms of the G that is submitted
SHEETS = (0.01, 0.03, 0.06, *(n / 10 for n in range(1, 10)))  # progress at which sheets are drawn


class Clock:
    """The wall-clock of a run over all its parts, and its progress from 0 to 1."""

    def __init__(self, config: Config, started: float, used_before: float) -> None:
        """`started`: `time.monotonic()` when this part began; `used_before`: seconds of others."""
        self.steps, self.started = config.steps, started
        self.origin = started - used_before
        self.deadline = self.origin + 3600 * config.hours if config.hours else math.inf
        self.part_deadline = started + 3600 * config.part_hours if config.part_hours else math.inf
        self.reserve = 0.0  # seconds that finishing takes, once measured

    def used(self) -> float:
        """Seconds of the run so far, all parts together."""
        return time.monotonic() - self.origin

    def training_left(self) -> float:
        """Seconds until this part must begin to finish."""
        return min(self.deadline, self.part_deadline) - self.reserve - time.monotonic()

    def progress(self, steps_done: int) -> float:
        """The larger of steps done over `steps` and time used over the budget less the reserve."""
        in_time = self.used() / max(1e-9, self.deadline - self.reserve - self.origin)
        return min(1.0, max(steps_done / self.steps, in_time))


class Interrupts:
    """What SIGINT and SIGTERM do: once `armed`, the first sets `stopped`; any other raises."""

    def __init__(self) -> None:
        self.armed = self.stopped = False

    def handle(self, *_: object) -> None:
        """The handler of both signals."""
        if self.stopped or not self.armed:
            raise KeyboardInterrupt
        self.stopped = True
        print("saving, then writing images.zip; once more to leave at once", file=sys.stderr)


@contextmanager
def interrupts() -> Iterator[Interrupts]:
    """Handle SIGINT and SIGTERM inside the block, and put the old handlers back behind it."""
    state, previous = Interrupts(), {}
    if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, state.handle)
    try:
        yield state
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Report:
    """`log.jsonl`, and what a person sees: a bar on a terminal or in a notebook, else lines."""

    def __init__(self, out: Path) -> None:
        self.path = out / "log.jsonl"
        form = "{percentage:3.0f}%|{bar}| {postfix}"
        self.bar = tqdm(total=1.0, bar_format=form, disable=not is_live())
        self.shown = self.logged = self.printed = -math.inf
        self.last_steps, self.last_time = 0, time.monotonic()

    def start(self, trainer: Trainer) -> None:
        """Count images per second from here."""
        self.last_steps, self.last_time = trainer.steps_done, time.monotonic()

    def event(self, text: str = "", **values: object) -> None:
        """Say `text`, and log it with `values` as one JSON line."""
        if text:
            tqdm.write(text)  # above the bar
            sys.stdout.flush()
            values = {"text": text} | values
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def progress(self, trainer: Trainer, clock: Clock, last: bool = False) -> dict[str, float]:
        """Show and, every 10 s, log where training stands. Returns the mean losses since then."""
        stats, now = trainer.read_stats(), time.monotonic()
        steps, batch = trainer.steps_done, trainer.config.batch_size
        rate = (steps - self.last_steps) / max(1e-9, now - self.last_time)
        left = min(clock.training_left(), (clock.steps - steps) / max(rate, 1e-9))
        share = clock.progress(steps)
        line = (
            f"step {steps}, {steps * batch:,} images, {rate * batch:.0f} images/s,"
            f" D {stats['d_loss']:.3f}, G {stats['g_loss']:.3f},"
            f" past margin {stats['past_margin']:.2f}, {max(0, left) / 60:.0f} min left"
        )
        self.bar.n = share
        self.bar.set_postfix_str(line)
        if self.bar.disable and (last or now >= self.printed + 60):
            print(f"{share:4.0%} {line}", flush=True)
            self.printed = now
        if last or now >= self.logged + 10:
            values = {k: round(v, 5) if math.isfinite(v) else None for k, v in stats.items()}
            self.event(
                step=steps, images=steps * batch, progress=round(share, 5),
                seconds=round(clock.used(), 2), images_per_second=round(rate * batch, 2), **values,
            )  # fmt: skip
            self.logged, self.last_steps, self.last_time = now, steps, now
        self.shown = now
        return stats


def write_checkpoint(
    out: Path, trainer: Trainer, clock: Clock, finished: bool = False, finishing: float = 0.0
) -> Path:
    """Write everything that a continuation needs to `checkpoint.new.pt`; returns its path.

    `finishing`: seconds that this part will still use, to be counted as used.
    """
    state = {
        "format": 1,
        "config": asdict(trainer.config),
        "trainer": trainer.state_dict(),
        "seconds_used": clock.used() + finishing,
        "finished": finished,
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
    }
    save(out / "checkpoint.new.pt", state)
    return out / "checkpoint.new.pt"


def keep_checkpoint(new: Path) -> None:
    """Make a whole `checkpoint.new.pt` the `checkpoint.pt`, and that one the previous one."""
    current = new.with_name("checkpoint.pt")
    if current.exists():
        os.replace(current, new.with_name("checkpoint.previous.pt"))
    os.replace(new, current)


class Damaged(UserError):
    """A checkpoint of which nothing can be trusted."""


def load_checkpoint(path: Path, *parts: str) -> dict[str, object]:
    """A checkpoint or `generator.pt` with one of `parts` in it. Raises `UserError` without."""
    try:
        with zipfile.ZipFile(path) as archive:
            whole = archive.testzip() is None  # torch itself does not look at the checksums
        state = torch.load(path, map_location="cpu", weights_only=True) if whole else None
        if isinstance(state, dict) and state.get("format") == 1 and {*parts} & {*state}:
            return state
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give another file.") from error
    except (*DAMAGE, pickle.UnpicklingError):
        pass
    raise Damaged(f"{path} is damaged, or no checkpoint of this version: give another file.")


def find_checkpoint(options: Options, *parts: str) -> dict[str, object] | None:
    """`--resume`, else the newest whole file in `--out` with one of `parts` in it, else None.

    "trainer" is in checkpoints, "state_dict" in `generator.pt`. Damaged files are set aside.
    """
    if options.resume:
        return load_checkpoint(Path(options.resume), *parts)
    names = ["checkpoint.pt", "checkpoint.previous.pt"]
    names += ["generator.pt"] if "state_dict" in parts else []
    for path in (Path(options.config.out, name) for name in names):
        try:
            if path.exists():
                return load_checkpoint(path, *parts)
        except Damaged:
            aside = path.with_suffix(".damaged.pt")
            os.replace(path, aside)
            print(f"{path} is damaged: set aside as {aside.name}.", file=sys.stderr)
    return None


def refuse_other_recipe(config: Config, saved: dict[str, object], names: Iterable[str]) -> None:
    """Raise `UserError` where a field of `names` that shapes the weights differs from the saved."""
    for f in fields(Config):
        if f.name in names and f.metadata["fixed"] and getattr(config, f.name) != saved[f.name]:
            flag = "--" + f.name.replace("_", "-")
            raise UserError(
                f"the checkpoint was made with {flag} {saved[f.name]}, not"
                f" {getattr(config, f.name)}: give {flag} {saved[f.name]}, or start anew with"
                " --fresh or another --out."
            )


# -------------------------------------------------------------------------------- 13. Looking at it


def real_images(dogs: CropSet, seed: int) -> np.ndarray:
    """uint8 (100, 64, 64, 3): real crops as the networks see them, spread over the whole set."""
    device = dogs.crops.device
    rows = torch.linspace(0, len(dogs.first) - 1, 100, device=device).long()
    generator = torch.Generator(device).manual_seed(stream(seed, "reals"))
    return to_bytes(draw_reals(dogs, rows, generator))


def sample_sheet(G: Generator, seed: int) -> np.ndarray:
    """uint8 (100, 64, 64, 3): the images of the run's fixed latents."""
    latents = draw_latents(100, G.latent_dim, stream(seed, "sheet"))
    return np.concatenate(list(sample_images(G, latents, draw_breeds(G, 100, seed))))


def draw_sheet(images: np.ndarray, columns: int = 10) -> Image.Image:
    """uint8 (n, 64, 64, 3) as one picture, `columns` to a row, white where images are wanting."""
    rows = math.ceil(len(images) / columns)
    sheet = np.full((rows * columns, IMAGE_SIZE, IMAGE_SIZE, 3), 255, np.uint8)
    sheet[: len(images)] = images
    sheet = sheet.reshape(rows, columns, IMAGE_SIZE, IMAGE_SIZE, 3).swapaxes(1, 2)
    return Image.fromarray(sheet.reshape(rows * IMAGE_SIZE, columns * IMAGE_SIZE, 3))


def save_picture(path: Path, frames: Sequence[Image.Image]) -> None:
    """Write one picture, or several as an animation of 0.7 s each; the format is the suffix's."""
    several = {"save_all": True, "append_images": frames[1:], "duration": 700, "loop": 0}
    with whole_file(path) as part:
        frames[0].save(part, path.suffix[1:].upper(), **(several if len(frames) > 1 else {}))


def pairwise_distance(images: np.ndarray) -> float:
    """Mean root-mean-square difference between two of the images, in levels of 0..255."""
    x = torch.from_numpy(images.reshape(len(images), -1)).float()
    return (torch.pdist(x) / math.sqrt(x.shape[1])).mean().item()


def look(trainer: Trainer, clock: Clock, report: Report, out: Path) -> None:
    """Draw the averaged G's sheet of now, and warn where it has collapsed or D has won."""
    config, stats = trainer.config, report.progress(trainer, clock)
    images = sample_sheet(trainer.averaged_generator(trainer.submitted(), 8), config.seed)
    save_picture(sheet_path(out, trainer.steps_done), [draw_sheet(images)])
    variety = pairwise_distance(images) / pairwise_distance(real_images(trainer.dogs, config.seed))
    report.event(step=trainer.steps_done, variety=round(variety, 4))
    if variety < 0.5:
        report.event(
            f"warning: the samples differ {variety:.2f} times as much among each other as real dogs"
            " do: if it stays so, G has collapsed; try a lower --g-lr or a wider --d-width"
        )
    if stats["past_margin"] > 0.98 and stats["d_fake"] < -6:
        report.event("warning: D tells reals from fakes with certainty: G learns little now")


def sheet_path(out: Path, step: int) -> Path:
    """Where the sheet of a step lies."""
    return out / "samples" / f"step_{step:07d}.png"


# -------------------------------------------------------------------------------- 14. The whole run


def measure_finish(trainer: Trainer) -> float:
    """Seconds that re-estimation, sampling and the zip take here: the better of two batches."""
    G = trainer.averaged_generator("none", 1)
    inputs = draw_latents(SAMPLE_BATCH, G.latent_dim, 0), draw_breeds(G, SAMPLE_BATCH, 0)
    images = next(sample_images(G, *inputs))

    def seconds(work: Callable) -> float:
        return min(timeit.repeat(work, number=1, repeat=2))

    norms = seconds(lambda: estimate_norms(G, 1, 0).to_rgb.bias.tolist())  # waits for the device
    sampling = seconds(lambda: list(sample_images(G, *inputs)))
    encoding = seconds(lambda: list(in_threads(encode_png, images)))
    batches = math.ceil(trainer.config.images / SAMPLE_BATCH)
    return NORM_BATCHES * norms + batches * (sampling + encoding)


def roll_back(trainer: Trainer, report: Report, out: Path) -> bool:
    """Back to the last checkpoint with fresh randomness. Returns False once three were in vain."""
    sick_step, rollbacks = trainer.steps_done, trainer.rollbacks + 1
    trainer.load_state_dict(load_checkpoint(out / "checkpoint.pt", "trainer")["trainer"])
    trainer.rollbacks = rollbacks
    trainer.rng.manual_seed(stream(trainer.config.seed, "training") + rollbacks)
    report.event(
        f"losses or weights were not finite at step {sick_step}: back to step {trainer.steps_done},"
        f" {'with fresh randomness' if rollbacks <= 3 else 'finishing from there'}",
        rollbacks=rollbacks,
    )
    return rollbacks <= 3


def train(trainer: Trainer, clock: Clock, report: Report, stop: Interrupts, out: Path) -> bool:
    """Train to progress 1 (returns True), or until this part's time is over or a signal came."""
    config, saved, looking = trainer.config, time.monotonic(), 0.0
    sheets = [s for s in SHEETS if s > clock.progress(trainer.steps_done)]
    on_cpu = trainer.device.type == "cpu"
    while (progress := clock.progress(trainer.steps_done)) < 1:
        if stop.stopped or clock.training_left() <= 0:
            return False
        trainer.step(progress)
        stop.armed = True
        averaging = trainer.steps_done % config.swa_every == 0
        if averaging:
            trainer.average(progress)
        due = time.monotonic() >= report.shown + 1  # reading the losses waits for the device
        saving = time.monotonic() >= saved + config.checkpoint_seconds
        asking = due or saving or (averaging and on_cpu)  # a GPU is waited for at log points alone
        if asking and not trainer.is_finite():
            if not roll_back(trainer, report, out):
                return True
            continue
        if due:
            report.progress(trainer, clock)
        if saving:
            keep_checkpoint(write_checkpoint(out, trainer, clock))
            saved = time.monotonic()
        if sheets and progress >= sheets[0]:
            sheets = [s for s in sheets if s > progress]
            if looking <= 0.05 * clock.used():  # on a slow device some sheets are left out
                begin = time.monotonic()
                look(trainer, clock, report, out)
                looking += time.monotonic() - begin
    return True


def train_within_budget(
    trainer: Trainer, clock: Clock, report: Report, stop: Interrupts, out: Path
) -> None:
    """Reserve the time to finish, train, and save. Raises `UserError` for too small a budget."""
    begin = time.monotonic()
    checkpoint = write_checkpoint(out, trainer, clock)
    saving = time.monotonic() - begin
    finishing = measure_finish(trainer)
    least = 1.25 * finishing + 2 * saving + 3
    left = clock.training_left()  # all of it: there is no reserve yet
    # Other programs may slow the end down: more is reserved, if training keeps a fifth of the time.
    clock.reserve = max(least, min(1.8 * finishing + 3 * saving + 3, 0.8 * left))
    if left <= least:
        checkpoint.unlink()
        part = clock.part_deadline < clock.deadline
        used = time.monotonic() - clock.started if part else clock.used()
        minutes = math.ceil((used + 1.3 * least) / 6) / 10
        remedy = f"--part-hours {minutes / 60 + 0.0005:.3f}" if part else f"--minutes {minutes}"
        raise UserError(
            f"the budget cannot hold the sampling of {trainer.config.images} images on this device:"
            f" give {remedy} or more, or fewer --images; or --sample-only after an earlier run."
        )
    keep_checkpoint(checkpoint)  # so that there is one to roll back to
    trainer.capture()
    report.start(trainer)
    done = train(trainer, clock, report, stop, out)
    if not trainer.is_finite():
        roll_back(trainer, report, out)
    report.progress(trainer, clock, last=True)
    keep_checkpoint(write_checkpoint(out, trainer, clock, done, finishing))


def finish(trainer: Trainer, report: Report, out: Path) -> None:
    """Average, re-estimate, and write `generator.pt`, the last sheet, the animation and the zip."""
    config, choice, steps = trainer.config, trainer.submitted(), trainer.steps_done
    G = trainer.averaged_generator(choice, NORM_BATCHES)
    state = {"format": 1, "config": asdict(config), "weights": choice, "steps_done": steps}
    state |= {"shape": G.shape, "breeds": trainer.dogs.breeds}
    weights = {k: v.cpu() for k, v in G.state_dict().items()}
    save(out / "generator.pt", state | {"state_dict": weights})
    save_picture(sheet_path(out, steps), [draw_sheet(sample_sheet(G, config.seed))])
    sheets = sorted((out / "samples").glob("*.png"))
    save_picture(out / "progress.webp", [Image.open(sheet) for sheet in sheets])
    submit(G, config, out)
    hours = p100_hours(config, steps)
    report.event(
        f"{out / 'images.zip'}: {config.images} dogs of the {WEIGHTS[choice]}, step {steps},"
        f" {steps * config.batch_size:,} images seen, P100-hours: {hours:.2f}",
        step=steps,
        submitted=choice,
        p100_hours=hours,
    )


def submit(G: Generator, config: Config, out: Path, breed: int | None = None) -> None:
    """Draw `config.images` dogs, of one breed or as often as each occurs, into `images.zip`."""
    latents, breeds = draw_inputs(G, config, config.images)
    if breed is not None:
        breeds = torch.full_like(breeds, breed)
    write_submission(out / "images.zip", sample_images(G, latents, breeds))


def find_breed(name: str, breeds: Sequence[str], conditioned: bool) -> int | None:
    """The index of the one breed that is called `name`, as in Pug; None for no name."""
    if not name:
        return None
    if not conditioned:
        raise UserError(
            "--breed: this generator was not told breeds; train with --condition breed."
        )
    plain = name.casefold().replace(" ", "_")
    found = [k for k, b in enumerate(breeds) if plain in (b.casefold(), spoken(b).casefold())]
    if len(found) != 1:
        raise UserError(f"--breed {name} is none of {', '.join(map(spoken, breeds))}.")
    return found[0]


def spoken(breed: str) -> str:
    """n02085620-Chihuahua without its number."""
    return breed.partition("-")[2] or breed


def announce(report: Report, trainer: Trainer, where: str, state: dict[str, object] | None) -> None:
    """Say and log what goes in: the device, the dogs, what was left out, where it resumes."""
    dogs = trainer.dogs
    report.event(
        device=describe_device(trainer.device),
        precision=trainer.precision,
        config=asdict(trainer.config),
        flops=flops_per_image(trainer.config),
    )
    left_out = count_reasons(dogs.skipped) or "nothing"
    report.event(
        f"{len(dogs.first)} dogs of {len(dogs.breeds)} breeds in {where}; left out: {left_out}",
        skipped=dogs.skipped,
    )
    if state:
        report.event(f"resumed at step {trainer.steps_done}", resumed_at_step=trainer.steps_done)
        if (state["torch"], state["threads"]) != (torch.__version__, torch.get_num_threads()):
            report.event("under another torch or thread count: not bit-equal to an unbroken run")


def run(options: Options, started: float, stop: Interrupts) -> int:
    """Find, crop, train, submit. Returns the exit code."""
    config, out = options.config, Path(options.config.out)
    device = choose_device(config.device)
    torch.backends.cudnn.benchmark = True  # shapes never change: let cuDNN choose by measurement
    print(f"{describe_device(device)}, {choose_precision(config.precision, device)}", flush=True)
    if options.dry_run:
        return show_plan(config, device)
    out.mkdir(parents=True, exist_ok=True)
    if options.sample_only or options.breed:
        return sample_only(options, device)
    found = find_dogs(config.data)
    anew = options.fresh and not options.resume
    state = None if anew else find_checkpoint(options, "trainer")
    if state:
        try:
            refuse_other_recipe(config, state["config"], state["config"])
        except UserError:
            if state["trainer"]["steps_done"]:
                raise
            state = None  # nothing was learnt yet that another recipe could spoil
    dogs = prepare_crops(found, config.crops)
    if state and state["trainer"]["data_key"] != dogs.key:
        raise UserError("the checkpoint was made from other dogs: give its --data, or --fresh.")
    trainer = Trainer(config, dogs, device)
    clock = Clock(config, started, state["seconds_used"] if state else 0.0)
    if state:
        trainer.load_state_dict(state["trainer"])
    else:  # nothing of an earlier run is mixed with this one's
        for old in (out / "log.jsonl", *(out / "samples").glob("step_*.png")):
            old.unlink(missing_ok=True)
    save_picture(out / "samples" / "real.png", [draw_sheet(real_images(dogs, config.seed))])
    report = Report(out)
    try:
        announce(report, trainer, found.where, state)
        with whole_file(out / "config.json") as part:
            part.write_text(json.dumps(asdict(config), indent=2))
        if not (state and state["finished"]) or asks_for_more(config, state["config"]):
            train_within_budget(trainer, clock, report, stop, out)
        finish(trainer, report, out)
    finally:
        report.bar.close()
    return 130 if stop.stopped else 0


def asks_for_more(config: Config, saved: dict[str, object]) -> bool:
    """Whether a finished run is to go on: more steps, or more hours (0 = no limit)."""
    hours, before = config.hours or math.inf, saved["hours"] or math.inf
    return config.steps > saved["steps"] or hours > before


SAMPLING = {"seed", "images", "average", "truncation"}  # fields that --sample-only may change


def sample_only(options: Options, device: torch.device) -> int:
    """Write `images.zip` from a checkpoint or from `generator.pt`."""
    out, state = Path(options.config.out), find_checkpoint(options, "trainer", "state_dict")
    if state is None:
        raise UserError(f"{out} holds no checkpoint.pt and no generator.pt: give another --out.")
    refuse_other_recipe(options.config, state["config"], options.named - SAMPLING)
    free = {n: getattr(options.config, n) for n in options.named & SAMPLING}
    saved = Config(**state["config"])
    config = replace(saved, **free, out=str(out))
    trained = state.get("trainer", state)  # both know the breeds
    G, _ = build_networks(saved, device, len(trained["breeds"]))
    if "trainer" in state:
        tensors = trained["tensors"]
        G.load_state_dict({n[2:]: t for n, t in tensors.items() if n.startswith("G.")})
        choice = weights_to_submit(config.average, trained["swa_count"], trained["averages_done"])
        weights = list(G.parameters())
        if choice != "none":
            weights = [tensors[f"{choice}.{i}"] for i in range(len(weights))]
        recipe = replace(saved, truncation=config.truncation)
        G = averaged_generator(G, weights, NORM_BATCHES, recipe)
    else:
        choice = state["weights"]
        G.load_state_dict(state["state_dict"])
        G.eval()
    breed = find_breed(options.breed, trained["breeds"], G.breeds > 0)
    submit(G, config, out, breed)
    print(f"{out / 'images.zip'}: {config.images} dogs of the {WEIGHTS[choice]}")
    return 0


def show_plan(config: Config, device: torch.device) -> int:
    """`--dry-run`: print what would be done, at what cost, and train nothing that is kept."""
    found = find_dogs(config.data)
    breeds = len({photo.breed for photo in found.photos})
    print(f"{len(found.photos)} photos of {breeds} breeds in {found.where}")
    print(json.dumps(asdict(config), indent=2))
    trainer = Trainer(config, random_crops(256, breeds), device)
    for name, network in (("G", trainer.G), ("D", trainer.D)):
        print(f"{name}: {sum(p.numel() for p in network.parameters()):,} parameters")
    flops = flops_per_image(config)
    print(", ".join(f"{name} {n / 1e9:.3f}" for name, n in flops.items()), end="")
    print(f": {sum(flops.values()) / 1e9:.3f} GFLOP per image-step")
    reserve = measure_finish(trainer)
    trainer.capture()
    seconds = time_steps(trainer, 2)
    steps = config.steps
    if config.hours:
        steps = min(steps, max(0, int((3600 * config.hours - reserve) / seconds)))
    print(f"{seconds * 1000:.1f} ms per step here: {steps} steps in the budget,", end=" ")
    print(f"{reserve:.0f} s of it to finish")
    print(f"P100-hours: {p100_hours(config, config.steps):.2f}")
    return 0


def random_crops(count: int, breeds: int = 120) -> CropSet:
    """Noise in the place of dogs of so many breeds, for measuring time and memory."""
    return CropSet(
        crops=torch.randint(256, (count, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=torch.uint8),
        first=torch.arange(count)[:, None],
        count=torch.ones((count, 1), dtype=torch.int64),
        weights=torch.ones(1),
        breed=torch.arange(count) % breeds,
        breeds=["noise"] * breeds,
        skipped=[],
        key="noise",
    )


def time_steps(trainer: Trainer, steps: int) -> float:
    """Seconds per step, after one that is not counted."""
    for count in (1, steps):
        begin = time.monotonic()
        for _ in range(count):
            trainer.step(0.0)
        trainer.is_finite()  # waits for the device
    return (time.monotonic() - begin) / steps


def batch_that_fits(config: Config, device: torch.device) -> int:
    """The largest halving of the batch size of which one step fits into the GPU's memory."""
    batch = config.batch_size // 2
    while batch > 2:
        torch.cuda.empty_cache()
        try:
            time_steps(Trainer(replace(config, batch_size=batch), random_crops(16), device), 1)
            return batch
        except torch.cuda.OutOfMemoryError:
            batch //= 2
    return batch


# ----------------------------------------------------------------------------------------- 15. Main


def main(argv: Sequence[str] = (), started: float | None = None) -> int:
    """Run with the options of `argv`; returns the exit code, 0, 2 or 130, and never exits.

    `started`: the `time.monotonic()` from which the budget counts; None = now.
    """
    started = time.monotonic() if started is None else started
    options = None
    try:
        with interrupts() as stop:
            options = parse(argv)
            return run(options, started, stop)
    except SystemExit as done:  # argparse's --help
        return int(done.code or 0)
    except KeyboardInterrupt:
        print("train_dogs: interrupted; every file that is there is whole.", file=sys.stderr)
        return 130
    except UserError as error:
        message = str(error)
    except torch.cuda.OutOfMemoryError:
        message = ""  # the attempt below must not keep the failed one alive
    except OSError as error:
        if error.errno is None:  # a library's, not the system's
            raise
        message = (
            f"{error.strerror} ({error.filename or options.config.out}): make room or give another"
            " --out, then start the same command again; every file that is there is whole."
        )
    if not message:
        fitting = batch_that_fits(options.config, choose_device(options.config.device))
        message = f"the GPU's memory is too small for this: --batch-size {fitting} fits."
    print(f"train_dogs: {message}", file=sys.stderr)
    return 2


def process_age() -> float:
    """Seconds since this process began, where the system tells; else its CPU time so far."""
    try:
        fields_after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        began = int(fields_after_name[19]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - began)
    except (OSError, AttributeError, ValueError, IndexError):
        return time.process_time()


if __name__ == "__main__":
    if in_notebook():  # its sys.argv is its kernel's, and it must not exit
        main()
    else:
        sys.exit(main(sys.argv[1:], time.monotonic() - process_age()))
