"""Compared at a time that is drawn within the segment: the trajectory segments of Hyper-SD (arXiv 2404.13686)."""

import jax
from jaxtyping import Array, Key

from mlcm_jax.distillation.targets.boundary import BOUNDARY
from mlcm_jax.types import Timesteps


def draw_end(key: Key[Array, ""], t_n: Timesteps, boundary: Timesteps) -> Timesteps:
    """Uniform over boundary <= t <= t_n, so that the teacher's state at t_n may be the target itself.

    The student is not told: it goes there along the clean latents that it predicts (arXiv 2404.13686).
    """
    return jax.random.randint(key, t_n.shape, boundary, t_n + 1)


WITHIN_SEGMENT = BOUNDARY._replace(draw_end=draw_end)
