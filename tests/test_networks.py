"""G, D, split batch norm and the losses, against ordinary batch norms, closed forms and counts."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from runs import light  # noqa: F401
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from train_dogs import (
    Config,
    Discriminator,
    Generator,
    SplitBatchNorm2d,
    build_networks,
    discriminator_loss,
    generator_loss,
    logit,
)

CPU = torch.device("cpu")
LAYOUTS = [torch.contiguous_format, torch.channels_last]

# ------------------------------------------------------------------------------- split batch norm


def split_and_ordinary(
    num_real: int, num_fake: int, channels: int, size: int, layout: torch.memory_format, seed: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients of input, weight and bias: by the split norm, and by forwards apart."""
    torch.manual_seed(seed)
    split, ordinary = SplitBatchNorm2d(channels), nn.BatchNorm2d(channels)
    with torch.no_grad():
        for norm in (split, ordinary):
            norm.weight.copy_(torch.linspace(-1.5, 2, channels))
            norm.bias.copy_(torch.linspace(1, -1, channels))
    # Two distributions far apart, so that shared statistics would show at once.
    reals = 3 * torch.randn(num_real, channels, size, size) + 5
    fakes = torch.randn(num_fake, channels, size, size) / 2 - 2
    x = torch.cat([reals, fakes]).contiguous(memory_format=layout).requires_grad_()
    weights = torch.randn_like(x)

    out = split(x, num_real)
    ours = [out, *torch.autograd.grad((out * weights).sum(), [x, split.weight, split.bias])]
    groups = [g for g in (x[:num_real], x[num_real:]) if len(g)]
    out = torch.cat([ordinary(g) for g in groups])
    theirs = [out, *torch.autograd.grad((out * weights).sum(), [x, ordinary.weight, ordinary.bias])]
    return [t.detach() for t in ours], [t.detach() for t in theirs]


@given(
    num_real=st.integers(0, 9),
    num_fake=st.integers(0, 9),
    channels=st.integers(1, 6),
    size=st.integers(1, 5),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 10**6),
)
def test_split_bn_equals_two_separate_forwards(num_real, num_fake, channels, size, layout, seed):
    assume(num_real + num_fake > 0)
    assume(all(n == 0 or n * size * size > 1 for n in (num_real, num_fake)))  # as nn.BatchNorm2d
    ours, theirs = split_and_ordinary(num_real, num_fake, channels, size, layout, seed)
    for name, a, b in zip(("output", "input", "weight", "bias"), ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("num_real", "num_fake"), [(32, 32), (5, 27), (0, 32), (32, 0), (1, 1)])
def test_split_bn_equals_two_separate_forwards_at_ds_own_size(layout, num_real, num_fake):
    ours, theirs = split_and_ordinary(num_real, num_fake, 24, 16, layout, 0)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)
    assert ours[0].shape == (num_real + num_fake, 24, 16, 16)


def test_split_bn_is_not_one_norm_of_the_mixed_batch():
    x = torch.cat([torch.randn(6, 3, 4, 4) + 5, torch.randn(6, 3, 4, 4)])
    split = SplitBatchNorm2d(3)(x, 6)
    assert split[:6].mean().abs() < 1e-5 and split[6:].mean().abs() < 1e-5
    mixed = nn.BatchNorm2d(3)(x)
    assert (split - mixed).abs().max() > 0.5
    assert torch.allclose(SplitBatchNorm2d(3)(x, 0), mixed, atol=1e-5)
    assert torch.allclose(SplitBatchNorm2d(3)(x, 12), mixed, atol=1e-5)


def test_split_bn_must_be_told_the_number_of_reals():
    x = torch.randn(4, 2, 3, 3)
    with pytest.raises(TypeError):
        SplitBatchNorm2d(2)(x)
    for wrong in (-1, 5):
        with pytest.raises(ValueError, match="num_real"):
            SplitBatchNorm2d(2)(x, wrong)


def test_split_bn_has_one_affine_pair_and_no_running_statistics():
    norm = SplitBatchNorm2d(7)
    assert {n: p.shape for n, p in norm.named_parameters()} == {"weight": (7,), "bias": (7,)}
    assert list(norm.buffers()) == []
    x = torch.randn(6, 7, 2, 2)
    assert torch.equal(norm.train()(x, 2), norm.eval()(x, 2))  # D has no eval mode of its own
    assert list(Discriminator(1).buffers()) == []


# --------------------------------------------------------------------------------- the networks


def parameters(network: nn.Module) -> int:
    """The number of trained numbers in a network."""
    return sum(p.numel() for p in network.parameters())


def gmacs(network: nn.Module, *inputs: object) -> float:
    """Multiply-adds of a forward in billions, by torch's counter on tensors without memory."""
    with FlopCounterMode(display=False) as counter:
        network(*inputs)
    return counter.get_total_flops() / 2e9


def test_g_and_d_at_width_48_have_the_size_of_the_model_they_follow():
    with torch.device("meta"):
        G, D = Generator(256, 48), Discriminator(48)
        assert round(parameters(G) / 1e6, 2) == 33.03
        assert round(parameters(D) / 1e6, 2) == 7.87
        assert round(gmacs(G, torch.empty(1, 256)), 2) == 1.90
        assert round(gmacs(D, torch.empty(1, 3, 64, 64), 1), 2) == 0.40


def test_the_layers_are_those_of_the_deeper_dcgan():
    with torch.device("meta"):
        G, D = Generator(256, 48), Discriminator(48)
    deconvs = [m for m in G.modules() if isinstance(m, nn.ConvTranspose2d)]
    assert [m.out_channels for m in deconvs] == [1536, 768, 384, 384, 192, 192, 96, 3]
    assert [m.kernel_size[0] for m in deconvs] == [4, 4, 4, 3, 4, 3, 4, 3]
    assert [m.stride[0] for m in deconvs] == [1, 2, 2, 1, 2, 1, 2, 1]
    assert [m.bias is not None for m in deconvs] == [False] * 7 + [True]
    assert sum(isinstance(m, nn.BatchNorm2d) for m in G.modules()) == 7
    convs = [m for m in D.modules() if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convs] == [96, 192, 192, 384, 384, 768, 1]
    assert [m.kernel_size[0] for m in convs] == [4, 4, 3, 4, 3, 4, 4]
    assert [m.stride[0] for m in convs][:6] == [2, 2, 1, 2, 1, 2]
    norms = [m for m in D.modules() if isinstance(m, SplitBatchNorm2d)]
    assert [len(m.weight) for m in norms] == [192, 384, 384, 768]
    assert not any(isinstance(m, nn.BatchNorm2d) for m in D.modules())


@given(width=st.integers(1, 4), latent_dim=st.integers(1, 20), batch=st.integers(2, 5))
def test_g_makes_images_and_d_one_logit_each(width, latent_dim, batch):
    images = Generator(latent_dim, width)(torch.randn(batch, latent_dim))
    assert images.shape == (batch, 3, 64, 64) and images.abs().max() <= 1
    for num_real in (0, 2, batch):
        logits = Discriminator(width)(images, num_real)
        assert logits.shape == (batch,) and logits.dtype == torch.float32


def test_g_and_d_are_widened_together_unless_d_is_given_its_own_width():
    G, D = build_networks(Config(width=6, latent_dim=8), CPU)
    assert (parameters(G), parameters(D)) == (
        parameters(Generator(8, 6)),
        parameters(Discriminator(6)),
    )
    G, D = build_networks(Config(width=6, d_width=3, latent_dim=8), CPU)
    assert (parameters(G), parameters(D)) == (
        parameters(Generator(8, 6)),
        parameters(Discriminator(3)),
    )


def in_order(D: nn.Module) -> list[Tensor]:
    """The parameters of a D: those of its convolutions, then those of its norms."""
    convs = [m for m in D.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in D.modules() if isinstance(m, (SplitBatchNorm2d, nn.BatchNorm2d))]
    return [p for m in (*convs, *norms) for p in (m.weight, m.bias) if p is not None]


class PlainDiscriminator(nn.Module):
    """D written anew with ordinary batch norms, for forwards of one kind."""

    def __init__(self, D: Discriminator, width: int) -> None:
        super().__init__()
        w, act = width, nn.LeakyReLU(0.2)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 2 * w, 4, 2, 1, bias=False), act,
            nn.Conv2d(2 * w, 4 * w, 4, 2, 1, bias=False), act,
            nn.Conv2d(4 * w, 4 * w, 3, 1, 1, bias=False), nn.BatchNorm2d(4 * w), act,
            nn.Conv2d(4 * w, 8 * w, 4, 2, 1, bias=False), nn.BatchNorm2d(8 * w), act,
            nn.Conv2d(8 * w, 8 * w, 3, 1, 1, bias=False), nn.BatchNorm2d(8 * w), act,
            nn.Conv2d(8 * w, 16 * w, 4, 2, 1, bias=False), nn.BatchNorm2d(16 * w), act,
            nn.Conv2d(16 * w, 1, 4),
        )  # fmt: skip
        with torch.no_grad():
            for ours, theirs in zip(in_order(D), in_order(self)):
                theirs.copy_(ours)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).flatten()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("num_real", "num_fake"), [(4, 4), (3, 5), (0, 6), (6, 0)])
def test_d_in_one_forward_equals_a_plain_d_in_two(layout, num_real, num_fake):
    torch.manual_seed(1)
    D = Discriminator(3).to(memory_format=layout)
    with torch.no_grad():
        for norm in D.modules():
            if isinstance(norm, SplitBatchNorm2d):
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.uniform_(-0.5, 0.5)
    plain = PlainDiscriminator(D, 3)
    x = torch.rand(num_real + num_fake, 3, 64, 64) * 2 - 1
    x[:num_real] *= 0.3
    x = x.contiguous(memory_format=layout).requires_grad_()
    weights = torch.randn(len(x))
    together = D(x, num_real)
    apart = torch.cat([plain(g) for g in (x[:num_real], x[num_real:]) if len(g)])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
    ours = torch.autograd.grad((together * weights).sum(), [x, *in_order(D)])
    theirs = torch.autograd.grad((apart * weights).sum(), [x, *in_order(plain)])
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


def test_the_same_seed_gives_the_same_weights_and_leaves_torchs_own_random_state_alone():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    a, b, c = (build_networks(Config(width=2, latent_dim=4, seed=s), CPU) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    for network_a, network_b, network_c in zip(a, b, c):
        pairs = zip(network_a.parameters(), network_b.parameters(), network_c.parameters())
        same = [(torch.equal(p, q), torch.equal(p, r)) for p, q, r in pairs if p.dim() == 4]
        assert all(equal and not other for equal, other in same)


def test_initial_weights_are_pytorchs_own_or_normal_by_init_std():
    own, _ = build_networks(Config(width=8, latent_dim=64, seed=3), CPU)
    torch.manual_seed(3)
    for p, q in zip(own.parameters(), Generator(64, 8).parameters()):
        assert torch.equal(p, q)
    for network in build_networks(Config(width=8, latent_dim=64, init_std=0.02), CPU):
        for module in network.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and module.weight.numel() > 1000:
                assert float(module.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
            if isinstance(module, (nn.BatchNorm2d, SplitBatchNorm2d)):
                assert float(module.weight.detach().mean()) == pytest.approx(1, abs=0.02)
                assert float(module.bias.detach().abs().max()) == 0


# ------------------------------------------------------------------------------------- the losses

margins = st.floats(0.05, 0.99)
logits = st.floats(-30, 30)
NO_FAKES_PUSH = -1e4  # a fake this sure of being a fake costs nothing


def real_side(values: list[float], margin: float, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Loss and gradient of reals alone, in float64."""
    x = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    fakes = torch.full_like(x, NO_FAKES_PUSH).detach()
    loss = discriminator_loss(x, fakes, margin, smoothing)
    return loss.detach(), torch.autograd.grad(loss, x)[0]


@given(margins, st.lists(st.floats(1e-3, 1e4), min_size=1, max_size=5))
def test_past_the_margin_loss_and_gradient_are_exactly_0(margin, beyond):
    loss, gradient = real_side([logit(margin) + b for b in beyond], margin)
    assert loss == 0 and (gradient == 0).all()


@given(margins, st.lists(st.floats(1e-3, 1e4), min_size=1, max_size=5))
def test_past_the_margin_loss_and_gradient_are_exactly_0_in_float32(margin, beyond):
    x = torch.tensor([logit(margin) + b for b in beyond], requires_grad=True)
    loss = discriminator_loss(x, torch.full((1,), NO_FAKES_PUSH), margin, 0.0)
    assert loss == 0 and (torch.autograd.grad(loss, x)[0] == 0).all()


@given(margins, st.floats(1e-3, 40))
def test_below_the_margin_it_is_the_logistic_loss_and_its_gradient(margin, below):
    x = logit(margin) - below
    loss, gradient = real_side([x], margin)
    p = 1 / (1 + math.exp(-x))
    assert float(loss) == pytest.approx(-math.log(p) + math.log(margin), rel=1e-9, abs=1e-12)
    assert float(gradient) == pytest.approx(-(1 - p), rel=1e-8, abs=1e-12)


@given(st.lists(logits, min_size=2, max_size=9), margins)
def test_each_real_is_judged_alone_and_the_mean_is_taken(values, margin):
    loss, gradient = real_side(values, margin)
    alone = [real_side([v], margin) for v in values]
    assert float(loss) == pytest.approx(sum(float(a[0]) for a in alone) / len(values), abs=1e-12)
    each = torch.cat([a[1] for a in alone]) / len(values)
    torch.testing.assert_close(gradient, each)


@given(st.lists(logits, min_size=1, max_size=9), margins, st.floats(0, 0.5))
def test_fakes_are_pushed_fully_at_every_logit(values, margin, smoothing):
    x = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    reals = torch.full((1,), 1e4 if not smoothing else 0.0, dtype=torch.float64)
    loss = discriminator_loss(reals, x, margin, smoothing)
    (gradient,) = torch.autograd.grad(loss, x)
    expected = torch.sigmoid(x.detach()) / len(values)
    torch.testing.assert_close(
        gradient, expected, rtol=1e-8, atol=1e-15
    )  # softplus is linear past 20
    assert (gradient > 0).all()


@given(st.lists(logits, min_size=1, max_size=9), st.lists(logits, min_size=1, max_size=9))
def test_without_margin_and_smoothing_it_is_the_plain_gan_loss(reals, fakes):
    r, f = torch.tensor(reals), torch.tensor(fakes)
    plain = F.binary_cross_entropy_with_logits(r, torch.ones_like(r))
    plain += F.binary_cross_entropy_with_logits(f, torch.zeros_like(f))
    torch.testing.assert_close(discriminator_loss(r, f, 1.0, 0.0), plain)


@given(st.lists(logits, min_size=1, max_size=9), st.floats(0.01, 0.5))
def test_smoothing_without_margin_is_the_label_1_minus_s(values, smoothing):
    x = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    label = torch.full_like(x, 1 - smoothing).detach()
    plain = F.binary_cross_entropy_with_logits(x, label)
    loss, gradient = real_side(values, 1.0, smoothing)
    torch.testing.assert_close(loss, plain.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(plain, x)[0])


@given(margins, st.floats(0.01, 0.5), st.floats(1e-3, 20))
def test_smoothing_pushes_reals_past_the_margin_back_down(margin, smoothing, beyond):
    x = logit(margin) + beyond
    _, gradient = real_side([x], margin, smoothing)
    assert float(gradient) == pytest.approx(smoothing / (1 + math.exp(-x)), rel=1e-9)
    assert "smoothing" in discriminator_loss.__doc__  # the interplay is documented


@given(st.lists(logits, min_size=1, max_size=9))
def test_the_generators_loss_is_the_non_saturating_one(values):
    x = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    loss = generator_loss(x)
    (gradient,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(
        loss.detach(), (1 + (-x.detach()).exp()).log().mean(), rtol=1e-9, atol=1e-12
    )
    torch.testing.assert_close(gradient, (torch.sigmoid(x.detach()) - 1) / len(values))
    assert (gradient < 0).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("size", [1e4, -1e4, 1e30, -1e30])
def test_huge_logits_give_finite_losses_and_gradients(size, smoothing):
    for margin in (0.8, 1.0):
        reals = torch.tensor([size, -size, 0.0], requires_grad=True)
        fakes = torch.tensor([size, -size, 0.0], requires_grad=True)
        d_loss = discriminator_loss(reals, fakes, margin, smoothing)
        g_loss = generator_loss(fakes)
        gradients = torch.autograd.grad(d_loss, [reals, fakes]) + torch.autograd.grad(g_loss, fakes)
        assert all(torch.isfinite(t).all() for t in (d_loss, g_loss, *gradients))
    one = torch.tensor([size], requires_grad=True)  # a wrong sign is still pushed at full strength
    (gradient,) = torch.autograd.grad(generator_loss(one), one)
    assert float(gradient) == (0.0 if size > 0 else -1.0)


def test_the_defaults_are_the_seeds_margin_and_no_smoothing():
    assert (Config().margin, Config().smoothing) == (0.8, 0.0)
    assert logit(0.8) == pytest.approx(1.3862943611)
    assert logit(1.0) == math.inf
