"""How much the images of one prompt differ from seed to seed."""

import numpy as np
from jaxtyping import Float

from mlcm_jax.errors import UserError
from mlcm_jax.evaluation.metrics.base import SeedMetric


def diversity(features: Float[np.ndarray, "seeds n d"]) -> Float[np.ndarray, " n"]:
    """For each of n prompts the mean distance of its images' features, pair by pair, scaled to length one: 0 to 2.

    Raises UserError for fewer than two seeds.
    """
    seeds = len(features)
    if seeds < 2:
        raise UserError(f"Diversity of {seeds} images a prompt is not possible: sample each prompt twice or more.")
    unit = np.asarray(features, np.float64)
    unit = unit / np.linalg.norm(unit, axis=-1, keepdims=True)
    first, second = np.triu_indices(seeds, k=1)
    return np.linalg.norm(unit[first] - unit[second], axis=-1).mean(axis=0)


DIVERSITY = SeedMetric("diversity", "diversity", "higher", 4, diversity)
