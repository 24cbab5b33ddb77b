"""Inception v3 (arXiv 1512.00567) with the weights and the quirks of the TensorFlow graph that FID is defined by.

Names are those of torchvision's network, as in pytorch-fid's file pt_inception-2015-12-05. It differs from that network
in its pooling branches: averages leave the padding out, and the last block takes a maximum.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mlcm_jax.models.layers import FrozenBatchNorm

SIDE = 299  # pixels
BATCH_NORM_EPS = 1e-3

SAME: Any = ((1, 1), (1, 1))  # flax takes pairs of pixels, though its annotation says a name

# (name, output channels, kernel height, kernel width): stride 1, padded to keep the size unless noted
Branch = Sequence[tuple[str, int, int, int]]


class BasicConv2d(nn.Module):
    """Convolution without bias, batch normalisation by stored statistics, ReLU."""

    features: int
    kernel: tuple[int, int] = (3, 3)
    stride: int = 1
    same: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n h w i"]) -> Float[Array, "n h2 w2 o"]:
        x = _Kernel(self.features, self.kernel, self.stride, self.same, self.dtype, name="conv")(x)
        return jax.nn.relu(FrozenBatchNorm(BATCH_NORM_EPS, name="bn")(x)).astype(self.dtype)


class _Kernel(nn.Module):
    features: int
    kernel: tuple[int, int]
    stride: int
    same: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        shape = (*self.kernel, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape).astype(self.dtype)
        padding = [(side // 2, side // 2) if self.same else (0, 0) for side in self.kernel]
        strides = (self.stride, self.stride)
        return jax.lax.conv_general_dilated(
            x.astype(self.dtype), kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )


def average_pool(x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
    """3 x 3 averages at stride 1, over the pixels that are there."""
    return nn.avg_pool(x, (3, 3), (1, 1), SAME, count_include_pad=False)


def same_max_pool(x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
    return nn.max_pool(x, (3, 3), (1, 1), SAME)


def halving_max_pool(x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c"]:
    return nn.max_pool(x, (3, 3), (2, 2))


def _chain(x, branch: Branch, dtype, *, halve: bool = False):
    """The convolutions of one branch; with ``halve``, the last has stride 2 and no padding."""
    for i, (name, features, *kernel) in enumerate(branch):
        last = halve and i == len(branch) - 1
        x = BasicConv2d(features, (kernel[0], kernel[1]), 2 if last else 1, not last, dtype, name=name)(x)
    return x


class Mixed(nn.Module):
    """Branches side by side, then a pooling branch; where they halve the size, it is the pooled input itself."""

    branches: tuple[Branch, ...]
    pool_features: int = 0
    max_pool: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n h w i"]) -> Float[Array, "n h2 w2 o"]:
        halve = not self.pool_features
        outputs = [_chain(x, branch, self.dtype, halve=halve) for branch in self.branches]
        if halve:
            pooled = halving_max_pool(x)
        else:
            pooled = same_max_pool(x) if self.max_pool else average_pool(x)
            pooled = BasicConv2d(self.pool_features, (1, 1), dtype=self.dtype, name="branch_pool")(pooled)
        return jnp.concatenate([*outputs, pooled], axis=-1)


class WideMixed(nn.Module):
    """The last two blocks: two branches end in a row-wise and a column-wise convolution of the same input."""

    max_pool: bool
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n h w i"]) -> Float[Array, "n h w 2048"]:
        dtype = self.dtype
        one = _chain(x, [("branch1x1", 320, 1, 1)], dtype)
        three = _chain(x, [("branch3x3_1", 384, 1, 1)], dtype)
        double = _chain(x, [("branch3x3dbl_1", 448, 1, 1), ("branch3x3dbl_2", 384, 3, 3)], dtype)
        split = [
            _chain(source, [(name, 384, *kernel)], dtype)
            for source, prefix in ((three, "branch3x3_2"), (double, "branch3x3dbl_3"))
            for name, kernel in ((f"{prefix}a", (1, 3)), (f"{prefix}b", (3, 1)))
        ]
        pooled = same_max_pool(x) if self.max_pool else average_pool(x)
        pooled = BasicConv2d(192, (1, 1), dtype=dtype, name="branch_pool")(pooled)
        return jnp.concatenate([one, *split, pooled], axis=-1)


def _block_a(pool_features: int, dtype, name: str) -> Mixed:
    double = (("branch3x3dbl_1", 64, 1, 1), ("branch3x3dbl_2", 96, 3, 3), ("branch3x3dbl_3", 96, 3, 3))
    five = (("branch5x5_1", 48, 1, 1), ("branch5x5_2", 64, 5, 5))
    return Mixed(((("branch1x1", 64, 1, 1),), five, double), pool_features, dtype=dtype, name=name)


def _block_b(dtype, name: str) -> Mixed:
    double = (("branch3x3dbl_1", 64, 1, 1), ("branch3x3dbl_2", 96, 3, 3), ("branch3x3dbl_3", 96, 3, 3))
    return Mixed(((("branch3x3", 384, 3, 3),), double), dtype=dtype, name=name)


def _block_c(c: int, dtype, name: str) -> Mixed:
    seven = (("branch7x7_1", c, 1, 1), ("branch7x7_2", c, 1, 7), ("branch7x7_3", 192, 7, 1))
    kernels = ((c, 1, 1), (c, 7, 1), (c, 1, 7), (c, 7, 1), (192, 1, 7))
    double = tuple((f"branch7x7dbl_{i}", *kernel) for i, kernel in enumerate(kernels, start=1))
    return Mixed(((("branch1x1", 192, 1, 1),), seven, double), 192, dtype=dtype, name=name)


def _block_d(dtype, name: str) -> Mixed:
    kernels = ((192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3))
    seven = tuple((f"branch7x7x3_{i}", *kernel) for i, kernel in enumerate(kernels, start=1))
    return Mixed(((("branch3x3_1", 192, 1, 1), ("branch3x3_2", 320, 3, 3)), seven), dtype=dtype, name=name)


class InceptionV3(nn.Module):
    """Up to the last average: what the Frechet Inception distance compares (arXiv 1706.08500)."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, pixels: Float[Array, "n 299 299 3"]) -> Float[Array, "n 2048"]:
        """Features of pixels in [-1, 1], float32."""
        dtype = self.dtype
        x = BasicConv2d(32, stride=2, same=False, dtype=dtype, name="Conv2d_1a_3x3")(pixels)
        x = BasicConv2d(32, same=False, dtype=dtype, name="Conv2d_2a_3x3")(x)
        x = halving_max_pool(BasicConv2d(64, dtype=dtype, name="Conv2d_2b_3x3")(x))
        x = BasicConv2d(80, (1, 1), dtype=dtype, name="Conv2d_3b_1x1")(x)
        x = halving_max_pool(BasicConv2d(192, same=False, dtype=dtype, name="Conv2d_4a_3x3")(x))
        for letter, pool_features in (("b", 32), ("c", 64), ("d", 64)):
            x = _block_a(pool_features, dtype, f"Mixed_5{letter}")(x)
        x = _block_b(dtype, "Mixed_6a")(x)
        for letter, channels in (("b", 128), ("c", 160), ("d", 160), ("e", 192)):
            x = _block_c(channels, dtype, f"Mixed_6{letter}")(x)
        x = _block_d(dtype, "Mixed_7a")(x)
        x = WideMixed(max_pool=False, dtype=dtype, name="Mixed_7b")(x)
        x = WideMixed(max_pool=True, dtype=dtype, name="Mixed_7c")(x)
        return x.astype(jnp.float32).mean(axis=(1, 2))


def resize_like_torch(images: Float[Array, "n H W 3"]) -> Float[Array, "n 299 299 3"]:
    """Bilinear, without a low-pass filter, whichever way the size goes: as pytorch-fid does it."""
    return jax.image.resize(images, (len(images), SIDE, SIDE, 3), "linear", antialias=False)
