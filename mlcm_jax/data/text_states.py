"""Files of text states, so that a training needs no text encoders: launch/encode.py --text_only makes them.

One ArrayRecord file. Record i is row i of the prompts, a safetensors image of hidden_states [k, tokens, d] and pooled
[k, p] for its k texts. The last record holds what else a run asks its text encoders for: the states of the
unconditional branch and of the sample prompts, with those prompts in its header.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import Float
from safetensors import SafetensorError, TensorSpec, deserialize, serialize

from mlcm_jax.data.prompts import TextSource
from mlcm_jax.errors import UserError
from mlcm_jax.hub.tensor_reader import DTYPES
from mlcm_jax.types import TextConditioning

NUM_COMPARED = 64  # rows whose texts are compared with the prompts before a run


class TextState(NamedTuple):
    """Token states and pooled states of n texts, in the dtype that they were encoded in."""

    hidden_states: Float[np.ndarray, "n tokens d"]
    pooled: Float[np.ndarray, "n p"]


class TextStatesWriter:
    """Writes a file of text states, row after row; ``finish`` ends it with what is not a row.

    ``path`` takes its name when it is whole.
    """

    def __init__(self, path: str | Path):
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = self._path.with_name(f".{self._path.name}.tmp")
        self._writer = ArrayRecordWriter(str(self._temporary), "group_size:1,uncompressed")  # floats do not shrink

    def write(self, texts: Sequence[str], states: TextState) -> None:
        self._writer.write(_packed(states._asdict(), {"texts": list(texts)}))

    def finish(
        self, unconditional: TextState, negative_prompt: str, sample: TextState, sample_prompts: list[str]
    ) -> None:
        """unconditional: one row. sample: of the sample prompts."""
        tensors = {f"unconditional.{name}": value for name, value in unconditional._asdict().items()}
        tensors |= {f"sample.{name}": value for name, value in sample._asdict().items()}
        self._writer.write(_packed(tensors, {"negative_prompt": negative_prompt, "sample_prompts": sample_prompts}))
        self._writer.close()
        self._temporary.replace(self._path)


class TextStates:
    """A file of text states whose rows are read as they are asked for.

    unconditional: one row. sample: of the sample prompts.
    """

    def __init__(self, path: str | Path):
        self._path = path
        if not Path(path).is_file():
            raise UserError(f"The text states {path} do not exist: make one with launch/encode.py --text_only.")
        try:
            self._records = ArrayRecordDataSource(str(path))
            tensors, self._said = _unpacked(self._records[len(self._records) - 1])
            self.unconditional, self.sample = (
                TextState(tensors[f"{name}.hidden_states"], tensors[f"{name}.pooled"])
                for name in ("unconditional", "sample")
            )
        except (RuntimeError, ValueError, IndexError, KeyError, SafetensorError):
            raise UserError(f"{path} is no file of text states: make one with launch/encode.py --text_only.") from None

    def __len__(self) -> int:
        return len(self._records) - 1

    def __getitems__(self, rows: Sequence[int]) -> list[TextState]:
        """Of each row the states of all its texts."""
        records = self._records.__getitems__([int(row) for row in rows])
        return [TextState(**_unpacked(record)[0]) for record in records]

    def check(
        self, prompts: TextSource, shapes: TextConditioning, *, negative_prompt: str, sample_prompts: list[str]
    ) -> None:
        """Raise UserError unless the file was made for this run: same prompts, same encoders, same dtype.

        shapes: of one row, as the teacher's text encoders make it (hub.pipeline.conditioning_shapes).
        """
        wanted = [(a.shape[1:], a.dtype) for a in (shapes.hidden_states, shapes.pooled)]
        if [(a.shape[1:], a.dtype) for a in self.unconditional] != wanted:
            found = " and ".join(f"{a.dtype}{list(a.shape[1:])}" for a in self.unconditional)
            needed = " and ".join(f"{dtype}{list(shape)}" for shape, dtype in wanted)
            raise UserError(
                f"{self._path} holds states of {found}, but this run needs {needed}: encode with the same --model and "
                "--dtype (config.compute_dtype)."
            )
        for name, value in (("negative_prompt", negative_prompt), ("sample_prompts", sample_prompts)):
            if self._said[name] != value:
                raise UserError(f"{self._path} was made with another {name}: encode with that of this run, --{name}.")
        if len(self) != len(prompts) or not self._same_texts(prompts):
            raise UserError(f"{self._path} was made from other prompts, or in another order: encode config.prompts.")

    def _same_texts(self, prompts: TextSource) -> bool:
        rows = np.unique(np.linspace(0, len(self) - 1, NUM_COMPARED).astype(int)).tolist()
        found = [_unpacked(record)[1]["texts"] for record in self._records.__getitems__(rows)]
        return found == [list(texts) for texts in prompts.__getitems__(rows)]


def _packed(tensors: dict[str, np.ndarray], said: dict[str, Any]) -> bytes:
    whole = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    specs = {
        name: TensorSpec(dtype=a.dtype.name, shape=a.shape, data_ptr=a.ctypes.data, data_len=a.nbytes)
        for name, a in whole.items()
    }
    return bytes(serialize(specs, metadata={"said": json.dumps(said)}))


def _unpacked(record: bytes) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    size = int.from_bytes(record[:8], "little")
    said = json.loads(json.loads(record[8 : 8 + size])["__metadata__"]["said"])
    tensors = {
        name: np.frombuffer(value["data"], jnp.dtype(DTYPES[value["dtype"]])).reshape(value["shape"])
        for name, value in deserialize(record)
    }
    return tensors, said
