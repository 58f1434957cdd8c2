"""Train a DCGAN on Stanford Dogs within a time budget and write `images.zip`: 10,000 new dogs.

    python train_dogs.py --data PATH/TO/stanford-dogs     # the recipe, or 8.5 hours of it
    python train_dogs.py --preset small --data THE/SAME   # on a CPU

One file does what Kaggle's *Generative Dog Images* (2019) asked for: it crops the dogs to their
boxes, trains a DCGAN with split batch norm, a margin loss and an averaged generator, and writes
64 x 64 PNGs. It runs on a CUDA GPU of compute capability 6.0 or newer or on a CPU; as a script, as
a Kaggle kernel, or pasted into one notebook cell (with options: `main(["--minutes", "30"])`).

Measured: `--preset small` reaches a FID of 69.7 after 2.56 million images (n = 1, 10,000 images
against 18,163 photos, torch 2.14.1, bf16). The default recipe costs 8.49 P100-hours by
counted FLOPs; its score has not been measured yet.

Sections 1 to 5 are the whole idea: configuration, networks, losses, one training step, averages.
Section 6 holds the parts of other recipes, each of which registers itself. Sections 7 to 14 are
what a run needs: data, device, state, images, the run, the command line.
"""

from __future__ import annotations

import time

STARTED = time.monotonic()  # before torch, whose import takes seconds of the budget

import argparse
import copy
import errno
import gc
import gzip
import hashlib
import io
import json
import lzma
import math
import os
import pickle
import re
import signal
import struct
import sys
import tarfile
import threading
import warnings
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import Field, asdict, dataclass, field, fields, replace
from functools import cache, partial
from itertools import chain, pairwise
from pathlib import Path
from typing import IO, NamedTuple, TextIO, TypeVar
from xml.etree import ElementTree

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from tqdm.auto import tqdm

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder are not detected there
    fcntl = None

IMAGE_SIZE = 64
SAMPLE_BATCH = 128  # latents per forward when sampling; fixed, so that an image never depends on N
P100_FLOPS = 7.4e12  # sustained FLOP/s of a P100 on a DCGAN: the unit of "P100-hours"


# --------------------------------------------------------------------------------- 1. Configuration


class UserError(Exception):
    """What the user or the machine must change: one sentence with the remedy; exit code 2."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One choice of an option, in a registry. `--help` and errors are made of such rows."""

    text: str  # for --help
    without: tuple[str, ...] = ()  # fields that must be at their default, or "field=value"
    needs: tuple[str, ...] = ()  # fields that must not be 0


def option(
    default: object,
    group: str,
    text: str,
    range: tuple[float, float] = (-math.inf, math.inf),
    choices: Callable[[], dict[str, Row] | tuple[str, ...]] = tuple,
    fixed: bool = True,
) -> object:
    """A field of `Config` and everything the command line says about it.

    `range`: smallest and largest value. `choices`: the allowed values, or a registry whose rows
    explain them. `fixed`: a resumed run must keep the value.
    """
    known = {"group": group, "help": text, "range": range, "choices": choices, "fixed": fixed}
    return field(default=default, metadata=known)


free = partial(option, fixed=False)


# fmt: off
@dataclass(frozen=True)
class Config:
    """The only source of options: each field is a flag, and is kept in checkpoint and log."""

    data: tuple[str, ...] = free((), "files", "folder, zip or tar of dogs; repeatable")
    out: str = free("", "files", "folder for results (/kaggle/working or output)")

    crops: str = option("square", "data",
        "box, square, head, context or whole; several with weights, as in square:3,context:1")
    dedupe: float = option(0.0, "data",
        "drop a dog whose thumbnail's cosine similarity to an earlier one is above this; 0 = off",
        (0, 1))
    mirror: float = option(0.5, "data", "probability of mirroring a photo", (0, 1))
    noise: float = option(0.0, "data", "uniform noise from 0 to this is added to reals", (0, 1))
    augment: str = option("", "data",
        "differentiable augmentations of reals and fakes, as in color,translation,cutout")

    architecture: str = option("deep", "networks", "both networks", choices=lambda: ARCHITECTURES)
    latents: str = option("normal", "networks", "distribution of a latent's numbers",
        choices=lambda: LATENTS)
    latent_dim: int = option(256, "networks", "numbers in a latent z", (1, 4096))
    width: int = option(48, "networks", "base channels, which each layer multiplies", (1, 1024))
    d_width: int = option(0, "networks", "base channels of D; 0 = width", (0, 1024))
    init_std: float = option(0.0, "networks",
        "standard deviation of normal initial weights; 0 = PyTorch's initialisation", (0, 1))
    condition: str = option("none", "networks", "use of breed labels", choices=lambda: CONDITIONS)
    g_norm: str = option("batch", "networks", "G's batch norm", choices=lambda: G_NORMS)
    minibatch_features: int = option(0, "networks",
        "kernels of minibatch discrimination in D; 0 = off", (0, 1024))

    loss: str = option("margin", "loss", "adversarial loss", choices=lambda: LOSSES)
    margin: float = option(0.8, "loss",
        "probability of being real above which a real has loss 0; 1 = never", (0.01, 1))
    smoothing: float = option(0.0, "loss",
        "one-sided label smoothing: the label of reals is 1 - this", (0, 0.5))
    classify: float = option(0.0, "loss", "weight of the breed classification loss", (0, 10))
    labelled: float = option(1.0, "loss", "share of the dogs whose breed D learns from", (0, 1))
    history: float = option(0.0, "loss",
        "weight of historical averaging: squared distance of the weights to their mean", (0, 1000))
    r1: float = option(0.0, "loss", "gamma of the R1 gradient penalty on reals", (0, 1000))

    batch_size: int = option(32, "optimisation", "reals (and fakes) per step", (2, 65536))
    g_lr: float = option(5e-4, "optimisation", "Adam's learning rate for G", (0, 1))
    d_lr: float = option(5e-4, "optimisation", "Adam's learning rate for D", (0, 1))
    beta1: float = option(0.3, "optimisation", "Adam's beta1", (0, 0.9999))
    beta2: float = option(0.999, "optimisation", "Adam's beta2", (0, 0.999999))
    lr_decay_start: float = option(1.0, "optimisation",
        "progress (0 to 1) from which learning rates fall linearly to 0", (0, 1))

    average: str = free("swa", "averaging", "weights of the submitted G; none = the last step's",
        choices=lambda: tuple(WEIGHTS))
    average_every: int = option(20, "averaging",
        "steps between updates of the averages", (1, 10**9))
    swa_start: float = option(0.5, "averaging", "progress (0 to 1) at which SWA begins", (0, 1))
    ema_beta: float = option(0.9995, "averaging", "decay of the EMA per step", (0, 0.9999999))
    ema_schedule: str = option("constant", "averaging",
        "schedule of --ema-beta; stepped: 0.9, 0.99, 0.999, 0.9999 instead",
        choices=lambda: ("constant", "stepped"))
    truncation: float = free(0.0, "averaging",
        "sample latents from a normal truncated to +- this; 0 = off", (0, 100))

    steps: int = free(397_000, "length",
        "steps of the whole recipe; given without --hours, there is no time limit", (1, 10**9))
    hours: float = free(8.5, "length",
        "wall-clock budget of all parts, zip included; inf = no limit", (0, math.inf))
    part_hours: float = free(math.inf, "length",
        "stop after this many hours; the same command resumes", (0, math.inf))

    seed: int = option(0, "run", "seed of all randomness", (0, 2**32 - 1))
    device: str = free("auto", "run", "auto, cpu, cuda or cuda:N")
    precision: str = free("auto", "run", "number format in training",
        choices=lambda: ("auto", *PRECISIONS))
    images: int = free(10_000, "run", "images in the zip", (1, 99_999))
# fmt: on


# fmt: off
PRESETS: dict[str, dict[str, object]] = {  # the fields that differ from the defaults
    # Ours: the networks, loss and rates of the notebook below.
    "dogs": {},
    # The notebook "1st public, 16th private" (Morxrc/kaggle_generate-dogs), its four crops alike.
    # Left out on purpose: a margin for G too, rotation that leaves black corners, samples drawn in
    # training mode, and D's norms over two halves of 16 fakes in G's update.
    "first-public": {
        "crops": "head:2,square:1,context:1", "smoothing": 0.05, "average": "ema",
        "average_every": 1, "ema_schedule": "stepped",
    },
    # Radford et al. 2015 (arXiv 1511.06434). Differs: no weight decay; split norm.
    "dcgan": {
        "architecture": "paper5", "latents": "uniform", "latent_dim": 100, "width": 128,
        "init_std": 0.02, "mirror": 0.0, "margin": 1.0, "batch_size": 128, "g_lr": 2e-4,
        "d_lr": 2e-4, "beta1": 0.5, "average": "none", "steps": 126_000,
    },
    # The competition's second place by its slides: RaLS-BigGAN with an auxiliary classifier.
    "second-private": {
        "architecture": "residual", "latent_dim": 100, "width": 64, "condition": "breed",
        "noise": 1 / 128, "loss": "rals", "classify": 0.1, "batch_size": 64, "g_lr": 2e-4,
        "d_lr": 8e-4, "beta1": 0.0, "average": "ema", "average_every": 1, "ema_beta": 0.999,
        "truncation": 2.0, "steps": 50_000,
    },
    # Salimans et al. 2016 (arXiv 1606.03498) as their code trains on ImageNet. Differs: 64 x 64
    # instead of 128; twice as wide; kernels of 4; no noise in D; split batch norm in D; minibatch
    # kernels as for CIFAR-10 (theirs: 300 of 50 numbers); G's target is 1, theirs 0.375.
    "improved": {
        "architecture": "paper", "latent_dim": 100, "width": 128, "init_std": 0.02,
        "condition": "classes", "g_norm": "virtual", "minibatch_features": 100, "margin": 1.0,
        "smoothing": 0.25, "classify": 1.0, "batch_size": 64, "g_lr": 4e-4, "d_lr": 4e-4,
        "beta1": 0.5, "average": "none", "steps": 308_000,
    },
    # Real dogs in two to three hours of one CPU core.
    "small": {
        "architecture": "paper", "latent_dim": 64, "width": 24, "condition": "classes",
        "classify": 1.0, "augment": "translation", "batch_size": 16, "g_lr": 3e-4, "d_lr": 3e-4,
        "beta1": 0.5, "lr_decay_start": 0.3, "average": "ema", "average_every": 10,
        "ema_beta": 0.998, "steps": 160_000,
    },
    # The drawn dogs of data/sample in three minutes of two CPU cores.
    "sample": {
        "architecture": "paper", "latent_dim": 64, "width": 16, "augment": "translation",
        "batch_size": 16, "beta1": 0.5, "lr_decay_start": 0.6, "average": "ema",
        "average_every": 10, "ema_beta": 0.998, "steps": 8_000, "images": 1_000,
    },
    # Pictures in MNIST's format on a CPU: few filters, and G learns four times as fast as D.
    "mnist": {
        "architecture": "paper", "latent_dim": 64, "width": 4, "d_width": 8, "mirror": 0.0,
        "augment": "translation", "g_lr": 1e-3, "d_lr": 2.5e-4, "beta1": 0.5,
        "lr_decay_start": 0.6, "average": "ema", "average_every": 10, "ema_beta": 0.998,
        "steps": 40_000,
    },
}
# fmt: on


# ------------------------------------------------------------------------------------ 2. The DCGAN

# The interface of every pair: `G(z, labels)` and `D(images, num_real, labels) -> Verdict`. `labels`
# are int64 breeds, which unconditional networks ignore.


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm with the interface of G's norms, `(x, labels)`; `labels` are ignored."""

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """`x`: (N, num_features, H, W)."""
        return super().forward(x)


class SplitBatchNorm2d(nn.Module):
    """Batch norm that gives the reals and the fakes of one batch separate statistics, but one gain
    and bias.

    Equal to two forwards through an ordinary batch norm in training mode, in one forward of all
    other layers. It has no running statistics, as D is never evaluated. Separate statistics for a
    second distribution: Xie et al. 2020 (AdvProp, arXiv 1911.09665).
    """

    def __init__(self, num_features: int, float32: bool = False, eps: float = 1e-5) -> None:
        """`float32`: normalise in float32 in any precision. R1 needs it: its second derivative
        holds the inverse deviation to the third power, which overflows fp16."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.float32, self.eps = float32, eps

    def forward(self, x: Tensor, num_real: int) -> Tensor:
        """`x`: (N, num_features, H, W), the `num_real` reals first; 0 or N make one group."""
        x = at_least_float32(x) if self.float32 else x
        groups = [g for g in x.split([num_real, len(x) - num_real]) if len(g)]
        normed = [
            F.batch_norm(g, None, None, self.weight, self.bias, training=True, eps=self.eps)
            for g in groups
        ]
        return normed[0] if len(normed) == 1 else torch.cat(normed)


class NoNorm(nn.Module):
    """The identity, for D's layers without a norm."""

    def forward(self, x: Tensor, num_real: int) -> Tensor:
        """Returns `x`."""
        return x


# Each layer: (channels / width, kernel). "rgb": the kernel of G's last layer. D's first
# "plain" layers have no norm. G's first layer makes 4 x 4 places of the latent.
LAYERS = {
    "deep": {  # deeper and wider, as in the notebook of preset first-public
        "G": ((32, 4), (16, 4), (8, 4), (8, 3), (4, 4), (4, 3), (2, 4)), "rgb": 3,
        "D": ((2, 4), (4, 4), (4, 3), (8, 4), (8, 3), (16, 4)), "plain": 2,
    },
    "paper": {  # Radford et al. 2015, with kernels of 4, which leave no checkerboard
        "G": ((8, 4), (4, 4), (2, 4), (1, 4)), "rgb": 4,
        "D": ((1, 4), (2, 4), (4, 4), (8, 4)), "plain": 1,
    },
    "paper5": {  # the same with the paper's kernels of 5
        "G": ((8, 4), (4, 5), (2, 5), (1, 5)), "rgb": 5,
        "D": ((1, 5), (2, 5), (4, 5), (8, 5)), "plain": 1,
    },
}  # fmt: skip
GEOMETRY = {  # by kernel: 3 keeps the side; 4 and 5 double it in G and halve it in D
    3: {"stride": 1, "padding": 1},
    4: {"stride": 2, "padding": 1},
    5: {"stride": 2, "padding": 2},
}


def transposed_conv(inputs: int, outputs: int, kernel: int, bias: bool) -> nn.ConvTranspose2d:
    """A layer of G after the first."""
    extra = int(kernel == 5)  # else 4 x 4 becomes 7 x 7
    return nn.ConvTranspose2d(
        inputs, outputs, kernel, output_padding=extra, bias=bias, **GEOMETRY[kernel]
    )


class Generator(nn.Module):
    """DCGAN: transposed convolutions, batch norm, ReLU, and tanh at the end."""

    breeds = 0  # how many it is conditioned on

    def __init__(
        self,
        latent_dim: int = 256,
        width: int = 48,
        architecture: str = "deep",
        norm: Callable[[int], nn.Module] = BatchNorm2d,
    ) -> None:
        """`norm` makes the norm of a number of channels."""
        super().__init__()
        # What `make_generator` needs to make a G like this one.
        self.constructor = {
            "kind": "dcgan", "latent_dim": latent_dim, "width": width, "architecture": architecture,
        }  # fmt: skip
        self.latent_dim = latent_dim
        layers = [(units * width, kernel) for units, kernel in LAYERS[architecture]["G"]]
        channels, kernel = layers[0]  # 1 x 1 to 4 x 4
        self.convs = nn.ModuleList([nn.ConvTranspose2d(latent_dim, channels, kernel, bias=False)])
        for (inputs, _), (outputs, kernel) in pairwise(layers):
            self.convs.append(transposed_conv(inputs, outputs, kernel, bias=False))
        self.norms = nn.ModuleList(norm(channels) for channels, _ in layers)
        self.to_rgb = transposed_conv(layers[-1][0], 3, LAYERS[architecture]["rgb"], bias=True)

    @classmethod
    def of(cls, config: Config, breeds: int) -> Generator:
        """The one that `config` asks for, for a data set of `breeds` breeds."""
        return cls(config.latent_dim, config.width, config.architecture)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """(N, latent_dim) latents and int64 (N,) breeds, which only norms that are conditioned on
        them read, to float32 (N, 3, 64, 64) images in [-1, 1]."""
        x = z[:, :, None, None]
        for conv, norm in zip(self.convs, self.norms):
            x = F.relu(norm(conv(x), labels), inplace=True)
        return at_least_float32(self.to_rgb(x)).tanh()  # bf16 has no number from 0.996 to 1


class Verdict(NamedTuple):
    """D's outputs for n images."""

    logits: Tensor  # float32 (n,): above 0 means real
    features: Tensor  # (n, channels, 4, 4): last convolution before its norm; residual: last ReLU
    classes: Tensor  # float32 (n, K): logits of the breeds; K = 0 without a classifier

    def split(self, count: int) -> tuple[Verdict, Verdict]:
        """The first `count` images and the others."""
        return Verdict(*(t[:count] for t in self)), Verdict(*(t[count:] for t in self))


class Discriminator(nn.Module):
    """DCGAN: convolutions, split batch norm, leaky ReLU, and a linear layer; then its heads."""

    def __init__(
        self,
        width: int = 48,
        architecture: str = "deep",
        outputs: int = 1,
        heads: Sequence[Callable[[int, int], nn.Module]] = (),
        float32_norms: bool = False,
    ) -> None:
        """`outputs` of the linear layer: the logit, then any classes. `heads` (section 6): each
        makes, from (channels, outputs), a module that maps (verdict, x, num_real, labels) to a new
        verdict."""
        super().__init__()
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        channels = 3
        for k, (units, kernel) in enumerate(LAYERS[architecture]["D"]):
            conv = nn.Conv2d(channels, units * width, kernel, bias=False, **GEOMETRY[kernel])
            channels = units * width
            plain = k < LAYERS[architecture]["plain"]
            self.convs.append(conv)
            self.norms.append(NoNorm() if plain else SplitBatchNorm2d(channels, float32_norms))
        # No pooling before it: split norm gives reals and fakes equal channel means.
        self.linear = nn.Conv2d(channels, outputs, 4)
        self.heads = nn.ModuleList(make(channels, outputs) for make in heads)

    def forward(self, images: Tensor, num_real: int, labels: Tensor | None = None) -> Verdict:
        """(N, 3, 64, 64) images in [-1, 1], the `num_real` reals first, and int64 (N,) breeds."""
        x = images
        for conv, norm in zip(self.convs, self.norms):
            features = conv(x)
            x = F.leaky_relu(norm(features, num_real), 0.2, inplace=True)
        outputs = at_least_float32(self.linear(x).flatten(1))
        verdict = Verdict(outputs[:, 0], features, outputs[:, 1:])
        for head in self.heads:
            verdict = head(verdict, x, num_real, labels)
        return verdict


class Head(NamedTuple):
    """A row of `HEADS`: an addition to D's output."""

    wanted: Callable[[Config], bool]
    make: Callable[[Config, int], Callable[[int, int], nn.Module]]  # of the config and the breeds
    outputs: Callable[[int], int] = lambda breeds: 0  # more outputs of D's linear layer


HEADS: dict[str, Head] = {}  # section 6 fills these two
GENERATORS: dict[str, type[nn.Module]] = {"dcgan": Generator}  # by the kind in G's `constructor`


def dcgan(config: Config, breeds: int) -> tuple[nn.Module, nn.Module]:
    """G and D of the tables in `LAYERS`."""
    kind = CONDITIONS[config.condition].generator or G_NORMS[config.g_norm].generator
    G = GENERATORS[kind].of(config, breeds)
    heads = [head for head in HEADS.values() if head.wanted(config)]
    D = Discriminator(
        config.d_width or config.width,
        config.architecture,
        outputs=1 + sum(head.outputs(breeds) for head in heads),
        heads=[head.make(config, breeds) for head in heads],
        float32_norms=config.r1 > 0,
    )
    return G, D


@dataclass(frozen=True, kw_only=True)
class Architecture(Row):
    """A row of `ARCHITECTURES`: it makes G and D of a configuration and a number of breeds.

    D has the interface above. G has also: `latent_dim`; `breeds`, 0 if unconditional, else with a
    buffer `frequency` of their shares in the data; `constructor`, a dict of plain values from which
    `make_generator` makes it again; and, if its weights need it, `settle()` (see `estimate_norms`).
    """

    build: Callable[[Config, int], tuple[nn.Module, nn.Module]]


ARCHITECTURES = {
    "deep": Architecture(text="a deeper and wider DCGAN", build=dcgan),
    "paper": Architecture(text="the DCGAN of 2015 with kernels of 4", build=dcgan),
    "paper5": Architecture(text="the same with the original kernels of 5", build=dcgan),
}


@dataclass(frozen=True, kw_only=True)
class Variant(Row):
    """A row of `CONDITIONS` or `G_NORMS`: the kind of generator that a DCGAN then has."""

    generator: str = ""


CONDITIONS = {
    "none": Variant(text="unconditional", without=("classify", "labelled")),
}
G_NORMS = {
    "batch": Variant(text="by the statistics of the batch", generator="dcgan"),
}


def build_networks(
    config: Config, device: torch.device, breeds: int = 0
) -> tuple[nn.Module, nn.Module]:
    """G and D on `device`; their initial weights depend on `config.seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        G, D = ARCHITECTURES[config.architecture].build(config, breeds)
        if config.init_std:  # DCGAN's own: weights N(0, std), gains N(1, std)
            for module in (*G.modules(), *D.modules()):
                if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                    nn.init.normal_(module.weight, 0.0, config.init_std)
                elif "Norm2d" in type(module).__name__ and module.weight is not None:
                    nn.init.normal_(module.weight, 1.0, config.init_std)
    layout = memory_layout(device)
    return G.to(device, memory_format=layout), D.to(device, memory_format=layout)


def make_generator(constructor: dict[str, object]) -> nn.Module:
    """A new G from the `constructor` of another, as in `generator.pt`; its weights are random."""
    arguments = dict(constructor)
    return GENERATORS[arguments.pop("kind")](**arguments)


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision to float32; float32 and float64 unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# --------------------------------------------------------------------------------------- 3. Losses


class Seen(NamedTuple):
    """Everything that a loss may read of one update."""

    images: Tensor  # (N, 3, 64, 64): D's input, augmented, the reals first
    reals: Tensor  # (n, 3, 64, 64) before augmentation; n = 0 in G's update if its loss reads none
    fakes: Tensor  # (batch, 3, 64, 64) before augmentation
    real: Verdict
    fake: Verdict
    labels: Tensor  # int64 (batch,): breeds of the reals and, the same, of the fakes; UNKNOWN = -1
    config: Config
    scale: Tensor | float  # of the loss in fp16, for terms that take gradients themselves


def d_margin(seen: Seen) -> Tensor:
    """Logistic loss whose real part is exactly 0, with gradient 0, once sigmoid(logit) > margin.

    real: (1 - s) * max(0, softplus(-l) - softplus(-l_m)) + s * softplus(l), l_m = logit(margin)
    fake: softplus(l)

    The margin keeps D from over-fitting reals that it already knows. Below it the gradient is that
    of the logistic loss; the constant only makes the minimum 0. With smoothing s > 0 the second
    term still pushes reals past the margin down, so the two work against each other.
    """
    smoothing = seen.config.smoothing
    at_margin = -math.log(seen.config.margin)  # softplus(-logit(m)) = -log m
    real = (F.softplus(-seen.real.logits) - at_margin).relu().mean()
    if smoothing:
        real = (1 - smoothing) * real + smoothing * F.softplus(seen.real.logits).mean()
    return real + F.softplus(seen.fake.logits).mean()


def g_logistic(seen: Seen) -> Tensor:
    """The non-saturating loss softplus(-l) (Goodfellow et al. 2014); its gradient is never 0."""
    return F.softplus(-seen.fake.logits).mean()


def past_margin(seen: Seen) -> Tensor:
    """bool (n,): reals that D is certain of. Without a margin (1) those above probability 0.8."""
    margin = seen.config.margin if seen.config.margin < 1 else 0.8
    return seen.real.logits > math.log(margin / (1 - margin))


@dataclass(frozen=True, kw_only=True)
class Loss(Row):
    """A row of `LOSSES`: the adversarial losses of D and G, both of weight 1."""

    d: Callable[[Seen], Tensor]  # to a float32 scalar
    g: Callable[[Seen], Tensor]
    certain: Callable[[Seen], Tensor] = past_margin  # bool (n,): reals that D is certain of
    g_reads_reals: bool = False  # then D is shown the reals in G's update too


LOSSES = {
    "margin": Loss(text="logistic, but 0 for reals past --margin", d=d_margin, g=g_logistic),
}


class Term(NamedTuple):
    """A further part of a loss. Its weight is the field of `Config` with the name of its row."""

    loss: Callable[[Seen], Tensor]  # or a class with this interface, made of the network
    wanted: Callable[[Config], bool] = lambda config: True  # besides a weight above 0


D_TERMS: dict[str, Term] = {}  # section 6 fills both
G_TERMS: dict[str, Term] = {}


class Objective:
    """What one network minimises: the adversarial loss and its weighted terms."""

    def __init__(self, config: Config, network: nn.Module, letter: str) -> None:
        """`letter`: d or g."""
        row = LOSSES[config.loss]
        first, rows = {"d": (row.d, D_TERMS), "g": (row.g, G_TERMS)}[letter]
        chosen = {n: t for n, t in rows.items() if getattr(config, n) and t.wanted(config)}
        self.terms: dict[str, Callable[[Seen], Tensor]] = {f"{letter}_loss": first}
        self.weights = [1.0]
        for name, term in chosen.items():
            has_state = isinstance(term.loss, type)
            self.terms[f"{letter}_{name}"] = term.loss(network) if has_state else term.loss
            self.weights.append(getattr(config, name))

    def __call__(self, seen: Seen) -> tuple[Tensor, list[Tensor]]:
        """The weighted sum, and the value of each term without its weight."""
        values = [term(seen) for term in self.terms.values()]
        return sum(weight * value for weight, value in zip(self.weights, values)), values

    def tensors(self) -> dict[str, Tensor]:
        """The state of its terms, by name."""
        kept = {name: term for name, term in self.terms.items() if isinstance(term, nn.Module)}
        return {
            f"{name}.{k}": t for name, term in kept.items() for k, t in term.state_dict().items()
        }


# --------------------------------------------------------------------------- 4. One training step

AUGMENTS: dict[str, Callable[[Tensor, torch.Generator | None], Tensor]] = {}  # section 6 fills it


@dataclass(frozen=True, kw_only=True)
class Latents(Row):
    """A row of `LATENTS`: `draw(shape, generator=..., device=...)` as `torch.randn` draws."""

    draw: Callable[..., Tensor]


LATENTS = {"normal": Latents(text="standard normal", draw=torch.randn)}


class Batches:
    """Draws reals, their breeds and latents on the device; each dog at most once an epoch."""

    def __init__(self, crops: CropSet, config: Config, rng: torch.Generator | None) -> None:
        """`crops` and `rng` are on one device."""
        self.crops, self.config, self.rng = crops, config, rng
        self.breed = hide_labels(crops.breed, config)
        device = crops.pixels.device
        self.order = torch.arange(len(crops.first), device=device)
        self.cursor = torch.zeros((), dtype=torch.int64, device=device)
        self.steps_per_epoch = max(1, len(crops.first) // config.batch_size)

    def shuffle(self) -> None:
        """Begin an epoch."""
        device = self.order.device
        self.order.copy_(torch.randperm(len(self.order), generator=self.rng, device=device))
        self.cursor.zero_()

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """float32 (B, 3, 64, 64) reals in [-1, 1], int64 (B,) breeds, float32 (B, latent_dim) z."""
        config, device = self.config, self.order.device
        places = self.cursor + torch.arange(config.batch_size, device=device)
        rows = self.order[places % len(self.order)]
        self.cursor += config.batch_size
        reals = draw_reals(self.crops, rows, self.rng, config.mirror)
        if config.noise:  # Soenderby et al. 2017 (arXiv 1610.04490)
            reals = reals + config.noise * torch.rand(
                reals.shape, generator=self.rng, device=device
            )
        shape = (config.batch_size, config.latent_dim)
        z = LATENTS[config.latents].draw(shape, generator=self.rng, device=device)
        return reals, self.breed[rows], z


class Optimizer:
    """Fused Adam (Kingma and Ba 2015, arXiv 1412.6980) of one network, with its own loss scale.

    One scale for both networks would let a strong R1, which overflows in D alone, take G's scale
    down with it.
    """

    def __init__(self, network: nn.Module, lr: float, config: Config, scaled: bool) -> None:
        """`lr`: the full learning rate. `scaled`: with a loss scale, which only fp16 needs."""
        self.parameters, self.full_lr, self.scaled = list(network.parameters()), lr, scaled
        device = self.parameters[0].device
        # A tensor, which a captured step reads from memory; CUDA's kernel wants float32.
        dtype = torch.float64 if device.type == "cpu" else torch.float32
        self.lr = torch.tensor(lr, dtype=dtype, device=device)
        self.loss_scale = torch.full((), 65536.0, device=device)
        on_meta = device.type == "meta"  # has no fused Adam, and nothing to update
        betas = (config.beta1, config.beta2)
        self.adam = torch.optim.Adam(self.parameters, betas=betas, fused=not on_meta)
        self.adam.param_groups[0]["lr"] = self.lr
        for p in self.parameters:  # as Adam's first step would make it: a capture needs it before
            moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            self.adam.state[p] = {"step": torch.zeros((), device=device), **moments}

    @property
    def scale(self) -> Tensor | float:
        """The factor of the loss that keeps half-precision gradients above 0."""
        return self.loss_scale if self.scaled else 1.0

    def set_rate(self, share: float) -> None:
        """Use this share of the full learning rate from now on."""
        self.lr.fill_(self.full_lr * share)

    def minimise(self, loss: Tensor) -> None:
        """One step on `loss`; `autograd.grad` leaves the other network's weights alone.

        Fused Adam divides the scale out of the gradients. If they overflow, the step is skipped and
        the scale halved; else the scale grows, twofold in 2,000 calls.
        """
        gradients = torch.autograd.grad(
            loss * self.scale if self.scaled else loss,
            self.parameters,
            allow_unused=True,  # a head that no term reads
            materialize_grads=True,
        )
        for parameter, gradient in zip(self.parameters, gradients):
            parameter.grad = laid_out_like(gradient, parameter)
        if self.scaled:
            finite = torch.stack(torch._foreach_norm(gradients)).isfinite().all()
            self.adam.grad_scale, self.adam.found_inf = self.loss_scale, (~finite).float()
        if not self.lr.is_meta:
            self.adam.step()
        if self.scaled:  # no `where`: it would copy from the host
            self.loss_scale.mul_(0.5 + finite * (2 ** (1 / 2000) - 0.5))

    def tensors(self) -> dict[str, Tensor]:
        """What `minimise` changes besides the parameters, by name."""
        states = enumerate(self.adam.state.values())
        found = {f"{i}.{k}": v for i, state in states for k, v in state.items()}
        return found | {"loss_scale": self.loss_scale}


class Trainer:
    """G, D, their optimisers and averages, and one training step, on one device.

    `one_step` runs eagerly or captured as a CUDA graph (`capture`): nothing in it waits for the
    device, and everything that it changes is a tensor that keeps its address.
    """

    def __init__(self, config: Config, crops: CropSet, device: torch.device) -> None:
        """Raises `UserError` where `config` needs several breeds and `crops` has one."""
        if config.condition != "none" and len(crops.breeds) < 2:
            raise UserError(
                f"--condition {config.condition} needs several breeds, and these dogs have one:"
                " give --data with annotations or labels, or leave --condition out."
            )
        self.config, self.device, self.crops = config, device, crops.to(device)
        self.layout = memory_layout(device)
        self.precision = choose_precision(config.precision, device)
        if device.type != "meta":  # counting FLOPs must not change a run's setting
            torch.backends.cudnn.allow_tf32 = self.precision != "fp32"
            # NVIDIA's containers switch TF32 on, in which a shift by pixels is not exact.
            torch.set_float32_matmul_precision("highest")
        self.G, self.D = build_networks(config, device, len(crops.breeds))
        if self.G.breeds:
            breeds = torch.arange(self.G.breeds, device=device)
            self.G.frequency.copy_((self.crops.breed[:, None] == breeds).float().mean(0))
        self.d_objective = Objective(config, self.D, "d")
        self.g_objective = Objective(config, self.G, "g")
        fp16 = self.precision == "fp16"
        self.opt_d = Optimizer(self.D, config.d_lr, config, fp16)
        self.opt_g = Optimizer(self.G, config.g_lr, config, fp16)
        self.averages = Averages(self.G)
        self.rng = torch.Generator(device if device.type == "cuda" else "cpu")
        self.rng.manual_seed(config.seed)
        self.batches = Batches(self.crops, config, self.rng)
        self.augments = [AUGMENTS[name] for name in parse_augment(config.augment)]
        self.stats = (*self.d_objective.terms, *self.g_objective.terms, *D_OUTPUTS)
        self.sums = torch.zeros(len(self.stats), device=device)
        self.steps_done = self.rollbacks = self.summed = 0
        self._means = dict.fromkeys(self.stats, 0.0)
        self.update_networks: Callable[[], None] = self.one_step  # or a replay of it
        self._in_flight: deque[torch.cuda.Event] = deque()

    def step(self, progress: float) -> None:
        """One training step at `progress` (0 to 1) of the run; at most 4 steps are in flight."""
        if self.steps_done % self.batches.steps_per_epoch == 0:
            self.batches.shuffle()
        start = self.config.lr_decay_start
        for optimizer in (self.opt_d, self.opt_g):
            optimizer.set_rate(min(1.0, (1 - progress) / (1 - start)) if start < 1 else 1.0)
        self.update_networks()
        self.steps_done += 1
        self.summed += 1
        if self.steps_done % self.config.average_every == 0:
            self.averages.update(self.G, progress, self.config)
        if self.device.type == "cuda":
            self._in_flight.append(torch.cuda.Event())
            self._in_flight[-1].record()
            if len(self._in_flight) > 4:
                self._in_flight.popleft().synchronize()

    def one_step(self) -> None:
        """One update of D, then one of G. The registries decide what is trained, not this."""
        reals, labels, z = self.batches.draw()
        with self.autocast():
            fakes = self.G(z, labels)  # one forward serves both updates
            seen = self.judge(reals, fakes.detach(), labels, self.opt_d)
            d_loss, d_values = self.d_objective(seen)
        self.opt_d.minimise(d_loss)
        with self.autocast():  # a new context: the old one has cached D's weights
            shown = reals if LOSSES[self.config.loss].g_reads_reals else reals[:0]
            g_loss, g_values = self.g_objective(self.judge(shown, fakes, labels, self.opt_g))
        self.opt_g.minimise(g_loss)
        certain = LOSSES[self.config.loss].certain(seen).float().mean()
        outputs = [seen.real.logits.mean(), seen.fake.logits.mean(), certain]
        self.sums += torch.stack([*d_values, *g_values, *outputs]).detach()

    def judge(self, reals: Tensor, fakes: Tensor, labels: Tensor, optimizer: Optimizer) -> Seen:
        """Augment both and let D judge them in one forward; there may be no reals."""
        images = torch.cat([reals, fakes])
        with self.autocast(False):  # a shift by pixels is exact in float32 only
            for augment in self.augments:
                images = augment(images, self.rng)
        images = images.contiguous(memory_format=self.layout).requires_grad_()
        verdict = self.D(images, len(reals), torch.cat([labels[: len(reals)], labels]))
        real, fake = verdict.split(len(reals))
        return Seen(images, reals, fakes, real, fake, labels, self.config, optimizer.scale)

    def autocast(self, enabled: bool = True) -> torch.autocast:
        """The context in which the networks compute in this run's precision; else float32."""
        dtype = PRECISIONS[self.precision]
        return torch.autocast(
            "cuda" if self.device.type == "cuda" else "cpu",
            dtype, enabled=enabled and dtype is not None,
        )  # fmt: skip

    @torch.no_grad()
    def is_healthy(self) -> bool:
        """Whether all weights are finite and no loss scale fell below 1; waits for the device.

        A loss that is not finite makes weights so at once, except in fp16, which skips the update
        and halves the scale.
        """
        norms = torch._foreach_norm([*self.G.parameters(), *self.D.parameters()])
        scales = torch.stack([self.opt_g.loss_scale, self.opt_d.loss_scale])
        return bool(torch.stack(norms).isfinite().all() & (scales >= 1).all())

    def read_stats(self) -> dict[str, float]:
        """The means of `stats` over the steps since the last call; waits for the device."""
        if self.summed:
            self._means = dict(zip(self.stats, (self.sums / self.summed).tolist()))
            self.sums.zero_()
            self.summed = 0
        return self._means


D_OUTPUTS = ("d_real", "d_fake", "past_margin")  # D's mean logits; the share of certain reals


# -------------------------------------------------------------------------------------- 5. Averages


class Averages:
    """The EMA and, from `swa_start` on, the equal-weight SWA of G's parameters.

    SWA: Izmailov et al. 2018 (arXiv 1803.05407). For the G of a GAN: Yazici et al. 2019 (arXiv
    1806.04498).
    """

    def __init__(self, G: nn.Module) -> None:
        self.ema = [p.detach().clone() for p in G.parameters()]
        self.swa = [p.detach().clone() for p in G.parameters()]
        self.ema_updates = self.swa_updates = 0

    @torch.no_grad()
    def update(self, G: nn.Module, progress: float, config: Config) -> None:
        """Add G's weights, `average_every` steps after the last time."""
        weights = list(G.parameters())
        self.ema_updates += 1
        # Early on the mean of about the last tenth of the updates: no trace of the initial weights.
        warm = (1 + self.ema_updates) / (10 + self.ema_updates)
        beta = stepped_beta(progress) if config.ema_schedule == "stepped" else config.ema_beta
        torch._foreach_lerp_(self.ema, weights, 1 - min(beta**config.average_every, warm))
        if progress >= config.swa_start:
            self.swa_updates += 1
            torch._foreach_lerp_(self.swa, weights, 1 / self.swa_updates)

    def choose(self, average: str) -> str:
        """Which weights make the submission: `average`, but the EMA while SWA has fewer than ten
        snapshots, and the raw weights while the EMA has none."""
        if average == "swa" and self.swa_updates < 10:
            average = "ema"
        return "none" if average == "ema" and self.ema_updates == 0 else average

    @torch.no_grad()
    def generator(
        self,
        like: nn.Module,
        choice: str,
        batches: int,
        config: Config,
        deadline: float = math.inf,
    ) -> nn.Module:
        """A copy of G with the weights of `choice`, and its norms by `estimate_norms`."""
        G = copy.deepcopy(like)
        weights = {"swa": self.swa, "ema": self.ema, "none": list(like.parameters())}[choice]
        for target, source in zip(G.parameters(), weights, strict=True):
            target.copy_(source)
        return estimate_norms(G, batches, config, deadline)


WEIGHTS = {"swa": "SWA generator", "ema": "EMA generator", "none": "raw generator"}


def stepped_beta(progress: float) -> float:
    """An EMA's decay that rises at epochs 200, 300 and 400 of 620, as in preset first-public."""
    return 1 - 0.1 ** (1 + sum(progress >= epoch / 620 for epoch in (200, 300, 400)))


def estimate_norms(
    G: nn.Module, batches: int, config: Config, deadline: float = math.inf
) -> nn.Module:
    """Estimate G's batch-norm statistics over `batches` x 128 latents, or fewer where that would
    take longer than to `deadline` (a `time.monotonic()`); returns it in eval mode.

    Averaged weights have no statistics of their own, and those of any single G are wrong for them
    (Izmailov et al. 2018, section 3.2). Cumulative means, as in PreciseBN (arXiv 2105.07576).
    """
    device = next(G.parameters()).device
    norms = [module for module in G.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative mean
    G.train()
    if hasattr(G, "settle"):
        G.settle()
    if norms:
        latents = draw_latents(batches * SAMPLE_BATCH, config, "norms")
        labels = draw_labels(G, len(latents), config.seed)
        with full_precision(), torch.no_grad():
            pairs = in_batches(latents, labels)
            for z, label in in_time(pairs, batches, deadline, allow_fewer=True):
                G(z.to(device), label.to(device))
    return G.eval()


# -------------------------------------------------------------------------------------- 6. Recipes

# Each recipe can be read alone: its formula and source, then the rows that register it.


# ---- Augmentation: differentiable, of reals and fakes in both updates, drawn anew for each image
# (Zhao et al. 2020, DiffAugment, arXiv 2006.10738). float32 (N, 3, 64, 64) to the same shape.
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
    """A shift by up to 8 pixels along each axis, reflected at the border: no black bars to learn.

    Two products with shift matrices: exact, and with a reproducible gradient, where that of an
    indexed copy is summed in any order.
    """
    side = x.shape[-1]
    reach = side // 8
    random = torch.rand((2, len(x), 1), generator=generator, device=x.device)
    shift = (random * (2 * reach + 1)).long() - reach
    pixel = torch.arange(side, device=x.device)
    source = (pixel + shift).abs()
    source = side - 1 - (side - 1 - source).abs()
    rows, columns = (source[..., None] == pixel).to(x.dtype)[:, :, None]  # each (N, 1, 64, 64)
    return rows @ x @ columns.mT


def augment_cutout(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """A grey square of half the side, centred anywhere."""
    side = x.shape[-1]
    random = torch.rand((2, len(x), 1), generator=generator, device=x.device)
    centre = (random * (side + 1)).floor()
    pixel = torch.arange(side, device=x.device)
    rows, columns = (pixel >= centre - side // 4) & (pixel < centre + side // 4)
    return x.masked_fill(rows[:, None, :, None] & columns[:, None, None, :], 0.0)


AUGMENTS |= {"color": augment_color, "translation": augment_translation, "cutout": augment_cutout}


def parse_augment(text: str) -> tuple[str, ...]:
    """`"color,cutout"` to `("color", "cutout")`, `""` to `()`. Raises `UserError`."""
    names = tuple(name.strip() for name in text.split(",") if text)
    if not set(names) <= set(AUGMENTS) or len(set(names)) < len(names):
        raise UserError(f"--augment {text}: give some of {', '.join(AUGMENTS)}, once each.")
    return names


# ---- The latents of Radford et al. 2015.
LATENTS["uniform"] = Latents(
    text="from -1 to 1",
    draw=lambda *shape, **how: 2 * torch.rand(*shape, **how) - 1,
    without=("truncation",),
)


# ---- Minibatch discrimination: Salimans et al. 2016 (Improved Techniques for Training GANs, arXiv
# 1606.03498), section 3.2.
class MinibatchDiscrimination(nn.Module):
    """Lets D see how similar each image's features are to those of its batch.

    o(x_i)_b = sum over j of exp(-|M_i,b - M_j,b|_1), M = T f(x), with i among the j; reals and
    fakes separately, like split batch norm. Five numbers per kernel b, and f averaged over the map,
    as in the authors' network for CIFAR-10.
    """

    def __init__(self, channels: int, outputs: int, kernels: int) -> None:
        super().__init__()
        self.project = nn.Linear(channels, kernels * 5, bias=False)
        self.weight = nn.Parameter(torch.zeros(outputs, kernels))  # from o to D's outputs

    def forward(self, verdict: Verdict, x: Tensor, num_real: int, labels: Tensor) -> Verdict:
        """`x`: (N, channels, 4, 4), D's last activations."""
        m = at_least_float32(self.project(x.mean((2, 3)))).unflatten(1, (-1, 5))
        groups = m.split([num_real, len(m) - num_real])
        # leaky_relu(x, -1) is |x|. `cdist` has no second derivative, which R1 needs, and that of
        # `abs` is a zero tensor without memory, which torch adds up on another device.
        o = [(-F.leaky_relu(g[:, None] - g, -1.0).sum(3)).exp().sum(1) for g in groups]
        # Elementwise, in float32: autocast would round a product of matrices.
        added = (torch.cat(o)[:, None] * self.weight).sum(2)
        logits, classes = verdict.logits + added[:, 0], verdict.classes + added[:, 1:]
        return verdict._replace(logits=logits, classes=classes)


HEADS["minibatch"] = Head(  # the first, as the others make logits of the outputs that it adds to
    wanted=lambda config: config.minibatch_features > 0,
    make=lambda config, breeds: partial(MinibatchDiscrimination, kernels=config.minibatch_features),
)


# ---- Breeds: class-conditional batch norm in G; a projection and, with --classify, a classifier in
# D, which trains both networks (AC-GAN, Odena et al. 2017, arXiv 1610.09585).
class BreedBatchNorm2d(nn.Module):
    """Batch norm with a gain and a bias per breed (Dumoulin et al. 2017, arXiv 1610.07629)."""

    def __init__(self, num_features: int, breeds: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(num_features, affine=False)
        self.weight = nn.Parameter(torch.ones(breeds, num_features))
        self.bias = nn.Parameter(torch.zeros(breeds, num_features))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """`x`: (N, num_features, H, W), `labels`: int64 (N,)."""
        weight, bias = (F.embedding(labels, p)[:, :, None, None] for p in (self.weight, self.bias))
        return torch.addcmul(bias, self.norm(x), weight).to(x.dtype)


class BreedGenerator(Generator):
    """A DCGAN's G that draws a dog of a given breed."""

    def __init__(self, latent_dim: int, width: int, architecture: str, breeds: int) -> None:
        super().__init__(latent_dim, width, architecture, partial(BreedBatchNorm2d, breeds=breeds))
        self.constructor |= {"kind": "breed", "breeds": breeds}
        self.breeds = breeds
        self.register_buffer("frequency", torch.full((breeds,), 1 / breeds))

    @classmethod
    def of(cls, config: Config, breeds: int) -> BreedGenerator:
        """The one that `config` asks for."""
        return cls(config.latent_dim, config.width, config.architecture, breeds)


class Projection(nn.Module):
    """Adds to the logit the product of an embedding of the breed and the mean features (Miyato and
    Koyama 2018, arXiv 1802.05637)."""

    def __init__(self, channels: int, breeds: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(breeds, channels))  # 0: D begins unconditional

    def forward(self, verdict: Verdict, x: Tensor, num_real: int, labels: Tensor) -> Verdict:
        """`x`: (N, channels, 4, 4), D's last activations."""
        added = (F.embedding(labels, self.embedding) * x.mean((2, 3))).sum(1)
        return verdict._replace(logits=verdict.logits + added)


class Classifier(nn.Module):
    """Logits of the breeds from the mean features."""

    def __init__(self, channels: int, breeds: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, breeds)

    def forward(self, verdict: Verdict, x: Tensor, num_real: int, labels: Tensor) -> Verdict:
        """`x`: (N, channels, 4, 4), D's last activations."""
        return verdict._replace(classes=at_least_float32(self.linear(x.mean((2, 3)))))


def classify_reals(seen: Seen) -> Tensor:
    """Cross-entropy of the breeds over the reals whose breed is known; 0 if there are none.

    D learns from reals only: a fake without a clear breed teaches nothing.
    """
    known = (seen.labels != UNKNOWN).sum().clamp(min=1)
    classes = seen.real.classes
    return F.cross_entropy(classes, seen.labels, ignore_index=UNKNOWN, reduction="sum") / known


GENERATORS["breed"] = BreedGenerator
CONDITIONS["breed"] = Variant(
    text="G and D get the label", generator="breed", without=("labelled", "g_norm=virtual")
)
HEADS["projection"] = Head(
    wanted=lambda config: config.condition == "breed",
    make=lambda config, breeds: lambda channels, outputs: Projection(channels, breeds),
)
HEADS["classifier"] = Head(
    wanted=lambda config: config.condition == "breed" and config.classify > 0,
    make=lambda config, breeds: lambda channels, outputs: Classifier(channels, breeds),
)
D_TERMS["classify"] = Term(classify_reals)
G_TERMS["classify"] = Term(
    lambda seen: F.cross_entropy(seen.fake.classes, seen.labels),
    wanted=lambda config: config.condition == "breed",
)


# ---- K + 1 classes, the breeds and "fake", while G is unconditional: Salimans et al. 2016, section
# 5. D may learn from the breeds of a part of the dogs only.
class FakeClass(nn.Module):
    """Turns K + 1 outputs, "fake" first, into the logits of the breeds and of being real.

    Only the differences of the K + 1 outputs count, so "fake" is subtracted from the breeds. The
    logit whose sigmoid is the share of all breeds is then their log-sum-exp.
    """

    def forward(self, verdict: Verdict, x: Tensor, num_real: int, labels: Tensor) -> Verdict:
        """Needs a verdict whose `logits` are of "fake"."""
        classes = verdict.classes - verdict.logits[:, None]
        return verdict._replace(logits=classes.logsumexp(1), classes=classes)


UNKNOWN = -1  # the label of a dog whose breed D does not learn from


def hide_labels(breed: Tensor, config: Config) -> Tensor:
    """int64 (dogs,): `breed`, with `UNKNOWN` for all but a random share `config.labelled`.

    The same dogs in every part of a run; a larger share contains a smaller one.
    """
    generator = torch.Generator().manual_seed(seed_for(config.seed, "labelled"))
    known = torch.rand(len(breed), generator=generator) < config.labelled
    return torch.where(known.to(breed.device), breed, UNKNOWN)


HEADS["fake class"] = Head(
    wanted=lambda config: config.condition == "classes",
    make=lambda config, breeds: lambda channels, outputs: FakeClass(),
    outputs=lambda breeds: breeds,
)
CONDITIONS["classes"] = Variant(
    text="D classifies K breeds + fake, G is unconditional", needs=("classify",)
)


# ---- Virtual batch norm: Salimans et al. 2016, section 3.5.
class VirtualBatchNorm2d(nn.Module):
    """Batch norm by a fixed reference batch and the image itself: no image depends on the others
    of its batch, in training or after."""

    def __init__(self, num_features: int, reference: int) -> None:
        """`reference`: how many images at the head of each batch are the reference."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.reference = reference

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """`x`: (reference + N, num_features, H, W); `labels` are ignored.

        The reference is normalised by its own mean and variance, an image by those of the reference
        and itself, pooled with weights n and 1 over n + 1.
        """
        wide, n = at_least_float32(x), self.reference
        var, mean = torch.var_mean(wide, (2, 3), correction=0, keepdim=True)
        ref_var, ref_mean = torch.var_mean(wide[:n], (0, 2, 3), correction=0, keepdim=True)
        share, gap = 1 / (n + 1), mean[n:] - ref_mean
        pooled = ref_var.lerp(var[n:], share) + share * (1 - share) * gap.square()
        var = torch.cat([ref_var.expand_as(var[:n]), pooled])
        mean = torch.cat([ref_mean.expand_as(mean[:n]), ref_mean + share * gap])
        gain = self.weight[:, None, None] * (var + 1e-5).rsqrt()
        shift = self.bias[:, None, None] - mean * gain
        return torch.addcmul(shift, wide, gain).to(x.dtype)


class VirtualGenerator(Generator):
    """A DCGAN's G with virtual batch norm, whose reference latents are part of it."""

    def __init__(self, latent_dim: int, width: int, architecture: str, reference: int) -> None:
        """`reference`: how many latents."""
        norm = partial(VirtualBatchNorm2d, reference=reference)
        super().__init__(latent_dim, width, architecture, norm)
        self.constructor |= {"kind": "virtual", "reference": reference}
        self.register_buffer("reference", torch.randn(reference, latent_dim))

    @classmethod
    def of(cls, config: Config, breeds: int) -> VirtualGenerator:
        """The one that `config` asks for; the reference is as large as a batch, as in the paper."""
        return cls(config.latent_dim, config.width, config.architecture, config.batch_size)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """As `Generator`."""
        return super().forward(torch.cat([self.reference, z]))[len(self.reference) :]


GENERATORS["virtual"] = VirtualGenerator
G_NORMS["virtual"] = Variant(text="by a fixed reference batch", generator="virtual")


# ---- Feature matching: Salimans et al. 2016, section 3.1.
def g_matching(seen: Seen) -> Tensor:
    """|mean f(real) - mean f(fake)|^2, as G's adversarial loss.

    f is the output of D's last convolution (of the residual D: activated), each channel at each of
    4 x 4 places, before split norm, which would make the means equal. The gradient is 0 where both
    means are equal, whatever the single images are.
    """
    real, fake = (at_least_float32(v.features).mean(0) for v in (seen.real, seen.fake))
    return (real - fake).square().sum()


LOSSES["matching"] = Loss(
    text="feature matching for G", d=d_margin, g=g_matching, g_reads_reals=True
)


# ---- Historical averaging: Salimans et al. 2016, section 3.3.
class HistoricalAverage(nn.Module):
    """|theta - mean of theta[1] ... theta[t]|^2 over all weights of a network.

    Pulls the weights back to where they were, so that the two players do not circle each other.
    The mean is not part of the gradient.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.weights = list(network.parameters())  # in a list, so they are not registered here
        self.register_buffer("mean", self.concatenated().detach())
        self.register_buffer("count", torch.zeros((), device=self.mean.device))

    def concatenated(self) -> Tensor:
        """All weights as one vector."""
        return torch.cat([weight.flatten() for weight in self.weights])

    def forward(self, seen: Seen) -> Tensor:
        """Adds the current weights to the mean, then measures; reads nothing of `seen`."""
        weights = self.concatenated()
        self.count += 1
        self.mean.lerp_(weights.detach(), 1 / self.count)
        return (weights - self.mean).square().sum()


D_TERMS["history"] = G_TERMS["history"] = Term(HistoricalAverage)


# ---- Hinge loss: Lim and Ye 2017 (Geometric GAN).
def d_hinge(seen: Seen) -> Tensor:
    """max(0, 1 - l) on reals and max(0, 1 + l) on fakes: gradient 0 past 1 (arXiv 1705.02894)."""
    return (1 - seen.real.logits).relu().mean() + (1 + seen.fake.logits).relu().mean()


def g_hinge(seen: Seen) -> Tensor:
    """-l, whose gradient is the same everywhere."""
    return -seen.fake.logits.mean()


LOSSES["hinge"] = Loss(
    text="linear, but 0 for reals above 1 and fakes below -1", d=d_hinge, g=g_hinge,
    certain=lambda seen: seen.real.logits > 1, without=("margin", "smoothing"),
)  # fmt: skip


# ---- Relativistic average least squares: Jolicoeur-Martineau 2018 (arXiv 1807.00734).
def relativistic_squares(above: Tensor, below: Tensor, smoothing: float = 0.0) -> Tensor:
    """(mean (a - mean b - 1)^2 + mean (b - mean a + 1)^2) / 2 for logits a and b: 0 only where all
    a are 1 above the mean of b, and all b 1 below the mean of a.

    Smoothing s makes the first target 1 - 2 s: the mean of 1 and -1 with chances of 1 - s and s.
    """
    up, down = above - below.mean() - (1 - 2 * smoothing), below - above.mean() + 1
    return (up.square().mean() + down.square().mean()) / 2


LOSSES["rals"] = Loss(
    text="relativistic average least squares",
    d=lambda seen: relativistic_squares(seen.real.logits, seen.fake.logits, seen.config.smoothing),
    g=lambda seen: relativistic_squares(seen.fake.logits, seen.real.logits),
    certain=lambda seen: seen.real.logits - seen.fake.logits.mean() > 1,
    g_reads_reals=True,
    without=("margin",),
)


# ---- R1 gradient penalty: Mescheder et al. 2018 (arXiv 1801.04406).
def gradient_penalty(seen: Seen) -> Tensor:
    """The mean over reals of |dD/dx|^2 / 2, where D is the sum of the batch's logits, as split norm
    makes each depend on the others.

    The inner gradient is taken of scaled logits, or fp16 would round it to 0, and without autocast,
    which would cast the backward pass's float32 products down.
    """
    total, count = seen.real.logits.mean() * seen.scale, len(seen.real.logits)
    with torch.autocast("cuda" if total.is_cuda else "cpu", enabled=False):
        (slope,) = torch.autograd.grad(total, seen.images, create_graph=True)
    return (slope[:count] * (count / seen.scale)).square().sum() / (2 * count)


D_TERMS["r1"] = Term(gradient_penalty)


# ---- The residual pair, a small BigGAN (Brock et al. 2019, arXiv 1809.11096), as the competition's
# second place built it: no convolution or linear layer has a bias, and their weights and D's
# embedding are spectrally normalised.
class SpectralNorm(nn.Module):
    """Divides a weight by its largest singular value (Miyato et al. 2018, arXiv 1802.05957).

    One power iteration per forward in training mode; its vector is a buffer that changes in place.
    """

    def __init__(self, weight: Tensor) -> None:
        """`weight`: (outputs, ...), orthogonal: then any vector is right at first."""
        super().__init__()
        self.register_buffer("v", F.normalize(torch.randn(weight[0].numel()), dim=0))

    def forward(self, weight: Tensor) -> Tensor:
        """Computes in float32: autocast would round the products, by 0.4 % in bf16."""
        with torch.autocast("cuda" if weight.is_cuda else "cpu", enabled=False):
            matrix = weight.flatten(1)
            with torch.no_grad():
                u = F.normalize(matrix @ self.v, dim=0)
                if self.training:
                    self.v.copy_(F.normalize(matrix.T @ u, dim=0))
            return weight / (u @ (matrix @ self.v))


def spectral(layer: nn.Module) -> nn.Module:
    """`layer` with an orthogonal initial weight and spectral norm."""
    nn.init.orthogonal_(layer.weight)
    return parametrize.register_parametrization(layer, "weight", SpectralNorm(layer.weight))


class LatentBatchNorm2d(nn.Module):
    """Batch norm whose gain and bias are a linear function of a code: a piece of z and the breed's
    embedding."""

    def __init__(self, num_features: int, code_dim: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(num_features, affine=False)
        self.affine = spectral(nn.Linear(code_dim, 2 * num_features, bias=False))

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        """`x`: (N, num_features, H, W), `code`: (N, code_dim); the gain is 1 + a linear map."""
        gain, bias = self.affine(code)[:, :, None, None].chunk(2, 1)
        return torch.addcmul(bias, self.norm(x), 1 + gain)


class NonLocalBlock(nn.Module):
    """Self-attention over an image's places (Zhang et al. 2019, SAGAN, arXiv 1805.08318).

    Keys and values are max-pooled over 2 x 2 places, as in BigGAN. The gain begins at 0, and with
    it the block as the identity. Two products, not torch's fused attention, whose CUDA kernels have
    no second derivative, which R1 needs.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        keys, values = max(1, channels // 8), max(1, channels // 2)
        self.query = spectral(nn.Conv2d(channels, keys, 1, bias=False))
        self.key = spectral(nn.Conv2d(channels, keys, 1, bias=False))
        self.value = spectral(nn.Conv2d(channels, values, 1, bias=False))
        self.out = spectral(nn.Conv2d(values, channels, 1, bias=False))
        self.gain = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) to the same, H and W even."""
        query = self.query(x).flatten(2)  # (N, keys, HW)
        key, value = (F.max_pool2d(conv(x), 2).flatten(2) for conv in (self.key, self.value))
        attention = (query.mT @ key).softmax(2)  # (N, HW, HW / 4)
        return x + self.gain * self.out((value @ attention.mT).unflatten(2, x.shape[2:]))


class UpBlock(nn.Module):
    """A residual block that doubles the side by nearest-neighbour upsampling."""

    def __init__(self, source: int, target: int, code_dim: int) -> None:
        super().__init__()
        self.norm1 = LatentBatchNorm2d(source, code_dim)
        self.conv1 = spectral(nn.Conv2d(source, target, 3, padding=1, bias=False))
        self.norm2 = LatentBatchNorm2d(target, code_dim)
        self.conv2 = spectral(nn.Conv2d(target, target, 3, padding=1, bias=False))
        self.shortcut = spectral(nn.Conv2d(source, target, 1, bias=False))

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        """(N, source, H, W) to (N, target, 2 H, 2 W)."""
        h = F.interpolate(F.relu(self.norm1(x, code), inplace=True), scale_factor=2.0)
        h = self.conv2(F.relu(self.norm2(self.conv1(h), code), inplace=True))
        # A 1 x 1 convolution before upsampling equals that after it, at a quarter of the work.
        return h + F.interpolate(self.shortcut(x), scale_factor=2.0)


class DownBlock(nn.Module):
    """A residual block that halves the side by average pooling."""

    def __init__(self, source: int, target: int, first: bool = False) -> None:
        """`first`: its input is an image, to which no ReLU is applied."""
        super().__init__()
        self.conv1 = spectral(nn.Conv2d(source, target, 3, padding=1, bias=False))
        self.conv2 = spectral(nn.Conv2d(target, target, 3, padding=1, bias=False))
        self.shortcut = spectral(nn.Conv2d(source, target, 1, bias=False))
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        """(N, source, H, W) to (N, target, H / 2, W / 2)."""
        h = self.conv2(F.relu(self.conv1(x if self.first else F.relu(x)), inplace=True))
        return F.avg_pool2d(h, 2) + self.shortcut(F.avg_pool2d(x, 2))


class ResidualGenerator(nn.Module):
    """G of the second place: blocks with 512, 256, 128 and 64 channels at width 64.

    z is split into five pieces. The first makes 4 x 4 places; each other one, with an embedding of
    the breed, is the code of a block's norms. The slides' "Embedding 32 * 4" is one embedding of 32
    numbers that all four blocks share, as in BigGAN and in the author's notebook.
    """

    def __init__(self, latent_dim: int, width: int, breeds: int) -> None:
        """`latent_dim`: at least 5. `breeds`: how many it is conditioned on; 0 = unconditional."""
        super().__init__()
        self.constructor = {
            "kind": "residual", "latent_dim": latent_dim, "width": width, "breeds": breeds,
        }  # fmt: skip
        self.latent_dim, self.breeds = latent_dim, breeds
        code_dim = 32 if breeds else 0
        if breeds:
            self.register_buffer("frequency", torch.full((breeds,), 1 / breeds))
            self.embedding = nn.Embedding(breeds, code_dim)
            nn.init.orthogonal_(self.embedding.weight)
        first, *pieces = (len(piece) for piece in torch.empty(latent_dim).tensor_split(5))
        self.linear = spectral(nn.Linear(first, 8 * width * 16, bias=False))
        self.blocks = nn.ModuleList()
        for source, target, piece in zip((8, 8, 4, 2), (8, 4, 2, 1), pieces):
            self.blocks.append(UpBlock(source * width, target * width, piece + code_dim))
        self.non_local = NonLocalBlock(2 * width)
        self.norm = nn.BatchNorm2d(width)
        self.to_rgb = spectral(nn.Conv2d(width, 3, 3, padding=1, bias=False))

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """As `Generator`."""
        first, *codes = z.tensor_split(5, dim=1)
        if self.breeds:
            breed = self.embedding(labels)
            codes = [torch.cat([piece, breed], 1) for piece in codes]
        x = self.linear(first).unflatten(1, (-1, 4, 4))
        for block, code in zip(self.blocks, codes):
            x = block(x, code)
            if x.shape[-1] == 32:
                x = self.non_local(x)
        return at_least_float32(self.to_rgb(F.relu(self.norm(x), inplace=True))).tanh()

    @torch.no_grad()
    def settle(self) -> None:
        """Run the power iteration to convergence for newly loaded weights, then freeze its vectors:
        those of averaged weights differ from those of the weights in training."""
        for layer in self.modules():
            if parametrize.is_parametrized(layer):
                for _ in range(200):
                    layer.weight  # noqa: B018 (an iteration)
                layer.parametrizations.eval()


class ResidualDiscriminator(nn.Module):
    """D of the second place: four halving blocks of 64, 128, 256 and 512 channels, sum pooling.

    The projection's embedding is normalised too, as in the author's notebook and in BigGAN: the
    slides exempt only G's.
    """

    def __init__(self, width: int, breeds: int, classify: bool) -> None:
        """`classify`: with a classifier of the breeds."""
        super().__init__()
        self.blocks = nn.Sequential(
            DownBlock(3, width, first=True), NonLocalBlock(width), DownBlock(width, 2 * width),
            DownBlock(2 * width, 4 * width), DownBlock(4 * width, 8 * width), nn.ReLU(),
        )  # fmt: skip
        self.linear = spectral(nn.Linear(8 * width, 1, bias=False))
        self.projection = spectral(nn.Embedding(breeds, 8 * width)) if breeds else None
        self.classifier = spectral(nn.Linear(8 * width, breeds, bias=False)) if classify else None

    def forward(self, images: Tensor, num_real: int, labels: Tensor | None = None) -> Verdict:
        """As `Discriminator`; `num_real` is ignored."""
        x = self.blocks(images)
        pooled = at_least_float32(x).sum((2, 3))
        # RaLS wants logits 1 apart, and they are sums over 4 x 4: half precision is too coarse.
        with torch.autocast("cuda" if x.is_cuda else "cpu", enabled=False):
            logits = self.linear(pooled).flatten()
            if self.projection is not None:
                logits = logits + (self.projection(labels) * pooled).sum(1)
            classes = pooled[:, :0] if self.classifier is None else self.classifier(pooled)
        return Verdict(logits, x, classes)


def residual(config: Config, breeds: int) -> tuple[nn.Module, nn.Module]:
    """The residual G and D. Raises `UserError` for latents of fewer than five numbers."""
    if config.latent_dim < 5:
        raise UserError(
            "--architecture residual splits a latent into 5: give --latent-dim 5 or more."
        )
    breeds = breeds if config.condition == "breed" else 0
    G = ResidualGenerator(config.latent_dim, config.width, breeds)
    return G, ResidualDiscriminator(config.d_width or config.width, breeds, config.classify > 0)


GENERATORS["residual"] = ResidualGenerator
ARCHITECTURES["residual"] = Architecture(
    text="a small BigGAN", build=residual,
    without=("g_norm", "minibatch_features", "init_std", "condition=classes"),
)  # fmt: skip


# ---------------------------------------------------------------------------- 7. Data: finding dogs


class BadItem(Exception):
    """A picture, annotation or box that is left out. The text is the reason, for the counts."""


DAMAGE = (  # what zipfile, tarfile, Pillow, ElementTree and torch raise for damaged files
    OSError, RuntimeError, ValueError, SyntaxError, TypeError, EOFError, LookupError,
    AttributeError, ArithmeticError, struct.error, zlib.error, lzma.LZMAError,
    zipfile.BadZipFile, tarfile.TarError, pickle.UnpicklingError,
)  # fmt: skip


@contextmanager
def counted_as(reason: str) -> Iterator[None]:
    """Raise `BadItem` for a damaged file. Every file of a set is read inside this."""
    try:
        yield
    except Image.DecompressionBombError as error:  # Pillow's limit: 179 million pixels
        raise BadItem("picture with too many pixels") from error
    except DAMAGE as error:
        raise BadItem(reason) from error


class Entry(NamedTuple):
    """A file in a folder or an archive."""

    path: str  # with forward slashes, from the name of the folder or archive on
    size: int  # bytes
    stamp: int  # modification time in ns of the file or archive; checksum of an IDX file
    open: Callable[[], IO[bytes]]

    def read(self) -> bytes:
        """The bytes of the file. Raises `BadItem` if it is damaged."""
        with counted_as("unreadable file"), self.open() as file:
            return file.read(self.size)


@dataclass(frozen=True)
class Photo:
    """One picture and its annotation, not yet read."""

    name: str  # as in n02085620-Chihuahua/n02085620_10074.jpg
    breed: str
    picture: Entry
    annotation: Entry | None  # None in a set without annotations


@dataclass(frozen=True)
class PhotoSet:
    """The photos found, in a fixed order, and what was left out."""

    where: str
    photos: list[Photo]
    skipped: list[tuple[str, str]]  # (name, reason)
    annotated: bool


PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".pgm"}
PACKED = ("", ".zip", ".tar")  # a set is two folders, zips or tars with these names
PICTURE_PLACES = {name + kind for name in ("images", "all-dogs") for kind in PACKED}
ANNOTATION_PLACES = {name + kind for name in ("annotation", "annotations") for kind in PACKED}
IDX_PICTURES = ("images-idx3-ubyte", "images-idx3-ubyte.gz")  # how MNIST's file names end


def is_hidden(name: str) -> bool:
    """Whether the system made a file or folder, and not the user."""
    return name.startswith((".", "__MACOSX"))


def folder_entries(place: Path) -> Iterator[Entry]:
    """The files of a folder and its subfolders, without the results of a run.

    Links are followed, but no folder is read twice.
    """
    top, seen = os.path.basename(os.path.abspath(place)), set()
    for folder, subfolders, names in os.walk(place, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            subfolders.clear()
            continue
        seen.add(real)
        results = {"samples", "progress.webp"} if "log.jsonl" in names else set()
        subfolders[:] = sorted(set(subfolders) - results)
        for file in (Path(folder, name) for name in set(names) - results):
            if file.is_file():  # not a dead link
                path, status = Path(top, file.relative_to(place)).as_posix(), file.stat()
                yield Entry(path, status.st_size, status.st_mtime_ns, partial(file.open, "rb"))


def archive_entries(place: Path) -> Iterator[Entry]:
    """The members of a zip or an uncompressed tar."""

    def open_tarred(start: int) -> IO[bytes]:
        file = place.open("rb")  # one for each member: threads must not share a position
        file.seek(start)
        return file

    if zipfile.is_zipfile(place):
        archive = zipfile.ZipFile(place)
        infos = [i for i in archive.infolist() if not i.is_dir()]
        members = [(i.filename, i.file_size, partial(archive.open, i)) for i in infos]
    else:
        with tarfile.open(place, "r:") as archive:
            infos = [i for i in archive if i.isreg()]
        members = [(i.name, i.size, partial(open_tarred, i.offset_data)) for i in infos]
    stamp = place.stat().st_mtime_ns
    for name, size, opened in members:
        yield Entry(f"{place.stem}/{name.removeprefix('./')}", size, stamp, opened)


def read_idx(place: Path, dimensions: int) -> np.ndarray:
    """The uint8 array of an IDX file (yann.lecun.com/exdb/mnist). Raises one of `DAMAGE`."""
    data = place.read_bytes()
    data = gzip.decompress(data) if place.suffix == ".gz" else data
    magic, *shape = struct.unpack_from(f">{1 + dimensions}I", data)
    if magic != 0x800 + dimensions:
        raise ValueError(f"not bytes in {dimensions} dimensions")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def idx_entries(place: Path) -> Iterator[Entry]:
    """The grey pictures of an IDX file as PGMs in class folders, by the file of labels next to it.

    Without labels they are all in the folder `dog`.
    """
    pictures = read_idx(place, 3)
    stamp = zlib.crc32(pictures)  # other sets have the same names and sizes
    label_file = place.with_name(place.name.replace("images-idx3", "labels-idx1"))
    labels = read_idx(label_file, 1) if label_file.exists() else ["dog"] * len(pictures)
    if len(labels) != len(pictures):
        raise ValueError(f"{len(pictures)} pictures, but {len(labels)} labels in {label_file.name}")
    for k, (pixels, label) in enumerate(zip(pictures, labels)):
        data = b"P5 %d %d 255\n" % pixels.shape[::-1] + pixels.tobytes()
        path = f"{place.name}/{label}/{k:06d}.pgm"
        yield Entry(path, len(data), stamp, partial(io.BytesIO, data))


def list_files(place: Path) -> list[Entry]:
    """All files of a folder, zip, uncompressed tar or IDX file, sorted, without hidden ones.

    Nothing is unpacked. Raises `UserError` if `place` cannot be read.
    """
    try:
        file_entries = idx_entries if place.name.endswith(IDX_PICTURES) else archive_entries
        entries = folder_entries(place) if place.is_dir() else file_entries(place)
        shown = [e for e in entries if not any(map(is_hidden, e.path.split("/")[1:]))]
    except DAMAGE as error:
        raise UserError(
            f"{place} cannot be read as a folder, zip, uncompressed tar or IDX file ({error}): give"
            " another."
        ) from error
    return sorted(shown, key=lambda entry: entry.path)


def find_set(folder: Path, levels: int) -> list[Path]:
    """Where the pictures and the annotations of a set are, at most `levels` below `folder`.

    Of several sets the shallowest counts, then the first by name. Returns [] if there is none.
    """
    level = [folder]
    for _ in range(levels + 1):
        below = [sorted(p for p in f.glob("*") if not is_hidden(p.name)) for f in level]
        for found in below:
            pictures = [p for p in found if p.name.lower() in PICTURE_PLACES]
            annotations = [p for p in found if p.name.lower() in ANNOTATION_PLACES]
            if pictures and annotations:
                return [pictures[0], annotations[0]]
        level = [*filter(os.path.isdir, chain(*below))]
    return []


def find_idx(folder: Path) -> list[Path]:
    """A folder's IDX file of pictures, MNIST's training set before its test set; [] if none."""
    found = [p for p in folder.glob("[!.]*") if p.name.endswith(IDX_PICTURES)]
    return sorted(found, key=lambda p: ("train" not in p.name, p.name))[:1]


def match_photos(
    pictures: list[Entry], annotations: dict[str, dict[str, Entry]]
) -> tuple[list[Photo], list[tuple[str, str]]]:
    """Pair pictures with annotations of the same stem. Also returns (name, reason) of the rest.

    `annotations`: by stem, then by folder. This folder is the breed, because the pictures of
    Kaggle's flat form have none. If several breeds use a stem, the folder of the picture decides.
    """
    photos: dict[str, Photo] = {}
    skipped, left = [], {(folder, stem) for stem, named in annotations.items() for folder in named}
    for picture in pictures:
        path = Path(picture.path)
        named = annotations.get(path.stem)
        if not named:
            skipped.append((picture.path, "picture without annotation"))
            continue
        breed = path.parent.name if path.parent.name in named else next(iter(named))
        left.discard((breed, path.stem))
        name = f"{breed}/{path.name}"
        photos.setdefault(name, Photo(name, breed, picture, named[breed]))  # a set may come twice
    skipped += [("/".join(pair), "annotation without picture") for pair in sorted(left)]
    return list(photos.values()), skipped


def find_photos(paths: Sequence[str | Path] = ()) -> PhotoSet:
    """The photos in `paths`, else those of Stanford Dogs on Kaggle's mounts, else in `data/`.

    A path is a folder with Stanford Dogs in any of its published forms (folders, Kaggle's flat
    form, two zips, the two official tars), an archive, a folder of pictures or of class folders, or
    IDX files (MNIST). Without annotations each picture is one whole dog, and its class is the name
    of its folder, as in torchvision's `ImageFolder`; pictures of one folder alone are one class.
    Raises `UserError` if there are no dogs.
    """
    places = [p for path in map(Path, paths) for p in find_set(path, 4) or find_idx(path) or [path]]
    if not paths:
        program = Path(globals().get("__file__", "a notebook cell")).resolve()
        searches = ((Path("/kaggle/input"), 4), (Path("data"), 0), (program.parent / "data", 0))
        places = next(filter(None, (find_set(*search) for search in searches)), [])
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
        elif ANNOTATION_PLACES & set(folder.lower().split("/")):
            named = annotations.setdefault(name.removesuffix(".xml"), {})
            named.setdefault(Path(folder).name, entry)
    where = " and ".join(map(str, places))
    if not pictures:
        raise UserError(f"no pictures of dogs in {where}: give another --data.")
    if annotations:
        return PhotoSet(where, *match_photos(pictures, annotations), annotated=True)
    folders = [Path(picture.path).parent.name for picture in pictures]
    if len(set(folders)) == 1:
        folders = ["dog"] * len(pictures)
    photos = [Photo(p.path, folder, p, None) for p, folder in zip(pictures, folders)]
    classes = len({photo.breed for photo in photos})
    counted = "one class" if classes == 1 else f"{classes} classes"
    where += f" (no annotations: whole pictures, {counted})"
    return PhotoSet(where, photos, [], annotated=False)


# -------------------------------------------------------------------- 8. Data: reading and cropping

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels, from 0 to the frame
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
TURNS = {  # EXIF orientation: what makes such a picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip


def open_picture(data: bytes) -> Image.Image:
    """A picture from the bytes of a file. A JPEG is not decoded yet, so that `decode_picture` can
    decode it at a fraction of its size. Raises `BadItem`."""
    with counted_as("damaged or not a picture"):
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
        if picture.format not in ("JPEG", "MPO"):
            picture.load()  # before EXIF is read: a PNG may have it at its end
    return picture


def orientation(picture: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 if there is none or it is damaged.

    Pillow's `exif_transpose` also writes a new EXIF block, which fails for some that can be read.
    """
    try:
        stated = picture.getexif().get(0x0112)
        return stated if stated in TURNS and picture.format != "TIFF" else 1  # Pillow turns TIFFs
    except DAMAGE:
        return 1


def decode_picture(picture: Image.Image, shrink: int = 1, upright: bool = True) -> Image.Image:
    """Decode an opened picture to RGB; a JPEG at 1/`shrink` (1, 2, 4, 8) by its DCT scaling.

    `upright`: turn it as EXIF says. Transparent parts become white, and 16-bit grey keeps its high
    byte. Raises `BadItem` if the picture is damaged.
    """
    with counted_as("damaged or not a picture"):
        picture.draft("RGB", (picture.width // shrink, picture.height // shrink))
        picture.load()
        if upright and (turn := TURNS.get(orientation(picture))) is not None:
            picture = picture.transpose(turn)
        if picture.mode.startswith("I"):  # convert() would clip 16 bits at 255
            picture = Image.fromarray((np.asarray(picture) // 256).astype(np.uint8))
        if picture.mode not in ("RGBA", "LA", "PA") and "transparency" not in picture.info:
            return picture.convert("RGB")
        picture = picture.convert("RGBA")
        white = Image.new("RGB", picture.size, "white")
        white.paste(picture, mask=picture.getchannel("A"))
        return white


def parse_annotation(xml: bytes) -> list[Box]:
    """The boxes of an annotation. Raises `BadItem` if it is broken."""
    with counted_as("broken annotation"):
        corners = ("xmin", "ymin", "xmax", "ymax")
        boxes = ElementTree.fromstring(xml).iter("bndbox")
        return [tuple(float(box.findtext(corner)) for corner in corners) for box in boxes]


def clip_box(box: Box, width: int, height: int) -> Box:
    """The part of a box inside the frame. Raises `BadItem` if the box is reversed, or this part is
    less than a pixel wide or high."""
    left, top, right, bottom = box
    if right < left or bottom < top:
        raise BadItem("reversed box")
    left, top, right, bottom = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
    if not (right - left >= 1 and bottom - top >= 1):  # nan is refused too
        raise BadItem("empty box or one outside the picture")
    return (left, top, right, bottom)


def open_photo(photo: Photo) -> tuple[Image.Image, tuple[int, int], list[Box], list[str]]:
    """Open a photo without decoding it. Raises `BadItem` if it has no good box.

    Returns the picture, the width and height of its frame, the boxes of its dogs, cut at the frame,
    and why other boxes are left out. Boxes of Stanford Dogs were drawn on the stored pictures. A
    photo without annotation is turned upright, and its box is the whole frame.
    """
    picture = open_picture(photo.picture.read())
    if photo.annotation is None:
        frame = picture.size[::-1] if orientation(picture) >= 5 else picture.size  # on its side
        return picture, frame, [(0, 0, *frame)], []
    boxes, reasons = [], []
    for box in parse_annotation(photo.annotation.read()):
        try:
            boxes.append(clip_box(box, *picture.size))
        except BadItem as bad:
            reasons.append(str(bad))
    if not boxes:
        raise BadItem(reasons[0] if reasons else "annotation without boxes")
    return picture, picture.size, boxes, reasons


def read_photo(photo: Photo) -> tuple[Image.Image, list[Box]]:
    """A photo in RGB at its full size, and the boxes of its dogs inside it. Raises `BadItem`."""
    picture, _, boxes, _ = open_photo(photo)
    return decode_picture(picture, upright=photo.annotation is None), boxes


def square_inside(x: float, y: float, side: float, width: int, height: int) -> list[Box]:
    """The square around (x, y), moved inside the frame."""
    left = min(max(x - side / 2, 0), width - side)
    top = min(max(y - side / 2, 0), height - side)
    return [(left, top, left + side, top + side)]


def crop_square(box: Box, width: int, height: int) -> list[Box]:
    """The box widened on its short side to a square, moved inside the frame.

    It covers the box, unless the box is longer than the frame's short side: then it is as large as
    fits, around the middle of the box.
    """
    left, top, right, bottom = box
    side = min(max(right - left, bottom - top), width, height)
    return square_inside((left + right) / 2, (top + bottom) / 2, side, width, height)


def crop_head(box: Box, width: int, height: int) -> list[Box]:
    """The square of the box's short side at its top; of a wide box left, middle and right."""
    left, top, right, bottom = box
    side = min(right - left, bottom - top)
    slack = right - left - side
    starts = [left + slack * share for share in (0, 0.5, 1)] if slack >= 1 else [left]
    return [(x, top, x + side, top + side) for x in starts]


def crop_context(box: Box, width: int, height: int) -> list[Box]:
    """A square around the middle of the box, moved inside the frame. Half its side is the distance
    to the nearest edge of the frame, plus 0.28 of how much farther the second nearest edge is.

    "Crop manner from Wu Qi" in Morxrc's notebook (see `first-public`).
    """
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    nearest, second = sorted((x, y, width - x, height - y))[:2]
    side = 2 * (nearest + int(0.28 * (second - nearest)))
    return square_inside(x, y, side, width, height)


# name: crop(box, width, height), the views of one dog; `box` and `whole` are squashed to a square
CROPS: dict[str, Callable[[Box, int, int], list[Box]]] = {
    "box": lambda box, width, height: [box],
    "square": crop_square,
    "head": crop_head,
    "context": crop_context,
    "whole": lambda box, width, height: [(0, 0, width, height)],
}


def parse_crops(text: str) -> dict[str, float]:
    """`"square:3,context"` to `{"square": 0.75, "context": 0.25}`. Raises `UserError`."""
    parts = [part.strip().partition(":") for part in text.split(",")]
    try:
        weights = {kind: float(weight or 1) for kind, _, weight in parts}
    except ValueError:
        weights = {}
    positive = all(0 < weight < math.inf for weight in weights.values())
    if not positive or len(weights) < len(parts) or not weights.keys() <= CROPS.keys():
        raise UserError(
            f"--crops {text}: give kinds out of {', '.join(CROPS)}, once each, with weights above 0"
            " if any, as in square:3,context:1."
        )
    return {kind: weight / sum(weights.values()) for kind, weight in weights.items()}


def crop_photo(photo: Photo, kinds: Sequence[str]) -> tuple[list[list[np.ndarray]], list[str]]:
    """The crops of every dog in a photo, and why boxes are left out.

    Returns, for each dog and each kind, uint8 (views, 64, 64, 3).

    JPEGs are decoded at the smallest DCT scale that leaves every crop at least 128 px: twice the
    final resolution, which keeps the median PSNR against full decoding above 45 dB
    (`tests/bench/bench_data.py`). Raises `BadItem`.
    """
    picture, frame, boxes, reasons = open_photo(photo)
    dogs = [[CROPS[kind](box, *frame) for kind in kinds] for box in boxes]
    least = min(min(c[2] - c[0], c[3] - c[1]) for dog in dogs for views in dog for c in views)
    shrink = next((s for s in (8, 4, 2) if least / s >= 2 * IMAGE_SIZE), 1)
    decoded = decode_picture(picture, shrink, upright=photo.annotation is None)
    scale = 1 / shrink if decoded.width < frame[0] else 1.0  # only JPEGs have shrunk

    def resize(crop: Box) -> np.ndarray:
        left, top, right, bottom = (edge * scale for edge in crop)  # may round to just outside
        inside = (max(left, 0), max(top, 0), min(right, decoded.width), min(bottom, decoded.height))
        return np.asarray(decoded.resize((IMAGE_SIZE,) * 2, Image.Resampling.LANCZOS, box=inside))

    return [[np.stack([resize(c) for c in views]) for views in dog] for dog in dogs], reasons


# ------------------------------------------------------------------- 9. Data: the prepared crop set


@dataclass(frozen=True)
class CropSet:
    """All crops: `pixels[first[i, k] : first[i, k] + count[i, k]]` shows dog i as kind k."""

    pixels: Tensor  # uint8 (views, 64, 64, 3)
    first: Tensor  # int64 (dogs, kinds)
    count: Tensor  # int64 (dogs, kinds)
    weights: Tensor  # float32 (kinds,): how often each kind is drawn
    breed: Tensor  # int64 (dogs,)
    breeds: list[str]
    skipped: list[tuple[str, str]]  # (name, reason)
    key: str  # hash of what the networks see; a resumed run must find the same

    def to(self, device: torch.device) -> CropSet:
        """The same set with its tensors on `device`."""
        tensors = {n: v.to(device) for n, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)


def in_threads(function: Callable, items: Iterable, ahead: int = 256) -> Iterator:
    """`map` in order, in a thread per core, at most 8, and of no more than `ahead` items that are
    not yet asked for; an interrupt drops what is not yet begun."""
    pool, waiting = ThreadPoolExecutor(min(8, os.cpu_count() or 1)), deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        # Never wait here: a garbage collection may close this generator inside a starting thread,
        # which holds the lock that joining another thread needs.
        pool.shutdown(wait=False, cancel_futures=True)


def count_reasons(skipped: list[tuple[str, str]]) -> str:
    """How many were left out for which reason, as in "2 unreadable file, 1 reversed box"."""
    reasons = Counter(reason for _, reason in skipped).most_common()
    return ", ".join(f"{n} {reason}" for reason, n in reasons)


def near_duplicates(views: Sequence[np.ndarray], limit: float, block: int = 1024) -> dict[int, int]:
    """Which dogs repeat an earlier one that stays: {index: index of the earlier one}.

    `views`: uint8 (64, 64, 3), one of each dog. Two are alike if grey thumbnails of 16 x 16
    pixels, minus their mean, have a cosine above `limit`, one of them mirrored or not: this finds
    recoded, scaled and grey copies, but not other cuts of a photo. (Radford et al. 2015, arXiv
    1511.06434, section 4.1.1, by codes of an autoencoder.)
    """
    means = [v.reshape(16, 4, 16, 4, 3).mean((1, 3, 4), dtype=np.float32) for v in views]
    small = torch.from_numpy(np.stack(means))
    small -= small.mean((1, 2), keepdim=True)
    plain, mirrored = (F.normalize(x.flatten(1)) for x in (small, small.flip(2)))
    repeats: dict[int, int] = {}
    stays = torch.ones(len(plain), dtype=torch.bool)
    for start in range(0, len(plain), block):  # some rows at a time: 250 MB for 20,000 dogs
        rows, end = plain[start : start + block], start + block
        cosine = torch.maximum(rows @ plain[:end].T, rows @ mirrored[:end].T)
        near = (cosine.clamp_(max=1.0) > limit).tril(start - 1)  # the earlier ones
        for k in near.any(1).nonzero().flatten().tolist():
            if len(first := (near[k] & stays[:end]).nonzero()):
                repeats[start + k], stays[start + k] = int(first[0]), False
    return repeats


def crop_all(photos: PhotoSet, kinds: list[str], show: bool, dedupe: float) -> dict[str, object]:
    """The crops of all photos, in the form of the cache. Raises `UserError`."""

    def attempt(photo: Photo) -> tuple[list, list[str]]:
        try:
            return crop_photo(photo, kinds)
        except BadItem as bad:
            return [], [str(bad)]

    dogs, shown, skipped = [], [], list(photos.skipped)  # crops of each dog, and its photo
    bar = {"unit": " photos", "disable": not show, "mininterval": 0.1 if is_live() else 60}
    results = in_threads(attempt, photos.photos)
    results = tqdm(results, "cropping", len(photos.photos), **bar)
    for (found, reasons), photo in zip(results, photos.photos):
        skipped += [(photo.name, reason) for reason in reasons]
        dogs += found
        shown += [photo] * len(found)
    items = len(skipped) + len(dogs)
    if len(skipped) > 0.05 * items:
        raise UserError(
            f"{len(skipped)} of {items} items in {photos.where} are bad"
            f" ({count_reasons(skipped)}), and at most 5 % may be: repair the set or give another"
            " --data."
        )
    repeats = near_duplicates([dog[0][0] for dog in dogs], dedupe) if dedupe else {}
    skipped += [
        (f"{shown[k].name}, of {shown[j].name}", "near-duplicates") for k, j in repeats.items()
    ]
    stay = [k for k in range(len(dogs)) if k not in repeats]
    if len(stay) < 16:
        remedy = "a higher --dedupe, or 0" if repeats else "--data with more"
        raise UserError(
            f"there are {len(stay)} dogs in {photos.where}, and training needs at least 16: give"
            f" {remedy}."
        )
    breeds = sorted({photo.breed for photo in photos.photos})
    table = {
        "pixels": torch.from_numpy(np.concatenate([v for k in stay for v in dogs[k]])),
        "count": torch.tensor([[len(views) for views in dogs[k]] for k in stay]),
        "breed": torch.tensor([breeds.index(shown[k].breed) for k in stay]),
        "breeds": breeds,
        "skipped": skipped,
    }
    return table | {"key": content_key(table)}


def content_key(table: dict[str, object]) -> str:
    """A hash of all that the networks see of a table of crops."""
    sha = hashlib.blake2b(table["pixels"].numpy(), digest_size=12)
    sha.update(json.dumps([table["count"].tolist(), table["breed"].tolist()]).encode())
    sha.update(json.dumps(table["breeds"]).encode())
    return sha.hexdigest()


def digest(value: object) -> str:
    """A hash of a value of plain types."""
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=12).hexdigest()


def cache_folder() -> Path:
    """Where prepared crops are kept: `$XDG_CACHE_HOME/train_dogs`; on Kaggle its scratch disk."""
    usual = Path("/kaggle/temp") if Path("/kaggle").is_dir() else Path.home() / ".cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or usual, "train_dogs")


def load_table(path: Path) -> dict[str, object] | None:
    """A table of crops from the cache, its pixels mapped from disk; None if missing or damaged."""
    try:
        table = torch.load(path, mmap=True, weights_only=True)
        return table if table["key"] == content_key(table) else None
    except DAMAGE:
        return None


def prepare_crops(photos: PhotoSet, crops: str, show: bool = True, dedupe: float = 0.0) -> CropSet:
    """Crop every dog once, or load the crops from the cache; the tensors are on the CPU.

    `crops`: kinds with weights, as `parse_crops` takes them; a set without annotations is cropped
    `whole`. `show`: with a progress bar. `dedupe`: the cosine of thumbnails above which a dog
    repeats an earlier one and is left out; 0 = all stay. Raises `UserError` above 5 % bad items, or
    with fewer than 16 dogs.
    """
    weights = parse_crops(crops if photos.annotated else "whole")
    kinds = sorted(weights)
    files = []
    for p in photos.photos:
        stamps = [(e.size, e.stamp) for e in (p.picture, p.annotation) if e]
        files.append((p.name, p.breed, stamps))
    version = 5  # of the crops and the table
    name = digest([kinds, files, photos.skipped, PIL.__version__, dedupe, version])
    path = cache_folder() / f"{name}.pt"
    table = load_table(path)
    if table is None:
        table = crop_all(photos, kinds, show, dedupe)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_parts(path.parent, older=3600)  # of runs that were killed while writing
            save(path, table)
        except OSError as error:
            say(
                f"the crops cannot be kept in {path.parent} ({error.strerror or error}), so the"
                " next run makes them again: set XDG_CACHE_HOME to a folder with more room."
            )
    count = table["count"]
    first = count.flatten().cumsum(0).view_as(count) - count
    shares = torch.tensor([weights[kind] for kind in kinds])
    return CropSet(first=first, weights=shares, **table)


def draw_reals(
    crops: CropSet, rows: Tensor, generator: torch.Generator | None, mirror: float = 0.5
) -> Tensor:
    """One view of each dog in `rows`, of a random kind of crop, mirrored with probability `mirror`.

    `rows`: int64 (B,). Returns float32 (B, 3, 64, 64) in [-1, 1], channels last in memory.
    """
    random = torch.rand((3, len(rows)), generator=generator, device=rows.device)
    kind = torch.bucketize(random[0], crops.weights.cumsum(0)[:-1], right=True)
    view = (random[1] * crops.count[rows, kind]).long() + crops.first[rows, kind]
    pixels = crops.pixels[view].permute(0, 3, 1, 2)
    mirrored = (random[2] < mirror)[:, None, None, None]
    return torch.where(mirrored, pixels.flip(3), pixels).float().div(127.5).sub(1)


# ----------------------------------------------------------------------------------- 10. The device


def choose_device(name: str, precision: str = "auto") -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` as a device on which a convolution has run.

    Raises `UserError` where there is no such GPU, or where the installed torch or cuDNN has no
    kernels for it in `precision` (a P100 under a CUDA 12.8+ build reports itself as available, and
    its first kernel fails).
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not gpus):
        return torch.device("cpu")
    usable = [f"cuda:{k}" for k in range(gpus)]
    wanted = "cuda:0" if name in ("auto", "cuda") else name
    if wanted not in usable:
        raise UserError(
            f"--device {name} is not available here: give one of"
            f" {', '.join(['auto', 'cpu', *usable])}, or turn a GPU on."
        )
    device = torch.device(wanted)
    try:
        torch.cuda.set_device(device)
        try_convolution(device, choose_precision(precision, device))
    except RuntimeError as error:
        if "out of memory" in str(error).lower():  # the GPU is full, not too old
            raise
        major, minor = torch.cuda.get_device_capability(device)
        remedy = "" if precision == "auto" else "give --precision auto, or "
        raise UserError(
            f"this GPU (sm_{major}{minor}) cannot run a convolution of the installed torch"
            f" {torch.__version__} ({first_line(error)}): {remedy}choose a T4 or L4,"
            " or pin the notebook to its original 2025 environment, or install a CUDA 12.6 build of"
            " torch 2.14 or older (pip install --no-index --find-links=FOLDER torch)."
        ) from error
    if precision == "bf16" and torch.cuda.get_device_capability(device) < (8, 0):
        say("this GPU has no bf16 in hardware and emulates it: --precision auto is faster.")
    return device


def try_convolution(device: torch.device, precision: str) -> None:
    """Run a small convolution, forward and backward, as the networks do; waits for the device."""
    how = {"device": device, "dtype": PRECISIONS[precision], "requires_grad": True}
    x, weight = (
        torch.ones(shape, **how).contiguous(memory_format=memory_layout(device))
        for shape in ((2, 16, 8, 8), (16, 16, 4, 4))
    )
    out = F.conv2d(x, weight, stride=2, padding=1).sum()
    sum(slope.sum() for slope in torch.autograd.grad(out, [x, weight])).item()


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def describe_device(device: torch.device) -> str:
    """One line for the log: device, capability, torch and CUDA versions."""
    if device.type == "cpu":
        return f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"
    major, minor = torch.cuda.get_device_capability(device)
    name = torch.cuda.get_device_name(device)
    return f"{name} (sm_{major}{minor}), torch {torch.__version__}, CUDA {torch.version.cuda}"


def memory_layout(device: torch.device) -> torch.memory_format:
    """Channels last, except on GPUs without tensor cores, which are faster with contiguous."""
    old_gpu = device.type == "cuda" and torch.cuda.get_device_capability(device) < (7, 0)
    return torch.contiguous_format if old_gpu else torch.channels_last


def laid_out_like(gradient: Tensor, parameter: Tensor) -> Tensor:
    """`gradient` with the strides of `parameter`.

    Adam's fused kernels walk raw memory: CUDA's refuse other strides, the CPU's mix up the elements
    without an error. `autograd.grad` returns any strides: NCHW for channels-last weights after a
    double backward (R1), and from cuDNN for a 1 x 1 input (G's first layer).
    """
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


PRECISIONS = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_precision(name: str, device: torch.device) -> str:
    """`auto` as bf16 or fp16 where the hardware makes it faster, else as fp32; other names stay.

    bf16 from Ampere (capability 8.0) on and on CPUs with bf16 instructions, fp16 on Volta and
    Turing (T4), fp32 on Pascal (P100) and other CPUs.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return "bf16" if capability >= (8, 0) else "fp16" if capability >= (7, 0) else "fp32"
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:  # not Linux
        flags = set()
    return "bf16" if flags & {"avx512_bf16", "amx_bf16"} else "fp32"


def memory_advice(error: BaseException, options: Options) -> str:
    """What helps if `error` means that memory ran out; "" if it means something else.

    The signs are words of torch, cuDNN and cuBLAS. "Unable to find an engine" usually means too
    little memory, but also a precision that cuDNN lacks.
    """
    text, engine = str(error).lower(), "unable to find an engine"
    signs = (
        "out of memory", "not enough memory", "can't allocate memory", "alloc_failed",
        "allocation_failed", engine,
    )  # fmt: skip
    if not isinstance(error, MemoryError) and not any(sign in text for sign in signs):
        return ""
    if options.draws_only:
        return "the memory is too small for this: try --device cpu."
    smaller = max(2, options.config.batch_size // 2)  # a checkpoint keeps its batch size
    return (
        "the memory is too small for this:"
        f" {'try --precision fp32, or ' if engine in text else ''}start anew with --fresh"
        f"{' instead of --resume' if options.resume else ''} --batch-size {smaller}, or continue on"
        " a device with more memory."
    )


def capture(trainer: Trainer) -> str:
    """Let `trainer.step` replay a CUDA graph of its step, if that does the same as an eager step.

    Returns "", or the reason why steps stay eager. The trainer's state does not change; copies of
    it are kept on the host. Raises what an eager step raises, for example for too little memory.
    """
    if trainer.device.type != "cuda":
        return ""
    before = trainer_state(trainer)
    stream = torch.cuda.Stream(trainer.device)  # a capture needs another than the default one
    try:
        with torch.cuda.stream(stream):
            warm_up(trainer)
            reason = try_graph(trainer, stream)
    finally:
        torch.cuda.synchronize()
        load_trainer(trainer, before)
    for optimizer in (trainer.opt_g, trainer.opt_d):
        optimizer.adam.zero_grad()  # gradients keep the memory of a graph that was given up
    gc.collect()  # so do the errors of a failed capture, which refer to each other
    with suppress(RuntimeError):  # torch 2.11 and older, after a capture that CUDA invalidated
        torch.cuda.empty_cache()
    return reason


def warm_up(trainer: Trainer) -> None:
    """Eager steps, in which cuDNN chooses its algorithms and fp16's loss scales settle: at most
    40, until three in a row have not overflowed."""
    scales, clean = [trainer.opt_g.loss_scale, trainer.opt_d.loss_scale], 0
    for _ in range(40):
        before = torch.stack(scales)
        trainer.one_step()
        clean = clean + 1 if (torch.stack(scales) >= before).all() else 0
        if clean == 3:
            return


def try_graph(trainer: Trainer, stream: torch.cuda.Stream) -> str:
    """Capture and compare; returns why steps cannot be replayed, or "". Changes the state."""
    try:
        replay = record_graph(trainer, stream)
        reason = compare_steps(trainer, replay)
    except RuntimeError as error:  # for example too little memory: a graph has its own
        return f"the step cannot run as a CUDA graph ({first_line(error)})"
    if not reason:
        trainer.update_networks = replay
    return reason


def record_graph(trainer: Trainer, stream: torch.cuda.Stream) -> Callable[[], None]:
    """The replay of `one_step` as a CUDA graph, captured on `stream`."""
    graph, own = torch.cuda.CUDAGraph(), trainer.rng
    default = torch.cuda.default_generators[trainer.device.index]  # the one that a graph knows
    default.set_state(own.get_state())
    trainer.rng = trainer.batches.rng = default
    groups = [optimizer.adam.param_groups[0] for optimizer in (trainer.opt_g, trainer.opt_d)]
    try:
        for group in groups:  # only now: in eager steps torch warns of it
            group["capturable"] = True
        with torch.cuda.graph(graph, stream=stream):
            trainer.one_step()
    except BaseException as error:
        trainer.rng = trainer.batches.rng = own  # the default one may stay in capture mode
        if error.__context__:  # the step's own error: this one is of the capture's end
            raise error.__context__
        raise
    finally:
        for group in groups:
            group["capturable"] = False
    return graph.replay


# How far a replayed and an eager step may be apart, as a share of the step's length. Rounding noise
# of a share e of a gradient's deviation flips a share e / pi of the signs in Adam's first step,
# which is +-lr for each weight: together 2 sqrt(e / pi) of its length. Allowed is four times that.
# e: for sums of some 10^4 products in another order, or in fp32 by another algorithm. On an H200
# two eager steps differed by 0.009 in fp32, 0.0002 in TF32 and 0 in bf16 and fp16, a replay by no
# more. A replay with other data differs by 0.4 to 1.4, one that moves nothing by 1.
ROUNDING = {"fp32": 2**-12, "tf32": 2**-11, "fp16": 2**-11, "bf16": 2**-8}
LARGEST_DEVIATION = {name: 8 * math.sqrt(e / math.pi) for name, e in ROUNDING.items()}
RESOLUTION = 2**-18  # of float32 sums of some 10^3 products, as a share of a vector's length


def compare_steps(trainer: Trainer, replay: Callable[[], None]) -> str:
    """How a replayed step differs from an eager one from the same state; "" if it does not.

    Integers and the random state must be equal. Floats may differ by rounding: by a share of the
    step's length, or, if that is 0, as with a learning rate of 0, by float32's resolution. Each
    buffer (statistics of a norm, vector of spectral norm) is compared alone. All weights of a
    network are compared together, and so are Adam's moments: the gradient of a single weight may
    be nothing but rounding, as that of a bias that the loss ignores.
    """
    start = trainer_state(trainer)
    for name in ("opt_g.loss_scale", "opt_d.loss_scale"):
        start["tensors"][name] *= 0.25  # a step that overflows is skipped and would show nothing
    start["tensors"]["sums"].zero_()  # an earlier overflow may have left nan in R1's
    ends = []
    for step in (trainer.one_step, replay):
        load_trainer(trainer, start)
        step()
        ends.append(trainer_state(trainer))
    first, eager, replayed = (s["tensors"] | {"rng": s["rng"]} for s in (start, *ends))
    networks = (("G", trainer.G), ("D", trainer.D))
    weights = {
        f"{n}.{k}": f"{n}'s weights" for n, net in networks for k, _ in net.named_parameters()
    }
    groups: dict[str, list[str]] = {}
    for name, tensor in first.items():
        if tensor.is_floating_point() and not name.endswith(".step"):  # Adam's: float32 integers
            group = weights.get(name) or re.sub(r"(opt_.)\.\d+", r"\1", name)
            groups.setdefault(group, []).append(name)
        elif not torch.equal(eager[name], replayed[name]):
            return f"a replayed step leaves another {name} than an eager one"
    bound = LARGEST_DEVIATION[trainer.precision]  # 0.07 in fp32 to 0.28 in bf16
    for group, names in groups.items():
        a, b, c = (
            torch.cat([state[name].flatten() for name in names]).double()
            for state in (first, eager, replayed)
        )
        way, apart = (b - a).norm().item(), (c - b).norm().item()
        if not apart <= bound * way + RESOLUTION * a.norm().item():
            return (
                f"a replayed step differs from an eager one in {group} by"
                f" {apart / max(way, 1e-30):.2g} of the step; rounding explains {bound:.2g}"
            )
    return ""


@cache
def flops_per_image(config: Config, breeds: int = 120) -> int:
    """FLOPs per image and step, forward and backward, by torch's counter on the step itself.

    Runs on meta tensors. Norms, activations and optimisers count as 0.
    """
    config = replace(config, batch_size=4, precision="fp32")
    meta = torch.device("meta")
    crops = CropSet(
        pixels=torch.empty((4, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=torch.uint8, device=meta),
        first=torch.zeros((4, 1), dtype=torch.int64, device=meta),
        count=torch.ones((4, 1), dtype=torch.int64, device=meta),
        weights=torch.ones(1, device=meta),
        breed=torch.zeros(4, dtype=torch.int64, device=meta),
        breeds=["any"] * breeds,
        skipped=[],
        key="",
    )
    trainer = Trainer(config, crops, meta)
    with FlopCounter() as counter:
        trainer.one_step()
    return counter.total // config.batch_size


class FlopCounter(TorchDispatchMode):
    """Adds up FLOPs by torch's own table of formulas.

    Torch's `FlopCounterMode` also hooks into every module that is called with a weight, as spectral
    norm is, and `autograd.grad` cannot pass such a hook.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        if operator.overloadpacket in flop_registry:
            formula = flop_registry[operator.overloadpacket]
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def p100_hours(config: Config, steps: int, breeds: int = 120) -> float:
    """Equivalent P100-hours of `steps`: images x FLOPs per image-step / 7.4e12 / 3600."""
    return steps * config.batch_size * flops_per_image(config, breeds) / P100_FLOPS / 3600


# -------------------------------------------------------------------------------------- 11. State

FORMAT = 3  # of checkpoint.pt and generator.pt


def training_tensors(trainer: Trainer) -> dict[str, Tensor]:
    """Everything that a step changes, by name."""
    parts = {
        "G": trainer.G.state_dict(),
        "D": trainer.D.state_dict(),
        "opt_g": trainer.opt_g.tensors(),
        "opt_d": trainer.opt_d.tensors(),
        "ema": dict(enumerate(trainer.averages.ema)),
        "swa": dict(enumerate(trainer.averages.swa)),
    }
    found = {f"{part}.{k}": v for part, tensors in parts.items() for k, v in tensors.items()}
    found |= trainer.d_objective.tensors() | trainer.g_objective.tensors()
    batches = trainer.batches
    return found | {"order": batches.order, "cursor": batches.cursor, "sums": trainer.sums}


def trainer_state(trainer: Trainer) -> dict[str, object]:
    """Everything that a bit-equal continuation needs, as copies on the CPU, in plain types."""
    tensors = training_tensors(trainer).items()
    return {
        "tensors": {k: v.detach().to("cpu", copy=True) for k, v in tensors},
        "rng": trainer.rng.get_state(),
        "data_key": trainer.crops.key,
        "breeds": trainer.crops.breeds,
        "steps_done": trainer.steps_done,
        "rollbacks": trainer.rollbacks,
        "summed": trainer.summed,
        "ema_updates": trainer.averages.ema_updates,
        "swa_updates": trainer.averages.swa_updates,
    }


@torch.no_grad()
def load_trainer(trainer: Trainer, state: dict[str, object]) -> bool:
    """Copy a `trainer_state` into the existing tensors, which a replay reads at their addresses.

    Returns False if the random state is of another kind of device: then it is seeded anew.
    """
    for name, tensor in training_tensors(trainer).items():
        tensor.copy_(state["tensors"][name])
    for name in ("steps_done", "rollbacks", "summed"):
        setattr(trainer, name, state[name])
    for name in ("ema_updates", "swa_updates"):
        setattr(trainer.averages, name, state[name])
    try:
        trainer.rng.set_state(state["rng"])
        return True
    except RuntimeError:
        trainer.rng.manual_seed(seed_for(trainer.config.seed, "training") + trainer.steps_done)
        return False


def plain(config: Config) -> dict[str, object]:
    """A configuration in the types of JSON: None instead of infinity."""
    values = asdict(config) | {"data": list(config.data)}
    return {k: None if v == math.inf else v for k, v in values.items()}


def config_of(values: dict[str, object]) -> Config:
    """The inverse of `plain`. Raises `ValueError` for other fields or types."""
    changed = {k: math.inf if v is None else v for k, v in values.items()}
    changed["data"] = tuple(changed["data"])
    require_same_form(changed, asdict(Config()), "configuration")
    return Config(**changed)


def checkpoint_state(
    trainer: Trainer, seconds_used: float, finished: bool = False
) -> dict[str, object]:
    """The contents of `checkpoint.pt`. `seconds_used`: wall-clock time of all parts so far."""
    return {
        "format": FORMAT,
        "config": plain(trainer.config),
        "trainer": trainer_state(trainer),
        "seconds_used": seconds_used,
        "finished": finished,
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
    }


def write_checkpoint(out: Path, state: dict[str, object]) -> None:
    """Write `checkpoint.pt`; the one before it becomes `checkpoint.previous.pt`."""
    new, current = out / "checkpoint.new.pt", out / "checkpoint.pt"
    save(new, state)
    if current.exists():
        os.replace(current, out / "checkpoint.previous.pt")
    os.replace(new, current)


class Saver:
    """Writes checkpoints in a thread while training continues: a disk takes seconds for 755 MB.

    A full disk does not end the training: it is reported, and the next checkpoint is tried.
    """

    def __init__(self, out: Path, report: Report) -> None:
        self.out, self.report, self.pool = out, report, ThreadPoolExecutor(1)
        self.pending: Future | None = None

    def save(self, trainer: Trainer, seconds_used: float, finished: bool = False) -> None:
        """Begin to write a checkpoint, once the one before it is written."""
        self.wait()
        state = checkpoint_state(trainer, seconds_used, finished)
        self.pending = self.pool.submit(write_checkpoint, self.out, state)

    def wait(self) -> None:
        """Wait for the checkpoint that is being written."""
        pending, self.pending = self.pending, None
        try:
            if pending is not None:
                pending.result()
        except OSError as error:
            self.report.event(f"no checkpoint could be written ({error.strerror}): going on")


class Damaged(UserError):
    """A file of this program whose bytes are damaged."""


Parsed = TypeVar("Parsed")


def read_state(path: Path, parse: Callable[[dict[str, object]], Parsed]) -> Parsed:
    """`parse` of a `checkpoint.pt` or `generator.pt`, with its "config" made a `Config`.

    No other code checks these files. Raises `Damaged` for a damaged file, and `UserError` for one
    of another version or on which `parse` fails.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch does not compare the checksums
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give another file.") from error
    except DAMAGE:
        damaged = path
    if damaged:
        raise Damaged(f"{path} is damaged: give another file.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["format"] != FORMAT:
            raise ValueError(f"format {state['format']}, not {FORMAT}")
        state["config"] = config_of(state["config"])
        return parse(state)
    except DAMAGE as error:
        raise UserError(
            f"{path} does not fit this version of the program ({first_line(error)}): move it away,"
            " or give another --out."
        ) from error


def require_same_form(saved: object, own: object, name: str = "checkpoint") -> None:
    """Raise `ValueError` where a state differs from the program's own in keys, types or shapes."""
    same = type(saved) is type(own)
    if same and isinstance(own, dict):
        same = saved.keys() == own.keys()
    if same and isinstance(own, Tensor):
        same = (saved.dtype, saved.layout) == (own.dtype, own.layout)
        same = same and (saved.shape == own.shape or name == "rng")  # a GPU's is shorter
    if not same:
        raise ValueError(f"another form of its {name}")
    for key in own if isinstance(own, dict) else ():
        require_same_form(saved[key], own[key], key)


def read_checkpoint(path: Path, trainer: Trainer) -> dict[str, object]:
    """A checkpoint of `trainer`'s recipe and data.

    Raises as `read_state`, and `UserError` for another recipe or data.
    """

    def parse(state: dict[str, object]) -> dict[str, object]:
        require_same_recipe(trainer.config, state["config"], [f.name for f in fields(Config)])
        if state["trainer"]["data_key"] != trainer.crops.key:
            raise UserError("the checkpoint was made from other dogs: give its --data, or --fresh.")
        require_same_form(state, checkpoint_state(trainer, 0.0) | {"config": state["config"]})
        return state

    return read_state(path, parse)


def require_same_recipe(config: Config, saved: Config, names: Iterable[str]) -> None:
    """Raise `UserError` where a fixed field among `names` differs from the saved one."""
    for f in fields(Config):
        now, then = getattr(config, f.name), getattr(saved, f.name)
        if f.name in names and f.metadata["fixed"] and now != then:
            flag = flag_of(f.name)
            raise UserError(
                f"the saved run had {flag} {then}, not {now}: give {flag} {then}, or train anew"
                " with --fresh or another --out."
            )


def find_checkpoint(options: Options, trainer: Trainer) -> dict[str, object] | None:
    """`--resume`, else the newest whole checkpoint in `--out`, else None.

    A damaged one is renamed; one that this version cannot read stays, and raises `UserError`.
    """
    if options.resume:
        return read_checkpoint(Path(options.resume), trainer)
    out = Path(options.config.out)
    for path in (out / "checkpoint.pt", out / "checkpoint.previous.pt"):
        try:
            if path.exists():
                return read_checkpoint(path, trainer)
        except Damaged:
            aside = path.with_suffix(".damaged.pt")
            os.replace(path, aside)
            say(f"{path} is damaged: renamed to {aside.name}.", sys.stderr)
    return None


def roll_back(trainer: Trainer, report: Report, options: Options) -> bool:
    """Return to the last checkpoint with fresh randomness; False from the fourth time on."""
    sick_step, rollbacks = trainer.steps_done, trainer.rollbacks + 1
    state = find_checkpoint(options._replace(resume=""), trainer)
    if state is None:
        raise UserError("training diverged, and there is no whole checkpoint: start with --fresh.")
    load_trainer(trainer, state["trainer"])
    trainer.rollbacks = rollbacks
    trainer.rng.manual_seed(seed_for(trainer.config.seed, "training") + rollbacks)
    report.event(
        f"weights not finite, or loss scale below 1, at step {sick_step}: back to step"
        f" {trainer.steps_done},"
        f" {'with fresh randomness' if rollbacks <= 3 else 'finishing from there'}",
        rollbacks=rollbacks,
    )
    return rollbacks <= 3


# ----------------------------------------------------------------------------- 12. Images and files

NORM_BATCHES = 32  # x 128 latents, to estimate the norms of the G that is submitted
SEED_USES = ("training", "submission", "norms", "sheet", "reals", "breeds", "labelled")


def seed_for(seed: int, use: str) -> int:
    """A 32-bit seed for one use of randomness, different for each; that of "training" is `seed`."""
    return (seed + SEED_USES.index(use) * 0x9E3779B1) % 2**32


def draw_latents(count: int, config: Config, use: str) -> Tensor:
    """float32 (count, latent_dim) latents for a use in `SEED_USES`; row k is the same for any
    `count`.

    Truncation t > 0: normal given |z| <= t, by the inverse of its distribution function.
    """
    generator = torch.Generator().manual_seed(seed_for(config.seed, use))
    draw = LATENTS[config.latents].draw
    shape, batches = (SAMPLE_BATCH, config.latent_dim), math.ceil(count / SAMPLE_BATCH)
    z = torch.cat([draw(shape, generator=generator) for _ in range(batches)])[:count]
    if config.truncation:  # of normal latents only
        tail = torch.special.ndtr(torch.tensor(-config.truncation, dtype=torch.float64))
        share = tail + torch.special.ndtr(z.double()) * (1 - 2 * tail)
        z = torch.special.ndtri(share).float()
    return z


def draw_labels(G: nn.Module, count: int, seed: int) -> Tensor:
    """int64 (count,) breeds, as frequent as in the data; row k is the same for any `count`.

    Zeros for an unconditional G.
    """
    if not G.breeds:
        return torch.zeros(count, dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed_for(seed, "breeds"))
    random = torch.rand(count, generator=generator)
    return torch.bucketize(random, G.frequency.cpu().cumsum(0)[:-1], right=True)


def in_batches(latents: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """G's inputs in batches of 128, the last one filled up."""
    for k in range(0, len(latents), SAMPLE_BATCH):
        rows = torch.arange(k, k + SAMPLE_BATCH).clamp(max=len(latents) - 1)
        yield latents[rows], labels[rows]


def full_precision() -> AbstractContextManager:
    """float32 convolutions by one fixed algorithm, for images that do not vary."""
    return torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    )


def sample_images(G: nn.Module, latents: Tensor, labels: Tensor) -> Iterator[np.ndarray]:
    """Batches of uint8 (n, 64, 64, 3) images, in the order of `latents` and `labels`.

    Every forward has 128 latents, and G must be in eval mode: an image depends on its own latent
    only.
    """
    device, left = next(G.parameters()).device, len(latents)
    with full_precision(), torch.no_grad():
        for z, label in in_batches(latents, labels):
            yield to_bytes(G(z.to(device), label.to(device)))[:left]
            left -= SAMPLE_BATCH


def to_bytes(images: Tensor) -> np.ndarray:
    """(N, 3, 64, 64) in [-1, 1] to uint8 (N, 64, 64, 3): round(127.5 x + 127.5), clamped."""
    levels = images.mul(127.5).add(127.5).round().clamp(0, 255).byte()
    return levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path to write to; renamed to `path` if the block ends well, else removed.

    File and folder are synced, so that a power cut leaves the old file or the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.part")
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
        with suppress(OSError):  # Windows opens no folders
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    finally:
        part.unlink(missing_ok=True)


def remove_parts(folder: Path, older: float = 0.0) -> None:
    """Remove temporary files that killed runs left, if they are `older` than so many seconds."""
    for part in folder.glob(".*.part"):
        with suppress(OSError):
            if time.time() - part.stat().st_mtime >= older:
                part.unlink()


def save(path: Path, value: object) -> None:
    """`torch.save` that leaves the old file whole on any error (a full disk raises `OSError`)."""
    with whole_file(path) as part, open(part, "wb") as file:
        try:
            torch.save(value, file)
        except RuntimeError as error:  # what torch raises on a short write
            file.flush()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error


def encode_png(image: np.ndarray) -> bytes:
    """uint8 (64, 64, 3) to a PNG. Run-length coding (3) at level 1 is 1.4 times as fast as Pillow's
    default here, and 4 % smaller (`tests/bench/bench_zip.py`: 0.33 against 0.46 ms, 9.1 against 9.4
    kB)."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1, compress_type=3)
    return buffer.getvalue()


def write_zip(path: Path, batches: Iterable[np.ndarray]) -> int:
    """Write `00000.png`... at the root of a zip, encoded in threads while the next batch is drawn.
    Returns how many there are.

    `batches`: uint8 (n, 64, 64, 3) arrays. Stored, not deflated: PNGs do not shrink again.
    """
    # 16 images a task: with one, threads would block each other.
    tasks = (batch[k : k + 16] for batch in batches for k in range(0, len(batch), 16))
    encoded = in_threads(lambda images: [*map(encode_png, images)], tasks, ahead=8)
    with whole_file(path) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
        for count, png in enumerate(chain.from_iterable(encoded)):
            name = zipfile.ZipInfo(f"{count:05d}.png", date_time=(1980, 1, 1, 0, 0, 0))
            name.external_attr = 0o644 << 16
            archive.writestr(name, png)
    return count + 1


class TooLate(Exception):
    """A zip was given up; its argument: the seconds that the rest takes at the rate so far."""


def in_time(batches: Iterator, count: int, deadline: float, allow_fewer: bool) -> Iterator:
    """The `count` batches, at least the first. Raises `TooLate` once the next two, or a quarter of
    the rest, would not be done before `deadline` (a `time.monotonic()`) at the mean rate so far.

    Not the whole rest: what slows the machine down may end. `allow_fewer`: where the next two would
    not be done, the batches end.
    """
    start = time.monotonic()
    for done in range(count):
        now, left = time.monotonic(), count - done
        seconds = (now - start) / max(1, done)  # of a batch
        if done and now + seconds * (2 if allow_fewer else max(2, left / 4)) > deadline:
            if allow_fewer:
                return
            raise TooLate(seconds * left)
        yield next(batches)


def write_images(
    G: nn.Module,
    config: Config,
    labels: Tensor | None = None,
    deadline: float = math.inf,
    allow_fewer: bool = False,
) -> int:
    """Draw `config.images` dogs into `images.zip`, of `labels` or as frequent as in the data.

    `deadline`, `allow_fewer`: as for `in_time`, which may raise `TooLate`: then the old file stays.
    Returns the number of images.
    """
    latents = draw_latents(config.images, config, "submission")
    labels = draw_labels(G, config.images, config.seed) if labels is None else labels
    batches, count = sample_images(G, latents, labels), math.ceil(config.images / SAMPLE_BATCH)
    path = Path(config.out) / "images.zip"
    return write_zip(path, in_time(batches, count, deadline, allow_fewer))


def submit(
    trainer: Trainer, deadline: float = math.inf, allow_fewer: bool = False
) -> tuple[nn.Module, str, int]:
    """Average, estimate the norms, write `generator.pt` and then `images.zip`, as `write_images`.
    Returns G, which weights it has, and the number of images. May raise `TooLate`."""
    config, choice = trainer.config, trainer.averages.choose(trainer.config.average)
    share = NORM_BATCHES / (NORM_BATCHES + math.ceil(config.images / SAMPLE_BATCH))
    now = time.monotonic()
    for_norms = now + share * (deadline - now)
    G = trainer.averages.generator(trainer.G, choice, NORM_BATCHES, config, for_norms)
    save(Path(config.out) / "generator.pt", generator_state(trainer, G, choice))
    return G, choice, write_images(G, config, deadline=deadline, allow_fewer=allow_fewer)


def generator_state(trainer: Trainer, G: nn.Module, choice: str) -> dict[str, object]:
    """The contents of `generator.pt` for a G with the weights of `choice`."""
    return {
        "format": FORMAT,
        "config": plain(trainer.config),
        "weights": choice,
        "generator": G.constructor,
        "breeds": trainer.crops.breeds,
        "steps_done": trainer.steps_done,
        "state_dict": {k: v.cpu() for k, v in G.state_dict().items()},
    }


def load_generator(path: Path, device: torch.device) -> tuple[nn.Module, dict[str, object]]:
    """G of a `generator.pt`, in eval mode, and the file's contents. Raises `UserError`."""

    def parse(state: dict[str, object]) -> tuple[nn.Module, dict[str, object]]:
        G = make_generator(state["generator"])
        G.load_state_dict(state["state_dict"])
        if state["weights"] not in WEIGHTS or len(state["breeds"]) < G.breeds:
            raise ValueError("unknown weights or breeds")
        return G.to(device, memory_format=memory_layout(device)).eval(), state

    return read_state(path, parse)


def real_images(crops: CropSet, config: Config) -> np.ndarray:
    """uint8 (100, 64, 64, 3): real crops as the networks see them, from the whole set."""
    device = crops.pixels.device
    rows = torch.linspace(0, len(crops.first) - 1, 100, device=device).long()
    generator = torch.Generator(device).manual_seed(seed_for(config.seed, "reals"))
    return to_bytes(draw_reals(crops, rows, generator, config.mirror))


def sheet_images(G: nn.Module, config: Config) -> np.ndarray:
    """uint8 (100, 64, 64, 3): the images of the run's fixed latents."""
    latents, labels = draw_latents(100, config, "sheet"), draw_labels(G, 100, config.seed)
    return np.concatenate(list(sample_images(G, latents, labels)))


def draw_sheet(images: np.ndarray, columns: int = 10) -> Image.Image:
    """uint8 (n, 64, 64, 3) as one picture, `columns` per row, white where images are missing."""
    rows = math.ceil(len(images) / columns)
    sheet = np.full((rows * columns, IMAGE_SIZE, IMAGE_SIZE, 3), 255, np.uint8)
    sheet[: len(images)] = images
    sheet = sheet.reshape(rows, columns, IMAGE_SIZE, IMAGE_SIZE, 3).swapaxes(1, 2)
    return Image.fromarray(sheet.reshape(rows * IMAGE_SIZE, columns * IMAGE_SIZE, 3))


def save_picture(path: Path, frames: Sequence[Image.Image], **options: int) -> None:
    """Write one picture, or several as a looping animation of 0.7 s each; the suffix names the
    format. `options`: Pillow's for that format."""
    several = {"save_all": True, "append_images": frames[1:], "duration": 700, "loop": 0} | options
    with whole_file(path) as part:
        frames[0].save(part, path.suffix[1:].upper(), **(several if len(frames) > 1 else options))


def save_sheet(G: nn.Module, trainer: Trainer) -> tuple[Path, np.ndarray]:
    """Write the sheet of this step. Returns its path and its images."""
    path = Path(trainer.config.out) / "samples" / f"step_{trainer.steps_done:07d}.png"
    images = sheet_images(G, trainer.config)
    save_picture(path, [draw_sheet(images)])
    return path, images


WALK_ROWS, WALK_COLUMNS, WALK_FRAMES = 8, 10, 80


def write_walk(G: nn.Module, config: Config, breeds: Sequence[int]) -> None:
    """Write `walk.webp`: eight closed walks through latent space, 8 s (Radford et al. 2015, 6.1).

    A row shows its whole walk at any time, each column a tenth of it further on. An unconditional G
    walks around a great circle through two random latents. A conditional one keeps a latent and
    goes through `breeds`, by interpolating the embeddings of each breed and the next.
    """
    place = torch.arange(WALK_FRAMES) / WALK_FRAMES
    first, second = draw_latents(2 * WALK_ROWS, config, "sheet")[:, None].chunk(2)
    angle = (2 * math.pi * place)[None, :, None]
    if breeds:
        G, z = between_breeds(G, breeds, place), first.expand(-1, WALK_FRAMES, -1)
    elif config.latents == "uniform":  # to the other latent and back, inside the cube
        z = first.lerp(second, (1 - angle.cos()) / 2)
    else:  # any point of the circle is a standard normal latent
        z = first * angle.cos() + second * angle.sin()
    labels = torch.arange(WALK_FRAMES).repeat(WALK_ROWS)  # an unconditional G ignores them
    images = np.concatenate(list(sample_images(G, z.flatten(0, 1), labels)))
    images = images.reshape(WALK_ROWS, WALK_FRAMES, *images.shape[1:])
    columns = np.arange(WALK_COLUMNS) * (WALK_FRAMES // WALK_COLUMNS)
    frames = [
        draw_sheet(images[:, (columns + k) % WALK_FRAMES].reshape(-1, *images.shape[2:]))
        for k in range(WALK_FRAMES)
    ]
    # At this quality noisy pictures take about 3 MB, where Pillow's default (80) takes 9.
    options = {"duration": 8000 // WALK_FRAMES, "quality": 15}
    save_picture(Path(config.out) / "walk.webp", frames, **options)


@torch.no_grad()
def between_breeds(G: nn.Module, breeds: Sequence[int], place: Tensor) -> nn.Module:
    """A copy of G whose label k is the blend at `place[k]` (0 to 1) of the circle of `breeds`."""
    G = copy.deepcopy(G)
    at = place * len(breeds)
    here, there = (torch.tensor(breeds)[(at.long() + k) % len(breeds)] for k in (0, 1))
    for module in G.modules():
        if isinstance(module, (BreedBatchNorm2d, nn.Embedding)):
            for name, table in list(module.named_parameters(recurse=False)):
                share = at.frac()[:, None].to(table.device)
                setattr(module, name, nn.Parameter(table[here].lerp(table[there], share)))
    return G


def pairwise_distance(images: np.ndarray) -> float:
    """Mean root-mean-square difference between two of the images, in levels of 0..255."""
    x = torch.from_numpy(images.reshape(len(images), -1)).float()
    return (torch.pdist(x) / math.sqrt(x.shape[1])).mean().item()


# -------------------------------------------------------------------------------------- 13. The run

SHEETS = (0.01, 0.03, 0.06, *(n / 10 for n in range(1, 10)))  # progress at which sheets are drawn
CHECKPOINT_SECONDS = 300.0
LAST_SHEET_SECONDS = 4.0  # for the last sheet and the animation, and to end the process
LEAST_SPARE_SECONDS = 3.0  # for the last zip over what the first one took
EXIT_SECONDS = 3.0  # from the last zip to the end of the process


class Clock:
    """The wall-clock of a run over all its parts, and its progress from 0 to 1."""

    def __init__(self, config: Config, started: float, used_before: float) -> None:
        """`started`: `time.monotonic()` at the start of this part; `used_before`: seconds of the
        parts before it."""
        self.steps, self.started = config.steps, started
        self.origin = started - used_before
        self.deadline = self.origin + 3600 * config.hours
        self.part_deadline = started + 3600 * config.part_hours
        self.end = min(self.deadline, self.part_deadline)  # of this part
        self.reserve = 0.0  # seconds for finishing, once measured

    def used(self) -> float:
        """Seconds of the run so far, all parts together."""
        return time.monotonic() - self.origin

    def training_left(self) -> float:
        """Seconds until this part must begin to finish."""
        return self.end - self.reserve - time.monotonic()

    def progress(self, steps_done: int) -> float:
        """The larger of steps done over `steps` and time used over the budget less the reserve."""
        by_time = self.used() / max(1e-9, self.deadline - self.reserve - self.origin)
        return min(1.0, max(steps_done / self.steps, by_time))

    def allows(self, seconds: float) -> bool:
        """Whether `seconds` not spent on training are under 2 % of the run (of at least 25
        minutes where there is no limit)."""
        budget = self.deadline - self.origin
        return seconds <= 0.02 * (budget if math.isfinite(budget) else max(1500, self.used()))


class Interrupts:
    """SIGINT, SIGTERM and SIGHUP. Before training they raise KeyboardInterrupt; during training
    (`armed`) the first one asks for a clean stop by setting `stopped`."""

    def __init__(self) -> None:
        self.armed = self.stopped = False

    def handle(self, *_: object) -> None:
        """The handler of all three."""
        if self.stopped or not self.armed:
            raise KeyboardInterrupt
        self.stopped = True
        say("saving, then writing images.zip; interrupt again to leave at once", sys.stderr)


@contextmanager
def interrupts() -> Iterator[Interrupts]:
    """Handle the signals inside the block, and restore the old handlers after it."""
    state, previous = Interrupts(), {}
    if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            under_nohup = name == "SIGHUP" and number and signal.getsignal(number) == signal.SIG_IGN
            if number and not under_nohup:
                previous[number] = signal.signal(number, state.handle)
    try:
        yield state
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def only_run_in(out: Path) -> Iterator[None]:
    """Lock `out` for this run. Raises `UserError` while another has it; a kill leaves no lock."""
    out.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    folder = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another run is writing to {out}: wait for its end, or give another --out."
            ) from error
        except OSError:  # a file system without locks
            pass
        for place in (out, out / "samples"):
            remove_parts(place)
        yield
    finally:
        os.close(folder)


def say(text: str, file: TextIO | None = None) -> None:
    """Print a line above the bar; a failure to print never ends a run (a full disk, `| head`)."""
    try:
        tqdm.write(text, file=file or sys.stdout)
        (file or sys.stdout).flush()
    except (OSError, ValueError, RuntimeError):  # the last: a signal during a write
        pass


class Report:
    """`log.jsonl`, and what a person sees: a bar on a terminal or in a notebook, else lines."""

    def __init__(self, out: Path) -> None:
        self.path = out / "log.jsonl"
        form = "{percentage:3.0f}%|{bar}| {desc}"
        self.bar = tqdm(total=1.0, bar_format=form, disable=not is_live())
        self.shown = self.logged = self.printed = -math.inf
        self.last_steps, self.last_time, self.complete = 0, time.monotonic(), True

    def start(self, trainer: Trainer) -> None:
        """Count images per second from here."""
        self.last_steps, self.last_time = trainer.steps_done, time.monotonic()

    def event(self, text: str = "", **values: object) -> None:
        """Print `text`, and log it with `values` as one JSON line, if the disk has room for it."""
        if text:
            say(text)
            values = {"text": text} | values
        line = (json.dumps(values) + "\n").encode()
        try:
            with open(self.path, "ab", buffering=0) as file:
                end = file.tell()
                if file.write(line) < len(line):
                    file.truncate(end)  # no half line, to which the next would be glued
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if self.complete:
                say(f"log.jsonl cannot be written ({error.strerror}): going on", sys.stderr)
            self.complete = False

    def status(self, trainer: Trainer, clock: Clock, last: bool = False) -> dict[str, float]:
        """Show and, every 10 s, log the progress. Returns the mean losses since the last call."""
        stats, now = trainer.read_stats(), time.monotonic()
        steps, batch = trainer.steps_done, trainer.config.batch_size
        rate = (steps - self.last_steps) / max(1e-9, now - self.last_time)
        left = min(clock.training_left(), (clock.steps - steps) / rate if rate else math.inf)
        minutes = f"{max(0, left) / 60:.0f}" if math.isfinite(left) else "?"
        progress = clock.progress(steps)
        line = (
            f"step {steps}, {steps * batch:,} images, {rate * batch:.0f} images/s,"
            f" D {stats['d_loss']:.3f}, G {stats['g_loss']:.3f},"
            f" past margin {stats['past_margin']:.2f}, {minutes} min left"
        )
        with suppress(OSError, ValueError):
            self.bar.n = progress
            self.bar.set_description_str(line)
        if self.bar.disable and (last or now >= self.printed + 60):
            say(f"{progress:4.0%} {line}")
            self.printed = now
        if last or now >= self.logged + 10:
            values = {k: round(v, 5) if math.isfinite(v) else None for k, v in stats.items()}
            self.event(
                step=steps, images=steps * batch, progress=round(progress, 5),
                seconds=round(clock.used(), 2), images_per_second=round(rate * batch, 2), **values,
            )  # fmt: skip
            self.logged, self.last_steps, self.last_time = now, steps, now
        self.shown = now
        return stats


def in_notebook() -> bool:
    """Whether this runs in a Jupyter kernel (Colab's is a subclass of it)."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return any(kind.__name__ == "ZMQInteractiveShell" for kind in type(shell).__mro__)


def is_live() -> bool:
    """Whether somebody watches: a terminal or a notebook, not a log file as in a Kaggle commit."""
    live = sys.stderr.isatty() or in_notebook()
    return live and os.environ.get("KAGGLE_KERNEL_RUN_TYPE") != "Batch"


@dataclass
class Run:
    """The parts of one run, and what its zips and sheets cost."""

    options: Options
    trainer: Trainer
    clock: Clock
    report: Report
    stop: Interrupts
    out: Path
    zip_of: str = ""  # "step N" or "an earlier part", which made images.zip; "": none
    zip_seconds: float = 0.0  # what a zip takes
    spent_on_zips: float = 0.0  # seconds so far
    spent_on_sheets: float = 0.0


def write_early_zip(run: Run, deadline: float) -> None:
    """Submit the present weights if it can be done in time, and measure how long it takes."""
    trainer, begin, left = run.trainer, time.monotonic(), 0.0
    batch = math.inf  # the seconds of a batch for the norms; the first warms up
    for _ in range(3):
        start = time.monotonic()
        trainer.averages.generator(trainer.G, "none", 1, trainer.config)
        batch = min(batch, time.monotonic() - start)
    try:
        if start + NORM_BATCHES * batch > deadline:
            # 1.5: images of the zip are encoded, too.
            raise TooLate(batch * (NORM_BATCHES + 1.5 * trainer.config.images / SAMPLE_BATCH))
        submit(trainer, deadline)
        run.zip_of = f"step {trainer.steps_done}"
    except TooLate as late:
        (left,) = late.args
    spent = time.monotonic() - begin
    run.zip_seconds, run.spent_on_zips = spent + left, run.spent_on_zips + spent


def reserve_time(run: Run) -> None:
    """Write a first zip and a first checkpoint, and reserve the time that the last ones take.

    With a first zip, the last one can be given up where the machine becomes too slow. The first is
    left out where it would take over a fifth of the time or, without a budget, over 30 s. Raises
    `UserError` where the budget is too small for a zip.
    """
    trainer, clock, out = run.trainer, run.clock, run.out
    if trainer.steps_done and (out / "images.zip").exists():
        run.zip_of = "an earlier part"
    begin, allowed = time.monotonic(), 0.2 * clock.training_left()
    write_early_zip(run, begin + (allowed if math.isfinite(allowed) else 30.0))
    zipped = time.monotonic()
    write_checkpoint(out, checkpoint_state(trainer, clock.used()))
    # A checkpoint may have to wait for the one before it.
    rest = 2 * (time.monotonic() - zipped) + LAST_SHEET_SECONDS
    # More where it costs under 1 % of the budget, or where the last zip would be the only one.
    spare = 0.3 if run.zip_of and not clock.allows(2 * run.zip_seconds) else 0.6
    left = clock.training_left()
    spare_seconds = max(LEAST_SPARE_SECONDS, spare * run.zip_seconds)
    clock.reserve = min(0.9 * left, run.zip_seconds + spare_seconds + rest)
    if run.zip_seconds + rest >= left:
        if not trainer.steps_done:  # the next try starts with the whole budget
            (out / "checkpoint.pt").unlink()
        part = clock.part_deadline < clock.deadline
        used = begin - (clock.started if part else clock.origin)
        minutes = math.ceil((used + 2.2 * run.zip_seconds + 2 * rest) / 6) / 10
        remedy = f"--part-hours {minutes / 60 + 0.0005:.3f}" if part else f"--minutes {minutes}"
        raise UserError(
            f"the budget is too small to sample {trainer.config.images} images on this device:"
            f" give {remedy} or more, or fewer --images; or --sample-only after an earlier run."
        )


def train_within_budget(run: Run) -> None:
    """Reserve the time to finish, train, and save. Raises `UserError` for too small a budget."""
    trainer, report = run.trainer, run.report
    reserve_time(run)
    run.stop.armed = True
    if reason := capture(trainer):
        report.event(f"{reason}: going on with slower eager steps", slower=reason)
    report.start(trainer)
    saver = Saver(run.out, report)
    try:
        done = train(run, saver)
        saver.wait()
        if not trainer.is_healthy():
            roll_back(trainer, report, run.options)
        report.status(trainer, run.clock, last=True)
        # Before the zip, which may be late. The saved time counts the whole reserve as used.
        saver.save(trainer, run.clock.used() + run.clock.reserve, done)
        saver.wait()
    finally:
        saver.pool.shutdown()  # waits for the file, after a second Ctrl-C too


def train(run: Run, saver: Saver) -> bool:
    """Train. Returns True at progress 1 or after a fourth rollback, False when this part's time is
    over or a signal came."""
    trainer, clock, report = run.trainer, run.clock, run.report
    saved = time.monotonic()
    sheets = [s for s in SHEETS if s > clock.progress(trainer.steps_done)]
    while (progress := clock.progress(trainer.steps_done)) < 1:
        if run.stop.stopped or clock.training_left() <= 0:
            return False
        trainer.step(progress)
        now = time.monotonic()
        showing = now >= report.shown + 1
        saving = now >= saved + CHECKPOINT_SECONDS
        looking = bool(sheets) and progress >= sheets[0]
        if not (showing or saving or looking):  # what follows waits for the device
            continue
        if not trainer.is_healthy():
            saver.wait()
            if not roll_back(trainer, report, run.options):
                return True
            continue
        if showing:
            report.status(trainer, clock)
        if saving:
            saver.save(trainer, clock.used())
            saved = time.monotonic()
        if looking:
            sheets = [s for s in sheets if s > progress]
            show_progress(run)
    return True


def show_progress(run: Run) -> None:
    """Write a sheet, and the zip again, if the time spent on each so far allows it: 5 % of the time
    for sheets, 2 % of the run for zips."""
    clock = run.clock
    try:
        if run.spent_on_sheets <= 0.05 * clock.used():
            begin = time.monotonic()
            check_samples(run)
            run.spent_on_sheets += time.monotonic() - begin
        if clock.allows(run.spent_on_zips + run.zip_seconds):
            write_early_zip(run, clock.end - clock.reserve)
    except OSError as error:  # a full disk must not end the training
        run.report.event(f"samples cannot be written ({error.strerror}): going on")


def check_samples(run: Run) -> None:
    """Write a sheet of the averaged G, and warn if it has collapsed or if D has won."""
    trainer, report, config = run.trainer, run.report, run.trainer.config
    stats = report.status(trainer, run.clock)
    choice = trainer.averages.choose(config.average)
    G = trainer.averages.generator(trainer.G, choice, 8, config)
    _, images = save_sheet(G, trainer)
    reals = real_images(trainer.crops, config)
    variety = pairwise_distance(images) / pairwise_distance(reals)
    report.event(step=trainer.steps_done, variety=round(variety, 4))
    settled = trainer.steps_done >= 1000 and run.clock.progress(trainer.steps_done) >= 0.1
    if variety < 0.5 and settled:
        report.event(
            f"warning: the samples differ from each other {variety:.2f} times as much as real dogs:"
            " if it stays so, G has collapsed; try a lower --g-lr or a wider --d-width"
        )
    if stats["past_margin"] > 0.98 and stats["d_fake"] < -6:
        report.event("warning: D is certain of all reals and fakes: G learns little now")


def finish(run: Run) -> None:
    """Write `generator.pt`, the zip, the last sheet and the animation, and print where they are.

    The zip comes first. Where it would be late, it is given up if there is an earlier one, else it
    has fewer images. Sheet and animation are left out where they would be late.
    """
    trainer, out, config, steps = run.trainer, run.out, run.trainer.config, run.trainer.steps_done
    try:
        G, choice, count = submit(trainer, run.clock.end - EXIT_SECONDS, allow_fewer=not run.zip_of)
    except TooLate:
        run.report.event(
            f"the machine became too slow for a last zip: {out / 'images.zip'} is of {run.zip_of};"
            f" --sample-only draws it from generator.pt, of step {steps}"
        )
        return
    hours = p100_hours(config, steps, len(trainer.crops.breeds))
    run.report.event(
        f"{out / 'images.zip'}: {count} dogs of the {WEIGHTS[choice]}, step {steps},"
        f" {steps * config.batch_size:,} images seen, P100-hours: {hours:.3g}",
        step=steps,
        submitted=choice,
        p100_hours=hours,
    )
    if count < config.images:
        run.report.event(
            f"the machine became too slow for {config.images} images: --sample-only draws them all"
        )
    if time.monotonic() > run.clock.end - LAST_SHEET_SECONDS:
        return
    sheet, _ = save_sheet(G, trainer)
    reals = draw_sheet(real_images(trainer.crops, config))
    sheets = [Image.open(path) for path in sorted((out / "samples").glob("step_*.png"))]
    save_picture(out / "progress.webp", [reals, *sheets])
    run.report.event(f"look at {sheet} (100 dogs) and {out / 'progress.webp'} (all sheets)")


def prepare(
    config: Config, device: torch.device, named: frozenset[str] = frozenset()
) -> tuple[Trainer, list[str]]:
    """Find and crop the dogs and build the trainer. Returns it and the plan, line by line.

    `named`: the fields that the user gave. What only the preset does with breeds is left out where
    the dogs have one.
    """
    photos = find_photos(config.data)
    crops = prepare_crops(photos, config.crops, dedupe=config.dedupe)
    notes, asked = [], named & {"condition", "classify", "labelled"}
    if config.condition != "none" and len(crops.breeds) == 1 and not asked:
        notes = [f"one breed: without the preset's --condition {config.condition}"]
        config = replace(config, condition="none", classify=0.0)
    trainer = Trainer(config, crops, device)
    G, D = (sum(p.numel() for p in net.parameters()) for net in (trainer.G, trainer.D))
    flops = flops_per_image(config, len(crops.breeds))
    dogs = (
        f"{len(photos.photos)} photos, {len(crops.first)} dogs of {len(crops.breeds)} breeds in"
        f" {photos.where}; left out: {count_reasons(crops.skipped) or 'nothing'}"
    )
    cost = (
        f"parameters: G {G:,}, D {D:,}; {flops / 1e9:.3f} GFLOP per image-step; the whole recipe:"
        f" {config.steps} steps, {config.steps * config.batch_size:,} images, P100-hours:"
        f" {p100_hours(config, config.steps, len(crops.breeds)):.3g}"
    )
    return trainer, [dogs, *notes, cost]


def show_plan(options: Options, device: torch.device) -> int:
    """`--dry-run`: crop the dogs, print the plan and the configuration, and try a GPU's replay."""
    trainer, plan = prepare(options.config, device, options.named)
    for line in (*plan, json.dumps(plain(trainer.config), indent=2)):
        say(line)
    if device.type == "cuda":
        reason = capture(trainer)
        say(f"{reason}: steps would be eager" if reason else "steps would be CUDA graph replays")
    return 0


def start_run(options: Options, device: torch.device, started: float, stop: Interrupts) -> int:
    """Find, crop, train, submit. Returns the exit code."""
    trainer, plan = prepare(options.config, device, options.named)
    config, out = trainer.config, Path(trainer.config.out)
    ignored = options.fresh and not options.resume
    state = None if ignored else find_checkpoint(options, trainer)
    clock = Clock(config, started, state["seconds_used"] if state else 0.0)
    if state is None:  # a new run is not mixed with an earlier one's log and sheets
        for old in (out / "log.jsonl", *(out / "samples").glob("step_*.png")):
            old.unlink(missing_ok=True)
    run = Run(options, trainer, clock, Report(out), stop, out)
    try:
        run.report.event(
            device=describe_device(device), precision=trainer.precision, config=plain(config),
            skipped=trainer.crops.skipped,
        )  # fmt: skip
        for line in plan:
            run.report.event(line)
        if state:
            continue_from(run, state)
        with whole_file(out / "config.json") as part:
            part.write_text(json.dumps(plain(config), indent=2), encoding="utf-8")
        reals = draw_sheet(real_images(trainer.crops, config))
        save_picture(out / "samples" / "real.png", [reals])
        saved = state["config"] if state else config
        longer = config.steps > saved.steps or config.hours > saved.hours
        if state and state["finished"] and not longer:
            clock.end = math.inf  # it is only submitted again
        else:
            train_within_budget(run)
        finish(run)
    finally:
        run.report.bar.close()
    return 130 if stop.stopped else 0


def continue_from(run: Run, state: dict[str, object]) -> None:
    """Load a checkpoint into the trainer, and say where it continues and what is not bit-equal."""
    trainer, report = run.trainer, run.report
    same_device = load_trainer(trainer, state["trainer"])
    report.event(f"resumed at step {trainer.steps_done}", resumed_at_step=trainer.steps_done)
    if not same_device:
        report.event("on another kind of device: going on with fresh randomness")
    if (state["torch"], state["threads"]) != (torch.__version__, torch.get_num_threads()):
        report.event("under another torch or thread count: not bit-equal to an unbroken run")


SAMPLING = {"seed", "images", "truncation"}  # fields that --sample-only may change


def sample_only(options: Options, device: torch.device) -> int:
    """`--sample-only`, `--breed` or `--walk`: draw from `generator.pt`."""
    path = Path(options.resume or Path(options.config.out) / "generator.pt")
    if not path.exists():
        raise UserError(f"{path} does not exist: train first, or give another --out.")
    G, state = load_generator(path, device)
    saved = state["config"]
    require_same_recipe(options.config, saved, options.named - SAMPLING)
    chosen = {n: getattr(options.config, n) for n in SAMPLING & options.named}
    config = check_config(replace(saved, out=options.config.out, **chosen))
    if config.truncation != saved.truncation:
        estimate_norms(G, NORM_BATCHES, config)
    breeds = find_breeds(options.breed, state["breeds"], G.breeds)
    if options.walk:
        write_walk(G, config, breeds or list(range(G.breeds))[:8])
        made = "walk.webp: eight walks"
    else:
        labels = torch.tensor(breeds)[torch.arange(config.images) % len(breeds)] if breeds else None
        write_images(G, config, labels)
        made = f"images.zip: {config.images} dogs"
    say(f"{Path(config.out) / made} of the {WEIGHTS[state['weights']]}")
    return 0


def find_breeds(names: str, breeds: Sequence[str], conditioned: int) -> list[int]:
    """The indices of the breeds in "Pug,Chihuahua"; [] for "". Raises `UserError`."""
    if names and not conditioned:
        raise UserError("--breed: this generator is unconditional: train with --condition breed.")

    def short(breed: str) -> str:
        """n02085620-Chihuahua without its number."""
        return breed.partition("-")[2] or breed

    found = []
    for name in names.split(",") if names else ():
        key = name.strip().casefold().replace(" ", "_")
        same = [k for k, b in enumerate(breeds) if key in (b.casefold(), short(b).casefold())]
        if len(same) != 1:
            known = ", ".join(map(short, breeds))
            raise UserError(
                f"--breed {name} is not a breed of this generator: give one of {known}."
            )
        found += same
    return found


# ----------------------------------------------------------------------------- 14. The command line


def flag_of(name: str) -> str:
    """The flag of a field of `Config`."""
    return "--" + name.replace("_", "-")


def check_config(config: Config) -> Config:
    """Raise `UserError` for a value out of its range, or for choices that do not go together;
    return `config` otherwise."""
    for f in fields(Config):
        value, flag = getattr(config, f.name), flag_of(f.name)
        (least, most), choices = f.metadata["range"], f.metadata["choices"]()
        if isinstance(value, (int, float)) and not least <= value <= most:  # also catches nan
            raise UserError(f"{flag} {value} is out of range: give {least} to {most}.")
        if choices and value not in choices:
            raise UserError(f"{flag} {value} is unknown: give one of {', '.join(choices)}.")
        if isinstance(choices, dict):
            check_row(config, flag, value, choices[value])
    parse_crops(config.crops)
    parse_augment(config.augment)
    return config


def check_row(config: Config, flag: str, choice: str, row: Row) -> None:
    """Raise `UserError` where `config` lacks what a row needs, or has what it excludes."""
    for name in row.needs:
        if not getattr(config, name):
            raise UserError(
                f"{flag} {choice} needs {flag_of(name)}: give it too, as in {flag_of(name)} 1."
            )
    for excluded in row.without:
        name, _, value = excluded.partition("=")
        now, default = getattr(config, name), Config.__dataclass_fields__[name].default
        if str(now) == value if value else now != default:
            other = f"another {flag_of(name)}" if value else f"{flag_of(name)} {default}"
            raise UserError(
                f"{flag} {choice} cannot be combined with {flag_of(name)} {now}: give another"
                f" {flag}, or {other}."
            )


class Options(NamedTuple):
    """A parsed command line: the configuration, the names of the given fields, the actions."""

    config: Config
    named: frozenset[str]
    dry_run: bool
    fresh: bool
    resume: str
    sample_only: bool
    walk: bool
    breed: str

    @property
    def draws_only(self) -> bool:
        """Whether images are drawn from `generator.pt`, without training."""
        return self.sample_only or self.walk or bool(self.breed)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are sentences of this program."""

    def error(self, message: str) -> None:
        """Raises `UserError`."""
        raise UserError(f"{message}; see --help.")


GONE = {  # flags of earlier versions
    "--augment-start": "late augmentation was not better",
    "--contrast": "it did not lower the FID",
    "--r1-every": "it was never measured to help",
    "--checkpoint-seconds": f"checkpoints are written every {CHECKPOINT_SECONDS:.0f} s",
}
RENAMED = {"--layers": "--architecture", "--swa-every": "--average-every"}


def modern(argument: str) -> str:
    """An argument with a renamed flag replaced. Raises `UserError` for a flag that is gone."""
    flag, equals, value = argument.partition("=")
    if flag in GONE:
        raise UserError(f"{flag} is gone: {GONE[flag]}; leave it out (see data/EXPERIMENTS.md).")
    if flag in RENAMED:
        say(f"{flag} is now called {RENAMED[flag]}.", sys.stderr)
    return RENAMED.get(flag, flag) + equals + value


def make_parser() -> Parser:
    """The actions, then the fields of `Config` by group."""
    parser = Parser(prog="train_dogs.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    action = parser.add_argument_group("actions").add_argument
    presets = f"recipe, one of {', '.join(PRESETS)}; default dogs"
    action("--preset", default="dogs", choices=PRESETS, metavar="NAME", help=presets)
    action("--dry-run", action="store_true", help="print the plan and stop")
    fresh = "ignore the checkpoint in --out, and delete its log and sheets"
    action("--fresh", action="store_true", help=fresh)
    resume = "start from this checkpoint, or draw from this generator.pt"
    action("--resume", default="", metavar="FILE", help=resume)
    again = "write images.zip again from generator.pt"
    action("--sample-only", action="store_true", help=again)
    walk = "write walk.webp from generator.pt: a walk through its latent space"
    action("--walk", action="store_true", help=walk)
    breed = "draw only these breeds from generator.pt, as in Pug or Pug,Chihuahua"
    action("--breed", default="", metavar="NAMES", help=breed)
    groups: dict[str, argparse._ArgumentGroup] = {}
    for f in fields(Config):
        name = f.metadata["group"]
        group = groups.setdefault(name, parser.add_argument_group(name))
        group.add_argument(
            flag_of(f.name),
            type=str if f.default == () else type(f.default),
            action="append" if f.default == () else "store",
            default=argparse.SUPPRESS,
            metavar={int: "N", float: "X", str: "TEXT", tuple: "PATH"}[type(f.default)],
            help=help_of(f).replace("%", "%%"),
        )
    minutes = {"type": float, "default": argparse.SUPPRESS, "metavar": "X"}
    groups["length"].add_argument("--minutes", help="--hours, in minutes", **minutes)
    return parser


def help_of(f: Field) -> str:
    """The help text of a field, its choices explained by their registry's rows."""
    choices = f.metadata["choices"]()
    if isinstance(choices, dict):
        choices = [f"{name} ({row.text})" for name, row in choices.items()]
    shown = f.metadata["help"] + (f": {', '.join(choices)}" if choices else "")
    return shown + (f"; default {f.default}" if f.default not in ("", ()) else "")


def recipe(preset: str, changes: dict[str, object]) -> Config:
    """The configuration of a preset with changed fields.

    The preset's `classify` is the weight of its own `condition`: another one starts from 0.
    """
    own = PRESETS[preset]
    if changes.get("condition", own.get("condition")) != own.get("condition"):
        own = own | {"classify": 0.0}
    return Config(**own | changes)


def parse(argv: Sequence[str]) -> Options:
    """The command line, made from `Config`; `--steps` alone lifts the time limit."""
    given = vars(make_parser().parse_args([modern(argument) for argument in argv]))
    actions = {name: given.pop(name) for name in ("preset", *Options._fields[2:])}
    if "minutes" in given:
        if "hours" in given:
            raise UserError("--hours and --minutes are the same budget: give one of them.")
        given["hours"] = given.pop("minutes") / 60
    for name in ("hours", "part_hours"):
        if not given.get(name, 1) > 0:
            raise UserError(f"{flag_of(name)} must be above 0.")
    if "steps" in given and "hours" not in given:
        given["hours"] = math.inf
    if "data" in given:
        given["data"] = tuple(given["data"])
    config = check_config(recipe(actions.pop("preset"), given))
    if not config.out:
        kaggle = Path("/kaggle/working")
        config = replace(config, out=str(kaggle if kaggle.is_dir() else "output"))
    return Options(config, frozenset(given), **actions)


def act(options: Options, started: float, stop: Interrupts) -> int:
    """Do what the command line asks for. Returns the exit code."""
    config = options.config
    device = choose_device(config.device, config.precision)
    torch.backends.cudnn.benchmark = True  # shapes never change: let cuDNN choose by measurement
    say(f"{describe_device(device)}, {choose_precision(config.precision, device)}")
    if options.dry_run:
        return show_plan(options, device)
    with only_run_in(Path(config.out)):
        if options.draws_only:
            return sample_only(options, device)
        return start_run(options, device, started, stop)


def main(argv: Sequence[str] = (), started: float | None = None) -> int:
    """Run with the options of `argv`; returns the exit code, 0, 2 or 130, and never exits.

    `started`: the `time.monotonic()` from which the budget counts; None = now.
    """
    started = time.monotonic() if started is None else started
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the error decides
    options = None
    try:
        with interrupts() as stop:
            options = parse(argv)
            return act(options, started, stop)
    except SystemExit:  # argparse's --help
        return 0
    except KeyboardInterrupt:
        say(f"train_dogs: interrupted; {after_interrupt(options)}.", sys.stderr)
        return 130
    except UserError as error:
        message = str(error)
    except OSError as error:
        if error.errno is None:  # a library's, not the system's
            raise
        message = (
            f"{error.strerror} ({error.filename or options.config.out}): free disk space or give"
            " another --out, then start the same command again; every file that is there is whole."
        )
    except (RuntimeError, MemoryError) as error:
        if not (message := memory_advice(error, options)):
            raise
    say(f"train_dogs: {message}", sys.stderr)
    return 2


def after_interrupt(options: Options | None) -> str:
    """What an interrupt leaves, and how to get a zip if there is none."""
    out = Path(options.config.out) if options else Path()
    if (out / "generator.pt").exists() and not (out / "images.zip").exists():
        return (
            "there is no images.zip yet: the same command continues, and --sample-only writes one"
        )
    return "every file that is there is whole"


def leave(code: int) -> None:
    """Exit with `code`, also where stdout is closed already (`| head -1`)."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


if __name__ == "__main__":
    if in_notebook():  # its sys.argv is its kernel's, and it must not exit
        main()
    else:
        for stream in (sys.stdout, sys.stderr):  # paths need not be UTF-8
            stream.reconfigure(errors="backslashreplace")
        leave(main(sys.argv[1:], STARTED))
