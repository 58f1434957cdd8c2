"""The curve of a run: each checkpoint is scored once, as its submission, and drawn."""

from __future__ import annotations

import shutil
from pathlib import Path

import curve
import numpy as np
import pytest
from PIL import Image
from runs import pixels, run_here

import mifid
import train_dogs


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The sets that mifid.py gets; it returns their mean level as FID."""
    seen: list[np.ndarray] = []

    def score(made: np.ndarray, reference: str, fast: bool = False) -> dict[str, object]:
        seen.append(made)
        found = {"fid": float(made.mean()), "fid_error": 1.0, "n_generated": len(made)}
        return found | {"memorization_distance": 0.3}

    monkeypatch.setattr(mifid, "score", score)
    monkeypatch.setattr(train_dogs, "NORM_BATCHES", 1)
    return seen


def blue(path: Path) -> np.ndarray:
    """bool (height, width): the pixels in the colour of the first line."""
    x = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return (x[..., 2] - x[..., 0] > 90) & (x[..., 2] - x[..., 1] > 50)


@pytest.mark.slow
def test_each_checkpoint_is_scored_once_as_its_submission(scored, tmp_path, capsys):
    out, kept = tmp_path / "out", tmp_path / "kept"
    kept.mkdir()
    for steps in (10, 20):
        assert run_here(out, steps=steps) == 0
        shutil.copy(out / "checkpoint.pt", kept / f"{steps}.pt")
        words = [str(out), "--images", "40", "--checkpoints", *map(str, sorted(kept.iterdir()))]
        assert curve.main(words) == 0
        assert np.array_equal(scored[-1], pixels(out / "images.zip"))
    assert len(scored) == 2  # not three: the first is in curve.json
    printed = capsys.readouterr().out
    assert "80 images, FID" in printed and "160 images, FID" in printed
    assert Image.open(out / "curve.png").width > 4 * curve.WIDTH
    assert curve.main([str(out), "--images", "39"]) == 0  # no scores of this count
    assert Image.open(out / "curve.png").width < 4 * curve.WIDTH


def test_a_line_goes_through_its_points(tmp_path):
    fixed = {"d_fake": -4.0, "past_margin": 0.5, "d_loss": 1, "g_loss": 2}
    values = [4.0] * 30 + [0.0] * 31
    log = [fixed | {"images": 100 * k, "d_real": v} for k, v in enumerate(values)]
    curve.draw_run(log, []).save(tmp_path / "c.png")
    line = blue(tmp_path / "c.png")[curve.TOP - 3 : curve.TOP + curve.HEIGHT + 4]
    rows = [line[:, curve.LEFT + round(curve.WIDTH * x)].nonzero()[0].mean() for x in (0.3, 0.8)]
    assert rows[0] == pytest.approx(3, abs=3) and rows[1] == pytest.approx(88, abs=3)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(train_dogs.UserError, match=r"log\.jsonl"):
        curve.main([str(tmp_path)])
