"""Whole pictures from a pipeline: initial noise, sampling and decoding, each compiled once for its sizes."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from mlcm_jax.diffusion.guidance import guided_predict
from mlcm_jax.diffusion.samplers import step_table
from mlcm_jax.hub.pipeline import Network
from mlcm_jax.images import to_float, to_uint8
from mlcm_jax.sampling import noise_rng, walk
from mlcm_jax.types import Latents, Params, TextConditioning

DISTILLED = ("TCDScheduler", "LCMScheduler")


def default_guidance_scale(scheduler_config: dict[str, Any]) -> float:
    """1 (none) for the schedulers of distilled models, which have their guidance within; 5 for others."""
    return 1.0 if scheduler_config["_class_name"] in DISTILLED else 5.0


@partial(jax.jit, static_argnames=("module", "prediction_type"))
def _sample(module, prediction_type, table, variables, latents, conditioning, unconditional, guidance_scale, rng):
    predict = partial(module.apply, variables)

    def network(x, timesteps):
        if guidance_scale is None:
            return predict(x, timesteps, conditioning)
        return guided_predict(predict, x, timesteps, conditioning, unconditional, guidance_scale)

    return walk(network, prediction_type, table, latents, rng)


def sample_latents(
    unet: Network,
    scheduler_config: dict[str, Any],
    latents: Latents,
    conditioning: TextConditioning,
    unconditional: TextConditioning,
    *,
    guidance_scale: float,
    num_steps: int,
    variables: Params | None = None,
    rng: Array | None = None,
) -> Latents:
    """Clean latents (scaled, float32) from standard normal noise; one program serves every number of steps.

    guidance_scale: a value <= 1 means no unconditional call. variables: instead of {"params": unet.params}.
    rng: a key for samplers that add noise. Raises UserError for a scheduler or number of steps that is not supported.
    """
    table = step_table(scheduler_config, num_steps)
    scale = jnp.float32(guidance_scale) if guidance_scale > 1 else None
    variables = {"params": unet.params} if variables is None else variables
    args = (table.arrays, variables, latents, conditioning, unconditional, scale, noise_rng(table, rng))
    return _sample(unet.module, table.prediction_type, *args)


@partial(jax.jit, static_argnames=("module",))
def _decode(module, params, latents):
    return module.apply({"params": params}, latents, method="decode")


def decode(vae: Network, latents: Latents) -> UInt8[np.ndarray, "n H W 3"]:
    """Images of scaled latents, one at a time: a decoder's activations are large."""
    unscaled = latents / vae.config["scaling_factor"]
    return np.concatenate([to_uint8(_decode(vae.module, vae.params, row[None])) for row in unscaled])


@partial(jax.jit, static_argnames=("module",))
def _encode(module, params, images):
    return module.apply({"params": params}, images, method="encode")[0]


def encode(vae: Network, images: UInt8[np.ndarray, "n H W 3"]) -> Float[np.ndarray, "n h w c"]:
    """Scaled latents (the means of the encoder's distributions), float32; compiled once for each batch size."""
    return np.asarray(_encode(vae.module, vae.params, to_float(images)), np.float32) * vae.config["scaling_factor"]


def draw_noise(seed: int, n: int, latent_shape: Sequence[int]) -> Latents:
    """The initial noise of pictures 0..n-1; picture i has the same noise whatever n is."""
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(n))
    return jax.vmap(lambda key: jax.random.normal(key, tuple(latent_shape)))(keys)


def latent_distance(a: Latents, b: Latents) -> Float[np.ndarray, " n"]:
    """Mean squared difference of each pair of latents."""
    return np.square(np.asarray(a, np.float64) - np.asarray(b, np.float64)).mean(axis=(1, 2, 3))
