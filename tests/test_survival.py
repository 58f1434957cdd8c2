"""Kills, signals, damage, full disks and budgets: what a run survives and leaves behind."""

from __future__ import annotations

import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from runs import (
    ROOT,
    SAMPLE,
    SCRIPT,
    STEPS,
    arguments,
    assert_one_sentence,
    environment,
    left_over,
    light_runs,
    load,
    log_of,
    pixels,
    pngs,
    resumed_steps,
    run_here,
    sha,
    tensors_in,
)

import train_dogs
from train_dogs import Config, Trainer, UserError, read_checkpoint, read_state

pytestmark = pytest.mark.usefixtures("light")

CUT = 3 * STEPS // 4  # where SWA has begun, in the middle of an order of the dogs
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def at_step(monkeypatch: pytest.MonkeyPatch, **acts: Callable[[], object]) -> list[int]:
    """Call `acts["s7"]` after step 7; returns the list of such steps so far."""
    real, came = Trainer.step, []

    def stepped(trainer: Trainer, progress: float) -> None:
        real(trainer, progress)
        act = acts.get(f"s{trainer.steps_done}")
        if act and trainer.steps_done not in came:
            came.append(trainer.steps_done)
            act()

    monkeypatch.setattr(Trainer, "step", stepped)
    return came


def send(number: int = signal.SIGINT) -> Callable[[], None]:
    """A function that sends this process a signal."""
    return lambda: os.kill(os.getpid(), number)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory, own_cache: Path) -> Path:
    """The folder of a run of `STEPS` that was interrupted at `CUT`; copy it to change it."""
    out = tmp_path_factory.mktemp("interrupted")
    with light_runs(), pytest.MonkeyPatch.context() as patch:
        at_step(patch, **{f"s{CUT}": send()})
        patch.setattr(train_dogs, "CHECKPOINT_SECONDS", 0.0)
        assert run_here(out, steps=STEPS) == 130
    return out


@pytest.fixture(scope="module")
def trainer(own_cache: Path) -> Trainer:
    """A trainer of the same recipe, to read checkpoints with."""
    config = train_dogs.parse(arguments(Path("unused"), steps=STEPS)).config
    return train_dogs.prepare(config, torch.device("cpu"))[0]


@pytest.fixture
def always_saving(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint after every step."""
    monkeypatch.setattr(train_dogs, "CHECKPOINT_SECONDS", 0.0)


@pytest.fixture
def stopped(interrupted: Path, tmp_path: Path) -> Path:
    """A copy of it, to resume."""
    return Path(shutil.copytree(interrupted, tmp_path / "stopped"))


def steps_of(out: Path) -> int:
    """How many steps the newest checkpoint in `out` has done."""
    path = next(p for p in (out / "checkpoint.pt", out / "checkpoint.previous.pt") if p.exists())
    return load(path)["trainer"]["steps_done"]


def assert_same_result(out: Path, reference: Path) -> None:
    """The same zip, byte for byte, the same weights and state; nothing unfinished beside them."""
    assert sha(out / "images.zip") == sha(reference / "images.zip")
    for file, part in (("generator.pt", "state_dict"), ("checkpoint.pt", "trainer")):
        ours, theirs = (list(tensors_in(load(f / file)[part])) for f in (out, reference))
        assert len(ours) == len(theirs) > 10
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    assert left_over(out) == []


def assert_whole(out: Path) -> None:
    """Every finished file in `out` can be read to its end."""
    for path in out.rglob("*.*"):
        if path.suffix == ".zip":
            assert len(pngs(path)) == 40
        elif path.suffix == ".pt":
            read_state(path, lambda state: state)
        elif path.suffix in (".png", ".webp"):
            Image.open(path).load()
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".jsonl":
            log_of(out)


# ------------------------------------------------------------------------------- kill -9 and resume

# Imports once, and forks a run for each line: [name, count, when, argv]. It is killed at the rename
# number `count` of the file `name`: "before" it, with the file half written, or "after" it.
KILLER = """
import json, os, signal, sys
import train_dogs

train_dogs.NORM_BATCHES, train_dogs.CHECKPOINT_SECONDS = 1, 0.0
for line in sys.stdin:
    name, count, when, argv = json.loads(line)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        replace = os.replace

        def dying_replace(source, target):
            global count
            count -= os.path.basename(target).startswith(name)
            if count == 0 and when == "before" and str(source).endswith(".part"):
                os.truncate(source, os.path.getsize(source) // 2)
            if count == 0:
                when == "after" and replace(source, target)
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        os.replace = dying_replace
        os._exit(train_dogs.main(argv))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def killer(own_cache: Path) -> Iterator[Callable[..., int]]:
    """Starts a run and kills it; returns its exit code."""
    process = subprocess.Popen(
        [sys.executable, "-c", KILLER], env=environment() | {"PYTHONPATH": str(ROOT)}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip

    def kill(argv: list[str], *moment: object) -> int:
        process.stdin.write(json.dumps([*moment, argv]) + "\n")
        process.stdin.flush()
        return int(process.stdout.readline())

    yield kill
    process.stdin.close()
    assert process.wait(60) == 0


@pytest.mark.slow
def test_killed_in_the_writing_of_each_file_it_loses_nothing_but_time(
    killer, finished_run, tmp_path
):
    out = tmp_path / "out"
    moments = """real.png 1 before, config.json 1 before, generator.pt 1 before,
        images.zip 1 before,
        checkpoint.new.pt 4 before, checkpoint.new.pt 3 after, checkpoint.previous.pt 3 after,
        checkpoint.pt 4 after, images.zip 2 before, step_ 1 before, progress.webp 1 before"""
    for name, count, when in map(str.split, moments.split(",")):
        argv = arguments(out, steps=STEPS)
        assert killer(argv, name, int(count), when) == -signal.SIGKILL, (name, when)
        assert_whole(out)
    assert run_here(out, steps=STEPS) == 0
    assert resumed_steps(out)[-1] == STEPS and len(set(resumed_steps(out))) > 3
    assert_same_result(out, finished_run)


def test_a_second_run_is_refused_while_the_first_lives_and_does_not_disturb_it(
    finished_run, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"

    def second() -> None:
        for flags in ((), ("--fresh",), ("--sample-only",)):
            capsys.readouterr()
            assert run_here(out, *flags, steps=5) == 2
            assert_one_sentence(capsys.readouterr().err, "another run", "--out")

    came = at_step(monkeypatch, s3=second)
    assert run_here(out, steps=STEPS) == 0 and came == [3]
    assert_same_result(out, finished_run)


# ---------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_step_saves_writes_the_zip_and_returns_130(
    number, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    handlers = [signal.getsignal(n) for n in SIGNALS]
    at_step(monkeypatch, s7=send(number))
    assert run_here(out, steps=STEPS) == 130
    assert [signal.getsignal(n) for n in SIGNALS] == handlers
    captured = capsys.readouterr()
    assert "interrupt again to leave at once" in captured.err and "look at" in captured.out
    assert steps_of(out) == 7 and len(pixels(out / "images.zip")) == 40 and left_over(out) == []


def test_a_hangup_that_is_ignored_as_under_nohup_stays_so(tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        at_step(monkeypatch, s3=send(signal.SIGHUP))
        assert run_here(tmp_path / "out", steps=5, images=3) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert steps_of(tmp_path / "out") == 5


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_before_the_first_step_ends_the_run_at_once_and_leaves_no_zip(
    number, tmp_path, monkeypatch, capsys
):
    out, went_on = tmp_path / "out", []

    def prepare(*_: object, **more: object) -> None:
        os.kill(os.getpid(), number)
        went_on.append("after the signal")

    monkeypatch.setattr(train_dogs, "prepare_crops", prepare)
    assert run_here(out, steps=STEPS) == 130 and went_on == []
    assert_one_sentence(capsys.readouterr().err)
    assert not (out / "images.zip").exists() and left_over(out) == []


@pytest.mark.parametrize("signalled", [0, 7])
def test_an_interrupt_of_the_only_zip_leaves_nothing_half_written_and_says_how_to_get_one(
    signalled, tmp_path, monkeypatch, capsys
):
    """The first zip, or the last after a first signal at step 7."""
    out, write, drawn = tmp_path / "out", train_dogs.write_zip, []

    def interrupted(path: Path, batches: Iterator) -> None:
        def watched() -> Iterator:
            for batch in batches:
                drawn.append(batch)
                yield batch
                os.kill(os.getpid(), signal.SIGINT)

        write(path, watched())

    with monkeypatch.context() as patch:
        patch.setattr(train_dogs, "write_zip", interrupted)
        if signalled:
            patch.setattr(train_dogs, "write_early_zip", lambda *_: None)
            at_step(patch, s7=send(signal.SIGTERM))
        assert run_here(out, steps=STEPS, images=400) == 130 and len(drawn) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert_one_sentence(message, "no images.zip yet", "the same command", "--sample-only")
    assert not (out / "images.zip").exists() and left_over(out) == []
    assert not signalled or steps_of(out) == signalled
    assert run_here(out, "--sample-only", images=6) == 0  # both remedies work
    assert len(pixels(out / "images.zip")) == 6
    assert run_here(out, steps=STEPS, images=6) == 0 and steps_of(out) == STEPS


@pytest.mark.parametrize("name", ["checkpoint.pt", "generator.pt", "progress.webp", "images.zip"])
def test_a_second_signal_at_a_files_renaming_leaves_the_old_files_whole(
    name, stopped, monkeypatch, capsys
):
    before, rename = {p.name: sha(p) for p in stopped.iterdir() if p.is_file()}, os.replace
    with monkeypatch.context() as patch:
        came = at_step(patch, **{f"s{CUT + 3}": send()})

        def renamed(source: str, target: str) -> None:
            if came and Path(target).name == name:
                os.kill(os.getpid(), signal.SIGINT)
            rename(source, target)

        patch.setattr(os, "replace", renamed)
        assert run_here(stopped, steps=STEPS) == 130
    assert "Traceback" not in capsys.readouterr().err
    assert_whole(stopped)
    assert [n for n in left_over(stopped) if ".part" in n] == []
    if name != "checkpoint.pt":  # what was to be replaced is as it was
        assert name == "generator.pt" or sha(stopped / name) == before[name]
        return
    assert run_here(stopped, steps=STEPS) == 0
    assert left_over(stopped) == [] and steps_of(stopped) == STEPS


def test_main_works_in_a_thread_where_no_handler_can_be_set(tmp_path):
    codes: list[int] = []
    out = tmp_path / "out"
    thread = threading.Thread(target=lambda: codes.append(run_here(out, steps=3, images=3)))
    thread.start()
    thread.join(60)
    assert codes == [0]


# ---------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("both", [False, True])
def test_a_damaged_checkpoint_is_renamed_and_the_one_before_it_used_if_it_is_whole(
    both, stopped, finished_run, capsys
):
    damaged = [stopped / "checkpoint.pt", stopped / "checkpoint.previous.pt"][: 1 + both]
    for path in damaged:
        os.truncate(path, 100_000)
    assert run_here(stopped, steps=STEPS) == 0
    assert capsys.readouterr().err.count("is damaged: renamed to") == len(damaged)
    assert both or 0 < resumed_steps(stopped)[-1] <= CUT
    assert not both or resumed_steps(stopped) == []
    aside = [p.stat().st_size for p in stopped.glob("*damaged*")]
    assert aside == [100_000] * len(damaged)
    assert_same_result(stopped, finished_run)


def test_a_rollback_goes_past_a_damaged_checkpoint_too(stopped, monkeypatch, capsys):
    def spoil() -> None:
        os.truncate(stopped / "checkpoint.pt", 100_000)
        next(trainers[0].G.parameters()).data.fill_(math.nan)

    trainers, make = [], Trainer.__init__
    monkeypatch.setattr(
        Trainer, "__init__", lambda self, *a: make(self, *a) or trainers.append(self)
    )
    at_step(monkeypatch, **{f"s{CUT + 3}": spoil})
    monkeypatch.setattr(train_dogs, "SHEETS", (0.9,))  # there the weights are looked at
    assert run_here(stopped, steps=STEPS) == 0
    captured = capsys.readouterr()
    assert "is damaged" in captured.err and "with fresh randomness" in captured.out
    assert steps_of(stopped) == STEPS and len(pixels(stopped / "images.zip")) == 40


def test_no_damage_by_truncation_or_flipped_bits_is_loaded_or_breaks_the_program(
    interrupted, trainer, tmp_path
):
    good = (interrupted / "checkpoint.pt").read_bytes()
    truth = list(tensors_in(load(interrupted / "checkpoint.pt")))
    chance, file = random.Random(0), tmp_path / "checkpoint.pt"
    refused = 0
    for attempt in range(45):
        data = bytearray(good[: chance.randrange(len(good))] if attempt % 3 == 0 else good)
        if attempt % 3 and data:
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        file.write_bytes(data)
        try:
            loaded = list(tensors_in(read_checkpoint(file, trainer)))
        except UserError:
            refused += 1
        else:  # the bit is where nothing is read
            assert len(loaded) == len(truth)
            assert all(torch.equal(a, b) for a, b in zip(loaded, truth))
    assert refused >= 30


MISSING = object()
WEIGHT = ("trainer", "tensors", "G.convs.0.weight")
FOREIGN = {  # what another version or program would save: the path to a value, and that value
    "the format before": ("format", train_dogs.FORMAT - 1),
    "no format": ("format", MISSING),
    "no trainer": ("trainer", MISSING),
    "a field less": ("config", "margin", MISSING),
    "a field more": ("config", "minibatch_std", 1),
    "finished a number": ("finished", 1),
    "steps in words": ("trainer", "steps_done", "3"),
    "no data key": ("trainer", "data_key", MISSING),
    "a tensor less": ("trainer", "tensors", "cursor", MISSING),
    "a tensor more": ("trainer", "tensors", "D.skip.weight", torch.zeros(3)),
    "another dtype": (*WEIGHT, lambda t: t.half()),
    "sparse": (*WEIGHT, lambda t: t.to_sparse()),
    "rng in words": ("trainer", "rng", "random"),
}


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_checkpoint_of_another_form_is_refused_and_left_as_it_is(
    kind, interrupted, trainer, tmp_path
):
    *path, last, value = FOREIGN[kind]
    file, state = tmp_path / "checkpoint.pt", load(interrupted / "checkpoint.pt")
    inner = state
    for key in path:
        inner = inner[key]
    if value is MISSING:
        del inner[last]
    else:
        inner[last] = value(inner[last]) if callable(value) else value
    torch.save(state, file)
    before = sha(file)
    with pytest.raises(UserError, match="does not fit this version") as caught:
        read_checkpoint(file, trainer)
    assert not isinstance(caught.value, train_dogs.Damaged)  # it would be renamed
    assert sha(file) == before


@pytest.mark.parametrize("content", [
    b"", b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.", b"PK\x05\x06" + bytes(18),
    [1, 2], "a folder", None,
], ids=["empty", "pickle", "zip", "list", "folder", "nothing"])  # fmt: skip
def test_a_file_that_is_no_checkpoint_is_refused_by_its_name(content, trainer, tmp_path):
    file = tmp_path / "checkpoint.pt"
    if content == "a folder":
        file.mkdir()
    elif isinstance(content, bytes):
        file.write_bytes(content)
    elif content:
        torch.save(content, file)
    with pytest.raises(UserError, match=f"{re.escape(str(file))}.*another"):
        read_checkpoint(file, trainer)
    assert file.exists() == (content is not None)


def test_no_tensor_of_a_checkpoint_may_have_another_shape(trainer):
    """`copy_` would broadcast some of them without an error."""
    own = train_dogs.trainer_state(trainer)
    for name, tensor in own["tensors"].items():
        for other in (tensor.new_empty(0), tensor[None]):
            changed = own | {"tensors": own["tensors"] | {name: other}}
            with pytest.raises(ValueError, match=re.escape(name)):
                train_dogs.require_same_form(changed, own)
    train_dogs.require_same_form(own, own)


@pytest.mark.parametrize("finished", [False, True])
def test_a_checkpoint_from_another_kind_of_device_goes_on_with_fresh_randomness(
    finished, stopped, finished_run, capsys
):
    state = load((finished_run if finished else stopped) / "checkpoint.pt")
    state["trainer"]["rng"] = torch.arange(16, dtype=torch.uint8)  # a GPU's: a seed and an offset
    torch.save(state, stopped / "checkpoint.pt")
    assert run_here(stopped, steps=STEPS) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and steps_of(stopped) == STEPS
    assert finished or "another kind of device: going on with fresh randomness" in captured.out
    # A finished run draws the same again; another one has gone on otherwise, and says so.
    assert (sha(stopped / "images.zip") == sha(finished_run / "images.zip")) == finished


# -------------------------------------------------------------------------------- what must match

MAY_DIFFER = {  # on a resume; everything else shapes what is learnt
    "data", "out", "average", "truncation", "steps", "hours", "part_hours", "device", "precision",
    "images",
}  # fmt: skip


def test_each_field_that_shapes_the_weights_must_match_and_no_other():
    saved, names, refused = Config(), [f.name for f in fields(Config)], set()
    for f in fields(Config):
        value = ("x",) if f.name == "data" else "x" if f.type == "str" else 3
        try:
            train_dogs.require_same_recipe(replace(saved, **{f.name: value}), saved, names)
        except UserError as error:
            assert f"--{f.name.replace('_', '-')} {getattr(saved, f.name)}" in str(error)
            refused.add(f.name)
    assert refused == set(names) - MAY_DIFFER


def test_resume_takes_a_read_only_file_and_what_does_not_change_the_weights_may_differ(
    stopped, finished_run, tmp_path, capsys
):
    def state() -> list[tuple[str, int, str]]:
        return [(p.name, p.stat().st_mtime_ns, sha(p)) for p in stopped.glob("*.*")]

    dogs = tmp_path / "elsewhere"  # the same dogs on another mount, with other times
    shutil.copytree(SAMPLE, dogs, copy_function=shutil.copyfile)
    before, out = state(), tmp_path / "working"
    options = {"data": dogs, "resume": stopped / "checkpoint.pt", "hours": 3, "part_hours": 2}
    stopped.chmod(0o555)
    assert run_here(out, steps=STEPS, device="cpu", **options) == 0, capsys.readouterr().err
    stopped.chmod(0o755)
    assert state() == before and resumed_steps(out) == [CUT]
    assert_same_result(out, finished_run)
    assert {"config.json", "log.jsonl", "progress.webp"} <= {p.name for p in out.iterdir()}


@pytest.mark.parametrize("change", ["a dog less", "--architecture paper"])
def test_a_checkpoint_of_other_dogs_or_networks_is_one_sentence_and_changes_nothing(
    change, stopped, tmp_path, capsys
):
    """`test_crops` shows that every change to the crops changes their key."""
    dogs = Path(shutil.copytree(SAMPLE, tmp_path / "dogs"))
    if change == "a dog less":
        os.remove(sorted((dogs / "Images").glob("*/*.jpg"))[7])
        changes, parts = {"data": dogs}, ["other dogs", "--data"]
    else:
        changes, parts = {"architecture": "paper"}, ["--architecture deep", "--out"]
    before = {p.name: sha(p) for p in stopped.iterdir() if p.is_file()}
    assert run_here(stopped, steps=STEPS, **changes) == 2
    assert_one_sentence(only_message(capsys), *parts, "--fresh")
    assert {p.name: sha(p) for p in stopped.iterdir() if p.is_file()} == before


def test_fresh_ignores_the_checkpoint_in_out(stopped):
    assert run_here(stopped, "--fresh", steps=5, images=4) == 0
    assert steps_of(stopped) == 5
    assert resumed_steps(stopped) == [] and len(pngs(stopped / "images.zip")) == 4
    sheets = {p.name for p in (stopped / "samples").glob("step_*.png")}
    assert sheets == {"step_0000005.png"}  # those of the earlier run are gone


# ------------------------------------------------------------------------------------ sample only


def test_sample_only_draws_from_generator_pt_alone_and_elsewhere_with_another_seed(
    finished_run, tmp_path
):
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(finished_run / "generator.pt", out)
    assert run_here(out, "--sample-only", data=tmp_path / "no dogs") == 0
    assert sha(out / "images.zip") == sha(finished_run / "images.zip")
    other = ["--out", out, "--sample-only", "--resume", finished_run / "generator.pt"]
    assert train_dogs.main([*map(str, other), "--seed", "5", "--images", "7"]) == 0
    files = pngs(out / "images.zip")
    assert len(files) == 7
    assert not set(files.values()) & set(pngs(finished_run / "images.zip").values())
    assert sorted(p.name for p in out.iterdir()) == ["generator.pt", "images.zip"]


@pytest.mark.parametrize("kind", ["nothing", "damaged", "checkpoint", "other recipe", "no weights"])
def test_sample_only_without_a_generator_of_this_kind_is_one_sentence(
    kind, finished_run, tmp_path, capsys
):
    out = Path(shutil.copytree(finished_run, tmp_path / "out"))
    file, before = out / "generator.pt", sha(out / "images.zip")
    changes = {"width": 2} if kind == "other recipe" else {}
    if kind == "nothing":
        file.unlink()
    elif kind == "damaged":
        os.truncate(file, 50_000)
    elif kind == "checkpoint":
        shutil.copy(out / "checkpoint.pt", file)
    elif kind == "no weights":
        state = load(file)
        state["state_dict"].popitem()
        torch.save(state, file)
    assert run_here(out, "--sample-only", **changes) == 2
    named = "--width 1" if kind == "other recipe" else "generator.pt"
    assert_one_sentence(capsys.readouterr().err, named)
    assert sha(out / "images.zip") == before


# --------------------------------------------------------------------------------------- the disk


def without_bars(stderr: str) -> str:
    """The lines of stderr except progress bars."""
    lines = stderr.replace("\r", "\n").splitlines()
    return "\n".join(line for line in lines if "cropping" not in line)


def only_message(capsys: pytest.CaptureFixture[str]) -> str:
    """What this process wrote to stderr, without bars."""
    return without_bars(capsys.readouterr().err)


class Disk:
    """A small file system that can be filled."""

    def __init__(self, folder: Path) -> None:
        self.out, self.ballast = folder / "out", folder / "ballast"

    def fill(self) -> None:
        with self.ballast.open("wb", buffering=0) as file:
            for size in (1 << 20, 1 << 12):  # then in pages
                try:
                    while file.write(bytes(size)) == size:
                        pass
                except OSError:
                    pass

    def empty(self) -> None:
        self.ballast.unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A file system of 16 MB, where one may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, check=False).returncode:
        pytest.skip("no right to mount a small file system here")
    yield Disk(folder)
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_full_for_a_while_costs_nothing_that_was_learnt(
    disk, always_saving, finished_run, monkeypatch, capsys
):
    monkeypatch.setattr(train_dogs, "SHEETS", (0.4, 0.5, 0.6))
    monkeypatch.setattr(train_dogs.Clock, "allows", lambda *_: True)
    at_step(monkeypatch, s20=disk.fill, s50=disk.empty)
    assert run_here(disk.out, steps=STEPS) == 0
    captured = capsys.readouterr()
    assert "no checkpoint could be written (No space left on device)" in captured.out
    assert "samples cannot be written" in captured.out
    assert only_of_the_log(captured.err)
    assert log_of(disk.out)[-1]["text"].startswith("look at")  # every line of it is whole
    assert_same_result(disk.out, finished_run)


def only_of_the_log(stderr: str) -> bool:
    """Whether the only message is, once, that the log is not complete."""
    return bool(re.fullmatch(r"(log\.jsonl cannot be written \(.*\): going on\n)?", stderr))


def test_a_disk_that_stays_full_is_one_sentence_and_the_files_of_before_stay_whole(
    disk, always_saving, finished_run, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        at_step(patch, s20=disk.fill)
        assert run_here(disk.out, steps=STEPS) == 2
    message = [line for line in only_message(capsys).splitlines() if "log.jsonl" not in line]
    assert_one_sentence("\n".join(message), "No space left", "space")
    assert_whole(disk.out)
    assert 10 < steps_of(disk.out) < STEPS
    assert [n for n in left_over(disk.out) if ".part" in n] == []
    disk.empty()
    assert run_here(disk.out, steps=STEPS) == 0  # as the sentence says
    assert_same_result(disk.out, finished_run)


def limit_files(size: int) -> None:
    """Let no file of this process grow beyond so many bytes; -1: any."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_without_room_for_a_last_checkpoint_the_zip_is_written_all_the_same(
    stopped, always_saving, finished_run, monkeypatch
):
    at_step(monkeypatch, **{f"s{CUT + 2}": lambda: limit_files(300_000)})
    try:
        run_here(stopped, steps=STEPS, images=6)
    finally:
        limit_files(-1)
    first = list(pngs(finished_run / "images.zip").items())[:6]
    assert list(pngs(stopped / "images.zip").items()) == first
    monkeypatch.undo()
    assert run_here(stopped, steps=STEPS) == 0
    assert_same_result(stopped, finished_run)


def test_a_line_of_the_log_that_finds_no_room_leaves_no_half_behind(tmp_path):
    report = train_dogs.Report(tmp_path)
    report.event(step=1)
    limit_files((tmp_path / "log.jsonl").stat().st_size + 5)
    try:
        report.event(step=2)
    finally:
        limit_files(-1)
    report.event(step=3)
    report.bar.close()
    assert [line["step"] for line in log_of(tmp_path)] == [1, 3]


def test_a_log_that_cannot_be_written_does_not_end_the_run(stopped, finished_run, capsys):
    (stopped / "log.jsonl").unlink()
    (stopped / "log.jsonl").symlink_to("/dev/full")
    assert run_here(stopped, steps=STEPS) == 0
    assert only_of_the_log(capsys.readouterr().err)
    (stopped / "log.jsonl").unlink()
    assert_same_result(stopped, finished_run)


@pytest.mark.slow
def test_a_run_whose_reader_leaves_goes_on_and_stderr_is_empty_even_of_torchs_warnings(
    finished_run, tmp_path
):
    words = arguments(
        tmp_path / "out", steps=4, images=6, r1=1, augment="color,translation,cutout", noise=0.01,
        condition="breed", classify=0.1, loss="rals", lr_decay_start=0.5,
    )  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *words], env=environment() | {"PYTHONWARNINGS": "always"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline()
    process.stdout.close()  # as `| head -1` does
    assert (process.wait(120), process.stderr.read()) == (0, "")
    process.stderr.close()
    assert len(pixels(tmp_path / "out" / "images.zip")) == 6


def test_results_that_are_removed_while_it_trains_come_again(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    at_step(monkeypatch, s9=lambda: shutil.rmtree(out))
    assert run_here(out, steps=STEPS) == 0
    assert only_of_the_log(capsys.readouterr().err)
    assert len(pixels(out / "images.zip")) == 40 and steps_of(out) == STEPS
    assert (out / "progress.webp").exists()


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere/out"])
def test_a_folder_that_cannot_be_made_is_one_sentence(place, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run_here(tmp_path / place, steps=STEPS) == 2
    assert_one_sentence(only_message(capsys), "--out")


# -------------------------------------------------------------------------------------- the budget


class MovedClock:
    """The program's clock; it moves by a price in seconds for each thing that is done.

    Nothing is learnt, as a step is only its price.
    """

    def __init__(self, patch: pytest.MonkeyPatch, sampling: float, saving: float) -> None:
        """`sampling`: the price of 128 images of a zip, half of it for G, which the norms need
        too; `saving`: that of a checkpoint."""
        self.now, self.slower, self.lock = 1000.0, 1.0, threading.Lock()
        for name in ("in_batches", "sample_images"):
            patch.setattr(
                train_dogs, name, self.by_batches(getattr(train_dogs, name), sampling / 2)
            )
        patch.setattr(Trainer, "one_step", lambda _: None)
        patch.setattr(Trainer, "step", self.priced(Trainer.step, 0.5))
        begin_to_save = train_dogs.Saver.save

        def saved(saver: train_dogs.Saver, *args: object) -> None:
            """At once, as real time would go by: a thread that lags would pay later."""
            begin_to_save(saver, *args)
            wait([saver.pending])

        patch.setattr(train_dogs.Saver, "save", saved)
        for name, price in (("save", saving), ("save_picture", 0.2)):
            patch.setattr(train_dogs, name, self.priced(getattr(train_dogs, name), price))
        fake = SimpleNamespace(monotonic=lambda: self.now, time=time.time)
        patch.setattr(train_dogs, "time", fake)

    def pay(self, price: float) -> None:
        """Let that many seconds go by."""
        with self.lock:  # a thread writes checkpoints
            self.now += price * self.slower

    def by_batches(self, batches: Callable[..., Iterator], price: float) -> Callable:
        """A generator of batches, each at its price."""

        def done(*args: torch.Tensor) -> Iterator:
            for batch in batches(*args):
                self.pay(price if len(args[-1]) >= 128 else 0.2)  # a sheet has 100
                yield batch

        return done

    def priced(self, do: Callable, price: float) -> Callable:
        """`do` at its price."""

        def done(*args: object, **options: object) -> object:
            result = do(*args, **options)
            self.pay(price)
            return result

        return done

    def run(self, *argv: str, slower_end: float = 1.0) -> float:
        """Run a part whose process started 4 s ago, and that ends so many times slower than it
        began; returns its seconds from the start of its process to its end."""
        began, self.now, self.slower = self.now, self.now + 4, 1.0
        train = train_dogs.train

        def then_slower(*args: object) -> bool:
            done = train(*args)
            self.slower = slower_end
            return done

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_dogs, "train", then_slower)
            assert train_dogs.main(argv, began) == 0
        return self.now - began


@pytest.mark.parametrize(("sampling", "early"), [(1.5, True), (5.0, False)])
def test_without_a_budget_a_first_zip_is_written_before_the_first_step_if_it_takes_under_30_s(
    sampling, early, tmp_path, monkeypatch
):
    monkeypatch.setattr(train_dogs, "SHEETS", (0.5,))
    MovedClock(monkeypatch, sampling, 0.1)
    zips: list[int] = []
    file = tmp_path / "out" / "images.zip"

    def look() -> None:
        zips.append(file.stat().st_mtime_ns if file.exists() else 0)

    at_step(monkeypatch, s1=look, s5=look, s9=look)
    assert run_here(file.parent, steps=10, images=256) == 0
    look()
    first, before_the_sheet, refreshed, last = zips
    if early:
        assert first == before_the_sheet and len({0, first, refreshed, last}) == 4
    else:
        assert first == before_the_sheet == refreshed == 0 < last


@pytest.mark.parametrize(
    ("sampling", "saving", "slower_end", "least"),
    [
        (1.2, 0.1, 1.0, 0.9),  # a tenth of the budget a zip, as 10,000 images in two minutes
        (1.2, 0.1, 1.25, 0.9),
        (0.06, 0.1, 1.4, 0.9),
        (2.4, 0.1, 1.5, 0.8),  # too long for a first zip
        (0.01, 4.0, 1.0, 0.8),  # a slow disk, and a checkpoint is being written at the end
    ],
)
def test_a_run_ends_within_its_budget_from_process_start_to_end_and_makes_use_of_it(
    sampling, saving, slower_end, least, tmp_path, monkeypatch
):
    monkeypatch.setattr(train_dogs, "CHECKPOINT_SECONDS", 1.5 * saving)
    clock, out = MovedClock(monkeypatch, sampling, saving), tmp_path / "out"
    argv = arguments(out, images=1280, minutes=2, average_every=1)
    used = clock.run(*argv, slower_end=slower_end)
    assert least * 120 <= used <= 120 and len(pngs(out / "images.zip")) == 1280
    # What is scheduled follows progress, which here is the time: SWA begins at half of it.
    lines = [line for line in log_of(out) if "progress" in line]
    assert lines[-1]["progress"] > 0.98 and load(out / "checkpoint.pt")["finished"]
    assert load(out / "checkpoint.pt")["trainer"]["swa_updates"] > 10
    assert any("submitted" in line for line in log_of(out))


def test_a_last_zip_that_would_be_too_late_is_given_up_and_the_first_stays(tmp_path, monkeypatch):
    clock, out = MovedClock(monkeypatch, 1.2, 0.1), tmp_path / "out"
    argv = arguments(out, images=1280, minutes=2)
    assert 0.9 * 120 <= clock.run(*argv, slower_end=3.0) <= 120
    (text,) = [line["text"] for line in log_of(out) if "too slow" in line.get("text", "")]
    steps = steps_of(out)
    assert "is of step 0;" in text and text.endswith(f"of step {steps}") and left_over(out) == []
    first = pngs(out / "images.zip")
    assert len(first) == 1280 and load(out / "generator.pt")["steps_done"] == steps
    assert train_dogs.main([*argv, "--sample-only"], clock.now) == 0  # as the sentence says
    assert pngs(out / "images.zip").keys() == first.keys()
    assert clock.run(*argv) < 60 and steps_of(out) == steps  # the finished run is submitted


def test_without_an_earlier_zip_a_last_one_that_would_be_late_has_fewer_images(
    tmp_path, monkeypatch
):
    clock, out = MovedClock(monkeypatch, 2.4, 0.1), tmp_path / "out"
    argv = arguments(out, images=1280, minutes=2)
    assert 0.9 * 120 <= clock.run(*argv, slower_end=3.0) <= 120
    few, texts = pngs(out / "images.zip"), [line.get("text", "") for line in log_of(out)]
    assert 128 <= len(few) < 1280 and any(f": {len(few)} dogs of" in text for text in texts)
    assert any("too slow for 1280 images" in text for text in texts) and left_over(out) == []
    assert train_dogs.main([*argv, "--sample-only"], clock.now) == 0  # as the sentence says
    every = pngs(out / "images.zip")
    assert len(every) == 1280 and list(every.items())[: len(few)] == list(few.items())


def test_only_a_larger_budget_trains_a_finished_run_further(tmp_path, monkeypatch):
    clock, out = MovedClock(monkeypatch, 0.1, 0.1), tmp_path / "out"
    done = []
    for minutes in ("0.5", "0.5", "0.4", "1.5"):
        clock.run(*arguments(out, images=6, minutes=minutes))
        done.append(steps_of(out))
    assert done[0] == done[1] == done[2] < done[3]


@pytest.mark.parametrize(("sampling", "saving"), [(1.5, 0.1), (0.1, 3.0)])
def test_the_parts_of_a_run_end_within_its_budget_together(sampling, saving, tmp_path, monkeypatch):
    clock, out = MovedClock(monkeypatch, sampling, saving), tmp_path / "out"
    argv = arguments(out, images=256, minutes=3, average_every=1)
    used, steps = [], []
    while not steps or not load(out / "checkpoint.pt")["finished"]:
        used.append(clock.run(*argv, "--part-hours", "0.0167"))
        steps.append(steps_of(out))
        assert used[-1] <= 60.12 and load(out / "checkpoint.pt")["seconds_used"] >= sum(used)
    assert 0.75 * 180 <= sum(used) <= 180
    assert resumed_steps(out) == steps[:-1] and steps == sorted(set(steps)) and len(steps) >= 3


def test_a_last_part_with_no_time_for_two_zips_writes_no_early_one(tmp_path, monkeypatch):
    clock, out = MovedClock(monkeypatch, 2.4, 0.1), tmp_path / "out"
    argv = arguments(out, images=1280, minutes=3)
    clock.run(*argv, "--part-hours", "0.03")
    state = load(out / "checkpoint.pt")
    torch.save(state | {"seconds_used": 180.0 - 50}, out / "checkpoint.pt")
    assert clock.run(*argv) <= 50


@pytest.mark.parametrize("limit", ["--minutes", "--part-hours"])
def test_a_budget_too_small_for_the_sampling_names_one_that_is_not(
    limit, tmp_path, monkeypatch, capsys
):
    clock, out = MovedClock(monkeypatch, 12.0, 0.1), tmp_path / "out"
    argv = arguments(out, images=256, **({"minutes": 30} if limit == "--part-hours" else {}))
    assert train_dogs.main([*argv, limit, "0.005"], clock.now) == 2
    message = only_message(capsys)
    assert_one_sentence(message, "budget", "--images")
    assert not (out / "images.zip").exists() and list(out.glob("checkpoint*")) == []
    least = re.search(rf"{limit} ([\d.]+)", message)[1]
    seconds = float(least) * (3600 if limit == "--part-hours" else 60)
    assert clock.run(*argv, limit, least) <= seconds
    assert len(pngs(out / "images.zip")) == 256 and steps_of(out) > 0


LATER = """
import runpy, sys, time
now = time.monotonic
time.monotonic = lambda: now() + 1000 * ("torch" in sys.modules)
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_budget_counts_from_before_the_import_of_torch(tmp_path):
    """With a clock that is 1,000 s later once torch is imported, 600 s are over at once."""
    command = [sys.executable, "-c", LATER, SCRIPT, *arguments(tmp_path / "out", minutes=10)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert_one_sentence(without_bars(done.stderr), "the budget is too small")
