"""Kills, signals, damage, full disks and budgets: what a run survives and leaves behind."""

# ruff: noqa: F811 (fixtures that are imported from runs)

from __future__ import annotations

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
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import (
    ROOT,
    SAMPLE,
    STEPS,
    arguments,
    assert_one_sentence,
    environment,
    finished_run,  # noqa: F401
    left_over,
    light,  # noqa: F401
    light_runs,
    load,
    log_of,
    pixels,
    pngs,
    resumed_steps,
    run_here,
    sha,
    start,
    tensors_in,
    wait_until,
)

import train_dogs
from train_dogs import Config, Trainer, UserError, load_state

CUT = 3 * STEPS // 4  # where SWA has begun, in the middle of an order of the dogs
SIGNALS = [signal.SIGINT, signal.SIGTERM]


def signal_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGINT) -> None:
    """Send this process a signal once `step` is done."""
    real = Trainer.step

    def stepped(trainer: Trainer, progress: float) -> None:
        real(trainer, progress)
        if trainer.steps_done == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Trainer, "step", stepped)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory, own_cache: Path) -> Path:
    """The folder of a run of `STEPS` that was interrupted at `CUT`; copy it to change it."""
    out = tmp_path_factory.mktemp("interrupted")
    with light_runs(), pytest.MonkeyPatch.context() as patch:
        signal_at(patch, CUT)
        assert run_here(out, steps=STEPS, checkpoint_seconds=0.0) == 130
    return out


@pytest.fixture
def stopped(interrupted: Path, tmp_path: Path) -> Path:
    """A copy of it, to be gone on with."""
    return Path(shutil.copytree(interrupted, tmp_path / "stopped"))


def assert_same_result(out: Path, reference: Path) -> None:
    """The same zip, byte for byte, the same weights and state; nothing unfinished beside them."""
    assert sha(out / "images.zip") == sha(reference / "images.zip")
    for file, part in (("generator.pt", "state_dict"), ("checkpoint.pt", "trainer")):
        ours, theirs = (list(tensors_in(load(f / file)[part])) for f in (out, reference))
        assert len(ours) == len(theirs) > 10
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    assert left_over(out) == []


# ------------------------------------------------------------------------------- kill -9 and resume


def test_killed_at_random_moments_and_resumed_it_writes_the_same_zip(finished_run, tmp_path):
    out, chance = tmp_path / "out", random.Random(3)
    argv = arguments(out, steps=STEPS, checkpoint_seconds=0.1)
    previous, codes = out / "checkpoint.previous.pt", []
    for attempt in range(4):
        process = start(*argv)
        if attempt == 0:  # at least once while it trains
            wait_until(lambda p=process: previous.exists() or p.poll() is not None)
            time.sleep(chance.uniform(0, 0.3))
        else:
            time.sleep(chance.uniform(1.5, 4.5))
        process.kill()
        process.communicate()
        codes.append(process.returncode)
        assert process.returncode in (0, -signal.SIGKILL)
    assert codes[0] == -signal.SIGKILL
    assert run_here(out, steps=STEPS) == 0
    assert max(resumed_steps(out)) > 0
    assert_same_result(out, finished_run)


DRIVER = """
import os, signal, sys
import train_dogs

when, count, seen, replace = sys.argv[1], int(sys.argv[2]), 0, os.replace

def dying_replace(source, target):
    global seen
    if os.path.basename(target).startswith("checkpoint"):
        seen += 1
        if seen == count:
            if when == "before":  # as if the machine had stopped half way through the writing
                os.truncate(source, os.path.getsize(source) // 2)
            else:
                replace(source, target)
            os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

os.replace = dying_replace
sys.exit(train_dogs.main(sys.argv[3:]))
"""


def die(when: str, count: int, argv: list[str]) -> None:
    """Run until SIGKILL, before or after a checkpoint's renaming number `count`."""
    command = [sys.executable, "-c", DRIVER, when, str(count), *argv]
    with_path = environment() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=with_path, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_killed_inside_the_writing_of_a_checkpoint_it_loses_nothing_but_time(
    finished_run, tmp_path
):
    out = tmp_path / "out"
    argv = arguments(out, steps=STEPS, checkpoint_seconds=0.1)
    die("before", 6, argv)  # the file is half written
    die("after", 5, argv)  # the old one is out of its place, the new one not yet in it
    assert run_here(out, steps=STEPS) == 0
    assert len(resumed_steps(out)) == 2 and resumed_steps(out)[-1] > 0
    assert_same_result(out, finished_run)


def test_the_checkpoint_holds_everything_in_plain_types(interrupted):
    state = load(interrupted / "checkpoint.pt")  # weights_only: plain types and tensors

    def keys(value: object) -> set[str]:
        if not isinstance(value, dict):
            return set()
        return set(map(str, value)).union(*map(keys, value.values()))

    names = keys(state)
    for part in ("opt_g.", "opt_d.", "ema.", "swa.", "order", "cursor", "rng", "G.", "D."):
        assert any(name.startswith(part) for name in names), part
    assert state["config"].keys() == asdict(Config()).keys()
    assert state["torch"] == torch.__version__ and state["threads"] == 1
    assert 0 < state["seconds_used"] < 600
    previous = load(interrupted / "checkpoint.previous.pt")
    assert 0 < previous["trainer"]["steps_done"] <= state["trainer"]["steps_done"] == CUT
    assert sum(t.numel() for t in tensors_in(state)) > 10_000


# ---------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_step_saves_writes_the_zip_and_returns_130(
    number, finished_run, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    handlers = [signal.getsignal(n) for n in SIGNALS]
    with monkeypatch.context() as patch:
        signal_at(patch, 7, number)
        assert run_here(out, steps=STEPS) == 130
    assert [signal.getsignal(n) for n in SIGNALS] == handlers
    assert "Traceback" not in capsys.readouterr().err
    assert load(out / "checkpoint.pt")["trainer"]["steps_done"] == 7
    assert len(pixels(out / "images.zip")) == 40 and left_over(out) == []
    # Started again it says where it goes on, and ends where an undisturbed run ends.
    assert run_here(out, steps=STEPS) == 0
    assert "resumed at step 7" in capsys.readouterr().out and resumed_steps(out) == [7]
    assert_same_result(out, finished_run)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_before_the_first_step_returns_130_and_leaves_no_zip(
    number, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    handlers = [signal.getsignal(n) for n in SIGNALS]

    def prepare(*_: object) -> None:
        os.kill(os.getpid(), number)
        time.sleep(5)

    monkeypatch.setattr(train_dogs, "prepare_crops", prepare)
    begin = time.monotonic()
    assert run_here(out, steps=STEPS) == 130
    assert time.monotonic() - begin < 4
    assert_one_sentence(capsys.readouterr().err)
    assert not (out / "images.zip").exists() and left_over(out) == []
    assert [signal.getsignal(n) for n in SIGNALS] == handlers


def test_the_script_leaves_with_130_after_an_early_signal(tmp_path):
    out = tmp_path / "out"
    process = start(*arguments(out, steps=10**6))
    try:
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert_one_sentence(stderr)
    assert not (out / "images.zip").exists() and left_over(out) == []


def test_a_second_signal_leaves_at_once_with_nothing_half_written(tmp_path):
    out = tmp_path / "out"
    process = start(*arguments(out, steps=10**6, images=30_000))
    try:
        for line in process.stdout:
            if "images/s" in line:
                break
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: (out / ".images.zip.part").exists())  # the writing of the zip
        process.send_signal(signal.SIGINT)
        begin = time.monotonic()
        _, stderr = process.communicate(timeout=60)
        took = time.monotonic() - begin
    finally:
        process.kill()
    assert process.returncode == 130 and took < 4
    assert "Traceback" not in stderr
    assert not (out / "images.zip").exists() and left_over(out) == []
    assert load(out / "checkpoint.pt")["trainer"]["steps_done"] > 0
    assert load(out / "generator.pt")


@pytest.mark.parametrize("name", ["checkpoint.pt", "generator.pt", "progress.webp", "images.zip"])
def test_a_second_signal_at_a_files_renaming_leaves_the_old_files_whole(
    name, stopped, monkeypatch, capsys
):
    before = {p.name: p.read_bytes() for p in stopped.iterdir() if p.is_file()}
    replace = os.replace

    def signalled(source: str, target: str) -> None:
        if Path(target).name == name and load_steps(stopped) > CUT - 2:
            os.kill(os.getpid(), signal.SIGINT)
        replace(source, target)

    with monkeypatch.context() as patch:
        signal_at(patch, CUT + 3)
        patch.setattr(os, "replace", signalled)
        assert run_here(stopped, steps=STEPS) == 130
    assert "Traceback" not in capsys.readouterr().err
    assert [n for n in left_over(stopped) if ".part" in n] == []
    for path in stopped.glob("*.pt"):
        assert load(path)
    assert len(pixels(stopped / "images.zip")) == 40
    if name != "checkpoint.pt":  # what was to be replaced is as it was
        assert (stopped / name).read_bytes() == before[name]
        return
    assert run_here(stopped, steps=STEPS) == 0
    assert left_over(stopped) == []
    assert load_steps(stopped) == STEPS


def load_steps(out: Path) -> int:
    """How many steps the newest checkpoint in `out` has done."""
    path = next(p for p in (out / "checkpoint.pt", out / "checkpoint.previous.pt") if p.exists())
    return load(path)["trainer"]["steps_done"]


def test_an_interrupt_while_a_finished_run_is_written_again_keeps_the_old_zip(
    finished_run, tmp_path, monkeypatch
):
    out = Path(shutil.copytree(finished_run, tmp_path / "out"))
    encode, once = train_dogs.encode_png, threading.Lock()

    def signalled(image: np.ndarray) -> bytes:  # in several threads
        if once.acquire(blocking=False):
            os.kill(os.getpid(), signal.SIGTERM)
        return encode(image)

    monkeypatch.setattr(train_dogs, "encode_png", signalled)
    assert run_here(out, steps=STEPS) == 130
    assert_same_result(out, finished_run)


def test_main_works_in_a_thread_where_no_handler_can_be_set(tmp_path):
    codes: list[int] = []
    out = tmp_path / "out"
    thread = threading.Thread(target=lambda: codes.append(run_here(out, steps=3, images=3)))
    thread.start()
    thread.join(60)
    assert codes == [0]


# ---------------------------------------------------------------------------------------- damage


def test_a_damaged_checkpoint_is_set_aside_and_the_previous_one_used(stopped, finished_run, capsys):
    damaged = stopped / "checkpoint.pt"
    os.truncate(damaged, damaged.stat().st_size // 2)
    size = damaged.stat().st_size
    assert run_here(stopped, steps=STEPS) == 0
    captured = capsys.readouterr()
    assert "damaged" in captured.err and "Traceback" not in captured.err
    assert 0 < resumed_steps(stopped)[-1] <= CUT
    aside = [p for p in stopped.glob("*damaged*")]
    assert [p.stat().st_size for p in aside] == [size]
    assert_same_result(stopped, finished_run)


def test_with_both_checkpoints_damaged_it_starts_anew(stopped, finished_run, capsys):
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        (stopped / name).write_bytes(b"no checkpoint")
    assert run_here(stopped, steps=STEPS) == 0
    assert capsys.readouterr().err.count("damaged:") == 2
    assert resumed_steps(stopped) == []
    assert_same_result(stopped, finished_run)


DAMAGE = {
    "empty": b"",
    "zeros": bytes(4096),
    "text": b"not a checkpoint\n" * 99,
    "pickle": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.",
    "zip": b"PK\x05\x06" + bytes(18),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_file_that_is_no_checkpoint_is_refused_in_one_sentence(kind, tmp_path, capsys):
    file = tmp_path / "checkpoint.pt"
    file.write_bytes(DAMAGE[kind])
    out = tmp_path / "out"
    assert run_here(out, steps=STEPS, resume=file) == 2
    assert_one_sentence(capsys.readouterr().err, str(file))
    assert file.read_bytes() == DAMAGE[kind] and not (out / "images.zip").exists()


@pytest.mark.parametrize("value", [{"format": 1}, {"config": {}}, [1, 2], torch.zeros(3), None])
def test_a_torch_file_of_something_else_is_refused_in_one_sentence(value, tmp_path, capsys):
    file = tmp_path / "checkpoint.pt"
    torch.save(value, file)
    assert run_here(tmp_path / "out", steps=STEPS, resume=file) == 2
    assert_one_sentence(capsys.readouterr().err, str(file))


@pytest.mark.parametrize("what", ["nothing", "folder", "generator.pt"])
def test_resume_from_what_is_no_checkpoint_is_one_sentence(what, finished_run, tmp_path, capsys):
    file = {"nothing": tmp_path / "none.pt", "folder": tmp_path}.get(what, finished_run / what)
    assert run_here(tmp_path / "out", steps=STEPS, resume=file) == 2
    assert_one_sentence(capsys.readouterr().err, str(file))


def test_no_damage_by_truncation_or_flipped_bits_is_loaded_or_breaks_the_program(
    interrupted, tmp_path
):
    good = (interrupted / "checkpoint.pt").read_bytes()
    truth = list(tensors_in(load(interrupted / "checkpoint.pt")))
    chance, file = random.Random(0), tmp_path / "checkpoint.pt"
    refused = 0
    for attempt in range(60):
        data = bytearray(good[: chance.randrange(len(good))] if attempt % 3 == 0 else good)
        if attempt % 3 and data:
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        file.write_bytes(data)
        try:
            loaded = list(tensors_in(load_state(file, "trainer")))
        except UserError:
            refused += 1
        else:  # the bit lay where nothing is read
            assert len(loaded) == len(truth)
            assert all(torch.equal(a, b) for a, b in zip(loaded, truth))
    assert refused >= 40


# -------------------------------------------------------------------------------- what must match


MUST_MATCH = {
    "crops": "box", "latent_dim": 17, "width": 2, "d_width": 2, "init_std": 0.02, "margin": 0.7,
    "smoothing": 0.1, "batch_size": 9, "g_lr": 0.1, "d_lr": 0.1, "beta1": 0.5, "beta2": 0.9,
    "seed": 1, "swa_start": 0.1, "average_every": 3,
}  # fmt: skip
MAY_DIFFER = {
    "hours": 3, "images": 6, "device": "cpu", "part_hours": 2, "checkpoint_seconds": 9,
}  # fmt: skip


@pytest.mark.parametrize("name", MUST_MATCH)
def test_another_recipe_is_refused_with_the_remedy(name, finished_run, tmp_path, capsys):
    file = finished_run / "checkpoint.pt"
    options = {"steps": STEPS, "resume": file, name: MUST_MATCH[name]}
    assert run_here(tmp_path / "out", **options) == 2
    flag = "--" + name.replace("_", "-")
    assert_one_sentence(capsys.readouterr().err, flag, "--fresh", "--out")


def test_what_does_not_change_the_weights_may_differ(stopped, finished_run, tmp_path, capsys):
    dogs = tmp_path / "elsewhere"  # the same dogs on another mount, with other times
    shutil.copytree(SAMPLE, dogs, copy_function=shutil.copyfile)
    out = tmp_path / "other"
    options = MAY_DIFFER | {"data": dogs, "resume": stopped / "checkpoint.pt"}
    assert run_here(out, steps=CUT + 1, **options) == 0, capsys.readouterr().err
    assert resumed_steps(out) == [CUT]
    assert len(pngs(out / "images.zip")) == 6


def test_other_dogs_are_refused_with_the_remedy(stopped, tmp_path, capsys):
    dogs = Path(shutil.copytree(SAMPLE, tmp_path / "fewer"))
    picture = next((dogs / "Images").glob("*/*.jpg"))
    next((dogs / "Annotation").glob(f"*/{picture.stem}*")).unlink()
    picture.unlink()
    assert run_here(stopped, steps=STEPS, data=dogs) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if "train_dogs:" in line]
    assert_one_sentence("\n".join(err), "--data", "--fresh")
    assert len(pixels(stopped / "images.zip")) == 40


def test_fresh_ignores_the_checkpoint_in_out(stopped):
    assert run_here(stopped, "--fresh", steps=5, images=4) == 0
    assert load(stopped / "checkpoint.pt")["trainer"]["steps_done"] == 5
    assert resumed_steps(stopped) == [] and len(pngs(stopped / "images.zip")) == 4
    sheets = {p.name for p in (stopped / "samples").glob("step_*.png")}
    assert sheets == {"step_0000005.png"}  # those of the earlier run are gone


@pytest.fixture
def read_only(interrupted: Path, tmp_path: Path) -> Iterator[Path]:
    """The interrupted run on a read-only mount, where one is permitted; else a read-only folder."""
    folder = Path(shutil.copytree(interrupted, tmp_path / "input"))
    mount = ["mount", "--bind", "-o", "ro", str(folder), str(folder)]
    done = shutil.which("mount") and subprocess.run(mount, capture_output=True, check=False)
    mounted = bool(done) and done.returncode == 0
    for path in (*folder.rglob("*"), folder) if not mounted else ():
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield folder
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)
    for path in (folder, *folder.rglob("*")) if not mounted else ():
        path.chmod(0o755 if path.is_dir() else 0o644)


def test_resume_from_a_read_only_folder_goes_on_in_an_empty_one(read_only, finished_run, tmp_path):
    def state() -> dict[Path, tuple[int, str]]:
        files = (p for p in read_only.rglob("*") if p.is_file())
        return {p: (p.stat().st_mtime_ns, sha(p)) for p in files}

    before, out = state(), tmp_path / "working"
    assert run_here(out, steps=STEPS, resume=read_only / "checkpoint.pt") == 0
    assert resumed_steps(out) == [CUT]
    assert_same_result(out, finished_run)
    assert state() == before
    names = {"checkpoint.pt", "config.json", "log.jsonl", "progress.webp"}
    assert names <= {p.name for p in out.iterdir()}
    assert (out / "samples" / "real.png").exists()  # a sheet of real crops here too


# ------------------------------------------------------------------------------------ sample only


def test_sample_only_draws_the_same_zip_from_the_checkpoint_without_the_dogs(
    finished_run, tmp_path
):
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(finished_run / "checkpoint.pt", out)
    before = sha(out / "checkpoint.pt")
    assert run_here(out, "--sample-only", data=tmp_path / "no dogs", images=40) == 0
    assert sha(out / "images.zip") == sha(finished_run / "images.zip")
    assert sha(out / "checkpoint.pt") == before and left_over(out) == []


def test_sample_only_draws_from_a_file_elsewhere_with_another_seed(finished_run, tmp_path):
    out = tmp_path / "out"
    for name in ("generator.pt", "checkpoint.pt"):
        words = ["--out", out, "--sample-only", "--resume", finished_run / name]
        assert train_dogs.main([*map(str, words), "--seed", "5", "--images", "7"]) == 0
        files = pngs(out / "images.zip")
        assert len(files) == 7
        assert not set(files.values()) & set(pngs(finished_run / "images.zip").values())
    assert not (out / "checkpoint.pt").exists()


def test_sample_only_uses_the_last_whole_file(finished_run, tmp_path, capsys):
    out = Path(shutil.copytree(finished_run, tmp_path / "out"))
    (out / "images.zip").unlink()
    (out / "checkpoint.pt").write_bytes(b"damaged")
    assert run_here(out, "--sample-only", images=40) == 0, capsys.readouterr().err
    assert len(pixels(out / "images.zip")) == 40


def test_sample_only_where_nothing_was_trained_is_one_sentence(tmp_path, capsys):
    assert run_here(tmp_path / "out", "--sample-only") == 2
    assert_one_sentence(capsys.readouterr().err, "checkpoint.pt")
    assert not (tmp_path / "out" / "images.zip").exists()


# --------------------------------------------------------------------------------------- the disk


def test_a_full_disk_is_one_sentence_and_the_last_good_files_stay_whole(
    finished_run, tmp_path, capsys
):
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(disk)]
    if not shutil.which("mount") or subprocess.run(command, check=False).returncode:
        pytest.skip("no right to mount a small file system here")
    try:
        out = disk / "out"
        assert run_here(out, steps=STEPS, checkpoint_seconds=0.2) == 2
        assert_one_sentence(only_message(capsys), "No space left", "room")
        assert load(out / "checkpoint.pt")["trainer"]["steps_done"] < STEPS
        assert left_over(out) == [] and not (out / "images.zip").exists()
        log_of(out)  # every line of it is whole
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        assert run_here(out, steps=STEPS) == 0  # as the sentence says
        assert_same_result(out, finished_run)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def only_message(capsys: pytest.CaptureFixture[str]) -> str:
    """The lines of stderr but for progress bars."""
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    return "\n".join(line for line in lines if "cropping" not in line)


def test_a_file_that_may_not_grow_is_one_sentence_and_the_last_good_files_stay_whole(
    stopped, finished_run, capsys
):
    before = {p.name: sha(p) for p in stopped.iterdir() if p.suffix in (".pt", ".zip", ".webp")}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        assert run_here(stopped, steps=STEPS) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_one_sentence(only_message(capsys), "large")
    assert {name: sha(stopped / name) for name in before} == before
    assert left_over(stopped) == []
    assert run_here(stopped, steps=STEPS) == 0
    assert_same_result(stopped, finished_run)


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere/out"])
def test_a_folder_that_cannot_be_made_is_one_sentence(place, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run_here(tmp_path / place, steps=STEPS) == 2
    assert_one_sentence(only_message(capsys), "--out")


# -------------------------------------------------------------------------------------- the budget


def test_a_budget_that_cannot_hold_the_sampling_names_one_that_can(tmp_path, capsys):
    out = tmp_path / "out"
    assert run_here(out, minutes=0.02) == 2
    message = only_message(capsys)
    assert_one_sentence(message, "budget", "--images")
    assert not (out / "images.zip").exists()
    least = re.search(r"--minutes ([\d.]+)", message)
    assert least and float(least[1]) < 1
    begin = time.monotonic()
    assert run_here(out, minutes=least[1]) == 0
    assert time.monotonic() - begin <= 60 * float(least[1])
    assert len(pixels(out / "images.zip")) == 40


def test_a_part_too_short_for_the_sampling_names_one_that_is_not(tmp_path, capsys):
    assert run_here(tmp_path / "out", minutes=30, part_hours=1e-5) == 2
    assert_one_sentence(only_message(capsys), "--part-hours")


def test_a_run_in_two_parts_ends_within_its_budget_from_process_start_to_zip(tmp_path):
    out, budget, part = tmp_path / "out", 45.0, 18.0
    argv = arguments(out, images=400, minutes=budget / 60, average_every=1, checkpoint_seconds=4)
    begin = time.time()
    assert train_dogs.main([*argv, "--part-hours", str(part / 3600)]) == 0
    first = time.time() - begin
    assert first <= part
    assert len(pngs(out / "images.zip")) == 400
    state = load(out / "checkpoint.pt")
    assert not state["finished"] and state["trainer"]["steps_done"] > 0
    # What a part has used counts to its zip, which was written after this checkpoint.
    zip_seconds = (out / "images.zip").stat().st_mtime - begin
    assert zip_seconds - 1 <= state["seconds_used"] <= part

    begin = time.time()
    process = start(*argv)
    _, stderr = process.communicate(timeout=120)
    second = time.time() - begin
    assert process.returncode == 0, stderr
    assert 0.7 * budget <= first + second <= budget  # kept, and made use of
    assert len(pngs(out / "images.zip")) == 400
    steps, before, state = resumed_steps(out), state, load(out / "checkpoint.pt")
    assert steps == [before["trainer"]["steps_done"]]
    assert state["finished"] and state["trainer"]["steps_done"] > steps[0]
    # What is scheduled follows progress, which here is the time: SWA begins at half of it.
    lines = [line for line in log_of(out) if "progress" in line]
    assert lines[-1]["progress"] > 0.99 and state["trainer"]["swa_updates"] > 10
    after = next(line for line in lines if line["step"] > steps[0])
    assert after["seconds"] >= before["seconds_used"] + 2  # the interpreter's start counts too
    # Finished within its budget: the same command writes the zip again and trains no more.
    assert train_dogs.main(argv) == 0
    assert load(out / "checkpoint.pt")["trainer"]["steps_done"] == state["trainer"]["steps_done"]


def test_more_steps_or_hours_continue_a_finished_run_and_fewer_do_not():
    saved = {"steps": 100, "hours": 2.0}
    for steps, hours, more in (
        (100, 2.0, False), (101, 2.0, True), (100, 3.0, True), (50, 1.0, False), (100, 0.0, True),
    ):  # fmt: skip
        assert train_dogs.asks_for_more(Config(steps=steps, hours=hours), saved) == more
    assert not train_dogs.asks_for_more(Config(steps=100, hours=5.0), {"steps": 100, "hours": 0.0})
