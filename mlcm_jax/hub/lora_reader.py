"""Reading LoRA files in PEFT's, diffusers' and kohya's naming as trees that the layers take."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from flax import traverse_util

from mlcm_jax.errors import UserError, listed
from mlcm_jax.hub import adapter_config, names
from mlcm_jax.hub.adapter_config import AdapterConfig
from mlcm_jax.hub.load import check_dtypes, check_tensors, place, read_layer, widest_dtype
from mlcm_jax.hub.lora_names import FILE_NAMES, PEFT_PREFIX, Spelling, spellings
from mlcm_jax.hub.tensor_reader import TensorReader, open_weights
from mlcm_jax.types import Params


def lora_file(path: epath.PathLike) -> epath.Path:
    """The file of a LoRA: the path itself, or in a folder diffusers' own or else PEFT's."""
    path = epath.Path(path)
    if path.suffix and not path.is_dir():
        return path
    files = [path / name for name in FILE_NAMES]
    return next((file for file in files if file.exists()), files[0])


def load_lora(path: str | Path, params_shapes: Params, *, dtype: Any = None) -> Params:
    """Read a LoRA of a UNet alone as a scaled tree: the form that the layers take. See ``load_loras``."""
    return load_loras(path, {"unet": params_shapes}, dtype=dtype)["unet"]


def load_loras(path: str | Path, shapes: Mapping[str, Params], *, dtype: Any = None) -> dict[str, Params]:
    """Read a LoRA file as scaled trees, for each network that it changes.

    Args:
      path: a ``.safetensors`` file, or a folder with ``pytorch_lora_weights.safetensors`` or, as PEFT writes it,
        ``adapter_model.safetensors``. Settings of PEFT's beside it or in its header count (hub/adapter_config.py).
      shapes: trees of ShapeDtypeStructs or arrays by the name of their network ("unet", "text_encoder"...).
      dtype: None keeps the file's.

    Layers of a stack that the file leaves out, or has at a lower rank, are filled with zeros. Raises UserError for a
    file that is absent or corrupt, for tensors that the networks have no place for and for unsupported settings.
    """
    reader = open_weights(Path(lora_file(path)))
    in_file = set(reader.names())
    factors = {part: _find_factors(part, tree, reader, in_file) for part, tree in shapes.items()}
    changed = [each for each in factors.values() if each.found]
    used: set[str] = set().union(*(each.used for each in changed))
    if in_file - used or not used:
        what = listed(in_file - used) or "it holds no tensors"
        raise UserError(f"{reader.source} is no LoRA for this model in PEFT's, diffusers' or kohya's naming: {what}.")
    if sum(len(each.used) for each in changed) > len(used):
        changed = [_the_one_that_fits(reader, changed)]
    return {each.part: _read_network(reader, each, dtype) for each in changed}


class _Factors(NamedTuple):
    """kernels: of a network by path, with their shape and modules. found: spellings of those that the file changes."""

    part: str
    kernels: dict[names.Path, tuple[Any, list[str]]]
    found: dict[str, Spelling]
    used: set[str]


def _find_factors(part: str, tree: Params, reader: TensorReader, in_file: set[str]) -> _Factors:
    leaves = list(names.walk(tree))
    kernels = {p: (leaf, [t.removesuffix(".weight") for t in g]) for p, leaf, g in leaves if p[-1] == "kernel"}
    modules = [module for _, group in kernels.values() for module in group]
    spelt = spellings(part, modules, [t for _, _, group in leaves for t in group])
    found = {m: f for m, kinds in spelt.items() if (f := _find(reader, kinds, in_file))}
    return _Factors(part, kernels, found, {n for spelling in found.values() for n in spelling.tensors} & in_file)


def _find(reader: TensorReader, kinds: dict[str, Spelling], in_file: set[str]) -> Spelling | None:
    """The spelling that the file uses for a module."""
    for spelling in kinds.values():
        pair = {spelling.down, spelling.up}
        if pair & in_file:
            if pair - in_file:
                raise UserError(f"{reader.source} lacks tensors that belong to its others: {listed(pair - in_file)}.")
            return spelling
    return None


def _the_one_that_fits(reader: TensorReader, networks: Sequence[_Factors]) -> _Factors:
    """Of several networks with modules of the same names, the one for which a file that names none was made."""
    fitting = [each for each in networks if _fits(reader, each)]
    if len(fitting) > 1:
        raise UserError(
            f"{reader.source} fits {' and '.join(each.part for each in fitting)} alike: say which it is for with "
            "the network's name and a dot before the names of its tensors."
        )
    return (fitting or networks)[0]


def _fits(reader: TensorReader, factors: _Factors) -> bool:
    for path, (kernel, group) in factors.kernels.items():
        features, fan_in = names.torch_shape(path, kernel.shape)[:2]
        for spelling in (factors.found[module] for module in group if module in factors.found):
            if reader.shape(spelling.down)[1:2] != (fan_in,) or reader.shape(spelling.up)[:1] != (features,):
                return False
    return True


def _read_network(reader: TensorReader, factors: _Factors, dtype: Any) -> Params:
    settings = _settings(reader, factors)
    lora = {}
    for path, (kernel, group) in factors.kernels.items():
        layers = [factors.found.get(module) for module in group]
        if any(layers):
            lora |= _read_module(reader, path, kernel.shape, layers, settings, dtype)
    return traverse_util.unflatten_dict(lora)


def _settings(reader: TensorReader, factors: _Factors) -> AdapterConfig | None:
    """PEFT's settings; None, meaning alpha = rank, where there are none."""
    if any(name.startswith(PEFT_PREFIX) for name in factors.used):
        return adapter_config.read_adapter_config(reader)
    named = any(name.startswith(f"{factors.part}.") for name in factors.used)
    return adapter_config.read_header(reader, factors.part if named else "")


class _Scale(NamedTuple):
    rank: int
    factor: float  # alpha / rank


def _scale(reader: TensorReader, spelling: Spelling, settings: AdapterConfig | None, in_file: set[str]) -> _Scale:
    shape = reader.shape(spelling.down)
    rank = shape[0] if shape else 0
    if rank < 1:
        raise UserError(f"{reader.source} has {spelling.down} of shape {list(shape)}: a LoRA's rank is 1 or more.")
    if spelling.alpha in in_file:
        return _Scale(rank, reader.read_number(spelling.alpha) / rank)
    return _Scale(rank, 1.0 if settings is None else settings.factor(spelling.module, rank))


def _read_module(reader, kernel_path, kernel_shape, layers, settings, dtype) -> dict[names.Path, Any]:
    """Both factors of a module; of a stack, all layers (None: the file leaves this one out)."""
    in_file = set(reader.names())
    scales = [s and _scale(reader, s, settings, in_file) for s in layers]
    rank = max(s.rank for s in scales if s)
    stacked = names.is_stacked(kernel_path)
    *outer, fan_in, features = kernel_shape[1:] if stacked else kernel_shape
    shapes = {"down": [*outer, fan_in, rank], "up": [*([1, 1] if outer else []), rank, features]}
    out = {}
    for factor, shape in shapes.items():
        axis = -1 if factor == "down" else -2
        in_layers = [getattr(s, factor) for s in layers if s]
        check_dtypes(reader, in_layers)
        array = np.zeros((len(layers), *shape), dtype or widest_dtype(reader, in_layers))
        for i, (spelling, scale) in enumerate(zip(layers, scales, strict=True)):
            if spelling:
                own = list(shape)
                own[axis] = scale.rank
                wanted = names.torch_shape(kernel_path, (1, *own) if stacked else tuple(own))
                layer = _read_factor(reader, kernel_path, getattr(spelling, factor), wanted)
                if factor == "up" and scale.factor != 1:
                    layer = layer.astype(np.float32) * scale.factor
                where = [slice(None)] * len(shape)
                where[axis] = slice(scale.rank)
                array[i][tuple(where)] = layer
        out[*kernel_path[:-1], factor] = place(array if stacked else array[0], None)
    return out


def _read_factor(reader: TensorReader, path: names.Path, name: str, wanted: tuple[int, ...]) -> np.ndarray:
    """One factor as Flax holds it; a linear layer's may be written as a 1x1 convolution's, and the other way round."""
    shape = reader.shape(name)
    if shape[:2] == wanted[:2] and set(shape[2:] + wanted[2:]) <= {1}:
        check_tensors(reader, {name: name}, {name: shape})
    else:
        check_tensors(reader, {name: name}, {name: wanted})
    return read_layer(reader, path, name, shape=wanted)
