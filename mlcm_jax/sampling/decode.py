"""Between latents and images: an autoencoder's decoder and encoder, each compiled once for its sizes."""

from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, UInt8

from mlcm_jax.errors import UserError
from mlcm_jax.hub.pipeline import Network
from mlcm_jax.images import to_float, to_uint8
from mlcm_jax.models.vae import AutoencoderKL
from mlcm_jax.parallel.distributed import host_array
from mlcm_jax.sampling.tiling import decode_in_tiles
from mlcm_jax.types import HostLatents, Latents

TILING = ("auto", "on", "off")
# "auto" decodes larger images in tiles. At this side SDXL's decoder needs 2.2 GB in float32, by the TPU compiler's
# count (a tile of 512 px: 0.55 GB); at twice the side its attention alone has 17 GB of scores.
LARGEST_WHOLE_SIDE = 1024


@partial(jax.jit, static_argnames=("module", "tile"))
def decoding_program(module, params, latents, tile):
    """What ``decode`` runs."""
    whole = partial(module.apply, {"params": params}, method="decode")

    def one(z):
        z = z[None] / module.config.scaling_factor
        return to_uint8(whole(z) if tile is None else decode_in_tiles(whole, z, tile, module.downscale))[0]

    return jax.lax.map(one, latents)


def decode(vae: Network, latents: Latents | HostLatents, tiling: str = "auto") -> UInt8[np.ndarray, "n H W 3"]:
    """Images of scaled latents, fetched at once; the program decodes one at a time: a decoder's activations are large.

    tiling: "on" decodes what is larger than the autoencoder's ``sample_size`` in tiles of that size, "auto" only
    images of more than 1024 px. Raises UserError for "on" with an AutoencoderTiny, which needs no tiles, and for
    latents that are not finite.
    """
    module: Any = vae.module
    tile = module.config.sample_size if in_tiles(vae, latents, tiling) else None
    images = decoding_program(module, vae.params, latents, tile)  # queued before the latents are waited for
    if not np.isfinite(host_array(latents)).all():
        raise UserError(
            "The samples are no finite numbers, so there are no images: lower the guidance scale or the LoRA's, or "
            "compute in float32."
        )
    return host_array(images)


def in_tiles(vae: Network, latents: Latents | HostLatents, tiling: str) -> bool:
    """Whether ``decode`` takes these latents apart."""
    module: Any = vae.module
    if not isinstance(module, AutoencoderKL):
        if tiling == "on":
            raise UserError(f"{type(module).__name__} decodes images of any size whole: leave tiling out.")
        return False
    side = max(latents.shape[1:3]) * module.downscale
    smallest = {"auto": LARGEST_WHOLE_SIDE, "on": 0, "off": side}[tiling]
    if tiling == "on" and module.config.sample_size is None:
        raise UserError("The autoencoder's config.json has no sample_size, the side of a tile: leave --vae_tiling out.")
    return module.config.sample_size is not None and side > max(smallest, module.config.sample_size)


@partial(jax.jit, static_argnames=("module",))
def _encode(module, params, images):
    return module.apply({"params": params}, images, method="encode")[0]


def encode(vae: Network, images: UInt8[np.ndarray, "n H W 3"]) -> Float[np.ndarray, "n h w c"]:
    """Scaled latents (the means of the encoder's distributions), float32; compiled once for each batch size."""
    module: Any = vae.module
    return np.asarray(_encode(module, vae.params, to_float(images)), np.float32) * module.config.scaling_factor
