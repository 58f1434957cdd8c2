"""The presets, and what they and the rarer fields set: layers, stepped EMA, noise, R1, truncation.

Oracles: the papers' own numbers, plain networks with ordinary batch norms, scipy's distributions.
"""

# ruff: noqa: F811 (fixtures that are imported from runs)

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import (
    SAMPLE,
    STEPS,
    assert_one_sentence,
    finished_run,  # noqa: F401
    light,  # noqa: F401
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
    Config,
    CropSet,
    Trainer,
    build_networks,
    discriminator_loss,
    draw_latents,
    find_photos,
    gradient_penalty,
    parse,
    prepare_crops,
    stepped_beta,
)

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


def test_all_presets_set_the_same_fields_and_the_first_is_the_default():
    assert list(PRESETS) == ["dogs", "first-public", "dcgan"]
    assert len({tuple(changes) for changes in PRESETS.values()}) == 1
    assert (
        parse([]).config == parse(["--preset", "dogs"]).config == Config(out=parse([]).config.out)
    )


@pytest.mark.parametrize("name", PRESETS)
def test_a_recipe_costs_8_and_a_half_p100_hours_and_hardly_less(name):
    config = parse(["--preset", name]).config
    assert 8.4 < train_dogs.p100_hours(config, config.steps) <= 8.5


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_trains_samples_and_resumes(name, tmp_path, monkeypatch):
    monkeypatch.setattr(train_dogs, "NORM_BATCHES", 1)
    out, changes = tmp_path / "out", {"preset": name, "latent_dim": 4, "batch_size": 4}
    zips = []
    for steps in (2, 4):
        assert run_here(out, steps=steps, images=3, **changes) == 0
        assert load(out / "checkpoint.pt")["trainer"]["steps_done"] == steps
        zips.append(pixels(out / "images.zip"))
    assert zips[0].shape == (3, 64, 64, 3) and not np.array_equal(*zips)
    written = json.loads((out / "config.json").read_text())
    given_here = {"latent_dim", "width", "batch_size", "average_every", "steps"}
    assert {k: written[k] for k in PRESETS[name].keys() - given_here} == {
        k: v for k, v in PRESETS[name].items() if k not in given_here
    }


def test_first_public_is_the_notebook_as_it_was():
    config = parse(["--preset", "first-public"]).config
    assert (config.layers, config.latent_dim, config.width) == ("deep", 256, 48)
    assert config.batch_size == 32
    assert (config.g_lr, config.d_lr, config.beta1, config.beta2) == (5e-4, 5e-4, 0.3, 0.999)
    assert (config.margin, config.smoothing) == (0.8, 0.05)
    assert (config.average, config.ema_beta, config.average_every) == ("ema", 0, 1)
    assert train_dogs.parse_crops(config.crops).keys() == {"head", "square", "context"}


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
    assert {m.kernel_size for m in (*deconvs, *convs)} == {(4, 4)}  # none of 3 x 3
    assert [m.stride[0] for m in deconvs] == [1, 2, 2, 2, 2]
    assert [m.stride[0] for m in convs][:4] == [2, 2, 2, 2]
    assert [m.num_features for m in G.modules() if isinstance(m, nn.BatchNorm2d)] == [
        1024, 512, 256, 128,
    ]  # fmt: skip
    norms = [m for m in D.modules() if isinstance(m, train_dogs.SplitBatchNorm2d)]
    assert [len(m.weight) for m in norms] == [256, 512, 1024]  # none at D's input


def test_dcgans_weights_are_normal_with_a_std_of_2_hundredths(paper):
    for network in paper:
        for module in network.modules():
            weight = getattr(module, "weight", None)
            if weight is None or weight.numel() < 100:
                continue
            mean = 0.0 if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) else 1.0
            values = weight.detach().flatten()[:20_000].numpy()
            assert stats.kstest((values - mean) / 0.02, "norm").pvalue > 1e-4


def test_dcgan_learns_as_its_paper_says():
    config = parse(["--preset", "dcgan"]).config
    assert (config.g_lr, config.d_lr, config.beta1, config.beta2) == (2e-4, 2e-4, 0.5, 0.999)
    assert (config.latent_dim, config.batch_size, config.average) == (100, 128, "none")
    real, fake = torch.randn(2, 50).double() * 9
    loss = discriminator_loss(real, fake, config.margin, config.smoothing)
    plain = -torch.sigmoid(real).log().mean() - torch.sigmoid(-fake).log().mean()
    torch.testing.assert_close(loss, plain)  # the logistic loss without a margin


@settings(max_examples=20)
@given(width=st.integers(1, 4), latent_dim=st.integers(1, 9), batch=st.integers(2, 4))
def test_papers_layers_make_images_and_logits_of_any_width(width, latent_dim, batch):
    G, D = build_networks(Config(layers="paper", width=width, latent_dim=latent_dim), CPU)
    images = G(torch.randn(batch, latent_dim))
    assert images.shape == (batch, 3, 64, 64) and images.abs().max() <= 1
    assert D(images, 1).shape == D(images, 0).shape == (batch,)
    assert [m.out_channels for m in G.convs] == [8 * width, 4 * width, 2 * width, width]


def test_a_checkpoint_of_other_layers_is_not_continued(finished_run, tmp_path, capsys):
    out = Path(shutil.copytree(finished_run, tmp_path / "out"))
    assert run_here(out, steps=STEPS + 4, layers="paper") == 2
    assert_one_sentence(capsys.readouterr().err, "--layers deep", "--fresh")


# --------------------------------------------------------------------------------- the stepped EMA


@pytest.mark.parametrize(
    ("epoch", "before", "after"), [(200, 0.9, 0.99), (300, 0.99, 0.999), (400, 0.999, 0.9999)]
)
def test_the_stepped_decay_rises_at_epochs_200_300_and_400_of_620(epoch, before, after):
    assert stepped_beta((epoch - 0.01) / 620) == pytest.approx(before, abs=1e-12)
    assert stepped_beta(epoch / 620) == pytest.approx(after, abs=1e-12)
    assert stepped_beta((epoch + 0.01) / 620) == pytest.approx(after, abs=1e-12)


def test_the_stepped_decay_is_one_of_four():
    betas = [stepped_beta(k / 1000) for k in range(1001)]
    assert betas == sorted(betas)
    assert {round(b, 9) for b in betas} == {0.9, 0.99, 0.999, 0.9999}


@pytest.mark.parametrize("every", [1, 3])
def test_the_ema_of_beta_0_takes_the_stepped_decay_of_now(dogs, every):
    trainer = Trainer(small(ema_beta=0.0, average_every=every), dogs, CPU)
    trainer.averages_done = 10**6  # long warm
    for progress, beta in ((0.1, 0.9), (0.4, 0.99), (0.6, 0.999), (0.9, 0.9999)):
        for average, weight in zip(trainer.averages.ema, trainer.G.parameters()):
            average.zero_()
            weight.data.fill_(1.0)
        trainer.average(progress)
        for average in trainer.averages.ema:
            expected = torch.full_like(average, 1 - beta**every)
            torch.testing.assert_close(average, expected, rtol=1e-3, atol=1e-7)


# ------------------------------------------------------------------------------------------- noise


def seen_in_a_step(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What D sees in one step: reals and fakes, then fakes; and the reals and fakes themselves."""
    chance = torch.Generator()
    chance.set_state(trainer.rng.get_state())
    seen, made = [], []
    features, forward = trainer.D.features, trainer.G.forward
    monkeypatch.setattr(
        trainer.D,
        "features",
        lambda x, num_real: seen.append(x.detach().clone()) or features(x, num_real),
    )
    monkeypatch.setattr(trainer.G, "forward", lambda *a: made.append(forward(*a)) or made[-1])
    trainer.step(0.0)
    order = torch.randperm(len(trainer.crops.first), generator=chance)
    batch = trainer.config.batch_size
    reals = train_dogs.draw_reals(trainer.crops, order[:batch], chance)
    return [seen[0][:batch], seen[0][batch:], seen[1], reals, made[0].detach()]


def test_noise_is_uniform_from_0_and_on_reals_alone(dogs, monkeypatch):
    trainer = Trainer(small(noise=1 / 128), dogs, CPU)
    reals, fakes, fakes_again, clean, made = seen_in_a_step(trainer, monkeypatch)
    noise = (reals - clean).numpy().ravel() * 128
    assert -1e-4 <= noise.min() and noise.max() <= 1 + 1e-4  # to float32's rounding at 1
    assert stats.kstest(noise[::7], "uniform").pvalue > 1e-3
    assert len(np.unique(noise)) > 10_000  # of each pixel and channel its own
    assert torch.equal(fakes, made) and torch.equal(fakes_again, made)


def test_without_noise_d_sees_the_reals_themselves(dogs, monkeypatch):
    reals, _, _, clean, _ = seen_in_a_step(Trainer(small(), dogs, CPU), monkeypatch)
    assert torch.equal(reals, clean)


def test_noise_of_one_step_is_not_that_of_the_next(dogs, monkeypatch):
    flat = CropSet(**(vars(dogs) | {"crops": torch.full_like(dogs.crops, 128)}))
    trainer, seen = Trainer(small(noise=0.5), flat, CPU), []
    features = trainer.D.features
    monkeypatch.setattr(
        trainer.D, "features", lambda x, num_real: seen.append(x.detach()) or features(x, num_real)
    )
    for _ in range(2):
        trainer.step(0.0)
    images = torch.cat([seen[0][:6], seen[2][:6]])
    assert len(torch.unique(images.flatten(1), dim=0)) == 12


# --------------------------------------------------------------------------------------------- R1


@given(st.integers(1, 6), st.integers(0, 10**6))
def test_r1_of_a_linear_d_is_half_its_squared_slope(batch, seed):
    torch.manual_seed(seed)
    slope, images = torch.randn(3, 8, 8), torch.randn(batch, 3, 8, 8).requires_grad_()
    logits = (images * slope).sum((1, 2, 3)) + 5
    expected = float(slope.square().sum()) / 2
    assert float(gradient_penalty(logits, images)) == pytest.approx(expected, rel=1e-5)


def test_r1_is_the_mean_over_reals_even_where_fakes_lie_behind_them():
    x = torch.randn(7, 3, 4, 4).requires_grad_()
    logits = x.square().sum((1, 2, 3))  # slope 2x
    expected = float((2 * x.detach()[:3]).square().sum((1, 2, 3)).mean()) / 2
    assert float(gradient_penalty(logits[:3], x).detach()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.usefixtures("double")
def test_r1_in_ds_step_is_that_of_a_plain_d_and_its_gradient_reaches_the_weights(dogs):
    with_r1, without = (Trainer(small(r1=r), dogs, CPU) for r in (3.0, 0.0))
    reals, fakes = torch.rand(2, 5, 3, 64, 64) * 2 - 1
    loss, _, _ = with_r1._judge_both(reals, fakes, None)
    other, _, _ = without._judge_both(reals, fakes, None)
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


def test_r1_is_for_d_alone_and_flattens_it(dogs):
    config = small(r1=100.0, g_lr=0.0, d_lr=0.01)
    trainers = [Trainer(c, dogs, CPU) for c in (config, small(g_lr=0.0, d_lr=0.01))]
    slopes = []
    for trainer in trainers:
        for _ in range(12):
            trainer.step(0.0)
        rows = torch.arange(20)
        reals = train_dogs.draw_reals(dogs, rows, torch.Generator()).requires_grad_()
        slopes.append(float(gradient_penalty(trainer.D(reals, 20), reals).detach()))
        assert trainer.is_healthy()
    assert slopes[0] < 0.5 * slopes[1]


def test_r1_is_counted_as_the_work_that_it_is():
    plain, with_r1 = (train_dogs.flops_per_image(small(r1=r)) for r in (0.0, 1.0))
    assert with_r1["D step"] > 1.3 * plain["D step"]
    assert with_r1["G forward"] == plain["G forward"] and with_r1["G step"] == plain["G step"]


# -------------------------------------------------------------------------------------- truncation


@given(truncation=st.floats(0.05, 6), seed=st.integers(0, 10**6), count=st.integers(1, 200))
def test_truncated_latents_are_scipys_truncated_normal_of_the_same_chance(truncation, seed, count):
    plain = draw_latents(count, 3, seed)
    z = draw_latents(count, 3, seed, truncation)
    assert z.dtype == torch.float32 and z.shape == plain.shape
    assert float(z.abs().max()) <= truncation * (1 + 1e-6)
    chance = stats.norm.cdf(plain.double().numpy())
    expected = stats.truncnorm.ppf(chance, -truncation, truncation)
    np.testing.assert_allclose(z.numpy(), expected, rtol=1e-5, atol=1e-6)
    order = plain.flatten().argsort()
    assert (z.flatten()[order].diff() >= 0).all()  # the larger stays the larger


def test_truncated_latents_are_distributed_as_normal_ones_within_the_bounds():
    z = draw_latents(4000, 2, 1, 1.5).numpy().ravel()
    assert stats.kstest(z, stats.truncnorm(-1.5, 1.5).cdf).pvalue > 1e-3
    again = draw_latents(10, 2, 1, 1.5).numpy().ravel()
    assert np.array_equal(again, z[:20])  # row k, however many there are


def test_truncation_0_changes_no_bit():
    assert torch.equal(draw_latents(300, 5, 2, 0.0), draw_latents(300, 5, 2))


def test_truncation_changes_what_is_drawn_and_not_what_was_learnt(finished_run, tmp_path):
    out = tmp_path / "truncated"
    assert run_here(out, steps=STEPS, truncation=0.7) == 0
    ours, theirs = (load(f / "checkpoint.pt")["trainer"]["tensors"] for f in (out, finished_run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert sha(out / "images.zip") != sha(finished_run / "images.zip")

    later = Path(shutil.copytree(finished_run, tmp_path / "later"))
    assert run_here(later, "--sample-only", truncation=0.7, data=None) == 0
    assert sha(later / "images.zip") == sha(out / "images.zip")
    assert run_here(later, "--sample-only", data=None, truncation=0) == 0
    assert sha(later / "images.zip") == sha(finished_run / "images.zip")


def test_norms_are_those_of_the_latents_that_will_be_drawn(dogs, monkeypatch):
    trainer, given_to_g = Trainer(small(truncation=0.5), dogs, CPU), []
    forward = train_dogs.Generator.forward
    monkeypatch.setattr(
        train_dogs.Generator, "forward", lambda G, z, *b: given_to_g.append(z) or forward(G, z, *b)
    )
    trainer.averaged_generator("none", 2)
    assert len(given_to_g) == 2 and max(float(z.abs().max()) for z in given_to_g) <= 0.5
    given_to_g.clear()
    trainer.step(0.0)
    assert float(given_to_g[0].abs().max()) > 0.6  # training knows no bounds
