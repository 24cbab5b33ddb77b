"""Compared at the lower boundary of the segment: the multistep consistency function."""

import jax.numpy as jnp
from ml_collections import ConfigDict

from mlcm_jax.diffusion.schedule import Schedule
from mlcm_jax.diffusion.scheduler_config import NUM_TRAIN_TIMESTEPS
from mlcm_jax.diffusion.solvers import ddim_step
from mlcm_jax.distillation.targets.base import Target
from mlcm_jax.types import Latents, Timesteps


def to_boundary(schedule: Schedule, z: Latents, x0: Latents, t: Timesteps, boundary: Timesteps) -> Latents:
    """g(z, t, boundary): follow the student's clean latents x0, predicted at (z, t), to the segment's lower boundary.

    At t = boundary it is the identity, exactly: the boundary condition (arXiv 2406.05768; 2403.06807, sec. 3).
    """
    return jnp.where((t == boundary)[:, None, None, None], z, ddim_step(schedule, z, x0, t, boundary))


def _teacher_goes_to_the_boundary(config: ConfigDict) -> bool:
    return config.skip >= NUM_TRAIN_TIMESTEPS


BOUNDARY = Target(to_boundary, _teacher_goes_to_the_boundary)
