"""A small part of `fuzz.py`, and a planted fault of each kind that it must report."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fcntl")  # it forks
FUZZ = Path(__file__).parent / "tools" / "fuzz.py"


def fuzz(folder: Path, *argv: str) -> tuple[int, dict[str, int], str]:
    """Exit code, the counts, and all that was printed."""
    command, env = [sys.executable, str(FUZZ), *argv], os.environ | {"TMPDIR": str(folder)}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, check=False, env=env
    )
    assert done.stdout.strip(), done.stderr[-2000:]
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stdout


@pytest.mark.slow
def test_broken_inputs_are_refused_in_a_sentence_or_done(tmp_path: Path) -> None:
    code, counts, out = fuzz(tmp_path, "--count", "4", "--seed", "11")
    assert (code, counts.get("wrong", 0)) == (0, 0), out
    assert sum(counts.values()) == 8 * 4 and counts["refused"] > 0 and counts["done"] > 0
    assert not any(tmp_path.glob("fuzz-*"))


@pytest.mark.slow
def test_a_planted_fault_of_each_kind_is_counted(tmp_path: Path) -> None:
    code, counts, out = fuzz(tmp_path, "--families", "planted")
    assert (code, counts["wrong"]) == (1, 4) and not counts.keys() & {"done", "refused"}
    for words in ("KeyError: 'planted'", "still running after 60 s", "code 7", " MB)"):
        assert words in out
    assert len([*tmp_path.glob("fuzz-*/planted-*")]) == 4
