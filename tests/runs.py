"""Small runs of train_dogs.py for the tests, and readers of what they write."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train_dogs

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "train_dogs.py"
SAMPLE = ROOT / "data" / "sample"

# About 15 ms a step on one core. 135 dogs make 16 steps of 8 an epoch: 60 steps are four orders.
TINY = {
    "data": SAMPLE, "width": 1, "latent-dim": 16, "batch-size": 8, "images": 40,
    "average-every": 2, "swa-start": 0.5,
}  # fmt: skip
STEPS = 60


def arguments(out: Path, *flags: str, **changes: object) -> list[str]:
    """The command line of a tiny run into `out`; a change of None leaves that option away."""
    options = TINY | {"out": out} | {name.replace("_", "-"): v for name, v in changes.items()}
    pairs = [[f"--{name}", str(value)] for name, value in options.items() if value is not None]
    return [word for pair in pairs for word in pair] + list(flags)


def run_here(out: Path, *flags: str, **changes: object) -> int:
    """A tiny run in this process; returns the exit code of `main`."""
    return train_dogs.main(arguments(out, *flags, **changes))


def environment() -> dict[str, str]:
    """This process's, with one thread for torch: two are many times slower on a busy machine."""
    one = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return os.environ | one


def run_script(*argv: object, script: Path = SCRIPT, **options: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of train_dogs.py as a process of its own."""
    command = [sys.executable, str(script), *map(str, argv)]
    known = {"capture_output": True, "text": True, "timeout": 240, "env": environment()}
    done = subprocess.run(command, check=False, **(known | options))
    return done.returncode, done.stdout, done.stderr


def log_of(out: Path) -> list[dict]:
    """The lines of `log.jsonl`, every one of which must be whole JSON."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text("utf-8").splitlines()]


def resumed_steps(out: Path) -> list[int]:
    """The steps at which the run in `out` was resumed, by its log."""
    return [line["resumed_at_step"] for line in log_of(out) if "resumed_at_step" in line]


def sha(path: Path) -> str:
    """sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def pngs(path: Path) -> dict[str, bytes]:
    """The files of a zip, each of which must pass its checksum."""
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name) for name in archive.namelist()}


def pixels(path: Path) -> np.ndarray:
    """uint8 (n, 64, 64, 3): the images of a zip, which must be what the competition accepts."""
    files = pngs(path)
    assert list(files) == [f"{k:05d}.png" for k in range(len(files))]
    pictures = [Image.open(io.BytesIO(data)) for data in files.values()]
    assert {(p.format, p.mode, p.size) for p in pictures} == {("PNG", "RGB", (64, 64))}
    return np.stack([np.asarray(p) for p in pictures])


def load(path: Path) -> dict:
    """A checkpoint or `generator.pt`, of plain types only."""
    return torch.load(path, map_location="cpu", weights_only=True)


def tensors_in(value: object) -> Iterator[torch.Tensor]:
    """Every tensor in nested dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def all_finite(path: Path) -> bool:
    """Whether every number in a checkpoint or `generator.pt` is finite."""
    floats = [t for t in tensors_in(load(path)) if t.is_floating_point()]
    assert floats
    return all(bool(t.isfinite().all()) for t in floats)


def left_over(out: Path) -> list[str]:
    """What an unfinished write would have left in `out`."""
    return [p.name for p in out.rglob("*") if ".part" in p.name or ".new" in p.name]


def assert_one_sentence(stderr: str, *parts: str) -> None:
    """One line, a sentence, no traceback, and each of `parts` in it."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    assert len(lines) == 1, stderr
    assert lines[0].startswith("train_dogs: ") and lines[0].rstrip()[-1] in ".!", stderr
    assert "Traceback" not in stderr
    for part in parts:
        assert part in lines[0], (part, stderr)


@contextmanager
def light_runs(sheets: tuple[float, ...] = ()) -> Iterator[None]:
    """Runs in this process use one thread, few latents for the norms, and draw few sheets."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_dogs, "NORM_BATCHES", 8)
        patch.setattr(train_dogs, "SHEETS", sheets)
        yield
    torch.set_num_threads(threads)
