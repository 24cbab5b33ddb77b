"""The conditioning of a run beside that of its batches: of the unconditional branch, and of the sample prompts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mlcm_jax.data.prompts import TextSource
from mlcm_jax.data.text_states import TextState, TextStates
from mlcm_jax.hub.pipeline import Pipeline
from mlcm_jax.image_size import ImageSize
from mlcm_jax.parallel.distributed import host_array
from mlcm_jax.parallel.sharding import from_equal_values
from mlcm_jax.sampling.conditioning import encode_prompts, time_ids, unconditional
from mlcm_jax.training.program import Program
from mlcm_jax.types import TextConditioning


class Texts(NamedTuple):
    """unconditional: of the unconditional branch, one row, replicated. sample: of the sample prompts."""

    unconditional: TextConditioning
    sample: TextConditioning


def open_states(program: Program, prompts: TextSource, sample_prompts: list[str]) -> TextStates | None:
    """The file of config.text_states, where there is one; raises UserError when it was not made for this run."""
    config = program.config
    if not config.text_states:
        return None
    states = TextStates(config.text_states)
    shapes, said = program.frozen.unconditional, config.negative_prompt
    states.check(prompts, shapes, negative_prompt=said, sample_prompts=sample_prompts)
    return states


def read_texts(program: Program, pipeline: Pipeline, sample_prompts: list[str], states: TextStates | None) -> Texts:
    """From the file of text states, or by the pipeline's text encoders, which without one must have weights."""
    size, shapes = program.image_size, program.frozen.unconditional
    if states is None:
        none = unconditional(pipeline, 1, size, program.config.negative_prompt)
        sample = encode_prompts(pipeline, sample_prompts, size)
    else:
        none, sample = _conditioning(states.unconditional, size), _conditioning(states.sample, size)
    return Texts(jax.tree.map(lambda a, like: from_equal_values(like.sharding, host_array(a)), none, shapes), sample)


def _conditioning(states: TextState, image_size: ImageSize) -> TextConditioning:
    hidden_states, pooled = (jnp.asarray(part) for part in states)
    return TextConditioning(hidden_states, pooled, time_ids(len(pooled), image_size))
