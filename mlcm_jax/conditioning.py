"""From prompts to what the UNet takes: token states, pooled state and SDXL's time ids (arXiv 2307.01952, sec. 2.2)."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mlcm_jax.hub.pipeline import Pipeline
from mlcm_jax.types import Params, TextConditioning

CHUNK = 64  # prompts that long lists are encoded by at a time


def encode_prompts(pipeline: Pipeline, prompts: Sequence[str], image_size: int) -> TextConditioning:
    """Conditioning [n ...] of prompts for square images of ``image_size`` pixels, as diffusers' pipelines make it.

    StableDiffusionXLPipeline: the states before each encoder's last layer, side by side, and the last encoder's
    pooled state. StableDiffusionPipeline: the encoder's last states. Longer prompts are cut to the tokenizer's length.
    """
    tokens = [tokenize(tokenizer, prompts) for tokenizer in pipeline.tokenizers]
    if len(prompts) <= CHUNK:
        return _conditioning(pipeline, tokens, image_size)
    padded = [np.concatenate([t, t[: -len(t) % CHUNK]]) for t in tokens]
    chunks = [
        jax.device_get(_conditioning(pipeline, [t[i : i + CHUNK] for t in padded], image_size))
        for i in range(0, len(padded[0]), CHUNK)
    ]
    return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(prompts)], *chunks)


def unconditional(pipeline: Pipeline, n: int, image_size: int) -> TextConditioning:
    """Conditioning of the unconditional branch: zeros where the pipeline forces them, else the empty prompt's."""
    empty = encode_prompts(pipeline, [""] * n, image_size)
    if not pipeline.model_index.get("force_zeros_for_empty_prompt", False):
        return empty
    return empty.replace(hidden_states=jnp.zeros_like(empty.hidden_states), pooled=jnp.zeros_like(empty.pooled))


def tokenize(tokenizer: Any, prompts: Sequence[str]) -> Int[np.ndarray, "n tokens"]:
    """Token ids, padded and cut to the tokenizer's ``model_max_length``."""
    encoded = tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="np")
    return encoded["input_ids"].astype(np.int32)


def time_ids(n: int, image_size: int) -> Float[Array, "n 6"]:
    """Original size, crop corner and target size, in pixels: a whole square image."""
    row = jnp.array([image_size, image_size, 0, 0, image_size, image_size], jnp.float32)
    return jnp.broadcast_to(row, (n, 6))


def _conditioning(pipeline: Pipeline, tokens: list[np.ndarray], image_size: int) -> TextConditioning:
    penultimate = pipeline.model_index["_class_name"] == "StableDiffusionXLPipeline"
    modules = tuple(encoder.module for encoder in pipeline.text_encoders)
    params = [encoder.params for encoder in pipeline.text_encoders]
    states, pooled = _encode(modules, penultimate, params, tokens)
    return TextConditioning(states, pooled, time_ids(len(tokens[0]), image_size))


@partial(jax.jit, static_argnames=("modules", "penultimate"))
def _encode(modules: tuple, penultimate: bool, params: list[Params], tokens: list[Int[Array, "n tokens"]]):
    outputs = [m.apply({"params": p}, t) for m, p, t in zip(modules, params, tokens, strict=True)]
    states = [out.penultimate if penultimate else out.last_hidden_state for out in outputs]
    return jnp.concatenate(states, axis=-1), outputs[-1].pooled
