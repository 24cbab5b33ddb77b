"""How well pictures fit their captions: CLIP's cosine similarity (arXiv 2104.08718, neither scaled nor clipped)."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from mlcm_jax.errors import UserError
from mlcm_jax.hub.pipeline import load_tokenizer
from mlcm_jax.models.clip_config import TextTowerConfig
from mlcm_jax.rewards.clip_features import CHUNK, Scorer
from mlcm_jax.sampling.conditioning import tokenize


def load_scorer_tokenizer(folder: str | Path) -> Any:
    """The tokenizer in a scorer's folder; raises UserError when there is none."""
    return load_tokenizer(Path(folder), "CLIPTokenizer")


def scorer_tokens(tokenizer: Any, tower: TextTowerConfig, prompts: Sequence[str]) -> Int[np.ndarray, "n t"]:
    """Token ids for a scorer's text tower; longer prompts are cut to the tokenizer's length.

    Raises UserError for a tokenizer that makes longer rows, or other ids, than the tower has embeddings for.
    """
    tokens = tokenize(tokenizer, prompts)
    if tokens.shape[1] > tower.max_position_embeddings or tokens.max() >= tower.vocab_size:
        raise UserError(
            f"The scorer's tokenizer makes rows of {tokens.shape[1]} tokens with ids up to {tokens.max()}, but its "
            f"text tower takes {tower.max_position_embeddings} tokens of {tower.vocab_size}: use the scorer's own."
        )
    return tokens


@partial(jax.jit, static_argnames=("module",))
def _encode(module, params, tokens):
    return module.apply({"params": params}, tokens, method="encode_texts").astype(jnp.float32)


def text_features(scorer: Scorer, tokenizer: Any, prompts: Sequence[str]) -> Float[np.ndarray, "n p"]:
    """Projected text embeddings, float32, not normalised; compiled once, for ``CHUNK`` prompts at a time.

    Cuts prompts and raises UserError as ``scorer_tokens`` does.
    """
    tokens = scorer_tokens(tokenizer, scorer.network.module.text, prompts)
    features = []
    for start in range(0, len(tokens), CHUNK):
        rows = np.arange(start, start + CHUNK) % len(tokens)
        features.append(np.asarray(_encode(scorer.network.module, scorer.network.params, tokens[rows])))
    return np.concatenate(features)[: len(tokens)]


def clip_scores(images: Float[np.ndarray, "n p"], texts: Float[np.ndarray, "n p"]) -> Float[np.ndarray, " n"]:
    """Cosine similarity of each picture's features with those of its own caption, float64, -1 to 1."""
    images, texts = (np.asarray(f, np.float64) for f in (images, texts))
    lengths = np.linalg.norm(images, axis=1) * np.linalg.norm(texts, axis=1)
    return (images * texts).sum(axis=1) / lengths
