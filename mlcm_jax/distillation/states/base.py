"""What a source of training states is: a part on the host, which says where each example of a step lies, and a part on
the devices, which makes the states."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key
from ml_collections import ConfigDict

from mlcm_jax import rng
from mlcm_jax.diffusion.parameterization import add_noise
from mlcm_jax.diffusion.schedule import Schedule
from mlcm_jax.diffusion.scheduler_config import LAST_TIMESTEP
from mlcm_jax.diffusion.solvers import SOLVERS, Solver
from mlcm_jax.distillation import segments
from mlcm_jax.distillation.trajectory import PredictX0, equal_steps, integrate
from mlcm_jax.types import Latents, Timesteps, TrajectoryBuffer


class States(NamedTuple):
    """A state z_m at t_m, the teacher's state z_n a short step on at t_n, and the lower boundary of their segment.

    clean: the latents that were noised to make the state; None for states of trajectories, which begin at noise.
    """

    z_m: Latents
    t_m: Timesteps
    z_n: Latents
    t_n: Timesteps
    boundary: Timesteps
    clean: Latents | None = None


class Draws(NamedTuple):
    """What a step has for each example. trajectory_step: the teacher's solver steps from pure noise to the state; 0 is
    the noise itself. latents: clean ones, scaled, of images."""

    trajectory_step: Int[Array, " n"]
    num_segments: Int[Array, ""]
    noise: Latents
    latents: Latents | None = None


class Placement(NamedTuple):
    """Where the examples of a step lie, on the host. trajectory_step: as in ``Draws``. prompts: positions in the
    stage's stream of prompts."""

    trajectory_step: Int[np.ndarray, " n"]
    prompts: Int[np.ndarray, " n"]


@dataclasses.dataclass(frozen=True)
class SourceContext:
    """What a source may call. teacher_x0: guided, or of the student before. student_x0: without gradient. timestep_key:
    of this step's timesteps. sample_key: of the noise that the student's own samples start from, and by its name of
    further noise. step: finished updates."""

    schedule: Schedule
    config: ConfigDict
    teacher_x0: PredictX0
    student_x0: PredictX0
    timestep_key: Key[Array, ""]
    sample_key: Key[Array, ""]
    step: segments.IntLike = 0

    def segment(self, trajectory_step: Int[Array, " n"]) -> Int[Array, " n"]:
        """Where a state lies after that many steps."""
        return jnp.maximum(trajectory_step - segments.steps_to_first_segment(self.config.timesteps), 0)

    def draw_timesteps(self, segment: Int[Array, " n"], num_segments: Int[Array, ""]) -> Timesteps:
        """t_m in each example's segment: anywhere, at its upper boundary, or at one of a finer grid."""
        if self.config.timesteps == "milestones":
            return segments.segment_boundaries(segment, num_segments)[0]
        if self.config.timesteps == "grid":
            return segments.draw_from_grid(self.timestep_key, segment, num_segments, self.config.grid)
        return segments.draw_timesteps(self.timestep_key, segment, num_segments)

    def short_step(self, draws: Draws, t_m: Timesteps) -> tuple[Timesteps, Timesteps]:
        """t_n and the boundary for states in the examples' segments."""
        _, boundary = segments.segment_boundaries(self.segment(draws.trajectory_step), draws.num_segments)
        if self.config.timesteps == "grid":
            grid = self.config.grid
            return segments.segment_boundaries(segments.segment_of(t_m, grid), grid)[1], boundary
        return segments.short_step(t_m, segments.annealed_skip(self.config, self.step), boundary), boundary

    def target_solver(self, clean: Latents | None = None) -> Solver:
        """Of the teacher's short step. clean: the clean latents of the states, where there are any."""
        return SOLVERS[self.config.target_solver].knowing(clean).with_strength(self.config.target_noise)

    def target_times(self, draws: Draws, t_m: Timesteps, t_n: Timesteps) -> Int[Array, "times n"]:
        """The timesteps of ``solver_steps`` equal steps from t_m to t_n, both included. A student before that goes
        through a whole segment takes the steps that it was trained on, to a timestep."""
        num_steps = self.config.solver_steps
        if self.config.teacher_network == "previous" and self.config.timesteps == "milestones":
            first = self.segment(draws.trajectory_step) * num_steps
            steps = [
                segments.segment_boundaries(first + i, draws.num_segments * num_steps)[0] for i in range(num_steps)
            ]
            return jnp.stack([*steps, t_n])
        return equal_steps(t_m, t_n, num_steps, num_steps + 1)

    def teacher_step(self, draws: Draws, z: Latents, t_m: Timesteps, t_n: Timesteps, clean: Latents) -> Latents:
        """Psi: from t_m to t_n in ``solver_steps`` guided steps of the target's solver."""
        num_steps, solver = self.config.solver_steps, self.target_solver(clean)
        times, key = self.target_times(draws, t_m, t_n), rng.named(self.sample_key, "target_solver")
        ends = integrate(self.teacher_x0, self.schedule, z, times, 0, num_steps, target_solver=solver, noise_key=key)
        return ends[1]

    def noised(self, draws: Draws, latents: Latents) -> States:
        """States of clean latents that are noised to the drawn timesteps."""
        t_m = self.draw_timesteps(self.segment(draws.trajectory_step), draws.num_segments)
        t_n, boundary = self.short_step(draws, t_m)
        noise = self._with_offset(draws.noise)
        z_m = add_noise(self.schedule, latents, noise, t_m)
        if self.config.pure_noise:
            z_m = jnp.where((t_m == LAST_TIMESTEP)[:, None, None, None], noise, z_m)
        return States(z_m, t_m, self.teacher_step(draws, z_m, t_m, t_n, latents), t_n, boundary, latents)

    def _with_offset(self, noise: Latents) -> Latents:
        """Noise whose mean, of each channel of an example, is moved by ``noise_offset`` times a normal number."""
        if not self.config.noise_offset:
            return noise
        key, (n, *_, channels) = rng.named(self.sample_key, "noise_offset"), noise.shape
        return noise + self.config.noise_offset * jax.random.normal(key, (n, 1, 1, channels))


class StateSource:
    """The defaults are those of a source without memory whose batch lies in all segments.

    uses_buffer: whether it keeps a live trajectory for each example. reads_latents: whether the batch must carry clean
    latents of images. gives_clean: whether its states have clean latents, as a discriminator needs them.
    makes_target: whether z_n is a step of the teacher's on from z_m; the consistency loss needs it. stage_settings: its
    settings that may change from stage to stage.
    """

    uses_buffer: bool = False
    reads_latents: bool = False
    gives_clean: bool = False
    makes_target: bool = True
    stage_settings: tuple[str, ...] = ()

    def check(self, config: ConfigDict) -> None:
        """Raise UserError for settings that cannot work with this source."""

    def states(
        self, context: SourceContext, draws: Draws, buffer: TrajectoryBuffer | None
    ) -> tuple[States, TrajectoryBuffer | None]:
        """The training states of a step and the buffer for the next one; traced."""
        raise NotImplementedError

    def placement(self, config: ConfigDict, step: int, start: int) -> Placement:
        """The examples of ``step`` (0: the first of the stage). start: of the stage in the run. A pure function.

        Here: examples in all segments side by side, each equally often.
        """
        position = step * config.batch_size + np.arange(config.batch_size)
        first = segments.steps_to_first_segment(config.timesteps)
        return Placement(first + position % config.num_segments, position)

    def trajectory_length(self, config: ConfigDict) -> int:
        """Steps that an example stays with its prompt."""
        return 1

    def takes_new_prompt(self, trajectory_step: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        """Which examples take a prompt that the step before did not have."""
        return np.ones(len(trajectory_step), bool)

    def average_loop_trips(self, config: ConfigDict) -> float:
        """Turns of a loop in ``states`` whose length is traced, on average over all segments, for counting FLOPs."""
        return 1.0
