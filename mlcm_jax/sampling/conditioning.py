"""From prompts to what the UNet takes: token states, pooled state and SDXL's time ids (arXiv 2307.01952, sec. 2.2)."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Array, Float, Int

from mlcm_jax.errors import UserError, shortened
from mlcm_jax.hub.pipeline import Network, Pipeline
from mlcm_jax.image_size import ImageSize, both
from mlcm_jax.types import Params, TextConditioning

CHUNK = 64  # prompts that long lists are encoded by at a time


def encode_prompts(pipeline: Pipeline, prompts: Sequence[str], image_size: int | ImageSize) -> TextConditioning:
    """Conditioning [n ...] of prompts for images of ``image_size`` pixels, as diffusers' pipelines make it.

    image_size: the side of a square, or height and width.

    StableDiffusionXLPipeline: the states before each encoder's last layer, side by side, and the last encoder's
    pooled state. StableDiffusionPipeline: the encoder's last states. Longer prompts are cut to the tokenizer's length.
    More than ``CHUNK`` prompts are encoded by ``CHUNK`` at a time, and the result is on the host.

    Raises UserError when a tokenizer makes longer rows, or other ids, than its text encoder has embeddings for.
    """
    tokens = tokenize_prompts(pipeline, prompts)
    if len(prompts) <= CHUNK:
        return _conditioning(pipeline, tokens, image_size)
    padded = [np.concatenate([t, t[: -len(t) % CHUNK]]) for t in tokens]
    chunks = [
        jax.device_get(_conditioning(pipeline, [t[i : i + CHUNK] for t in padded], image_size))
        for i in range(0, len(padded[0]), CHUNK)
    ]
    return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(prompts)], *chunks)


def tokenize_prompts(pipeline: Pipeline, prompts: Sequence[str]) -> list[Int[np.ndarray, "n tokens"]]:
    """The prompts as each text encoder of the pipeline reads them; errors are ``encode_prompts``'s."""
    pairs = zip(pipeline.tokenizers, pipeline.text_encoders, strict=True)
    return [_checked_tokens(tokenizer, encoder, prompts) for tokenizer, encoder in pairs]


def encode_tokens(
    pipeline: Pipeline,
    tokens: Sequence[Int[Array | np.ndarray, "n tokens"]],
    placement: Sharding | None = None,
) -> tuple[Float[Array, "n tokens d"], Float[Array, "n p"]]:
    """Token states and pooled states of what ``tokenize_prompts`` made, in one program. placement: of the results."""
    modules = tuple(encoder.module for encoder in pipeline.text_encoders)
    params = [encoder.params for encoder in pipeline.text_encoders]
    return _encode(modules, _is_sdxl(pipeline), placement, params, list(tokens))


def unconditional(
    pipeline: Pipeline, n: int, image_size: int | ImageSize, negative_prompt: str = ""
) -> TextConditioning:
    """Conditioning of the unconditional branch: the negative prompt's; without one, zeros where the pipeline forces
    them, else the empty prompt's.

    As in diffusers, a model_index.json that says nothing forces zeros for StableDiffusionXLPipeline, and only for it.
    """
    empty = encode_prompts(pipeline, [negative_prompt], image_size)
    if not negative_prompt and pipeline.model_index.get("force_zeros_for_empty_prompt", _is_sdxl(pipeline)):
        zeros = jnp.zeros_like(empty.hidden_states), jnp.zeros_like(empty.pooled)
        empty = TextConditioning(*zeros, empty.time_ids)
    return jax.tree.map(lambda row: jnp.broadcast_to(row, (n, *row.shape[1:])), empty)


def tokenize(tokenizer: Any, prompts: Sequence[str]) -> Int[np.ndarray, "n tokens"]:
    """Token ids, padded and cut to the tokenizer's ``model_max_length``; raises UserError where it cannot make them."""
    try:
        encoded = tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="np")
    except Exception as e:  # what tokenizers raise depends on what is wrong with the vocabulary
        raise UserError(f"The tokenizer cannot read the prompts ({shortened(e)}): use the model's own.") from None
    return encoded["input_ids"].astype(np.int32)


def time_ids(n: int, image_size: int | ImageSize) -> Float[Array, "n 6"]:
    """Original size, crop corner and target size, in pixels: a whole square image."""
    height, width = both(image_size)
    return jnp.broadcast_to(jnp.array([height, width, 0, 0, height, width], jnp.float32), (n, 6))


def _checked_tokens(tokenizer: Any, encoder: Network, prompts: Sequence[str]) -> Int[np.ndarray, "n tokens"]:
    # An index beyond a table is not an error in JAX: the states would be NaN.
    module: Any = encoder.module
    if tokenizer.model_max_length > module.num_tokens:
        raise UserError(
            f"The tokenizer's model_max_length is {tokenizer.model_max_length}, but its text encoder takes "
            f"{module.num_tokens} tokens: set model_max_length in tokenizer_config.json."
        )
    tokens = tokenize(tokenizer, prompts)
    if tokens.max() >= module.config.vocab_size:
        raise UserError(
            f"The tokenizer made the id {tokens.max()}, but its text encoder has {module.config.vocab_size} tokens: "
            "use the tokenizer that belongs to the encoder."
        )
    return tokens


def _is_sdxl(pipeline: Pipeline) -> bool:
    return pipeline.model_index["_class_name"] == "StableDiffusionXLPipeline"


def _conditioning(pipeline: Pipeline, tokens: list[np.ndarray], image_size: int | ImageSize) -> TextConditioning:
    return TextConditioning(*encode_tokens(pipeline, tokens), time_ids(len(tokens[0]), image_size))


@partial(jax.jit, static_argnames=("modules", "penultimate", "placement"))
def _encode(
    modules: tuple,
    penultimate: bool,
    placement: Sharding | None,
    params: list[Params],
    tokens: list[Int[Array | np.ndarray, "n tokens"]],
):
    outputs = [m.apply({"params": p}, t) for m, p, t in zip(modules, params, tokens, strict=True)]
    states = [out.penultimate if penultimate else out.last_hidden_state for out in outputs]
    encoded = jnp.concatenate(states, axis=-1), outputs[-1].pooled
    return encoded if placement is None else jax.lax.with_sharding_constraint(encoded, placement)
