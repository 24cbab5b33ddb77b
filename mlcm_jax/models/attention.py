"""diffusers' Transformer2DModel: self-attention, attention to the prompt's states, gated feed-forward."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mlcm_jax.models.attention_backend import AttentionBackend, dot_product_attention
from mlcm_jax.models.layers import Conv, Dense, GroupNorm, LayerNorm
from mlcm_jax.models.remat import rematerialised
from mlcm_jax.parallel.sharding import split_batch


@flax.struct.dataclass
class ImageTokens:
    """What an IP-Adapter makes of an image. scale: of the attention to it."""

    tokens: Float[Array, "n k e"]
    scale: Float[Array, " n"]


@flax.struct.dataclass
class Context:
    """What a transformer attends to: the states of a prompt, and images."""

    text: Float[Array, "n s e"]
    images: tuple[ImageTokens, ...] = ()


class Attention(nn.Module):
    """Multi-head attention of ``x`` to ``context``; queries, keys and values have no bias.

    Each image is attended to by itself, with keys and values of its own (arXiv 2308.06721, equation 5).
    """

    heads: int
    backend: AttentionBackend
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n t d"], context: Context) -> Float[Array, "n t d"]:
        width = x.shape[-1]
        q = Dense(width, use_bias=False, dtype=self.dtype, name="to_q")(x)
        out = self._attend(q, context.text)
        for i, image in enumerate(context.images):
            scale = image.scale.astype(self.dtype)[:, None, None]
            out = out + scale * self._attend(q, image.tokens, f"_ip_{i}")
        return Dense(width, dtype=self.dtype, name="to_out_0")(out)

    def _attend(self, q: Float[Array, "n t d"], states: Float[Array, "n s e"], ending: str = "") -> Array:
        """ending: of the names of the projections to keys and values."""
        width, dtype = q.shape[-1], self.dtype
        k, v = (Dense(width, use_bias=False, dtype=dtype, name=f"to_{each}{ending}")(states) for each in "kv")
        return dot_product_attention(q, k, v, self.heads, backend=self.backend)


class GEGLU(nn.Module):
    """x W * gelu(x V) with the exact, erf form of GELU (arXiv 2002.05202)."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n t d"]) -> Float[Array, "n t f"]:
        hidden, gate = jnp.split(Dense(2 * self.features, dtype=self.dtype, name="proj")(x), 2, axis=-1)
        return hidden * jax.nn.gelu(gate, approximate=False)


class FeedForward(nn.Module):
    """Gated hidden layer of four times the width."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n t d"]) -> Float[Array, "n t d"]:
        width = x.shape[-1]
        return Dense(width, dtype=self.dtype, name="net_2")(GEGLU(4 * width, self.dtype, name="net_0")(x))


class BasicTransformerBlock(nn.Module):
    """Pre-norm block, in the form that nn.scan takes."""

    heads: int
    backend: AttentionBackend
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n t d"], context: Context):
        x, context = split_batch((x, context), self.backend.mesh)
        h = LayerNorm(dtype=self.dtype, name="norm1")(x)
        x = x + Attention(self.heads, self.backend, self.dtype, name="attn1")(h, Context(h))
        h = LayerNorm(dtype=self.dtype, name="norm2")(x)
        x = x + Attention(self.heads, self.backend, self.dtype, name="attn2")(h, context)
        h = LayerNorm(dtype=self.dtype, name="norm3")(x)
        return x + FeedForward(self.dtype, name="ff")(h), None


class Transformer2DModel(nn.Module):
    """A stack of transformer blocks over all positions, with a norm before and a residual around it.

    The stack runs under nn.scan: it is compiled once, however deep it is. unroll: blocks in a turn of the loop.
    """

    num_layers: int
    heads: int
    groups: int
    use_linear_projection: bool
    backend: AttentionBackend
    remat: str | None = None
    unroll: int = 1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], context: Context) -> Float[Array, "n h w c"]:
        n, height, width, c = x.shape
        tokens = GroupNorm(self.groups, 1e-6, self.dtype, name="norm")(x)
        tokens = self._project("proj_in", tokens).reshape(n, height * width, c)
        if self.num_layers:  # small ControlNets have the projections alone
            tokens = self._blocks(tokens, context)
        return x + self._project("proj_out", tokens.reshape(x.shape))

    def _blocks(self, tokens: Float[Array, "n t d"], context: Context) -> Float[Array, "n t d"]:
        block = rematerialised(BasicTransformerBlock, self.remat, prevent_cse=False)
        blocks = nn.scan(
            block,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]  (flax's own marker, typed as an int)
            length=self.num_layers,
            unroll=min(self.unroll, self.num_layers),
        )
        return blocks(self.heads, self.backend, self.dtype, name="transformer_blocks")(tokens, context)[0]

    def _project(self, name: str, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        """A linear layer and a 1x1 convolution are the same map; their weights differ in shape."""
        c = x.shape[-1]
        if self.use_linear_projection:
            return Dense(c, dtype=self.dtype, name=name)(x)
        return Conv(c, kernel_size=1, padding=0, dtype=self.dtype, name=name)(x)
