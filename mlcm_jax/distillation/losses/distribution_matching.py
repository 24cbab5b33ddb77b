"""Distribution matching without data (DMD, arXiv 2311.18828; DMD2, arXiv 2405.14867).

The student's clean latents are noised again. Where the teacher and a network that knows the student's own
distribution (the fake score) disagree about what they were, the student moves towards the teacher's answer.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mlcm_jax.diffusion.parameterization import training_target
from mlcm_jax.diffusion.schedule import Schedule
from mlcm_jax.types import Latents, Timesteps

EXAMPLE = (1, 2, 3)  # axes of one example
LOWEST, HIGHEST = 20, 980  # timesteps of the renoising: 2 to 98 % of them, as the paper's


def matching_loss(x0: Latents, real_x0: Latents, fake_x0: Latents) -> Float[Array, " n"]:
    """A loss whose gradient in x0 is (fake_x0 - real_x0) / mean |x0 - real_x0| / elements (arXiv 2311.18828, eq. 7, 8).

    real_x0, fake_x0: what teacher and fake score say of the renoised x0.
    """
    size = jnp.abs(x0 - real_x0).mean(axis=EXAMPLE, keepdims=True)
    target = x0 - (fake_x0 - real_x0) / jnp.maximum(size, 1e-6)
    return 0.5 * jnp.square(x0 - jax.lax.stop_gradient(target)).mean(axis=EXAMPLE)


def fake_score_loss(
    schedule: Schedule, output: Latents, x0: Latents, noise: Latents, timesteps: Timesteps
) -> Float[Array, " n"]:
    """The diffusion loss by which the fake score learns the student's distribution.

    output: its own prediction for x0 noised with ``noise`` to ``timesteps``, of the schedule's prediction type.
    """
    target = training_target(schedule, jax.lax.stop_gradient(x0), noise, timesteps)
    return jnp.square(output.astype(jnp.float32) - target).mean(axis=EXAMPLE)
