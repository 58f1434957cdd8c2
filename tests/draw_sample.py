"""Draws `data/sample`: small pictures of invented dogs, in the layout of Stanford Dogs.

Nothing in them is a photograph. Each dog is a skeleton of a few hundred spheres, posed in three
dimensions, seen by an orthographic camera through a depth buffer, coloured by solid textures and
lit by one lamp; the scene behind it is painted from noise. Picture k depends on `SEED` and k
alone, so that any one can be redrawn without the rest.

    python tests/draw_sample.py [--to data/sample] [--sheet FILE.png]

Units: a dog is measured in "units" of about its height at the shoulder, x forward, y up,
z to its left; the camera's x is right, y up, z towards the viewer, all in supersampled pixels.
"""

import argparse
import io
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SEED = 20190814  # the day the competition closed
PICTURES = 120
SUPERSAMPLE = 3  # drawn at three times the size and averaged down, for smooth edges
QUALITY = 86  # of the JPEGs: 120 pictures and their annotations stay well under 1 MB

# ------------------------------------------------------------------------------------ the breeds


@dataclass(frozen=True)
class Breed:
    """Proportions in units, coats as (main, second) colours in sRGB; `fluff` is tufts a sphere."""

    wnid: str
    name: str
    leg: float
    body: float
    girth: float
    skull: float
    muzzle: float  # in skull radii
    ears: str
    tail: str
    fluff: float
    pattern: str
    coats: tuple[tuple[tuple[int, int, int], tuple[int, int, int]], ...]


WHITE, CREAM, BLACK = (240, 236, 228), (233, 205, 158), (48, 42, 42)
TAN, RED, BROWN, GREY = (203, 143, 84), (168, 88, 44), (112, 66, 40), (136, 134, 138)

# fmt: off
BREEDS = (
    #      wnid         name               leg   body  girth skull  muzzle ears       tail    fluff
    Breed("n90000001", "Drawn_spaniel",    0.42, 0.82, 0.20, 0.175, 0.75, "long",    "flag",  0.9,
          "patches", ((WHITE, RED), (WHITE, BROWN), (WHITE, BLACK), (CREAM, RED))),
    Breed("n90000002", "Drawn_shepherd",   0.55, 0.92, 0.20, 0.165, 1.05, "pointed", "flag",  0.7,
          "saddle", ((TAN, BLACK), (CREAM, GREY), (RED, BLACK), (WHITE, GREY))),
    Breed("n90000003", "Drawn_terrier",    0.30, 0.62, 0.18, 0.180, 0.65, "folded",  "stub",  1.3,
          "plain", ((WHITE, CREAM), (GREY, WHITE), (TAN, CREAM), (BLACK, GREY))),
    Breed("n90000004", "Drawn_dachshund",  0.20, 1.08, 0.17, 0.155, 1.15, "long",    "whip",  0.0,
          "points", ((BLACK, TAN), (RED, TAN), (BROWN, CREAM))),
    Breed("n90000005", "Drawn_dalmatian",  0.58, 0.86, 0.19, 0.155, 0.95, "flop",    "whip",  0.0,
          "spots", ((WHITE, BLACK), (WHITE, BROWN), (CREAM, BROWN))),
    Breed("n90000006", "Drawn_spitz",      0.34, 0.62, 0.22, 0.185, 0.50, "pointed", "curl",  2.0,
          "plain", ((CREAM, WHITE), (WHITE, WHITE), (TAN, CREAM), (BLACK, GREY), (RED, CREAM))),
)
# fmt: on

POSES = ("stand", "sit", "lie", "head", "run", "sit", "head", "lie", "stand", "bow")
SCENES = ("meadow", "sofa", "snow", "room", "beach", "autumn", "wall", "studio", "hill")

# ------------------------------------------------------------------------------------ small tools


def colour(rgb: tuple[int, int, int]) -> np.ndarray:
    """sRGB bytes to a float32 vector in [0, 1]."""
    return np.asarray(rgb, np.float32) / 255


def resized(array: np.ndarray, width: int, height: int) -> np.ndarray:
    """A float32 (h, w) array resampled smoothly to (height, width)."""
    image = Image.fromarray(np.ascontiguousarray(array, np.float32))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def blurred(array: np.ndarray, radius: float) -> np.ndarray:
    """Float32 (h, w), averaged down by `radius` pixels and brought up again: cheap and smooth."""
    height, width = array.shape
    small = (max(2, round(width / radius)), max(2, round(height / radius)))
    image = Image.fromarray(np.ascontiguousarray(array, np.float32))
    return resized(np.asarray(image.resize(small, Image.Resampling.BOX)), width, height)


def noise(rng: np.random.Generator, height: int, width: int, *cells: float) -> np.ndarray:
    """Sum of smooth noises, one for each cell size in pixels, scaled to about [-1, 1]."""
    total = np.zeros((height, width), np.float32)
    for weight, cell in enumerate(cells, start=1):
        shape = (max(2, round(height / cell) + 1), max(2, round(width / cell) + 1))
        total += resized(rng.uniform(-1, 1, shape), width, height) / weight
    return total / sum(1 / (k + 1) for k in range(len(cells)))


def mix(a: np.ndarray, b: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Colours a and b blended by t in [0, 1], which gains a last axis."""
    t = np.clip(t, 0, 1)[..., None]
    return a * (1 - t) + b * t


def step(x: np.ndarray, edge: float, soft: float) -> np.ndarray:
    """0 below the edge, 1 above it, straight between, over a width of `soft`."""
    return np.clip((x - edge) / soft + 0.5, 0, 1)


def rotation(axis: int, degrees: float) -> np.ndarray:
    """3×3 rotation about x, y or z (0, 1, 2)."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    i, j = ((1, 2), (2, 0), (0, 1))[axis]
    matrix = np.eye(3)
    matrix[i, i], matrix[i, j], matrix[j, i], matrix[j, j] = c, -s, s, c
    return matrix


class SolidNoise:
    """Smooth noise over three-dimensional points, from a random lattice that repeats."""

    def __init__(self, rng: np.random.Generator, size: int = 16) -> None:
        self.lattice, self.size = rng.uniform(-1, 1, (size, size, size)), size

    def __call__(self, points: np.ndarray, scale: float) -> np.ndarray:
        """(n, 3) points to (n,) values in about [-1, 1]; `scale` is cells per unit."""
        p = points * scale + 100
        low = np.floor(p).astype(int)
        t = p - low
        t = t * t * (3 - 2 * t)
        total = np.zeros(len(points))
        for corner in np.ndindex(2, 2, 2):
            weight = np.prod(np.where(corner, t, 1 - t), axis=1)
            x, y, z = ((low + corner) % self.size).T
            total += weight * self.lattice[x, y, z]
        return 1.6 * total


# --------------------------------------------------------------------------------------- the dogs


@dataclass
class Rig:
    """A dog as spheres: those of the body in units, those of the head in skull radii."""

    centres: list[np.ndarray] = field(default_factory=list)
    radii: list[float] = field(default_factory=list)
    roles: list[str] = field(default_factory=list)
    backs: list[np.ndarray] = field(default_factory=list)  # towards the dog's back, or zero
    on_head: list[bool] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)  # the sphere that a tuft grows on, or itself

    def ball(
        self,
        centre: np.ndarray | tuple[float, float, float],
        radius: float,
        role: str,
        head: bool = False,
        back: np.ndarray | None = None,
        parent: int | None = None,
    ) -> None:
        self.parents.append(len(self.radii) if parent is None else parent)
        self.centres.append(np.asarray(centre, float))
        self.radii.append(float(radius))
        self.roles.append(role)
        self.backs.append(np.zeros(3) if back is None else back)
        self.on_head.append(head)

    def chain(self, points: list, radii: list, role: str, head: bool = False) -> None:
        """Spheres along a Catmull-Rom curve through the points, close enough to look smooth."""
        p, r = np.asarray(points, float), np.asarray(radii, float)
        p = np.vstack([2 * p[0] - p[1], p, 2 * p[-1] - p[-2]])
        for k in range(len(r) - 1):
            a, b, c, d = p[k : k + 4]
            length = np.linalg.norm(c - b)
            count = int(np.ceil(length / (0.16 * min(max(r[k : k + 2]), 2 * min(r[k : k + 2])))))
            for t in np.arange(count + (k == len(r) - 2)) / max(count, 1):
                cubic = -a + 3 * b - 3 * c + d
                at = b + t / 2 * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * cubic))
                along = (c - b) / max(length, 1e-9)
                back = np.array([0.0, 1.0, 0.0]) - along[1] * along
                steep = np.linalg.norm(back)
                back = back / steep if steep > 0.45 else np.zeros(3)
                self.ball(at, r[k] * (1 - t) + r[k + 1] * t, role, head, back)


def add_leg(rig: Rig, top: tuple, knee: tuple, foot: tuple, thick: float, thin: float) -> None:
    """A leg from the shoulder or hip through knee or hock to a paw that points forward."""
    rig.chain([top, knee, foot], [thick, thin * 1.15, thin], "leg")
    x, y, z = foot
    rig.chain([(x, y, z), (x + 1.2 * thin, y - 0.1 * thin, z)], [thin * 1.05, thin * 1.1], "paw")


def add_tail(rig: Rig, b: Breed, root: np.ndarray, lift: float, swing: float) -> None:
    """A tail from its root; lift in [0, 1] from hanging to raised, swing sideways in units."""
    x, y, z = root
    if b.tail == "curl":
        points = [(0, 0, 0), (-0.10, 0.16, 0), (0.02, 0.30, swing / 2), (0.18, 0.22, swing)]
        radii = [0.07, 0.12, 0.12, 0.09]
    elif b.tail == "stub":
        points, radii = (
            [(0, 0, 0), (-0.05, 0.12, swing / 3), (-0.02, 0.24, swing / 2)],
            [0.05, 0.045, 0.035],
        )
    else:
        up = 0.9 * lift - 0.45
        points = [
            (0, 0, 0),
            (-0.16, 0.35 * up, swing / 3),
            (-0.32, 0.8 * up, swing),
            (-0.42, 1.2 * up, swing),
        ]
        radii = [0.055, 0.075, 0.085, 0.03] if b.tail == "flag" else [0.045, 0.036, 0.028, 0.016]
    low = 0.05 - y  # a tail lies on the ground rather than under it
    rig.chain([(x + p, y + max(q, low), z + s) for p, q, s in points], radii, "tail")


def add_head(rig: Rig, b: Breed, rng: np.random.Generator, panting: bool) -> None:
    """Skull, muzzle, eyes and ears, in skull radii about the skull's centre."""
    m = b.muzzle
    tip = 0.62 + m
    rig.ball((0, 0, 0), 1.0, "skull", True)
    for side in (-1, 1):
        rig.ball((0.38, 0.16, side * 0.30), 0.64, "skull", True)
        rig.ball((0.30, -0.38, side * 0.34), 0.66, "skull", True)
        rig.chain(
            [(0.55, -0.30, side * 0.12), (tip, -0.36, side * 0.10)], [0.56, 0.34], "muzzle", True
        )
        rig.ball((tip + 0.27, -0.17, side * 0.09), 0.19, "nose", True)
        rig.ball((0.86, 0.24, side * 0.43), 0.20, "eye", True)
        rig.ball((0.99, 0.33, side * 0.44), 0.075, "glint", True)
    drop = 0.30 if panting else 0.10
    jaw = [(0.45, -0.72, 0), (tip - 0.10, -0.66 - drop, 0)]
    rig.chain(jaw, [0.36, 0.22], "jaw", True)
    if panting:
        tongue = [(tip - 0.2, -0.62, 0), (tip + 0.12, -0.80, 0.04), (tip + 0.14, -1.12, 0.06)]
        rig.chain(tongue, [0.17, 0.19, 0.15], "tongue", True)
    else:
        lips = [(0.7, -0.72, 0.28), (tip + 0.12, -0.66, 0), (0.7, -0.72, -0.28)]
        rig.chain(lips, [0.05, 0.06, 0.05], "lips", True)
    if b.name == "Drawn_terrier":  # eyebrows and a beard
        for side in (-1, 1):
            rig.chain(
                [(0.80, 0.50, side * 0.30), (1.05, 0.44, side * 0.5)], [0.18, 0.11], "brow", True
            )
            beard = [(tip - 0.3, -0.55, side * 0.2), (tip - 0.1, -1.0, side * 0.24)]
            rig.chain(beard, [0.36, 0.20], "muzzle", True)
    perk = rng.uniform(-0.12, 0.12)
    for side in (-1, 1):
        if b.ears == "pointed":
            base, top = (-0.05, 0.68, side * 0.60), (0.02 + perk, 1.72, side * (0.86 + perk))
            middle = tuple((p + q) / 2 for p, q in zip(base, top, strict=True))
            rig.chain([base, middle, top], [0.44, 0.29, 0.04], "ear", True)
            inside = [(p + 0.22, q - 0.05, s) for p, q, s in (base, middle)]
            rig.chain(inside, [0.26, 0.14], "inner", True)
        elif b.ears == "folded":  # up, and the tip forward
            fold = (0.10, 1.22, side * 0.80)
            rig.chain([(-0.05, 0.62, side * 0.62), fold], [0.36, 0.22], "ear", True)
            rig.chain([fold, (0.48, 1.06 + perk, side * 0.90)], [0.22, 0.08], "ear", True)
        else:
            length = 1.5 if b.ears == "long" else 0.95
            points = [
                (-0.10, 0.62, side * 0.72),
                (0.02, 0.20, side * 1.16),
                (0.08 + perk, -0.35 * length, side * 1.24),
                (0.14 + perk, -0.85 * length, side * 1.12),
            ]
            for shift in (-0.16, 0.16):  # two chains side by side: an ear is flat
                ear = [(x + shift * k / 2, y, z) for k, (x, y, z) in enumerate(points)]
                rig.chain(ear, [0.28, 0.26, 0.30, 0.20], "ear", True)


def posed(b: Breed, pose: str, rng: np.random.Generator) -> tuple[Rig, np.ndarray, float]:
    """Builds the dog: returns it, where its skull is in units, and the head's pitch in degrees."""
    rig, g, leg, half = Rig(), b.girth, b.leg, b.body / 2
    thick, thin = g * 0.48, 0.035 + 0.05 * min(leg, 0.5)
    swing, lift = rng.uniform(-0.12, 0.12), rng.uniform(0.2, 1.0)
    pitch = rng.uniform(-14, 8)
    sides = ((-1, rng.uniform(-0.07, 0.07)), (1, rng.uniform(-0.07, 0.07)))
    z, floor = g * 0.52, thin
    if pose in ("stand", "run"):
        y = leg + g * 0.75
        rump, chest = np.array([-half, y + 0.02, 0]), np.array([half, y, 0])
        reach = 0.42 * leg + 0.12 if pose == "run" else 0.0
        lifted = 0.22 * leg if pose == "run" else 0.0
        for side, jitter in sides:
            ahead = jitter + side * reach
            foot = (half + ahead, floor + lifted * (side > 0), side * z)
            add_leg(
                rig,
                (half - 0.02, y - 0.4 * g, side * z),
                (half + ahead * 0.4, y * 0.5, side * z),
                foot,
                thick,
                thin,
            )
            hip, foot = (
                (-half, y - 0.1 * g, side * z),
                (-half - ahead - 0.04, floor + lifted * (side < 0), side * z),
            )
            hock = (-half - ahead * 0.4 - 0.11, y * 0.36, side * z)
            rig.ball((-half + 0.02, y - 0.35 * g, side * z * 0.9), g * 0.72, "torso")
            add_leg(rig, hip, hock, foot, thick * 1.25, thin)
    elif pose == "sit" or pose == "head":
        tilt = np.arcsin(np.clip((1.15 * leg + 0.1) / b.body, 0.45, 0.84))
        rump = np.array([-half * 0.6, g * 0.95, 0])
        chest = rump + b.body * 0.92 * np.array([np.cos(tilt), np.sin(tilt), 0])
        for side, jitter in sides:
            x = chest[0] + 0.04
            top, foot = (
                (x - 0.02, chest[1] - 0.3 * g, side * z),
                (x + 0.05 + jitter / 2, floor, side * z),
            )
            add_leg(rig, top, (x + 0.03, chest[1] * 0.5, side * z), foot, thick * 1.1, thin)
            rig.ball(rump + (0.10, 0.02, side * g * 0.75), g * 0.85, "torso")
            add_leg(
                rig,
                tuple(rump + (0.10, -0.04, side * g * 0.9)),
                tuple(rump + (0.30, -0.3 * g, side * g * 1.15)),
                (rump[0] + 0.36, floor, side * (g * 1.1 + 0.02)),
                g * 0.6,
                thin * 1.1,
            )
        lift = 0.25
    elif pose == "lie":
        rump, chest = np.array([-half, g * 0.95, 0]), np.array([half, g * 1.0, 0])
        for side, jitter in sides:
            top, foot = (
                (half, 0.5 * g, side * z),
                (half + 0.14 + 0.55 * leg + jitter, floor, side * z * 1.2),
            )
            add_leg(rig, top, (half + 0.1, floor * 1.4, side * z * 1.2), foot, thick, thin * 1.1)
            rig.ball((-half + 0.06, g * 0.8, side * g * 0.7), g * 0.82, "torso")
            foot = (-half + 0.34 + jitter, floor, side * g * 1.2)
            add_leg(
                rig,
                (-half + 0.05, g * 0.6, side * g),
                (-half + 0.2, floor * 2, side * g * 1.25),
                foot,
                thick,
                thin * 1.1,
            )
        lift = 0.3
    else:  # a play bow: elbows down, rump up
        y = leg + g * 0.75
        rump, chest = (
            np.array([-half, y + 0.04, 0]),
            np.array([half * 0.9, g * 1.05 + 0.25 * leg, 0]),
        )
        for side, jitter in sides:
            foot = (half + 0.12 + 0.5 * leg + jitter, floor, side * z * 1.3)
            add_leg(
                rig,
                (half * 0.9, chest[1] - 0.4 * g, side * z),
                (half, floor * 2, side * z * 1.2),
                foot,
                thick,
                thin,
            )
            rig.ball((-half + 0.02, y - 0.3 * g, side * z * 0.9), g * 0.72, "torso")
            hock = (-half - 0.1, y * 0.36, side * z)
            add_leg(
                rig,
                (-half, y - 0.1 * g, side * z),
                hock,
                (-half - 0.03, floor, side * z),
                thick * 1.25,
                thin,
            )
        lift, pitch = 1.0, 6.0

    waist = 0.5 * (rump + chest) + (-0.1 * half, -0.02 if pose != "lie" else 0.0, 0)
    slim = 0.74 if b.fluff < 0.5 else 0.88
    rig.chain([rump, waist, chest], [g * 0.86, g * slim, g * 1.04], "torso")
    rig.ball(chest + (0.05, -0.25 * g, 0), g * 0.92, "torso")
    up = 0.16 + 0.16 * leg + 0.4 * g
    rise = {"stand": (0.24, up), "run": (0.32, up * 0.7), "lie": (0.16, up + 0.05)}
    neck = np.array([*rise.get(pose, (0.14, up + 0.05)), 0.0])
    if pose == "lie" and rng.random() < 0.35:  # the chin on the paws
        neck, pitch = np.array([0.30, max(b.skull * 1.05 - chest[1], -0.05), 0.0]), 0.0
    skull = chest + neck
    start = chest + (0.02, 0.2 * g, 0)
    throat = skull - (0.05, 0.3 * b.skull, 0)
    rig.chain([start, throat], [g * 0.82, b.skull * 0.74], "neck")
    if b.pattern == "plain" and b.fluff > 1.5:  # the spitz wears a ruff
        rig.ball(0.6 * start + 0.4 * throat + (0.05, -0.02, 0), g * 1.02, "ruff")
    tail_root = (
        rump + (-g * 0.7, g * 0.35, 0)
        if pose != "sit" and pose != "head"
        else rump + (-g * 0.75, -g * 0.4, 0)
    )
    add_tail(rig, b, tail_root, lift, swing)
    if rng.random() < 0.4:  # a collar, as a ring of beads about the neck
        axis = throat - start
        axis = axis / np.linalg.norm(axis)
        across = np.cross(axis, (0, 0, 1.0))
        at = start + 0.62 * (throat - start)
        ring = b.skull * 0.30 + g * 0.52
        for angle in np.linspace(0, 2 * np.pi, 40, endpoint=False):
            spot = at + ring * (np.cos(angle) * across + np.sin(angle) * np.array([0, 0, 1.0]))
            rig.ball(spot, 0.032, "collar")
    return rig, skull, pitch


def add_fluff(rig: Rig, amount: float, rng: np.random.Generator) -> None:
    """Small tufts on the coat's surface, `amount` of them a sphere, so that no edge is smooth."""
    share = {"torso": 14, "ruff": 90, "skull": 16, "neck": 10, "tail": 6}
    furry = share.keys() | {"ear", "muzzle", "jaw", "leg"}
    for k in [k for k, role in enumerate(rig.roles) if role in furry]:
        role = rig.roles[k]
        for _ in range(rng.poisson(amount * share.get(role, 3))):
            direction = rng.normal(size=3)
            direction /= np.linalg.norm(direction)
            if role in ("skull", "muzzle", "jaw") and direction[0] > 0.2:
                continue  # the face stays clear
            size = rig.radii[k] * rng.uniform(0.07, 0.15)
            reach = rng.uniform(0.92, 1.0)
            spot = rig.centres[k] + reach * rig.radii[k] * direction
            rig.ball(spot, size, role, rig.on_head[k], rig.backs[k], k)


@dataclass
class Dog:
    """A dog before the camera: spheres in supersampled pixels, and what its coat needs."""

    breed: Breed
    coat: tuple[np.ndarray, np.ndarray]
    local: np.ndarray  # (n, 3) centres in units, of the head relative to the skull
    on_head: np.ndarray  # (n,) bool
    roles: np.ndarray  # (n,) str
    backs: np.ndarray  # (n, 3)
    parents: np.ndarray  # (n,) int
    turns: np.ndarray  # (2, 3, 3): body and head to camera, without the scale
    scale: float  # pixels per unit
    seen: np.ndarray  # (n, 3) centres in the camera, pixels
    radii: np.ndarray  # (n,) pixels
    ground: np.ndarray  # (n, 3) feet of the spheres on the ground, and their height in units
    seed: list[int]

    def moved(self, shift: np.ndarray) -> None:
        """Moves the dog by (right, up, towards the viewer), in pixels."""
        self.seen = self.seen + shift
        self.ground = self.ground + (*shift[:2], 0)

    def box(self, which: np.ndarray | None = None) -> np.ndarray:
        """Left, bottom, right, top in the camera (y up), of all spheres or of some."""
        which = np.ones(len(self.radii), bool) if which is None else which
        xy, r = self.seen[which, :2], self.radii[which, None]
        return np.concatenate([(xy - r).min(0), (xy + r).max(0)])


def make_dog(b: Breed, pose: str, rng: np.random.Generator, seed: list[int], lean: float) -> Dog:
    """A dog of the breed in the pose, turned at random, at 1 pixel a unit, before the origin."""
    panting = rng.random() < 0.45
    rig, skull, pitch = posed(b, pose, rng)
    add_head(rig, b, rng, panting)
    if b.fluff:
        add_fluff(rig, b.fluff, rng)
    # 0 looks to the right in profile, 90 into the camera, 180 to the left.
    yaw = {"head": rng.uniform(45, 135), "run": rng.choice([0, 180]) + rng.uniform(-25, 25)}.get(
        pose, rng.choice([rng.uniform(5, 75), rng.uniform(105, 175), rng.uniform(55, 125)])
    )
    glance = float(np.clip(rng.uniform(0.45, 1.0) * (90 - yaw), -62, 62))
    body = rotation(0, lean) @ rotation(1, -yaw)
    tilt = rng.uniform(-10, 10)
    head = body @ rotation(1, -glance) @ rotation(2, pitch) @ rotation(0, tilt)
    on_head = np.array(rig.on_head)
    local, radii = np.array(rig.centres), np.array(rig.radii)
    local[on_head] *= b.skull
    radii[on_head] *= b.skull
    seen = local @ body.T
    seen[on_head] = skull @ body.T + local[on_head] @ head.T
    world = seen @ np.linalg.inv(body).T
    height = world[:, 1].copy()
    world[:, 1] = 0
    coat = b.coats[rng.integers(len(b.coats))]
    return Dog(
        b,
        (colour(coat[0]), colour(coat[1])),
        local,
        on_head,
        np.array(rig.roles),
        np.array(rig.backs),
        np.array(rig.parents),
        np.stack([body, head]),
        1.0,
        seen,
        radii,
        np.column_stack([(world @ body.T)[:, :2], height]),
        seed,
    )


def scaled(dog: Dog, factor: float) -> None:
    """Enlarges the dog by a factor, about the camera's origin."""
    dog.seen, dog.radii, dog.scale = dog.seen * factor, dog.radii * factor, dog.scale * factor
    dog.ground = dog.ground * (factor, factor, 1)


# --------------------------------------------------------------------------------------- the coat


def coat_colour(
    dog: Dog, role: np.ndarray, point: np.ndarray, up: np.ndarray, head: np.ndarray
) -> np.ndarray:
    """Colours of the visible points, sRGB in [0, 1].

    role (n,) str; point (n, 3) in units, of the head relative to the skull; up (n,) in [-1, 1],
    1 on the dog's back and -1 under its belly; head (n,) bool. Returns (n, 3).
    """
    rng = np.random.default_rng(dog.seed)
    wave = SolidNoise(rng)
    main, second = dog.coat
    solid = point + np.where(head, 7.0, 0.0)[:, None]
    broad, fine = wave(solid, 4.5), wave(solid + 3, 14)
    face = point / dog.breed.skull
    muzzle = np.isin(role, ("muzzle", "jaw", "brow"))
    ear, limb = role == "ear", np.isin(role, ("leg", "paw"))
    trunk = np.isin(role, ("torso", "neck", "ruff", "tail"))
    first = np.broadcast_to(main, point.shape)
    pattern = dog.breed.pattern
    if pattern == "patches":
        patch = step(broad + 0.25 * fine, rng.uniform(-0.15, 0.35), 0.2)
        blaze = step(np.abs(face[:, 2]) + 0.12 * fine, 0.24, 0.12)
        patch = np.where(head, np.where(muzzle, 0.35 * (fine > 0.45), blaze), patch)
        patch = np.where(ear, 1.0, np.where(limb, 0.5 * (fine > 0.5), patch))
    elif pattern == "saddle":
        patch = np.where(trunk, step(up + 0.35 * broad, 0.05, 0.4), 0.0)
        patch = np.where(ear, 0.8, patch)
        mask = step(face[:, 0] + 0.2 * broad, 0.95, 0.5)
        patch = np.where(
            head & ~ear, np.where(muzzle, mask, 0.6 * step(face[:, 1], 0.72, 0.4)), patch
        )
        patch = np.where(role == "tail", 0.75, patch)
    elif pattern == "points":
        patch = np.where(role == "paw", 1.0, 0.0)
        patch = np.where(role == "leg", step(0.14 + 0.05 * broad - point[:, 1], 0.0, 0.08), patch)
        low = step(-face[:, 1] + 0.1 * broad, 0.32, 0.15) * (face[:, 0] > 0.4)
        dots = [np.hypot(face[:, 1] - 0.52, face[:, 2] - s * 0.34) < 0.15 for s in (-1, 1)]
        dots = (dots[0] | dots[1]) & (face[:, 0] > 0.5)
        patch = np.where(head & ~ear, np.maximum(low, dots), patch)
        chest = step(-up + 0.2 * broad, 0.72, 0.2) * (point[:, 0] > 0.25 * dog.breed.body)
        patch = np.where(trunk, chest, patch)
    elif pattern == "spots":
        centres = rng.uniform((-0.9, -0.5, -0.5), (0.9, 1.3, 0.5), (420, 3))
        sizes = rng.uniform(0.018, 0.062, 420)
        shift = point + np.where(head, 0.3, 0.0)[:, None]
        nearest = np.full(len(point), 9.0)
        for centre, size in zip(centres, sizes, strict=True):
            nearest = np.minimum(nearest, np.linalg.norm(shift - centre, axis=1) / size)
        patch = step(-nearest, -1.0, 0.35)
        patch = np.where(ear, np.maximum(patch, step(broad, rng.uniform(-0.5, 0.3), 0.3)), patch)
        patch = np.where(muzzle, patch * 0.5, patch)
    else:
        patch = step(-up + 0.3 * broad, 0.35, 0.9) * trunk
        patch = np.where(muzzle | (role == "ruff"), 0.75, np.where(limb, 0.4, patch))
    result = mix(first, second, patch)
    belly = np.where(trunk, 0.10 * np.clip(-up, 0, 1), 0.0)
    result = mix(result, np.ones(3), belly)
    result = result * (1 + 0.10 * fine + 0.08 * broad)[:, None]
    collar = colour(((196, 40, 44), (36, 92, 178), (232, 176, 32), (40, 140, 84))[rng.integers(4)])
    for name, paint in (
        ("nose", colour((34, 28, 30))),
        ("eye", colour((36, 22, 14))),
        ("glint", np.array([2.6, 2.6, 2.6])),  # brighter than white: it survives any light
        ("lips", colour((52, 34, 34))),
        ("tongue", colour((226, 110, 122))),
        ("inner", 0.55 * main + 0.45 * colour((222, 150, 140))),
        ("collar", collar),
    ):
        result[role == name] = paint
    return result


# --------------------------------------------------------------------------------------- the light


@dataclass(frozen=True)
class Light:
    """One lamp and a sky: direction towards the lamp, its colour, and the ambient colour."""

    towards: np.ndarray
    lamp: np.ndarray
    ambient: np.ndarray


def make_light(rng: np.random.Generator, scene: str) -> Light:
    side = rng.choice([-1, 1]) * rng.uniform(0.25, 0.9)
    towards = np.array([side, rng.uniform(0.5, 1.0), rng.uniform(0.45, 1.0)])
    moods = {
        "noon": ((1.02, 1.00, 0.95), (0.46, 0.50, 0.56)),
        "dusk": ((1.08, 0.84, 0.60), (0.42, 0.40, 0.48)),
        "cloud": ((0.62, 0.64, 0.68), (0.62, 0.64, 0.68)),
        "lamp": ((0.92, 0.80, 0.64), (0.48, 0.43, 0.38)),
        "dim": ((0.66, 0.58, 0.50), (0.34, 0.34, 0.38)),
    }
    inside = scene in ("sofa", "room", "studio")
    mood = rng.choice(["lamp", "noon", "dim"] if inside else ["noon", "dusk", "cloud", "noon"])
    lamp, ambient = moods[str(mood)]
    return Light(towards / np.linalg.norm(towards), np.array(lamp), np.array(ambient))


def paint_dogs(canvas: np.ndarray, dogs: list[Dog], light: Light) -> None:
    """Draws the dogs with their shadows into the canvas (h, w, 3), through one depth buffer."""
    height, width = canvas.shape[:2]
    shadow = Image.new("L", (width, height))
    pen = ImageDraw.Draw(shadow)
    for dog in dogs:
        for k in np.argsort(-dog.ground[:, 2], kind="stable"):  # the lowest last: they darken most
            (x, y, up), r = dog.ground[k], dog.radii[k]
            if up < 1:
                x, y = x - 0.35 * up * dog.scale * light.towards[0], height - y
                edges = (x - r * 1.1, y - 0.42 * r, x + r * 1.1, y + 0.42 * r)
                pen.ellipse(edges, fill=max(1, int(200 - 190 * up)))
    soft = shadow.filter(ImageFilter.GaussianBlur(0.022 * max(height, width)))
    canvas *= 1 - 0.62 * (np.asarray(soft, np.float32) / 255)[..., None]

    for dog in sorted(dogs, key=lambda d: d.seen[:, 2].mean()):
        depth = np.full((height, width), -np.inf)
        index = np.full((height, width), -1)
        for k, ((x, y, z), r) in enumerate(zip(dog.seen, dog.radii, strict=True)):
            y = height - y
            left, right = max(0, int(x - r)), min(width, int(x + r) + 2)
            top, bottom = max(0, int(y - r)), min(height, int(y + r) + 2)
            if left >= right or top >= bottom:
                continue
            dx, dy = np.arange(left, right) + 0.5 - x, np.arange(top, bottom) + 0.5 - y
            room = r * r - dx[None, :] ** 2 - dy[:, None] ** 2
            at = z + np.sqrt(np.maximum(room, 0))
            window = (slice(top, bottom), slice(left, right))
            nearer = (room > 0) & (at > depth[window])
            depth[window][nearer] = at[nearer]
            index[window][nearer] = k
        rows, columns = np.nonzero(index >= 0)
        if not len(rows):
            continue
        k = index[rows, columns]
        hit = np.column_stack([columns + 0.5, height - rows - 0.5, depth[rows, columns]])
        normal = (hit - dog.seen[k]) / dog.radii[k, None]
        smooth = hit - dog.seen[dog.parents[k]]  # tufts take most of their light as their parent
        smooth /= np.linalg.norm(smooth, axis=1, keepdims=True)
        turn = dog.turns[dog.on_head[k].astype(int)]
        offset = np.einsum("nji,nj->ni", turn, normal)
        point = dog.local[k] + offset * dog.radii[k, None] / dog.scale
        up = (offset * dog.backs[k]).sum(1)
        base = coat_colour(dog, dog.roles[k], point, up, dog.on_head[k])

        # A pixel that lies deeper than its surroundings gets less of the sky: soft creases.
        filled = np.where(index >= 0, depth, depth[rows, columns].min())
        crease = blurred(filled, 0.07 * dog.scale) - filled
        crease = np.clip(crease[rows, columns] / (0.16 * dog.scale), -0.4, 1.0)
        rng = np.random.default_rng([*dog.seed, 9])
        fur = rng.normal(0, 0.12 if dog.breed.fluff else 0.06, (len(rows), 3))
        skin = ~np.isin(dog.roles[k], ("eye", "nose", "glint", "collar", "tongue"))
        bent = 0.4 * normal + 0.6 * smooth + fur * skin[:, None]
        lit = np.clip(bent @ light.towards * 0.75 + 0.25, 0, 1)
        sky = 0.72 + 0.28 * bent[:, 1]
        colours = base * (
            lit[:, None] * light.lamp + (sky - 0.35 * crease)[:, None] * light.ambient
        )
        shine = np.clip(bent @ light.towards, 0, 1) ** 24 * np.where(
            dog.roles[k] == "nose", 0.7, 0.06
        )
        canvas[rows, columns] = colours * 0.82 + shine[:, None]


# --------------------------------------------------------------------------------------- scenes


def gradient(height: int, width: int, top: tuple, bottom: tuple) -> np.ndarray:
    """(h, w, 3) that fades from one colour to another downwards."""
    t = np.broadcast_to(np.linspace(0, 1, height)[:, None], (height, width))
    return mix(colour(top), colour(bottom), t)


def speckled(
    rng: np.random.Generator, h: int, w: int, rgb: tuple, amount: float, *cells: float
) -> np.ndarray:
    """(h, w, 3) of one colour, its brightness moved by noise."""
    return colour(rgb) * (1 + amount * noise(rng, h, w, *cells))[..., None]


def scene_outdoors(
    rng: np.random.Generator, h: int, w: int, scene: str, horizon: int
) -> np.ndarray:
    """Meadow, hill, snow, beach or autumn wood: a sky, something far away, and a ground."""
    sky = {
        "meadow": ((112, 168, 226), (206, 226, 240)),
        "hill": ((72, 134, 214), (190, 218, 240)),
        "snow": ((176, 196, 216), (226, 232, 240)),
        "beach": ((104, 176, 226), (238, 226, 206)),
        "autumn": ((196, 190, 180), (232, 214, 186)),
    }[scene]
    ground = {
        "meadow": [(94, 142, 52), (124, 158, 68), (76, 120, 58)],
        "hill": [(110, 156, 60), (134, 152, 72)],
        "snow": [(226, 232, 242), (214, 224, 240)],
        "beach": [(222, 196, 150), (206, 180, 138)],
        "autumn": [(158, 106, 52), (134, 98, 62), (176, 120, 44)],
    }[scene]
    canvas = gradient(h, w, *sky)
    clouds = step(noise(rng, h, w, w / 2.5, w / 6, w / 14), rng.uniform(0.05, 0.4), 0.5)
    canvas = mix(canvas, np.ones(3), 0.7 * clouds)
    far = Image.fromarray(np.uint8(np.clip(canvas, 0, 1) * 255))
    pen = ImageDraw.Draw(far)
    if scene == "beach":
        sea = np.array([(40, 120, 160), (60, 150, 176)][rng.integers(2)])
        for y in range(max(0, horizon - h // 8), horizon):
            pen.line((0, y, w, y), fill=tuple(int(c) for c in sea + rng.integers(-10, 14)))
    elif scene != "hill":
        tree = {"snow": (70, 96, 92), "autumn": (150, 92, 40)}.get(scene, (56, 96, 50))
        for _ in range(rng.integers(3, 12)):
            x, tall = rng.uniform(0, w), rng.uniform(0.12, 0.42) * h
            paint = tuple(int(np.clip(c + rng.integers(-18, 30), 0, 255)) for c in tree)
            if scene == "snow":
                for part in range(3):
                    y, wide = horizon - tall * part / 4, tall * (0.34 - 0.08 * part)
                    pen.polygon([(x - wide, y), (x + wide, y), (x, y - tall * 0.5)], fill=paint)
            else:
                pen.rectangle(
                    (x - tall / 22, horizon - tall / 2, x + tall / 22, horizon), fill=(82, 62, 46)
                )
                for _ in range(7):
                    cx, cy = x + rng.normal(0, tall / 6), horizon - tall * rng.uniform(0.4, 1)
                    r = tall * rng.uniform(0.12, 0.24)
                    pen.ellipse((cx - r, cy - r, cx + r, cy + r), fill=paint)
    far = far.filter(ImageFilter.GaussianBlur(rng.uniform(1.5, 5)))
    canvas = np.asarray(far, np.float32) / 255
    edge = horizon + 0.03 * h * noise(rng, 2, w, w / 2)[0]
    if scene == "hill":
        edge = edge + 0.16 * h * (2 * np.arange(w) / w - 1) ** 2
    below = (np.arange(h)[:, None] > edge[None, :]).astype(np.float32)
    rgb = ground[rng.integers(len(ground))]
    amount = {"snow": 0.06, "beach": 0.10}.get(scene, 0.24)
    floor = speckled(rng, h, w, rgb, amount, w / 3, 16, 6, 3)
    near = Image.fromarray(np.uint8(np.clip(mix(canvas, floor, below), 0, 1) * 255))
    pen = ImageDraw.Draw(near)
    for _ in range({"meadow": 900, "hill": 700, "autumn": 420, "snow": 0}.get(scene, 60)):
        x, y = rng.uniform(0, w), rng.uniform(horizon + 0.05 * h, h * 1.05)
        size = 2 + 9 * (y - horizon) / h
        jitter = rng.integers(-32, 40)
        if scene == "autumn":
            leaf = [(204, 112, 34), (182, 70, 30), (222, 168, 56), (120, 78, 44)][rng.integers(4)]
            pen.ellipse((x - size / 2, y - size / 4, x + size / 2, y + size / 4), fill=leaf)
        else:
            paint = tuple(int(np.clip(c + jitter, 0, 255)) for c in rgb)
            pen.line((x, y, x + rng.normal(0, size / 3), y - size), fill=paint, width=2)
    if scene in ("meadow", "hill") and rng.random() < 0.5:
        petal = [(250, 240, 120), (246, 246, 250), (214, 120, 190)][rng.integers(3)]
        for _ in range(40):
            x, y = rng.uniform(0, w), rng.uniform(horizon + 0.08 * h, h)
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=petal)
    return np.asarray(near, np.float32) / 255


def scene_indoors(rng: np.random.Generator, h: int, w: int, scene: str, horizon: int) -> np.ndarray:
    """Sofa, room, a brick wall by a pavement, or a studio's backdrop."""
    if scene == "studio":
        back = [(96, 128, 160), (168, 108, 104), (120, 146, 112), (70, 74, 84), (202, 178, 150)]
        rgb = back[rng.integers(len(back))]
        x, y = np.meshgrid(np.linspace(-1, 1, w), np.linspace(-1, 1, h))
        glow = 1.25 - 0.45 * np.hypot(x - rng.uniform(-0.4, 0.4), y + 0.2)
        return speckled(rng, h, w, rgb, 0.08, w / 3, w / 8) * glow[..., None]
    if scene == "wall":
        image = Image.new("RGB", (w, h), (150, 140, 132))
        pen = ImageDraw.Draw(image)
        brick = np.array([(164, 84, 66), (140, 98, 84), (182, 170, 156)][rng.integers(3)])
        tall, wide = h // 12, h // 5
        for row, y in enumerate(range(0, horizon, tall)):
            for x in range(-wide, w + wide, wide):
                left = x + (row % 2) * wide // 2
                paint = tuple(int(c) for c in np.clip(brick + rng.integers(-20, 20), 0, 255))
                pen.rectangle((left + 2, y + 2, left + wide - 2, y + tall - 2), fill=paint)
        canvas = np.asarray(image, np.float32) / 255
        canvas = canvas * (1 + 0.12 * noise(rng, h, w, 20, 5))[..., None]
        canvas[horizon:] = speckled(rng, h - horizon, w, (138, 136, 134), 0.16, 40, 6, 3)
        return canvas
    walls = [(196, 204, 190), (214, 196, 168), (168, 186, 206), (206, 176, 170), (226, 222, 214)]
    wall = walls[rng.integers(len(walls))]
    canvas = speckled(rng, h, w, wall, 0.05, w / 2, w / 6)
    if rng.random() < 0.4:  # striped paper
        stripes = (np.arange(w) // max(6, w // 18)) % 2
        canvas = canvas * (1 - 0.08 * stripes)[None, :, None]
    image = Image.fromarray(np.uint8(np.clip(canvas, 0, 1) * 255))
    pen = ImageDraw.Draw(image)
    if rng.random() < 0.6:  # a window or a picture on the wall
        x, y, a, b = rng.uniform(0, 0.7) * w, rng.uniform(-0.1, 0.1) * h, 0.34 * w, 0.3 * h
        inside = [(190, 220, 240), (96, 130, 96), (226, 190, 120)][rng.integers(3)]
        pen.rectangle((x, y, x + a, y + b), fill=inside, outline=(120, 92, 66), width=7)
        pen.line((x + a / 2, y, x + a / 2, y + b), fill=(120, 92, 66), width=4)
    if scene == "room":
        plank = np.array([(170, 122, 78), (132, 92, 62), (196, 158, 112)][rng.integers(3)])
        for y in range(horizon, h, max(6, h // 22)):
            paint = tuple(int(c) for c in np.clip(plank + rng.integers(-14, 14), 0, 255))
            pen.rectangle(
                (0, y, w, y + h // 22), fill=paint, outline=tuple(int(c) for c in plank * 0.8)
            )
        pen.rectangle((0, horizon - h // 28, w, horizon), fill=(238, 234, 226))
        if rng.random() < 0.7:
            rug = [(150, 60, 60), (60, 90, 130), (200, 180, 140), (80, 120, 96)][rng.integers(4)]
            pen.ellipse((-0.1 * w, horizon + 0.1 * h, 1.1 * w, h * 1.3), fill=rug)
    else:
        cloths = [(120, 60, 62), (66, 96, 120), (136, 130, 120), (90, 108, 78), (178, 140, 92)]
        cloth = np.array(cloths[rng.integers(len(cloths))])
        tint = [tuple(int(c) for c in np.clip(cloth * f, 0, 255)) for f in (0.86, 1.0, 1.16, 0.7)]
        back = max(0, horizon - int(0.22 * h))
        pen.rounded_rectangle((-0.1 * w, back, 1.1 * w, h), h // 10, fill=tint[0])
        for k in range(3):
            pen.line((w * k / 2, back, w * k / 2, horizon + h // 6), fill=tint[3], width=5)
        pen.rounded_rectangle((-0.1 * w, horizon + h // 8, 1.1 * w, h * 1.2), h // 12, fill=tint[1])
        pen.line((0, horizon + h // 8, w, horizon + h // 8), fill=tint[3], width=6)
        if rng.random() < 0.6:
            x, y, a = rng.uniform(0, 0.8) * w, back + 0.04 * h, 0.3 * h
            paint = [(232, 200, 110), (226, 226, 220), (180, 90, 96)][rng.integers(3)]
            pen.rounded_rectangle((x, y, x + a, y + a), a / 4, fill=paint)
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(1, 3)))
    return np.asarray(image, np.float32) / 255 * (1 + 0.07 * noise(rng, h, w, 12, 4))[..., None]


# -------------------------------------------------------------------------------------- pictures


@dataclass
class Picture:
    """One picture before it is drawn. Boxes are (xmin, ymin, xmax, ymax) in pixels, y down."""

    breed: Breed
    number: int
    width: int
    height: int
    scene: str
    dogs: list[Dog]
    boxes: list[tuple[int, int, int, int]]
    rng: np.random.Generator

    @property
    def folder(self) -> str:
        return f"{self.breed.wnid}-{self.breed.name}"

    @property
    def stem(self) -> str:
        return f"{self.breed.wnid}_{self.number}"


def plan(k: int) -> Picture:
    """Everything about picture k but its pixels: quick, and enough for its annotation."""
    rng = np.random.default_rng([SEED, k])
    breed = BREEDS[k % len(BREEDS)]
    turn = k // len(BREEDS)
    pose = POSES[(turn + k) % len(POSES)]
    scene = SCENES[(5 * turn + 2 * k + k // 40) % len(SCENES)]
    if pose == "run" and scene in ("sofa", "studio"):
        scene = "meadow"
    pair = k % 8 == 3
    shapes = ((172, 129), (129, 172), (150, 150), (186, 124), (160, 128))
    width, height = shapes[rng.integers(5)] if not pair else ((186, 132), (172, 136))[k % 2]
    width, height = (int(n + rng.integers(-9, 10)) for n in (width, height))
    w, h = width * SUPERSAMPLE, height * SUPERSAMPLE

    lean = rng.uniform(6, 17)
    dogs = [make_dog(breed, pose, rng, [SEED, k, 1], lean)]
    if pair:
        second = POSES[(turn + k + 3) % len(POSES)]
        dogs.append(make_dog(breed, "sit" if second == "head" else second, rng, [SEED, k, 2], lean))
    close = pose == "head" and not pair
    for place, dog in enumerate(dogs):
        roles = np.isin(dog.roles, ("skull", "muzzle", "ear", "nose", "neck")) if close else None
        left, bottom, right, top = dog.box(roles)
        room_w = w * (0.56 if pair else 1.0)
        fill = rng.uniform(0.70, 0.94) if close or rng.random() < 0.8 else rng.uniform(0.45, 0.62)
        scaled(dog, fill * min(room_w / (right - left), h / (top - bottom)))
        left, bottom, right, top = dog.box(roles)
        free_w, free_h = w - (right - left), h - (top - bottom)
        x = free_w * rng.uniform(0.1, 0.9)
        y = free_h * (rng.uniform(0.45, 0.85) if close else rng.uniform(0.12, 0.45))
        if pair:
            x = (0.02 + 0.5 * place) * w + (w * 0.5 - (right - left)) * rng.uniform(0.2, 0.8)
        elif rng.random() < 0.15:  # cut by the frame's edge, as photographs do
            head = dog.seen[dog.on_head, 0].mean() > dog.seen[~dog.on_head, 0].mean()
            cut = 0.15 * (right - left)
            x = -cut if head else free_w + cut  # the tail's end goes, not the head
        dog.moved(np.array([x - left, y - bottom, -y if pair else 0.0]))
    boxes = []
    for dog in dogs:
        left, bottom, right, top = dog.box() / SUPERSAMPLE
        corners = (left, height - top, right, height - bottom)
        limits = (width, height, width, height)
        boxes.append(
            tuple(round(float(np.clip(c, 0, n))) for c, n in zip(corners, limits, strict=True))
        )
    return Picture(breed, 1000 + 37 * turn + k, width, height, scene, dogs, boxes, rng)


def drawn(picture: Picture) -> Image.Image:
    """The picture itself, RGB. Uses up the picture's generator: plan it anew to draw it again."""
    rng, w, h = picture.rng, picture.width * SUPERSAMPLE, picture.height * SUPERSAMPLE
    feet = h - min(float(dog.box()[1]) for dog in picture.dogs)
    horizon = int(np.clip(min(feet, h) - rng.uniform(0.18, 0.42) * h, 0.25 * h, 0.8 * h))
    outdoors = picture.scene in ("meadow", "hill", "snow", "beach", "autumn")
    scene = (scene_outdoors if outdoors else scene_indoors)(rng, h, w, picture.scene, horizon)
    light = make_light(rng, picture.scene)
    canvas = scene * (0.55 * light.lamp + 0.62 * light.ambient)
    far = rng.uniform(0, 5)  # the lens is focused on the dog
    soft = Image.fromarray(np.uint8(np.clip(canvas, 0, 1) * 255))
    canvas = np.asarray(soft.filter(ImageFilter.GaussianBlur(far)), np.float32) / 255
    paint_dogs(canvas, picture.dogs, light)
    if picture.scene == "snow" and rng.random() < 0.6:
        for _ in range(50):
            x, y, r = rng.integers(w - 8), rng.integers(h - 8), rng.integers(2, 6)
            canvas[y : y + r, x : x + r] = 0.8 * canvas[y : y + r, x : x + r] + 0.2 * 1.2
    x, y = np.meshgrid(np.linspace(-1, 1, w), np.linspace(-1, 1, h))
    canvas = canvas * (1 - rng.uniform(0, 0.16) * (x**2 + y**2))[..., None]
    image = Image.fromarray(np.uint8(np.clip(canvas, 0, 1) * 255 + 0.5))
    image = image.resize((picture.width, picture.height), Image.Resampling.BOX)
    grain = rng.normal(0, rng.uniform(0.8, 3.0), (picture.height, picture.width, 1))
    pixels = np.asarray(image, np.float32) + grain.astype(np.float32)
    return Image.fromarray(np.uint8(np.clip(pixels, 0, 255) + 0.5))


def annotation(picture: Picture) -> str:
    """The picture's annotation, word for word in the form that Stanford Dogs has."""
    objects = "".join(
        f"""\t<object>
\t\t<name>{escape(picture.breed.name)}</name>
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
\t\t<database>drawn by tests/draw_sample.py</database>
\t</source>
\t<size>
\t\t<width>{picture.width}</width>
\t\t<height>{picture.height}</height>
\t\t<depth>3</depth>
\t</size>
\t<segment>0</segment>
{objects}</annotation>
"""


def contact_sheet(images: list[Image.Image], columns: int, side: int) -> Image.Image:
    """All images, each fitted into a square of `side` pixels, on one grey sheet."""
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * side, rows * side), (90, 90, 90))
    for k, image in enumerate(images):
        small = image.copy()
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
        sheet.paste(small, ((k % columns) * side, (k // columns) * side))
    return sheet


def main() -> None:
    here = Path(__file__).resolve().parent.parent / "data" / "sample"
    parser = argparse.ArgumentParser(description="Draw the sample data set.")
    parser.add_argument("--to", type=Path, default=here, help="folder to write (data/sample)")
    parser.add_argument("--sheet", type=Path, help="also write a contact sheet, as PNG")
    options = parser.parse_args()
    fresh = options.to.with_name(options.to.name + ".part")  # the set appears whole or not at all
    shutil.rmtree(fresh, ignore_errors=True)
    images, total = [], 0
    for k in range(PICTURES):
        picture = plan(k)
        for kind, name in (("Images", picture.stem + ".jpg"), ("Annotation", picture.stem)):
            path = fresh / kind / picture.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            data = annotation(picture).encode()
            if kind == "Images":
                images.append(drawn(picture))
                buffer = io.BytesIO()
                images[-1].save(buffer, "JPEG", quality=QUALITY, optimize=True)
                data = buffer.getvalue()
            path.write_bytes(data)
            total += len(data)
    if options.sheet:
        contact_sheet(images, 12, 128).save(options.sheet)
    shutil.rmtree(options.to, ignore_errors=True)
    os.replace(fresh, options.to)
    print(f"{len(images)} pictures, {total:,} bytes with their annotations, in {options.to}")


if __name__ == "__main__":
    main()
