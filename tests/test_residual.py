"""The residual networks of preset second-private: spectral norm, blocks, attention, one step.

Oracles: sums written out by hand, singular values by SVD, networks and a step in plain tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from runs import SAMPLE, assert_one_sentence, run_here, sha
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

import train_dogs
from train_dogs import (
    PRESETS,
    Config,
    CropSet,
    NonLocalBlock,
    ResidualDiscriminator,
    ResidualGenerator,
    SpectralNorm,
    Trainer,
    build_networks,
    draw_latents,
    find_photos,
    load_trainer,
    make_generator,
    prepare_crops,
    sample_images,
    trainer_state,
    training_tensors,
)

pytestmark = pytest.mark.usefixtures("light")

CPU = torch.device("cpu")
PRESET = Config(**PRESETS["second-private"])


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
    """The preset, narrow enough to train in milliseconds."""
    tiny = {"width": 2, "latent_dim": 12, "batch_size": 6, "precision": "fp32"}
    return replace(PRESET, **(tiny | changes))


def spectral_layers(network: nn.Module) -> dict[str, nn.Module]:
    """The layers whose weight is spectrally normalised, by name."""
    return {name: m for name, m in network.named_modules() if is_parametrized(m)}


def largest(weight: Tensor) -> float:
    """The largest singular value of a weight, as a matrix with a row for each output."""
    return float(torch.linalg.svdvals(weight.detach().flatten(1).double())[0])


def largest_singular_values(network: nn.Module) -> dict[str, float]:
    """That of each weight as a forward in eval mode uses it: 1 where its norm is right."""
    network = copy.deepcopy(network).eval()
    return {name: largest(layer.weight) for name, layer in spectral_layers(network).items()}


# ------------------------------------------------------------------------------- shapes and counts


@pytest.mark.parametrize(("width", "latent_dim", "breeds"), [(1, 7, 0), (2, 12, 120)])
def test_g_makes_images_and_can_be_made_again_and_d_a_verdict_on_each(width, latent_dim, breeds):
    G = ResidualGenerator(latent_dim, width, breeds)
    D = ResidualDiscriminator(width, breeds, classify=breeds > 0)
    z, labels = torch.randn(4, latent_dim), torch.arange(4) % max(1, breeds)
    images = G(z, labels)
    assert images.shape == (4, 3, 64, 64) and images.abs().max() <= 1
    verdict = D(images, 2, labels)
    assert verdict.logits.shape == (4,) and verdict.classes.shape == (4, breeds)
    assert verdict.features.shape == (4, 8 * width, 4, 4) and verdict.features.min() >= 0
    twin = make_generator(G.constructor)
    assert type(twin) is type(G) and twin.constructor == G.constructor
    twin.load_state_dict(G.state_dict())
    torch.testing.assert_close(twin.eval()(z, labels), G.eval()(z, labels))


def conv(source: int, target: int, kernel: int) -> int:
    """The weights of a convolution without bias."""
    return source * target * kernel**2


# At width 64: channels before and after the blocks.
UP = ((512, 512), (512, 256), (256, 128), (128, 64))
DOWN = ((3, 64), (64, 128), (128, 256), (256, 512))


def test_the_parameters_at_width_64_are_those_counted_by_hand():
    G, D = build_networks(PRESET, CPU, 120)
    code = 20 + 32  # a piece of z and the embedding
    g = 120 * 32 + 20 * 4 * 4 * 512 + 2 * 64 + conv(64, 3, 3)  # embedding, linear, last norm, rgb
    for a, b in UP:
        g += code * 2 * (a + b) + conv(a, b, 3) + conv(b, b, 3) + conv(a, b, 1)
    g += 2 * conv(128, 16, 1) + 2 * conv(128, 64, 1) + 1
    d = 512 + 120 * 512 + 120 * 512  # logit, projection, classifier
    for a, b in DOWN:
        d += conv(a, b, 3) + conv(b, b, 3) + conv(a, b, 1)
    d += 2 * conv(64, 8, 1) + 2 * conv(64, 32, 1) + 1
    assert sum(p.numel() for p in G.parameters()) == g == 7_911_489
    assert sum(p.numel() for p in D.parameters()) == d == 4_984_193


# ---------------------------------------------------------------------------------- spectral norm


def test_all_weights_but_gs_embedding_are_spectrally_normalised_and_begin_orthogonal():
    for network, count in zip(build_networks(small(), CPU, 6), (26, 19)):
        layers = spectral_layers(network)
        assert len(layers) == count
        for layer in layers.values():
            values = torch.linalg.svdvals(layer.parametrizations.weight.original.flatten(1))
            torch.testing.assert_close(values, torch.ones_like(values))
        others = [k for k, p in network.named_parameters() if p.dim() > 1 and "original" not in k]
        assert others == (["embedding.weight"] if isinstance(network, ResidualGenerator) else [])


def test_in_40_steps_the_norms_stay_near_those_of_an_svd_and_settling_finds_them(dogs):
    """One power iteration a forward follows weights that move with a delay."""
    trainer = Trainer(small(batch_size=2, g_lr=1e-3, d_lr=1e-3), dogs, CPU)
    for _ in range(40):
        trainer.step(0.0)
    networks = (trainer.G, trainer.D)
    assert max(largest(raw(m)) for n in networks for m in spectral_layers(n).values()) > 1.1
    off = sorted(abs(v - 1) for n in networks for v in largest_singular_values(n).values())
    assert off[len(off) // 2] < 0.01 and off[-1] < 0.1
    trainer.G.settle()
    assert all(abs(v - 1) < 0.01 for v in largest_singular_values(trainer.G).values())


def raw(layer: nn.Module) -> Tensor:
    """A layer's trained weight, before its norm is divided out."""
    return layer.parametrizations.weight.original


def test_an_averaged_g_is_divided_by_the_norms_of_its_own_weights_and_keeps_them(dogs):
    trainer, other = (Trainer(small(seed=seed), dogs, CPU) for seed in (0, 1))
    torch._foreach_lerp_(trainer.averages.ema, list(other.G.parameters()), 0.5)
    before = trainer_state(trainer)["tensors"]
    G = trainer.averages.generator(trainer.G, "ema", 2, trainer.config)
    assert all(abs(v - 1) < 0.01 for v in largest_singular_values(G).values())
    for average, weight in zip(trainer.averages.ema, G.parameters(), strict=True):
        assert torch.equal(average, weight)
    unsettled = copy.deepcopy(trainer.G)
    for target, source in zip(unsettled.parameters(), trainer.averages.ema):
        target.data.copy_(source)
    assert max(abs(v - 1) for v in largest_singular_values(unsettled).values()) > 0.2
    after = training_tensors(trainer)
    assert all(torch.equal(before[name], after[name]) for name in before)  # it was a copy

    G.train()
    G.settle()
    buffers = {k: b.clone() for k, b in G.named_buffers()}
    G(torch.randn(4, 12), torch.arange(4))  # as when the norms' statistics are estimated
    moved = {k for k, b in G.named_buffers() if not torch.equal(b, buffers[k])}
    vectors = {k for k in buffers if k.endswith(".weight.0.v")}
    assert len(vectors) == 26 and "norm.running_mean" in moved and not moved & vectors


def test_the_power_iteration_is_one_a_forward_and_in_float32_under_autocast_too(dogs):
    weight = torch.randn(8, 4, 3, 3)
    norm = SpectralNorm(weight)
    twin = copy.deepcopy(norm)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = norm(weight)
    assert torch.equal(under_autocast, twin(weight)) and torch.equal(norm.v, twin.v)
    trainer, calls = Trainer(small(precision="bf16"), dogs, CPU), []
    for network in (trainer.G, trainer.D):
        for layer in spectral_layers(network).values():
            layer.parametrizations.weight[0].register_forward_hook(lambda *_: calls.append(1))
    trainer.step(0.0)
    assert len(calls) == 26 + 2 * 19


@torch.no_grad()
def test_ds_products_with_sums_over_16_places_are_in_float32_under_autocast():
    _, D = build_networks(small(), CPU, 6)
    labels = torch.arange(6)
    with torch.autocast("cpu", torch.bfloat16):
        logits, features, classes = D(torch.rand(6, 3, 64, 64), 3, labels)
    assert features.dtype == torch.bfloat16
    pooled = features.float().sum((2, 3))
    D.eval()
    expected = pooled @ D.linear.weight[0] + (D.projection.weight[labels] * pooled).sum(1)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(classes, pooled @ D.classifier.weight.T, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------- the pieces


def test_the_non_local_block_begins_as_the_identity_and_learns_from_there():
    block, x = NonLocalBlock(16), torch.randn(2, 16, 8, 8)
    assert torch.equal(block(x), x)
    (slope,) = torch.autograd.grad(block(x).square().sum(), block.gain)
    assert float(slope.abs()) > 0


def test_an_image_depends_on_its_own_latent_and_breed_alone_and_on_all_of_them():
    config = small()
    G, _ = build_networks(config, CPU, 6)
    train_dogs.estimate_norms(G, 1, config)
    z, breeds = draw_latents(128, config, "sheet"), torch.arange(128) % 6
    (images,) = sample_images(G, z, breeds)
    others, other_breeds = draw_latents(128, config, "submission"), breeds.flip(0)
    others[7], other_breeds[7] = z[7], breeds[7]
    assert (next(sample_images(G, others, other_breeds))[7] == images[7]).all()
    for piece in range(5):
        changed = z.clone()
        changed[7].tensor_split(5)[piece].neg_()
        assert (next(sample_images(G, changed, breeds))[7] != images[7]).any()
    assert (next(sample_images(G, z, (breeds + 1) % 6))[7] != images[7]).any()


def test_a_latent_too_short_to_be_split_into_five_is_refused(tmp_path, capsys):
    assert run_here(tmp_path / "out", preset="second-private", latent_dim=4) == 2
    assert_one_sentence(capsys.readouterr().err, "--latent-dim 5", "into 5")


# -------------------------------------------------------------------------------- one step, plainly


class Plain:
    """The weights of a network as plain tensors, each divided by its norm anew in every forward."""

    def __init__(self, network: nn.Module) -> None:
        self.state = {k: v.detach().clone() for k, v in network.state_dict().items()}
        self.names = [k for k, _ in network.named_parameters()]
        for name in self.names:
            self.state[name].requires_grad_()

    def parameters(self) -> list[Tensor]:
        """What is trained, in the order of the network's."""
        return [self.state[name] for name in self.names]

    def begin(self) -> None:
        """One power iteration for each weight."""
        self.weights = {}
        for name in self.names:
            layer, found, _ = name.partition(".parametrizations.weight.original")
            if not found:
                continue
            matrix = self.state[name].flatten(1)
            v = self.state[f"{layer}.parametrizations.weight.0.v"]
            with torch.no_grad():
                u = matrix @ v / (matrix @ v).norm()
                v = matrix.T @ u / (matrix.T @ u).norm()
            self.state[f"{layer}.parametrizations.weight.0.v"] = v
            self.weights[layer] = self.state[name] / (u @ matrix @ v)

    def attend(self, x: Tensor, name: str) -> Tensor:
        """The non-local block of this name."""
        w = {n: self.weights[f"{name}.{n}"] for n in ("query", "key", "value", "out")}
        query = F.conv2d(x, w["query"]).flatten(2)
        key, value = (F.max_pool2d(F.conv2d(x, w[n]), 2).flatten(2) for n in ("key", "value"))
        share = torch.einsum("nkq,nkp->nqp", query, key).exp()
        share = share / share.sum(2, keepdim=True)
        seen = torch.einsum("nqp,nvp->nvq", share, value).reshape(len(x), -1, 32, 32)
        return x + self.state[f"{name}.gain"] * F.conv2d(seen, w["out"])

    def normed(self, x: Tensor, name: str, code: Tensor) -> Tensor:
        """The conditional norm."""
        x = (x - x.mean((0, 2, 3), True)) / (x.var((0, 2, 3), False, keepdim=True) + 1e-5).sqrt()
        affine = code @ self.weights[f"{name}.affine"].T
        gain, bias = affine[:, : x.shape[1]], affine[:, x.shape[1] :]
        return x * (1 + gain[:, :, None, None]) + bias[:, :, None, None]

    def generate(self, z: Tensor, labels: Tensor) -> Tensor:
        """A G of the author's order: doubled first, then convolved, in both branches."""
        self.begin()
        first, *pieces = torch.split(z, z.shape[1] // 5, 1)
        x = (first @ self.weights["linear"].T).reshape(len(z), -1, 4, 4)
        for k, piece in enumerate(pieces):
            code = torch.cat([piece, self.state["embedding.weight"][labels]], 1)
            block, w = f"blocks.{k}", self.weights
            h = F.relu(self.normed(x, f"{block}.norm1", code))
            h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
            h = F.conv2d(h, w[f"{block}.conv1"], padding=1)
            h = F.conv2d(
                F.relu(self.normed(h, f"{block}.norm2", code)), w[f"{block}.conv2"], None, 1, 1
            )
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            x = h + F.conv2d(x, w[f"{block}.shortcut"])
            x = self.attend(x, "non_local") if k == 2 else x
        x = F.batch_norm(x, None, None, self.state["norm.weight"], self.state["norm.bias"], True)
        return F.conv2d(F.relu(x), self.weights["to_rgb"], padding=1).tanh()

    def judge(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """A D of the author's order: logits of being real, and of the breeds."""
        self.begin()
        for k in (0, 2, 3, 4):
            block, w = f"blocks.{k}", self.weights
            h = F.conv2d(F.relu(x) if k else x, w[f"{block}.conv1"], padding=1)
            h = F.conv2d(F.relu(h), w[f"{block}.conv2"], padding=1)
            x = F.avg_pool2d(h, 2) + F.avg_pool2d(F.conv2d(x, w[f"{block}.shortcut"]), 2)
            x = self.attend(x, "blocks.1") if k == 0 else x
        h = F.relu(x).sum((2, 3))
        logits = h @ self.weights["linear"][0] + (self.weights["projection"][labels] * h).sum(1)
        return logits, h @ self.weights["classifier"].T


@pytest.mark.usefixtures("double")
def test_one_step_is_the_loop_written_out(dogs):
    """Relativistic least squares and 0.1 of the cross-entropy, of reals in D and of fakes in G."""
    config = small(latent_dim=20, width=2)
    trainer, twin = (Trainer(config, dogs, CPU) for _ in range(2))
    for block in (trainer.G.non_local, trainer.D.blocks[1]):
        block.gain.data.fill_(0.5)
    G, D = Plain(trainer.G), Plain(trainer.D)
    adams = [
        torch.optim.Adam(n.parameters(), lr, betas=(0.0, 0.999), fused=False)
        for n, lr in ((G, 2e-4), (D, 8e-4))
    ]
    twin.batches.shuffle()
    reals, labels, z = twin.batches.draw()
    assert reals.dtype == torch.float64  # by its noise

    fakes = G.generate(z, labels)
    both, twice = torch.cat([reals, fakes.detach()]), torch.cat([labels, labels])
    logits, classes = D.judge(both, twice)
    r, f = logits[:6], logits[6:]
    rals = (((r - f.mean() - 1) ** 2).mean() + ((f - r.mean() + 1) ** 2).mean()) / 2
    breeds = -classes[:6].log_softmax(1)[torch.arange(6), labels].mean()
    slopes = torch.autograd.grad(rals + 0.1 * breeds, D.parameters())
    for p, slope in zip(D.parameters(), slopes):
        p.grad = slope
    adams[1].step()

    logits, classes = D.judge(torch.cat([reals, fakes]), twice)
    r, f = logits[:6], logits[6:]
    g_rals = (((r - f.mean() + 1) ** 2).mean() + ((f - r.mean() - 1) ** 2).mean()) / 2
    g_breeds = -classes[6:].log_softmax(1)[torch.arange(6), labels].mean()
    slopes = torch.autograd.grad(g_rals + 0.1 * g_breeds, G.parameters())
    for p, slope in zip(G.parameters(), slopes):
        p.grad = slope
    adams[0].step()

    trainer.step(0.0)
    losses = trainer.read_stats()
    expected = {"d_loss": rals, "d_classify": breeds, "g_loss": g_rals, "g_classify": g_breeds}
    for name, value in expected.items():
        assert losses[name] == pytest.approx(float(value.detach()), rel=1e-9)
    for plain, network in ((G, trainer.G), (D, trainer.D)):
        for name in (*plain.names, *(k for k in plain.state if k.endswith(".weight.0.v"))):
            torch.testing.assert_close(network.state_dict()[name], plain.state[name].detach())


# ---------------------------------------------------------------------------------- saved states


def test_a_saved_trainer_continues_bit_for_bit(dogs):
    through, first, resumed = (Trainer(small(seed=seed), dogs, CPU) for seed in (0, 0, 1))
    for trainer, steps in ((through, 4), (first, 2)):
        for _ in range(steps):
            trainer.step(0.0)
    assert load_trainer(resumed, trainer_state(first))
    resumed.step(0.0), resumed.step(0.0)
    ours, theirs = training_tensors(resumed), training_tensors(through)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert len([name for name in theirs if name.endswith(".weight.0.v")]) == 26 + 19


def test_the_zip_is_written_again_from_generator_pt_and_of_other_latents_or_one_breed(
    dogs, tmp_path, monkeypatch
):
    monkeypatch.setattr(train_dogs, "NORM_BATCHES", 1)
    config = small(out=str(tmp_path), images=4)
    train_dogs.submit(Trainer(config, dogs, CPU))
    written = sha(tmp_path / "images.zip")
    for words, same in (
        ("--sample-only", True),
        ("--breed Drawn_spitz", False),
        ("--sample-only --truncation 0.5", False),
    ):
        assert train_dogs.main([*words.split(), "--out", str(tmp_path)]) == 0
        assert (sha(tmp_path / "images.zip") == written) is same
