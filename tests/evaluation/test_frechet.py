"""The Frechet distance where it is known in closed form."""

import numpy as np
import pytest

from mlcm_jax.errors import UserError
from mlcm_jax.evaluation.metrics.frechet_distance import frechet_distance

RNG = np.random.default_rng(0)


def with_moments(mean, covariance, n=50):
    """n examples whose sample mean and unbiased sample covariance are exactly these."""
    x = RNG.normal(size=(n, len(mean)))
    whitened, _ = np.linalg.qr(x - x.mean(axis=0))
    return whitened * np.sqrt(n - 1) @ np.linalg.cholesky(covariance).T + mean


def test_equal_covariances():
    """Only the means differ: the squared distance of the means."""
    covariance = np.array([[2.0, 0.7], [0.7, 1.0]])
    a, b = with_moments(np.zeros(2), covariance), with_moments(np.array([3.0, -4.0]), covariance, n=31)
    assert frechet_distance(a, b) == pytest.approx(25.0, rel=1e-12)


def test_diagonal_covariances():
    variances_a, variances_b, mean = np.array([1.0, 4.0, 9.0]), np.array([16.0, 0.25, 9.0]), np.array([1.0, 2.0, 2.0])
    a, b = with_moments(np.zeros(3), np.diag(variances_a)), with_moments(mean, np.diag(variances_b))
    want = 9.0 + np.square(np.sqrt(variances_a) - np.sqrt(variances_b)).sum()
    assert frechet_distance(a, b) == pytest.approx(want, rel=1e-12)


def test_covariances_that_do_not_commute():
    """For 2 x 2 matrices tr(M^(1/2)) = sqrt(tr M + 2 sqrt(det M))."""
    c, d = np.array([[3.0, 1.0], [1.0, 2.0]]), np.array([[1.0, -0.8], [-0.8, 5.0]])
    assert np.abs(c @ d - d @ c).max() > 1
    root = np.sqrt(np.trace(c @ d) + 2 * np.sqrt(np.linalg.det(c @ d)))
    want = np.trace(c) + np.trace(d) - 2 * root
    assert frechet_distance(with_moments(np.zeros(2), c), with_moments(np.zeros(2), d)) == pytest.approx(
        want, rel=1e-10
    )


def test_symmetry_rotation_and_shift():
    a, b = RNG.normal(size=(40, 6)), RNG.normal(size=(30, 6)) @ RNG.normal(size=(6, 6)) + 1.0
    rotation, _ = np.linalg.qr(RNG.normal(size=(6, 6)))
    want = frechet_distance(a, b)
    assert frechet_distance(b, a) == pytest.approx(want, rel=1e-12)
    assert frechet_distance(a @ rotation + 7.0, b @ rotation + 7.0) == pytest.approx(want, rel=1e-10)
    assert frechet_distance(3 * a, 3 * b) == pytest.approx(9 * want, rel=1e-12)


@pytest.mark.parametrize("shape", [(20, 5), (5, 20), (2, 64)])
def test_zero_for_itself_also_with_few_examples(shape):
    a = RNG.normal(size=shape) * 10
    assert frechet_distance(a, a.copy()) == pytest.approx(0.0, abs=1e-9)


def test_few_examples_span_a_line():
    """Two examples give rank one: along orthogonal lines nothing is shared, and the traces add up."""
    a, b = np.zeros((2, 8)), np.zeros((2, 8))
    a[:, 0], b[:, 5] = (-1.0, 1.0), (-3.0, 3.0)
    assert frechet_distance(a, b) == pytest.approx(2.0 + 18.0, rel=1e-12)
    assert frechet_distance(a, 3 * a) == pytest.approx(2.0 + 18.0 - 2 * 6.0, rel=1e-12)


def test_float32_far_from_the_origin():
    """Features far from zero keep their small covariance: the arithmetic is float64."""
    a = with_moments(np.full(4, 1000.0), np.eye(4)).astype(np.float32)
    b = with_moments(np.full(4, 1000.0), 4 * np.eye(4)).astype(np.float32)
    assert frechet_distance(a, b) == pytest.approx(4.0, rel=1e-3)


def test_sampled_gaussians():
    a, b = RNG.normal(size=(100_000, 3)), 2 * RNG.normal(size=(100_000, 3)) + 1
    assert frechet_distance(a, b) == pytest.approx(3.0 + 3.0, rel=0.02)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.zeros((1, 3)), np.zeros((5, 3)), "have no covariance: give two examples"),
        (np.zeros((5, 3)), np.zeros((5, 4)), "width 3 and 4"),
        (np.full((5, 3), np.nan), np.zeros((5, 3)), "not finite"),
    ],
)
def test_unfit_features(a, b, message):
    with pytest.raises(UserError, match=message):
        frechet_distance(a, b)
