"""Random numbers as a pure function of (seed, stream name, step): nothing to save, and a resumed run repeats them."""

import zlib

import jax
from jaxtyping import Array, Int, Key


def stream(seed: int | Int[Array, ""], name: str, step: int | Int[Array, ""]) -> Key[Array, ""]:
    """Key of the stream ``name`` ("timesteps", "noise", ...) at ``step``; usable inside jit with a traced step."""
    root = jax.random.key(seed)
    return jax.random.fold_in(jax.random.fold_in(root, zlib.crc32(name.encode())), step)
