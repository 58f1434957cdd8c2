"""Which device is taken or refused, before the data is touched; and what only a GPU can show."""

from __future__ import annotations

import ast
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import (
    SAMPLE,
    SCRIPT,
    assert_one_sentence,
    left_over,
    light,  # noqa: F401
    load,
    pixels,
    resumed_steps,
    run_here,
)
from torch import nn

import train_dogs
from train_dogs import (
    Config,
    Discriminator,
    Trainer,
    UserError,
    architecture_is_built,
    choose_device,
    find_photos,
    prepare_crops,
)

CU128 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]  # of torch's CUDA 12.8+ builds
CU126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((6, 0), CU126, True),  # P100
        ((6, 1), CU126, True),  # P40: the same major version, a later minor one
        ((6, 0), CU128, False),
        ((7, 0), CU128, False),  # V100
        ((7, 5), CU128, True),  # T4
        ((8, 9), CU128, True),  # L4
        ((8, 0), ["sm_86"], False),  # binaries do not run on an earlier minor version
        ((9, 0), ["sm_90a"], True),
        ((9, 0), ["sm_80", "sm_86"], False),  # nor on another major version
        ((9, 0), ["sm_80", "compute_80"], True),  # but intermediate code is compiled on the spot
        ((7, 5), ["compute_80"], False),
        ((10, 0), CU128, True),
        ((12, 1), CU128, True),
        ((12, 0), ["sm_100"], False),
        ((8, 0), [], False),
    ],
)
def test_a_gpu_runs_what_was_built_for_it(capability, built, runs):
    assert architecture_is_built(capability, built) == runs


def pretend_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], built: list[str]
) -> None:
    """A GPU that torch reports as available, as a P100 under a CUDA 12.8 build does."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla P100-PCIE-16GB")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    monkeypatch.setattr(torch.cuda, "set_device", lambda *_: None)


REMEDIES = ["T4", "L4", "2025", "2.14"]  # in this order


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:0"])
def test_a_p100_under_a_cuda_12_8_build_is_refused_before_the_data_is_touched(
    device, tmp_path, monkeypatch, capsys
):
    pretend_gpu(monkeypatch, (6, 0), CU128)
    touched: list[object] = []
    monkeypatch.setattr(train_dogs, "find_photos", lambda *paths: touched.append(paths))
    assert run_here(tmp_path / "out", steps=3, device=device) == 2
    err = capsys.readouterr().err
    assert_one_sentence(err, "sm_60", "cu126" if "cu126" in err else "12.6", *REMEDIES)
    assert [err.index(r) for r in REMEDIES] == sorted(err.index(r) for r in REMEDIES)
    assert touched == [] and not (tmp_path / "out").exists()


def test_a_gpu_whose_first_kernel_dies_is_refused_with_the_same_remedies(
    tmp_path, monkeypatch, capsys
):
    pretend_gpu(monkeypatch, (6, 0), CU126)
    ones = torch.ones

    def dying(*size: object, device: object = None, **more: object) -> torch.Tensor:
        if device is not None and torch.device(device).type == "cuda":
            raise RuntimeError(
                "CUDA error: no kernel image is available for execution on the device\n"
                "CUDA kernel errors might be asynchronously reported at some other API call."
            )
        return ones(*size, device=device, **more)

    monkeypatch.setattr(torch, "ones", dying)
    assert run_here(tmp_path / "out", steps=3) == 2
    assert_one_sentence(capsys.readouterr().err, "no kernel image", *REMEDIES)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("device", ["tpu", "cuda:", "cuda:one", "cuda:-1", "CPU "])
def test_an_unknown_device_is_one_sentence(device, tmp_path, capsys, monkeypatch):
    pretend_gpu(monkeypatch, (6, 0), CU128)
    assert run_here(tmp_path / "out", device=device) == 2
    assert_one_sentence(capsys.readouterr().err)


def test_a_gpu_that_is_not_there_is_one_sentence_with_the_remedy(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run_here(tmp_path / "out", device="cuda") == 2
    assert_one_sentence(capsys.readouterr().err, "--device cpu")
    pretend_gpu(monkeypatch, (7, 5), CU128)
    assert run_here(tmp_path / "out", device="cuda:3") == 2
    assert_one_sentence(capsys.readouterr().err, "cuda:3")


def test_auto_takes_the_cpu_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError):
        choose_device("cuda")


def test_nothing_in_the_file_needs_triton():
    names = {
        node.attr if isinstance(node, ast.Attribute) else node.id
        for node in ast.walk(ast.parse(SCRIPT.read_text("utf-8")))
        if isinstance(node, (ast.Attribute, ast.Name))
    }
    assert not names & {"compile", "triton", "inductor", "_dynamo"}


def test_out_of_gpu_memory_names_the_batch_size_that_fits(tmp_path, monkeypatch, capsys):
    step = Trainer.step

    def hungry(trainer: Trainer, progress: float) -> None:
        if trainer.config.batch_size > 9:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        step(trainer, progress)

    monkeypatch.setattr(Trainer, "step", hungry)
    out = tmp_path / "out"
    assert run_here(out, steps=3, images=4, batch_size=32) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "train_dogs" in line]
    assert_one_sentence("\n".join(lines), "--batch-size 8")
    assert left_over(out) == [] and not (out / "images.zip").exists()
    assert all(load(path) for path in out.glob("*.pt"))
    # Doing as it says works, in the same folder.
    more = re.findall(r"--fresh", lines[-1])
    assert run_here(out, *more, steps=3, images=4, batch_size=8) == 0


# ---------------------------------------------------------------------------------- on a real GPU

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")


@pytest.fixture
def cuda() -> torch.device:
    """The GPU, after a kernel has run on it."""
    return choose_device("cuda")


@pytest.fixture
def exact() -> Iterator[None]:
    """Deterministic convolutions in plain float32."""
    with torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    ):
        yield


def trainer_on(device: torch.device, **changes: object) -> Trainer:
    """A small trainer of the drawn dogs, in plain float32 if no `precision` is given."""
    small = {"width": 4, "latent_dim": 16, "batch_size": 8, "precision": "fp32"}
    config = Config(**(small | changes))
    return Trainer(config, prepare_crops(find_photos([SAMPLE]), "square", show=False), device)


def trained(
    device: torch.device, steps: int, captured: bool, **changes: object
) -> dict[str, torch.Tensor]:
    """All tensors of a run after `steps`, with its random state."""
    trainer = trainer_on(device, **changes)
    if captured:
        trainer.capture()
    for k in range(steps):
        trainer.step(k / steps)
        if k % 5 == 4:
            trainer.average(k / steps)
    state = trainer.state_dict()
    return state["tensors"] | {"rng": state["rng"]}


@gpu
@needs_gpu
@pytest.mark.usefixtures("exact")
def test_a_captured_step_equals_an_eager_one(cuda):
    eager, captured = trained(cuda, 1, captured=False), trained(cuda, 1, captured=True)
    assert eager.keys() == captured.keys()
    for name, tensor in eager.items():
        torch.testing.assert_close(captured[name], tensor, rtol=1e-5, atol=1e-5)


@gpu
@needs_gpu
@pytest.mark.usefixtures("exact")
def test_fifty_captured_steps_equal_fifty_eager_ones_bit_for_bit(cuda):
    eager, captured = trained(cuda, 50, captured=False), trained(cuda, 50, captured=True)
    assert [name for name in eager if not torch.equal(eager[name], captured[name])] == []


@gpu
@needs_gpu
@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(
    "changes",
    [
        {"augment": "color,translation,cutout", "noise": 1 / 128},
        {"condition": "breed", "classify": 0.1},
        {"r1": 1.0},
        {"layers": "paper", "init_std": 0.02},
        {"precision": "tf32"},
        {"precision": "bf16"},
        {"precision": "fp16"},
    ],
    ids=lambda changes: "+".join(changes),
)
def test_whatever_the_recipe_captured_steps_equal_eager_ones(cuda, changes):
    eager, captured = (trained(cuda, 3, c, **changes) for c in (False, True))
    for name, tensor in eager.items():
        torch.testing.assert_close(captured[name], tensor, rtol=1e-3, atol=1e-3)


@gpu
@needs_gpu
@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp16"])
def test_fewer_bits_give_about_the_losses_of_float32(cuda, precision):
    means = {}
    for name in ("fp32", precision):
        trainer = trainer_on(cuda, precision=name)
        for _ in range(30):
            trainer.step(0.0)
        means[name] = trainer.read_stats()
    assert means[precision]["d_loss"] == pytest.approx(means["fp32"]["d_loss"], rel=0.1)
    assert means[precision]["g_loss"] == pytest.approx(means["fp32"]["g_loss"], rel=0.1)


@gpu
@needs_gpu
def test_capturing_leaves_weights_optimisers_and_random_state_as_they_were(cuda):
    trainer = trainer_on(cuda)
    trainer.step(0.0)
    before = trainer.state_dict()
    trainer.capture()
    after = trainer.state_dict()
    assert torch.equal(before["rng"], after["rng"])
    assert all(torch.equal(before["tensors"][n], t) for n, t in after["tensors"].items())


@gpu
@needs_gpu
def test_a_checkpoint_goes_on_bit_for_bit_under_a_captured_graph(cuda, exact):
    first, second = trainer_on(cuda), trainer_on(cuda, seed=5)
    second.capture()
    first.step(0.0)
    state = first.state_dict()
    first.step(0.0)
    expected = first.state_dict()["tensors"]
    second.load_state_dict(state)
    second.step(0.0)
    found = second.state_dict()["tensors"]
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@gpu
@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_steps_never_wait_for_the_device(cuda, precision):
    trainer = trainer_on(cuda, precision=precision)
    trainer.capture()
    trainer.step(0.0)  # the first of 16 in its order of the dogs
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for k in range(12):
            trainer.step(k / 12)
            trainer.average(k / 12)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@gpu
@needs_gpu
def test_only_a_few_steps_are_in_flight_so_that_the_clock_means_something(cuda):
    trainer = trainer_on(cuda, width=32, batch_size=32)
    trainer.capture()
    for _ in range(10):
        trainer.step(0.0)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(60):
        trainer.step(0.0)
    queued = time.perf_counter()
    torch.cuda.synchronize()
    end = time.perf_counter()
    assert end - queued <= 6 * (end - begin) / 60 + 0.005


def milliseconds(work: Callable[[], object], repeats: int = 30) -> float:
    """The median time of `work` on the GPU."""
    times = []
    for _ in range(repeats + 5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return float(np.median(times[5:]))


@gpu
@needs_gpu
def test_one_forward_with_split_norms_is_faster_than_two_forwards(cuda):
    from test_networks import PlainDiscriminator

    D = Discriminator(48).to(cuda)
    plain = PlainDiscriminator(D, 48).to(cuda)
    reals, fakes = torch.randn(2, 32, 3, 64, 64, device=cuda)
    both = torch.cat([reals, fakes])

    def backward(logits: torch.Tensor, network: nn.Module) -> None:
        torch.autograd.grad(logits.square().mean(), list(network.parameters()))

    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        together = milliseconds(lambda: backward(D(both, 32), D))
        apart = milliseconds(lambda: backward(torch.cat([plain(reals), plain(fakes)]), plain))
    assert together < apart


@gpu
@needs_gpu
def test_an_image_drawn_alone_on_the_gpu_differs_by_at_most_one_level(cuda):
    G = trainer_on(cuda).averaged_generator("none", 4)
    latents = train_dogs.draw_latents(300, 16, 4)
    full = np.concatenate(list(train_dogs.sample_images(G, latents))).astype(int)
    for k in (0, 127, 128, 299):
        (alone,) = train_dogs.sample_images(G, latents[k : k + 1])
        assert np.abs(alone[0] - full[k]).max() <= 1
    on_cpu = np.concatenate(list(train_dogs.sample_images(G.cpu(), latents))).astype(int)
    assert np.abs(on_cpu - full).max() <= 1


@gpu
@needs_gpu
def test_a_whole_run_and_its_continuation_on_the_gpu(cuda, tmp_path):
    out = Path(tmp_path / "out")
    assert run_here(out, device="cuda", width=4, steps=40) == 0
    assert run_here(out, device="cuda", width=4, steps=60) == 0
    assert resumed_steps(out) == [40]
    assert load(out / "checkpoint.pt")["trainer"]["steps_done"] == 60
    assert len(pixels(out / "images.zip")) == 40
