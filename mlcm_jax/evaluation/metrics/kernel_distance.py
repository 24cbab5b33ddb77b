"""Kernel distance between two sets of features: KID where they are Inception's (arXiv 1801.01401)."""

import dataclasses

import numpy as np
from jaxtyping import Float

from mlcm_jax.errors import UserError
from mlcm_jax.evaluation.metrics.base import FeaturePair, SetMetric
from mlcm_jax.evaluation.statistics.bootstrap import Figure, counts


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The kernel (x.y / d + 1)^3 of all pairs within and between two sets of features, float64.

    paired: example i of one set and example i of the other are of the same prompt.
    """

    aa: Float[np.ndarray, "n n"]
    bb: Float[np.ndarray, "m m"]
    ab: Float[np.ndarray, "n m"]
    paired: bool = False

    @classmethod
    def of(cls, a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"], *, paired: bool = False) -> "Kernels":
        """Raises UserError for sets of fewer than two examples."""
        if min(len(a), len(b)) < 2:
            raise UserError(
                f"A kernel distance of {len(a)} and {len(b)} examples has no pairs: give two examples or more."
            )
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return cls(_kernel(a, a), _kernel(b, b), _kernel(a, b), paired)

    def distance(
        self, counts_a: Float[np.ndarray, "*b n"] | None = None, counts_b: Float[np.ndarray, "*b m"] | None = None
    ) -> Float[np.ndarray, "*b"]:
        """Unbiased squared maximum mean discrepancy (arXiv 1801.01401 eq. 4): around 0 for sets of one distribution.

        counts: how often each example comes, for one or more resamples; once by default. None is paired with itself,
        nor with its partner: the two are not independent, and would pull the figure below 0.
        """
        n, m = self.ab.shape
        a = np.ones(n) if counts_a is None else np.asarray(counts_a, np.float64)
        b = np.ones(m) if counts_b is None else np.asarray(counts_b, np.float64)
        within = _mean_of_pairs(self.aa, a, a, distinct=True) + _mean_of_pairs(self.bb, b, b, distinct=True)
        return within - 2 * _mean_of_pairs(self.ab, a, b, distinct=self.paired)


def _kernel(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "n m"]:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _mean_of_pairs(
    kernel: Float[np.ndarray, "n m"], a: Float[np.ndarray, "*b n"], b: Float[np.ndarray, "*b m"], *, distinct: bool
) -> Float[np.ndarray, "*b"]:
    total, pairs = (a @ kernel * b).sum(axis=-1), a.sum(axis=-1) * b.sum(axis=-1)
    if distinct:
        total, pairs = total - (a * b) @ np.diag(kernel), pairs - (a * b).sum(axis=-1)
    return total / pairs


def _figure(pair: FeaturePair) -> Figure:
    kernels = Kernels.of(pair.samples, pair.reference, paired=pair.paired)
    return Figure(float(kernels.distance()), kernels.distance(*map(counts, pair.resamples)))


KERNEL_DISTANCE = SetMetric("kernel_distance", "kernel distance (KID)", "lower", 4, _figure)
