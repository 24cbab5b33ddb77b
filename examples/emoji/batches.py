"""Which emoji a training step sees: a pure function of the seed and the step, so that a resumed run repeats it."""

from collections import Counter

import numpy as np
from emoji_dataset.dataset import EmojiSplit
from jaxtyping import Float, Int


def row_weights(data: EmojiSplit) -> Float[np.ndarray, " n"]:
    """How often each row is drawn, sum 1: every (name, style) counts the same, however many skin tones it comes in."""
    images = list(zip(data["name"], data["style"], strict=True))
    variants = Counter(images)
    weights = np.array([1.0 / variants[image] for image in images])
    return weights / weights.sum()


class Batches:
    """Draws rows by ``row_weights``."""

    def __init__(self, data: EmojiSplit, *, seed: int, batch_size: int):
        self._weights = row_weights(data)
        self._seed, self._batch_size = seed, batch_size

    def indices(self, step: int) -> Int[np.ndarray, " n"]:
        """Rows of the batch of ``step``, without repeats."""
        rng = np.random.default_rng([self._seed, step])
        return rng.choice(len(self._weights), self._batch_size, replace=False, p=self._weights)
