"""Training from packed crops on a machine without the photos, and what comes back from there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import elsewhere
import numpy as np
import pytest
import torch
from runs import ROOT, SAMPLE, arguments, environment, pixels, run_here

import train_dogs

pytestmark = pytest.mark.usefixtures("light")

# `elsewhere.py` with the light settings that the runs of this process have.
SCRIPT = """
import sys; sys.path[:0] = ["tests/tools"]
import elsewhere, train_dogs
train_dogs.NORM_BATCHES, train_dogs.SHEETS = 8, ()
sys.exit(elsewhere.main(sys.argv[1:]))
"""


def options(**changes: object) -> list[str]:
    """Those of a tiny run, without --data and --out."""
    return arguments(None, steps=6, data=None, **changes)


def packed(path: Path, *words: str) -> Path:
    """The sample's crops in a file."""
    assert elsewhere.main(["pack", str(path), "--data", str(SAMPLE), *words]) == 0
    return path


@pytest.mark.slow
def test_a_lossless_pack_trains_the_same_images_where_no_photos_are(tmp_path):
    assert run_here(tmp_path / "home", steps=6) == 0
    packed(tmp_path / "crops.zip", "--lossless")
    there = tmp_path / "there"  # the program, the tool and the pack; nothing else
    (there / "tests" / "tools").mkdir(parents=True)
    for name in ("train_dogs.py", "tests/tools/elsewhere.py"):
        shutil.copy(ROOT / name, there / name)
    shutil.move(tmp_path / "crops.zip", there)
    command = [sys.executable, "-c", SCRIPT, "run", "crops.zip", "results", *options()]
    own = environment() | {"XDG_CACHE_HOME": str(there / "cache")}
    subprocess.run(command, cwd=there, env=own, check=True, timeout=240)
    results = there / "results"
    ours, theirs = (pixels(p) for p in (tmp_path / "home/images.zip", results / "images_0.zip"))
    assert np.array_equal(ours, theirs)
    names = {"log.jsonl", "config.json", "progress.webp", "images_0.zip"}
    assert {p.name for p in results.iterdir()} - names <= {"step_0000006.png"}
    assert not (there / "cache").exists()  # no photo was looked for


def test_a_pack_has_every_field_of_the_crops_and_jpeg_stays_near(tmp_path):
    dogs = train_dogs.prepare_crops(train_dogs.find_photos([SAMPLE]), "square,whole")
    kinds, found = elsewhere.unpack(packed(tmp_path / "a.zip", "--crops", "square,whole"))
    assert kinds == "square,whole" and found.key != dogs.key
    difference = found.pixels.float() - dogs.pixels.float()
    assert 0 < difference.square().mean() < 255**2 / 10**3.6  # above 36 dB
    for name, value in vars(dogs).items():
        if name not in ("pixels", "key"):
            same = torch.equal if isinstance(value, torch.Tensor) else type(value).__eq__
            assert same(value, getattr(found, name)), name
    kinds, found = elsewhere.unpack(packed(tmp_path / "b.zip", "--lossless"))
    assert found.key == train_dogs.prepare_crops(train_dogs.find_photos([SAMPLE]), "square").key


def test_what_an_ended_run_leaves_is_small_files_and_one_that_fails_leaves_its_folder(
    tmp_path, monkeypatch, capsys
):
    for name in ("find_photos", "prepare_crops"):  # `run` replaces them
        monkeypatch.setattr(train_dogs, name, getattr(train_dogs, name))
    path, results = packed(tmp_path / "crops.zip"), tmp_path / "results"
    monkeypatch.setattr(elsewhere, "ZIP_BYTES", 100_000)
    assert elsewhere.main(["run", str(path), str(results), *options(crops="box")]) == 2
    assert "holds --crops square" in capsys.readouterr().err
    assert elsewhere.main(["run", str(path), str(results), *options()]) == 0
    parts = sorted(results.glob("images_*.zip"))
    assert parts and all(p.stat().st_size <= 100_000 for p in parts)
    names = [name for p in parts for name in zipfile.ZipFile(p).namelist()]
    assert names == [f"{k:05d}.png" for k in range(len(names))] and 0 < len(names) <= 40
    assert json.loads((results / "config.json").read_text())["steps"] == 6
    assert not (results / "run").exists()

    def killed(trainer: object, progress: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train_dogs.Trainer, "step", killed)
    assert elsewhere.main(["run", str(path), str(tmp_path / "b"), *options()]) == 130
    assert (tmp_path / "b" / "run" / "config.json").exists()
    assert (tmp_path / "b" / "log.jsonl").exists()
    assert not list((tmp_path / "b").glob("images_*"))


def test_a_zip_is_split_within_its_limit_and_what_is_too_much_is_counted(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(elsewhere, "ZIP_BYTES", 10_000)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for k in range(30):
            archive.writestr(f"{k:05d}.png", bytes([k]) * 1000)
    monkeypatch.setattr(elsewhere, "ZIPS", 3)
    elsewhere.split_zip(tmp_path / "images.zip", tmp_path)
    parts = [tmp_path / f"images_{k}.zip" for k in range(3)]
    assert all(path.stat().st_size <= 10_000 for path in parts)
    assert [len(zipfile.ZipFile(path).namelist()) for path in parts] == [8, 8, 8]
    assert capsys.readouterr().out.startswith("6 of the images")
    assert zipfile.ZipFile(parts[2]).read("00023.png") == bytes([23]) * 1000
