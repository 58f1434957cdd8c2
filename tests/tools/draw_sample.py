"""Draw `data/sample`: small cartoons of invented dogs, in the layout of Stanford Dogs.

    python tests/tools/draw_sample.py [--to data/sample]

Every dog sits and looks at the viewer, so its head fills the upper half of its box and a network
can learn to draw it within three minutes. Breed, coat, the turn and tilt of the head, tongue, tail,
collar, size, scene and the cut by the frame differ. A dog is a list of closed curves, painted back
to front at four times the size. Picture k depends only on `SEED` and k.

Points are complex numbers, x + iy with y down: a product turns a curve, and a sum moves it. The
unit is about the height of a dog; its paws are at 0 and its head is around -0.62i.
"""

import argparse
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageDraw

SEED = 20190814  # the day the competition closed
PICTURES = 120
LINE_WIDTH = 0.014  # of the dark outline of every part, as a share of a dog's width
SUPERSAMPLE = 4  # drawn at this multiple of the size and averaged, for smooth edges
QUALITY = 86  # of the JPEGs: all pictures and annotations together are under 1 MB

Colour = tuple[int, int, int]
WHITE, CREAM, SAND, GOLD = (250, 246, 238), (250, 226, 184), (236, 190, 128), (232, 160, 74)
RED, BROWN, GREY, BLACK = (196, 100, 48), (134, 82, 54), (152, 156, 170), (74, 68, 78)
LINE, NOSE, PINK, TAG = (66, 44, 40), (44, 32, 36), (244, 132, 140), (252, 220, 110)
COLLARS = ((222, 64, 60), (54, 124, 208), (250, 196, 52))

# ------------------------------------------------------------------------------------ the breeds


class Breed(NamedTuple):
    """Face, head and ears of a breed; `coats` are (main, second) colours, `fur` is 0 for smooth."""

    wnid: str
    name: str
    ears: str
    fur: float
    head: tuple[float, float]  # half its width and height
    muzzle: tuple[float, float]  # the same
    marking: str
    coats: tuple[tuple[Colour, Colour], ...]


# fmt: off
BREEDS = (
    Breed("n90000001", "Drawn_spaniel", "long", 0.0, (0.28, 0.27), (0.15, 0.115), "blaze",
          ((RED, WHITE), (BROWN, WHITE), (BLACK, WHITE))),
    Breed("n90000002", "Drawn_shepherd", "tall", 0.02, (0.28, 0.26), (0.14, 0.125), "mask",
          ((GOLD, BLACK), (SAND, BLACK), (SAND, BROWN))),
    Breed("n90000003", "Drawn_terrier", "folded", 0.05, (0.29, 0.27), (0.19, 0.14), "beard",
          ((GREY, WHITE), (SAND, CREAM), (WHITE, CREAM))),
    Breed("n90000004", "Drawn_dachshund", "drop", 0.0, (0.26, 0.27), (0.145, 0.13), "points",
          ((BLACK, SAND), (BROWN, SAND), (RED, SAND))),
    Breed("n90000005", "Drawn_dalmatian", "flop", 0.0, (0.28, 0.265), (0.15, 0.115), "spots",
          ((WHITE, BLACK), (WHITE, BROWN))),
    Breed("n90000006", "Drawn_spitz", "small", 0.075, (0.33, 0.28), (0.13, 0.10), "ruff",
          ((GOLD, CREAM), (CREAM, WHITE), (WHITE, WHITE))),
)
EARS = {  # the right ear: points relative to the head's centre; whether it hangs in front of it
    "long":   ((0.17 - 0.22j, 0.31 - 0.20j, 0.42 + 0.04j, 0.39 + 0.25j, 0.27 + 0.24j, 0.22), True),
    "drop":   ((0.14 - 0.23j, 0.29 - 0.21j, 0.38 - 0.02j, 0.35 + 0.19j, 0.25 + 0.17j, 0.20), True),
    "flop":   ((0.10 - 0.24j, 0.27 - 0.27j, 0.38 - 0.12j, 0.36 + 0.08j, 0.27 + 0.06j), True),
    "folded": ((0.06 - 0.23j, 0.17 - 0.36j, 0.30 - 0.33j, 0.36 - 0.13j, 0.24 - 0.16j), True),
    "tall":   ((0.03 - 0.18j, 0.17 - 0.42j, 0.235 - 0.46j, 0.29 - 0.38j, 0.26 - 0.08j), False),
    "small":  ((0.08 - 0.20j, 0.20 - 0.37j, 0.255 - 0.39j, 0.30 - 0.32j, 0.28 - 0.10j), False),
}
# fmt: on

# ---------------------------------------------------------------------------------------- curves


def ellipse(middle: complex, rx: float, ry: float, degrees: float = 0.0) -> np.ndarray:
    """Closed curve of 48 points, turned clockwise."""
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    return middle + (rx * np.cos(t) + 1j * ry * np.sin(t)) * np.exp(1j * np.radians(degrees))


def smooth(*points: complex) -> np.ndarray:
    """Closed Catmull-Rom curve through the points, ten steps for each."""
    b = np.asarray(points)[:, None]
    a, c, d = np.roll(b, 1, 0), np.roll(b, -1, 0), np.roll(b, -2, 0)
    t = np.linspace(0, 1, 10, endpoint=False)
    curve = 2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2
    return ((curve + (3 * b - a - 3 * c + d) * t**3) / 2).ravel()


def furry(curve: np.ndarray, depth: float, tufts: int = 13) -> np.ndarray:
    """The curve with rounded tufts whose height is `depth` of its radius."""
    if not depth:
        return curve
    middle = curve.mean()
    t = np.linspace(0, 1, 240, endpoint=False) * len(curve)
    curve = np.interp(t, np.arange(len(curve) + 1), np.append(curve, curve[0]))
    wave = np.abs(np.sin(np.linspace(0, np.pi * tufts, 240, endpoint=False)))
    return middle + (curve - middle) * (1 + depth * wave)


def shaded(colour: Colour, share: float) -> Colour:
    """The colour made darker (share < 1) or lighter."""
    return tuple(min(255, round(c * share)) for c in colour)


Mark = tuple[np.ndarray, Colour]  # a curve that is filled


class Part(NamedTuple):
    """A closed curve filled with one colour, marks clipped to it, and a dark outline."""

    curve: np.ndarray
    colour: Colour
    marks: Sequence[Mark] = ()
    line: bool = True

    def moved(self, factor: complex, shift: complex) -> "Part":
        """Enlarged and turned by `factor`, then shifted."""
        marks = [(curve * factor + shift, colour) for curve, colour in self.marks]
        return self._replace(curve=self.curve * factor + shift, marks=marks)


def lit(curve: np.ndarray, colour: Colour, *marks: Mark, flip: bool = False) -> Part:
    """A part lit from the upper left, so its lower right rim is darker.

    `flip`: mirror the curve and its marks, but not the light.
    """
    if flip:
        curve, marks = -curve.conj(), [(-mark.conj(), colour) for mark, colour in marks]
    return Part(curve, shaded(colour, 0.84), ((curve - 0.022 - 0.03j, colour), *marks))


# ----------------------------------------------------------------------------------------- a dog

# fmt: off


def make_dog(breed: Breed, rng: np.random.Generator) -> list[Part]:
    """A random sitting dog; the parts are ordered back to front."""
    main, second = breed.coats[rng.integers(len(breed.coats))]
    main = shaded(main, rng.uniform(0.94, 1.05))
    turn, tilt = rng.uniform(-1, 1), np.exp(1j * np.radians(rng.uniform(-9, 9)))
    body = make_body(breed, main, second, rng)
    head = make_head(breed, main, second, turn, rng)
    return body + [part.moved(tilt, (0.02 * turn - 0.22j) * tilt - 0.41j) for part in head]


def make_body(
    breed: Breed, main: Colour, second: Colour, rng: np.random.Generator
) -> list[Part]:
    """Tail, trunk, haunches, feet, forelegs, and a collar or a ruff; the paws are at 0."""
    collar, left_tail, lift = rng.integers(3), rng.random() < 0.5, rng.uniform(-0.05, 0.04) * 1j
    tail = smooth(0.16 - 0.1j, 0.3 - 0.12j, 0.37 - 0.3j + lift, 0.31 - 0.31j + lift, 0.24 - 0.2j,
                  0.14 - 0.16j)
    if breed.marking == "ruff":
        tail = furry(ellipse(0.28 - 0.25j, 0.12, 0.14), 0.12, 9)
    trunk = smooth(-0.14 - 0.44j, 0.14 - 0.44j, 0.22 - 0.2j, 0.2 - 0.02j, -0.2 - 0.02j,
                   -0.22 - 0.2j)
    marks = {
        "spots": [(ellipse(p + rng.uniform(-0.02, 0.02), 0.045, 0.04), second)
                  for p in (-0.15 - 0.27j, 0.16 - 0.22j, 0.02 - 0.17j)],
        "mask": [(ellipse(x - 0.27j, 0.1, 0.2), second) for x in (-0.25, 0.25)],  # a saddle
    }.get(breed.marking, [(ellipse(-0.27j, 0.11, 0.16), second)])  # a bright chest
    paws = second if breed.marking in ("blaze", "points") else main
    foreleg = smooth(0.02 - 0.22j, 0.12 - 0.22j, 0.125 - 0.05j, 0.11, 0.03, 0.015 - 0.05j)
    parts = [lit(tail, main, flip=left_tail), lit(furry(trunk, breed.fur / 2), main, *marks)]
    for curve, colour, *paw in (
        (ellipse(0.2 - 0.1j, 0.1, 0.11), main),
        (ellipse(0.21 - 0.035j, 0.085, 0.045), paws),
        (foreleg, main, (ellipse(0.07, 0.12, 0.09), paws)),
    ):
        parts += [lit(curve, colour, *paw, flip=flip) for flip in (False, True)]
    if breed.marking == "ruff":
        return [*parts, lit(furry(ellipse(-0.36j, 0.25, 0.13), 0.14, 11), second)]
    ring = smooth(-0.15 - 0.4j, 0.15 - 0.4j, 0.15 - 0.34j, -0.31j, -0.15 - 0.34j)
    return [*parts, Part(ring, COLLARS[collar]), Part(ellipse(-0.295j, 0.035, 0.035), TAG)]


def make_head(
    breed: Breed, main: Colour, second: Colour, turn: float, rng: np.random.Generator
) -> list[Part]:
    """Skull, ears, muzzle, tongue, eyes and nose around 0; `turn` in [-1, 1]: to the side."""
    marking, (rx, ry), look = breed.marking, breed.head, 0.06 * turn
    points, hanging = EARS[breed.ears]
    dark = {"spots": second, "mask": second, "beard": shaded(main, 0.86), "ruff": main}
    ears = []
    for flip in (True, False):
        near = 1 + (0.12 if flip else -0.12) * turn  # perspective: the far ear is narrower
        ear = smooth(*(p.real * near + 1j * p.imag for p in points)) * rng.uniform(0.96, 1.04)
        ear = furry(ear, breed.fur / 2, 7)
        inner = [] if hanging else [(0.55 * ear + 0.45 * ear.mean() + 0.015j, PINK)]
        ears.append(lit(ear, dark.get(marking, shaded(main, 0.8)), *inner, flip=flip))

    half = (0.72 * rx - 0.8j * ry, rx + 0.02j, 0.7 * rx + 0.78j * ry)
    skull = smooth(-1j * ry, *half, 1j * ry, *(-p.conjugate() for p in half[::-1]))
    marks = {
        "blaze": [(ellipse(look - 0.1j, 0.055, 0.3), second)],
        "mask": [(ellipse(look + 0.12j, 0.19, 0.17), second)],
        "points": [(ellipse(look + x - 0.135j, 0.04, 0.028), second) for x in (-0.105, 0.105)],
        "spots": [(ellipse(look + p, 0.04, 0.04), second)
                  for p in (-0.12 - 0.19j, 0.08 - 0.23j, 0.2 + 0.1j)],
        "ruff": [(ellipse(look + 0.1j, 0.24, 0.17), second)],
    }.get(marking, [])
    if marking == "spots" and rng.random() < 0.5:  # a patch round one eye
        marks.append((ellipse(look + 0.12 - 0.03j, 0.1, 0.12), second))

    chin = 1.5 * look + 0.12j
    cheeks = {"mask": shaded(second, 1.12), "spots": WHITE}.get(marking, second)
    muzzle = furry(ellipse(chin, *breed.muzzle), breed.fur * 1.6, 11)
    tongue = smooth(chin - 0.045 + 0.05j, chin + 0.045 + 0.05j, chin + 0.045 + 0.12j,
                    chin + 0.15j, chin - 0.045 + 0.12j)
    mouth = ellipse(chin + 0.055j, 0.06, 0.04)
    nose = smooth(chin - 0.065 - 0.075j, chin + 0.065 - 0.075j, chin + 0.03 - 0.01j,
                  chin - 0.03 - 0.01j)
    face = [lit(muzzle, cheeks), Part(mouth, LINE, [(mouth - 0.018j, cheeks)], line=False)]
    if rng.random() < 0.6:
        face.insert(1, Part(tongue, PINK))
    for eye in (look - 0.115 - 0.035j, look + 0.115 - 0.035j):
        pupil = eye + 0.2 * look
        shine = ellipse(pupil - 0.012 - 0.016j, 0.015, 0.016)
        face.append(Part(ellipse(eye, 0.05, 0.056), WHITE))
        face.append(Part(ellipse(pupil, 0.036, 0.043), NOSE, [(shine, WHITE)], line=False))
    face.append(Part(nose, NOSE, [(ellipse(chin - 0.02 - 0.072j, 0.02, 0.01), GREY)]))
    head = lit(furry(skull, breed.fur), main, *marks)
    return [head, *ears, *face] if hanging else [*ears, head, *face]


# fmt: on

# -------------------------------------------------------------------------------------- pictures


class Picture(NamedTuple):
    """All data of a picture except its pixels."""

    breed: Breed
    stem: str
    width: int
    height: int
    scene: str
    dogs: list[list[Part]]  # in pixels
    boxes: list[tuple[int, int, int, int]]  # xmin, ymin, xmax, ymax

    @property
    def folder(self) -> str:
        return f"{self.breed.wnid}-{self.breed.name}"


SCENES = {  # colours of the sky or wall at its top and bottom, then of the ground
    "meadow": ((148, 208, 244), (216, 240, 250), (138, 204, 96), (96, 170, 74)),
    "room":   ((250, 222, 170), (252, 234, 200), (204, 146, 98), (172, 112, 74)),
    "dusk":   ((150, 140, 210), (248, 196, 200), (122, 120, 176), (90, 90, 150)),
}  # fmt: skip


def corners(dog: list[Part]) -> tuple[float, float, float, float]:
    """Minimum of x and y, maximum of x and y."""
    points = np.concatenate([part.curve for part in dog])
    return points.real.min(), points.imag.min(), points.real.max(), points.imag.max()


def plan(k: int) -> Picture:
    """Picture k as curves, without drawing it; enough for its annotation."""
    rng = np.random.default_rng([SEED, k])
    breed, pair = BREEDS[k % 6], k % 8 == 3
    width, height = ((180, 136), (136, 180), (152, 152))[(k // 2) % 3] if not pair else (232, 128)
    width, height = width + int(rng.integers(-8, 9)), height + int(rng.integers(-8, 9))
    dogs, boxes = [], []
    for place in range(1 + pair):
        dog = make_dog(breed, rng)
        left, top, right, bottom = corners(dog)
        room = width * (0.5 if pair else 1)
        scale = rng.uniform(0.82, 0.95) * min(room / (right - left), height / (bottom - top))
        free = room - scale * (right - left)
        x = room * place + free * rng.uniform(0.2, 0.8) - scale * left
        y = height - scale * bottom - (height - scale * (bottom - top)) * rng.uniform(0.2, 0.6)
        if not pair and k % 10 == 4:  # cut off by the lower edge of the frame, as in many photos
            y = height + 0.12 * scale
        if not pair and k % 20 == 9:  # or by the left edge
            x = -scale * left - 0.1 * scale
        dogs.append([part.moved(scale, complex(x, y)) for part in dog])
        half = LINE_WIDTH * scale * (right - left) / 2  # of the outline
        edges = zip(corners(dogs[-1]), (-half, -half, half, half), strict=True)
        limits = (width, height, width, height)
        boxes.append(tuple(min(max(0, round(c + e)), n) for (c, e), n in zip(edges, limits)))
    scene = list(SCENES)[(k + k // 6) % 3]
    return Picture(
        breed, f"{breed.wnid}_{1000 + 37 * (k // 6) + k}", width, height, scene, dogs, boxes
    )


def drawn(picture: Picture, with_dogs: bool = True) -> Image.Image:
    """The pixels, RGB."""
    w, h = picture.width * SUPERSAMPLE, picture.height * SUPERSAMPLE
    foot = max(corners(dog)[3] for dog in picture.dogs) * SUPERSAMPLE
    horizon = min(foot, h) - 0.2 * h
    sky_top, sky_foot, ground_top, ground_foot = np.asarray(SCENES[picture.scene], float)
    y = np.arange(h)[:, None]
    sky = sky_top + (sky_foot - sky_top) * np.clip(y / horizon, 0, 1)
    ground = ground_top + (ground_foot - ground_top) * np.clip((y - horizon) / (h - horizon), 0, 1)
    rows = np.where(y < horizon, sky, ground)
    image = Image.fromarray(np.uint8(np.broadcast_to(rows[:, None], (h, w, 3)) + 0.5))
    for dog in picture.dogs if with_dogs else ():
        left, _, right, bottom = (c * SUPERSAMPLE for c in corners(dog))
        shadow = ellipse(complex((left + right) / 2, bottom - 4), 0.5 * (right - left), 0.03 * h)
        paint(image, Part(shadow, shaded(tuple(ground_foot), 0.85), line=False), 0)
        for part in dog:
            paint(image, part.moved(SUPERSAMPLE, 0), round(LINE_WIDTH * (right - left)))
    return image.resize((picture.width, picture.height), Image.Resampling.BOX)


def paint(image: Image.Image, part: Part, line: int) -> None:
    """Paint a part and its marks onto the image, with an outline of `line` pixels."""

    def mask(curve: np.ndarray) -> Image.Image:
        found = Image.new("L", image.size)
        ImageDraw.Draw(found).polygon([(p.real, p.imag) for p in curve], fill=255)
        return found

    inside = mask(part.curve)
    image.paste(part.colour, mask=inside)
    for curve, colour in part.marks:
        image.paste(colour, mask=ImageChops.multiply(inside, mask(curve)))
    if part.line and line:
        points = [(p.real, p.imag) for p in (*part.curve, *part.curve[:2])]
        ImageDraw.Draw(image).line(points, fill=LINE, width=line, joint="curve")


def annotation(picture: Picture) -> str:
    """The picture's annotation, in exactly the form of Stanford Dogs."""
    objects = "".join(
        f"""\t<object>
\t\t<name>{picture.breed.name}</name>
\t\t<pose>Unspecified</pose>
\t\t<truncated>0</truncated>
\t\t<difficult>0</difficult>
\t\t<bndbox>
\t\t\t<xmin>{xmin}</xmin>
\t\t\t<ymin>{ymin}</ymin>
\t\t\t<xmax>{xmax}</xmax>
\t\t\t<ymax>{ymax}</ymax>
\t\t</bndbox>
\t</object>
"""
        for xmin, ymin, xmax, ymax in picture.boxes
    )
    return f"""<annotation>
\t<folder>{picture.breed.wnid[1:]}</folder>
\t<filename>{picture.stem}</filename>
\t<source>
\t\t<database>drawn by tests/tools/draw_sample.py</database>
\t</source>
\t<size>
\t\t<width>{picture.width}</width>
\t\t<height>{picture.height}</height>
\t\t<depth>3</depth>
\t</size>
\t<segment>0</segment>
{objects}</annotation>
"""


def main() -> None:
    """Write all pictures and annotations."""
    here = Path(__file__).resolve().parents[2] / "data" / "sample"
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--to", type=Path, default=here, help="folder to write (data/sample)")
    folder = parser.parse_args().to
    for k in range(PICTURES):
        picture = plan(k)
        jpeg = io.BytesIO()
        drawn(picture).save(jpeg, "JPEG", quality=QUALITY, optimize=True)
        for path, data in (
            (Path("Images", picture.folder, f"{picture.stem}.jpg"), jpeg.getvalue()),
            (Path("Annotation", picture.folder, picture.stem), annotation(picture).encode()),
        ):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
    print(f"{PICTURES} pictures with their annotations in {folder}")


if __name__ == "__main__":
    main()
