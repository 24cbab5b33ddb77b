"""Images: read from files, uint8 and float into one another, rows of them into a grid."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float, UInt8
from PIL import Image, ImageOps

from mlcm_jax.errors import UserError
from mlcm_jax.outputs import atomic_write, image_format


def to_uint8(images: Float[Array, "n H W 3"]) -> UInt8[Array, "n H W 3"]:
    """Images in [-1, 1] to 0..255, rounded as diffusers' image processor rounds; for use inside ``jax.jit``."""
    return (jnp.clip(images.astype(jnp.float32) / 2 + 0.5, 0, 1) * 255).round().astype(jnp.uint8)


def to_float(images: UInt8[np.ndarray, "n H W 3"]) -> Float[np.ndarray, "n H W 3"]:
    """Images 0..255 to [-1, 1]."""
    return images.astype(np.float32) / 127.5 - 1.0


def open_image(path: str | Path, mode: str = "RGB") -> Image.Image:
    """An image file as people see it: turned as its EXIF orientation says, of 16-bit greys the upper 8 bits.

    mode: Pillow's, of what is returned. Raises UserError for a file that Pillow cannot read, for whatever reason.
    """
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):  # Pillow's own conversion makes all that is above 255 white
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return image.convert(mode)
    except Exception as error:  # what Pillow raises for a damaged file depends on the format and on the damage
        reason = " ".join(str(error).split())[:150] or type(error).__name__
        raise UserError(f"{path} cannot be read as an image ({reason}): replace it or take it away.") from None


def resized(image: Image.Image, size: tuple[int, int], mode: str = "RGB") -> UInt8[np.ndarray, "H W *c"]:
    """An image at ``size``, height and width, as diffusers' image processors resize it (Lanczos); mode: Pillow's."""
    height, width = size
    return np.asarray(image.resize((width, height), resample=Image.Resampling.LANCZOS).convert(mode))


def image_grid(images: UInt8[np.ndarray, "n H W 3"], columns: int, gap: int = 2) -> UInt8[np.ndarray, "H2 W2 3"]:
    """Lay images out row by row on white, ``gap`` pixels apart."""
    n, height, width, _ = images.shape
    rows = -(-n // columns)
    canvas = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = (i // columns) * (height + gap), (i % columns) * (width + gap)
        canvas[y : y + height, x : x + width] = image
    return canvas


def write_image(image: UInt8[np.ndarray, "H W 3"], path: epath.PathLike) -> None:
    """Write a file in the format that its suffix names, here or at gs://; it takes its name when it is whole."""
    with atomic_write(path) as f:
        Image.fromarray(image).save(f, format=image_format(path))
