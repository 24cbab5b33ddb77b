"""Intervals by resampling rows with replacement (Efron 1979). One seed, so that rows of equal number go together.

Two samplers that drew the same prompts are resampled alike, and the ratio of their figures is a paired one.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

CONFIDENCE = 95  # per cent


def resampled_rows(n: int, num_resamples: int, *, stream: int = 0) -> Int[np.ndarray, "b n"]:
    """Row numbers of the resamples; ``stream``: another number for rows that have no partner in stream 0."""
    return np.random.default_rng([n, stream]).integers(n, size=(num_resamples, n))


def replicates(statistic: Callable[..., float], *rows: Int[np.ndarray, "b n"]) -> Float[np.ndarray, " b"]:
    """``statistic`` of the rows of each resample, one argument for each set that is resampled."""
    return np.array([statistic(*chosen) for chosen in zip(*rows, strict=True)], np.float64)


def mean_replicates(values: Float[np.ndarray, " n"], rows: Int[np.ndarray, "b n"]) -> Float[np.ndarray, " b"]:
    """Mean of each resample."""
    return np.asarray(values, np.float64)[rows].mean(axis=1)


def counts(rows: Int[np.ndarray, "b n"]) -> Int[np.ndarray, "b n"]:
    """How often each row comes in each resample."""
    return np.stack([np.bincount(chosen, minlength=len(chosen)) for chosen in rows])


def interval(value: float, replicated: Float[np.ndarray, " b"]) -> tuple[float, float]:
    """The replicates' middle 95 %, moved so that their mean lies on ``value``.

    A resample repeats rows, which alone makes the Frechet distance larger; only the spread is taken from it. For a mean
    the move is nothing but rounding.
    """
    tail = (100 - CONFIDENCE) / 2
    low, high = np.percentile(replicated, [tail, 100 - tail]) - replicated.mean() + value
    return float(low), float(high)
