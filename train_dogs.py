"""Train a DCGAN on Stanford Dogs within a time budget and write `images.zip`: 10,000 new dogs.

One file, from JPEGs and boxes to the zip that Kaggle's *Generative Dog Images* would accept. Split
batch norm in the discriminator, a margin loss, and an averaged generator (SWA or EMA) whose batch
norm statistics are re-estimated. Runs on a CUDA GPU from compute capability 6.0 on, or on a CPU; as
a script, as a Kaggle kernel, or pasted into a notebook cell (there with options by
`main(["--minutes", "30"])`).

    python train_dogs.py --data PATH/TO/stanford-dogs     # the recipe, or 8.5 hours of it
    python train_dogs.py --preset small --data THE/SAME   # on a CPU

What it costs is counted: 8.49 P100-hours for the default recipe. What it scores after them has
not been measured yet; `--preset small` reaches a FID of 81.1 in 114 minutes of a CPU core (n = 1).

How the dogs are made comes first: configuration, networks, losses, one step, averages; a second
pair of networks stands behind them. Then what a run needs around it: the data in the order in which
it flows, the device, the trainer, the submission, the run.
"""

from __future__ import annotations

import time

STARTED = time.monotonic()  # before torch, whose import takes seconds of the budget

import argparse
import copy
import errno
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
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import IO, NamedTuple
from xml.etree import ElementTree

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from tqdm.auto import tqdm

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder are not told apart there
    fcntl = None

IMAGE_SIZE = 64
SAMPLE_BATCH = 128  # latents per forward when sampling; fixed, so that an image never depends on N
P100_FLOPS = 7.4e12  # sustained FLOP/s of a P100 on a DCGAN: the unit of "P100-hours"


# --------------------------------------------------------------------------------- 1. Configuration


class UserError(Exception):
    """What the user or the machine must change: one sentence with the remedy; exit code 2."""


def option(
    default: object,
    group: str,
    text: str,
    span: tuple[float, float] = (-math.inf, math.inf),
    among: str = "",
    fixed: bool = True,
) -> object:
    """A field of `Config`: a flag of the command line with all that is known of it.

    `span`: the least and the most; `among`: the choices; `fixed`: not to change on a resume.
    """
    known = {"group": group, "help": text, "span": span, "among": among.split(), "fixed": fixed}
    return field(default=default, metadata=known)


free = partial(option, fixed=False)


# fmt: off
@dataclass(frozen=True)
class Config:
    """The only source of options: each field is a flag and goes into the checkpoint and log."""

    data: tuple[str, ...] = free((), "files", "folder, zip or tar of dogs; repeatable")
    out: str = free("", "files", "folder for results (/kaggle/working or output)")

    crops: str = option("square", "data", "kinds of crop with weights, as in square:3,context:1")
    dedupe: float = option(0.0, "data",
        "leave out dogs whose thumbnail has a higher cosine than this with another; 0 = none",
        (0, 1))
    mirror: float = option(0.5, "data", "share of the draws that are mirrored", (0, 1))
    noise: float = option(0.0, "data", "reals get uniform noise from 0 to this", (0, 1))
    augment: str = option("", "data",
        "differentiable augmentation of reals and fakes: color,translation,cutout")
    augment_start: float = option(0.0, "data",
        "progress at which --augment begins, 0 to 1", (0, 1))

    layers: str = option("deep", "networks",
        "deep, paper: the DCGAN of 2015, or residual: a small BigGAN", among="deep paper residual")
    latent_dim: int = option(256, "networks", "numbers in a latent z", (1, 4096))
    width: int = option(48, "networks", "channels per unit of G's table (and D's)", (1, 1024))
    d_width: int = option(0, "networks", "the same for D alone; 0 = width", (0, 1024))
    init_std: float = option(0.0, "networks", "std of normal weights; 0 = PyTorch's own", (0, 1))
    condition: str = option("none", "networks",
        "what G and D are told of a dog: none or breed; classes: D learns breeds, G is told none",
        among="none breed classes")
    g_norm: str = option("batch", "networks",
        "of G: batch, or virtual batch norm by a fixed reference batch", among="batch virtual")
    minibatch_features: int = option(0, "networks",
        "kernels of minibatch discrimination, by which D sees how alike a batch is", (0, 1024))

    loss: str = option("margin", "loss",
        "margin; rals: relativistic average least squares; matching: feature matching for G",
        among="margin rals matching")
    margin: float = option(0.8, "loss",
        "probability past which a real costs nothing; 1 = never", (0.01, 1))
    smoothing: float = option(0.0, "loss",
        "one-sided label smoothing: the reals' label is 1 - this", (0, 0.5))
    classify: float = option(0.0, "loss",
        "weight of telling breeds apart, if conditioned on them", (0, 10))
    labelled: float = option(1.0, "loss",
        "share of the dogs whose breed D is told, with --condition classes", (0, 1))
    contrast: float = option(0.0, "loss",
        "weight of holding the fakes' contrast to the photos', to which D is blind", (0, 1000))
    history: float = option(0.0, "loss",
        "weight of historical averaging: squared distance of all weights to their mean", (0, 1000))
    r1: float = option(0.0, "loss", "gamma of the R1 gradient penalty on reals", (0, 1000))
    r1_every: int = option(1, "loss",
        "steps from one such penalty to the next, each so many times as large", (1, 1000))

    batch_size: int = option(32, "optimisation", "reals (and fakes) per step", (2, 65536))
    g_lr: float = option(5e-4, "optimisation", "Adam's learning rate for G", (0, 1))
    d_lr: float = option(5e-4, "optimisation", "Adam's learning rate for D", (0, 1))
    beta1: float = option(0.3, "optimisation", "Adam's beta1", (0, 0.9999))
    beta2: float = option(0.999, "optimisation", "Adam's beta2", (0, 0.999999))
    lr_decay_start: float = option(1.0, "optimisation",
        "progress where lr begins to fall to 0", (0, 1))

    average: str = free("swa", "averaging", "weights to submit: swa, ema or none",
        among="swa ema none")
    average_every: int = option(20, "averaging", "steps between updates of both", (1, 10**9))
    swa_start: float = option(0.5, "averaging", "progress at which SWA begins, 0 to 1", (0, 1))
    ema_beta: float = option(0.9995, "averaging", "EMA's decay per step", (0, 0.9999999))
    ema_schedule: str = option("constant", "averaging",
        "of that decay; stepped: 0.9, 0.99, 0.999, 0.9999 instead", among="constant stepped")
    truncation: float = free(0.0, "averaging",
        "latents beyond this are drawn anew; 0 = none", (0, 100))

    steps: int = free(397_000, "length", "steps of the whole recipe", (1, 10**9))
    hours: float = free(8.5, "length",
        "wall-clock budget of all parts, zip included; inf = none", (0, math.inf))
    part_hours: float = free(math.inf, "length",
        "end this part after so long, to be resumed", (0, math.inf))

    seed: int = option(0, "run", "seed of everything random", (0, 2**32 - 1))
    device: str = free("auto", "run", "auto, cpu, cuda or cuda:N")
    precision: str = free("auto", "run", "of convolutions: auto, fp32, tf32, bf16 or fp16",
        among="auto fp32 tf32 bf16 fp16")
    images: int = free(10_000, "run", "images in the zip", (1, 99_999))
    checkpoint_seconds: float = free(300.0, "run", "seconds between checkpoints", (0, 1e9))

    @property
    def conditional(self) -> bool:
        """Whether the networks are told breeds."""
        return self.condition == "breed"
# fmt: on


# dogs: ours. first-public: the notebook that says it was first in public, crops by nearest kinds,
# without its quirks (a margin for G too, rotation that leaves black wedges, samples in training
# mode).
GPU_PRESETS = {  # field: its value in each preset; fields that are not here have their defaults
    "preset":        ("dogs",     "first-public"),
    "crops":         ("square",   "head:2,square:1,context:1"),
    "smoothing":     (0.0,        0.05),
    "average":       ("swa",      "ema"),
    "average_every": (20,         1),
    "ema_schedule":  ("constant", "stepped"),
}  # fmt: skip
# dcgan: the networks and settings of Radford et al. 2015 (arXiv 1511.06434). second-private: the
# slides of the competition's second place, RaLS-BigGAN with an auxiliary classifier. improved: the
# recipe of Salimans et al. 2016 (arXiv 1606.03498) for ImageNet: virtual batch norm, minibatch
# discrimination, K + 1 classes, all labels. Smoothing, rates, batch and beta1 are those of their
# `imagenet` code, which has no historical averaging. Ours differs: 64 x 64 instead of 128; dcgan's
# layers and latents, twice as wide as theirs; no noise on D's input; split batch norm in D;
# minibatch kernels as for CIFAR-10 (theirs: 300 of 50 numbers); G's target 1 instead of 0.375.
PAPER_PRESETS = {
    "preset":             ("dcgan",  "second-private", "improved"),
    "layers":             ("paper",  "residual",       "paper"),
    "latent_dim":         (100,      100,              100),
    "width":              (128,      64,               128),
    "init_std":           (0.02,     0.0,              0.02),
    "condition":          ("none",   "breed",          "classes"),
    "g_norm":             ("batch",  "batch",          "virtual"),
    "minibatch_features": (0,        0,                100),
    "noise":              (0.0,      1 / 128,          0.0),
    "loss":               ("margin", "rals",           "margin"),
    "margin":             (1.0,      0.8,              1.0),  # rals has none
    "smoothing":          (0.0,      0.0,              0.25),
    "classify":           (0.0,      0.1,              1.0),
    "batch_size":         (128,      64,               64),
    "g_lr":               (2e-4,     2e-4,             4e-4),
    "d_lr":               (2e-4,     8e-4,             4e-4),
    "beta1":              (0.5,      0.0,              0.5),
    "average":            ("none",   "ema",            "none"),
    "average_every":      (20,       1,                20),
    "ema_beta":           (0.9995,   0.999,            0.9995),
    "truncation":         (0.0,      2.0,              0.0),
    "steps":              (197_000,  50_000,           309_000),
}  # fmt: skip
# small: real dogs in two hours of one CPU core (0.35 GFLOP an image). sample: the drawn dogs of
# data/sample, in three minutes of two. mnist: pictures in MNIST's format on a CPU: few filters, and
# for G four times D's rate.
CPU_PRESETS = {
    "preset":         ("small",       "sample",      "mnist"),
    "layers":         ("paper",       "paper",       "paper"),
    "latent_dim":     (64,            64,            64),
    "width":          (24,            16,            4),
    "d_width":        (0,             0,             8),
    "mirror":         (0.5,           0.5,           0.0),
    "augment":        ("translation", "translation", "translation"),
    "batch_size":     (16,            16,            32),
    "g_lr":           (3e-4,          5e-4,          1e-3),
    "d_lr":           (3e-4,          5e-4,          2.5e-4),
    "beta1":          (0.5,           0.5,           0.5),
    "lr_decay_start": (0.3,           0.6,           0.6),
    "average":        ("ema",         "ema",         "ema"),
    "average_every":  (10,            10,            10),
    "ema_beta":       (0.998,         0.998,         0.998),
    "steps":          (160_000,       8_000,         40_000),
    "images":         (10_000,        1_000,         10_000),
}  # fmt: skip
PRESETS = {
    column[0]: dict(zip(list(table)[1:], column[1:]))
    for table in (GPU_PRESETS, PAPER_PRESETS, CPU_PRESETS)
    for column in zip(*table.values())
}


# -------------------------------------------------------------------------------------- 2. Networks

# What every pair of networks keeps to: `G(z, labels)` and `D(images, num_real, labels)`, where
# labels are int64 breeds, which an unconditional network ignores. A row of `NETWORKS` makes a pair.


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm of an unconditional G: `(x, labels)` like the conditional one."""

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """`x`: (N, num_features, H, W); `labels` are ignored."""
        return super().forward(x)


class BreedBatchNorm2d(nn.Module):
    """Batch norm with a gain and a bias for each breed (Dumoulin et al. 2017, arXiv 1610.07629)."""

    def __init__(self, num_features: int, breeds: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(num_features, affine=False)
        self.weight = nn.Parameter(torch.ones(breeds, num_features))
        self.bias = nn.Parameter(torch.zeros(breeds, num_features))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """`x`: (N, num_features, H, W), `labels`: int64 (N,)."""
        weight, bias = (F.embedding(labels, p)[:, :, None, None] for p in (self.weight, self.bias))
        return torch.addcmul(bias, self.norm(x), weight)


class VirtualBatchNorm2d(nn.Module):
    """Batch norm by a fixed reference batch and the image itself (Salimans et al. 2016, arXiv
    1606.03498, section 3.5): no image depends on those drawn beside it, in training or after."""

    def __init__(self, num_features: int, reference: int, eps: float = 1e-5) -> None:
        """`reference`: how many images at the head of each batch are the reference."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.reference, self.eps = reference, eps

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """`x`: (reference + N, num_features, H, W); `labels` are ignored.

        The reference is normed by its own mean and mean square, an image by those of the reference
        and itself: (n * theirs + its own) / (n + 1). As variances, so that float32 loses nothing.
        """
        wide, n = widened(x), self.reference
        var, mean = torch.var_mean(wide, (2, 3), correction=0, keepdim=True)
        ref_var, ref_mean = torch.var_mean(wide[:n], (0, 2, 3), correction=0, keepdim=True)
        share, gap = 1 / (n + 1), mean[n:] - ref_mean
        # The variance of two groups pooled: the mean of theirs, and that between their means.
        pooled = ref_var.lerp(var[n:], share) + share * (1 - share) * gap.square()
        var = torch.cat([ref_var.expand_as(var[:n]), pooled])
        mean = torch.cat([ref_mean.expand_as(mean[:n]), ref_mean + share * gap])
        gain = self.weight[:, None, None] * (var + self.eps).rsqrt()
        shift = self.bias[:, None, None] - mean * gain
        return torch.addcmul(shift, wide, gain).to(x.dtype)


class SplitBatchNorm2d(nn.Module):
    """Batch norm that gives reals and fakes in one batch their own statistics, but one affine pair.

    Equal to two separate forwards through an ordinary batch norm in training mode, in one forward
    of everything around it. Keeps no running statistics: D is never evaluated. Statistics of their
    own for a second distribution: Xie et al. 2020 (AdvProp, arXiv 1911.09665).
    """

    def __init__(self, num_features: int, eps: float = 1e-5, wide: bool = False) -> None:
        """`wide`: in float32 whatever comes in, for R1: the second derivative holds the inverse
        deviation to the third power, which fp16 has no number for."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.eps, self.wide = eps, wide

    def forward(self, x: Tensor, num_real: int) -> Tensor:
        """`x`: (N, num_features, H, W), the `num_real` reals first; 0 or N make one group."""
        if not 0 <= num_real <= len(x):
            raise ValueError(f"num_real is {num_real}, but the batch holds {len(x)}")
        x = widened(x) if self.wide else x
        groups = [g for g in x.split([num_real, len(x) - num_real]) if len(g)]
        normed = [
            F.batch_norm(g, None, None, self.weight, self.bias, training=True, eps=self.eps)
            for g in groups
        ]
        return normed[0] if len(normed) == 1 else torch.cat(normed)


class NoNorm(nn.Module):
    """Nothing in the place of a norm of D."""

    def forward(self, x: Tensor, num_real: int) -> Tensor:
        """`x` as it is."""
        return x


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


class Generator(nn.Module):
    """DCGAN: transposed convolutions, batch norm, ReLU, and tanh at the end."""

    def __init__(
        self,
        latent_dim: int = 256,
        width: int = 48,
        layers: str = "deep",
        breeds: int = 0,
        reference: int = 0,
    ) -> None:
        """`breeds`: how many it is conditioned on; 0 = it draws a dog of any. `reference`: how many
        latents make the reference batch of virtual batch norm; 0 = ordinary batch norm."""
        super().__init__()
        self.shape = {
            "latent_dim": latent_dim, "width": width, "layers": layers, "breeds": breeds,
            "reference": reference,
        }  # fmt: skip
        self.register_buffer("reference", torch.randn(reference, latent_dim))
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
            if reference:
                self.norms.append(VirtualBatchNorm2d(target, reference))
            else:
                norm = BreedBatchNorm2d(target, breeds) if breeds else BatchNorm2d(target)
                self.norms.append(norm)
            source = target
        last = LAYERS[layers]["rgb"]
        self.to_rgb = nn.ConvTranspose2d(source, 3, last, last - 2, 1)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """(N, latent_dim) standard normal latents to float32 (N, 3, 64, 64) images in [-1, 1].

        `labels`: int64 (N,) breeds, needed only by a G that is conditioned on them.
        """
        if labels is None and self.breeds:
            raise ValueError(f"a generator of {self.breeds} breeds needs labels")
        x = torch.cat([self.reference, z])[:, :, None, None]  # the reference may be none
        for conv, norm in zip(self.convs, self.norms):
            x = F.relu(norm(conv(x), labels), inplace=True)
        x = x[len(self.reference) :]
        return widened(self.to_rgb(x)).tanh()  # bf16 has no number between 0.996 and 1


class Verdict(NamedTuple):
    """What D says of n images."""

    logits: Tensor  # float32 (n,): of being real
    features: Tensor  # (n, channels, 4, 4): of the last convolution, before any split norm
    classes: Tensor  # float32 (n, K): logits of the breeds; K = 0 without such a head

    def split(self, count: int) -> tuple[Verdict, Verdict]:
        """The verdict on the first `count` images and that on the others."""
        return Verdict(*(t[:count] for t in self)), Verdict(*(t[count:] for t in self))


class MinibatchDiscrimination(nn.Module):
    """How near each image's features lie to the others' of its batch, by which D sees a collapse.

    o(x_i)_b = sum over j of exp(-|M_i,b - M_j,b|_1), M = T f(x), i itself among the j; reals and
    fakes apart, as if they had come in two batches (Salimans et al. 2016, arXiv 1606.03498, section
    3.2). Five numbers to each b, and f pooled, as in the authors' network for CIFAR-10.
    """

    def __init__(self, num_features: int, kernels: int, numbers: int = 5) -> None:
        super().__init__()
        self.kernels = kernels
        self.project = nn.Linear(num_features, kernels * numbers, bias=False)

    def forward(self, f: Tensor, num_real: int) -> Tensor:
        """(N, num_features), the `num_real` reals first; there may be none. float32 (N, kernels)
        of 1 to the number of reals or of fakes."""
        m = widened(self.project(f)).unflatten(1, (self.kernels, -1))
        groups = m.split([num_real, len(m) - num_real])
        # leaky_relu(x, -1) is |x|. For R1: `cdist` has no second derivative, and that of `abs` is a
        # tensor without memory, which torch adds up on another device.
        near = [(-F.leaky_relu(g[:, None] - g, -1.0).sum(3)).exp().sum(1) for g in groups]
        return torch.cat(near)


class Discriminator(nn.Module):
    """Convolutions, split batch norm, leaky ReLU; of breeds, a projection besides.

    Projection: Miyato and Koyama 2018 (arXiv 1802.05637); the classifier: Odena et al. 2017
    (AC-GAN, arXiv 1610.09585); K breeds and "fake" as K + 1 classes: Salimans et al. 2016 (arXiv
    1606.03498, section 5).
    """

    def __init__(
        self,
        width: int = 48,
        layers: str = "deep",
        breeds: int = 0,
        classify: bool = False,
        wide: bool = False,
        classes: int = 0,
        minibatch_features: int = 0,
    ) -> None:
        """`classify`: with a head for the breeds; `wide`: norms in float32; `classes`: so many
        beside "fake" in the place of real and fake; `minibatch_features`: kernels of minibatch
        discrimination."""
        super().__init__()
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        source = 3
        for k, (units, kernel) in enumerate(LAYERS[layers]["D"]):
            target = units * width
            plain = k < LAYERS[layers]["plain"]
            self.convs.append(nn.Conv2d(source, target, kernel, kernel - 2, 1, bias=False))
            self.norms.append(NoNorm() if plain else SplitBatchNorm2d(target, wide=wide))
            source = target
        # Of all of the map, not its mean: split batch norm makes those of reals and fakes alike.
        outputs, self.classes = classes + 1, classes
        self.head = nn.Conv2d(source, outputs, 4)
        if classes:
            nn.init.constant_(self.head.bias[-1:], math.log(classes))  # undecided, not K to 1
        # From 0: D begins as if it were told nothing.
        self.projection = nn.Parameter(torch.zeros(breeds, source)) if breeds else None
        self.classifier = nn.Linear(source, breeds) if classify else None
        self.minibatch = self.likeness = None
        if minibatch_features:
            self.minibatch = MinibatchDiscrimination(source, minibatch_features)
            self.likeness = nn.Parameter(torch.zeros(outputs, minibatch_features))

    def forward(self, images: Tensor, num_real: int, labels: Tensor | None = None) -> Verdict:
        """(N, 3, 64, 64) images in [-1, 1], the `num_real` reals first, and their int64 breeds."""
        x = images
        for conv, norm in zip(self.convs, self.norms):
            features = conv(x)
            x = F.leaky_relu(norm(features, num_real), 0.2, inplace=True)
        said, mean = widened(self.head(x).flatten(1)), x.mean((2, 3))
        if self.minibatch is not None:  # a linear layer on what stands beside the features
            said = said + (self.minibatch(mean, num_real)[:, None] * self.likeness).sum(2)
        if self.classes:  # "fake", the last, is made 0: the logit's sigmoid is the others' share
            classes = said[:, :-1] - said[:, -1:]
            return Verdict(classes.logsumexp(1), features, classes)
        logits = said.flatten()
        if self.projection is not None:
            logits = logits + (F.embedding(labels, self.projection) * mean).sum(1)
        classes = mean[:, :0] if self.classifier is None else self.classifier(mean)
        return Verdict(logits, features, widened(classes))


def dcgan(config: Config, breeds: int) -> tuple[Generator, Discriminator]:
    """G and D of `config`'s layers, for `breeds` breeds."""
    D_width = config.d_width or config.width
    reference = config.batch_size if config.g_norm == "virtual" else 0  # as large as in the paper
    told = breeds if config.conditional else 0
    G = Generator(config.latent_dim, config.width, config.layers, told, reference)
    D = Discriminator(
        D_width,
        config.layers,
        told,
        classify=config.classify > 0 and config.conditional,
        wide=config.r1 > 0,
        classes=breeds if config.condition == "classes" else 0,
        minibatch_features=config.minibatch_features,
    )
    return G, D


NETWORKS: dict[str, Callable[[Config, int], tuple[nn.Module, nn.Module]]] = {
    "deep": dcgan,
    "paper": dcgan,
}  # and "residual", section 6
NORMS = (nn.BatchNorm2d, SplitBatchNorm2d, BreedBatchNorm2d, VirtualBatchNorm2d)


def build_networks(
    config: Config, device: torch.device, breeds: int = 0
) -> tuple[nn.Module, nn.Module]:
    """G and D, of `breeds` breeds if told of them, their weights from `config.seed` anywhere."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        G, D = NETWORKS[config.layers](config, 0 if config.condition == "none" else breeds)
        if config.init_std:  # DCGAN's own: weights N(0, std), norms N(1, std)
            for module in (*G.modules(), *D.modules()):
                if parametrize.is_parametrized(module):
                    continue  # spectral-normed: begun orthogonal
                if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                    nn.init.normal_(module.weight, 0.0, config.init_std)
                elif isinstance(module, NORMS) and module.weight is not None:
                    nn.init.normal_(module.weight, 1.0, config.init_std)
    layout = memory_layout(device)
    return G.to(device, memory_format=layout), D.to(device, memory_format=layout)


def make_generator(shape: dict[str, object]) -> nn.Module:
    """A new G of the kind whose `shape` this is, as in `generator.pt`, with weights of its own."""
    if shape["layers"] == "residual":
        return ResidualGenerator(**{k: v for k, v in shape.items() if k != "layers"})
    return Generator(**shape)


def widened(x: Tensor) -> Tensor:
    """Half-precision numbers as float32; others as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---------------------------------------------------------------------------------------- 3. Losses


class Seen(NamedTuple):
    """All that a loss may read: D's verdicts on the images of one step."""

    images: Tensor  # (N, 3, 64, 64) as D saw them, the reals first
    real: Verdict
    fake: Verdict
    labels: Tensor  # int64 (batch,): breeds of the reals (or UNKNOWN) and, the same, of the fakes
    fakes: Tensor  # (batch, 3, 64, 64) before augmentation
    contrast: Tensor | None  # float32 scalar: the photos' root mean square; None if no term asks
    config: Config
    scale: Tensor | float  # of gradients, so that half precision does not round them to 0


class Term(NamedTuple):
    """A part of a loss, weighed by the field of `Config` that is called like it."""

    loss: Callable[[Seen], Tensor]  # to a float32 scalar; a class is made of the network first
    reads_reals: bool = False  # in G's step: then D is shown the reals there too
    conditional: bool = False  # only where G is told breeds
    lazy: bool = False  # on each `r1_every`-th step alone


def d_margin(seen: Seen) -> Tensor:
    """Logistic loss whose real side is exactly 0, with gradient 0, once sigmoid(logit) > margin.

    real: (1 - s) * max(0, softplus(-l) - softplus(-l_m)) + s * softplus(l), l_m = logit(margin)
    fake: softplus(l)

    The constant makes the floor 0; below the margin the gradient is the logistic loss's own. The
    margin keeps D from over-fitting reals it already knows. With smoothing s > 0 a real past the
    margin is still pushed down by the second term, so that the two work against each other.
    """
    smoothing = seen.config.smoothing
    floor = -math.log(seen.config.margin)  # softplus(-logit(m)) = -log m
    real = (F.softplus(-seen.real.logits) - floor).relu().mean()
    if smoothing:
        real = (1 - smoothing) * real + smoothing * F.softplus(seen.real.logits).mean()
    return real + F.softplus(seen.fake.logits).mean()


def g_logistic(seen: Seen) -> Tensor:
    """The non-saturating loss softplus(-l), Goodfellow et al. 2014; its gradient is never 0."""
    return F.softplus(-seen.fake.logits).mean()


def d_rals(seen: Seen) -> Tensor:
    """Relativistic average least squares (Jolicoeur-Martineau 2018, arXiv 1807.00734).

    (mean (r - mean f - 1)^2 + mean (f - mean r + 1)^2) / 2; 0 only where all reals lie 1 above the
    fakes' mean and all fakes 1 below the reals'.
    """
    real, fake = seen.real.logits, seen.fake.logits
    return ((real - fake.mean() - 1).square().mean() + (fake - real.mean() + 1).square().mean()) / 2


def g_rals(seen: Seen) -> Tensor:
    """`d_rals` with reals and fakes in each other's place; the gradient reaches G by the fakes."""
    return d_rals(seen._replace(real=seen.fake, fake=seen.real))


def g_matching(seen: Seen) -> Tensor:
    """Feature matching, |mean f(real) - mean f(fake)|^2, in the place of an adversarial loss of G
    (Salimans et al. 2016, arXiv 1606.03498, section 3.1).

    f is what D's last convolution gives (the residual D's: activated), each channel at each of
    4 x 4 places, before split norm, which would make the channels' means equal. The gradient is 0
    where both means are equal, whatever the single images are.
    """
    real, fake = (widened(v.features).mean(0) for v in (seen.real, seen.fake))
    return (real - fake).square().sum()


def gradient_penalty(seen: Seen) -> Tensor:
    """R1: the mean over reals of |dD/dx|^2 / 2 (Mescheder et al. 2018, arXiv 1801.04406), where D
    is the sum of the batch's logits, as split norm makes each depend on the others.

    The images' slope is taken of scaled logits, as large as the loss's own: else fp16 makes it 0.
    Where only each n-th step has the penalty it is n times as large there, and in the mean over
    steps the same: lazy regularisation (Karras et al. 2020, arXiv 1912.04958, appendix B).
    """
    total = seen.real.logits.mean() * seen.scale
    (slope,) = torch.autograd.grad(total, seen.images, create_graph=True)
    count = len(seen.real.logits)
    penalty = (slope[:count] * (count / seen.scale)).square().sum() / (2 * count)
    return penalty * seen.config.r1_every


def g_contrast(seen: Seen) -> Tensor:
    """The squared log of the fakes' contrast over the photos': the one thing to which D is blind.

    Leaky ReLU passes a factor of all fakes on, and split batch norm divides it out, so that G, left
    alone, drifts into grey. A bias before D's norms would show it the factor, at the cost of FID.
    """
    return (seen.fakes.square().mean().sqrt() / seen.contrast).log().square()


UNKNOWN = -1  # the breed of a dog that D is not told


def classify_reals(seen: Seen) -> Tensor:
    """Cross-entropy of the breeds, of reals alone: fakes of no clear breed teach nothing.

    The mean over those whose breed is known, and 0 where it is of none.
    """
    known = (seen.labels != UNKNOWN).sum().clamp(min=1)
    classes = seen.real.classes
    return F.cross_entropy(classes, seen.labels, ignore_index=UNKNOWN, reduction="sum") / known


def classify_fakes(seen: Seen) -> Tensor:
    """Cross-entropy of the breeds that the fakes were drawn as."""
    return F.cross_entropy(seen.fake.classes, seen.labels)


class HistoricalAverage(nn.Module):
    """|theta - mean of theta[1] ... theta[t]|^2 over all weights of a network, t being now.

    A pull back to where the weights have been, so that two players do not circle each other
    (Salimans et al. 2016, arXiv 1606.03498, section 3.3). The mean is no part of the gradient.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.weights = list(network.parameters())  # in a list: they stay the network's own
        count = torch.zeros((), dtype=torch.int64, device=self.weights[0].device)
        self.register_buffer("count", count)
        for k, weight in enumerate(self.weights):
            self.register_buffer(f"mean_{k}", weight.detach().clone())

    def forward(self, seen: Seen) -> Tensor:
        """Takes the weights of now in, then tells; nothing is read of `seen`."""
        means = [self.get_buffer(f"mean_{k}") for k in range(len(self.weights))]
        with torch.no_grad():
            self.count += 1
            share = 1 / self.count
            for mean, weight in zip(means, self.weights):
                mean.lerp_(weight, share)
        gaps = [(weight - mean).square().sum() for weight, mean in zip(self.weights, means)]
        return torch.stack(gaps).sum()


ADVERSARIAL = {  # `--loss`: the term of D and that of G, of weight 1
    "margin": (Term(d_margin), Term(g_logistic)),
    "rals": (Term(d_rals), Term(g_rals, reads_reals=True)),
    "matching": (Term(d_margin), Term(g_matching, reads_reals=True)),
}
D_TERMS = {
    "r1": Term(gradient_penalty, lazy=True),
    "classify": Term(classify_reals),
    "history": Term(HistoricalAverage),
}
G_TERMS = {
    "classify": Term(classify_fakes, conditional=True),
    "contrast": Term(g_contrast),
    "history": Term(HistoricalAverage),
}


class Objective(NamedTuple):
    """The weighed terms of one network's loss, the adversarial one first."""

    terms: dict[str, Term]
    weights: list[float]

    @property
    def reads_reals(self) -> bool:
        """Whether any term does."""
        return any(term.reads_reals for term in self.terms.values())

    def __call__(self, seen: Seen, lazy: bool = True) -> tuple[Tensor, list[Tensor]]:
        """The weighed sum, and each term's value without its weight; of a lazy one 0 where this is
        no step for it."""
        values = [
            term.loss(seen) if lazy or not term.lazy else seen.images.new_zeros(())
            for term in self.terms.values()
        ]
        return sum(weight * value for weight, value in zip(self.weights, values)), values

    def state_dict(self) -> dict[str, Tensor]:
        """What its terms remember from step to step, by name."""
        kept = {k: term.loss for k, term in self.terms.items() if isinstance(term.loss, nn.Module)}
        return {f"{k}.{name}": t for k, m in kept.items() for name, t in m.state_dict().items()}


def objectives(config: Config, G: nn.Module, D: nn.Module) -> tuple[Objective, Objective]:
    """What D and what G minimise under `config`."""
    chosen = []
    for letter, network, first, more in zip(
        "dg", (D, G), ADVERSARIAL[config.loss], (D_TERMS, G_TERMS)
    ):
        terms, weights = {f"{letter}_loss": first}, [1.0]
        for name, term in more.items():
            if getattr(config, name) and (config.conditional or not term.conditional):
                if isinstance(term.loss, type):  # a term with state
                    term = term._replace(loss=term.loss(network))
                terms[f"{letter}_{name}"] = term
                weights.append(getattr(config, name))
        chosen.append(Objective(terms, weights))
    return chosen[0], chosen[1]


def logit(probability: float) -> float:
    """log(p / (1 - p)); inf for 1."""
    return math.inf if probability >= 1 else math.log(probability / (1 - probability))


# -------------------------------------------------------------------------------------- 4. One step

# The augmentations are differentiable, for reals and fakes alike, in D's step and in G's, drawn
# anew for every image: Zhao et al. 2020 (DiffAugment, arXiv 2006.10738). Each maps float32
# (N, 3, 64, 64) to the same.


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


AUGMENTS: dict[str, Callable[[Tensor, torch.Generator | None], Tensor]] = {
    "color": augment_color,
    "translation": augment_translation,
    "cutout": augment_cutout,
}


class Batches:
    """Reals, their breeds and latents, drawn on the device; each dog once an epoch."""

    def __init__(self, crops: CropSet, config: Config, rng: torch.Generator | None) -> None:
        """`crops` on the device of the networks, as is `rng`."""
        self.crops, self.config, self.rng = crops, config, rng
        device, dogs = crops.pixels.device, len(crops.first)
        self.order = torch.arange(dogs, device=device)
        self.cursor = torch.zeros((), dtype=torch.int64, device=device)
        # The same dogs in every part of a run, and all that a smaller share holds in a larger one.
        chance = torch.Generator().manual_seed(seed_for(config.seed, "labelled"))
        known = torch.rand(dogs, generator=chance) < config.labelled
        self.breed = torch.where(known.to(device), crops.breed, UNKNOWN)
        self.steps_per_epoch = max(1, dogs // config.batch_size)

    def shuffle(self) -> None:
        """Begin an epoch."""
        device = self.order.device
        self.order.copy_(torch.randperm(len(self.order), generator=self.rng, device=device))
        self.cursor.zero_()

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """float32 (B, 3, 64, 64) reals in [-1, 1], int64 (B,) breeds or `UNKNOWN`, float32
        (B, latent_dim) z."""
        config, device = self.config, self.order.device
        places = self.cursor + torch.arange(config.batch_size, device=device)
        rows = self.order[places % len(self.order)]
        self.cursor += config.batch_size
        reals = draw_reals(self.crops, rows, self.rng, config.mirror)
        if config.noise:  # (Soenderby et al. 2017, arXiv 1610.04490)
            reals = reals + config.noise * torch.rand(
                reals.shape, generator=self.rng, device=device
            )
        z = torch.randn(config.batch_size, config.latent_dim, generator=self.rng, device=device)
        return reals, self.breed[rows], z


def draw_reals(
    crops: CropSet, rows: Tensor, generator: torch.Generator | None, mirror: float = 0.5
) -> Tensor:
    """One view of each dog in `rows`, its kind drawn anew, a share of `mirror` mirrored.

    `rows`: int64 (B,). Returns float32 (B, 3, 64, 64) in [-1, 1], channels last in memory.
    """
    chance = torch.rand((3, len(rows)), generator=generator, device=rows.device)
    kind = torch.bucketize(chance[0], crops.weights.cumsum(0)[:-1], right=True)
    view = (chance[1] * crops.count[rows, kind]).long() + crops.first[rows, kind]
    pixels = crops.pixels[view].permute(0, 3, 1, 2)
    mirrored = (chance[2] < mirror)[:, None, None, None]
    return torch.where(mirrored, pixels.flip(3), pixels).float().div(127.5).sub(1)


def contrast_of(crops: CropSet) -> Tensor:
    """The root mean square of a thousand or two of the views, in [-1, 1]; float32 scalar."""
    some = crops.pixels[:: max(1, len(crops.pixels) // 1024)]
    return some.float().div(127.5).sub(1).square().mean().sqrt()


class TrainingStep:
    """G, D, their optimisers, and one update of both, on one device.

    The same code runs eagerly or captured as a CUDA graph (`capture`): nothing in it waits for the
    device, and everything that it changes is a tensor that stays where it is.
    """

    def __init__(self, config: Config, crops: CropSet, device: torch.device) -> None:
        self.config, self.device, self.crops = config, device, crops.to(device)
        self.G, self.D = build_networks(config, device, len(crops.breeds))
        self.d_objective, self.g_objective = objectives(config, self.G, self.D)
        self.opt_g = make_adam(self.G, config.g_lr, config)
        self.opt_d = make_adam(self.D, config.d_lr, config)
        self.contrast = contrast_of(self.crops) if config.contrast else None
        self.layout, self.augments = memory_layout(device), parse_augment(config.augment)
        self.augmenting = torch.ones((), dtype=torch.bool, device=device)  # from their start on
        self.precision = choose_precision(config.precision, device)
        self.loss_scale = torch.full((), 65536.0, device=device)  # used with fp16 alone
        self.rng = torch.Generator(device if device.type == "cuda" else "cpu")
        self.rng.manual_seed(config.seed)
        self.batches = Batches(self.crops, config, self.rng)
        self.kinds = (True, False) if config.r1_every > 1 else (True,)  # of step: lazy or not
        self.stats = (*self.d_objective.terms, *self.g_objective.terms, *D_OUTPUTS)
        self.sums = torch.zeros(len(self.stats), device=device)

    def one_step(self, lazy: bool = True) -> None:
        """One update of D and one of G; `lazy`: with the terms that not every step has.

        What is trained stands in the registries, not here.
        """
        reals, labels, z = self.batches.draw()
        with self.autocast():
            fakes = self.G(z, labels)  # one forward serves both steps
            seen = self.show(reals, fakes.detach(), labels)
            d_loss, d_values = self.d_objective(seen, lazy)
        update(self.opt_d, d_loss, self.scale)
        with self.autocast():  # anew: autocast remembers the weights from before the update
            again = reals if self.g_objective.reads_reals else reals[:0]
            g_loss, g_values = self.g_objective(self.show(again, fakes, labels))
        update(self.opt_g, g_loss, self.scale)
        sure = self.config.margin if self.config.margin < 1 else 0.8  # without one: that of dogs
        past = (seen.real.logits > logit(sure)).float().mean()
        outputs = [seen.real.logits.mean(), seen.fake.logits.mean(), past]
        self.sums += torch.stack([*d_values, *g_values, *outputs]).detach()

    def show(self, reals: Tensor, fakes: Tensor, labels: Tensor) -> Seen:
        """D's verdicts on both, augmented; there may be no reals."""
        images = plain = torch.cat([reals, fakes])
        with self.autocast(False):  # a shift is exact in float32 alone
            for name in self.augments:
                images = AUGMENTS[name](images, self.rng)
        if self.config.augment_start:  # a captured step cannot leave them out
            images = torch.where(self.augmenting, images, plain)
        images = images.contiguous(memory_format=self.layout).requires_grad_()
        told = torch.cat([labels[: len(reals)], labels])
        real, fake = self.D(images, len(reals), told).split(len(reals))
        scale = 1.0 if self.scale is None else self.scale
        return Seen(images, real, fake, labels, fakes, self.contrast, self.config, scale)

    def autocast(self, wanted: bool = True) -> torch.autocast:
        """The context in which networks compute in this run's precision; else float32."""
        dtype = PRECISIONS[self.precision]
        kind = "cuda" if self.device.type == "cuda" else "cpu"
        return torch.autocast(kind, dtype, enabled=wanted and dtype is not None)

    @property
    def scale(self) -> Tensor | None:
        """The factor of a loss that keeps half-precision gradients off 0; only fp16 needs one."""
        return self.loss_scale if self.precision == "fp16" else None


D_OUTPUTS = ("d_real", "d_fake", "past_margin")  # D's mean logits; the share of reals past it


def update(adam: torch.optim.Adam, loss: Tensor, scale: Tensor | None = None) -> None:
    """One Adam step on `loss`; `autograd.grad` leaves the other network's weights alone.

    `scale`: a factor of the loss that fused Adam divides out of the gradients. Where they overflow
    the step is skipped and the scale halved; else it grows, twofold in 2,000 calls.
    """
    group = adam.param_groups[0]
    parameters = group["params"]
    gradients = torch.autograd.grad(
        loss if scale is None else loss * scale,
        parameters,
        allow_unused=True,  # a head that no term reads
        materialize_grads=True,
    )
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = laid_out_like(gradient, parameter)
    if scale is None:
        adam.step()
        return
    finite = torch.stack(torch._foreach_norm(gradients)).isfinite().all()
    if group["fused"]:
        adam.grad_scale, adam.found_inf = scale, (~finite).float()
        adam.step()
    elif finite:  # waits for the device; only where fused Adam does not work
        torch._foreach_div_([p.grad for p in parameters], scale)
        adam.step()
    scale.mul_(0.5 + finite * (2 ** (1 / 2000) - 0.5))  # no `where`: it would copy from the host


# -------------------------------------------------------------------------------------- 5. Averages


class Averages:
    """The EMA and, late, the equal-weight SWA of G's parameters; norms are estimated afterwards.

    SWA: Izmailov et al. 2018 (arXiv 1803.05407); of a GAN's G: Yazici et al. 2019 (arXiv
    1806.04498).
    """

    def __init__(self, G: nn.Module) -> None:
        self.ema = [p.detach().clone() for p in G.parameters()]
        self.swa = [p.detach().clone() for p in G.parameters()]
        self.ema_updates = self.swa_updates = 0

    @torch.no_grad()
    def update(self, G: nn.Module, progress: float, config: Config) -> None:
        """Take in G as it is now, `average_every` steps after the last time."""
        weights = list(G.parameters())
        self.ema_updates += 1
        # Early on an average over the last tenth of the updates: no trace of the initial weights.
        warm = (1 + self.ema_updates) / (10 + self.ema_updates)
        beta = stepped_beta(progress) if config.ema_schedule == "stepped" else config.ema_beta
        torch._foreach_lerp_(self.ema, weights, 1 - min(beta**config.average_every, warm))
        if progress >= config.swa_start:
            self.swa_updates += 1
            torch._foreach_lerp_(self.swa, weights, 1 / self.swa_updates)

    def choose(self, average: str) -> str:
        """Which weights are submitted, by a rule that needs no look at the images.

        `average` says it; but SWA only from 10 snapshots on (until then the EMA stands in), and the
        EMA only from its first update on (until then the raw weights do).
        """
        if average == "swa" and self.swa_updates < 10:
            average = "ema"
        return "none" if average == "ema" and self.ema_updates == 0 else average

    @torch.no_grad()
    def generator(self, like: nn.Module, choice: str, batches: int, config: Config) -> nn.Module:
        """A copy of G with the weights of `choice`, its norms estimated over `batches`, in eval."""
        G = copy.deepcopy(like)
        weights = {"swa": self.swa, "ema": self.ema, "none": list(like.parameters())}[choice]
        for target, source in zip(G.parameters(), weights, strict=True):
            target.copy_(source)
        return estimate_norms(G, batches, config.seed, config.truncation)


WEIGHTS = {"swa": "SWA generator", "ema": "EMA generator", "none": "raw generator"}


def stepped_beta(progress: float) -> float:
    """An EMA's decay that rises at epochs 200, 300 and 400 of 620, as first-public's did."""
    return 1 - 0.1 ** (1 + sum(progress >= epoch / 620 for epoch in (200, 300, 400)))


def estimate_norms(G: nn.Module, batches: int, seed: int, truncation: float = 0.0) -> nn.Module:
    """Re-estimate G's batch-norm statistics over `batches` x 128 latents; returns it in eval mode.

    Averaged weights have no statistics of their own: those of any single G are wrong for them
    (Izmailov et al. 2018, section 3.2). Cumulative means, as PreciseBN (arXiv 2105.07576).
    """
    device = next(G.parameters()).device
    norms = [module for module in G.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    settle(G)
    if not norms:  # virtual batch norm keeps no statistics
        return G.eval()
    latents = draw_latents(
        batches * SAMPLE_BATCH, G.latent_dim, seed_for(seed, "norms"), truncation
    )
    labels = draw_labels(G, len(latents), seed)
    with full_precision(), torch.no_grad():
        for z, label in in_batches(latents, labels):
            G(z.to(device), label.to(device))
    return G.eval()


# ------------------------------------------------------------------------- 6. The residual networks

# The residual pair: a small BigGAN (Brock et al. 2019, arXiv 1809.11096), as the competition's
# second place made it: no convolution and no linear layer has a bias, and their weights, as those
# of D's embedding, are spectral-normed.


def spectral(layer: nn.Module) -> nn.Module:
    """`layer`, its weight begun orthogonal and from now on divided by its largest singular value.

    Spectral norm: Miyato et al. 2018 (arXiv 1802.05957). One power iteration in each forward in
    training mode, whose vectors are buffers that change in place.
    """
    nn.init.orthogonal_(layer.weight)
    return spectral_norm(layer)


@contextmanager
def spectral_weights(network: nn.Module) -> Iterator[None]:
    """Compute each spectral-normed weight once, for the forward inside, and in float32.

    Autocast would take the power iteration's products in half precision, whose rounding (0.4 % in
    bf16) would stand in every weight, and in which torch's spectral norm fails on a GPU.
    """
    kind = "cuda" if next(network.parameters()).is_cuda else "cpu"
    with parametrize.cached():
        with torch.autocast(kind, enabled=False):
            for module in network.modules():
                if parametrize.is_parametrized(module):
                    module.weight  # noqa: B018 (read, and so cached)
        yield


def settle(network: nn.Module, rounds: int = 200) -> None:
    """Find the spectral norms of weights that were just put there, then keep them as they are.

    The power iteration's vectors are those of the weights that were trained; those of an average
    are others. Leaves `network` in training mode, but for them.
    """
    network.train()
    with torch.no_grad():
        for _ in range(rounds):
            with spectral_weights(network):
                pass
    for module in network.modules():
        if parametrize.is_parametrized(module):
            module.parametrizations.eval()


class LatentBatchNorm2d(nn.Module):
    """Batch norm whose gain and bias are a linear map of a code: a piece of z, and the breed's."""

    def __init__(self, num_features: int, code_dim: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(num_features, affine=False)
        self.affine = spectral(nn.Linear(code_dim, 2 * num_features, bias=False))

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        """`x`: (N, num_features, H, W), `code`: (N, code_dim); the gain is 1 + what is mapped."""
        gain, bias = self.affine(code)[:, :, None, None].chunk(2, 1)
        return torch.addcmul(bias, self.norm(x), 1 + gain)


class NonLocalBlock(nn.Module):
    """Each place of an image looks at all others (Zhang et al. 2019, SAGAN, arXiv 1805.08318).

    Of each 2 x 2 places it sees the largest key and value, as in BigGAN. The gain begins at 0, and
    with it the block as the identity. Two products, not torch's fused attention: its kernels on a
    GPU have no second derivative, which R1 needs.
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
        """(N, channels, H, W) to the same, of even H and W."""
        query = self.query(x).flatten(2)  # (N, keys, HW)
        key, value = (F.max_pool2d(conv(x), 2).flatten(2) for conv in (self.key, self.value))
        attention = (query.mT @ key).softmax(2)  # (N, HW, HW / 4)
        seen = (attention @ value.mT).mT.unflatten(2, x.shape[2:])  # channels last in memory
        seen = seen.contiguous() if x.is_contiguous() else seen
        return x + self.gain * self.out(seen)


class UpBlock(nn.Module):
    """A residual block that doubles the side, by repeating each place."""

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
        # A 1 x 1 convolution before the doubling is that after it, for a quarter of the work.
        return h + F.interpolate(self.shortcut(x), scale_factor=2.0)


class DownBlock(nn.Module):
    """A residual block that halves the side, by means of 2 x 2 places."""

    def __init__(self, source: int, target: int, first: bool = False) -> None:
        """`first`: of an image, which no ReLU may cut."""
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
    """G of the second place: blocks up to 512, 256, 128 and 64 channels at width 64.

    z is split into five pieces. The first is mapped to 4 x 4 places; each other one, beside an
    embedding of the breed, is the code of a block's norms. The slides' "Embedding 32 * 4" is one
    embedding of 32 numbers, given to all four blocks, as BigGAN shares it and as the author's
    notebook does.
    """

    EMBEDDING = 32

    def __init__(self, latent_dim: int = 100, width: int = 64, breeds: int = 0) -> None:
        """`latent_dim`: 5 at least. `breeds`: how many it is conditioned on; 0 = none."""
        super().__init__()
        self.shape = {
            "latent_dim": latent_dim, "width": width, "layers": "residual", "breeds": breeds,
        }  # fmt: skip
        self.latent_dim, self.breeds = latent_dim, breeds
        self.register_buffer("frequency", torch.full((breeds,), 1 / max(1, breeds)))
        self.embedding = nn.Embedding(breeds, self.EMBEDDING) if breeds else None
        if breeds:
            nn.init.orthogonal_(self.embedding.weight)
        first, *pieces = (len(piece) for piece in torch.empty(latent_dim).tensor_split(5))
        self.linear = spectral(nn.Linear(first, 8 * width * 16, bias=False))
        self.blocks = nn.ModuleList()
        for source, target, piece in zip((8, 8, 4, 2), (8, 4, 2, 1), pieces):
            code_dim = piece + self.EMBEDDING * bool(breeds)
            self.blocks.append(UpBlock(source * width, target * width, code_dim))
        self.non_local = NonLocalBlock(2 * width)
        self.norm = nn.BatchNorm2d(width)
        self.to_rgb = spectral(nn.Conv2d(width, 3, 3, padding=1, bias=False))

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """As `Generator`: (N, latent_dim) to float32 (N, 3, 64, 64) images in [-1, 1]."""
        if labels is None and self.breeds:
            raise ValueError(f"a generator of {self.breeds} breeds needs labels")
        first, *codes = z.tensor_split(5, dim=1)
        if self.breeds:
            breed = self.embedding(labels)
            codes = [torch.cat([piece, breed], 1) for piece in codes]
        with spectral_weights(self):
            x = self.linear(first).unflatten(1, (-1, 4, 4))
            for block, code in zip(self.blocks, codes):
                x = block(x, code)
                if x.shape[-1] == 32:
                    x = self.non_local(x)
            return widened(self.to_rgb(F.relu(self.norm(x), inplace=True))).tanh()


class ResidualDiscriminator(nn.Module):
    """D of the second place: four halving blocks of 64, 128, 256 and 512 channels, sum pooling.

    Real or not is a linear head and the projection of the breed (Miyato and Koyama 2018, arXiv
    1802.05637). The projection's embedding is normed too, as in the author's notebook and BigGAN:
    the slides leave out G's alone.
    """

    def __init__(self, width: int = 64, breeds: int = 0, classify: bool = False) -> None:
        """`classify`: with a head for the breeds."""
        super().__init__()
        self.blocks = nn.ModuleList()
        for source, target in ((0, 1), (1, 2), (2, 4), (4, 8)):
            self.blocks.append(DownBlock(source * width or 3, target * width, first=not source))
        self.non_local = NonLocalBlock(width)
        self.head = spectral(nn.Linear(8 * width, 1, bias=False))
        self.projection = spectral(nn.Embedding(breeds, 8 * width)) if breeds else None
        self.classifier = spectral(nn.Linear(8 * width, breeds, bias=False)) if classify else None

    def forward(self, images: Tensor, num_real: int, labels: Tensor | None = None) -> Verdict:
        """(N, 3, 64, 64) images and their int64 breeds; which are real is nothing to it."""
        with spectral_weights(self):
            x = images
            for block in self.blocks:
                x = block(x)
                if x.shape[-1] == 32:
                    x = self.non_local(x)
            x = F.relu(x)
            pooled = widened(x).sum((2, 3))
            # Logits of sums over 16 places, told apart by 1: half precision is too coarse.
            with torch.autocast("cuda" if x.is_cuda else "cpu", enabled=False):
                logits = self.head(pooled).flatten()
                if self.projection is not None:
                    logits = logits + (self.projection(labels) * pooled).sum(1)
                classes = pooled[:, :0] if self.classifier is None else self.classifier(pooled)
            return Verdict(logits, x, classes)


def residual(config: Config, breeds: int) -> tuple[ResidualGenerator, ResidualDiscriminator]:
    """The residual G and D, for `breeds` breeds; 0 = told of none."""
    G = ResidualGenerator(config.latent_dim, config.width, breeds)
    return G, ResidualDiscriminator(config.d_width or config.width, breeds, config.classify > 0)


NETWORKS["residual"] = residual


# ---------------------------------------------------------------------------- 7. Data: finding dogs


class BadItem(Exception):
    """A picture, annotation or box that is left out; the text is the reason it is counted under."""


DAMAGE = (  # what zipfile, tarfile, Pillow and torch raise for damaged files
    OSError, RuntimeError, ValueError, SyntaxError, TypeError, EOFError, LookupError,
    AttributeError, ArithmeticError, struct.error, zlib.error, lzma.LZMAError,
    zipfile.BadZipFile, tarfile.TarError,
)  # fmt: skip


@contextmanager
def counted_as(reason: str) -> Iterator[None]:
    """Every file from outside is read inside this: damage becomes one `BadItem`."""
    try:
        yield
    except Image.DecompressionBombError as error:
        raise BadItem("picture with too many pixels") from error
    except DAMAGE as error:
        raise BadItem(reason) from error


LARGEST_FILE = 64 << 20  # bytes; a larger picture is a mistake or an attack


class Entry(NamedTuple):
    """A file in a folder or an archive."""

    path: str  # with forward slashes; its first part is the name of the folder or archive
    size: int  # bytes, as the folder or archive claims
    stamp: int  # modification time in ns, of the file or of its archive
    open: Callable[[], IO[bytes]]
    label: str = ""  # its class, if the set has a file of labels

    def read(self) -> bytes:
        """Its bytes, no more than it claims. Raises `BadItem` if it is too large or damaged."""
        if self.size > LARGEST_FILE:
            raise BadItem("file larger than 64 MB")
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
PICTURE_PLACES = ("images", "all-dogs")  # names of a set's halves: folder, .zip or .tar
ANNOTATION_PLACES = ("annotation", "annotations")


def is_litter(name: str) -> bool:
    """Whether a file or folder was made by the system, not by the user."""
    return name.startswith((".", "__MACOSX"))


def folder_entries(place: Path) -> Iterator[Entry]:
    """The files of a folder and of those below. Links are followed, to each folder once."""
    top, seen = os.path.basename(os.path.abspath(place)), set()
    for folder, inner, names in os.walk(place, followlinks=True):
        results = {"samples", "progress.webp"} if "log.jsonl" in names else set()  # of a run here
        if (real := os.path.realpath(folder)) in seen:
            inner.clear()
            continue
        seen.add(real)
        inner[:] = sorted(set(inner) - results)
        for file in (Path(folder, name) for name in set(names) - results):
            if file.is_file():  # no dead link
                path, status = Path(top, file.relative_to(place)).as_posix(), file.stat()
                yield Entry(path, status.st_size, status.st_mtime_ns, partial(file.open, "rb"))


def archive_entries(place: Path) -> Iterator[Entry]:
    """The members of a zip or an uncompressed tar."""

    def open_zipped(info: zipfile.ZipInfo) -> IO[bytes]:
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError("zipfile unpacks this method without a limit")
        return archive.open(info)  # a member that holds more than it claims fails its checksum

    def open_tarred(info: tarfile.TarInfo) -> IO[bytes]:
        file = place.open("rb")  # one for each member: threads do not share a position
        file.seek(info.offset_data)
        return file

    if zipfile.is_zipfile(place):
        archive = zipfile.ZipFile(place)
        zipped = (i for i in archive.infolist() if not i.is_dir())
        members = [(i.filename, i.file_size, partial(open_zipped, i)) for i in zipped]
    else:
        members = []
        with tarfile.open(place, "r:") as archive:
            for i in archive:
                if i.size < 0:
                    raise ValueError("a member of negative size")  # older Pythons loop on it
                if i.isreg():
                    members.append((i.name, i.size, partial(open_tarred, i)))
    stamp = place.stat().st_mtime_ns
    for name, size, opened in members:
        yield Entry(f"{place.stem}/{name.removeprefix('./')}", size, stamp, opened)


IDX_SUFFIXES = ("idx3-ubyte", "idx3-ubyte.gz")
LARGEST_IDX = 1 << 30  # bytes; MNIST's 60,000 pictures are 47 MB


def read_idx(place: Path, dimensions: int) -> np.ndarray:
    """The uint8 array of an IDX file (yann.lecun.com/exdb/mnist). Raises one of `DAMAGE`."""
    with gzip.open(place) if place.suffix == ".gz" else place.open("rb") as file:
        magic, *shape = struct.unpack(f">{1 + dimensions}I", file.read(4 + 4 * dimensions))
        if magic != 0x800 + dimensions or math.prod(shape) > LARGEST_IDX:
            raise ValueError(f"not IDX of bytes in {dimensions} dimensions, or over 1 GB")
        return np.frombuffer(file.read(math.prod(shape)), np.uint8).reshape(shape)


def idx_entries(place: Path) -> Iterator[Entry]:
    """The grey pictures of an IDX file as PGM, with the labels of the file beside it if any."""
    pictures = read_idx(place, 3)
    stamp = zlib.crc32(pictures)  # not the time: sets of this form have equal names and sizes
    beside = place.with_name(place.name.replace("images-idx3", "labels-idx1"))
    labels = read_idx(beside, 1) if beside.exists() else ["dog"] * len(pictures)
    if len(labels) != len(pictures):
        raise ValueError(f"{len(pictures)} pictures, but {len(labels)} labels in {beside.name}")
    for k, (pixels, label) in enumerate(zip(pictures, labels)):
        data = b"P5 %d %d 255\n" % pixels.shape[::-1] + pixels.tobytes()
        path = f"{place.name}/{k:06d}.pgm"
        yield Entry(path, len(data), stamp, partial(io.BytesIO, data), str(label))


def list_files(place: Path) -> list[Entry]:
    """All files of a folder, zip, uncompressed tar or IDX file, sorted; nothing is unpacked.

    The system's own files are left out. Raises `UserError` if `place` cannot be read.
    """
    try:
        file_entries = idx_entries if place.name.endswith(IDX_SUFFIXES) else archive_entries
        entries = folder_entries(place) if place.is_dir() else file_entries(place)
        shown = [e for e in entries if not any(map(is_litter, e.path.split("/")[1:]))]
    except DAMAGE as error:
        raise UserError(
            f"{place} cannot be read as a folder, zip, uncompressed tar or IDX file ({error}): give"
            " another."
        ) from error
    return sorted(shown, key=lambda entry: entry.path)


def find_set(folder: Path, levels: int) -> list[Path]:
    """Pictures and annotations of the first set at most `levels` below, the shallowest first; []
    if there is none."""

    def half(found: list[Path], names: tuple[str, ...]) -> list[Path]:
        kinds = {name + suffix for name in names for suffix in ("", ".zip", ".tar")}
        return [p for p in found if p.name.lower() in kinds][:1]

    level = [folder]
    for _ in range(levels + 1):
        below = [sorted(p for p in c.glob("*") if not is_litter(p.name)) for c in level]
        for found in below:
            pictures, annotations = half(found, PICTURE_PLACES), half(found, ANNOTATION_PLACES)
            if pictures and annotations:
                return pictures + annotations
        level = sorted(filter(os.path.isdir, chain(*below)))
    return []


def find_idx(folder: Path) -> list[Path]:
    """The IDX file of pictures in a folder, the one to train on before the one to test on."""
    found = [p for p in folder.glob("*") if p.name.endswith(IDX_SUFFIXES) and not is_litter(p.name)]
    return sorted(found, key=lambda p: ("train" not in p.name, p.name))[:1]


def match_photos(
    pictures: list[Entry], annotations: dict[str, dict[str, Entry]]
) -> tuple[list[Photo], list[tuple[str, str]]]:
    """Pair pictures with annotations of the same stem; returns (name, reason) for the rest too.

    `annotations`: by stem, then by folder. That folder is the breed, since Kaggle's flat form has
    no other. If several breeds use one stem, the folder of the picture decides.
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
        photos.setdefault(name, Photo(name, breed, picture, named[breed]))  # given twice: one dog
    skipped += [("/".join(pair), "annotation without picture") for pair in sorted(left)]
    return list(photos.values()), skipped


def find_photos(paths: Sequence[str | Path] = ()) -> PhotoSet:
    """The photos of Stanford Dogs in `paths`, else on Kaggle's mounts, else in `data/`.

    A path is a folder that holds the set in any of its published forms (folders, Kaggle's flat
    form, two zips, the two official tars), an archive, a folder of pictures or of class folders, or
    IDX files (MNIST). Without annotations each picture is one whole dog, and its class is its label
    or the name of its folder, as in torchvision's `ImageFolder`; pictures of one folder alone are
    one class. Raises `UserError` if there are no dogs.
    """
    places = [p for path in map(Path, paths) for p in find_set(path, 4) or find_idx(path) or [path]]
    if not paths:
        beside = [Path(__file__).resolve().parent / "data"] if "__file__" in globals() else []
        searches = ((Path("/kaggle/input"), 4), (Path("data"), 0), *((p, 0) for p in beside))
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
        elif {"annotation", "annotations"} & set(folder.lower().split("/")):
            named = annotations.setdefault(name.removesuffix(".xml"), {})
            named.setdefault(Path(folder).name, entry)  # a set given twice counts once
    where = " and ".join(map(str, places))
    if not pictures:
        raise UserError(f"no pictures of dogs in {where}: give another --data.")
    if annotations:
        return PhotoSet(where, *match_photos(pictures, annotations), annotated=True)
    folders = [Path(picture.path).parent.name for picture in pictures]
    if len(set(folders)) == 1:
        folders = ["dog"] * len(pictures)
    photos = [Photo(p.path, p.label or folder, p, None) for p, folder in zip(pictures, folders)]
    classes = len({photo.breed for photo in photos})
    counted = "one class" if classes == 1 else f"{classes} classes"
    where += f" (no annotations: whole pictures, {counted})"
    return PhotoSet(where, photos, [], annotated=False)


# -------------------------------------------------------------------- 8. Data: reading and cropping

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels, right and bottom out
LARGEST_PICTURE = 32_000_000  # pixels to decode, 12 bytes each on the way: 400 MB in each thread
LARGEST_ANNOTATION = 64 << 10  # bytes; Stanford's largest has 4 kB
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
TURNS = {  # EXIF's orientation: what makes such a picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip


def check_pixels(picture: Image.Image) -> None:
    """Raises `BadItem` if decoding would take too much memory."""
    if math.prod(picture.size) > LARGEST_PICTURE:
        raise BadItem("picture with too many pixels")


def open_picture(data: bytes) -> Image.Image:
    """A picture of an encoded file. A JPEG is not decoded yet, so that `decode_picture` can do that
    at a fraction of its size. Raises `BadItem`."""
    with counted_as("damaged or not a picture"):
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
        scaled = picture.format in ("JPEG", "MPO")  # libjpeg holds a progressive one in full
        if not scaled or "progressive" in picture.info:
            check_pixels(picture)
        if not scaled:
            picture.load()  # before EXIF is read: a PNG may hold it at its end
    return picture


def orientation(picture: Image.Image) -> int:
    """EXIF's orientation, 1 to 8; 1 if there is none or it is damaged; 5 and more: on its side.

    Pillow's `exif_transpose` writes the EXIF block anew, which fails for some that can be read.
    """
    try:
        stated = picture.getexif().get(0x0112)
        return stated if stated in TURNS and picture.format != "TIFF" else 1  # Pillow turns TIFFs
    except DAMAGE:
        return 1


def decode_picture(picture: Image.Image, shrink: int = 1, upright: bool = True) -> Image.Image:
    """Decode an opened picture to RGB; a JPEG at 1/`shrink` (1, 2, 4, 8) by its DCT scaling.

    `upright`: turned as EXIF says. Transparency is laid on white, and of 16-bit grey the high byte
    counts. Raises `BadItem` if the picture is damaged or too large.
    """
    with counted_as("damaged or not a picture"):
        picture.draft("RGB", (picture.width // shrink, picture.height // shrink))
        check_pixels(picture)
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


class NoDoctype(ElementTree.TreeBuilder):
    """Refuses the declaration that entity bombs need."""

    def doctype(self, name: str, pubid: str, system: str) -> None:
        """Raises `BadItem`."""
        raise BadItem("annotation with a DOCTYPE")


def parse_annotation(xml: bytes) -> list[Box]:
    """The boxes of an annotation. Raises `BadItem` if it is broken, hostile or too large."""
    if len(xml) > LARGEST_ANNOTATION:
        raise BadItem("annotation larger than 64 kB")
    with counted_as("broken annotation"):
        root = ElementTree.fromstring(xml, ElementTree.XMLParser(target=NoDoctype()))
        corners = ("xmin", "ymin", "xmax", "ymax")
        return [tuple(float(box.findtext(c)) for c in corners) for box in root.iter("bndbox")]


def clip_box(box: Box, width: int, height: int) -> Box:
    """The part of a box inside the frame. Raises `BadItem` if that is under a pixel wide or high,
    or the box is reversed."""
    left, top, right, bottom = box
    if right < left or bottom < top:
        raise BadItem("reversed box")
    left, top, right, bottom = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
    if not (right - left >= 1 and bottom - top >= 1):  # so that nan is refused too
        raise BadItem("empty box or one outside the picture")
    return (left, top, right, bottom)


def open_photo(photo: Photo) -> tuple[Image.Image, tuple[int, int], list[Box], list[str]]:
    """A photo, not yet decoded; width and height of its frame; the boxes of its dogs inside the
    frame; why other boxes are left out. Raises `BadItem` if there is no good box.

    Boxes of Stanford Dogs were drawn on the pictures as they are stored. A photo without annotation
    is turned upright, and its box is the whole frame.
    """
    picture = open_picture(photo.picture.read())
    if photo.annotation is None:
        frame = picture.size[::-1] if orientation(picture) >= 5 else picture.size
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
    """The largest square centred on the box that fits the frame, grown away from the edge that it
    touches: on each side by 0.28 of the least room that it has on the three other sides.

    "Crop manner from Wu Qi" in Morxrc's notebook (see `first-public`), which says it in four cases.
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
    """The crops of every dog in a photo, and the reasons for the boxes left out.

    Returns, for each dog and each kind, uint8 of shape (views, 64, 64, 3). JPEGs are decoded at the
    smallest DCT scale that leaves every crop at least 128 px: twice the resolution it ends with,
    which keeps the median PSNR against full decoding above 45 dB (`tests/bench_data.py`).
    Raises `BadItem` if the photo gives no dog.
    """
    picture, frame, boxes, reasons = open_photo(photo)
    dogs = [[CROPS[kind](box, *frame) for kind in kinds] for box in boxes]
    least = min(min(c[2] - c[0], c[3] - c[1]) for dog in dogs for views in dog for c in views)
    shrink = next((s for s in (8, 4, 2) if least / s >= 2 * IMAGE_SIZE), 1)
    decoded = decode_picture(picture, shrink, upright=photo.annotation is None)
    scale = 1 / shrink if decoded.width < frame[0] else 1.0  # only JPEGs have shrunk

    def resize(crop: Box) -> np.ndarray:
        left, top, right, bottom = (edge * scale for edge in crop)
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
    key: str  # of what the networks see; a resumed run must find the same

    def to(self, device: torch.device) -> CropSet:
        """The same with its tensors on `device`."""
        names = ("pixels", "first", "count", "weights", "breed")
        return replace(self, **{n: getattr(self, n).to(device) for n in names})


def in_threads(function: Callable, items: Iterable) -> Iterator:
    """`map` in order by a thread for each core; an interrupt drops what is still waiting."""
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        yield from pool.map(function, items)
    finally:
        pool.shutdown(cancel_futures=True)


def count_reasons(skipped: list[tuple[str, str]]) -> str:
    """How many were left out for which reason, as in "2 unreadable file, 1 reversed box"."""
    reasons = Counter(reason for _, reason in skipped).most_common()
    return ", ".join(f"{n} {reason}" for reason, n in reasons)


def near_duplicates(views: Sequence[np.ndarray], limit: float, block: int = 1024) -> dict[int, int]:
    """Which dogs repeat an earlier one that stays: {index: index of the earlier one}.

    `views`: uint8 (64, 64, 3), one of each dog. Two are alike if grey thumbnails of 16 x 16
    pixels, less their mean, have a cosine above `limit`, one of them mirrored or not: copies that
    are recoded, scaled or grey are found, other cuts of a photo are not. (Radford et al. 2015,
    arXiv 1511.06434, section 4.1.1, by codes of an autoencoder.)
    """
    means = [v.reshape(16, 4, 16, 4, 3).mean((1, 3, 4), dtype=np.float32) for v in views]
    small = torch.from_numpy(np.stack(means))
    small -= small.mean((1, 2), keepdim=True)
    plain, mirrored = (F.normalize(x.flatten(1)) for x in (small, small.flip(2)))
    repeats: dict[int, int] = {}
    stays = torch.ones(len(plain), dtype=torch.bool)
    for start in range(0, len(plain), block):  # some rows at a time: 190 MB for 20,000 dogs
        rows, end = plain[start : start + block], start + block
        cosine = torch.maximum(rows @ plain[:end].T, rows @ mirrored[:end].T)
        near = (cosine.clamp_(max=1.0) > limit).tril(start - 1)  # the earlier ones
        for k in near.any(1).nonzero().flatten().tolist():
            if len(first := (near[k] & stays[:end]).nonzero()):
                repeats[start + k], stays[start + k] = int(first[0]), False
    return repeats


def crop_all(photos: PhotoSet, kinds: list[str], show: bool, dedupe: float) -> dict[str, object]:
    """The crops of all photos, as they are kept in the cache. Raises `UserError`."""

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
            f" ({count_reasons(skipped)}): repair the set or give another --data; at most 5 % may"
            " be."
        )
    repeats = near_duplicates([dog[0][0] for dog in dogs], dedupe) if dedupe else {}
    skipped += [
        (f"{shown[k].name}, of {shown[j].name}", "near-duplicates") for k, j in repeats.items()
    ]
    stay = [k for k in range(len(dogs)) if k not in repeats]
    if len(stay) < 16:
        remedy = "a higher --dedupe, or 0" if repeats else "--data with more"
        raise UserError(
            f"{photos.where} holds {len(stay)} dogs, and at least 16 are needed to train: give"
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
    """A short name for all that the networks see of a table of crops."""
    sha = hashlib.blake2b(table["pixels"].numpy(), digest_size=12)
    sha.update(json.dumps([table["count"].tolist(), table["breed"].tolist()]).encode())
    sha.update(json.dumps(table["breeds"]).encode())
    return sha.hexdigest()


def digest(value: object) -> str:
    """A short name for a value of plain types."""
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
    except (*DAMAGE, pickle.UnpicklingError):
        return None


def prepare_crops(photos: PhotoSet, crops: str, show: bool = True, dedupe: float = 0.0) -> CropSet:
    """Crop every dog once, or load that from the cache; the tensors are on the CPU.

    `crops`: kinds with weights, as `parse_crops` takes them; a set without annotations is cropped
    `whole`. `show`: with a progress bar. `dedupe`: the cosine of thumbnails above which a dog
    repeats an earlier one; 0 = all stay. Raises `UserError` above 5 % bad items, or with fewer than
    16 dogs.
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


# ----------------------------------------------------------------------------------- 10. The device


def choose_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` as a device on which a real kernel has run.

    Raises `UserError` where there is no such GPU, or the installed torch has no kernels for it (a
    P100 under a CUDA 12.8+ build reports itself as available, and its first kernel dies).
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not re.fullmatch(r"cuda(:[0-9]{1,3})?", name):
        raise UserError(f"--device {name} is unknown: give auto, cpu, cuda or cuda:N.")
    device = torch.device("cuda", int(name.partition(":")[2] or 0))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.index >= gpus:
        raise UserError(
            f"--device {name}: {gpus} CUDA GPUs are usable here; give one of them from cuda:0 on,"
            " or --device cpu, or turn a GPU on."
        )
    try:
        torch.cuda.set_device(device)
        torch.ones(8, device=device).sum().item()
    except RuntimeError as error:
        major, minor = torch.cuda.get_device_capability(device)
        raise UserError(
            f"this GPU (sm_{major}{minor}) cannot run a kernel of the installed torch"
            f" {torch.__version__} ({first_line(error)}): choose a T4 or L4 instead, or pin the"
            " notebook to its original 2025 environment, or install a CUDA 12.6 build of torch 2.14"
            " or older (pip install --no-index --find-links=FOLDER torch)."
        ) from error
    return device


def first_line(error: BaseException) -> str:
    """What an error says, in one line, or else its name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def describe_device(device: torch.device) -> str:
    """One line for the log: device, capability, torch and CUDA versions."""
    if device.type == "cpu":
        return f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"
    major, minor = torch.cuda.get_device_capability(device)
    name = torch.cuda.get_device_name(device)
    return f"{name} (sm_{major}{minor}), torch {torch.__version__}, CUDA {torch.version.cuda}"


def memory_layout(device: torch.device) -> torch.memory_format:
    """Channels last but on GPUs without tensor cores, whose convolutions want it contiguous."""
    old_gpu = device.type == "cuda" and torch.cuda.get_device_capability(device) < (7, 0)
    return torch.contiguous_format if old_gpu else torch.channels_last


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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, in any of the forms in which torch, cuDNN and cuBLAS say so."""
    said = str(error).lower()
    signs = ("out of memory", "alloc_failed", "allocation_failed", "unable to find an engine")
    signs += ("not enough memory",)
    return isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(sign in said for sign in signs)
    )


# Rounding alone makes two runs of a step differ: by this share of a gradient's norm, where sums of
# some 10^4 products are taken in another order, or in fp32 by another algorithm.
ROUNDING = {"fp32": 2**-12, "tf32": 2**-11, "fp16": 2**-11, "bf16": 2**-8}


def largest_deviation(precision: str) -> float:
    """How far apart a replayed and an eager step may end, as a share of the way that a step goes.

    Adam's first step is +-lr wherever |gradient| exceeds its noise, so noise of a share e of a
    normal gradient's deviation turns a share e / pi of the signs, each 2 lr off: together
    2 sqrt(e / pi) of the way. Allowed is four times that: 0.07 in fp32 to 0.28 in bf16. The step
    that is compared is the fourth, after `warm_up`, where rounding costs less: on an H200 two eager
    steps differed by 0.009 in fp32, 0.0002 in TF32, and not at all in bf16 and fp16, a replay by no
    more. A replay with other data goes 0.4 to 1.4, one that moves nothing 1 (tried on a CPU).
    """
    return 8 * math.sqrt(ROUNDING[precision] / math.pi)


def capture(trainer: Trainer) -> str:
    """Make `trainer.step` replay a CUDA graph of its step, once that is seen to do the same.

    Returns "", or why the run goes on by a slower way: eagerly, or with Adam unfused too. Weights
    and random state stay as they were. Raises only what is no failure of these three: an interrupt,
    or memory that ran out.
    """
    if trainer.device.type != "cuda":
        return ""
    before, reason = trainer.state_dict(trainer.device), ""
    try:
        try:
            warm_up(trainer)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            reason = f"fused Adam does not work here ({first_line(error)})"
            trainer.load_state_dict(before)
            unfuse(trainer)
            warm_up(trainer)
            return reason
        warm = trainer.state_dict(trainer.device)
        try:
            replay = captured(trainer)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            reason = f"the step cannot be captured as a CUDA graph ({first_line(error)})"
            return reason
        warm["tensors"]["loss_scale"] *= 0.25  # a step that overflows is skipped, and shows nothing
        reasons = (compare_steps(trainer, warm, replay, lazy) for lazy in trainer.kinds)
        reason = next(filter(None, reasons), "")
        if not reason:
            trainer.update_both = replay
        return reason
    finally:
        trainer.load_state_dict(before)


def warm_up(trainer: Trainer) -> None:
    """Three eager steps, so that cuDNN has chosen its algorithms; more while fp16 overflows."""
    stream = torch.cuda.Stream(trainer.device)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for k in range(20):
            scale = trainer.loss_scale.item()
            trainer.one_step(trainer.kinds[k % len(trainer.kinds)])
            if k >= 2 and trainer.loss_scale.item() >= scale:
                break
    torch.cuda.current_stream().wait_stream(stream)


def captured(trainer: Trainer) -> Callable[[bool], None]:
    """The replay of `one_step` as CUDA graphs, one to each of its kinds. Raises what the step
    raised, not what followed."""
    graphs = {lazy: torch.cuda.CUDAGraph() for lazy in trainer.kinds}
    stream, own = torch.cuda.Stream(trainer.device), trainer.rng
    trainer.use_generator(torch.cuda.default_generators[trainer.device.index])  # a graph knows it
    groups = [adam.param_groups[0] for adam in (trainer.opt_g, trainer.opt_d)]
    first: list[BaseException] = []
    try:
        for group in groups:  # only now: outside a capture torch warns of it
            group["capturable"] = True
        for lazy, graph in graphs.items():
            # The outer `with` puts the current stream back where a failed capture does not.
            with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
                try:
                    trainer.one_step(lazy)
                except BaseException as error:
                    first.append(error)
                    raise
    except BaseException:
        trainer.rng = trainer.batches.rng = own  # the default one may stay as in a capture
        if first:
            raise first.pop() from None  # not what the capture's end said to it
        raise
    finally:
        for group in groups:
            group["capturable"] = False

    def replay(lazy: bool) -> None:
        graphs[lazy].replay()

    return replay


def unfuse(trainer: Trainer) -> None:
    """Let Adam update one tensor after another, as it does anywhere."""
    for adam in (trainer.opt_g, trainer.opt_d):
        group = adam.param_groups[0]
        group["fused"], group["lr"] = False, float(group["lr"])
        adam.grad_scale = adam.found_inf = None  # only a fused step takes them


def compare_steps(
    trainer: Trainer, start: dict[str, object], replay: Callable[[bool], None], lazy: bool
) -> str:
    """How a replayed step from `start` ends elsewhere than an eager one; "" where it does not."""
    ends = []
    for step in (trainer.one_step, replay):
        trainer.load_state_dict(start)
        step(lazy)
        ends.append({k: v.clone() for k, v in trainer.tensors().items()})
    bound = largest_deviation(trainer.precision)
    for name, network in (("G", trainer.G), ("D", trainer.D)):
        keys = [f"{name}.{k}" for k, _ in network.named_parameters()]
        eager, replayed = ([end[k] for k in keys] for end in ends)
        gone = distance(eager, [start["tensors"][k] for k in keys])
        apart = distance(replayed, eager) / max(gone, 1e-30)
        if not (gone > 0 and apart <= bound):
            return (
                f"a replayed step ends {apart:.2g} of {name}'s way off an eager one, where rounding"
                f" explains {bound:.2g}"
            )
    return ""


@torch.no_grad()
def distance(these: Sequence[Tensor], those: Sequence[Tensor]) -> float:
    """The Euclidean distance between two lists of tensors."""
    gaps = [a.double() - b.double() for a, b in zip(these, those, strict=True)]
    return torch.stack([gap.norm() for gap in gaps]).norm().item()


# ---------------------------------------------------------------------------------- 11. The trainer


class Trainer(TrainingStep):
    """One run's steps: scheduled, counted, averaged, watched, and all that a checkpoint holds.

    Rollback and resume copy into the tensors that a replay touches, which stay where they are.
    """

    def __init__(self, config: Config, crops: CropSet, device: torch.device) -> None:
        """Raises `UserError` where `config` tells apart breeds of which there is one."""
        if config.condition != "none" and len(crops.breeds) < 2:
            raise UserError(
                f"--condition {config.condition} needs several breeds, and these dogs are of one:"
                " give --data with annotations or labels, or leave --condition away."
            )
        super().__init__(config, crops, device)
        if self.G.breeds:
            self.G.frequency.copy_(torch.bincount(crops.breed, minlength=self.G.breeds))
            self.G.frequency.div_(self.G.frequency.sum())
        torch.backends.cudnn.allow_tf32 = self.precision != "fp32"
        self.averages = Averages(self.G)
        self.steps_done = self.rollbacks = self.summed = 0
        self._rate_share, self._augmenting = 1.0, True
        self._means = dict.fromkeys(self.stats, 0.0)
        self.update_both: Callable[[bool], None] = self.one_step  # or a replay of it
        self._in_flight: deque[torch.cuda.Event] = deque()

    def step(self, progress: float) -> None:
        """One update of D, of G, and where due of the averages; at most 4 steps in flight."""
        if self.steps_done % self.batches.steps_per_epoch == 0:
            self.batches.shuffle()
        self._set_augmenting(progress)
        self._set_rates(progress)
        self.update_both(self.steps_done % self.config.r1_every == 0)
        self.steps_done += 1
        self.summed += 1
        if self.steps_done % self.config.average_every == 0:
            self.averages.update(self.G, progress, self.config)
        if self.device.type == "cuda":
            self._in_flight.append(torch.cuda.Event())
            self._in_flight[-1].record()
            if len(self._in_flight) > 4:
                self._in_flight.popleft().synchronize()

    def _set_augmenting(self, progress: float) -> None:
        """Augmented from `augment_start` on."""
        wanted = progress >= self.config.augment_start
        if wanted != self._augmenting:
            self._augmenting = wanted
            self.augmenting.fill_(wanted)

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

    @torch.no_grad()
    def is_healthy(self) -> bool:
        """Whether all weights are finite, and fp16 has not run out of range; waits for the device.

        A loss that is not finite makes weights so at once, but for fp16, which skips such a step
        and halves the scale.
        """
        norms = torch._foreach_norm([*self.G.parameters(), *self.D.parameters()])
        return bool(torch.stack(norms).isfinite().all() & (self.loss_scale >= 1))

    def read_stats(self) -> dict[str, float]:
        """The means of `stats` over the steps since the last call; waits for the device."""
        if self.summed:
            self._means = dict(zip(self.stats, (self.sums / self.summed).tolist()))
            self.sums.zero_()
            self.summed = 0
        return self._means

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a step changes, by name."""
        found = {f"G.{k}": v for k, v in self.G.state_dict().items()}
        found |= {f"D.{k}": v for k, v in self.D.state_dict().items()}
        for name, adam in (("opt_g", self.opt_g), ("opt_d", self.opt_d)):
            for i, state in enumerate(adam.state.values()):
                found |= {f"{name}.{i}.{k}": v for k, v in state.items()}
        found |= {f"ema.{i}": v for i, v in enumerate(self.averages.ema)}
        found |= {f"swa.{i}": v for i, v in enumerate(self.averages.swa)}
        found |= self.d_objective.state_dict() | self.g_objective.state_dict()
        found |= {"order": self.batches.order, "cursor": self.batches.cursor}
        return found | {"sums": self.sums, "loss_scale": self.loss_scale}

    def counters(self) -> dict[str, int]:
        """The numbers beside the tensors."""
        return {
            "steps_done": self.steps_done, "rollbacks": self.rollbacks, "summed": self.summed,
            "ema_updates": self.averages.ema_updates, "swa_updates": self.averages.swa_updates,
        }  # fmt: skip

    def state_dict(self, device: torch.device | str = "cpu") -> dict[str, object]:
        """Everything that a bit-equal continuation needs, as copies on `device`, in plain types."""
        tensors = {k: v.detach().to(device, copy=True) for k, v in self.tensors().items()}
        data = {"data_key": self.crops.key, "breeds": self.crops.breeds}
        return {"tensors": tensors, "rng": self.rng.get_state(), **data, **self.counters()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, object]) -> bool:
        """Copy a `state_dict` into the tensors that are there; False if its randomness is of
        another kind of device (a CPU's generator and a GPU's differ), and was begun anew."""
        for name, tensor in self.tensors().items():
            tensor.copy_(state["tensors"][name])
        for name in ("steps_done", "rollbacks", "summed"):
            setattr(self, name, state[name])
        self.averages.ema_updates, self.averages.swa_updates = (
            state["ema_updates"], state["swa_updates"],
        )  # fmt: skip
        try:
            self.rng.set_state(state["rng"])
            return True
        except RuntimeError:
            self.rng.manual_seed(seed_for(self.config.seed, "training") + self.steps_done)
            return False

    def use_generator(self, rng: torch.Generator) -> None:
        """Draw from `rng` from now on, from the state that the generator of now has."""
        rng.set_state(self.rng.get_state())
        self.rng = self.batches.rng = rng


def make_adam(network: nn.Module, lr: float, config: Config) -> torch.optim.Adam:
    """Adam (Kingma and Ba 2015, arXiv 1412.6980), fused, its state made."""
    parameters = list(network.parameters())
    device = parameters[0].device
    on_gpu = device.type == "cuda"
    adam = torch.optim.Adam(
        parameters,
        lr=torch.tensor(lr, device=device) if on_gpu else lr,
        betas=(config.beta1, config.beta2),
        fused=device.type != "meta",
    )
    for parameter in parameters:  # a first step of nothing makes its state exist
        parameter.grad = torch.zeros_like(parameter)
    adam.step()
    for state in adam.state.values():
        state["step"].zero_()
    return adam


def laid_out_like(gradient: Tensor, parameter: Tensor) -> Tensor:
    """`gradient` with the strides of `parameter`.

    Adam's fused kernels walk raw memory: CUDA's refuse other strides, a CPU's silently mix up the
    elements. `autograd.grad` returns whatever a backward made, which is NCHW for channels-last
    weights after a double backward (R1), and after cuDNN on a 1x1 input (G's first layer).
    """
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def flops_per_image(config: Config, breeds: int = 120) -> int:
    """FLOPs per image and step, forward and backward, by torch's counter on the very step itself.

    Run on meta tensors; norms, activations and optimisers count as nothing, and augmentation but
    for the shifts' products (0.07 %).
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
    step, counts = TrainingStep(config, crops, meta), []
    for lazy in step.kinds:
        with FlopCounter() as counter:
            step.one_step(lazy)
        counts.append(counter.total)
    period = config.r1_every  # steps, of which the first is of the first kind
    return (counts[0] + (period - 1) * counts[-1]) // (period * config.batch_size)


class FlopCounter(TorchDispatchMode):
    """Adds up FLOPs by torch's own table of formulas.

    Torch's `FlopCounterMode` besides hooks into each module that is called with a weight, as
    spectral norm is, and `autograd.grad` bears no such hook.
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


# ------------------------------------------------------------------------- 12. Sampling, submission

FORMAT = 2  # of checkpoint.pt and generator.pt
NORM_BATCHES = 32  # x 128 latents, to re-estimate the norms of the G that is submitted
SEED_USES = ("training", "submission", "norms", "sheet", "reals", "breeds", "labelled")


def seed_for(seed: int, use: str) -> int:
    """A seed for one use of randomness, far from those of the others; "training" has `seed`.

    It has 32 bits: torch's generator of a CPU looks at no more.
    """
    return (seed + SEED_USES.index(use) * 0x9E3779B1) % 2**32


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


def draw_labels(G: nn.Module, count: int, seed: int) -> Tensor:
    """int64 (count,) breeds, as often as in the data; row k is the same whatever `count` is.

    Zeros for a G that is not conditioned on them.
    """
    generator = torch.Generator().manual_seed(seed_for(seed, "breeds"))
    chance = torch.rand(count, generator=generator)
    return torch.bucketize(chance, G.frequency.cpu().cumsum(0)[:-1], right=True)


def in_batches(latents: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """What a G takes, in batches of 128, the last one filled up."""
    for k in range(0, len(latents), SAMPLE_BATCH):
        rows = torch.arange(k, k + SAMPLE_BATCH).clamp(max=len(latents) - 1)
        yield latents[rows], labels[rows]


def full_precision() -> AbstractContextManager:
    """Plain float32 convolutions by one fixed algorithm, for images that do not vary."""
    return torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    )


def sample_images(G: nn.Module, latents: Tensor, labels: Tensor) -> Iterator[np.ndarray]:
    """uint8 (n, 64, 64, 3) batches of images, in the order of `latents` and of their breeds.

    Every forward has 128 latents, the last one filled up, and G must be in eval mode: an image
    depends on its own latent alone.
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
    """A path beside `path` to write to; renamed into place if the block ends well, else removed.

    The file is on the disk before it is renamed, and its name before this returns, so that a power
    cut leaves the old file or the new one.
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
    """Remove what killed runs left half-written, if it is `older` than so many seconds."""
    for part in folder.glob(".*.part"):
        with suppress(OSError):
            if time.time() - part.stat().st_mtime >= older:
                part.unlink()


def save(path: Path, value: object) -> None:
    """`torch.save` that leaves the old file whole on any error (a full disk raises `OSError`)."""
    with whole_file(path) as part, open(part, "wb") as file:
        try:
            torch.save(value, file)
        except RuntimeError as error:  # torch's own word where the file took too little
            file.flush()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error


def encode_png(image: np.ndarray) -> bytes:
    """uint8 (64, 64, 3) to a PNG. Run-length coding (3) at level 1 is 1.4 times as fast as Pillow's
    default here, and 5 % smaller (`tests/bench_zip.py`: 0.42 against 0.60 ms, 8.3 against 8.8 kB).
    """
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1, compress_type=3)
    return buffer.getvalue()


def write_zip(path: Path, batches: Iterable[np.ndarray]) -> int:
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


def write_images(G: nn.Module, config: Config, out: Path, breed: int | None = None) -> None:
    """Draw `config.images` dogs, of one breed or as often as each occurs, into `images.zip`."""
    seed = seed_for(config.seed, "submission")
    latents = draw_latents(config.images, G.latent_dim, seed, config.truncation)
    labels = draw_labels(G, config.images, config.seed)
    if breed is not None:
        labels = torch.full_like(labels, breed)
    write_zip(out / "images.zip", sample_images(G, latents, labels))


def write_results(trainer: Trainer, out: Path) -> tuple[nn.Module, str]:
    """Average, re-estimate, write `generator.pt` and `images.zip`; returns G and what it is of."""
    config, choice = trainer.config, trainer.averages.choose(trainer.config.average)
    G = trainer.averages.generator(trainer.G, choice, NORM_BATCHES, config)
    state = {"format": FORMAT, "config": plain(config), "weights": choice}
    state |= {"shape": G.shape, "breeds": trainer.crops.breeds, "steps_done": trainer.steps_done}
    save(
        out / "generator.pt",
        state | {"state_dict": {k: v.cpu() for k, v in G.state_dict().items()}},
    )
    write_images(G, config, out)
    return G, choice


def real_images(crops: CropSet, config: Config) -> np.ndarray:
    """uint8 (100, 64, 64, 3): real crops as the networks see them, spread over the whole set."""
    device = crops.pixels.device
    rows = torch.linspace(0, len(crops.first) - 1, 100, device=device).long()
    generator = torch.Generator(device).manual_seed(seed_for(config.seed, "reals"))
    return to_bytes(draw_reals(crops, rows, generator, config.mirror))


def sheet_images(G: nn.Module, seed: int, truncation: float = 0.0) -> np.ndarray:
    """uint8 (100, 64, 64, 3): the images of the run's fixed latents."""
    latents = draw_latents(100, G.latent_dim, seed_for(seed, "sheet"), truncation)
    return np.concatenate(list(sample_images(G, latents, draw_labels(G, 100, seed))))


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


# -------------------------------------------------------------------------------------- 13. The run

SHEETS = (0.01, 0.03, 0.06, *(n / 10 for n in range(1, 10)))  # progress at which sheets are drawn


class Clock:
    """The wall-clock of a run over all its parts, and its progress from 0 to 1."""

    def __init__(self, config: Config, started: float, used_before: float) -> None:
        """`started`: `time.monotonic()` when this part began; `used_before`: seconds of others."""
        self.steps, self.started = config.steps, started
        self.origin = started - used_before
        self.budget_seconds = 3600 * config.hours
        self.deadline = self.origin + self.budget_seconds
        self.part_deadline = started + 3600 * config.part_hours
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

    def allows(self, seconds: float) -> bool:
        """Whether `seconds` beside training are under 2 % of the run (of 25 minutes at least)."""
        budget = self.budget_seconds if math.isfinite(self.budget_seconds) else 1500
        return seconds <= 0.02 * max(budget, self.used())


class Interrupts:
    """What SIGINT, SIGTERM and SIGHUP do: raise; but `armed`, the first only sets `stopped`."""

    def __init__(self) -> None:
        self.armed = self.stopped = False

    def handle(self, *_: object) -> None:
        """The handler of all three."""
        if self.stopped or not self.armed:
            raise KeyboardInterrupt
        self.stopped = True
        say("saving, then writing images.zip; once more to leave at once", sys.stderr)


@contextmanager
def interrupts() -> Iterator[Interrupts]:
    """Handle the signals inside the block, and put the old handlers back behind it."""
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
    """Hold `out` for this run. Raises `UserError` while another lives; a kill leaves no lock."""
    out.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(folder)
        raise UserError(
            f"another run is writing to {out}: wait for its end, or give another --out."
        ) from error
    except OSError:  # a file system without locks
        pass
    try:
        for place in (out, out / "samples"):
            remove_parts(place)
        yield
    finally:
        os.close(folder)


def say(text: str, file: object = None) -> None:
    """Print a line above the bar; what is only told never ends a run (a full disk, `| head`)."""
    try:
        tqdm.write(text, file=file or sys.stdout)
        (file or sys.stdout).flush()
    except (OSError, ValueError, RuntimeError):  # the last: a signal in the midst of a write
        pass


class Report:
    """`log.jsonl`, and what a person sees: a bar on a terminal or in a notebook, else lines."""

    def __init__(self, out: Path) -> None:
        self.path = out / "log.jsonl"
        form = "{percentage:3.0f}%|{bar}| {desc}"
        self.bar = tqdm(total=1.0, bar_format=form, disable=not is_live())
        self.shown = self.logged = self.printed = -math.inf
        self.last_steps, self.last_time, self.missed = 0, time.monotonic(), 0

    def start(self, trainer: Trainer) -> None:
        """Count images per second from here."""
        self.last_steps, self.last_time = trainer.steps_done, time.monotonic()

    def event(self, text: str = "", **values: object) -> None:
        """Say `text`, and log it with `values` as one JSON line, if there is room for it."""
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
            if not self.missed:
                say(f"log.jsonl cannot be written ({error.strerror}): going on", sys.stderr)
            self.missed += 1

    def status(self, trainer: Trainer, clock: Clock, last: bool = False) -> dict[str, float]:
        """Show and, every 10 s, log where training stands. Returns the mean losses since then."""
        stats, now = trainer.read_stats(), time.monotonic()
        steps, batch = trainer.steps_done, trainer.config.batch_size
        rate = (steps - self.last_steps) / max(1e-9, now - self.last_time)
        left = min(clock.training_left(), (clock.steps - steps) / rate if rate else math.inf)
        minutes = f"{max(0, left) / 60:.0f}" if math.isfinite(left) else "?"
        share = clock.progress(steps)
        line = (
            f"step {steps}, {steps * batch:,} images, {rate * batch:.0f} images/s,"
            f" D {stats['d_loss']:.3f}, G {stats['g_loss']:.3f},"
            f" past margin {stats['past_margin']:.2f}, {minutes} min left"
        )
        with suppress(OSError, ValueError):
            self.bar.n = share
            self.bar.set_description_str(line)
        if self.bar.disable and (last or now >= self.printed + 60):
            say(f"{share:4.0%} {line}")
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


def in_notebook() -> bool:
    """Whether this runs in a Jupyter kernel (Colab's is a subclass), not merely beside one."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return any(kind.__name__ == "ZMQInteractiveShell" for kind in type(shell).__mro__)


def is_live() -> bool:
    """Whether somebody watches: a terminal or a notebook, not a log file as in a Kaggle commit."""
    live = sys.stderr.isatty() or in_notebook()
    return live and os.environ.get("KAGGLE_KERNEL_RUN_TYPE") != "Batch"


# Checkpoints: two of them, each whole, the newer one written while training goes on.


def plain(config: Config) -> dict[str, object]:
    """A configuration in types that JSON has: None in the place of infinity."""
    values = asdict(config) | {"data": list(config.data)}
    return {k: None if v == math.inf else v for k, v in values.items()}


def checkpoint_state(
    trainer: Trainer, clock: Clock, finished: bool = False, finishing: float = 0.0
) -> dict[str, object]:
    """Everything that a continuation needs. `finishing`: seconds that this part will still use."""
    return {
        "format": FORMAT,
        "config": plain(trainer.config),
        "trainer": trainer.state_dict(),
        "seconds_used": clock.used() + finishing,
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
    """Writes checkpoints in a thread while training goes on: 755 MB take a disk some seconds.

    A full disk does not end the training: it is said, and tried again at the next time.
    """

    def __init__(self, out: Path, report: Report) -> None:
        self.out, self.report, self.pool = out, report, ThreadPoolExecutor(1)
        self.pending: Future | None = None

    def save(
        self, trainer: Trainer, clock: Clock, finished: bool = False, finishing: float = 0.0
    ) -> None:
        """Begin to write a checkpoint of now, once the one before it is written."""
        self.wait()
        state = checkpoint_state(trainer, clock, finished, finishing)
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
    """A checkpoint of which nothing can be trusted."""


def load_state(path: Path, part: str) -> dict[str, object]:
    """A checkpoint, or `generator.pt`, with `part` in it.

    Raises `Damaged` where the file is broken, `UserError` where it is something else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            whole = archive.testzip() is None  # torch itself does not look at the checksums
    except FileNotFoundError as error:
        raise UserError(f"{path} is not there: give another file.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give another file.") from error
    except DAMAGE:
        whole = False
    if not whole:
        raise Damaged(f"{path} is damaged: give another file.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (*DAMAGE, pickle.UnpicklingError):
        state = None
    version = state.get("format") if isinstance(state, dict) else None
    if type(version) is int and version == FORMAT:
        config = state.get("config")
        fits = isinstance(config, dict) and config.keys() == plain(Config()).keys()
        if fits and isinstance(state.get(part), dict):
            return state
    raise UserError(
        f"{path} was not made by this version of the program, or holds no {part}: move it away,"
        " or give another --out."
    )


def find_checkpoint(options: Options) -> dict[str, object] | None:
    """`--resume`, else the newest whole checkpoint in `--out`, else None; damaged ones are set
    aside, and what this version cannot read is left where it is (`UserError`)."""
    if options.resume:
        return load_state(Path(options.resume), "trainer")
    out = Path(options.config.out)
    for path in (out / "checkpoint.pt", out / "checkpoint.previous.pt"):
        try:
            if path.exists():
                return load_state(path, "trainer")
        except Damaged:
            aside = path.with_suffix(".damaged.pt")
            os.replace(path, aside)
            say(f"{path} is damaged: set aside as {aside.name}.", sys.stderr)
    return None


def check_state(saved: object, own: object, name: str = "the checkpoint") -> None:
    """Raise `UserError` where a state differs from a trainer's own in keys, types or shapes."""
    fits = type(saved) is type(own)
    if fits and isinstance(own, Tensor):
        fits = saved.shape == own.shape or name.endswith(" rng")
        fits &= (saved.dtype, saved.layout, saved.device) == (own.dtype, own.layout, own.device)
    elif fits and isinstance(own, dict):
        fits = saved.keys() == own.keys()
    elif fits and isinstance(own, (int, float)):
        fits = 0 <= saved < 2**62  # nor nan
    if not fits:
        raise UserError(f"{name} does not fit these networks and this data: start with --fresh.")
    if isinstance(own, dict):
        for key, value in own.items():
            check_state(saved[key], value, f"{name.removesuffix(' trainer')} {key}")


def refuse_other_recipe(config: Config, saved: dict[str, object], names: Iterable[str]) -> None:
    """Raise `UserError` where a field of `names` that shapes the weights differs from the saved."""
    now = plain(config)
    for f in fields(Config):
        if f.name in names and f.metadata["fixed"] and now[f.name] != saved.get(f.name):
            flag = "--" + f.name.replace("_", "-")
            raise UserError(
                f"the checkpoint was made with {flag} {saved.get(f.name)}, not {now[f.name]}: give"
                f" {flag} {saved.get(f.name)}, or start anew with --fresh or another --out."
            )


def roll_back(trainer: Trainer, report: Report, options: Options) -> bool:
    """Back to the last checkpoint with fresh randomness. Returns False once three were in vain."""
    sick_step, rollbacks = trainer.steps_done, trainer.rollbacks + 1
    state = find_checkpoint(options._replace(resume=""))
    if state is None:
        raise UserError("weights were not finite and no checkpoint is whole: start with --fresh.")
    trainer.load_state_dict(state["trainer"])
    trainer.rollbacks = rollbacks
    trainer.rng.manual_seed(seed_for(trainer.config.seed, "training") + rollbacks)
    report.event(
        f"weights were not finite at step {sick_step}: back to step {trainer.steps_done},"
        f" {'with fresh randomness' if rollbacks <= 3 else 'finishing from there'}",
        rollbacks=rollbacks,
    )
    return rollbacks <= 3


# Training: from the first zip, of a G that knows nothing yet, to the last.


class Run(NamedTuple):
    """What belongs to one run."""

    options: Options
    trainer: Trainer
    clock: Clock
    report: Report
    stop: Interrupts
    out: Path


def estimate_finish(trainer: Trainer) -> float:
    """Seconds that re-estimation, sampling and the zip take here, by the second of two batches."""
    config = trainer.config
    for _ in range(2):
        marks = [time.monotonic()]
        for batches in (1, 2):  # what is done once, and a batch or two
            G = trainer.averages.generator(trainer.G, "none", batches, config)
            next(G.parameters()).sum().item()  # waits for the device
            marks.append(time.monotonic())
        latents = draw_latents(SAMPLE_BATCH, G.latent_dim, 0)
        (images,) = sample_images(G, latents, draw_labels(G, SAMPLE_BATCH, 0))
        list(in_threads(encode_png, images))
        one, two, sampling = (b - a for a, b in pairwise([*marks, time.monotonic()]))
    norms = one + (NORM_BATCHES - 1) * max(0.0, two - one)
    return norms + math.ceil(config.images / SAMPLE_BATCH) * sampling


def reserve_time(run: Run) -> float:
    """Write a first zip where that costs under 2 % of the budget; reserve what the last takes.

    Returns the seconds of finishing. Raises `UserError` where the budget cannot hold them.
    """
    trainer, clock, out = run.trainer, run.clock, run.out
    begin = time.monotonic()
    state = checkpoint_state(trainer, clock)
    save(out / "checkpoint.new.pt", state)
    saving, finishing = time.monotonic() - begin, estimate_finish(trainer)
    left = clock.training_left()  # all of it: there is no reserve yet
    if left > 1.5 * finishing and clock.allows(finishing):
        begin = time.monotonic()
        write_results(trainer, out)
        finishing = time.monotonic() - begin
    # Half as much again: other programs may slow the end down; sheet and animation come too.
    clock.reserve = 1.5 * (finishing + 2 * saving) + 1
    if left <= clock.reserve:
        (out / "checkpoint.new.pt").unlink()
        part = clock.part_deadline < clock.deadline
        used = time.monotonic() - clock.started if part else clock.used()
        minutes = math.ceil((used + 1.2 * clock.reserve) / 6) / 10
        remedy = f"--part-hours {minutes / 60 + 0.0005:.3f}" if part else f"--minutes {minutes}"
        raise UserError(
            f"the budget cannot hold the sampling of {trainer.config.images} images on this device:"
            f" give {remedy} or more, or fewer --images; or --sample-only after an earlier run."
        )
    write_checkpoint(out, state)  # so that there is one to roll back to
    return finishing


def train_within_budget(run: Run) -> None:
    """Reserve the time to finish, train, and save. Raises `UserError` for too small a budget."""
    trainer, report = run.trainer, run.report
    finishing = reserve_time(run)
    run.stop.armed = True  # from here on there is something to save
    if reason := capture(trainer):
        report.event(f"{reason}: going on by a slower way", slower=reason)
    report.start(trainer)
    saver = Saver(run.out, report)
    try:
        done = train(run, saver, finishing)
        saver.wait()
        if not trainer.is_healthy():
            roll_back(trainer, report, run.options)
        report.status(trainer, run.clock, last=True)
        saver.save(trainer, run.clock, done, finishing)
    finally:
        try:
            saver.wait()
        finally:  # a second Ctrl-C waits for the files too
            saver.pool.shutdown()


def train(run: Run, saver: Saver, finishing: float) -> bool:
    """Train to progress 1 (returns True), or until this part's time is over or a signal came."""
    trainer, clock, report, config = run.trainer, run.clock, run.report, run.trainer.config
    saved, spent = time.monotonic(), (0.0, finishing)
    sheets = [s for s in SHEETS if s > clock.progress(trainer.steps_done)]
    while (progress := clock.progress(trainer.steps_done)) < 1:
        if run.stop.stopped or clock.training_left() <= 0:
            return False
        trainer.step(progress)
        now = time.monotonic()
        showing = now >= report.shown + 1
        saving = now >= saved + config.checkpoint_seconds
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
            saver.save(trainer, clock)
            saved = time.monotonic()
        if looking:
            sheets = [s for s in sheets if s > progress]
            spent = show_progress(run, spent, finishing)
    return True


def show_progress(run: Run, spent: tuple[float, float], finishing: float) -> tuple[float, float]:
    """A sheet, and the zip anew, where the seconds `spent` on either so far allow it.

    On a slow device some are left out: sheets above 5 % of the time, zips above 2 % of the run.
    """
    on_sheets, on_zips = spent
    begin = time.monotonic()
    try:
        if on_sheets <= 0.05 * run.clock.used():
            look(run)
            on_sheets += time.monotonic() - begin
        begin = time.monotonic()
        if run.clock.allows(on_zips + finishing):
            write_results(run.trainer, run.out)
            on_zips += time.monotonic() - begin
    except OSError as error:  # a full disk: what was learnt is more than what can be shown of it
        run.report.event(f"the results of now cannot be written ({error.strerror}): going on")
    return on_sheets, on_zips


def look(run: Run) -> None:
    """Draw the averaged G's sheet of now, and warn where it has collapsed or D has won."""
    trainer, report, config = run.trainer, run.report, run.trainer.config
    stats = report.status(trainer, run.clock)
    choice = trainer.averages.choose(config.average)
    G = trainer.averages.generator(trainer.G, choice, 8, config)
    images = sheet_images(G, config.seed, config.truncation)
    save_picture(sheet_path(run.out, trainer.steps_done), [draw_sheet(images)])
    reals = real_images(trainer.crops, config)
    variety = pairwise_distance(images) / pairwise_distance(reals)
    report.event(step=trainer.steps_done, variety=round(variety, 4))
    if variety < 0.5 and run.clock.progress(trainer.steps_done) >= 0.1:
        report.event(
            f"warning: the samples differ {variety:.2f} times as much among each other as real dogs"
            " do: if it stays so, G has collapsed; try a lower --g-lr or a wider --d-width"
        )
    if stats["past_margin"] > 0.98 and stats["d_fake"] < -6:
        report.event("warning: D tells reals from fakes with certainty: G learns little now")


def sheet_path(out: Path, step: int) -> Path:
    """Where the sheet of a step lies."""
    return out / "samples" / f"step_{step:07d}.png"


def finish(run: Run) -> None:
    """Write `generator.pt`, the zip, the last sheet and the animation, and say where they are."""
    trainer, out, config, steps = run.trainer, run.out, run.trainer.config, run.trainer.steps_done
    G, choice = write_results(trainer, out)
    sheet = sheet_path(out, steps)
    save_picture(sheet, [draw_sheet(sheet_images(G, config.seed, config.truncation))])
    reals = draw_sheet(real_images(trainer.crops, config))
    sheets = [Image.open(path) for path in sorted((out / "samples").glob("step_*.png"))]
    save_picture(out / "progress.webp", [reals, *sheets])
    hours = p100_hours(config, steps)
    run.report.event(
        f"{out / 'images.zip'}: {config.images} dogs of the {WEIGHTS[choice]}, step {steps},"
        f" {steps * config.batch_size:,} images seen, P100-hours: {hours:.3g}",
        step=steps,
        submitted=choice,
        p100_hours=hours,
    )
    run.report.event(f"look at {sheet} (100 of them) and {out / 'progress.webp'} (how they grew)")


def announce(run: Run, where: str, state: dict[str, object] | None) -> None:
    """Say and log what goes in: the device, the dogs, what was left out, where it resumes."""
    trainer, report, crops = run.trainer, run.report, run.trainer.crops
    report.event(
        device=describe_device(trainer.device),
        precision=trainer.precision,
        config=plain(trainer.config),
        flops=flops_per_image(trainer.config, len(crops.breeds)),
    )
    left_out = count_reasons(crops.skipped) or "nothing"
    report.event(
        f"{len(crops.first)} dogs of {len(crops.breeds)} breeds in {where}; left out: {left_out}",
        skipped=crops.skipped,
    )
    if state:
        report.event(f"resumed at step {trainer.steps_done}", resumed_at_step=trainer.steps_done)
        if (state["torch"], state["threads"]) != (torch.__version__, torch.get_num_threads()):
            report.event("under another torch or thread count: not bit-equal to an unbroken run")


def resumed_state(options: Options) -> dict[str, object] | None:
    """The checkpoint to go on from, if there is one and it is not to be ignored."""
    config = options.config
    state = None if options.fresh and not options.resume else find_checkpoint(options)
    if state is None:
        return None
    try:
        refuse_other_recipe(config, state["config"], state["config"])
    except UserError:
        if state["trainer"].get("steps_done") != 0:
            raise
        return None  # nothing was learnt yet that another recipe could spoil
    return state


def load_trainer(trainer: Trainer, state: dict[str, object]) -> bool:
    """Put a checkpoint into a trainer, checked as a whole before any of it is used.

    Returns False where its randomness is of another kind of device. Raises `UserError`.
    """
    if state["trainer"].get("data_key") != trainer.crops.key:
        raise UserError("the checkpoint was made from other dogs: give its --data, or --fresh.")
    check_state(state["trainer"], trainer.state_dict())
    for name, kind in (
        ("seconds_used", float),
        ("finished", bool),
        ("threads", int),
        ("torch", str),
    ):
        check_state(state.get(name), kind(), f"the checkpoint's {name}")
    order = state["trainer"]["tensors"]["order"]
    if not torch.equal(order.sort().values, torch.arange(len(order))):
        raise UserError("the checkpoint's order of the dogs is none: start with --fresh.")
    return trainer.load_state_dict(state["trainer"])


def start_run(options: Options, device: torch.device, started: float, stop: Interrupts) -> int:
    """Find, crop, train, submit. Returns the exit code."""
    config, out = options.config, Path(options.config.out)
    photos = find_photos(config.data)
    state = resumed_state(options)
    crops = prepare_crops(photos, config.crops, dedupe=config.dedupe)
    trainer = Trainer(config, crops, device)
    same_kind = load_trainer(trainer, state) if state else True
    clock = Clock(config, started, state["seconds_used"] if state else 0.0)
    if state is None:  # nothing of an earlier run is mixed with this one's
        for old in (out / "log.jsonl", *(out / "samples").glob("step_*.png")):
            old.unlink(missing_ok=True)
    run = Run(options, trainer, clock, Report(out), stop, out)
    try:
        announce(run, photos.where, state)
        with whole_file(out / "config.json") as part:
            part.write_text(json.dumps(plain(config), indent=2), encoding="utf-8")
        save_picture(out / "samples" / "real.png", [draw_sheet(real_images(crops, config))])
        if not (state and state["finished"]) or asks_for_more(config, state["config"]):
            if not same_kind:
                run.report.event("on another kind of device: going on with fresh randomness")
            train_within_budget(run)
        finish(run)
    finally:
        run.report.bar.close()
    return 130 if stop.stopped else 0


def asks_for_more(config: Config, saved: dict[str, object]) -> bool:
    """Whether a finished run is to go on: more steps, or more hours (None = no limit)."""
    steps, hours = saved["steps"], math.inf if saved["hours"] is None else saved["hours"]
    if not all(isinstance(number, (int, float)) for number in (steps, hours)):
        raise UserError("the checkpoint's steps or hours are no numbers: start with --fresh.")
    return config.steps > steps or config.hours > hours


SAMPLING = {"seed", "images", "truncation"}  # fields that --sample-only may change


def load_generator(path: Path, device: torch.device) -> tuple[nn.Module, dict[str, object]]:
    """G of a `generator.pt`, in eval mode, and all that the file holds. Raises `UserError`."""
    state = load_state(path, "state_dict")
    try:
        G = make_generator(state["shape"]).to(device, memory_format=memory_layout(device))
        G.load_state_dict(state["state_dict"])
        usual = plain(Config())
        fits = state["weights"] in WEIGHTS and len(state["breeds"]) >= G.breeds
        fits &= all(isinstance(breed, str) for breed in state["breeds"])
        fits &= all(type(state["config"][name]) is type(usual[name]) for name in SAMPLING)
    except (*DAMAGE, MemoryError):
        fits = False
    if not fits:
        raise UserError(f"{path} holds no generator of this version: give another.")
    return G.eval(), state


def sample_only(options: Options, device: torch.device) -> int:
    """Write `images.zip` anew from `generator.pt`."""
    out = Path(options.config.out)
    path = Path(options.resume or out / "generator.pt")
    if not path.exists():
        raise UserError(f"{path} is not there: train first, or give another --out.")
    G, state = load_generator(path, device)
    refuse_other_recipe(options.config, state["config"], options.named - SAMPLING)
    chosen = {n: getattr(options.config, n) for n in SAMPLING & options.named}
    saved = {n: state["config"][n] for n in SAMPLING}
    config = check_config(replace(options.config, **(saved | chosen)))
    if config.truncation != saved["truncation"]:
        estimate_norms(G, NORM_BATCHES, config.seed, config.truncation)
    write_images(G, config, out, find_breed(options.breed, state["breeds"], G.breeds > 0))
    kind = WEIGHTS[state["weights"]]
    say(f"{out / 'images.zip'}: {config.images} dogs of the {kind}")
    return 0


def find_breed(name: str, breeds: Sequence[str], conditioned: bool) -> int | None:
    """The index of the one breed that is called `name`, as in Pug; None for no name."""
    if not name:
        return None
    if not conditioned:
        raise UserError(
            "--breed: this generator was not told breeds; train with --condition breed."
        )
    plain_name = name.casefold().replace(" ", "_")
    found = [k for k, b in enumerate(breeds) if plain_name in (b.casefold(), spoken(b).casefold())]
    if len(found) != 1:
        raise UserError(f"--breed {name} is none of {', '.join(map(spoken, breeds))}.")
    return found[0]


def spoken(breed: str) -> str:
    """n02085620-Chihuahua without its number."""
    return breed.partition("-")[2] or breed


def show_plan(config: Config, device: torch.device) -> int:
    """`--dry-run`: crop the dogs, print the plan and its cost, and try a GPU's replay."""
    photos = find_photos(config.data)
    crops = prepare_crops(photos, config.crops, dedupe=config.dedupe)
    say(f"{len(photos.photos)} photos, {len(crops.first)} dogs of {len(crops.breeds)} breeds in")
    say(f"{photos.where}; left out: {count_reasons(crops.skipped) or 'nothing'}")
    say(json.dumps(plain(config), indent=2))
    trainer = Trainer(config, crops, device)
    for name, network in (("G", trainer.G), ("D", trainer.D)):
        say(f"{name}: {sum(p.numel() for p in network.parameters()):,} parameters")
    flops = flops_per_image(config, len(crops.breeds))
    say(f"{flops / 1e9:.3f} GFLOP per image-step")
    say(f"P100-hours: {p100_hours(config, config.steps, len(crops.breeds)):.3g}")
    if device.type == "cuda":
        reason = capture(trainer)
        say(
            f"{reason}: the run would go on by a slower way" if reason else "a replayed step agrees"
        )
    return 0


# ----------------------------------------------------------------------------- 14. The command line


def check_config(config: Config) -> Config:
    """Raise `UserError` for a value out of its range; return `config` otherwise."""
    for f in fields(Config):
        value, flag = getattr(config, f.name), "--" + f.name.replace("_", "-")
        (least, most), among = f.metadata["span"], f.metadata["among"]
        if isinstance(value, (int, float)) and not least <= value <= most:  # also catches nan
            raise UserError(f"{flag} {value} is out of range: give {least} to {most}.")
        if among and value not in among:
            raise UserError(f"{flag} {value} is unknown: give one of {', '.join(among)}.")
    if config.classify and config.condition == "none":
        raise UserError(
            "--classify tells breeds apart: give --condition breed with it, or --condition classes."
        )
    if config.condition == "classes" and not config.classify:
        raise UserError(
            "--condition classes: D learns breeds by --classify alone: give --classify 1 with it."
        )
    if config.labelled < 1 and config.condition != "classes":
        raise UserError(
            "--labelled hides breeds from a D that learns them: give --condition classes with it."
        )
    if config.g_norm == "virtual" and config.conditional:
        raise UserError("--g-norm virtual knows no breeds: leave --condition breed away.")
    if config.smoothing and config.loss == "rals":
        raise UserError("--loss rals has no labels to smooth: leave --smoothing away.")
    if config.layers == "residual":
        if config.latent_dim < 5:
            raise UserError("--layers residual splits a latent in 5: give --latent-dim 5 or more.")
        for value, flag in (
            (config.g_norm == "virtual", "--g-norm virtual"),
            (config.minibatch_features, "--minibatch-features"),
            (config.condition == "classes", "--condition classes"),
            (config.init_std, "--init-std"),
        ):
            if value:
                raise UserError(f"--layers residual has no {flag}: give --layers deep or paper.")
    if config.r1_every > 1 and not config.r1:
        raise UserError("--r1-every spaces the penalties of --r1: give --r1 with it.")
    parse_crops(config.crops)
    if not parse_augment(config.augment) and config.augment_start:
        raise UserError("--augment-start begins what --augment names: give --augment with it.")
    return config


def parse_augment(text: str) -> tuple[str, ...]:
    """`"color,cutout"` to `("color", "cutout")`, `""` to `()`. Raises `UserError`."""
    names = tuple(name.strip() for name in text.split(",") if text)
    if not set(names) <= set(AUGMENTS) or len(set(names)) < len(names):
        raise UserError(f"--augment {text}: give some of {', '.join(AUGMENTS)}, once each.")
    return names


class Options(NamedTuple):
    """A parsed command line: the configuration, which fields were named, and what to do."""

    config: Config
    named: frozenset[str]
    dry_run: bool
    fresh: bool
    resume: str
    sample_only: bool
    breed: str


class Parser(argparse.ArgumentParser):
    """argparse whose errors are sentences of this program."""

    def error(self, message: str) -> None:
        """Raises `UserError`."""
        raise UserError(f"{message}; see --help.")


def make_parser() -> Parser:
    """Actions, then the fields of `Config` by group."""
    parser = Parser(prog="train_dogs.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    actions = parser.add_argument_group("actions")
    preset = f"recipe, of {', '.join(PRESETS)}; default dogs"
    actions.add_argument("--preset", default="dogs", metavar="NAME", help=preset)
    actions.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    actions.add_argument("--fresh", action="store_true", help="ignore the checkpoint in --out")
    actions.add_argument("--resume", default="", metavar="FILE", help="start from this checkpoint")
    again = "write images.zip from generator.pt"
    actions.add_argument("--sample-only", action="store_true", help=again)
    breed = "the same, of this breed alone, as in Pug"
    actions.add_argument("--breed", default="", metavar="NAME", help=breed)
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
    minutes = {"type": float, "default": argparse.SUPPRESS, "metavar": "X"}
    groups["length"].add_argument("--minutes", help="--hours, in minutes", **minutes)
    return parser


def parse(argv: Sequence[str]) -> Options:
    """The command line, made from `Config`; `--steps` alone lifts the time limit."""
    given = vars(make_parser().parse_args(list(argv)))
    acts = {
        k: given.pop(k) for k in ("preset", "dry_run", "fresh", "resume", "sample_only", "breed")
    }
    if "minutes" in given:
        if "hours" in given:
            raise UserError("--hours and --minutes are the same budget: give one of them.")
        given["hours"] = given.pop("minutes") / 60
    for name in ("hours", "part_hours"):
        if not given.get(name, 1) > 0:
            raise UserError(f"a budget of {given[name]:g} hours is none: give more than 0.")
    if "steps" in given and "hours" not in given:
        given["hours"] = math.inf
    if acts["preset"] not in PRESETS:
        raise UserError(f"--preset {acts['preset']} is unknown: give one of {', '.join(PRESETS)}.")
    if "data" in given:
        given["data"] = tuple(given["data"])
    config = check_config(replace(Config(**PRESETS[acts.pop("preset")]), **given))
    if not config.out:
        kaggle = Path("/kaggle/working")
        config = replace(config, out=str(kaggle if kaggle.is_dir() else "output"))
    return Options(config, frozenset(given), **acts)


def act(options: Options, started: float, stop: Interrupts) -> int:
    """Do what the command line asks for. Returns the exit code."""
    config = options.config
    device = choose_device(config.device)
    torch.backends.cudnn.benchmark = True  # shapes never change: let cuDNN choose by measurement
    say(f"{describe_device(device)}, {choose_precision(config.precision, device)}")
    if options.dry_run:
        return show_plan(config, device)
    with only_run_in(Path(config.out)):
        if options.sample_only or options.breed:
            return sample_only(options, device)
        return start_run(options, device, started, stop)


def main(argv: Sequence[str] = (), started: float | None = None) -> int:
    """Run with the options of `argv`; returns the exit code, 0, 2 or 130, and never exits.

    `started`: the `time.monotonic()` from which the budget counts; None = now.
    """
    started = time.monotonic() if started is None else started
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `open_picture` decides
    options = None
    try:
        with interrupts() as stop:
            options = parse(argv)
            return act(options, started, stop)
    except SystemExit as done:  # argparse's --help
        return int(done.code or 0)
    except KeyboardInterrupt:
        say("train_dogs: interrupted; every file that is there is whole.", sys.stderr)
        return 130
    except UserError as error:
        message = str(error)
    except OSError as error:
        if error.errno is None:  # a library's, not the system's
            raise
        message = (
            f"{error.strerror} ({error.filename or options.config.out}): make room or give another"
            " --out, then start the same command again; every file that is there is whole."
        )
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        smaller = max(2, options.config.batch_size // 2)
        message = f"the memory is too small for this: try --batch-size {smaller}."
    say(f"train_dogs: {message}", sys.stderr)
    return 2


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
