"""Which device holds which part of an array: a mesh, and rules from parameter paths to mesh axes.

Mesh axes: ``data`` splits the batch; ``fsdp`` splits the batch and the weights, which are gathered layer by layer
(ZeRO stage 3, arXiv 1910.02054); ``tensor`` splits the matrix products inside a layer (Megatron, arXiv 1909.08053).
"""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from mlcm_jax.config import SHARDING_RULES
from mlcm_jax.errors import UserError, shortened

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# One dimension of a rule: no axis, one axis, or several that split it together.
RuleAxes = Sequence[str | Sequence[str] | None]
Rules = Sequence[tuple[str, RuleAxes]]

# Smaller arrays are replicated whatever the rules say: at 64 kB in float32 a collective costs its latency, more than
# a copy on every device is worth. These are the norms, most biases and small LoRA factors.
MIN_SHARDED_SIZE = 2**14


def make_mesh(mesh_config: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of ``mesh_config``, {"data": -1, "fsdp": 1, "tensor": 1}: devices along each axis, -1 for what is left.

    devices: jax devices to use, also those of a topology that is only compiled for; None: all that there are.
    Raises UserError for an unknown or missing axis, a size that cannot be, and a product that is not the number of
    devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = dict(mesh_config)
    if set(sizes) != set(AXES):
        raise UserError(f"config.mesh has the axes {', '.join(sizes)}: it needs {', '.join(AXES)}, and no others.")
    for axis, size in sizes.items():
        if not isinstance(size, int) or (size < 1 and size != -1):
            raise UserError(f"config.mesh.{axis}={size!r} cannot be: use a number of devices, or -1 for those left.")
    open_axes = [axis for axis in AXES if sizes[axis] == -1]
    if len(open_axes) > 1:
        raise UserError(f"config.mesh has -1 for {' and '.join(open_axes)}: only one axis can take what is left.")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if open_axes and len(devices) % fixed == 0:
        sizes[open_axes[0]] = len(devices) // fixed
    if math.prod(sizes[axis] for axis in AXES) != len(devices):
        described = " x ".join(f"{axis} {mesh_config[axis]}" for axis in AXES)
        raise UserError(
            f"config.mesh {described} does not fit {len(devices)} device{'s' * (len(devices) != 1)}: "
            f"the product of the axes must be the number of devices."
        )
    shape = tuple(sizes[axis] for axis in AXES)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Arrays whose first axis is the batch: split over ``data`` and ``fsdp``."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


_step_mesh: ContextVar[Mesh | None] = ContextVar("step_mesh", default=None)


def traced_on(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with ``mesh`` as what ``split_batch`` and ``gathered`` take while it is traced."""

    @functools.wraps(function)
    def traced(*args: Any) -> Any:
        token = _step_mesh.set(mesh)
        try:
            return function(*args)
        finally:
            _step_mesh.reset(token)

    return traced


def split_batch(tree: Any, mesh: Mesh | None = None) -> Any:
    """Arrays whose first axis is the batch, held to be split over ``data`` and ``fsdp``, forward and backward.

    Without it the compiler is free to gather the batch where arrays are joined or reshaped, and then each device
    computes all of it. The other axes stay the compiler's choice. mesh: None: that of ``traced_on``. Nothing changes
    where the batch does not divide, on one device, and without a mesh.
    """
    mesh = mesh or _step_mesh.get()
    ways = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if mesh is None or ways == 1:
        return tree

    def split(a: Any) -> Any:
        if a.shape[0] % ways:
            return a
        others = (PartitionSpec.UNCONSTRAINED,) * (a.ndim - 1)
        return jax.lax.with_sharding_constraint(a, NamedSharding(mesh, PartitionSpec(BATCH_AXES, *others)))

    return jax.tree.map(split, tree)


def gathered(params: Any, rules: Rules) -> Any:
    """Weights held to be whole along ``fsdp``, split by ``rules`` along ``tensor``, on the mesh of ``traced_on``.

    For a small network with large activations. Left to itself, the TPU compiler may pass a weight's parts around while
    it computes with them, in a loop that holds its output several times over from the step's start to its end.
    """
    mesh = _step_mesh.get()
    if mesh is None or mesh.shape["fsdp"] == 1:
        return params

    without_fsdp = AbstractMesh(tuple(1 if axis == "fsdp" else mesh.shape[axis] for axis in AXES), AXES)
    split = param_shardings(params, without_fsdp, rules)
    return jax.lax.with_sharding_constraint(params, jax.tree.map(lambda s: NamedSharding(mesh, s.spec), split))


def local_rows(sharding: NamedSharding, n: int) -> Int[np.ndarray, " m"]:
    """Rows of a batch of n, in order, that the devices of this process hold."""
    slices = {index[0].indices(n)[:2] for index in sharding.addressable_devices_indices_map((n,)).values() if index}
    return np.concatenate([np.arange(start, stop) for start, stop in sorted(slices)])


def from_local_rows(sharding: NamedSharding, values: np.ndarray) -> jax.Array:
    """The batch whose rows on this process's devices, in order, are ``values``; each process gives its own."""
    parts = math.prod(sharding.mesh.shape[axis] for axis in BATCH_AXES)
    mine = local_rows(sharding, parts)
    each = len(values) // len(mine)

    def shard(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(parts * each)
        first = int(np.searchsorted(mine, start // each)) * each
        return values[first : first + stop - start]

    return jax.make_array_from_callback((parts * each, *values.shape[1:]), sharding, shard)


def from_equal_values(sharding: NamedSharding, value: Any) -> jax.Array:
    """A replicated array of what every process gives alike; unlike jax.device_put, none asks the others for it."""
    value = np.asarray(value)
    return jax.make_array_from_callback(value.shape, sharding, lambda _: value)


def param_shardings(
    shapes_tree: Any,
    mesh: Mesh | AbstractMesh,
    rules: Rules = SHARDING_RULES,
    *,
    min_size: int = MIN_SHARDED_SIZE,
) -> Any:
    """A NamedSharding for each array (or ShapeDtypeStruct) of a tree, by the first rule that its path matches.

    Serves every tree that repeats the parameters' paths: parameters, LoRA factors, moving averages, optimizer and
    train states. An axis that does not divide its dimension moves to the largest of the rule's other dimensions that
    it does divide, one without an axis before one with, the later of two equal ones; where there is none, the array
    is replicated along that axis. Dimensions in front of the rule's, such as a stack's layers, are never split.
    Arrays of fewer than ``min_size`` elements and those that no rule matches are replicated.

    Raises UserError for a rule that is not a regular expression, that names an unknown axis, or that has more
    dimensions than an array it matches.
    """
    compiled = [_compile(pattern, axes, mesh) for pattern, axes in rules]

    def sharding(key_path, leaf) -> NamedSharding:
        path = jax.tree_util.keystr(key_path, simple=True, separator="/")
        axes = next((axes for pattern, axes in compiled if pattern.search(path)), None)
        if axes is None or math.prod(leaf.shape) < min_size:
            return NamedSharding(mesh, PartitionSpec())
        if len(axes) > len(leaf.shape):
            raise UserError(
                f"The sharding rule for {path} names {len(axes)} dimensions, but the array has the shape "
                f"{tuple(leaf.shape)}: put a rule that fits it first in config.sharding_rules."
            )
        return NamedSharding(mesh, PartitionSpec(*_place(axes, leaf.shape, mesh.shape)))

    return jax.tree_util.tree_map_with_path(sharding, shapes_tree)


def _compile(pattern: str, axes: RuleAxes, mesh: Mesh | AbstractMesh) -> tuple[re.Pattern, list[tuple[str, ...]]]:
    """The rule with its pattern compiled and the axes of each dimension as a tuple, without those of one device."""
    try:
        compiled = re.compile(pattern)
    except re.error as e:
        raise UserError(f"The sharding rule {pattern!r} is not a regular expression ({shortened(e)}).") from None
    entries = [() if entry is None else (entry,) if isinstance(entry, str) else tuple(entry) for entry in axes]
    named = [axis for entry in entries for axis in entry]
    unknown = [axis for axis in named if axis not in mesh.shape]
    if unknown:
        raise UserError(f"The sharding rule {pattern!r} names the axis {unknown[0]!r}: use {', '.join(mesh.shape)}.")
    if len(set(named)) < len(named):
        raise UserError(f"The sharding rule {pattern!r} names an axis twice: an axis can split only one dimension.")
    return compiled, [tuple(axis for axis in entry if mesh.shape[axis] > 1) for entry in entries]


def _place(
    axes: Sequence[tuple[str, ...]], shape: tuple[int, ...], sizes: Mapping[str, int]
) -> list[tuple[str, ...] | None]:
    """Axes of each dimension of ``shape``, after moving those that do not divide theirs."""
    placed: list[tuple[str, ...]] = [()] * len(shape)
    first = len(shape) - len(axes)

    def fits(dim: int, axis: str) -> bool:
        return shape[dim] % (sizes[axis] * math.prod(sizes[a] for a in placed[dim])) == 0

    displaced = []
    for dim, entry in enumerate(axes, first):
        for axis in entry:
            if fits(dim, axis):
                placed[dim] += (axis,)
            else:
                displaced.append(axis)
    for axis in displaced:
        candidates = [dim for dim in range(first, len(shape)) if fits(dim, axis)]
        if candidates:
            target = max(candidates, key=lambda dim: (not placed[dim], shape[dim], dim))
            placed[target] += (axis,)
    return [entry or None for entry in placed]


def sharded_fraction(tree: Any) -> float:
    """Share of the elements in arrays that are split; leaves are arrays or ShapeDtypeStructs with shardings."""
    leaves = jax.tree.leaves(tree)
    total = sum(math.prod(leaf.shape) for leaf in leaves)
    return sum(math.prod(leaf.shape) for leaf in leaves if not leaf.sharding.is_fully_replicated) / total


def bytes_per_device(tree: Any) -> int:
    """Bytes that one device holds of the tree; leaves are arrays or ShapeDtypeStructs with shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
