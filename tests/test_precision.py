"""Precision: which a device gets, steps in half of it, the loss scale, and sampling in float32."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import (
    SAMPLE,
    STEPS,
    all_finite,
    load,
    log_of,
    pixels,
    run_here,
    sha,
    tensors_in,
)
from torch import Tensor, nn

import train_dogs
from train_dogs import (
    PRECISIONS,
    Config,
    CropSet,
    Generator,
    Trainer,
    choose_precision,
    draw_latents,
    find_photos,
    make_generator,
    prepare_crops,
    sample_images,
    seed_for,
    update,
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


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_precision_by_name_is_taken_as_it_is_on_any_device(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 0))
    assert choose_precision(name, CPU) == choose_precision(name, CUDA) == name


# ------------------------------------------------------------------------- a step in less precision


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
    kept = [t for t in tensors_in(trainer.state_dict()) if t.is_floating_point()]
    assert {t.dtype for t in kept} == {torch.float32}


def test_images_and_logits_are_float32_and_tanh_does_not_round_to_1(dogs):
    trainer = Trainer(small(precision="bf16"), dogs, CPU)
    nn.init.constant_(trainer.G.to_rgb.bias, 3.5)  # tanh 0.998, which bf16 would make 1
    with trainer.autocast():
        images = trainer.G(torch.randn(8, 8))
        said = trainer.D(images, 4)
    assert images.dtype == said.logits.dtype == said.classes.dtype == torch.float32
    assert images.median() > 0.99 and (images < 1).all()


@pytest.mark.parametrize("name", PRECISIONS)
def test_fp32_is_not_tf32_though_torch_has_that_on_by_default(name, dogs, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    trainer, seen = Trainer(small(precision=name, width=1), dogs, CPU), []
    train_dogs.p100_hours(trainer.config, 1)  # counting is no business of the device's
    step = train_dogs.update

    def spy(*args: object) -> None:
        step(*args)  # back through the convolutions
        seen.append(torch.backends.cudnn.allow_tf32)

    monkeypatch.setattr(train_dogs, "update", spy)
    trainer.step(0.0)
    assert seen == [name != "fp32"] * 2


@pytest.fixture(scope="module")
def losses(dogs: CropSet) -> dict[str, list[dict[str, float]]]:
    """The statistics of 8 steps in each precision, from the same weights and on the same dogs."""
    found = {}
    for name in ("fp32", "bf16", "fp16"):
        trainer = Trainer(small(precision=name, g_lr=0.0, d_lr=1e-3), dogs, CPU)
        trainer.loss_scale.fill_(1024.0)  # low enough that no step is skipped
        found[name] = []
        for _ in range(8):
            trainer.step(0.0)
            found[name].append(dict(trainer.read_stats()))
        assert trainer.is_healthy()
    return found


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
            for p in (trainer.D.norms[-1].weight, trainer.D.head.weight):
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
@pytest.mark.parametrize("changes", [{}, {"layers": "paper", "init_std": 0.02}])
def test_r1_in_half_precision_has_the_gradients_of_float32(name, changes, dogs):
    """Its double backward takes D's norms' 1 / std to the third power: past 65504 from 0.025 on."""
    moments = []
    for precision in ("fp32", name):
        trainer = Trainer(small(precision=precision, r1=1.0, beta1=0.0, **changes), dogs, CPU)
        trainer.loss_scale.fill_(256.0)
        trainer.step(0.0)
        states = trainer.opt_d.state.items()  # but of the head's bias, which R1 does not reach
        moments.append([s["exp_avg"] for p, s in states if p is not trainer.D.head.bias])
        assert float(trainer.loss_scale) >= 256  # no update was skipped
    for exact, half in zip(*moments, strict=True):
        assert (half - exact).norm() < 0.3 * exact.norm()


# ----------------------------------------------------------------------------------- the loss scale


def with_adam(fused: bool = True) -> tuple[nn.Module, torch.optim.Adam]:
    """A small network and its Adam."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))
    return network, torch.optim.Adam(network.parameters(), lr=0.01, fused=fused)


def state_of(network: nn.Module, adam: torch.optim.Adam) -> list[Tensor]:
    """Copies of the weights, Adam's moments and its step counts."""
    moments = [state[k] for state in adam.state.values() for k in sorted(state)]
    return [t.detach().clone() for t in (*network.parameters(), *moments)]


@pytest.mark.parametrize("fused", [True, False])
def test_an_update_with_a_scale_equals_one_without(fused):
    states = []
    for scale in (None, torch.tensor(65536.0)):
        network, adam = with_adam(fused)
        for k in range(5):
            x = torch.randn(9, 5, generator=torch.Generator().manual_seed(k))
            update(adam, network(x).square().mean(), scale)
        states.append(state_of(network, adam))
    for plain, scaled in zip(*states, strict=True):
        torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=1e-6)


def test_gradients_of_a_whole_step_with_a_scale_are_those_of_one_without(dogs, monkeypatch):
    plain, scaled = (Trainer(small(precision="fp32"), dogs, CPU) for _ in range(2))
    monkeypatch.setattr(Trainer, "scale", property(lambda t: t.loss_scale if t is scaled else None))
    plain.step(0.0)
    scaled.step(0.0)
    for name in ("opt_g", "opt_d"):  # the gradients as Adam saw them; the weights are Adam's affair
        for a, b in zip(getattr(plain, name).state.values(), getattr(scaled, name).state.values()):
            tolerance = 1e-5 * float(a["exp_avg"].abs().max())
            torch.testing.assert_close(b["exp_avg"], a["exp_avg"], rtol=1e-4, atol=tolerance)
            assert tolerance > 0
    assert float(scaled.loss_scale) > 65536


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("broken", [math.inf, -math.inf, math.nan, 1e38])
def test_an_overflow_leaves_weights_and_moments_as_they_were_and_halves_the_scale(broken, fused):
    network, adam = with_adam(fused)
    x, scale = torch.randn(9, 5), torch.tensor(1024.0)
    update(adam, network(x).square().mean(), scale)
    before, scale_before = state_of(network, adam), float(scale)
    update(adam, network(x).square().mean() * broken, scale)
    for a, b in zip(state_of(network, adam), before, strict=True):
        assert torch.equal(a, b)
    assert float(scale) == scale_before / 2
    update(adam, network(x).square().mean(), scale)  # and it goes on
    assert all(not torch.equal(a, b) for a, b in zip(state_of(network, adam), before))


def test_one_weight_that_overflows_stops_them_all():
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    adam, scale = torch.optim.Adam([a, b], lr=0.1, fused=True), torch.tensor(8.0)
    update(adam, a.sum() + b[0] + b[1] * math.inf, scale)
    assert (a == 1).all() and (b == 1).all() and float(scale) == 4


def test_the_scale_doubles_in_2000_updates_that_are_finite():
    p = nn.Parameter(torch.ones(1))
    adam, scale = torch.optim.Adam([p], lr=0.0, fused=True), torch.tensor(64.0)
    for _ in range(500):
        update(adam, p.sum(), scale)
    assert float(scale) == pytest.approx(64 * 2**0.25, rel=1e-4)


def test_only_fp16_has_a_scale_and_it_keeps_gradients_off_0(dogs):
    trainers = {name: Trainer(small(precision=name), dogs, CPU) for name in PRECISIONS}
    assert [name for name, trainer in trainers.items() if trainer.scale is not None] == ["fp16"]
    # 1e-6 / 4096 is nothing in float16, whose least number is 6e-8; 65536 times that is something.
    weight, scale = nn.Parameter(torch.ones(4096)), torch.tensor(65536.0)
    adam = torch.optim.Adam([weight], lr=0.1, fused=True)
    update(adam, weight.half().float().mean() * 1e-6)
    assert (weight == 1).all()
    update(adam, weight.half().float().mean() * 1e-6, scale)
    assert (weight < 1).all()


def test_a_trainer_survives_an_overflow_in_fp16_and_its_scale_is_resumed(dogs):
    trainer = Trainer(small(precision="fp16", width=1, batch_size=4), dogs, CPU)
    trainer.loss_scale.fill_(2.0**36)
    before = [p.detach().clone() for p in trainer.D.parameters()]
    trainer.step(0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.D.parameters()))
    assert float(trainer.loss_scale) == 2.0**34  # halved by D's update and by G's
    other = Trainer(small(precision="fp16", width=1, batch_size=4), dogs, CPU)
    other.load_state_dict(trainer.state_dict())
    assert float(other.loss_scale) == 2.0**34
    for _ in range(14):
        trainer.step(0.0)
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.D.parameters()))
    assert float(trainer.loss_scale) < 2.0**30 and trainer.is_healthy()


# ------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_sampling_is_in_float32_whatever_was_trained_in(name, tmp_path, monkeypatch):
    monkeypatch.setattr(train_dogs, "NORM_BATCHES", 1)
    out, seen = tmp_path / "out", set()
    sample = train_dogs.sample_images

    def spy(G: Generator, *inputs: object):
        assert not torch.is_autocast_enabled() and not G.training
        seen.update(p.dtype for p in G.parameters())
        return sample(G, *inputs)

    monkeypatch.setattr(train_dogs, "sample_images", spy)
    assert run_here(out, precision=name, steps=10, images=6) == 0
    assert seen == {torch.float32} and all_finite(out / "checkpoint.pt")
    assert next(x["precision"] for x in log_of(out) if "precision" in x) == name
    state = load(out / "generator.pt")
    G = make_generator(state["shape"])
    G.load_state_dict(state["state_dict"])
    G = G.to(memory_format=train_dogs.memory_layout(CPU)).eval()
    z = draw_latents(6, 16, seed_for(0, "submission"))
    (expected,) = sample_images(G, z, torch.zeros(6, dtype=torch.int64))
    assert np.array_equal(pixels(out / "images.zip"), expected)


def test_the_precision_may_change_when_a_run_is_resumed(finished_run, tmp_path, monkeypatch):
    monkeypatch.setattr(train_dogs, "NORM_BATCHES", 1)
    out = Path(shutil.copytree(finished_run, tmp_path / "out"))
    assert run_here(out, steps=STEPS + 6, precision="bf16") == 0
    assert load(out / "checkpoint.pt")["trainer"]["steps_done"] == STEPS + 6
    assert [x["precision"] for x in log_of(out) if "precision" in x][-1] == "bf16"
    assert run_here(out, "--sample-only", data=None) == 0  # as the saved configuration says
    assert sha(out / "images.zip") != sha(finished_run / "images.zip")
