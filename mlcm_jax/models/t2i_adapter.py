"""diffusers' T2IAdapter (arXiv 2302.08453): features of an image that are added to a UNet's way down."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mlcm_jax.json_config import LAYERS, Kind, Table, is_size, read_config, sizes
from mlcm_jax.models.layers import Conv

CLASS_NAME = "T2IAdapter"
LIGHT, XL = "light_adapter", "full_adapter_xl"
MOST_LEVELS, LARGEST_DOWNSCALE = 8, 64
WIDTHS = sizes(each=lambda v: is_size(v) and v <= 1 << 14)
CONFIG_KEYS: Table = {
    "adapter_type": ("full_adapter", ("full_adapter", XL, LIGHT)),
    "in_channels": (3, (1, 3)),
    "channels": (
        (320, 640, 1280, 1280),
        Kind(f"a list of 1 to {MOST_LEVELS} widths", lambda v: WIDTHS.holds(v) and len(v) <= MOST_LEVELS),
    ),
    "num_res_blocks": (2, LAYERS),
    "downscale_factor": (8, Kind(f"1 to {LARGEST_DOWNSCALE}", lambda v: is_size(v) and v <= LARGEST_DOWNSCALE)),
}


@dataclasses.dataclass(frozen=True)
class T2IAdapterConfig:
    """The keys of config.json. downscale_factor: pixels along each side of a place that the network starts with."""

    adapter_type: str
    in_channels: int
    channels: tuple[int, ...]
    num_res_blocks: int
    downscale_factor: int

    @classmethod
    def read(cls, config: dict[str, Any]) -> "T2IAdapterConfig":
        """Validate diffusers' config.json; raises UserError for a setting that is not supported."""
        values = read_config(config, CONFIG_KEYS, CLASS_NAME)
        if values["adapter_type"] == LIGHT:  # it computes at a quarter of the width
            values.check("channels", min(values["channels"]) >= 4, "widths of 4 and more")
        if values["adapter_type"] == XL:
            values.check("channels", len(set(values["channels"][2:])) <= 1, "widths that are equal from the third on")
        return cls(**values)

    @property
    def stages(self) -> tuple[tuple[int, bool], ...]:
        """Of each feature its width, and whether it has half the height and width of the one before."""
        if self.adapter_type == XL:
            return tuple((width, i == 2) for i, width in enumerate(self.channels))
        widths = self.channels + (self.channels[-1:] if self.adapter_type == LIGHT else ())
        return tuple((width, i > 0) for i, width in enumerate(widths))


class AdapterResnet(nn.Module):
    """x + a convolution of relu of a convolution of x. kernel_size: of the second."""

    kernel_size: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        h, size = jax.nn.relu(Conv(x.shape[-1], dtype=self.dtype, name="block1")(x)), self.kernel_size
        return x + Conv(x.shape[-1], kernel_size=size, padding=size // 2, dtype=self.dtype, name="block2")(h)


class AdapterStage(nn.Module):
    """diffusers' AdapterBlock and LightAdapterBlock: perhaps a mean of 2 x 2 places, then resnets of one width."""

    features: int
    num_resnets: int
    downsample: bool
    light: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 f"]:
        if self.downsample:
            x = nn.avg_pool(x, (2, 2), (2, 2), "SAME", count_include_pad=False)
        width = self.features // 4 if self.light else self.features
        if self.light or x.shape[-1] != width:
            x = self._pointwise(width, "in_conv")(x)
        for i in range(self.num_resnets):
            x = AdapterResnet(3 if self.light else 1, self.dtype, name=f"resnets_{i}")(x)
        return self._pointwise(self.features, "out_conv")(x) if self.light else x

    def _pointwise(self, features: int, name: str) -> Conv:
        return Conv(features, kernel_size=1, padding=0, dtype=self.dtype, name=name)


class Stages(nn.Module):
    """The stages one after another, from squares of pixels that are channels."""

    config: T2IAdapterConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, image: Float[Array, "n H W c"]) -> tuple[Float[Array, "n h w f"], ...]:
        cfg, features = self.config, []
        x, light = pixel_unshuffle(image, cfg.downscale_factor), cfg.adapter_type == LIGHT
        if not light:
            x = Conv(cfg.channels[0], dtype=self.dtype, name="conv_in")(x)
        for i, (width, downsample) in enumerate(cfg.stages):
            x = AdapterStage(width, cfg.num_res_blocks, downsample, light, self.dtype, name=f"body_{i}")(x)
            features.append(x)
        return tuple(features)


class T2IAdapter(nn.Module):
    """What an image adds to a UNet, whatever its prompt and its noise are."""

    config: T2IAdapterConfig
    dtype: jnp.dtype = jnp.float32

    @classmethod
    def from_config(cls, config: dict[str, Any], dtype=jnp.float32) -> "T2IAdapter":
        """Build from diffusers' config.json. Raises UserError for a setting that is not supported."""
        return cls(T2IAdapterConfig.read(config), dtype)

    @nn.compact
    def __call__(self, image: Float[Array, "n H W c"]) -> tuple[Float[Array, "n h w f"], ...]:
        """Features from the finest to the coarsest. image: in [0, 1], RGB or of one channel grey."""
        return Stages(self.config, self.dtype, name="adapter")(image)


def pixel_unshuffle(image: Float[Array, "n H W c"], factor: int) -> Float[Array, "n h w d"]:
    """Squares of ``factor`` x ``factor`` pixels as channels, in torch's order (arXiv 1609.05158, reversed)."""
    n, height, width, c = image.shape
    squares = image.reshape(n, height // factor, factor, width // factor, factor, c).transpose(0, 1, 3, 5, 2, 4)
    return squares.reshape(n, height // factor, width // factor, c * factor * factor)
