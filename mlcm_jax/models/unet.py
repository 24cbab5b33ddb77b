"""diffusers' UNet2DConditionModel from its config.json (SDXL, arXiv 2307.01952; SD, arXiv 2112.10752)."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mlcm_jax.errors import UserError
from mlcm_jax.models.attention import Transformer2DModel
from mlcm_jax.models.config import ConfigValues, Table, read_config
from mlcm_jax.models.layers import Conv, Dense, Downsample2D, GroupNorm, ResnetBlock2D, Upsample2D
from mlcm_jax.types import TextConditioning

CLASS_NAME = "UNet2DConditionModel"
# block type: whether it has attention
DOWN_BLOCKS = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
UP_BLOCKS = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}
OFF = (False, (False,))
ABSENT = (None, (None,))

# key: (diffusers' default, supported values or None for any)
CONFIG_KEYS: Table = {
    "sample_size": (None, None),
    "in_channels": (4, None),
    "out_channels": (4, None),
    "center_input_sample": OFF,
    "flip_sin_to_cos": (True, (True, False)),
    "freq_shift": (0, None),
    "down_block_types": (("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), None),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", ("UNetMidBlock2DCrossAttn",)),
    "up_block_types": (("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, None),
    "only_cross_attention": OFF,
    "block_out_channels": ((320, 640, 1280, 1280), None),
    "layers_per_block": (2, None),
    "downsample_padding": (1, (1,)),
    "mid_block_scale_factor": (1, (1,)),
    "dropout": (0.0, (0.0,)),
    "act_fn": ("silu", ("silu", "swish")),
    "norm_num_groups": (32, None),
    "norm_eps": (1e-5, None),
    "cross_attention_dim": (1280, None),
    "transformer_layers_per_block": (1, None),
    "reverse_transformer_layers_per_block": ABSENT,
    "encoder_hid_dim": ABSENT,
    "encoder_hid_dim_type": ABSENT,
    "attention_head_dim": (8, None),
    "num_attention_heads": ABSENT,
    "dual_cross_attention": OFF,
    "use_linear_projection": (False, (True, False)),
    "class_embed_type": ABSENT,
    "addition_embed_type": (None, (None, "text_time")),
    "addition_time_embed_dim": (None, None),
    "num_class_embeds": ABSENT,
    "upcast_attention": (False, (True, False, None)),
    "resnet_time_scale_shift": ("default", ("default",)),
    "resnet_skip_time_act": OFF,
    "resnet_out_scale_factor": (1.0, (1, 1.0)),
    "time_embedding_type": ("positional", ("positional",)),
    "time_embedding_dim": ABSENT,
    "time_embedding_act_fn": ABSENT,
    "timestep_post_act": ABSENT,
    "time_cond_proj_dim": (None, None),
    "conv_in_kernel": (3, (3,)),
    "conv_out_kernel": (3, (3,)),
    "projection_class_embeddings_input_dim": (None, None),
    "attention_type": ("default", ("default",)),
    "class_embeddings_concat": OFF,
    "mid_block_only_cross_attention": (None, (None, False)),
    "cross_attention_norm": ABSENT,
    "addition_embed_type_num_heads": (64, None),
}


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """The keys of config.json that shape the network; those that may differ from block to block are tuples."""

    block_out_channels: tuple[int, ...]
    down_has_attention: tuple[bool, ...]
    up_has_attention: tuple[bool, ...]
    layers_per_block: tuple[int, ...]
    transformer_layers_per_block: tuple[int, ...]
    num_heads: tuple[int, ...]
    out_channels: int
    norm_num_groups: int
    norm_eps: float
    act_fn: str
    use_linear_projection: bool
    flip_sin_to_cos: bool
    freq_shift: float
    addition_time_embed_dim: int | None  # None: no pooled state and time ids
    time_cond_proj_dim: int | None
    remat: bool

    @classmethod
    def read(cls, config: dict[str, Any], remat: bool) -> "UNetConfig":
        """Validate diffusers' config.json; raises UserError for a setting that is not supported."""
        values = read_config(config, CONFIG_KEYS, CLASS_NAME)
        has_text_time = values["addition_embed_type"] == "text_time"
        if has_text_time and not isinstance(values["addition_time_embed_dim"], int):
            raise _unsupported(values, "addition_time_embed_dim", "a number, as addition_embed_type is text_time")
        read_here: dict[str, Any] = {
            "down_has_attention": _has_attention(values, "down_block_types", DOWN_BLOCKS),
            "up_has_attention": _has_attention(values, "up_block_types", UP_BLOCKS),
            "layers_per_block": _each_level(values, "layers_per_block"),
            "transformer_layers_per_block": _each_level(values, "transformer_layers_per_block"),
            # diffusers reads the number of heads from a key that is named after their width
            "num_heads": _each_level(values, "attention_head_dim"),
            "addition_time_embed_dim": values["addition_time_embed_dim"] if has_text_time else None,
            "remat": remat,
        }
        fields = [f.name for f in dataclasses.fields(cls)]
        return cls(**{name: read_here[name] if name in read_here else values[name] for name in fields})


def _unsupported(values: ConfigValues, key: str, supported: str) -> UserError:
    value = list(values[key]) if isinstance(values[key], tuple) else values[key]
    return UserError(f"{CLASS_NAME}'s config.json has {key}={value}, which is not supported: use {supported}.")


def _each_level(values: ConfigValues, key: str) -> tuple[int, ...]:
    """One number for each resolution, from a number for all or a list."""
    count, value = len(values["block_out_channels"]), values[key]
    levels = value if isinstance(value, tuple) else (value,) * count
    if len(levels) != count or not all(isinstance(v, int) for v in levels):
        raise _unsupported(values, key, f"a number or a list of {count} numbers")
    return levels


def _has_attention(values: ConfigValues, key: str, types: dict[str, bool]) -> tuple[bool, ...]:
    """Whether each block attends to the prompt."""
    count, blocks = len(values["block_out_channels"]), values[key]
    if len(blocks) != count or not set(blocks) <= set(types):
        raise _unsupported(values, key, f"{count} of {', '.join(types)}")
    return tuple(types[name] for name in blocks)


def sinusoidal_embedding(
    values: Float[Array, " n"], dim: int, flip_sin_to_cos: bool, freq_shift: float
) -> Float[Array, "n dim"]:
    """Sines and cosines of ``values`` at dim / 2 frequencies from 1 to 1 / 10000, float32 (arXiv 1706.03762, 3.5)."""
    half = dim // 2
    exponents = jnp.arange(half, dtype=jnp.float32) / (half - freq_shift)
    angles = values.astype(jnp.float32)[:, None] * jnp.exp(-jnp.log(10000.0) * exponents)[None]
    waves = [jnp.sin(angles), jnp.cos(angles)]
    return jnp.concatenate(waves[::-1] if flip_sin_to_cos else waves, axis=-1)


class TimestepEmbedding(nn.Module):
    """Two-layer perceptron; ``condition`` (a guidance-scale embedding) is projected and added to its input."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n d"], condition: Float[Array, "n e"] | None = None) -> Float[Array, "n f"]:
        if condition is not None:
            x = x + Dense(x.shape[-1], use_bias=False, dtype=self.dtype, name="cond_proj")(condition)
        x = jax.nn.silu(Dense(self.features, dtype=self.dtype, name="linear_1")(x))
        return Dense(self.features, dtype=self.dtype, name="linear_2")(x)


class Stage(nn.Module):
    """What the blocks of all three kinds share: how a resnet and a transformer are built."""

    config: UNetConfig
    features: int
    num_layers: int
    num_transformer_layers: int  # 0: no attention
    num_heads: int
    dtype: jnp.dtype

    def resnet(self, i: int, x, temb):
        cfg = self.config
        # Named as torch names them, so recomputing the activations must not change the name.
        block = nn.remat(ResnetBlock2D) if cfg.remat else ResnetBlock2D
        args = (self.features, cfg.norm_num_groups, cfg.norm_eps, cfg.act_fn, self.dtype)
        return block(*args, name=f"resnets_{i}")(x, temb)

    def transformer(self, i: int, x, context):
        if not self.num_transformer_layers:
            return x
        cfg = self.config
        return Transformer2DModel(
            self.num_transformer_layers,
            self.num_heads,
            cfg.norm_num_groups,
            cfg.use_linear_projection,
            cfg.remat,
            self.dtype,
            name=f"attentions_{i}",
        )(x, context)


class DownBlock(Stage):
    """DownBlock2D and CrossAttnDownBlock2D; returns the output and all states for the way up."""

    downsample: bool = False

    @nn.compact
    def __call__(self, x, temb, context):
        states = []
        for i in range(self.num_layers):
            x = self.transformer(i, self.resnet(i, x, temb), context)
            states.append(x)
        if self.downsample:
            x = Downsample2D(self.features, dtype=self.dtype, name="downsamplers_0")(x)
            states.append(x)
        return x, states


class MidBlock(Stage):
    """UNetMidBlock2DCrossAttn."""

    @nn.compact
    def __call__(self, x, temb, context):
        x = self.transformer(0, self.resnet(0, x, temb), context)
        return self.resnet(1, x, temb)


class UpBlock(Stage):
    """UpBlock2D and CrossAttnUpBlock2D; each layer takes the newest of ``states``."""

    upsample: bool = False

    @nn.compact
    def __call__(self, x, temb, context, states):
        for i in range(self.num_layers):
            joined = jnp.concatenate([x, states[-1 - i]], axis=-1)
            x = self.transformer(i, self.resnet(i, joined, temb), context)
        return Upsample2D(self.features, dtype=self.dtype, name="upsamplers_0")(x) if self.upsample else x


class UNet2DConditionModel(nn.Module):
    """The denoiser: predicts noise, v or x0 from noisy latents, as the teacher's scheduler config says."""

    config: UNetConfig
    dtype: jnp.dtype = jnp.float32

    @classmethod
    def from_config(cls, config: dict[str, Any], dtype=jnp.float32, remat: bool = False) -> "UNet2DConditionModel":
        """Build from diffusers' config.json; remat: recompute activations in the backward pass.

        Raises UserError for a setting that is not supported.
        """
        return cls(UNetConfig.read(config, remat), dtype)

    @nn.compact
    def __call__(
        self,
        sample: Float[Array, "n h w c"],
        timesteps: Array,
        conditioning: TextConditioning,
        timestep_cond: Float[Array, "n e"] | None = None,
    ) -> Float[Array, "n h w o"]:
        """Prediction for scaled latents at ``timesteps`` 0..999 (int or float, [n]).

        timestep_cond: embedding of the guidance scale, for students with ``time_cond_proj_dim``.
        """
        cfg, channels = self.config, self.config.block_out_channels
        context = conditioning.hidden_states.astype(self.dtype)
        temb = self._time_embedding(timesteps, conditioning, timestep_cond)
        x = Conv(channels[0], dtype=self.dtype, name="conv_in")(sample)
        last, states = len(channels) - 1, [x]
        for i in range(len(channels)):
            args = self._stage_args(i, cfg.layers_per_block[i], cfg.down_has_attention[i])
            x, new_states = DownBlock(*args, downsample=i < last, name=f"down_blocks_{i}")(x, temb, context)
            states += new_states
        x = MidBlock(*self._stage_args(last, 1, True), name="mid_block")(x, temb, context)
        for i in range(len(channels)):
            level = last - i
            num_layers = cfg.layers_per_block[level] + 1
            args = self._stage_args(level, num_layers, cfg.up_has_attention[i])
            x = UpBlock(*args, upsample=i < last, name=f"up_blocks_{i}")(x, temb, context, states[-num_layers:])
            states = states[:-num_layers]
        x = jax.nn.silu(GroupNorm(cfg.norm_num_groups, cfg.norm_eps, self.dtype, name="conv_norm_out")(x))
        return Conv(cfg.out_channels, dtype=self.dtype, name="conv_out")(x)

    def _stage_args(self, level: int, num_layers: int, has_attention: bool) -> tuple:
        cfg = self.config
        depth = cfg.transformer_layers_per_block[level] if has_attention else 0
        return cfg, cfg.block_out_channels[level], num_layers, depth, cfg.num_heads[level], self.dtype

    def _time_embedding(self, timesteps, conditioning, timestep_cond) -> Float[Array, "n f"]:
        cfg, width = self.config, self.config.block_out_channels[0]
        if (timestep_cond is None) != (cfg.time_cond_proj_dim is None):
            raise ValueError("timestep_cond is given exactly when config.json has time_cond_proj_dim")
        waves = sinusoidal_embedding(timesteps, width, cfg.flip_sin_to_cos, cfg.freq_shift)
        temb = TimestepEmbedding(4 * width, self.dtype, name="time_embedding")(waves, timestep_cond)
        if cfg.addition_time_embed_dim is None:
            return temb
        ids = conditioning.time_ids.reshape(-1)
        waves = sinusoidal_embedding(ids, cfg.addition_time_embed_dim, cfg.flip_sin_to_cos, cfg.freq_shift)
        pooled = conditioning.pooled.astype(jnp.float32)
        added = jnp.concatenate([pooled, waves.reshape(len(pooled), -1)], axis=-1)
        return temb + TimestepEmbedding(4 * width, self.dtype, name="add_embedding")(added)
