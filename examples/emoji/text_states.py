"""What the English text encoders give the UNet, which Chinese ones learn to give, and how far from it they are."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from recipe import MODEL_INDEX

from mlcm_jax.hub.pipeline import Network, load_network
from mlcm_jax.hub.tokenizer import load_tokenizer
from mlcm_jax.sampling.conditioning import CHUNK, tokenize

ENCODERS, TOKENIZERS = ("text_encoder", "text_encoder_2"), ("tokenizer", "tokenizer_2")
# states_1 and states_2, each encoder's penultimate token states, and pooled, the last one's
TextStates = dict[str, Any]


class EnglishEncoders:
    """The teacher's text encoders in float32, with their tokenizers."""

    def __init__(self, teacher: Path):
        self.networks = [load_network(teacher / p, MODEL_INDEX[p][1], param_dtype=jnp.float32) for p in ENCODERS]
        self._tokenizers = [load_tokenizer(teacher / part, "CLIPTokenizer") for part in TOKENIZERS]

    def __call__(self, captions: list[str]) -> TextStates:
        """States of all captions, on the host, float16."""
        params = [network.params for network in self.networks]
        tokens = [tokenize(tokenizer, captions) for tokenizer in self._tokenizers]
        return in_chunks(lambda *rows: states_of(self.networks, params, rows), tokens)


def states_of(networks: Sequence[Network], params, tokens) -> TextStates:
    """What two encoders give the UNet."""
    out = [n.module.apply({"params": p}, t) for n, p, t in zip(networks, params, tokens, strict=True)]
    return {"states_1": out[0].penultimate, "states_2": out[1].penultimate, "pooled": out[1].pooled}


def in_chunks(states: Callable[..., TextStates], tokens: Sequence[np.ndarray]) -> TextStates:
    """``states`` of all rows, float16, which halves what the states of all captions take in memory."""
    compiled = jax.jit(states)
    padded = [np.concatenate([t, t[: -len(t) % CHUNK]]) for t in tokens]
    chunks = [
        jax.tree.map(np.float16, jax.device_get(compiled(*(t[i : i + CHUNK] for t in padded))))
        for i in range(0, len(padded[0]), CHUNK)
    ]
    return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(tokens[0])], *chunks)


def spread(target: TextStates) -> dict[str, float]:
    """Variance over the captions of each of the outputs, averaged over positions and channels."""
    return {name: float(np.mean([x.var() for x in value.astype(np.float32).T])) for name, value in target.items()}


def unexplained(output: TextStates, target: TextStates, variance: dict[str, float]) -> dict[str, Any]:
    """Mean squared error of each of the outputs, as a part of its variance over captions."""
    return {name: jnp.square(output[name] - target[name]).mean() / variance[name] for name in target}
