"""Which device is taken or refused, before the data is touched; and what only a GPU can show."""

from __future__ import annotations

import ast
from collections.abc import Iterator
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
    capture,
    choose_device,
    draw_latents,
    find_photos,
    load_trainer,
    prepare_crops,
    sample_images,
    trainer_state,
)

pytestmark = pytest.mark.usefixtures("light")


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> list[object]:
    """One GPU that torch calls available, on which no kernel runs: a P100 under CUDA 12.8.

    Returns a list to which each search for photos adds an item.
    """
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "set_device", lambda *_: None)
    ones, touched = torch.ones, []

    def dying(*size: object, device: object = None, **more: object) -> torch.Tensor:
        if device is not None and torch.device(device).type == "cuda":
            raise RuntimeError(
                "CUDA error: no kernel image is available for execution on the device\n"
                "CUDA kernel errors might be asynchronously reported at some other API call."
            )
        return ones(*size, device=device, **more)

    monkeypatch.setattr(torch, "ones", dying)
    monkeypatch.setattr(train_dogs, "find_photos", lambda *paths: touched.append(paths))
    return touched


@pytest.mark.parametrize("device", ["auto", "cuda:0"])
def test_a_gpu_on_which_no_kernel_runs_is_refused_before_the_data_is_touched(
    device, tmp_path, monkeypatch, capsys
):
    touched = pretend_gpu(monkeypatch, (6, 0))
    assert run_here(tmp_path / "out", steps=3, device=device) == 2
    err = capsys.readouterr().err
    remedies = ["T4", "L4", "2025", "CUDA 12.6"]  # in this order
    assert_one_sentence(err, "sm_60", "no kernel image", *remedies)
    assert [err.rindex(r) for r in remedies] == sorted(err.rindex(r) for r in remedies)
    assert touched == [] and not (tmp_path / "out").exists()


def pretend_convolutions(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], error: Exception | None
) -> list[torch.dtype]:
    """A GPU whose convolutions raise `error`, or run on the CPU; the dtypes of those tried."""
    pretend_gpu(monkeypatch, capability)
    convolve, tried = torch.nn.functional.conv2d, []

    def on_cpu(*size: object, device: object = None, **more: object) -> torch.Tensor:
        return torch.full(*size, 1.0, **more)

    def tried_conv(x: torch.Tensor, *inputs: object, **more: object) -> torch.Tensor:
        tried.append(x.dtype)
        if error is not None:
            raise error
        return convolve(x, *inputs, **more)

    monkeypatch.setattr(torch, "ones", on_cpu)
    monkeypatch.setattr(torch.nn.functional, "conv2d", tried_conv)
    return tried


@pytest.mark.parametrize(
    ("precision", "dtype"), [("auto", torch.float16), ("bf16", torch.bfloat16)]
)
def test_a_convolution_in_the_precision_of_the_run_decides_whether_a_gpu_is_taken(
    precision, dtype, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        tried = pretend_convolutions(patch, (7, 0), None)
        assert choose_device("cuda", precision) == torch.device("cuda", 0) and tried == [dtype]
    error = RuntimeError("GET was unable to find an engine to execute this computation")
    tried = pretend_convolutions(monkeypatch, (7, 0), error)
    assert run_here(tmp_path / "out", steps=3, device="cuda", precision=precision) == 2
    remedies = ["--precision auto"] * (precision != "auto") + ["T4", "CUDA 12.6"]
    assert_one_sentence(capsys.readouterr().err, "sm_70", "find an engine", *remedies)
    assert tried == [dtype]


@pytest.mark.parametrize(
    ("precision", "capability", "emulated"),
    [("auto", (6, 0), False), ("bf16", (7, 5), True), ("bf16", (8, 0), False)],
)
def test_bf16_that_a_gpu_emulates_is_one_sentence_and_goes_on(
    precision, capability, emulated, monkeypatch, capsys
):
    tried = pretend_convolutions(monkeypatch, capability, None)
    assert choose_device("cuda", precision) == torch.device("cuda", 0) and len(tried) == 1
    assert ("--precision auto" in capsys.readouterr().out) is emulated


def test_a_gpu_that_is_full_is_not_called_too_old(tmp_path, monkeypatch, capsys):
    pretend_convolutions(monkeypatch, (7, 5), RuntimeError("CUDA error: out of memory"))
    assert run_here(tmp_path / "out", steps=3, device="cuda") == 2
    err = capsys.readouterr().err
    assert_one_sentence(err, "memory is too small")
    assert "T4" not in err


def test_a_device_that_is_not_here_is_one_sentence_with_those_that_are(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    assert run_here(tmp_path / "out", device="cuda") == 2
    assert_one_sentence(capsys.readouterr().err, "--device cuda is", "auto, cpu,", "turn a GPU on")
    pretend_gpu(monkeypatch, (7, 5))
    for device in ("tpu", "cuda:", "cuda:1", "cuda:-1", "cuda:²", "CPU "):
        assert run_here(tmp_path / "out", device=device) == 2
        assert_one_sentence(capsys.readouterr().err, f"--device {device} is", "auto, cpu, cuda:0,")


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
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
    ids=lambda error: str(error)[:12],
)
def test_out_of_memory_in_any_form_names_a_smaller_batch(error, tmp_path, monkeypatch, capsys):
    def hungry(*inputs: object) -> None:
        raise error

    monkeypatch.setattr(train_dogs, "start_run", hungry)
    assert run_here(tmp_path / "out", batch_size=16) == 2
    engine = ["--precision fp32"] if "engine" in str(error) else []
    assert_one_sentence(capsys.readouterr().err, "--fresh --batch-size 8", "more memory", *engine)
    assert run_here(tmp_path / "out", "--resume", "other.pt", batch_size=16) == 2
    assert_one_sentence(capsys.readouterr().err, "--fresh instead of --resume --batch-size 8")


def test_out_of_memory_leaves_whole_files_and_each_remedy_that_it_names_works(
    tmp_path, monkeypatch, capsys
):
    def hungry(*inputs: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    def refused(*flags: str, **changes: object) -> str:
        assert run_here(out, *flags, images=4, **changes) == 2
        return capsys.readouterr().err.splitlines()[-1]

    out = tmp_path / "out"
    with monkeypatch.context() as patch:  # in a new run
        patch.setattr(Trainer, "step", hungry)
        assert_one_sentence(refused(steps=3, batch_size=16), "--fresh --batch-size 8")
    assert left_over(out) == [] and all(load(path) for path in out.glob("*.pt"))
    assert run_here(out, "--fresh", steps=3, images=4, batch_size=8) == 0
    with monkeypatch.context() as patch:  # in a resumed one
        patch.setattr(Trainer, "step", hungry)
        assert_one_sentence(refused(steps=6, batch_size=8), "--fresh --batch-size 4")
    assert "--batch-size 8" in refused(steps=6, batch_size=4)  # the checkpoint keeps it
    assert run_here(out, "--fresh", steps=6, images=4, batch_size=4) == 0
    with monkeypatch.context() as patch:
        patch.setattr(train_dogs, "sample_images", hungry)
        err = refused("--sample-only", data=None, batch_size=4)
    assert_one_sentence(err, "--device cpu")
    assert "--batch-size" not in err


# ---------------------------------------------------------------------------------- on a real GPU


@pytest.fixture
def cuda() -> Iterator[torch.device]:
    """The GPU, with cuDNN's choice by measurement, as in every run."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        yield choose_device("cuda")


@pytest.fixture
def exact(cuda: torch.device) -> Iterator[None]:
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
    assert capture(trainer) == "" and trainer.update_networks != trainer.one_step
    return trainer


def trained(trainer: Trainer, steps: int, start: int = 0) -> dict[str, torch.Tensor]:
    """All tensors of a run of 50 steps after `steps` from `start` on, with its random state."""
    for k in range(start, start + steps):
        trainer.step(k / 50)
    state = trainer_state(trainer)
    return state["tensors"] | {"rng": state["rng"]}


@pytest.mark.gpu
@pytest.mark.usefixtures("exact")
def test_fifty_eager_steps_equal_captured_ones_that_are_resumed_half_way_bit_for_bit(cuda):
    """So a capture changes nothing in the trainer, and a replay reads what is loaded."""
    eager, first = trainer_on(cuda), captured_on(cuda)
    trained(first, 25)
    half = trainer_state(first)  # before the next capture takes the generator that graphs share
    second = captured_on(cuda, seed=5)
    load_trainer(second, half)
    expected, found = trained(eager, 50), trained(second, 25, 25)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


RESIDUAL = {"architecture": "residual", "condition": "breed", "classify": 0.1, "loss": "rals"}
CLASSES = {
    "architecture": "paper", "condition": "classes", "classify": 1.0, "g_norm": "virtual",
    "minibatch_features": 3,
}  # fmt: skip
CAPTURED = {
    **{loss: {"loss": loss} for loss in train_dogs.LOSSES},
    **{name: {"architecture": name, "init_std": 0.02} for name in train_dogs.LAYERS},
    **{name: {"precision": name} for name in ("tf32", "bf16", "fp16")},
    "the default": {"width": 48, "latent_dim": 256, "batch_size": 32, "precision": "bf16"},
    "augmented": {"augment": "color,translation,cutout", "noise": 1 / 128},
    "breed r1": {"condition": "breed", "classify": 0.1, "r1": 1.0},
    "breed fp16 r1": {"precision": "fp16", "r1": 1.0, "condition": "breed"},
    "residual": RESIDUAL,
    "residual bf16 r1": RESIDUAL | {"precision": "bf16", "r1": 1.0},
    "residual fp16 r1": RESIDUAL | {"precision": "fp16", "r1": 1.0},
    "improved": CLASSES | {"labelled": 0.5},
    "improved bf16": CLASSES | {"precision": "bf16"},
    "improved fp16 r1": CLASSES | {"precision": "fp16", "r1": 10.0},
    "matching history": {"loss": "matching", "history": 0.1},
    "rals breed bf16": {"loss": "rals", "condition": "breed", "precision": "bf16"},
    "no learning": {"g_lr": 0.0, "d_lr": 0.0},
}


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", CAPTURED)
def test_every_recipe_is_captured_without_alarm_and_its_replay_learns(cuda, recipe):
    """`capture` itself compares the whole state after a replayed and an eager step."""
    trainer = captured_on(cuda, **CAPTURED[recipe])
    before = [p.detach().clone() for p in trainer.G.parameters()]
    trained(trainer, 25)
    moved = any(not torch.equal(a, b) for a, b in zip(before, trainer.G.parameters()))
    assert trainer.is_healthy() and moved is (recipe != "no learning")


@pytest.mark.gpu
def test_where_memory_is_too_small_for_a_graph_it_is_freed_and_steps_go_on(cuda, monkeypatch):
    trainer = trainer_on(cuda, width=16, batch_size=32)
    trainer.step(0.0)
    torch.cuda.synchronize()
    before, compare = torch.cuda.memory_allocated(), train_dogs.compare_steps

    def full(*inputs: object) -> str:
        compare(*inputs)
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(train_dogs, "compare_steps", full)
    assert "out of memory" in capture(trainer) and trainer.update_networks == trainer.one_step
    assert torch.cuda.memory_allocated() <= 1.1 * before + 2**25  # cuBLAS keeps a workspace
    trainer.step(0.0)
    assert trainer.is_healthy()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp16"])
def test_fewer_bits_give_about_the_losses_of_float32(cuda, precision):
    means = {}
    for name in ("fp32", precision):
        trainer = trainer_on(cuda, precision=name)
        trained(trainer, 30)
        means[name] = trainer.read_stats()
    for loss in ("d_loss", "g_loss"):
        assert means[precision][loss] == pytest.approx(means["fp32"][loss], rel=0.1)


@pytest.mark.gpu
def test_a_checkpoint_of_a_gpu_goes_on_on_a_cpu_and_the_reverse(cuda):
    on_gpu, on_cpu = trainer_on(cuda), trainer_on(torch.device("cpu"))
    trained(on_gpu, 1)
    for source, target in ((on_gpu, on_cpu), (on_cpu, on_gpu)):
        assert load_trainer(target, trainer_state(source)) is False  # with fresh randomness
        trained(target, 1)
        assert target.is_healthy()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
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


@pytest.mark.gpu
def test_at_most_4_steps_are_in_flight_so_that_the_clock_means_something(cuda):
    """The only wait in a step is for the end of the fifth last one."""
    trainer, ends = captured_on(cuda, width=32, batch_size=32), []
    for _ in range(60):
        trainer.step(0.0)
        ends.append(trainer._in_flight[-1])
        assert all(end.query() for end in ends[:-4])


@pytest.mark.gpu
def test_an_image_drawn_alone_on_the_gpu_differs_by_at_most_one_level(cuda):
    trainer = trainer_on(cuda)
    G = trainer.averages.generator(trainer.G, "none", 4, trainer.config)
    latents, labels = draw_latents(300, trainer.config, "sheet"), torch.zeros(300).long()
    full = np.concatenate(list(sample_images(G, latents, labels))).astype(int)
    for k in (0, 127, 128, 299):
        (alone,) = sample_images(G, latents[k : k + 1], labels[:1])
        assert np.abs(alone[0] - full[k]).max() <= 1
    on_cpu = np.concatenate(list(sample_images(G.cpu(), latents, labels))).astype(int)
    assert np.abs(on_cpu - full).max() <= 1


@pytest.mark.gpu
def test_a_whole_run_and_its_continuation_on_the_gpu(cuda, tmp_path):
    out = Path(tmp_path / "out")
    assert run_here(out, device="cuda", width=4, steps=40) == 0
    assert run_here(out, device="cuda", width=4, steps=60) == 0
    assert resumed_steps(out) == [40]
    assert load(out / "checkpoint.pt")["trainer"]["steps_done"] == 60
    assert len(pixels(out / "images.zip")) == 40


@pytest.mark.gpu
def test_after_a_capture_that_a_wait_invalidates_steps_go_on(cuda, monkeypatch):
    """The last test, as it leaves CUDA's default generator in capture mode."""
    trainer = trainer_on(cuda)
    judge = trainer.judge

    def waiting(*args: object) -> train_dogs.Seen:
        seen = judge(*args)
        seen.fake.logits.sum().item()  # no capture may wait for the device
        return seen

    monkeypatch.setattr(trainer, "judge", waiting)
    assert "CUDA graph" in capture(trainer) and trainer.update_networks == trainer.one_step
    trained(trainer, 3)
    assert trainer.is_healthy()
