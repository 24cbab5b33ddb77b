"""What a target is: where the student's answers for two states of a trajectory are compared."""

from collections.abc import Callable
from typing import NamedTuple

from ml_collections import ConfigDict

from mlcm_jax.diffusion.schedule import Schedule
from mlcm_jax.types import Latents, Timesteps


class Target(NamedTuple):
    """consistency_function: (schedule, z, x0, t, boundary) -> the answer at (z, t), where x0 is the predicted clean
    latents. is_teachers_state: whether the teacher's short step ends where the consistency function is the
    identity, so that its state is the target and no network is asked."""

    consistency_function: Callable[[Schedule, Latents, Latents, Timesteps, Timesteps], Latents]
    is_teachers_state: Callable[[ConfigDict], bool]
