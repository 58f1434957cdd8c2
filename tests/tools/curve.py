"""Draw the course of a run over its images: FID, D's outputs, losses, variety.

    python tests/tools/curve.py output                                        # from its log
    python tests/tools/curve.py output --checkpoints kept/*.pt --images 5000  # with FID

`--checkpoints` are copies of `checkpoint.pt`, taken during the run. The images that each would
submit are scored against the run's own photos, whole, by mifid.py. Scores are kept in
`OUT/curve.json`; a second call scores only new ones. The picture is `OUT/curve.png`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ablation import images_of
from draw_figures import BLUE, GREY, INK, ORANGE, SCALE, font
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import mifid
import train_dogs
from train_dogs import UserError

WIDTH, HEIGHT = 250, 170  # of a panel's axes, in pixels
LEFT, TOP, GAP = 46, 42, 76


@dataclass
class Line:
    """One line of a panel: its name, colour, and points."""

    name: str
    colour: str
    points: list[tuple[float, float]]
    errors: list[float] | None = None  # half the height of a bar through each point


def read_log(out: Path) -> list[dict]:
    """The lines of a run's log that report a step, each with its count of images."""
    path = out / "log.jsonl"
    if not path.is_file():
        raise UserError(f"{path} does not exist: give the --out of a run.")
    lines = [json.loads(text) for text in path.read_text("utf-8").splitlines()]
    batch = next(x["config"]["batch_size"] for x in lines if "config" in x)
    return [x | {"images": x["step"] * batch} for x in lines if "step" in x]


def smoothed(points: list[tuple[float, float]], count: int = 60) -> list[tuple[float, float]]:
    """The means of `count` groups of neighbours: one line of a log is noisy."""
    parts = np.array_split(np.array(points), min(count, len(points)))
    return [tuple(part.mean(0)) for part in parts]


def score(checkpoint: Path, images: int, fast: bool) -> dict[str, object]:
    """FID, its error and the distance of the images that a checkpoint submits."""
    made, trainer = images_of(checkpoint, images)
    config = trainer.config
    found = mifid.score(made, config.data[0], fast=fast)
    names = ("fid", "fid_error", "memorization_distance", "n_generated")
    seen = {"images": trainer.steps_done * config.batch_size, "fast": fast}
    return seen | {name: found[name] for name in names}


def panel(draw: ImageDraw.ImageDraw, left: float, title: str, lines: Sequence[Line]) -> None:
    """Axes from the minimum to the maximum of all lines, images along x, and the lines' names."""
    xs, ys = zip(*(point for line in lines for point in line.points))
    x_max, y_min, y_max = max(xs), min(0.0, *ys), max(ys)
    bottom = TOP + HEIGHT

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = x / x_max, (y - y_min) / (y_max - y_min or 1)
        return (left + WIDTH * across) * SCALE, (bottom - HEIGHT * up) * SCALE

    def text(x: float, y: float, words: str, colour: str = INK, anchor: str = "lm") -> None:
        draw.text((x * SCALE, y * SCALE), words, colour, font(11), anchor=anchor)

    corners = ((left, TOP), (left, bottom), (left + WIDTH, bottom))
    draw.line([(x * SCALE, y * SCALE) for x, y in corners], INK, SCALE)
    if y_min < 0:
        draw.line([place(0, 0), place(x_max, 0)], GREY, SCALE)
    text(left, TOP - 29, title)
    for value in (y_min, y_max):
        text(left - 4, place(0, value)[1] / SCALE, f"{value:.3g}", anchor="rm")
    text(left, bottom + 12, "0", anchor="mm")
    text(left + WIDTH, bottom + 12, f"{x_max / 1e6:.2f} M images", anchor="rm")
    for k, line in enumerate(lines):
        places = [place(*point) for point in line.points]
        draw.line(places, line.colour, 2 * SCALE, joint="curve")
        for (x, y), error in zip(line.points, line.errors or []):
            draw.line([place(x, y - error), place(x, y + error)], line.colour, 2 * SCALE)
        if len(places) <= 30:
            for x, y in places:
                draw.ellipse(
                    [x - 3 * SCALE, y - 3 * SCALE, x + 3 * SCALE, y + 3 * SCALE], line.colour
                )
        text(left + WIDTH, TOP - 29 + 13 * k, line.name, line.colour, "rm")


def draw_run(log: Sequence[dict], scores: Sequence[dict]) -> Image.Image:
    """The panels of a run: FID if there are scores, D's mean outputs, losses, shares."""

    def of(name: str) -> list[tuple[float, float]]:
        return [(x["images"], x[name]) for x in log if x.get(name) is not None]

    panels = [
        ("D's mean logit", [
            Line("reals", BLUE, smoothed(of("d_real"))),
            Line("fakes", ORANGE, smoothed(of("d_fake"))),
        ]),
        ("losses", [
            Line("D", BLUE, smoothed(of("d_loss"))),
            Line("G", ORANGE, smoothed(of("g_loss"))),
        ]),
        ("shares", [
            Line("reals past the margin", BLUE, smoothed(of("past_margin"))),
            *([Line("variety", ORANGE, of("variety"))] if of("variety") else []),
        ]),
    ]  # fmt: skip
    if scores:
        points = [(x["images"], x["fid"]) for x in scores]
        errors = [2 * (x["fid_error"] or 0) for x in scores]
        title = f"FID of {scores[0]['n_generated']:,} images"
        panels.insert(0, (title, [Line("", BLUE, points, errors)]))
    size = (LEFT + (WIDTH + GAP) * len(panels) - GAP + 14, TOP + HEIGHT + 26)
    picture = Image.new("RGB", (size[0] * SCALE, size[1] * SCALE), "white")
    draw = ImageDraw.Draw(picture)
    for k, (title, lines) in enumerate(panels):
        panel(draw, LEFT + (WIDTH + GAP) * k, title, lines)
    return picture.resize(size, Image.Resampling.LANCZOS)


def main(argv: Sequence[str] | None = None) -> int:
    """Score new checkpoints, and draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("out", type=Path, help="the --out of a run")
    parser.add_argument("--checkpoints", type=Path, nargs="*", default=[], help="copies to score")
    parser.add_argument("--images", type=int, default=10_000, help="images to score of each")
    parser.add_argument("--fast", action="store_true", help="score in half precision")
    args = parser.parse_args(argv)
    log, kept = read_log(args.out), args.out / "curve.json"
    scores = json.loads(kept.read_text("utf-8")) if kept.exists() else {}
    for path in args.checkpoints:
        name = f"{path.resolve()}, {args.images} images{', fast' * args.fast}"
        if name not in scores:
            scores[name] = score(path, args.images, args.fast)
            with train_dogs.whole_file(kept) as part:
                part.write_text(json.dumps(scores, indent=1))
        x = scores[name]
        print(
            f"{path}: {x['images']:,} images, FID {x['fid']:.2f} +- {x['fid_error'] or 0:.2f},"
            f" distance {x['memorization_distance']:.3f}",
            flush=True,
        )
    mine = [x for x in scores.values() if (x["n_generated"], x["fast"]) == (args.images, args.fast)]
    picture = draw_run(log, sorted(mine, key=lambda x: x["images"]))
    train_dogs.save_picture(args.out / "curve.png", [picture])
    print(f"see {args.out / 'curve.png'}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (UserError, mifid.UserError) as error:
        sys.exit(f"curve: {error}")
