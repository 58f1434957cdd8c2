"""Breeds: the networks that are told them, the loss that tells them apart, and drawing of one."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import (
    SAMPLE,
    assert_one_sentence,
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
    build_networks,
    draw_labels,
    draw_latents,
    find_breed,
    find_photos,
    make_generator,
    prepare_crops,
    sample_images,
    seed_for,
)

pytestmark = pytest.mark.usefixtures("light")

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
    tiny = {"width": 1, "latent_dim": 4, "batch_size": 6, "precision": "fp32"}
    return Config(**(tiny | {"condition": "breed"} | changes))


# ------------------------------------------------------------------------------------- G's norms


def told_norm(breeds: int, channels: int) -> BreedBatchNorm2d:
    """One with gains and biases far apart."""
    norm = BreedBatchNorm2d(channels, breeds)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
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
        rows = zip(ordinary(x), breed.tolist())
        expected = torch.stack(
            [r * norm.weight[b, :, None, None] + norm.bias[b, :, None, None] for r, b in rows]
        )
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        inputs = [x, norm.weight, norm.bias]
        ours = torch.autograd.grad((out * weights).sum(), inputs)
        theirs = torch.autograd.grad((expected * weights).sum(), inputs)
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
    for name, buffer in ordinary.named_buffers():
        torch.testing.assert_close(norm.get_buffer(f"norm.{name}"), buffer)


def test_at_first_all_breeds_are_one_and_both_networks_are_those_that_are_told_nothing():
    told, plain = (build_networks(small(condition=c), CPU, 6) for c in ("breed", "none"))
    z, images, breeds = torch.randn(6, 4), torch.rand(6, 3, 64, 64) * 2 - 1, torch.arange(6)
    torch.testing.assert_close(told[0](z, breeds), plain[0](z))
    assert torch.equal(told[1](images, 3, breeds).logits, plain[1](images, 3).logits)
    assert plain[0].breeds == 0 and plain[1].projection is plain[1].classifier is None
    assert told[1].classifier is None  # telling apart is a thing of its own


def test_g_wants_labels_where_it_was_made_for_them_and_ignores_them_elsewhere():
    G, z = Generator(4, 1).eval(), torch.randn(3, 4)
    assert torch.equal(G(z), G(z, torch.tensor([0, 1, 5])))
    with pytest.raises(ValueError, match="labels"):
        Generator(4, 1, breeds=6)(z)


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
    heads: list[Tensor] = []
    D.head.register_forward_pre_hook(lambda _, inputs: heads.append(inputs[0]))
    with torch.no_grad():
        said = D(images, 4, breed)
        (features,) = heads
        for k in range(6):
            head, told = float(D.head.bias), 0.0
            for c in range(features.shape[1]):
                head += float((features[k, c] * D.head.weight[0, c]).sum())
                told += float(D.projection[breed[k], c]) * float(features[k, c].mean())
            assert float(said.logits[k]) == pytest.approx(head + told, abs=1e-4)
            assert abs(told) > 1e-3  # it counts


# ----------------------------------------------------------------------------------- in a step


def test_a_fake_is_of_the_breed_of_its_real_and_d_is_told_so(dogs, monkeypatch):
    trainer, given_to_g, given_to_d, rows = Trainer(small(), dogs, CPU), [], [], []
    draw = train_dogs.draw_reals
    trainer.G.register_forward_pre_hook(lambda _, inputs: given_to_g.append(inputs[1]))
    trainer.D.register_forward_pre_hook(lambda _, inputs: given_to_d.append(inputs[2]))
    monkeypatch.setattr(
        train_dogs, "draw_reals", lambda d, r, g, m: rows.append(r.clone()) or draw(d, r, g, m)
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


def test_d_tells_apart_the_breeds_of_reals_alone_and_g_is_asked_for_the_breed_it_was_told(dogs):
    trainer = Trainer(small(classify=0.5, g_lr=0.0), dogs, CPU)
    said, told = [], []
    trainer.G.register_forward_pre_hook(lambda _, inputs: told.append(inputs[1]))
    trainer.D.register_forward_hook(lambda _, inputs, verdict: said.append(verdict))
    before = trainer.D.classifier.weight.detach().clone()
    trainer.step(0.0)
    d_step, g_step = said
    assert [len(v.classes) for v in said] == [12, 6] and d_step.classes.shape[1] == 6
    stats = trainer.read_stats()
    expected = {
        "d_classify": cross_entropy(d_step.classes[:6], told[0]),
        "g_classify": cross_entropy(g_step.classes, told[0]),
        "g_loss": float(np.logaddexp(0, -g_step.logits.detach().numpy()).mean()),
    }  # the adversarial part is logged alone
    assert {k: stats[k] for k in expected} == pytest.approx(expected, rel=1e-5)
    assert not torch.equal(trainer.D.classifier.weight, before)


# --------------------------------------------------------------------------------- as in the data


def test_g_keeps_the_share_of_each_breed(dogs):
    expected = np.bincount(dogs.breed.numpy()) / len(dogs.breed)
    assert len(set(expected)) > 1  # the drawn sample is not even
    assert Trainer(small(), dogs, CPU).G.frequency.tolist() == pytest.approx(expected.tolist())


def of_shares(*shares: float) -> Generator:
    """A G whose breeds occur so often."""
    G = Generator(2, 1, breeds=len(shares))
    G.frequency.copy_(torch.tensor(shares))
    return G


def test_breeds_are_drawn_as_often_as_in_the_data():
    shares = np.array([0.0, 0.4, 0.05, 0.0, 0.25, 0.29, 0.01, 0.0])
    G = of_shares(*shares)
    for seed in (0, 7):
        drawn = draw_labels(G, 20_000, seed)
        assert drawn.dtype == torch.int64 and drawn.shape == (20_000,)
        counts = np.bincount(drawn.numpy(), minlength=8)
        assert (counts[shares == 0] == 0).all()
        assert stats.chisquare(counts[shares > 0], 20_000 * shares[shares > 0]).pvalue > 1e-3
        after = drawn[1:][drawn[:-1] == 1].numpy()  # what follows a breed is any breed
        assert abs((after == 1).mean() - 0.4) < 0.03
    assert not torch.equal(draw_labels(G, 99, 0), draw_labels(G, 99, 1))
    assert (draw_labels(Generator(2, 1), 50, 0) == 0).all()  # of a G that is told nothing


@given(count=st.integers(1, 400), other=st.integers(1, 400), seed=st.integers(0, 2**32 - 1))
def test_breed_k_is_the_same_however_many_are_drawn(count, other, seed):
    G, n = of_shares(0.5, 0.2, 0.3), min(count, other)
    a, b = draw_labels(G, count, seed), draw_labels(G, other, seed)
    assert len(a) == count and torch.equal(a[:n], b[:n])


# -------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def told_run(tmp_path_factory: pytest.TempPathFactory, own_cache: Path) -> Path:
    """A finished run that was told breeds, with breeds far apart; copy it to change it."""
    out = tmp_path_factory.mktemp("told")
    with light_runs():
        assert run_here(out, steps=14, images=12, g_lr=0.02, **TOLD) == 0
    return out


def test_breed_alone_draws_that_breed_by_its_full_or_short_name(told_run, tmp_path):
    state = load(told_run / "generator.pt")
    assert state["breeds"] == NAMES
    G = make_generator(state["shape"])
    G.load_state_dict(state["state_dict"])
    G = G.to(memory_format=train_dogs.memory_layout(CPU)).eval()
    latents = draw_latents(12, 16, seed_for(0, "submission"))
    (expected,) = sample_images(G, latents, torch.full((12,), 2))
    out = Path(shutil.copytree(told_run, tmp_path / "out"))
    for name in ("N90000003-DRAWN_TERRIER", "drawn terrier"):
        assert run_here(out, breed=name, images=12, data=None) == 0
        assert np.array_equal(pixels(out / "images.zip"), expected), name
    assert sha(out / "generator.pt") == sha(told_run / "generator.pt")
    all_breeds, breeds = pixels(told_run / "images.zip"), draw_labels(G, 12, 0).tolist()
    same = [bool(np.array_equal(a, b)) for a, b in zip(all_breeds, expected)]
    assert same == [b == 2 for b in breeds] and 0 < sum(same) < 12


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
