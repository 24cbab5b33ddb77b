"""Images and their edges: moved ones for the training of a ControlNet, and how well samples follow them."""

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from mlcm_jax.sampling.canny import canny_edges

Images = UInt8[np.ndarray, "n H W 3"]
TOLERANCE = 1  # pixels that an edge may be away


def moved(images: Images, rng: np.random.Generator) -> Images:
    """Each image, on white, mirrored or not, 0.7 to 1 times as large, anywhere it fits."""
    return np.stack([_moved(image, rng) for image in images])


def _moved(image: UInt8[np.ndarray, "H W 3"], rng: np.random.Generator) -> UInt8[np.ndarray, "H W 3"]:
    side = image.shape[0]
    size = int(rng.integers(round(0.7 * side), side + 1))
    small = Image.fromarray(image[:, ::-1] if rng.random() < 0.5 else image).resize(
        (size, size), Image.Resampling.LANCZOS
    )
    canvas = np.full_like(image, 255)
    top, left = rng.integers(0, side - size + 1, size=2)
    canvas[top : top + size, left : left + size] = np.asarray(small)
    return canvas


def edges_of(images: Images) -> Images:
    """What launch/canny.py makes of each."""
    return np.stack([np.asarray(canny_edges(Image.fromarray(image))) for image in images])


def agreement(samples: Images, edges: Images) -> Float[np.ndarray, " n"]:
    """F1 of each sample's edges against those that it was to follow, 0 to 1; ``TOLERANCE`` pixels away is a hit."""
    ours, theirs = edges_of(samples)[..., 0] > 0, edges[..., 0] > 0
    precision, recall = _found(ours, _grown(theirs)), _found(theirs, _grown(ours))
    return 2 * precision * recall / np.maximum(precision + recall, 1e-9)


def _grown(edges: Bool[np.ndarray, "n H W"]) -> Bool[np.ndarray, "n H W"]:
    kernel = np.ones((2 * TOLERANCE + 1,) * 2, np.uint8)
    return np.stack([cv2.dilate(one.astype(np.uint8), kernel) > 0 for one in edges])


def _found(edges: Bool[np.ndarray, "n H W"], near: Bool[np.ndarray, "n H W"]) -> Float[np.ndarray, " n"]:
    """The part of each image's edges that lies in ``near``; 1 for an image without any."""
    total = edges.sum(axis=(1, 2))
    return np.where(total > 0, (edges & near).sum(axis=(1, 2)) / np.maximum(total, 1), 1.0)
