"""The techniques of Salimans et al. 2016, each against its formula in slow plain Python."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import SAMPLE, load, run_here, sha
from torch import Tensor, nn

import train_dogs
from train_dogs import (
    UNKNOWN,
    Config,
    CropSet,
    Discriminator,
    HistoricalAverage,
    MinibatchDiscrimination,
    Seen,
    Trainer,
    Verdict,
    VirtualBatchNorm2d,
    VirtualGenerator,
    build_networks,
    classify_reals,
    estimate_norms,
    find_photos,
    g_matching,
    make_generator,
    prepare_crops,
    training_tensors,
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


def discriminator(**changes: object) -> Discriminator:
    """A small D for five breeds."""
    return build_networks(small(width=2, architecture="paper", **changes), CPU, 5)[1]


def seen(real: Verdict, fake: Verdict, labels: Tensor) -> Seen:
    """What a loss reads."""
    none = torch.empty(0)
    return Seen(none, none, none, real, fake, labels, Config(), 1.0)


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
def test_features_are_taken_before_split_norm_which_makes_their_means_equal():
    D, x = discriminator(), torch.rand(12, 3, 64, 64) * 2 - 1
    x[6:] *= 0.1  # as fakes that are pale
    outputs: list[Tensor] = []
    for module in (D.convs[-1], D.norms[-1]):
        module.register_forward_hook(lambda _, inputs, out: outputs.append(out.clone()))
    features = D(x, 6).features
    assert torch.equal(features, outputs[0])
    for values, equal in ((features, False), (outputs[1], True)):
        real, fake = (part.mean((0, 2, 3)) for part in values.split(6))
        assert torch.allclose(real, fake, atol=1e-5) is equal


def test_with_matching_gs_loss_reads_no_logit(dogs):
    trainer = Trainer(small(loss="matching"), dogs, CPU)
    reals, labels, z = trainer.batches.draw()
    loss, _ = trainer.g_objective(trainer.judge(reals, trainer.G(z), labels, trainer.opt_g))
    weights = [trainer.D.linear.weight, *trainer.G.parameters()]
    of_logit, *others = torch.autograd.grad(loss, weights, allow_unused=True)
    assert of_logit is None and max(float(g.abs().max()) for g in others) > 0


# ------------------------------------------------------------------------ minibatch discrimination


def similarity(m: list[list[list[float]]]) -> list[list[float]]:
    """o(x_i)_b of the paper, of M of each image, by four loops."""
    out = []
    for mine in m:
        row = [0.0] * len(mine)
        for theirs in m:
            for b in range(len(mine)):
                row[b] += math.exp(-sum(abs(p - q) for p, q in zip(mine[b], theirs[b])))
        out.append(row)
    return out


@settings(max_examples=20)
@given(
    num_real=st.integers(0, 5), num_fake=st.integers(0, 5), kernels=st.integers(1, 4),
    outputs=st.integers(1, 3), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_minibatch_features_are_the_papers_sums_over_reals_and_over_fakes(
    num_real, num_fake, kernels, outputs, seed
):
    """Each output adds its weighted sum of them to what D's linear layer makes."""
    torch.manual_seed(seed)
    head = MinibatchDiscrimination(6, outputs, kernels)
    nn.init.normal_(head.weight)
    x, first = torch.randn(num_real + num_fake, 6, 4, 4), torch.randn(num_real + num_fake, outputs)
    m = (x.mean((2, 3)) @ head.project.weight.T).view(-1, kernels, 5).tolist()
    o = torch.tensor(similarity(m[:num_real]) + similarity(m[num_real:])).view(-1, kernels)
    verdict = head(Verdict(first[:, 0], x, first[:, 1:]), x, num_real, None)
    ours = torch.cat([verdict.logits[:, None], verdict.classes], 1)
    torch.testing.assert_close(ours, first + o @ head.weight.T, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_their_weighted_sum_is_in_float32_under_autocast():
    head, outputs = MinibatchDiscrimination(6, 3, 4), []
    nn.init.normal_(head.weight)
    head.project.register_forward_hook(lambda _, inputs, out: outputs.append(out.float()))
    x, none = torch.randn(5, 6, 4, 4), torch.zeros(5, 3)
    with torch.autocast("cpu", torch.bfloat16):
        verdict = head(Verdict(none[:, 0], x, none[:, 1:]), x, 5, None)
    o = torch.tensor(similarity(outputs[0].view(5, 4, 5).tolist()))
    torch.testing.assert_close(verdict.logits, o @ head.weight[0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_reals_logit_depends_on_the_other_reals_and_on_no_fake():
    D = discriminator(minibatch_features=4, **CLASSES)
    images = torch.rand(9, 3, 64, 64) * 2 - 1
    nn.init.normal_(D.heads[0].weight)
    before = D(images, 5).logits
    others, collapsed = images.clone(), images.clone()
    others[5:] = torch.rand(4, 3, 64, 64)
    collapsed[1:5] = images[1]
    assert torch.equal(D(others, 5).logits[:5], before[:5])
    assert not torch.allclose(D(others, 5).logits[5:], before[5:])
    assert not torch.allclose(D(collapsed, 5).logits[:1], before[:1])
    alone = D(images[5:], 0).logits  # as in G's update
    torch.testing.assert_close(alone, before[5:], rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------------- K + 1 classes


@torch.no_grad()
def test_the_logit_of_k_classes_is_their_log_sum_exp_and_its_sigmoid_the_softmax_of_k_plus_1():
    D, outputs = discriminator(**CLASSES), []
    D.linear.register_forward_hook(lambda _, inputs, out: outputs.append(out.flatten(1)))
    verdict = D(torch.rand(6, 3, 64, 64), 3)
    assert verdict.classes.shape == (6, 5) and verdict.logits.shape == (6,)
    for logit, classes, row in zip(*verdict[::2], outputs[0]):
        assert float(logit) == pytest.approx(
            math.log(sum(math.exp(v) for v in classes.tolist())), abs=1e-5
        )
        shares = row.double().softmax(0)  # the first class is "fake"
        assert 1 / (1 + math.exp(-logit)) == pytest.approx(1 - float(shares[0]), abs=1e-6)
        torch.testing.assert_close(classes.softmax(0), (shares[1:] / shares[1:].sum()).float())


def test_only_dogs_of_a_known_breed_are_classified_and_without_one_the_loss_is_0():
    classes = torch.randn(4, 3, requires_grad=True)
    verdict = Verdict(classes[:, 0], classes, classes)
    loss = classify_reals(seen(verdict, verdict, torch.tensor([2, UNKNOWN, 0, UNKNOWN])))
    rows = [np.exp(classes[k].detach().double().numpy()) for k in (0, 2)]
    expected = -(math.log(rows[0][2] / rows[0].sum()) + math.log(rows[1][0] / rows[1].sum())) / 2
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    nothing = classify_reals(seen(verdict, verdict, torch.full((4,), UNKNOWN)))
    (gradient,) = torch.autograd.grad(nothing, [classes])
    assert float(nothing.detach()) == 0 and not gradient.any()


def test_with_classes_g_is_unconditional_and_has_no_breed_term(dogs):
    trainer = Trainer(small(**CLASSES, minibatch_features=2), dogs, CPU)
    assert trainer.G.breeds == 0
    assert trainer.D.linear.out_channels == len(dogs.breeds) + 1  # and "fake"
    heads = ["MinibatchDiscrimination", "FakeClass"]
    assert [type(head).__name__ for head in trainer.D.heads] == heads
    assert list(trainer.d_objective.terms) == ["d_loss", "d_classify"]
    assert list(trainer.g_objective.terms) == ["g_loss"]


def test_the_labelled_share_is_fixed_by_the_seed_and_a_larger_one_contains_it(dogs):
    def known(share: float, seed: int = 0) -> Tensor:
        breed = train_dogs.hide_labels(dogs.breed, small(labelled=share, seed=seed))
        visible = breed != UNKNOWN
        assert torch.equal(breed[visible], dogs.breed[visible])
        return visible

    few, more = known(0.3), known(0.7)
    assert 0.15 < few.float().mean() < 0.45 and 0.55 < more.float().mean() < 0.85
    assert more[few].all() and torch.equal(few, known(0.3)) and not torch.equal(few, known(0.3, 1))
    assert known(1.0).all() and not known(0.0).any()
    batches = Trainer(small(**CLASSES, labelled=0.3), dogs, CPU).batches
    assert torch.equal(batches.breed != UNKNOWN, few)


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
    G, z = VirtualGenerator(4, 2, "paper", reference=6), torch.randn(8, 4)
    for training in (True, False):
        G.train(training)
        images = G(z)
        for k in range(8):
            torch.testing.assert_close(G(z[k : k + 1])[0], images[k], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(images[0], images[1], atol=1e-2)
    G.reference.normal_()
    assert not torch.allclose(G(z), images, atol=1e-2)


# --------------------------------------------------------------------------- historical averaging


def test_history_is_the_squared_distance_to_the_mean_of_all_weights_up_to_now(dogs):
    trainer = Trainer(small(history=0.3), dogs, CPU)
    kept, expected = {"d": [], "g": []}, {"d": [], "g": []}
    for step in range(5):
        for name, network in (("d", trainer.D), ("g", trainer.G)):
            weights = [p.detach().double().clone() for p in network.parameters()]
            kept[name].append(weights)
            means = [sum(past) / (step + 1) for past in zip(*kept[name])]
            gaps = [float((w - m).square().sum()) for w, m in zip(weights, means)]
            expected[name].append(sum(gaps))
        trainer.step(0.0)
        stats = trainer.read_stats()
        for name in "dg":
            assert stats[f"{name}_history"] == pytest.approx(expected[name][-1], rel=1e-3, abs=1e-9)
    assert expected["d"][-1] > expected["d"][0] == 0
    for name in "dg":
        ours = training_tensors(trainer)[f"{name}_history.mean"].double()
        means = [(sum(past) / 5).flatten() for past in zip(*kept[name])]
        torch.testing.assert_close(ours, torch.cat(means), rtol=1e-5, atol=1e-7)


def test_the_gradient_of_history_is_twice_the_way_back():
    network = nn.Linear(3, 2)
    term, weights = HistoricalAverage(network), list(network.parameters())
    term(None)
    with torch.no_grad():
        for weight in weights:
            weight.add_(1.0)  # the mean of now and before is 0.5 behind
    loss = term(None)
    assert float(loss.detach()) == pytest.approx(8 * 0.25)
    for gradient in torch.autograd.grad(loss, weights):
        torch.testing.assert_close(gradient, torch.full_like(gradient, 2 * 0.5))
    assert list(term.parameters()) == []  # the weights stay the network's own


# -------------------------------------------------------------------------------------- whole runs


def test_all_techniques_in_two_parts_write_the_bytes_of_one_and_the_generator_needs_no_estimation(
    tmp_path, monkeypatch
):
    """In fp16, whose loss scales are part of the state."""
    changes = {**ALL, "precision": "fp16", "average": "ema", "swa_start": 1.0, "batch_size": 3}
    changes |= {"architecture": "paper"}  # fewer layers
    for out, parts in (("whole", [10]), ("parts", [4, 10])):
        for steps in parts:
            assert run_here(tmp_path / out, steps=steps, images=9, **changes) == 0
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    ours, theirs = (load(p / "checkpoint.pt")["trainer"]["tensors"] for p in (whole, parts))
    assert int(ours["d_history.count"]) == 10
    # The sums of what is logged begin anew whenever a line is written.
    assert [k for k in ours if k != "sums" and not torch.equal(ours[k], theirs[k])] == []
    written = sha(whole / "images.zip")
    assert sha(parts / "images.zip") == written

    saved = load(whole / "generator.pt")
    G = make_generator(saved["generator"])
    G.load_state_dict(saved["state_dict"])
    assert torch.equal(G.reference, ours["G.reference"]) and len(G.reference) == 3
    before = {k: v.clone() for k, v in G.state_dict().items()}
    with monkeypatch.context() as patch:
        patch.setattr(VirtualGenerator, "forward", None)  # it cannot be called
        assert estimate_norms(G, 4, Config()) is G and not G.training
    assert all(torch.equal(v, before[k]) for k, v in G.state_dict().items())
    assert train_dogs.main(["--sample-only", "--out", str(whole)]) == 0
    assert sha(whole / "images.zip") == written
