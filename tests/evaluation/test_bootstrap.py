"""Intervals cover what they should, and the sameness of samplers shows in paired ones."""

import numpy as np
import pytest

from mlcm_jax.evaluation.measure import set_figures
from mlcm_jax.evaluation.metrics.base import FeaturePair
from mlcm_jax.evaluation.metrics.frechet_distance import frechet_distance
from mlcm_jax.evaluation.statistics.bootstrap import (
    Figure,
    interval,
    mean_figure,
    mean_replicates,
    replicates,
    resampled_indices,
)

RNG = np.random.default_rng(0)


def test_the_mean_is_covered_19_times_out_of_20():
    """400 experiments of 80 skewed numbers: 95 % of them, less a small-sample loss."""
    indices = resampled_indices(80, 500)
    covered = 0
    for _ in range(400):
        values = RNG.exponential(size=80)
        low, high = interval(values.mean(), mean_replicates(values, indices))
        covered += low < 1.0 < high
    assert 0.89 < covered / 400 < 0.985


def test_the_interval_of_a_mean_is_as_wide_as_theory_says():
    values = RNG.normal(size=1000)
    low, high = mean_figure(values).interval
    assert high - low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(1000), rel=0.1)
    assert low < values.mean() < high


def test_sets_of_equal_size_are_resampled_alike():
    np.testing.assert_array_equal(resampled_indices(9, 5), resampled_indices(9, 5))
    assert (resampled_indices(9, 5) != resampled_indices(9, 5, stream=1)).any()


def test_a_paired_ratio_is_narrow():
    """Two samplers whose images are good and bad together differ by 2 % for certain."""
    values = RNG.exponential(size=200) + 0.1
    better, worse = mean_figure(values), mean_figure(0.98 * values + RNG.normal(size=200) * 1e-3)
    ratio = worse.over(better)
    low, high = ratio.interval
    assert low < 0.98 < high and high - low < 0.01
    assert better.interval[0] < worse.value  # alone, the intervals could not tell them apart


def test_the_frechet_distance_lies_inside_its_interval():
    """Resamples alone lie above it: that is why they are moved."""
    a, b = RNG.normal(size=(60, 20)), RNG.normal(size=(60, 20)) + 0.3
    indices, others = resampled_indices(60, 100), resampled_indices(60, 100, stream=1)
    value, found = frechet_distance(a, b), replicates(lambda i, j: frechet_distance(a[i], b[j]), indices, others)
    assert np.percentile(found, 2.5) > value
    low, high = interval(value, found)
    assert low < value < high


def test_a_set_against_itself():
    """Paired, the distances are nothing, in every resample."""
    a = RNG.normal(size=(40, 8))
    found = set_figures(FeaturePair(a, a, paired=True, num_resamples=20))
    for name, value in {"frechet_distance": 0, "kernel_distance": 0, "precision": 1, "recall": 1}.items():
        assert isinstance(found[name], Figure)
        np.testing.assert_allclose([found[name].value, *found[name].interval], value, atol=1e-9)
