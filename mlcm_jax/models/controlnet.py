"""diffusers' ControlNetModel (arXiv 2302.05543): a copy of a UNet's way down that sees an image, and adds to it."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from itertools import zip_longest
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mlcm_jax.models.attention import Context, ImageTokens
from mlcm_jax.models.attention_backend import AUTO, AttentionBackend
from mlcm_jax.models.controlnet_config import ControlNetConfig
from mlcm_jax.models.layers import Conv
from mlcm_jax.models.unet import Residuals, UNet2DConditionModel, UNetEncoder
from mlcm_jax.types import Params, TextConditioning

ZERO_AT_START = ("controlnet_down_blocks_", "controlnet_mid_block")


class ConditioningEmbedding(nn.Module):
    """Convolutions from an image to the size of a latent."""

    widths: tuple[int, ...]
    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, image: Float[Array, "n H W 3"]) -> Float[Array, "n h w c"]:
        x = jax.nn.silu(Conv(self.widths[0], dtype=self.dtype, name="conv_in")(image))
        for i, width in enumerate(self.widths[1:]):
            x = jax.nn.silu(Conv(x.shape[-1], dtype=self.dtype, name=f"blocks_{2 * i}")(x))
            x = jax.nn.silu(Conv(width, stride=2, dtype=self.dtype, name=f"blocks_{2 * i + 1}")(x))
        return Conv(self.features, dtype=self.dtype, name="conv_out")(x)


class ControlNetModel(UNetEncoder):
    """What an image adds to a UNet."""

    config: ControlNetConfig

    @classmethod
    def from_config(
        cls, config: dict[str, Any], dtype=jnp.float32, attention: AttentionBackend = AUTO
    ) -> "ControlNetModel":
        """Build from diffusers' config.json. Raises UserError for a setting that is not supported."""
        return cls(ControlNetConfig.read(config, attention), dtype)

    def with_attention(self, attention: AttentionBackend) -> "ControlNetModel":
        """The same network with another implementation of attention."""
        return self.clone(config=dataclasses.replace(self.config, attention=attention))

    @property
    def downscale(self) -> int:
        """Pixels along each side of a latent."""
        return 2 ** (len(self.config.conditioning_embedding_out_channels) - 1)

    @nn.compact
    def __call__(
        self,
        sample: Float[Array, "n h w c"],
        timesteps: Array,
        conditioning: TextConditioning,
        image: Float[Array, "n H W 3"],
    ) -> Residuals:
        """For scaled latents at ``timesteps`` 0..999 (int or float, [n]). image: RGB in [0, 1]."""
        cfg, width = self.config, self.config.block_out_channels[0]
        image = image[..., ::-1] if cfg.controlnet_conditioning_channel_order == "bgr" else image
        temb = self.embed_time(timesteps, conditioning)
        x = Conv(width, dtype=self.dtype, name="conv_in")(sample)
        embedding = ConditioningEmbedding(
            cfg.conditioning_embedding_out_channels, width, self.dtype, name="controlnet_cond_embedding"
        )
        context = Context(conditioning.hidden_states.astype(self.dtype))
        x, states = self.encode(x + embedding(image), temb, context)
        down = (self._out(state, f"controlnet_down_blocks_{i}") for i, state in enumerate(states))
        return Residuals(tuple(down), self._out(x, "controlnet_mid_block"))

    def _out(self, x: Float[Array, "n h w c"], name: str) -> Float[Array, "n h w c"]:
        """A 1x1 convolution, which is 0 at the start of a training."""
        return Conv(x.shape[-1], kernel_size=1, padding=0, dtype=self.dtype, name=name)(x)


def copied_from_unet(params: Params, unet: Params) -> Params:
    """The first parameters of a training (arXiv 2302.05543, 3.1): the UNet's own, and layers that add 0.

    params: new ones of the ControlNet; what the UNet has no part of keeps them. A shallower transformer gets the UNet's
    first blocks.
    """

    def start(path: tuple[Any, ...], new: jax.Array) -> jax.Array:
        names = [key.key for key in path]
        if names[0].startswith(ZERO_AT_START) or names[:2] == ["controlnet_cond_embedding", "conv_out"]:
            return jnp.zeros_like(new)
        own: Any = unet
        for name in names:
            if name not in own:
                return new
            own = own[name]
        return jnp.asarray(own[: len(new)] if "transformer_blocks" in names else own, new.dtype)

    return jax.tree_util.tree_map_with_path(start, params)


@flax.struct.dataclass
class AdapterFeatures:
    """Of a T2I-Adapter, times its scale. last_timestep: the smallest at which they are added."""

    maps: tuple[Float[Array, "n h w c"], ...]
    last_timestep: Float[Array, " n"]


@flax.struct.dataclass
class Controlled:
    """Conditioning of a UNet that is controlled, an entry an example.

    images: of the ControlNets, RGB in [0, 1]. scales: of the ControlNets' residuals. features: of the T2I-Adapters.
    prompts: of the IP-Adapters.
    """

    text: TextConditioning
    images: tuple[Float[Array, "n H W 3"], ...] = ()
    scales: tuple[Float[Array, " n"], ...] = ()
    features: tuple[AdapterFeatures, ...] = ()
    prompts: tuple[ImageTokens, ...] = ()


class ControlledUNet(nn.Module):
    """A UNet and the ControlNets that add to it, as one network that is called as a UNet is.

    Where it has IP-Adapters, their weights are among the UNet's; what T2I-Adapters made is in its conditioning.
    """

    unet: UNet2DConditionModel
    controlnets: tuple[ControlNetModel, ...] = ()

    def __call__(
        self,
        sample: Float[Array, "n h w c"],
        timesteps: Array,
        conditioning: Controlled,
        timestep_cond: Float[Array, "n e"] | None = None,
    ) -> Float[Array, "n h w o"]:
        text, added = conditioning.text, []
        for controlnet, image, scale in zip(self.controlnets, conditioning.images, conditioning.scales, strict=True):
            residuals = controlnet(sample, timesteps, text, image)
            added.append(jax.tree.map(partial(_times, numbers=scale), residuals))
        total = jax.tree.map(lambda *each: sum(each[1:], each[0]), *added) if added else None
        features = _sums(conditioning.features, timesteps)
        return self.unet(sample, timesteps, text, timestep_cond, total, features, conditioning.prompts)


def _times(x: Float[Array, "n h w c"], numbers: Float[Array, " n"]) -> Float[Array, "n h w c"]:
    """Each example times its number."""
    return x * numbers.astype(x.dtype).reshape(-1, 1, 1, 1)


def _sums(features: Sequence[AdapterFeatures], timesteps: Array) -> list[Float[Array, "n h w c"]]:
    """What the adapters add at these timesteps, which may be a different number of maps."""
    added = [[_times(m, timesteps >= each.last_timestep) for m in each.maps] for each in features]
    levels = zip_longest(*added)
    return [jax.tree.reduce(jnp.add, [m for m in maps if m is not None]) for maps in levels]
