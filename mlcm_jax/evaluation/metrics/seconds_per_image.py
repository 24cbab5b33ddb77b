"""Time of sampling and decoding, without compiling."""

import numpy as np

from mlcm_jax.evaluation.metrics.base import ImageMetric

SECONDS_PER_IMAGE = ImageMetric("seconds_per_image", "seconds an image", "lower", 4, np.atleast_1d, needs=("seconds",))
