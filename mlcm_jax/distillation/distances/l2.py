"""Mean squared difference."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from mlcm_jax.distillation.distances.base import Distance
from mlcm_jax.types import Latents


def l2(a: Latents, b: Latents) -> Float[Array, " n"]:
    """Mean squared difference of each pair."""
    return jnp.square(a - b).mean(axis=(1, 2, 3))


L2 = Distance(lambda context, answers, weights: l2(answers.prediction, answers.target))
