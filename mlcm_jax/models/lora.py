"""Low-rank adaptation (arXiv 2106.09685) as a parameter tree beside the frozen kernels.

A LoRA tree mirrors the module paths of the network: {module path...: {"down", "up"}}. The layers (models/layers.py)
take it as the collection "lora", with ``up`` already multiplied by alpha / rank (``scaled``).
"""

import re
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array

from mlcm_jax.config import LORA_TARGETS
from mlcm_jax.errors import UserError, listed, shortened
from mlcm_jax.types import Params

Flat = dict[tuple[str, ...], Any]


def target_modules(params_shapes: Params, targets: Sequence[str]) -> dict[tuple[str, ...], Any]:
    """The kernels that ``targets`` select, by module path; raises UserError for a target that selects none."""
    flat: Flat = traverse_util.flatten_dict(params_shapes)
    kernels = {path[:-1]: leaf for path, leaf in flat.items() if path[-1] == "kernel"}
    selected = {}
    for target in targets:
        try:
            pattern = re.compile(target)
        except re.error as e:
            raise UserError(f"LoRA target {target!r} is not a regular expression ({shortened(e)}).") from None
        matched = {path: leaf for path, leaf in kernels.items() if pattern.search("/".join(path))}
        if not matched:
            some = listed("/".join(path) for path in list(kernels)[:3])
            raise UserError(f"LoRA target {target!r} matches no layer of the network: its layers are like {some}.")
        selected |= matched
    return selected


def init(
    rng: jax.Array,
    params_shapes: Params,
    rank: int,
    targets: Sequence[str] = LORA_TARGETS,
    dtype: Any = jnp.float32,
) -> Params:
    """A LoRA that changes nothing yet: ``up`` is zero, ``down`` is uniform within 1/sqrt(fan_in), as PEFT's default.

    A kernel [i, o] gets down [i, r] and up [r, o]; [k, k, i, o] gets down [k, k, i, r] and up [1, 1, r, o]; stacked
    kernels get stacked factors. Each module's numbers depend on ``rng`` and its path only, not on the other targets.
    Raises UserError for a rank below 1 and for a target that matches no layer.
    """
    if rank < 1:
        raise UserError(f"LoRA rank {rank} is not possible: use 1 or more.")
    lora = {}
    for path, kernel in target_modules(params_shapes, targets).items():
        *outer, fan_in, features = kernel.shape
        is_conv = len(outer) >= 2
        bound = (fan_in * (outer[-2] * outer[-1] if is_conv else 1)) ** -0.5
        key = jax.random.fold_in(rng, zlib.crc32("/".join(path).encode()))
        up_outer = [*outer[:-2], 1, 1] if is_conv else outer
        lora[*path, "down"] = jax.random.uniform(key, (*outer, fan_in, rank), dtype, -bound, bound)
        lora[*path, "up"] = jnp.zeros((*up_outer, rank, features), dtype)
    return traverse_util.unflatten_dict(lora)


def scaled(lora: Params, alpha: float, rank: int) -> Params:
    """Multiply every ``up`` by alpha / rank: the form that the layers, ``merge`` and hub/lora.py take."""
    flat: Flat = traverse_util.flatten_dict(lora)
    return traverse_util.unflatten_dict({k: v * (alpha / rank) if k[-1] == "up" else v for k, v in flat.items()})


def merge(params: Params, lora: Params) -> Params:
    """Parameters with a scaled LoRA folded into the kernels, which keep their dtype; the sum is done in float32."""
    flat: Flat = traverse_util.flatten_dict(params)
    factors: Flat = traverse_util.flatten_dict(lora)
    for *module, leaf in factors:
        if leaf == "down":
            down, up = (factors[*module, name] for name in ("down", "up"))
            flat[*module, "kernel"] = _merged_kernel(flat[*module, "kernel"], down, up)
    return traverse_util.unflatten_dict(flat)


@jax.jit  # one program for each shape: operation by operation, compiling takes most of the time of a small network
def _merged_kernel(kernel: Array, down: Array, up: Array) -> Array:
    # Both kinds of kernel are one (batched) matrix product: a convolution's up factor is 1x1.
    down, up = down.astype(jnp.float32), up.astype(jnp.float32)
    delta = jnp.matmul(down, up, precision=jax.lax.Precision.HIGHEST)
    return (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)
