"""CLIP's text and vision towers as transformers has them (arXiv 2103.00020), driven by its config.json."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mlcm_jax.models.attention_backend import dot_product_attention
from mlcm_jax.models.clip_config import TextTowerConfig, TowerConfig, VisionTowerConfig, read_clip, text_class
from mlcm_jax.models.layers import ACTIVATIONS, Conv, Dense, Embedding, LayerNorm
from mlcm_jax.parallel.sharding import split_batch

LEGACY_EOS = 2  # what old config.json files say for every tokenizer; the end of text is then the largest id


@flax.struct.dataclass
class CLIPTextOutput:
    """penultimate: states before the last layer, as SDXL takes them. last_hidden_state: after the final norm.

    pooled: the end-of-text token's state, projected where the model has a projection.
    """

    penultimate: Float[Array, "n t d"]
    last_hidden_state: Float[Array, "n t d"]
    pooled: Float[Array, "n p"]


class CLIPAttention(nn.Module):
    config: TowerConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, mask):
        heads, width = self.config.num_attention_heads, self.config.hidden_size
        q, k, v = (Dense(width, dtype=self.dtype, name=f"{name}_proj")(x) for name in "qkv")
        return Dense(width, dtype=self.dtype, name="out_proj")(dot_product_attention(q, k, v, heads, mask))


class CLIPMLP(nn.Module):
    config: TowerConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        x = Dense(self.config.intermediate_size, dtype=self.dtype, name="fc1")(x)
        return Dense(self.config.hidden_size, dtype=self.dtype, name="fc2")(ACTIVATIONS[self.config.hidden_act](x))


class CLIPLayer(nn.Module):
    """Pre-norm transformer layer in the form nn.scan takes; it carries its input along with its output."""

    config: TowerConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, states, mask):
        cfg, dtype = self.config, self.dtype
        x = split_batch(states[0])
        h = LayerNorm(cfg.layer_norm_eps, dtype, name="layer_norm1")(x)
        y = x + CLIPAttention(cfg, dtype, name="self_attn")(h, mask)
        h = LayerNorm(cfg.layer_norm_eps, dtype, name="layer_norm2")(y)
        return (y + CLIPMLP(cfg, dtype, name="mlp")(h), x), None


class CLIPEncoder(nn.Module):
    """All layers; returns the last layer's output and its input, the only inner state that is kept."""

    config: TowerConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, mask):
        layers = nn.scan(
            CLIPLayer,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]  (as in attention.py)
            length=self.config.num_hidden_layers,
        )
        states, _ = layers(self.config, self.dtype, name="layers")((x, x), mask)
        return states


class CLIPTextEmbeddings(nn.Module):
    config: TextTowerConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, input_ids):
        cfg = self.config
        tokens = Embedding(cfg.vocab_size, cfg.hidden_size, self.dtype, name="token_embedding")(input_ids)
        places = Embedding(cfg.max_position_embeddings, cfg.hidden_size, self.dtype, name="position_embedding")
        return tokens + places(jnp.arange(input_ids.shape[1]))[None]


class CLIPTextTransformer(nn.Module):
    config: TextTowerConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, input_ids: Int[Array, "n t"]) -> CLIPTextOutput:
        cfg, (n, t) = self.config, input_ids.shape
        x = CLIPTextEmbeddings(cfg, self.dtype, name="embeddings")(input_ids)
        causal = jnp.tril(jnp.ones((1, 1, t, t), bool))
        x, penultimate = CLIPEncoder(cfg, self.dtype, name="encoder")(x, causal)
        x = LayerNorm(cfg.layer_norm_eps, self.dtype, name="final_layer_norm")(x)
        legacy = cfg.eos_token_id == LEGACY_EOS
        end = (input_ids if legacy else (input_ids == cfg.eos_token_id)).argmax(-1)
        return CLIPTextOutput(penultimate, x, x[jnp.arange(n), end])


class CLIPTextModel(nn.Module):
    """CLIPTextModel, and CLIPTextModelWithProjection where ``with_projection``."""

    config: TextTowerConfig
    with_projection: bool
    dtype: jnp.dtype = jnp.float32

    @classmethod
    def from_config(cls, config: dict[str, Any], dtype=jnp.float32) -> "CLIPTextModel":
        """Build from transformers' config.json; its "architectures" decides on the projection.

        Raises UserError for a key or a value that is not supported.
        """
        name = text_class(config)
        return cls(TextTowerConfig.read(config, name), name == "CLIPTextModelWithProjection", dtype)

    @property
    def num_tokens(self) -> int:
        return self.config.max_position_embeddings

    @property
    def states_dim(self) -> int:
        return self.config.hidden_size

    @property
    def pooled_dim(self) -> int:
        return self.config.projection_dim if self.with_projection else self.config.hidden_size

    @nn.compact
    def __call__(self, input_ids: Int[Array, "n t"]) -> CLIPTextOutput:
        """input_ids: padded to at most max_position_embeddings."""
        out = CLIPTextTransformer(self.config, self.dtype, name="text_model")(input_ids)
        if not self.with_projection:
            return out
        project = Dense(self.config.projection_dim, use_bias=False, dtype=self.dtype, name="text_projection")
        return CLIPTextOutput(out.penultimate, out.last_hidden_state, project(out.pooled))


@flax.struct.dataclass
class CLIPVisionOutput:
    """last_hidden_state: of all positions, before the final norm. pooled: the first position's, after it."""

    last_hidden_state: Float[Array, "n t d"]
    pooled: Float[Array, "n d"]


class CLIPVisionEmbeddings(nn.Module):
    config: VisionTowerConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, pixel_values):
        cfg = self.config
        size = cfg.patch_size
        patch = Conv(cfg.hidden_size, size, size, 0, use_bias=False, dtype=self.dtype, name="patch_embedding")
        patches = patch(pixel_values)
        n = patches.shape[0]
        patches = patches.reshape(n, -1, cfg.hidden_size)
        first = self.param("class_embedding", nn.initializers.normal(0.02), (cfg.hidden_size,))
        first = jnp.broadcast_to(first.astype(self.dtype), (n, 1, cfg.hidden_size))
        x = jnp.concatenate([first, patches], axis=1)
        places = Embedding((cfg.image_size // size) ** 2 + 1, cfg.hidden_size, self.dtype, name="position_embedding")
        return x + places(jnp.arange(x.shape[1]))[None]


class CLIPVisionTransformer(nn.Module):
    config: VisionTowerConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, pixel_values: Float[Array, "n h w 3"]) -> CLIPVisionOutput:
        cfg = self.config
        x = CLIPVisionEmbeddings(cfg, self.dtype, name="embeddings")(pixel_values)
        x = LayerNorm(cfg.layer_norm_eps, self.dtype, name="pre_layrnorm")(x)
        x, _ = CLIPEncoder(cfg, self.dtype, name="encoder")(x, None)
        return CLIPVisionOutput(x, LayerNorm(cfg.layer_norm_eps, self.dtype, name="post_layernorm")(x[:, 0]))


class CLIPVisionModel(nn.Module):
    """CLIPVisionModelWithProjection."""

    config: VisionTowerConfig
    dtype: jnp.dtype = jnp.float32

    @classmethod
    def from_config(cls, config: dict[str, Any], dtype=jnp.float32) -> "CLIPVisionModel":
        """Build from transformers' config.json; raises UserError for a key or a value that is not supported."""
        return cls(VisionTowerConfig.read(config, "CLIPVisionModelWithProjection"), dtype)

    @nn.compact
    def __call__(self, pixel_values: Float[Array, "n h w 3"]) -> Float[Array, "n p"]:
        """Image embeddings of normalised pixels."""
        out = CLIPVisionTransformer(self.config, self.dtype, name="vision_model")(pixel_values)
        return Dense(self.config.projection_dim, use_bias=False, dtype=self.dtype, name="visual_projection")(out.pooled)


class CLIPModel(nn.Module):
    """Both towers in one space (CLIPModel): a scorer of images against captions."""

    text: TextTowerConfig
    vision: VisionTowerConfig
    projection_dim: int
    logit_scale_init: float
    dtype: jnp.dtype = jnp.float32

    @classmethod
    def from_config(cls, config: dict[str, Any], dtype=jnp.float32) -> "CLIPModel":
        """Build from transformers' config.json; raises UserError for a key or a value that is not supported."""
        return cls(*read_clip(config), dtype)

    def setup(self):
        self.text_model = CLIPTextTransformer(self.text, self.dtype)
        self.vision_model = CLIPVisionTransformer(self.vision, self.dtype)
        self.text_projection = Dense(self.projection_dim, use_bias=False, dtype=self.dtype)
        self.visual_projection = Dense(self.projection_dim, use_bias=False, dtype=self.dtype)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(self.logit_scale_init), ())

    def __call__(self, input_ids: Int[Array, "n t"], pixel_values: Float[Array, "m h w 3"]):
        """Image embeddings [m p] and text embeddings [n p], not normalised."""
        return self.encode_images(pixel_values), self.encode_texts(input_ids)

    def encode_images(self, pixel_values: Float[Array, "m h w 3"]) -> Float[Array, "m p"]:
        return self.visual_projection(self.vision_model(pixel_values).pooled)

    def encode_texts(self, input_ids: Int[Array, "n t"]) -> Float[Array, "n p"]:
        return self.text_projection(self.text_model(input_ids).pooled)
