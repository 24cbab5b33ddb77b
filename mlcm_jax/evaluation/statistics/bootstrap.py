"""Intervals by resampling examples with replacement (Efron 1979).

One seed: sets of equal size are resampled alike. For two samplers with the same prompts the ratio of their figures is
therefore a paired one.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

CONFIDENCE = 95  # per cent
MEAN_RESAMPLES = 2000


def resampled_indices(n: int, num_resamples: int, *, stream: int = 0) -> Int[np.ndarray, "b n"]:
    """Indices of the resamples; ``stream``: another number for examples that have no partner in stream 0."""
    return np.random.default_rng([n, stream]).integers(n, size=(num_resamples, n))


def replicates(statistic: Callable[..., float], *indices: Int[np.ndarray, "b n"]) -> Float[np.ndarray, " b"]:
    """``statistic`` of the indices of each resample, one argument for each set that is resampled."""
    return np.array([statistic(*chosen) for chosen in zip(*indices, strict=True)], np.float64)


def mean_replicates(values: Float[np.ndarray, " n"], indices: Int[np.ndarray, "b n"]) -> Float[np.ndarray, " b"]:
    """Mean of each resample."""
    return np.asarray(values, np.float64)[indices].mean(axis=1)


def counts(indices: Int[np.ndarray, "b n"]) -> Int[np.ndarray, "b n"]:
    """How often each example comes in each resample."""
    return np.stack([np.bincount(chosen, minlength=len(chosen)) for chosen in indices])


def interval(value: float, replicated: Float[np.ndarray, " b"]) -> tuple[float, float]:
    """The replicates' middle 95 %, moved so that their mean lies on ``value``.

    A resample repeats examples, which alone makes the Frechet distance larger; only the spread is taken from it. For a
    mean the move is nothing but rounding.
    """
    tail = (100 - CONFIDENCE) / 2
    low, high = np.percentile(replicated, [tail, 100 - tail]) - replicated.mean() + value
    return float(low), float(high)


@dataclasses.dataclass(frozen=True)
class Figure:
    """A number, and what it is in resamples of the images."""

    value: float
    replicates: Float[np.ndarray, " b"]

    @property
    def interval(self) -> tuple[float, float]:
        """95 % bootstrap interval."""
        return interval(self.value, self.replicates)

    def over(self, other: "Figure") -> "Figure":
        """The ratio to another sampler's figure, paired: both are resampled alike."""
        mine, others = (f.replicates - f.replicates.mean() + f.value for f in (self, other))
        return Figure(self.value / other.value, mine / others)


def mean_figure(values: Float[np.ndarray, " n"], *, stream: int = 0) -> Figure:
    """Mean of one number an image. stream: as ``resampled_indices`` takes it."""
    indices = resampled_indices(len(values), MEAN_RESAMPLES, stream=stream)
    return Figure(float(np.mean(values, dtype=np.float64)), mean_replicates(values, indices))
