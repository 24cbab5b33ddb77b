"""The directions in which a set of features varies most."""

import dataclasses

import numpy as np
from jaxtyping import Float

from mlcm_jax.errors import UserError


def num_components(n: int, most: int) -> int:
    """How many are taken of a set of n images: ``most``, but no more than it has."""
    return min(most, n - 1)


@dataclasses.dataclass(frozen=True)
class PrincipalComponents:
    """mean: of the set. axes: orthonormal columns, by falling variance; float64."""

    mean: Float[np.ndarray, " d"]
    axes: Float[np.ndarray, "d k"]

    @classmethod
    def of(cls, features: Float[np.ndarray, "n d"], most: int) -> "PrincipalComponents":
        """The first ``most`` of a set, or as many as it has: n - 1, or d. Raises UserError for less than two images."""
        if len(features) < 2:
            raise UserError(f"A set of {len(features)} images has no principal components: give two or more.")
        features = np.asarray(features, np.float64)
        mean = features.mean(axis=0)
        _, _, axes = np.linalg.svd(features - mean, full_matrices=False)
        return cls(mean, axes[: num_components(len(features), most)].T)

    def __call__(self, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n k"]:
        """The features' coordinates along the axes."""
        return (np.asarray(features, np.float64) - self.mean) @ self.axes
