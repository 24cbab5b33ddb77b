"""A column of text of a JSONL, CSV or Parquet file, read whole with pyarrow; only that column stays in memory."""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import pyarrow as pa
from etils import epath
from pyarrow import csv, json, parquet

from mlcm_jax.errors import UserError, shortened

LIKELY = ("prompt", "prompts", "caption", "captions", "text")  # of a column that nobody has named, best first


class TextColumn:
    """Rows of one text or more (a column of lists); rows without any are left out."""

    def __init__(self, texts: pa.ChunkedArray):
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    def __getitems__(self, rows: Sequence[int]) -> list[Sequence[str]]:
        return [_texts(value) for value in self._texts.take(pa.array(rows, pa.int64())).to_pylist()]


def read_column(path: epath.Path, column: str) -> TextColumn:
    """The column of a file whose suffix is in ``SUFFIXES``.

    column: "" for the one that is named like prompts are. Raises UserError for a file that cannot be read, a column
    that is not there or holds no text, and one without a prompt.
    """
    try:
        with path.open("rb") as file:
            found = SUFFIXES[path.suffix](file, path, column)
    except (pa.ArrowException, OSError) as e:
        raise UserError(f"{path} is not a readable {path.suffix} file ({shortened(e)}).") from None
    kept = [bool(_texts(value)) for value in found.to_pylist()]
    if not any(kept):
        raise UserError(f"{path} has no prompt in the column that is read: name another with prompts_column.")
    return TextColumn(found.filter(pa.array(kept)))


def choose_column(place: Any, columns: Sequence[str], wanted: str) -> str:
    """The column ``wanted``, or else the likeliest of the columns of text; raises UserError where there is none."""
    named = ", ".join(columns[:12]) or "none"
    if wanted:
        return wanted if wanted in columns else _no_column(f"{place} has no text in {wanted!r}: it has {named}.")
    for name in LIKELY:
        matching = [column for column in columns if name in column.split("/")]
        if len(matching) == 1:
            return matching[0]
    if len(columns) == 1:
        return columns[0]
    return _no_column(f"{place} does not say which column holds the prompts: set prompts_column; it has {named}.")


def _no_column(sentence: str) -> NoReturn:
    raise UserError(sentence)


def _texts(value: str | list[str | None] | None) -> tuple[str, ...]:
    several = [value] if isinstance(value, str) else value or []
    return tuple(text.strip() for text in several if text and text.strip())


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _is_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _choose(schema: pa.Schema, path: epath.Path, column: str) -> str:
    return choose_column(path, [field.name for field in schema if _is_text(field.type)], column)


def _parquet(file: Any, path: epath.Path, column: str) -> pa.ChunkedArray:
    opened = parquet.ParquetFile(file)
    name = _choose(opened.schema_arrow, path, column)
    return opened.read(columns=[name]).column(name)


def _table(read: Callable[[Any], pa.Table]) -> Callable[..., pa.ChunkedArray]:
    def read_chosen(file: Any, path: epath.Path, column: str) -> pa.ChunkedArray:
        table = read(file)
        return table.column(_choose(table.schema, path, column))

    return read_chosen


def _read_csv(file: Any) -> pa.Table:
    """A comma between cells, double quotes around those that hold one; the first line names the columns."""
    return csv.read_csv(file, parse_options=csv.ParseOptions(newlines_in_values=True))


SUFFIXES: dict[str, Callable[..., pa.ChunkedArray]] = {
    ".jsonl": _table(json.read_json),  # an object a line
    ".csv": _table(_read_csv),
    ".parquet": _parquet,
}
