"""EfficientNet-Lite (arXiv 1905.11946, without squeeze-and-excitation): an image classifier up to its last features.

Names are those of the PyPI package efficientnet_lite_pytorch. Padding is TensorFlow's "SAME" at the size that comes in,
which is that package's with ``image_size`` set to this size.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mlcm_jax.json_config import Kind, Table, is_number, read_config
from mlcm_jax.models.layers import FrozenBatchNorm

COEFFICIENT = Kind("a number above 0, at most 10", lambda v: is_number(v) and 0 < v <= 10)
KEYS: Table = dict.fromkeys(("width_coefficient", "depth_coefficient"), (1.0, COEFFICIENT))
# config.json of the published sizes
VARIANTS = {
    "lite0": {"width_coefficient": 1.0, "depth_coefficient": 1.0},
    "lite1": {"width_coefficient": 1.0, "depth_coefficient": 1.1},
    "lite2": {"width_coefficient": 1.1, "depth_coefficient": 1.2},
    "lite3": {"width_coefficient": 1.2, "depth_coefficient": 1.4},
    "lite4": {"width_coefficient": 1.4, "depth_coefficient": 1.8},
}
BATCH_NORM_EPS = 1e-3
STEM, HEAD = 32, 1280  # channels, of all sizes


class StageSettings(NamedTuple):
    """Blocks of one width, before the coefficients; the first block has the stride."""

    repeats: int
    kernel: int
    stride: int
    expansion: int
    features: int


STAGES = (
    StageSettings(1, 3, 1, 1, 16),
    StageSettings(2, 3, 2, 6, 24),
    StageSettings(2, 5, 2, 6, 40),
    StageSettings(3, 3, 2, 6, 80),
    StageSettings(3, 5, 1, 6, 112),
    StageSettings(4, 5, 2, 6, 192),
    StageSettings(1, 3, 1, 6, 320),
)


def scaled_features(features: int, width_coefficient: float) -> int:
    """Channels times the coefficient, rounded to a multiple of 8, and down by no more than a tenth."""
    wanted = features * width_coefficient
    rounded = max(8, int(wanted + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * wanted else rounded


def block_settings(width_coefficient: float, depth_coefficient: float) -> list[StageSettings]:
    """One entry a block, with ``repeats`` 1; the first and the last stage keep their depth."""
    blocks = []
    for i, stage in enumerate(STAGES):
        scales = 0 < i < len(STAGES) - 1
        repeats = math.ceil(depth_coefficient * stage.repeats) if scales else stage.repeats
        one = stage._replace(repeats=1, features=scaled_features(stage.features, width_coefficient))
        blocks += [one] + [one._replace(stride=1)] * (repeats - 1)
    return blocks


class DepthwiseConv(nn.Module):
    """A filter for each channel, "SAME" padding.

    A sum of shifted products: on a CPU a tenth of the time of XLA's grouped convolution (measured at these sizes).
    """

    kernel_size: int
    stride: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c"]:
        (n, height, width, channels), size, stride = x.shape, self.kernel_size, self.stride
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (size, size, 1, channels)).astype(self.dtype)
        paddings = jax.lax.padtype_to_pads((height, width), (size, size), (stride, stride), "SAME")
        padded = jnp.pad(x.astype(self.dtype), ((0, 0), *paddings, (0, 0)))
        rows, columns = (stride * (math.ceil(length / stride) - 1) + 1 for length in (height, width))

        def shifted(i: int, j: int) -> Float[Array, "n h2 w2 c"]:
            ends = (n, i + rows, j + columns, channels)
            return jax.lax.slice(padded, (0, i, j, 0), ends, (1, stride, stride, 1))

        products = [shifted(i, j) * kernel[i, j, 0] for i in range(size) for j in range(size)]
        return functools.reduce(jnp.add, products)


class Block(nn.Module):
    """Inverted residual (arXiv 1801.04381): widen, filter each channel, narrow; skipped where the shape stays."""

    settings: StageSettings
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n h w i"]) -> Float[Array, "n h2 w2 o"]:
        stage, dtype, inputs = self.settings, self.dtype, x
        width = x.shape[-1] * stage.expansion
        if stage.expansion > 1:
            x = nn.Conv(width, (1, 1), use_bias=False, dtype=dtype, name="_expand_conv")(x)
            x = nn.relu6(FrozenBatchNorm(BATCH_NORM_EPS, name="_bn0")(x))
        x = DepthwiseConv(stage.kernel, stage.stride, dtype, name="_depthwise_conv")(x)
        x = nn.relu6(FrozenBatchNorm(BATCH_NORM_EPS, name="_bn1")(x))
        x = nn.Conv(stage.features, (1, 1), use_bias=False, dtype=dtype, name="_project_conv")(x)
        x = FrozenBatchNorm(BATCH_NORM_EPS, name="_bn2")(x)
        return x + inputs if x.shape == inputs.shape and stage.stride == 1 else x


class EfficientNetLite(nn.Module):
    """Pixels in [-1, 1], about (value - 127) / 128, to the average of the last features over all places, float32."""

    width_coefficient: float = 1.0
    depth_coefficient: float = 1.0
    dtype: jnp.dtype = jnp.float32

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, dtype: Any = jnp.float32) -> "EfficientNetLite":
        """Raises UserError for a key that is not supported."""
        values = read_config(dict(config), KEYS, cls.__name__)
        return cls(values["width_coefficient"], values["depth_coefficient"], dtype)

    @nn.compact
    def __call__(self, pixels: Float[Array, "n h w 3"]) -> Float[Array, "n 1280"]:
        x = nn.Conv(STEM, (3, 3), (2, 2), use_bias=False, dtype=self.dtype, name="_conv_stem")(pixels)
        x = nn.relu6(FrozenBatchNorm(BATCH_NORM_EPS, name="_bn0")(x))
        for i, block in enumerate(block_settings(self.width_coefficient, self.depth_coefficient)):
            x = Block(block, self.dtype, name=f"_blocks_{i}")(x)
        x = nn.Conv(HEAD, (1, 1), use_bias=False, dtype=self.dtype, name="_conv_head")(x)
        return nn.relu6(FrozenBatchNorm(BATCH_NORM_EPS, name="_bn1")(x)).mean(axis=(1, 2))
