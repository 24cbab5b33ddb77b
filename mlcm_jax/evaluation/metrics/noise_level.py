"""The level of noise in all of an image, apart from its contours."""

import numpy as np
from jaxtyping import Float, UInt8

from mlcm_jax.evaluation.metrics.base import ImageMetric
from mlcm_jax.evaluation.metrics.high_frequency_energy import laplacian


def noise_level(images: UInt8[np.ndarray, "n H W 3"]) -> Float[np.ndarray, " n"]:
    """Median over the pixels of the mean absolute response of their colours to the 3 x 3 Laplacian, white being 1.

    As in the median estimator of noise (Donoho and Johnstone 1994): contours, which take less than half of an image,
    hardly count. An even image has 0. Noise raises it, and so does a blur that smears contours over half the image.
    """
    response = np.abs(laplacian(images)).mean(axis=-1)
    return np.median(response.reshape(len(images), -1), axis=1)


NOISE_LEVEL = ImageMetric("noise_level", "noise level", "near 1", 3, noise_level, relative_to_data=True)
