"""Improved precision and recall (arXiv 1904.06991)."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float

from mlcm_jax.errors import UserError
from mlcm_jax.evaluation.metrics.base import FeaturePair, SetMetric
from mlcm_jax.evaluation.statistics.bootstrap import Figure, mean_figure

NEIGHBOURS = 3  # the paper's choice
CHUNK = 1024  # examples whose distances are held at a time


def lies_among(
    points: Float[np.ndarray, "n d"], members: Float[np.ndarray, "m d"], *, neighbours: int = NEIGHBOURS
) -> Bool[np.ndarray, " n"]:
    """Eq. 1: a point lies among a set when it is no further from one of its points than that one's k-th neighbour.

    Raises UserError for sets without k neighbours.
    """
    if min(len(points), len(members)) <= neighbours:
        raise UserError(
            f"Precision and recall of {len(points)} and {len(members)} images are not possible: give {neighbours + 1} "
            "or more of each."
        )
    points, members = np.asarray(points, np.float64), np.asarray(members, np.float64)
    # Each member is its own nearest neighbour, so that the k-th other one has the place k
    radii = [np.partition(squared, neighbours, axis=1)[:, neighbours] for squared in _distances(members, members)]
    limits = np.concatenate(radii)
    return np.concatenate([(squared <= limits).any(axis=1) for squared in _distances(points, members)])


def _distances(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> Iterator[Float[np.ndarray, "c m"]]:
    """Squared, of all pairs, ``CHUNK`` examples of ``a`` at a time; rounded, so that equal ones are at distance 0."""
    squares = np.square(b).sum(axis=1)
    for start in range(0, len(a), CHUNK):
        chunk = a[start : start + CHUNK]
        squared = np.square(chunk).sum(axis=1)[:, None] + squares - 2 * chunk @ b.T
        squared[squared < 1e-12 * squares.max()] = 0
        yield squared


# Only the images that are counted are resampled, not those that they are sought among: repeated examples would shrink
# the distances to neighbours.


def _precision(pair: FeaturePair) -> Figure:
    return mean_figure(lies_among(pair.samples, pair.reference))


def _recall(pair: FeaturePair) -> Figure:
    return mean_figure(lies_among(pair.reference, pair.samples), stream=pair.reference_stream)


PRECISION = SetMetric("precision", "precision", "higher", 3, _precision, min_images=NEIGHBOURS + 1)
RECALL = SetMetric("recall", "recall", "higher", 3, _recall, min_images=NEIGHBOURS + 1)
