"""Another language for a pipeline: text encoders and tokenizers that say the same to the UNet."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from mlcm_jax.errors import UserError
from mlcm_jax.hub.model_index import PIPELINES
from mlcm_jax.hub.network import Network
from mlcm_jax.hub.pipeline import Pipeline, conditioning_shapes, load_network
from mlcm_jax.hub.tokenizer import load_tokenizer
from mlcm_jax.models.chinese_clip import AdaptedTextModel

ADAPTER = "adapter"
ADAPTED_PARTS = ("text_encoder", ADAPTER, "tokenizer")


def with_text(pipeline: Pipeline, folder: str | Path, *, dtype: Any = jnp.float32, param_dtype: Any = None) -> Pipeline:
    """The pipeline with the text encoders and tokenizers of ``folder``, named as in the pipeline's own folder.

    A folder with an ``adapter`` has one text encoder, Chinese-CLIP's, and one tokenizer (``load_adapted``).

    Args:
      dtype: compute dtype of the encoders. param_dtype: of their parameters; None keeps the files'.

    Raises UserError when ``folder`` lacks one, or holds encoders whose states have another width than the UNet takes.
    """
    folder = Path(folder)
    encoders, tokenizers = PIPELINES[pipeline.model_index["_class_name"]]
    adapted = (folder / ADAPTER).is_dir()
    parts = ADAPTED_PARTS if adapted else (*encoders, *tokenizers)
    for part in parts:
        if not (folder / part).is_dir():
            others = "" if adapted else f", or {', '.join(ADAPTED_PARTS)}"
            raise UserError(f"{folder / part} does not exist: a text folder needs {', '.join(parts)}{others}.")
    index, dtypes = pipeline.model_index, {"dtype": dtype, "param_dtype": param_dtype}
    if adapted:
        network, tokenizer = load_adapted(folder, **dtypes)
        text: dict[str, Any] = {"text_encoders": (network,), "tokenizers": (tokenizer,)}
    else:
        text = {
            "text_encoders": tuple(load_network(folder / part, index[part][1], **dtypes) for part in encoders),
            "tokenizers": tuple(load_tokenizer(folder / part, index[part][1]) for part in tokenizers),
        }
    replaced = dataclasses.replace(pipeline, **text, tokenizer_folder=folder)
    own, new = conditioning_shapes(pipeline, 1), conditioning_shapes(replaced, 1)
    for what, a, b in (("token", own.hidden_states, new.hidden_states), ("pooled", own.pooled, new.pooled)):
        if a.shape[-1] != b.shape[-1]:
            raise UserError(
                f"The {what} states of {folder} are {b.shape[-1]} wide, but the model takes {a.shape[-1]}: "
                "use text encoders that were trained for this model."
            )
    return replaced


def load_adapted(folder: Path, **dtypes: Any) -> tuple[Network, Any]:
    """Chinese-CLIP's text tower with its adapter as one network, and the tokenizer, which pads to its length.

    dtypes: as ``load_network`` takes them. Raises UserError for parts that do not fit each other and as
    ``load_network`` and ``load_tokenizer`` do.
    """
    tower = load_network(folder / "text_encoder", "ChineseCLIPTextModel", **dtypes)
    adapter = load_network(folder / ADAPTER, "TextAdapter", **dtypes)
    module = AdaptedTextModel(tower.module, adapter.module)  # pyright: ignore[reportArgumentType]
    has, takes = module.config, module.adapter.config
    if has.hidden_size != takes.input_dim:
        raise UserError(
            f"{folder / ADAPTER} takes states {takes.input_dim} wide, but those of text_encoder are "
            f"{has.hidden_size} wide: use the text encoder that it was trained with."
        )
    if has.max_position_embeddings < takes.num_tokens:
        raise UserError(
            f"{folder / ADAPTER}/config.json has num_tokens={takes.num_tokens}, but text_encoder takes "
            f"{has.max_position_embeddings} tokens: use at most that many."
        )
    tokenizer = load_tokenizer(folder / "tokenizer", "BertTokenizer")
    if tokenizer.pad_token_id != has.pad_token_id:
        raise UserError(
            f"{folder / 'tokenizer'} pads with {tokenizer.pad_token_id}, but text_encoder has "
            f"pad_token_id={has.pad_token_id}: use the tokenizer that belongs to it."
        )
    tokenizer.model_max_length = takes.num_tokens
    params = {"tower": tower.params, "adapter": adapter.params}
    return Network(module, params, {"text_encoder": tower.config, ADAPTER: adapter.config}), tokenizer
