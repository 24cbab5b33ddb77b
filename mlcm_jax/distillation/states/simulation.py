"""The student's own states on its way through sampling: backward simulation (DMD2, arXiv 2405.14867, sec. 4.5)."""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mlcm_jax.diffusion.parameterization import add_noise
from mlcm_jax.distillation import segments
from mlcm_jax.distillation.states.base import Draws, SourceContext, States
from mlcm_jax.distillation.states.mds import MultistepDenoising
from mlcm_jax.errors import UserError
from mlcm_jax.rules import check_rules, needs, one_of
from mlcm_jax.types import TrajectoryBuffer


class Simulation(MultistepDenoising):
    """From noise through the student's earlier steps: it predicts x0, which fresh noise carries to the next boundary,
    as LCMScheduler samples. All examples have taken the same number of steps. There is no teacher's step, no target."""

    makes_target = False

    def check(self, config: ConfigDict) -> None:
        check_rules(config, {"timesteps": one_of("milestones")})
        if config.consistency.weight > 0:
            raise UserError(
                f"config.states={config.states!r} makes no target: set config.consistency.weight=0 and the weight of "
                "another loss."
            )

    def states(
        self, context: SourceContext, draws: Draws, buffer: TrajectoryBuffer | None
    ) -> tuple[States, TrajectoryBuffer | None]:
        def upper(segment):
            return jnp.broadcast_to(segments.segment_boundaries(segment, draws.num_segments)[0], (len(draws.noise),))

        def step(i, z):
            x0 = context.student_x0(z, upper(i))
            fresh = jax.random.normal(jax.random.fold_in(context.sample_key, i), z.shape)
            return add_noise(context.schedule, x0, fresh, upper(i + 1))

        segment = context.segment(draws.trajectory_step)
        z = jax.lax.fori_loop(0, segment[0], step, draws.noise)
        t, boundary = segments.segment_boundaries(segment, draws.num_segments)
        return States(z, t, z, t, boundary, draws.latents), buffer

    def average_loop_trips(self, config: ConfigDict) -> float:
        return (config.num_segments - 1) / 2


class SimulationWithData(Simulation):
    """The same states with clean latents of images beside them, for a discriminator."""

    reads_latents = True
    gives_clean = True

    def check(self, config: ConfigDict) -> None:
        super().check(config)
        needs(config, "latents", "make a file of them with launch/encode.py", because=f"states={config.states!r}")
