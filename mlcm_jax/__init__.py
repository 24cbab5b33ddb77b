"""Multistep latent consistency distillation of latent diffusion models in JAX.

from mlcm_jax import distill, load_pipeline

images = load_pipeline("runs/emoji/export")(["red heart, noto style"], num_steps=4, seed=0)
"""

import os
from typing import TYPE_CHECKING, Any

# Tokenizers are all that is taken from transformers, which else regrets at each start that there is no PyTorch.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

if TYPE_CHECKING:
    from etils import epath
    from ml_collections import ConfigDict

    from mlcm_jax.sampling.text_to_image import TextToImage

__all__ = ["distill", "load_pipeline"]
__version__ = "0.1.0"

# Imports are inside, so that a program that needs neither function does not wait for them.


def load_pipeline(place: "epath.PathLike", *, dtype: str = "float32", **options: Any) -> "TextToImage":
    """A text-to-image pipeline from a diffusers folder, a hub id or a .safetensors file, ready to be called.

    dtype: that it is computed in. options: those of ``mlcm_jax.hub.pipeline.load_pipeline``, such as variant="fp16".
    Raises UserError for a place that holds no model, and for one that is not supported.
    """
    import jax.numpy as jnp

    from mlcm_jax.hub.pipeline import load_pipeline as load
    from mlcm_jax.sampling.text_to_image import TextToImage

    return TextToImage(load(str(place), dtype=jnp.dtype(dtype), **options))


def distill(config: "ConfigDict", workdir: "epath.PathLike", **options: Any) -> None:
    """Distil the teacher of a configuration; images, figures and the exported student are then in ``workdir``.

    The same call goes on where a run stopped. options: those of ``mlcm_jax.training.run.distill``, such as
    plan_only=True. Raises UserError, before anything is compiled, for settings that cannot work.
    """
    from mlcm_jax.training.run import distill as run

    run(config, workdir, **options)
