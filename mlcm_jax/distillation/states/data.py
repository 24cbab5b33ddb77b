"""Noised latents of real images, as LCM has them (arXiv 2310.04378)."""

from ml_collections import ConfigDict

from mlcm_jax.distillation.states.base import Draws, SourceContext, States, StateSource
from mlcm_jax.rules import needs
from mlcm_jax.types import TrajectoryBuffer


class Data(StateSource):
    """A file of latents, one for each prompt."""

    reads_latents = True
    gives_clean = True

    def check(self, config: ConfigDict) -> None:
        needs(config, "latents", "make a file of them with launch/encode.py", because="states='data'")

    def states(
        self, context: SourceContext, draws: Draws, buffer: TrajectoryBuffer | None
    ) -> tuple[States, TrajectoryBuffer | None]:
        if draws.latents is None:
            raise ValueError("the states of 'data' need latents in the batch")
        return context.noised(draws, draws.latents), buffer
