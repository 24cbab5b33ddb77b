"""Frozen networks beside the teacher, which losses ask, by their role: what they are and their weights."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from mlcm_jax.hub.pipeline import Network
from mlcm_jax.types import Params


@dataclasses.dataclass(frozen=True)
class FrozenNetwork:
    """network: has ``module`` and ``params``, and whatever else its loss knows of it. dtype: of the weights on the
    devices; None: config.frozen_dtype. tokenize: the prompts of a batch as this network reads them; None: it gets none.
    of_teacher: picks the weights out of the teacher's autoencoder, of which they are a part; None: they are its own."""

    network: Any
    dtype: Any = None
    tokenize: Callable[[Sequence[str]], Int[np.ndarray, "n t"]] | None = None
    of_teacher: Callable[[Params], Params] | None = None


# Reads a network, weights and all; its caller has checked the settings.
Load = Callable[[], FrozenNetwork]


@dataclasses.dataclass(frozen=True)
class FrozenNetworks:
    """by_role: with parameters that are ShapeDtypeStructs. weights: by role, without those that are the teacher's, and
    empty once they have been placed."""

    by_role: Mapping[str, FrozenNetwork] = dataclasses.field(default_factory=dict)
    weights: dict[str, Params] = dataclasses.field(default_factory=dict)

    def __contains__(self, role: str) -> bool:
        return role in self.by_role

    def __getitem__(self, role: str) -> Any:
        """What ``FrozenNetwork.network`` is; raises ValueError for a role that no stage of the run has."""
        if role not in self.by_role:
            raise ValueError(f"no stage of this run has a network for {role}")
        return self.by_role[role].network

    def shapes(self, dtype: Any) -> dict[str, Params]:
        """ShapeDtypeStructs of the weights. dtype: config.frozen_dtype."""
        return {
            role: jax.tree.map(partial(_shape, dtype=frozen.dtype or dtype), frozen.network.params)
            for role, frozen in self.by_role.items()
        }

    def placed(self, shapes: Mapping[str, Params], vae: Network) -> dict[str, Params]:
        """The weights with dtypes and shardings of ``shapes``, once: they are given away. vae: the teacher's, with its
        weights."""
        return jax.tree.map(_put, {role: self._weights(role, vae) for role in shapes}, dict(shapes))

    def tokenize(self, prompts: Sequence[str]) -> dict[str, Int[np.ndarray, "n t"]]:
        """The prompts as each network that reads them does."""
        readers = {role: frozen.tokenize for role, frozen in self.by_role.items() if frozen.tokenize is not None}
        return {role: tokenize(prompts) for role, tokenize in readers.items()}

    def _weights(self, role: str, vae: Network) -> Params:
        of_teacher = self.by_role[role].of_teacher
        return self.weights.pop(role) if of_teacher is None else of_teacher(vae.params)


def read_networks(loads: Mapping[str, Load]) -> FrozenNetworks:
    """Read the networks of a run, by role; raises UserError as their loaders do."""
    with _on_the_host():
        found = {role: load() for role, load in loads.items()}
    weights = {role: frozen.network.params for role, frozen in found.items() if frozen.of_teacher is None}
    return FrozenNetworks({role: _described(frozen) for role, frozen in found.items()}, weights)


@contextlib.contextmanager
def _on_the_host() -> Iterator[None]:
    """Where weights wait for their place: an accelerator would hold them twice, and whole."""
    config: Any = jax.config
    before, platforms = config.jax_default_device, config.jax_platforms
    if not platforms or "cpu" in platforms:
        # not jax.default_device(), which counts in this thread alone: weights are read by several
        config.update("jax_default_device", jax.local_devices(backend="cpu")[0])
    try:
        yield
    finally:
        config.update("jax_default_device", before)


def _described(frozen: FrozenNetwork) -> FrozenNetwork:
    """The same without weights."""
    shapes = jax.tree.map(lambda a: _shape(a, a.dtype), frozen.network.params)
    return dataclasses.replace(frozen, network=dataclasses.replace(frozen.network, params=shapes))


def _put(array: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    if not array.is_fully_addressable:  # the teacher's, on the mesh already
        return jax.device_put(array.astype(like.dtype), like.sharding)
    values = np.asarray(array).astype(like.dtype)
    return jax.make_array_from_callback(like.shape, like.sharding, values.__getitem__)


def _shape(leaf: Any, dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, dtype)
