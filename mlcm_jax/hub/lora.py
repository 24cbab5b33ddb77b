"""LoRA files in PEFT's, diffusers' and kohya's naming, in and out, and folding them into a pipeline.

Loaders disagree about alpha where a file says nothing of it, so it is always explicit here. Files in PEFT's naming hold
``up`` already multiplied by alpha / rank and say alpha = rank in the header; files in kohya's have it in ``.alpha``
tensors, again with alpha = rank. Every loader comes to the same weights.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from flax import traverse_util

from mlcm_jax.errors import UserError
from mlcm_jax.hub import names
from mlcm_jax.hub.fetch import SCHEDULER_NAME, resolve_lora
from mlcm_jax.hub.load import check_tensors, place, read_json, read_layer
from mlcm_jax.hub.lora_names import PARTS, Spelling, kohya_naming, spellings
from mlcm_jax.hub.pipeline import Pipeline
from mlcm_jax.hub.save import FORMAT, Entry, host_array, write_safetensors
from mlcm_jax.hub.tensor_reader import DTYPES, TensorReader, listed, open_weights
from mlcm_jax.models import lora as low_rank
from mlcm_jax.types import Params

FILE_NAME = "pytorch_lora_weights.safetensors"
METADATA_KEY = "lora_adapter_metadata"  # of the safetensors header, read by diffusers from 0.34 on
NAMINGS = ("peft", "kohya")  # that are written; those that are read: lora_names.py


def _lora_file(path: epath.PathLike) -> epath.Path:
    path = epath.Path(path)
    return path / FILE_NAME if path.is_dir() or not path.suffix else path


def _modules(path: names.Path, num_layers: int | None) -> list[str]:
    """Torch module names behind a Flax module path."""
    return [n.removesuffix(".weight") for n in names.tensor_names((*path, "kernel"), num_layers)]


def _rank(lora: dict) -> int:
    ranks = {leaf.shape[-1] for path, leaf in lora.items() if path[-1] == "down"}
    if len(ranks) != 1:
        raise UserError(f"A LoRA of one rank can be saved, this one has {sorted(ranks)}.")
    return ranks.pop()


def save_lora(
    lora: Params, path: epath.PathLike, *, naming: str = "peft", unet_shapes: Params | None = None, dtype: Any = None
) -> epath.Path:
    """Write a scaled UNet LoRA (models/lora.py, ``scaled``); returns the file.

    Args:
      path: a ``.safetensors`` file, or a folder that gets ``pytorch_lora_weights.safetensors``.
      naming: "peft", diffusers' own, or "kohya", that of ComfyUI and A1111; diffusers reads both.
      unet_shapes: the UNet's parameters or their shapes, for "kohya".
      dtype: of the written tensors; None keeps the tree's.
    """
    file = _lora_file(path)
    flat: dict[names.Path, Any] = traverse_util.flatten_dict(lora)
    rank = _rank(flat)
    of_path = {p[:-1]: _modules(p[:-1], f.shape[0] if names.is_stacked(p) else None) for p, f in flat.items()}
    modules = [m for group in of_path.values() for m in group]
    tensors = [t for _, _, group in names.walk(unet_shapes or {}) for t in group]
    kind = kohya_naming(tensors) if naming == "kohya" else naming
    spelt = {m: s[kind] for m, s in spellings("unet", modules, tensors).items()}
    entries = [_entry(p, leaf, [spelt[m] for m in of_path[p[:-1]]], dtype) for p, leaf in flat.items()]
    metadata = dict(FORMAT)
    if naming == "kohya":
        alpha = np.full((), rank, np.float32)
        entries.append(Entry([spelt[m].alpha for m in modules], (), alpha.dtype, _constant([alpha] * len(modules))))
        metadata |= {"ss_network_dim": str(rank), "ss_network_alpha": str(rank)}
    else:
        adapter = {"r": rank, "lora_alpha": rank, "target_modules": sorted(modules)}
        adapter |= {"rank_pattern": {}, "alpha_pattern": {}}
        metadata[METADATA_KEY] = json.dumps({f"unet.{key}": value for key, value in adapter.items()})
    write_safetensors(entries, file, metadata)
    return file


def _constant(tensors: list[np.ndarray]) -> Callable[[], list[np.ndarray]]:
    def read() -> list[np.ndarray]:
        return tensors

    return read


def _entry(path: names.Path, leaf: Any, spelt: list[Spelling], dtype: Any) -> Entry:
    *module, factor = path
    kernel_path = (*module, "kernel")
    stacked = names.is_stacked(kernel_path)

    def read() -> list[np.ndarray]:
        array = host_array(leaf)
        return [names.to_torch(kernel_path, layer) for layer in (array if stacked else array[None])]

    shape = names.torch_shape(kernel_path, leaf.shape)
    return Entry([getattr(s, factor) for s in spelt], shape, np.dtype(dtype or leaf.dtype), read)


def _header_alpha(reader: TensorReader, part: str) -> float | None:
    """lora_alpha of the header; None, meaning alpha = rank, where the file has no header of this kind."""
    if METADATA_KEY not in reader.metadata:
        return None
    try:
        adapter = json.loads(reader.metadata[METADATA_KEY])
    except ValueError:
        raise UserError(f"{reader.source} has a damaged {METADATA_KEY} in its header.") from None
    for key in ("alpha_pattern", "use_dora", "use_rslora"):
        if adapter.get(f"{part}.{key}"):
            raise UserError(f"{reader.source} sets {key}={adapter[f'{part}.{key}']!r}, which is not supported.")
    return adapter.get(f"{part}.lora_alpha")


def load_lora(path: str | Path, params_shapes: Params, *, dtype: Any = None) -> Params:
    """Read a LoRA of a UNet alone as a scaled tree: the form that the layers take. See ``load_loras``."""
    return load_loras(path, {"unet": params_shapes}, dtype=dtype)["unet"]


def load_loras(path: str | Path, shapes: Mapping[str, Params], *, dtype: Any = None) -> dict[str, Params]:
    """Read a LoRA file as scaled trees, for each network that it changes.

    Args:
      path: a ``.safetensors`` file, or a folder with ``pytorch_lora_weights.safetensors``.
      shapes: trees of ShapeDtypeStructs or arrays by the name of their network ("unet", "text_encoder"...).
      dtype: None keeps the file's.

    Layers of a stack that the file leaves out, or has at a lower rank, are filled with zeros. Raises UserError for a
    file that is absent or corrupt, and for tensors that the networks have no place for.
    """
    reader = open_weights(Path(_lora_file(path)))
    in_file, used = set(reader.names()), set()
    out = {}
    for part, tree in shapes.items():
        leaves = list(names.walk(tree))
        kernels = {p: (leaf, group) for p, leaf, group in leaves if p[-1] == "kernel"}
        modules = [t.removesuffix(".weight") for _, group in kernels.values() for t in group]
        spelt = spellings(part, modules, [t for _, _, group in leaves for t in group])
        found = {m: f for m, kinds in spelt.items() if (f := _find(reader, kinds, in_file))}
        used |= {n for spelling in found.values() for n in spelling} & in_file
        alpha = _header_alpha(reader, part) if found else None
        lora = {}
        for kernel_path, (kernel, group) in kernels.items():
            layers = [found.get(t.removesuffix(".weight")) for t in group]
            if any(layers):
                lora |= _read_module(reader, kernel_path, kernel.shape, layers, alpha, dtype)
        if lora:
            out[part] = traverse_util.unflatten_dict(lora)
    if in_file - used or not used:
        what = listed(in_file - used) or "it holds no tensors"
        raise UserError(f"{reader.source} is no LoRA for this model in PEFT's, diffusers' or kohya's naming: {what}.")
    return out


def _find(reader: TensorReader, kinds: dict[str, Spelling], in_file: set[str]) -> Spelling | None:
    """The spelling that the file uses for a module."""
    for spelling in kinds.values():
        pair = {spelling.down, spelling.up}
        if pair & in_file:
            if pair - in_file:
                raise UserError(f"{reader.source} lacks tensors that belong to its others: {listed(pair - in_file)}.")
            return spelling
    return None


class _Scale(NamedTuple):
    rank: int
    factor: float  # alpha / rank


def _scale(reader: TensorReader, spelling: Spelling, header_alpha: float | None, in_file: Sequence[str]) -> _Scale:
    shape = reader.shape(spelling.down)
    rank = shape[0] if shape else 0
    if rank < 1:
        raise UserError(f"{reader.source} has {spelling.down} of shape {list(shape)}: a LoRA's rank is 1 or more.")
    alpha = rank if header_alpha is None else header_alpha
    if spelling.alpha in in_file:
        check_tensors(reader, {spelling.alpha: spelling.alpha}, {spelling.alpha: ()})
        alpha = float(reader.read(spelling.alpha))
    return _Scale(rank, alpha / rank)


def _read_module(reader, kernel_path, kernel_shape, layers, header_alpha, dtype) -> dict[names.Path, Any]:
    """Both factors of a module; of a stack, all layers (None: the file leaves this one out)."""
    in_file = reader.names()
    scales = [s and _scale(reader, s, header_alpha, in_file) for s in layers]
    rank = max(s.rank for s in scales if s)
    stacked = names.is_stacked(kernel_path)
    *outer, fan_in, features = kernel_shape[1:] if stacked else kernel_shape
    shapes = {"down": [*outer, fan_in, rank], "up": [*([1, 1] if outer else []), rank, features]}
    out = {}
    for factor, shape in shapes.items():
        axis = -1 if factor == "down" else -2
        dtypes = {reader.dtype(getattr(s, factor)) for s in layers if s}
        target = np.dtype(dtype or DTYPES.get(sorted(dtypes)[0], "float32"))
        array = np.zeros((len(layers), *shape), target)
        for i, (spelling, scale) in enumerate(zip(layers, scales, strict=True)):
            if spelling:
                name = getattr(spelling, factor)
                own = list(shape)
                own[axis] = scale.rank
                wanted = names.torch_shape(kernel_path, (1, *own) if stacked else tuple(own))
                check_tensors(reader, {name: name}, {name: wanted})
                layer = read_layer(reader, kernel_path, name)
                if factor == "up" and scale.factor != 1:
                    layer = layer.astype(np.float32) * scale.factor
                where = [slice(None)] * len(shape)
                where[axis] = slice(scale.rank)
                array[i][tuple(where)] = layer
        out[*kernel_path[:-1], factor] = place(array if stacked else array[0], None)
    return out


def with_loras(pipeline: Pipeline, loras: Sequence[str]) -> Pipeline:
    """The pipeline with LoRAs folded into its networks' weights, which keep their dtype.

    loras: PLACE or PLACE:SCALE (1 by default), a file or a folder as ``load_loras`` takes it, here or on the hub
    (hub/fetch.py, ``resolve_lora``). A folder that has a
    scheduler_config.json beside the LoRA, as a student's has, brings its sampler along. Raises UserError as
    ``load_loras`` does.
    """
    networks, scheduler_config = pipeline.networks(), pipeline.scheduler_config
    for entry in loras:
        place, scale = _parse(entry)
        path = resolve_lora(place, FILE_NAME)
        beside = path / SCHEDULER_NAME
        scheduler_config = read_json(beside) if beside.is_file() else scheduler_config
        shapes = {part: networks[part].params for part in PARTS if part in networks}
        for part, tree in load_loras(path, shapes, dtype=np.float32).items():
            merged = low_rank.merge(networks[part].params, low_rank.scaled(tree, scale, 1))
            networks[part] = dataclasses.replace(networks[part], params=merged)
    encoders = tuple(network for part, network in networks.items() if part.startswith("text_encoder"))
    return dataclasses.replace(
        pipeline, unet=networks["unet"], text_encoders=encoders, scheduler_config=scheduler_config
    )


def _parse(entry: str) -> tuple[str, float]:
    path, colon, scale = entry.rpartition(":")
    if not colon or Path(entry).exists():
        return entry, 1.0
    try:
        return path, float(scale)
    except ValueError:
        raise UserError(f"--lora={entry} ends in {scale!r}, which is no scale: write FILE or FILE:0.8.") from None
