"""One rule table between Flax parameter paths and the tensor names of diffusers and transformers.

A Flax path mirrors the torch name: ``down_blocks.1.resnets.0.conv1.weight`` is
``("down_blocks_1", "resnets_0", "conv1", "kernel")``. Stacks that are run by ``nn.scan`` (``STACKED``) hold all their
layers in one array with a leading layer axis. Both directions, reading and writing, walk the Flax tree and use this
file alone.
"""

import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

STACKED = ("transformer_blocks", "layers", "layer", "blocks")
LISTS = (
    "down_blocks",
    "up_blocks",
    "controlnet_down_blocks",
    "blocks",
    "body",
    "resnets",
    "attentions",
    "downsamplers",
    "upsamplers",
    "to_out",
    "projector",
    "net",
    "layers",
    "conv",
    "_blocks",
)
LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
_LIST_ITEM = re.compile(rf"^({'|'.join(LISTS)})_(\d+)$")

Path = tuple[str, ...]


def tensor_names(path: Path, num_layers: int | None = None) -> list[str]:
    """Torch names that the Flax array at ``path`` holds: one, or one a layer when the path runs through a stack."""
    *modules, leaf = path
    parts = [_LIST_ITEM.sub(r"\1.\2", m) for m in modules] + [LEAVES.get(leaf, leaf)]
    stack = next((i for i, m in enumerate(modules) if m in STACKED), None)
    if stack is None:
        return [".".join(parts)]
    if num_layers is None:
        raise ValueError(f"{'/'.join(path)} is a stack: its number of layers is needed")
    return [".".join([*parts[: stack + 1], str(i), *parts[stack + 1 :]]) for i in range(num_layers)]


def is_stacked(path: Path) -> bool:
    return any(m in STACKED for m in path[:-1])


def to_torch(path: Path, array: np.ndarray) -> np.ndarray:
    """Reorder one layer's Flax array as torch holds it: Dense [i, o] -> [o, i], Conv HWIO -> OIHW."""
    if path[-1] != "kernel":
        return array
    return array.T if array.ndim == 2 else array.transpose(3, 2, 0, 1)


def to_flax(path: Path, tensor: np.ndarray) -> np.ndarray:
    """The inverse of ``to_torch``."""
    if path[-1] != "kernel":
        return tensor
    return tensor.T if tensor.ndim == 2 else tensor.transpose(2, 3, 1, 0)


def torch_shape(path: Path, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of each torch tensor behind the Flax array of ``shape`` at ``path``."""
    shape = shape[1:] if is_stacked(path) else shape
    if path[-1] != "kernel":
        return shape
    return shape[::-1] if len(shape) == 2 else (shape[3], shape[2], shape[0], shape[1])


def walk(params) -> Iterator[tuple[Path, Any, list[str]]]:
    """Yield (path, leaf, torch names) for each leaf of a nested dict of arrays or ShapeDtypeStructs."""
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = tuple(str(k.key) for k in keys)
        yield path, leaf, tensor_names(path, leaf.shape[0] if is_stacked(path) else None)
