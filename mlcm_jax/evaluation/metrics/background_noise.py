"""How much of a white background is not white."""

import numpy as np
from jaxtyping import Bool, Float, UInt8
from scipy import ndimage

from mlcm_jax.evaluation.metrics.base import ImageMetric

NEAR_WHITE = 24  # of 255: what is at most so far from white, in all colours, may be background
WHITE = 3  # of 255: what is at most so far from white is white


def background_noise(images: UInt8[np.ndarray, "n H W 3"]) -> Float[np.ndarray, " n"]:
    """The share of background pixels that are not white, 0 to 1, float64.

    Background is what can be reached from the image's border through nearly white pixels, left, right, up and down.
    Soft edges of a shape are counted too, so the figure says something beside that of clean images of the same kind
    only. An image without a white border has 0.
    """
    distance = 255 - images.min(axis=-1).astype(np.int16)
    return np.array([_share(one <= NEAR_WHITE, one > WHITE) for one in distance], np.float64)


def _share(nearly_white: Bool[np.ndarray, "H W"], tinted: Bool[np.ndarray, "H W"]) -> float:
    border = np.zeros_like(nearly_white)
    border[[0, -1]] = border[:, [0, -1]] = True
    background = ndimage.binary_propagation(border & nearly_white, mask=nearly_white)
    return float((background & tinted).sum() / max(background.sum(), 1))


BACKGROUND_NOISE = ImageMetric(
    "background_noise", "background noise", "near 1", 3, background_noise, relative_to_data=True
)
