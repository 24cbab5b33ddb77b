"""Floating-point operations: those of a function, counted on its jaxpr (nothing is compiled, and loops count in full),
and those that a device can do."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

# FLOP/s of dense bfloat16 products by the start of jax's device_kind, as the vendors' data sheets have them.
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5": 459e12,  # v5p calls itself so
    "TPU v5p": 459e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


def peak_flops(device: Any) -> float | None:
    """FLOP/s of dense bfloat16 products that a device can do by its data sheet; None where none is known."""
    words = device.device_kind.replace("-", " ") + " "
    kinds = [kind for kind in PEAK_FLOPS if words.startswith(kind + " ")]
    return PEAK_FLOPS[max(kinds, key=len)] if kinds else None


def count_flops(fn: Callable, *args: Any, while_trips: float = 1.0) -> float:
    """FLOPs of the matrix products and convolutions in ``fn(*args)`` (two a multiply-add); args may be abstract.

    while_trips: how often the body of a loop with a traced bound runs, on average.
    """
    return _count(jax.make_jaxpr(fn)(*args).jaxpr, while_trips)


def _count(jaxpr: core.Jaxpr, while_trips: float) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name in _FLOPS:
            total += _FLOPS[name](eqn)
        elif name == "while":
            total += while_trips * _count(eqn.params["body_jaxpr"].jaxpr, while_trips)
        elif name == "cond":
            total += max(_count(branch.jaxpr, while_trips) for branch in eqn.params["branches"])
        else:
            times = eqn.params["length"] if name == "scan" else 1
            total += times * sum(_count(inner, while_trips) for inner in _inner_jaxprs(eqn))
    return total


def _inner_jaxprs(eqn) -> list[core.Jaxpr]:
    closed = [v for v in eqn.params.values() if isinstance(v, core.ClosedJaxpr | core.Jaxpr)]
    return [v.jaxpr if isinstance(v, core.ClosedJaxpr) else v for v in closed]


def _dot_general(eqn) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    lhs = eqn.invars[0].aval.shape
    return 2.0 * eqn.outvars[0].aval.size * math.prod(lhs[d] for d in contracted)


def _conv_general_dilated(eqn) -> float:
    kernel, out = eqn.invars[1].aval, eqn.outvars[0].aval
    out_channels = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
    # Of a stretched input (the gradient of a strided convolution) the inserted zeros do not count.
    return 2.0 * out.size * (kernel.size / out_channels) / math.prod(eqn.params["lhs_dilation"])


_FLOPS = {"dot_general": _dot_general, "conv_general_dilated": _conv_general_dilated}
