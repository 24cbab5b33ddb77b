"""Features of images and texts by transformers' CLIPModel (arXiv 2103.00020)."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast
from weakref import WeakValueDictionary

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8

from mlcm_jax.errors import UserError
from mlcm_jax.hub.pipeline import load_network
from mlcm_jax.hub.preprocess import Preprocessor
from mlcm_jax.hub.tokenizer import load_tokenizer
from mlcm_jax.models.clip import CLIPModel
from mlcm_jax.models.clip_config import TextTowerConfig
from mlcm_jax.sampling.conditioning import tokenize
from mlcm_jax.types import Params

CHUNK = 64  # images, or texts, that are encoded at a time


@dataclasses.dataclass(frozen=True)
class ClipEncoder:
    """A CLIPModel and the preprocessing of its images."""

    module: CLIPModel
    params: Params
    preprocessor: Preprocessor


_IN_USE: WeakValueDictionary[tuple[str, str], ClipEncoder] = WeakValueDictionary()


def load_clip_encoder(folder: str | Path, *, dtype: Any = jnp.float32) -> ClipEncoder:
    """Read config.json, weights and preprocessor_config.json; ``dtype`` is the compute dtype.

    An encoder that is still in use is shared, so that metrics and reward models of one folder hold its weights once.
    Raises UserError for an unsupported setting and for unfit weights.
    """
    key = str(folder), jnp.dtype(dtype).name
    if (encoder := _IN_USE.get(key)) is None:
        network = load_network(folder, "CLIPModel", dtype=dtype)
        encoder = ClipEncoder(cast(CLIPModel, network.module), network.params, Preprocessor.from_folder(folder))
        _IN_USE[key] = encoder
    return encoder


def load_clip_tokenizer(folder: str | Path) -> Any:
    """The tokenizer in a CLIPModel's folder; raises UserError when there is none."""
    return load_tokenizer(Path(folder), "CLIPTokenizer")


def clip_tokens(tokenizer: Any, tower: TextTowerConfig, prompts: Sequence[str]) -> Int[np.ndarray, "n t"]:
    """Token ids for a CLIP's text tower; longer prompts are cut to the tokenizer's length.

    Raises UserError for a tokenizer that makes longer sequences, or other ids, than the tower has embeddings for.
    """
    tokens = tokenize(tokenizer, prompts)
    if tokens.shape[1] > tower.max_position_embeddings or tokens.max() >= tower.vocab_size:
        raise UserError(
            f"The CLIP's tokenizer makes {tokens.shape[1]} tokens a prompt with ids up to {tokens.max()}, but its text "
            f"tower takes {tower.max_position_embeddings} tokens of {tower.vocab_size}: use the CLIP's own."
        )
    return tokens


def tower_pixels(encoder: ClipEncoder, images: UInt8[np.ndarray, "n H W 3"]) -> Float[np.ndarray, "n h w 3"]:
    """What the image tower takes; raises UserError when the images do not come out at its size."""
    return encoder.preprocessor.for_tower(images, encoder.module.vision.image_size)


@partial(jax.jit, static_argnames=("module", "method"))
def _encode(module, params, inputs, method):
    return module.apply({"params": params}, inputs, method=method).astype(jnp.float32)


def image_features(encoder: ClipEncoder, images: UInt8[np.ndarray, "n H W 3"]) -> Float[np.ndarray, "n p"]:
    """Projected image embeddings, float32, not normalised; compiled once, for ``CHUNK`` images at a time.

    These are the features of CLIP-FID (arXiv 2203.06026); scale the vectors to length one for cosine similarities.
    Raises UserError when the images do not come out at the size that the tower takes.
    """
    features = []
    for start in range(0, len(images), CHUNK):
        pixels = tower_pixels(encoder, images[start : start + CHUNK])
        padded = np.pad(pixels, [(0, CHUNK - len(pixels)), (0, 0), (0, 0), (0, 0)])
        encoded = _encode(encoder.module, encoder.params, padded, "encode_images")
        features.append(np.asarray(encoded)[: len(pixels)])
    return np.concatenate(features)


def text_features(encoder: ClipEncoder, tokens: Int[np.ndarray, "n t"]) -> Float[np.ndarray, "n p"]:
    """Projected text embeddings of ``clip_tokens``, float32, not normalised; compiled once, for ``CHUNK`` at a time."""
    features = []
    for start in range(0, len(tokens), CHUNK):
        indices = np.arange(start, start + CHUNK) % len(tokens)
        features.append(np.asarray(_encode(encoder.module, encoder.params, tokens[indices], "encode_texts")))
    return np.concatenate(features)[: len(tokens)]
