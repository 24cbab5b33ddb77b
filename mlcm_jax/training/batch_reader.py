"""What a step's batch is made of on the host: rows, prompts, latents, tokens. A pure function of the step.

Each process reads the rows that its own devices hold.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from mlcm_jax.data.latents import LatentFile
from mlcm_jax.data.prompts import Place, TextSource, shuffled
from mlcm_jax.data.text_states import States, TextStates
from mlcm_jax.parallel.sharding import batch_sharding, local_rows
from mlcm_jax.training.batch_plan import begins, rows_at, trajectory_length
from mlcm_jax.training.program import Program, StageProgram
from mlcm_jax.training.stages import stage_at


class Fresh(NamedTuple):
    """Rows that take a new prompt at the same step, equally many of each device, so that encoding them stays there.

    row: place in the device's own rows; their number stands for padding. texts: "" for padding.
    tokens: as each text encoder reads them; states: instead of tokens, where they were encoded before the run.
    """

    row: Int[np.ndarray, " m"]
    texts: list[str]
    tokens: list[Int[np.ndarray, "m t"]] | None = None
    states: States | None = None


class Read(NamedTuple):
    """Of one step, this process's rows. fresh: what has to be encoded, in order; texts: only for the judges."""

    step: int
    fresh: list[Fresh]
    jumps: Int[np.ndarray, " n"]
    guidance_scale: Float[np.ndarray, " n"]
    latents: Float[np.ndarray, "n h w c"] | None
    judge_tokens: dict[str, Int[np.ndarray, "n t"]]
    texts: list[str]


class Reader:
    """Reads what a step takes. Without tokens, which ``tokenized`` adds: tokenizers do not bear several threads.

    latents: of the rows of ``prompts``, in their order. states: of the same rows.
    """

    def __init__(
        self, program: Program, prompts: TextSource, latents: LatentFile | None, states: TextStates | None = None
    ):
        self._program, self._prompts, self._latents, self._states = program, prompts, latents, states
        self._stages = tuple(program.stage for program in program.stages)
        self.sharding = batch_sharding(program.mesh)
        self.batch_size = program.config.batch_size
        self.rows = local_rows(self.sharding, self.batch_size)
        self.rows_each = self.sharding.shard_shape((self.batch_size,))[0]  # of a device

    def stage(self, step: int) -> StageProgram:
        return self._program.stages[stage_at(self._stages, step)]

    def __call__(self, step: int, *, from_the_start: bool) -> Read:
        """The rows of ``step``. from_the_start: with the prompts of all trajectories that are under way."""
        all_rows, stage = rows_at(self._stages, step), self.stage(step)
        jumps, positions = all_rows.jumps[self.rows], all_rows.prompts[self.rows]
        streaming = stage.stage.config.states == "streaming"
        first = step - int(all_rows.jumps.max()) if from_the_start and streaming else step
        reads_latents = stage.batch.latents is not None and self._latents is not None
        places = self._places(positions) if reads_latents or stage.batch.judge_tokens else []
        return Read(
            step,
            [fresh for earlier in range(first, step + 1) for fresh in self._fresh(earlier)],
            jumps.astype(np.int32),
            all_rows.guidance_scale[self.rows],
            self._latents[[place.row for place in places]] if reads_latents and self._latents else None,
            {},
            self._texts(places) if stage.batch.judge_tokens else [],
        )

    def tokenized(self, read: Read, tokenize: Callable[[Sequence[str]], list[np.ndarray]]) -> Read:
        fresh = [new if new.states else new._replace(tokens=tokenize(new.texts)) for new in read.fresh]
        judged = self._program.auxiliary.tokenize(read.texts) if read.texts else {}
        return read._replace(fresh=fresh, judge_tokens=judged)

    def _fresh(self, step: int) -> list[Fresh]:
        """The rows that begin with a prompt at ``step``: as many for each device, and for each of the calls, as a
        device has begin at a step of the stage on average, so that all calls share one program."""
        rows, stage = rows_at(self._stages, step), self.stage(step).stage
        beginning = begins(stage, rows).reshape(-1, self.rows_each)
        at_a_time = -(-self.rows_each // trajectory_length(stage))
        calls = -(-int(beginning.sum(1).max()) // at_a_time)
        first_rows = self.rows[:: self.rows_each]
        padded = np.full((len(first_rows), calls * at_a_time), self.rows_each, np.int32)
        for own, of_device in zip(padded, beginning[first_rows // self.rows_each], strict=True):
            own[: of_device.sum()] = np.flatnonzero(of_device)
        parts = np.split(padded, calls, axis=1) if calls else []
        return [self._read_fresh(rows.prompts, first_rows, part) for part in parts]

    def _read_fresh(self, positions: np.ndarray, first_rows: np.ndarray, row: np.ndarray) -> Fresh:
        """row: [devices, rows of each]. positions: in the stream of prompts, of all rows of the batch."""
        real = (row < self.rows_each).ravel()
        places = self._places(positions[(first_rows[:, None] + row).ravel()[real]])
        if self._states is None:
            texts = np.full(row.size, "", object)
            texts[real] = self._texts(places)
            return Fresh(row.ravel(), texts.tolist())
        padded = States(*(np.zeros((row.size, *part.shape[1:]), part.dtype) for part in self._states.unconditional))
        of_rows = self._states.__getitems__([place.row for place in places])
        for i, place, states in zip(np.flatnonzero(real), places, of_rows, strict=True):
            for part, values in zip(padded, states, strict=True):
                part[i] = values[place.turn(len(values))]
        return Fresh(row.ravel(), [], states=padded)

    def _places(self, positions: np.ndarray) -> list[Place]:
        return shuffled(positions, len(self._prompts), self._program.config.seed)

    def _texts(self, places: list[Place]) -> list[str]:
        of_rows = self._prompts.__getitems__([place.row for place in places])
        return [texts[place.turn(len(texts))] for place, texts in zip(places, of_rows, strict=True)]
