"""diffusers' UNet2DConditionModel from its config.json (SDXL, arXiv 2307.01952; SD, arXiv 2112.10752)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mlcm_jax.models.attention import Context, ImageTokens, Transformer2DModel
from mlcm_jax.models.attention_backend import AUTO, AttentionBackend
from mlcm_jax.models.layers import Conv, Dense, Downsample2D, GroupNorm, ResnetBlock2D, Upsample2D
from mlcm_jax.models.remat import REMAT_POLICIES, rematerialised
from mlcm_jax.models.unet_config import Depths, EncoderConfig, UNetConfig
from mlcm_jax.parallel.sharding import split_batch
from mlcm_jax.types import TextConditioning


def sinusoidal_embedding(
    values: Float[Array, " n"], dim: int, flip_sin_to_cos: bool, freq_shift: float
) -> Float[Array, "n dim"]:
    """Sines and cosines of ``values`` at dim / 2 frequencies from 1 to 1 / 10000, float32 (arXiv 1706.03762, 3.5)."""
    half = dim // 2
    exponents = jnp.arange(half, dtype=jnp.float32) / (half - freq_shift)
    angles = values.astype(jnp.float32)[:, None] * jnp.exp(-jnp.log(10000.0) * exponents)[None]
    waves = [jnp.sin(angles), jnp.cos(angles)]
    return jnp.concatenate(waves[::-1] if flip_sin_to_cos else waves, axis=-1)


def guidance_embedding(guidance_scale: Float[Array, " n"], dim: int) -> Float[Array, "n dim"]:
    """The embedding of the guidance scale for a student with ``time_cond_proj_dim`` (arXiv 2310.04378), float32.

    It is w of eps_c + w (eps_c - eps_u), which is one less than the scale used elsewhere, times 1000.
    """
    return sinusoidal_embedding(1000 * (guidance_scale - 1), dim, flip_sin_to_cos=False, freq_shift=1)


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


class UNetBlock(nn.Module):
    """What the blocks of all three kinds share: layers of a resnet and, where it has a depth, a transformer."""

    config: EncoderConfig
    features: int
    depths: Depths
    num_heads: int
    dtype: jnp.dtype

    def layer(self, i: int, x, temb, context):
        cfg = self.config
        # Named as torch names them, so recomputing the activations must not change the name.
        block = rematerialised(ResnetBlock2D, cfg.remat)
        args = (self.features, cfg.norm_num_groups, cfg.norm_eps, cfg.act_fn, self.dtype)
        x = block(*args, name=f"resnets_{i}")(x, temb)
        depth = self.depths[i]
        if depth is None:
            return x
        return Transformer2DModel(
            depth,
            self.num_heads,
            cfg.norm_num_groups,
            cfg.use_linear_projection,
            cfg.attention,
            cfg.remat,
            cfg.unroll,
            self.dtype,
            name=f"attentions_{i}",
        )(x, context)


class DownBlock(UNetBlock):
    """DownBlock2D and CrossAttnDownBlock2D; returns the output and all states for the way up.

    feature: of T2I-Adapters, added where diffusers does: after the last transformer, or else to the block's output.
    """

    downsample: bool = False

    @nn.compact
    def __call__(self, x, temb, context, feature=None):
        states, attends = [], self.depths[-1] is not None
        for i in range(len(self.depths)):
            x = self.layer(i, x, temb, context)
            states.append(x)
        if feature is not None and (attends or not self.downsample):
            x = states[-1] = x + feature.astype(self.dtype)
        if self.downsample:
            x = Downsample2D(self.features, dtype=self.dtype, name="downsamplers_0")(x)
            if feature is not None and not attends:
                x = x + feature.astype(self.dtype)
            states.append(x)
        return x, states


class MidBlock(UNetBlock):
    """UNetMidBlock2DCrossAttn, and UNetMidBlock2D, which is one resnet."""

    @nn.compact
    def __call__(self, x, temb, context):
        for i in range(len(self.depths)):
            x = self.layer(i, x, temb, context)
        return x


class UpBlock(UNetBlock):
    """UpBlock2D and CrossAttnUpBlock2D; each layer takes the newest of ``states``."""

    upsample: bool = False

    @nn.compact
    def __call__(self, x, temb, context, states):
        for i in range(len(self.depths)):
            x = self.layer(i, jnp.concatenate([x, states[-1 - i]], axis=-1), temb, context)
        return Upsample2D(self.features, dtype=self.dtype, name="upsamplers_0")(x) if self.upsample else x


@flax.struct.dataclass
class Residuals:
    """What a ControlNet adds to a UNet: to each state that the way up reads, and to what leaves the middle."""

    down: tuple[Float[Array, "n h w c"], ...]
    mid: Float[Array, "n h w c"]


Features = Sequence[Float[Array, "n h w c"]]  # of T2I-Adapters: of the down blocks in order, then of the middle


class UNetEncoder(nn.Module):
    """The time's embedding, the way down and the middle, which UNet and ControlNet (models/controlnet.py) share."""

    config: EncoderConfig
    dtype: jnp.dtype = jnp.float32

    def stage_args(self, level: int, depths: Depths) -> tuple:
        """Arguments of the block of a resolution."""
        cfg = self.config
        return cfg, cfg.block_out_channels[level], depths, cfg.num_heads[level], self.dtype

    def embed_time(self, timesteps, conditioning: TextConditioning, timestep_cond=None) -> Float[Array, "n f"]:
        """Of the timestep, and of the pooled state and time ids where the network takes them."""
        cfg, width = self.config, self.config.block_out_channels[0]
        waves = sinusoidal_embedding(timesteps, width, cfg.flip_sin_to_cos, cfg.freq_shift)
        temb = TimestepEmbedding(4 * width, self.dtype, name="time_embedding")(waves, timestep_cond)
        if cfg.addition_time_embed_dim is None:
            return temb
        ids = conditioning.time_ids.reshape(-1)
        waves = sinusoidal_embedding(ids, cfg.addition_time_embed_dim, cfg.flip_sin_to_cos, cfg.freq_shift)
        pooled = conditioning.pooled.astype(jnp.float32)
        added = jnp.concatenate([pooled, waves.reshape(len(pooled), -1)], axis=-1)
        return temb + TimestepEmbedding(4 * width, self.dtype, name="add_embedding")(added)

    def encode(
        self, x: Float[Array, "n h w c"], temb, context: Context, features: Features = ()
    ) -> tuple[Float[Array, "n h2 w2 c2"], list[Any]]:
        """From what ``conv_in`` makes to the middle's output; also the states that the way up reads, x first."""
        cfg, states = self.config, [x]
        last, added = len(cfg.block_out_channels) - 1, dict(enumerate(features))
        for i, depths in enumerate(cfg.down_depths):
            block = DownBlock(*self.stage_args(i, depths), downsample=i < last, name=f"down_blocks_{i}")
            x, new_states = block(x, temb, context, added.get(i))
            states += new_states
        x = MidBlock(*self.stage_args(last, cfg.mid_depths), name="mid_block")(x, temb, context)
        return (x if last + 1 not in added else x + added[last + 1].astype(self.dtype)), states


class UNet2DConditionModel(UNetEncoder):
    """The denoiser: predicts noise, v or x0 from noisy latents, as the teacher's scheduler config says."""

    config: UNetConfig

    @classmethod
    def from_config(
        cls,
        config: dict[str, Any],
        dtype=jnp.float32,
        remat: bool | str = False,
        attention: AttentionBackend = AUTO,
        unroll: int = 1,
    ) -> "UNet2DConditionModel":
        """Build from diffusers' config.json; remat: recompute activations in the backward pass, all of them or but for
        what a policy of models/remat.py keeps. unroll: transformer blocks in a turn of their loop.

        Raises UserError for a setting that is not supported.
        """
        policy = REMAT_POLICIES[0] if remat is True else remat or None
        return cls(UNetConfig.read(config, policy, attention, unroll), dtype)

    def with_attention(self, attention: AttentionBackend) -> "UNet2DConditionModel":
        """The same network with another implementation of attention."""
        return self.clone(config=dataclasses.replace(self.config, attention=attention))

    def with_guidance_embedding(self, dim: int) -> "UNet2DConditionModel":
        """The same network, conditioned on its guidance scale by an embedding of ``dim`` numbers; 0: it is not."""
        return self.clone(config=dataclasses.replace(self.config, time_cond_proj_dim=dim or None))

    @nn.compact
    def __call__(
        self,
        sample: Float[Array, "n h w c"],
        timesteps: Array,
        conditioning: TextConditioning,
        timestep_cond: Float[Array, "n e"] | None = None,
        residuals: Residuals | None = None,
        features: Features = (),
        images: tuple[ImageTokens, ...] = (),
    ) -> Float[Array, "n h w o"]:
        """Prediction for scaled latents at ``timesteps`` 0..999 (int or float, [n]), float32.

        timestep_cond: embedding of the guidance scale, for students with ``time_cond_proj_dim``. residuals: of
        ControlNets. features: of T2I-Adapters. images: of IP-Adapters.
        """
        cfg, last = self.config, len(self.config.block_out_channels) - 1
        if (timestep_cond is None) != (cfg.time_cond_proj_dim is None):
            raise ValueError("timestep_cond is given exactly when config.json has time_cond_proj_dim")
        inputs = (sample, timesteps, conditioning, timestep_cond)
        sample, timesteps, conditioning, timestep_cond = split_batch(inputs, cfg.attention.mesh)
        context = Context(conditioning.hidden_states.astype(self.dtype), images)
        temb = self.embed_time(timesteps, conditioning, timestep_cond)
        x = Conv(cfg.block_out_channels[0], dtype=self.dtype, name="conv_in")(sample)
        x, states = self.encode(x, temb, context, features)
        if residuals is not None:
            x = x + residuals.mid.astype(self.dtype)
            states = [state + added.astype(self.dtype) for state, added in zip(states, residuals.down, strict=True)]
        for i, depths in enumerate(cfg.up_depths):
            block = UpBlock(*self.stage_args(last - i, depths), upsample=i < last, name=f"up_blocks_{i}")
            x = block(x, temb, context, states[-len(depths) :])
            states = states[: -len(depths)]
        # In float32 whatever the rest is: guidance multiplies the last rounding by w, and x0 by sigma / alpha.
        x = jax.nn.silu(GroupNorm(cfg.norm_num_groups, cfg.norm_eps, jnp.float32, name="conv_norm_out")(x))
        return Conv(cfg.out_channels, dtype=jnp.float32, name="conv_out")(x)
