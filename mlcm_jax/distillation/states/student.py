"""Noised samples of the student itself, for consistency across segments (arXiv 2406.05768, stage 2)."""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mlcm_jax.distillation import segments
from mlcm_jax.distillation.states.base import Draws, SourceContext, States, StateSource
from mlcm_jax.distillation.trajectory import integrate
from mlcm_jax.rules import between, check_rules
from mlcm_jax.types import TrajectoryBuffer


class Student(StateSource):
    """The student samples in ``student_steps`` steps from other noise than the states are made with."""

    gives_clean = True
    stage_settings = ("student_steps",)

    def check(self, config: ConfigDict) -> None:
        check_rules(config, {"student_steps": between(1, segments.MAX_SEGMENTS)})

    def states(
        self, context: SourceContext, draws: Draws, buffer: TrajectoryBuffer | None
    ) -> tuple[States, TrajectoryBuffer | None]:
        num_steps = context.config.student_steps
        times = segments.boundaries(num_steps)[:, None]
        times = jnp.broadcast_to(times, (num_steps + 1, *draws.trajectory_step.shape))
        start = jax.random.normal(context.sample_key, draws.noise.shape)
        _, sample = integrate(context.student_x0, context.schedule, start, times, num_steps - 1)
        return context.noised(draws, sample), buffer
