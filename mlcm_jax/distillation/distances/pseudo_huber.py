"""Between squared and absolute difference, for targets with outliers."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from mlcm_jax.distillation.distances.base import Distance
from mlcm_jax.types import Latents

HUBER_C = 1e-3


def pseudo_huber(a: Latents, b: Latents) -> Float[Array, " n"]:
    """sqrt(d^2 + c^2) - c, elementwise and averaged, c = 1e-3 (arXiv 2310.14189, eq. 9; used by LCM)."""
    return (jnp.sqrt(jnp.square(a - b) + HUBER_C**2) - HUBER_C).mean(axis=(1, 2, 3))


PSEUDO_HUBER = Distance(lambda context, answers, weights: pseudo_huber(answers.prediction, answers.target))
