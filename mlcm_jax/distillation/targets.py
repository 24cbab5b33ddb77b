"""The multistep consistency function: one jump from anywhere in a segment to its target."""

from collections.abc import Callable

import jax.numpy as jnp

from mlcm_jax.diffusion.schedule import Schedule
from mlcm_jax.diffusion.solvers import ddim_step
from mlcm_jax.types import Latents, Timesteps


def jump_to_edge(schedule: Schedule, z: Latents, x0: Latents, t: Timesteps, edge: Timesteps) -> Latents:
    """g(z, t, edge): follow the student's clean latents x0, predicted at (z, t), to the segment's lower edge.

    At t = edge it is the identity, exactly: that is the boundary condition (arXiv 2406.05768; 2403.06807, sec. 3).
    """
    return jnp.where((t == edge)[:, None, None, None], z, ddim_step(schedule, z, x0, t, edge))


def jump_to_x0(schedule: Schedule, z: Latents, x0: Latents, t: Timesteps, edge: Timesteps) -> Latents:
    """f(z, t): the student's clean latents, wherever the segment ends (LCM, arXiv 2310.04378; MLCM's stage 2).

    At t = 0 it is the identity. LCM reaches that by weights that are 1 and 0 to 1e-5 from t = 20 on.
    """
    return jnp.where((t == 0)[:, None, None, None], z, x0)


Jump = Callable[[Schedule, Latents, Latents, Timesteps, Timesteps], Latents]
JUMPS: dict[str, Jump] = {"edge": jump_to_edge, "x0": jump_to_x0}
