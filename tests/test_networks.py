"""G, D, split batch norm and the losses, against ordinary batch norms, closed forms and counts."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from train_dogs import (
    ARCHITECTURES,
    LAYERS,
    LOSSES,
    BatchNorm2d,
    Config,
    Discriminator,
    Generator,
    Objective,
    Seen,
    SplitBatchNorm2d,
    Verdict,
    build_networks,
    d_margin,
    g_logistic,
    make_generator,
    past_margin,
)

pytestmark = pytest.mark.usefixtures("light")

CPU = torch.device("cpu")
LAYOUTS = [torch.contiguous_format, torch.channels_last]

# ------------------------------------------------------------------------------- split batch norm


@given(
    num_real=st.integers(0, 9),
    num_fake=st.integers(0, 9),
    channels=st.integers(1, 6),
    size=st.integers(1, 5),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 10**6),
)
@example(32, 32, 24, 16, LAYOUTS[0], 0)
@example(5, 27, 24, 16, LAYOUTS[1], 0)
def test_split_bn_equals_two_separate_forwards(num_real, num_fake, channels, size, layout, seed):
    assume(num_real + num_fake > 0)
    assume(all(n == 0 or n * size * size > 1 for n in (num_real, num_fake)))  # as nn.BatchNorm2d
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
    out = torch.cat([ordinary(g) for g in (x[:num_real], x[num_real:]) if len(g)])
    theirs = [out, *torch.autograd.grad((out * weights).sum(), [x, ordinary.weight, ordinary.bias])]
    for name, a, b in zip(("output", "input", "weight", "bias"), ours, theirs):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")


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


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("width", "latent_dim", "batch"), [(1, 5, 2), (3, 20, 5)])
def test_g_makes_images_and_d_a_verdict_on_each(architecture, width, latent_dim, batch):
    config = Config(architecture=architecture, width=width, latent_dim=latent_dim)
    G, D = build_networks(config, CPU)
    images = G(torch.randn(batch, latent_dim))
    assert images.shape == (batch, 3, 64, 64) and images.abs().max() <= 1
    twin = make_generator(G.constructor)
    assert [p.shape for p in twin.parameters()] == [p.shape for p in G.parameters()]
    for num_real in (0, 2, batch):
        verdict = D(images, num_real)
        assert verdict.logits.shape == (batch,) and verdict.logits.dtype == torch.float32
        assert verdict.features.shape[::2] == (batch, 4) and verdict.classes.shape == (batch, 0)
        for part, rows in zip(verdict.split(2), (slice(2), slice(2, None))):
            assert all(torch.equal(a, b[rows]) for a, b in zip(part, verdict))


@pytest.mark.parametrize("architecture", LAYERS)
def test_a_dcgans_d_has_no_running_statistics_as_it_is_never_evaluated(architecture):
    assert list(Discriminator(1, architecture).buffers()) == []


@pytest.mark.parametrize(("d_width", "expected"), [(0, 6), (3, 3)])
def test_g_and_d_are_widened_together_unless_d_is_given_its_own_width(d_width, expected):
    G, D = build_networks(Config(width=6, d_width=d_width, latent_dim=8), CPU)
    assert parameters(G) == parameters(Generator(8, 6))
    assert parameters(D) == parameters(Discriminator(expected))


def in_order(D: nn.Module) -> list[Tensor]:
    """The parameters of a D: those of its convolutions, then those of its norms."""
    convs = [m for m in D.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in D.modules() if isinstance(m, (SplitBatchNorm2d, nn.BatchNorm2d))]
    return [p for m in (*convs, *norms) for p in (m.weight, m.bias) if p is not None]


class PlainDiscriminator(nn.Module):
    """A deep D with ordinary batch norms, for reals or fakes alone."""

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
            for ours, theirs in zip(in_order(D), in_order(self), strict=True):
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
    together = D(x, num_real).logits
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
            if isinstance(module, (BatchNorm2d, SplitBatchNorm2d)):
                assert float(module.weight.detach().mean()) == pytest.approx(1, abs=0.02)
                assert float(module.bias.detach().abs().max()) == 0


# ------------------------------------------------------------------------------------- the losses

margins = st.floats(0.05, 0.99)
logits = st.floats(-30, 30)
some = st.lists(logits, min_size=1, max_size=9)


def double(values: list[float]) -> Tensor:
    """Logits whose gradient is wanted, in float64."""
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def seen(reals: Tensor, fakes: Tensor, **config: object) -> Seen:
    """What a loss reads, of logits alone."""
    none = torch.empty(0)
    real, fake = (Verdict(logits, none, none) for logits in (reals, fakes))
    return Seen(none, none, none, real, fake, none, Config(**config), 1.0)


@pytest.mark.parametrize("architecture", LAYERS)
def test_d_cannot_see_a_factor_of_all_fakes(architecture):
    """Leaky ReLU is positively homogeneous and split norm removes scale."""
    torch.manual_seed(0)
    D = Discriminator(2, architecture).double()
    reals, fakes = torch.rand(2, 5, 3, 64, 64, dtype=torch.float64) * 2 - 1
    plain, pale = (D(torch.cat([reals, k * fakes]), 5).logits for k in (1.0, 0.5))
    torch.testing.assert_close(plain, pale, rtol=1e-2, atol=1e-3)  # but for the norms' epsilon


def logit(probability: float) -> float:
    """The inverse of the sigmoid."""
    return math.log(probability / (1 - probability))


def real_side(values: list[float], margin: float, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Loss and gradient of reals alone, in float64: fakes so sure of being fakes cost nothing."""
    x = double(values)
    loss = d_margin(seen(x, x.detach() * 0 - 1e4, margin=margin, smoothing=smoothing))
    return loss.detach(), torch.autograd.grad(loss, x)[0]


@given(margins, st.lists(st.floats(1e-3, 1e4), min_size=1, max_size=5))
def test_past_the_margin_loss_and_gradient_are_exactly_0(margin, beyond):
    for dtype in (torch.float64, torch.float32):
        x = torch.tensor([logit(margin) + b for b in beyond], dtype=dtype, requires_grad=True)
        loss = d_margin(seen(x, torch.full_like(x, -1e4), margin=margin))
        assert loss == 0 and (torch.autograd.grad(loss, x)[0] == 0).all()


@given(margins, st.floats(1e-3, 40))
def test_below_the_margin_it_is_the_logistic_loss_and_its_gradient(margin, below):
    x = logit(margin) - below
    loss, gradient = real_side([x], margin)
    p = 1 / (1 + math.exp(-x))
    assert float(loss) == pytest.approx(-math.log(p) + math.log(margin), rel=1e-9, abs=1e-12)
    assert float(gradient) == pytest.approx(-(1 - p), rel=1e-8, abs=1e-12)


@given(some, margins)
def test_each_real_is_judged_alone_and_the_mean_is_taken(values, margin):
    loss, gradient = real_side(values, margin)
    alone = [real_side([v], margin) for v in values]
    assert float(loss) == pytest.approx(sum(float(a[0]) for a in alone) / len(values), abs=1e-12)
    torch.testing.assert_close(gradient, torch.cat([a[1] for a in alone]) / len(values))


@given(some, margins, st.floats(0, 0.5))
def test_fakes_are_pushed_fully_at_every_logit(values, margin, smoothing):
    x = double(values)
    loss = d_margin(seen(torch.zeros_like(x), x, margin=margin, smoothing=smoothing))
    (gradient,) = torch.autograd.grad(loss, x)
    expected = torch.sigmoid(x.detach()) / len(values)
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-15)
    assert (gradient > 0).all()


@given(some, some, st.floats(0, 0.5))
def test_without_margin_it_is_the_plain_gan_loss_with_the_label_1_minus_s(reals, fakes, smoothing):
    r, f = double(reals), double(fakes)
    plain = F.binary_cross_entropy_with_logits(r, torch.full_like(r, 1 - smoothing))
    plain = plain + F.binary_cross_entropy_with_logits(f, torch.zeros_like(f))
    loss = d_margin(seen(r, f, margin=1.0, smoothing=smoothing))
    torch.testing.assert_close(loss, plain)
    for ours, theirs in zip(torch.autograd.grad(loss, [r, f]), torch.autograd.grad(plain, [r, f])):
        torch.testing.assert_close(ours, theirs)


@given(margins, st.floats(0.01, 0.5), st.floats(1e-3, 20))
def test_smoothing_pushes_reals_past_the_margin_back_down(margin, smoothing, beyond):
    x = logit(margin) + beyond
    _, gradient = real_side([x], margin, smoothing)
    assert float(gradient) == pytest.approx(smoothing / (1 + math.exp(-x)), rel=1e-9)


@given(some)
def test_the_generators_loss_is_the_non_saturating_one(values):
    x = double(values)
    loss = g_logistic(seen(x[:0], x))
    (gradient,) = torch.autograd.grad(loss, x)
    expected = (1 + (-x.detach()).exp()).log().mean()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, (torch.sigmoid(x.detach()) - 1) / len(values))
    assert (gradient < 0).all()


def test_past_margin_counts_reals_of_which_d_is_certain():
    r, f = torch.tensor([logit(0.79), logit(0.81), 1.6]), torch.tensor([0.3, 0.5])
    assert LOSSES["margin"].certain is past_margin
    assert past_margin(seen(r, f, margin=0.8)).tolist() == [False, True, True]
    assert past_margin(seen(r, f, margin=1.0)).tolist() == [False, True, True]  # as for 0.8


@pytest.mark.parametrize("size", [1e4, -1e4, 1e30, -1e30])
def test_huge_logits_give_finite_losses_and_gradients(size):
    fakes = torch.tensor([size, -size, 0.0], requires_grad=True)
    reals = torch.tensor([size, -size, 0.0], requires_grad=True)
    for changes in ({"margin": 0.8}, {"margin": 1.0}, {"smoothing": 0.1}):
        losses = [loss(seen(reals, fakes, **changes)) for loss in (d_margin, g_logistic)]
        gradients = torch.autograd.grad(sum(losses), [reals, fakes])
        assert all(torch.isfinite(t).all() for t in (*losses, *gradients))
    one = torch.tensor([size], requires_grad=True)  # a wrong sign is still pushed at full strength
    (gradient,) = torch.autograd.grad(g_logistic(seen(one[:0], one)), one)
    assert float(gradient) == (0.0 if size > 0 else -1.0)


def objectives(**changes: object) -> list[Objective]:
    """Those of D and of G."""
    return [Objective(Config(**changes), nn.Identity(), letter) for letter in "dg"]


def test_an_objective_weighs_its_terms_and_names_each():
    verdict = Verdict(torch.tensor([0.3, -0.2]), torch.empty(0), torch.tensor([[1.0, 2], [0, 1]]))
    labels, none = torch.tensor([0, 1]), torch.empty(0)
    config = {"condition": "breed", "classify": 0.25}
    both = Seen(none, none, none, verdict, verdict, labels, Config(**config), 1.0)
    classify = F.cross_entropy(verdict.classes, labels)
    for objective, letter, first in zip(objectives(**config), "dg", (d_margin, g_logistic)):
        loss, values = objective(both)
        assert list(objective.terms) == [f"{letter}_loss", f"{letter}_classify"]
        torch.testing.assert_close(torch.stack(values), torch.stack([first(both), classify]))
        torch.testing.assert_close(loss, first(both) + 0.25 * classify)
    assert [list(o.terms) for o in objectives(r1=2.0)] == [["d_loss", "d_r1"], ["g_loss"]]
