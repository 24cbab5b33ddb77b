"""Random numbers as a pure function of (seed, stream name, step): nothing to save, and a resumed run repeats them."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key, UInt32

from mlcm_jax.errors import UserError

MAX_SEED = 2**64 - 1


def next_seed(seed: int, by: int = 1) -> int:
    """The seed that lies ``by`` further on; after the last comes 0."""
    return (seed + by) % (MAX_SEED + 1)


def seed_words(seed: int) -> UInt32[np.ndarray, "2"]:
    """A seed from 0 to ``MAX_SEED`` as an array, its upper 32 bits first: jax has no 64-bit integers by default.

    Raises UserError for another one.
    """
    if not 0 <= seed <= MAX_SEED:
        raise UserError(f"The seed {seed} cannot work: give one from 0 to {MAX_SEED}.")
    return np.array(divmod(seed, 2**32), np.uint32)


def seed_key(seed: int | UInt32[Array, "2"]) -> Key[Array, ""]:
    """The key of a seed, of which all 64 bits count; below 2**32 it is jax.random.key's. An array: ``seed_words``."""
    words = seed_words(int(seed)) if isinstance(seed, int | np.integer) else seed
    return jax.random.wrap_key_data(jnp.asarray(words), impl="threefry2x32")


def stream(seed: int | UInt32[Array, "2"], name: str, step: int | Int[Array, ""]) -> Key[Array, ""]:
    """Key of the stream ``name`` ("timesteps", "noise", ...) at ``step``; usable inside jit with a traced step.

    A run's numbers depend on the names: "terms" and "rivals" stay, whatever the code calls losses and critics.
    """
    return jax.random.fold_in(named(seed_key(seed), name), step)


def named(key: Key[Array, ""], name: str) -> Key[Array, ""]:
    """A key of its own for ``name``, derived from ``key``."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))
