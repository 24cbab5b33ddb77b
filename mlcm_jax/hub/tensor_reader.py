"""Tensors of safetensors files: one, or the shards that an index names. Nothing else is ever opened."""

import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open

from mlcm_jax.errors import UserError, listed, shortened

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
NUMBERS = {
    "F64": "<f8",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
}  # of single numbers, beside those
BASE_NAMES = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
# Which of several files counts: diffusers prefers shards with an index to one file, transformers one file to shards.
SINGLE = ("{}.safetensors",)
INDEX = ("{}.safetensors.index.json",)
VARIANT_SINGLE = ("{}.{variant}.safetensors",)
VARIANT_INDEX = (
    "{}.safetensors.index.{variant}.json",
    "{}.safetensors.{variant}.index.json",
    "{}.{variant}.safetensors.index.json",
)
EXPONENTS = {"float32": np.uint32(0x7F800000), "float16": np.uint16(0x7C00), "bfloat16": np.uint16(0x7F80)}
CHUNK = 1 << 16  # elements, whose intermediate results stay in the processor's cache
PICKLES = ("*.bin", "*.bin.index.json", "*.ckpt", "*.pt", "*.pth")


def read_json(path: Path | epath.Path) -> dict[str, Any]:
    """Return the JSON object in a file; raises UserError when it is absent or is not a JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: name the folder that has it, or copy the whole folder.") from None
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path} is not a readable JSON file ({shortened(e)}): copy it again.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object: copy it again.")
    return value


def _header(file: Path) -> tuple[int, dict[str, Any]]:
    """Where the data begin, and the header's entries, of a file that safetensors found in order."""
    with file.open("rb") as f:
        size = int.from_bytes(f.read(8), "little")
        return 8 + size, json.loads(f.read(size))


class TensorReader:
    """Tensors of one safetensors file, or of the shards that an index file names.

    Raises UserError for a corrupt file and for an index that points outside its own folder.
    """

    def __init__(self, source: Path):
        self.source = source
        self.metadata: dict[str, str] = {}
        self._handles: dict[str, Any] = {}
        self._files: dict[str, Path] = {}
        self._headers: dict[Path, tuple[int, dict[str, Any]]] = {}
        if source.name.endswith(".json"):
            self._open_shards(source)
        else:
            handle = self._open(source)
            self.metadata = handle.metadata() or {}
            self._handles = dict.fromkeys(handle.keys(), handle)
            self._files = dict.fromkeys(handle.keys(), source)

    @staticmethod
    def _open(file: Path) -> Any:
        if not file.is_file():
            raise UserError(f"{file} does not exist or is not a file.")
        try:
            return safe_open(file, framework="np")
        except (SafetensorError, OSError) as e:
            raise UserError(
                f"{file} is not a complete safetensors file ({shortened(e)}): copy or download it again."
            ) from None

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
        self._files = {name: index.parent / file for name, file in weight_map.items()}

    def names(self) -> list[str]:
        return list(self._handles)

    def spelling(self, name: str) -> str:
        """How the file would name a tensor."""
        return name

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._handles[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """The dtype as the file spells it: F32, BF16, I64..."""
        return self._handles[name].get_slice(name).get_dtype()

    def num_bytes(self, name: str) -> int:
        """What ``read`` needs of memory for a tensor."""
        start, end = self._place(name)
        return end - start

    def read(self, name: str, memory: np.ndarray | None = None) -> np.ndarray:
        """One tensor; memory: bytes to read it into: new ones take longer to get than a cached file to read."""
        # Not through the memory map: its pages would count as this process's memory, the whole file in the end.
        memory = self._read_bytes(name, memory)
        return memory.view(jnp.dtype(DTYPES[self.dtype(name)])).reshape(self.shape(name))

    def read_number(self, name: str) -> float:
        """A tensor of one element, of any shape and dtype; raises UserError for another and for NaN or infinity."""
        shape, code = self.shape(name), self.dtype(name)
        dtype = DTYPES.get(code) or NUMBERS.get(code)
        if math.prod(shape) != 1 or dtype is None:
            raise UserError(f"{self.source} has {name} of shape {list(shape)} and dtype {code}: it must be one number.")
        value = float(self._read_bytes(name).view(jnp.dtype(dtype))[0])
        if not math.isfinite(value):
            raise UserError(f"{self.source} has {name}={value}, no finite number: copy or download it again.")
        return value

    def _read_bytes(self, name: str, memory: np.ndarray | None = None) -> np.ndarray:
        start, end = self._place(name)
        memory = np.empty(end - start, np.uint8) if memory is None else memory[: end - start]
        try:
            with self._files[name].open("rb") as f:
                f.seek(start)
                size = f.readinto(memory.data)
        except OSError as e:
            raise UserError(f"{self.source}: tensor {name} cannot be read ({shortened(e)}).") from None
        if size != end - start:
            raise UserError(f"{self.source}: tensor {name} cannot be read (the file has become shorter).")
        return memory

    def _place(self, name: str) -> tuple[int, int]:
        """Where a tensor's bytes begin and end in its file."""
        file = self._files[name]
        if file not in self._headers:
            self._headers[file] = _header(file)
        data, entries = self._headers[file]
        start, end = entries[name]["data_offsets"]
        return data + start, data + end


def is_finite(tensor: np.ndarray) -> bool:
    """Whether a float tensor is free of NaN and infinity, by its exponents: a fraction of the time to read it."""
    bits = tensor.reshape(-1).view(f"u{tensor.itemsize}")
    exponent = EXPONENTS[tensor.dtype.name]
    chunks = (bits[i : i + CHUNK] for i in range(0, bits.size, CHUNK))
    return not any(((chunk & exponent) == exponent).any() for chunk in chunks)


def find_weights(folder: Path, variant: str | None = None, library: str = "diffusers") -> Path:
    """The weights file, or the index of its shards, in a component's folder.

    variant: such as "fp16"; None takes full precision before fp16. library: whose file is taken where there are
    several, diffusers' or transformers'.
    """
    files = [*_weights_files(folder, variant, library), *([] if variant else _weights_files(folder, "fp16", library))]
    for file in files:
        if file.exists():
            return file
    pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"{folder} has weights only as a pickle ({listed(pickles)}), never read here: convert it to safetensors."
        )
    others = listed(p.name for p in folder.glob("*.safetensors"))
    single = (VARIANT_SINGLE if variant else SINGLE)[0]
    raise UserError(
        f"{folder} has no safetensors weights{f' of the variant {variant}' if variant else ''}: expected "
        f"{' or '.join(single.format(b, variant=variant) for b in BASE_NAMES.values())}"
        f"{f'; it has {others}, and a variant is chosen by its name (--variant)' if others else ''}."
    )


def _weights_files(folder: Path, variant: str | None, library: str) -> list[Path]:
    """Where weights may be, the first that counts first."""
    single, index = (VARIANT_SINGLE, VARIANT_INDEX) if variant else (SINGLE, INDEX)
    layouts = {"diffusers": index + single, "transformers": single + index}
    libraries = sorted(BASE_NAMES, key=library.__ne__)  # its own names first
    return [folder / layout.format(BASE_NAMES[name], variant=variant) for name in libraries for layout in layouts[name]]


def has_variant(folder: Path, variant: str) -> bool:
    """Whether a component's folder has weights of a variant, in whatever format."""
    return folder.is_dir() and any(variant in file.name.split(".")[1:-1] for file in folder.iterdir())


def refuse_pickle(path: Path) -> None:
    """Raise UserError for a file that has a pickle's name."""
    if any(path.match(pattern) for pattern in PICKLES):
        raise UserError(f"{path} is a pickle, never read here: convert it to safetensors.")


def open_weights(source: str | Path) -> TensorReader:
    """Tensors of a component's folder, or of one .safetensors file; raises UserError for a pickle and for no file."""
    path = Path(source)
    refuse_pickle(path)
    return TensorReader(path if path.suffix in (".safetensors", ".json") else find_weights(path))
