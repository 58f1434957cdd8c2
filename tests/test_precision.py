"""Precision: which a device gets, steps in half of it, the loss scale, and sampling in float32."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import SAMPLE, STEPS, all_finite, load, log_of, run_here, sha, tensors_in
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import train_dogs
from train_dogs import (
    PRECISIONS,
    PRESETS,
    Config,
    CropSet,
    Optimizer,
    Trainer,
    choose_precision,
    find_photos,
    load_trainer,
    prepare_crops,
    trainer_state,
)

pytestmark = pytest.mark.usefixtures("light")

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(scope="module")
def dogs(own_cache: Path) -> CropSet:
    """The drawn sample, cropped."""
    return prepare_crops(find_photos([SAMPLE]), "square", show=False)


def small(**changes: object) -> Config:
    """A configuration that trains in milliseconds."""
    return Config(**({"width": 2, "latent_dim": 8, "batch_size": 8} | changes))


# ---------------------------------------------------------------------------------- what auto means


@pytest.mark.parametrize(
    ("gpu", "capability", "precision"),
    [
        ("P100", (6, 0), "fp32"), ("GTX 1080", (6, 1), "fp32"), ("V100", (7, 0), "fp16"),
        ("T4", (7, 5), "fp16"), ("A100", (8, 0), "bf16"), ("RTX 3090", (8, 6), "bf16"),
        ("L4", (8, 9), "bf16"), ("H200", (9, 0), "bf16"), ("B200", (10, 0), "bf16"),
    ],
)  # fmt: skip
def test_a_gpu_gets_what_it_has_in_hardware(gpu, capability, precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_precision("auto", CUDA) == precision, gpu


@pytest.mark.parametrize(
    ("flags", "precision"),
    [
        ("fpu sse2 avx2 avx512f", "fp32"), ("fpu avx2 avx512f avx512_bf16", "bf16"),
        ("fpu amx_bf16 amx_tile", "bf16"), ("fpu avx512_bf16_not_quite", "fp32"), ("", "fp32"),
        (None, "fp32"),
    ],
)  # fmt: skip
def test_a_cpu_gets_bf16_only_with_instructions_for_it(flags, precision, monkeypatch):
    def read_text(path: Path) -> str:
        assert str(path) == "/proc/cpuinfo"
        if flags is None:  # no Linux
            raise FileNotFoundError(path)
        return f"processor\t: 0\nmodel name\t: A CPU\nflags\t\t: {flags}\nbugs\t\t: none\n"

    monkeypatch.setattr(Path, "read_text", read_text)
    assert choose_precision("auto", CPU) == precision


def test_a_precision_by_name_is_taken_as_it_is_on_any_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 0))
    for name in PRECISIONS:
        assert choose_precision(name, CPU) == choose_precision(name, CUDA) == name


# ------------------------------------------------------------------------- a step in less precision


def set_scales(trainer: Trainer, scale: float) -> None:
    """Set the loss scale of both networks."""
    for opt in (trainer.opt_g, trainer.opt_d):
        opt.loss_scale.fill_(scale)


def types_in_a_step(trainer: Trainer) -> set[torch.dtype]:
    """What the convolutions of G and D put out in one step."""
    seen = []
    for module in (*trainer.G.modules(), *trainer.D.modules()):
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            module.register_forward_hook(lambda m, inputs, out: seen.append(out.dtype))
    trainer.step(0.0)
    assert len(seen) == 8 + 2 * 7
    return set(seen)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("fp32", torch.float32), ("tf32", torch.float32), ("bf16", torch.bfloat16),
        ("fp16", torch.float16),
    ],
)  # fmt: skip
def test_convolutions_compute_in_it_and_all_that_is_kept_is_float32(name, dtype, dogs):
    trainer = Trainer(small(precision=name), dogs, CPU)
    assert types_in_a_step(trainer) == {dtype}
    kept = [t for t in tensors_in(trainer_state(trainer)) if t.is_floating_point()]
    assert {t.dtype for t in kept} == {torch.float32}


def test_images_and_logits_are_float32_and_tanh_does_not_round_to_1(dogs):
    trainer = Trainer(small(precision="bf16"), dogs, CPU)
    nn.init.constant_(trainer.G.to_rgb.bias, 3.5)  # tanh 0.998, which bf16 would make 1
    with trainer.autocast():
        images = trainer.G(torch.randn(8, 8))
        verdict = trainer.D(images, 4)
    assert images.dtype == verdict.logits.dtype == verdict.classes.dtype == torch.float32
    assert images.median() > 0.99 and (images < 1).all()


@pytest.mark.parametrize("name", PRECISIONS)
def test_fp32_is_not_tf32_though_torch_has_that_on_by_default(name, dogs, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    trainer, seen = Trainer(small(precision=name, width=1), dogs, CPU), []
    train_dogs.p100_hours(trainer.config, 1)  # must not change the setting
    step = Optimizer.minimise

    def spy(*args: object) -> None:
        step(*args)  # back through the convolutions
        seen.append(torch.backends.cudnn.allow_tf32)

    monkeypatch.setattr(Optimizer, "minimise", spy)
    trainer.step(0.0)
    assert seen == [name != "fp32"] * 2


@pytest.fixture(scope="module")
def losses(dogs: CropSet) -> dict[str, list[dict[str, float]]]:
    """The statistics of 8 steps in each precision, from the same weights and on the same dogs."""
    found = {}
    for name in ("fp32", "bf16", "fp16"):
        trainer = Trainer(small(precision=name, g_lr=0.0, d_lr=1e-3), dogs, CPU)
        set_scales(trainer, 1024.0)  # low enough that no step is skipped
        found[name] = []
        for _ in range(8):
            trainer.step(0.0)
            found[name].append(dict(trainer.read_stats()))
        assert trainer.is_healthy()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_half_the_precision_has_nearly_the_same_losses_and_learns_as_well(name, losses):
    for stat in ("d_loss", "g_loss"):
        exact, half = (np.array([s[stat] for s in losses[n]]) for n in ("fp32", name))
        assert not np.array_equal(exact, half)
        assert half[0] == pytest.approx(exact[0], rel=0.02)
        np.testing.assert_allclose(half, exact, rtol=0.1)
    assert losses[name][-1]["d_loss"] < 0.9 * losses[name][0]["d_loss"]


def test_every_term_is_nearly_the_same_in_less_precision(dogs):
    """R1 in fp16 too, whose inner gradient would be 0 if the loss scale did not reach it."""
    changes = {"width": 1, "r1": 1.0, "augment": "color,translation,cutout", "condition": "breed"}
    stats = {}
    for name in ("fp32", "bf16", "fp16"):
        trainer = Trainer(small(precision=name, classify=0.5, d_lr=0.0, **changes), dogs, CPU)
        with torch.no_grad():
            for p in (trainer.D.norms[-1].weight, trainer.D.linear.weight):
                p.mul_(3e-3)  # so that R1's slopes are too small for fp16
        for _ in range(3):
            trainer.step(0.0)
        assert trainer.is_healthy()
        stats[name] = trainer.read_stats()
    assert 0 < stats["fp32"]["d_r1"] < 1e-7
    for name in ("bf16", "fp16"):
        for term in ("d_loss", "g_loss", "d_classify", "g_classify", "d_r1"):
            assert stats[name][term] == pytest.approx(stats["fp32"][term], rel=0.05), term


@pytest.mark.parametrize("name", ["bf16", "fp16"])
@pytest.mark.parametrize("changes", [{}, {"architecture": "paper", "init_std": 0.02}])
def test_r1_in_half_precision_has_the_gradients_of_float32(name, changes, dogs):
    """Its double backward takes D's norms' 1 / std to the third power: past 65504 from 0.025 on."""
    moments = []
    for precision in ("fp32", name):
        trainer = Trainer(small(precision=precision, r1=1.0, beta1=0.0, **changes), dogs, CPU)
        set_scales(trainer, 256.0)
        trainer.step(0.0)
        states = trainer.opt_d.adam.state.items()  # but of the head's bias, which R1 does not reach
        moments.append([s["exp_avg"] for p, s in states if p is not trainer.D.linear.bias])
        assert float(trainer.opt_d.loss_scale) >= 256  # no update was skipped
    for exact, half in zip(*moments, strict=True):
        assert (half - exact).norm() < 0.3 * exact.norm()


class Casts(TorchDispatchMode):
    """Counts conversions from float32 to half precision."""

    count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        if operator.overloadpacket.__name__ == "_to_copy" and args[0].dtype == torch.float32:
            self.count += out.dtype in (torch.bfloat16, torch.float16)
        return out


@pytest.mark.parametrize("name", ["bf16", "fp16"])
@pytest.mark.parametrize("recipe", ["improved", "second-private"])
def test_r1s_inner_gradient_casts_nothing_down_but_what_the_forward_did(recipe, name, dogs):
    """Autograd's own casts, back to the half precision in which a layer ran, are there without
    autocast too; with it, more would be."""
    changes = PRESETS[recipe] | {"width": 2, "latent_dim": 8, "batch_size": 4}
    trainer = Trainer(Config(**changes | {"precision": name, "r1": 1.0}), dogs, CPU)
    reals, labels, z = trainer.batches.draw()
    with trainer.autocast():
        seen = trainer.judge(reals, trainer.G(z, labels).detach(), labels, trainer.opt_d)
        with Casts() as inside:
            train_dogs.gradient_penalty(seen)
        seen = trainer.judge(reals, trainer.G(z, labels).detach(), labels, trainer.opt_d)
    with Casts() as outside:
        train_dogs.gradient_penalty(seen)
    assert inside.count == outside.count


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_a_conditional_norm_gives_what_it_was_given(name):
    dtype, x = PRECISIONS[name], torch.randn(4, 6, 8, 8)
    with torch.autocast("cpu", dtype):
        for kind in (dtype, torch.float32):
            given = x.to(dtype=kind)
            labels = torch.tensor([0, 1, 2, 0])
            assert train_dogs.BreedBatchNorm2d(6, 3)(given, labels).dtype == kind
            code = torch.randn(4, 5)
            assert train_dogs.LatentBatchNorm2d(6, 5)(given, code).dtype == kind


# ----------------------------------------------------------------------------------- the loss scale


ADAM = Config(beta1=0.9)


def with_optimizer() -> tuple[nn.Module, Optimizer]:
    """A small network and its optimiser, with a loss scale."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))
    return network, Optimizer(network, 0.01, ADAM, scaled=True)


def state_of(opt: Optimizer) -> list[Tensor]:
    """Copies of the weights, Adam's moments and its step counts."""
    moments = [state[k] for state in opt.adam.state.values() for k in sorted(state)]
    return [t.detach().clone() for t in (*opt.parameters, *moments)]


def test_an_optimisers_state_is_that_of_torchs_own_after_a_step_of_nothing():
    network, opt = with_optimizer()
    own = torch.optim.Adam(network.parameters(), fused=True)
    for p in network.parameters():
        p.grad = torch.zeros_like(p)
    own.step()
    for p in network.parameters():
        ours, theirs = opt.adam.state[p], own.state[p]
        assert list(ours) == list(theirs)
        for k in ours:
            expected = torch.zeros_like(theirs[k])
            torch.testing.assert_close(ours[k], expected, rtol=0, atol=0, check_stride=True)


def test_gradients_of_a_whole_step_with_a_scale_are_those_of_one_without(dogs):
    plain, scaled = (Trainer(small(precision="fp32"), dogs, CPU) for _ in range(2))
    scaled.opt_g.scaled = scaled.opt_d.scaled = True
    plain.step(0.0)
    scaled.step(0.0)
    for name in ("opt_g", "opt_d"):  # the gradients as Adam saw them; the weights are Adam's affair
        states = (getattr(trainer, name).adam.state.values() for trainer in (plain, scaled))
        for a, b in zip(*states):
            tolerance = 1e-5 * float(a["exp_avg"].abs().max())
            torch.testing.assert_close(b["exp_avg"], a["exp_avg"], rtol=1e-4, atol=tolerance)
            assert tolerance > 0
        assert float(getattr(scaled, name).loss_scale) > 65536


@pytest.mark.parametrize("broken", [math.inf, -math.inf, math.nan, 1e38])
def test_an_overflow_in_one_weight_leaves_all_and_their_moments_and_halves_the_scale(broken):
    network, opt = with_optimizer()
    x = torch.randn(9, 5)
    opt.loss_scale.fill_(1024.0)
    opt.minimise(network(x).square().mean())
    before, scale_before = state_of(opt), float(opt.loss_scale)
    opt.minimise(network(x).square().mean() + network[0].weight[0, 0] * broken)
    for a, b in zip(state_of(opt), before, strict=True):
        assert torch.equal(a, b)
    assert float(opt.loss_scale) == scale_before / 2
    opt.minimise(network(x).square().mean())  # and it goes on
    assert all(not torch.equal(a, b) for a, b in zip(state_of(opt), before))


def test_the_scale_doubles_in_2000_updates_that_are_finite():
    p = nn.Parameter(torch.ones(1))
    opt = Optimizer(nn.ParameterList([p]), 0.0, ADAM, scaled=True)
    opt.loss_scale.fill_(64.0)
    for _ in range(500):
        opt.minimise(p.sum())
    assert float(opt.loss_scale) == pytest.approx(64 * 2**0.25, rel=1e-4)


def test_an_overflow_of_d_alone_leaves_gs_scale_and_ends_the_run_at_last(dogs):
    trainer = Trainer(small(precision="fp16", r1=1.0), dogs, CPU)
    set_scales(trainer, 256.0)
    trainer.opt_d.loss_scale.fill_(2.0**40)
    trainer.step(0.0)
    assert float(trainer.opt_d.loss_scale) == 2.0**39 and float(trainer.opt_g.loss_scale) > 256
    set_scales(trainer, 1.0)
    assert trainer.is_healthy()
    for opt in (trainer.opt_g, trainer.opt_d):
        set_scales(trainer, 1.0)
        opt.loss_scale.fill_(0.5)
        assert not trainer.is_healthy()


def test_only_fp16_has_a_scale_and_it_keeps_gradients_off_0(dogs):
    trainers = {name: Trainer(small(precision=name), dogs, CPU) for name in PRECISIONS}
    assert [name for name, trainer in trainers.items() if trainer.opt_d.scaled] == ["fp16"]
    assert [name for name, trainer in trainers.items() if trainer.opt_g.scaled] == ["fp16"]
    # 1e-6 / 4096 is nothing in float16, whose least number is 6e-8; 65536 times that is something.
    weight = nn.Parameter(torch.ones(4096))
    network = nn.ParameterList([weight])
    plain, scaled = (Optimizer(network, 0.1, ADAM, scaled) for scaled in (False, True))
    plain.minimise(weight.half().float().mean() * 1e-6)
    assert (weight == 1).all()
    scaled.minimise(weight.half().float().mean() * 1e-6)
    assert (weight < 1).all()


def test_a_trainer_survives_an_overflow_in_fp16_and_its_scale_is_resumed(dogs):
    trainer = Trainer(small(precision="fp16", width=1, batch_size=4), dogs, CPU)
    set_scales(trainer, 2.0**36)
    before = [p.detach().clone() for p in trainer.D.parameters()]
    trainer.step(0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.D.parameters()))
    assert float(trainer.opt_d.loss_scale) == float(trainer.opt_g.loss_scale) == 2.0**35
    other = Trainer(small(precision="fp16", width=1, batch_size=4), dogs, CPU)
    load_trainer(other, trainer_state(trainer))
    assert float(other.opt_d.loss_scale) == float(other.opt_g.loss_scale) == 2.0**35
    for _ in range(30):  # halved by each step that overflows
        trainer.step(0.0)
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.D.parameters()))
    assert float(trainer.opt_d.loss_scale) < 2.0**30 and trainer.is_healthy()


# ------------------------------------------------------------------------------------- whole runs


def test_averages_norms_and_images_are_in_float32_whatever_was_trained_in(dogs):
    """Bit-equal to those of the same weights in a trainer of fp32."""
    half, full = (Trainer(small(precision=p, average_every=1), dogs, CPU) for p in ("bf16", "fp32"))
    half.step(0.0)
    load_trainer(full, trainer_state(half))
    drawn = []
    for trainer in (half, full):
        G = trainer.averages.generator(trainer.G, "ema", 1, trainer.config)
        assert {p.dtype for p in G.parameters()} == {torch.float32}
        drawn.append(train_dogs.sheet_images(G, trainer.config))
    assert np.array_equal(*drawn)


def test_the_precision_may_change_when_a_run_is_resumed(finished_run, tmp_path, monkeypatch):
    monkeypatch.setattr(train_dogs, "NORM_BATCHES", 1)
    out = Path(shutil.copytree(finished_run, tmp_path / "out"))
    assert run_here(out, steps=STEPS + 6, precision="bf16") == 0
    assert load(out / "checkpoint.pt")["trainer"]["steps_done"] == STEPS + 6
    assert [x["precision"] for x in log_of(out) if "precision" in x][-1] == "bf16"
    assert run_here(out, "--sample-only", data=None) == 0  # as the saved configuration says
    assert sha(out / "images.zip") != sha(finished_run / "images.zip")
    assert all_finite(out / "checkpoint.pt")
