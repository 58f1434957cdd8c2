"""The submitted generator: SWA, EMA, re-estimated norms, and images that depend on z alone."""

# ruff: noqa: F811 (fixtures that are imported from runs)

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import (
    STEPS,
    finished_run,  # noqa: F401
    light,  # noqa: F401
    light_runs,
    load,
    pixels,
    pngs,
    run_here,
    sha,
)
from torch import Tensor, nn

import train_dogs
from train_dogs import Generator, Trainer, draw_latents, estimate_norms, sample_images

Snapshot = tuple[float, int, list[Tensor]]  # progress, steps done, G's parameters


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict, list[Snapshot]]:
    """Checkpoint, `generator.pt` and G's weights at each update of the averages of a run."""
    snapshots: list[Snapshot] = []
    average = Trainer.average

    def spy(trainer: Trainer, progress: float) -> None:
        weights = [p.detach().double().clone() for p in trainer.G.parameters()]
        snapshots.append((progress, trainer.steps_done, weights))
        average(trainer, progress)

    out = tmp_path_factory.mktemp("recorded")
    with light_runs(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "average", spy)
        assert run_here(out, steps=50, average_every=2, swa_start=0.4, images=3, ema_beta=0.8) == 0
    return load(out / "checkpoint.pt"), load(out / "generator.pt"), snapshots


def averages(checkpoint: dict, name: str) -> list[Tensor]:
    """The `swa` or `ema` weights of a checkpoint, in the order of G's parameters."""
    tensors = checkpoint["trainer"]["tensors"]
    count = sum(key.startswith(f"{name}.") for key in tensors)
    return [tensors[f"{name}.{i}"] for i in range(count)]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Equal to the rounding of float32 means."""
    assert len(ours) == len(theirs) > 10
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-6)


def test_swa_is_the_plain_mean_of_snapshots_from_swa_start_on(recorded):
    checkpoint, _, snapshots = recorded
    assert [step for _, step, _ in snapshots] == list(range(2, 51, 2))  # every average_every steps
    for progress, step, _ in snapshots:
        assert step - 1 <= progress * 50 + 1e-9 <= step
    late = [weights for progress, _, weights in snapshots if progress >= 0.4]
    assert len(late) == checkpoint["trainer"]["swa_updates"] and 14 <= len(late) <= 16
    means = [sum(group) / len(late) for group in zip(*late)]
    assert_same(averages(checkpoint, "swa"), means)


def test_ema_is_the_plain_recurrence_with_its_warm_start(recorded):
    checkpoint, _, snapshots = recorded
    ema = [torch.zeros_like(w) for w in snapshots[0][2]]
    total = 0.0  # the weights of the snapshots sum to 1 but for what is left of the start
    for n, (_, _, weights) in enumerate(snapshots, start=1):
        beta = min(0.8**2, (1 + n) / (10 + n))  # the first by average_every = 2
        ema = [beta * e + (1 - beta) * w for e, w in zip(ema, weights)]
        total = beta * total + (1 - beta)
    assert total > 0.999  # no trace of the initial weights
    start = snapshots[0][2]  # whatever they were, they count for less than the rounding
    ours = averages(checkpoint, "ema")
    for a, b, w in zip(ours, ema, start):
        bound = (1 - total) * float(w.abs().max() + 1) + 1e-5
        assert float((a.double() - b).abs().max()) <= bound


def test_the_submitted_weights_are_the_average_and_not_the_last_generator(recorded):
    checkpoint, generator, _ = recorded
    names = [name for name, _ in Generator(16, 1).named_parameters()]
    submitted = [generator["state_dict"][name] for name in names]
    assert generator["weights"] == "swa"
    assert_same(submitted, averages(checkpoint, "swa"))
    last = [checkpoint["trainer"]["tensors"][f"G.{name}"] for name in names]
    assert max(float((a - b).abs().max()) for a, b in zip(submitted, last)) > 1e-3


@pytest.mark.parametrize("average", ["ema", "none"])
def test_average_chooses_which_weights_are_submitted(average, finished_run, tmp_path):
    out = Path(shutil.copytree(finished_run, tmp_path / "out"))
    assert run_here(out, steps=STEPS, average=average) == 0  # finished: only submitted anew
    tensors = load(out / "checkpoint.pt")["trainer"]["tensors"]
    generator = load(out / "generator.pt")
    names = [name for name, _ in Generator(16, 1).named_parameters()]
    key = {"ema": "ema.{i}", "none": "G.{name}"}[average]
    expected = [tensors[key.format(i=i, name=name)] for i, name in enumerate(names)]
    assert generator["weights"] == average
    assert_same([generator["state_dict"][name] for name in names], expected)
    assert sha(out / "images.zip") != sha(finished_run / "images.zip")


@pytest.mark.parametrize(
    ("average", "swa_updates", "ema_updates", "submitted"),
    [
        ("swa", 10, 99, "swa"), ("swa", 9, 99, "ema"), ("swa", 0, 1, "ema"), ("swa", 0, 0, "none"),
        ("ema", 99, 99, "ema"), ("ema", 0, 0, "none"), ("none", 99, 99, "none"),
    ],
)  # fmt: skip
def test_which_weights_are_submitted_is_a_rule(average, swa_count, averages_done, submitted):
    assert train_dogs.weights_to_submit(average, swa_count, averages_done) == submitted


# --------------------------------------------------------------------------- batch-norm statistics


def norms(G: nn.Module) -> list[nn.BatchNorm2d]:
    """The batch norms of G, in order."""
    return [m for m in G.modules() if isinstance(m, nn.BatchNorm2d)]


def test_re_estimated_statistics_are_the_means_over_all_batches():
    torch.manual_seed(0)
    G, seen = Generator(6, 2), {}
    for index, norm in enumerate(norms(G)):
        norm.running_mean.fill_(9)  # what was there before must not matter
        norm.register_forward_pre_hook(
            lambda _, inputs, i=index: seen.setdefault(i, []).append(inputs[0].double())
        )
    assert estimate_norms(G, 4, seed=3) is G
    assert not G.training
    for index, norm in enumerate(norms(G)):
        batches = seen[index]
        assert len(batches) == 4 and not torch.equal(batches[0], batches[1])
        means = sum(x.mean((0, 2, 3)) for x in batches) / 4
        variances = sum(x.var((0, 2, 3), unbiased=True) for x in batches) / 4
        torch.testing.assert_close(norm.running_mean.double(), means, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var.double(), variances, rtol=1e-4, atol=1e-6)


def statistics(G: Generator, latents: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Mean and variance of what reaches each norm, when all latents go through G as one batch."""
    found, hooks = [], []
    for norm in norms(G):
        hook = norm.register_forward_pre_hook(
            lambda _, x: found.append((x[0].mean((0, 2, 3)), x[0].var((0, 2, 3))))
        )
        hooks.append(hook)
    with torch.no_grad():
        G.train()(latents)
    for hook in hooks:
        hook.remove()
    return found


@pytest.fixture(scope="module")
def submitted(finished_run) -> Generator:
    """The generator that a whole run left, as anyone would load it."""
    state = load(finished_run / "generator.pt")
    G = Generator(**state["shape"])
    G.load_state_dict(state["state_dict"])
    return G.eval()


def clone(G: Generator) -> Generator:
    """A copy of G."""
    copy = Generator(16, 1)
    copy.load_state_dict(G.state_dict())
    return copy


def test_generator_pt_holds_the_statistics_of_its_own_averaged_weights(submitted):
    torch.manual_seed(5)
    own = statistics(clone(submitted), torch.randn(1024, 16))
    for norm, (mean, variance) in zip(norms(submitted), own):
        spread = variance.sqrt()
        assert ((norm.running_mean - mean).abs() <= 0.15 * spread + 1e-4).all()
        assert ((norm.running_var / variance).log().abs() <= 0.2).all()


def test_without_re_estimation_the_images_would_be_others(submitted, finished_run):
    """The trap: averaged weights with the statistics of the last G, or with none, draw badly."""
    torch.manual_seed(6)
    z = torch.randn(512, 16)
    with torch.no_grad():
        by_batch = clone(submitted).train()(z)  # every norm by this very batch: what was trained
        kept = clone(submitted).eval()
        trained = load(finished_run / "checkpoint.pt")["trainer"]["tensors"]
        stale, fresh = clone(submitted).eval(), clone(submitted).eval()
        names = [name for name, m in stale.named_modules() if isinstance(m, nn.BatchNorm2d)]
        for name, norm in zip(names, norms(stale)):
            norm.running_mean.copy_(trained[f"G.{name}.running_mean"])
            norm.running_var.copy_(trained[f"G.{name}.running_var"])
        for norm in norms(fresh):
            norm.reset_running_stats()
        error = {
            name: float((G(z) - by_batch).square().mean().sqrt())
            for name, G in (("kept", kept), ("stale", stale), ("fresh", fresh))
        }
    assert error["kept"] < 0.02
    assert error["stale"] > 3 * error["kept"] and error["fresh"] > 3 * error["kept"]


# ----------------------------------------------------------------------------------------- sampling


@given(count=st.integers(1, 300), other=st.integers(1, 300))
def test_latent_k_is_the_same_however_many_are_drawn(count, other):
    a, b = draw_latents(count, 5, 8), draw_latents(other, 5, 8)
    n = min(count, other)
    assert len(a) == count and torch.equal(a[:n], b[:n])


def test_latents_are_standard_normal_and_differ_by_seed():
    z = draw_latents(2000, 8, 1)
    assert z.shape == (2000, 8) and z.dtype == torch.float32
    assert abs(float(z.mean())) < 0.03 and abs(float(z.std()) - 1) < 0.03
    assert len(torch.unique(z, dim=0)) == 2000
    assert not torch.equal(z, draw_latents(2000, 8, 2))


def test_image_k_drawn_alone_is_the_same_bytes_as_in_the_full_run(submitted):
    latents = draw_latents(300, 16, 4)
    full = np.concatenate(list(sample_images(submitted, latents)))
    assert full.shape == (300, 64, 64, 3) and full.dtype == np.uint8
    for k in (0, 1, 127, 128, 255, 256, 299):
        (alone,) = sample_images(submitted, latents[k : k + 1])
        assert np.array_equal(alone[0], full[k]), k
    backwards = np.concatenate(list(sample_images(submitted, latents.flip(0))))
    assert np.array_equal(backwards[::-1], full)


def test_sampling_is_in_eval_mode_float32_and_in_batches_of_one_size(submitted):
    calls = []
    hook = submitted.register_forward_hook(
        lambda G, inputs, out: calls.append((len(inputs[0]), G.training, out.dtype, out.grad_fn))
    )
    try:
        for count in (1, 128, 200):
            assert sum(map(len, sample_images(submitted, draw_latents(count, 16, 0)))) == count
    finally:
        hook.remove()
    assert len(set(calls)) == 1 and len(calls) == 4
    assert calls[0][1:] == (False, torch.float32, None)


def test_the_zip_of_3_images_holds_the_first_3_of_the_zip_of_200(finished_run, tmp_path):
    for count in (3, 200):
        out = tmp_path / str(count)
        out.mkdir()
        shutil.copy(finished_run / "generator.pt", out)
        assert run_here(out, "--sample-only", images=count, data=None) == 0
    few, many = (pngs(tmp_path / n / "images.zip") for n in ("3", "200"))
    assert list(few.items()) == list(many.items())[:3] and len(many) == 200
    assert list(pngs(finished_run / "images.zip").items()) == list(many.items())[:40]
    assert len(np.unique(pixels(tmp_path / "200" / "images.zip"), axis=0)) == 200
