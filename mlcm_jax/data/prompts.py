"""Where prompts come from, a row at a time, and the order they are taken in: a pure function of the seed.

A place is a text file (a prompt a line), a .jsonl, .csv or .parquet file with a column of text, here or at gs://, or
``tfds:NAME`` (data/tfds_text.py). A row can hold several texts for the same thing, as captions of an image.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from etils import epath

from mlcm_jax.data.columns import SUFFIXES, read_column
from mlcm_jax.errors import UserError, shortened

TFDS = "tfds:"
NUM_HASHED = 2**18  # rows; all of most files, and of data sets no more than is read in seconds
LINE_END = re.compile(r"\r\n|\n|\r")  # U+2028 and other separators, at which str.splitlines cuts, belong to a prompt


class TextSource(Protocol):
    """Rows of texts that are read as they are asked for; a row has one text or more."""

    def __len__(self) -> int: ...

    def __getitems__(self, rows: Sequence[int]) -> list[Sequence[str]]: ...


class TextLines:
    """Rows of one text each, in memory."""

    def __init__(self, lines: list[str]):
        self._lines = lines

    def __len__(self) -> int:
        return len(self._lines)

    def __getitems__(self, rows: Sequence[int]) -> list[Sequence[str]]:
        return [(self._lines[i],) for i in rows]


def open_prompts(place: str | Path, column: str = "") -> TextSource:
    """The prompts of a place. column: of a table or data set; "": the one that is named like prompts are.

    Raises UserError for a place that does not exist, cannot be read or holds no prompt, and for a column that is not
    there or holds no text.
    """
    place = str(place)
    if place.startswith(TFDS):
        from mlcm_jax.data.tfds_text import TfdsText  # importing TensorFlow Datasets takes a second

        return TfdsText(place.removeprefix(TFDS), column)
    path = epath.Path(place)
    try:
        exists = path.exists() and not path.is_dir()
    except (ImportError, OSError) as e:
        raise UserError(f"{place} cannot be reached ({shortened(e)}).") from None
    if not exists:
        raise UserError(f"The prompt file {place} does not exist: name a text file with one prompt a line.")
    if path.suffix in SUFFIXES:
        return read_column(path, column)
    if column:
        raise UserError(f"{place} has no columns: leave prompts_column empty, or name a .jsonl, .csv or .parquet file.")
    return _text_file(path)


def read_prompts(place: str | Path, column: str = "") -> list[str]:
    """All prompts of a place, in memory; of a row with several texts the first. Errors are ``open_prompts``'s."""
    source = open_prompts(place, column)
    return [texts[0] for texts in source.__getitems__(range(len(source)))]


def text_lines(text: str) -> list[str]:
    """The lines of a text without what ends them: \\n, \\r\\n or \\r. A last line needs no end."""
    lines = LINE_END.split(text)
    return lines if lines[-1] else lines[:-1]


def _text_file(path: epath.Path) -> TextLines:
    try:
        text = path.read_bytes().decode("utf-8-sig")  # without the byte order mark that Windows' editors write
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # as in UTF-16 without its mark
        raise UserError(f"The prompt file {path} is not UTF-8 text: write one prompt a line.")
    prompts = [line.strip() for line in text_lines(text) if line.strip()]
    if not prompts:
        raise UserError(f"The prompt file {path} is empty: write one prompt a line.")
    return TextLines(prompts)


def fingerprint(source: TextSource) -> dict[str, Any]:
    """What tells whether prompts have changed: how many rows there are, and a hash of their texts.

    Of more than ``NUM_HASHED`` rows that many are hashed, at equal distances.
    """
    rows = np.unique(np.linspace(0, len(source) - 1, min(len(source), NUM_HASHED)).astype(int))
    digest = hashlib.sha256()
    for part in np.array_split(rows, -(-len(rows) // 4096)):
        digest.update(json.dumps([list(texts) for texts in source.__getitems__(part.tolist())]).encode())
    return {"rows": len(source), "sha256": digest.hexdigest()}


class PromptIndex(NamedTuple):
    """A row of the source, and how often the stream has walked through all rows before."""

    row: int
    epoch: int

    def turn(self, num_texts: int) -> int:
        """Which of a row's texts is meant: each pass takes the next."""
        return self.epoch % num_texts


def shuffled(positions: Iterable[int], n: int, seed: int) -> list[PromptIndex]:
    """Where the positions of an endless stream lie, which goes through all n rows in a new random order each time;
    any position can be asked for."""
    epochs = (divmod(int(position), n) for position in positions)
    return [PromptIndex(int(_order(seed, epoch, n)[index]), epoch) for epoch, index in epochs]


@lru_cache(maxsize=4)  # trajectories of a few epochs can be under way at a time
def _order(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)
