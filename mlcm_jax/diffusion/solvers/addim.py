"""aDDIM (arXiv 2403.06807, sec. 3.3): DDIM whose noise is lengthened by what the predicted x0 lacks in variance."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from mlcm_jax.diffusion.schedule import Scale, Schedule, alpha_sigma
from mlcm_jax.diffusion.solvers.base import Solver
from mlcm_jax.diffusion.solvers.ddim import ddim_weights
from mlcm_jax.types import Latents, Timesteps

EXAMPLE = (1, 2, 3)  # axes of one example
OF_DATA = 0.75  # share of the squared error of x0 that is taken for the variance
LEAST_EPS = 1e-6  # mean square of the noise, which a step divides by


def addim_step(
    schedule: Schedule, z: Latents, x0: Latents, x_var: Float[Array, "n 1 1 1"], t: Timesteps, s: Timesteps
) -> Latents:
    """From t to s: alpha_s x0 + sqrt(sigma_s^2 + (d / |eps|^2) (alpha_s - alpha_t sigma_s / sigma_t)^2 x_var) eps.

    eps: the noise that z and x0 imply, its norm that of each example alone. x_var: variance of x0 given z, an element.
    At s = t this is z, to the bit; with x_var = 0 it is DDIM. (arXiv 2403.06807, alg. 3)
    """
    z, x0 = z.astype(jnp.float32), x0.astype(jnp.float32)
    alpha_t, sigma_t = alpha_sigma(schedule, t)
    alpha_s, sigma_s = alpha_sigma(schedule, s)
    _, x0_weight = ddim_weights(schedule, t, s)
    eps = (z - alpha_t * x0) / sigma_t
    power = jnp.maximum(jnp.square(eps).mean(axis=EXAMPLE, keepdims=True), LEAST_EPS)
    longer = jnp.square(sigma_s) + jnp.square(x0_weight) * x_var / power
    z_weight = jnp.sqrt(longer / jnp.square(sigma_t))
    return z_weight * z + (alpha_s - z_weight * alpha_t) * x0


def model_variance(schedule: Schedule, t: Timesteps) -> Scale:
    """x_var without data: 0.1 / (2 + SNR(t)). (arXiv 2403.06807, sec. 3.3)"""
    alpha, sigma = alpha_sigma(schedule, t)
    return 0.1 / (2 + jnp.square(alpha / sigma))


def data_variance(x0: Latents, clean: Latents) -> Scale:
    """x_var of states that are noised data: 0.75 |clean - x0|^2 / d, of each example. (arXiv 2403.06807, sec. 3.3)"""
    return OF_DATA * jnp.square(clean - x0).mean(axis=EXAMPLE, keepdims=True)


def _step(schedule, z, x0, x0_prev, t_prev, t, s):
    return addim_step(schedule, z, x0, model_variance(schedule, t), t, s)


def _step_of_data(schedule, z, x0, x0_prev, t_prev, t, s, *, clean):
    return addim_step(schedule, z, x0, data_variance(x0, clean), t, s)


ADDIM = Solver(_step, uses_previous=False)
ADDIM_DATA = Solver(_step_of_data, uses_previous=False, needs_clean=True)
