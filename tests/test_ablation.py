"""The ablation tool: equal cost, no work twice, the scores of mifid.py, and the notebook's tables.

In Inception's place is a network of 48 numbers, so that a score takes milliseconds.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import ablation
import numpy as np
import pytest
from dog_sets import as_folders, make_dogs
from runs import ROOT, SAMPLE, left_over, pixels

import mifid
import train_dogs
from train_dogs import Config, Trainer

pytestmark = pytest.mark.usefixtures("light", "small_network")

BASE = "width=1,latent_dim=4,batch_size=4,average_every=1,swa_start=0.25,precision=fp32"
STEPS = 6
HOURS = train_dogs.p100_hours(Config(**ablation.fields_of(BASE)), STEPS)
Call = Callable[..., list[dict]]
HAND_WRITTEN = {
    "preset": "small", "base": {}, "change": "base", "seed": 0, "hours": None, "images": 800,
    "average": "swa", "n": 10_000, "reference": "18,163 whole photos", "fast": True, "fid": 99.0,
    "fid_error": 0.5, "fid_unbiased": 97.0, "fid_box": None, "memorization_distance": 0.25,
}  # fmt: skip


def colours(model: object, batches: Iterable[object]) -> tuple[np.ndarray, float]:
    """uint8 batches of (N, 64, 64, 3) to float32 (N, 48), the mean colours of 4 x 4 regions, in no
    time."""
    images = np.concatenate([np.asarray(batch) for batch in batches]).astype(np.float32)
    return images.reshape(-1, 4, 16, 4, 16, 3).mean((2, 4)).reshape(-1, 48), 0.0


@pytest.fixture
def small_network(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    """`colours` as the network of mifid.py."""
    known = {"weights": "none", "sha256": "0", "fingerprint": "0", "batch_size": 64}
    known |= {"classifier": None, "precision": "float32"}
    load = lambda path, device, fast: SimpleNamespace(**known)
    monkeypatch.setattr(mifid, "find_weights", lambda given, offline: None)
    monkeypatch.setattr(mifid, "load_inception", load)
    monkeypatch.setattr(mifid, "run_network", colours)


@pytest.fixture
def call(tmp_path: Path) -> Call:
    """The tool in this process; returns the lines of its log."""

    def run(*words: object, log: str = "out/results.jsonl") -> list[dict]:
        fixed = ["--data", SAMPLE, "--out", tmp_path / "out", "--base", BASE, "--device", "cpu"]
        fixed += ["--hours", HOURS, "--images", 40]
        assert ablation.main([str(w) for w in (*fixed, *words)]) == 0
        return ablation.read_lines(tmp_path / log)

    return run


def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on a step is an error."""

    def refuse(trainer: Trainer, progress: float) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(Trainer, "step", refuse)


# ------------------------------------------------------------------------------------ equal cost


@cache
def run_of(change: str) -> ablation.Run:
    """A run of 0.85 P100-hours that is not started."""
    args = {"preset": "dogs", "base": {}, "hours": 0.85, "device": "cpu", "tenth": False}
    return ablation.Run(argparse.Namespace(**args, out=Path("none")), change, 0)


def test_all_changes_cost_the_same_flops_within_half_a_step():
    for change in ("base", "r1=0.1", "loss=rals", "breed+classify", "batch_size=16"):
        config = run_of(change).config
        step = config.batch_size * train_dogs.flops_per_image(config) / 7.4e12 / 3600
        assert abs(config.steps * step - 0.85) <= 0.5001 * step, change


def test_a_change_that_costs_more_trains_on_fewer_images_and_a_free_one_on_as_many():
    names = ("base", "r1=0.1", "batch_size=16")
    base, r1, small = (run_of(change).config.steps for change in names)
    assert r1 < 0.9 * base and abs(small - 2 * base) <= 1
    for free in ("augment", "noise=0.01", "breed+classify", "no-margin", "decay"):
        assert run_of(free).config.steps == pytest.approx(base, rel=1e-3)


def test_each_change_changes_the_configuration_and_only_that():
    base = vars(run_of("base").config)
    for change, fields in ablation.CHANGES.items():
        config = vars(run_of(change).config)
        assert {k for k in base if config[k] != base[k]} - {"steps", "out"} == set(fields), change
    assert ablation.fields_of("condition=breed,classify=0.1") == ablation.CHANGES["breed+classify"]
    found = ablation.fields_of("augment=color,,cutout,width=3")
    assert found == {"augment": "color,cutout", "width": 3}
    with pytest.raises(SystemExit, match="wdth=3 is no change.*square"):
        ablation.fields_of("wdth=3")


# ----------------------------------------------------------------------- training and scoring


def test_each_score_is_a_line_and_nothing_is_trained_or_scored_twice(
    call, monkeypatch, tmp_path, capsys
):
    (tmp_path / "log.jsonl").write_text(json.dumps(HAND_WRITTEN) + "\n")
    words = ["--log", tmp_path / "log.jsonl", "--seeds", "0,1", "base", "d_lr=0.001"]
    first, *lines = call(*words, "--averages", "swa", log="log.jsonl")
    assert first == HAND_WRITTEN
    found = [(x["seed"], x["change"], x["average"]) for x in lines]
    assert found == [(s, c, "swa") for s in (0, 1) for c in words[-2:]]  # a seed after the other
    for x in lines:
        assert (x["steps"], x["images"], x["n"]) == (STEPS, 4 * STEPS, 40)
        assert x["p100_hours"] == pytest.approx(HOURS)
        assert x["reference"] == "120 whole photos" and "CPU" in x["device"] and x["date"]
        assert x["fid"] > 0 and x["fid_error"] > 0 and x["fid_box"] > 0
    assert len({x["fid"] for x in lines}) == 4  # seeds and changes differ
    assert left_over(tmp_path) == []
    by_hand, table = capsys.readouterr().out.split("`--preset ")[-2:]
    assert "| base | swa | 1 | 800 | 99.0 ± 0.5 | 97.0 | - | 0.250 |" in by_hand
    assert all(f"| {change} | swa | 2 | 24 |" in table for change in words[-2:])

    no_training(monkeypatch)
    more = call(*words, "--averages", "swa,none", log="log.jsonl")  # from the checkpoints
    assert more[:5] == [first, *lines] and [x["average"] for x in more[5:]] == ["none"] * 4
    monkeypatch.setattr(ablation, "images_of", None)
    assert call(*words, "--averages", "swa,none", log="log.jsonl") == more
    capsys.readouterr()
    assert ablation.main(["--table", str(tmp_path / "log.jsonl")]) == 0
    assert "| d_lr=0.001 | none | 2 | 24 |" in capsys.readouterr().out


def test_the_images_that_are_scored_are_those_of_the_submission(finished_run):
    images, trainer = ablation.images_of(finished_run / "checkpoint.pt", 40)
    assert np.array_equal(images, pixels(finished_run / "images.zip"))
    raw, _ = ablation.images_of(finished_run / "checkpoint.pt", 40, "none")
    assert trainer.config.average == "swa" and not np.array_equal(images, raw)


def test_scores_are_those_of_mifid_by_both_rules_and_photos_are_read_once(tmp_path, monkeypatch):
    data, args = as_folders(tmp_path, make_dogs(30)), argparse.Namespace(device="cpu", fast=False)
    images = np.random.default_rng(0).integers(0, 256, (90, 64, 64, 3), np.uint8)
    read, seen = train_dogs.read_photo, []
    with monkeypatch.context() as patch:
        patch.setattr(train_dogs, "read_photo", lambda photo: (seen.append(photo), read(photo))[1])
        for _ in range(2):
            found = ablation.score(ablation.features_of(images, args), data, args)
    assert len(seen) == 30
    whole, box = (mifid.score(images, data, crop=rule, device="cpu") for rule in ("whole", "box"))
    assert found.pop("fid_box") == box["fid"] != whole["fid"]
    assert found.items() <= whole.items() and found["fid_unbiased"] is not None


def test_scores_in_half_precision_or_of_other_counts_have_their_own_tables():
    lines = [HAND_WRITTEN, HAND_WRITTEN | {"fast": False}, HAND_WRITTEN | {"n": 5000}]
    tables = ablation.show_tables([*lines, *lines]).split("distance |")[1:]
    assert len(tables) == 3 and all("| base | swa | 2 |" in table for table in tables)


def test_a_tenth_is_trained_on_and_the_others_are_the_reference(tmp_path):
    data = as_folders(tmp_path / "dogs", make_dogs(300))
    parts = [train_dogs.find_photos([p]) for p in ablation.split_tenth(data, tmp_path / "out")]
    seen, unseen = ({p.name for p in part.photos} for part in parts)
    assert seen | unseen == {p.name for p in train_dogs.find_photos([data]).photos}
    assert not seen & unseen and 15 < len(seen) < 45
    assert len(train_dogs.prepare_crops(parts[0], "square").first) == len(seen)
    some = as_folders(tmp_path / "some", make_dogs(200))  # a photo's own name decides
    again = train_dogs.find_photos([ablation.split_tenth(some, tmp_path / "again")[0]])
    assert {p.name for p in again.photos} <= seen


def test_the_floor_is_that_of_photos_that_are_not_in_the_reference(capsys, monkeypatch, tmp_path):
    data = as_folders(tmp_path / "dogs", make_dogs(32))
    seen, score = [], ablation.score

    def spy(features: np.ndarray, folder: Path, args: argparse.Namespace) -> dict[str, object]:
        seen.append((len(features), len(train_dogs.find_photos([folder]).photos)))
        return score(features, folder, args)

    monkeypatch.setattr(ablation, "score", spy)
    words = ["--data", str(data), "--floor", "--images", "16", "--device", "cpu"]
    assert ablation.main([*words, "crops=whole", "box"]) == 0
    assert seen == [(16, 16)] * 2
    whole, box = (line.split("|") for line in capsys.readouterr().out.splitlines()[-2:])
    assert whole[1].strip() == "whole" and box[1].strip() == "box"
    assert float(whole[-2]) > 0.001  # none of the drawn photos is in the reference


def test_a_mixture_is_half_of_each_seed(call, monkeypatch, capsys):
    words = ["--averages", "none", "--seeds", "0,1"]
    call(*words)
    compared, score = [], ablation.score
    spy = lambda x, *rest: compared.append(x) or score(x, *rest)
    monkeypatch.setattr(ablation, "score", spy)
    no_training(monkeypatch)
    call(*words, "--mixture")
    first, second, mixed = compared
    assert np.array_equal(mixed, np.concatenate([first[:20], second[:20]])) and len(first) == 40
    rows = capsys.readouterr().out.splitlines()[-3:]
    assert [row.split("|")[3].strip() for row in rows] == ["seed 0", "seed 1", "half of each"]


# ------------------------------------------------------------------------------------ the notebook


def test_the_notebook_has_the_tables_of_its_lines_and_valid_commands(capsys):
    notebook = (ROOT / "data" / "EXPERIMENTS.md").read_text("utf-8")
    assert ablation.main(["--table", str(ROOT / "data" / "experiments.jsonl")]) == 0
    rows = [row for row in capsys.readouterr().out.splitlines() if row]
    assert len(rows) > 10 and [row for row in rows if row not in notebook] == []
    commands = re.findall(r"^python tests/tools/ablation.py (.*)$", notebook, re.MULTILINE)
    assert len(commands) >= 4
    for command in commands:
        args = ablation.parse(command.split())
        for change in args.changes:
            ablation.Run(args, change, 0)
    assert "(gone)" in notebook  # options of which only the numbers are left


def test_the_notebook_names_only_files_that_exist():
    for path in (ROOT / "data" / "EXPERIMENTS.md", ROOT / "tests" / "README.md"):
        text = path.read_text("utf-8")
        folder = path.parent if path.parent.name == "tests" else ROOT
        names = set(re.findall(r"[\w/]*\b(?:tools|bench)/\w+\.py", text))
        assert names and all((folder / n).exists() or (ROOT / n).exists() for n in names), names
        for picture in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text):
            assert (path.parent / picture).is_file()
