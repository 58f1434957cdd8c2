"""The command line: flags, presets, help, the dry run, exit codes, and what a run leaves behind."""

# ruff: noqa: F811 (fixtures that are imported from runs)

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import re
import shutil
import struct
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from runs import (
    ROOT,
    SAMPLE,
    SCRIPT,
    STEPS,
    arguments,
    assert_one_sentence,
    finished_run,  # noqa: F401
    light,  # noqa: F401
    load,
    log_of,
    pixels,
    run_here,
    run_script,
)

import train_dogs
from train_dogs import Config, Generator, UserError, main, parse

FIELDS = {f.name: f for f in dataclasses.fields(Config)}


def flag(name: str) -> str:
    """The flag of a field."""
    return "--" + name.replace("_", "-")


def test_every_field_of_the_configuration_is_a_flag_with_hyphens():
    for name, f in FIELDS.items():
        if type(f.default) in (int, float):
            low, high = train_dogs.RANGES.get(name, (1, 2))
            value = type(f.default)(high if high < 1e6 else low + 1)
        else:
            free = {"data": "x", "crops": "box", "augment": "cutout", "out": "y", "device": "cpu"}
            value = free.get(name) or train_dogs.CHOICES[name][1]
        more = ["--condition", "breed"] if name == "classify" else []
        got = getattr(parse([flag(name), str(value), *more]).config, name)
        assert got == ((value,) if name == "data" else value), name


def test_the_flags_of_the_contract_exist_with_their_defaults():
    config = parse([]).config
    assert config.data == () and config.seed is not None
    assert (config.device, config.images, config.checkpoint_seconds) == ("auto", 10_000, 300)
    assert (config.hours, config.average, config.margin) == (8.5, "swa", 0.8)
    named = {"steps", "width", "d_width", "batch_size", "crops", "swa_start", "average_every"}
    assert named <= set(FIELDS)
    options = parse(["--dry-run", "--fresh", "--sample-only", "--resume", "x.pt"])
    assert options.dry_run and options.fresh and options.sample_only and options.resume == "x.pt"
    assert not (parse([]).dry_run or parse([]).fresh or parse([]).sample_only or parse([]).resume)
    assert parse(["--preset", "dogs"]).config == config


def test_data_may_be_repeated_and_keeps_its_order():
    assert parse(["--data", "b", "--data", "a"]).config.data == ("b", "a")


def test_the_configuration_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().width = 3


@pytest.mark.parametrize(("on_kaggle", "folder"), [(True, "/kaggle/working"), (False, "output")])
def test_out_is_kaggles_working_folder_where_that_exists(monkeypatch, on_kaggle, folder):
    is_dir = Path.is_dir
    monkeypatch.setattr(
        Path,
        "is_dir",
        lambda self, **_: on_kaggle if str(self) == "/kaggle/working" else is_dir(self),
    )
    assert parse([]).config.out == folder
    assert parse(["--out", "elsewhere"]).config.out == "elsewhere"


def test_a_preset_is_a_set_of_changed_fields_and_flags_go_before_it(monkeypatch):
    monkeypatch.setitem(train_dogs.PRESETS, "narrow", {"width": 8, "margin": 0.9})
    config = parse(["--preset", "narrow", "--margin", "0.7"]).config
    assert (config.width, config.margin) == (8, 0.7)
    assert config == dataclasses.replace(Config(), width=8, margin=0.7, out=config.out)


def test_every_preset_is_valid_and_costs_at_most_eight_and_a_half_p100_hours():
    for name, changes in train_dogs.PRESETS.items():
        assert set(changes) <= set(FIELDS)
        config = parse(["--preset", name]).config
        assert 0 < train_dogs.p100_hours(config, config.steps) <= 8.5, name


def test_steps_alone_lift_the_time_limit_and_with_a_budget_they_do_not():
    def limit(*words: str) -> float:
        return train_dogs.Clock(parse(words).config, 0.0, 0.0).deadline / 3600

    assert limit("--steps", "9") == math.inf
    assert limit("--steps", "9", "--hours", "2") == 2
    assert limit("--steps", "9", "--minutes", "30") == 0.5
    assert limit("--minutes", "90") == 1.5
    assert limit() == 8.5


@given(
    st.floats(0.01, 1), st.integers(1, 99_999), st.integers(1, 512), st.integers(0, 2**32 - 1),
    st.floats(1e-3, 1e4),
)  # fmt: skip
def test_values_arrive_exactly_as_given(margin, images, width, seed, hours):
    words = {"margin": margin, "images": images, "width": width, "seed": seed, "hours": hours}
    config = parse([w for k, v in words.items() for w in (flag(k), repr(v))]).config
    assert words == {name: getattr(config, name) for name in words}


BAD = [
    ["--width", "0"], ["--width", "4.5"], ["--width", "wide"], ["--margin", "1.01"],
    ["--margin", "0"], ["--margin", "nan"], ["--batch-size", "1"], ["--steps", "0"],
    ["--steps", "-3"], ["--hours", "0"], ["--hours", "nan"], ["--hours", "-1"], ["--minutes", "0"],
    ["--hours", "1", "--minutes", "60"], ["--images", "0"], ["--images", "100000"],
    ["--seed", "-1"], ["--seed", "4294967296"], ["--average", "mean"], ["--swa-start", "1.5"],
    ["--average-every", "0"], ["--ema-beta", "1"], ["--beta1", "1"], ["--g-lr", "inf"],
    ["--crops", "tail"], ["--crops", "box:0"], ["--crops", ""], ["--preset", "cats"],
    ["--device", "tpu"], ["--device", "cuda:x"], ["--checkpoint-seconds", "-1"], ["--wid", "4"],
    ["--nonsense"], ["stray"], ["--width"], ["--smoothing", "-0.1"], ["--part-hours", "-1"],
]  # fmt: skip


@pytest.mark.parametrize("words", BAD, ids=" ".join)
def test_a_wrong_option_is_one_sentence_and_exit_code_2(words, capsys, tmp_path):
    assert main(["--out", str(tmp_path / "out"), *words]) == 2
    assert_one_sentence(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_values_out_of_range_are_refused_with_the_range():
    for name, (least, most) in train_dogs.RANGES.items():
        kind = type(FIELDS[name].default)
        step = 1 if kind is int else 0.5
        for value in (least - step, most + step if most < 1e8 else most * 2):
            pattern = "0" if name == "hours" else rf"{flag(name)}.*{re.escape(str(least))}"
            with pytest.raises(UserError, match=pattern):
                parse([f"{flag(name)}={kind(value)}"])


@pytest.fixture(scope="module")
def help_entries() -> tuple[dict[str, str], list[str]]:
    """The help text of each flag, and the titles of the groups."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "400")
        with contextlib.redirect_stdout(io.StringIO()) as text, pytest.raises(SystemExit) as done:
            parse(["--help"])
    assert done.value.code == 0
    words = re.sub(r"\n {20,}", " ", text.getvalue())  # a long flag stands on a line of its own
    entries = dict(re.findall(r"^  (?:-h, )?(--[\w-]+)(.*)$", words, re.MULTILINE))
    return entries, re.findall(r"^([a-z]\w*):$", text.getvalue(), re.MULTILINE)


def test_help_gives_every_field_its_meaning_and_default(help_entries):
    entries, _ = help_entries
    for name, f in FIELDS.items():
        text = entries[flag(name)]
        assert len(text.split()) >= 4, (name, text)
        if f.default not in ("", ()):
            assert str(f.default).rstrip("0").rstrip(".") in text.replace(",", ""), (name, text)
            assert "default" in text or f"({f.default})" in text, (name, text)
    for name in ("--preset", "--dry-run", "--fresh", "--resume", "--sample-only", "--minutes"):
        assert len(entries[name].split()) >= 3
    assert "dogs" in entries["--preset"] and "default" in entries["--preset"]


def test_help_names_the_unit_of_every_duration_and_share(help_entries):
    entries, _ = help_entries
    units = {
        "hours": "hour", "part_hours": "hour", "minutes": "minute",
        "checkpoint_seconds": "second", "steps": "step", "average_every": "step",
        "swa_start": "progress",
        "lr_decay_start": "progress", "margin": "probability", "images": "image",
    }  # fmt: skip
    for name, unit in units.items():
        assert unit in flag(name) + entries[flag(name)], name


def test_help_groups_the_flags(help_entries):
    groups = {f.metadata["group"] for f in FIELDS.values()}
    assert groups <= set(help_entries[1]) and len(groups) >= 5


def test_main_returns_from_help_and_prints_it_on_stdout(capsys):
    assert main(["--help"]) == 0
    captured = capsys.readouterr()
    assert "--batch-size" in captured.out and captured.err == ""


def test_without_dogs_the_script_exits_with_2_and_names_both_remedies(tmp_path):
    if Path("/kaggle/input").exists():
        pytest.skip("this machine has Kaggle's input mounted")
    shutil.copy(SCRIPT, tmp_path)  # alone, without the data folder that lies beside it here
    shutil.copytree(SAMPLE, tmp_path / "data" / "sample")  # used only when named
    code, _, stderr = run_script("--width", "1", script=tmp_path / SCRIPT.name, cwd=tmp_path)
    assert code == 2
    assert_one_sentence(stderr, "data/download.py", "--data data/sample")
    assert not (tmp_path / "output" / "images.zip").exists()


# ------------------------------------------------------------------------------------- the dry run


def macs(width: int, d_width: int, latent_dim: int) -> tuple[list[int], list[int]]:
    """Multiply-adds per image of each layer of G and of D, by hand from the networks' table."""
    w, v = width, d_width
    g = [  # in x out x kernel area x positions of the smaller side
        latent_dim * 32 * w * 16 * 1,
        32 * w * 16 * w * 16 * 4**2,
        16 * w * 8 * w * 16 * 8**2,
        8 * w * 8 * w * 9 * 16**2,
        8 * w * 4 * w * 16 * 16**2,
        4 * w * 4 * w * 9 * 32**2,
        4 * w * 2 * w * 16 * 32**2,
        2 * w * 3 * 9 * 64**2,
    ]
    d = [
        3 * 2 * v * 16 * 32**2,
        2 * v * 4 * v * 16 * 16**2,
        4 * v * 4 * v * 9 * 16**2,
        4 * v * 8 * v * 16 * 8**2,
        8 * v * 8 * v * 9 * 8**2,
        8 * v * 16 * v * 16 * 4**2,
        16 * v * 1 * 16,
    ]
    return g, d


@pytest.mark.parametrize(("width", "d_width", "latent_dim"), [(48, 0, 256), (16, 24, 64)])
def test_flops_are_those_of_one_d_step_and_one_g_step(width, d_width, latent_dim):
    g, d = macs(width, d_width or width, latent_dim)
    forward = sum(g)
    # D's step: a real and a fake forward, gradients of weights and of all inputs but the images.
    d_step = 2 * (3 * sum(d) - d[0])
    # G's step: the fake forward and back through D, then G's weights and all inputs but z.
    g_step = 2 * sum(d) + 2 * sum(g) - g[0]
    expected = 2 * (forward + d_step + g_step)
    config = Config(width=width, d_width=d_width, latent_dim=latent_dim)
    assert sum(train_dogs.flops_per_image(config).values()) == pytest.approx(expected, rel=1e-3)
    hours = 1000 * config.batch_size * expected / 7.4e12 / 3600
    assert train_dogs.p100_hours(config, 1000) == pytest.approx(hours, rel=1e-3)


def test_a_dry_run_prints_the_plan_and_leaves_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--data", SAMPLE, "--out", out, "--width", 1, "--latent-dim", 16, "--images", 64]
    assert main([*map(str, words), "--minutes", "2", "--device", "cpu", "--dry-run"]) == 0
    captured = capsys.readouterr()
    text = captured.out
    config = parse([*map(str, words), "--minutes", "2"]).config
    assert not out.exists() and "Traceback" not in captured.err
    assert "CPU" in text and torch.__version__ in text  # device
    assert "120" in text and "sample" in text  # data found
    for name in FIELDS:  # the configuration
        assert re.search(rf"\b{name}\b", text), name
    for network in (Generator(16, 1), train_dogs.Discriminator(1)):  # parameters
        count = sum(p.numel() for p in network.parameters())
        assert str(count) in text.replace(",", "")
    flops = sum(train_dogs.flops_per_image(config).values())
    assert f"{flops / 1e9:.3f} GFLOP" in text
    steps = re.search(r"(\d[\d,]*) steps in the budget", text)
    assert steps and 0 < int(steps[1].replace(",", "")) <= config.steps
    hours = config.steps * config.batch_size * flops / 7.4e12 / 3600
    assert re.findall(r"^P100-hours: (.*)$", text, re.MULTILINE) == [f"{hours:.2f}"]


def test_a_dry_run_of_a_conditional_recipe_counts_the_breeds_of_the_data(tmp_path, capsys):
    words = ["--data", SAMPLE, "--out", tmp_path / "out", "--width", 1, "--latent-dim", 16]
    words += ["--images", 64, "--device", "cpu", "--condition", "breed", "--dry-run"]
    assert main([*map(str, words)]) == 0
    text = capsys.readouterr().out.replace(",", "")
    for network in (Generator(16, 1, breeds=6), train_dogs.Discriminator(1, breeds=6)):
        assert f"{sum(p.numel() for p in network.parameters())} parameters" in text


def test_a_dry_run_without_dogs_is_refused(tmp_path, capsys):
    words = ["--data", str(tmp_path / "none"), "--out", str(tmp_path / "out"), "--width", "1"]
    assert main([*words, "--dry-run"]) == 2
    assert_one_sentence(capsys.readouterr().err, "none")


# ------------------------------------------------------------------------------ what a run leaves


def test_a_run_leaves_every_file_of_the_contract(finished_run):
    names = {
        "images.zip", "generator.pt", "checkpoint.pt", "config.json", "log.jsonl", "samples",
        "progress.webp",
    }  # fmt: skip
    assert names <= {p.name for p in finished_run.iterdir()}
    assert pixels(finished_run / "images.zip").shape == (40, 64, 64, 3)


def test_config_json_the_log_and_the_checkpoint_carry_the_configuration(finished_run):
    config = parse(arguments(finished_run, steps=STEPS)).config
    expected = json.loads(json.dumps(dataclasses.asdict(config)))
    written = json.loads((finished_run / "config.json").read_text())
    logged = next(line["config"] for line in log_of(finished_run) if "config" in line)
    saved = json.loads(json.dumps(load(finished_run / "checkpoint.pt")["config"]))
    assert written == logged == saved == expected
    assert any("device" in line for line in log_of(finished_run))


def test_generator_pt_is_loaded_in_the_readmes_four_lines_and_draws_the_images_of_the_zip(
    finished_run, tmp_path, monkeypatch
):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    (lines,) = (block for block in blocks if "generator.pt" in block)
    assert len([line for line in lines.splitlines() if line and "import" not in line]) <= 4
    shutil.copytree(finished_run, tmp_path / "output")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(lines, names)  # noqa: S102 (the very text that the README shows)
    assert names["images"].shape[1:] == (3, 64, 64)
    z = train_dogs.draw_latents(40, 16, train_dogs.seed_for(0, "submission"))
    with torch.no_grad():
        images = names["G"](z).mul(127.5).add(127.5).round().clamp(0, 255).permute(0, 2, 3, 1)
    difference = images.numpy() - pixels(finished_run / "images.zip")
    assert np.abs(difference).max() <= 1


def test_the_first_sheet_shows_real_crops_and_the_animation_shows_all_sheets(finished_run):
    sheets = sorted((finished_run / "samples").glob("*.png"))
    assert sheets[0].name.startswith("real")
    assert len(sheets) >= 2 and sheets[-1].name.endswith(f"{STEPS}.png")
    for sheet in sheets:
        with Image.open(sheet) as picture:
            assert picture.size == (640, 640)
    with Image.open(finished_run / "progress.webp") as animation:
        assert animation.format == "WEBP" and animation.n_frames == len(sheets)
    with Image.open(sheets[0]) as first:  # real crops: those of the data, in its colours
        dogs = train_dogs.prepare_crops(train_dogs.find_photos([SAMPLE]), "square", show=False)
        real = dogs.crops.float().mean((0, 1, 2))
        shown = np.asarray(first, float).mean((0, 1))
        assert np.abs(shown - real.numpy()).max() < 12


def test_the_log_says_how_training_goes(finished_run):
    lines = [line for line in log_of(finished_run) if "d_loss" in line]
    last = lines[-1]
    assert last["step"] == STEPS and last["images"] == 8 * STEPS and last["progress"] == 1
    for name in ("g_loss", "d_real", "d_fake", "past_margin", "images_per_second", "seconds"):
        assert math.isfinite(last[name]), name
    assert 0 <= last["past_margin"] <= 1


def test_in_a_log_file_progress_is_a_line_now_and_then_and_no_bar(finished_run):
    said = finished_run.with_suffix(".txt").read_text()
    assert "\r" not in said and "\x1b" not in said
    lines = [line for line in said.splitlines() if "images/s" in line]
    assert 1 <= len(lines) <= 3  # the first, the last; a minute lies between two
    assert re.search(r"D -?[\d.]+.*G -?[\d.]+.*left", lines[-1])


def test_on_a_terminal_progress_is_a_bar_with_images_per_second_losses_and_time_left(
    tmp_path, monkeypatch
):
    fcntl, pty, termios = map(pytest.importorskip, ("fcntl", "pty", "termios"))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 160, 0, 0))
    shown = bytearray()

    def read() -> None:
        with contextlib.suppress(OSError):  # how Linux says that the other end is closed
            while chunk := os.read(ours, 65536):
                shown.extend(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(theirs, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        assert run_here(tmp_path / "out", steps=30) == 0
    reader.join(10)
    os.close(ours)
    bar = [part for part in shown.decode().split("\r") if "images/s" in part and "|" in part]
    assert bar and re.search(r"D -?[\d.]+.*G -?[\d.]+.*left", bar[-1])


def test_kaggles_batch_runs_get_lines_even_where_stderr_is_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    assert not train_dogs.is_live()
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert train_dogs.is_live()
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    assert not train_dogs.is_live()


def test_main_leaves_no_trace_of_a_finished_run_in_the_data_folder(finished_run):
    names = {p.suffix for p in SAMPLE.rglob("*") if p.is_file()}
    assert names <= {".jpg", ".xml", "", ".md", ".txt"}


def test_a_set_smaller_than_a_batch_trains(tmp_path):
    data = tmp_path / "dogs"
    pictures = sorted((SAMPLE / "Images").glob("*/*.jpg"))[:16]
    data.mkdir()
    for picture in pictures:
        shutil.copy(picture, data)
    assert run_here(tmp_path / "out", data=data, batch_size=24, steps=3, images=5) == 0
    assert len(pixels(tmp_path / "out" / "images.zip")) == 5
