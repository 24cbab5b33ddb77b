"""Other layouts of the same weights: where each of our tensors is in a file, for reading and for writing.

A layout is a function from our names to places. Reading looks our names up in it, writing sends them through it, so
there is one table for both directions.
"""

import functools
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from mlcm_jax.hub.save import Entry
from mlcm_jax.hub.tensor_reader import TensorReader


class Place(NamedTuple):
    """A tensor of a file, and what of it is ours.

    third: which third of its first axis, where query, key and value are below one another; None: all of it.
    form: "same"; "transposed", a plain matrix there and a linear layer's weight here; "pointwise", a 1x1 convolution
    there and a linear layer here.
    """

    name: str
    third: int | None = None
    form: str = "same"


class Layout(NamedTuple):
    """places: from all names of a network to their places; prefix: of every name in the file."""

    places: Callable[[Collection[str]], dict[str, Place]]
    prefix: str = ""


def unchanged(names: Collection[str]) -> dict[str, Place]:
    """The places of a layout that differs by its prefix alone."""
    return {name: Place(name) for name in names}


class RenamedReader(TensorReader):
    """A reader's tensors under other names."""

    def __init__(self, reader: TensorReader, rename: Callable[[str], str]):
        self.source, self.metadata, self._reader = reader.source, reader.metadata, reader
        # a name that needs no change goes before another that becomes it
        self._names = {rename(n): n for n in reader.names()} | {n: n for n in reader.names() if rename(n) == n}

    def names(self) -> list[str]:
        return list(self._names)

    def spelling(self, name: str) -> str:
        return self._names.get(name, name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._reader.shape(self._names[name])

    def dtype(self, name: str) -> str:
        return self._reader.dtype(self._names[name])

    def num_bytes(self, name: str) -> int:
        return self._reader.num_bytes(self._names[name])

    def read(self, name: str, memory: np.ndarray | None = None) -> np.ndarray:
        return self._reader.read(self._names[name], memory)


class LayoutReader(TensorReader):
    """A reader's tensors under our names; what has no place in the network keeps the name that it has in the file."""

    def __init__(self, reader: TensorReader, layout: Layout, names: Collection[str]):
        self.source, self.metadata, self._reader = reader.source, reader.metadata, reader
        in_file = {n for n in reader.names() if n.startswith(layout.prefix)}
        places = {ours: place._replace(name=layout.prefix + place.name) for ours, place in layout.places(names).items()}
        places = {ours: _as_written(place, in_file) for ours, place in places.items()}
        self._spelling = {ours: place.name for ours, place in places.items()}
        self._places = {ours: place for ours, place in places.items() if place.name in in_file}
        self._places |= {name: Place(name) for name in in_file - set(self._spelling.values())}

    def names(self) -> list[str]:
        return list(self._places)

    def spelling(self, name: str) -> str:
        return self._spelling.get(name, name)

    def shape(self, name: str) -> tuple[int, ...]:
        place = self._places[name]
        shape = self._reader.shape(place.name)
        if place.form == "transposed":
            shape = shape[::-1]
        elif place.form == "pointwise" and shape[2:] == (1, 1):
            shape = shape[:2]
        return shape if place.third is None else (shape[0] // 3, *shape[1:])

    def dtype(self, name: str) -> str:
        return self._reader.dtype(self._places[name].name)

    def num_bytes(self, name: str) -> int:
        return self._reader.num_bytes(self._places[name].name)

    def read(self, name: str, memory: np.ndarray | None = None) -> np.ndarray:
        place = self._places[name]
        tensor = self._reader.read(place.name, memory)
        if place.form == "transposed":
            tensor = tensor.T
        return (tensor if place.third is None else np.split(tensor, 3)[place.third]).reshape(self.shape(name))


def _as_written(place: Place, in_file: Collection[str]) -> Place:
    """The place where the file has it: a plain matrix may be there as a linear layer's weight after all."""
    linear = f"{place.name}.weight"
    if place.form == "transposed" and place.name not in in_file and linear in in_file:
        return Place(linear)
    return place


def lay_out(entries: list[Entry], layout: Layout) -> list[Entry]:
    """The same tensors under the names and in the forms of ``layout``."""
    places = layout.places([name for entry in entries for name in entry.names])
    groups: dict[tuple[str, ...], list[tuple[Place, Entry]]] = {}
    for entry in entries:
        here = [places[name] for name in entry.names]
        groups.setdefault(tuple(layout.prefix + p.name for p in here), []).append((here[0], entry))
    return [_joined(list(names), group) for names, group in groups.items()]


def _joined(names: list[str], group: list[tuple[Place, Entry]]) -> Entry:
    """One entry of the file's tensors ``names`` from the one or three that they are here."""
    parts = [entry for _, entry in sorted(group, key=_third)]
    form = group[0][0].form
    first, *rest = parts[0].shape
    shape = {"same": (first, *rest), "transposed": (*rest, first), "pointwise": (first, *rest, 1, 1)}[form]
    shape = (len(parts) * shape[0], *shape[1:])

    def read() -> list[np.ndarray]:
        layers = (np.concatenate(tensors) for tensors in zip(*(p.read() for p in parts), strict=True))
        return [(layer.T if form == "transposed" else layer).reshape(shape) for layer in layers]

    dtype: Any = functools.reduce(jnp.promote_types, (p.dtype for p in parts))
    return Entry(names, shape, np.dtype(dtype), read)


def _third(item: tuple[Place, Entry]) -> int:
    return item[0].third or 0
