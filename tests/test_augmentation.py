"""Augmentation: each against a slow loop of numpy, and where in a step it is applied."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import SAMPLE, assert_one_sentence
from scipy import stats
from torch import Tensor

import train_dogs
from train_dogs import (
    AUGMENTS,
    Config,
    CropSet,
    Trainer,
    augment_color,
    augment_cutout,
    augment_translation,
    find_photos,
    parse_augment,
    prepare_crops,
)

pytestmark = pytest.mark.usefixtures("light")

CPU = torch.device("cpu")
ALL = tuple(AUGMENTS)
every = pytest.mark.parametrize("name", ALL)


@pytest.fixture(scope="module")
def dogs(own_cache: Path) -> CropSet:
    """The drawn sample, cropped."""
    return prepare_crops(find_photos([SAMPLE]), "square", show=False)


def seeded(seed: int) -> torch.Generator:
    """A generator."""
    return torch.Generator().manual_seed(seed)


def pictures(count: int, side: int = 64, seed: int = 0) -> Tensor:
    """Images of noise in [-1, 1], all of whose pixels differ."""
    return torch.rand(count, 3, side, side, generator=seeded(seed)) * 2 - 1


def augment(x: Tensor, names: Sequence[str], rng: torch.Generator | None) -> Tensor:
    """One after the other."""
    for name in names:
        x = AUGMENTS[name](x, rng)
    return x


# ----------------------------------------------------------------------------- what all share


@every
def test_an_image_depends_on_itself_and_the_generators_state_alone(name):
    x = pictures(5)
    other, copy = x.clone(), x.clone()
    other[1:] = 0.25
    torch.manual_seed(3)
    before = torch.get_rng_state()
    out = augment(x, [name], seeded(2))
    assert torch.equal(torch.get_rng_state(), before)  # torch's own is left alone
    assert (out.shape, out.dtype) == (x.shape, x.dtype) and torch.equal(x, copy)
    assert torch.equal(augment(x, [name], seeded(2)), out)
    assert torch.equal(augment(other, [name], seeded(2))[0], out[0])
    channels_last = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(augment(channels_last, [name], seeded(2)), out)
    by_default = augment(x, [name], None)  # as in a captured graph
    assert not torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(3)
    assert torch.equal(augment(x, [name], None), by_default)


@every
def test_the_gradient_is_that_of_finite_differences(name):
    x = pictures(2, side=8).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda y: augment(y, [name], seeded(4)), x)


# ------------------------------------------------------------------------------------------- colour


def color_by_loop(x: np.ndarray, brightness: float, saturation: float, contrast: float):
    """DiffAugment's three, pixel by pixel: x (3, H, W)."""
    out = x + brightness
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            grey = sum(out[:, i, j]) / 3
            for c in range(3):
                out[c, i, j] = grey + saturation * (out[c, i, j] - grey)
    mean = out.mean()
    return mean + contrast * (out - mean)


def recovered(before: np.ndarray, after: np.ndarray) -> tuple[float, float, float]:
    """Brightness, saturation and contrast from an image before and after.

    The mean only moves by the brightness; the grey image's spread only scales by the contrast.
    """
    grey, grey_after = before.mean(0), after.mean(0)
    contrast = (grey_after.std() / grey.std()).item()
    colourful = (after - grey_after).std() / (before - grey).std()
    return after.mean() - before.mean(), colourful / contrast, contrast


def test_color_is_a_slow_loop_with_uniform_independent_brightness_saturation_and_contrast():
    x = pictures(1, side=8).double().expand(3000, 3, 8, 8)
    pairs = [*zip(x.numpy(), augment_color(x, seeded(2)).numpy())]
    found = np.array([recovered(*pair) for pair in pairs])
    for (before, after), values in zip(pairs[:8], found):
        np.testing.assert_allclose(after, color_by_loop(before, *values), rtol=1e-9, atol=1e-9)
    for values, (least, most) in zip(found.T, ((-0.5, 0.5), (0, 2), (0.5, 1.5))):
        assert stats.kstest((values - least) / (most - least), "uniform").pvalue > 1e-3
    correlations = np.corrcoef(found.T) - np.eye(3)
    assert np.abs(correlations).max() < 0.08


# -------------------------------------------------------------------------------------- translation


def translation_by_loop(x: np.ndarray, down: int, right: int) -> np.ndarray:
    """x (C, H, W) with each pixel taken from `down` and `right` of it, mirrored at the border."""
    height, width = x.shape[1:]

    def mirrored(k: int, side: int) -> int:
        return -k if k < 0 else 2 * (side - 1) - k if k >= side else k

    out = np.empty_like(x)
    for i in range(height):
        for j in range(width):
            out[:, i, j] = x[:, mirrored(i + down, height), mirrored(j + right, width)]
    return out


def shift_of(after: np.ndarray, before: np.ndarray) -> tuple[int, int]:
    """Where the middle pixel came from; all pixels differ."""
    middle = before.shape[-1] // 2
    where = np.argwhere((before == after[:, middle, middle][:, None, None]).all(0))
    assert len(where) == 1
    return tuple(int(k) - middle for k in where[0])


def test_translation_equals_a_slow_loop_with_reflection_bit_for_bit():
    x = pictures(30)
    for before, after in zip(x.numpy(), augment_translation(x, seeded(3)).numpy()):
        assert np.array_equal(after, translation_by_loop(before, *shift_of(after, before)))


def test_shifts_are_uniform_from_8_up_to_8_down_and_independent():
    ramp = torch.arange(64.0)
    x = torch.stack([ramp[:, None].expand(64, 64), ramp.expand(64, 64)])  # each pixel's own place
    out = augment_translation(x.expand(3000, 2, 64, 64), seeded(4))[:, :, 32, 32].long() - 32
    table = np.zeros((17, 17))
    for down, right in out.tolist():
        table[down + 8, right + 8] += 1
    assert stats.chisquare(table.sum(0)).pvalue > 1e-3
    assert stats.chisquare(table.sum(1)).pvalue > 1e-3
    assert stats.chi2_contingency(table).pvalue > 1e-3


# ------------------------------------------------------------------------------------------- cutout


def centre_of(hole: np.ndarray) -> list[int]:
    """The centre of a square of 32 pixels a side that leaves this hole in an image of 64."""
    centre = []
    for axis in (1, 0):
        (inside,) = np.nonzero(hole.any(axis))
        centre.append(int(inside[-1] + 1 - 16 if inside[0] == 0 else inside[0] + 16))
    return centre


def test_cutout_is_one_grey_square_of_half_the_side_centred_anywhere_and_all_else_stays():
    x = pictures(1).expand(6500, 3, 64, 64)
    before, centres = x[0].numpy(), []
    for after in augment_cutout(x, seeded(8)).numpy():
        hole = (after == 0).all(0)
        row, column = centre_of(hole)
        expected = before.copy()
        expected[:, max(0, row - 16) : row + 16, max(0, column - 16) : column + 16] = 0
        assert np.array_equal(after, expected)
        centres.append((row, column))
    for places in np.array(centres).T:  # borders and corners included
        counts = np.bincount(places, minlength=65)
        assert len(counts) == 65 and stats.chisquare(counts).pvalue > 1e-3


# ----------------------------------------------------------------------------------- in a step


def small(**changes: object) -> Config:
    """A configuration that trains in milliseconds."""
    return Config(**({"width": 1, "latent_dim": 4, "batch_size": 6, "precision": "fp32"} | changes))


def shown_to(trainer: Trainer) -> list[Tensor]:
    """The images that D will see, call by call."""
    seen: list[Tensor] = []
    trainer.D.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    return seen


@pytest.mark.parametrize("augments", [ALL, ALL[::-1], ()], ids=["all", "reversed", "none"])
def test_d_sees_reals_and_fakes_augmented_in_both_steps_each_time_anew(augments, dogs):
    """In the order of the option; and without it no random number is drawn for it."""
    trainer = Trainer(small(augment=", ".join(augments)), dogs, CPU)
    seen, rng = shown_to(trainer), torch.Generator()
    rng.set_state(trainer.rng.get_state())
    G = train_dogs.Generator(4, 1)
    G.load_state_dict(trainer.G.state_dict())
    trainer.step(0.0)

    order = torch.randperm(len(dogs.first), generator=rng)
    reals = train_dogs.draw_reals(dogs, order[:6], rng)
    with torch.no_grad():
        fakes = G(torch.randn(6, 4, generator=rng))
    for images, plain in zip(seen, (torch.cat([reals, fakes]), fakes), strict=True):
        expected = augment(plain, augments, rng)
        torch.testing.assert_close(images.detach(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(rng.get_state(), trainer.rng.get_state())


def test_gs_gradient_comes_through_the_augmentation(dogs):
    trainer = Trainer(small(augment="cutout"), dogs, CPU)
    trainer.step(0.0)
    trainer.augments = [lambda x, generator: x.mul(0)]
    moments = [trainer.opt_g.adam.state[p]["exp_avg"].clone() for p in trainer.G.parameters()]
    trainer.step(0.0)
    after = [trainer.opt_g.adam.state[p]["exp_avg"] for p in trainer.G.parameters()]
    for m, n in zip(moments, after):  # no new gradient: only Adam's mean, times beta1
        assert m.abs().max() > 0
        torch.testing.assert_close(n, 0.3 * m)


def test_augmentation_is_in_float32_though_the_networks_compute_in_less(dogs):
    trainer = Trainer(small(augment=",".join(ALL), precision="bf16"), dogs, CPU)
    seen = shown_to(trainer)
    trainer.step(0.0)
    assert {images.dtype for images in seen} == {torch.float32}


def test_augmentation_is_for_training_alone(dogs, tmp_path, monkeypatch):
    def refuse(x: Tensor, generator: torch.Generator) -> Tensor:
        raise AssertionError("augmented")

    monkeypatch.setattr(train_dogs, "NORM_BATCHES", 1)
    monkeypatch.setattr(train_dogs, "AUGMENTS", dict.fromkeys(ALL, refuse))
    config = small(augment=",".join(ALL), out=str(tmp_path), images=5)
    trainer = Trainer(config, dogs, CPU)
    train_dogs.submit(trainer)
    train_dogs.real_images(dogs, config)
    with pytest.raises(AssertionError, match="augmented"):
        trainer.step(0.0)


# ------------------------------------------------------------------------------------------ names


def test_names_keep_their_order_and_others_are_refused_with_the_right_ones(tmp_path, capsys):
    assert parse_augment("cutout, color") == ("cutout", "color") and parse_augment("") == ()
    for text in ("flip", "color,color", "color,", ",", "Color", " "):
        assert train_dogs.main(["--out", str(tmp_path / "out"), "--augment", text]) == 2
        assert_one_sentence(capsys.readouterr().err, "--augment", *ALL)
    assert not (tmp_path / "out").exists()
