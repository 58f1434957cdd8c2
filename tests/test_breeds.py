"""Breeds: the networks that are told them, the loss that tells them apart, and drawing of one."""

# ruff: noqa: F811 (fixtures that are imported from runs)

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import (
    SAMPLE,
    assert_one_sentence,
    finished_run,  # noqa: F401
    light,  # noqa: F401
    light_runs,
    load,
    pixels,
    run_here,
    sha,
)
from scipy import stats
from torch import Tensor, nn

import train_dogs
from train_dogs import (
    BreedBatchNorm2d,
    Config,
    CropSet,
    Discriminator,
    Generator,
    Trainer,
    UserError,
    draw_inputs,
    draw_labels,
    find_breed,
    find_photos,
    prepare_crops,
    sample_images,
)

CPU = torch.device("cpu")
NAMES = [
    "n90000001-Drawn_spaniel", "n90000002-Drawn_shepherd", "n90000003-Drawn_terrier",
    "n90000004-Drawn_dachshund", "n90000005-Drawn_dalmatian", "n90000006-Drawn_spitz",
]  # fmt: skip
TOLD = {"condition": "breed", "classify": 0.5}


@pytest.fixture(scope="module")
def dogs(own_cache: Path) -> CropSet:
    """The drawn sample, cropped."""
    return prepare_crops(find_photos([SAMPLE]), "square", show=False)


def small(**changes: object) -> Config:
    """A configuration that trains in milliseconds, told of breeds."""
    return Config(
        **(
            {
                "width": 1,
                "latent_dim": 4,
                "batch_size": 6,
                "precision": "fp32",
                "condition": "breed",
            }
            | changes
        )
    )


# ------------------------------------------------------------------------------------- G's norms


def told_norm(breeds: int, channels: int) -> BreedBatchNorm2d:
    """One with gains and biases far apart."""
    norm = BreedBatchNorm2d(channels, breeds)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    return norm


@settings(max_examples=30)
@given(
    batch=st.integers(2, 8), channels=st.integers(1, 5), breeds=st.integers(1, 4),
    seed=st.integers(0, 10**6),
)  # fmt: skip
def test_statistics_are_of_the_whole_batch_and_gain_and_bias_of_each_dogs_breed(
    batch, channels, breeds, seed
):
    torch.manual_seed(seed)
    norm, ordinary = told_norm(breeds, channels), nn.BatchNorm2d(channels, affine=False)
    x = (3 * torch.randn(batch, channels, 3, 3) + 5).requires_grad_()
    breed, weights = torch.randint(breeds, (batch,)), torch.randn(batch, channels, 3, 3)
    for training in (True, False):  # in the end by the running statistics
        norm.train(training)
        ordinary.train(training)
        out = norm(x, breed)
        normed = ordinary(x)
        rows = [normed[k] * norm.weight[b, :, None, None] for k, b in enumerate(breed.tolist())]
        rows = [r + norm.bias[b, :, None, None] for r, b in zip(rows, breed.tolist())]
        expected = torch.stack(rows)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        inputs = [x, norm.weight, norm.bias]
        ours = torch.autograd.grad((out * weights).sum(), inputs)
        theirs = torch.autograd.grad((expected * weights).sum(), inputs)
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
    for name, buffer in ordinary.named_buffers():
        torch.testing.assert_close(norm.get_buffer(f"norm.{name}"), buffer)


def test_a_breed_that_is_not_in_the_batch_learns_nothing_from_it():
    norm = told_norm(4, 3)
    out = norm(torch.randn(5, 3, 2, 2), torch.tensor([0, 2, 2, 0, 2])).square().sum()
    for gradient in torch.autograd.grad(out, [norm.weight, norm.bias]):
        assert (gradient[[1, 3]] == 0).all() and (gradient[[0, 2]] != 0).any(1).all()


def test_at_first_all_breeds_are_one_and_g_is_the_g_that_is_told_nothing():
    config = {"width": 2, "latent_dim": 4}
    told, _ = train_dogs.build_networks(Config(**config, condition="breed"), CPU, 6)
    plain, _ = train_dogs.build_networks(Config(**config), CPU, 6)
    z = torch.randn(6, 4)
    torch.testing.assert_close(told(z, torch.arange(6)), plain(z))


def test_g_wants_breeds_if_and_only_if_it_was_made_for_them():
    z, breed = torch.randn(3, 4), torch.tensor([0, 1, 5])
    assert Generator(4, 1, breeds=6)(z, breed).shape == Generator(4, 1)(z).shape == (3, 3, 64, 64)
    for G, given_breed in ((Generator(4, 1, breeds=6), None), (Generator(4, 1), breed)):
        with pytest.raises(ValueError, match="breed"):
            G(z, given_breed)


def test_a_dogs_image_depends_on_its_breed():
    G = Generator(4, 1, breeds=3)
    for module in G.modules():
        if isinstance(module, BreedBatchNorm2d):
            nn.init.normal_(module.weight)
    z = torch.randn(1, 4).expand(3, 4)
    with torch.no_grad():
        images = G.eval()(z, torch.tensor([0, 1, 0]))
    assert torch.equal(images[0], images[2]) and not torch.equal(images[0], images[1])


# --------------------------------------------------------------------------------- D's projection


def test_the_projection_is_the_inner_product_of_breed_and_pooled_features():
    torch.manual_seed(0)
    D = Discriminator(1, breeds=5)
    nn.init.normal_(D.projection)
    images, breed = torch.rand(6, 3, 64, 64) * 2 - 1, torch.tensor([4, 0, 0, 3, 2, 4])
    with torch.no_grad():
        features, logits = D.features(images, 4), D(images, 4, breed)
        for k in range(6):
            head, told = float(D.head.bias), 0.0
            for c in range(features.shape[1]):
                head += float((features[k, c] * D.head.weight[0, c]).sum())
                told += float(D.projection[breed[k], c]) * float(features[k, c].mean())
            assert float(logits[k]) == pytest.approx(head + told, abs=1e-4)
            assert abs(told) > 1e-3  # it counts


def test_a_projection_of_0_gives_the_logits_of_a_d_that_is_told_nothing():
    _, told = train_dogs.build_networks(small(), CPU, 6)
    _, plain = train_dogs.build_networks(small(condition="none"), CPU, 6)
    assert (told.projection == 0).all() and plain.projection is None
    images = torch.rand(6, 3, 64, 64) * 2 - 1
    assert torch.equal(told(images, 3, torch.arange(6)), plain(images, 3))


def test_without_condition_the_networks_have_nothing_of_breeds():
    G, D = train_dogs.build_networks(small(condition="none"), CPU, 6)
    assert G.breeds == 0 and len(G.frequency) == 0 and D.classifier is None
    assert not any(isinstance(m, BreedBatchNorm2d) for m in G.modules())
    _, D = train_dogs.build_networks(small(), CPU, 6)
    assert D.classifier is None  # telling apart is a thing of its own


# ----------------------------------------------------------------------------------- in a step


def test_a_fake_is_of_the_breed_of_its_real_and_d_is_told_so(dogs, monkeypatch):
    trainer, given_to_g, given_to_d, rows = Trainer(small(), dogs, CPU), [], [], []
    forward, judge, draw = trainer.G.forward, trainer.D.judge, train_dogs.draw_reals
    monkeypatch.setattr(trainer.G, "forward", lambda z, b: given_to_g.append(b) or forward(z, b))
    monkeypatch.setattr(trainer.D, "judge", lambda f, b: given_to_d.append(b) or judge(f, b))
    monkeypatch.setattr(
        train_dogs, "draw_reals", lambda d, r, g: rows.append(r.clone()) or draw(d, r, g)
    )
    for _ in range(2):
        trainer.step(0.0)
    for step in (0, 1):
        breed = dogs.breed[rows[step]]
        assert torch.equal(given_to_g[step], breed)
        assert torch.equal(given_to_d[2 * step], torch.cat([breed, breed]))
        assert torch.equal(given_to_d[2 * step + 1], breed)
    assert (trainer.D.projection != 0).any()  # it is learnt


def cross_entropy(logits: Tensor, breed: Tensor) -> float:
    """The mean of -log of the softmax at the right breed, one by one."""
    rows = logits.detach().double().numpy()
    chances = [np.exp(r[b]) / np.exp(r).sum() for r, b in zip(rows, breed.tolist())]
    return float(-np.log(chances).mean())


def test_d_learns_to_tell_breeds_apart_from_reals_alone(dogs):
    trainer, plain = (Trainer(small(classify=c), dogs, CPU) for c in (0.5, 0.0))
    shared = plain.D.state_dict()
    plain.D.load_state_dict({k: v for k, v in trainer.D.state_dict().items() if k in shared})
    reals, breed = torch.rand(6, 3, 64, 64) * 2 - 1, torch.tensor([0, 1, 2, 3, 4, 4])
    told_apart = cross_entropy(trainer.D.classify(trainer.D.features(reals, 6)), breed)
    for fakes in (torch.rand(6, 3, 64, 64) * 2 - 1, torch.zeros(6, 3, 64, 64)):
        loss, _, _ = trainer._judge_both(reals, fakes, breed)
        without, _, _ = plain._judge_both(reals, fakes, breed)
        assert float(loss.detach() - without.detach()) == pytest.approx(0.5 * told_apart, rel=1e-4)
        (gradient,) = torch.autograd.grad(loss, trainer.D.classifier.weight)
        assert gradient.abs().max() > 0


def test_g_is_asked_for_dogs_of_the_breed_that_it_was_told(dogs, monkeypatch):
    trainer, told = Trainer(small(classify=0.5, g_lr=0.0), dogs, CPU), []
    classify, judge, plain = trainer.D.classify, trainer.D.judge, []
    monkeypatch.setattr(trainer.D, "classify", lambda f: told.append(classify(f)) or told[-1])
    monkeypatch.setattr(trainer.D, "judge", lambda f, b: plain.append(judge(f, b)) or plain[-1])
    breeds = []
    forward = trainer.G.forward
    monkeypatch.setattr(trainer.G, "forward", lambda z, b: breeds.append(b) or forward(z, b))
    trainer.step(0.0)
    assert [len(t) for t in told] == [6, 6]  # reals in D's step, fakes in G's
    expected = float(F.softplus(-plain[1].detach()).mean()) + 0.5 * cross_entropy(
        told[1], breeds[0]
    )
    assert trainer.read_stats()["g_loss"] == pytest.approx(expected, rel=1e-5)


def test_conditioning_costs_next_to_nothing():
    hours = [train_dogs.p100_hours(Config(**c), 1000) for c in ({}, {"condition": "breed"}, TOLD)]
    assert hours[1] == hours[2] == pytest.approx(hours[0], rel=1e-3)


# --------------------------------------------------------------------------------- as in the data


def test_g_keeps_the_share_of_each_breed(dogs):
    counts = Counter(dogs.breed.tolist())
    expected = [counts[k] / len(dogs.breed) for k in range(6)]
    assert len(set(expected)) > 1  # the drawn sample is not even
    G = Trainer(small(), dogs, CPU).G
    assert G.frequency.tolist() == pytest.approx(expected)


def of_shares(*shares: float) -> Generator:
    """A G whose breeds occur so often."""
    G = Generator(2, 1, breeds=len(shares))
    G.frequency.copy_(torch.tensor(shares))
    return G


def test_breeds_are_drawn_as_often_as_in_the_data():
    shares = [0.0, 0.4, 0.05, 0.0, 0.25, 0.29, 0.01, 0.0]
    G = of_shares(*shares)
    for seed in (0, 7):
        drawn = draw_labels(G, 20_000, seed)
        assert drawn.dtype == torch.int64 and drawn.shape == (20_000,)
        counts = np.bincount(drawn.numpy(), minlength=8)
        assert (counts[np.array(shares) == 0] == 0).all()
        seen, expected = (np.array(a)[np.array(shares) > 0] for a in (counts, shares))
        assert stats.chisquare(seen, 20_000 * expected).pvalue > 1e-3
        runs = drawn[1:][drawn[:-1] == 1].numpy()  # what follows a breed is any breed
        assert abs((runs == 1).mean() - 0.4) < 0.03
    assert not torch.equal(draw_labels(G, 99, 0), draw_labels(G, 99, 1))


@given(count=st.integers(1, 400), other=st.integers(1, 400), seed=st.integers(0, 2**32 - 1))
def test_breed_k_is_the_same_however_many_are_drawn(count, other, seed):
    G, n = of_shares(0.5, 0.2, 0.3), min(count, other)
    a, b = draw_labels(G, count, seed), draw_labels(G, other, seed)
    assert len(a) == count and torch.equal(a[:n], b[:n])


def test_a_g_that_is_told_nothing_gets_latents_alone_and_they_are_the_same_ones():
    config = Config(seed=3, latent_dim=2)
    latents, breeds = draw_inputs(of_shares(0.5, 0.5), config, 50)
    plain, none = draw_inputs(Generator(2, 1), config, 50)
    assert none is None and len(breeds) == 50 and torch.equal(latents, plain)


# -------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def told_run(tmp_path_factory: pytest.TempPathFactory, own_cache: Path) -> Path:
    """A finished run that was told breeds, with breeds far apart; copy it to change it."""
    out = tmp_path_factory.mktemp("told")
    with light_runs():
        assert run_here(out, steps=14, images=12, g_lr=0.02, **TOLD) == 0
    return out


def test_breed_alone_draws_that_breed_by_full_or_short_name_from_either_file(told_run, tmp_path):
    state = load(told_run / "generator.pt")
    assert state["breeds"] == NAMES
    G = Generator(**state["shape"])
    G.load_state_dict(state["state_dict"])
    G = G.to(memory_format=train_dogs.memory_layout(CPU)).eval()
    latents, _ = draw_inputs(G, Config(latent_dim=16), 12)
    terriers = torch.full((12,), 2)
    (expected,) = sample_images(G, latents, terriers)
    cases = {
        "n90000003-Drawn_terrier": "checkpoint.pt", "N90000003-DRAWN_TERRIER": "generator.pt",
        "Drawn_terrier": "generator.pt", "drawn terrier": "checkpoint.pt",
    }  # fmt: skip
    for name, file in cases.items():
        out = tmp_path / name
        out.mkdir()
        shutil.copy(told_run / file, out)
        assert run_here(out, breed=name, images=12, data=None) == 0
        assert np.array_equal(pixels(out / "images.zip"), expected), name
        assert sha(out / file) == sha(told_run / file)
    all_breeds = pixels(told_run / "images.zip")
    same = [bool(np.array_equal(a, b)) for a, b in zip(all_breeds, expected)]
    breeds = draw_labels(G, 12, 0).tolist()
    assert same == [b == 2 for b in breeds] and any(b != 2 for b in breeds)


@pytest.mark.parametrize("name", ["Poodle", "terrier"])
def test_an_unknown_breed_is_refused_with_the_names(name, told_run, tmp_path, capsys):
    out = Path(shutil.copytree(told_run, tmp_path / "out"))
    before = {p: sha(p) for p in out.rglob("*") if p.is_file()}
    assert run_here(out, breed=name, images=12, data=None) == 2
    spoken = [n.partition("-")[2] for n in NAMES]
    assert_one_sentence(capsys.readouterr().err, "--breed", name, *spoken)
    assert {p: sha(p) for p in out.rglob("*") if p.is_file()} == before


def test_a_breed_of_a_run_that_was_told_none_is_refused(finished_run, tmp_path, capsys):
    out = Path(shutil.copytree(finished_run, tmp_path / "out"))
    assert run_here(out, breed="Drawn_spitz", images=12, data=None) == 2
    assert_one_sentence(capsys.readouterr().err, "--breed", "--condition breed")
    assert sha(out / "images.zip") == sha(finished_run / "images.zip")


def test_a_name_means_the_one_breed_that_is_called_so():
    breeds = ["n1-Shih-Tzu", "n2-toy_poodle", "n3-Pug", "n4-Pug", "spitz"]
    for name, index in {
        "Shih-Tzu": 0, "shih-tzu": 0, "Toy Poodle": 1, "n3-pug": 2, "N4-Pug": 3, "SPITZ": 4,
    }.items():  # fmt: skip
        assert find_breed(name, breeds, True) == index
    assert find_breed("", breeds, True) is None and find_breed("", breeds, False) is None
    with pytest.raises(UserError, match="toy_poodle"):
        find_breed("Pug", breeds, True)  # which of the two?


def test_classify_without_condition_is_refused(tmp_path, capsys):
    assert run_here(tmp_path / "out", classify=0.1, steps=2) == 2
    assert_one_sentence(capsys.readouterr().err, "--classify", "--condition breed")
    assert not (tmp_path / "out").exists()


def test_the_dry_run_of_a_g_that_is_told_breeds_counts_the_parameters_of_all(tmp_path, capsys):
    assert run_here(tmp_path / "out", "--dry-run", steps=2, **TOLD) == 0
    G, D = Generator(16, 1, breeds=6), Discriminator(1, breeds=6, classify=True)
    said = capsys.readouterr().out
    for name, network in (("G", G), ("D", D)):
        assert f"{name}: {sum(p.numel() for p in network.parameters()):,} parameters" in said


def test_a_run_in_two_parts_writes_the_zip_of_one_in_one(tmp_path, monkeypatch):
    monkeypatch.setattr(train_dogs, "NORM_BATCHES", 1)
    changes = {
        **TOLD, "augment": "color,translation,cutout", "noise": 1 / 128,
        "ema_beta": 0.9, "average": "ema", "images": 9, "batch_size": 3,
    }  # fmt: skip
    assert run_here(tmp_path / "whole", steps=30, **changes) == 0
    for steps in (15, 30):
        assert run_here(tmp_path / "parts", steps=steps, **changes) == 0
    whole, parts = (tmp_path / name / "images.zip" for name in ("whole", "parts"))
    assert sha(whole) == sha(parts)


def test_a_checkpoint_of_one_condition_is_not_continued_with_the_other(told_run, tmp_path, capsys):
    out = Path(shutil.copytree(told_run, tmp_path / "out"))
    assert run_here(out, steps=20, g_lr=0.02) == 2
    assert_one_sentence(capsys.readouterr().err, "--condition breed", "--fresh")
