"""Which device is taken or refused, before the data is touched; and what only a GPU can show."""

from __future__ import annotations

import ast
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
    load,
    pixels,
    resumed_steps,
    run_here,
)

import train_dogs
from train_dogs import (
    Config,
    Trainer,
    UserError,
    capture,
    choose_device,
    draw_latents,
    find_photos,
    prepare_crops,
    sample_images,
)

pytestmark = pytest.mark.usefixtures("light")


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """A GPU that torch calls available, on which no kernel runs: a P100 under CUDA 12.8."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "set_device", lambda *_: None)
    ones = torch.ones

    def dying(*size: object, device: object = None, **more: object) -> torch.Tensor:
        if device is not None and torch.device(device).type == "cuda":
            raise RuntimeError(
                "CUDA error: no kernel image is available for execution on the device\n"
                "CUDA kernel errors might be asynchronously reported at some other API call."
            )
        return ones(*size, device=device, **more)

    monkeypatch.setattr(torch, "ones", dying)


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:0"])
def test_a_gpu_on_which_no_kernel_runs_is_refused_before_the_data_is_touched(
    device, tmp_path, monkeypatch, capsys
):
    pretend_gpu(monkeypatch, (6, 0))
    touched: list[object] = []
    monkeypatch.setattr(train_dogs, "find_photos", lambda *paths: touched.append(paths))
    assert run_here(tmp_path / "out", steps=3, device=device) == 2
    err = capsys.readouterr().err
    remedies = ["T4", "L4", "2025", "CUDA 12.6"]  # in this order
    assert_one_sentence(err, "sm_60", "no kernel image", *remedies)
    assert [err.rindex(r) for r in remedies] == sorted(err.rindex(r) for r in remedies)
    assert touched == [] and not (tmp_path / "out").exists()


@pytest.mark.parametrize("device", ["tpu", "cuda:", "cuda:one", "cuda:-1", "CPU "])
def test_an_unknown_device_is_one_sentence(device, tmp_path, capsys, monkeypatch):
    pretend_gpu(monkeypatch, (6, 0))
    assert run_here(tmp_path / "out", device=device) == 2
    assert_one_sentence(capsys.readouterr().err)


def test_a_gpu_that_is_not_there_is_one_sentence_with_the_remedy(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run_here(tmp_path / "out", device="cuda") == 2
    assert_one_sentence(capsys.readouterr().err, "--device cpu")
    pretend_gpu(monkeypatch, (7, 5))
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


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate"
        ),
        MemoryError(),
    ],
    ids=lambda error: str(error)[:12],
)
def test_out_of_memory_in_any_form_names_a_smaller_batch(error, tmp_path, monkeypatch, capsys):
    def hungry(trainer: Trainer, progress: float) -> None:
        raise error

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", hungry)
        assert run_here(out, steps=3, images=4, batch_size=16) == 2
    assert_one_sentence(capsys.readouterr().err.splitlines()[-1], "--batch-size 8")
    assert left_over(out) == [] and all(load(path) for path in out.glob("*.pt"))
    # Doing as it says works, in the same folder.
    assert run_here(out, steps=3, images=4, batch_size=8) == 0


# ---------------------------------------------------------------------------------- on a real GPU

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")


def gpu(test: Callable) -> Callable:
    """Marks a test that needs one."""
    return pytest.mark.gpu(no_gpu(test))


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
    config = Config(**(small | {"average_every": 5, "swa_start": 0.5} | changes))
    return Trainer(config, prepare_crops(find_photos([SAMPLE]), "square", show=False), device)


def captured_on(device: torch.device, **changes: object) -> Trainer:
    """The same, its step captured and found to do as an eager one does."""
    trainer = trainer_on(device, **changes)
    assert capture(trainer) == "" and trainer.update_both != trainer.one_step
    return trainer


def trained(trainer: Trainer, steps: int) -> dict[str, torch.Tensor]:
    """All tensors of a run after `steps`, with its random state."""
    for k in range(steps):
        trainer.step(k / steps)
    state = trainer.state_dict()
    return state["tensors"] | {"rng": state["rng"]}


@gpu
@pytest.mark.usefixtures("exact")
def test_fifty_captured_steps_equal_fifty_eager_ones_bit_for_bit(cuda):
    eager, captured = trained(trainer_on(cuda), 50), trained(captured_on(cuda), 50)
    assert [name for name in eager if not torch.equal(eager[name], captured[name])] == []


@gpu
@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(
    "changes",
    [
        {"augment": "color,translation,cutout", "noise": 1 / 128},
        {"augment": "color", "augment_start": 0.5},
        {"condition": "breed", "classify": 0.1},
        {"r1": 1.0},
        {"r1": 1.0, "r1_every": 2},
        {"loss": "rals"},
        {"layers": "paper", "init_std": 0.02},
        {"precision": "tf32"},
        {"precision": "bf16"},
        {"precision": "fp16"},
        {"precision": "fp16", "r1": 1.0, "condition": "breed"},
    ],
    ids=lambda changes: "+".join(changes),
)
def test_whatever_the_recipe_captured_steps_equal_eager_ones(cuda, changes):
    eager, captured = (trained(make(cuda, **changes), 3) for make in (trainer_on, captured_on))
    for name, tensor in eager.items():
        torch.testing.assert_close(captured[name], tensor, rtol=1e-3, atol=1e-3)


@gpu
@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp16"])
def test_fewer_bits_give_about_the_losses_of_float32(cuda, precision):
    means = {}
    for name in ("fp32", precision):
        trainer = trainer_on(cuda, precision=name)
        trained(trainer, 30)
        means[name] = trainer.read_stats()
    for loss in ("d_loss", "g_loss"):
        assert means[precision][loss] == pytest.approx(means["fp32"][loss], rel=0.1)


@gpu
def test_capturing_leaves_weights_optimisers_and_random_state_as_they_were(cuda):
    trainer = trainer_on(cuda)
    trainer.step(0.0)
    before = trainer.state_dict()
    assert capture(trainer) == ""
    after = trainer.state_dict()
    assert torch.equal(before["rng"], after["rng"])
    assert all(torch.equal(before["tensors"][n], t) for n, t in after["tensors"].items())


@gpu
@pytest.mark.usefixtures("exact")
def test_a_checkpoint_goes_on_bit_for_bit_under_a_captured_graph(cuda):
    first, second = trainer_on(cuda), captured_on(cuda, seed=5)
    trained(first, 1)
    state = first.state_dict()
    expected = trained(first, 1)
    second.load_state_dict(state)
    found = trained(second, 1)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


@gpu
def test_a_checkpoint_of_a_gpu_goes_on_on_a_cpu_and_the_reverse(cuda):
    on_gpu, on_cpu = trainer_on(cuda), trainer_on(torch.device("cpu"))
    trained(on_gpu, 1)
    for source, target in ((on_gpu, on_cpu), (on_cpu, on_gpu)):
        assert target.load_state_dict(source.state_dict()) is False  # with fresh randomness
        trained(target, 1)
        assert target.is_healthy()


@gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_steps_never_wait_for_the_device(cuda, precision):
    trainer = captured_on(cuda, precision=precision)
    trainer.step(0.0)  # the first of 16 in its order of the dogs
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for k in range(12):  # two updates of the averages among them
            trainer.step(k / 12)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@gpu
def test_only_a_few_steps_are_in_flight_so_that_the_clock_means_something(cuda):
    trainer = captured_on(cuda, width=32, batch_size=32)
    trained(trainer, 10)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(60):
        trainer.step(0.0)
    queued = time.perf_counter()
    torch.cuda.synchronize()
    end = time.perf_counter()
    assert end - queued <= 6 * (end - begin) / 60 + 0.005


@gpu
def test_an_image_drawn_alone_on_the_gpu_differs_by_at_most_one_level(cuda):
    trainer = trainer_on(cuda)
    G = trainer.averages.generator(trainer.G, "none", 4, trainer.config)
    latents, labels = draw_latents(300, 16, 4), torch.zeros(300, dtype=torch.int64)
    full = np.concatenate(list(sample_images(G, latents, labels))).astype(int)
    for k in (0, 127, 128, 299):
        (alone,) = sample_images(G, latents[k : k + 1], labels[:1])
        assert np.abs(alone[0] - full[k]).max() <= 1
    on_cpu = np.concatenate(list(sample_images(G.cpu(), latents, labels))).astype(int)
    assert np.abs(on_cpu - full).max() <= 1


@gpu
def test_a_whole_run_and_its_continuation_on_the_gpu(cuda, tmp_path):
    out = Path(tmp_path / "out")
    assert run_here(out, device="cuda", width=4, steps=40) == 0
    assert run_here(out, device="cuda", width=4, steps=60) == 0
    assert resumed_steps(out) == [40]
    assert load(out / "checkpoint.pt")["trainer"]["steps_done"] == 60
    assert len(pixels(out / "images.zip")) == 40
