"""LoRA files in PEFT's naming, which diffusers' ``load_lora_weights`` takes.

Tensors are ``unet.<module>.lora_A.weight`` (down) and ``lora_B.weight`` (up). Loaders disagree about alpha: some read
the header, some read ``.alpha`` tensors, some neither, and their defaults differ. Files written here hold ``up``
already multiplied by alpha / rank and say alpha = rank in the header, so that each of them comes to the same weights.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from mlcm_jax.errors import UserError
from mlcm_jax.hub import names
from mlcm_jax.hub.load import TensorReader, check_tensors, listed, place, read_array
from mlcm_jax.hub.save import FORMAT, Entry, host_array, write_safetensors
from mlcm_jax.types import Params

FILE_NAME = "pytorch_lora_weights.safetensors"
METADATA_KEY = "lora_adapter_metadata"  # of the safetensors header, read by diffusers from 0.34 on
FACTORS = {"down": "lora_A", "up": "lora_B"}
PREFIX = "unet."


def _lora_file(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / FILE_NAME


def _modules(path: names.Path, num_layers: int | None) -> list[str]:
    """Torch module names behind a Flax module path."""
    return [n.removesuffix(".weight") for n in names.tensor_names((*path, "kernel"), num_layers)]


def _rank(lora: dict) -> int:
    ranks = {leaf.shape[-1] for path, leaf in lora.items() if path[-1] == "down"}
    if len(ranks) != 1:
        raise UserError(f"A LoRA of one rank can be saved, this one has {sorted(ranks)}.")
    return ranks.pop()


def _entry(path: names.Path, leaf: Any, dtype: Any) -> Entry:
    *module, factor = path
    kernel_path = (*module, "kernel")
    stacked = names.is_stacked(kernel_path)
    tensors = _modules(tuple(module), leaf.shape[0] if stacked else None)

    def read() -> list[np.ndarray]:
        array = host_array(leaf)
        return [names.to_torch(kernel_path, layer) for layer in (array if stacked else array[None])]

    torch_names = [f"{PREFIX}{m}.{FACTORS[factor]}.weight" for m in tensors]
    return Entry(torch_names, names.torch_shape(kernel_path, leaf.shape), np.dtype(dtype or leaf.dtype), read)


def save_lora(lora: Params, path: str | Path, *, dtype: Any = None) -> Path:
    """Write a scaled UNet LoRA (models/lora.py, ``scaled``) for ``pipe.load_lora_weights``; returns the file.

    Args:
      path: a ``.safetensors`` file, or a folder that gets ``pytorch_lora_weights.safetensors``.
      dtype: of the written tensors; None keeps the tree's.
    """
    file = _lora_file(path)
    flat = traverse_util.flatten_dict(lora)
    rank = _rank(flat)
    entries = [_entry(p, leaf, dtype) for p, leaf in flat.items()]
    suffix = f".{FACTORS['down']}.weight"
    modules = sorted(n.removeprefix(PREFIX).removesuffix(suffix) for e in entries for n in e.names if suffix in n)
    adapter = {"r": rank, "lora_alpha": rank, "target_modules": modules, "rank_pattern": {}, "alpha_pattern": {}}
    adapter_text = json.dumps({PREFIX + key: value for key, value in adapter.items()})
    write_safetensors(entries, file, FORMAT | {METADATA_KEY: adapter_text})
    return file


def _alpha(reader: TensorReader) -> float | None:
    """lora_alpha of the header; None, meaning alpha = rank, where the file has no header of this kind."""
    if METADATA_KEY not in reader.metadata:
        return None
    try:
        adapter = json.loads(reader.metadata[METADATA_KEY])
    except ValueError:
        raise UserError(f"{reader.source} has a damaged {METADATA_KEY} in its header.") from None
    for key in ("alpha_pattern", "use_dora", "use_rslora"):
        if adapter.get(PREFIX + key):
            raise UserError(f"{reader.source} sets {key}={adapter[PREFIX + key]!r}, which is not supported.")
    return adapter.get(PREFIX + "lora_alpha")


def load_lora(path: str | Path, params_shapes: Params, *, dtype: Any = None) -> Params:
    """Read a UNet LoRA in PEFT's naming as a scaled tree: the form that the layers take.

    Args:
      params_shapes: the UNet's tree of ShapeDtypeStructs or arrays. dtype: None keeps the file's.

    Raises UserError for a file that is absent or corrupt, for tensors that the network has no place for, and for a
    stack of layers of which the file holds only some.
    """
    reader = TensorReader(_lora_file(path))
    alpha = _alpha(reader)
    in_file = set(reader.names())
    lora, used = {}, set()
    for kernel_path, kernel, _ in names.walk(params_shapes):
        if kernel_path[-1] != "kernel":
            continue
        modules = _modules(kernel_path[:-1], kernel.shape[0] if names.is_stacked(kernel_path) else None)
        tensors = {f: [f"{PREFIX}{m}.{name}.weight" for m in modules] for f, name in FACTORS.items()}
        wanted = {n for group in tensors.values() for n in group}
        if not wanted & in_file:
            continue
        if wanted - in_file:
            raise UserError(f"{reader.source} lacks tensors that belong to its others: {listed(wanted - in_file)}.")
        used |= wanted
        lora |= _read_module(reader, kernel_path, kernel.shape, tensors, alpha, dtype)
    if in_file - used or not used:
        what = listed(in_file - used) or "it holds no tensors"
        raise UserError(f"{reader.source} is no LoRA in PEFT's naming for this UNet: {what}.")
    return traverse_util.unflatten_dict(lora)


def _read_module(reader, kernel_path, kernel_shape, tensors, alpha, dtype) -> dict[names.Path, Any]:
    rank = reader.shape(tensors["down"][0])[0]
    *outer, fan_in, features = kernel_shape
    up_outer = [*outer[:-2], 1, 1] if len(outer) >= 2 else outer
    shapes = {"down": (*outer, fan_in, rank), "up": (*up_outer, rank, features)}
    out = {}
    for factor, group in tensors.items():
        shape = names.torch_shape(kernel_path, shapes[factor])
        check_tensors(reader, {n: n for n in group}, dict.fromkeys(group, shape))
        array = read_array(reader, kernel_path, group, dtype)
        if factor == "up" and alpha is not None and alpha != rank:
            array = (array.astype(np.float32) * (alpha / rank)).astype(array.dtype)
        out[*kernel_path[:-1], factor] = place(array, None)
    return out
