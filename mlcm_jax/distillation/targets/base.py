"""What a target is: where the student's answers for two states of a trajectory are compared."""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array, Key
from ml_collections import ConfigDict

from mlcm_jax.diffusion.schedule import Schedule
from mlcm_jax.types import Latents, Timesteps


def _lower_boundary(key: Key[Array, ""], t_n: Timesteps, boundary: Timesteps) -> Timesteps:
    return boundary


class Target(NamedTuple):
    """consistency_function: (schedule, z, x0, t, boundary) -> the answer at (z, t), where x0 is the predicted clean
    latents. is_teachers_state: whether the teacher's short step ends where the consistency function is the
    identity, so that its state is the target and no network is asked. draw_end: (key, t_n, lower boundary of the
    segment) -> where the answers are compared, ``boundary`` for the consistency function and for all losses."""

    consistency_function: Callable[[Schedule, Latents, Latents, Timesteps, Timesteps], Latents]
    is_teachers_state: Callable[[ConfigDict], bool]
    draw_end: Callable[[Key[Array, ""], Timesteps, Timesteps], Timesteps] = _lower_boundary
