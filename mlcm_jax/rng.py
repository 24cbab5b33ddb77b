"""Random numbers as a pure function of (seed, stream name, step): nothing to save, and a resumed run repeats them."""

import zlib

import jax
from jaxtyping import Array, Int, Key


def stream(seed: int | Int[Array, ""], name: str, step: int | Int[Array, ""]) -> Key[Array, ""]:
    """Key of the stream ``name`` ("timesteps", "noise", ...) at ``step``; usable inside jit with a traced step."""
    return jax.random.fold_in(named(jax.random.key(seed), name), step)


def named(key: Key[Array, ""], name: str) -> Key[Array, ""]:
    """A key of its own for ``name``, derived from ``key``."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))
