"""Prompt files: one prompt a line; a step's prompts are a pure function of the seed and the step."""

from collections.abc import Sequence
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


class PromptStream:
    """Walks through all prompts in a new random order each time, ``batch_size`` a step; any step can be asked for."""

    def __init__(self, prompts: Sequence[str], *, seed: int, batch_size: int):
        self._prompts, self._seed, self._batch_size = prompts, seed, batch_size
        self._epoch, self._order = -1, np.arange(len(prompts))

    def batch(self, step: int) -> list[str]:
        """The prompts of ``step`` (0 for the first)."""
        first = step * self._batch_size
        return [self._prompts[self._row(i)] for i in range(first, first + self._batch_size)]

    def _row(self, position: int) -> int:
        epoch, index = divmod(position, len(self._prompts))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self._seed, epoch]).permutation(len(self._prompts))
        return int(self._order[index])
