"""DDIM (arXiv 2010.02502): the first-order step of the probability flow ODE."""

import jax.numpy as jnp

from mlcm_jax.diffusion.schedule import Scale, Schedule, alpha_sigma
from mlcm_jax.diffusion.solvers.base import Solver
from mlcm_jax.types import Latents, Timesteps


def ddim_step(schedule: Schedule, z: Latents, x0: Latents, t: Timesteps, s: Timesteps) -> Latents:
    """From t to s along the direction that x0 implies: alpha_s x0 + sigma_s (z - alpha_t x0) / sigma_t.

    At s = t this is z, to the bit. sigma_t > 0 at every timestep of a valid schedule. (arXiv 2010.02502 eq. 12)
    """
    z_weight, x0_weight = ddim_weights(schedule, t, s)
    return z_weight * z.astype(jnp.float32) + x0_weight * x0.astype(jnp.float32)


def ddim_weights(schedule: Schedule, t: Timesteps, s: Timesteps) -> tuple[Scale, Scale]:
    """What z and x0 are multiplied by in ``ddim_step``: sigma_s / sigma_t and alpha_s - alpha_t sigma_s / sigma_t."""
    alpha_t, sigma_t = alpha_sigma(schedule, t)
    alpha_s, sigma_s = alpha_sigma(schedule, s)
    # a root of the ratio, as XLA rounds a ratio of roots so that it is not 1 at s = t
    z_weight = jnp.sqrt(jnp.square(sigma_s) / jnp.square(sigma_t))
    return z_weight, alpha_s - z_weight * alpha_t


def _step(schedule, z, x0, x0_prev, t_prev, t, s):
    return ddim_step(schedule, z, x0, t, s)


DDIM = Solver(_step, uses_previous=False)
