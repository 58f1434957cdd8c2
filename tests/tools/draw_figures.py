"""Draw the README's figures, with the program's own functions: the margin loss and split norm.

python tests/tools/draw_figures.py      # writes data/margin.png and data/split_norm.png
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import train_dogs
from train_dogs import Config, Seen, Verdict

INK, GREY, BLUE, ORANGE = "#222222", "#bbbbbb", "#2060b0", "#d06010"
SCALE = 2  # drawn at this multiple of the size and shrunk, for smooth lines


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's built-in font."""
    try:
        return ImageFont.load_default(size=size * SCALE)
    except TypeError:  # Pillow 10.0
        return ImageFont.load_default()


def real_loss(logit: float, margin: float) -> tuple[float, float]:
    """D's loss of one real with `logit`, and its gradient; the fake's loss is about 0."""
    real = torch.tensor([logit], requires_grad=True)
    nothing = torch.zeros(1, 0)
    verdicts = Verdict(real, nothing, nothing), Verdict(torch.tensor([-50.0]), nothing, nothing)
    config = Config(margin=margin)
    seen = Seen(nothing, nothing, nothing, *verdicts, torch.zeros(1).long(), config, 1.0)
    loss = train_dogs.d_margin(seen)
    (slope,) = torch.autograd.grad(loss, real)
    return loss.item(), slope.item()


def margin_figure() -> Image.Image:
    """The loss of a real and its gradient over D's probability, with and without the margin."""
    width, height, left, bottom = 760, 300, 50, 250
    picture = Image.new("RGB", (width * SCALE, height * SCALE), "white")
    draw = ImageDraw.Draw(picture)

    def text(x: float, y: float, words: str, colour: str = INK, anchor: str = "lm") -> None:
        draw.text((x * SCALE, y * SCALE), words, colour, font(13), anchor=anchor)

    def curve(origin: float, which: int, margin: float, colour: str, top: float) -> None:
        share = [0.02 + 0.96 * k / 300 for k in range(301)]
        values = [abs(real_loss(math.log(p / (1 - p)), margin)[which]) for p in share]
        points = [
            ((origin + 300 * p) * SCALE, (bottom - 210 * min(v / top, 1.05)) * SCALE)
            for p, v in zip(share, values)
        ]
        draw.line(points, colour, 3 * SCALE, joint="curve")

    for origin, which, top, title in (
        (left, 0, 4.0, "loss of a real"),
        (left + 370, 1, 1.0, "|gradient| with respect to the logit"),
    ):
        corners = ((origin, 30), (origin, bottom), (origin + 310, bottom))
        draw.line([(x * SCALE, y * SCALE) for x, y in corners], INK, SCALE)
        margin_at = origin + 300 * 0.8
        draw.line([(margin_at * SCALE, y * SCALE) for y in (40, bottom)], GREY, SCALE)
        curve(origin, which, 1.0, BLUE, top)
        curve(origin, which, 0.8, ORANGE, top)
        text(origin + 8, 22, title)
        text(origin + 150, bottom + 18, "D(real), as a probability", anchor="mm")
        text(margin_at + 4, 50, "0.8")
        text(origin - 8, bottom, "0", anchor="rm")
        text(origin - 8, bottom - 210, f"{top:g}", anchor="rm")
    text(left + 130, 75, "no margin", BLUE)
    text(left + 130, 95, "margin 0.8", ORANGE)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def split_norm_figure() -> Image.Image:
    """One forward of reals and fakes: one batch for convolutions, two for norms."""
    width, height = 760, 190
    picture = Image.new("RGB", (width * SCALE, height * SCALE), "white")
    draw = ImageDraw.Draw(picture)

    def box(x: float, y: float, w: float, h: float, words: str, colour: str) -> None:
        corners = [v * SCALE for v in (x, y, x + w, y + h)]
        draw.rounded_rectangle(corners, 8 * SCALE, fill=colour, outline=INK, width=SCALE)
        middle = ((x + w / 2) * SCALE, (y + h / 2) * SCALE)
        draw.multiline_text(middle, words, INK, font(13), anchor="mm", align="center")

    def arrow(x: float, y: float, length: float) -> None:
        tip = (x + length, y)
        draw.line([(x * SCALE, y * SCALE), (tip[0] * SCALE, y * SCALE)], INK, SCALE)
        head = [tip, (tip[0] - 7, y - 4), (tip[0] - 7, y + 4)]
        draw.polygon([(a * SCALE, b * SCALE) for a, b in head], INK)

    orange, blue, plain = "#ffe3cc", "#d5e5fa", "#f2f2f2"
    box(20, 30, 100, 55, "32 reals", orange)
    box(20, 100, 100, 55, "32 fakes", blue)
    arrow(125, 92, 40)
    box(170, 30, 130, 125, "convolution\none batch of 64", plain)
    for y, colour, words in ((30, orange, "reals"), (100, blue, "fakes")):
        arrow(305, y + 27, 35)
        box(345, y, 190, 55, f"(x - mean) / deviation\nof the {words}", colour)
        arrow(540, y + 27, 35)
    box(580, 30, 160, 125, "one gain, one bias,\nleaky ReLU,\nthe next convolution", plain)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def main() -> None:
    """Write both pictures into `data/`."""
    margin_figure().save(ROOT / "data" / "margin.png", optimize=True)
    split_norm_figure().save(ROOT / "data" / "split_norm.png", optimize=True)


if __name__ == "__main__":
    main()
