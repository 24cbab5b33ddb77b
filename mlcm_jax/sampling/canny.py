"""Edges for ControlNets that follow them (Canny 1986), by OpenCV, which published ones were trained with."""

import numpy as np
from PIL import Image

from mlcm_jax.errors import UserError

LOW, HIGH = 100, 200  # of diffusers' examples and of lllyasviel's ControlNets


def canny_edges(image: Image.Image, low: float = LOW, high: float = HIGH) -> Image.Image:
    """White edges on black, RGB of the image's size. An edge begins where the gradient is above ``high`` and goes on
    while it is above ``low``; both are for 8-bit images. Raises UserError where OpenCV is not installed.
    """
    try:
        import cv2
    except ImportError:
        raise UserError("Edges need OpenCV, which is not installed: pip install opencv-python-headless.") from None
    edges = cv2.Canny(np.asarray(image.convert("RGB")), low, high)
    return Image.fromarray(edges).convert("RGB")
