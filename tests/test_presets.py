"""The presets, and what they and the rarer fields set: layers, stepped EMA, noise, R1, truncation.

Oracles: the papers' own numbers, plain networks with ordinary batch norms, scipy's distributions.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import (
    SAMPLE,
    STEPS,
    load,
    pixels,
    run_here,
    sha,
)
from scipy import stats
from test_networks import PlainDiscriminator, in_order
from torch import Tensor, nn

import train_dogs
from train_dogs import (
    PRESETS,
    Averages,
    Config,
    CropSet,
    Seen,
    Trainer,
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


def test_a_preset_holds_what_differs_from_the_default_which_is_the_first():
    for fields in PRESETS.values():
        assert all(getattr(Config(), name) != value for name, value in fields.items())
    assert next(iter(PRESETS)) == "dogs"
    assert (
        parse([]).config == parse(["--preset", "dogs"]).config == Config(out=parse([]).config.out)
    )


@pytest.mark.parametrize("name", PRESETS)
def test_a_recipe_costs_8_and_a_half_p100_hours_but_for_those_with_numbers_of_their_own(name):
    config = parse(["--preset", name]).config
    hours = train_dogs.p100_hours(config, config.steps)
    # The second place's 50,000 steps filled its nine hours, and are 3.32 by counted FLOPs.
    least, most = (0, 0.1) if name in ("small", "sample", "mnist") else (8.4, 8.5)
    if name == "second-private":
        least, most = 3.31, 3.33
    assert least < hours <= most


def test_first_public_draws_its_notebooks_four_crops_alike():
    # Two of the four are squares of the box's short side, the third is widened, the last centred.
    shares = {"head": 0.5, "square": 0.25, "context": 0.25}
    assert train_dogs.parse_crops(PRESETS["first-public"]["crops"]) == shares


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_trains_samples_and_resumes(name, tmp_path, monkeypatch):
    monkeypatch.setattr(train_dogs, "NORM_BATCHES", 1)
    out, changes = tmp_path / "out", {"preset": name, "latent_dim": 5, "batch_size": 4}
    zips = []
    for steps in (2, 4):
        assert run_here(out, steps=steps, images=3, **changes) == 0
        assert load(out / "checkpoint.pt")["trainer"]["steps_done"] == steps
        zips.append(pixels(out / "images.zip"))
    assert zips[0].shape == (3, 64, 64, 3) and not np.array_equal(*zips)
    written = json.loads((out / "config.json").read_text())
    given_here = {"latent_dim", "width", "batch_size", "average_every", "steps", "images"}
    for field in PRESETS[name].keys() - given_here:
        assert written[field] == PRESETS[name][field]


# ----------------------------------------------------------------------------------- the DCGAN


@pytest.fixture(scope="module")
def paper() -> tuple[nn.Module, nn.Module]:
    """G and D of the preset `dcgan` at their own width."""
    return build_networks(parse(["--preset", "dcgan"]).config, CPU)


def test_dcgan_has_the_layers_of_its_paper(paper):
    G, D = paper
    deconvs = [m for m in G.modules() if isinstance(m, nn.ConvTranspose2d)]
    convs = [m for m in D.modules() if isinstance(m, nn.Conv2d)]
    assert [m.in_channels for m in deconvs] == [100, 1024, 512, 256, 128]
    assert [m.out_channels for m in deconvs] == [1024, 512, 256, 128, 3]
    assert [m.out_channels for m in convs] == [128, 256, 512, 1024, 1]
    # Five by five, but for the two that stand for the paper's linear layers of 4 x 4 places.
    assert [m.kernel_size[0] for m in deconvs] == [4, 5, 5, 5, 5]
    assert [m.kernel_size[0] for m in convs] == [5, 5, 5, 5, 4]
    z = torch.zeros(2, 100)
    assert G(z).shape == (2, 3, 64, 64) and D(G(z), 1).features.shape == (2, 1024, 4, 4)
    assert [m.stride[0] for m in deconvs] == [1, 2, 2, 2, 2]
    assert [m.stride[0] for m in convs][:4] == [2, 2, 2, 2]
    norms = [m.num_features for m in G.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms == [1024, 512, 256, 128]
    norms = [len(m.weight) for m in D.modules() if isinstance(m, train_dogs.SplitBatchNorm2d)]
    assert norms == [256, 512, 1024]  # none at D's input


def test_dcgan_learns_as_its_paper_says():
    config = parse(["--preset", "dcgan"]).config
    assert (config.g_lr, config.d_lr, config.beta1, config.init_std) == (2e-4, 2e-4, 0.5, 0.02)
    assert (config.batch_size, config.average) == (128, "none")
    assert (config.margin, config.smoothing, config.loss) == (1.0, 0.0, "margin")  # plain logistic
    assert (config.mirror, config.augment, config.latents) == (0.0, "", "uniform")


def test_kernels_of_5_do_25_sixteenths_of_the_work_of_kernels_of_4():
    four, five = (
        Config(architecture=a, width=8, latent_dim=1, precision="fp32") for a in ("paper", "paper5")
    )
    ratio = train_dogs.flops_per_image(five) / train_dogs.flops_per_image(four)
    assert 1.5 < ratio < 25 / 16  # G's first layer and D's last have kernels of 4 in both


def test_uniform_latents_fill_the_cube_in_training_and_after(dogs):
    config = small(latents="uniform", batch_size=16)
    _, _, trained = Trainer(config, dogs, CPU).batches.draw()
    sampled = draw_latents(4000, config, "submission")
    for z in (trained, sampled):
        assert z.dtype == torch.float32 and float(z.abs().max()) <= 1
    assert stats.kstest(sampled.flatten().numpy()[::4], "uniform", args=(-1, 2)).pvalue > 1e-3
    assert torch.equal(draw_latents(9, config, "submission"), sampled[:9])


# --------------------------------------------------------------------------------- the stepped EMA


@pytest.mark.parametrize(
    ("epoch", "before", "after"), [(200, 0.9, 0.99), (300, 0.99, 0.999), (400, 0.999, 0.9999)]
)
def test_the_stepped_decay_rises_at_epochs_200_300_and_400_of_620(epoch, before, after):
    assert stepped_beta((epoch - 0.01) / 620) == pytest.approx(before, abs=1e-12)
    assert stepped_beta(epoch / 620) == pytest.approx(after, abs=1e-12)
    assert stepped_beta((epoch + 0.01) / 620) == pytest.approx(after, abs=1e-12)
    betas = {round(stepped_beta(k / 1000), 9) for k in range(1001)}
    assert betas == {0.9, 0.99, 0.999, 0.9999}


@pytest.mark.parametrize("every", [1, 3])
def test_a_stepped_ema_takes_the_decay_of_now_and_a_constant_one_its_own(every):
    G, _ = build_networks(small(), CPU)
    for schedule, betas in (("stepped", (0.9, 0.99, 0.999, 0.9999)), ("constant", (0.9995,) * 4)):
        config = small(ema_schedule=schedule, ema_beta=0.9995, average_every=every)
        averages = Averages(G)
        averages.ema_updates = 10**6  # long warm
        for progress, beta in zip((0.1, 0.4, 0.6, 0.9), betas):
            for average, weight in zip(averages.ema, G.parameters()):
                average.zero_()
                weight.data.fill_(1.0)
            averages.update(G, progress, config)
            for average in averages.ema:
                expected = torch.full_like(average, 1 - beta**every)
                torch.testing.assert_close(average, expected, rtol=1e-3, atol=1e-7)


# ------------------------------------------------------------------------------------------- noise


def test_noise_is_uniform_from_0_of_each_pixel_its_own_and_new_in_every_step(dogs):
    flat = replace(dogs, pixels=torch.full_like(dogs.pixels, 128))
    batches = Trainer(small(noise=0.5), flat, CPU).batches
    first, second = (batches.draw()[0] - (128 / 127.5 - 1) for _ in range(2))
    values = first.numpy().ravel() / 0.5
    assert -1e-6 <= values.min() and values.max() <= 1 + 1e-6
    assert stats.kstest(values[::7], "uniform").pvalue > 1e-3
    assert len(torch.unique(torch.cat([first, second]).flatten(1), dim=0)) == 12
    clean, _, _ = Trainer(small(), flat, CPU).batches.draw()
    assert len(clean.unique()) == 1


def test_noise_is_laid_on_reals_alone(dogs, monkeypatch):
    trainer, shown = Trainer(small(noise=0.5), dogs, CPU), []
    drawn, forward, judge = [], trainer.G.forward, trainer.D.forward
    monkeypatch.setattr(trainer.G, "forward", lambda *a: drawn.append(forward(*a)) or drawn[-1])
    monkeypatch.setattr(
        trainer.D, "forward", lambda x, *a: shown.append(x.detach().clone()) or judge(x, *a)
    )
    trainer.step(0.0)
    assert torch.equal(shown[0][6:], drawn[0]) and torch.equal(shown[1], drawn[0])
    assert shown[0][:6].max() > 1  # a real with noise


# --------------------------------------------------------------------------------------------- R1


def penalty_of(logits: Tensor, images: Tensor) -> float:
    """The R1 penalty, of logits of some first images."""
    verdict = train_dogs.Verdict(logits, logits, logits)
    labels, none = torch.zeros(len(logits)), torch.empty(0)
    seen = Seen(images, none, none, verdict, verdict, labels, Config(), 1.0)
    return float(gradient_penalty(seen).detach())


def test_r1_is_half_the_squared_slope_in_the_mean_over_reals_though_fakes_lie_behind_them():
    slope, images = torch.randn(3, 8, 8), torch.randn(4, 3, 8, 8).requires_grad_()
    logits = (images * slope).sum((1, 2, 3)) + 5
    assert penalty_of(logits, images) == pytest.approx(float(slope.square().sum()) / 2, rel=1e-5)
    x = torch.randn(7, 3, 4, 4).requires_grad_()
    logits = x.square().sum((1, 2, 3))  # slope 2x
    expected = float((2 * x.detach()[:3]).square().sum((1, 2, 3)).mean()) / 2
    assert penalty_of(logits[:3], x) == pytest.approx(expected, rel=1e-5)


@pytest.mark.usefixtures("double")
def test_r1_in_ds_step_is_that_of_a_plain_d_and_its_gradient_reaches_the_weights(dogs):
    with_r1, without = (Trainer(small(r1=r), dogs, CPU) for r in (3.0, 0.0))
    reals, fakes = torch.rand(2, 5, 3, 64, 64) * 2 - 1
    labels = torch.zeros(5, dtype=torch.int64)
    loss, _ = with_r1.d_objective(with_r1.judge(reals, fakes, labels, with_r1.opt_d))
    other, _ = without.d_objective(without.judge(reals, fakes, labels, without.opt_d))
    ours = torch.autograd.grad(loss, in_order(with_r1.D))
    theirs = torch.autograd.grad(other, in_order(without.D))
    plain, x = PlainDiscriminator(with_r1.D, 1), reals.clone().requires_grad_()
    (slope,) = torch.autograd.grad(plain(x).sum(), x, create_graph=True)
    penalty = 3.0 * sum(s.square().sum() / 2 for s in slope) / 5
    assert float((loss - other).detach()) == pytest.approx(float(penalty.detach()), rel=1e-5)
    expected = torch.autograd.grad(penalty, in_order(plain), allow_unused=True)
    for a, b, c in zip(ours, theirs, expected):
        c = torch.zeros_like(a) if c is None else c
        torch.testing.assert_close(a - b, c, rtol=1e-4, atol=1e-5 * float(c.abs().max()) + 1e-6)
    assert max(float(c.abs().max()) for c in expected if c is not None) > 0


def test_r1_is_counted_as_the_work_that_it_is():
    plain, with_r1 = (train_dogs.flops_per_image(small(r1=r)) for r in (0.0, 1.0))
    assert with_r1 > 1.2 * plain


# -------------------------------------------------------------------------------------- truncation


@given(truncation=st.floats(0.05, 6), seed=st.integers(0, 10**6), count=st.integers(1, 200))
def test_truncated_latents_are_scipys_truncated_normal_of_the_same_chance(truncation, seed, count):
    config = Config(latent_dim=3, seed=seed)
    cut = replace(config, truncation=truncation)
    plain, z = (draw_latents(count, c, "submission") for c in (config, cut))
    assert z.dtype == torch.float32 and float(z.abs().max()) <= truncation * (1 + 1e-6)
    chance = stats.norm.cdf(plain.double().numpy())
    expected = stats.truncnorm.ppf(chance, -truncation, truncation)
    np.testing.assert_allclose(z.numpy(), expected, rtol=1e-5, atol=1e-6)
    order = plain.flatten().argsort()
    assert (z.flatten()[order].diff() >= 0).all()  # the larger stays the larger
    assert torch.equal(draw_latents(300, cut, "submission")[:count], z)


def test_truncation_changes_what_is_drawn_and_not_what_was_learnt(finished_run, tmp_path):
    out = tmp_path / "truncated"
    assert run_here(out, steps=STEPS, truncation=0.7) == 0
    ours, theirs = (load(f / "checkpoint.pt")["trainer"]["tensors"] for f in (out, finished_run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert sha(out / "images.zip") != sha(finished_run / "images.zip")

    later = Path(shutil.copytree(finished_run, tmp_path / "later"))
    for truncation, same in ((0.7, out), (0, finished_run)):
        assert run_here(later, "--sample-only", truncation=truncation, data=None) == 0
        assert sha(later / "images.zip") == sha(same / "images.zip")


def test_norms_are_those_of_the_latents_that_will_be_drawn(dogs, monkeypatch):
    trainer, given_to_g = Trainer(small(truncation=0.5), dogs, CPU), []
    forward = train_dogs.Generator.forward
    monkeypatch.setattr(
        train_dogs.Generator, "forward", lambda G, z, *b: given_to_g.append(z) or forward(G, z, *b)
    )
    trainer.averages.generator(trainer.G, "none", 2, trainer.config)
    assert len(given_to_g) == 2 and max(float(z.abs().max()) for z in given_to_g) <= 0.5
    given_to_g.clear()
    trainer.step(0.0)
    assert float(given_to_g[0].abs().max()) > 0.6  # training knows no bounds
