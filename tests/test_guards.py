"""What a CUDA graph and its fused optimiser need, guarded on a CPU, for every preset and term."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from runs import SAMPLE, STEPS, load, run_here, sha
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import train_dogs
from train_dogs import (
    ADVERSARIAL,
    AUGMENTS,
    D_TERMS,
    G_TERMS,
    PRESETS,
    ROUNDING,
    Config,
    CropSet,
    Report,
    Trainer,
    capture,
    distance,
    find_photos,
    largest_deviation,
    prepare_crops,
    update,
)

pytestmark = pytest.mark.usefixtures("light")

CPU, META = torch.device("cpu"), torch.device("meta")
IMPROVED = {
    "condition": "classes", "classify": 1.0, "labelled": 0.5, "g_norm": "virtual", "r1": 1.0,
    "minibatch_features": 3, "history": 0.1, "loss": "matching",
}  # fmt: skip
EVERYTHING = {
    "condition": "breed", "classify": 0.5, "r1": 1.0, "noise": 0.1, "augment": ",".join(AUGMENTS),
    "augment_start": 0.5, "contrast": 2.0,
}  # fmt: skip
RECIPES = {
    **PRESETS,
    "r1": {"r1": 1.0},
    "lazy r1": {"r1": 1.0, "r1_every": 3},
    "everything": EVERYTHING,
    "rals": {"loss": "rals"},
    "bf16": EVERYTHING | {"loss": "rals", "precision": "bf16"},
    "fp16": EVERYTHING | {"precision": "fp16"},
    "residual r1": {"layers": "residual", "r1": 1.0},
    "residual bf16": EVERYTHING | {"layers": "residual", "loss": "rals", "precision": "bf16"},
    "residual fp16": EVERYTHING | {"layers": "residual", "precision": "fp16"},
    "matching": {"loss": "matching"},
    "history": {"history": 1.0},
    "minibatch": {"minibatch_features": 3, "r1": 1.0},
    "virtual": {"g_norm": "virtual"},
    "classes": {"condition": "classes", "classify": 1.0, "labelled": 0.5},
    "improved bf16": IMPROVED | {"precision": "bf16"},
    "improved fp16": IMPROVED | {"precision": "fp16"},
}
recipes = pytest.mark.parametrize("recipe", RECIPES)


@pytest.fixture(scope="module")
def dogs(own_cache: Path) -> CropSet:
    """The drawn sample, cropped."""
    return prepare_crops(find_photos([SAMPLE]), "square", show=False)


def trainer_of(
    recipe: str, dogs: CropSet, device: torch.device = CPU, **changes: object
) -> Trainer:
    """A small trainer, both of whose averages take in every step."""
    small = {"width": 2, "latent_dim": 8, "batch_size": 4, "average_every": 1, "swa_start": 0.0}
    return Trainer(
        Config(**({"precision": "fp32"} | RECIPES[recipe] | small | changes)), dogs, device
    )


def test_the_recipes_hold_every_loss_and_term():
    for name in (*D_TERMS, *G_TERMS):
        assert any(changes.get(name) for changes in RECIPES.values()), name
    assert {changes.get("loss", "margin") for changes in RECIPES.values()} == set(ADVERSARIAL)


# ------------------------------------------------------------------- what the optimiser is handed


def watch_adam(monkeypatch: pytest.MonkeyPatch, beta1: float) -> list[Tensor]:
    """Let each Adam step fail whose gradients are not laid out, or not used, as they should be."""
    step, seen = torch.optim.Adam.step, []

    def checked(adam: torch.optim.Adam) -> None:
        parameters = adam.param_groups[0]["params"]
        for p in parameters:
            assert p.grad.stride() == p.stride() and p.grad.dtype == p.dtype
        scale = getattr(adam, "grad_scale", None)
        gradients = [p.grad.clone() / (1.0 if scale is None else scale) for p in parameters]
        seen.extend(gradients)
        before = [adam.state[p]["exp_avg"].clone() for p in parameters]
        step(adam)
        for p, g, m in zip(parameters, gradients, before):
            expected = beta1 * m + (1 - beta1) * g
            torch.testing.assert_close(
                adam.state[p]["exp_avg"], expected, rtol=1e-4, atol=1e-5 * float(g.abs().max())
            )

    monkeypatch.setattr(torch.optim.Adam, "step", checked)
    return seen


@recipes
def test_adam_sees_gradients_laid_out_like_their_parameters_and_uses_them(
    recipe, dogs, monkeypatch
):
    trainer = trainer_of(recipe, dogs)
    trainer.loss_scale.fill_(16.0)  # low enough that fp16 skips no step
    seen = watch_adam(monkeypatch, trainer.config.beta1)
    for _ in range(2):
        trainer.step(0.0)
    parameters = [*trainer.D.parameters(), *trainer.G.parameters()]
    assert len(seen) == 2 * len(parameters) and max(float(g.abs().max()) for g in seen) > 0


def test_the_guard_of_layouts_sees_r1_without_its_mend(dogs, monkeypatch):
    trainer = trainer_of("r1", dogs)
    watch_adam(monkeypatch, trainer.config.beta1)
    monkeypatch.setattr(train_dogs, "laid_out_like", lambda gradient, parameter: gradient)
    with pytest.raises(AssertionError):
        trainer.step(0.0)


class Transposed(torch.autograd.Function):
    """The sum of the products with 0, 1, 2, …, whose gradient has the strides of `order`."""

    @staticmethod
    def forward(context: object, weight: Tensor, order: tuple[int, ...]) -> Tensor:
        context.shape, context.order = weight.shape, order
        return (weight * torch.arange(weight.numel()).view(weight.shape)).sum()

    @staticmethod
    def backward(context: object, above: Tensor) -> tuple[Tensor, None]:
        values = torch.arange(math.prod(context.shape), dtype=torch.float32).view(context.shape)
        inverse = [context.order.index(k) for k in range(4)]
        return above * values.permute(context.order).contiguous().permute(inverse), None


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (1, 0, 3, 2), (3, 2, 1, 0)])
def test_a_gradient_of_any_strides_is_used_element_by_element(fused, layout, order):
    weight = nn.Parameter(torch.zeros(3, 4, 2, 5).contiguous(memory_format=layout))
    adam = torch.optim.Adam([weight], betas=(0.5, 0.9), fused=fused)
    update(adam, Transposed.apply(weight, order))
    expected = torch.arange(120, dtype=torch.float32).view(3, 4, 2, 5) / 2
    torch.testing.assert_close(adam.state[weight]["exp_avg"], expected)
    update(adam, weight.sum())  # whose gradient is one number, of strides 0
    torch.testing.assert_close(adam.state[weight]["exp_avg"], expected / 2 + 0.5)


# ------------------------------------------------------------------ nothing that waits for a device

WAITS = ("_local_scalar_dense", "lift_fresh", "nonzero", "masked_select", "is_nonzero", "equal")


class Watch(TorchDispatchMode):
    """Fails at an operator that waits for a device, and at tensors of another than `device`."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.seen = device, 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name, tensors = operator.overloadpacket.__name__, []
        torch.utils._pytree.tree_map_only(Tensor, tensors.append, (args, kwargs))
        assert name not in WAITS, name
        if name in ("index", "index_put", "index_put_"):
            indices = [t for t in args[1] if t is not None]
            assert not any(t.dtype in (torch.bool, torch.uint8) for t in indices), name
        assert all(t.device == self.device for t in tensors), f"{name} across devices"
        self.seen += 1
        return operator(*args, **(kwargs or {}))


def step_watched(trainer: Trainer, device: torch.device) -> None:
    """A step and its averages, and what adds up beside them."""
    trainer.step(0.0)  # begins an order of the dogs
    with Watch(device) as watch:
        trainer.step(0.5)
    assert watch.seen > 200


@recipes
def test_neither_a_step_nor_an_average_waits_for_the_device(recipe, dogs):
    trainer = trainer_of(recipe, dogs, lr_decay_start=0.1)
    step_watched(trainer, CPU)
    assert trainer.averages.swa_updates == trainer.averages.ema_updates == 2


@pytest.fixture
def no_adam(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Adam, which is not fused on the device of shapes alone."""
    monkeypatch.setattr(torch.optim.Adam, "step", lambda adam: None)


@recipes
@pytest.mark.usefixtures("no_adam")
def test_nothing_crosses_between_devices(recipe, dogs):
    changes = {"precision": "bf16"} if "fp16" in recipe else {}  # its scale wants fused Adam
    step_watched(trainer_of(recipe, dogs, META, **changes), META)


FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "item": lambda loss: loss * loss.detach().item(),
    "constant": lambda loss: loss * torch.tensor(1.0),
    "nonzero": lambda loss: loss + torch.nonzero(loss.detach()).sum(),
    "boolean index": lambda loss: loss[None][loss[None] > 0].sum(),
    "if": lambda loss: loss if loss > 0 else -loss,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_guard_of_waiting_sees_each_of_its_kind(fault, dogs, monkeypatch):
    d_term, g_term = ADVERSARIAL["margin"]
    faulty = d_term._replace(loss=lambda seen: FAULTS[fault](d_term.loss(seen)))
    monkeypatch.setitem(ADVERSARIAL, "margin", (faulty, g_term))
    with pytest.raises(AssertionError):
        step_watched(trainer_of("dogs", dogs), CPU)


@pytest.mark.usefixtures("no_adam")
def test_the_guard_of_devices_sees_a_tensor_of_another(dogs, monkeypatch):
    monkeypatch.setitem(AUGMENTS, "color", lambda x, generator: x * torch.ones((), device=CPU))
    with pytest.raises(AssertionError, match="across devices"):
        step_watched(trainer_of("everything", dogs, META), META)


# ------------------------------------------------------------------ everything stays where it is


def addresses(trainer: Trainer) -> dict[str, int]:
    """Where all lies that a replay reads or writes."""
    found = dict(trainer.tensors())
    for name, network in (("G", trainer.G), ("D", trainer.D)):
        found |= {f"{name} {k}": p for k, p in network.named_parameters()}
    for name, adam in (("g", trainer.opt_g), ("d", trainer.opt_d)):
        found |= {f"parameter {name} {i}": p for i, p in enumerate(adam.param_groups[0]["params"])}
        found[f"rate {name}"] = adam.param_groups[0]["lr"]
    crops = trainer.batches.crops
    names = ("pixels", "first", "count", "weights", "breed")
    found |= {f"crops {n}": getattr(crops, n) for n in names}
    return {name: tensor.data_ptr() for name, tensor in found.items() if tensor.numel()}


@recipes
def test_what_a_replay_touches_never_moves(recipe, dogs, tmp_path):
    trainer, other = (trainer_of(recipe, dogs, seed=s, lr_decay_start=0.5) for s in (0, 1))
    for adam in (trainer.opt_g, trainer.opt_d):
        adam.param_groups[0]["lr"] = torch.tensor(adam.param_groups[0]["lr"])  # as on a GPU
    before = addresses(trainer)
    options = train_dogs.parse(["--out", str(tmp_path)])
    clock = train_dogs.Clock(trainer.config, 0.0, 0.0)
    train_dogs.write_checkpoint(tmp_path, train_dogs.checkpoint_state(trainer, clock))
    trainer.step(0.0)
    trainer.step(0.75)  # half of the rates
    rates = [float(adam.param_groups[0]["lr"]) for adam in (trainer.opt_g, trainer.opt_d)]
    assert rates == pytest.approx([trainer.config.g_lr / 2, trainer.config.d_lr / 2])
    trainer.batches.shuffle()
    trainer.read_stats(), trainer.is_healthy(), trainer.state_dict()
    trainer.averages.generator(trainer.G, "swa", 1, trainer.config)
    assert trainer.load_state_dict(other.state_dict())
    first = [next(iter(t.G.parameters())) for t in (trainer, other)]
    assert torch.equal(*first) and addresses(trainer) == before
    assert train_dogs.roll_back(trainer, Report(tmp_path), options)
    assert not torch.equal(*first) and addresses(trainer) == before


def test_a_rollback_restores_the_averages_too(dogs, tmp_path):
    trainer = trainer_of("dogs", dogs)
    trainer.step(0.0)
    saved, clock = trainer.state_dict(), train_dogs.Clock(trainer.config, 0.0, 0.0)
    train_dogs.write_checkpoint(tmp_path, train_dogs.checkpoint_state(trainer, clock))
    with torch.no_grad():
        next(iter(trainer.G.parameters())).fill_(math.nan)
    trainer.step(0.0)
    assert not trainer.is_healthy() and not all(t.isfinite().all() for t in trainer.averages.ema)
    train_dogs.roll_back(trainer, Report(tmp_path), train_dogs.parse(["--out", str(tmp_path)]))
    assert_as_before(trainer, saved, ("rollbacks", "rng"))


# ----------------------------------------------------------------- the capture, with CUDA pretended


def assert_as_before(trainer: Trainer, before: dict, but: tuple[str, ...] = ()) -> None:
    """That the state is bit-equal, random state and counters included."""
    after = trainer.state_dict()
    for name in before.keys() - {"tensors", *but}:
        same = torch.equal if name == "rng" else lambda a, b: a == b
        assert same(before[name], after[name]), name
    changed = [k for k, t in before["tensors"].items() if not torch.equal(t, after["tensors"][k])]
    assert changed == []


class PretendedGpu(str):
    """Says that it is a GPU, and is the CPU to torch."""

    type, index = "cuda", 0


class Graph:
    """Of the one kind of step that it has recorded."""

    lazy: bool | None = None

    def __init__(self, graphs: Graphs) -> None:
        self.graphs = graphs

    def replay(self) -> None:
        assert self.lazy is not None
        self.graphs.replay(self.lazy)


class Graphs:
    """Stands in for `torch.cuda`: a capture leaves the state alone, and a replay is a step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, trainer: Trainer) -> None:
        self.trainer, self.capturing, self.monkeypatch = trainer, False, monkeypatch
        self.at_end: Exception | None = None  # what the end of a broken capture raises itself
        autocast = Trainer(trainer.config, trainer.crops, CPU).autocast
        monkeypatch.setattr(trainer, "autocast", autocast)  # of the CPU, on which it is
        trainer.device = PretendedGpu("cpu")
        for name in ("Stream", "Event", "current_stream"):
            monkeypatch.setattr(torch.cuda, name, lambda *_: self)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(self))
        monkeypatch.setattr(torch.cuda, "default_generators", [torch.Generator()])
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: warnings.catch_warnings())
        monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: self.captured(graph))

    @contextmanager
    def captured(self, graph: Graph) -> Iterator[None]:
        before, self.capturing, step = self.trainer.state_dict(), True, self.trainer.one_step

        def recorded(lazy: bool) -> None:
            graph.lazy = lazy
            step(lazy)

        try:
            with self.monkeypatch.context() as patch:
                patch.setattr(self.trainer, "one_step", recorded)
                yield
        except BaseException:
            if self.at_end is not None:
                raise self.at_end from None
            raise
        finally:
            self.capturing = False
            self.trainer.load_state_dict(before)

    def replay(self, lazy: bool) -> None:
        self.trainer.one_step(lazy)

    def wait_stream(self, stream: object) -> None:
        pass

    record = synchronize = lambda self: None


def fail_in_step(monkeypatch: pytest.MonkeyPatch, at: Callable[[int], bool], error: BaseException):
    """Let a step raise, half done, where `at` says so of its number from 0."""
    steps, change = [], train_dogs.update

    def failing(adam: torch.optim.Adam, loss: Tensor, scale: Tensor | None = None) -> None:
        steps.append(adam)
        if len(steps) % 2 == 0 and at(len(steps) // 2 - 1):  # D has been updated, G is not
            raise error
        change(adam, loss, scale)

    monkeypatch.setattr(train_dogs, "update", failing)


def pretended(
    monkeypatch: pytest.MonkeyPatch, dogs: CropSet, recipe: str = "dogs"
) -> tuple[Trainer, Graphs, dict]:
    """A trainer after a step, its pretended CUDA, and its state."""
    trainer = trainer_of(recipe, dogs)
    trainer.step(0.0)
    return trainer, Graphs(monkeypatch, trainer), trainer.state_dict()


@recipes
def test_a_capture_leaves_all_as_it_was_and_its_replay_is_what_steps_do(recipe, dogs, monkeypatch):
    trainer, _, before = pretended(monkeypatch, dogs, recipe)
    assert capture(trainer) == ""
    assert_as_before(trainer, before)
    assert trainer.update_both.__name__ == "replay"
    assert not any(a.param_groups[0]["capturable"] for a in (trainer.opt_g, trainer.opt_d))
    eager = trainer_of(recipe, dogs)
    for k in range(7):  # more than may be in flight
        eager.step(0.0)
        trainer.step(0.0) if k else None
    assert_as_before(trainer, eager.state_dict())


@pytest.mark.parametrize("at_end", [None, RuntimeError("the capture was invalidated")])
def test_what_the_captured_step_raised_is_the_reason_and_the_run_goes_on(at_end, dogs, monkeypatch):
    trainer, graphs, before = pretended(monkeypatch, dogs)
    graphs.at_end = at_end
    with monkeypatch.context() as patch:
        fail_in_step(patch, lambda _: graphs.capturing, RuntimeError("no such kernel\nat all"))
        reason = capture(trainer)
    assert "captured" in reason and "no such kernel" in reason and "\n" not in reason
    assert_as_before(trainer, before)
    assert trainer.rng is trainer.batches.rng and trainer.update_both == trainer.one_step
    trainer.step(0.0)
    assert trainer.is_healthy()


@pytest.mark.parametrize("at_end", [None, RuntimeError("the capture was invalidated")])
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), torch.cuda.OutOfMemoryError("CUDA out of memory.")]
)
def test_an_interrupt_or_a_full_memory_anywhere_comes_out_and_spoils_nothing(
    error, at_end, dogs, monkeypatch
):
    """In each of the three steps of warm-up, the captured one, and the two that are compared."""
    for number in range(6):
        trainer, graphs, before = pretended(monkeypatch, dogs)
        graphs.at_end = at_end
        with monkeypatch.context() as patch:
            fail_in_step(patch, lambda k, number=number: k == number, error)
            with pytest.raises(type(error)) as raised:
                capture(trainer)
        assert raised.value is error
        assert_as_before(trainer, before)
        assert not any(a.param_groups[0]["capturable"] for a in (trainer.opt_g, trainer.opt_d))
        assert trainer.update_both == trainer.one_step


@pytest.mark.parametrize("recipe", ["dogs", "fp16"])
def test_where_fused_adam_refuses_the_run_goes_on_without_it(recipe, dogs, monkeypatch):
    trainer, _, before = pretended(monkeypatch, dogs, recipe)
    step, usual = torch.optim.Adam.step, trainer_of(recipe, dogs)

    def refusing(adam: torch.optim.Adam) -> None:
        if adam.param_groups[0]["fused"]:
            raise RuntimeError("params, grads must have same dtype, device, and layout")
        step(adam)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", refusing)
        reason = capture(trainer)
        assert_as_before(trainer, before)
        trainer.step(0.0)
    assert "fused Adam" in reason and "same dtype" in reason
    usual.step(0.0), usual.step(0.0)
    for ours, theirs in zip(trainer.G.parameters(), usual.G.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def other_data(trainer: Trainer) -> None:
    """A step on other dogs."""
    trainer.batches.cursor += 17
    trainer.one_step()


def half_a_step(trainer: Trainer) -> None:
    """A step that leaves G as it is."""
    before = [p.detach().clone() for p in trainer.G.parameters()]
    trainer.one_step()
    with torch.no_grad():
        torch._foreach_copy_(list(trainer.G.parameters()), before)


@pytest.mark.parametrize("wrong", [lambda trainer: None, other_data, half_a_step])
@pytest.mark.parametrize("precision", ROUNDING)
def test_a_replay_that_does_something_else_is_refused(wrong, precision, dogs, monkeypatch):
    trainer, graphs, before = pretended(monkeypatch, dogs)
    trainer.precision, graphs.replay = precision, lambda lazy: wrong(trainer)
    reason = capture(trainer)
    assert "off an eager one" in reason and trainer.update_both == trainer.one_step
    assert_as_before(trainer, before)


@pytest.mark.parametrize("wrong", [True, False])
def test_where_either_of_two_replays_does_something_else_it_is_refused(wrong, dogs, monkeypatch):
    """A step with R1 and one without are a graph each."""
    trainer, graphs, before = pretended(monkeypatch, dogs, "lazy r1")
    graphs.replay = lambda lazy: None if lazy == wrong else trainer.one_step(lazy)
    assert "off an eager one" in capture(trainer)
    assert_as_before(trainer, before)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_rounding_of_the_gradients_alone_is_not_refused(precision, dogs, monkeypatch):
    trainer, graphs, _ = pretended(monkeypatch, dogs)
    lay_out, rounding = train_dogs.laid_out_like, ROUNDING[precision]

    def rounded(gradient: Tensor, parameter: Tensor) -> Tensor:
        noise = rounding * gradient.std(correction=0) * torch.randn(gradient.shape)
        return lay_out(gradient + noise, parameter)

    def replay(lazy: bool) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(train_dogs, "laid_out_like", rounded)
            trainer.one_step()

    trainer.precision, graphs.replay = precision, replay
    assert capture(trainer) == ""


@pytest.mark.parametrize("precision", ROUNDING)
def test_the_bound_is_four_times_what_such_noise_does_to_adams_first_step(precision):
    chance, noise = torch.Generator().manual_seed(0), ROUNDING[precision]
    gradient = torch.randn(4_000_000, generator=chance)
    ends = []
    for g in (gradient, gradient + noise * torch.randn(gradient.shape, generator=chance)):
        weight = nn.Parameter(torch.zeros_like(g))
        update(torch.optim.Adam([weight], lr=1.0, eps=1e-12), (weight * g).sum())
        ends.append(weight.detach())
    way = distance(ends[:1], [torch.zeros_like(gradient)])
    apart = distance(ends[1:], ends[:1]) / way
    assert apart == pytest.approx(2 * math.sqrt(noise / math.pi), rel=0.1)
    assert largest_deviation(precision) == pytest.approx(4 * apart, rel=0.1)


# -------------------------------------------------------------- another kind of device's randomness


class OtherGenerator:
    """A GPU's: its state is of 16 bytes, and it takes no other."""

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def get_state(self) -> Tensor:
        return torch.zeros(16, dtype=torch.uint8)

    def set_state(self, state: Tensor) -> None:
        if len(state) != 16:
            raise RuntimeError("RNG state is wrong size")

    def manual_seed(self, seed: int) -> None:
        self.seeds.append(seed)


def test_a_state_of_another_kind_of_device_goes_on_with_fresh_randomness(dogs):
    trainer, other = trainer_of("dogs", dogs), trainer_of("dogs", dogs, seed=9)
    other.step(0.0)
    state = other.state_dict()
    assert trainer.load_state_dict(state | {"rng": torch.zeros(16, dtype=torch.uint8)}) is False
    assert_as_before(trainer, state, ("rng",))
    fresh = trainer.state_dict()["rng"]
    assert not any(
        torch.equal(fresh, t.state_dict()["rng"]) for t in (other, trainer_of("dogs", dogs))
    )
    trainer.step(0.0)
    assert trainer.is_healthy() and trainer.load_state_dict(state) is True
    trainer.rng = OtherGenerator()
    assert trainer.load_state_dict(state) is False and len(trainer.rng.seeds) == 1
    assert trainer.load_state_dict(state | {"rng": trainer.rng.get_state()}) is True


def test_a_run_of_a_gpu_is_resumed_and_its_finished_zip_written_again(
    finished_run, tmp_path, capsys
):
    state = load(finished_run / "checkpoint.pt")
    state["trainer"]["rng"] = torch.zeros(16, dtype=torch.uint8)
    torch.save(state, tmp_path / "checkpoint.pt")
    assert run_here(tmp_path, steps=STEPS) == 0
    assert sha(tmp_path / "images.zip") == sha(finished_run / "images.zip")
    torch.save(state, tmp_path / "checkpoint.pt")
    assert run_here(tmp_path, steps=STEPS + 3, images=2) == 0
    assert "fresh randomness" in capsys.readouterr().out
    assert load(tmp_path / "checkpoint.pt")["trainer"]["steps_done"] == STEPS + 3


@recipes
def test_a_step_warns_of_nothing(recipe, dogs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer = trainer_of(recipe, dogs)
        trainer.step(0.0)
        assert trainer.is_healthy() and trainer.read_stats()
        trainer.averages.generator(trainer.G, "swa", 1, trainer.config)
