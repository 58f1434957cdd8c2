"""One change at a time: train it, score it, and say in a table what it costs and what it gains.

    python tests/tools/ablation.py --data DOGS --out runs --hours 0.85 --seeds 0,1 base breed augment
    python tests/tools/ablation.py --data DOGS --out runs --points 12 base@8.5
    python tests/tools/ablation.py --data DOGS --out runs --tenth --seeds 0,1 base no-margin r1
    python tests/tools/ablation.py --data DOGS --floor base box square+whole
    python tests/tools/ablation.py --out runs --table

A change is a name of `CHANGES` or fields of the configuration, as in `margin=1,smoothing=0.05`; the
same fields for all by `--base width=16`. Each run costs `--hours` P100-hours by arithmetic, or what
stands behind its @, so that changes compare at equal FLOPs on any device. It keeps the generators
of `--averages` at the end (and at `--points` before it, for the curve), as `train_dogs.py --breed`
and `--sample-only` read them, and scores `--images` of each by both rules of mifid.py. Lines are
appended to `OUT/results.jsonl`, one for each generator scored. What is done is not done again, and
training goes on from its checkpoint: stop it at any time and give the same command.

`--tenth` trains on a tenth of the photos, chosen by a hash of their names, and scores against the
others: there over-fitting is real, within hours. `--floor` trains nothing: it scores real dogs,
cropped as each change says, against photos that show others: what a perfect generator of those
crops would reach. For a machine without the photos: `--pack dogs.pt` writes the crops that the
changes need and the references' features to one file, which is then its `--data`. `--fast` scores
in half precision, as mifid.py's does; such scores compare with each other alone.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import mifid
import train_dogs
from train_dogs import Config, Photo, PhotoSet, Trainer, digest

CHANGES: dict[str, dict[str, object]] = {
    "base": {},
    "square+whole": {"crops": "square:1,whole:1"},
    "square+context": {"crops": "square:1,context:1"},
    "box": {"crops": "box"},
    "translation": {"augment": "translation"},
    "augment": {"augment": "color,translation,cutout"},
    "late-translation": {"augment": "translation", "augment_start": 0.5},
    "breed": {"condition": "breed"},
    "breed+classify": {"condition": "breed", "classify": 0.1},
    "decay": {"lr_decay_start": 0.5},
    "r1": {"r1": 0.1},
    "lazy-r1": {"r1": 0.1, "r1_every": 8},
    "rals": {"loss": "rals"},
    "no-margin": {"margin": 1.0},
    "batch-16": {"batch_size": 16},
}


def fields_of(text: str) -> dict[str, object]:
    """A name of `CHANGES`, or `field=value,…` (a comma within a value doubled), as fields."""
    if text in CHANGES:
        return CHANGES[text]
    types = {f.name: type(f.default) for f in fields(Config)}
    found = {}
    for part in text.replace(",,", "\0").split(","):
        name, _, value = part.replace("\0", ",").partition("=")
        if name not in types:
            sys.exit(f"{part} is no change: give one of {', '.join(CHANGES)}, or field=value.")
        found[name] = types[name](value)
    return found


class Run:
    """One change at one seed: its configuration, its folder, and what it is called in the log."""

    def __init__(self, args: argparse.Namespace, change: str, seed: int) -> None:
        self.change, _, own_hours = change.partition("@")
        hours = float(own_hours or args.hours)
        recipe = train_dogs.PRESETS[args.preset] | args.base | fields_of(self.change)
        config = replace(Config(**recipe), seed=seed, hours=math.inf, device=args.device)
        self.step_hours = train_dogs.p100_hours(config, 1)
        self.steps = max(1, round(hours / self.step_hours))
        self.config = train_dogs.check_config(replace(config, steps=self.steps))
        self.key = {"preset": args.preset, "base": args.base, "tenth": args.tenth}
        self.key |= {"change": self.change, "seed": seed, "hours": hours}
        self.folder = args.out / digest(self.key)

    def generator(self, step: int, average: str) -> Path:
        """Where the generator of an average at a step lies."""
        return self.folder / f"generator_{step:07d}_{average}.pt"

    def __str__(self) -> str:
        return f"{self.change}, seed {self.config.seed}"


# --------------------------------------------------------------------------------------------- dogs


class Dogs:
    """What is trained on and what scores compare with: of photos, or of a file that was packed."""

    def __init__(self, data: Path, tenth: bool, fast: bool = False) -> None:
        self.packed, self.tenth, self.fast = {}, tenth, fast
        if data.suffix == ".pt":
            self.packed = torch.load(data, weights_only=True, mmap=True)
            self.tenth, self.fast = self.packed["tenth"], self.packed["fast"]
            return
        self.seen = self.unseen = train_dogs.find_photos([data])
        if tenth:
            self.seen, self.unseen = split(self.seen, lambda n: int(digest(n), 16) % 10 == 0)

    def crops(self, kinds: str) -> train_dogs.CropSet:
        """What `kinds` show of those to train on."""
        if not self.packed:
            return train_dogs.prepare_crops(self.seen, kinds)
        if kinds not in self.packed["crops"]:
            sys.exit(f"these dogs were packed without --crops {kinds}: pack them again.")
        return train_dogs.CropSet(**self.packed["crops"][kinds])

    def references(self, model: mifid.Inception) -> dict[str, np.ndarray]:
        """The features of those to compare with, by rule."""
        if not self.packed:
            return references(self.unseen, model)
        return {rule: kept.numpy() for rule, kept in self.packed["references"].items()}


def split(photos: PhotoSet, chosen: Callable[[str], bool]) -> tuple[PhotoSet, PhotoSet]:
    """The photos that are chosen by name, and the others, each as a set of its own."""
    both = [[p for p in photos.photos if chosen(p.name) is wanted] for wanted in (True, False)]
    return tuple(replace(photos, photos=some, skipped=[]) for some in both)


def references(photos: PhotoSet, model: mifid.Inception) -> dict[str, np.ndarray]:
    """Features of whole frames and of boxes, as mifid.py's two rules squash them; cached."""
    names = [(p.name, p.picture.size, p.picture.stamp) for p in photos.photos]
    found = {}
    for rule in ("whole", "box") if photos.annotated else ("whole",):
        key = digest([rule, names, model.precision])
        path = train_dogs.cache_folder() / f"reference_{key}.npz"
        found[rule] = kept_features(path, model, partial(squashed, photos, rule))
    return found


def squashed(photos: PhotoSet, rule: str) -> np.ndarray:
    """uint8 (n, 64, 64, 3): every readable photo whole, or every box by itself."""

    def views(photo: Photo) -> list[np.ndarray]:
        try:
            picture, boxes = train_dogs.read_photo(photo)
        except train_dogs.BadItem:
            return []
        frames = [picture] if rule == "whole" else [picture.crop([*map(round, b)]) for b in boxes]
        return [np.asarray(f.resize((64, 64), Image.Resampling.LANCZOS)) for f in frames]

    return np.stack([v for found in train_dogs.in_threads(views, photos.photos) for v in found])


def kept_features(
    path: Path, model: mifid.Inception, images: Callable[[], np.ndarray]
) -> np.ndarray:
    """The features in `path`; made of `images` and written there where there are none."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        mifid.save_arrays(path, features=mifid.extract_features(model, images()))
    with np.load(path) as arrays:
        return arrays["features"]


# ----------------------------------------------------------------------------------------- training


def marks(steps: int, points: int) -> list[int]:
    """Steps at which generators are kept: the last one, and each time about 1.5 fewer."""
    return sorted({max(1, round(steps / 1.5**k)) for k in range(points)})


def train(run: Run, dogs: train_dogs.CropSet, averages: Sequence[str], points: int) -> float:
    """Train to the end, from the checkpoint on if there is one, and keep the generators.

    Returns the seconds that it took, all calls together.
    """
    config, checkpoint = run.config, run.folder / "checkpoint.pt"
    trainer, seconds = Trainer(config, dogs, train_dogs.choose_device(config.device)), 0.0
    if checkpoint.exists():
        state = train_dogs.load_state(checkpoint, "trainer")
        train_dogs.load_trainer(trainer, state)
        seconds = state["seconds_used"]
    if trainer.steps_done < run.steps and (reason := train_dogs.capture(trainer)):
        print(f"{run}: {reason}: going on by a slower way", flush=True)
    begin = saved = time.monotonic()
    wanted, start = marks(run.steps, points), trainer.steps_done
    while True:
        if trainer.steps_done in wanted:
            if not trainer.is_healthy():
                sys.exit(f"{run}: not finite at step {trainer.steps_done}")
            for average in averages:
                keep_generator(run, trainer, average)
        done = trainer.steps_done == run.steps
        if (done and start < run.steps) or time.monotonic() > saved + 60:
            saved = time.monotonic()
            clock = train_dogs.Clock(config, begin, seconds)
            train_dogs.save(checkpoint, train_dogs.checkpoint_state(trainer, clock, done))
            stats = {k: round(v, 3) for k, v in trainer.read_stats().items()}
            print(f"{run}: {trainer.steps_done / run.steps:.0%} {stats}", flush=True)
        if done:
            return seconds + (saved - begin)
        trainer.step(trainer.steps_done / run.steps)


def keep_generator(run: Run, trainer: Trainer, average: str) -> None:
    """Save G with the weights of `average`, if it is not there; an average begins some time."""
    path, averages = run.generator(trainer.steps_done, average), trainer.averages
    begun = {"swa": averages.swa_updates, "ema": averages.ema_updates, "none": True}[average]
    if path.exists() or not begun:
        return
    G = averages.generator(trainer.G, average, train_dogs.NORM_BATCHES, trainer.config)
    state = {"format": train_dogs.FORMAT, "config": train_dogs.plain(trainer.config)}
    state |= {"weights": average, "shape": G.shape, "breeds": trainer.crops.breeds}
    state |= {"steps_done": trainer.steps_done}
    weights = {k: v.cpu() for k, v in G.state_dict().items()}
    train_dogs.save(path, state | {"state_dict": weights})


# ------------------------------------------------------------------------------------------ scoring


class Scorer:
    """Inception, and the references' features, ready for one generator after another."""

    def __init__(
        self,
        device: torch.device,
        found: Callable[[mifid.Inception], dict[str, np.ndarray]],
        fast: bool,
    ) -> None:
        """`found`: what makes the features of the references, by rule."""
        self.device, self.model = device, mifid.load_inception(device=device, fast=fast)
        self.features = found(self.model)

    def score(self, path: Path, config: Config, count: int) -> dict[str, object]:
        """`compare` for the images that a submission of the generator in `path` would hold."""
        kept = path.with_name(f"{path.stem}_{count}_{self.model.precision}.npz")
        images = partial(submitted, path, config, count)
        return self.compare(kept_features(kept, self.model, images))

    def compare(self, features: np.ndarray) -> dict[str, object]:
        """FID by each rule, and the other numbers of the public one, for N x 2048 features."""
        found = {
            rule: mifid.score(features, reals, device=str(self.device))
            for rule, reals in self.features.items()
        }
        line = {name: found["whole"][name] for name in SCORES}
        return line | {"fid_box": found["box"]["fid"] if "box" in found else None}


SCORES = (
    "fid", "memorization_distance", "mifid", "unseen_distance", "n_generated", "n_reference",
)  # fmt: skip


def submitted(path: Path, config: Config, count: int) -> np.ndarray:
    """uint8 (count, 64, 64, 3): what the generator in `path` draws; a sheet is laid beside it."""
    device = train_dogs.choose_device(config.device)
    state = train_dogs.load_state(path, "state_dict")
    G = train_dogs.make_generator(state["shape"])
    G.load_state_dict(state["state_dict"])
    G = G.to(device, memory_format=train_dogs.memory_layout(device)).eval()
    seed = train_dogs.seed_for(config.seed, "submission")
    z = train_dogs.draw_latents(count, G.latent_dim, seed, config.truncation)
    labels = train_dogs.draw_labels(G, count, config.seed)
    images = np.concatenate(list(train_dogs.sample_images(G, z, labels)))
    train_dogs.save_picture(path.with_suffix(".png"), [train_dogs.draw_sheet(images[:100])])
    return images


def show_floor(args: argparse.Namespace) -> str:
    """Markdown: real dogs of some photos, cropped as the changes say, against the other photos."""
    found = train_dogs.find_photos([args.data])
    order = np.random.default_rng(args.seeds[0]).permutation(len(found.photos))
    names = {found.photos[k].name for k in order[: min(args.images, len(order) // 2)]}
    drawn, others = split(found, names.__contains__)
    device = train_dogs.choose_device(args.device)
    scorer = Scorer(device, partial(references, others), args.fast)
    text = [
        "| crops | images | FID, whole frames | FID, boxes | distance |",
        "|---|---|---|---|---|",
    ]
    for change in args.changes:
        crops = Run(args, change, 0).config.crops
        dogs = train_dogs.prepare_crops(drawn, crops)
        rows = torch.arange(args.images) % len(dogs.first)  # every dog about as often
        chance = torch.Generator().manual_seed(args.seeds[0])
        reals = [train_dogs.draw_reals(dogs, part, chance) for part in rows.split(1000)]
        images = np.concatenate([train_dogs.to_bytes(real) for real in reals])
        x = scorer.compare(mifid.extract_features(scorer.model, images))
        cells = [spread([x], *of) for of in COLUMNS]
        text.append(f"| {crops} | {len(images):,} | {' | '.join(cells)} |")
    return "\n".join(text)


# ---------------------------------------------------------------------------------------- the table

COLUMNS = (("fid", 1), ("fid_box", 1), ("memorization_distance", 3))  # and their digits


def read_lines(out: Path) -> list[dict]:
    """What was scored so far."""
    path = out / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append_line(out: Path, line: dict) -> None:
    """Add a line; the file is whole at any time."""
    lines = [*read_lines(out), line]
    with train_dogs.whole_file(out / "results.jsonl") as part:
        part.write_text("".join(json.dumps(x) + "\n" for x in lines))


def grouped(lines: Sequence[dict], *names: str) -> dict[str, list[dict]]:
    """Lines by the values of some fields."""
    groups: dict[str, list[dict]] = {}
    for x in lines:
        groups.setdefault(json.dumps([x[name] for name in names]), []).append(x)
    return groups


def show_tables(out: Path) -> str:
    """Markdown: what each change scored at the end of its runs, and the curves of long ones."""
    text = []
    for mine in grouped(read_lines(out), "preset", "base", "tenth", "hours", "n", "fast").values():
        x = mine[0]
        where = "a tenth against the others, " if x["tenth"] else ""
        text.append(
            f"\n{x['preset']} with {x['base']}, {where}{x['hours']} P100-hours a run,"
            f" {x['n']:,} images scored{' by --fast' * x['fast']}\n\n"
            "| change | weights | seeds | images | FID, whole frames | FID, boxes | distance |\n"
            "|---|---|---|---|---|---|---|"
        )
        ends = grouped([x for x in mine if x["step"] == x["steps"]], "change", "average").values()
        for rows in sorted(ends, key=lambda rows: statistics.mean(x["fid"] for x in rows)):
            x, cells = rows[0], [spread(rows, *of) for of in COLUMNS]
            start = f"{x['change']} | {x['average']} | {len(rows)} | {x['images']:,}"
            text.append(f"| {start} | {' | '.join(cells)} |")
        curves = {x["change"] for x in mine if x["step"] < x["steps"]}
        text += [
            f"{x['change']}, seed {x['seed']}, {x['average']}: {x['images']:,} images,"
            f" {x['p100_hours']:.3f} P100-hours, FID {x['fid']:.1f},"
            f" distance {x['memorization_distance']:.3f}"
            for x in sorted(mine, key=lambda x: (x["change"], x["seed"], x["average"], x["step"]))
            if x["change"] in curves
        ]
    return "\n".join(text)


def spread(rows: Sequence[dict], name: str, digits: int) -> str:
    """Mean, and least to most over the seeds."""
    values = [x[name] for x in rows if x[name] is not None]
    if not values:
        return "-"
    numbers = (statistics.mean(values), min(values), max(values))
    mean, least, most = (f"{v:.{digits}f}" for v in numbers)
    return mean if len(values) == 1 else f"{mean} ({least} to {most})"


# --------------------------------------------------------------------------------------------- main


def averages(text: str) -> list[str]:
    """`swa,none` to ["swa", "none"]."""
    if not set(text.split(",")) <= set(train_dogs.WEIGHTS):
        raise ValueError
    return text.split(",")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("changes", nargs="*", default=["base"], help="names or field=value,…")
    parser.add_argument("--data", type=Path, help="Stanford Dogs, as for train_dogs.py")
    default = Path("output/ablation")
    parser.add_argument("--out", type=Path, default=default, help="folder of the runs")
    parser.add_argument("--preset", default="dogs", choices=list(train_dogs.PRESETS))
    parser.add_argument("--base", type=fields_of, default={}, help="field=value,… for all runs")
    parser.add_argument("--hours", type=float, default=0.85, help="P100-hours of each run")
    parser.add_argument("--seeds", type=lambda x: [*map(int, x.split(","))], default=[0])
    parser.add_argument("--images", type=int, default=10_000, help="images to score")
    parser.add_argument("--averages", type=averages, default=list(train_dogs.WEIGHTS))
    parser.add_argument("--points", type=int, default=1, help="generators scored along a run")
    parser.add_argument("--tenth", action="store_true", help="train on a tenth of the photos")
    parser.add_argument("--fast", action="store_true", help="score in half precision")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--pack", type=Path, help="write crops and references to this .pt")
    parser.add_argument("--floor", action="store_true", help="score real crops and stop")
    parser.add_argument("--table", action="store_true", help="show the tables and stop")
    args = parser.parse_args(argv)
    if not (args.table or args.data):
        parser.error("give --data, the folder of dogs to train on")
    if args.floor and args.data.suffix == ".pt":
        parser.error("--floor needs photos: give their folder as --data")
    return args


def missing(run: Run, args: argparse.Namespace) -> list[dict]:
    """The generators of a run that are not yet scored, as they are called in the log."""
    log = read_lines(args.out)
    names = [
        run.key | {"step": step, "average": average, "n": args.images, "fast": args.fast}
        for step in marks(run.steps, args.points)
        for average in args.averages
    ]
    return [name for name in names if not any(line.items() >= name.items() for line in log)]


def main(argv: Sequence[str] | None = None) -> int:
    """Train and score what is not yet scored; print the tables."""
    args = parse(argv)
    if args.table or args.floor:
        print(show_tables(args.out) if args.table else show_floor(args))
        return 0
    torch.backends.cudnn.benchmark = True
    dogs, scorer = Dogs(args.data, args.tenth, args.fast), None
    device, args.tenth, args.fast = train_dogs.choose_device(args.device), dogs.tenth, dogs.fast
    if args.pack:
        kinds = {Run(args, change, 0).config.crops for change in args.changes}
        found = Scorer(device, dogs.references, args.fast).features.items()
        pack = {"tenth": dogs.tenth, "fast": dogs.fast}
        pack["crops"] = {kind: vars(dogs.crops(kind)) for kind in kinds}
        pack["references"] = {rule: torch.from_numpy(features) for rule, features in found}
        train_dogs.save(args.pack, pack)
        return 0
    # All changes at one seed first: a stop leaves whole comparisons.
    for run in [Run(args, change, seed) for seed in args.seeds for change in args.changes]:
        if not (left := missing(run, args)):
            continue
        seconds = train(run, dogs.crops(run.config.crops), args.averages, args.points)
        for name in left:
            path = run.generator(name["step"], name["average"])
            if not path.exists():  # an average that had not begun
                continue
            scorer = scorer or Scorer(device, dogs.references, args.fast)
            line = name | {"steps": run.steps, "images": name["step"] * run.config.batch_size}
            line |= {"p100_hours": name["step"] * run.step_hours, "seconds": round(seconds, 1)}
            line |= {"device": train_dogs.describe_device(device)}
            line |= {"config": train_dogs.plain(run.config)}
            line |= scorer.score(path, run.config, args.images)
            append_line(args.out, line)
            print(f"{run}, {path.stem}: FID {line['fid']:.2f}", flush=True)
    print(show_tables(args.out))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except train_dogs.UserError as error:
        sys.exit(f"ablation: {error}")
