"""Reward models: networks that give each image one number, with or without its prompt."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from mlcm_jax.errors import UserError
from mlcm_jax.hub.preprocess import Preprocessor
from mlcm_jax.types import Params

CHUNK = 16  # images that are scored at a time

Tokens = Int[np.ndarray, "n t"]


@dataclasses.dataclass(frozen=True)
class RewardModel:
    """``module.apply({"params": params}, pixels, tokens)`` is one float32 score an image; more is better.

    tokenize: prompts to ids [n t], or to [n 0] where the prompt does not count.
    """

    module: nn.Module
    params: Params
    preprocessor: Preprocessor
    tokenize: Callable[[Sequence[str]], Tokens]

    def __call__(self, images: UInt8[np.ndarray, "n H W 3"], prompts: Sequence[str]) -> Float[np.ndarray, " n"]:
        """Scores of images, each for its own prompt; at most ``CHUNK`` images at a time.

        Raises UserError when there are not as many prompts as images, and for sizes the network does not take.
        """
        check_prompts(images, prompts)
        tokens, scores = self.tokenize(prompts), []
        for indices in batch_indices(len(images), CHUNK):
            pixels = self.preprocessor(images[indices])
            scores.append(np.asarray(_score(self.module, self.params, pixels, tokens[indices])))
        return np.concatenate(scores)[: len(images)]

    def reward(self, params: Params, images: Float[Array, "n H W 3"], tokens: Int[Array, "n t"]) -> Float[Array, " n"]:
        """The same for float images in [-1, 1], as a function of arrays that can be compiled and differentiated."""
        scores: Any = self.module.apply({"params": params}, self.preprocessor.differentiable(images), tokens)
        return scores


@dataclasses.dataclass(frozen=True)
class RewardModelSpec:
    """A kind of reward model: what the registry holds.

    name: in flags, and of the figure NAME_score. title: of its score in reports. measures: what the score says.
    load: ``load(folder, dtype=...)`` reads it, to be computed in ``dtype``, and raises UserError for an unfit folder.
    """

    name: str
    title: str
    measures: str
    load: Callable[..., RewardModel]


@partial(jax.jit, static_argnames=("module",))
def _score(module, params, pixels, tokens):
    return module.apply({"params": params}, pixels, tokens)


def check_prompts(images: UInt8[np.ndarray, "n H W 3"], prompts: Sequence[str]) -> None:
    """Raise UserError when there are not as many prompts as images."""
    if len(images) != len(prompts):
        raise UserError(f"There are {len(images)} images and {len(prompts)} prompts: give each image its own.")


def batch_indices(n: int, size: int) -> Iterator[Int[np.ndarray, " size"]]:
    """Indices of n examples in batches of one size, at most ``size``, so that a program compiles once.

    The last batch wraps around: leave out what comes after the first n results.
    """
    size = min(size, n)
    for start in range(0, n, size):
        yield np.arange(start, start + size) % n


def no_tokens(prompts: Sequence[str]) -> Tokens:
    """For reward models that look at the image alone."""
    return np.zeros((len(prompts), 0), np.int32)


def weights_file(folder: str | Path, name: str) -> Path:
    """A weights file that a user has put into a folder; raises UserError when it is not there."""
    path = Path(folder) / name
    if not path.is_file():
        raise UserError(f"{path} does not exist: docs/evaluate.md says how to make it.")
    return path


def unit(x: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """Vectors of length one, float32."""
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
