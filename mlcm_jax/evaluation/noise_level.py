"""Noise that lies on all of a picture, told from its contours."""

import numpy as np
from jaxtyping import Float, UInt8

from mlcm_jax.evaluation.high_frequency import laplacian


def noise_level(images: UInt8[np.ndarray, "n H W 3"]) -> Float[np.ndarray, " n"]:
    """Median over the pixels of the mean absolute response of their colours to the 3 x 3 Laplacian, white being 1.

    As in the median estimator of noise (Donoho and Johnstone 1994): contours, which take less than half of a picture,
    hardly count. An even picture has 0. Noise raises it, and so does a blur that smears contours over half the picture.
    """
    response = np.abs(laplacian(images)).mean(axis=-1)
    return np.median(response.reshape(len(images), -1), axis=1)
