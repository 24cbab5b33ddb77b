"""Writing Flax parameters as diffusers' and transformers' folders: config.json and safetensors with torch's names."""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from mlcm_jax.errors import UserError
from mlcm_jax.hub import names
from mlcm_jax.hub.tensor_reader import DTYPES, is_finite
from mlcm_jax.outputs import atomic_write
from mlcm_jax.parallel.distributed import host_array
from mlcm_jax.types import Params

FORMAT = {"format": "pt"}  # transformers and diffusers refuse a file without it
FILE_DTYPES = {name: code for code, name in DTYPES.items()}


class Entry(NamedTuple):
    """Tensors of equal shape that come from one array: ``read`` returns them in the order of ``names``."""

    names: list[str]
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], list[np.ndarray]]


def copy_folder(source: Path, target: epath.Path) -> None:
    """Copy the files of a folder here, at any depth, to a folder here or at gs://."""
    for file in source.rglob("*"):
        if file.is_file():
            with file.open("rb") as original, atomic_write(target / str(file.relative_to(source))) as copy:
                shutil.copyfileobj(original, copy)


def write_json(value: Mapping[str, Any], path: epath.PathLike):
    """Write a JSON object as diffusers and transformers lay it out."""
    with atomic_write(path) as f:
        f.write((to_json(value, indent=2, sort_keys=True) + "\n").encode())


def to_json(value: Any, **layout: Any) -> str:
    """A value as JSON text, which has no word for a number that is not finite: null stands for it."""
    return json.dumps(_finite_or_none(value), allow_nan=False, **layout)


def _finite_or_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite_or_none(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite_or_none(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _header(entries: list[Entry], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for entry in entries:
        size = int(np.prod(entry.shape, dtype=np.int64)) * entry.dtype.itemsize
        for name in entry.names:
            header[name] = {
                "dtype": FILE_DTYPES[entry.dtype.name],
                "shape": list(entry.shape),
                "data_offsets": [offset, offset + size],
            }
            offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text


def write_safetensors(entries: list[Entry], path: epath.PathLike, metadata: Mapping[str, str] = FORMAT):
    """Write entries one array at a time; of several processes the first writes, all must call.

    Raises UserError for a dtype other than float32, float16 and bfloat16, and for a tensor that is not finite, or would
    not be in its dtype; the file is then not there.
    """
    for entry in entries:
        if entry.dtype.name not in FILE_DTYPES:
            raise UserError(
                f"{entry.names[0]} is {entry.dtype.name}, which is not written to safetensors: "
                f"use {', '.join(FILE_DTYPES)}."
            )
    # Wide dtypes first keep every tensor aligned to its own size.
    entries = sorted(entries, key=_descending_itemsize)
    if jax.process_index() != 0:
        for entry in entries:
            entry.read()
        return
    with atomic_write(path) as f:
        f.write(_header(entries, metadata))
        for entry in entries:
            for name, tensor in zip(entry.names, entry.read(), strict=True):
                f.write(_checked(name, tensor, entry.dtype).view(np.uint8).data)


def _checked(name: str, tensor: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A tensor's values in order and in the file's dtype; raises UserError where one is not finite."""
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(tensor, dtype).reshape(-1)
    if is_finite(values):
        return values
    if np.isfinite(np.asarray(tensor, np.float32)).all():
        raise UserError(f"{name} has values that {dtype.name} does not hold: use --dtype=bfloat16 or --dtype=float32.")
    raise UserError(f"{name} has values that are no finite numbers, so nothing is written: use another checkpoint.")


def _descending_itemsize(entry: Entry) -> int:
    return -entry.dtype.itemsize


def param_entries(params: Params, dtype: Any = None) -> list[Entry]:
    """Each array of a Flax tree as torch tensors, with names by hub/names.py; dtype None keeps the array's."""

    def reader(path, leaf, stacked):
        def read() -> list[np.ndarray]:
            array = host_array(leaf)
            return [names.to_torch(path, layer) for layer in (array if stacked else array[None])]

        return read

    return [
        Entry(
            torch_names,
            names.torch_shape(path, leaf.shape),
            np.dtype(dtype or leaf.dtype),
            reader(path, leaf, names.is_stacked(path)),
        )
        for path, leaf, torch_names in names.walk(params)
    ]


def save_params(
    params: Params, config: Mapping[str, Any], folder: epath.PathLike, *, file_name: str, dtype: Any = None
) -> epath.Path:
    """Write ``config.json`` and the weights of one component; returns the path of the weights.

    Args:
      file_name: ``diffusion_pytorch_model.safetensors`` for diffusers, ``model.safetensors`` for transformers.
      dtype: of the written tensors, float32, float16 or bfloat16; None keeps the parameters'.

    Both files are written under a temporary name and renamed, so a killed process leaves no half file.
    """
    folder = epath.Path(folder)
    config = dict(config)
    if dtype is not None:
        # transformers builds a network in the dtype that its config names
        config |= {key: np.dtype(dtype).name for key in ("dtype", "torch_dtype") if key in config}
    write_safetensors(param_entries(params, dtype), folder / file_name)
    if jax.process_index() == 0:
        write_json(config, folder / "config.json")
    return folder / file_name
