"""One state after another of live trajectories: one guided teacher evaluation an example."""

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mlcm_jax.diffusion.scheduler_config import LAST_TIMESTEP
from mlcm_jax.diffusion.solvers import SOLVERS
from mlcm_jax.distillation import segments
from mlcm_jax.distillation.states.base import Draws, Placement, SourceContext, States, StateSource
from mlcm_jax.distillation.trajectory import integrate
from mlcm_jax.types import TrajectoryBuffer


class Streaming(StateSource):
    """The trajectories of all examples are under way at different places; a finished one begins anew from noise."""

    uses_buffer = True

    def states(
        self, context: SourceContext, draws: Draws, buffer: TrajectoryBuffer | None
    ) -> tuple[States, TrajectoryBuffer]:
        """The teacher's one prediction at (z_m, t_m) serves the short step to t_n and the step to the next state."""
        if buffer is None:
            raise ValueError("streaming needs a trajectory buffer: create the state with empty_buffer(...)")
        config, schedule, solver = context.config, context.schedule, SOLVERS[context.config.trajectory_solver]
        fresh = draws.trajectory_step == 0
        t_m = jnp.where(fresh, LAST_TIMESTEP, buffer.t)
        z_m = jnp.where(fresh[:, None, None, None], draws.noise, buffer.z)
        t_n, boundary = context.short_step(draws, t_m)
        x0 = context.teacher_x0(z_m, t_m)

        num_steps, times = config.solver_steps, context.target_times(draws, t_m, t_n)
        short = context.target_solver()
        z_n = short.step(schedule, z_m, x0, x0, t_m, t_m, times[1])
        if num_steps > 1:
            z_n = integrate(context.teacher_x0, schedule, z_n, times[1:], 0, num_steps - 1, target_solver=short)[1]

        # A trajectory that ends here has a last, unused step: the next training step starts it afresh.
        following = jnp.minimum(context.segment(draws.trajectory_step + 1), draws.num_segments - 1)
        t_next = jnp.minimum(context.draw_timesteps(following, draws.num_segments), t_m - 1)
        t_prev = jnp.where(fresh, t_m, buffer.t_prev)
        z_next = solver.step(schedule, z_m, x0, buffer.x0_prev, t_prev, t_m, t_next)
        # Where both lead to the same timestep, the smaller steps were the more exact ones.
        z_next = jnp.where((t_next == t_n)[:, None, None, None], z_n, z_next)
        return States(z_m, t_m, z_n, t_n, boundary), TrajectoryBuffer(z_next, t_next, x0, t_m)

    def placement(self, config: ConfigDict, step: int, start: int) -> Placement:
        """Example j's trajectory ends j steps (modulo its length) early the first time: afterwards every place is
        equally often in a batch."""
        length = self.trajectory_length(config)
        example = np.arange(config.batch_size)
        turn = step + example % length
        return Placement(np.minimum(step, turn % length), turn // length * len(example) + example)

    def trajectory_length(self, config: ConfigDict) -> int:
        """M + 1 states, the noise and one in each segment, or M at milestones, where the noise is the first one's."""
        return config.num_segments + segments.steps_to_first_segment(config.timesteps)

    def takes_new_prompt(self, trajectory_step):
        return trajectory_step == 0


def empty_buffer(n: int, latent_shape: tuple[int, int, int]) -> TrajectoryBuffer:
    """A buffer before the first step, when every example starts from fresh noise."""
    z, t = jnp.zeros((n, *latent_shape)), jnp.zeros(n, jnp.int32)
    return TrajectoryBuffer(z, t, z, t)
