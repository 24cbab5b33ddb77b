"""Kernel distance, precision, recall and diversity against what they are by definition."""

import numpy as np
import pytest

from mlcm_jax.errors import UserError
from mlcm_jax.evaluation import precision_recall as precision_recall_module
from mlcm_jax.evaluation.bootstrap import counts, resampled_rows
from mlcm_jax.evaluation.diversity import diversity
from mlcm_jax.evaluation.kid import Kernels
from mlcm_jax.evaluation.precision_recall import precision_recall


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
    """A resample's repeated rows are never paired with themselves."""
    a, b, rows = normal(6, 4), normal(6, 4, seed=1) + 0.5, resampled_rows(6, 3)
    found = Kernels.of(a, b, paired=paired).distance(counts(rows), counts(rows))
    assert found.shape == (3,)
    for value, chosen in zip(found, rows, strict=True):
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
    real, drawn = np.array([[0.0], [1.0], [10.0]]), np.array([[0.5], [0.6], [3.0], [30.0]])
    covered = precision_recall(drawn, real, neighbours=1)
    assert covered.precise.tolist() == [True, True, True, False]  # 3 lies within 9 of 10
    assert covered.recalled.tolist() == [False, True, True]  # 1 lies within 2.4 of 3; 10 within 27 of 30


@pytest.mark.parametrize("chunk", [4, 1000])
def test_precision_and_recall_of_sets(chunk, monkeypatch):
    monkeypatch.setattr(precision_recall_module, "CHUNK", chunk)
    a = normal(50, 6)
    same = precision_recall(a, a.copy())
    assert same.precise.all() and same.recalled.all()
    far = precision_recall(a, a + 100)
    assert not far.precise.any() and not far.recalled.any()
    one_mode = precision_recall(a[:20], np.concatenate([a[:20], a[20:] + 100]))
    assert one_mode.precise.all() and one_mode.recalled.sum() == 20


def test_diversity():
    equal, across = np.ones((3, 2, 4)), np.eye(4)[:3, None].repeat(2, axis=1)
    np.testing.assert_allclose(diversity(equal), [0, 0], atol=1e-12)
    np.testing.assert_allclose(diversity(across * 5), [np.sqrt(2)] * 2)  # lengths do not count


def test_too_few():
    with pytest.raises(UserError, match="give two rows or more"):
        Kernels.of(normal(1, 4), normal(5, 4))
    with pytest.raises(UserError, match="give 4 or more of each"):
        precision_recall(normal(3, 4), normal(5, 4))
    with pytest.raises(UserError, match="draw each prompt twice or more"):
        diversity(normal(1, 5, 4))
