"""Where training states come from: one signature, a table of sources, chosen by ``config.states``.

Every source answers with a state z_m at t_m, the teacher's state z_n a short step on at t_n, and the edge of the
segment that both lie in.

streaming: one state after another of live trajectories; one guided teacher evaluation an example.
mds: the multistep denoising strategy, a new trajectory for each state (arXiv 2406.05768, sec. 4).
data: noised latents of real images, as LCM (arXiv 2310.04378).
student: noised samples of the student itself, for consistency across segments (arXiv 2406.05768, stage 2).
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key
from ml_collections import ConfigDict

from mlcm_jax.diffusion.parameterization import add_noise
from mlcm_jax.diffusion.schedule import Schedule
from mlcm_jax.diffusion.solvers import ddim_step, dpmpp_2m_step
from mlcm_jax.distillation import segments
from mlcm_jax.distillation.segments import LAST_TIMESTEP
from mlcm_jax.distillation.trajectory import PredictX0, denoising_timesteps, equal_jumps, walk
from mlcm_jax.types import Latents, Pool, Timesteps


class States(NamedTuple):
    """A state, the teacher's state ``skip`` timesteps on, and the lower edge of their segment.

    clean: the latents that were noised to make the state; None for states of trajectories, which begin at noise.
    """

    z_m: Latents
    t_m: Timesteps
    z_n: Latents
    t_n: Timesteps
    edge: Timesteps
    clean: Latents | None = None


class Rows(NamedTuple):
    """What a step draws for each row. jumps: the teacher's jumps from pure noise to the state; 0 is the noise itself.
    latents: clean ones, scaled, for "data"."""

    jumps: Int[Array, " n"]
    num_segments: Int[Array, ""]
    noise: Latents
    latents: Latents | None = None


@dataclasses.dataclass(frozen=True)
class Source:
    """What a source may call. teacher_x0: guided. student_x0: without gradient. timestep_key: of this step's timesteps.
    sample_key: of the noise that the student's own samples start from."""

    schedule: Schedule
    config: ConfigDict
    teacher_x0: PredictX0
    student_x0: PredictX0
    timestep_key: Key[Array, ""]
    sample_key: Key[Array, ""]

    def segment(self, jumps: Int[Array, " n"]) -> Int[Array, " n"]:
        """Where a state lies after that many jumps."""
        return jnp.maximum(jumps - segments.jumps_to_first_segment(self.config.timesteps), 0)

    def draw_timesteps(self, segment: Int[Array, " n"], num_segments: Int[Array, ""]) -> Timesteps:
        """t_m in each row's segment: anywhere, or at its upper edge."""
        if self.config.timesteps == "milestones":
            return segments.segment_edges(segment, num_segments)[0]
        return segments.draw_timesteps(self.timestep_key, segment, num_segments)

    def short_step(self, rows: Rows, t_m: Timesteps) -> tuple[Timesteps, Timesteps]:
        """t_n and the edge for states in the rows' segments."""
        _, edge = segments.segment_edges(self.segment(rows.jumps), rows.num_segments)
        return segments.short_step(t_m, self.config.skip, edge), edge

    def teacher_step(self, z: Latents, t_m: Timesteps, t_n: Timesteps) -> Latents:
        """Psi: from t_m to t_n in ``solver_steps`` guided DDIM steps."""
        num_steps = self.config.solver_steps
        times = equal_jumps(t_m, t_n, num_steps, num_steps + 1)
        return walk(self.teacher_x0, self.schedule, z, times, 0, num_steps)[1]


def streaming(source: Source, rows: Rows, pool: Pool | None) -> tuple[States, Pool]:
    """The teacher's one prediction at (z_m, t_m) serves the short step to t_n and the jump to the row's next state."""
    if pool is None:
        raise ValueError("streaming needs a pool: distillation.state.create(..., pool=empty_pool(...))")
    fresh = rows.jumps == 0
    t_m = jnp.where(fresh, LAST_TIMESTEP, pool.t)
    z_m = jnp.where(fresh[:, None, None, None], rows.noise, pool.z)
    t_n, edge = source.short_step(rows, t_m)
    x0 = source.teacher_x0(z_m, t_m)

    num_steps = source.config.solver_steps
    times = equal_jumps(t_m, t_n, num_steps, num_steps + 1)
    z_n = ddim_step(source.schedule, z_m, x0, t_m, times[1])
    if num_steps > 1:
        z_n = walk(source.teacher_x0, source.schedule, z_n, times[1:], 0, num_steps - 1)[1]

    # A row whose trajectory ends here draws a last, unused jump: the next step starts it afresh.
    following = jnp.minimum(source.segment(rows.jumps + 1), rows.num_segments - 1)
    t_next = jnp.minimum(source.draw_timesteps(following, rows.num_segments), t_m - 1)
    if source.config.trajectory_solver == "dpmpp_2m":
        t_prev = jnp.where(fresh, t_m, pool.t_prev)
        z_next = dpmpp_2m_step(source.schedule, z_m, x0, pool.x0_prev, t_prev, t_m, t_next)
    else:
        z_next = ddim_step(source.schedule, z_m, x0, t_m, t_next)
    # Where both lead to the same timestep, the smaller steps were the more exact ones.
    z_next = jnp.where((t_next == t_n)[:, None, None, None], z_n, z_next)
    return States(z_m, t_m, z_n, t_n, edge), Pool(z_next, t_next, x0, t_m)


def mds(source: Source, rows: Rows, pool: Pool | None) -> tuple[States, Pool | None]:
    """A trajectory from pure noise for each state; all rows take the same number of jumps, those of the first."""
    t_m = source.draw_timesteps(source.segment(rows.jumps), rows.num_segments)
    t_n, edge = source.short_step(rows, t_m)
    num_jumps, substeps = rows.jumps[0], source.config.solver_steps
    times = denoising_timesteps(t_m, t_n, num_jumps, segments.MAX_SEGMENTS, substeps)
    second_order = source.config.trajectory_solver == "dpmpp_2m"
    z_m, z_n = walk(
        source.teacher_x0, source.schedule, rows.noise, times, num_jumps, substeps, second_order=second_order
    )
    return States(z_m, t_m, z_n, t_n, edge), pool


def _noised(source: Source, rows: Rows, latents: Latents) -> States:
    t_m = source.draw_timesteps(source.segment(rows.jumps), rows.num_segments)
    t_n, edge = source.short_step(rows, t_m)
    z_m = add_noise(source.schedule, latents, rows.noise, t_m)
    return States(z_m, t_m, source.teacher_step(z_m, t_m, t_n), t_n, edge, latents)


def data(source: Source, rows: Rows, pool: Pool | None) -> tuple[States, Pool | None]:
    """Noised latents of images."""
    if rows.latents is None:
        raise ValueError("the states of 'data' need latents in the batch")
    return _noised(source, rows, rows.latents), pool


def student(source: Source, rows: Rows, pool: Pool | None) -> tuple[States, Pool | None]:
    """Noised samples that the student draws in ``student_steps`` steps from other noise."""
    num_steps = source.config.student_steps
    times = jnp.broadcast_to(segments.edges(num_steps)[:, None], (num_steps + 1, *rows.jumps.shape))
    start = jax.random.normal(source.sample_key, rows.noise.shape)
    _, sample = walk(source.student_x0, source.schedule, start, times, num_steps - 1)
    return _noised(source, rows, sample), pool


Draw = Callable[[Source, Rows, Pool | None], tuple[States, Pool | None]]
SOURCES: dict[str, Draw] = {"streaming": streaming, "mds": mds, "data": data, "student": student}


def empty_pool(n: int, latent_shape: tuple[int, int, int]) -> Pool:
    """A pool before the first step, when every row starts from fresh noise."""
    z, t = jnp.zeros((n, *latent_shape)), jnp.zeros(n, jnp.int32)
    return Pool(z, t, z, t)
