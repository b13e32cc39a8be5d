"""Distances between sets against closed forms and a plain reference, and the intervals about them."""

from __future__ import annotations

import numpy as np
import pytest

from arimg.evals.bootstrap import Figure, draws, figure, mean_figure
from arimg.evals.frechet import Gaussian, Moments, frechet_distance, frechet_figure, kid_figure


def normal(count: int, channels: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, channels))


def reference_frechet(a_NC: np.ndarray, b_NC: np.ndarray) -> float:
    """The formula as written: the trace of the principal square root of C1 C2, by its own eigenvalues."""
    means, covariances = [x.mean(0) for x in (a_NC, b_NC)], [np.cov(x, rowvar=False) for x in (a_NC, b_NC)]
    roots = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).astype(complex))
    return float(((means[0] - means[1]) ** 2).sum() + np.trace(sum(covariances)) - 2 * roots.sum().real)


def reference_kid(a_NC: np.ndarray, b_MC: np.ndarray) -> float:
    """The unbiased estimate of MMD^2, pair by pair."""
    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / len(x) + 1) ** 3)
    n, m = len(a_NC), len(b_MC)
    own = sum(kernel(a_NC[i], a_NC[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    other = sum(kernel(b_MC[i], b_MC[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return own + other - 2 * sum(kernel(a, b) for a in a_NC for b in b_MC) / (n * m)


def law(features_NC: np.ndarray) -> Gaussian:
    return Gaussian.of(features_NC.mean(0), np.cov(features_NC, rowvar=False))


def test_moments_in_batches_are_those_of_the_whole() -> None:
    features = 1e4 + normal(50, 6) @ normal(6, 6, 1)             # far from zero: a plain sum of squares would cancel
    moments = Moments(6)
    for batch in np.split(features.astype(np.float64), [1, 20, 21]):
        moments.update(batch)
    assert moments.count == 50
    np.testing.assert_allclose(moments.mean_C, features.mean(0), rtol=1e-13)
    np.testing.assert_allclose(moments.covariance_CC, np.cov(features, rowvar=False), rtol=1e-9)


def test_frechet_of_gaussians_in_closed_form() -> None:
    """Diagonal covariances: |m1 - m2|^2 + sum (s1 - s2)^2; a rotation of both changes nothing."""
    means, deviations = normal(2, 5), 1 + normal(2, 5, 1) ** 2
    turn = np.linalg.qr(normal(5, 5, 2))[0]
    expected = ((means[0] - means[1]) ** 2).sum() + ((deviations[0] - deviations[1]) ** 2).sum()
    laws = [(turn @ m, turn @ np.diag(s ** 2) @ turn.T) for m, s in zip(means, deviations)]
    assert frechet_distance(*laws[0], Gaussian.of(*laws[1])) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(*laws[0], Gaussian.of(*laws[0])) == pytest.approx(0, abs=1e-12)


def test_features_that_are_no_numbers_are_not_at_distance_zero() -> None:
    features = normal(20, 3)
    features[4, 1] = np.nan
    assert np.isnan(frechet_figure(features, law(normal(20, 3, 1)), rounds=3)).all()


@pytest.mark.parametrize("counts", [(80, 120), (80, 9)])         # the second covariance has not full rank
def test_frechet_equals_the_plain_reference(counts: tuple[int, int]) -> None:
    a, b = normal(counts[0], 12) @ normal(12, 12, 1), 0.3 + normal(counts[1], 12, 2)
    assert frechet_figure(a, law(b)).value == pytest.approx(reference_frechet(a, b), rel=1e-6)


def test_kid_equals_the_plain_reference() -> None:
    a, b = normal(9, 4), 0.5 + normal(7, 4, 1)
    assert kid_figure(a, b).value == pytest.approx(reference_kid(a, b), rel=1e-12)


def test_kid_of_very_few_pictures() -> None:
    found = kid_figure(normal(2, 3), normal(5, 3, 1))           # half of the rounds draw one picture twice
    assert np.isfinite(found).all()


def test_kid_has_mean_zero_under_equal_laws() -> None:
    values = np.array([kid_figure(normal(30, 3, 2 * k), normal(30, 3, 2 * k + 1)).value for k in range(100)])
    error = values.std() / np.sqrt(len(values))
    assert abs(values.mean()) < 3 * error
    assert kid_figure(normal(30, 3) + 1, normal(30, 3, 1)).value > 5 * values.std()


def test_intervals_are_the_same_in_every_run_and_hold_the_value() -> None:
    a, b = normal(60, 4), normal(60, 4, 1) + 0.5
    for measure in (lambda seed: frechet_figure(a, law(b), seed), lambda seed: kid_figure(a, b, seed),
                    lambda seed: mean_figure(a[:, 0], seed)):
        first = measure(0)
        assert first == measure(0) and first != measure(1)
        assert first.low < first.value < first.high and measure(1).value == first.value


def test_interval_of_a_mean_is_that_of_the_normal_law() -> None:
    values = normal(400, 1)[:, 0]
    found = mean_figure(values)
    assert found.value == pytest.approx(values.mean())
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.1)


def test_means_leave_out_pictures_without_a_value() -> None:
    assert mean_figure(np.array([1.0, np.nan, 1.0])) == Figure(1, 1, 1)
    assert np.isnan(mean_figure(np.array([np.nan])).value)


def test_draws_and_limits() -> None:
    counts = np.stack([*draws(5, rounds=7)])
    assert counts.shape == (7, 5) and (counts.sum(1) == 5).all() and len(np.unique(counts)) > 2
    assert figure(0.1, [0.0, 1.0, 2.0], lowest=0.0).low == 0.0
