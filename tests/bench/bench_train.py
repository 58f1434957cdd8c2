"""How fast the dogs train: a step of `train_dogs.py` against the plain DCGAN loop.

    python tests/bench/bench_train.py  # the default recipe on the best device here
    python tests/bench/bench_train.py --all --widths 16   # every preset at one width

All train the same networks from the same crops, which lie on the device:

- `plain`, the loop that most DCGANs begin from, pytorch/examples `dcgan/main.py`: two forwards of
  D with a backward each, a third for G whose backward also computes gradients for D's weights in
  vain, `.item()` in every iteration, Adam and memory layout as they come. Its D has `BatchNorm2d`
  in training mode in the place of split batch norm, which is the same mathematics.
- `eager P`: ours in precision P. `captured P`: the same, replayed as a CUDA graph (GPUs alone).
- `convolutions P`: nothing but the convolutions of that step, with its own tensors: the ceiling.

They take turns within each repeat, forwards and backwards alternately, so that a device that warms
up or a neighbour that wakes hits all of them; ratios are taken within a repeat. A spread is the
median with the least and the most over the repeats. The last line of the output is everything as
JSON. One that failed is shown as failed, with its error, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import gc
import json
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
from train_dogs import Config, CropSet, Discriminator, SplitBatchNorm2d, Trainer, capture

# -------------------------------------------------------------------------------------- the clock


def spread(values: Sequence[float]) -> list[float]:
    """Median, least and most of one value for each repeat."""
    return [statistics.median(values), min(values), max(values)]


def shown(numbers: list[float] | None) -> str:
    """A spread as `1.20 (1.16-1.26)`."""
    return "{:.2f} ({:.2f}-{:.2f})".format(*numbers) if numbers else "-"


@dataclass
class Contestant:
    """Something that computes a step, under a precision's setting of TF32."""

    name: str
    make: Callable[[], Callable[[], object]]  # to its step
    tf32: bool
    step: Callable[[], object] = lambda: None
    count: int = 1  # of steps in a turn
    times: list[float] = field(default_factory=list)  # seconds of a step, by repeat
    failed: str = ""

    def attempt(self, part: Callable[[], object]) -> None:
        """Run a part of the race; an error ends it for this contestant, and for no other."""
        torch.backends.cudnn.allow_tf32 = self.tf32
        try:
            if not self.failed:
                part()
        except (RuntimeError, MemoryError) as error:
            self.failed = train_dogs.first_line(error)

    def prepare(self, device: torch.device, seconds: float) -> None:
        """Make it, and find how many steps take about `seconds`."""
        self.step = self.make()
        self.turn(device)  # chooses algorithms
        self.count = max(2, round(seconds / self.turn(device)))

    def turn(self, device: torch.device) -> float:
        """Seconds of a step, in the mean of `count` after an untimed one."""
        self.step()
        wait(device)
        begin = time.perf_counter()
        for _ in range(self.count):
            self.step()
        wait(device)
        return (time.perf_counter() - begin) / self.count


def wait(device: torch.device) -> None:
    """Until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def race(
    contestants: Sequence[Contestant], device: torch.device, repeats: int, seconds: float
) -> None:
    """Fill in `times`: every contestant once in each repeat, in alternating order."""
    for one in contestants:
        one.attempt(partial(one.prepare, device, seconds))
    for repeat in range(repeats):
        for one in contestants[:: -1 if repeat % 2 else 1]:
            one.attempt(lambda one=one: one.times.append(one.turn(device)))


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
    """A step of a run late enough for SWA. Raises `RuntimeError` where `replay` is not possible."""
    trainer = Trainer(config, crops, device)
    if replay and (reason := capture(trainer)):
        raise RuntimeError(reason)
    return lambda: trainer.step(0.6)


class Convolutions(TorchDispatchMode):
    """Records every convolution, and backward of one, with the tensors that it was given."""

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
        """All of them once more, their results thrown away."""
        for func, args in self.calls:
            func(*args)


def convolutions_alone(
    config: Config, crops: CropSet, device: torch.device
) -> Callable[[], object]:
    """Nothing but the convolutions of a step; on CUDA as a graph, so that no launch is timed."""
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
    return lambda kept=found: graph.replay()  # which reads the tensors that are kept


def precisions(device: torch.device) -> list[str]:
    """Those that this device has in hardware."""
    fastest = train_dogs.choose_precision("auto", device)
    if device.type == "cuda" and fastest == "bf16":
        return ["fp32", "tf32", "bf16", "fp16"]
    return sorted({"fp32", fastest})


def contestants_of(config: Config, crops: CropSet, device: torch.device) -> list[Contestant]:
    """All that race on this device; none is made yet."""
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

HEAD = (
    f"{'preset':>12} {'width':>5} {'batch':>5} {'contestant':>17} {'images/s':>9}"
    f" {'ms per step':>26} {'times plain':>18} {'GFLOP/s':>9} {'of the ceiling':>18}"
)


def rows_of(contestants: Sequence[Contestant], config: Config, preset: str) -> list[dict]:
    """What each contestant showed; GFLOP/s are those of our step, which is what is needed."""
    flops = train_dogs.flops_per_image(config)
    times = {one.name: one.times for one in contestants if not one.failed}

    def ratio(base: str, mine: list[float]) -> list[float] | None:
        return spread([b / t for b, t in zip(times[base], mine)]) if base in times else None

    rows = []
    for one in contestants:
        row = {"preset": preset, "width": config.width, "batch_size": config.batch_size}
        row["contestant"] = one.name
        if one.failed:
            rows.append(row | {"failed": one.failed})
            continue
        rate = config.batch_size / statistics.median(one.times)
        row |= {"images_per_second": rate, "gflops": rate * flops / 1e9}
        row |= {"ms_per_step": spread([1000 * t for t in one.times])}
        row |= {"times_plain": ratio("plain", one.times)}
        row |= {"of_ceiling": ratio(f"convolutions {one.name.partition(' ')[2]}", one.times)}
        rows.append(row)
    return rows


def show(row: dict) -> str:
    """A row of the table."""
    start = f"{row['preset']:>12} {row['width']:>5} {row['batch_size']:>5} {row['contestant']:>17}"
    if "failed" in row:
        return f"{start} failed: {row['failed']}"
    return (
        f"{start} {row['images_per_second']:>9.1f} {shown(row['ms_per_step']):>26}"
        f" {shown(row['times_plain']):>18} {row['gflops']:>9.1f} {shown(row['of_ceiling']):>18}"
    )


# --------------------------------------------------------------------------------------------- main


def noise_crops(count: int, breeds: int = 120) -> CropSet:
    """`count` dogs of noise, one square view of each."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 64, 64, 3), dtype=torch.uint8, generator=generator)
    return CropSet(
        pixels=pixels,
        first=torch.arange(count)[:, None],
        count=torch.ones((count, 1), dtype=torch.int64),
        weights=torch.ones(1),
        breed=torch.arange(count) % breeds,
        breeds=[f"noise {k}" for k in range(breeds)],
        skipped=[],
        key="noise",
    )


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    names = list(train_dogs.PRESETS)
    parser.add_argument("--presets", choices=names, nargs="+", default=["dogs"], metavar="NAME")
    parser.add_argument("--all", dest="presets", action="store_const", const=names)
    parser.add_argument("--widths", type=int, nargs="+", help="default the preset's; 16 on a CPU")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32], help="default 32")
    parser.add_argument("--repeats", type=int, default=5, help="default 5")
    parser.add_argument("--seconds", type=float, help="of a turn; default 0.5 on a GPU, 4 on a CPU")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return parser.parse_args(argv)


def main(argv: Sequence[str] = ()) -> int:
    """Print the table and everything as JSON; return 1 where a contestant failed."""
    given = arguments(argv)
    device = train_dogs.choose_device(given.device)
    cuda = device.type == "cuda"
    torch.backends.cudnn.benchmark = True  # as in a run of ours
    crops, rows = noise_crops(20_580 if cuda else 1024), []
    described = train_dogs.describe_device(device)
    print(f"{described}; median (least-most) over {given.repeats} repeats\n{HEAD}")
    for preset in given.presets:
        config = Config(**train_dogs.PRESETS[preset])
        for width in given.widths or [config.width if cuda else 16]:
            for batch in given.batch_sizes:
                sized = replace(config, width=width, batch_size=batch)
                contestants = contestants_of(sized, crops, device)
                race(contestants, device, given.repeats, given.seconds or (0.5 if cuda else 4.0))
                found = rows_of(contestants, sized, preset)
                print(*map(show, found), sep="\n", flush=True)
                rows += found
                del contestants
                gc.collect()  # a trainer holds its own step
                if cuda:
                    torch.cuda.empty_cache()
    print(json.dumps({"device": described, "python": sys.version.split()[0], "rows": rows}))
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except train_dogs.UserError as error:
        sys.exit(f"bench_train: {error}")
