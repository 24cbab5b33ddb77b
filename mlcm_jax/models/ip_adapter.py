"""IP-Adapter's projection of an image's embedding to tokens (arXiv 2308.06721, sec. 3.2)."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from mlcm_jax.models.layers import Dense, LayerNorm

NUM_TOKENS = 4  # of all published ones of this kind; diffusers takes no other number


class ImageProjection(nn.Module):
    """``NUM_TOKENS`` tokens of ``width`` channels, which a UNet's transformers attend to."""

    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, embeddings: Float[Array, "n d"]) -> Float[Array, "n k e"]:
        tokens = Dense(NUM_TOKENS * self.width, dtype=self.dtype, name="proj")(embeddings)
        return LayerNorm(dtype=self.dtype, name="norm")(tokens.reshape(len(tokens), NUM_TOKENS, self.width))
