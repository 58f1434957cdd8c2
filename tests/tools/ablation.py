"""Compare changes of a recipe: train each at equal cost, score it, and print a table.

    python tests/tools/ablation.py --data DOGS --out runs --seeds 0,1 base translation r1=0.1
    python tests/tools/ablation.py --data DOGS --out runs --tenth --seeds 0,1 base no-margin
    python tests/tools/ablation.py --data DOGS --out runs --mixture --seeds 0,1 base
    python tests/tools/ablation.py --data DOGS --floor base box square+whole
    python tests/tools/ablation.py --table data/experiments.jsonl

A change is a name of `CHANGES` or fields of the configuration, as in `margin=1,smoothing=0.05`;
`--base width=16` sets fields for all of them. Each run costs `--hours` P100-hours by counted FLOPs,
so that changes compare at equal cost on any device. At the end `--images` of each generator of
`--averages` are scored by both rules of mifid.py. Each score is a line of JSON in `--log`; a score
that is there is not computed again. An interrupted run continues from its checkpoint: give the same
command again.

`--tenth` trains on a tenth of the photos, chosen by a hash of their names, and scores against the
others: over-fitting shows there within hours. `--floor` trains nothing: it scores real dogs,
cropped as each change does it, against other photos; a perfect generator of such crops has this
score. `--mixture` scores images half from each of two trained seeds, and each seed alone at the
same count. `--fast` scores in half precision; compare such scores only with each other.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import cache
from itertools import chain
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import mifid
import train_dogs
from train_dogs import Config, Photo, PhotoSet, Trainer, UserError, digest

CHANGES: dict[str, dict[str, object]] = {
    "base": {},
    "square+whole": {"crops": "square:1,whole:1"},
    "square+context": {"crops": "square:1,context:1"},
    "box": {"crops": "box"},
    "head": {"crops": "head"},
    "head+square+context": {"crops": "head:2,square:1,context:1"},  # first-public's
    "translation": {"augment": "translation"},
    "augment": {"augment": "color,translation,cutout"},
    "breed+classify": {"condition": "breed", "classify": 0.1},
    "decay": {"lr_decay_start": 0.5},
    "no-margin": {"margin": 1.0},
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
    """One change at one seed: its configuration and the fields that identify it in the log."""

    def __init__(self, args: argparse.Namespace, change: str, seed: int) -> None:
        config = train_dogs.recipe(args.preset, args.base | fields_of(change))
        config = replace(config, seed=seed, hours=math.inf, device=args.device)
        self.step_hours = train_dogs.p100_hours(config, 1)
        steps = max(1, round(args.hours / self.step_hours))
        self.key = {"preset": args.preset, "base": args.base, "tenth": args.tenth}
        self.key |= {"change": change, "seed": seed, "hours": args.hours}
        self.folder = args.out / digest(self.key)
        self.config = train_dogs.check_config(replace(config, steps=steps, out=str(self.folder)))


# ----------------------------------------------------------------------------- dogs and generators


def copy_photos(photos: PhotoSet, folder: Path, chosen: Callable[[Photo], bool]) -> Path:
    """Copy the chosen photos, if they are not there yet, into `folder` as a set; returns it."""
    for photo in filter(chosen, photos.photos):
        name = Path(photo.breed, Path(photo.name).name)
        files = {folder / "Images" / name: photo.picture}
        if photo.annotation is not None:
            files[folder / "Annotation" / name.with_suffix("")] = photo.annotation
        for path, entry in files.items():
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                with train_dogs.whole_file(path) as part:
                    part.write_bytes(entry.read())
    return folder


def split_tenth(data: Path, out: Path) -> tuple[Path, Path]:
    """Copies of a tenth of the photos, chosen by a hash of their names, and of the others."""

    def is_in_tenth(photo: Photo) -> bool:
        return int(digest(photo.name), 16) % 10 == 0

    photos = train_dogs.find_photos([data])
    others = copy_photos(photos, out / "others", lambda photo: not is_in_tenth(photo))
    return copy_photos(photos, out / "tenth", is_in_tenth), others


def train(run: Run, data: Path) -> None:
    """Train to the end, from the checkpoint if there is one, as train_dogs.py does it."""
    argv = ["--data", str(data), "--images", "1"]
    for f in fields(Config):
        value = getattr(run.config, f.name)
        if value != f.default:
            argv += [train_dogs.flag_of(f.name), str(value)]
    if code := train_dogs.main(argv):
        sys.exit(code)


def images_of(checkpoint: Path, count: int, average: str = "") -> tuple[np.ndarray, Trainer]:
    """uint8 (count, 64, 64, 3): the images that a checkpoint submits; and its trainer.

    `average`: weights as in `--average`; default those of the submission.
    """
    config = train_dogs.read_state(checkpoint, lambda state: state["config"])
    photos = train_dogs.find_photos(config.data)
    crops = train_dogs.prepare_crops(photos, config.crops, dedupe=config.dedupe)
    trainer = Trainer(config, crops, train_dogs.choose_device(config.device))
    train_dogs.load_trainer(trainer, train_dogs.read_checkpoint(checkpoint, trainer)["trainer"])
    choice = average or trainer.averages.choose(config.average)
    if choice == "swa" and not trainer.averages.swa_updates:
        raise UserError(f"SWA has not begun in {checkpoint}: leave swa out of --averages.")
    G = trainer.averages.generator(trainer.G, choice, train_dogs.NORM_BATCHES, config)
    latents = train_dogs.draw_latents(count, config, "submission")
    labels = train_dogs.draw_labels(G, count, config.seed)
    return np.concatenate(list(train_dogs.sample_images(G, latents, labels))), trainer


# ------------------------------------------------------------------------------------------ scoring


def features_of(images: np.ndarray, args: argparse.Namespace) -> np.ndarray:
    """float32 (N, 2048): Inception's features of uint8 images."""
    device = train_dogs.choose_device(args.device)
    return mifid.extract_features(mifid.load_inception(None, device, args.fast), images)


@cache
def references(data: Path) -> dict[str, np.ndarray]:
    """uint8 (n, 64, 64, 3) as mifid.py cuts them by its rules `whole` and, with annotations, `box`;
    each photo is read once. Photos that give no dog are left out."""
    found = train_dogs.find_photos([data])

    def views(photo: Photo) -> tuple[list[np.ndarray], list[np.ndarray]]:
        try:
            picture, boxes = train_dogs.read_photo(photo)
        except train_dogs.BadItem:
            return [], []
        return [mifid.fit(picture, (64, 64))], mifid.fit_boxes(picture, boxes, (64, 64))

    sides = zip(*train_dogs.in_threads(views, found.photos))
    whole, box = (np.stack([*chain.from_iterable(side)]) for side in sides)
    return {"whole": whole, "box": box} if found.annotated else {"whole": whole}


def score(features: np.ndarray, data: Path, args: argparse.Namespace) -> dict[str, object]:
    """FID against whole photos and against boxes, and the other numbers of the former."""
    device = str(train_dogs.choose_device(args.device))
    found = {
        rule: mifid.score(features, images, device=device, fast=args.fast)
        for rule, images in references(data).items()
    }
    names = ("fid", "fid_error", "fid_unbiased", "memorization_distance", "n_reference")
    line = {name: found["whole"][name] for name in names}
    return line | {"fid_box": found["box"]["fid"] if "box" in found else None}


def show_floor(args: argparse.Namespace) -> str:
    """Markdown: real dogs of some photos, cropped as the changes do it, against other photos."""
    found = train_dogs.find_photos([args.data])
    order = np.random.default_rng(args.seeds[0]).permutation(len(found.photos))
    names = {found.photos[k].name for k in order[: min(args.images, len(order) // 2)]}
    drawn = replace(found, photos=[p for p in found.photos if p.name in names], skipped=[])
    text = heading("crops", "images")
    with tempfile.TemporaryDirectory(prefix="floor-") as folder:
        others = copy_photos(found, Path(folder), lambda photo: photo.name not in names)
        for change in args.changes:
            crops = Run(args, change, 0).config.crops
            dogs = train_dogs.prepare_crops(drawn, crops)
            rows = torch.arange(args.images) % len(dogs.first)  # every dog about as often
            generator = torch.Generator().manual_seed(args.seeds[0])
            reals = [train_dogs.draw_reals(dogs, part, generator) for part in rows.split(1000)]
            images = np.concatenate([train_dogs.to_bytes(real) for real in reals])
            x = score(features_of(images, args), others, args)
            text.append(row([x], crops, f"{len(images):,}"))
    return "\n".join(text)


def show_mixture(args: argparse.Namespace, data: Path) -> str:
    """Markdown: images half from each of the first two seeds, and from each seed alone."""
    text = heading("change", "weights", "images of")
    for change in args.changes:
        checkpoints = [Run(args, change, k).folder / "checkpoint.pt" for k in args.seeds[:2]]
        for average in args.averages:
            made = [images_of(path, args.images, average)[0] for path in checkpoints]
            both = [features_of(images, args) for images in made]
            half = args.images // 2
            sets = {f"seed {seed}": x for seed, x in zip(args.seeds, both)}
            sets["half of each"] = np.concatenate([x[:half] for x in both])
            for name, x in sets.items():
                text.append(row([score(x, data, args)], change, average, name))
    return "\n".join(text)


# ---------------------------------------------------------------------------------------- the table

COLUMNS = {  # title: name and digits
    "FID, whole photos": ("fid", 1),
    "bias-corrected": ("fid_unbiased", 1),
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
    """Markdown: the scores of each change, best first.

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
        rows = grouped(mine, "change", "average", "images").values()
        for some in sorted(rows, key=lambda some: statistics.mean(x["fid"] for x in some)):
            x = some[0]
            text.append(row(some, x["change"], x["average"], len(some), f"{x['images']:,}"))
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
    parser.add_argument("--log", type=Path, help="file of the scores (OUT/results.jsonl)")
    parser.add_argument("--preset", default="dogs", choices=list(train_dogs.PRESETS))
    parser.add_argument("--base", type=fields_of, default={}, help="field=value,… for all runs")
    parser.add_argument("--hours", type=float, default=0.85, help="P100-hours of each run")
    parser.add_argument("--seeds", type=lambda x: [*map(int, x.split(","))], default=[0])
    parser.add_argument("--images", type=int, default=10_000, help="images to score")
    parser.add_argument("--averages", type=averages, default=list(train_dogs.WEIGHTS))
    parser.add_argument("--tenth", action="store_true", help="train on a tenth of the photos")
    parser.add_argument("--fast", action="store_true", help="score in half precision")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--floor", action="store_true", help="score real crops and stop")
    parser.add_argument("--mixture", action="store_true", help="score two seeds mixed and stop")
    parser.add_argument("--table", type=Path, help="print the tables of this file and stop")
    args = parser.parse_args(argv)
    if not (args.table or args.data):
        parser.error("give --data, the folder of dogs to train on")
    if args.mixture and len(args.seeds) < 2:
        parser.error("--mixture needs two seeds: give --seeds 0,1")
    args.log = args.log or args.out / "results.jsonl"
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Train and score what is not in the log yet; print the tables."""
    args = parse(argv)
    if args.table or args.floor:
        print(show_tables(read_lines(args.table)) if args.table else show_floor(args))
        return 0
    data, reference = split_tenth(args.data, args.out) if args.tenth else (args.data, args.data)
    if args.mixture:
        print(show_mixture(args, reference))
        return 0
    device = train_dogs.describe_device(train_dogs.choose_device(args.device))
    # All changes at one seed first, so that a stop leaves whole comparisons.
    for run in [Run(args, change, seed) for seed in args.seeds for change in args.changes]:
        names = [
            run.key | {"average": a, "n": args.images, "fast": args.fast} for a in args.averages
        ]
        log = read_lines(args.log)
        missing = [name for name in names if not any(x.items() >= name.items() for x in log)]
        if missing:
            train(run, data)
        for name in missing:
            checkpoint = run.folder / "checkpoint.pt"
            images, trainer = images_of(checkpoint, args.images, name["average"])
            steps = trainer.steps_done
            line = name | {"steps": steps, "images": steps * run.config.batch_size}
            line |= {"p100_hours": steps * run.step_hours, "device": device}
            line |= {"date": datetime.date.today().isoformat()}
            line |= score(features_of(images, args), reference, args)
            kept_out = " not trained on" * args.tenth
            line |= {"reference": f"{line['n_reference']:,} whole photos{kept_out}"}
            append_line(args.log, line)
            print(
                f"{name['change']}, seed {name['seed']}, {name['average']}: FID {line['fid']:.2f}"
            )
    print(show_tables(read_lines(args.log)))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (UserError, mifid.UserError) as error:
        sys.exit(f"ablation: {error}")
