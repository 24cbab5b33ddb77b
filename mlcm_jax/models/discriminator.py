"""Heads that discriminate real from sampled latents by a frozen denoiser's features (arXiv 2311.17042, 2403.12015)."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mlcm_jax.models.layers import Conv, GroupNorm

Feature = Float[Array, "n h w c"]


class DiscriminatorHeads(nn.Module):
    """A small convolutional head on each feature: a map of logits, positive for real.

    kernel_size: of a head's first convolution.
    """

    width: int
    kernel_size: int = 3
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: Mapping[str, Feature]) -> list[Float[Array, "n h w 1"]]:
        return [self._head(name, feature) for name, feature in features.items()]

    def _head(self, name: str, feature: Feature) -> Float[Array, "n h w 1"]:
        size = self.kernel_size
        x = Conv(self.width, size, padding=size // 2, dtype=self.dtype, name=f"{name}_in")(feature)
        x = GroupNorm(min(32, self.width // 2), 1e-5, dtype=self.dtype, name=f"{name}_norm")(x)
        logits = Conv(1, kernel_size=1, padding=0, dtype=self.dtype, name=f"{name}_out")(jax.nn.silu(x))
        return logits.astype(jnp.float32)


# Of a UNet: how the names of a part's blocks begin.
PARTS = {"encoder": ("down_blocks_", "mid_block"), "middle": ("mid_block",), "decoder": ("up_blocks_",)}


class PairHead(nn.Module):
    """One logit, positive for real, of two features: twice a 4x4 convolution of stride 2, a norm of 32 groups and SiLU
    on both side by side, then a mean over places (arXiv 2402.13929, sec. 3.2)."""

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, begin: Feature, end: Feature) -> Float[Array, "n 1"]:
        x = jnp.concatenate([begin, end], axis=-1)
        for i in range(2):
            x = Conv(self.width, kernel_size=4, stride=2, padding=1, dtype=self.dtype, name=f"convs_{i}")(x)
            x = jax.nn.silu(GroupNorm(min(32, self.width // 2), 1e-5, dtype=self.dtype, name=f"norms_{i}")(x))
        logits = Conv(1, kernel_size=1, padding=0, dtype=self.dtype, name="out")(x)
        return logits.astype(jnp.float32).mean(axis=(1, 2))


def block_features(intermediates: Mapping[str, Any], part: str) -> dict[str, Feature]:
    """What a UNet's blocks of a part returned, from flax's captured intermediates, in the network's order."""
    blocks = [name for start in PARTS[part] for name in sorted(intermediates) if name.startswith(start)]
    outputs = {name: intermediates[name]["__call__"][0] for name in blocks}
    return {name: output[0] if isinstance(output, tuple) else output for name, output in outputs.items()}


def is_block(module: nn.Module, method: str, *, part: str) -> bool:
    """Filter for flax's capture_intermediates: the calls whose outputs ``block_features`` takes."""
    return method == "__call__" and (module.name or "").startswith(PARTS[part]) and len(module.path) == 1
