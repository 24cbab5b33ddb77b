"""Decoding large images tile by tile, so that the decoder's activations are those of one tile."""

from collections import defaultdict
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mlcm_jax.types import Latents

OVERLAP = 0.25  # of a tile, with the one above and the one to the left


def decode_in_tiles(
    decode: Callable[[Latents], Array], latents: Latents, tile: int, downscale: int
) -> Float[Array, "n H W 3"]:
    """Images of ``latents``, float32, for use inside ``jax.jit``; the same as diffusers' ``enable_tiling``.

    decode: latents -> images, called with squares and, at the right and lower edge, with what is left of them.
    tile: pixels along a tile's side. downscale: pixels along a latent's side.
    Where tiles overlap, one fades into the next. Each tile has its own norms and attention, so that the result is
    close to that of the whole, and not the same.
    """
    side = tile // downscale
    stride, fade = int(side * (1 - OVERLAP)), int(tile * OVERLAP)
    kept = tile - fade
    _, height, width, _ = latents.shape
    tops, lefts = range(0, height, stride), range(0, width, stride)
    tiles = _decoded(decode, latents, [(top, left) for top in tops for left in lefts], side)
    rows, above = [], {}
    for top in tops:
        row = {}
        for left in lefts:
            images = tiles[top, left]
            if above:
                images = _faded_in(images, above[left], fade, axis=1)
            if row:
                images = _faded_in(images, row[left - stride], fade, axis=2)
            row[left] = images
        rows.append(jnp.concatenate([images[:, :kept, :kept] for images in row.values()], axis=2))
        above = row
    return jnp.concatenate(rows, axis=1)


def _decoded(decode, latents, places: list[tuple[int, int]], side: int) -> dict[tuple[int, int], Array]:
    """The tile at each place. Tiles of a size share a loop: the program holds the decoder four times at most."""
    of_size = defaultdict(dict)
    for top, left in places:
        piece = latents[:, top : top + side, left : left + side]
        of_size[piece.shape][top, left] = piece
    tiles = {}
    for pieces in of_size.values():
        images = jax.lax.map(lambda piece: decode(piece).astype(jnp.float32), jnp.stack(list(pieces.values())))
        tiles |= zip(pieces, images, strict=True)
    return tiles


def _faded_in(images: Array, before: Array, extent: int, axis: int) -> Array:
    """``images`` with the end of ``before`` blended linearly into their beginning."""
    extent = min(before.shape[axis], images.shape[axis], extent)
    images, before = jnp.moveaxis(images, axis, -1), jnp.moveaxis(before, axis, -1)
    weight = jnp.arange(extent, dtype=jnp.float32) / max(extent, 1)
    blended = before[..., before.shape[-1] - extent :] * (1 - weight) + images[..., :extent] * weight
    return jnp.moveaxis(images.at[..., :extent].set(blended), -1, axis)
