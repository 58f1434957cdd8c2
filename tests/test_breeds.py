"""Breeds: conditional networks, the classifier, drawing chosen breeds, and walks between them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from runs import (
    SAMPLE,
    assert_one_sentence,
    light_runs,
    log_of,
    pixels,
    run_here,
    sha,
)
from scipy import stats
from torch import Tensor, nn

import train_dogs
from train_dogs import (
    WALK_FRAMES,
    BreedBatchNorm2d,
    BreedGenerator,
    Config,
    CropSet,
    Generator,
    Trainer,
    UserError,
    build_networks,
    draw_labels,
    draw_latents,
    estimate_norms,
    find_breeds,
    find_photos,
    load_generator,
    prepare_crops,
    sample_images,
    write_walk,
)

pytestmark = pytest.mark.usefixtures("light")

CPU = torch.device("cpu")
NAMES = [
    "n90000001-Drawn_spaniel", "n90000002-Drawn_shepherd", "n90000003-Drawn_terrier",
    "n90000004-Drawn_dachshund", "n90000005-Drawn_dalmatian", "n90000006-Drawn_spitz",
]  # fmt: skip
BREED = {"condition": "breed", "classify": 0.5}


@pytest.fixture(scope="module")
def dogs(own_cache: Path) -> CropSet:
    """The drawn sample, cropped."""
    return prepare_crops(find_photos([SAMPLE]), "square", show=False)


def small(**changes: object) -> Config:
    """A configuration that trains in milliseconds, conditioned on breeds."""
    tiny = {"width": 1, "latent_dim": 4, "batch_size": 6, "precision": "fp32"}
    return Config(**(tiny | {"condition": "breed"} | changes))


# ------------------------------------------------------------------------------------- G's norms


@settings(max_examples=15)
@given(
    batch=st.integers(2, 8), channels=st.integers(1, 5), breeds=st.integers(1, 4),
    seed=st.integers(0, 10**6),
)  # fmt: skip
def test_statistics_are_of_the_whole_batch_and_gain_and_bias_of_each_dogs_breed(
    batch, channels, breeds, seed
):
    torch.manual_seed(seed)
    norm, ordinary = BreedBatchNorm2d(channels, breeds), nn.BatchNorm2d(channels, affine=False)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
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


def test_conditional_networks_begin_as_the_unconditional_ones():
    (G, D), (plain_G, plain_D) = (
        build_networks(small(condition=c), CPU, 6) for c in ("breed", "none")
    )
    z, images, breeds = torch.randn(6, 4), torch.rand(6, 3, 64, 64) * 2 - 1, torch.arange(6)
    torch.testing.assert_close(G(z, breeds), plain_G(z))
    assert torch.equal(D(images, 3, breeds).logits, plain_D(images, 3).logits)
    assert (G.breeds, plain_G.breeds, len(D.heads), len(plain_D.heads)) == (6, 0, 1, 0)
    assert torch.equal(plain_G.eval()(z), plain_G(z, breeds))  # it ignores labels


def varied(breeds: int) -> BreedGenerator:
    """A conditional G in eval mode whose breeds are far apart."""
    torch.manual_seed(0)
    G = BreedGenerator(4, 4, "paper", breeds)
    for module in G.modules():
        if isinstance(module, BreedBatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return G.eval()


# --------------------------------------------------------------------------------- D's projection


@torch.no_grad()
def test_the_projection_is_the_inner_product_of_breed_and_pooled_features():
    torch.manual_seed(0)
    _, D = build_networks(small(), CPU, 5)
    (head,) = D.heads
    nn.init.normal_(head.embedding)
    images, breed = torch.rand(6, 3, 64, 64) * 2 - 1, torch.tensor([4, 0, 0, 3, 2, 4])
    inputs: list[Tensor] = []
    D.linear.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    verdict = D(images, 4, breed)
    (features,) = inputs
    for k in range(6):
        logit, added = float(D.linear.bias), 0.0
        for c in range(features.shape[1]):
            logit += float((features[k, c] * D.linear.weight[0, c]).sum())
            added += float(head.embedding[breed[k], c]) * float(features[k, c].mean())
        assert float(verdict.logits[k]) == pytest.approx(logit + added, abs=1e-4)
        assert abs(added) > 1e-3  # it counts


# ----------------------------------------------------------------------------------- in a step


def cross_entropy(logits: Tensor, breed: Tensor) -> float:
    """The mean of -log of the softmax at the right breed, one by one."""
    rows = logits.detach().double().numpy()
    chances = [np.exp(r[b]) / np.exp(r).sum() for r, b in zip(rows, breed.tolist())]
    return float(-np.log(chances).mean())


def test_a_fake_has_the_breed_of_its_real_and_d_classifies_reals_and_g_its_fakes(dogs, monkeypatch):
    trainer, rows = Trainer(small(classify=0.5), dogs, CPU), []
    given_to_g, given_to_d, verdicts = [], [], []
    draw = train_dogs.draw_reals
    monkeypatch.setattr(
        train_dogs, "draw_reals", lambda d, r, g, m: rows.append(r.clone()) or draw(d, r, g, m)
    )
    trainer.G.register_forward_pre_hook(lambda _, inputs: given_to_g.append(inputs[1]))
    trainer.D.register_forward_pre_hook(lambda _, inputs: given_to_d.append(inputs[2]))
    trainer.D.register_forward_hook(lambda _, inputs, verdict: verdicts.append(verdict))
    projection, classifier = trainer.D.heads
    before = classifier.linear.weight.detach().clone()
    for _ in range(2):
        trainer.step(0.0)
        breed, (of_d, of_g) = dogs.breed[rows[-1]], verdicts[-2:]
        assert torch.equal(given_to_g[-1], breed)
        assert torch.equal(given_to_d[-2], torch.cat([breed, breed]))
        assert torch.equal(given_to_d[-1], breed)
        assert of_d.classes.shape == (12, 6) and of_g.classes.shape == (6, 6)
        expected = {
            "d_classify": cross_entropy(of_d.classes[:6], breed),
            "g_classify": cross_entropy(of_g.classes, breed),
            "g_loss": float(np.logaddexp(0, -of_g.logits.detach().numpy()).mean()),
        }  # the adversarial part is logged alone
        logged = trainer.read_stats()
        assert {k: logged[k] for k in expected} == pytest.approx(expected, rel=1e-5)
    assert (projection.embedding != 0).any()  # both are learnt
    assert not torch.equal(classifier.linear.weight, before)


# --------------------------------------------------------------------------------- as in the data


def of_shares(*shares: float) -> BreedGenerator:
    """A G whose breeds occur so often."""
    G = BreedGenerator(2, 1, "paper", len(shares))
    G.frequency.copy_(torch.tensor(shares))
    return G


def test_breeds_are_drawn_as_often_as_in_the_data(dogs):
    expected = np.bincount(dogs.breed.numpy()) / len(dogs.breed)
    assert len(set(expected)) > 1  # the drawn sample is not even
    assert Trainer(small(), dogs, CPU).G.frequency.tolist() == pytest.approx(expected.tolist())

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
    assert (draw_labels(Generator(2, 1), 50, 0) == 0).all()  # of an unconditional G


@given(count=st.integers(1, 400), other=st.integers(1, 400), seed=st.integers(0, 2**32 - 1))
def test_breed_k_is_the_same_however_many_are_drawn(count, other, seed):
    G, n = of_shares(0.5, 0.2, 0.3), min(count, other)
    a, b = draw_labels(G, count, seed), draw_labels(G, other, seed)
    assert len(a) == count and torch.equal(a[:n], b[:n])


# -------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def breed_run(tmp_path_factory: pytest.TempPathFactory, own_cache: Path) -> Path:
    """A finished conditional run, with breeds far apart; copy it to change it."""
    out = tmp_path_factory.mktemp("breeds")
    with light_runs():
        assert run_here(out, steps=14, images=12, g_lr=0.02, **BREED) == 0
    return out


def test_breed_draws_those_breeds_in_turn_by_their_full_or_short_names(breed_run, tmp_path):
    G, saved = load_generator(breed_run / "generator.pt", CPU)
    assert saved["breeds"] == NAMES
    latents = draw_latents(12, saved["config"], "submission")
    out = Path(shutil.copytree(breed_run, tmp_path / "out"))
    for names, breeds in (
        ("N90000003-DRAWN_TERRIER", [2]), ("drawn terrier,Drawn_spitz, n90000001-Drawn_spaniel",
         [2, 5, 0]),
    ):  # fmt: skip
        labels = torch.tensor(breeds).repeat(12)[:12]
        (expected,) = sample_images(G, latents, labels)
        assert run_here(out, breed=names, images=12, data=None) == 0
        assert np.array_equal(pixels(out / "images.zip"), expected), names
        # Row k has the same latent as in the run's own zip, and so the same image if its breed is.
        own = draw_labels(G, 12, 0)
        same = [bool((a == b).all()) for a, b in zip(pixels(breed_run / "images.zip"), expected)]
        assert same == (own == labels).tolist() and 0 < sum(same) < 12
    assert sha(out / "generator.pt") == sha(breed_run / "generator.pt")


def test_an_unknown_breed_or_one_of_an_unconditional_run_is_refused_and_nothing_is_written(
    breed_run, finished_run, tmp_path, capsys
):
    short = [n.partition("-")[2] for n in NAMES]
    for run, remedy in ((breed_run, ["terrier", *short]), (finished_run, ["--condition breed"])):
        out = Path(shutil.copytree(run, tmp_path / run.name))
        before = {p: sha(p) for p in out.rglob("*") if p.is_file()}
        assert run_here(out, breed="Drawn_spitz,terrier", images=12, data=None) == 2
        assert_one_sentence(capsys.readouterr().err, "--breed", *remedy)
        assert {p: sha(p) for p in out.rglob("*") if p.is_file()} == before


def test_a_name_means_the_one_breed_that_is_called_so():
    breeds = ["n1-Shih-Tzu", "n2-toy_poodle", "n3-Pug", "n4-Pug", "spitz"]
    for names, indices in {
        "Shih-Tzu": [0], "shih-tzu": [0], "Toy Poodle": [1], "n3-pug": [2], "N4-Pug,SPITZ": [3, 4],
        "": [],
    }.items():  # fmt: skip
        assert find_breeds(names, breeds, 5) == indices
    assert find_breeds("", breeds, 0) == []
    with pytest.raises(UserError, match="toy_poodle"):
        find_breeds("Pug", breeds, 5)  # which of the two?


def test_the_plan_the_end_and_the_log_of_a_run_name_the_same_p100_hours(breed_run):
    logged = log_of(breed_run)
    (hours,) = [line["p100_hours"] for line in logged if "p100_hours" in line]
    lines = [line["text"] for line in logged if "P100-hours" in line.get("text", "")]
    assert len(lines) == 2 and all(f"P100-hours: {hours:.3g}" in line for line in lines)


def test_a_conditional_run_in_two_parts_writes_the_zip_of_one_in_one(tmp_path, monkeypatch):
    monkeypatch.setattr(train_dogs, "NORM_BATCHES", 1)
    changes = {
        **BREED, "augment": "color,translation,cutout", "noise": 1 / 128, "ema_beta": 0.9,
        "average": "ema", "images": 9, "batch_size": 3, "architecture": "paper",
    }  # fmt: skip
    assert run_here(tmp_path / "whole", steps=12, **changes) == 0
    for steps in (5, 12):
        assert run_here(tmp_path / "parts", steps=steps, **changes) == 0
    whole, parts = (tmp_path / name / "images.zip" for name in ("whole", "parts"))
    assert sha(whole) == sha(parts)


# ---------------------------------------------------------------------------------------- the walk


@pytest.fixture
def walk(monkeypatch: pytest.MonkeyPatch) -> Callable[..., np.ndarray]:
    """Returns the frames that `write_walk` draws, before they are compressed: uint8 (80, 8, 10, 64,
    64, 3), as rows and columns of images."""

    def frames_of(G: nn.Module, config: Config, breeds: Sequence[int] = ()) -> np.ndarray:
        kept: list[Image.Image] = []
        monkeypatch.setattr(
            train_dogs, "save_picture", lambda path, frames, **_: kept.extend(frames)
        )
        write_walk(G, config, breeds)
        return np.stack(kept).reshape(len(kept), 8, 64, 10, 64, 3).swapaxes(2, 3)

    return frames_of


@pytest.mark.parametrize("latents", ["normal", "uniform"])
def test_a_walk_is_closed_and_each_column_is_a_tenth_of_it_ahead(latents, walk):
    config = small(condition="none", architecture="paper", latents=latents)
    G, _ = build_networks(config, CPU)
    estimate_norms(G, 1, config)
    frames = walk(G, config)
    assert len(frames) == WALK_FRAMES == 80
    for k in range(80):  # frame k + 8 is frame k, moved on by one column
        ahead = frames[(k + 8) % 80]
        assert np.array_equal(ahead[:, :-1], frames[k][:, 1:])
        assert np.array_equal(ahead[:, -1], frames[k][:, 0])
    first = frames[:, 0, 0].astype(int)
    moves = np.abs(first - np.roll(first, 1, 0)).mean((1, 2, 3))
    assert moves.max() < 0.2 * np.abs(first - np.roll(first, 40, 0)).mean((1, 2, 3)).max()


@pytest.mark.parametrize("kind", ["dcgan", "residual"])
def test_a_walk_through_breeds_shows_each_of_them_and_keeps_a_rows_latent(kind, walk, monkeypatch):
    monkeypatch.setattr(train_dogs, "WALK_FRAMES", 20)
    if kind == "dcgan":
        config, G = small(), varied(6)
    else:
        config = small(architecture="residual", latent_dim=5)
        G = estimate_norms(build_networks(config, CPU, 6)[0], 1, config)
    breeds, latents = [4, 0, 3, 5], draw_latents(8, config, "sheet")
    column = walk(G, config, breeds)[:, :, 0]
    labels = torch.tensor(breeds).repeat_interleave(8)
    (expected,) = sample_images(G, latents.repeat(4, 1), labels)
    assert np.array_equal(column[::5], expected.reshape(4, 8, 64, 64, 3))
    for k in range(20):
        assert not np.array_equal(column[k], column[k - 1])


def test_walk_writes_an_animation_and_leaves_the_zip(breed_run, tmp_path):
    out = Path(shutil.copytree(breed_run, tmp_path / "out"))
    assert run_here(out, "--walk", data=None) == 0
    with Image.open(out / "walk.webp") as animation:
        assert (animation.format, animation.size) == ("WEBP", (640, 512))
        durations = []  # WebP joins frames that hardly differ
        for frame in range(animation.n_frames):
            animation.seek(frame)
            animation.load()
            durations.append(animation.info["duration"])
        assert sum(durations) == 8000 and len(durations) > 10
    assert sha(out / "images.zip") == sha(breed_run / "images.zip")
