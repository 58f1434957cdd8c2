"""One change at a time: train it, score it, and print what it costs and what it gains.

    python tests/tools/ablation.py --data DOGS --out runs --seeds 0,1 base breed augment
    python tests/tools/ablation.py --data DOGS --out runs --points 12 base@8.5
    python tests/tools/ablation.py --data DOGS --out runs --tenth --seeds 0,1 base no-margin r1
    python tests/tools/ablation.py --data DOGS --out runs --mixture --seeds 0,1 base
    python tests/tools/ablation.py --data DOGS --floor base box square+whole
    python tests/tools/ablation.py --table data/experiments.jsonl

A change is a name of `CHANGES` or fields of the configuration, as in `margin=1,smoothing=0.05`;
`--base width=16` sets fields for all of them. Each run costs `--hours` P100-hours by counted FLOPs,
or the number after its @, so that changes compare at equal cost on any device. The generators of
`--averages` are kept at the end (and at `--points` before it), in the format of `generator.pt`, and
`--images` of each are scored by both rules of mifid.py. Each score is a line of
`OUT/results.jsonl`; `--log FILE` appends a copy, without the configuration, to a file that can be
committed. A finished run is not repeated, and an interrupted one continues from its checkpoint:
stop it at any time and give the same command again.

`--tenth` trains on a tenth of the photos, chosen by a hash of their names, and scores against the
others: there over-fitting shows within hours. `--floor` trains nothing: it scores real dogs,
cropped as each change does it, against other photos: the score of a perfect generator of such
crops. `--mixture` scores images half from each of two seeds, next to each seed alone at the same
count. `--fast` scores in half precision; compare such scores only with each other. `--table FILE`
prints the tables of the lines in a file.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import cache, partial
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
    "head": {"crops": "head"},
    "head+square+context": {"crops": "head:2,square:1,context:1"},  # first-public's
    "translation": {"augment": "translation"},
    "augment": {"augment": "color,translation,cutout"},
    "breed": {"condition": "breed"},
    "breed+classify": {"condition": "breed", "classify": 0.1},
    "decay": {"lr_decay_start": 0.5},
    "r1": {"r1": 0.1},
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
    """One change at one seed: its configuration, its folder, and the fields that identify it."""

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
        """The file of an average's generator at a step."""
        return self.folder / f"generator_{step:07d}_{average}.pt"

    def __str__(self) -> str:
        return f"{self.change}, seed {self.config.seed}"


# --------------------------------------------------------------------------------------------- dogs


def find_dogs(data: Path, tenth: bool) -> tuple[PhotoSet, PhotoSet]:
    """The photos to train on, and those to compare with: the same, or the other nine tenths."""
    photos = train_dogs.find_photos([data])
    if not tenth:
        return photos, photos
    return split(photos, lambda name: int(digest(name), 16) % 10 == 0)


def split(photos: PhotoSet, chosen: Callable[[str], bool]) -> tuple[PhotoSet, PhotoSet]:
    """The photos that are chosen by name, and the others, each as a set of its own."""
    both = [[p for p in photos.photos if chosen(p.name) is wanted] for wanted in (True, False)]
    return tuple(replace(photos, photos=some, skipped=[]) for some in both)


def references(photos: PhotoSet, model: mifid.Inception) -> dict[str, np.ndarray]:
    """Features of whole frames and of boxes, as mifid.py's two rules squash them; cached."""
    names = [(p.name, p.picture.size, p.picture.stamp) for p in photos.photos]
    views = cache(partial(squashed, photos))  # a photo is read once for both rules
    found = {}
    for rule in ("whole", "box") if photos.annotated else ("whole",):
        key = digest([rule, names, model.precision])
        path = train_dogs.cache_folder() / f"reference_{key}.npz"
        found[rule] = kept_features(path, model, lambda rule=rule: views()[rule])
    return found


def squashed(photos: PhotoSet) -> dict[str, np.ndarray]:
    """uint8 (n, 64, 64, 3) by rule: every readable photo whole, and every box by itself."""

    def small(picture: Image.Image) -> np.ndarray:
        return np.asarray(picture.resize((64, 64), Image.Resampling.LANCZOS))

    def views(photo: Photo) -> tuple[list[np.ndarray], list[np.ndarray]]:
        try:
            picture, boxes = train_dogs.read_photo(photo)
        except train_dogs.BadItem:
            return [], []
        return [small(picture)], [small(picture.crop([*map(round, box)])) for box in boxes]

    found = {"whole": [], "box": []}
    for frames, boxes in train_dogs.in_threads(views, photos.photos):
        found["whole"] += frames
        found["box"] += boxes
    return {rule: np.stack(some) for rule, some in found.items() if some}


def kept_features(
    path: Path, model: mifid.Inception, images: Callable[[], np.ndarray]
) -> np.ndarray:
    """The features in `path`; if it does not exist, they are computed from `images` and kept."""
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
        state = train_dogs.read_checkpoint(checkpoint, trainer)
        train_dogs.load_trainer(trainer, state["trainer"])
        seconds = state["seconds_used"]
    if trainer.steps_done < run.steps and (reason := train_dogs.capture(trainer)):
        print(f"{run}: {reason}: going on with eager steps", flush=True)
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
            used = seconds + saved - begin
            train_dogs.save(checkpoint, train_dogs.checkpoint_state(trainer, used, done))
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
    train_dogs.save(path, train_dogs.generator_state(trainer, G, average))


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

    def features_of(self, path: Path, config: Config, count: int) -> np.ndarray:
        """float32 (count, 2048), of the images that the generator in `path` submits; kept."""
        kept = path.with_name(f"{path.stem}_{count}_{self.model.precision}.npz")
        return kept_features(kept, self.model, partial(submitted, path, config, count))

    def score(self, path: Path, config: Config, count: int) -> dict[str, object]:
        """`compare` for the images that a submission of the generator in `path` would hold."""
        return self.compare(self.features_of(path, config, count))

    def compare(self, features: np.ndarray) -> dict[str, object]:
        """FID by each rule, and the other numbers of the public one, for N x 2048 features."""
        found = {
            rule: mifid.score(features, reals, device=str(self.device))
            for rule, reals in self.features.items()
        }
        line = {name: found["whole"][name] for name in SCORES}
        if len(features) >= 2 * mifid.GROUPS:  # of fewer the jackknife has no error
            reals = mifid.gaussian_of(self.features["whole"])
            _, line["fid_error"], line["fid_unbiased"] = mifid.fid_with_error(features, reals)
        return line | {"fid_box": found["box"]["fid"] if "box" in found else None}


SCORES = (
    "fid", "fid_error", "fid_unbiased", "memorization_distance", "mifid", "unseen_distance",
    "n_generated", "n_reference",
)  # fmt: skip


def submitted(path: Path, config: Config, count: int) -> np.ndarray:
    """uint8 (count, 64, 64, 3): images of the generator in `path`; a sheet is saved next to it."""
    device = train_dogs.choose_device(config.device)
    G, _ = train_dogs.load_generator(path, device)
    z = train_dogs.draw_latents(count, config, "submission")
    labels = train_dogs.draw_labels(G, count, config.seed)
    images = np.concatenate(list(train_dogs.sample_images(G, z, labels)))
    train_dogs.save_picture(path.with_suffix(".png"), [train_dogs.draw_sheet(images[:100])])
    return images


def show_floor(args: argparse.Namespace) -> str:
    """Markdown: real dogs of some photos, cropped as the changes do it, against other photos."""
    found = train_dogs.find_photos([args.data])
    order = np.random.default_rng(args.seeds[0]).permutation(len(found.photos))
    names = {found.photos[k].name for k in order[: min(args.images, len(order) // 2)]}
    drawn, others = split(found, names.__contains__)
    device = train_dogs.choose_device(args.device)
    scorer = Scorer(device, partial(references, others), args.fast)
    text = heading("crops", "images")
    for change in args.changes:
        crops = Run(args, change, 0).config.crops
        dogs = train_dogs.prepare_crops(drawn, crops)
        rows = torch.arange(args.images) % len(dogs.first)  # every dog about as often
        chance = torch.Generator().manual_seed(args.seeds[0])
        reals = [train_dogs.draw_reals(dogs, part, chance) for part in rows.split(1000)]
        images = np.concatenate([train_dogs.to_bytes(real) for real in reals])
        x = scorer.compare(mifid.extract_features(scorer.model, images))
        text.append(row([x], crops, f"{len(images):,}"))
    return "\n".join(text)


def show_mixture(args: argparse.Namespace, scorer: Scorer) -> str:
    """Markdown: images half from each of the first two seeds, and from each seed alone."""
    text = heading("change", "weights", "images of")
    for change in args.changes:
        runs = [Run(args, change, seed) for seed in args.seeds[:2]]
        for average in args.averages:
            paths = [run.generator(run.steps, average) for run in runs]
            if not all(path.exists() for path in paths):
                sys.exit(f"ablation: {change}, {average}: train seeds {args.seeds} first")
            both = [scorer.features_of(p, r.config, args.images) for p, r in zip(paths, runs)]
            half = args.images // 2
            sets = {f"seed {run.config.seed}": x for run, x in zip(runs, both)}
            sets["half of each"] = np.concatenate([x[:half] for x in both])
            for name, x in sets.items():
                text.append(row([scorer.compare(x)], change, average, name))
    return "\n".join(text)


# ---------------------------------------------------------------------------------------- the table

COLUMNS = {  # title: name and digits
    "FID, whole photos": ("fid", 1),
    "without its bias": ("fid_unbiased", 1),
    "FID, boxes": ("fid_box", 1),
    "distance": ("memorization_distance", 3),
}


def heading(*names: str) -> list[str]:
    """The first two lines of a table: `names`, then the scores."""
    titles = [*names, *COLUMNS]
    return [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]


def row(rows: Sequence[dict], *cells: object) -> str:
    """A line of a table: `cells`, then the scores of one or several runs."""
    return f"| {' | '.join(map(str, [*cells, *(spread(rows, *x) for x in COLUMNS.values())]))} |"


def spread(rows: Sequence[dict], name: str, digits: int) -> str:
    """Mean, and least to most over the seeds; of one run the value, with its error if known."""
    values = [x[name] for x in rows if x.get(name) is not None]
    if not values:
        return "-"
    numbers = (statistics.mean(values), min(values), max(values))
    mean, least, most = (f"{v:.{digits}f}" for v in numbers)
    if len(values) > 1:
        return f"{mean} ({least} to {most})"
    error = rows[0].get(f"{name}_error")
    return mean if error is None else f"{mean} ± {error:.{digits}f}"


def read_lines(path: Path) -> list[dict]:
    """The scores in a file."""
    text = path.read_text("utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def append_line(path: Path, line: dict) -> None:
    """Add a line; the file is whole at any time."""
    lines = [*read_lines(path), line]
    with train_dogs.whole_file(path) as part:
        part.write_text("".join(json.dumps(x) + "\n" for x in lines), "utf-8")


def grouped(lines: Sequence[dict], *names: str) -> dict[str, list[dict]]:
    """Lines by the values of some fields."""
    groups: dict[str, list[dict]] = {}
    for x in lines:
        groups.setdefault(json.dumps([x.get(name) for name in names]), []).append(x)
    return groups


def show_tables(lines: Sequence[dict]) -> str:
    """Markdown: the scores of each change at the end of its runs, and the curves of long ones.

    A table holds only scores that compare: of equal cost, against the same photos.
    """
    text = []
    same = ("preset", "base", "reference", "hours", "n", "fast")
    for mine in grouped(lines, *same).values():
        x, base = mine[0], ",".join(f"{k}={v}" for k, v in mine[0]["base"].items())
        cost = f", {x['hours']} P100-hours a run" if x.get("hours") else ""
        text.append(
            f"\n`--preset {x['preset']}`{f', `{base}`' if base else ''}{cost}: {x['n']:,} images"
            f" against {x.get('reference')}{', `--fast`' * x['fast']}\n"
        )
        text += heading("change", "weights", "seeds", "images")
        ends, earlier = [], []
        for run in grouped(mine, "change", "average", "seed").values():
            *before, end = sorted(run, key=lambda x: x["step"])
            ends.append(end)
            earlier += [*before, end] if before else []
        rows = grouped(ends, "change", "average", "images").values()
        for some in sorted(rows, key=lambda some: statistics.mean(x["fid"] for x in some)):
            x = some[0]
            text.append(row(some, x["change"], x["average"], len(some), f"{x['images']:,}"))
        text += [
            f"{x['change']}, seed {x['seed']}, {x['average']}: {x['images']:,} images,"
            f" {x['p100_hours']:.3f} P100-hours, FID {x['fid']:.1f},"
            f" distance {x['memorization_distance']:.3f}"
            for x in earlier
        ]
    return "\n".join(text)


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
    parser.add_argument("--log", type=Path, help="append a copy of each score to this file")
    parser.add_argument("--floor", action="store_true", help="score real crops and stop")
    parser.add_argument("--mixture", action="store_true", help="score two seeds mixed and stop")
    parser.add_argument("--table", type=Path, help="print the tables of this file and stop")
    args = parser.parse_args(argv)
    if not (args.table or args.data):
        parser.error("give --data, the folder of dogs to train on")
    if args.mixture and len(args.seeds) < 2:
        parser.error("--mixture needs two seeds: give --seeds 0,1")
    return args


def missing(run: Run, args: argparse.Namespace) -> list[dict]:
    """The generators of a run that are not yet scored: the fields that identify their lines."""
    log = read_lines(args.out / "results.jsonl")
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
        print(show_tables(read_lines(args.table)) if args.table else show_floor(args))
        return 0
    torch.backends.cudnn.benchmark = True
    device = train_dogs.choose_device(args.device)
    seen, unseen = find_dogs(args.data, args.tenth)
    scorer = cache(lambda: Scorer(device, partial(references, unseen), args.fast))
    if args.mixture:
        print(show_mixture(args, scorer()))
        return 0
    # All changes at one seed first: a stop leaves whole comparisons.
    for run in [Run(args, change, seed) for seed in args.seeds for change in args.changes]:
        if not (left := missing(run, args)):
            continue
        dogs = train_dogs.prepare_crops(seen, run.config.crops)
        seconds = train(run, dogs, args.averages, args.points)
        for name in left:
            path = run.generator(name["step"], name["average"])
            if not path.exists():  # an average that had not begun
                continue
            line = name | {"steps": run.steps, "images": name["step"] * run.config.batch_size}
            line |= {"p100_hours": name["step"] * run.step_hours, "seconds": round(seconds, 1)}
            line |= {"device": train_dogs.describe_device(device)}
            line |= {"date": datetime.date.today().isoformat()}
            line |= scorer().score(path, run.config, args.images)
            kept_out = " not trained on" * args.tenth
            line |= {"reference": f"{line['n_reference']:,} whole photos{kept_out}"}
            if args.log:
                append_line(args.log, line)
            append_line(args.out / "results.jsonl", line | {"config": train_dogs.plain(run.config)})
            print(f"{run}, {path.stem}: FID {line['fid']:.2f}", flush=True)
    print(show_tables(read_lines(args.out / "results.jsonl")))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except train_dogs.UserError as error:
        sys.exit(f"ablation: {error}")
