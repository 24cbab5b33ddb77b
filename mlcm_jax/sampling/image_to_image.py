"""Sampling that starts from an image (arXiv 2108.01073) and may make only a part of it new (2201.09865)."""

import numpy as np
from jaxtyping import Float
from PIL import Image

from mlcm_jax.errors import UserError
from mlcm_jax.hub.pipeline import Pipeline
from mlcm_jax.image_size import ImageSize
from mlcm_jax.images import resized
from mlcm_jax.sampling.decode import encode
from mlcm_jax.sampling.sample import ImageStart

STRENGTH = 0.5


def checked_strength(image: Image.Image | None, strength: float | None, mask: Image.Image | None) -> float:
    """The part of the steps to take: 1 without an image, and with one ``STRENGTH`` where none is given.

    Raises UserError for a mask or a strength without an image, and for a mask of another size.
    """
    if image is None:
        if mask is not None or strength is not None:
            what = "mask" if mask is not None else "strength"
            raise UserError(f"There is a {what} and no image: name the image to start from as well.")
        return 1.0
    if mask is not None and mask.size != image.size:
        raise UserError(
            f"The mask has {mask.width} x {mask.height} px and the image {image.width} x {image.height}: give a mask "
            "of the image's size."
        )
    return STRENGTH if strength is None else strength


def image_start(
    pipeline: Pipeline, image: Image.Image, strength: float, mask: Image.Image | None, image_size: ImageSize
) -> ImageStart:
    """What ``sample_latents`` takes for an image and a mask, resized to the size of the samples.

    The latents are the mean of what the encoder answers. Raises UserError for a mask without white.
    """
    latent_mask = None if mask is None else _latent_mask(mask, image_size, pipeline.downscale)
    return ImageStart(encode(pipeline.vae, resized(image, image_size)[None]), strength, latent_mask)


def _latent_mask(mask: Image.Image, image_size: ImageSize, downscale: int) -> Float[np.ndarray, "1 h w 1"]:
    """As diffusers makes it: white from half of the brightness on, of each latent the upper left pixel."""
    white = resized(mask, image_size, "L")[::downscale, ::downscale] >= 127.5
    if not white.any():
        raise UserError("The mask has no white, so that nothing would be made new: paint white what is to change.")
    return white.astype(np.float32)[None, :, :, None]
