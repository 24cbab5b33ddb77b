"""Layers shared by all networks: they hold torch's names, numerics and a low-rank path beside each kernel.

Compute runs in ``dtype``; normalisation statistics always run in float32 (decision 6 of docs/design.md).
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mlcm_jax.parallel.sharding import split_batch

ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "relu": jax.nn.relu,
}


class Dense(nn.Module):
    """Linear layer; where the "lora" collection has an entry of this path, its low-rank product is added.

    The "lora" entry is {"down": [in, r], "up": [r, out]}, already multiplied by alpha / rank. The kernel is never
    merged with it, so its dense gradient is never formed (arXiv 2106.09685).
    """

    features: int
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        x = x.astype(self.dtype)
        y = x @ kernel.astype(self.dtype)
        if self.has_variable("lora", "down"):
            down, up = (self.get_variable("lora", k).astype(self.dtype) for k in ("down", "up"))
            y = y + (x @ down) @ up
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return y


class Conv(nn.Module):
    """2-D convolution, channels-last, explicit padding as in torch; low-rank path as in Dense.

    padding: pixels on both sides, or ((top, bottom), (left, right)).
    The low-rank path is a kernel-sized convolution down to rank r, then a 1x1 convolution up (PEFT's layout).
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    padding: int | Sequence[tuple[int, int]] = 1
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32

    def _conv(self, x, kernel, stride, padding):
        pads = [(padding, padding)] * 2 if isinstance(padding, int) else list(padding)
        return jax.lax.conv_general_dilated(
            x, kernel.astype(self.dtype), (stride, stride), pads, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    @nn.compact
    def __call__(self, x: Float[Array, "n h w i"]) -> Float[Array, "n h2 w2 o"]:
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        x = x.astype(self.dtype)
        y = self._conv(x, kernel, self.stride, self.padding)
        if self.has_variable("lora", "down"):
            down, up = (self.get_variable("lora", k) for k in ("down", "up"))
            # Where as many devices as it has ranks split ``down``, the compiler would gather the batch instead of it.
            low = split_batch(self._conv(x, down, self.stride, self.padding))
            y = y + self._conv(low, up, 1, 0)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return y


class GroupNorm(nn.Module):
    """Group normalisation over channels-last input, statistics in float32."""

    groups: int
    eps: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n *s c"]) -> Float[Array, "n *s c"]:
        n, c = x.shape[0], x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (c,)).astype(jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (c,)).astype(jnp.float32)
        flat = x.astype(jnp.float32).reshape(n, -1, c)
        mean = self._per_group(flat.mean(axis=1, keepdims=True))
        if x.dtype == jnp.float32:
            var = self._per_group(jnp.square(flat - mean).mean(axis=1, keepdims=True))
        else:  # both means in one pass over x; what the difference cancels is below the 8 to 11 bits that x has
            square = self._per_group(jnp.square(flat).mean(axis=1, keepdims=True))
            var = jnp.maximum(square - jnp.square(mean), 0.0)
        y = (flat - mean) * (jax.lax.rsqrt(var + self.eps) * scale) + bias
        return y.reshape(x.shape).astype(self.dtype)

    def _per_group(self, channel_means):
        """Average the channels of a group. Reducing positions first, per channel, is 3 to 5 times faster on a CPU."""
        n, _, c = channel_means.shape
        group_means = channel_means.reshape(n, self.groups, -1).mean(axis=-1)
        return group_means.repeat(c // self.groups, axis=-1)[:, None, :]


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, statistics in float32."""

    eps: float = 1e-5
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],)).astype(jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],)).astype(jnp.float32)
        x = x.astype(jnp.float32)
        mean = x.mean(-1, keepdims=True)
        var = jnp.square(x - mean).mean(-1, keepdims=True)
        return ((x - mean) * jax.lax.rsqrt(var + self.eps) * scale + bias).astype(self.dtype)


class Embedding(nn.Module):
    """Table look-up."""

    num_embeddings: int
    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, ids):
        table = self.param("embedding", nn.initializers.normal(0.02), (self.num_embeddings, self.features))
        return jnp.take(table, ids, axis=0).astype(self.dtype)


class ResnetBlock2D(nn.Module):
    """diffusers' ResnetBlock2D (``resnet_time_scale_shift="default"``); ``temb`` is None in the autoencoder."""

    features: int
    groups: int = 32
    eps: float = 1e-6
    act: str = "silu"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], temb: Float[Array, "n t"] | None = None):
        act = ACTIVATIONS[self.act]
        h = GroupNorm(self.groups, self.eps, self.dtype, name="norm1")(x)
        h = Conv(self.features, dtype=self.dtype, name="conv1")(act(h))
        if temb is not None:
            h = h + Dense(self.features, dtype=self.dtype, name="time_emb_proj")(act(temb))[:, None, None, :]
        h = GroupNorm(self.groups, self.eps, self.dtype, name="norm2")(h)
        h = Conv(self.features, dtype=self.dtype, name="conv2")(act(h))
        if x.shape[-1] != self.features:
            x = Conv(self.features, kernel_size=1, padding=0, dtype=self.dtype, name="conv_shortcut")(x)
        return x + h


class Downsample2D(nn.Module):
    """Halve height and width with a strided convolution; ``padding=0`` is the autoencoder's lopsided form."""

    features: int
    padding: int = 1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c"]:
        padding = ((0, 1), (0, 1)) if self.padding == 0 else self.padding
        return Conv(self.features, stride=2, padding=padding, dtype=self.dtype, name="conv")(x)


class Upsample2D(nn.Module):
    """Double height and width (nearest), then convolve."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c"]:
        return Conv(self.features, dtype=self.dtype, name="conv")(upsample_nearest(x))


def upsample_nearest(x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c"]:
    """Double height and width by repeating each pixel."""
    n, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None, :], (n, h, 2, w, 2, c)).reshape(n, 2 * h, 2 * w, c)


class FrozenBatchNorm(nn.Module):
    """Batch normalisation by stored statistics, in float32; they are parameters, since they come with the weights."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        size = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, size).astype(jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, size).astype(jnp.float32)
        mean = self.param("running_mean", nn.initializers.zeros, size).astype(jnp.float32)
        variance = self.param("running_var", nn.initializers.ones, size).astype(jnp.float32)
        scale = scale * jax.lax.rsqrt(variance + self.epsilon)
        return x.astype(jnp.float32) * scale + (bias - mean * scale)
