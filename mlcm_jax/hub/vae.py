"""Another autoencoder for a pipeline: a finetuned one, such as SDXL's for float16, or a tiny one for previews."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp

from mlcm_jax.errors import UserError
from mlcm_jax.hub.load import read_json
from mlcm_jax.hub.pipeline import Network, Pipeline, load_network

CLASSES = ("AutoencoderKL", "AutoencoderTiny")


def load_vae(folder: str | Path, pipeline: Pipeline, *, dtype: Any = jnp.float32) -> Network:
    """The autoencoder in ``folder`` (or in its ``vae``), which is to decode the pipeline's latents.

    Args:
      dtype: compute dtype, unless its config.json asks for float32.

    Raises UserError when the folder holds no autoencoder, and for one whose latents have another shape.
    """
    folder = Path(folder)
    folder = folder / "vae" if (folder / "vae").is_dir() else folder
    class_name = read_json(folder / "config.json").get("_class_name")
    if class_name not in CLASSES:
        raise UserError(f"{folder} is a {class_name}, no autoencoder: use {' or '.join(CLASSES)}.")
    vae = load_network(folder, class_name, dtype=dtype)
    new, own = _latent(vae), _latent(pipeline.vae)
    if new != own:
        raise UserError(
            f"A latent of {folder} has {new[0]} channels for {new[1]} pixels a side, and one of the model has {own[0]} "
            f"for {own[1]}: use an autoencoder that was made for this model."
        )
    return vae


def _latent(vae: Network) -> tuple[int, int]:
    """Channels of a latent, and pixels along its side."""
    module: Any = vae.module
    return module.config.latent_channels, module.downscale
