"""The techniques of Salimans et al. 2016, each against its formula in slow plain Python."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import SAMPLE, assert_one_sentence, load, run_here, sha
from torch import Tensor, nn

import train_dogs
from train_dogs import (
    UNKNOWN,
    Config,
    CropSet,
    Discriminator,
    Generator,
    HistoricalAverage,
    MinibatchDiscrimination,
    Seen,
    Trainer,
    Verdict,
    VirtualBatchNorm2d,
    classify_reals,
    estimate_norms,
    find_photos,
    flops_per_image,
    g_matching,
    prepare_crops,
)

pytestmark = pytest.mark.usefixtures("light")

CPU = torch.device("cpu")
CLASSES = {"condition": "classes", "classify": 1.0}
ALL = {
    **CLASSES, "loss": "matching", "g_norm": "virtual", "minibatch_features": 3, "history": 0.1,
    "labelled": 0.5, "smoothing": 0.1,
}  # fmt: skip


@pytest.fixture(scope="module")
def dogs(own_cache: Path) -> CropSet:
    """The drawn sample, cropped."""
    return prepare_crops(find_photos([SAMPLE]), "square", show=False)


def small(**changes: object) -> Config:
    """A configuration that trains in milliseconds."""
    return Config(**({"width": 1, "latent_dim": 4, "batch_size": 6, "precision": "fp32"} | changes))


def seen(real: Verdict, fake: Verdict, labels: Tensor) -> Seen:
    """What a loss reads."""
    none = torch.empty(0)
    return Seen(none, real, fake, labels, none, None, Config(), 1.0)


# ------------------------------------------------------------------------------- feature matching


def test_feature_matching_is_the_squared_distance_of_the_mean_features():
    real, fake = torch.randn(5, 3, 4, 4) + 1, torch.randn(7, 3, 4, 4)
    expected = 0.0
    for place in np.ndindex(3, 4, 4):
        means = [sum(float(x[place]) for x in f) / len(f) for f in (real, fake)]
        expected += (means[0] - means[1]) ** 2
    none = torch.empty(0)
    ours = g_matching(seen(Verdict(none, real, none), Verdict(none, fake, none), none))
    assert float(ours) == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_what_is_matched_stands_before_split_norm_which_makes_means_equal():
    torch.manual_seed(0)
    D, x = Discriminator(2, "paper"), torch.rand(12, 3, 64, 64) * 2 - 1
    x[6:] *= 0.1  # as fakes that are pale
    seen: list[Tensor] = []
    D.convs[-1].register_forward_hook(lambda _, inputs, out: seen.append(out.clone()))
    normed: list[Tensor] = []
    D.norms[-1].register_forward_hook(lambda _, inputs, out: normed.append(out.clone()))
    features = D(x, 6).features
    assert torch.equal(features, seen[0])
    for values, equal in ((features, False), (normed[0], True)):
        real, fake = (part.mean((0, 2, 3)) for part in values.split(6))
        assert torch.allclose(real, fake, atol=1e-5) is equal


def test_with_matching_g_is_shown_reals_and_its_loss_reads_no_logit(dogs):
    trainer, shown = Trainer(small(loss="matching"), dogs, CPU), []
    trainer.D.register_forward_pre_hook(lambda _, inputs: shown.append(inputs))
    head = trainer.D.head.weight
    reals, labels, z = trainer.batches.draw()
    loss, _ = trainer.g_objective(trainer.show(reals, trainer.G(z), labels))
    images, num_real, _ = shown[0]
    assert torch.equal(images[:num_real], reals) and num_real == len(reals)
    assert torch.autograd.grad(loss, [head], allow_unused=True) == (None,)
    weights = list(trainer.G.parameters())
    assert max(float(g.abs().max()) for g in torch.autograd.grad(loss, weights)) > 0


# ------------------------------------------------------------------------ minibatch discrimination


def likeness(m: list[list[list[float]]]) -> list[list[float]]:
    """o(x_i)_b of the paper, of M of each image, by four loops."""
    out = []
    for mine in m:
        row = [0.0] * len(mine)
        for theirs in m:
            for b in range(len(mine)):
                row[b] += math.exp(-sum(abs(p - q) for p, q in zip(mine[b], theirs[b])))
        out.append(row)
    return out


@settings(max_examples=25)
@given(
    num_real=st.integers(0, 5), num_fake=st.integers(0, 5), kernels=st.integers(1, 4),
    numbers=st.integers(1, 5), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_minibatch_features_are_the_papers_sums_of_reals_and_of_fakes_apart(
    num_real, num_fake, kernels, numbers, seed
):
    torch.manual_seed(seed)
    layer = MinibatchDiscrimination(6, kernels, numbers)
    f = torch.randn(num_real + num_fake, 6)
    m = (f @ layer.project.weight.T).view(-1, kernels, numbers).tolist()
    expected = likeness(m[:num_real]) + likeness(m[num_real:])
    ours = layer(f, num_real)
    assert ours.shape == (num_real + num_fake, kernels)
    torch.testing.assert_close(ours, torch.tensor(expected).view_as(ours), rtol=1e-4, atol=1e-5)


@pytest.fixture(params=["own head", "classes"])
def watchful(request: pytest.FixtureRequest) -> Discriminator:
    """A D with minibatch features that count, with a logit of its own or of K + 1 classes."""
    torch.manual_seed(0)
    classes = 5 if request.param == "classes" else 0
    D = Discriminator(2, "paper", classes=classes, minibatch_features=4)
    nn.init.normal_(D.likeness)
    return D


@torch.no_grad()
def test_a_reals_logit_knows_the_other_reals_and_no_fake(watchful):
    images = torch.rand(9, 3, 64, 64) * 2 - 1
    before = watchful(images, 5).logits
    others, collapsed = images.clone(), images.clone()
    others[5:] = torch.rand(4, 3, 64, 64)
    collapsed[1:5] = images[1]
    assert torch.equal(watchful(others, 5).logits[:5], before[:5])
    assert not torch.allclose(watchful(others, 5).logits[5:], before[5:])
    assert not torch.allclose(watchful(collapsed, 5).logits[:5], before[:5])
    alone = watchful(images[5:], 0).logits  # as in G's step
    torch.testing.assert_close(alone, before[5:], rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------------- K + 1 classes


@torch.no_grad()
def test_the_logit_of_k_classes_is_their_log_sum_exp_and_its_sigmoid_the_softmax_of_k_plus_1():
    torch.manual_seed(0)
    said = Discriminator(2, "paper", classes=5)(torch.rand(6, 3, 64, 64), 3)
    assert said.classes.shape == (6, 5) and said.logits.shape == (6,)
    for logit, row in zip(said.logits.tolist(), said.classes.double().tolist()):
        assert logit == pytest.approx(math.log(sum(math.exp(v) for v in row)), abs=1e-5)
        chances = torch.tensor([*row, 0.0]).softmax(0)  # the last class is "fake"
        assert 1 / (1 + math.exp(-logit)) == pytest.approx(1 - float(chances[-1]), abs=1e-6)


def test_only_dogs_whose_breed_is_known_are_told_apart_and_none_of_them_costs_nothing():
    classes = torch.randn(4, 3, requires_grad=True)
    verdict = Verdict(classes[:, 0], classes, classes)
    loss = classify_reals(seen(verdict, verdict, torch.tensor([2, UNKNOWN, 0, UNKNOWN])))
    rows = [np.exp(classes[k].detach().double().numpy()) for k in (0, 2)]
    expected = -(math.log(rows[0][2] / rows[0].sum()) + math.log(rows[1][0] / rows[1].sum())) / 2
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    nothing = classify_reals(seen(verdict, verdict, torch.full((4,), UNKNOWN)))
    (gradient,) = torch.autograd.grad(nothing, [classes])
    assert float(nothing.detach()) == 0 and not gradient.any()


def test_of_k_plus_1_classes_g_is_told_none_and_has_no_term(dogs):
    trainer = Trainer(small(**CLASSES, minibatch_features=2), dogs, CPU)
    assert trainer.G.breeds == 0 and trainer.D.projection is None
    assert trainer.D.head.out_channels == len(dogs.breeds) + 1  # and "fake"
    assert list(trainer.d_objective.terms) == ["d_loss", "d_classify"]
    assert list(trainer.g_objective.terms) == ["g_loss"]


def test_the_labelled_share_is_fixed_by_the_seed_and_grows_by_adding(dogs):
    def known(share: float, seed: int = 0) -> Tensor:
        breed = Trainer(small(**CLASSES, labelled=share, seed=seed), dogs, CPU).batches.breed
        told = breed != UNKNOWN
        assert torch.equal(breed[told], dogs.breed[told])
        return told

    few, more = known(0.3), known(0.7)
    assert 0.15 < few.float().mean() < 0.45 and 0.55 < more.float().mean() < 0.85
    assert (
        (more[few]).all() and torch.equal(few, known(0.3)) and not torch.equal(few, known(0.3, 1))
    )
    assert known(1.0).all() and not known(0.0).any()


# ----------------------------------------------------------------------------- virtual batch norm


def test_virtual_norms_statistics_are_the_references_and_in_a_share_the_images_own():
    torch.manual_seed(0)
    n, norm, x = 3, VirtualBatchNorm2d(2, 3), 2 * torch.randn(5, 2, 4, 4) + 7
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    out, rows = norm(x, None), x.double().numpy()
    for i in range(5):
        for c in range(2):
            mean, square = rows[:n, c].mean(), (rows[:n, c] ** 2).mean()
            if i >= n:
                mean = (n * mean + rows[i, c].mean()) / (n + 1)
                square = (n * square + (rows[i, c] ** 2).mean()) / (n + 1)
            plain = (rows[i, c] - mean) / np.sqrt(square - mean**2 + 1e-5)
            expected = plain * float(norm.weight[c].detach()) + float(norm.bias[c].detach())
            np.testing.assert_allclose(out[i, c].detach().numpy(), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_image_depends_on_its_latent_and_the_reference_batch_alone():
    torch.manual_seed(0)
    G, z = Generator(4, 2, "paper", reference=6), torch.randn(8, 4)
    for training in (True, False):
        G.train(training)
        images = G(z)
        for k in range(8):
            torch.testing.assert_close(G(z[k : k + 1])[0], images[k], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(images[0], images[1], atol=1e-2)
    G.reference.normal_()
    assert not torch.allclose(G(z), images, atol=1e-2)


def test_virtual_norms_of_an_averaged_g_need_no_estimation_and_its_file_loads_again(
    tmp_path, monkeypatch
):
    out, changes = tmp_path / "out", {"g_norm": "virtual", "average": "ema", "images": 5}
    assert run_here(out, steps=6, **changes) == 0
    first = sha(out / "images.zip")
    state = load(out / "generator.pt")
    G = Generator(**state["shape"])
    G.load_state_dict(state["state_dict"])
    tensors = load(out / "checkpoint.pt")["trainer"]["tensors"]
    assert torch.equal(G.reference, tensors["G.reference"]) and len(G.reference) == 8
    before = {k: v.clone() for k, v in G.state_dict().items()}
    monkeypatch.setattr(Generator, "forward", None)  # nothing is drawn for it
    assert estimate_norms(G, 4, seed=0) is G and not G.training
    assert all(torch.equal(v, before[k]) for k, v in G.state_dict().items())
    monkeypatch.undo()
    assert run_here(out, "--sample-only", images=5, data=None) == 0
    assert sha(out / "images.zip") == first


def test_the_reference_is_counted_as_the_second_pass_of_g_that_it_is():
    plain, virtual = (flops_per_image(small(width=8, g_norm=n)) for n in ("batch", "virtual"))
    G = Generator(4, 8)
    sides = (1, 4, 8, 16, 16, 32, 32)  # of what each layer is given
    macs = [conv.weight.numel() * side**2 for conv, side in zip(G.convs, sides, strict=True)]
    # Forward, and both gradients but that of the latents.
    assert virtual - plain == pytest.approx(2 * (3 * sum(macs) - macs[0]), rel=1e-3)


# --------------------------------------------------------------------------- historical averaging


def test_history_is_the_squared_distance_to_the_mean_of_all_weights_up_to_now(dogs):
    trainer = Trainer(small(history=0.3), dogs, CPU)
    kept, told = {"d": [], "g": []}, {"d": [], "g": []}
    for step in range(5):
        for name, network in (("d", trainer.D), ("g", trainer.G)):
            weights = [p.detach().double().clone() for p in network.parameters()]
            kept[name].append(weights)
            means = [sum(past) / (step + 1) for past in zip(*kept[name])]
            gaps = [float((w - m).square().sum()) for w, m in zip(weights, means)]
            told[name].append(sum(gaps))
        trainer.step(0.0)
        stats = trainer.read_stats()
        for name in "dg":
            assert stats[f"{name}_history"] == pytest.approx(told[name][-1], rel=1e-3, abs=1e-9)
    assert told["d"][-1] > told["d"][0] == 0
    for name, network in (("d", trainer.D), ("g", trainer.G)):
        for k, past in enumerate(zip(*kept[name])):
            ours = trainer.tensors()[f"{name}_history.mean_{k}"]
            torch.testing.assert_close(ours.double(), sum(past) / 5, rtol=1e-5, atol=1e-7)


def test_the_gradient_of_history_is_twice_the_way_back():
    network = nn.Linear(3, 2)
    term, weights = HistoricalAverage(network), list(network.parameters())
    term(None)
    with torch.no_grad():
        for weight in weights:
            weight.add_(1.0)  # the mean of now and before lies 0.5 behind
    loss = term(None)
    assert float(loss.detach()) == pytest.approx(8 * 0.25)
    for gradient in torch.autograd.grad(loss, weights):
        torch.testing.assert_close(gradient, torch.full_like(gradient, 2 * 0.5))
    assert list(term.parameters()) == []  # the weights stay the network's own


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_in_two_parts_writes_the_bytes_of_one_in_one(precision, tmp_path, monkeypatch):
    monkeypatch.setattr(train_dogs, "NORM_BATCHES", 1)
    changes = {**ALL, "precision": precision, "average": "ema", "swa_start": 1.0}
    changes |= {"images": 9, "batch_size": 3}
    for out, parts in (("whole", [20]), ("parts", [9, 20])):
        for steps in parts:
            assert run_here(tmp_path / out, steps=steps, **changes) == 0
    whole, parts = (load(tmp_path / n / "checkpoint.pt")["trainer"] for n in ("whole", "parts"))
    assert int(whole["tensors"]["d_history.count"]) == 20
    ours, theirs = whole["tensors"], parts["tensors"]
    # The sums of what is logged begin anew whenever a line is written.
    assert [k for k in ours if k != "sums" and not torch.equal(ours[k], theirs[k])] == []
    assert sha(tmp_path / "whole/images.zip") == sha(tmp_path / "parts/images.zip")


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--condition", "classes"], ("--classify",)),
        (["--labelled", "0.5"], ("--condition classes",)),
        (["--labelled", "0.5", "--condition", "breed"], ("--condition classes",)),
        (["--g-norm", "virtual", "--condition", "breed"], ("--g-norm", "--condition")),
    ],
    ids=lambda words: " ".join(words),
)
def test_what_does_not_go_together_is_refused(words, parts, tmp_path, capsys):
    assert train_dogs.main(["--out", str(tmp_path / "out"), *words]) == 2
    assert_one_sentence(capsys.readouterr().err, *parts)
