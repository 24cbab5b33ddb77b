"""BLIP's image-grounded text encoder (arXiv 2201.12086) with ImageReward's head (arXiv 2304.05977).

Parameter names are those of ImageReward's published file: a ViT in timm's layout, a BERT whose layers also attend to
the image's patches, a head of linear layers.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mlcm_jax.json_config import COUNT, LAYERS, NOT_NEGATIVE, SIZE, UNREAD, Table, read_config
from mlcm_jax.models.attention_backend import dot_product_attention
from mlcm_jax.models.bert import BertAttention, BertConfig, BertEmbeddings, BertIntermediate, BertOutput, padding_mask
from mlcm_jax.models.layers import ACTIVATIONS, Conv, Dense, LayerNorm
from mlcm_jax.parallel.sharding import split_batch

REWARD_MEAN, REWARD_STD = 0.16717362830052426, 1.0333394966054072  # of the published weights
HEAD_WIDTHS = (1024, 128, 64, 16, 1)
# Their place among linear layers and dropouts, which the file's names count. Dropout does nothing when scoring.
HEAD_PLACES = (0, 2, 4, 6, 7)


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Of the ViT; the file that is read has none of it, so the defaults are ImageReward's (ViT-L/16 at 224 px)."""

    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 16
    layer_norm_eps: float = 1e-6


# med_config.json. What is UNREAD has no effect on a score.
MED_KEYS: Table = {
    "hidden_act": ("gelu", ("gelu",)),
    "hidden_size": (768, SIZE),
    "intermediate_size": (3072, SIZE),
    "layer_norm_eps": (1e-12, NOT_NEGATIVE),
    "max_position_embeddings": (512, SIZE),
    "num_attention_heads": (12, SIZE),
    "num_hidden_layers": (12, LAYERS),
    "pad_token_id": (0, COUNT),
    "vocab_size": (30524, SIZE),
    "add_cross_attention": (True, (True,)),
    "model_type": ("bert", ("bert",)),
    "position_embedding_type": ("absolute", ("absolute",)),
    **dict.fromkeys(
        (
            *("architectures", "attention_probs_dropout_prob", "hidden_dropout_prob", "initializer_range"),
            *("type_vocab_size", "encoder_width", "transformers_version", "torch_dtype", "dtype"),
        ),
        (None, UNREAD),
    ),
}


def read_text_config(config: Mapping[str, Any]) -> BertConfig:
    """The BERT's settings from med_config.json; raises UserError for a key or a value that is not supported."""
    values = read_config(dict(config), MED_KEYS, "ImageReward", file_name="med_config.json")
    return BertConfig.of(values, type_vocab_size=0)


def _stack(layer, length: int):
    return nn.scan(
        layer,
        variable_axes={"params": 0, "lora": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]  (as in attention.py)
        length=length,
    )


class _VisionAttention(nn.Module):
    heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        q, k, v = jnp.split(Dense(3 * width, dtype=self.dtype, name="qkv")(x), 3, axis=-1)
        return Dense(width, dtype=self.dtype, name="proj")(dot_product_attention(q, k, v, self.heads))


class _VisionMLP(nn.Module):
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        hidden = ACTIVATIONS["gelu"](Dense(4 * x.shape[-1], dtype=self.dtype, name="fc1")(x))
        return Dense(x.shape[-1], dtype=self.dtype, name="fc2")(hidden)


class _VisionBlock(nn.Module):
    """Pre-norm block in the form that nn.scan takes."""

    config: VisionConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, _):
        cfg, dtype, x = self.config, self.dtype, split_batch(x)
        h = LayerNorm(cfg.layer_norm_eps, dtype, name="norm1")(x)
        x = x + _VisionAttention(cfg.num_attention_heads, dtype, name="attn")(h)
        h = LayerNorm(cfg.layer_norm_eps, dtype, name="norm2")(x)
        return x + _VisionMLP(dtype, name="mlp")(h), None


class _PatchEmbed(nn.Module):
    config: VisionConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, pixels):
        size = self.config.patch_size
        patches = Conv(self.config.hidden_size, size, size, 0, dtype=self.dtype, name="proj")(pixels)
        return patches.reshape(len(pixels), -1, self.config.hidden_size)


class VisionTransformer(nn.Module):
    """States of the class token and of all patches."""

    config: VisionConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, pixels: Float[Array, "n h w 3"]) -> Float[Array, "n t d"]:
        cfg = self.config
        patches = _PatchEmbed(cfg, self.dtype, name="patch_embed")(pixels)
        n, count, width = patches.shape
        first = self.param("cls_token", nn.initializers.normal(0.02), (1, 1, width)).astype(self.dtype)
        places = self.param("pos_embed", nn.initializers.normal(0.02), (1, count + 1, width)).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(first, (n, 1, width)), patches], axis=1) + places
        x, _ = _stack(_VisionBlock, cfg.num_hidden_layers)(cfg, self.dtype, name="blocks")(x, None)
        return LayerNorm(cfg.layer_norm_eps, self.dtype, name="norm")(x)


class _TextLayer(nn.Module):
    """Post-norm layer: itself, the image, feed-forward; in the form that nn.scan takes."""

    config: BertConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, patches, mask):
        cfg, dtype = self.config, self.dtype
        x, patches = split_batch((x, patches))
        x = BertAttention(cfg, dtype, name="attention")(x, x, mask)
        x = BertAttention(cfg, dtype, name="crossattention")(x, patches, None)
        hidden = BertIntermediate(cfg, dtype, name="intermediate")(x)
        return BertOutput(cfg, dtype, name="output")(hidden, x), None


class _TextLayers(nn.Module):
    config: BertConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, patches, mask):
        layers = _stack(_TextLayer, self.config.num_hidden_layers)(self.config, self.dtype, name="layer")
        return layers(x, patches, mask)[0]


class TextEncoder(nn.Module):
    """Token states of a text that looks at an image; padding, by its id, is not attended to."""

    config: BertConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, input_ids: Int[Array, "n t"], patches: Float[Array, "n s e"]) -> Float[Array, "n t d"]:
        x = BertEmbeddings(self.config, self.dtype, name="embeddings")(input_ids)
        mask = padding_mask(input_ids, self.config)
        return _TextLayers(self.config, self.dtype, name="encoder")(x, patches, mask)


class ScoreHead(nn.Module):
    """Five linear layers with nothing between them (dropout in training): features to one number."""

    @nn.compact
    def __call__(self, x: Float[Array, "n d"]) -> Float[Array, " n"]:
        for place, width in zip(HEAD_PLACES, HEAD_WIDTHS, strict=True):
            x = Dense(width, name=f"layers_{place}")(x)
        return x[:, 0]


class _Blip(nn.Module):
    vision: VisionConfig
    text: BertConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, pixels, input_ids):
        patches = VisionTransformer(self.vision, self.dtype, name="visual_encoder")(pixels)
        return TextEncoder(self.text, self.dtype, name="text_encoder")(input_ids, patches)


class ImageReward(nn.Module):
    """How much people would like an image for a prompt; over the training images, mean 0 and spread 1."""

    vision: VisionConfig
    text: BertConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, pixels: Float[Array, "n h w 3"], input_ids: Int[Array, "n t"]) -> Float[Array, " n"]:
        """Rewards, float32, of normalised pixels and a BERT tokenizer's ids."""
        states = _Blip(self.vision, self.text, self.dtype, name="blip")(pixels, input_ids)
        return (ScoreHead(name="mlp")(states[:, 0].astype(jnp.float32)) - REWARD_MEAN) / REWARD_STD
