"""Kernel distance, precision, recall and diversity against what they are by definition."""

import numpy as np
import pytest

from mlcm_jax.errors import UserError
from mlcm_jax.evaluation.metrics import precision_recall
from mlcm_jax.evaluation.metrics.diversity import diversity
from mlcm_jax.evaluation.metrics.kernel_distance import Kernels
from mlcm_jax.evaluation.metrics.precision_recall import lies_among
from mlcm_jax.evaluation.statistics.bootstrap import counts, resampled_indices


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def direct_distance(a, b, same=lambda i, j: i == j, partners=False):
    """The definition of the U-statistic, pair by pair."""

    def kernel(x, y):
        return (float(np.dot(x.astype(np.float64), y)) / len(x) + 1) ** 3

    def mean(first, second, left_out):
        pairs = [(i, j) for i in range(len(first)) for j in range(len(second)) if not left_out(i, j)]
        return np.mean([kernel(first[i], second[j]) for i, j in pairs])

    between = mean(a, b, same if partners else lambda i, j: False)
    return mean(a, a, same) + mean(b, b, same) - 2 * between


def test_kernel_distance_against_the_sum():
    a, b = normal(7, 5), normal(9, 5, seed=1) + 0.5
    assert Kernels.of(a, b).distance() == pytest.approx(direct_distance(a, b), rel=1e-9)
    assert Kernels.of(a, b[:7], paired=True).distance() == pytest.approx(
        direct_distance(a, b[:7], partners=True), rel=1e-9
    )


@pytest.mark.parametrize("paired", [False, True])
def test_kernel_distance_of_resamples(paired):
    """A resample's repeated examples are never paired with themselves."""
    a, b, indices = normal(6, 4), normal(6, 4, seed=1) + 0.5, resampled_indices(6, 3)
    found = Kernels.of(a, b, paired=paired).distance(counts(indices), counts(indices))
    assert found.shape == (3,)
    for value, chosen in zip(found, indices, strict=True):
        want = direct_distance(a[chosen], b[chosen], lambda i, j, c=chosen: c[i] == c[j], paired)
        assert value == pytest.approx(want, rel=1e-9)


def test_kernel_distance_is_unbiased():
    """300 pairs of sets of one distribution: around 0, half of them below it."""
    found = np.array(
        [Kernels.of(normal(20, 8, seed=2 * i), normal(20, 8, seed=2 * i + 1)).distance() for i in range(300)]
    )
    assert abs(found.mean()) < 3 * found.std() / np.sqrt(300)
    assert 0.3 < (found < 0).mean() < 0.75
    shifted = [Kernels.of(normal(20, 8, seed=2 * i), normal(20, 8, seed=2 * i + 1) + 1).distance() for i in range(20)]
    assert min(shifted) > found.max()


def test_precision_and_recall_by_hand():
    """On a line with k = 1: members 0, 1 reach 1 and 10 reaches 9; members 0.5, 0.6 reach 0.1 and 3 reaches 2.4."""
    real, samples = np.array([[0.0], [1.0], [10.0]]), np.array([[0.5], [0.6], [3.0], [30.0]])
    precise, recalled = lies_among(samples, real, neighbours=1), lies_among(real, samples, neighbours=1)
    assert precise.tolist() == [True, True, True, False]  # 3 lies within 9 of 10
    assert recalled.tolist() == [False, True, True]  # 1 lies within 2.4 of 3; 10 within 27 of 30


@pytest.mark.parametrize("chunk", [4, 1000])
def test_precision_and_recall_of_sets(chunk, monkeypatch):
    monkeypatch.setattr(precision_recall, "CHUNK", chunk)
    a = normal(50, 6)
    assert lies_among(a, a.copy()).all() and lies_among(a.copy(), a).all()
    assert not lies_among(a, a + 100).any() and not lies_among(a + 100, a).any()
    one_mode, two_modes = a[:20], np.concatenate([a[:20], a[20:] + 100])
    assert lies_among(one_mode, two_modes).all() and lies_among(two_modes, one_mode).sum() == 20


def test_diversity():
    equal, across = np.ones((3, 2, 4)), np.eye(4)[:3, None].repeat(2, axis=1)
    np.testing.assert_allclose(diversity(equal), [0, 0], atol=1e-12)
    np.testing.assert_allclose(diversity(across * 5), [np.sqrt(2)] * 2)  # lengths do not count


def test_too_few():
    with pytest.raises(UserError, match="give two examples or more"):
        Kernels.of(normal(1, 4), normal(5, 4))
    with pytest.raises(UserError, match="give 4 or more of each"):
        lies_among(normal(3, 4), normal(5, 4))
    with pytest.raises(UserError, match="sample each prompt twice or more"):
        diversity(normal(1, 5, 4))
