"""Layers by which an image's tokens attend to a prompt's, as in MPS (arXiv 2405.14705).

The blocks are PaLM's (arXiv 2204.02311): attention with one head of keys and values beside a gated feed-forward layer.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mlcm_jax.models.attention_backend import dot_product_attention
from mlcm_jax.models.layers import Dense, LayerNorm
from mlcm_jax.parallel.sharding import split_batch

WIDENING = 4  # of feed-forward layers
EPSILON = 1e-5  # of layer norms
BASE = 10_000.0  # of rotary frequencies


def rotate(x: Float[Array, "n t d"], head_dim: int) -> Float[Array, "n t d"]:
    """Rotary positions (arXiv 2104.09864) of merged heads; a head's first half turns against its second."""
    n, t, _ = x.shape
    frequencies = BASE ** (-jnp.arange(0, head_dim, 2) / head_dim)
    angles = jnp.arange(t)[:, None] * frequencies
    cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
    a, b = jnp.split(x.reshape(n, t, -1, head_dim).astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def one_head_for_all(q, k, v, heads: int, mask=None):
    """Attention in which all heads of queries share one head of keys and values."""
    k, v = (jnp.tile(a, (1, 1, heads)) for a in (k, v))
    return dot_product_attention(q, k, v, heads, mask)


class GatedFeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202) after the projection that widens; the gate is the second half."""

    dim: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        values, gate = jnp.split(x, 2, axis=-1)
        return Dense(self.dim, use_bias=False, dtype=self.dtype, name="out")(jax.nn.silu(gate) * values)


class CrossBlock(nn.Module):
    """x attends to context and passes its feed-forward layer, side by side."""

    dim: int
    heads: int
    head_dim: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, context, mask):
        x = LayerNorm(EPSILON, self.dtype, name="norm")(x)
        q = Dense(self.heads * self.head_dim, use_bias=False, dtype=self.dtype, name="to_q")(x)
        k, v = jnp.split(Dense(2 * self.head_dim, use_bias=False, dtype=self.dtype, name="to_kv")(context), 2, axis=-1)
        out = one_head_for_all(q, k, v, self.heads, mask)
        wide = Dense(2 * WIDENING * self.dim, use_bias=False, dtype=self.dtype, name="ff_in")(x)
        return Dense(self.dim, use_bias=False, dtype=self.dtype, name="to_out")(out) + GatedFeedForward(
            self.dim, self.dtype, name="ff"
        )(wide)


class SelfBlock(nn.Module):
    """x attends to itself and passes its feed-forward layer, side by side; one projection makes all their inputs."""

    dim: int
    heads: int
    head_dim: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        x = LayerNorm(EPSILON, self.dtype, name="norm")(x)
        inner, d = self.heads * self.head_dim, self.head_dim
        fused = Dense(inner + 2 * d + 2 * WIDENING * self.dim, use_bias=False, dtype=self.dtype, name="fused")(x)
        q, k, v, wide = jnp.split(fused, (inner, inner + d, inner + 2 * d), axis=-1)
        out = one_head_for_all(rotate(q, d), rotate(k, d), v, self.heads)
        return Dense(self.dim, use_bias=False, dtype=self.dtype, name="attn_out")(out) + GatedFeedForward(
            self.dim, self.dtype, name="ff"
        )(wide)


class CrossLayer(nn.Module):
    """Both blocks with their residuals, in the form nn.scan takes."""

    dim: int
    heads: int
    head_dim: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, context, mask):
        sizes = (self.dim, self.heads, self.head_dim, self.dtype)
        x, context = split_batch((x, context))
        x = x + CrossBlock(*sizes, name="cross")(x, context, mask)
        return x + SelfBlock(*sizes, name="own")(x), None


class CrossModel(nn.Module):
    """Image tokens that have attended to the words that ``mask`` leaves."""

    dim: int
    layers: int
    heads: int
    head_dim: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "n p d"], context: Float[Array, "n t d"], mask: Bool[Array, "n 1 1 t"]
    ) -> Float[Array, "n p d"]:
        stack = nn.scan(
            CrossLayer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]  (as in attention.py)
            length=self.layers,
        )
        x, _ = stack(self.dim, self.heads, self.head_dim, self.dtype, name="layers")(x, context, mask)
        return x
