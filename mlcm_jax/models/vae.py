"""diffusers' AutoencoderKL: images in [-1, 1] to latents and back (arXiv 2112.10752)."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from mlcm_jax.json_config import LAYERS, NAMES, POSITIVE, SIZE, SIZES, Table, either, or_null, read_config
from mlcm_jax.models.attention_backend import dot_product_attention
from mlcm_jax.models.layers import (
    ACTIVATIONS,
    Conv,
    Dense,
    Downsample2D,
    GroupNorm,
    ResnetBlock2D,
    Upsample2D,
)
from mlcm_jax.models.remat import rematerialised
from mlcm_jax.parallel.sharding import split_batch

EPS = 1e-6

# key: (diffusers' default, supported values or their kind)
CONFIG_KEYS: Table = {
    "in_channels": (3, (3,)),
    "out_channels": (3, (3,)),
    "down_block_types": (("DownEncoderBlock2D",), NAMES),
    "up_block_types": (("UpDecoderBlock2D",), NAMES),
    "block_out_channels": ((64,), SIZES),
    "layers_per_block": (1, LAYERS),
    "act_fn": ("silu", ("silu", "swish")),
    "latent_channels": (4, SIZE),
    "norm_num_groups": (32, SIZE),
    "sample_size": (32, or_null(either(SIZE, SIZES))),
    "scaling_factor": (0.18215, POSITIVE),
    "shift_factor": (None, (None, 0.0)),
    "latents_mean": (None, (None,)),
    "latents_std": (None, (None,)),
    "force_upcast": (True, (True, False)),
    "use_quant_conv": (True, (True, False)),
    "use_post_quant_conv": (True, (True, False)),
    "mid_block_add_attention": (True, (True, False)),
}


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """The keys of config.json that shape the network."""

    block_out_channels: tuple[int, ...]
    layers_per_block: int
    act_fn: str
    latent_channels: int
    norm_num_groups: int
    sample_size: (
        int | None
    )  # pixels along the side of the images that it was trained on; of a tile, where there are any
    scaling_factor: float
    force_upcast: bool
    use_quant_conv: bool
    use_post_quant_conv: bool
    mid_block_add_attention: bool


class VAEAttention(nn.Module):
    """Single-head self-attention over all positions, with its own norm and a residual."""

    groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        n, h, w, c = x.shape
        tokens = GroupNorm(self.groups, EPS, self.dtype, name="group_norm")(x).reshape(n, h * w, c)
        q, k, v = (Dense(c, dtype=self.dtype, name=f"to_{name}")(tokens) for name in "qkv")
        out = dot_product_attention(q, k, v, heads=1)
        return x + Dense(c, dtype=self.dtype, name="to_out_0")(out).reshape(n, h, w, c)


class Block(nn.Module):
    """A row of resnets, then an optional change of resolution: DownEncoderBlock2D and UpDecoderBlock2D."""

    config: VAEConfig
    features: int
    num_resnets: int
    resample: str | None  # "down", "up" or None
    dtype: jnp.dtype
    remat: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c2"]:
        cfg = self.config
        resnet = rematerialised(ResnetBlock2D, self.remat)
        for i in range(self.num_resnets):
            args = (self.features, cfg.norm_num_groups, EPS, cfg.act_fn, self.dtype)
            x = resnet(*args, name=f"resnets_{i}")(split_batch(x))
        if self.resample == "down":
            x = Downsample2D(self.features, padding=0, dtype=self.dtype, name="downsamplers_0")(x)
        if self.resample == "up":
            x = Upsample2D(self.features, dtype=self.dtype, name="upsamplers_0")(x)
        return x


class MidBlock(nn.Module):
    """Resnet, attention, resnet at the lowest resolution."""

    config: VAEConfig
    dtype: jnp.dtype
    remat: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        cfg = self.config
        resnet, attention = (rematerialised(block, self.remat) for block in (ResnetBlock2D, VAEAttention))
        args = (x.shape[-1], cfg.norm_num_groups, EPS, cfg.act_fn, self.dtype)
        x = resnet(*args, name="resnets_0")(split_batch(x))
        if cfg.mid_block_add_attention:
            x = attention(cfg.norm_num_groups, self.dtype, name="attentions_0")(x)
        return resnet(*args, name="resnets_1")(x)


class Encoder(nn.Module):
    """Images [-1, 1] to the moments (mean and log-variance) before quant_conv."""

    config: VAEConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "n H W 3"]) -> Float[Array, "n h w c2"]:
        cfg = self.config
        x = Conv(cfg.block_out_channels[0], dtype=self.dtype, name="conv_in")(x)
        last = len(cfg.block_out_channels) - 1
        for i, features in enumerate(cfg.block_out_channels):
            resample = "down" if i < last else None
            x = Block(cfg, features, cfg.layers_per_block, resample, self.dtype, name=f"down_blocks_{i}")(x)
        x = MidBlock(cfg, self.dtype, name="mid_block")(x)
        x = ACTIVATIONS[cfg.act_fn](GroupNorm(cfg.norm_num_groups, EPS, self.dtype, name="conv_norm_out")(x))
        return Conv(2 * cfg.latent_channels, dtype=self.dtype, name="conv_out")(x)


class Decoder(nn.Module):
    """Latents after post_quant_conv to images [-1, 1]."""

    config: VAEConfig
    dtype: jnp.dtype
    remat: str | None = None

    @nn.compact
    def __call__(self, z: Float[Array, "n h w c"]) -> Float[Array, "n H W 3"]:
        cfg = self.config
        channels = cfg.block_out_channels[::-1]
        x = Conv(channels[0], dtype=self.dtype, name="conv_in")(z)
        x = MidBlock(cfg, self.dtype, self.remat, name="mid_block")(x)
        for i, features in enumerate(channels):
            args = (cfg.layers_per_block + 1, "up" if i < len(channels) - 1 else None, self.dtype, self.remat)
            x = Block(cfg, features, *args, name=f"up_blocks_{i}")(x)
        x = ACTIVATIONS[cfg.act_fn](GroupNorm(cfg.norm_num_groups, EPS, self.dtype, name="conv_norm_out")(x))
        return Conv(3, dtype=self.dtype, name="conv_out")(x)


class AutoencoderKL(nn.Module):
    """The autoencoder; call its methods through ``module.apply(variables, x, method="encode")``.

    remat: policy of models/remat.py for the decoder's backward pass; None: all its activations are kept.
    """

    config: VAEConfig
    dtype: jnp.dtype = jnp.float32
    remat: str | None = None

    @classmethod
    def from_config(cls, config: dict[str, Any], dtype=jnp.float32) -> "AutoencoderKL":
        """Build from diffusers' config.json; raises UserError for a setting that is not supported."""
        values = read_config(config, CONFIG_KEYS, "AutoencoderKL")
        for key, only in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            values.require(key, (only,) * len(values["block_out_channels"]))
        channels, groups, side = values["block_out_channels"], values["norm_num_groups"], values["sample_size"]
        fits = all(c % groups == 0 for c in channels)
        values.check("block_out_channels", fits, f"multiples of norm_num_groups={groups}")
        side = side[0] if isinstance(side, tuple) else side  # as diffusers reads the side of a tile
        values.check("sample_size", side is None or side >= 2 ** len(channels), "a side in pixels, or null")
        values["sample_size"] = side
        return cls(VAEConfig(**{f.name: values[f.name] for f in dataclasses.fields(VAEConfig)}), dtype)

    @property
    def downscale(self) -> int:
        """Pixels along each side of a latent."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def setup(self):
        cfg = self.config
        self.encoder = Encoder(cfg, self.dtype)
        self.decoder = Decoder(cfg, self.dtype, self.remat)
        if cfg.use_quant_conv:
            self.quant_conv = Conv(2 * cfg.latent_channels, kernel_size=1, padding=0, dtype=self.dtype)
        if cfg.use_post_quant_conv:
            self.post_quant_conv = Conv(cfg.latent_channels, kernel_size=1, padding=0, dtype=self.dtype)

    def encode(self, images: Float[Array, "n H W 3"]) -> tuple[Float[Array, "n h w c"], Float[Array, "n h w c"]]:
        """Mean and log-variance (clipped to -30..20) of the latents of images in [-1, 1], before scaling_factor."""
        moments = self.encoder(images)
        if self.config.use_quant_conv:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, latents: Float[Array, "n h w c"]) -> Float[Array, "n H W 3"]:
        """Images, about [-1, 1], of latents before scaling_factor."""
        if self.config.use_post_quant_conv:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents)

    def __call__(self, images: Float[Array, "n H W 3"]) -> Float[Array, "n H W 3"]:
        """Reconstruct images through the mean of their latents."""
        mean, _ = self.encode(images)
        return self.decode(mean)
