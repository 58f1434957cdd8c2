"""mifid.py's arithmetic against closed forms, SciPy, plain Python loops and the released scores."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

import mifid

RESULTS = Path(__file__).resolve().parents[2] / "shared/data/competition_results.csv"


def gaussian_features(seed: int, count: int, size: int = 24) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, size)) @ rng.normal(size=(size, size)) + rng.normal(size=size)


# ---------------------------------------------------------------- Fréchet distance


def test_two_gaussians_with_diagonal_covariances_have_the_closed_form() -> None:
    rng = np.random.default_rng(0)
    m1, m2, s1, s2 = rng.normal(size=8), rng.normal(size=8), rng.random(8), rng.random(8)
    closed = ((m1 - m2) ** 2).sum() + ((np.sqrt(s1) - np.sqrt(s2)) ** 2).sum()
    assert mifid.frechet_distance(m1, np.diag(s1), m2, np.diag(s2)) == pytest.approx(closed, 1e-12)


def test_one_dimension_is_the_squared_difference_of_means_and_deviations() -> None:
    assert mifid.frechet_distance([1.0], [[4.0]], [3.0], [[9.0]]) == pytest.approx(4 + 1)


@pytest.mark.parametrize("count", [10, 24, 200])  # fewer, as many and more rows than dimensions
def test_scipy_square_root_gives_the_same_distance(count: int) -> None:
    x, y = gaussian_features(1, count), gaussian_features(2, 300)
    (m1, s1), (m2, s2) = mifid.mean_and_covariance(x), mifid.mean_and_covariance(y)
    root = scipy.linalg.sqrtm(s1 @ s2).real
    expected = ((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * root)
    assert mifid.frechet_distance(m1, s1, m2, s2) == pytest.approx(expected, rel=1e-6)
    assert mifid.frechet_distance(m2, s2, m1, s1) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("count", [500, 3000])  # singular and regular covariances of 2,048
def test_a_set_against_itself_or_its_permutation_is_zero(count: int) -> None:
    x = np.random.default_rng(3).gamma(0.5, 0.5, (count, 2048)).astype(np.float32)
    trace = np.trace(mifid.mean_and_covariance(x)[1])
    permuted = np.random.default_rng(4).permutation(x)
    assert 0 <= mifid.fid_of_features(x, x) <= 1e-6 * trace
    assert 0 <= mifid.fid_of_features(x, permuted) <= 1e-6 * trace


@pytest.mark.parametrize("counts", [(5, 9), (9, 80), (80, 9), (80, 90)])  # of 24 dimensions
def test_few_images_take_a_shorter_way_to_the_same_distance(counts: tuple[int, int]) -> None:
    x, y = (gaussian_features(seed, count) for seed, count in enumerate(counts))
    expected = mifid.frechet_distance(*mifid.mean_and_covariance(x), *mifid.mean_and_covariance(y))
    assert mifid.fid_of_features(x, y) == pytest.approx(expected, rel=1e-8)


def test_a_singular_covariance_against_itself_is_zero() -> None:
    mean, sigma = mifid.mean_and_covariance(gaussian_features(21, 40, 120))
    assert mifid.frechet_distance(mean, sigma, mean, sigma) <= 1e-6 * np.trace(sigma)


def test_mean_and_covariance_are_numpys_in_float64_whatever_the_blocks() -> None:
    x = gaussian_features(5, 5000).astype(np.float32)
    mean, sigma = mifid.mean_and_covariance(x)
    np.testing.assert_allclose(mean, x.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-10)


def test_torch_tensors_are_taken_like_arrays() -> None:
    x, y = gaussian_features(6, 50), gaussian_features(7, 60)
    moments = (*mifid.mean_and_covariance(x), *mifid.mean_and_covariance(y))
    tensors = [torch.from_numpy(m) for m in moments]
    assert mifid.frechet_distance(*tensors) == mifid.frechet_distance(*moments)
    assert mifid.memorization_distance(torch.from_numpy(x), y) == mifid.memorization_distance(x, y)


def test_moments_that_do_not_fit_or_are_not_finite_are_refused() -> None:
    m, s = np.zeros(3), np.eye(3)
    with pytest.raises(ValueError, match="dimension"):
        mifid.frechet_distance(m, s, np.zeros(4), np.eye(4))
    with pytest.raises(ValueError, match="not finite"):
        mifid.frechet_distance(m, s, m, s * np.nan)


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
def test_a_loop_of_plain_python_gives_the_same_distance(seed: int, n: int, m: int) -> None:
    rng = np.random.default_rng(seed)
    g, t = rng.normal(size=(n, 5)), rng.normal(size=(m, 5))
    expected = distance_by_loops(g.tolist(), t.tolist())
    assert mifid.memorization_distance(g, t) == pytest.approx(expected, abs=1e-6)


def test_rows_of_zeros_are_left_out_on_both_sides() -> None:
    g, t = np.abs(gaussian_features(8, 9)), np.abs(gaussian_features(9, 7))
    expected = distance_by_loops(g.tolist(), t.tolist())
    g, t = np.insert(g, 4, 0, axis=0), np.insert(t, [0, 3], 0, axis=0)
    assert mifid.memorization_distance(g, t) == pytest.approx(expected, abs=1e-12)
    # and so is any row whose sum is 0, as in the competition's code
    odd = np.zeros(g.shape[1])
    odd[:2] = 1, -1
    assert mifid.memorization_distance(np.vstack([g, odd]), t) == pytest.approx(expected, abs=1e-12)
    with pytest.raises(ValueError, match="zero"):
        mifid.memorization_distance(np.zeros((3, 4)), np.ones((3, 4)))


def test_a_generator_that_copies_50_of_2000_photos_is_penalised() -> None:
    """The transposition trap: averaged over the photos instead, this distance is over 0.3."""
    rng = np.random.default_rng(10)
    photos = rng.gamma(0.5, 1, (2000, 256))
    copies = photos[rng.integers(0, 50, 1000)] + rng.normal(0, 1e-3, (1000, 256))
    distance = mifid.memorization_distance(copies, photos)
    assert distance < 1e-3
    assert mifid.memorization_distance(photos, copies) > 0.3
    assert mifid.memorization_informed_fid(20, distance) > 20_000


def test_the_distance_does_not_depend_on_order_scale_or_sign() -> None:
    g, t = gaussian_features(11, 1500), gaussian_features(12, 2100)
    rng = np.random.default_rng(13)
    expected = mifid.memorization_distance(g, t)
    shuffled = mifid.memorization_distance(rng.permutation(g), -3 * rng.permutation(t))
    assert shuffled == pytest.approx(expected, rel=1e-9)
    pieces = [mifid.memorization_distance(part, t) for part in np.array_split(g, 3)]
    assert np.mean(pieces) == pytest.approx(expected, rel=1e-9)


def test_features_from_float32_agree_with_float64_to_1e_7() -> None:
    rng = np.random.default_rng(14)
    g, t = (rng.gamma(0.5, 0.5, (n, 2048)).astype(np.float32) for n in (300, 900))
    double = [
        x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1)[:, None] for x in (g, t)
    ]
    expected = (1 - np.abs(double[0] @ double[1].T)).min(1).mean()
    assert mifid.memorization_distance(g, t) == pytest.approx(expected, abs=1e-8)


def test_features_that_do_not_fit_or_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="same D"):
        mifid.memorization_distance(np.ones((2, 3)), np.ones((2, 4)))
    with pytest.raises(ValueError, match="finite"):
        mifid.memorization_distance(np.full((2, 3), np.inf), np.ones((2, 3)))


# ---------------------------------------------------------------- MiFID


def test_all_released_scores_are_reproduced_from_their_fid_and_distance() -> None:
    if not RESULTS.is_file():
        pytest.skip(f"no {RESULTS}")
    rows = list(csv.DictReader(RESULTS.open()))
    assert len(rows) == 1666
    penalised = 0
    for row in rows:
        fid, distance = float(row["FID_public"]), float(row["distance_public"])
        score = mifid.memorization_informed_fid(fid, distance, 0.1)
        assert score == pytest.approx(float(row["public_score"]), rel=1e-9)
        penalised += distance < 0.1
    assert penalised == 3


def test_the_private_scores_follow_from_their_threshold_of_a_quarter() -> None:
    if not RESULTS.is_file():
        pytest.skip(f"no {RESULTS}")
    for row in csv.DictReader(RESULTS.open()):
        if float(row["private_score"]) < 999_999:  # else disqualified by hand
            score = mifid.memorization_informed_fid(
                float(row["FID_private"]), float(row["distance_private"]), threshold=0.25
            )
            assert score == pytest.approx(float(row["private_score"]), rel=1e-9)


def test_a_copy_never_scores_well() -> None:
    assert mifid.memorization_informed_fid(0, 0) == math.inf
    assert mifid.memorization_informed_fid(-5.7, 3e-8) == math.inf
    assert mifid.memorization_informed_fid(25.0, 9e-7) == math.inf
    assert mifid.memorization_informed_fid(-5.7, 0.2) == 0
    assert mifid.memorization_informed_fid(10, 0.1) == 10  # the threshold itself is not penalised
    assert mifid.memorization_informed_fid(10, 0.05) == pytest.approx(200)


def test_unseen_distance_is_what_a_held_out_half_of_the_same_kind_reaches() -> None:
    x = np.random.default_rng(15).gamma(0.5, 0.5, (3000, 64))
    held_out = mifid.memorization_distance(x[:1000], x[1000:])
    assert mifid.unseen_distance(x[1000:]) == pytest.approx(held_out, rel=0.03)
    doubled = np.repeat(x[1000:], 2, axis=0)  # a repeated picture is not its own neighbour
    assert mifid.unseen_distance(doubled) == pytest.approx(held_out, rel=0.04)


# ---------------------------------------------------------------- KID, precision, recall, ...


def test_kid_is_the_unbiased_estimator_written_out() -> None:
    x, y = gaussian_features(16, 30, 6) / 3, gaussian_features(17, 30, 6) / 3
    k = [[[(a @ b / 6 + 1) ** 3 for b in q] for a in p] for p, q in ((x, x), (y, y), (x, y))]
    within = [sum(k[s][i][j] for i in range(30) for j in range(30) if i != j) for s in (0, 1)]
    expected = sum(within) / (30 * 29) - 2 * np.mean(k[2])
    kid, spread = mifid.kernel_distance(x, y, subsets=3)
    assert kid == pytest.approx(expected, rel=1e-10)
    assert spread == pytest.approx(0, abs=1e-12)  # the subsets are the whole sets here


def test_kid_is_torch_fidelitys() -> None:
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


def manifolds_by_loops(g: np.ndarray, t: np.ndarray, k: int) -> dict[str, float]:
    def radius(x: np.ndarray, i: int) -> float:
        return sorted(math.dist(x[i], x[j]) for j in range(len(x)) if j != i)[k - 1]

    radius_g, radius_t = ([radius(x, i) for i in range(len(x))] for x in (g, t))
    inside = [[math.dist(a, b) <= r for b, r in zip(t, radius_t)] for a in g]
    return {
        "precision": sum(map(any, inside)) / len(g),
        "recall": sum(any(math.dist(a, b) <= r for a, r in zip(g, radius_g)) for b in t) / len(t),
        "density": sum(map(sum, inside)) / (k * len(g)),
        "coverage": sum(min(math.dist(a, b) for a in g) <= r for b, r in zip(t, radius_t)) / len(t),
    }


def test_precision_recall_density_and_coverage_are_the_definitions_written_out() -> None:
    rng = np.random.default_rng(19)
    g, t = rng.normal(0.4, 0.8, (70, 3)), rng.normal(size=(90, 3))
    scores = mifid.manifold_scores(g, t)
    assert scores == pytest.approx(manifolds_by_loops(g, t, mifid.NEIGHBOURS), abs=1e-6)
    assert 0 < scores["recall"] < 1 and 0 < scores["coverage"] < 1


def test_precision_and_recall_are_torch_fidelitys() -> None:
    metric_prc = pytest.importorskip("torch_fidelity.metric_prc")
    rng = np.random.default_rng(20)
    g, t = rng.normal(0.1, 0.9, (2100, 8)), rng.normal(size=(2300, 8))
    theirs = metric_prc.prc_features_to_metric(
        torch.from_numpy(g),
        torch.from_numpy(t),
        prc_neighborhood=5,
        prc_batch_size=500,
        verbose=False,
    )
    scores = mifid.manifold_scores(g, t)
    both = sorted(theirs[name] for name in ("precision", "recall"))
    assert sorted((scores["precision"], scores["recall"])) == pytest.approx(both, abs=2e-3)


# ---------------------------------------------------------------- Inception score


def test_the_inception_score_of_certain_and_of_blind_classifiers_is_known() -> None:
    certain = np.tile(np.eye(8) * 100, (50, 1))  # 8 classes, each as often in every part
    assert mifid.inception_score(certain) == pytest.approx((8.0, 0.0), abs=1e-6)
    assert mifid.inception_score(np.zeros((40, 8))) == pytest.approx((1.0, 0.0), abs=1e-9)
    sure = np.where(np.arange(8) < 4, 2000.0, 0.0)  # of four classes the chance underflows to 0
    assert mifid.inception_score(np.tile(sure, (40, 1))) == pytest.approx((1.0, 0.0), abs=1e-9)


def test_the_inception_score_is_torch_fidelitys() -> None:
    theirs = pytest.importorskip("torch_fidelity.metric_isc").isc_features_to_metric
    logits = np.random.default_rng(0).normal(0, 3, (237, 1008))
    expected = theirs(torch.from_numpy(logits), splits=10, shuffle=False)
    assert mifid.inception_score(logits) == pytest.approx(tuple(expected.values()), rel=1e-9)
