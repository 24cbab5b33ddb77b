"""The batches of a run: which prompts, which places on trajectories, and the program of the stage they belong to."""

from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from mlcm_jax import sharding
from mlcm_jax.conditioning import encode_prompts
from mlcm_jax.data.latents import LatentFile
from mlcm_jax.data.prompts import shuffled
from mlcm_jax.hub.pipeline import Pipeline
from mlcm_jax.train.agenda import rows_at
from mlcm_jax.train.program import Program, StageProgram
from mlcm_jax.train.stages import stage_at
from mlcm_jax.types import Batch


class Fed(NamedTuple):
    """A batch, and the stage whose step takes it."""

    stage: StageProgram
    batch: Batch


class Feed:
    """The batch of any step (0 for the first), as a pure function of the step.

    latents: of the prompts, in their order, for stages whose states are made of data.
    """

    def __init__(self, program: Program, pipeline: Pipeline, prompts: list[str], latents: LatentFile | None):
        self._program, self._pipeline, self._prompts, self._latents = program, pipeline, prompts, latents
        self._stages = tuple(program.stage for program in program.stages)

    def __call__(self, step: int) -> Fed:
        config, rows = self._program.config, rows_at(self._stages, step)
        stage = self._program.stages[stage_at(self._stages, step)]
        numbers = shuffled(rows.prompts, len(self._prompts), config.seed)
        prompts = [self._prompts[i] for i in numbers]
        put = partial(jax.device_put, device=sharding.batch_sharding(self._program.mesh))
        one = stage.batch.num_segments.sharding
        batch = Batch(
            conditioning=put(encode_prompts(self._pipeline, prompts, self._program.image_size)),
            jumps=put(rows.jumps.astype(np.int32)),
            num_segments=jax.device_put(np.int32(stage.stage.config.num_segments), one),
            guidance_scale=put(rows.guidance_scale),
            seed=jax.device_put(np.int32(config.seed), one),
            latents=put(self._latents[numbers]) if stage.batch.latents is not None and self._latents else None,
            judge_tokens=put(self._program.auxiliary.tokenize(prompts)) if stage.batch.judge_tokens else {},
        )
        return Fed(stage, batch)
