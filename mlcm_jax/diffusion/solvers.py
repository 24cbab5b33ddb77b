"""Single steps of the probability flow ODE between traced integer timesteps; all arithmetic is float32."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from mlcm_jax.diffusion.schedule import Scale, Schedule, alpha_sigma
from mlcm_jax.types import Timesteps

Latents = Float[Array, "n h w c"]


def ddim_step(schedule: Schedule, z: Latents, x0: Latents, t: Timesteps, s: Timesteps) -> Latents:
    """Jump from t to s along the direction that x0 implies: alpha_s x0 + sigma_s (z - alpha_t x0) / sigma_t.

    At s = t this is z, to the bit. sigma_t > 0 at every timestep of a valid schedule. (arXiv 2010.02502 eq. 12)
    """
    z_weight, x0_weight = _ddim_weights(schedule, t, s)
    return z_weight * z.astype(jnp.float32) + x0_weight * x0.astype(jnp.float32)


def dpmpp_2m_step(
    schedule: Schedule, z: Latents, x0: Latents, x0_prev: Latents, t_prev: Timesteps, t: Timesteps, s: Timesteps
) -> Latents:
    """Second-order multistep jump from t to s, with x0_prev predicted at t_prev > t (arXiv 2211.01095 alg. 2).

    Where t_prev == t there is no earlier prediction and the step is first order, which is DDIM.
    """
    z_weight, x0_weight = _ddim_weights(schedule, t, s)
    lambda_prev, lambda_t, lambda_s = (_half_log_snr(schedule, u) for u in (t_prev, t, s))
    first_order = (t_prev == t)[:, None, None, None]
    last_width = jnp.where(first_order, 1.0, lambda_t - lambda_prev)
    slope = jnp.where(first_order, 0.0, 0.5 * (lambda_s - lambda_t) / last_width)
    x0, x0_prev = x0.astype(jnp.float32), x0_prev.astype(jnp.float32)
    return z_weight * z.astype(jnp.float32) + x0_weight * (x0 + slope * (x0 - x0_prev))


def _ddim_weights(schedule: Schedule, t: Timesteps, s: Timesteps) -> tuple[Scale, Scale]:
    alpha_t, sigma_t = alpha_sigma(schedule, t)
    alpha_s, sigma_s = alpha_sigma(schedule, s)
    # a root of the ratio, as XLA rounds a ratio of roots so that it is not 1 at s = t
    z_weight = jnp.sqrt(jnp.square(sigma_s) / jnp.square(sigma_t))
    return z_weight, alpha_s - z_weight * alpha_t


def _half_log_snr(schedule: Schedule, t: Timesteps) -> Scale:
    alpha, sigma = alpha_sigma(schedule, t)
    return jnp.log(alpha) - jnp.log(sigma)
