"""Pairs of English and Chinese captions that Chinese text encoders are trained on, and what the English ones say."""

from typing import Any

import numpy as np
from batches import Batches
from emoji_dataset.chinese import SPELLINGS, chinese_names, spelt_caption
from emoji_dataset.dataset import EmojiSplit
from emoji_dataset.phrases import NewNames
from emoji_dataset.sources import STYLES
from jaxtyping import Int
from ml_collections import ConfigDict
from recipe import MADE_UP, NUM_MADE_UP
from text_states import TextStates

from mlcm_jax.sampling.conditioning import tokenize


class Captions:
    """Captions of the training split, then made-up ones, in English and as name, skin tone and style in Chinese."""

    def __init__(self, splits: dict[str, EmojiSplit], seed: int):
        known, train = chinese_names(), splits["train"]
        held_out = set(splits["heldout"]["name"])
        names = {name: known[name] for name in sorted(set(train["name"]))}
        new_name = NewNames(names, held_out | {known[name] for name in held_out})
        generator = np.random.default_rng([seed, 2])
        self.english = list(train["caption"])
        self.parts = [
            (known[name], tone, style)
            for name, tone, style in zip(train["name"], train["skin_tone"], train["style"], strict=True)
        ]
        for _ in range(NUM_MADE_UP):
            (english, chinese), style = new_name(generator), STYLES[generator.integers(len(STYLES))]
            self.english.append(f"{english}, {style} style")
            self.parts.append((chinese, "", style))

    def chinese(self, row: int, spelling: int) -> str:
        return spelt_caption(*self.parts[row], spelling)


class PairBatches:
    """Chinese token ids and the English encoders' states, a part ``MADE_UP`` of them of made-up captions.

    states: of ``captions.english``.
    """

    def __init__(self, train: EmojiSplit, captions: Captions, tokenizer: Any, states: TextStates, config: ConfigDict):
        self._captions, self._tokenizer, self._states, self._seed = captions, tokenizer, states, config.seed
        self._num_new = round(config.batch_size * MADE_UP)
        self._batches = Batches(train, seed=config.seed, batch_size=config.batch_size - self._num_new)
        self._num_real = len(train["caption"])

    def __call__(self, step: int) -> tuple[Int[np.ndarray, "n tokens"], TextStates]:
        generator = np.random.default_rng([self._seed, step, 1])
        new = self._num_real + generator.integers(NUM_MADE_UP, size=self._num_new)
        rows = np.concatenate([self._batches.indices(step), new])
        spellings = generator.integers(len(SPELLINGS), size=len(rows))
        texts = [self._captions.chinese(row, spelling) for row, spelling in zip(rows, spellings, strict=True)]
        return tokenize(self._tokenizer, texts), {name: value[rows] for name, value in self._states.items()}
