"""A small part of `fuzz.py`, and that it sees what is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fcntl")  # it forks
FUZZ = Path(__file__).parent / "tools" / "fuzz.py"


def fuzz(*argv: str) -> tuple[int, dict[str, int], str]:
    """Exit code, the counts, and all that was printed."""
    command = [sys.executable, str(FUZZ), *argv]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.stdout.strip(), done.stderr[-2000:]
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stdout


@pytest.mark.slow
def test_broken_inputs_are_refused_in_a_sentence_or_done(tmp_path: Path) -> None:
    code, counts, out = fuzz("--count", "4", "--seed", "11", "--keep", str(tmp_path / "kept"))
    assert (code, counts.get("wrong", 0)) == (0, 0), out
    assert (
        counts["refused"] + counts["done"] == 9 * 4 and min(counts["refused"], counts["done"]) > 0
    )


@pytest.mark.slow
def test_a_planted_fault_of_each_kind_is_counted(tmp_path: Path) -> None:
    keep = ("--keep", str(tmp_path / "kept"))
    code, counts, out = fuzz("--families", "planted", "--count", "4", "--seconds", "60", *keep)
    assert (code, counts["wrong"]) == (1, 4) and not counts.keys() & {"done", "refused"}
    for words in ("KeyError: 'planted'", "still running after 60 s", "code 7", " MB)"):
        assert words in out
