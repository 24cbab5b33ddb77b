"""LPIPS (arXiv 1801.03924) of latents, on a VGG-like network (arXiv 1409.1556) that reads them.

Latents are already as small as an image after three poolings, so the first three are left out (arXiv 2406.05768).
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mlcm_jax.json_config import LAYERS, MOST_LAYERS, SIZE, SIZES, Table, read_config, sizes
from mlcm_jax.models.layers import Conv
from mlcm_jax.types import Latents

LAYERS_OF_BLOCKS = sizes(f"whole numbers from 1 to {MOST_LAYERS}", each=LAYERS.holds)
KEYS: Table = {
    "latent_channels": (4, SIZE),
    "block_out_channels": ((64, 128, 256, 512, 512), SIZES),
    "layers_per_block": ((2, 2, 3, 3, 3), LAYERS_OF_BLOCKS),
}
POOLED = 3  # number of the block, from 0, after which height and width are halved
EPS = 1e-10


@dataclasses.dataclass(frozen=True)
class LatentLPIPSConfig:
    """The keys of config.json."""

    latent_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: tuple[int, ...]


class Head(nn.Module):
    """Learnt weights of a block's channels, 0 or more, on squared differences; mean over positions."""

    @nn.compact
    def __call__(self, squared: Float[Array, "n h w c"]) -> Float[Array, " n"]:
        weights = self.param("scale", nn.initializers.constant(1.0), (squared.shape[-1],))
        return (squared @ weights.astype(jnp.float32)).mean(axis=(1, 2))


class LatentLPIPS(nn.Module):
    """``module.apply({"params": params}, a, b)`` is a distance for each pair of scaled latents, float32, 0 or more."""

    config: LatentLPIPSConfig
    dtype: jnp.dtype = jnp.float32

    @classmethod
    def from_config(cls, config: dict[str, Any], dtype=jnp.float32) -> "LatentLPIPS":
        """Build from config.json; raises UserError for a key that is not supported."""
        values = read_config(config, KEYS, "LatentLPIPS")
        count = len(values["block_out_channels"])
        values.check("layers_per_block", len(values["layers_per_block"]) == count, f"one for each of {count} blocks")
        return cls(LatentLPIPSConfig(**values), dtype)

    @nn.compact
    def __call__(self, a: Latents, b: Latents) -> Float[Array, " n"]:
        """Sum over the blocks of the weighted squared difference of unit-length features (arXiv 1801.03924, eq. 1)."""
        x, n, distances = jnp.concatenate([a, b]), len(a), []
        widths = zip(self.config.block_out_channels, self.config.layers_per_block, strict=True)
        for block, (width, num_layers) in enumerate(widths):
            for layer in range(num_layers):
                x = jax.nn.relu(Conv(width, dtype=self.dtype, name=f"block{block}_conv{layer}")(x))
            features = x.astype(jnp.float32)
            features = features / jnp.sqrt(jnp.square(features).sum(axis=-1, keepdims=True) + EPS)
            distances.append(Head(name=f"head{block}")(jnp.square(features[:n] - features[n:])))
            if block == POOLED:
                x = nn.max_pool(x, (2, 2), (2, 2))
        return jnp.stack(distances).sum(axis=0)
