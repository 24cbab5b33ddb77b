"""What the examples of a step are: places on trajectories, prompts, guidance. Pure functions of the step, on the host,
so that a resumed run goes on with the same examples and nothing of them is saved."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from ml_collections import ConfigDict

from mlcm_jax.distillation.states import STATE_SOURCES, Placement, StateSource
from mlcm_jax.training.stages import Stage, num_buckets, stage_at

_GUIDANCE, _EMPTY = 1, 3  # streams of numpy generators


class BatchPlan(NamedTuple):
    """trajectory_step: the teacher's solver steps from pure noise to the example's state (states.Draws).

    prompts: positions in the run's stream of prompts. guidance_scale: of the teacher. without_prompt: whether the
    example goes without its prompt.
    """

    trajectory_step: Int[np.ndarray, " n"]
    prompts: Int[np.ndarray, " n"]
    guidance_scale: Float[np.ndarray, " n"]
    without_prompt: Bool[np.ndarray, " n"]


def batch_plan(stages: tuple[Stage, ...], step: int) -> BatchPlan:
    """The examples of ``step`` (0 for the first)."""
    number = stage_at(stages, step)
    stage, before = stages[number], sum(_prompts_used(s) for s in stages[:number])
    trajectory_step, prompts = _placement(stage, step)
    prompts = before + prompts
    scales, empty = guidance_scales(stage.config, prompts), empty_prompts(stage.config, prompts)
    return BatchPlan(trajectory_step, prompts, scales, empty)


def _placement(stage: Stage, step: int) -> Placement:
    """Of each size of images a sequence of steps by itself, and every so many-th position in the stream of prompts."""
    sizes = num_buckets(stage.config)
    placement = source_of(stage).placement(stage.config, (step - stage.start) // sizes, stage.start)
    return placement._replace(prompts=placement.prompts * sizes + step % sizes)


def source_of(stage: Stage) -> StateSource:
    """The source of a stage's states."""
    return STATE_SOURCES[stage.config.states]


def takes_new_prompt(stage: Stage, plan: BatchPlan) -> Bool[np.ndarray, " n"]:
    """Which examples take a prompt that the step before did not have."""
    return source_of(stage).takes_new_prompt(plan.trajectory_step)


def renews_teacher(stages: tuple[Stage, ...], step: int) -> bool:
    """Whether the student as it is before ``step`` becomes the teacher of stages that have students as theirs."""
    stage = stages[stage_at(stages, step)]
    return step == stage.start and stage.renews_teacher


def guidance_scales(config: ConfigDict, prompts: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """The scale of each position in the stream: constant along a trajectory, uniform where a range is given."""
    low, high = config.guidance_scale, config.guidance_scale_max or config.guidance_scale
    return np.asarray(low + (high - low) * _uniform(config, _GUIDANCE, prompts), np.float32)


def empty_prompts(config: ConfigDict, prompts: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """Which positions in the stream are without a prompt: on average the fraction ``config.empty_prompts`` of them."""
    if not config.empty_prompts:
        return np.zeros(len(prompts), bool)
    return _uniform(config, _EMPTY, prompts) < config.empty_prompts


def _uniform(config: ConfigDict, stream: int, prompts: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """A number from 0 to 1 for each position in the stream of prompts, whatever batch it is in."""
    return np.asarray([np.random.default_rng([config.seed, stream, int(p)]).random() for p in prompts])


def _prompts_used(stage: Stage) -> int:
    """Positions in the stream that a whole stage takes, up to the last one that it touches."""
    last = range(max(stage.start, stage.end - num_buckets(stage.config)), stage.end)
    return max(int(_placement(stage, step).prompts.max()) for step in last) + 1
