"""The batches of a run, read and tokenized ahead in the background; and what of them is encoded on the devices."""

from functools import partial
from typing import Any, NamedTuple, cast

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from mlcm_jax.data.latents import LatentFile
from mlcm_jax.data.prompts import TextSource
from mlcm_jax.data.text_states import TextStates
from mlcm_jax.hub.pipeline import Pipeline
from mlcm_jax.parallel.sharding import from_equal_values, from_local_rows
from mlcm_jax.rng import seed_words
from mlcm_jax.sampling.conditioning import encode_tokens, time_ids, tokenize_prompts
from mlcm_jax.training.batch_reader import BatchReader, HostBatch, NewPrompts
from mlcm_jax.training.program import Program, StageProgram
from mlcm_jax.types import Batch, TextConditioning

READ_AHEAD = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)  # batches; files may be far away
TOKENIZED_AHEAD = 2  # batches

Texts = tuple[Float[Array, "n tokens d"], Float[Array, "n p"]]  # token states and pooled states


class StageBatch(NamedTuple):
    """A batch, and the stage whose step takes it."""

    stage: StageProgram
    batch: Batch


class InputPipeline:
    """The batch of any step (0 for the first), as a pure function of the step; the next ones are read ahead.

    A prompt is encoded when its trajectory begins; until it ends, the example's conditioning stays on its device. One
    that begins in the middle repeats the encoding of the trajectories that are under way, call for call, so that a
    resumed run has the same bits. Nothing here waits for a device, and close() ends the threads.

    latents: of the rows of ``prompts``, in their order, for stages whose states are made of data. states: of the same
    rows; with them the pipeline's text encoders are not used.
    """

    def __init__(
        self,
        program: Program,
        pipeline: Pipeline,
        prompts: TextSource,
        latents: LatentFile | None = None,
        states: TextStates | None = None,
    ):
        self._pipeline, self._num_steps = pipeline, program.config.num_steps
        self._reader = BatchReader(program, prompts, latents, states)
        self._sharding = self._reader.sharding
        self._put = partial(from_local_rows, self._sharding)
        self._one = partial(from_equal_values, NamedSharding(program.mesh, PartitionSpec()))
        shapes, n = program.stages[0].batch.conditioning, program.config.batch_size

        def nothing() -> tuple[Texts, tuple[Float[Array, "n 6"], ...]]:
            zeros = jnp.zeros_like(shapes.hidden_states), jnp.zeros_like(shapes.pooled)
            return zeros, tuple(time_ids(n, size) for size in program.image_sizes)

        made = cast(Any, jax.jit(nothing, out_shardings=self._sharding)())
        self._nothing: Texts = made[0]
        self._time_ids: tuple[Float[Array, "n 6"], ...] = made[1]
        self._held: dict[int, Texts] = {}  # by the number of the size
        self._coming: Any = None
        self._expected = -1

    def __call__(self, step: int) -> StageBatch:
        if step != self._expected:
            self.close()
            self._coming = iter(self._batches(step))
        read = next(self._coming)
        self._expected = step + 1
        stage = self._reader.stage(step)
        return StageBatch(stage, self._placed(stage, read, step % len(self._time_ids)))

    def close(self) -> None:
        if self._coming is not None:
            self._coming.close()
        self._coming, self._held, self._expected = None, {}, -1

    def _batches(self, start: int) -> grain.IterDataset:
        """Batches from ``start`` on: files in several threads, tokenizers, which are not made for it, in one."""
        reader, tokenize = self._reader, partial(tokenize_prompts, self._pipeline)
        steps = grain.MapDataset.range(start, max(self._num_steps, start + 1))
        read = steps.map(lambda step: reader(int(step), from_the_start=int(step) == start)).to_iter_dataset(READ_AHEAD)
        tokenized = read.map(lambda read: reader.tokenized(read, tokenize))
        return grain.experimental.ThreadPrefetchIterDataset(tokenized, prefetch_buffer_size=TOKENIZED_AHEAD)

    def _placed(self, stage: StageProgram, read: HostBatch, bucket: int) -> Batch:
        config = stage.stage.config
        for new in read.new_prompts:
            held = self._held.get(new.bucket, self._nothing)
            self._held[new.bucket] = _replace(held, self._put(new.example), self._encoded(new), self._sharding)
        put, one = self._put, self._one
        hidden_states, pooled = self._held.get(bucket, self._nothing)
        return Batch(
            conditioning=TextConditioning(hidden_states, pooled, self._time_ids[bucket]),
            trajectory_step=put(read.trajectory_step),
            num_segments=one(np.int32(config.num_segments)),
            guidance_scale=put(read.guidance_scale),
            seed=one(seed_words(config.seed)),
            latents=None if read.latents is None else put(read.latents),
            without_prompt=put(read.without_prompt) if stage.batch.without_prompt is not None else None,
            prompt_tokens={role: put(tokens) for role, tokens in read.prompt_tokens.items()},
            renews_teacher=one(np.bool_(read.renews_teacher)) if config.teacher_network == "previous" else None,
        )

    def _encoded(self, new: NewPrompts) -> Texts:
        if new.states is not None:
            return self._put(new.states.hidden_states), self._put(new.states.pooled)
        assert new.tokens is not None  # BatchReader.tokenized has been there
        return encode_tokens(self._pipeline, [self._put(tokens) for tokens in new.tokens], self._sharding)


@partial(jax.jit, static_argnames="sharding")
def _replace(held: Texts, example: Int[Array, " m"], new: Texts, sharding: NamedSharding) -> Texts:
    """On each device its examples ``example`` replaced by its part of ``new``; what is beyond them is left out."""

    def on_each(held, example, new):
        return jax.tree.map(lambda old, values: old.at[example].set(values, mode="drop"), held, new)

    spec = sharding.spec
    return jax.shard_map(on_each, mesh=sharding.mesh, in_specs=(spec, spec, spec), out_specs=spec)(held, example, new)
