"""The noising z = alpha x0 + sigma eps, and what a network's output says of x0 and eps.

An output is converted once, at the network's edge.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from mlcm_jax.diffusion.schedule import Schedule, alpha_sigma
from mlcm_jax.types import Latents, Timesteps

Scale = Float[Array, "n 1 1 1"] | Float[Array, ""]


class Prediction(NamedTuple):
    """Clean latents and noise that explain z together: z = alpha x0 + sigma eps."""

    x0: Latents
    eps: Latents


def _from_epsilon(output, z, alpha, sigma):
    return Prediction((z - sigma * output) / alpha, output)


def _from_v(output, z, alpha, sigma):
    return Prediction(alpha * z - sigma * output, sigma * z + alpha * output)


def _from_sample(output, z, alpha, sigma):
    return Prediction(output, (z - alpha * output) / sigma)


CONVERSIONS = {"epsilon": _from_epsilon, "v_prediction": _from_v, "sample": _from_sample}


def convert_output(prediction_type: str, output: Latents, z: Latents, alpha: Scale, sigma: Scale) -> Prediction:
    """Network output at noise level (alpha, sigma) -> (x0, eps), float32.

    v = alpha eps - sigma x0 (arXiv 2202.00512 appendix D).
    """
    return CONVERSIONS[prediction_type](output.astype(jnp.float32), z.astype(jnp.float32), alpha, sigma)


def predict_x0_eps(
    schedule: Schedule, output: Latents, z: Latents, timesteps: Timesteps, prediction_type: str = ""
) -> Prediction:
    """Network output for z at ``timesteps`` -> (x0, eps), float32. prediction_type: what it is; "": the schedule's."""
    alpha, sigma = alpha_sigma(schedule, timesteps)
    return convert_output(prediction_type or schedule.prediction_type, output, z, alpha, sigma)


def add_noise(schedule: Schedule, x0: Latents, noise: Latents, timesteps: Timesteps) -> Latents:
    """z_t = alpha_t x0 + sigma_t noise, float32."""
    alpha, sigma = alpha_sigma(schedule, timesteps)
    return alpha * x0.astype(jnp.float32) + sigma * noise.astype(jnp.float32)


def noise_further(schedule: Schedule, z: Latents, noise: Latents, t: Timesteps, s: Timesteps) -> Latents:
    """z at t noised on to s >= t, float32: what a noising to t becomes is a noising to s (arXiv 2006.11239 eq. 2)."""
    kept = (schedule.alphas_cumprod[s] / schedule.alphas_cumprod[t])[:, None, None, None]
    return jnp.sqrt(kept) * z.astype(jnp.float32) + jnp.sqrt(1 - kept) * noise.astype(jnp.float32)


def training_target(schedule: Schedule, x0: Latents, noise: Latents, timesteps: Timesteps) -> Latents:
    """The output that a perfect network has for z_t = alpha x0 + sigma noise, float32."""
    alpha, sigma = alpha_sigma(schedule, timesteps)
    x0, noise = x0.astype(jnp.float32), noise.astype(jnp.float32)
    targets = {"epsilon": noise, "v_prediction": alpha * noise - sigma * x0, "sample": x0}
    return targets[schedule.prediction_type]
