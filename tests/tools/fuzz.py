"""Give both programs broken inputs, each in a child process with a limit of time and memory.

    python tests/tools/fuzz.py                    # 1,620 inputs, one core, one seed
    python tests/tools/fuzz.py --seed 1 --families checkpoints npz --count 50

Each input is a valid one of a family below, then damaged at random, by a seed. The program must
finish (`done`, exit code 0) or refuse the input (`refused`, exit code 2 and one sentence that
begins with the program's name). All else is `wrong`: a traceback, another code, no end after 60
seconds, too much memory. Wrong inputs are printed with what the program printed, their folders are
kept, and the exit code is 1. Scores use a small random network in the place of Inception, since
only the reading of files is tested.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import io
import json
import math
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from dog_sets import BOX, annotate, encode, paint, write
from frozen_graph import graph_of

import mifid
import train_dogs

SECONDS = 60  # of a child
MEMORY = 1536 << 20  # bytes that a child may have resident

Rng = random.Random
GOOD = [encode(paint(k)) for k in range(18)]  # two more than a run needs
TINY = ["--architecture", "paper", "--width", "1", "--latent-dim", "4", "--batch-size", "2"]
TINY += ["--images", "2", "--precision", "fp32", "--hours", "inf", "--device", "cpu"]
# Values of options.
NASTY = (
    "", " ", "0", "-1", "1e308", "-1e308", "nan", "inf", "-inf", "1e-320", "99999999999999999999",
    "0x10", "1_0", "²", "٣", "1.5", "True", "None", "é", "\ud800", "a" * 5000, "/", ".", "..",
    "/dev/null", "/dev/zero", "square:", "box:0", "box:-1", "cuda:²", "cuda:99999999999999999999",
    "cpu:7", "meta", "color,color", "--help", "--", "\n", "%s", "{}", "*",
)  # fmt: skip


class Network(torch.nn.Module):
    """Features of the right shape: a fixed projection of the first pixels."""

    weights, sha256, fingerprint, precision, batch_size = "none", "0" * 64, "0", "float32", 64
    classifier = None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 N x H x W x 3 to float32 N x 2048."""
        means = images.float().reshape(len(images), -1)[:, :192]
        waves = torch.arange(2048 * means.shape[1], dtype=torch.float32).sin()
        return (means @ waves.view(-1, 2048)).abs() / 999


# ------------------------------------------------------------------------------------- the damage


def damage(data: bytes, rng: Rng) -> bytes:
    """Bytes of a file changed, cut off, removed, doubled or inserted."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        if not data:
            break
        at = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(300, len(data)))
        kind = rng.randrange(6)
        if kind == 0:
            data[at] = rng.randrange(256)
        elif kind == 1:
            data[at : at + 4] = rng.choice((b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"))
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            del data[at : at + rng.randrange(1, 60)]
        elif kind == 4:
            data[at:at] = data[:at][-rng.randrange(1, 99) :]
        else:
            data[at:at] = rng.randbytes(rng.randrange(1, 40))
    return bytes(data)


def odd_picture(rng: Rng) -> bytes:
    """A picture of a rare format, one with a false size or EXIF block, a damaged one, or none."""
    kind = rng.randrange(8)
    if kind == 0:
        mode, form = rng.choice(
            [("1", "PNG"), ("I;16", "PNG"), ("LA", "PNG"), ("P", "GIF"), ("CMYK", "JPEG"),
             ("F", "TIFF"), ("L", "BMP"), ("RGBA", "WEBP"), ("I", "TIFF"), ("YCbCr", "JPEG")]
        )  # fmt: skip
        return encode(Image.new(mode, rng.choice([(96, 80), (1, 1), (1, 300), (64, 64)])), form)
    if kind == 1:  # a PNG with any width and height in its header
        side = rng.choice((1, 70, 4000, 8900, 60000, 2**31 - 1))
        head = side.to_bytes(4, "big") * 2 + bytes((8, rng.choice((0, 2, 3, 6)), 0, 0, 0))
        rows = zlib.compress(bytes(min(side, 4000) * 3 + 1) * min(side, 4000))
        parts = [(b"IHDR", head), (b"IDAT", rows), (b"IEND", b"")]
        chunks = (len(d).to_bytes(4, "big") + n + d + zlib.crc32(n + d).to_bytes(4, "big")
                  for n, d in parts)  # fmt: skip
        return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
    if kind == 2:  # a random EXIF block
        head = rng.choice((b"Exif\0\0II*\0\x08\0\0\0", b"Exif\0\0MM\0*\0\0\0\x08", b"Exif\0\0"))
        return encode(paint(rng.randrange(99)), "JPEG", exif=head + rng.randbytes(60))
    if kind == 3:
        exif = Image.Exif()
        exif[0x0112] = rng.choice((0, 1, 5, 6, 9, 65535))
        return encode(paint(rng.randrange(99)), "JPEG", exif=exif.tobytes())
    if kind == 4:
        return rng.choice((b"", b"\0", b"GIF89a", b"<svg/>", b"%!PS\n", b"\xff\xd8\xff", b"BM"))
    form = rng.choice(("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"))
    return damage(encode(paint(rng.randrange(99)), form), rng)


def odd_annotation(rng: Rng) -> bytes:
    """An annotation with strange boxes, a damaged one, or one that is much too long."""
    kind = rng.randrange(5)
    if kind < 2:
        values = (-(10**30), -5, 0, 1, 8, 40, 79, 96, 10**30, "nan", "inf", "", "x", "1e400", 2.5)
        count = rng.choice((0, 1, 1, 2, 9))
        boxes = [tuple(rng.choice(values) for _ in range(4)) for _ in range(count)]
        return annotate(boxes, (rng.choice(values), rng.choice(values)))
    if kind == 2:
        bomb = "".join(f'<!ENTITY e{k + 1} "{f"&e{k};" * 9}">' for k in range(9))
        return rng.choice((
            f'<!DOCTYPE a [<!ENTITY e0 "dog">{bomb}]><annotation>&e9;</annotation>'.encode(),
            annotate([BOX] * 200), b"<a>" * 20_000, "<ä/>".encode("utf-16"),
        ))  # fmt: skip
    return damage(annotate([BOX]), rng)


# ------------------------------------------------------------------------------------ the families
# Each makes one input in an empty folder and returns (program, its arguments).

Case = tuple[Callable[..., int], list[str]]


def dogs_in(folder: Path, pictures: Sequence[bytes], annotations: Sequence[bytes | None]) -> Path:
    """A set in Stanford's layout, or a plain folder without annotations."""
    for k, (picture, annotation) in enumerate(zip(pictures, annotations)):
        write(folder / f"Images/n01-Dog/n01_{k}.jpg", picture)
        if annotation is not None:
            write(folder / f"Annotation/n01-Dog/n01_{k}", annotation)
    return folder


def crop_or_score(data: Path, folder: Path, rng: Rng) -> Case:
    """Crop `data` with train_dogs.py, or score it with mifid.py."""
    if rng.random() < 0.6:
        crops = rng.choice(("square", "box,head:2", "whole", "context,whole"))
        options = ["--data", str(data), "--out", str(folder / "out"), "--crops", crops, *TINY]
        return train_dogs.main, [*options, "--dry-run", "--steps", "1"]
    good = dogs_in(folder / "good", GOOD[:3], [None] * 3)
    crop = rng.choice(("whole", "box", "centre"))
    sides = [str(good), str(data)] if rng.random() < 0.7 else [str(data), str(good)]
    return mifid.main, [*sides, "--crop", crop, "--resize", "--no-cache"]


def photos(folder: Path, rng: Rng) -> Case:
    """Some pictures or annotations are odd."""
    found, notes = list(GOOD), [rng.choice((None, *[annotate([BOX])] * 2))] * len(GOOD)
    for k in range(rng.choice((1, 1, 3, 18))):
        if notes[k] is None or rng.random() < 0.5:
            found[k] = odd_picture(rng)
        else:
            notes[k] = odd_annotation(rng)
    return crop_or_score(dogs_in(folder / "data", found, notes), folder, rng)


def archives(folder: Path, rng: Rng) -> Case:
    """A zip or tar with members of strange names and kinds, damaged or not."""
    path = folder / rng.choice(("dogs.zip", "all-dogs.zip", "images.tar", "dogs.tar.gz"))
    names = [f"Images/n01-Dog/n01_{k}.jpg" for k in range(len(GOOD))]
    for k in range(rng.choice((0, 1, 3))):
        names[k] = rng.choice(("../../x.jpg", "/etc/x.jpg", "a\\b.jpg", "é.jpg", "x/", "\n.jpg"))
    members = dict(zip(names, GOOD))
    if rng.random() < 0.2:
        members["bomb.jpg"] = bytes(80 << 20)
    if path.suffix == ".zip":
        ways = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
        with zipfile.ZipFile(path, "w", rng.choice(ways)) as archive:
            for name, data in members.items():
                archive.writestr(name, data)
    else:
        kinds = [tarfile.REGTYPE] * 2 + [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE]
        with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.type, info.size, info.linkname = rng.choice(kinds), len(data), names[0]
                archive.addfile(info, io.BytesIO(data))
    if rng.random() < 0.8:
        path.write_bytes(damage(path.read_bytes(), rng))
    return crop_or_score(path, folder, rng)


def idx(folder: Path, rng: Rng) -> Case:
    """MNIST's files, damaged or with a false header."""
    path = folder / "train-images-idx3-ubyte"
    claimed = [rng.choice((0, 1, 20, 20, 1 << 20, 2**32 - 1)) for _ in range(2)]
    count, side = claimed if rng.random() < 0.3 else (20, 28)
    kind, rank = rng.choice((8, 8, 8, 8, 13, 255)), rng.choice((3, 3, 3, 3, 1, 250))
    head = struct.pack(">BBBB3I", 0, 0, kind, rank, count, side, 28)
    data = head + rng.randbytes(20 * 28 * 28)
    labels = struct.pack(">BBBBI", 0, 0, 8, 1, rng.choice((20, 20, 19))) + rng.randbytes(20)
    if rng.random() < 0.4:
        data = damage(data, rng)
    if rng.random() < 0.5:
        path, data = path.with_suffix(".gz"), gzip.compress(data, 1)
        data = damage(data, rng) if rng.random() < 0.4 else data
    path.write_bytes(data)
    if rng.random() < 0.5:
        (folder / "train-labels-idx1-ubyte").write_bytes(labels)
    return crop_or_score(path, folder, rng)


def commands(folder: Path, rng: Rng) -> Case:
    """Strange values of options, with good data."""
    data = dogs_in(folder / "data", GOOD, [None] * len(GOOD))
    if rng.random() < 0.6:
        program, argv = train_dogs.main, ["--data", str(data), "--out", str(folder / "out"), *TINY]
        argv += ["--dry-run"]
        names = [f"--{f.name.replace('_', '-')}" for f in train_dogs.fields(train_dogs.Config)]
        names += ["--minutes", "--preset", "--breed", "--resume", "--sample-only", "--fresh"]
    else:
        program, argv = mifid.main, [str(data), str(data), "--resize", "--no-cache"]
        names = ["--crop", "--size", "--threshold", "--held-out", "--device", "--batch-size"]
        names += ["--limit", "--sheet", "--save-features", "--fast", "--all", "--json"]
    for _ in range(rng.choice((1, 1, 2, 4))):
        argv += [rng.choice(names), rng.choice((*NASTY, str(data), str(folder)))]
    return program, argv


def odd_value(value: object, rng: Rng) -> object:
    """Another value, of the same type or of another type."""
    if isinstance(value, torch.Tensor) and rng.random() < 0.7:
        return rng.choice((
            lambda: value.double(), lambda: value.flatten()[:-1], lambda: value[None],
            lambda: value.to(torch.int32), lambda: torch.empty(0), lambda: value.float() * math.nan,
            lambda: value.reshape(-1).float().to_sparse(), lambda: value.to("meta"),
        ))()  # fmt: skip
    return rng.choice((None, 0, -1, 2**63 - 1, 10**30, 1.5, math.nan, "", "x", True, [], {}, b"x"))


def odd_state(state: dict, rng: Rng) -> dict:
    """A checkpoint with one or two entries, at any depth, changed, removed or added."""
    state = copy.deepcopy(state)
    for _ in range(rng.choice((1, 1, 2))):
        place = state
        while True:
            key = rng.choice(list(place)) if place else "x"
            if not isinstance(place.get(key), dict) or not place[key] or rng.random() < 0.15:
                break
            place = place[key]
        kind = rng.randrange(5)
        if kind == 0:
            place.pop(key, None)
        elif kind == 1:
            place[rng.choice(("x", 7, ""))] = odd_value(None, rng)
        else:
            place[key] = odd_value(place.get(key), rng)
    return state


def finished_run(folder: Path) -> Path:
    """A finished run of two steps."""
    data = dogs_in(folder / "data", GOOD, [None] * len(GOOD))
    argv = ["--data", str(data), "--out", str(folder / "out"), *TINY, "--steps", "2"]
    assert train_dogs.main(argv) == 0
    return folder


def damage_state(path: Path, rng: Rng) -> None:
    """Damage a file of torch.save in its bytes or its entries."""
    if rng.random() < 0.7:
        torch.save(odd_state(torch.load(path, weights_only=True), rng), path)
    else:
        path.write_bytes(damage(path.read_bytes(), rng))


def checkpoints(folder: Path, rng: Rng) -> Case:
    """A run with damaged checkpoints is continued."""
    shutil.copytree(finished["folder"], folder, dirs_exist_ok=True)
    for name in rng.choice((("checkpoint.pt",), ("checkpoint.pt", "checkpoint.previous.pt"))):
        damage_state(folder / "out" / name, rng)
    argv = ["--data", str(folder / "data"), "--out", str(folder / "out"), *TINY, "--steps", "3"]
    return train_dogs.main, argv


def generators(folder: Path, rng: Rng) -> Case:
    """Images are drawn from a damaged generator.pt."""
    shutil.copytree(finished["folder"], folder, dirs_exist_ok=True)
    damage_state(folder / "out" / "generator.pt", rng)
    return train_dogs.main, ["--out", str(folder / "out"), *TINY, "--sample-only"]


def npz(folder: Path, rng: Rng) -> Case:
    """A strange .npz on either side of a score."""
    noise = np.random.default_rng(rng.randrange(999))
    shape = (rng.choice((0, 1, 2, 30)), rng.choice((0, 1, 64, 2048)))
    x = noise.random(shape if rng.random() < 0.5 else (30, 2048)) + 0.1
    kinds = ("f4", "f8", ">f4", "f2", "g", "i8", "c8", "U3", "?", "O")
    x = x.astype(rng.choice(kinds)) if rng.random() < 0.5 else x
    if x.dtype.kind == "f" and x.size and rng.random() < 0.3:
        x.flat[0] = rng.choice((math.nan, math.inf, 1e200, -1e9, 0))
    arrays = {rng.choice(("features", "features", "features", "mu", "arr_0")): x}
    abouts = ("[]", "{", "7", '{"rule": 3}', '{"rule": "box"}')
    arrays["about"] = rng.choice(("{}", "{}", "{}", "{}", *abouts))
    if "mu" in arrays:
        arrays["mu"] = x[:1].ravel()
        arrays["sigma"] = rng.choice((x, x.T @ x if x.dtype.kind == "f" else x))
    odd, good = folder / "odd.npz", folder / "good.npz"
    np.savez(good, features=noise.random((30, 2048)) + 0.1)
    if rng.random() < 0.1:
        with open(odd, "wb") as file:
            np.save(file, x)
    else:
        np.savez(odd, **arrays)
    if rng.random() < 0.4:
        odd.write_bytes(damage(odd.read_bytes(), rng))
    sides = [str(odd), str(good)]
    rng.shuffle(sides)
    more = rng.choice(([], ["--all"], ["--limit", "2"], ["--held-out", str(good)]))
    return mifid.main, sides + more


def weights(folder: Path, rng: Rng) -> Case:
    """A file without the weights of Inception."""
    good = dogs_in(folder / "data", GOOD[:3], [None] * 3)
    path, kind = folder / "weights.pth", rng.randrange(6)
    if kind == 0:
        path.write_bytes(rng.randbytes(rng.randrange(300)))
    elif kind > 3:
        some = {"conv/conv2d_params": np.ones((3, 3, 3, 32)), "conv/batchnorm/beta": np.ones(32)}
        path.write_bytes(damage(graph_of(some, content=kind == 4), rng))
    elif kind == 1:
        torch.save(odd_value(torch.ones(3), rng), path)
    else:
        some = {name: torch.ones(rng.choice((1, 3))) for name in list(names_of_weights)[:9]}
        torch.save(some, path)
        if kind == 3:
            path.write_bytes(damage(path.read_bytes(), rng))
    return mifid.main, [str(good), str(good), "--resize", "--weights", str(path), "--no-cache"]


def planted(folder: Path, rng: Rng) -> Case:
    """To test this tool: in turn a traceback, a hang, too much memory, and another exit code."""
    kind = int(folder.name.split("-")[2]) % 4

    def program(argv: list[str]) -> int:
        if kind == 0:
            raise KeyError("planted")
        if kind == 1:
            time.sleep(9999)
        if kind == 2:
            return len(np.ones(MEMORY + (200 << 20), np.uint8)) * 0
        return 7

    return program, []


finished: dict[str, Path] = {}
names_of_weights = [f"{n}.{p}" for n in mifid.named_convolutions() for p in mifid.TENSORS]
FAMILIES: dict[str, tuple[Callable[[Path, Rng], Case], int]] = {
    "photos": (photos, 540), "archives": (archives, 260), "commands": (commands, 300),
    "checkpoints": (checkpoints, 160), "generators": (generators, 80), "npz": (npz, 160),
    "weights": (weights, 60), "idx": (idx, 60),
}  # fmt: skip


# ------------------------------------------------------------------------------------ the children


def in_child(program: Callable[..., int], argv: list[str], printed: Path) -> None:
    """Run the program in this process, a fork, and exit with its code; 99 = a traceback, 98 =
    SystemExit with another code than 0."""
    code = 99
    os.chdir(printed.parent)  # for options that name a file without a folder
    resource.setrlimit(resource.RLIMIT_DATA, (4 * MEMORY, 4 * MEMORY))  # protects the machine
    try:
        with open(printed, "w", errors="backslashreplace") as file:
            sys.stdout, sys.stderr = io.StringIO(), file
            try:
                code = program(argv)
            except SystemExit as done:
                code = 98 if done.code else 0
            except BaseException:  # noqa: BLE001
                traceback.print_exc()
            file.flush()
    finally:
        os._exit(code if isinstance(code, int) and 0 <= code < 99 else 99)


def outcome(program: Callable[..., int], argv: list[str], printed: Path) -> str:
    """`done`, `refused`, or `wrong: ...` for one input."""
    child = os.fork()
    if child == 0:
        in_child(program, argv, printed)
    end = time.monotonic() + SECONDS
    while True:
        pid, status, used = os.wait4(child, os.WNOHANG)
        if pid:
            break
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.wait4(child, 0)
            return f"wrong: still running after {SECONDS} s"
        time.sleep(0.002)
    peak = used.ru_maxrss << (0 if sys.platform == "darwin" else 10)
    text = printed.read_text(errors="replace") if printed.exists() else ""
    code = os.waitstatus_to_exitcode(status)
    name = "mifid" if program is mifid.main else "train_dogs"
    sentences = [line for line in text.splitlines() if line.startswith(name)]
    if peak > MEMORY:
        return f"wrong: {peak >> 20} MB"
    if "Traceback" in text or code not in (0, 2):
        return f"wrong: code {code}"
    if code == 2 and len(sentences) != 1:
        return f"wrong: {len(sentences)} sentences"
    return "refused" if code else "done"


def fuzz(family: str, count: int, seed: int, keep: Path) -> tuple[Counter[str], list[str]]:
    """How many inputs ended in which way, and a report of each wrong one."""
    make = planted if family == "planted" else FAMILIES[family][0]
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    for number in range(count):
        rng = Rng(f"{seed} {family} {number}")
        folder = Path(tempfile.mkdtemp(prefix=f"{family}-{seed}-{number}-", dir=keep))
        program, argv = make(folder, rng)
        printed = folder / "printed.txt"
        end = outcome(program, argv, printed)
        counts[end.partition(":")[0]] += 1
        if end.startswith("wrong"):
            tail = printed.read_text(errors="replace").strip()[-400:] if printed.exists() else ""
            wrong.append(f"{family} {number} ({end}): {argv}\n{tail}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return counts, wrong


def prepare(keep: Path) -> None:
    """Make what all inputs share, before the first fork."""
    torch.set_num_threads(1)
    os.environ["XDG_CACHE_HOME"] = str(keep / "cache")
    network, load, find = Network(), mifid.load_inception, mifid.find_weights
    mifid.find_weights = lambda path, offline: find(path, offline) if path else None
    mifid.load_inception = lambda path, *rest: load(path, *rest) if path else network
    finished["folder"] = finished_run(Path(tempfile.mkdtemp(prefix="finished-", dir=keep)))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main(argv: Sequence[str] = ()) -> int:
    """Print a row for each family and a report of each wrong input; 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    families = [*FAMILIES, "planted"]
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--families", nargs="+", choices=families, default=[*FAMILIES])
    parser.add_argument("--count", type=int, help="inputs of each family; default its own number")
    given = parser.parse_args(argv)
    keep = Path(tempfile.mkdtemp(prefix="fuzz-"))
    prepare(keep)
    total: Counter[str] = Counter()
    failures = []
    for family in given.families:
        count = given.count or FAMILIES.get(family, (None, 4))[1]
        counts, wrong = fuzz(family, count, given.seed, keep)
        numbers = ", ".join(f"{counts[end]} {end}" for end in ("done", "refused", "wrong"))
        print(f"{family:12} {numbers}", flush=True)
        total += counts
        failures += wrong
    print(*failures, sep="\n\n")
    print(json.dumps(dict(total)))
    if failures:
        print(f"the inputs are in {keep}", file=sys.stderr)
    else:
        shutil.rmtree(keep)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
