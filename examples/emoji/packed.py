"""One file with all that the denoiser's training on a GPU reads: latents, captions, weights, some real images."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float16, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mlcm_jax.errors import UserError
from mlcm_jax.hub.tensor_reader import find_weights
from mlcm_jax.outputs import atomic_write

MAX_BYTES = 30_000_000


@dataclasses.dataclass(frozen=True)
class Packed:
    """latents: scaled means of the encoder. weights: how often a row is drawn, sum 1. heldout_*: of names that are
    not trained on. real: images of real_captions, to compare samples with. vae: the fingerprint of the autoencoder.

    Captions are text: their states (15 kB each) are computed anew, which takes seconds.
    """

    latents: Float16[np.ndarray, "n h w c"]
    captions: list[str]
    weights: Float[np.ndarray, " n"]
    heldout_latents: Float16[np.ndarray, "m h w c"]
    heldout_captions: list[str]
    real: UInt8[np.ndarray, "k H W 3"]
    real_captions: list[str]
    vae: str


def save_packed(packed: Packed, path: Path) -> int:
    """Write a safetensors file; returns its size in bytes. Raises UserError above ``MAX_BYTES``."""
    fields = dataclasses.asdict(packed)
    arrays = {name: np.ascontiguousarray(value) for name, value in fields.items() if isinstance(value, np.ndarray)}
    texts = {name: json.dumps(value) for name, value in fields.items() if name not in arrays}
    data = save(arrays, metadata=texts)
    if len(data) > MAX_BYTES:
        raise UserError(f"The file would have {len(data)} bytes, more than {MAX_BYTES}: lower --num_real.")
    with atomic_write(path) as f:
        f.write(data)
    return len(data)


def load_packed(path: Path) -> Packed:
    """Raises UserError for a file that is missing or holds something else."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: write it with examples/emoji/pack.py.")
    try:
        with safe_open(path, framework="np") as f:
            texts = {name: json.loads(value) for name, value in f.metadata().items()}
            return Packed(**{name: f.get_tensor(name) for name in f.keys()}, **texts)  # noqa: SIM118  not a mapping
    except (SafetensorError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} was not written by examples/emoji/pack.py ({str(error)[:150]}).") from None


def fingerprint(folder: Path) -> str:
    """SHA-256 of a network's weights file: latents mean nothing to another autoencoder."""
    return hashlib.sha256(find_weights(folder).read_bytes()).hexdigest()
