"""The norm of the difference in x-space, not squared, weighted by SNR + 1 (MCM, arXiv 2403.06807)."""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float

from mlcm_jax.diffusion.schedule import Schedule, alpha_sigma
from mlcm_jax.diffusion.solvers import ddim_weights
from mlcm_jax.distillation.context import DistillationContext
from mlcm_jax.distillation.distances.base import Answers, Distance
from mlcm_jax.types import Latents, Params, Timesteps


def x0_norm(schedule: Schedule, difference: Latents, t: Timesteps) -> Float[Array, " n"]:
    """(SNR(t) + 1) |difference|, the norm over all elements of an example; where the difference is 0, so is the
    gradient. difference: of clean latents that were predicted at t. (arXiv 2403.06807, sec. 3)"""
    alpha, sigma = alpha_sigma(schedule, t)
    squared = jnp.square(difference).sum(axis=(1, 2, 3))
    norm = jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1.0)), 0.0)
    return (jnp.square(alpha / sigma) + 1)[:, 0, 0, 0] * norm


def x0_difference(context: DistillationContext, answers: Answers) -> Latents:
    """Of the clean latents, predicted at t, that lead to the two answers: the inverse DDIM step, where they lie at the
    boundary."""
    difference = answers.prediction - answers.target
    if context.config.target == "x0":
        return difference
    _, x0_weight = ddim_weights(context.schedule, answers.t, answers.boundary)
    return difference / x0_weight


def _measure(context: DistillationContext, answers: Answers, weights: Mapping[str, Params]) -> Float[Array, " n"]:
    return x0_norm(context.schedule, x0_difference(context, answers), answers.t)


X0_NORM = Distance(_measure)
