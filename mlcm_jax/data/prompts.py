"""Prompt files: one prompt a line; the order they are taken in is a pure function of the seed."""

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np

from mlcm_jax.errors import UserError


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a text file, blank lines left out; raises UserError when there is no file or no prompt in it."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"The prompt file {path} does not exist: name a text file with one prompt a line.")
    try:
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise UserError(f"The prompt file {path} is not UTF-8 text: write one prompt a line.") from None
    if not prompts:
        raise UserError(f"The prompt file {path} is empty: write one prompt a line.")
    return prompts


def shuffled(positions: Iterable[int], n: int, seed: int) -> list[int]:
    """The numbers of the prompts at positions of an endless stream, which walks through all n in a new random order
    each time; any position can be asked for."""
    epochs = (divmod(int(position), n) for position in positions)
    return [int(_order(seed, epoch, n)[index]) for epoch, index in epochs]


@lru_cache(maxsize=4)  # trajectories of a few epochs can be under way at a time
def _order(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)
