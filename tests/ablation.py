"""One change at a time: train it, score it, and say in a table what it costs and what it gains.

    python tests/ablation.py --data DOGS --out runs --hours 0.85 --seeds 0,1 base breed augment
    python tests/ablation.py --data DOGS --out runs --points 12 base@8.5
    python tests/ablation.py --data DOGS --floor base box square+whole
    python tests/ablation.py --out runs --table

A change is a name of `CHANGES` or fields of the configuration, as in `margin=1,smoothing=0.05`; the
same fields for all by `--base width=16`. Each run costs `--hours` P100-hours by arithmetic, or what
stands behind its @, so that changes compare at equal FLOPs on any device. It saves the generators
of `--averages` at the end (and at `--points` before it, for the curve), samples `--images` of each,
and scores them with mifid.py by both rules. Lines are appended to `OUT/results.jsonl`, one for each
generator scored. What is done is not done again, and training goes on from its checkpoint: stop it
at any time and give the same command.

`--floor` trains nothing: it scores real dogs, cropped as each change says, against photos that show
others: what a perfect generator of those crops would reach.

For a machine without the photos: `--pack dogs.pt` writes the crops that the changes need and the
references' features to one file, which is then its `--data`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mifid
import train_dogs
from train_dogs import Config, Trainer

CHANGES: dict[str, dict[str, object]] = {
    "base": {},
    "square+whole": {"crops": "square:1,whole:1"},
    "square+context": {"crops": "square:1,context:1"},
    "box": {"crops": "box"},
    "translation": {"augment": "translation"},
    "translation+cutout": {"augment": "translation,cutout"},
    "augment": {"augment": "color,translation,cutout"},
    "breed": {"condition": "breed"},
    "breed+classify": {"condition": "breed", "classify": 0.1},
    "noise": {"noise": 1 / 128},
    "decay": {"lr_decay_start": 0.5},
    "slower-G": {"g_lr": 2e-4},
    "slower-D": {"d_lr": 2e-4},
    "r1": {"r1": 0.1},
    "truncation": {"truncation": 2.0},
    "no-margin": {"margin": 1.0},
    "smoothing": {"smoothing": 0.05},
    "batch-64": {"batch_size": 64},
}


class Run:
    """One change at one seed: its configuration, its folder, and what it is called in the log."""

    def __init__(self, args: argparse.Namespace, change: str, seed: int) -> None:
        change, _, own_hours = change.partition("@")
        hours = float(own_hours or args.hours)
        recipe = train_dogs.PRESETS[args.preset] | args.base | fields_of(change)
        config = replace(Config(**recipe), seed=seed, hours=0.0, device=args.device)
        flops = sum(train_dogs.flops_per_image(config).values())
        step_hours = flops * config.batch_size / train_dogs.P100_FLOPS / 3600
        self.steps = max(1, round(hours / step_hours))
        self.config = train_dogs.check_config(replace(config, steps=self.steps))
        self.change, self.step_hours = change, step_hours
        self.key = {
            "preset": args.preset,
            "base": args.base,
            "change": change,
            "seed": seed,
            "hours": hours,
        }
        self.folder = args.out / train_dogs.digest(self.key)


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


def read_lines(out: Path) -> list[dict]:
    """What was scored so far; a last line that a stop cut short is left out."""
    path = out / "results.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def append_line(out: Path, line: dict) -> None:
    """Add a line, after the whole ones."""
    path = out / "results.jsonl"
    text = path.read_text() if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    with train_dogs.whole_file(path) as part:
        part.write_text(whole + json.dumps(line) + "\n")


# ------------------------------------------------------------------------------------------ dogs


class Dogs:
    """The crops of a data set, or of a file that `--pack` wrote, each mixture prepared once."""

    def __init__(self, data: Path) -> None:
        self.packed = load_pack(data)["crops"] if data.suffix == ".pt" else {}
        self.found = None if self.packed else train_dogs.find_photos([data])

    def prepared(self, crops: str) -> train_dogs.CropSet:
        """What `crops` shows of them."""
        if crops not in self.packed:
            if self.found is None:
                sys.exit(f"these dogs were packed without --crops {crops}: pack them again.")
            self.packed[crops] = vars(train_dogs.prepare_crops(self.found, crops))
        return train_dogs.CropSet(**self.packed[crops])


def load_pack(path: Path) -> dict[str, dict]:
    """What `--pack` wrote: "crops" by mixture, and "references" by rule."""
    return torch.load(path, weights_only=True, mmap=True)


# -------------------------------------------------------------------------------------- training


def marks(steps: int, points: int) -> list[int]:
    """Steps at which generators are kept: the last one, and each time about 1.5 fewer."""
    return sorted({max(1, round(steps / 1.5**k)) for k in range(points)})


def train(run: Run, dogs: train_dogs.CropSet, averages: Sequence[str], points: int) -> float:
    """Train to the end and keep the generators, from the checkpoint on if there is one.

    Returns the seconds that it took, all calls together.
    """
    config, checkpoint = run.config, run.folder / "checkpoint.pt"
    wanted, seconds, state = marks(run.steps, points), 0.0, None
    if checkpoint.exists():
        state = train_dogs.load_state(checkpoint, "trainer")
        seconds = state["seconds_used"]
        missing = [a for a in averages if not generator_path(run, run.steps, a).exists()]
        if state["trainer"]["steps_done"] == run.steps and not missing:
            return seconds
    trainer = Trainer(config, dogs, train_dogs.choose_device(config.device))
    if state:
        trainer.load_state_dict(state["trainer"])
        if trainer.steps_done == run.steps:  # an average that nobody asked for before
            for average in missing:
                keep_generator(run, trainer, average)
            return seconds
    trainer.capture()
    begin = saved = time.monotonic()

    def save() -> float:
        used = seconds + time.monotonic() - begin
        state = {"format": 1, "trainer": trainer.state_dict(), "seconds_used": used}
        train_dogs.save(checkpoint, state)
        return used

    while trainer.steps_done < run.steps:
        progress = trainer.steps_done / run.steps
        trainer.step(progress)
        if trainer.steps_done % config.average_every == 0:
            trainer.average(progress)
        if trainer.steps_done in wanted:
            if not trainer.is_healthy():
                sys.exit(f"{run.change}, seed {config.seed}: not finite at {trainer.steps_done}")
            for average in averages:
                keep_generator(run, trainer, average)
        if time.monotonic() > saved + 60:
            save()
            saved = time.monotonic()
            share = trainer.steps_done / run.steps
            stats = {k: round(v, 3) for k, v in trainer.read_stats().items()}
            print(f"{run.change}, seed {config.seed}: {share:.0%} {stats}", flush=True)
    return save()


def generator_path(run: Run, step: int, average: str) -> Path:
    """Where the generator of an average at a step lies."""
    return run.folder / f"generator_{step:07d}_{average}.pt"


def keep_generator(run: Run, trainer: Trainer, average: str) -> None:
    """Save G with the weights of `average`; before SWA begins there is none of it."""
    if average == "swa" and not trainer.swa_count:
        return
    G = trainer.averaged_generator(average, train_dogs.NORM_BATCHES)
    weights = {k: v.cpu() for k, v in G.state_dict().items()}
    path = generator_path(run, trainer.steps_done, average)
    train_dogs.save(path, {"format": 1, "shape": G.shape, "state_dict": weights})


# --------------------------------------------------------------------------------------- scoring


class Scorer:
    """Inception, and the references' moments, ready for one generator after another."""

    def __init__(self, args: argparse.Namespace, without: frozenset[str] = frozenset()) -> None:
        """`without`: names of photos that the references leave out."""
        self.device = train_dogs.choose_device(args.device)
        self.model = mifid.load_inception(mifid.find_weights(args.weights), self.device)
        whole, box = args.reference or args.data, args.box_reference or args.data
        self.features = {"whole": reference(whole, "whole", self.model, without)}
        if args.box_reference or not args.reference:
            self.features["box"] = reference(box, "box", self.model, without)
        self.moments = {k: mifid.mean_and_covariance(f) for k, f in self.features.items()}

    def score(self, path: Path, config: Config, count: int) -> dict[str, float]:
        """FID by each rule, distance and MiFID of `count` images of the generator in `path`."""
        kept = path.with_suffix(".npz")
        features = np.load(kept)["features"] if kept.exists() else ()
        if len(features) != count:
            state = train_dogs.load_state(path, "state_dict")
            G = train_dogs.Generator(**state["shape"])
            G.load_state_dict(state["state_dict"])
            G = G.to(self.device, memory_format=train_dogs.memory_layout(self.device)).eval()
            images = list(train_dogs.sample_images(G, *train_dogs.draw_inputs(G, config, count)))
            sheet = train_dogs.draw_sheet(np.concatenate(images)[:100])
            train_dogs.save_picture(path.with_suffix(".png"), [sheet])
            features = mifid.extract_features(self.model, np.concatenate(images))
            mifid.save_arrays(kept, features=features)
        return self.compare(features)

    def compare(self, features: np.ndarray) -> dict[str, float]:
        """FID by each rule, distance and MiFID of N x 2048 features."""
        moments = mifid.mean_and_covariance(features)
        fids = {k: mifid.frechet_distance(*moments, *m) for k, m in self.moments.items()}
        distance = mifid.memorization_distance(features, self.features["whole"])
        return {
            "fid": fids["whole"],
            "fid_box": fids.get("box"),
            "memorization_distance": distance,
            "mifid": mifid.memorization_informed_fid(fids["whole"], distance),
            "n_generated": len(features),
            "n_reference": {k: len(f) for k, f in self.features.items()},
        }


def reference(
    source: Path, rule: str, model: mifid.Inception, without: frozenset[str] = frozenset()
) -> np.ndarray:
    """The features of a packed file, of an .npz, or of a data set under a rule.

    `without`: the names of photos of a data set that are left out.
    """
    if source.suffix == ".pt":
        return load_pack(source)["references"][rule].numpy()
    found = mifid.open_source(source, True, None if source.suffix == ".npz" else rule, False, None)
    if isinstance(found, mifid.ImageSet):
        found = mifid.features_of(found, model, None, cache=True, progress=True)
    if without:
        names = [found.images.pictures[owner].name for owner in found.owners]
        return found.values[[name not in without for name in names]]
    return found.values


def show_floor(args: argparse.Namespace) -> str:
    """Markdown: real dogs of some photos, cropped as the changes say, against the other photos."""
    found = train_dogs.find_photos([args.data])
    order = np.random.default_rng(args.seeds[0]).permutation(len(found.photos))
    drawn = [found.photos[k] for k in order[: min(args.images, len(order) // 2)]]
    scorer = Scorer(args, frozenset(photo.name for photo in drawn))
    text = [
        "| crops | images | FID, whole frames | FID, boxes | distance |",
        "|---|---|---|---|---|",
    ]
    for change in args.changes:
        crops = Run(args, change, 0).config.crops
        dogs = train_dogs.prepare_crops(replace(found, photos=drawn), crops)
        rows = torch.arange(args.images) % len(dogs.first)  # every dog about as often
        chance = torch.Generator().manual_seed(args.seeds[0])
        reals = [train_dogs.draw_reals(dogs, part, chance) for part in rows.split(1000)]
        images = np.concatenate([train_dogs.to_bytes(real) for real in reals])
        x = scorer.compare(mifid.extract_features(scorer.model, images))
        numbers = f"{x['fid']:.2f} | {x['fid_box']:.2f} | {x['memorization_distance']:.4f}"
        text.append(f"| {crops} | {len(images):,} | {numbers} |")
    return "\n".join(text)


# --------------------------------------------------------------------------------------- the table


def show_tables(out: Path) -> str:
    """Markdown: what each change scored at the end of its runs, and the curves of long ones."""
    lines = read_lines(out)
    text = []
    settings: dict[tuple, list[dict]] = {}
    for x in lines:
        key = (x["preset"], json.dumps(x["base"]), x["hours"], x["n"])
        settings.setdefault(key, []).append(x)
    for (preset, base, hours, n), mine in sorted(settings.items(), key=lambda s: str(s[0])):
        text.append(f"\n{preset} with {base}, {hours} P100-hours a run, {n:,} images scored\n")
        text.append(
            "| change | weights | seeds | images | FID, whole frames | FID, boxes | distance |"
        )
        text.append("|---|---|---|---|---|---|---|")
        last = [x for x in mine if x["step"] == x["steps"]]
        groups: dict[tuple[str, str], list[dict]] = {}
        for x in last:
            groups.setdefault((x["change"], x["average"]), []).append(x)
        best_first = sorted(groups.items(), key=lambda g: statistics.mean(x["fid"] for x in g[1]))
        for (change, average), rows in best_first:
            cells = [change, average, str(len(rows)), f"{rows[0]['images']:,}"]
            cells += [spread(rows, "fid", 1), spread(rows, "fid_box", 1)]
            cells += [spread(rows, "memorization_distance", 3)]
            text.append(f"| {' | '.join(cells)} |")
        text += [
            f"{x['change']}, seed {x['seed']}, {x['average']}: {x['images']:,} images,"
            f" {x['p100_hours']:.3f} P100-hours, FID {x['fid']:.1f},"
            f" distance {x['memorization_distance']:.3f}"
            for x in sorted(mine, key=lambda x: (x["change"], x["seed"], x["average"], x["step"]))
            if any(y["step"] < y["steps"] and y["change"] == x["change"] for y in mine)
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


# ------------------------------------------------------------------------------------------ main


def numbers(text: str) -> list[int]:
    """`0,1` to [0, 1]."""
    return [int(part) for part in text.split(",")]


def averages(text: str) -> list[str]:
    """`swa,none` to ["swa", "none"]."""
    if not set(text.split(",")) <= set(train_dogs.WEIGHTS):
        raise ValueError
    return text.split(",")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("changes", nargs="*", default=["base"], help="names or field=value,…")
    parser.add_argument("--data", type=Path, help="Stanford Dogs, as for train_dogs.py")
    parser.add_argument(
        "--out", type=Path, default=Path("output/ablation"), help="folder of the runs"
    )
    parser.add_argument("--preset", default="dogs", choices=list(train_dogs.PRESETS))
    parser.add_argument("--base", type=fields_of, default={}, help="field=value,… for all runs")
    parser.add_argument("--hours", type=float, default=0.85, help="P100-hours of each run")
    parser.add_argument("--seeds", type=numbers, default=[0], help="by commas")
    parser.add_argument("--images", type=int, default=10_000, help="images to score")
    parser.add_argument("--averages", type=averages, default=["swa", "ema", "none"])
    parser.add_argument("--points", type=int, default=1, help="generators scored along a run")
    parser.add_argument("--reference", type=Path, help=".npz of whole frames; default --data")
    parser.add_argument("--box-reference", type=Path, help=".npz of boxes; default --data")
    parser.add_argument("--weights", help="Inception's, as for mifid.py")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--minutes", type=float, default=0.0, help="begin no run after so long")
    parser.add_argument("--pack", type=Path, help="write crops and references to this .pt")
    parser.add_argument("--floor", action="store_true", help="score real crops and stop")
    parser.add_argument("--table", action="store_true", help="show the tables and stop")
    args = parser.parse_args(argv)
    if not (args.table or args.data):
        parser.error("give --data, the folder of dogs to train on")
    if args.floor and (args.reference or args.box_reference or args.data.suffix == ".pt"):
        parser.error("--floor needs the photos of --data as its reference, and no other")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Train and score what is not yet scored; print the tables."""
    args = parse(argv)
    if args.table:
        print(show_tables(args.out))
        return 0
    if args.floor:
        print(show_floor(args))
        return 0
    torch.backends.cudnn.benchmark = True
    device = train_dogs.choose_device(args.device)
    about = {
        "device": train_dogs.describe_device(device),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
    dogs, scorer, begin = Dogs(args.data), None, time.monotonic()
    if args.pack:
        for change in args.changes:
            dogs.prepared(Run(args, change, 0).config.crops)
        references = {k: torch.from_numpy(f) for k, f in Scorer(args).features.items()}
        train_dogs.save(args.pack, {"crops": dogs.packed, "references": references})
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:  # all changes at one seed first: a stop leaves whole comparisons
        for change in args.changes:
            if args.minutes and time.monotonic() > begin + 60 * args.minutes:
                break
            run = Run(args, change, seed)
            run.folder.mkdir(exist_ok=True)
            crops = dogs.prepared(run.config.crops)
            seconds = train(run, crops, args.averages, args.points)
            for step in marks(run.steps, args.points):
                for average in args.averages:
                    path = generator_path(run, step, average)
                    name = run.key | {"step": step, "average": average, "n": args.images}
                    done = any(x.items() >= name.items() for x in read_lines(args.out))
                    if done or not path.exists():
                        continue
                    scorer = scorer or Scorer(args)
                    line = name | {
                        "steps": run.steps,
                        "images": step * run.config.batch_size,
                        "p100_hours": step * run.step_hours,
                        "seconds": round(seconds, 1),
                        "config": asdict(run.config),
                    }
                    line |= scorer.score(path, run.config, args.images) | about
                    append_line(args.out, line)
                    print(
                        f"{run.change}, seed {seed}, {average}, step {step}: FID {line['fid']:.2f},"
                        f" distance {line['memorization_distance']:.4f}",
                        flush=True,
                    )
    print(show_tables(args.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
