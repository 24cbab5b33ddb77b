"""Improved precision and recall (arXiv 1904.06991)."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from mlcm_jax.errors import UserError

NEIGHBOURS = 3  # the paper's choice
CHUNK = 1024  # rows whose distances are held at a time


class Covered(NamedTuple):
    """precise: which drawn pictures lie among the real ones. recalled: which real pictures lie among the drawn.

    Precision and recall are their means.
    """

    precise: Bool[np.ndarray, " n"]
    recalled: Bool[np.ndarray, " m"]


def precision_recall(
    drawn: Float[np.ndarray, "n d"], real: Float[np.ndarray, "m d"], *, neighbours: int = NEIGHBOURS
) -> Covered:
    """Eq. 1: a point lies among a set when it is no further from one of its points than that one's k-th neighbour.

    Raises UserError for a set without k neighbours.
    """
    if min(len(drawn), len(real)) <= neighbours:
        raise UserError(
            f"Precision and recall of {len(drawn)} and {len(real)} pictures are not possible: give {neighbours + 1} or "
            "more of each."
        )
    drawn, real = np.asarray(drawn, np.float64), np.asarray(real, np.float64)
    return Covered(_lies_among(drawn, real, neighbours), _lies_among(real, drawn, neighbours))


def _lies_among(points: Float[np.ndarray, "n d"], members: Float[np.ndarray, "m d"], k: int) -> Bool[np.ndarray, " n"]:
    # Each member is its own nearest neighbour, so that the k-th other one has the place k
    radii = np.concatenate([np.partition(rows, k, axis=1)[:, k] for rows in _squared_distances(members, members)])
    return np.concatenate([(rows <= radii).any(axis=1) for rows in _squared_distances(points, members)])


def _squared_distances(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]):
    """Of all pairs, ``CHUNK`` rows of ``a`` at a time; rounded, so that equal rows are at distance 0."""
    squares = np.square(b).sum(axis=1)
    for start in range(0, len(a), CHUNK):
        rows = a[start : start + CHUNK]
        distances = np.square(rows).sum(axis=1)[:, None] + squares - 2 * rows @ b.T
        distances[distances < 1e-12 * squares.max()] = 0
        yield distances
