"""The command line: flags, presets, help, the dry run, exit codes, and what a run leaves behind."""

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
from dog_sets import snapshot
from PIL import Image
from runs import (
    ROOT,
    SAMPLE,
    SCRIPT,
    STEPS,
    arguments,
    assert_one_sentence,
    load,
    log_of,
    pixels,
    run_here,
    run_script,
)

import train_dogs
from train_dogs import Config, UserError, main, parse

pytestmark = pytest.mark.usefixtures("light")

FIELDS = {f.name: f for f in dataclasses.fields(Config)}
RANGES = {name: f.metadata["range"] for name, f in FIELDS.items()}
NEEDS = {  # the options without which a field is refused
    "classify": ["--condition", "breed"],
    "labelled": ["--condition", "classes", "--classify", "1"],
}
TEXTS = {"data": "x", "out": "y", "crops": "box", "augment": "cutout", "device": "cpu"}


def flag(name: str) -> str:
    """The flag of a field."""
    return "--" + name.replace("_", "-")


def another(name: str) -> str:
    """A word for a field that is valid and not its default."""
    f = FIELDS[name]
    if type(f.default) not in (int, float):
        return TEXTS.get(name) or next(c for c in f.metadata["choices"]() if c != f.default)
    least, most = RANGES[name]
    return repr(type(f.default)(next(v for v in (3, 0.25) if least <= v <= most)))


def test_every_field_of_the_configuration_is_a_flag_with_hyphens():
    for name, f in FIELDS.items():
        more = NEEDS.get(name, [])
        got = getattr(parse([flag(name), another(name), *more]).config, name)
        assert type(got) is type(f.default) and got != f.default
        assert str(got[0] if name == "data" else got) == another(name)


def test_actions_are_off_unless_asked_for():
    switches = ["--dry-run", "--fresh", "--sample-only", "--walk"]
    given, default = parse([*switches, "--resume", "x.pt", "--breed", "Pug"]), parse([])
    assert given[2:] == (True, True, "x.pt", True, True, "Pug")
    assert default[2:] == (False, False, "", False, False, "") and not default.named


def test_data_may_be_repeated_and_keeps_its_order():
    assert parse(["--data", "b", "--data", "a"]).config.data == ("b", "a")


def test_out_is_kaggles_working_folder_where_that_exists(monkeypatch):
    there, is_dir = [], Path.is_dir
    monkeypatch.setattr(Path, "is_dir", lambda self: str(self) in there or is_dir(self))
    if not Path("/kaggle/working").is_dir():
        assert parse([]).config.out == "output"
    there.append("/kaggle/working")
    assert parse([]).config.out == "/kaggle/working"
    assert parse(["--out", "elsewhere"]).config.out == "elsewhere"


def test_a_preset_is_a_set_of_changed_fields_and_flags_go_before_it(monkeypatch):
    monkeypatch.setitem(train_dogs.PRESETS, "narrow", {"width": 8, "margin": 0.9})
    options = parse(["--preset", "narrow", "--margin", "0.7"])
    assert options.config == Config(width=8, margin=0.7, out=options.config.out)
    assert options.named == {"margin"}


def test_steps_alone_lift_the_time_limit_and_with_a_budget_they_do_not():
    def limit(*words: str) -> float:
        return train_dogs.Clock(parse(words).config, 0.0, 0.0).deadline / 3600

    assert limit("--steps", "9") == limit("--hours", "inf") == math.inf
    assert limit("--steps", "9", "--hours", "2") == 2
    assert limit("--steps", "9", "--minutes", "30") == 0.5
    assert limit("--minutes", "90") == 1.5
    assert limit() == FIELDS["hours"].default


BAD = [
    ["--width", "4.5"], ["--width", "wide"], ["--margin", "nan"], ["--hours", "nan"],
    ["--hours", "0"], ["--minutes", "0"], ["--part-hours", "0"], ["--g-lr", "inf"],
    ["--hours", "1", "--minutes", "60"], ["--average", "mean"], ["--loss", "wasserstein"],
    ["--crops", "tail"], ["--crops", "box:0"], ["--crops", ""], ["--latents", "gamma"],
    ["--preset", "cats"], ["--device", "tpu"], ["--device", "cuda:x"],
    ["--device", "cuda:²"], ["--device", "cuda:12345678901234567890"], ["--wid", "4"],
    ["--nonsense"], ["stray"], ["--width"],
]  # fmt: skip


@pytest.mark.parametrize("words", BAD, ids=" ".join)
def test_a_wrong_option_is_one_sentence_and_exit_code_2(words, capsys, tmp_path):
    assert main(["--out", str(tmp_path / "out"), *words]) == 2
    assert_one_sentence(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_values_beyond_either_end_are_refused_with_the_range_and_the_ends_are_not():
    tried = 0
    for name, (least, most) in RANGES.items():
        kind, more = type(FIELDS[name].default), NEEDS.get(name, [])
        for end, sign in ((least, -1), (most, 1)):
            if kind not in (int, float) or not math.isfinite(end):
                continue
            beyond = end + sign if kind is int else math.nextafter(end, sign * math.inf)
            above_0 = name in ("hours", "part_hours")
            words = "must be above 0" if above_0 else f".*{least} to {most}"
            with pytest.raises(UserError, match=f"^{flag(name)} {words}[.]$"):
                parse([*more, f"{flag(name)}={kind(beyond)!r}"])
            if not above_0:
                assert getattr(parse([*more, f"{flag(name)}={kind(end)!r}"]).config, name) == end
            tried += 1
    assert tried > 40


# ---------------------------------------------------------- what goes together, by the registries

REGISTRIES = {name: f.metadata["choices"]() for name, f in FIELDS.items()}
ROWS = [
    (field, choice, row)
    for field, rows in REGISTRIES.items()
    if isinstance(rows, dict)
    for choice, row in rows.items()
]


def choosing(field: str, choice: str, *more: str) -> list[str]:
    """The flags of a choice and of what it needs."""
    needs = [word for name in REGISTRIES[field][choice].needs for word in (flag(name), "1")]
    return [flag(field), choice, *needs, *more]


@pytest.mark.parametrize(
    ("field", "choice", "excluded"),
    [(field, choice, excluded) for field, choice, row in ROWS for excluded in row.without],
)
def test_what_a_row_excludes_is_refused_with_a_remedy_that_works(field, choice, excluded):
    name, _, value = excluded.partition("=")
    wrong, default = value or another(name), FIELDS[name].default
    with pytest.raises(UserError) as refused:
        parse(choosing(field, choice, flag(name), wrong))
    remedy = f"another {flag(name)}" if value else f"{flag(name)} {default}"
    assert str(refused.value) == (
        f"{flag(field)} {choice} cannot be combined with {flag(name)} {wrong}: give another"
        f" {flag(field)}, or {remedy}."
    )
    config = parse(choosing(field, choice, flag(name), str(default))).config
    assert (getattr(config, field), getattr(config, name)) == (choice, default)


@pytest.mark.parametrize(
    ("field", "choice", "needed"),
    [(field, choice, needed) for field, choice, row in ROWS for needed in row.needs],
)
def test_what_a_row_needs_is_asked_for_with_a_value_that_works(field, choice, needed):
    with pytest.raises(UserError) as refused:
        parse([flag(field), choice])
    asked = f"{flag(field)} {choice} needs {flag(needed)}: give it too, as in {flag(needed)} 1."
    assert str(refused.value) == asked
    assert getattr(parse(choosing(field, choice)).config, field) == choice


def test_rows_need_and_exclude_what_their_networks_and_losses_cannot_do():
    assert train_dogs.CONDITIONS["classes"].needs == ("classify",)  # or D would learn no breeds
    fields = {field for field, _, _ in ROWS}
    assert fields == {"architecture", "latents", "condition", "g_norm", "loss"}
    excluded = {(choice, name) for _, choice, row in ROWS for name in row.without}
    assert excluded >= {
        ("none", "classify"), ("none", "labelled"), ("breed", "labelled"), ("hinge", "margin"),
        ("uniform", "truncation"),
        ("breed", "g_norm=virtual"), ("rals", "margin"), ("residual", "g_norm"),
        ("residual", "minibatch_features"), ("residual", "condition=classes"),
    }  # fmt: skip


# --------------------------------------------------------------------- flags of earlier versions


@pytest.mark.parametrize("name", train_dogs.GONE)
def test_a_flag_that_is_gone_is_refused_with_the_reason(name, tmp_path, capsys):
    for words in ([name, "1"], [f"{name}=1"]):
        assert main(["--out", str(tmp_path / "out"), *words]) == 2
        reason = train_dogs.GONE[name]
        assert_one_sentence(capsys.readouterr().err, f"{name} is gone", reason, "leave it out")
    assert name not in {flag(field) for field in FIELDS}


def test_a_renamed_flag_works_and_names_the_new_one(capsys):
    for words in (["--layers", "paper"], ["--layers=paper"]):
        assert parse(words).config.architecture == "paper"
        assert capsys.readouterr().err == "--layers is now called --architecture.\n"
    assert parse(["--architecture", "paper"]).config.architecture == "paper"
    assert capsys.readouterr().err == ""


# --------------------------------------------------------------------------------------- the help


@pytest.fixture(scope="module")
def help_entries() -> dict[str, str]:
    """The help text of each flag, and of each group "" and its flags."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "400")
        with contextlib.redirect_stdout(io.StringIO()) as text:
            assert main(["--help"]) == 0
    words = re.sub(r"\n {20,}", " ", text.getvalue())  # a long flag has its own line
    groups = re.split(r"^([a-z]\w*):$", words, flags=re.MULTILINE)[1:]
    found = dict(zip(groups[::2], groups[1::2]))
    return found | dict(re.findall(r"^  (--[\w-]+)(.*)$", words, re.MULTILINE))


def test_help_gives_every_field_its_meaning_and_default_below_its_group(help_entries):
    for name, f in FIELDS.items():
        text = help_entries[flag(name)]
        assert f.metadata["help"] in text and len(f.metadata["help"].split()) >= 2, name
        assert flag(name) in help_entries[f.metadata["group"]]
        if f.default not in ("", ()):
            assert text.endswith(f"default {f.default}"), (name, text)
        choices = f.metadata["choices"]()
        for choice in choices:
            shown = f"{choice} ({choices[choice].text})" if isinstance(choices, dict) else choice
            assert shown in text, (name, text)
    for name in ("preset", "dry-run", "fresh", "resume", "sample-only", "minutes", "walk"):
        assert len(help_entries[f"--{name}"].split()) >= 3
    assert all(name in help_entries["--preset"] for name in (*train_dogs.PRESETS, "default dogs"))
    assert [choice for _, choice, row in ROWS if row.text == choice] == []  # rows say more


def test_without_dogs_the_script_exits_with_2_and_names_both_remedies(tmp_path):
    if Path("/kaggle/input").exists():
        pytest.skip("this machine has Kaggle's input mounted")
    shutil.copy(SCRIPT, tmp_path)  # alone, without its data folder
    shutil.copytree(SAMPLE, tmp_path / "data" / "sample")  # used only when named
    code, _, stderr = run_script("--width", "1", script=tmp_path / SCRIPT.name, cwd=tmp_path)
    assert code == 2
    assert_one_sentence(stderr, "data/download.py", "--data data/sample")
    assert not (tmp_path / "output" / "images.zip").exists()


# ------------------------------------------------------------------------------------- the dry run


def expected_flops(w: int, v: int, latent_dim: int) -> int:
    """FLOPs of an image and step by hand, at widths `w` of G and `v` of D."""
    g = (latent_dim * 32 * w * 16, 32 * w * 16 * w * 16 * 4**2, 16 * w * 8 * w * 16 * 8**2)
    g += (8 * w * 8 * w * 9 * 16**2, 8 * w * 4 * w * 16 * 16**2, 4 * w * 4 * w * 9 * 32**2)
    g += (4 * w * 2 * w * 16 * 32**2, 2 * w * 3 * 9 * 64**2)
    d = (3 * 2 * v * 16 * 32**2, 2 * v * 4 * v * 16 * 16**2, 4 * v * 4 * v * 9 * 16**2)
    d += (4 * v * 8 * v * 16 * 8**2, 8 * v * 8 * v * 9 * 8**2, 8 * v * 16 * v * 16 * 4**2)
    d += (16 * v * 1 * 16,)
    # D's step: a real and a fake forward, gradients of weights and of all inputs but the images.
    d_step = 2 * (3 * sum(d) - d[0])
    # G's step: the fake forward and back through D, then G's weights and all inputs but z.
    g_step = 2 * sum(d) + 2 * sum(g) - g[0]
    return 2 * (sum(g) + d_step + g_step)


@pytest.mark.parametrize(("width", "d_width", "latent_dim"), [(48, 0, 256), (16, 24, 64)])
def test_flops_are_those_of_one_d_step_and_one_g_step(width, d_width, latent_dim):
    expected = expected_flops(width, d_width or width, latent_dim)
    config = Config(width=width, d_width=d_width, latent_dim=latent_dim)
    assert train_dogs.flops_per_image(config) == pytest.approx(expected, rel=1e-3)
    hours = 1000 * config.batch_size * expected / 7.4e12 / 3600
    assert train_dogs.p100_hours(config, 1000) == pytest.approx(hours, rel=1e-3)


def test_a_dry_run_prints_the_plan_and_leaves_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    words = arguments(out, minutes=2, device="cpu", condition="breed")
    assert main([*words, "--dry-run"]) == 0
    text, config = capsys.readouterr().out, parse(words).config
    assert not out.exists()
    assert "CPU" in text and torch.__version__ in text  # device
    assert "120 photos, 135 dogs of 6 breeds" in text and "sample" in text  # data found
    assert json.loads(text[text.index("{") : text.index("}") + 1]) == train_dogs.plain(config)
    G, D = train_dogs.build_networks(config, torch.device("cpu"), 6)
    counts = [f"{sum(p.numel() for p in network.parameters()):,}" for network in (G, D)]
    assert "parameters: G {}, D {};".format(*counts) in text
    flops = train_dogs.flops_per_image(config, 6)
    assert f"{flops / 1e9:.3f} GFLOP" in text
    hours = config.steps * config.batch_size * flops / 7.4e12 / 3600
    assert re.findall(r"P100-hours: (\S+)$", text, re.MULTILINE) == [f"{hours:.3g}"]


# ------------------------------------------------------------------------------ what a run leaves


def test_a_run_leaves_every_file_of_the_contract_and_names_those_to_look_at(finished_run):
    assert {p.name for p in finished_run.iterdir()} == {
        "images.zip", "generator.pt", "checkpoint.pt", "checkpoint.previous.pt", "config.json",
        "log.jsonl", "samples", "progress.webp",
    }  # fmt: skip
    assert pixels(finished_run / "images.zip").shape == (40, 64, 64, 3)
    last = finished_run.with_suffix(".txt").read_text().splitlines()[-2:]
    for name in ("images.zip", f"samples/step_{STEPS:07d}.png", "progress.webp"):
        assert str(finished_run / name) in " ".join(last)


def test_config_json_the_log_and_the_checkpoint_carry_the_configuration(finished_run):
    config = parse(arguments(finished_run, steps=STEPS)).config
    expected = json.loads(json.dumps(dataclasses.asdict(config)).replace("Infinity", "null"))
    written = json.loads((finished_run / "config.json").read_text())
    logged = next(line["config"] for line in log_of(finished_run) if "config" in line)
    assert written == logged == load(finished_run / "checkpoint.pt")["config"] == expected
    assert expected["hours"] is None  # no limit, in a form that every reader of JSON takes
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
    z = train_dogs.draw_latents(40, Config(latent_dim=16), "submission")
    with torch.no_grad():
        images = names["G"](z).mul(127.5).add(127.5).round().clamp(0, 255).permute(0, 2, 3, 1)
    difference = images.numpy() - pixels(finished_run / "images.zip")
    assert np.abs(difference).max() <= 1


def test_the_first_sheet_shows_real_crops_and_the_animation_shows_all_sheets(finished_run):
    sheets = sorted((finished_run / "samples").glob("*.png"))
    assert sheets[0].name == "real.png"
    assert len(sheets) >= 2 and sheets[-1].name.endswith(f"{STEPS}.png")
    for sheet in sheets:
        with Image.open(sheet) as picture:
            assert picture.size == (640, 640)
    with Image.open(finished_run / "progress.webp") as animation:
        assert animation.format == "WEBP" and animation.n_frames == len(sheets)
    dogs = train_dogs.prepare_crops(train_dogs.find_photos([SAMPLE]), "square", show=False)
    crops = {view.tobytes() for crop in dogs.pixels.numpy() for view in (crop, crop[:, ::-1])}
    with Image.open(sheets[0]) as first:
        tiles = np.asarray(first).reshape(10, 64, 10, 64, 3).swapaxes(1, 2).reshape(100, 64, 64, 3)
    shown = {tile.tobytes() for tile in tiles}
    assert shown <= crops and len(shown) == 100


def test_the_log_says_how_training_goes_and_a_log_file_gets_a_line_now_and_then(finished_run):
    last = [line for line in log_of(finished_run) if "d_loss" in line][-1]
    assert last["step"] == STEPS and last["images"] == 8 * STEPS and last["progress"] == 1
    for name in ("g_loss", "d_real", "d_fake", "images_per_second", "seconds"):
        assert math.isfinite(last[name]), name
    assert 0 <= last["past_margin"] <= 1
    text = finished_run.with_suffix(".txt").read_text()
    assert "\r" not in text and "\x1b" not in text
    lines = [line for line in text.splitlines() if "images/s" in line]
    assert 1 <= len(lines) <= 3  # the first, the last; at most one a minute
    assert re.search(r"D -?[\d.]+.*G -?[\d.]+.*left", lines[-1])


def test_on_a_terminal_progress_is_a_bar_and_a_terminal_that_closes_does_not_end_the_run(
    tmp_path, monkeypatch
):
    fcntl, pty, termios = map(pytest.importorskip, ("fcntl", "pty", "termios"))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 160, 0, 0))
    shown = bytearray()

    def read() -> None:
        while b"past margin" not in shown:
            shown.extend(os.read(ours, 65536))
        os.close(ours)

    reader = threading.Thread(target=read)
    reader.start()
    terminal = os.fdopen(theirs, "w")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        patch.setattr(sys, "stdout", terminal)
        assert run_here(tmp_path / "out", steps=30) == 0
    reader.join(10)
    with contextlib.suppress(OSError):  # what it still had to say
        terminal.close()
    bar = r"%\|.*\|\W+step \d+, [\d,]+ images, \d+ images/s, D -?[\d.]+, G -?[\d.]+, past margin"
    assert re.search(bar, shown.decode()), shown
    assert len(pixels(tmp_path / "out" / "images.zip")) == 40


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


def test_a_run_leaves_no_trace_in_the_data_and_results_below_it_are_no_data(tmp_path, monkeypatch):
    dogs = Path(shutil.copytree(SAMPLE, tmp_path / "photos"))
    before = snapshot(dogs)
    monkeypatch.chdir(dogs)
    for _ in range(2):
        assert run_here(Path("output"), "--fresh", data=".", steps=2, images=3) == 0
        found = next(line["text"] for line in log_of(dogs / "output") if "dogs of" in str(line))
        assert found.startswith("120 photos, 135 dogs of 6 breeds")
    shutil.rmtree(dogs / "output")
    assert [s[:3] for s in snapshot(dogs)[1:]] == [s[:3] for s in before[1:]]


def test_a_set_smaller_than_a_batch_trains(tmp_path):
    data = tmp_path / "dogs"
    data.mkdir()
    for picture in sorted((SAMPLE / "Images").glob("*/*.jpg"))[:16]:
        shutil.copy(picture, data)
    assert run_here(tmp_path / "out", data=data, batch_size=24, steps=3, images=5) == 0
    assert len(pixels(tmp_path / "out" / "images.zip")) == 5
