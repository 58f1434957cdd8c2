"""How far mifid.py's numbers can be trusted: error bars, bias, photos held out, and the verdict."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

import mifid


def spread_gaussian(seed: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of a Gaussian with neither zero."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(size, size)) / math.sqrt(size)
    return rng.normal(0, 0.3, size), mix @ mix.T + 0.1 * np.eye(size)


def photos(seed: int, count: int, size: int = 64) -> np.ndarray:
    """Features that are positive and sparse like the network's."""
    return np.random.default_rng(seed).gamma(0.5, 0.5, (count, size))


# ---------------------------------------------------------------- error and bias


@pytest.mark.parametrize(("size", "count"), [(16, 400), (32, 500)])
def test_the_interval_covers_the_known_fid_of_gaussians_in_200_draws(size, count):
    (m1, s1), (m2, s2) = spread_gaussian(1, size), spread_gaussian(2, size)
    trace = np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
    known = ((m1 - m2) ** 2).sum() + trace
    reference = mifid.Gaussian(torch.from_numpy(m2), torch.linalg.cholesky(torch.from_numpy(s2)))
    rng = np.random.default_rng(3)
    draws = [
        mifid.fid_with_error(rng.multivariate_normal(m1, s1, count), reference) for _ in range(200)
    ]
    fid, error, unbiased = np.array(draws).T
    assert 0.90 <= np.mean(np.abs(unbiased - known) <= 2.26 * error) <= 0.98
    assert error.mean() == pytest.approx(fid.std(), rel=0.15)
    noise = fid.std() / math.sqrt(len(draws))
    assert abs(unbiased.mean() - known) < 3 * noise < fid.mean() - known


def test_the_unbiased_fid_of_few_images_is_that_of_many():
    reference, many = photos(7, 3000), 1.1 * photos(8, 100_000)
    at_all = mifid.frechet_distance(many, reference)
    for count in (200, 1000):
        found = mifid.score(many[:count], reference)
        assert abs(found["fid_unbiased"] - at_all) < 3 * found["fid_error"]
        assert found["fid_unbiased"] < found["fid"]
    few, fewest = (mifid.score(many[:count], reference) for count in (90, 19))
    assert few["fid_unbiased"] is None and few["fid_error"] > 0  # fewer than 1.5 D
    assert fewest["fid_error"] is None and fewest["fid"] > 0  # fewer than 2 a group


def test_the_unbiased_fid_agrees_with_fid_infinity_within_its_error():
    # Chong and Forsyth 2020 (arXiv 1911.07023): a line through FID at several counts, against 1/N.
    reference, made = mifid.gaussian_of(photos(30, 4000)), 1.1 * photos(31, 4000)
    _, error, unbiased = mifid.fid_with_error(made, reference)
    rng, counts = np.random.default_rng(32), np.linspace(400, 4000, 15).astype(int)
    ends = []
    for _ in range(5):
        parts = [made[rng.permutation(len(made))[:count]] for count in counts]
        values = [mifid.fid_with_error(part, reference)[0] for part in parts]
        ends.append(np.polyfit(1 / counts, values, 1)[1])
    assert abs(np.mean(ends) - unbiased) < error


@pytest.mark.slow
def test_the_distance_error_is_the_spread_of_the_distance_over_draws():
    reference = photos(9, 1000)
    found = [mifid.score(photos(10 + i, 100), reference) for i in range(100)]
    spread = np.std([each["memorization_distance"] for each in found])
    assert np.mean([each["distance_error"] for each in found]) == pytest.approx(spread, rel=0.2)


# ---------------------------------------------------------------- inside `score`


def test_the_threshold_is_the_one_given():
    generated, reference = photos(13, 300), photos(14, 400)
    distance = mifid.score(generated, reference)["memorization_distance"]
    for threshold in (0.9 * distance, 1.1 * distance):
        found = mifid.score(generated, reference, threshold=threshold)
        penalty = distance if distance < threshold else 1
        assert found["mifid"] == pytest.approx(found["fid"] / penalty, rel=1e-9)
        assert found["threshold"] == threshold
        assert ("penalised" in found["verdict"]) == (distance < threshold)


def test_the_unseen_distance_in_a_score_is_the_references_own():
    generated, reference = photos(15, 300), photos(16, 900)
    found = mifid.score(generated, reference)["unseen_distance"]
    assert found == mifid.unseen_distance(reference) != mifid.unseen_distance(generated)


@pytest.mark.parametrize(
    ("distance", "words"),
    [
        (0.99e-6, "is a copy"), (1.01e-6, "penalised"), (0.0999, "penalised"),
        (0.1, "Nearer to the reference"), (0.1799, "Nearer to the reference"),
        (0.1801, "As far"),
    ],
)  # fmt: skip
def test_the_verdicts_bounds(distance, words):
    assert words in mifid.verdict(distance, unseen=0.2, threshold=0.1, count=5000)


# ---------------------------------------------------------------- photos held out


MANY = photos(20, 6000)
SEEN, HELD_OUT, OTHERS = MANY[:2000], MANY[2000:3500], MANY[3500:]


def sentence(generated: np.ndarray, held_out: np.ndarray = HELD_OUT) -> str:
    found = mifid.score(generated, SEEN, held_out=held_out)
    assert found["n_held_out"] == len(held_out)
    assert f"{found['held_out_distance']:.3f}" in found["over_fitting"]
    return found["over_fitting"]


def test_a_model_that_copies_50_photos_over_fits():
    noise = np.random.default_rng(21).normal(0, 0.02, (1000, 64))
    assert "it over-fits" in sentence(np.abs(np.tile(SEEN[:50], (20, 1)) + noise))


def test_a_model_that_leans_on_its_photos_over_fits():
    """A third of each image's features are those of a photo it was trained on."""
    assert "it over-fits" in sentence(0.33 * SEEN[:1000] + 0.67 * OTHERS[:1000])


def test_real_photos_do_not_over_fit():
    for rows in np.split(OTHERS[:2500], 5):
        assert "no sign of over-fitting" in sentence(rows)


def test_sets_in_each_others_place_are_noticed():
    assert "swapped" in sentence(HELD_OUT[:500] + 0.01)
    found = mifid.score(OTHERS[:300], SEEN, held_out=np.concatenate([HELD_OUT[:900], SEEN[:100]]))
    assert any("100 of 1,000 held-out photos are in the reference" in n for n in found["notes"])


def test_counts_that_differ_do_not_look_like_over_fitting():
    """The distance to 2,000 photos is smaller than to 400 of the same kind."""
    assert "no sign of over-fitting" in sentence(OTHERS[:1000], HELD_OUT[:400])
