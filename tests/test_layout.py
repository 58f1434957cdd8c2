"""The repository's shape: its top level, line lengths, and words that do not belong."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOP = {"train_dogs.py", "mifid.py", "requirements.txt", "README.md", "tests", "data"}
# Backwards, so that this file does not hold them itself.
BACKWARDS = ["/krow/", "yrarbil.", "detsohnohtyp", "gro.ipyp", "gro.sjmpn", "gro.naibed.bed"]
FORBIDDEN = [word[::-1] for word in BACKWARDS]


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    """Every file of the project, relative to its root."""
    try:
        listing = subprocess.run(
            ["git", "-c", "safe.directory=*", "ls-files", "-z"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"not a git repository, or no git: {error}")
    return [Path(name) for name in listing.split("\0") if name and (ROOT / name).is_file()]


def test_the_top_level_holds_what_was_agreed(tracked):
    top = {path.parts[0] for path in tracked}
    assert {name for name in top if not name.startswith(".")} <= TOP


def test_lines_have_at_most_100_columns(tracked):
    long = [
        f"{path}:{number}"
        for path in tracked
        if path.suffix == ".py"
        for number, line in enumerate((ROOT / path).read_text("utf-8").splitlines(), start=1)
        if len(line) > 100
    ]
    assert long == []


def test_no_word_that_belongs_to_one_machine(tracked):
    found = [
        f"{path}: {word}"
        for path in tracked
        if path.suffix not in {".jpg", ".png", ".webp"}
        for word in FORBIDDEN
        if word in (ROOT / path).read_text("utf-8")
    ]
    assert found == []


def test_requirements_are_the_six_agreed():
    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    names = [re.match(r"[A-Za-z0-9_-]+", line)[0].lower() for line in lines]
    assert sorted(names) == ["numpy", "pillow", "scipy", "torch", "torchvision", "tqdm"]
    assert all(">=" in line for line in lines)


def test_nothing_large_is_committed(tracked):
    assert [p for p in tracked if (ROOT / p).stat().st_size > 1_500_000] == []
