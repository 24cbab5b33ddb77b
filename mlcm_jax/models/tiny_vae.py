"""diffusers' AutoencoderTiny (TAESD): a small, deterministic autoencoder for quick looks at latents."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mlcm_jax.errors import UserError
from mlcm_jax.json_config import (
    COUNT,
    MOST_LAYERS,
    POSITIVE,
    SIZE,
    SIZES,
    UNREAD,
    ConfigValues,
    Table,
    read_config,
    sizes,
)
from mlcm_jax.models.layers import ACTIVATIONS, Conv, upsample_nearest

BLOCKS = sizes("whole numbers, 0 or more", each=lambda v: COUNT.holds(v) and v <= MOST_LAYERS)
# key: (diffusers' default, supported values or their kind)
CONFIG_KEYS: Table = {
    "in_channels": (3, (3,)),
    "out_channels": (3, (3,)),
    "encoder_block_out_channels": ((64,) * 4, SIZES),
    "decoder_block_out_channels": ((64,) * 4, SIZES),
    "block_out_channels": (None, UNREAD),  # diffusers repeats the decoder's
    "act_fn": ("relu", ("relu", "silu", "swish", "gelu")),
    "upsample_fn": ("nearest", ("nearest",)),
    "latent_channels": (4, SIZE),
    "upsampling_scaling_factor": (2, (2,)),
    "num_encoder_blocks": ((1, 3, 3, 3), BLOCKS),
    "num_decoder_blocks": ((3, 3, 3, 1), BLOCKS),
    "latent_magnitude": (3, UNREAD),  # of diffusers' scale_latents, for storing latents as images; not used here
    "latent_shift": (0.5, UNREAD),
    "force_upcast": (False, (False,)),
    "scaling_factor": (1.0, POSITIVE),
    "shift_factor": (0.0, (0.0, None)),
}
LATENT_RANGE = 3.0  # the decoder squashes latents softly into +- this


@dataclasses.dataclass(frozen=True)
class TinyVAEConfig:
    """The keys of config.json that shape the network; width: channels of every inner layer of each half."""

    encoder_width: int
    decoder_width: int
    num_encoder_blocks: tuple[int, ...]
    num_decoder_blocks: tuple[int, ...]
    act_fn: str
    latent_channels: int
    scaling_factor: float

    @classmethod
    def read(cls, config: dict[str, Any]) -> "TinyVAEConfig":
        """Validate diffusers' config.json; raises UserError for a setting that is not supported."""
        values = read_config(config, CONFIG_KEYS, "AutoencoderTiny")
        widths = {f"{half}_width": _width(values, half) for half in ("encoder", "decoder")}
        if len(values["num_encoder_blocks"]) != len(values["num_decoder_blocks"]):
            raise UserError(f"{values.source} has an encoder and a decoder with different numbers of stages.")
        fields = [f.name for f in dataclasses.fields(cls) if f.name not in widths]
        return cls(**widths, **{name: values[name] for name in fields})


def _width(values: ConfigValues, half: str) -> int:
    """The one width of all stages of a half: a stage begins with a convolution that does not change it."""
    key, blocks = f"{half}_block_out_channels", values[f"num_{half}_blocks"]
    channels = values[key]
    repeated = channels == channels[:1] * len(blocks)
    values.check(key, repeated, f"one number, as often as num_{half}_blocks has entries, {len(blocks)}")
    return channels[0]


class TinyBlock(nn.Module):
    """Three convolutions with a residual around them (AutoencoderTinyBlock); the last activation is always a ReLU."""

    config: TinyVAEConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        width, act = x.shape[-1], ACTIVATIONS[self.config.act_fn]
        h = act(Conv(width, dtype=self.dtype, name="conv_0")(x))
        h = act(Conv(width, dtype=self.dtype, name="conv_2")(h))
        return jax.nn.relu(Conv(width, dtype=self.dtype, name="conv_4")(h) + x)


class TinyEncoder(nn.Module):
    """Images [-1, 1] to latents; torch numbers the layers of all stages in one row."""

    config: TinyVAEConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "n H W 3"]) -> Float[Array, "n h w c"]:
        cfg, place = self.config, 0
        x = (x + 1) / 2
        for i, num_blocks in enumerate(cfg.num_encoder_blocks):
            stride, first = (1, True) if i == 0 else (2, False)
            conv = Conv(cfg.encoder_width, stride=stride, use_bias=first, dtype=self.dtype, name=f"layers_{place}")
            x = conv(x)
            for j in range(num_blocks):
                x = TinyBlock(cfg, self.dtype, name=f"layers_{place + 1 + j}")(x)
            place += 1 + num_blocks
        return Conv(cfg.latent_channels, dtype=self.dtype, name=f"layers_{place}")(x)


class TinyDecoder(nn.Module):
    """Latents to images [-1, 1]."""

    config: TinyVAEConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, z: Float[Array, "n h w c"]) -> Float[Array, "n H W 3"]:
        cfg, last = self.config, len(self.config.num_decoder_blocks) - 1
        z = jnp.tanh(z / LATENT_RANGE) * LATENT_RANGE
        x = ACTIVATIONS[cfg.act_fn](Conv(cfg.decoder_width, dtype=self.dtype, name="layers_0")(z))
        place = 2  # the activation counts as a layer, and so does each change of size
        for i, num_blocks in enumerate(cfg.num_decoder_blocks):
            for j in range(num_blocks):
                x = TinyBlock(cfg, self.dtype, name=f"layers_{place + j}")(x)
            place += num_blocks
            if i < last:
                x = upsample_nearest(x)
                place += 1
            width, use_bias = (3, True) if i == last else (cfg.decoder_width, False)
            x = Conv(width, use_bias=use_bias, dtype=self.dtype, name=f"layers_{place}")(x)
            place += 1
        return 2 * x - 1


class AutoencoderTiny(nn.Module):
    """The autoencoder; call its methods through ``module.apply(variables, x, method="decode")``."""

    config: TinyVAEConfig
    dtype: jnp.dtype = jnp.float32

    @classmethod
    def from_config(cls, config: dict[str, Any], dtype=jnp.float32) -> "AutoencoderTiny":
        """Build from diffusers' config.json; raises UserError for a setting that is not supported."""
        return cls(TinyVAEConfig.read(config), dtype)

    @property
    def downscale(self) -> int:
        """Pixels along each side of a latent."""
        return 2 ** (len(self.config.num_encoder_blocks) - 1)

    def setup(self):
        self.encoder = TinyEncoder(self.config, self.dtype)
        self.decoder = TinyDecoder(self.config, self.dtype)

    def encode(self, images: Float[Array, "n H W 3"]) -> tuple[Float[Array, "n h w c"], None]:
        """Latents of images in [-1, 1], before scaling_factor, and None: this encoder has no variance."""
        return self.encoder(images), None

    def decode(self, latents: Float[Array, "n h w c"]) -> Float[Array, "n H W 3"]:
        """Images, about [-1, 1], of latents before scaling_factor."""
        return self.decoder(latents)

    def __call__(self, images: Float[Array, "n H W 3"]) -> Float[Array, "n H W 3"]:
        """Reconstruct images."""
        latents, _ = self.encode(images)
        return self.decode(latents)
