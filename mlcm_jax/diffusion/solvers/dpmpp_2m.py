"""DPM-Solver++ 2M (arXiv 2211.01095): second order with one evaluation a step, by the prediction of the one before."""

import jax.numpy as jnp

from mlcm_jax.diffusion.schedule import Scale, Schedule, alpha_sigma
from mlcm_jax.diffusion.solvers.base import Solver
from mlcm_jax.diffusion.solvers.ddim import ddim_weights
from mlcm_jax.types import Latents, Timesteps


def dpmpp_2m_step(
    schedule: Schedule, z: Latents, x0: Latents, x0_prev: Latents, t_prev: Timesteps, t: Timesteps, s: Timesteps
) -> Latents:
    """Second-order multistep from t to s, with x0_prev predicted at t_prev > t (arXiv 2211.01095 alg. 2).

    Where t_prev == t there is no earlier prediction and the step is first order, which is DDIM.
    """
    z_weight, x0_weight = ddim_weights(schedule, t, s)
    lambda_prev, lambda_t, lambda_s = (_half_log_snr(schedule, u) for u in (t_prev, t, s))
    first_order = (t_prev == t)[:, None, None, None]
    last_width = jnp.where(first_order, 1.0, lambda_t - lambda_prev)
    slope = jnp.where(first_order, 0.0, 0.5 * (lambda_s - lambda_t) / last_width)
    x0, x0_prev = x0.astype(jnp.float32), x0_prev.astype(jnp.float32)
    return z_weight * z.astype(jnp.float32) + x0_weight * (x0 + slope * (x0 - x0_prev))


def _half_log_snr(schedule: Schedule, t: Timesteps) -> Scale:
    alpha, sigma = alpha_sigma(schedule, t)
    return jnp.log(alpha) - jnp.log(sigma)


DPMPP_2M = Solver(dpmpp_2m_step, uses_previous=True)
