"""The gradient of a batch in parts, one after the other: the memory of one part's activations, the same sum."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from mlcm_jax.types import Params

# (params, rows, key) -> the mean loss over the rows, and (means over them, one result a row)
LossFn = Callable[[Params, Any, Key[Array, ""]], tuple[Array, tuple[Any, Any]]]


def value_and_grad(
    loss_fn: LossFn, params: Params, rows: Any, key: Key[Array, ""], parts: int
) -> tuple[tuple[Array, tuple[Any, Any]], Params]:
    """Like jax.value_and_grad(loss_fn, has_aux=True)(params, rows, key), in ``parts`` of equal size under a scan.

    rows: a tree whose arrays have the batch first, a multiple of ``parts`` long. Each part has a key of its own.
    """
    gradient = jax.value_and_grad(loss_fn, has_aux=True)
    if parts == 1:
        return gradient(params, rows, key)

    def one(total, part):
        rows, key = part
        (loss, (means, results)), grads = gradient(params, rows, key)
        return jax.tree.map(jnp.add, total, (loss, means, grads)), results

    split = jax.tree.map(lambda a: _split(a, parts), rows)
    keys = jax.random.split(key, parts)
    shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda a: a[0], split), keys[0])
    (loss, (means, _)), grads = shapes
    start = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), (loss, means, grads))
    total, results = jax.lax.scan(one, start, (split, keys))
    loss, means, grads = jax.tree.map(lambda a: a / parts, total)
    return (loss, (means, jax.tree.map(_joined, results))), grads


def _split(a: Array, parts: int) -> Array:
    """[b, ...] to [parts, b / parts, ...]; every part takes rows from each device's share of the batch."""
    return jnp.swapaxes(a.reshape(len(a) // parts, parts, *a.shape[1:]), 0, 1)


def _joined(a: Array) -> Array:
    """The inverse of ``_split``."""
    return jnp.swapaxes(a, 0, 1).reshape(-1, *a.shape[2:])
