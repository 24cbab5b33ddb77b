"""What the rows of a step's batch are: places on trajectories, prompts, guidance. Pure functions of the step, on the
host, so that a resumed run goes on with the same rows and nothing of them is saved."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from ml_collections import ConfigDict

from mlcm_jax.distillation.segments import jumps_to_first_segment
from mlcm_jax.training.stages import Stage, stage_at


class Rows(NamedTuple):
    """jumps: the teacher's jumps from pure noise to the row's state (distillation.states.Rows).

    prompts: positions in the stream of prompts. guidance_scale: of the teacher.
    """

    jumps: Int[np.ndarray, " n"]
    prompts: Int[np.ndarray, " n"]
    guidance_scale: Float[np.ndarray, " n"]


def rows_at(stages: tuple[Stage, ...], step: int) -> Rows:
    """The rows of ``step`` (0 for the first)."""
    number = stage_at(stages, step)
    stage, before = stages[number], sum(_prompts_used(s) for s in stages[:number])
    jumps, prompts = _PLACES[stage.config.states](stage, step - stage.start)
    return Rows(jumps, before + prompts, guidance_scales(stage.config, before + prompts))


def trajectory_length(stage: Stage) -> int:
    """Steps that a row stays with its prompt. A streamed trajectory is M + 1 states long, the noise and one in each
    segment, or M at milestones, where the noise is the first segment's."""
    if stage.config.states != "streaming":
        return 1
    return stage.config.num_segments + jumps_to_first_segment(stage.config.timesteps)


def begins(stage: Stage, rows: Rows) -> Bool[np.ndarray, " n"]:
    """Which rows take a prompt that the step before did not have."""
    return rows.jumps == 0 if stage.config.states == "streaming" else np.ones(len(rows.jumps), bool)


def guidance_scales(config: ConfigDict, prompts: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """The scale of each position in the stream: constant along a trajectory, uniform where a range is given."""
    low, high = config.guidance_scale, config.guidance_scale_max or config.guidance_scale
    draws = [np.random.default_rng([config.seed, _GUIDANCE, int(p)]).random() for p in prompts]
    return np.asarray(low + (high - low) * np.asarray(draws), np.float32)


def _streaming(stage: Stage, s: int) -> tuple[np.ndarray, np.ndarray]:
    """Row j's trajectory ends j steps (modulo its length) early the first time: afterwards every place is equally
    often in a batch."""
    length = trajectory_length(stage)
    row = np.arange(stage.config.batch_size)
    turn = s + row % length
    jumps = np.minimum(s, turn % length)
    return jumps, turn // length * len(row) + row


def _one_segment(stage: Stage, s: int) -> tuple[np.ndarray, np.ndarray]:
    """The whole batch in one segment, so that no row waits for others' longer trajectories; M steps visit all."""
    num_segments, n = stage.config.num_segments, stage.config.batch_size
    block, place = divmod(s, num_segments)
    order = np.random.default_rng([stage.config.seed, _SEGMENTS, stage.start, block]).permutation(num_segments)
    first = jumps_to_first_segment(stage.config.timesteps)
    return np.full(n, first + order[place]), s * n + np.arange(n)


def _every_segment(stage: Stage, s: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows in all segments side by side, each equally often."""
    position = s * stage.config.batch_size + np.arange(stage.config.batch_size)
    first = jumps_to_first_segment(stage.config.timesteps)
    return first + position % stage.config.num_segments, position


_PLACES = {"streaming": _streaming, "mds": _one_segment, "data": _every_segment, "student": _every_segment}
_GUIDANCE, _SEGMENTS = 1, 2  # streams of numpy generators


def _prompts_used(stage: Stage) -> int:
    """Positions in the stream that a whole stage takes, up to the last one that it touches."""
    _, prompts = _PLACES[stage.config.states](stage, stage.end - stage.start - 1)
    return int(prompts.max()) + 1
