"""What the README tells its readers to type works."""

import json
import os
import re
import shutil
from pathlib import Path
from unittest import mock

import pytest

import train_dogs

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_every_command_line_of_the_program_is_understood():
    commands = [
        line.split("#")[0].partition("train_dogs.py")[2].split()
        for _, block in BLOCKS
        for line in block.splitlines()
        if "python train_dogs.py" in line
    ]
    assert len(commands) >= 3
    for command in commands:
        train_dogs.parse(command)


def test_every_flag_that_is_named_exists():
    known = set(re.findall(r"--[a-z][a-z-]+", train_dogs.make_parser().format_help()))
    known |= set(re.findall(r'"(--[a-z][a-z-]+)"', (ROOT / "mifid.py").read_text("utf-8")))
    known |= set(
        re.findall(r'"(--[a-z][a-z-]+)"', (ROOT / "tests/tools/ablation.py").read_text("utf-8"))
    )
    known |= {"--accelerator"}  # kaggle's
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) - known == set()


def test_the_loss_of_your_own_is_that_of_the_program():
    (block,) = (text for kind, text in BLOCKS if kind == "python" and "d_hinge" in text)
    assert block in (ROOT / "train_dogs.py").read_text("utf-8")


def test_every_picture_is_there():
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert len(pictures) >= 4
    assert [p for p in pictures if not (ROOT / p).is_file()] == []


def test_what_presets_cost_is_what_is_counted():
    rows = re.findall(
        r"^\| `(\S+)` \|.*\| ([\d.]+) \| ([\d.]+) M \| ([\d.]+) \|$", README, re.MULTILINE
    )
    assert [name for name, *_ in rows] == list(train_dogs.PRESETS)
    for name, gflop, images, hours in rows:
        config = train_dogs.Config(**train_dogs.PRESETS[name])
        assert float(gflop) == pytest.approx(train_dogs.flops_per_image(config) / 1e9, abs=0.006)
        assert float(images) == pytest.approx(config.steps * config.batch_size / 1e6, rel=0.03)
        assert float(hours) == pytest.approx(train_dogs.p100_hours(config, config.steps), rel=0.01)


def test_the_kernel_metadata_is_what_kaggle_takes(tmp_path, monkeypatch):
    """By the kaggle package's own code, up to the request that it would send."""
    monkeypatch.setenv("KAGGLE_USERNAME", "nobody")  # it wants credentials when it is imported
    monkeypatch.setenv("KAGGLE_KEY", "0" * 32)
    extended = pytest.importorskip("kaggle.api.kaggle_api_extended")
    (metadata,) = [block for kind, block in BLOCKS if kind == "json"]
    (tmp_path / "kernel-metadata.json").write_text(metadata)
    shutil.copy(ROOT / "train_dogs.py", tmp_path)
    client = mock.MagicMock()
    monkeypatch.setattr(extended.KaggleApi, "build_kaggle_client", lambda self: client)
    extended.KaggleApi().kernels_push(os.fspath(tmp_path), None, "NvidiaTeslaT4")
    save = client.__enter__.return_value.kernels.kernels_api_client.save_kernel
    request = save.call_args.args[0]
    assert (request.machine_shape, request.enable_gpu) == ("NvidiaTeslaT4", True)
    assert request.competition_data_sources == json.loads(metadata)["competition_sources"]
    assert request.text == (ROOT / "train_dogs.py").read_text("utf-8")
