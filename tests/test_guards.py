"""What a CUDA graph and its fused optimiser need, guarded on a CPU, for every row of a registry."""

from __future__ import annotations

import copy
import math
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from itertools import cycle, product
from pathlib import Path

import pytest
import torch
from runs import SAMPLE, STEPS, load, run_here, sha
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import train_dogs
from train_dogs import (
    ARCHITECTURES,
    AUGMENTS,
    D_TERMS,
    G_TERMS,
    HEADS,
    LARGEST_DEVIATION,
    LOSSES,
    PRESETS,
    ROUNDING,
    Config,
    CropSet,
    Optimizer,
    Report,
    Trainer,
    capture,
    checkpoint_state,
    find_photos,
    load_trainer,
    prepare_crops,
    trainer_state,
    training_tensors,
)

pytestmark = pytest.mark.usefixtures("light")

CPU, META = torch.device("cpu"), torch.device("meta")


def rows() -> dict[str, dict[str, object]]:
    """A recipe for each row of each registry behind an option, with what the row needs."""
    found = {}
    for field in fields(Config):
        registry = field.metadata["choices"]()
        for name in registry if isinstance(registry, dict) else ():
            if name != field.default:
                needs = dict.fromkeys(registry[name].needs, 1.0)
                found[f"{field.name} {name}"] = {field.name: name} | needs
    return found


TERMS = dict.fromkeys([*D_TERMS, *G_TERMS], 0.5)
AUGMENTED = {"noise": 0.1, "augment": ",".join(AUGMENTS)}
EVERYTHING = TERMS | AUGMENTED | {"condition": "breed"}
IMPROVED = PRESETS["improved"] | TERMS | {"minibatch_features": 3, "labelled": 0.5}
RECIPES = {
    **PRESETS,
    **rows(),
    **{f"term {name}": {"condition": "breed", name: 1.0} for name in TERMS},
    "everything": EVERYTHING,
    "fp16": {"architecture": "paper", "precision": "fp16"},
    **{f"improved {half}": IMPROVED | {"precision": half} for half in ("bf16", "fp16")},
}
for (name, half), loss in zip(product(ARCHITECTURES, ("bf16", "fp16")), cycle(LOSSES)):
    changes = EVERYTHING | {"architecture": name, "loss": loss, "precision": half}
    RECIPES[f"{name} {loss} {half}"] = changes
in_float32 = [n for n, changes in RECIPES.items() if "precision" not in changes]
float32_recipes = pytest.mark.parametrize("recipe", in_float32)  # where others would add nothing


@pytest.fixture(scope="module")
def dogs(own_cache: Path) -> CropSet:
    """The drawn sample, cropped."""
    return prepare_crops(find_photos([SAMPLE]), "square", show=False)


def config_of(recipe: str, **changes: object) -> Config:
    """A small configuration, both of whose averages take in every step."""
    small = {"width": 2, "latent_dim": 8, "batch_size": 4, "average_every": 1, "swa_start": 0.0}
    return Config(**({"precision": "fp32"} | RECIPES[recipe] | small | changes))


def trainer_of(
    recipe: str, dogs: CropSet, device: torch.device = CPU, **changes: object
) -> Trainer:
    """A trainer of that configuration."""
    return Trainer(config_of(recipe, **changes), dogs, device)


def test_the_recipes_are_valid_and_cover_every_loss_term_and_head():
    configs = [train_dogs.check_config(config_of(recipe)) for recipe in RECIPES]
    assert {config.loss for config in configs} == set(LOSSES)
    for name, term in (*D_TERMS.items(), *G_TERMS.items()):
        assert any(getattr(config, name) and term.wanted(config) for config in configs), name
    for name, head in HEADS.items():
        assert any(head.wanted(config) for config in configs), name


# ------------------------------------------------------------------- what the optimiser is handed


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


@pytest.mark.parametrize("shape", [(3, 4, 2, 5), (3, 1, 4, 4), (4, 6, 1, 1)])
def test_a_gradient_of_any_strides_is_used_element_by_element(shape):
    layouts = (torch.contiguous_format, torch.channels_last)
    orders = [(0, 1, 2, 3), (0, 2, 3, 1), (1, 0, 3, 2), (3, 2, 1, 0)]
    for layout, order in product(layouts, orders):
        weight = nn.Parameter(torch.zeros(shape).contiguous(memory_format=layout))
        opt = Optimizer(nn.ParameterList([weight]), 0.001, Config(beta1=0.5), scaled=False)
        opt.minimise(Transposed.apply(weight, order))
        assert weight.grad.stride() == weight.stride()
        expected = torch.arange(math.prod(shape), dtype=torch.float32).view(shape) / 2
        torch.testing.assert_close(opt.adam.state[weight]["exp_avg"], expected)
        opt.minimise(weight.sum())  # whose gradient is one number, of strides 0
        torch.testing.assert_close(opt.adam.state[weight]["exp_avg"], expected / 2 + 0.5)


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
    """A step that begins an epoch, and one under `Watch`."""
    trainer.step(0.0)
    with Watch(device) as watch:
        trainer.step(0.5)
    assert watch.seen > 200


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_neither_waits_for_the_device_nor_warns_nor_crosses_devices(recipe, dogs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer = trainer_of(recipe, dogs, lr_decay_start=0.1)
        step_watched(trainer, CPU)
        assert trainer.is_healthy() and trainer.read_stats()
        trainer.averages.generator(trainer.G, "swa", 1, trainer.config)
    assert trainer.averages.swa_updates == trainer.averages.ema_updates == 2
    if recipe in in_float32:  # in others it would add nothing
        step_watched(trainer_of(recipe, dogs, META), META)


FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "item": lambda loss: loss * loss.detach().item(),
    "constant": lambda loss: loss * torch.tensor(1.0),
    "nonzero": lambda loss: loss + torch.nonzero(loss.detach()).sum(),
    "boolean index": lambda loss: loss[None][loss[None] > 0].sum(),
    "if": lambda loss: loss if loss > 0 else -loss,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_guard_of_waiting_sees_each_of_its_kind(fault, dogs, monkeypatch):
    row = LOSSES["margin"]
    faulty = replace(row, d=lambda seen: FAULTS[fault](row.d(seen)))
    monkeypatch.setitem(LOSSES, "margin", faulty)
    with pytest.raises(AssertionError):
        step_watched(trainer_of("dogs", dogs), CPU)


def test_the_guard_of_devices_sees_a_tensor_of_another(dogs, monkeypatch):
    monkeypatch.setitem(AUGMENTS, "color", lambda x, generator: x * torch.ones((), device=CPU))
    with pytest.raises(AssertionError, match="across devices"):
        step_watched(trainer_of("everything", dogs, META), META)


# ------------------------------------------------------------------ everything stays where it is


def addresses(trainer: Trainer) -> dict[str, int]:
    """The addresses of all that a replay reads or writes."""
    found = dict(training_tensors(trainer))
    for name, network in (("G", trainer.G), ("D", trainer.D)):
        found |= {f"{name} {k}": p for k, p in network.named_parameters()}
    for name, opt in (("g", trainer.opt_g), ("d", trainer.opt_d)):
        group = opt.adam.param_groups[0]
        found |= {f"parameter {name} {i}": p for i, p in enumerate(group["params"])}
        found[f"rate {name}"] = group["lr"]
    crops = trainer.batches.crops
    names = ("pixels", "first", "count", "weights", "breed")
    found |= {f"crops {n}": getattr(crops, n) for n in names}
    return {name: tensor.data_ptr() for name, tensor in found.items() if tensor.numel()}


@float32_recipes
def test_what_a_replay_touches_never_moves(recipe, dogs, tmp_path):
    trainer, other = (trainer_of(recipe, dogs, seed=s, lr_decay_start=0.5) for s in (0, 1))
    before, saved = addresses(trainer), trainer_state(trainer)
    options = train_dogs.parse(["--out", str(tmp_path)])
    train_dogs.write_checkpoint(tmp_path, checkpoint_state(trainer, 0.0))
    trainer.step(0.0)
    trainer.step(0.75)  # half of the rates
    groups = [opt.adam.param_groups[0] for opt in (trainer.opt_g, trainer.opt_d)]
    rates = [float(group["lr"]) for group in groups]
    assert rates == pytest.approx([trainer.config.g_lr / 2, trainer.config.d_lr / 2])
    trainer.batches.shuffle()
    trainer.read_stats(), trainer.is_healthy(), trainer_state(trainer)
    trainer.averages.generator(trainer.G, "swa", 1, trainer.config)
    assert load_trainer(trainer, trainer_state(other))
    assert_as_before(trainer, trainer_state(other))
    trainer.averages.ema[0].fill_(math.nan)
    assert train_dogs.roll_back(trainer, Report(tmp_path), options)
    assert_as_before(trainer, saved, ("rollbacks", "rng"))
    assert addresses(trainer) == before


# ----------------------------------------------------------------- the capture, with CUDA pretended


def assert_as_before(trainer: Trainer, before: dict, but: tuple[str, ...] = ()) -> None:
    """That the state is bit-equal, random state and counters included."""
    after = trainer_state(trainer)
    for name in before.keys() - {"tensors", *but}:
        same = torch.equal if name == "rng" else lambda a, b: a == b
        assert same(before[name], after[name]), name
    tensors = after["tensors"], before["tensors"]  # an overflow leaves nan in the sums
    torch.testing.assert_close(*tensors, rtol=0, atol=0, equal_nan=True)


class PretendedGpu(str):
    """Says that it is a GPU, and is the CPU to torch."""

    type, index = "cuda", 0


class Graphs:
    """Stands in for `torch.cuda`: a capture leaves the state alone, and a replay is a step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, trainer: Trainer) -> None:
        self.trainer, self.capturing = trainer, False
        self.at_end: Exception | None = None  # what the end of a broken capture raises itself
        autocast = Trainer(trainer.config, trainer.crops, CPU).autocast
        monkeypatch.setattr(trainer, "autocast", autocast)  # of the CPU, on which it is
        trainer.device = PretendedGpu("cpu")
        for name in ("Stream", "Event", "CUDAGraph"):
            monkeypatch.setattr(torch.cuda, name, lambda *_: self)
        for name in ("synchronize", "empty_cache"):
            monkeypatch.setattr(torch.cuda, name, lambda: None)
        monkeypatch.setattr(torch.cuda, "default_generators", [torch.Generator()])
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: self.captured())

    @contextmanager
    def captured(self) -> Iterator[None]:
        before, self.capturing = trainer_state(self.trainer), True
        try:
            yield
        except BaseException:
            if self.at_end is not None:
                raise copy.copy(self.at_end)
            raise
        finally:
            self.capturing = False
            load_trainer(self.trainer, before)

    def replay(self) -> None:
        self.trainer.one_step()

    record = synchronize = lambda self: None


def fail_in_step(monkeypatch: pytest.MonkeyPatch, at: Callable[[int], bool], error: BaseException):
    """Let a step raise, half done, where `at` says so of its number from 0."""
    steps, change = [], Optimizer.minimise

    def failing(opt: Optimizer, loss: Tensor) -> None:
        steps.append(opt)
        if len(steps) % 2 == 0 and at(len(steps) // 2 - 1):  # D has been updated, G is not
            raise error
        change(opt, loss)

    monkeypatch.setattr(Optimizer, "minimise", failing)


def pretended(
    monkeypatch: pytest.MonkeyPatch, dogs: CropSet, recipe: str = "dogs"
) -> tuple[Trainer, Graphs, dict]:
    """A trainer after a step, its pretended CUDA, and its state."""
    trainer = trainer_of(recipe, dogs)
    trainer.step(0.0)
    return trainer, Graphs(monkeypatch, trainer), trainer_state(trainer)


def assert_eager(trainer: Trainer, before: dict) -> None:
    """That nothing of a failed capture is left, and steps go on."""
    assert_as_before(trainer, before)
    assert trainer.rng is trainer.batches.rng and trainer.update_networks == trainer.one_step
    for opt in (trainer.opt_g, trainer.opt_d):
        assert not opt.adam.param_groups[0]["capturable"]
    trainer.step(0.0)
    assert trainer.is_healthy()


AT_END = pytest.mark.parametrize("at_end", [None, RuntimeError("the capture was invalidated")])


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_capture_leaves_all_as_it_was_and_its_replay_is_what_steps_do(recipe, dogs, monkeypatch):
    trainer, _, before = pretended(monkeypatch, dogs, recipe)
    assert capture(trainer) == ""
    assert_as_before(trainer, before)
    assert trainer.update_networks.__name__ == "replay"
    eager = trainer_of(recipe, dogs)
    for k in range(6 if recipe == "dogs" else 2):  # 6: more than may be in flight
        eager.step(0.0)
        trainer.step(0.0) if k else None
    assert_as_before(trainer, trainer_state(eager))


FULL = torch.cuda.OutOfMemoryError("CUDA out of memory.")
# The steps of a capture: three of warm-up, the captured one, and the two that are compared.
EAGER, ALL = range(3), range(6)


@AT_END
@pytest.mark.parametrize(
    ("error", "numbers"), [(KeyboardInterrupt(), ALL), (FULL, EAGER)], ids=["interrupt", "memory"]
)
def test_an_interrupt_or_a_memory_too_small_for_eager_steps_comes_out_and_spoils_nothing(
    error, numbers, at_end, dogs, monkeypatch
):
    for number in numbers:
        trainer, graphs, before = pretended(monkeypatch, dogs)
        graphs.at_end = at_end
        with monkeypatch.context() as patch:
            fail_in_step(patch, lambda k, number=number: k == number, error)
            with pytest.raises(type(error)) as raised:
                capture(trainer)
        assert raised.value is error
        assert_eager(trainer, before)


@AT_END
@pytest.mark.parametrize("number", [k for k in ALL if k not in EAGER])
def test_the_memory_of_a_graph_that_fails_is_freed_its_error_named_and_steps_stay_eager(
    number, at_end, dogs, monkeypatch
):
    trainer, graphs, before = pretended(monkeypatch, dogs)
    graphs.at_end, made, alive = at_end, [], []
    forward, change = trainer.G.forward, Optimizer.minimise

    def watched(*args: Tensor) -> Tensor:
        images = forward(*args)
        made.append(weakref.ref(images))
        return images

    def empty_cache() -> None:
        parameters = (*trainer.G.parameters(), *trainer.D.parameters())
        alive.append(
            [ref for ref in made if ref() is not None]
            + [p for p in parameters if p.grad is not None]
        )
        raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")  # older torch's

    def full(opt: Optimizer, loss: Tensor) -> None:
        if len(made) == number + 1:  # a new error: a kept one would keep the step's tensors
            raise torch.cuda.OutOfMemoryError("out of memory\nat all")
        change(opt, loss)

    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    monkeypatch.setattr(trainer.G, "forward", watched)
    with monkeypatch.context() as patch:
        patch.setattr(Optimizer, "minimise", full)
        reason = capture(trainer)
    assert reason == "the step cannot run as a CUDA graph (out of memory)"
    assert made and alive == [[]]
    assert_eager(trainer, before)


@pytest.mark.parametrize("name", ["opt_g", "opt_d"])
def test_the_warm_up_goes_on_until_neither_scale_overflows(name, dogs, monkeypatch):
    """From a scale of 2 ** 40, that of one network alone, which 20 steps do not bring down."""
    trainer, _, _ = pretended(monkeypatch, dogs, "fp16")
    scale, steps, step = getattr(trainer, name).loss_scale, [], trainer.one_step
    scale.fill_(2.0**40)

    def counted() -> None:
        before = float(scale)
        step()
        steps.append(float(scale) >= before)

    monkeypatch.setattr(trainer, "one_step", counted)
    train_dogs.warm_up(trainer)
    assert 3 < len(steps) <= 40 and steps[-3:] == [True] * 3 and not steps[0]


def test_networks_that_do_not_learn_are_no_alarm(dogs, monkeypatch):
    trainer = trainer_of("dogs", dogs, g_lr=0.0, d_lr=0.0)
    Graphs(monkeypatch, trainer)
    assert capture(trainer) == ""


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


LOOSEST = max(ROUNDING, key=ROUNDING.get)  # what this precision's bound refuses, all refuse


@pytest.mark.parametrize("wrong", [lambda trainer: None, other_data, half_a_step])
def test_a_replay_that_does_something_else_is_refused(wrong, dogs, monkeypatch):
    trainer, graphs, before = pretended(monkeypatch, dogs)
    trainer.precision, graphs.replay = LOOSEST, lambda: wrong(trainer)
    assert "replayed step" in capture(trainer)
    assert_eager(trainer, before)


def test_at_the_edge_of_an_overflow_steps_are_compared_all_the_same(dogs, monkeypatch):
    """Where a step overflows it is skipped, and any other that is skipped looks the same."""
    trainer, graphs, before = pretended(monkeypatch, dogs, "fp16")
    monkeypatch.setattr(train_dogs, "warm_up", lambda trainer: None)
    scale = trainer.opt_g.loss_scale
    for power in range(16, 60):
        load_trainer(trainer, before)
        scale.fill_(2.0**power)
        trainer.one_step()
        if scale < 2.0**power:
            break
    load_trainer(trainer, before)
    scale.fill_(2.0**power)
    graphs.replay = lambda: half_a_step(trainer)
    assert "G's weights" in capture(trainer)


NOT_REPLAYED = {  # recipe: parts of the names of tensors that a replay leaves as they were
    "dogs": ["cursor", "G.norms.2.running_mean", "G.norms.0.running_var", "num_batches_tracked",
             "opt_d.0.step", "exp_avg", "sums", "rng"],
    "architecture residual": ["G.linear.parametrizations.weight.0.v",
                              "D.blocks.2.conv2.parametrizations.weight.0.v"],
    "term history": ["d_history.count", "d_history.mean", "g_history.mean"],
    "fp16": ["opt_g.loss_scale", "opt_d.loss_scale"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "part"), [(recipe, part) for recipe, parts in NOT_REPLAYED.items() for part in parts]
)
def test_whatever_a_replay_leaves_as_it_was_is_seen(recipe, part, dogs, monkeypatch):
    trainer, graphs, before = pretended(monkeypatch, dogs, recipe)
    bare = [f"{n}.{k}" for n in "GD" for k, _ in getattr(trainer, n).named_parameters()]

    def replay() -> None:
        state = trainer_state(trainer)
        trainer.one_step()
        if part == "rng":
            trainer.rng.set_state(state["rng"])
        for name, tensor in training_tensors(trainer).items():
            if part in name and name not in bare:
                with torch.no_grad():
                    tensor.copy_(state["tensors"][name])

    trainer.precision, graphs.replay = LOOSEST, replay
    assert "replayed step" in capture(trainer)
    assert_eager(trainer, before)


@pytest.mark.parametrize("recipe", ["dogs", "second-private", "improved", "everything"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rounding_of_the_gradients_alone_is_not_refused(precision, recipe, dogs, monkeypatch):
    trainer, graphs, _ = pretended(monkeypatch, dogs, recipe)
    lay_out, rounding = train_dogs.laid_out_like, ROUNDING[precision]

    def rounded(gradient: Tensor, parameter: Tensor) -> Tensor:
        noise = rounding * gradient.std(correction=0) * torch.randn(gradient.shape)
        return lay_out(gradient + noise * (gradient != 0), parameter)  # an absent breed's stays 0

    def replay() -> None:
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
        opt = Optimizer(nn.ParameterList([weight]), 1.0, Config(beta1=0.9), scaled=False)
        opt.adam.param_groups[0]["eps"] = 1e-12
        opt.minimise((weight * g).sum())
        ends.append(weight.detach())
    apart = float((ends[1] - ends[0]).norm() / ends[0].norm())
    assert apart == pytest.approx(2 * math.sqrt(noise / math.pi), rel=0.1)
    assert LARGEST_DEVIATION[precision] == pytest.approx(4 * apart, rel=0.1)


# -------------------------------------------------------------- another kind of device's randomness


def test_a_state_of_another_kind_of_device_goes_on_with_fresh_randomness(dogs):
    trainer, other = trainer_of("dogs", dogs), trainer_of("dogs", dogs, seed=9)
    other.step(0.0)
    state, own = trainer_state(other), trainer_state(trainer)
    assert load_trainer(trainer, state | {"rng": torch.zeros(16, dtype=torch.uint8)}) is False
    assert_as_before(trainer, state, ("rng",))
    fresh = trainer_state(trainer)["rng"]
    assert not torch.equal(fresh, own["rng"]) and not torch.equal(fresh, state["rng"])
    trainer.step(0.0)
    assert trainer.is_healthy() and load_trainer(trainer, state) is True


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
