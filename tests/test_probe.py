"""The probe of D: its features, both classifiers, the folds, the held-out dogs, the table.

Oracles: the layers written out, and ridge regression in its primal form in float64.
"""

from __future__ import annotations

import re
from collections import Counter

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
    (got, classes), pooled = probe.run_discriminator(D, x, 7, CPU), []
    assert classes.shape == (7, 0)  # no classifier
    for conv, norm in zip(D.convs, D.norms):
        x = conv(x)
        if norm.state_dict():
            mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), False, keepdim=True)
            x = (x - mean) / (var + 1e-5).sqrt()
        x = torch.where(x > 0, x, 0.2 * x)
        side = x.shape[2] // 4
        pooled.append(x.unfold(2, side, side).unfold(3, side, side).amax((4, 5)).flatten(1))
    torch.testing.assert_close(got, torch.cat(pooled, 1), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_own_classes_are_those_of_the_head_on_batches_of_reals():
    config = Config(condition="classes", classify=1.0, minibatch_features=3, width=1)
    _, D = train_dogs.build_networks(config, CPU, 5)
    x = torch.rand(12, 3, 64, 64) * 2 - 1
    _, classes = probe.run_discriminator(D, x, 4, CPU)
    batches = [D(x[k : k + 4], 4, torch.zeros(4).long()).classes for k in (0, 4, 8)]
    torch.testing.assert_close(classes, torch.cat(batches))
    assert classes.shape == (12, 5)


def planted(signal: float) -> tuple[Tensor, Tensor, Tensor]:
    """250 dogs of 4 breeds in 20 numbers, of which one for each breed is higher by `signal`."""
    generator = torch.Generator().manual_seed(0)
    breed, folds = torch.arange(250) % 4, torch.arange(250) % probe.FOLDS
    x = torch.randn(250, 20, generator=generator)
    return x + signal * F.one_hot(breed, 20), breed, folds


def test_separable_breeds_are_recognised_and_equal_ones_are_not():
    assert min(probe.linear_accuracies(*planted(8.0), CPU)) == 1.0
    assert 0.1 < np.mean(probe.linear_accuracies(*planted(0.0), CPU)) < 0.4


def test_each_fold_is_classified_with_the_ridge_that_another_fold_chose():
    x, breed, folds = planted(1.0)
    wide = x.double().numpy()
    wide = (wide - wide.mean(0)) / wide.std(0, ddof=1)
    wanted = np.eye(4)[breed]
    for tested, share in enumerate(probe.linear_accuracies(x, breed, folds, CPU)):
        choosing = (tested + 1) % probe.FOLDS
        training = ~np.isin(folds, (tested, choosing))
        a, mean = wide[training], wanted[training].mean(0)
        scale, found = (a**2).sum(1).mean(), []
        for ridge in probe.RIDGES:
            normal = a.T @ a + ridge * scale * np.eye(20)
            w = np.linalg.solve(normal, a.T @ (wanted[training] - mean))
            right = (wide @ w + mean).argmax(1) == breed.numpy()
            found.append(tuple(right[folds == fold].mean() for fold in (choosing, tested)))
        assert share == pytest.approx(max(found, key=lambda pair: pair[0])[1])


def test_no_photo_is_in_two_folds_and_the_dogs_are_shuffled(own_cache):
    photos = train_dogs.find_photos([SAMPLE])
    images, breeds, folds = probe.views(photos, Config())
    expected: Counter[tuple[int, str]] = Counter()
    for photo in photos.photos:
        fold = int(train_dogs.digest(photo.name), 16) % probe.FOLDS
        expected[fold, photo.breed] += len(train_dogs.read_photo(photo)[1])
    assert Counter(zip(folds.tolist(), breeds)) == expected
    assert len(images) == len(breeds) == expected.total() > len(photos.photos)
    assert len(set(breeds[:16])) > 2 and len(set(folds[:16].tolist())) > 2


def test_a_split_copies_each_photo_to_one_of_two_folders(tmp_path):
    assert probe.main(["--split", str(SAMPLE), str(tmp_path)]) == 0
    parts = [train_dogs.find_photos([tmp_path / name]) for name in ("train", "held-out")]
    train, held_out = ({p.name: train_dogs.read_photo(p)[1] for p in part.photos} for part in parts)
    photos = train_dogs.find_photos([SAMPLE]).photos
    assert train | held_out == {p.name: train_dogs.read_photo(p)[1] for p in photos}
    assert not train.keys() & held_out.keys() and 10 < len(held_out) < 40
    assert len({int(train_dogs.digest(name), 16) % probe.FOLDS for name in held_out}) == 5


ROW = (
    r"^\| (D's own|linear, D as \w+|linear, pixels|the most).*\| [\d.]+% \([\d.]+% to [\d.]+%\) \|$"
)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["sample", "second-private", "improved"])
def test_a_run_is_compared_with_its_initialisation_the_pixels_and_chance(preset, tmp_path, capsys):
    out = tmp_path / "out"
    assert run_here(out, preset=preset, steps=2, images=3) == 0
    _, breeds, networks = probe.load_discriminators(out)
    trained, initial = (list(D.parameters()) for D in networks.values())
    moved = max((a - b).abs().max().item() for a, b in zip(trained, initial))
    assert 0 < moved < 0.01 and len(breeds) == 6  # two steps of Adam away: the same initialisation
    capsys.readouterr()
    assert probe.main([str(out)]) == 0
    printed = capsys.readouterr().out
    assert "120 of their 120 photos are in the training set" in printed
    rows = re.findall(ROW, printed, re.MULTILINE)
    own = ["D's own"] * (preset != "sample")
    linear = ["linear, D as trained", "linear, D as initialised", "linear, pixels"]
    assert rows == [*own, *linear, "the most"]


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(train_dogs.UserError, match="cannot be read"):
        probe.main([str(tmp_path)])
