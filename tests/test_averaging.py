"""The submitted generator: SWA, EMA, re-estimated norms, and images that depend on z alone."""

from __future__ import annotations

import math
import shutil
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
    pngs,
    run_here,
    sha,
)
from torch import Tensor, nn

import train_dogs
from train_dogs import (
    Averages,
    BreedBatchNorm2d,
    BreedGenerator,
    Config,
    Generator,
    Trainer,
    draw_latents,
    estimate_norms,
    find_photos,
    make_generator,
    prepare_crops,
    sample_images,
    seed_for,
)

pytestmark = pytest.mark.usefixtures("light")

CPU = torch.device("cpu")


def exact(tensors: list[Tensor]) -> list[Tensor]:
    """Copies in float64."""
    return [t.detach().double().clone() for t in tensors]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Equal to the rounding of float32 means."""
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------- the averages


def test_ema_and_swa_are_the_plain_recurrences_of_what_the_steps_left(own_cache):
    """Every second step of 50: the EMA with its warm start, the mean of SWA from 40 % on."""
    dogs = prepare_crops(find_photos([SAMPLE]), "square", show=False)
    changes = {"width": 1, "latent_dim": 4, "batch_size": 4, "precision": "fp32", "g_lr": 0.01}
    config = Config(**changes, average_every=2, swa_start=0.4, ema_beta=0.6)
    trainer = Trainer(config, dogs, CPU)
    ema, late = exact(list(trainer.G.parameters())), []
    for step in range(50):
        trainer.step(step / 50)
        weights = exact(list(trainer.G.parameters()))
        if step % 2 == 1:
            n = (step + 1) // 2
            beta = min(0.6**2, (1 + n) / (10 + n))  # 0.18 at first, 0.36 from the fifth on
            ema = [beta * e + (1 - beta) * w for e, w in zip(ema, weights)]
            late += [weights] if step >= 0.4 * 50 else []
        assert_same(trainer.averages.ema, ema)
    assert trainer.averages.ema_updates == 25 and trainer.averages.swa_updates == len(late) == 15
    assert_same(trainer.averages.swa, [sum(group) / len(late) for group in zip(*late)])


@pytest.mark.parametrize(
    ("average", "swa_updates", "ema_updates", "submitted"),
    [
        ("swa", 10, 99, "swa"), ("swa", 9, 99, "ema"), ("swa", 0, 1, "ema"), ("swa", 0, 0, "none"),
        ("ema", 99, 99, "ema"), ("ema", 0, 0, "none"), ("none", 99, 99, "none"),
    ],
)  # fmt: skip
def test_which_weights_are_submitted_is_a_rule(average, swa_updates, ema_updates, submitted):
    averages = Averages(nn.Linear(1, 1))
    averages.swa_updates, averages.ema_updates = swa_updates, ema_updates
    assert averages.choose(average) == submitted


def test_average_chooses_which_weights_are_submitted(finished_run, tmp_path):
    out = Path(shutil.copytree(finished_run, tmp_path / "out"))
    tensors = load(out / "checkpoint.pt")["trainer"]["tensors"]
    names = [name for name, _ in Generator(16, 1).named_parameters()]
    keys = {"ema": "ema.{i}", "none": "G.{name}", "swa": "swa.{i}"}
    for average, key in keys.items():
        (out / "images.zip").unlink()
        assert run_here(out, steps=STEPS, average=average) == 0  # finished: only submitted anew
        generator = load(out / "generator.pt")
        expected = [tensors[key.format(i=i, name=name)] for i, name in enumerate(names)]
        assert generator["weights"] == average
        assert all(torch.equal(generator["state_dict"][n], t) for n, t in zip(names, expected))
        same = sha(out / "images.zip") == sha(finished_run / "images.zip")
        assert same == (average == "swa")


# --------------------------------------------------------------------------- batch-norm statistics


def norms(G: nn.Module) -> list[nn.BatchNorm2d]:
    """The batch norms of G, in order."""
    return [m for m in G.modules() if isinstance(m, nn.BatchNorm2d)]


def inputs_of_norms(G: Generator, batches: list[tuple[Tensor, Tensor]]) -> list[list[Tensor]]:
    """What reaches each norm, batch by batch, in training mode."""
    found: list[list[Tensor]] = [[] for _ in norms(G)]
    hooks = [
        norm.register_forward_pre_hook(lambda _, x, seen=seen: seen.append(x[0].double()))
        for norm, seen in zip(norms(G), found)
    ]
    with torch.no_grad():
        for z, labels in batches:
            G.train()(z, labels)
    for hook in hooks:
        hook.remove()
    return found


def assert_statistics(G: Generator, latents: Tensor, labels: Tensor) -> None:
    """That the norms hold the means over these batches of 128, of means and of variances."""
    twin = make_generator(G.constructor)
    twin.load_state_dict(G.state_dict())
    seen = inputs_of_norms(twin, list(zip(latents.split(128), labels.split(128))))
    for norm, xs in zip(norms(G), seen, strict=True):
        means = sum(x.mean((0, 2, 3)) for x in xs) / len(xs)
        variances = sum(x.var((0, 2, 3), unbiased=True) for x in xs) / len(xs)
        torch.testing.assert_close(norm.running_mean.double(), means, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(norm.running_var.double(), variances, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("breeds", [0, 3])
def test_re_estimated_statistics_are_the_means_over_latents_and_breeds_of_their_own(breeds):
    torch.manual_seed(0)
    G = BreedGenerator(6, 2, "deep", breeds) if breeds else Generator(6, 2)
    for module in G.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.fill_(9)  # what was there before must not matter
        if isinstance(module, BreedBatchNorm2d):
            nn.init.normal_(module.weight)
    assert estimate_norms(G, 4, Config(latent_dim=6, seed=3)) is G and not G.training
    z, chance = (torch.Generator().manual_seed(seed_for(3, use)) for use in ("norms", "breeds"))
    labels = (torch.rand(4 * 128, generator=chance) * max(1, breeds)).long()
    assert_statistics(G, torch.randn(4 * 128, 6, generator=z), labels)


def test_uses_of_a_seed_never_share_their_randomness():
    for seed in (0, 1, 2**32 - 1):
        config = Config(latent_dim=4, seed=seed)
        z = [draw_latents(1, config, use) for use in train_dogs.SEED_USES]
        assert len(torch.unique(torch.cat(z), dim=0)) == len(z) > 1


@pytest.fixture(scope="module")
def submitted(finished_run) -> Generator:
    """The generator that a whole run left, as anyone would load it."""
    state = load(finished_run / "generator.pt")
    G = make_generator(state["generator"])
    G.load_state_dict(state["state_dict"])
    return G.eval()


def test_generator_pt_holds_the_statistics_of_its_own_averaged_weights(submitted):
    z = draw_latents(train_dogs.NORM_BATCHES * 128, Config(latent_dim=16), "norms")
    assert_statistics(submitted, z, torch.zeros(len(z), dtype=torch.int64))


def test_without_re_estimation_the_images_would_be_others(submitted, finished_run):
    """The trap: averaged weights with the statistics of the last G, or with none, draw badly."""
    z = torch.randn(512, 16, generator=torch.Generator().manual_seed(6))
    trained = load(finished_run / "checkpoint.pt")["trainer"]["tensors"]
    drawn = {}
    for name in ("batch", "kept", "stale", "fresh"):
        G = Generator(16, 1)
        G.load_state_dict(submitted.state_dict())
        for place, norm in G.named_modules():
            if isinstance(norm, nn.BatchNorm2d) and name == "stale":
                norm.running_mean.copy_(trained[f"G.{place}.running_mean"])
                norm.running_var.copy_(trained[f"G.{place}.running_var"])
            elif isinstance(norm, nn.BatchNorm2d) and name == "fresh":
                norm.reset_running_stats()
        with torch.no_grad():
            drawn[name] = G.train(name == "batch")(z)  # by this very batch: as it was trained
    error = {k: float((x - drawn["batch"]).square().mean().sqrt()) for k, x in drawn.items()}
    assert error["kept"] < 0.02 and min(error["stale"], error["fresh"]) > 3 * error["kept"]


# ----------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("latents", ["normal", "uniform"])
@given(count=st.integers(1, 300), other=st.integers(1, 300))
def test_latent_k_is_the_same_however_many_are_drawn(latents, count, other):
    config = Config(latent_dim=5, seed=8, latents=latents)
    a, b = (draw_latents(n, config, "submission") for n in (count, other))
    n = min(count, other)
    assert len(a) == count and torch.equal(a[:n], b[:n])


@pytest.mark.parametrize(("latents", "deviation"), [("normal", 1.0), ("uniform", 1 / 3**0.5)])
def test_latents_are_normal_or_uniform_and_differ_by_seed(latents, deviation):
    z, other = (
        draw_latents(2000, Config(latent_dim=8, seed=seed, latents=latents), "submission")
        for seed in (1, 2)
    )
    assert z.shape == (2000, 8) and z.dtype == torch.float32
    assert abs(float(z.mean())) < 0.03 and abs(float(z.std()) - deviation) < 0.03
    assert (float(z.abs().max()) <= 1) is (latents == "uniform")
    assert len(torch.unique(z, dim=0)) == 2000 and not torch.equal(z, other)


class Echo(nn.Module):
    """Draws its latents and labels as colours, and notes how many it is given at once."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.calls = nn.Parameter(torch.ones(1)), []

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        images = torch.stack([z[:, 0], z[:, 1], labels / 10], 1)[:, :, None, None] * self.weight
        self.calls.append((len(z), len(labels), images.dtype, images.requires_grad))
        return images.expand(-1, 3, 64, 64)


@pytest.mark.parametrize("count", [1, 127, 128, 129, 300])
def test_every_forward_has_128_latents_and_images_come_in_their_order(count):
    G, latents = Echo(), draw_latents(count, Config(latent_dim=2), "sheet") / 4
    labels = torch.arange(count) % 9
    images = np.concatenate(list(sample_images(G, latents, labels)))
    assert G.calls == [(128, 128, torch.float32, False)] * math.ceil(count / 128)
    colours = torch.cat([latents, labels[:, None] / 10], 1)
    expected = (127.5 * colours + 127.5).round().clamp(0, 255).byte().numpy()
    assert images.shape == (count, 64, 64, 3) and np.array_equal(images[:, 5, 9], expected)


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


def test_neighbouring_seeds_share_no_seed_of_any_use():
    seeds = [seed_for(seed, use) for seed in range(100) for use in train_dogs.SEED_USES]
    assert len(set(seeds)) == len(seeds)
