"""The probe of D's features: what it reads of each layer, how it classifies, what it prints.

Oracles: the layers written out, ridge regression in its other form, in float64.
"""

from __future__ import annotations

import re

import numpy as np
import probe
import pytest
import torch
import torch.nn.functional as F
from runs import SAMPLE, run_here
from torch import Tensor

import train_dogs
from train_dogs import Config, Discriminator

CPU = torch.device("cpu")


@torch.no_grad()
def test_features_are_each_layers_activations_pooled_to_4_by_4():
    torch.manual_seed(0)
    D, x = Discriminator(2, "paper"), torch.rand(7, 3, 64, 64) * 2 - 1
    got, pooled = probe.features(D, x, CPU), []
    for conv, norm in zip(D.convs, D.norms):
        x = conv(x)
        if norm.state_dict():
            mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), False, keepdim=True)
            x = (x - mean) / (var + 1e-5).sqrt()
        x = torch.where(x > 0, x, 0.2 * x)
        side = x.shape[2] // 4
        pooled.append(x.unfold(2, side, side).unfold(3, side, side).amax((4, 5)).flatten(1))
    torch.testing.assert_close(got, torch.cat(pooled, 1), atol=1e-5, rtol=1e-4)


def planted(signal: float) -> tuple[Tensor, Tensor, Tensor]:
    """250 dogs of 4 breeds in 20 numbers, of which one for each breed is higher by `signal`."""
    generator = torch.Generator().manual_seed(0)
    breed, folds = torch.arange(250) % 4, torch.arange(250) % probe.FOLDS
    x = torch.randn(250, 20, generator=generator)
    return x + signal * F.one_hot(breed, 20), breed, folds


def test_breeds_that_a_line_parts_are_found_and_breeds_that_nothing_tells_are_not():
    assert min(probe.accuracies(*planted(8.0), CPU)) == 1.0
    assert 0.1 < np.mean(probe.accuracies(*planted(0.0), CPU)) < 0.4


def test_each_fold_is_told_apart_by_the_ridge_that_another_fold_chose():
    x, breed, folds = planted(1.0)
    wide = x.double().numpy()
    wide = (wide - wide.mean(0)) / wide.std(0, ddof=1)
    wanted = np.eye(4)[breed]
    for tested, share in enumerate(probe.accuracies(x, breed, folds, CPU)):
        choosing = (tested + 1) % probe.FOLDS
        learnt = ~np.isin(folds, (tested, choosing))
        a, mean = wide[learnt], wanted[learnt].mean(0)
        scale, found = (a**2).sum(1).mean(), []
        for ridge in probe.RIDGES:
            normal = a.T @ a + ridge * scale * np.eye(20)
            w = np.linalg.solve(normal, a.T @ (wanted[learnt] - mean))
            right = (wide @ w + mean).argmax(1) == breed.numpy()
            found.append(tuple(right[folds == fold].mean() for fold in (choosing, tested)))
        assert share == pytest.approx(max(found, key=lambda pair: pair[0])[1])


def test_no_photo_lies_in_two_folds(own_cache):
    photos = train_dogs.find_photos([SAMPLE])
    images, breeds, folds = probe.views(photos, Config())
    boxes = sum(len(train_dogs.read_photo(photo)[1]) for photo in photos.photos)
    assert len(images) == len(breeds) == len(folds) == boxes > len(photos.photos)
    dealt = [0] * probe.FOLDS
    for photo in photos.photos:
        fold = int(train_dogs.digest(photo.name), 16) % probe.FOLDS
        dealt[fold] += len(train_dogs.read_photo(photo)[1])
    assert [folds.count(k) for k in range(probe.FOLDS)] == dealt


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["sample", "second-private", "improved"])
def test_a_run_is_probed_against_its_own_beginning_and_the_pixels(preset, tmp_path, capsys):
    out = tmp_path / "out"
    assert run_here(out, preset=preset, steps=2, images=3) == 0
    _, networks = probe.load_discriminators(out)
    trained, begun = (list(networks[name].parameters()) for name in ("D as trained", "D as begun"))
    moved = max((a - b).abs().max().item() for a, b in zip(trained, begun))
    assert 0 < moved < 0.01  # two steps of Adam away, so the same beginning
    capsys.readouterr()
    assert probe.main([str(out)]) == 0
    rows = re.findall(
        r"^\| (D as \w+|pixels).*\| [\d.]+% \(.+ to .+\) \|$", capsys.readouterr().out, re.MULTILINE
    )
    assert rows == ["D as trained", "D as begun", "pixels"]


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(train_dogs.UserError, match="cannot be read"):
        probe.main([str(tmp_path)])
