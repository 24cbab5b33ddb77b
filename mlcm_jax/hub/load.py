"""Strict, streaming reading of diffusers' and transformers' safetensors into Flax parameters.

Everything is checked from the file's header before the first tensor is read. Then one Flax array at a time is
assembled on the host, cast and placed, so that the host holds little more than the largest array.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open

from mlcm_jax.errors import UserError
from mlcm_jax.hub import names
from mlcm_jax.types import Params

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
BASE_NAMES = ("diffusion_pytorch_model", "model")
LAYOUTS = (
    "{}.safetensors",
    "{}.safetensors.index.json",
    "{}.fp16.safetensors",
    "{}.safetensors.index.fp16.json",
    "{}.fp16.safetensors.index.json",
)
PICKLES = ("*.bin", "*.bin.index.json", "*.ckpt", "*.pt", "*.pth")

# Buffers that older versions of transformers wrote among the weights; they hold nothing that was learnt.
IGNORED = (re.compile(r"(^|\.)embeddings\.position_ids$"),)

# Other versions' spelling -> ours; a rule is used only where its result is a name that the network has.
ALIASES = (
    # transformers 5 writes CLIPTextModel without the prefix that every earlier version writes
    (re.compile(r"^(embeddings|encoder|final_layer_norm)\."), r"text_model.\1."),
    (re.compile(r"^(embeddings|encoder|pre_layrnorm|post_layernorm)\."), r"vision_model.\1."),
    # diffusers before 0.15 named the autoencoder's attention so; SD 1.5's and 2.1's files still do
    (re.compile(r"\.attentions\.0\.query\."), ".attentions.0.to_q."),
    (re.compile(r"\.attentions\.0\.key\."), ".attentions.0.to_k."),
    (re.compile(r"\.attentions\.0\.value\."), ".attentions.0.to_v."),
    (re.compile(r"\.attentions\.0\.proj_attn\."), ".attentions.0.to_out.0."),
)

NUM_LISTED = 5


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; raises UserError when it is absent or is not a JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except (OSError, ValueError) as e:
        raise UserError(f"{path} is not a readable JSON file ({e}).") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object.")
    return value


def listed(items: Iterable[str]) -> str:
    """The first few of many names and the number of the others, for messages."""
    items = sorted(items)
    rest = f" and {len(items) - NUM_LISTED} more" if len(items) > NUM_LISTED else ""
    return ", ".join(items[:NUM_LISTED]) + rest


class TensorReader:
    """Memory-mapped tensors of one safetensors file, or of the shards that an index file names.

    Raises UserError for a corrupt file and for an index that points outside its own folder.
    """

    def __init__(self, source: Path):
        self.source = source
        self.metadata: dict[str, str] = {}
        self._handles: dict[str, Any] = {}
        if source.name.endswith(".json"):
            self._open_shards(source)
        else:
            handle = self._open(source)
            self.metadata = handle.metadata() or {}
            self._handles = dict.fromkeys(handle.keys(), handle)

    @staticmethod
    def _open(file: Path) -> Any:
        if not file.is_file():
            raise UserError(f"{file} does not exist or is not a file.")
        try:
            return safe_open(file, framework="np")
        except (SafetensorError, OSError) as e:
            raise UserError(f"{file} is not a complete safetensors file ({e}): copy or download it again.") from None

    def _open_shards(self, index: Path):
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
            raise UserError(f"{index} has no weight_map from tensor names to file names.")
        for file in sorted(set(weight_map.values())):
            if Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
                raise UserError(f"{index} names {file!r}, which is not a safetensors file beside it.")
        shards = {file: self._open(index.parent / file) for file in sorted(set(weight_map.values()))}
        held = {file: set(shard.keys()) for file, shard in shards.items()}
        absent = [name for name, file in weight_map.items() if name not in held[file]]
        if absent:
            raise UserError(f"{index} names tensors that its files do not hold: {listed(absent)}.")
        self._handles = {name: shards[file] for name, file in weight_map.items()}

    def names(self) -> list[str]:
        return list(self._handles)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._handles[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """The dtype as the file spells it: F32, BF16, I64..."""
        return self._handles[name].get_slice(name).get_dtype()

    def read(self, name: str) -> np.ndarray:
        try:
            return self._handles[name].get_tensor(name)
        except (SafetensorError, OSError) as e:
            raise UserError(f"{self.source}: tensor {name} cannot be read ({e}).") from None


def find_weights(folder: Path) -> Path:
    """The weights file, or the index of its shards, in a component's folder: full precision before fp16."""
    candidates = [folder / layout.format(base) for layout in LAYOUTS for base in BASE_NAMES]
    for file in candidates:
        if file.exists():
            return file
    pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"{folder} has weights only as a pickle ({listed(pickles)}), never read here: convert it to safetensors."
        )
    raise UserError(f"{folder} has no safetensors weights: expected {candidates[0].name} or {candidates[1].name}.")


def open_weights(source: str | Path) -> TensorReader:
    """Tensors of a component's folder, or of one .safetensors file; raises UserError for a pickle and for no file."""
    path = Path(source)
    if any(path.match(pattern) for pattern in PICKLES):
        raise UserError(f"{path} is a pickle, never read here: convert it to safetensors.")
    return TensorReader(path if path.suffix == ".safetensors" else find_weights(path))


def _match_names(
    reader: TensorReader, expected: Mapping[str, tuple[int, ...]], ignored: Sequence[re.Pattern]
) -> dict[str, str]:
    """Map each expected name to the name that the file uses for it; every tensor must find its place."""
    in_file = set(reader.names())
    found, unexpected = {}, []
    for name in in_file:
        if name in expected:
            found[name] = name
        elif not any(rule.search(name) for rule in (*IGNORED, *ignored)):
            spelt = (rule.sub(new, name) for rule, new in ALIASES if rule.search(name))
            ours = next((s for s in spelt if s in expected and s not in in_file), None)
            if ours is None or ours in found:
                unexpected.append(name)
            else:
                found[ours] = name
    missing = expected.keys() - found.keys()
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
        f"{file_name} is {list(reader.shape(file_name))}, not {list(expected[name])}"
        for name, file_name in found.items()
        if reader.shape(file_name) != expected[name]
    ]
    if misshapen:
        raise UserError(
            f"{reader.source} does not fit its config.json, {len(misshapen)} tensors have another shape: "
            f"{listed(misshapen)}."
        )
    mistyped = [f"{n} is {reader.dtype(n)}" for n in found.values() if reader.dtype(n) not in DTYPES]
    if mistyped:
        raise UserError(
            f"{reader.source} has tensors of an unsupported dtype: {listed(mistyped)}; use {', '.join(DTYPES)}."
        )


def read_array(reader: TensorReader, path: names.Path, file_names: list[str], dtype: Any = None) -> np.ndarray:
    """Assemble the Flax array at ``path`` on the host, layer by layer where it is a stack."""
    if dtype is None:
        dtypes = {reader.dtype(n) for n in file_names}
        if len(dtypes) > 1:
            raise UserError(
                f"{reader.source} holds the layers of {'/'.join(path)} in several dtypes "
                f"({', '.join(sorted(dtypes))}): name one dtype to load it with."
            )
        dtype = DTYPES[dtypes.pop()]

    layers = (names.to_flax(path, reader.read(name)) for name in file_names)
    first = next(layers)
    if not names.is_stacked(path):
        return np.asarray(first, dtype, order="C")
    stack = np.empty((len(file_names), *first.shape), dtype)
    stack[0] = first
    for i, layer in enumerate(layers, start=1):
        stack[i] = layer
    return stack


def place(array: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """Put a host array on the devices; each process hands over only the shards that it holds."""
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
) -> Params:
    """Read a component's safetensors into parameters of the given tree, strictly and one array at a time.

    Args:
      shapes: tree of ShapeDtypeStructs, ``jax.eval_shape(module.init, ...)["params"]``; its dtypes are not used.
      source: a folder with ``diffusion_pytorch_model`` or ``model`` as ``.safetensors``, ``.fp16.safetensors`` or
        shards; one .safetensors file; or an open reader.
      dtype: of all parameters; None keeps the file's.
      shardings: one sharding for all, or a tree like ``shapes``; None puts everything on the default device.
      ignored: names that a file may have beside the network's, such as those of a part that is not used.

    Raises UserError for missing, unexpected, misshapen or non-float tensors, for a corrupt file, for an index that
    leaves its folder and for weights that are only there as a pickle.
    """
    reader = source if isinstance(source, TensorReader) else open_weights(source)
    leaves = list(names.walk(shapes))
    expected = {n: names.torch_shape(path, leaf.shape) for path, leaf, torch_names in leaves for n in torch_names}
    found = _match_names(reader, expected, ignored)
    check_tensors(reader, found, expected)
    one_for_all = shardings is None or isinstance(shardings, jax.sharding.Sharding)
    by_path: dict[names.Path, Any] = {} if one_for_all else traverse_util.flatten_dict(shardings)
    params = {}
    for path, _, torch_names in leaves:
        array = read_array(reader, path, [found[n] for n in torch_names], dtype)
        params[path] = place(array, shardings if one_for_all else by_path[path])
    return traverse_util.unflatten_dict(params)
