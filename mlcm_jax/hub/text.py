"""Another language for a pipeline: text encoders and tokenizers that say the same to the UNet."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from mlcm_jax.errors import UserError
from mlcm_jax.hub.model_index import PIPELINES
from mlcm_jax.hub.pipeline import Pipeline, conditioning_shapes, load_network
from mlcm_jax.hub.tokenizer import load_tokenizer


def with_text(pipeline: Pipeline, folder: str | Path, *, dtype: Any = jnp.float32) -> Pipeline:
    """The pipeline with the text encoders and tokenizers of ``folder``, named as in the pipeline's own folder.

    Args:
      dtype: compute dtype of the encoders.

    Raises UserError when ``folder`` lacks one, or holds encoders whose states have another width than the UNet takes.
    """
    folder = Path(folder)
    encoders, tokenizers = PIPELINES[pipeline.model_index["_class_name"]]
    parts = (*encoders, *tokenizers)
    for part in parts:
        if not (folder / part).is_dir():
            raise UserError(f"{folder / part} does not exist: a text folder needs {', '.join(parts)}.")
    index = pipeline.model_index
    replaced = dataclasses.replace(
        pipeline,
        text_encoders=tuple(load_network(folder / part, index[part][1], dtype=dtype) for part in encoders),
        tokenizers=tuple(load_tokenizer(folder / part, index[part][1]) for part in tokenizers),
        tokenizer_folder=folder,
    )
    own, new = conditioning_shapes(pipeline, 1), conditioning_shapes(replaced, 1)
    for what, a, b in (("token", own.hidden_states, new.hidden_states), ("pooled", own.pooled, new.pooled)):
        if a.shape[-1] != b.shape[-1]:
            raise UserError(
                f"The {what} states of {folder} are {b.shape[-1]} wide, but the model takes {a.shape[-1]}: "
                "use text encoders that were trained for this model."
            )
    return replaced
