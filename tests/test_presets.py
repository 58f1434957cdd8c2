"""The presets, and what they and the rarer fields set.

Uniform latents, hinge, RaLS, stepped EMA, noise, R1, truncation.

Oracles: the papers' own numbers, closed forms, scipy's distributions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import SAMPLE, load, pixels, run_here, sha
from scipy import stats
from torch import nn

import train_dogs
from train_dogs import (
    LOSSES,
    PRESETS,
    Averages,
    Config,
    CropSet,
    Seen,
    Trainer,
    Verdict,
    build_networks,
    draw_latents,
    find_photos,
    gradient_penalty,
    parse,
    prepare_crops,
    stepped_beta,
)

pytestmark = pytest.mark.usefixtures("light")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dogs(own_cache: Path) -> CropSet:
    """The drawn sample, cropped."""
    return prepare_crops(find_photos([SAMPLE]), "square", show=False)


@pytest.fixture
def double() -> Iterator[None]:
    """Everything in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def small(**changes: object) -> Config:
    """A configuration that trains in milliseconds."""
    return Config(**({"width": 1, "latent_dim": 4, "batch_size": 6, "precision": "fp32"} | changes))


# ----------------------------------------------------------------------------------- the table


def test_the_first_preset_is_the_default():
    default = parse([]).config
    assert next(iter(PRESETS)) == "dogs"
    assert default == parse(["--preset", "dogs"]).config == Config(out=default.out)


def test_first_public_draws_its_notebooks_four_crops_alike():
    # Two of the four are squares of the box's short side, the third is widened, the last centred.
    shares = {"head": 0.5, "square": 0.25, "context": 0.25}
    assert train_dogs.parse_crops(PRESETS["first-public"]["crops"]) == shares


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_trains_and_writes_its_zip_and_configuration(name, tmp_path, monkeypatch):
    monkeypatch.setattr(train_dogs, "NORM_BATCHES", 1)
    out, changes = tmp_path / "out", {"preset": name, "latent_dim": 5, "batch_size": 4}
    assert run_here(out, steps=2, images=3, **changes) == 0
    assert pixels(out / "images.zip").shape == (3, 64, 64, 3)
    written = json.loads((out / "config.json").read_text())
    given_here = {"latent_dim", "width", "batch_size", "average_every", "steps", "images"}
    for field in PRESETS[name].keys() - given_here:
        assert written[field] == PRESETS[name][field]


def test_the_weight_of_a_presets_condition_is_not_that_of_another():
    for condition, weight in (("none", 0), ("breed", 0), ("classes", 1)):
        config = train_dogs.recipe("improved", {"condition": condition})
        assert (config.condition, config.classify) == (condition, weight)
    given = ["--preset", "improved", "--condition", "breed", "--g-norm", "batch"]
    assert parse([*given, "--classify", "0.3"]).config.classify == 0.3
    assert parse(given).config.classify == 0.0


# ----------------------------------------------------------------------------------- the DCGAN


def test_dcgan_has_the_layers_of_its_paper_at_twice_the_width():
    """Figure 1: 4 x 4 places of 1024 channels, then kernels of 5 with strides of 2."""
    G, D = build_networks(parse(["--preset", "dcgan"]).config, CPU)
    deconvs = [m for m in G.modules() if isinstance(m, nn.ConvTranspose2d)]
    convs = [m for m in D.modules() if isinstance(m, nn.Conv2d)]
    assert [m.in_channels for m in deconvs] == [100, 1024, 512, 256, 128]
    assert [m.out_channels for m in deconvs] == [1024, 512, 256, 128, 3]
    assert [m.in_channels for m in convs] == [3, 128, 256, 512, 1024]
    assert [m.kernel_size[0] for m in deconvs] == [4, 5, 5, 5, 5]  # the first: a projection of z
    assert [m.kernel_size[0] for m in convs] == [5, 5, 5, 5, 4]  # the last: a linear layer
    assert [m.stride[0] for m in (*deconvs[1:], *convs[:-1])] == [2] * 8
    norms = [m.num_features for m in G.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms == [1024, 512, 256, 128]
    norms = [len(m.weight) for m in D.modules() if isinstance(m, train_dogs.SplitBatchNorm2d)]
    assert norms == [256, 512, 1024]  # none at D's input


def test_dcgan_learns_as_its_paper_says_and_second_private_as_its_slides():
    """Section 4 of the paper: the plain logistic loss, and nothing of ours."""
    assert PRESETS["dcgan"].items() >= {
        "g_lr": 2e-4, "d_lr": 2e-4, "beta1": 0.5, "init_std": 0.02, "batch_size": 128,
        "margin": 1.0, "latents": "uniform", "latent_dim": 100, "mirror": 0.0, "average": "none",
    }.items()  # fmt: skip
    config = parse(["--preset", "dcgan"]).config
    assert (config.loss, config.smoothing, config.augment) == ("margin", 0.0, "")
    assert (config.crops, config.lr_decay_start) == ("square", 1.0)
    assert PRESETS["second-private"].items() >= {
        "g_lr": 2e-4, "d_lr": 8e-4, "beta1": 0.0, "batch_size": 64, "steps": 50_000,
        "noise": 1 / 128, "loss": "rals", "classify": 0.1, "condition": "breed", "average": "ema",
        "ema_beta": 0.999, "average_every": 1, "truncation": 2.0, "latent_dim": 100,
    }.items()  # fmt: skip


# --------------------------------------------------------------------------------- uniform latents


def test_uniform_latents_fill_the_cube_in_training(dogs):
    """Those of images are drawn in tests/test_averaging.py."""
    reals, _, z = Trainer(small(latents="uniform", latent_dim=200), dogs, CPU).batches.draw()
    normal = Trainer(small(latent_dim=200), dogs, CPU).batches.draw()
    assert torch.equal(normal[0], reals)  # the same dogs
    assert z.dtype == torch.float32 and z.shape == (6, 200)
    assert stats.kstest(z.numpy().ravel(), stats.uniform(-1, 2).cdf).pvalue > 1e-3


# ---------------------------------------------------------------------------------- hinge and RaLS


def values_and_slopes(
    loss: str, reals: list[float], fakes: list[float]
) -> tuple[tuple[float, float], tuple[np.ndarray, ...]]:
    """D's and G's loss, and D's gradient by reals, D's by fakes, G's by fakes."""
    real, fake = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (reals, fakes))
    none, row = torch.empty(0), LOSSES[loss]
    verdicts = (Verdict(logits, none, none) for logits in (real, fake))
    seen = Seen(none, none, none, *verdicts, none, Config(), 1.0)
    d, g = row.d(seen), row.g(seen)
    slopes = *torch.autograd.grad(d, [real, fake]), *torch.autograd.grad(g, [fake])
    return (float(d.detach()), float(g.detach())), tuple(s.numpy() for s in slopes)


LOGITS = st.lists(st.integers(-40, 40).map(lambda n: n / 8 + 1 / 16), min_size=1, max_size=6)


@given(reals=LOGITS, fakes=LOGITS)
def test_hinge_and_its_gradient_are_the_closed_form(reals, fakes):
    """No logit is at a kink."""
    (d, g), (of_reals, of_fakes, of_g) = values_and_slopes("hinge", reals, fakes)
    expected = sum(max(0, 1 - r) for r in reals) / len(reals)
    expected += sum(max(0, 1 + f) for f in fakes) / len(fakes)
    assert d == pytest.approx(expected) and g == pytest.approx(-sum(fakes) / len(fakes))
    np.testing.assert_allclose(of_reals, [-(r < 1) / len(reals) for r in reals])
    np.testing.assert_allclose(of_fakes, [(f > -1) / len(fakes) for f in fakes])
    np.testing.assert_allclose(of_g, [-1 / len(fakes)] * len(fakes))


@given(reals=LOGITS, fakes=LOGITS)
def test_rals_and_its_gradient_are_the_papers_sums_and_g_swaps_the_sides(reals, fakes):
    mean_real, mean_fake = sum(reals) / len(reals), sum(fakes) / len(fakes)

    def by_loop(above: list[float], mean_above: float, below: list[float], mean_below: float):
        first = sum((a - mean_below - 1) ** 2 for a in above) / len(above)
        return (first + sum((b - mean_above + 1) ** 2 for b in below) / len(below)) / 2

    values, (of_reals, of_fakes, of_g) = values_and_slopes("rals", reals, fakes)
    d = by_loop(reals, mean_real, fakes, mean_fake)
    g = by_loop(fakes, mean_fake, reals, mean_real)
    assert values == pytest.approx((d, g), abs=1e-9)
    gap = mean_real - mean_fake
    # The second summand of each comes from the other side's squares, through the mean.
    slopes = [(r - mean_fake - 1) + (gap - 1) for r in reals]
    np.testing.assert_allclose(of_reals, np.array(slopes) / len(reals), atol=1e-9)
    slopes = [(f - mean_real + 1) - (gap - 1) for f in fakes]
    np.testing.assert_allclose(of_fakes, np.array(slopes) / len(fakes), atol=1e-9)
    slopes = [(f - mean_real - 1) - (gap + 1) for f in fakes]
    np.testing.assert_allclose(of_g, np.array(slopes) / len(fakes), atol=1e-9)


@given(reals=LOGITS, fakes=LOGITS, s=st.floats(0, 0.5))
def test_smoothing_of_rals_is_the_mean_over_labels_that_are_right_or_wrong(reals, fakes, s):
    """A real's label is -1 with probability s: only a constant, 2 s (1 - s), is left out."""
    real, fake = (torch.tensor(logits, dtype=torch.float64) for logits in (reals, fakes))
    none, gap = torch.empty(0), real - fake.mean()
    verdicts = (Verdict(logits, none, none) for logits in (real, fake))
    loss = LOSSES["rals"].d(Seen(none, none, none, *verdicts, none, Config(smoothing=s), 1.0))
    over_labels = (1 - s) * (gap - 1).square().mean() + s * (gap + 1).square().mean()
    expected = (over_labels + (fake - real.mean() + 1).square().mean()) / 2 - 2 * s * (1 - s)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)


def test_rals_is_0_only_where_each_side_is_1_from_the_others_mean():
    (d, _), slopes = values_and_slopes("rals", [2.5] * 3, [1.5] * 2)
    assert d == 0 and not slopes[0].any() and not slopes[1].any()
    (_, g), slopes = values_and_slopes("rals", [1.5] * 3, [2.5] * 2)
    assert g == 0 and not slopes[2].any()
    for reals in ([3.5] * 3, [1.5, 3.5]):  # another gap; the same in the mean alone
        assert values_and_slopes("rals", reals, [1.5] * 2)[0][0] > 0


def test_each_loss_counts_the_reals_that_d_is_certain_of():
    none, logits = torch.empty(0), torch.tensor([-1.0, 0.5, 1.2, 1.6])
    verdicts = (Verdict(x, none, none) for x in (logits, torch.full((3,), 0.4)))
    seen = Seen(none, none, none, *verdicts, none, Config(), 1.0)
    expected = {name: [x > math.log(4) for x in logits] for name in LOSSES}  # 0.8 of a sigmoid
    expected |= {"hinge": [x > 1 for x in logits], "rals": [x - 0.4 > 1 for x in logits]}
    for name, row in LOSSES.items():
        assert row.certain(seen).tolist() == [bool(x) for x in expected[name]], name


# --------------------------------------------------------------------------------- the stepped EMA


def test_the_stepped_decay_rises_at_epochs_200_300_and_400_of_620():
    for epoch, before, after in ((200, 0.9, 0.99), (300, 0.99, 0.999), (400, 0.999, 0.9999)):
        betas = [stepped_beta((epoch + k) / 620) for k in (-0.01, 0, 0.01)]
        assert betas == pytest.approx([before, after, after], abs=1e-12)
    assert stepped_beta(0.0) == pytest.approx(0.9) and stepped_beta(1.0) == pytest.approx(0.9999)


@pytest.mark.parametrize("every", [1, 3])
def test_a_stepped_ema_has_the_decay_of_its_progress_and_a_constant_one_its_own(every):
    G, _ = build_networks(small(), CPU)
    for schedule, betas in (("stepped", (0.9, 0.99, 0.999, 0.9999)), ("constant", (0.9995,) * 4)):
        config = small(ema_schedule=schedule, ema_beta=0.9995, average_every=every)
        averages = Averages(G)
        averages.ema_updates = 10**6  # long past the warm-up
        for progress, beta in zip((0.1, 0.4, 0.6, 0.9), betas):
            for average, weight in zip(averages.ema, G.parameters()):
                average.zero_()
                weight.data.fill_(1.0)
            averages.update(G, progress, config)
            for average in averages.ema:
                expected = torch.full_like(average, 1 - beta**every)
                torch.testing.assert_close(average, expected, rtol=1e-3, atol=1e-7)


# ------------------------------------------------------------------------------------------- noise


def test_noise_is_uniform_from_0_of_each_pixel_its_own_in_every_step_and_on_reals_alone(dogs):
    flat = replace(dogs, pixels=torch.full_like(dogs.pixels, 128))
    trainer, shown, drawn = Trainer(small(noise=0.5), flat, CPU), [], []
    trainer.G.register_forward_hook(lambda _, inputs, images: drawn.append(images.detach()))
    trainer.D.register_forward_pre_hook(lambda _, inputs: shown.append(inputs[0].detach()))
    for _ in range(2):
        trainer.step(0.0)
    noise = torch.cat([shown[0][:6], shown[2][:6]]) - (128 / 127.5 - 1)
    values = noise.numpy().ravel() / 0.5
    assert -1e-6 <= values.min() and values.max() <= 1 + 1e-6
    assert stats.kstest(values[::7], "uniform").pvalue > 1e-3
    assert len(torch.unique(noise.flatten(1), dim=0)) == 12
    assert torch.equal(shown[0][6:], drawn[0]) and torch.equal(shown[1], drawn[0])


# --------------------------------------------------------------------------------------------- R1


def test_r1_is_half_the_squared_slope_of_reals_alone_in_the_mean_over_them():
    x, none = torch.randn(7, 3, 4, 4).requires_grad_(), torch.empty(0)
    logits = x.square().sum((1, 2, 3))[:3] + x[3:].sum()  # of the 3 reals; slope 2x
    verdict = Verdict(logits, none, none)
    penalty = gradient_penalty(Seen(x, none, none, verdict, verdict, none, Config(), 1.0))
    expected = float((2 * x.detach()[:3]).square().sum((1, 2, 3)).mean()) / 2
    assert float(penalty.detach()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.usefixtures("double")
def test_r1_in_ds_update_is_that_of_reals_alone_and_its_gradient_reaches_the_weights(dogs):
    with_r1, without = (Trainer(small(r1=r), dogs, CPU) for r in (3.0, 0.0))
    reals, fakes = torch.rand(2, 5, 3, 64, 64) * 2 - 1
    labels, gradients, losses = torch.zeros(5, dtype=torch.int64), [], []
    for trainer in (with_r1, without):
        loss, _ = trainer.d_objective(trainer.judge(reals, fakes, labels, trainer.opt_d))
        losses.append(loss.detach())
        gradients.append(torch.autograd.grad(loss, list(trainer.D.parameters())))
    x = reals.clone().requires_grad_()
    (slope,) = torch.autograd.grad(with_r1.D(x, 5).logits.sum(), x, create_graph=True)
    penalty = 3.0 * sum(s.square().sum() / 2 for s in slope) / 5
    assert float(losses[0] - losses[1]) == pytest.approx(float(penalty.detach()), rel=1e-5)
    weights = list(with_r1.D.parameters())
    expected = torch.autograd.grad(penalty, weights, allow_unused=True, materialize_grads=True)
    for a, b, c in zip(*gradients, expected):
        torch.testing.assert_close(a - b, c, rtol=1e-4, atol=1e-5 * float(c.abs().max()) + 1e-6)
    assert max(float(c.abs().max()) for c in expected) > 0


# -------------------------------------------------------------------------------------- truncation


@given(truncation=st.floats(0.05, 6), seed=st.integers(0, 10**6), count=st.integers(1, 200))
def test_truncated_latents_are_scipys_truncated_normal_of_the_same_quantiles(
    truncation, seed, count
):
    plain_config = Config(latent_dim=3, seed=seed)
    config = replace(plain_config, truncation=truncation)
    plain, z = (draw_latents(count, c, "submission") for c in (plain_config, config))
    assert z.dtype == torch.float32 and float(z.abs().max()) <= truncation * (1 + 1e-6)
    quantiles = stats.norm.cdf(plain.double().numpy())
    expected = stats.truncnorm.ppf(quantiles, -truncation, truncation)
    np.testing.assert_allclose(z.numpy(), expected, rtol=1e-5, atol=1e-6)
    order = plain.flatten().argsort()
    assert (z.flatten()[order].diff() >= 0).all()  # the larger stays the larger
    assert torch.equal(draw_latents(300, config, "submission")[:count], z)


def test_truncation_changes_what_is_drawn_and_not_what_is_learnt(tmp_path, monkeypatch):
    monkeypatch.setattr(train_dogs, "NORM_BATCHES", 1)
    plain, truncated = tmp_path / "plain", tmp_path / "truncated"
    for out, truncation in ((plain, 0.0), (truncated, 0.7)):
        assert run_here(out, steps=4, images=5, truncation=truncation) == 0
    ours, theirs = (load(f / "checkpoint.pt")["trainer"]["tensors"] for f in (truncated, plain))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    first, second = (sha(out / "images.zip") for out in (plain, truncated))
    assert first != second
    for truncation, expected in (("0.7", second), ("0", first)):
        words = ["--sample-only", "--out", str(plain), "--truncation", truncation]
        assert train_dogs.main(words) == 0
        assert sha(plain / "images.zip") == expected


def test_norms_are_those_of_the_latents_that_will_be_drawn(dogs, monkeypatch):
    trainer, given_to_g = Trainer(small(truncation=0.5), dogs, CPU), []
    forward = train_dogs.Generator.forward
    monkeypatch.setattr(
        train_dogs.Generator, "forward", lambda G, z, *b: given_to_g.append(z) or forward(G, z, *b)
    )
    trainer.averages.generator(trainer.G, "none", 2, trainer.config)
    assert len(given_to_g) == 2 and max(float(z.abs().max()) for z in given_to_g) <= 0.5
