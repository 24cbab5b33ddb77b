"""Steps that add fresh noise and keep the marginals: DDIM with eta (arXiv 2010.02502) and ER-SDE (2309.06169)."""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp

from mlcm_jax.diffusion.schedule import Scale, Schedule, alpha_sigma
from mlcm_jax.diffusion.solvers.base import Solver
from mlcm_jax.types import Latents, Timesteps


def stochastic_step(
    schedule: Schedule, z: Latents, x0: Latents, t: Timesteps, s: Timesteps, noise: Latents, added: Scale
) -> Latents:
    """From t to s: alpha_s x0 + sqrt(sigma_s^2 - added^2) eps + added noise, eps the noise that z and x0 imply.

    Whatever ``added`` is, up to sigma_s, the noise at s has the variance sigma_s^2; without it this is DDIM.
    (arXiv 2010.02502, eq. 12)
    """
    alpha_t, sigma_t = alpha_sigma(schedule, t)
    alpha_s, sigma_s = alpha_sigma(schedule, s)
    z_weight = jnp.sqrt((jnp.square(sigma_s) - jnp.square(added)) / jnp.square(sigma_t))
    return z_weight * z.astype(jnp.float32) + (alpha_s - z_weight * alpha_t) * x0.astype(jnp.float32) + added * noise


def added_noise(schedule: Schedule, t: Timesteps, s: Timesteps, growth: Callable[[Scale], Scale]) -> Scale:
    """sigma_s sqrt(1 - (g(l_s) / g(l_t))^2), where l = sigma / alpha and g is ``growth``; 0 at s = t.

    In ER-SDE's terms phi(l) = l g(l) scales the noise, and l_s^2 - l_t^2 (phi(l_s) / phi(l_t))^2 is its variance before
    alpha_s. (arXiv 2309.06169) At l = infinity, which a zero terminal SNR has, all of the noise is fresh.
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(schedule, t), alpha_sigma(schedule, s)
    kept = growth(sigma_s / alpha_s) / growth(sigma_t / alpha_t)
    return jnp.where((t == s)[:, None, None, None], 0.0, sigma_s * jnp.sqrt(1 - jnp.square(kept)))


def ddim_growth(ratio: Scale) -> Scale:
    """g(l) = l, phi(l) = l^2: the reverse SDE of DDPM, which is DDIM with eta = 1."""
    return ratio


def er_sde_growth(ratio: Scale) -> Scale:
    """g(l) = exp(l^0.3) + 10: less noise the less there is, ER-SDE's own choice. (arXiv 2309.06169)"""
    return jnp.exp(ratio**0.3) + 10


def _step(schedule, z, x0, x0_prev, t_prev, t, s, *, noise, strength, growth):
    return stochastic_step(schedule, z, x0, t, s, noise, strength * added_noise(schedule, t, s, growth))


DDIM_SDE = Solver(partial(_step, growth=ddim_growth), uses_previous=False, adds_noise=True)
ER_SDE = Solver(partial(_step, growth=er_sde_growth), uses_previous=False, adds_noise=True)
