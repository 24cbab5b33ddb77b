"""The multistep denoising strategy: a new trajectory for each state (arXiv 2406.05768, sec. 4)."""

import numpy as np
from ml_collections import ConfigDict

from mlcm_jax.diffusion.solvers import SOLVERS
from mlcm_jax.distillation import segments
from mlcm_jax.distillation.states.base import Draws, Placement, SourceContext, States, StateSource
from mlcm_jax.distillation.trajectory import integrate, trajectory_timesteps
from mlcm_jax.types import TrajectoryBuffer

_SEGMENTS = 2  # stream of numpy generators


class MultistepDenoising(StateSource):
    """From pure noise for each state; all examples take the same number of steps, that of the first."""

    def states(
        self, context: SourceContext, draws: Draws, buffer: TrajectoryBuffer | None
    ) -> tuple[States, TrajectoryBuffer | None]:
        t_m = context.draw_timesteps(context.segment(draws.trajectory_step), draws.num_segments)
        t_n, boundary = context.short_step(draws, t_m)
        num_steps, substeps = draws.trajectory_step[0], context.config.solver_steps
        times = trajectory_timesteps(t_m, t_n, num_steps, segments.MAX_SEGMENTS, substeps)
        solver = SOLVERS[context.config.trajectory_solver]
        z_m, z_n = integrate(
            context.teacher_x0,
            context.schedule,
            draws.noise,
            times,
            num_steps,
            substeps,
            solver=solver,
            target_solver=context.target_solver(),
        )
        return States(z_m, t_m, z_n, t_n, boundary), buffer

    def placement(self, config: ConfigDict, step: int, start: int) -> Placement:
        """The whole batch in one segment, as none should wait for longer trajectories; M steps visit all."""
        num_segments, n = config.num_segments, config.batch_size
        block, place = divmod(step, num_segments)
        order = np.random.default_rng([config.seed, _SEGMENTS, start, block]).permutation(num_segments)
        first = segments.steps_to_first_segment(config.timesteps)
        return Placement(np.full(n, first + order[place]), step * n + np.arange(n))

    def average_loop_trips(self, config: ConfigDict) -> float:
        first = segments.steps_to_first_segment(config.timesteps)
        return first + (config.num_segments - 1) / 2 + config.solver_steps
