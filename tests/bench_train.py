"""How fast the dogs train: a step of `train_dogs.py` against the plain loop, norms, and a roofline.

    python tests/bench_train.py              # steps and roofline on the best device here
    python tests/bench_train.py --norms      # ways to compute split batch norm, at D's own shapes
    python tests/bench_train.py --all        # both; on a data-centre GPU in less than 8 minutes

Contestants take turns within each repeat, forwards and backwards alternately, so that a device that
warms up or a neighbour that wakes hits all of them; ratios are taken within a repeat. A spread is
the least and the most over the repeats. The last line of the output is everything as JSON.

The plain loop is the one that most DCGANs begin from, pytorch/examples `dcgan/main.py`: a Dataset
that opens and flips one picture at a time, a DataLoader with 2 workers, two forwards of D with a
backward each, a third for G whose backward also computes gradients for D's weights in vain,
`.item()` in every iteration, and Adam as it comes. It trains the same G, and the same D with
`BatchNorm2d` in training mode in the place of split batch norm, which is the same mathematics.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import random
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_dogs
from train_dogs import Config, CropSet, Discriminator, SplitBatchNorm2d, Trainer

WORKERS = 2  # of the plain loop's DataLoader, as in pytorch/examples
PHOTOS = 20_580  # in Stanford Dogs: the length of an epoch of the plain loop
WARM_STEPS = 2 * WORKERS + 1  # untimed, in each turn: the batches that its workers hold ready, + 1
NINE_HOURS = 9 * 3600  # seconds

# Sustained share of the float32 peak: 7.4 of 9.3 TFLOP/s, what such a net reached on a P100. That a
# T4 (8.1) or the plain float32 units of an H200 (66.9) reach the same share is an assumption.
P100_PEAK, T4_PEAK, H200_PEAK = 9.3e12, 8.1e12, 66.9e12
SHARE_OF_PEAK = train_dogs.P100_FLOPS / P100_PEAK

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


# --------------------------------------------------------------------------------------- the clock


def wait(device: torch.device) -> None:
    """Until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Spread(NamedTuple):
    """Median, least and most of what the repeats gave."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def show(self, digits: int) -> str:
        return f"{self.median:.{digits}f} ({self.least:.{digits}f}-{self.most:.{digits}f})"


def in_turns(turns: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Every turn once in each repeat, in alternating order: what it returned, by repeat."""
    found: dict[str, list[float]] = {name: [] for name in turns}
    for repeat in range(repeats):
        for name in list(turns)[:: -1 if repeat % 2 else 1]:
            found[name].append(turns[name]())
    return found


def call_timer(
    call: Callable[[], object], device: torch.device, seconds: float, calls: int = 1
) -> Callable[[], float]:
    """A turn that takes about `seconds` and returns the seconds of one `call`.

    On CUDA, `calls` of them are captured into one graph, so that no launch from the host is timed.
    """
    for _ in range(2):
        call()
    if device.type == "cuda":
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()
        go = graph.replay
    else:
        go, calls = call, 1

    def measure(count: int) -> float:
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(count):
                go()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1000 / count
        begin = time.perf_counter()
        for _ in range(count):
            go()
        return (time.perf_counter() - begin) / count

    measure(1)
    count = max(1, round(seconds / max(measure(1), 1e-6)))
    return lambda: measure(count) / calls


# ---------------------------------------------------------------------------------- the plain loop


class Pictures(Dataset):
    """PNG files, opened, mirrored half of the time and scaled to [-1, 1], one at a time."""

    def __init__(self, files: Sequence[Path], length: int = PHOTOS) -> None:
        self.files, self.length = list(files), length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self.files[index % len(self.files)]) as picture:
            image = picture.convert("RGB")
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return pixels.float().div(255).sub(0.5).div(0.5)


def plain_discriminator(D: Discriminator) -> nn.Sequential:
    """D's layers and weights with ordinary batch norm; (N, 3, 64, 64) to (N, 1, 1, 1) logits."""
    layers: list[nn.Module] = []
    for conv, norm in zip(D.convs, D.norms):
        layers.append(conv)
        if isinstance(norm, SplitBatchNorm2d):
            ordinary = nn.BatchNorm2d(len(norm.weight), eps=norm.eps)
            ordinary.load_state_dict(norm.state_dict(), strict=False)
            layers.append(ordinary)
        layers.append(nn.LeakyReLU(0.2, inplace=True))
    return nn.Sequential(*layers, D.head)


class PlainLoop:
    """The loop of pytorch/examples `dcgan/main.py` over the same networks."""

    def __init__(self, config: Config, files: Sequence[Path], device: torch.device) -> None:
        G, D = train_dogs.build_networks(config, torch.device("cpu"))
        self.G = G.to(device, memory_format=torch.contiguous_format)
        D = D.to(memory_format=torch.contiguous_format)
        self.D = plain_discriminator(D).to(device)
        self.config, self.device = config, device
        betas = (config.beta1, config.beta2)
        self.opt_g = torch.optim.Adam(self.G.parameters(), lr=config.g_lr, betas=betas)
        self.opt_d = torch.optim.Adam(self.D.parameters(), lr=config.d_lr, betas=betas)
        self.criterion = nn.BCEWithLogitsLoss()
        self.loader = DataLoader(
            Pictures(files), batch_size=config.batch_size, shuffle=True, num_workers=WORKERS
        )
        self.batches: Iterator[Tensor] = iter(())
        self.losses = (math.nan, math.nan)

    def begin(self) -> None:
        """Start the workers."""
        self.batches = iter(self.loader)

    def end(self) -> None:
        """Stop the workers, so that they take nothing from whoever is next."""
        self.batches = iter(())

    def step(self) -> None:
        """One iteration."""
        batch = next(self.batches, None)
        if batch is None:  # the epoch is over
            self.begin()
            batch = next(self.batches)
        G, D = self.G, self.D

        D.zero_grad()
        real = batch.to(self.device)
        label = torch.full((len(real),), 1.0, device=self.device)
        output = D(real).view(-1)
        loss_real = self.criterion(output, label)
        loss_real.backward()
        output.mean().item()
        noise = torch.randn(len(real), self.config.latent_dim, device=self.device)
        fake = G(noise)
        label.fill_(0.0)
        output = D(fake.detach()).view(-1)
        loss_fake = self.criterion(output, label)
        loss_fake.backward()
        output.mean().item()
        self.opt_d.step()

        G.zero_grad()
        label.fill_(1.0)
        output = D(fake).view(-1)
        loss_g = self.criterion(output, label)
        loss_g.backward()
        output.mean().item()
        self.opt_g.step()
        self.losses = ((loss_real + loss_fake).item(), loss_g.item())


def write_pictures(dogs: CropSet, folder: Path, most: int = 512) -> list[Path]:
    """The first crops as PNG files."""
    files = []
    for i, crop in enumerate(dogs.crops[:most].numpy()):
        files.append(folder / f"{i:05}.png")
        Image.fromarray(crop).save(files[-1])
    return files


# -------------------------------------------------------------------------------------- contestants


@dataclass
class Contestant:
    """Something that trains: a step, what surrounds a turn of it, and its peak memory in bytes."""

    name: str
    step: Callable[[], None]
    begin: Callable[[], None] = lambda: None
    end: Callable[[], None] = lambda: None
    peak: int | None = None

    @contextmanager
    def turn(self, device: torch.device, warm: int = WARM_STEPS) -> Iterator[None]:
        """Begins, does the untimed steps, waits; ends afterwards."""
        self.begin()
        try:
            for _ in range(warm):
                self.step()
            wait(device)
            yield
        finally:
            self.end()


def our_step(trainer: Trainer) -> None:
    """A step of a run, with what `train` does at every `average_every`-th: average."""
    trainer.step(0.6)
    if trainer.steps_done % trainer.config.average_every == 0:
        trainer.average(0.6)


def build_contestants(
    config: Config, dogs: CropSet, files: Sequence[Path], device: torch.device
) -> list[Contestant]:
    """Captured (on CUDA, where it can be), eager, plain; each warmed up, its peak measured.

    A peak is above what was allocated before the contestant existed (so it holds the crops of ours,
    which lie on the device), and after cuDNN chose its algorithms, which tries some that need more.
    """
    made = []
    for name in ("captured", "eager", "plain") if device.type == "cuda" else ("eager", "plain"):
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        if name == "plain":
            loop = PlainLoop(config, files, device)
            one = Contestant(name, loop.step, loop.begin, loop.end)
        else:
            trainer = Trainer(config, dogs, device)
            one = Contestant(name, lambda trainer=trainer: our_step(trainer))
        with one.turn(device, warm=2):
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                if name == "captured":
                    try:
                        trainer.capture()
                    except torch.cuda.OutOfMemoryError:
                        raise
                    except RuntimeError as error:
                        print("no capture here:", str(error).splitlines()[0])
                    if getattr(trainer, "_replay", True) is None:
                        continue  # the eager one stands for both
                for _ in range(2):
                    one.step()
                wait(device)
                one.peak = torch.cuda.max_memory_allocated() - before
        made.append(one)
    return made


def step_timer(one: Contestant, device: torch.device, seconds: float) -> Callable[[], float]:
    """A turn that takes about `seconds` and returns the seconds of one step."""

    def measure(count: int) -> float:
        with one.turn(device):
            begin = time.perf_counter()
            for _ in range(count):
                one.step()
            wait(device)
            return (time.perf_counter() - begin) / count

    count = max(3, round(seconds / measure(1)))
    return lambda: measure(count)


def host_seconds(one: Contestant, device: torch.device) -> float | None:
    """Seconds that the host needs to submit a step while the device has nothing to do.

    Only meaningful where nothing in the step waits for the device; three steps at a time, as the
    trainer lets four be in flight.
    """
    if device.type != "cuda" or one.name == "plain":
        return None
    found = []
    for _ in range(5):
        wait(device)
        begin = time.perf_counter()
        for _ in range(3):
            one.step()
        found.append((time.perf_counter() - begin) / 3)
    return statistics.median(found)


# --------------------------------------------------------------------- the time inside convolutions

# Kernels of cuDNN, cuBLAS and CUTLASS; nothing but convolutions multiplies matrices in these nets.
CONVOLUTION = re.compile("conv|gemm|fprop|dgrad|wgrad|winograd|xmma|cutlass|scudnn|nvjet|fft")
# Others of cuDNN (norms, changes of layout or type), and all of PyTorch's own.
NO_CONVOLUTION = re.compile("at::native|bn_|norm|ToNhwc|ToNchw|Padding|convert|transpose_")
# Spans that the profiler draws over the kernels, as if they were some.
ANNOTATIONS = ("Optimizer.", "ProfilerStep", "enumerate(", "## ")
CPU_CONVOLUTIONS = ("aten::conv2d", "aten::conv_transpose2d", "aten::convolution_backward")


def is_convolution(kernel: str) -> bool:
    """Whether a CUDA kernel's name is that of a convolution's arithmetic."""
    return bool(CONVOLUTION.search(kernel)) and not NO_CONVOLUTION.search(kernel)


class Convolving(NamedTuple):
    """What the profiler saw in a step."""

    seconds: float  # inside convolutions
    busy: float  # inside any kernel; on a CPU all of the step
    top: list[tuple[str, float]]  # the longest kernels or operators with their share of `busy`


def convolving(one: Contestant, device: torch.device, steps: int = 3) -> Convolving | None:
    """The time of a step inside convolutions; None where the profiler sees no kernels."""
    cuda = device.type == "cuda"
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with one.turn(device), profile(activities=kinds) as profiler:
        begin = time.perf_counter()
        for _ in range(steps):
            one.step()
        wait(device)
        wall = time.perf_counter() - begin
    spent: Counter[str] = Counter()  # microseconds
    if cuda:
        for event in profiler.events():
            on_device = event.device_type == torch.autograd.DeviceType.CUDA
            if on_device and not event.name.startswith(ANNOTATIONS):
                spent[event.name] += event.time_range.elapsed_us()
        busy = sum(spent.values()) / 1e6
        inside = sum(us for name, us in spent.items() if is_convolution(name)) / 1e6
    else:
        averages = profiler.key_averages()
        for event in averages:
            spent[event.key] += event.self_cpu_time_total
        busy = wall
        inside = sum(e.cpu_time_total for e in averages if e.key in CPU_CONVOLUTIONS) / 1e6
    if not spent or not busy:
        return None
    top = [(name[:120], round(us / 1e6 / busy, 4)) for name, us in spent.most_common(12)]
    return Convolving(inside / steps, busy / steps, top)


# ------------------------------------------------------------------------------------------- steps


def bench_steps(bench: Bench, config: Config, preset: str) -> list[dict[str, object]]:
    """The contestants on one preset and batch size: prints a block, returns its rows."""
    device, batch = bench.device, config.batch_size
    contestants = build_contestants(config, bench.dogs, bench.files, device)
    turns = {one.name: step_timer(one, device, bench.seconds) for one in contestants}
    seconds = in_turns(turns, bench.repeats)
    rows = []
    for one in contestants:
        times = seconds[one.name]
        step = Spread.of(times)
        ratio = Spread.of([p / t for p, t in zip(seconds["plain"], times)])
        inside = convolving(one, device)
        host = host_seconds(one, device)
        # On CUDA against the step as timed without the profiler, which slows the host.
        whole = inside and (step.median if device.type == "cuda" else inside.busy)
        row = {
            "preset": preset,
            "width": config.width,
            "batch_size": batch,
            "loop": one.name,
            "images_per_second": batch / step.median,
            "ms_per_step": [1000 * value for value in step],
            "times_plain": list(ratio),
            "convolution_share_of_step": inside and inside.seconds / whole,
            "convolution_share_of_kernels": inside and inside.seconds / inside.busy,
            "host_ms_per_step": host and 1000 * host,
            "peak_bytes": one.peak,
            "top": inside and inside.top,
        }
        rows.append(row)
        print(
            f"{preset:>10} {config.width:>5} {batch:>5} {one.name:>9}"
            f" {row['images_per_second']:>9.1f}"
            f" {Spread(*row['ms_per_step']).show(2):>26}"
            f" {ratio.show(2):>18}"
            f" {percent(row['convolution_share_of_step']):>8}"
            f" {percent(row['convolution_share_of_kernels']):>10}"
            f" {number(row['host_ms_per_step'], 2):>8}"
            f" {number(one.peak and one.peak / 2**20, 0):>8}",
            flush=True,
        )
    return rows


STEPS_HEAD = (
    f"{'preset':>10} {'width':>5} {'batch':>5} {'loop':>9} {'images/s':>9}"
    f" {'ms per step':>26} {'times plain':>18} {'conv %':>8} {'of kernels':>10} {'host ms':>8}"
    f" {'peak MiB':>8}"
)


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}"


def number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


# ---------------------------------------------------------------------------------------- roofline


class ConvCall(NamedTuple):
    """One call of a convolution in a step, and which gradients its backward has to give."""

    name: str
    conv: nn.Conv2d | nn.ConvTranspose2d
    shape: tuple[int, ...]  # of the input
    of_input: bool
    of_weight: bool

    def flops(self) -> tuple[int, int]:
        """Of the forward and of the backward; 2 for a multiplication with its addition."""
        batch, source, height, width = self.shape
        (k, _), (s, _), (p, _) = self.conv.kernel_size, self.conv.stride, self.conv.padding
        if isinstance(self.conv, nn.ConvTranspose2d):
            positions = height * width
        else:
            positions = ((height + 2 * p - k) // s + 1) * ((width + 2 * p - k) // s + 1)
        forward = 2 * batch * positions * source * self.conv.out_channels * k * k
        return forward, forward * (self.of_input + self.of_weight)


def record_convolutions(trainer: Trainer) -> list[ConvCall]:
    """Every call of a convolution in one eager step."""
    calls: list[ConvCall] = []
    seen: set[str] = set()
    hooks = []

    def hook(name: str) -> Callable:
        def note(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            x = inputs[0]
            # D is called twice: for its own weights, then for the gradient of its input alone.
            calls.append(ConvCall(name, module, tuple(x.shape), x.requires_grad, name not in seen))
            seen.add(name)

        return note

    for letter, network in (("G", trainer.G), ("D", trainer.D)):
        for name, module in network.named_modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                hooks.append(module.register_forward_hook(hook(f"{letter}.{name}")))
    trainer.step(0.0)
    for handle in hooks:
        handle.remove()
    return calls


def precisions(device: torch.device) -> list[str]:
    """Those that are worth measuring on this device."""
    fastest = train_dogs.choose_precision("auto", device)
    if device.type == "cuda" and fastest == "bf16":
        return ["tf32", "bf16", "fp16", "fp32"]
    return sorted({"fp32", fastest})


class Layer(NamedTuple):
    """A convolution timed alone."""

    name: str
    shape: tuple[int, ...]
    flops: tuple[int, int]  # forward, backward
    seconds: tuple[float, float]


def time_convolutions(
    bench: Bench, calls: Sequence[ConvCall], precision: str, layout: torch.memory_format
) -> list[Layer]:
    """Each call's forward and backward alone, straight from cuDNN's or oneDNN's door."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    flags = {"enabled": True, "benchmark": True, "deterministic": False}
    layers = []
    with torch.backends.cudnn.flags(**flags, allow_tf32=precision == "tf32"):
        for call in calls:
            conv = call.conv
            x = torch.randn(call.shape, device=bench.device).to(dtype)
            x = x.contiguous(memory_format=layout)
            weight = conv.weight.detach().to(dtype).contiguous(memory_format=layout)
            geometry = (conv.stride, conv.padding, conv.dilation)
            rest = (isinstance(conv, nn.ConvTranspose2d), (0, 0), 1)
            mask = [call.of_input, call.of_weight, False]

            def forward(x=x, weight=weight, geometry=geometry, rest=rest) -> Tensor:
                return torch.ops.aten.convolution(x, weight, None, *geometry, *rest)

            gradient = torch.randn_like(forward())

            def backward(
                x=x, weight=weight, geometry=geometry, rest=rest, mask=mask, gradient=gradient
            ) -> object:
                return torch.ops.aten.convolution_backward(
                    gradient, x, weight, None, *geometry, *rest, mask
                )

            turns = {
                "forward": call_timer(forward, bench.device, bench.seconds / 60, calls=10),
                "backward": call_timer(backward, bench.device, bench.seconds / 60, calls=10),
            }
            found = in_turns(turns, min(3, bench.repeats))
            seconds = tuple(statistics.median(found[name]) for name in turns)
            layers.append(Layer(call.name, call.shape, call.flops(), seconds))
    return layers


def ceiling(layers: Sequence[Layer]) -> tuple[float, float]:
    """FLOPs and seconds of all the convolutions of a step."""
    return sum(sum(la.flops) for la in layers), sum(sum(la.seconds) for la in layers)


def print_layers(layers: Sequence[Layer]) -> None:
    print(
        f"{'layer':>14} {'input':>18} {'GFLOP':>8} {'forward ms':>11} {'backward ms':>11}", end=" "
    )
    print(f"{'forward TF/s':>12} {'backward TF/s':>13}")
    for la in layers:
        print(f"{la.name:>14} {'x'.join(map(str, la.shape)):>18}", end=" ")
        print(f"{sum(la.flops) / 1e9:>8.2f}", *(f"{1000 * s:>11.3f}" for s in la.seconds), end=" ")
        rates = [f / s / 1e12 for f, s in zip(la.flops, la.seconds)]
        print(f"{rates[0]:>12.3f} {rates[1]:>13.3f}")


def bench_roofline(
    bench: Bench, config: Config, preset: str, rows: Sequence[dict[str, object]]
) -> dict[str, object]:
    """FLOPs, what the step attains of them, and what its convolutions alone would attain."""
    flops = sum(train_dogs.flops_per_image(config).values())
    print(f"\nRoofline of {preset}, width {config.width}: {flops / 1e9:.3f} GFLOP per image-step")
    mine = [r for r in rows if r["loop"] != "plain"]
    batches = sorted({r["batch_size"] for r in mine})
    shown = max([b for b in batches if b <= 128] or batches[:1])
    points, detail = [], []
    head = f"{'batch':>5} {'precision':>9} {'layout':>13} {'ceiling TF/s':>12} {'ms':>9}"
    lines = [f"{head} {'attained TF/s':>13} {'of it %':>7}"]
    trained = ""

    def point(batch: int, calls: list[ConvCall], precision: str, layout: str) -> list[Layer]:
        layers = time_convolutions(bench, calls, precision, LAYOUTS[layout])
        total, seconds = ceiling(layers)
        best = max(r["images_per_second"] for r in mine if r["batch_size"] == batch)
        attained = best * flops if precision == trained and layout == trained_layout else None
        share = attained and attained / (total / seconds)
        found = {"batch_size": batch, "precision": precision, "layout": layout}
        found |= {"ceiling_flops": total / seconds, "seconds": seconds, "attained_flops": attained}
        points.append(found)
        lines.append(
            f"{batch:>5} {precision:>9} {layout:>13} {total / seconds / 1e12:>12.3f}"
            f" {1000 * seconds:>9.3f} {number(attained and attained / 1e12, 3):>13}"
            f" {percent(share):>7}"
        )
        return layers

    for batch in batches:
        if bench.is_late(0.9):
            break
        trainer = Trainer(replace(config, batch_size=batch), bench.dogs, bench.device)
        calls, trained = record_convolutions(trainer), trainer.precision
        trained_layout = next(k for k, v in LAYOUTS.items() if v == trainer.layout)
        layers = point(batch, calls, trained, trained_layout)
        if batch == shown:
            detail = layers
            for precision in precisions(bench.device):
                for layout in LAYOUTS:
                    if (precision, layout) != (trained, trained_layout) and not bench.is_late(0.8):
                        point(batch, calls, precision, layout)
        del trainer, calls, layers
    if detail:
        print(f"each convolution alone at batch {shown}, {trained}, {trained_layout}:")
        print_layers(detail)
    print("all convolutions of a step alone (the ceiling), and the whole step beside them:")
    print("\n".join(lines))
    hours = nine_hours(bench, flops, config.batch_size, mine)
    return {
        "preset": preset,
        "width": config.width,
        "flops_per_image_step": flops,
        "trained_in": trained,
        "points": points,
        "layers": [la._asdict() for la in detail],
        "nine_hours": hours,
    }


def nine_hours(
    bench: Bench, flops: int, batch: int, rows: Sequence[dict[str, object]]
) -> list[dict[str, object]]:
    """What 9 hours of nothing but steps buy, each row marked measured or computed."""
    h200 = "H200" in bench.described
    table = [
        ("P100, fp32", "computed", train_dogs.P100_FLOPS / flops, None),
        ("T4, fp32", "computed", T4_PEAK * SHARE_OF_PEAK / flops, None),
    ]
    if not h200:
        table.append(("H200, fp32", "computed", H200_PEAK * SHARE_OF_PEAK / flops, None))
    for size in sorted({r["batch_size"] for r in rows}):
        best = max((r for r in rows if r["batch_size"] == size), key=lambda r: r["times_plain"][0])
        name = "H200" if h200 else bench.described.split(",")[0]
        table.append((f"{name}, {best['loop']}", "measured", best["images_per_second"], size))
    print("what 9 hours (32,400 s of nothing but steps) buy:")
    print(f"{'card':>24} {'':>9} {'batch':>5} {'images/s':>9} {'million images':>14} {'steps':>10}")
    found = []
    for card, how, rate, size in table:
        images = rate * NINE_HOURS
        steps = images / (size or batch)
        found.append({"card": card, "how": how, "batch_size": size or batch})
        found[-1] |= {"images_per_second": rate, "images": images, "steps": steps}
        print(
            f"{card[:24]:>24} {how:>9} {size or batch:>5} {rate:>9.1f} {images / 1e6:>14.2f}"
            f" {steps:>10,.0f}"
        )
    print(
        f"(computed: P100 at {train_dogs.P100_FLOPS / 1e12:g} TFLOP/s, which is"
        f" {SHARE_OF_PEAK:.0%} of its float32 peak; the others at the same share of theirs,"
        f" T4 {T4_PEAK / 1e12:g}, H200 {H200_PEAK / 1e12:g} without tensor cores: an assumption)"
    )
    return found


# ------------------------------------------------------------------------------- split batch norms

# Each takes x (2B, C, H, W), the affine pair and eps. Those in INTERLEAVED want the batch as real,
# fake, real, fake, ...; the others the reals first.


def ordinary_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Batch norm of one group."""
    return F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)


def two_calls(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """A call for each half, and a copy to join them."""
    return torch.cat([ordinary_norm(half, weight, bias, eps) for half in x.chunk(2)])


def one_call(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Interleaved, B x 2C in one call: a view if contiguous; in channels last two copies."""
    count, channels, height, width = x.shape
    twice = (weight.repeat(2), bias.repeat(2), eps)
    if not x.is_contiguous():
        pairs = x.unflatten(0, (-1, 2)).permute(0, 3, 4, 1, 2).flatten(3).permute(0, 3, 1, 2)
        normed = ordinary_norm(pairs, *twice).permute(0, 2, 3, 1).unflatten(3, (2, channels))
        rows = normed.permute(0, 3, 1, 2, 4).reshape(count, height, width, channels)
        return rows.permute(0, 3, 1, 2)
    return ordinary_norm(x.view(count // 2, 2 * channels, height, width), *twice).view_as(x)


def moments(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`var_mean` over a five-dimensional view, then one multiplication with an addition."""
    halves = x.unflatten(0, (2, -1))
    variance, mean = torch.var_mean(halves, dim=(1, 3, 4), correction=0, keepdim=True)
    scale = weight[:, None, None] * torch.rsqrt(variance + eps)
    return torch.addcmul(bias[:, None, None] - mean * scale, halves, scale).flatten(0, 1)


class _WithoutJoining(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y = torch.empty_like(x)
        ctx.eps, saved = eps, []
        for half, target in zip(x.chunk(2), y.chunk(2)):
            mean, invstd = torch.empty_like(weight), torch.empty_like(weight)
            torch.ops.aten.native_batch_norm.out(
                half, weight, bias, None, None, True, 0.0, eps,
                out=target, save_mean=mean, save_invstd=invstd,
            )  # fmt: skip
            saved += [mean, invstd]
        ctx.save_for_backward(x, weight, *saved)
        return y

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *saved = ctx.saved_tensors
        of_x, of_weight, of_bias = zip(
            *(
                torch.ops.aten.native_batch_norm_backward(
                    g, half, weight, None, None, mean, invstd, True, ctx.eps, [True] * 3
                )
                for g, half, mean, invstd in zip(
                    gradient.chunk(2), x.chunk(2), saved[::2], saved[1::2]
                )
            )
        )
        return torch.cat(of_x), sum(of_weight), sum(of_bias), None


def without_joining(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """A call for each half that writes into its half of the result; joined only backwards."""
    return _WithoutJoining.apply(x, weight, bias, eps)


NORMS: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "two calls": two_calls,
    "one call": one_call,
    "moments": moments,
    "without joining": without_joining,
}
INTERLEAVED = {"one call"}
SEPARATE = "two forwards"


def interleave(x: Tensor) -> Tensor:
    """(2B, ...) with the reals first to real, fake, real, ..., in the same layout."""
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    return torch.stack(x.chunk(2), 1).flatten(0, 1).contiguous(memory_format=layout)


def logits_of(D: Discriminator, images: Tensor, norm: Callable[..., Tensor]) -> Tensor:
    """D's forward with another norm."""
    x = images
    for conv, split in zip(D.convs, D.norms):
        x = conv(x)
        if isinstance(split, SplitBatchNorm2d):
            x = norm(x, split.weight, split.bias, split.eps)
        x = F.leaky_relu(x, 0.2, inplace=True)
    return D.head(x).flatten()


def norm_shapes(D: Discriminator, batch: int) -> list[tuple[int, ...]]:
    """What D's split batch norms are given for `batch` reals and as many fakes."""
    shapes: list[tuple[int, ...]] = []
    hooks = [
        norm.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
        for norm in D.norms
        if isinstance(norm, SplitBatchNorm2d)
    ]
    with torch.no_grad():
        D(torch.zeros(2 * batch, 3, 64, 64, device=D.head.weight.device), batch)
    for handle in hooks:
        handle.remove()
    return shapes


def norm_calls(
    shape: tuple[int, ...], layout: torch.memory_format, device: torch.device, eps: float = 1e-5
) -> dict[str, Callable[[], list[Tensor]]]:
    """For each way: forward and backward of one norm; output and gradients, reals first."""
    generator = torch.Generator().manual_seed(0)

    def noise(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    x = (1.7 * noise(*shape) + 0.6).to(device).contiguous(memory_format=layout)
    gradient = noise(*shape).to(device).contiguous(memory_format=layout)
    weight = (1 + 0.2 * noise(shape[1])).to(device).requires_grad_()
    bias = (0.1 * noise(shape[1])).to(device).requires_grad_()

    def joined(name: str) -> Callable[[], list[Tensor]]:
        turned = name in INTERLEAVED
        given = (interleave(x) if turned else x.clone()).requires_grad_()
        upstream = interleave(gradient) if turned else gradient

        def call() -> list[Tensor]:
            y = NORMS[name](given, weight, bias, eps)
            return [y, *torch.autograd.grad(y, (given, weight, bias), upstream)]

        return call

    halves = [half.clone().requires_grad_() for half in x.chunk(2)]
    upstream = [half.clone() for half in gradient.chunk(2)]

    def separate() -> list[Tensor]:
        outputs = [ordinary_norm(half, weight, bias, eps) for half in halves]
        return [*outputs, *torch.autograd.grad(outputs, (*halves, weight, bias), upstream)]

    return {**{name: joined(name) for name in NORMS}, SEPARATE: separate}


def discriminator_calls(
    D: Discriminator, batch: int, layout: torch.memory_format
) -> dict[str, Callable[[], list[Tensor]]]:
    """For each way: D's part of its own step, logits (reals first) and gradients of its weights."""
    generator = torch.Generator().manual_seed(1)
    device = D.head.weight.device
    images = torch.rand(2 * batch, 3, 64, 64, generator=generator).mul(2).sub(1).to(device)
    reals, fakes = (h.contiguous(memory_format=layout) for h in images.chunk(2))
    weights = list(D.parameters())

    def gradients(real_logits: Tensor, fake_logits: Tensor) -> list[Tensor]:
        loss = F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()
        return [real_logits, fake_logits, *torch.autograd.grad(loss, weights)]

    def joined(name: str) -> Callable[[], list[Tensor]]:
        def call() -> list[Tensor]:
            both = torch.cat([reals, fakes])
            if name in INTERLEAVED:
                logits = logits_of(D, interleave(both), NORMS[name])
                return gradients(logits[::2], logits[1::2])
            return gradients(*logits_of(D, both, NORMS[name]).chunk(2))

        return call

    def separate() -> list[Tensor]:
        return gradients(*(logits_of(D, half, ordinary_norm) for half in (reals, fakes)))

    def shipped() -> list[Tensor]:
        return gradients(*D(torch.cat([reals, fakes]), batch).chunk(2))

    return {"as shipped": shipped, **{n: joined(n) for n in NORMS}, SEPARATE: separate}


def differences(calls: dict[str, Callable[[], list[Tensor]]]) -> dict[str, float]:
    """For each way, the largest relative distance of its results from two separate forwards'."""
    with train_dogs.full_precision():
        expected = [tensor.detach() for tensor in calls[SEPARATE]()]
        found = {}
        for name, call in calls.items():
            got = [tensor.detach() for tensor in call()]
            if len(got) == 4 and len(expected) == 6:  # one norm: its output and x's gradient joined
                turned = name in INTERLEAVED
                got[:2] = [torch.cat([g[::2], g[1::2]]) if turned else g for g in got[:2]]
                got = [*got[0].chunk(2), *got[1].chunk(2), *got[2:]]
            found[name] = max(
                ((g - e).norm() / e.norm().clamp_min(1e-12)).item() for g, e in zip(got, expected)
            )
    return found


def bench_norms(bench: Bench, config: Config, preset: str) -> list[dict[str, object]]:
    """All ways in both layouts: the norms of D summed, then the whole D; equality first."""
    rows = []
    batch, device = config.batch_size, bench.device
    for layout_name, layout in LAYOUTS.items():
        D = train_dogs.build_networks(config, device)[1].to(memory_format=layout)
        norms = [norm_calls(shape, layout, device) for shape in norm_shapes(D, batch)]
        works = {"norms": norms, "whole D": [discriminator_calls(D, batch, layout)]}
        for work, parts in works.items():
            wrong: Counter[str] = Counter()
            sums: dict[str, list[float]] = {}
            for calls in parts:
                for name, value in differences(calls).items():
                    wrong[name] = max(wrong[name], value)
                turns = {
                    name: call_timer(call, device, bench.seconds / 10, calls=4)
                    for name, call in calls.items()
                }
                for name, times in in_turns(turns, bench.repeats).items():
                    before = sums.get(name, [0.0] * len(times))
                    sums[name] = [a + b for a, b in zip(before, times)]
            for name, times in sums.items():
                if wrong[name] > 1e-3:
                    raise AssertionError(f"{name} is not split batch norm: off by {wrong[name]:g}")
                spread = Spread.of([1000 * t for t in times])
                ratio = Spread.of([s / t for s, t in zip(sums[SEPARATE], times)])
                row = {"preset": preset, "width": config.width, "batch_size": batch}
                row |= {"layout": layout_name, "work": work, "way": name, "ms": list(spread)}
                row |= {"times_two_forwards": list(ratio), "difference": wrong[name]}
                rows.append(row)
                print(
                    f"{preset:>10} {config.width:>5} {batch:>5} {layout_name:>13} {work:>8}"
                    f" {name:>15} {spread.show(3):>26} {ratio.show(2):>18} {wrong[name]:>10.1e}",
                    flush=True,
                )
            del parts
        del D, norms, works
    return rows


NORMS_HEAD = (
    f"{'preset':>10} {'width':>5} {'batch':>5} {'layout':>13} {'work':>8} {'way':>15}"
    f" {'ms, forward + backward':>26} {'x two forwards':>18} {'difference':>10}"
)


# -------------------------------------------------------------------------------------------- main


@dataclass
class Bench:
    """What all measurements share."""

    device: torch.device
    described: str
    dogs: CropSet
    files: list[Path]
    repeats: int
    seconds: float  # of a timed turn
    begun: float  # on time.monotonic()
    minutes: float

    def is_late(self, share: float = 1.0) -> bool:
        """Whether this share of the time given is over; says so."""
        late = time.monotonic() > self.begun + 60 * self.minutes * share
        if late:
            print("(the time is over: the rest of this is left out; give more --minutes)")
        return late


def whole_numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--norms", action="store_true", help="only the split batch norms")
    parser.add_argument("--all", action="store_true", help="steps, roofline and norms")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--presets", default="", help="some of them, by commas; default all")
    parser.add_argument(
        "--widths", type=whole_numbers, help="default: the preset's on a GPU, 16 on a CPU"
    )
    parser.add_argument(
        "--batch-sizes", type=whole_numbers, help="default: 32,128,64,256 on a GPU, 16,32 on a CPU"
    )
    parser.add_argument("--repeats", type=int, default=5, help="alternating repeats; default 5")
    parser.add_argument(
        "--seconds-per-point", type=float, help="of a timed turn; default 0.5 on a GPU, 4 on a CPU"
    )
    parser.add_argument("--minutes", type=float, default=7.0, help="start nothing after; default 7")
    parser.add_argument("--data", action="append", help="real dogs; default: noise")
    return parser.parse_args(argv)


def resized(config: Config, width: int) -> Config:
    """The configuration at another width, D's in proportion."""
    return replace(config, width=width, d_width=round(config.d_width * width / config.width))


def main(argv: Sequence[str] = ()) -> dict[str, object]:
    """Prints the tables, returns what the JSON line holds."""
    begun = time.monotonic()
    given = arguments(argv)
    device = train_dogs.choose_device(given.device)
    cuda = device.type == "cuda"
    torch.backends.cudnn.benchmark = True  # as both the project and the plain loop's model have it
    if cuda:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]):
            pass  # before the first capture, so that the profiler sees inside graphs
    described = train_dogs.describe_device(device)
    print(described)
    presets = given.presets.split(",") if given.presets else list(train_dogs.PRESETS)
    batches = given.batch_sizes or ([32, 128, 64, 256] if cuda else [16, 32])
    if given.data:
        found = train_dogs.find_photos(given.data)
        dogs = train_dogs.prepare_crops(found, Config().crops)
    else:
        dogs = train_dogs.random_crops(PHOTOS if cuda else 1024)
    results: dict[str, object] = {"device": described, "python": sys.version.split()[0]}
    with tempfile.TemporaryDirectory(prefix="bench-train-") as folder:
        bench = Bench(
            device=device,
            described=described,
            dogs=dogs,
            files=[] if given.norms else write_pictures(dogs, Path(folder)),
            repeats=given.repeats,
            seconds=given.seconds_per_point or (0.5 if cuda else 4.0),
            begun=begun,
            minutes=given.minutes,
        )
        configs = [
            (preset, resized(config, width))
            for preset in presets
            for config in [Config(**train_dogs.PRESETS[preset])]
            for width in given.widths or [config.width if cuda else 16]
        ]
        if not given.norms:
            results["steps"] = steps = []
            print("Steps: median (least-most) over", given.repeats, "alternating repeats")
            print(STEPS_HEAD)
            sizes = [(preset, config, batch) for batch in batches for preset, config in configs]
            for preset, config, batch in sizes:
                if bench.is_late(0.6):
                    break
                try:
                    steps += bench_steps(bench, replace(config, batch_size=batch), preset)
                except torch.cuda.OutOfMemoryError:
                    print(f"{preset:>10} {config.width:>5} {batch:>5}  too little GPU memory")
                if cuda:
                    gc.collect()
                    torch.cuda.empty_cache()
            results["rooflines"] = rooflines = []
            for preset, config in configs:
                rows = [r for r in steps if (r["preset"], r["width"]) == (preset, config.width)]
                if rows and not bench.is_late(0.9):
                    rooflines.append(bench_roofline(bench, config, preset, rows))
        if given.norms or given.all:
            results["norms"] = norms = []
            print("\nSplit batch norm: median (least-most) over", given.repeats, "repeats")
            print(NORMS_HEAD)
            shapes: set[tuple[int, int]] = set()
            for preset, config in configs:
                for batch in batches:
                    shape = (config.d_width or config.width, batch)
                    if shape not in shapes and not bench.is_late():
                        norms += bench_norms(bench, replace(config, batch_size=batch), preset)
                    shapes.add(shape)  # presets that share D's shapes share its times
    results["seconds"] = round(time.monotonic() - begun, 1)
    print(json.dumps(results))
    return results


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except train_dogs.UserError as error:
        sys.exit(f"bench_train: {error}")
