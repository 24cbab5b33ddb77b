"""Strict, streaming reading of diffusers' and transformers' safetensors into Flax parameters.

Everything is checked from the file's header before the first tensor is read. Then a few Flax arrays at a time are
assembled on the host, cast and placed, so that the host holds little more than the largest of them.
"""

import functools
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from mlcm_jax.errors import UserError, listed
from mlcm_jax.hub import names
from mlcm_jax.hub.host_copy import copy_into, empty_aligned
from mlcm_jax.hub.layout import Layout, LayoutReader
from mlcm_jax.hub.tensor_reader import DTYPES, TensorReader, is_finite, open_weights
from mlcm_jax.hub.tensor_reader import find_weights as find_weights
from mlcm_jax.hub.tensor_reader import read_json as read_json
from mlcm_jax.types import Params

# Buffers that older versions of transformers wrote among the weights; they hold nothing that was learnt.
BUFFERS = (re.compile(r"(^|\.)embeddings\.position_ids$"),)

# Other versions' spelling -> ours; a rule is used only where its result is a name that the network has.
ALIASES = (
    # transformers 5 writes CLIPTextModel without the prefix that every earlier version writes
    (re.compile(r"^(embeddings|encoder|final_layer_norm)\."), r"text_model.\1."),
    (re.compile(r"^(embeddings|encoder|pre_layrnorm|post_layernorm)\."), r"vision_model.\1."),
    # a whole ChineseCLIPModel's file has its text tower with a prefix
    (re.compile(r"^text_model\.(embeddings|encoder)\."), r"\1."),
    # diffusers before 0.15 named the autoencoder's attention so; SD 1.5's and 2.1's files still do
    (re.compile(r"\.attentions\.0\.query\."), ".attentions.0.to_q."),
    (re.compile(r"\.attentions\.0\.key\."), ".attentions.0.to_k."),
    (re.compile(r"\.attentions\.0\.value\."), ".attentions.0.to_v."),
    (re.compile(r"\.attentions\.0\.proj_attn\."), ".attentions.0.to_out.0."),
)

THREADS = 4  # that read, check, cast and place an array each


def _match_names(
    reader: TensorReader, expected: Mapping[str, tuple[int, ...]], ignored: Sequence[re.Pattern]
) -> dict[str, str]:
    """Map each expected name to the name that the file uses for it; every tensor must find its place."""
    in_file = set(reader.names())
    found, unexpected = {}, []
    for name in in_file:
        if name in expected:
            found[name] = name
        elif not any(rule.search(name) for rule in (*BUFFERS, *ignored)):
            spelt = (rule.sub(new, name) for rule, new in ALIASES if rule.search(name))
            ours = next((s for s in spelt if s in expected and s not in in_file), None)
            if ours is None or ours in found:
                unexpected.append(name)
            else:
                found[ours] = name
    missing = {reader.spelling(name) for name in expected.keys() - found.keys()}
    if missing:
        raise UserError(f"{reader.source} lacks {len(missing)} tensors of the network: {listed(missing)}.")
    if unexpected:
        raise UserError(
            f"{reader.source} has {len(unexpected)} tensors that the network does not have: {listed(unexpected)}."
        )
    return found


def check_tensors(reader: TensorReader, found: Mapping[str, str], expected: Mapping[str, tuple[int, ...]]):
    """Raise UserError when a tensor has another shape than ``expected`` or is not of a supported float dtype."""
    misshapen = [
        f"{reader.spelling(file_name)} is {list(reader.shape(file_name))}, not {list(expected[name])}"
        for name, file_name in found.items()
        if reader.shape(file_name) != expected[name]
    ]
    if misshapen:
        raise UserError(
            f"{reader.source} does not fit the network, {len(misshapen)} tensors have another shape: "
            f"{listed(misshapen)}."
        )
    check_dtypes(reader, found.values())


def check_dtypes(reader: TensorReader, file_names: Iterable[str]):
    """Raise UserError when a tensor is not of a supported float dtype."""
    mistyped = [f"{n} is {reader.dtype(n)}" for n in file_names if reader.dtype(n) not in DTYPES]
    if mistyped:
        raise UserError(
            f"{reader.source} has tensors of an unsupported dtype: {listed(mistyped)}; use {', '.join(DTYPES)}."
        )


def widest_dtype(reader: TensorReader, file_names: Iterable[str]) -> np.dtype:
    """The smallest dtype that holds the values of all these tensors: one array may be several tensors in a file."""
    return np.dtype(functools.reduce(jnp.promote_types, (DTYPES[reader.dtype(n)] for n in file_names)))


def read_array(reader: TensorReader, path: names.Path, file_names: list[str], dtype: Any = None) -> np.ndarray:
    """Assemble the Flax array at ``path`` on the host from the tensors of these names."""
    dtype = dtype or widest_dtype(reader, file_names)
    memory = np.empty(max(map(reader.num_bytes, file_names)), np.uint8)
    layers = (read_layer(reader, path, name, memory) for name in file_names)
    first = next(layers)
    stack = empty_aligned((len(file_names), *first.shape), dtype)
    for i, layer in enumerate(itertools.chain([first], layers)):
        copy_into(stack[i, ...], layer)  # a view, of scalars too
    return stack if names.is_stacked(path) else stack[0]


def read_layer(
    reader: TensorReader,
    path: names.Path,
    name: str,
    memory: np.ndarray | None = None,
    shape: tuple[int, ...] | None = None,
) -> np.ndarray:
    """One tensor as Flax holds it, in ``memory`` if given; raises UserError when it has a value that is not finite.

    shape: torch's, where the file has it with more or fewer axes of length 1.
    """
    tensor = reader.read(name, memory)
    if not is_finite(tensor):
        raise UserError(
            f"{reader.source} has values that are no finite numbers in {reader.spelling(name)}: copy or download it "
            "again, and if that does not help, use another model."
        )
    return names.to_flax(path, tensor if shape is None else tensor.reshape(shape))


def place(array: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """Put a host array on the devices; each process hands over only the shards that it holds.

    A CPU device takes an aligned array as it is, without a copy: it must not be written to afterwards.
    """
    if sharding is None:
        return jax.device_put(array)
    return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)


def load_params(
    shapes: Params,
    source: str | Path | TensorReader,
    *,
    dtype: Any = None,
    shardings: Any = None,
    ignored: Sequence[re.Pattern] = (),
    layout: Layout | None = None,
) -> Params:
    """Read a component's safetensors into parameters of the given tree, strictly and a few arrays at a time.

    Args:
      shapes: tree of ShapeDtypeStructs, ``jax.eval_shape(module.init, ...)["params"]``; its dtypes are not used.
      source: a folder with ``diffusion_pytorch_model`` or ``model`` as ``.safetensors``, ``.fp16.safetensors`` or
        shards; one .safetensors file; or an open reader.
      dtype: of all parameters; None keeps the file's.
      shardings: one sharding for all, or a tree like ``shapes``; None puts everything on the default device.
      ignored: names that a file may have beside the network's, such as those of a part that is not used.
      layout: how the file names and keeps the tensors; None: as diffusers and transformers do.

    Raises UserError for missing, unexpected, misshapen or non-float tensors, for a corrupt file, for an index that
    leaves its folder and for weights that are only there as a pickle.
    """
    reader = source if isinstance(source, TensorReader) else open_weights(source)
    leaves = list(names.walk(shapes))
    expected = {n: names.torch_shape(path, leaf.shape) for path, leaf, torch_names in leaves for n in torch_names}
    if layout is not None:
        reader = LayoutReader(reader, layout, expected)
    found = _match_names(reader, expected, ignored)
    check_tensors(reader, found, expected)
    one_for_all = shardings is None or isinstance(shardings, jax.sharding.Sharding)
    by_path: dict[names.Path, Any] = {} if one_for_all else traverse_util.flatten_dict(shardings)

    def load(leaf: tuple[names.Path, Any, list[str]]) -> tuple[names.Path, jax.Array]:
        path, _, torch_names = leaf
        array = read_array(reader, path, [found[n] for n in torch_names], dtype)
        return path, place(array, shardings if one_for_all else by_path[path])

    with ThreadPoolExecutor(THREADS) as pool:
        return traverse_util.unflatten_dict(dict(pool.map(load, leaves)))
