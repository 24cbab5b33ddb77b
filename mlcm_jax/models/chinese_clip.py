"""Chinese-CLIP's text tower (arXiv 2211.01335), a BERT, and the adapter that lets it speak to SDXL's UNet.

The adapter is PEA-Diffusion's (arXiv 2311.17086); its tensors have the names of its authors' files.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mlcm_jax.errors import UserError
from mlcm_jax.json_config import COUNT, LAYERS, NOT_NEGATIVE, SIZE, UNREAD, Table, read_config
from mlcm_jax.models.bert import BertAttention, BertConfig, BertEmbeddings, BertIntermediate, BertOutput, padding_mask
from mlcm_jax.models.clip import CLIPTextOutput
from mlcm_jax.models.clip_config import COMMON
from mlcm_jax.models.layers import ACTIVATIONS, Dense, LayerNorm
from mlcm_jax.parallel.sharding import split_batch

TEXT_KEYS: Table = {
    **COMMON,
    **dict.fromkeys(
        ("attention_probs_dropout_prob", "hidden_dropout_prob", "classifier_dropout", "use_cache"), (None, UNREAD)
    ),
    # of the projection of the first token, which only the contrastive loss and scores use
    **dict.fromkeys(("directionality", "projection_dim"), (None, UNREAD)),
    "hidden_act": ("gelu", ("gelu", "quick_gelu", "relu")),
    "hidden_size": (768, SIZE),
    "intermediate_size": (3072, SIZE),
    "layer_norm_eps": (1e-12, NOT_NEGATIVE),
    "max_position_embeddings": (512, SIZE),
    "model_type": ("chinese_clip_text_model", ("chinese_clip_text_model",)),
    "num_attention_heads": (12, SIZE),
    "num_hidden_layers": (12, LAYERS),
    "pad_token_id": (0, COUNT),
    "position_embedding_type": ("absolute", ("absolute",)),
    "type_vocab_size": (2, SIZE),
    "vocab_size": (30522, SIZE),
}
ADAPTER_KEYS: Table = {
    "input_dim": (1024, SIZE),
    "hidden_dim": (2048, SIZE),
    "pooled_dim": (1280, SIZE),
    "states_dim": (2048, SIZE),
    "num_tokens": (52, SIZE),
}


def read_text_config(config: Mapping[str, Any]) -> BertConfig:
    """The tower's settings from its own config.json or a whole ChineseCLIPModel's.

    Raises UserError for another model's, and for a key or a value that is not supported.
    """
    if config.get("model_type") == "chinese_clip":
        inner = config.get("text_config_dict") or config.get("text_config")
        if not isinstance(inner, Mapping):
            raise UserError("ChineseCLIPModel's config.json has no text_config: copy the whole model.")
        config = inner
    return BertConfig.of(read_config(dict(config), TEXT_KEYS, "ChineseCLIPTextModel"))


class _Layer(nn.Module):
    """Post-norm layer in the form that nn.scan takes."""

    config: BertConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, mask):
        cfg, dtype = self.config, self.dtype
        x = split_batch(x)
        x = BertAttention(cfg, dtype, name="attention")(x, x, mask)
        hidden = BertIntermediate(cfg, dtype, name="intermediate")(x)
        return BertOutput(cfg, dtype, name="output")(hidden, x), None


class _Encoder(nn.Module):
    config: BertConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, mask):
        layers = nn.scan(
            _Layer,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]  (as in attention.py)
            length=self.config.num_hidden_layers,
        )
        return layers(self.config, self.dtype, name="layer")(x, mask)[0]


class ChineseCLIPTextModel(nn.Module):
    """The states of all tokens, padding's too, after the last layer; there is no pooler here."""

    config: BertConfig
    dtype: jnp.dtype = jnp.float32

    @classmethod
    def from_config(cls, config: dict[str, Any], dtype=jnp.float32) -> "ChineseCLIPTextModel":
        """Build from transformers' config.json; errors are ``read_text_config``'s."""
        return cls(read_text_config(config), dtype)

    @nn.compact
    def __call__(self, input_ids: Int[Array, "n t"]) -> Float[Array, "n t d"]:
        x = BertEmbeddings(self.config, self.dtype, name="embeddings")(input_ids)
        return _Encoder(self.config, self.dtype, name="encoder")(x, padding_mask(input_ids, self.config))


@dataclasses.dataclass(frozen=True)
class TextAdapterConfig:
    """Widths of the tower's states, of both hidden layers, of the pooled state and of the UNet's token states.

    num_tokens: length to which captions are padded and cut.
    """

    input_dim: int
    hidden_dim: int
    pooled_dim: int
    states_dim: int
    num_tokens: int


class TextAdapter(nn.Module):
    """An MLP for each token; the mean of its outputs is the pooled state, a further layer makes the token states."""

    config: TextAdapterConfig
    dtype: jnp.dtype = jnp.float32

    @classmethod
    def from_config(cls, config: dict[str, Any], dtype=jnp.float32) -> "TextAdapter":
        """Build from the adapter's config.json; raises UserError for a key or a value that is not supported."""
        return cls(TextAdapterConfig(**read_config(config, ADAPTER_KEYS, "TextAdapter")), dtype)

    @nn.compact
    def __call__(self, x: Float[Array, "n t d"]) -> CLIPTextOutput:
        cfg, gelu = self.config, ACTIVATIONS["gelu"]
        x = LayerNorm(dtype=self.dtype, name="layernorm")(x)
        for place, width in ((0, cfg.hidden_dim), (2, cfg.hidden_dim), (4, cfg.pooled_dim)):  # GELUs are 1 and 3
            x = Dense(width, use_bias=False, dtype=self.dtype, name=f"projector_{place}")(gelu(x) if place else x)
        states = Dense(cfg.states_dim, dtype=self.dtype, name="fc")(gelu(x))
        return CLIPTextOutput(states, states, x.mean(axis=1))


class AdaptedTextModel(nn.Module):
    """A tower and its adapter, which stand for all text encoders of a pipeline."""

    tower: ChineseCLIPTextModel
    adapter: TextAdapter

    def __call__(self, input_ids: Int[Array, "n t"]) -> CLIPTextOutput:
        """input_ids: padded to the adapter's num_tokens."""
        return self.adapter(self.tower(input_ids))

    @property
    def config(self) -> BertConfig:
        return self.tower.config

    @property
    def dtype(self) -> jnp.dtype:
        return self.adapter.dtype

    @property
    def num_tokens(self) -> int:
        return self.adapter.config.num_tokens

    @property
    def states_dim(self) -> int:
        return self.adapter.config.states_dim

    @property
    def pooled_dim(self) -> int:
        return self.adapter.config.pooled_dim
