"""Attention by cuDNN's fused kernels: the rules that they and jax set, and how odd lengths are made to fit them."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

DTYPES = (jnp.bfloat16, jnp.float16)
HEAD_DIM_MULTIPLE = 8
MAX_HEAD_DIM = 128  # in both directions, on all GPUs since Ampere
LENGTH_MULTIPLE = 2  # of queries and of keys: jax refuses the gradient for odd numbers, and a prompt has 77 tokens


def supports(head_dim: int, dtype: Any) -> bool:
    """Whether ``cudnn_attention`` has an output and a gradient for heads of ``head_dim`` channels, at any length."""
    return dtype in DTYPES and head_dim % HEAD_DIM_MULTIPLE == 0 and head_dim <= MAX_HEAD_DIM


def cudnn_attention(
    q: Float[Array, "n t h d"], k: Float[Array, "n s h d"], v: Float[Array, "n s h d"]
) -> Float[Array, "n t h d"]:
    """Attention on a CUDA GPU without its scores in memory, scaled by 1 / sqrt(d), with a gradient.

    Any number of queries and keys: odd ones get one more row, and no query sees the padded key.
    """
    tokens, keys = q.shape[1], k.shape[1]
    q, k, v = (_pad(a) for a in (q, k, v))
    # Without lengths the kernel needs no mask at all, which is the faster one.
    lengths = jnp.full(len(k), keys, jnp.int32) if k.shape[1] > keys else None
    out = jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, implementation="cudnn")
    return out[:, :tokens]


def _pad(a: Float[Array, "n t h d"]) -> Float[Array, "n t2 h d"]:
    return jnp.pad(a, ((0, 0), (0, -a.shape[1] % LENGTH_MULTIPLE), (0, 0), (0, 0)))
