"""A step, the schedule, determinism, sickness and collapse."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from runs import (
    SAMPLE,
    STEPS,
    all_finite,
    load,
    log_of,
    pixels,
    resumed_steps,
    run_here,
    sha,
)
from test_networks import PlainDiscriminator, in_order

import train_dogs
from train_dogs import Clock, Config, CropSet, Seen, Trainer, find_photos, prepare_crops

pytestmark = pytest.mark.usefixtures("light")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dogs(own_cache: Path) -> CropSet:
    """The drawn sample, cropped."""
    return prepare_crops(find_photos([SAMPLE]), "square", show=False)


def small(**changes: object) -> Config:
    """A configuration that trains in milliseconds."""
    return Config(**({"width": 2, "latent_dim": 12, "batch_size": 6} | changes))


# -------------------------------------------------------------------------------------- one step


def plain_adam(
    weight: torch.Tensor, gradient: torch.Tensor, state: dict, lr: float, beta1: float, beta2: float
) -> torch.Tensor:
    """Adam as its paper writes it, in float64; `state` carries the moments and the step count."""
    g = gradient.double()
    state["t"] = state.get("t", 0) + 1
    state["m"] = beta1 * state.get("m", 0) + (1 - beta1) * g
    state["v"] = beta2 * state.get("v", 0) + (1 - beta2) * g * g
    m, v = state["m"] / (1 - beta1 ** state["t"]), state["v"] / (1 - beta2 ** state["t"])
    return weight.double() - lr * m / (v.sqrt() + 1e-8)


@pytest.fixture
def double() -> Iterator[None]:
    """Everything in float64: no ReLU can flip between two ways to compute the same."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    "changes",
    [
        {"margin": 0.55},
        {"margin": 1.0, "smoothing": 0.1},
        {"d_width": 3, "init_std": 0.02},
    ],
)
def test_a_step_is_a_plain_dcgan_step_with_plain_adam(dogs, changes):
    """Four steps against: ordinary batch norms in forwards apart, BCE by hand, Adam by hand."""
    config = small(g_lr=3e-3, d_lr=1e-3, beta1=0.4, beta2=0.99, **changes)
    trainer = Trainer(config, dogs, CPU)
    g_states = [{} for _ in trainer.G.parameters()]
    d_states = [{} for _ in trainer.D.parameters()]

    def check(
        gradients: Sequence[torch.Tensor], before: list, after: list, states: list, lr: float
    ):
        for g, w0, w1, state in zip(gradients, before, after, states, strict=True):
            torch.testing.assert_close(w1.grad, g, rtol=1e-6, atol=1e-6 * float(g.abs().max()))
            expected = plain_adam(w0, w1.grad, state, lr, 0.4, 0.99)
            torch.testing.assert_close(w1.detach(), expected, rtol=1e-9, atol=1e-9)

    for step in range(4):
        # What the step will draw, by a copy of its generator.
        chance = torch.Generator()
        chance.set_state(trainer.rng.get_state())
        if step == 0:
            order = torch.randperm(len(dogs.first), generator=chance)
        reals = train_dogs.draw_reals(dogs, order[6 * step : 6 * step + 6], chance).double()
        z = torch.randn(6, 12, generator=chance)

        G = train_dogs.Generator(12, 2)
        G.load_state_dict(trainer.G.state_dict())
        D = PlainDiscriminator(trainer.D, config.d_width or 2)
        before_d = [w.detach().clone() for w in in_order(trainer.D)]
        before_g = [w.detach().clone() for w in trainer.G.parameters()]
        trainer.step(0.0)

        # D's step: -log D(x) down to the margin, -log(1 - D(G(z))).
        fakes = G(z)
        real, fake = D(reals), D(fakes.detach())
        p, s = torch.sigmoid(real), config.smoothing
        real_loss = (-p.log()).clamp_min(-math.log(config.margin)) + math.log(config.margin)
        d_loss = ((1 - s) * real_loss - s * (1 - p).log()).mean()
        d_loss = d_loss - (1 - torch.sigmoid(fake)).log().mean()
        gradients = torch.autograd.grad(d_loss, in_order(D))
        check(gradients, before_d, in_order(trainer.D), d_states, 1e-3)
        # G's step: -log D(G(z)) of the same fakes, by the D that has just been improved.
        D = PlainDiscriminator(trainer.D, config.d_width or 2)
        g_loss = -F.logsigmoid(D(fakes)).mean()
        gradients = torch.autograd.grad(g_loss, list(G.parameters()))
        check(gradients, before_g, list(trainer.G.parameters()), g_states, 3e-3)

        past = (p > (config.margin if config.margin < 1 else 0.8)).double().mean()
        expected = {"d_loss": d_loss, "g_loss": g_loss}
        expected |= {"d_real": real.mean(), "d_fake": fake.mean(), "past_margin": past}
        assert trainer.stats == tuple(expected)
        assert list(trainer.read_stats().values()) == pytest.approx(
            [float(value.detach()) for value in expected.values()], rel=1e-6, abs=1e-9
        )
    assert trainer.steps_done == 4


@pytest.mark.parametrize("loss", train_dogs.LOSSES)
def test_g_is_shown_reals_only_for_a_loss_that_reads_them(loss, dogs):
    trainer, counts = Trainer(small(loss=loss), dogs, CPU), []
    trainer.D.register_forward_pre_hook(lambda _, inputs: counts.append(inputs[1]))
    trainer.step(0.0)
    assert counts == [6, 6 if loss in ("matching", "rals") else 0]


def test_the_statistics_are_means_over_the_steps_since_they_were_read(dogs):
    trainer, single = Trainer(small(), dogs, CPU), Trainer(small(), dogs, CPU)
    each = []
    for _ in range(3):
        single.step(0.0)
        each.append(dict(single.read_stats()))
        trainer.step(0.0)
    means = trainer.read_stats()
    for name, value in means.items():
        assert value == pytest.approx(np.mean([e[name] for e in each]), abs=1e-5)


def test_every_dog_is_drawn_once_before_any_is_drawn_twice(dogs, monkeypatch):
    drawn: list[int] = []
    draw = train_dogs.draw_reals

    def spy(crops: CropSet, rows: torch.Tensor, *others: object) -> torch.Tensor:
        drawn.extend(rows.tolist())
        return draw(crops, rows, *others)

    monkeypatch.setattr(train_dogs, "draw_reals", spy)
    trainer = Trainer(small(batch_size=9), dogs, CPU)  # 135 dogs: 15 batches without a rest
    for _ in range(30):
        trainer.step(0.0)
    assert sorted(drawn[:135]) == sorted(drawn[135:]) == list(range(135))
    assert drawn[:135] != drawn[135:]  # in another order


@pytest.mark.parametrize(
    ("start", "progress", "share"),
    [(1.0, 0.0, 1), (1.0, 1.0, 1), (0.5, 0.4, 1), (0.5, 0.75, 0.5), (0.0, 0.25, 0.75), (0.5, 1, 0)],
)
def test_the_learning_rate_follows_progress(dogs, start, progress, share):
    trainer = Trainer(small(lr_decay_start=start, g_lr=0.002, d_lr=0.001), dogs, CPU)
    trainer.step(progress)
    rates = [float(opt.adam.param_groups[0]["lr"]) for opt in (trainer.opt_g, trainer.opt_d)]
    assert rates == pytest.approx([0.002 * share, 0.001 * share])


# ---------------------------------------------------------------------------------- the schedule


@contextmanager
def at(seconds: float) -> Iterator[None]:
    """The program's clock shows `seconds`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_dogs, "time", SimpleNamespace(monotonic=lambda: seconds))
        yield


@given(st.floats(0, 5000), st.integers(0, 2000))
def test_progress_is_the_larger_of_steps_and_time(used, steps):
    with at(100 + used):
        got = Clock(Config(steps=1000, hours=1.0), 100.0, 0.0).progress(steps)
    assert got == pytest.approx(min(1, max(steps / 1000, used / 3600)))


@given(st.floats(0, 1e7), st.integers(0, 1000))
def test_without_a_budget_progress_is_the_steps_alone_and_time_never_ends_a_run(used, steps):
    endless = Clock(train_dogs.parse(["--steps", "1000"]).config, 100.0, 0.0)
    with at(100 + used):
        assert endless.progress(steps) == steps / 1000
        assert endless.training_left() == math.inf


def test_the_clock_counts_all_parts_and_keeps_the_reserve():
    parts = Clock(Config(hours=1.0, part_hours=0.25), 1000.0, used_before=600)
    whole = Clock(Config(hours=1.0), 1000.0, used_before=600)
    parts.reserve = 50
    with at(1100):
        assert parts.used() == 700
        assert parts.training_left() == 900 - 100 - 50  # this part's end
        assert parts.progress(0) == pytest.approx(700 / 3550)
        assert whole.training_left() == 3600 - 700


def test_the_budget_is_tested_at_every_step(tmp_path, monkeypatch):
    step, left, over = Trainer.step, Clock.training_left, []

    def last(trainer: Trainer, progress: float) -> None:
        step(trainer, progress)
        if trainer.steps_done == 7:
            over.append("the time is up")

    monkeypatch.setattr(Trainer, "step", last)
    monkeypatch.setattr(Clock, "training_left", lambda clock: -1.0 if over else left(clock))
    assert run_here(tmp_path / "out", steps=STEPS, minutes=60, images=3) == 0
    assert load(tmp_path / "out" / "checkpoint.pt")["trainer"]["steps_done"] == 7


# ------------------------------------------------------------------------------------ determinism


def test_the_same_seed_writes_the_same_zip_whatever_is_saved_and_shown(
    finished_run, tmp_path, monkeypatch
):
    monkeypatch.setattr(train_dogs, "SHEETS", ())  # none but the first and the last
    monkeypatch.setattr(train_dogs, "CHECKPOINT_SECONDS", 0.1)
    assert run_here(tmp_path / "a", steps=STEPS) == 0
    assert sha(tmp_path / "a" / "images.zip") == sha(finished_run / "images.zip")
    ours, theirs = (load(f / "generator.pt")["state_dict"] for f in (tmp_path / "a", finished_run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_another_seed_writes_other_images(finished_run, tmp_path):
    assert run_here(tmp_path / "a", steps=20, seed=1, images=5) == 0
    other, ours = pixels(tmp_path / "a" / "images.zip"), pixels(finished_run / "images.zip")
    assert all(not np.array_equal(a, b) for a, b in zip(other, ours))


# --------------------------------------------------------------------------------------- sickness


def sick_from(
    monkeypatch: pytest.MonkeyPatch, network: int, first: int, last: float, value: float = math.nan
) -> None:
    """Let the loss of D (0) or G (1) be `value` in its calls `first` to `last`, from 1.

    Counting the FLOPs is the first of them.
    """
    calls: list[int] = []
    row, name = train_dogs.LOSSES["margin"], "dg"[network]
    loss = getattr(row, name)

    def sick(seen: Seen) -> torch.Tensor:
        calls.append(len(calls) + 1)
        healthy = loss(seen)
        return healthy * value if first <= len(calls) <= last else healthy

    monkeypatch.setitem(train_dogs.LOSSES, "margin", replace(row, **{name: sick}))


@pytest.mark.parametrize(
    ("network", "value", "first", "last", "steps", "rollbacks", "end"),
    [
        (1, math.nan, 15, 15, 30, 1, {30}),
        (1, math.nan, 21, 21, 21, 1, set(range(22))),  # the last, and no step of the averages
        (0, math.inf, 1, math.inf, 30, 4, {0}),  # from the first on
        (1, math.nan, 31, math.inf, 60, 4, set(range(10, 31))),
    ],
)
def test_sick_steps_are_taken_back_and_reported_three_times_at_most(
    network, value, first, last, steps, rollbacks, end, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    sick_from(monkeypatch, network, first, last, value)
    monkeypatch.setattr(train_dogs, "CHECKPOINT_SECONDS", 0.02)
    assert run_here(out, steps=steps, images=4, swa_start=0.1) == 0
    lines = log_of(out)
    backs = [line["rollbacks"] for line in lines if line.get("rollbacks")]
    assert backs == list(range(1, rollbacks + 1))
    printed = capsys.readouterr().out
    assert printed.count("not finite") == rollbacks and ("finishing" in printed) == (rollbacks == 4)
    submitted = next(line for line in reversed(lines) if "submitted" in line)
    assert submitted["step"] in end
    assert (submitted["submitted"] == "none") == (submitted["step"] < 2)
    checkpoints = list(out.glob("checkpoint*.pt"))
    assert checkpoints
    assert all(all_finite(path) for path in (*checkpoints, out / "generator.pt"))
    assert pixels(out / "images.zip").std() > 1


def test_after_a_rollback_the_randomness_is_fresh(dogs, tmp_path, monkeypatch):
    states: list[bytes] = []
    step = Trainer.step

    def spy(trainer: Trainer, progress: float) -> None:
        states.append(bytes(trainer.rng.get_state().tolist()))
        step(trainer, progress)

    monkeypatch.setattr(Trainer, "step", spy)
    sick_from(monkeypatch, 1, 5, 6)
    # A checkpoint after each step, and so a look at its health.
    monkeypatch.setattr(train_dogs, "CHECKPOINT_SECONDS", 0)
    assert run_here(tmp_path / "out", steps=6, images=2) == 0
    assert len(states) > 6  # some were done again
    assert len(set(states)) == len(states)  # but from no state of the generator twice


# --------------------------------------------------------------------------------------- collapse


@pytest.fixture
def deaf_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    """A G that draws one image whatever z is."""
    build = train_dogs.build_networks

    def without_input(*args: object) -> tuple:
        G, D = build(*args)
        with torch.no_grad():
            next(G.parameters()).zero_()
        return G, D

    monkeypatch.setattr(train_dogs, "build_networks", without_input)


@pytest.mark.usefixtures("deaf_generator")
def test_a_collapsed_generator_and_a_d_that_has_won_are_warned_of(dogs, tmp_path, capsys):
    words = ["--steps", "2000", "--out", str(tmp_path), "--loss", "margin", "--margin", "0.5"]
    options = train_dogs.parse([*words, "--width", "1", "--latent-dim", "8", "--batch-size", "8",
                                "--g-lr", "0", "--d-lr", "0.01", "--average", "none"])  # fmt: skip
    trainer, report = Trainer(options.config, dogs, CPU), train_dogs.Report(tmp_path)
    run_clock, stop = Clock(options.config, 0.0, 0.0), train_dogs.Interrupts()
    run = train_dogs.Run(options, trainer, run_clock, report, stop, tmp_path)
    for _ in range(150):
        trainer.step(0.0)
    trainer.read_stats()
    for steps_done in (999, 1000):  # early on a G that draws one image is no news
        trainer.step(0.0)
        trainer.steps_done = steps_done
        train_dogs.check_samples(run)
    printed = capsys.readouterr().out
    warnings = [line["text"] for line in log_of(tmp_path) if line.get("text", "")[:4] == "warn"]
    assert ["collapsed" in text for text in warnings] == [False, True, False]
    assert ["certain" in text for text in warnings] == [True, False, True]
    assert all(text in printed for text in warnings)
    assert [line["variety"] for line in log_of(tmp_path) if "variety" in line] == [0, 0]


def test_variety_is_the_mean_distance_of_all_pairs():
    images = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), np.uint8)
    pairs = [
        math.sqrt(np.mean((images[i].astype(float) - images[j]) ** 2))
        for i in range(5)
        for j in range(i)
    ]
    assert train_dogs.pairwise_distance(images) == pytest.approx(np.mean(pairs), rel=1e-5)
    assert train_dogs.pairwise_distance(np.repeat(images[:1], 4, 0)) == 0


def test_more_steps_continue_a_finished_run(finished_run, tmp_path):
    out = Path(shutil.copytree(finished_run, tmp_path / "out"))
    assert run_here(out, steps=STEPS + 20) == 0
    assert load(out / "checkpoint.pt")["trainer"]["steps_done"] == STEPS + 20
    assert sha(out / "images.zip") != sha(finished_run / "images.zip")
    assert resumed_steps(out) == [STEPS]
