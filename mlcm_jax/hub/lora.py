"""LoRA files in PEFT's and in kohya's naming, as others read them, and folding LoRAs into a pipeline.

Loaders disagree about alpha where a file says nothing of it, so it is always explicit here. Files in PEFT's naming hold
``up`` already multiplied by alpha / rank and say alpha = rank in the header; files in kohya's have it in ``.alpha``
tensors, again with alpha = rank. Every loader comes to the same weights.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util

from mlcm_jax.errors import UserError
from mlcm_jax.hub import names
from mlcm_jax.hub.adapter_config import METADATA_KEY
from mlcm_jax.hub.fetch import SCHEDULER_NAME, resolve_lora
from mlcm_jax.hub.load import read_json
from mlcm_jax.hub.lora_names import FILE_NAMES, PARTS, Spelling, kohya_naming, spellings
from mlcm_jax.hub.lora_reader import load_loras
from mlcm_jax.hub.pipeline import Network, Pipeline
from mlcm_jax.hub.save import FORMAT, Entry, host_array, write_safetensors
from mlcm_jax.models import lora as low_rank
from mlcm_jax.types import Params


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
    file = epath.Path(path)
    file = file if file.suffix and not file.is_dir() else file / FILE_NAMES[0]
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


def with_loras(pipeline: Pipeline, loras: Sequence[str]) -> Pipeline:
    """The pipeline with LoRAs folded into its networks' weights, which keep their dtype.

    loras: PLACE or PLACE:SCALE (1 by default), a file or a folder as ``load_loras`` takes it, here or on the hub
    (hub/fetch.py, ``resolve_lora``). A folder that has a
    scheduler_config.json beside the LoRA, as a student's has, brings its sampler along. Raises UserError as
    ``load_loras`` does.
    """
    networks, scheduler_config = pipeline.networks(), pipeline.scheduler_config
    for entry in loras:
        place, scale = parse_lora(entry)
        path = resolve_lora(place)
        beside = path / SCHEDULER_NAME
        scheduler_config = read_json(beside) if beside.is_file() else scheduler_config
        shapes = {part: networks[part].params for part in PARTS if part in networks}
        for part, tree in load_loras(path, shapes, dtype=np.float32).items():
            networks[part] = _merged(networks[part], low_rank.scaled(tree, scale, 1), f"--lora={entry} for the {part}")
    encoders = tuple(network for part, network in networks.items() if part not in ("unet", "vae"))
    adapted = dataclasses.replace(pipeline, unet=networks["unet"], text_encoders=encoders)
    return adapted.with_scheduler(scheduler_config)


def _merged(network: Network, lora: Params, what: str) -> Network:
    """The network with a scaled LoRA folded in; raises UserError where a weight would not be finite."""
    params = low_rank.merge(network.params, lora)
    kernels: dict[names.Path, Any] = traverse_util.flatten_dict(params)
    modules = dict.fromkeys(tuple(module) for *module, _ in traverse_util.flatten_dict(lora))
    for module, finite in zip(modules, _are_finite([kernels[*module, "kernel"] for module in modules]), strict=True):
        if not finite:
            kernel = kernels[*module, "kernel"]
            raise UserError(
                f"{what} leaves {'.'.join(module)} with values that {kernel.dtype.name} does not hold: use a smaller "
                "scale."
            )
    return dataclasses.replace(network, params=params)


@jax.jit
def _are_finite(arrays: list[Any]) -> list[Any]:
    return [jnp.isfinite(array).all() for array in arrays]


def parse_lora(entry: str) -> tuple[str, float]:
    """Place and scale of PLACE or PLACE:SCALE; raises UserError for a scale that is no finite number."""
    path, colon, scale = entry.rpartition(":")
    if not colon or Path(entry).exists():
        return entry, 1.0
    try:
        factor = float(scale)
    except ValueError:
        factor = float("nan")
    if not math.isfinite(factor):
        raise UserError(f"--lora={entry} ends in {scale!r}, which is no scale: write FILE or FILE:0.8.")
    return path, factor
