"""What a step's batch is made of on the host: places, prompts, latents, tokens. A pure function of the step.

Each process reads the examples that its own devices hold.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from mlcm_jax.data.latents import LatentFile
from mlcm_jax.data.prompts import PromptIndex, TextSource, shuffled
from mlcm_jax.data.text_states import TextState, TextStates
from mlcm_jax.parallel.sharding import batch_sharding, local_rows
from mlcm_jax.training.batch_plan import batch_plan, renews_teacher, source_of, takes_new_prompt
from mlcm_jax.training.program import Program, StageProgram, program_at, stages_of
from mlcm_jax.training.stages import Stage, num_buckets


class NewPrompts(NamedTuple):
    """Of examples that take a new prompt at the same step, equally many on each device, where they are encoded.

    example: place among the device's own examples; their number stands for padding. texts: "" for padding.
    tokens: as each text encoder reads them; states: instead of tokens, where they were encoded before the run.
    bucket: the size of images, by its number in config.buckets.
    """

    example: Int[np.ndarray, " m"]
    texts: list[str]
    bucket: int = 0
    tokens: list[Int[np.ndarray, "m t"]] | None = None
    states: TextState | None = None


class HostBatch(NamedTuple):
    """Of one step, this process's examples. new_prompts: what has to be encoded, in order. texts: for frozen networks
    that read prompts, where there are any. renews_teacher: as batch_plan has it."""

    step: int
    new_prompts: list[NewPrompts]
    trajectory_step: Int[np.ndarray, " n"]
    guidance_scale: Float[np.ndarray, " n"]
    without_prompt: Bool[np.ndarray, " n"]
    latents: Float[np.ndarray, "n h w c"] | None
    prompt_tokens: dict[str, Int[np.ndarray, "n t"]]
    texts: list[str]
    renews_teacher: bool


class BatchReader:
    """Reads what a step takes. Without tokens, which ``tokenized`` adds: tokenizers do not bear several threads.

    latents: of the rows of ``prompts``, in their order. states: text states of the same rows.
    """

    def __init__(
        self, program: Program, prompts: TextSource, latents: LatentFile | None, states: TextStates | None = None
    ):
        self._program, self._prompts, self._latents, self._states = program, prompts, latents, states
        self._sizes = num_buckets(program.config)
        self._stages = stages_of(program.stages)
        self.sharding = batch_sharding(program.mesh)
        self.batch_size = program.config.batch_size
        self.examples = local_rows(self.sharding, self.batch_size)
        self.examples_each = self.sharding.shard_shape((self.batch_size,))[0]  # of a device

    def stage(self, step: int) -> StageProgram:
        return program_at(self._program.stages, step)

    def __call__(self, step: int, *, from_the_start: bool) -> HostBatch:
        """The examples of ``step``. from_the_start: with the prompts of all trajectories that are under way."""
        plan, stage = batch_plan(self._stages, step), self.stage(step)
        under_way = from_the_start and source_of(stage.stage).uses_buffer
        first = self._first_under_way(step, stage.stage) if under_way else step
        reads_latents = stage.batch.latents is not None and self._latents is not None
        reads_prompts = bool(stage.batch.prompt_tokens)
        places = self._places(plan.prompts[self.examples]) if reads_latents or reads_prompts else []
        empty = plan.without_prompt[self.examples]
        texts = self._texts(places) if reads_prompts else []
        return HostBatch(
            step,
            [
                new._replace(bucket=earlier % self._sizes)
                for earlier in range(first, step + 1)
                for new in self._new_prompts(earlier)
            ],
            plan.trajectory_step[self.examples].astype(np.int32),
            plan.guidance_scale[self.examples],
            empty,
            self._latents[[place.row for place in places]] if reads_latents and self._latents else None,
            {},
            ["" if without else text for without, text in zip(empty, texts, strict=True)] if texts else [],
            renews_teacher(self._stages, step),
        )

    def _first_under_way(self, step: int, stage: Stage) -> int:
        """The step at which the oldest of the trajectories began that go on at ``step`` or, of other sizes, next."""
        coming = range(step, min(step + self._sizes, max(stage.end, step + 1)))
        return min(s - self._sizes * int(batch_plan(self._stages, s).trajectory_step.max()) for s in coming)

    def tokenized(self, read: HostBatch, tokenize: Callable[[Sequence[str]], list[np.ndarray]]) -> HostBatch:
        new_prompts = [new if new.states else new._replace(tokens=tokenize(new.texts)) for new in read.new_prompts]
        tokens = self._program.networks.tokenize(read.texts) if read.texts else {}
        return read._replace(new_prompts=new_prompts, prompt_tokens=tokens)

    def _new_prompts(self, step: int) -> list[NewPrompts]:
        """The examples that begin with a prompt at ``step``: as many for each device, and for each of the calls, as a
        device has begin at a step of the stage on average, so that all calls share one program."""
        plan, stage = batch_plan(self._stages, step), self.stage(step).stage
        beginning = takes_new_prompt(stage, plan).reshape(-1, self.examples_each)
        at_a_time = -(-self.examples_each // source_of(stage).trajectory_length(stage.config))
        calls = -(-int(beginning.sum(1).max()) // at_a_time)
        first_of_device = self.examples[:: self.examples_each]
        padded = np.full((len(first_of_device), calls * at_a_time), self.examples_each, np.int32)
        for own, of_device in zip(padded, beginning[first_of_device // self.examples_each], strict=True):
            own[: of_device.sum()] = np.flatnonzero(of_device)
        parts = np.split(padded, calls, axis=1) if calls else []
        return [self._read_prompts(plan.prompts, first_of_device, part) for part in parts]

    def _read_prompts(self, positions: np.ndarray, first_of_device: np.ndarray, example: np.ndarray) -> NewPrompts:
        """example: [devices, examples of each]. positions: in the stream of prompts, of all examples of the batch."""
        real = (example < self.examples_each).ravel()
        places = self._places(positions[(first_of_device[:, None] + example).ravel()[real]])
        if self._states is None:
            texts = np.full(example.size, "", object)
            texts[real] = self._texts(places)
            return NewPrompts(example.ravel(), texts.tolist())
        padded = TextState(
            *(np.zeros((example.size, *part.shape[1:]), part.dtype) for part in self._states.unconditional)
        )
        of_rows = self._states.__getitems__([place.row for place in places])
        for i, place, states in zip(np.flatnonzero(real), places, of_rows, strict=True):
            for part, values in zip(padded, states, strict=True):
                part[i] = values[place.turn(len(values))]
        return NewPrompts(example.ravel(), [], states=padded)

    def _places(self, positions: np.ndarray) -> list[PromptIndex]:
        return shuffled(positions, len(self._prompts), self._program.config.seed)

    def _texts(self, places: list[PromptIndex]) -> list[str]:
        of_rows = self._prompts.__getitems__([place.row for place in places])
        return [texts[place.turn(len(texts))] for place, texts in zip(places, of_rows, strict=True)]
