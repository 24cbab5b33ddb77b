"""The squared difference in x-space, weighted by the truncated SNR (progressive distillation and TRACT)."""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float

from mlcm_jax.diffusion.schedule import alpha_sigma
from mlcm_jax.distillation.context import DistillationContext
from mlcm_jax.distillation.distances.base import Answers, Distance
from mlcm_jax.distillation.distances.x0_norm import x0_difference
from mlcm_jax.types import Params


def _measure(context: DistillationContext, answers: Answers, weights: Mapping[str, Params]) -> Float[Array, " n"]:
    """max(SNR(t), 1) times the mean square over the elements (arXiv 2202.00512, sec. 4; 2303.04248, sec. 3)."""
    alpha, sigma = alpha_sigma(context.schedule, answers.t)
    weight = jnp.maximum(jnp.square(alpha / sigma), 1.0)[:, 0, 0, 0]
    return weight * jnp.square(x0_difference(context, answers)).mean(axis=(1, 2, 3))


X0_SNR = Distance(_measure)
