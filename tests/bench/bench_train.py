"""Compare the speed of a training step of `train_dogs.py` with that of the plain DCGAN loop.

    python tests/bench/bench_train.py                           # the default recipe
    python tests/bench/bench_train.py --width 16 --device cpu

All train the same networks on the same crops, which are on the device:

- `plain`: the loop of pytorch/examples `dcgan/main.py`: two forwards of D with a backward each, a
  third for G whose backward also computes the unused gradients of D's weights, `.item()` in every
  iteration, default Adam and memory layout. Its D has `BatchNorm2d` in training mode instead of
  split batch norm, which is mathematically equal.
- `eager P`: ours in precision P. `captured P`: the same, replayed as a CUDA graph (GPUs only).
- `convolutions P`: only the convolutions of that step, on its own tensors: an upper bound.

Each contestant runs once in each repeat, in alternating order, so that a warm device or another
process affects all of them; ratios are computed within a repeat. Numbers are the median with the
minimum and maximum over the repeats.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train_dogs
from train_dogs import Config, CropSet, Discriminator, SplitBatchNorm2d, Trainer, UserError

# -------------------------------------------------------------------------------------- the clock


def spread(values: Sequence[float]) -> str:
    """Median, minimum and maximum, as `1.20 (1.16-1.26)`."""
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


@dataclass
class Contestant:
    """One way to compute a step, with or without TF32."""

    name: str
    make: Callable[[], Callable[[], object]]  # returns its step
    tf32: bool
    times: list[float] = field(default_factory=list)  # seconds of a step, by repeat

    def prepare(self, device: torch.device, seconds: float) -> None:
        """Make its step, and find how many steps take about `seconds`."""
        torch.backends.cudnn.allow_tf32 = self.tf32
        self.step, self.count = self.make(), 1
        self.turn(device)  # the first steps choose algorithms
        self.count = max(2, round(seconds / self.turn(device)))

    def turn(self, device: torch.device) -> float:
        """Mean seconds of `count` steps, after an untimed one."""
        torch.backends.cudnn.allow_tf32 = self.tf32
        self.step()
        wait(device)
        begin = time.perf_counter()
        for _ in range(self.count):
            self.step()
        wait(device)
        return (time.perf_counter() - begin) / self.count


def wait(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def race(
    contestants: Sequence[Contestant], device: torch.device, repeats: int, seconds: float
) -> None:
    """Measure `times`: every contestant once in each repeat, in alternating order."""
    for one in contestants:
        one.prepare(device, seconds)
    for repeat in range(repeats):
        for one in contestants[:: -1 if repeat % 2 else 1]:
            one.times.append(one.turn(device))


# ---------------------------------------------------------------------------------- the plain loop


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
    return nn.Sequential(*layers, D.linear)


class PlainLoop:
    """The loop of pytorch/examples `dcgan/main.py` over the same networks."""

    def __init__(self, config: Config, crops: CropSet, device: torch.device) -> None:
        G, D = train_dogs.build_networks(config, torch.device("cpu"))
        self.G = G.to(device, memory_format=torch.contiguous_format)
        self.D = plain_discriminator(D).to(device, memory_format=torch.contiguous_format)
        self.config, self.device, self.crops = config, device, crops.to(device)
        betas = (config.beta1, config.beta2)
        self.opt_g = torch.optim.Adam(self.G.parameters(), lr=config.g_lr, betas=betas)
        self.opt_d = torch.optim.Adam(self.D.parameters(), lr=config.d_lr, betas=betas)
        self.criterion = nn.BCEWithLogitsLoss()
        self.losses = (0.0, 0.0)

    def step(self) -> None:
        """One iteration."""
        G, D, size = self.G, self.D, self.config.batch_size
        rows = torch.randint(len(self.crops.first), (size,), device=self.device)
        real = train_dogs.draw_reals(self.crops, rows, None)

        # Update D: maximise log(D(x)) + log(1 - D(G(z)))
        D.zero_grad()
        label = torch.full((size,), 1.0, device=self.device)
        output = D(real).view(-1)
        loss_real = self.criterion(output, label)
        loss_real.backward()
        output.mean().item()
        noise = torch.randn(size, self.config.latent_dim, device=self.device)
        fake = G(noise)
        label.fill_(0.0)
        output = D(fake.detach()).view(-1)
        loss_fake = self.criterion(output, label)
        loss_fake.backward()
        output.mean().item()
        self.opt_d.step()

        # Update G: maximise log(D(G(z)))
        G.zero_grad()
        label.fill_(1.0)
        output = D(fake).view(-1)
        loss_g = self.criterion(output, label)
        loss_g.backward()
        output.mean().item()
        self.opt_g.step()
        self.losses = ((loss_real + loss_fake).item(), loss_g.item())


# ----------------------------------------------------------------------------------- ours, and less


def our_step(
    config: Config, crops: CropSet, device: torch.device, replay: bool = False
) -> Callable[[], None]:
    """A step of a run late enough for SWA. Raises `UserError` if it cannot be replayed."""
    trainer = Trainer(config, crops, device)
    if replay and (reason := train_dogs.capture(trainer)):
        raise UserError(reason)
    return lambda: trainer.step(0.6)


class Convolutions(TorchDispatchMode):
    """Records every convolution and its backward, with their arguments."""

    OPERATORS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable, tuple]] = []

    def __torch_dispatch__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if func in self.OPERATORS:
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))

    @torch.no_grad()
    def again(self) -> None:
        """Compute all of them again, without using the results."""
        for func, args in self.calls:
            func(*args)


def convolutions_alone(
    config: Config, crops: CropSet, device: torch.device
) -> Callable[[], object]:
    """Only the convolutions of a step; on CUDA as a graph, so that no launch is timed."""
    trainer = Trainer(config, crops, device)
    trainer.step(0.0)
    with Convolutions() as found:
        trainer.one_step()
    if device.type != "cuda":
        return found.again
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found.again()
        wait(device)
        with torch.cuda.graph(graph, stream=stream):
            found.again()
    return lambda kept=found: graph.replay()  # the graph reads the recorded tensors


def precisions(device: torch.device) -> list[str]:
    """The precisions that this device has in hardware."""
    fastest = train_dogs.choose_precision("auto", device)
    if device.type == "cuda" and fastest == "bf16":
        return ["fp32", "tf32", "bf16", "fp16"]
    return sorted({"fp32", fastest})


def contestants_of(config: Config, crops: CropSet, device: torch.device) -> list[Contestant]:
    """All contestants for this device, not made yet."""
    found = [Contestant("plain", lambda: PlainLoop(config, crops, device).step, tf32=True)]
    for precision in precisions(device):
        given = (replace(config, precision=precision), crops, device)
        makers = {"eager": our_step, "convolutions": convolutions_alone}
        if device.type == "cuda":
            makers["captured"] = partial(our_step, replay=True)
        for name, make in makers.items():
            tf32 = precision != "fp32"
            found.append(Contestant(f"{name} {precision}", partial(make, *given), tf32))
    return found


# ---------------------------------------------------------------------------------------- the table

COLUMNS = "{:>17} {:>9} {:>26} {:>18} {:>9} {:>18}"
HEAD = COLUMNS.format(
    "contestant", "images/s", "ms per step", "times plain", "GFLOP/s", "of the bound"
)


def rows_of(contestants: Sequence[Contestant], config: Config) -> list[str]:
    """A row for each contestant; GFLOP/s count the FLOPs of our step, for `plain` too."""
    times = {one.name: one.times for one in contestants}

    def ratio(base: str, mine: list[float]) -> str:
        return spread([b / t for b, t in zip(times[base], mine)]) if base in times else "-"

    rows = []
    for name, mine in times.items():
        rate = config.batch_size / statistics.median(mine)
        rows.append(COLUMNS.format(
            name,
            f"{rate:.1f}",
            spread([1000 * t for t in mine]),
            ratio("plain", mine),
            f"{rate * train_dogs.flops_per_image(config) / 1e9:.1f}",
            ratio(f"convolutions {name.partition(' ')[2]}", mine),
        ))  # fmt: skip
    return rows


# --------------------------------------------------------------------------------------------- main


def noise_crops(count: int) -> CropSet:
    """`count` dogs of noise, one square view of each."""
    generator = torch.Generator().manual_seed(0)
    return CropSet(
        pixels=torch.randint(256, (count, 64, 64, 3), dtype=torch.uint8, generator=generator),
        first=torch.arange(count)[:, None],
        count=torch.ones((count, 1), dtype=torch.int64),
        weights=torch.ones(1),
        breed=torch.zeros(count, dtype=torch.int64),
        breeds=["noise"],
        skipped=[],
        key="noise",
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--width", type=int, help="default 48 on a GPU, 16 on a CPU")
    parser.add_argument("--batch-size", type=int, default=32, help="default 32")
    parser.add_argument("--repeats", type=int, default=5, help="default 5")
    parser.add_argument("--seconds", type=float, help="of a turn; default 0.5 on a GPU, 4 on a CPU")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    given = parser.parse_args(argv)
    device = train_dogs.choose_device(given.device)
    cuda = device.type == "cuda"
    torch.backends.cudnn.benchmark = True  # as train_dogs.py does
    crops = noise_crops(20_580 if cuda else 1024)
    config = Config(width=given.width or (48 if cuda else 16), batch_size=given.batch_size)
    described = train_dogs.describe_device(device)
    print(f"{described}; width {config.width}, batch size {config.batch_size}; median (minimum-"
          f"maximum) over {given.repeats} repeats\n{HEAD}")  # fmt: skip
    contestants = contestants_of(config, crops, device)
    race(contestants, device, given.repeats, given.seconds or (0.5 if cuda else 4.0))
    print(*rows_of(contestants, config), sep="\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"bench_train: {error}")
