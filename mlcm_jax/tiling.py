"""Decoding large pictures tile by tile, so that the decoder's activations are those of one tile."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Array, Float

from mlcm_jax.types import Latents

OVERLAP = 0.25  # of a tile, with the one above and the one to the left


def decode_in_tiles(
    decode: Callable[[Latents], Array], latents: Latents, tile: int, downscale: int
) -> Float[np.ndarray, "n H W 3"]:
    """Images of ``latents``, put together on the host; the same as diffusers' ``enable_tiling``.

    decode: latents -> images, called with squares and, at the right and lower edge, with what is left of them.
    tile: pixels along a tile's side. downscale: pixels along a latent's side.
    Where tiles overlap, one fades into the next. Each tile has its own norms and attention, so that the result is
    close to that of the whole, and not the same.
    """
    side = tile // downscale
    stride, fade = int(side * (1 - OVERLAP)), int(tile * OVERLAP)
    kept = tile - fade
    _, height, width, _ = latents.shape
    rows, above = [], []
    for top in range(0, height, stride):
        row = []
        for column, left in enumerate(range(0, width, stride)):
            images = np.array(decode(latents[:, top : top + side, left : left + side]), np.float32)
            if above:
                _fade_in(images, above[column], fade, axis=1)
            if row:
                _fade_in(images, row[-1], fade, axis=2)
            row.append(images)
        rows.append(np.concatenate([images[:, :kept, :kept] for images in row], axis=2))
        above = row
    return np.concatenate(rows, axis=1)


def _fade_in(images: np.ndarray, before: np.ndarray, extent: int, axis: int) -> None:
    """Blend the end of ``before`` linearly into the beginning of ``images``, in place."""
    extent = min(before.shape[axis], images.shape[axis], extent)
    images, before = np.moveaxis(images, axis, -1), np.moveaxis(before, axis, -1)
    weight = np.arange(extent, dtype=np.float32) / max(extent, 1)
    ends = before[..., before.shape[-1] - extent :]
    images[..., :extent] = ends * (1 - weight) + images[..., :extent] * weight
