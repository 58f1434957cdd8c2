"""Plant one fault at a time in a copy of the project and run its tests: do they notice it?

    python tests/tools/mutants.py                       # all: some minutes of a core
    python tests/tools/mutants.py --only head-at-the-bottom seeds-of-uses-collide

A mutant is `killed` if a test fails. It has `survived` if all pass: then a test is missing. It is
`stale` if its text is not in the file exactly once (the program has changed: update `MUTANTS`), and
`broken` if pytest ended in another way, for example because the program cannot be imported. The
tests of the chosen mutants first run without a fault, and must pass. The exit code is 0 if all
mutants are killed.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 900  # of the tests of one mutant; a mutant that hangs is killed


class Mutant(NamedTuple):
    """A planted fault: `old` becomes `new` in `file`, and `tests` should fail."""

    file: str
    old: str
    new: str
    tests: str  # words for pytest


NUMBERS, CROPS = "tests/test_mifid_numbers.py", "tests/test_crops.py"
MUTANTS = {
    "biased-covariance": Mutant("mifid.py", "scatter / (len(x) - 1)", "scatter / len(x)", NUMBERS),
    "mifid-another-epsilon": Mutant(
        "mifid.py", "fid / (distance + EPSILON)", "fid / (distance + 1e-3)", NUMBERS
    ),
    "copies-have-a-score": Mutant(
        "mifid.py",
        "if distance < COPY_DISTANCE:\n        return math.inf",
        "if distance < 0:\n        return math.inf",
        NUMBERS,
    ),
    "jackknife-too-narrow": Mutant(
        "mifid.py",
        "math.sqrt((GROUPS - 1) / GROUPS",
        "math.sqrt(1 / GROUPS",
        "tests/test_mifid_trust.py",
    ),
    "square-outside-the-frame": Mutant(
        "train_dogs.py",
        "top = min(max(y - side / 2, 0), height - side)",
        "top = y - side / 2",
        CROPS,
    ),
    "head-at-the-bottom": Mutant(
        "train_dogs.py",
        "[(x, top, x + side, top + side) for x in starts]",
        "[(x, bottom - side, x + side, bottom) for x in starts]",
        CROPS,
    ),
    "mirrored-copies-stay": Mutant(
        "train_dogs.py",
        "torch.maximum(rows @ plain[:end].T, rows @ mirrored[:end].T)",
        "rows @ plain[:end].T",
        "tests/test_sources.py",
    ),
    "zip-with-the-clock": Mutant(
        "train_dogs.py",
        "date_time=(1980, 1, 1, 0, 0, 0)",
        "date_time=(1980, 1, 1, 0, 0, time.time_ns() // 1000 % 60)",
        "tests/test_submission.py",
    ),
    "levels-cut-off": Mutant(
        "train_dogs.py",
        "images.mul(127.5).add(127.5).round().clamp(0, 255)",
        "images.mul(127.5).add(127.5).clamp(0, 255)",
        "tests/test_submission.py",
    ),
    "one-seed-for-all-uses": Mutant(
        "train_dogs.py",
        "(seed + SEED_USES.index(use) * 0x9E3779B1) % 2**32",
        "seed % 2**32",
        "tests/test_averaging.py",
    ),
    "seeds-of-uses-collide": Mutant(
        "train_dogs.py",
        "(seed + SEED_USES.index(use) * 0x9E3779B1) % 2**32",
        "seed + SEED_USES.index(use)",
        "tests/test_averaging.py",
    ),
}


def pytest(folder: Path, tests: str, seconds: float) -> int:
    """pytest's exit code for the tests in a copy, up to the first failure; 1 if they hang."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(
            [*command, *tests.split()],
            cwd=folder, capture_output=True, text=True, timeout=seconds, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return 1
    return done.returncode


def judge(folder: Path, mutant: Mutant) -> str:
    """Plant a mutant in a copy of the project, run its tests, and restore the file."""
    path = folder / mutant.file
    text = path.read_text("utf-8")
    if text.count(mutant.old) != 1:
        return "stale"
    path.write_text(text.replace(mutant.old, mutant.new), "utf-8")
    try:
        code = pytest(folder, mutant.tests, SECONDS)
    finally:
        path.write_text(text, "utf-8")
    return {0: "survived", 1: "killed"}.get(code, "broken")


def main(
    argv: Sequence[str] | None = None,
    mutants: Mapping[str, Mutant] = MUTANTS,
    root: Path = ROOT,
) -> int:
    """Print a line for each mutant, and how many were killed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--only", nargs="+", choices=list(mutants), default=list(mutants))
    args = parser.parse_args(argv)
    skipped = shutil.ignore_patterns(".git", "__pycache__", "output", ".venv", ".*_cache")
    with tempfile.TemporaryDirectory(prefix="mutants-") as place:
        folder = Path(shutil.copytree(root, Path(place) / "project", ignore=skipped))
        tests = dict.fromkeys(word for name in args.only for word in mutants[name].tests.split())
        if pytest(folder, " ".join(tests), SECONDS * len(args.only)):
            print(f"the tests fail without a fault: {' '.join(tests)}")
            return 1
        counts: Counter[str] = Counter()
        for name in args.only:
            end = judge(folder, mutants[name])
            print(f"{end:8} {name}", flush=True)
            counts[end] += 1
    print(", ".join(f"{number} {end}" for end, number in counts.items()))
    return int(counts["killed"] < len(args.only))


if __name__ == "__main__":
    sys.exit(main())
