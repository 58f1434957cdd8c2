"""mifid.py's arithmetic against closed forms, SciPy, plain Python loops and the released scores."""

import csv
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

import mifid

Distance = Callable[[np.ndarray, np.ndarray], float]
RESULTS = Path(__file__).resolve().parents[2] / "shared/data/competition_results.csv"


def gaussian_features(seed: int, count: int, size: int = 24) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, size)) @ rng.normal(size=(size, size)) + rng.normal(size=size)


# ---------------------------------------------------------------- Fréchet distance


def features_with(mean: np.ndarray, sigma: np.ndarray, seed: int, count: int = 50) -> np.ndarray:
    """Features whose own mean and unbiased covariance are exactly these."""
    x = np.random.default_rng(seed).normal(size=(count, len(mean)))
    x -= x.mean(0)
    white = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False).reshape(sigma.shape))).T
    return white @ np.linalg.cholesky(sigma).T + mean


def fid_by_numpy(x: np.ndarray, y: np.ndarray) -> float:
    """The formula written out, by the eigenvalues of the covariances' product."""
    sigmas = [np.cov(f, rowvar=False) for f in (x, y)]
    roots = np.sqrt(np.linalg.eigvals(sigmas[0] @ sigmas[1]).real.clip(0)).sum()
    gap = ((x.mean(0) - y.mean(0)) ** 2).sum()
    return gap + np.trace(sigmas[0]) + np.trace(sigmas[1]) - 2 * roots


@pytest.mark.parametrize("size", [1, 8])
def test_two_gaussians_with_diagonal_covariances_have_the_closed_form(size):
    rng = np.random.default_rng(0)
    (m1, m2), (s1, s2) = rng.normal(size=(2, size)), rng.random((2, size))
    closed = ((m1 - m2) ** 2).sum() + ((np.sqrt(s1) - np.sqrt(s2)) ** 2).sum()
    x, y = features_with(m1, np.diag(s1), 1), features_with(m2, np.diag(s2), 2)
    assert mifid.frechet_distance(x, y) == pytest.approx(closed, rel=1e-9)


# of 24 dimensions: fewer, as many and more rows on either side
@pytest.mark.parametrize("counts", [(5, 9), (10, 300), (24, 300), (80, 9), (200, 300)])
def test_the_formula_written_out_and_scipys_square_root_give_the_same(counts):
    x, y = (gaussian_features(seed, count) for seed, count in enumerate(counts))
    for a, b in ((x, y), (y, x)):
        assert mifid.frechet_distance(a, b) == pytest.approx(fid_by_numpy(x, y), rel=1e-6)
    if min(counts) > 24:
        root = scipy.linalg.sqrtm(np.cov(x, rowvar=False) @ np.cov(y, rowvar=False)).real
        known = mifid.Gaussian(*map(torch.from_numpy, (y.mean(0), np.cov(y, rowvar=False))))
        known = known._replace(half=mifid.half_of(known.half))
        trace = np.trace(np.cov(x, rowvar=False) + np.cov(y, rowvar=False) - 2 * root)
        expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + trace
        assert mifid.fids_without(x, known)[0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("count", [20, 200])  # of 24 dimensions
def test_without_a_group_it_is_the_fid_of_the_others(count):
    x, known = gaussian_features(1, count), mifid.gaussian_of(gaussian_features(2, 300))
    groups = np.array_split(np.random.default_rng(0).permutation(count), 4)
    whole, *others = mifid.fids_without(x, known, groups)
    assert mifid.fids_without(x, known) == [whole]
    for rows, fid in zip(groups, others):
        alone = mifid.fids_without(np.delete(x, rows, axis=0), known)
        assert alone == [pytest.approx(fid, rel=1e-9)]


@pytest.mark.parametrize("count", [500, 3000])  # singular and regular covariances of 2,048
def test_a_set_against_itself_or_its_permutation_is_zero(count):
    x = np.random.default_rng(3).gamma(0.5, 0.5, (count, 2048)).astype(np.float32)
    permuted = np.random.default_rng(4).permutation(x)
    trace = x.astype(np.float64).var(0, ddof=1).sum()
    assert 0 <= mifid.frechet_distance(x, permuted) <= 1e-6 * trace


def test_a_singular_covariance_against_its_own_features_is_zero():
    x = gaussian_features(21, 40, 120)
    sigma = np.cov(x, rowvar=False)
    known = mifid.Gaussian(torch.from_numpy(x.mean(0)), mifid.half_of(torch.from_numpy(sigma)))
    assert known.half.shape == (120, 39)  # as many columns as its rank
    np.testing.assert_allclose(known.half @ known.half.T, sigma, atol=1e-9)
    assert mifid.fids_without(x, known)[0] <= 1e-6 * np.trace(sigma)


@pytest.mark.parametrize("count", [20, 5000])  # of 24 dimensions; 5,000 are several blocks
def test_mean_and_covariance_are_numpys_in_float64(count):
    x = gaussian_features(5, count).astype(np.float32)
    mean, half = mifid.gaussian_of(x)
    np.testing.assert_allclose(mean, x.astype(np.float64).mean(0), rtol=1e-12)
    covariance = np.cov(x.astype(np.float64), rowvar=False)
    np.testing.assert_allclose(half @ half.T, covariance, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("distance", [mifid.frechet_distance, mifid.memorization_distance])
def test_tensors_are_taken_like_arrays_and_features_that_do_not_fit_refused(distance):
    good = np.ones((2, 3))
    with pytest.raises(ValueError, match="two rows"):
        mifid.frechet_distance(good, good[:1])
    for bad, words in (
        (np.ones((2, 4)), "same D"),
        (np.full((2, 3), np.inf), "finite"),
        (np.full((2, 3), np.nan), "finite"),
        (np.ones((2, 3), int), "int64"),
        (np.ones(3), "shape"),
        (np.zeros((3, 3)), "zero"),
    ):
        with pytest.raises(ValueError, match=words):
            distance(bad, good)
        with pytest.raises(ValueError, match=words):
            distance(good, bad)
    x, y = gaussian_features(6, 50), gaussian_features(7, 60)
    assert distance(torch.from_numpy(x), torch.from_numpy(y)) == distance(x, y)


# ---------------------------------------------------------------- memorization distance


def distance_by_loops(generated: list[list[float]], reference: list[list[float]]) -> float:
    """The competition's distance in plain Python: no arrays, no library."""
    generated = [g for g in generated if sum(g) != 0]
    reference = [t for t in reference if sum(t) != 0]
    total = 0.0
    for g in generated:
        best = math.inf
        for t in reference:
            dot = sum(a * b for a, b in zip(g, t))
            norms = math.sqrt(sum(a * a for a in g)) * math.sqrt(sum(b * b for b in t))
            best = min(best, 1 - abs(dot / norms))
        total += best
    return total / len(generated)


@given(seed=st.integers(0, 10**6), n=st.integers(1, 12), m=st.integers(1, 12))
def test_a_loop_of_plain_python_gives_the_same_distance(seed, n, m):
    rng = np.random.default_rng(seed)
    g, t = rng.normal(size=(n, 5)), rng.normal(size=(m, 5))
    expected = distance_by_loops(g.tolist(), t.tolist())
    assert mifid.memorization_distance(g, t) == pytest.approx(expected, abs=1e-6)


def test_rows_of_zeros_are_left_out_on_both_sides():
    g, t = np.abs(gaussian_features(8, 9)), np.abs(gaussian_features(9, 7))
    expected = distance_by_loops(g.tolist(), t.tolist())
    g, t = np.insert(g, 4, 0, axis=0), np.insert(t, [0, 3], 0, axis=0)
    assert mifid.memorization_distance(g, t) == pytest.approx(expected, abs=1e-12)
    # and so is any row whose sum is 0, as in the competition's code
    odd = np.zeros(g.shape[1])
    odd[:2] = 1, -1
    assert mifid.memorization_distance(np.vstack([g, odd]), t) == pytest.approx(expected, abs=1e-12)


def test_a_generator_that_copies_50_of_2000_photos_is_penalised():
    """The transposition trap: averaged over the photos instead, this distance is over 0.3."""
    rng = np.random.default_rng(10)
    photos = rng.gamma(0.5, 1, (2000, 256))
    copies = photos[rng.integers(0, 50, 1000)] + rng.normal(0, 1e-2, (1000, 256))
    distance = mifid.memorization_distance(copies, photos)
    assert distance < 1e-3
    assert mifid.memorization_distance(photos, copies) > 0.3
    found = mifid.score(copies, photos)
    assert found["memorization_distance"] == pytest.approx(distance, rel=1e-9)
    assert found["mifid"] > 1000 * found["fid"] and "memorization" in found["verdict"]


def test_the_distance_does_not_depend_on_order_scale_or_sign():
    g, t = gaussian_features(11, 1500), gaussian_features(12, 2100)
    rng = np.random.default_rng(13)
    expected = mifid.memorization_distance(g, t)
    shuffled = mifid.memorization_distance(rng.permutation(g), -3 * rng.permutation(t))
    assert shuffled == pytest.approx(expected, rel=1e-9)
    pieces = [mifid.memorization_distance(part, t) for part in np.array_split(g, 3)]
    assert np.mean(pieces) == pytest.approx(expected, rel=1e-9)


def test_features_from_float32_agree_with_float64_to_1e_7():
    rng = np.random.default_rng(14)
    g, t = (rng.gamma(0.5, 0.5, (n, 2048)).astype(np.float32) for n in (300, 900))
    double = [
        x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1)[:, None] for x in (g, t)
    ]
    expected = (1 - np.abs(double[0] @ double[1].T)).min(1).mean()
    assert mifid.memorization_distance(g, t) == pytest.approx(expected, abs=1e-8)


# ---------------------------------------------------------------- MiFID


def test_all_released_scores_are_reproduced_from_their_fid_and_distance():
    if not RESULTS.is_file():
        pytest.skip(f"no {RESULTS}")
    rows = list(csv.DictReader(RESULTS.open()))
    assert len(rows) == 1666
    for side, threshold in (("public", 0.1), ("private", 0.25)):
        for row in rows:
            fid, distance = float(row[f"FID_{side}"]), float(row[f"distance_{side}"])
            expected = float(row[f"{side}_score"])
            if side == "public" or expected < 999_999:  # else disqualified by hand
                score = mifid.memorization_informed_fid(fid, distance, threshold)
                assert score == pytest.approx(expected, rel=1e-9)
    assert sum(float(row["distance_public"]) < 0.1 for row in rows) == 3  # of them penalised


def test_a_copy_never_scores_well():
    assert mifid.memorization_informed_fid(0, 0) == math.inf
    assert mifid.memorization_informed_fid(-5.7, 3e-8) == math.inf
    assert mifid.memorization_informed_fid(25.0, 9e-7) == math.inf
    assert mifid.memorization_informed_fid(-5.7, 0.2) == 0
    assert mifid.memorization_informed_fid(10, 0.1) == 10  # the threshold itself is not penalised
    assert mifid.memorization_informed_fid(10, 0.05) == pytest.approx(200)


def test_unseen_distance_is_what_a_held_out_half_of_the_same_kind_reaches():
    x = np.random.default_rng(15).gamma(0.5, 0.5, (3000, 64))
    held_out = mifid.memorization_distance(x[:1000], x[1000:])
    assert mifid.unseen_distance(x[1000:]) == pytest.approx(held_out, rel=0.03)
    doubled = np.repeat(x[1000:], 2, axis=0)  # a repeated picture is not its own neighbour
    assert mifid.unseen_distance(doubled) == pytest.approx(held_out, rel=0.04)


# ---------------------------------------------------------------- KID, precision, recall, ...


def test_kid_is_the_unbiased_estimator_written_out():
    x, y = gaussian_features(16, 30, 6) / 3, gaussian_features(17, 30, 6) / 3
    k = [[[(a @ b / 6 + 1) ** 3 for b in q] for a in p] for p, q in ((x, x), (y, y), (x, y))]
    within = [sum(k[s][i][j] for i in range(30) for j in range(30) if i != j) for s in (0, 1)]
    expected = sum(within) / (30 * 29) - 2 * np.mean(k[2])
    kid, spread = mifid.kernel_distance(x, y, subsets=3)
    assert kid == pytest.approx(expected, rel=1e-10)
    assert spread == pytest.approx(0, abs=1e-12)  # the subsets are the whole sets here


def test_kid_is_torch_fidelitys():
    metric_kid = pytest.importorskip("torch_fidelity.metric_kid")
    rng = np.random.default_rng(18)
    x, y = rng.gamma(1, 1, (1500, 64)), rng.gamma(1.1, 1, (1500, 64))
    theirs = metric_kid.kid_features_to_metric(
        torch.from_numpy(x), torch.from_numpy(y), kid_subsets=60, kid_subset_size=500, verbose=False
    )
    kid, spread = mifid.kernel_distance(x, y, subsets=60, size=500)
    error = theirs["kernel_inception_distance_std"] / math.sqrt(60)
    assert kid == pytest.approx(theirs["kernel_inception_distance_mean"], abs=4 * error)
    assert spread == pytest.approx(theirs["kernel_inception_distance_std"], rel=0.5)


@pytest.mark.parametrize(("n", "m"), [(70, 90), (1100, 1300)])  # in one block of 1,024, in several
def test_precision_recall_density_and_coverage_are_the_definitions_written_out(n, m):
    rng = np.random.default_rng(19)
    g, t = rng.normal(0.4, 0.8, (n, 3)), rng.normal(size=(m, 3))
    gg, tt, gt = (np.linalg.norm(a[:, None] - b, axis=2) for a, b in ((g, g), (t, t), (g, t)))
    radius_g, radius_t = (np.sort(x, axis=1)[:, mifid.NEIGHBOURS] for x in (gg, tt))
    inside = gt <= radius_t
    expected = {
        "precision": inside.any(1).mean(),
        "recall": (gt <= radius_g[:, None]).any(0).mean(),
        "density": inside.sum() / (mifid.NEIGHBOURS * n),
        "coverage": (gt.min(0) <= radius_t).mean(),
    }
    found = mifid.manifold_scores(g, t)
    assert found == pytest.approx(expected, abs=1e-6 if n == 70 else 2e-3)  # float32 at an edge
    assert 0 < found["recall"] < 1 and 0 < found["coverage"] < 1


# ---------------------------------------------------------------- Inception score


def test_the_inception_score_of_certain_and_of_blind_classifiers_is_known():
    certain = np.tile(np.eye(8) * 100, (50, 1))  # 8 classes, each as often in every part
    assert mifid.inception_score(certain) == pytest.approx((8.0, 0.0), abs=1e-6)
    assert mifid.inception_score(np.zeros((40, 8))) == pytest.approx((1.0, 0.0), abs=1e-9)
    sure = np.where(np.arange(8) < 4, 2000.0, 0.0)  # of four classes the chance underflows to 0
    assert mifid.inception_score(np.tile(sure, (40, 1))) == pytest.approx((1.0, 0.0), abs=1e-9)


def test_the_inception_score_is_torch_fidelitys():
    theirs = pytest.importorskip("torch_fidelity.metric_isc").isc_features_to_metric
    logits = np.random.default_rng(0).normal(0, 3, (237, 1008))
    expected = theirs(torch.from_numpy(logits), splits=10, shuffle=False)
    assert mifid.inception_score(logits) == pytest.approx(tuple(expected.values()), rel=1e-9)
