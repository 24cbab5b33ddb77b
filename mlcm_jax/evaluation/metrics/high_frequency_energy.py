"""High-frequency energy: contours, texture and noise."""

import numpy as np
from jaxtyping import Float, UInt8

from mlcm_jax.evaluation.metrics.base import ImageMetric


def high_frequency_energy(images: UInt8[np.ndarray, "n H W 3"]) -> Float[np.ndarray, " n"]:
    """Mean squared response to the 3 x 3 Laplacian, over colours and pixels; float64.

    An even image has 0; noise of variance v adds 20 v. A blurred image has less than a sharp one.
    """
    return np.square(laplacian(images)).mean(axis=(1, 2, 3))


def laplacian(images: UInt8[np.ndarray, "n H W 3"]) -> Float[np.ndarray, "n h w 3"]:
    """Four neighbours less four times the pixel, white being 1, where all neighbours are in the image; float64."""
    x = images.astype(np.float64) / 255
    sides = x[:, :-2, 1:-1] + x[:, 2:, 1:-1] + x[:, 1:-1, :-2] + x[:, 1:-1, 2:]
    return sides - 4 * x[:, 1:-1, 1:-1]


HIGH_FREQUENCY_ENERGY = ImageMetric(
    "high_frequency_energy", "high-frequency energy", "near 1", 3, high_frequency_energy, relative_to_data=True
)
