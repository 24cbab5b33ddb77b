"""BERT's embeddings and post-norm layers (arXiv 1810.04805) under transformers' parameter names."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mlcm_jax.errors import UserError
from mlcm_jax.json_config import ConfigValues
from mlcm_jax.models.attention_backend import dot_product_attention
from mlcm_jax.models.layers import ACTIVATIONS, Dense, Embedding, LayerNorm


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The keys of config.json that shape a BERT. type_vocab_size: 0 without embeddings of token types."""

    hidden_act: str
    hidden_size: int
    intermediate_size: int
    layer_norm_eps: float
    max_position_embeddings: int
    num_attention_heads: int
    num_hidden_layers: int
    pad_token_id: int
    vocab_size: int
    type_vocab_size: int = 0

    @classmethod
    def of(cls, values: ConfigValues, **others: Any) -> "BertConfig":
        """From checked settings; raises UserError for heads that do not divide the width."""
        if values["hidden_size"] % values["num_attention_heads"]:
            raise UserError(
                f"{values.source} has hidden_size={values['hidden_size']}, which "
                f"num_attention_heads={values['num_attention_heads']} does not divide."
            )
        names = [field.name for field in dataclasses.fields(cls) if field.name not in others]
        return cls(**{name: values[name] for name in names}, **others)


class BertSelfAttention(nn.Module):
    """Attention from ``x`` to ``context``; mask: true where it may go."""

    config: BertConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, context, mask):
        width = self.config.hidden_size
        q = Dense(width, dtype=self.dtype, name="query")(x)
        k = Dense(width, dtype=self.dtype, name="key")(context)
        v = Dense(width, dtype=self.dtype, name="value")(context)
        return dot_product_attention(q, k, v, self.config.num_attention_heads, mask)


class BertOutput(nn.Module):
    """A linear layer, then the norm of its sum with the residual."""

    config: BertConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, residual):
        x = Dense(self.config.hidden_size, dtype=self.dtype, name="dense")(x)
        return LayerNorm(self.config.layer_norm_eps, self.dtype, name="LayerNorm")(x + residual)


class BertAttention(nn.Module):
    config: BertConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, context, mask):
        attended = BertSelfAttention(self.config, self.dtype, name="self")(x, context, mask)
        return BertOutput(self.config, self.dtype, name="output")(attended, x)


class BertIntermediate(nn.Module):
    config: BertConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        x = Dense(self.config.intermediate_size, dtype=self.dtype, name="dense")(x)
        return ACTIVATIONS[self.config.hidden_act](x)


class BertEmbeddings(nn.Module):
    """Of words, positions and, where the config has them, of the first token type, which all tokens are of."""

    config: BertConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, input_ids: Int[Array, "n t"]) -> Float[Array, "n t d"]:
        cfg, dtype = self.config, self.dtype
        x = Embedding(cfg.vocab_size, cfg.hidden_size, dtype, name="word_embeddings")(input_ids)
        if cfg.type_vocab_size:
            types = Embedding(cfg.type_vocab_size, cfg.hidden_size, dtype, name="token_type_embeddings")
            x = x + types(jnp.zeros_like(input_ids))
        places = Embedding(cfg.max_position_embeddings, cfg.hidden_size, dtype, name="position_embeddings")
        x = x + places(jnp.arange(input_ids.shape[1]))[None]
        return LayerNorm(cfg.layer_norm_eps, dtype, name="LayerNorm")(x)


def padding_mask(input_ids: Int[Array, "n t"], config: BertConfig) -> Bool[Array, "n 1 1 t"]:
    """Where attention may go: everywhere but to padding, which is told by its id."""
    return (input_ids != config.pad_token_id)[:, None, None, :]
