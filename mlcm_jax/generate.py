"""Whole pictures from a pipeline: initial noise, sampling and decoding, each compiled once for its sizes."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from mlcm_jax.hub.pipeline import Network
from mlcm_jax.images import to_uint8
from mlcm_jax.sampling import sample
from mlcm_jax.types import Latents, Params, TextConditioning


@partial(jax.jit, static_argnames=("module", "scheduler", "guidance_scale", "num_steps"))
def _sample(module, scheduler, guidance_scale, num_steps, variables, latents, conditioning, unconditional, rng):
    return sample(
        partial(module.apply, variables),
        dict(scheduler),
        latents,
        conditioning,
        unconditional,
        guidance_scale,
        num_steps,
        rng,
    )


def sample_latents(
    unet: Network,
    scheduler_config: Mapping[str, Any],
    latents: Latents,
    conditioning: TextConditioning,
    unconditional: TextConditioning,
    *,
    guidance_scale: float,
    num_steps: int,
    variables: Params | None = None,
    rng: Array | None = None,
) -> Latents:
    """Clean latents (scaled, float32) from standard normal noise, compiled once a network, scheduler and step count.

    variables: instead of {"params": unet.params}. rng: a key for samplers that add noise.
    """
    scheduler = tuple(sorted((k, tuple(v) if isinstance(v, list) else v) for k, v in scheduler_config.items()))
    variables = {"params": unet.params} if variables is None else variables
    rng = jax.random.key(0) if rng is None else rng
    args = (float(guidance_scale), num_steps, variables, latents, conditioning, unconditional, rng)
    return _sample(unet.module, scheduler, *args)


@partial(jax.jit, static_argnames=("module",))
def _decode(module, params, latents):
    return module.apply({"params": params}, latents, method="decode")


def decode(vae: Network, latents: Latents) -> UInt8[np.ndarray, "n H W 3"]:
    """Images of scaled latents, one at a time: a decoder's activations are large."""
    unscaled = latents / vae.config["scaling_factor"]
    return np.concatenate([to_uint8(_decode(vae.module, vae.params, row[None])) for row in unscaled])


def draw_noise(seed: int, n: int, latent_shape: Sequence[int]) -> Latents:
    """The initial noise of pictures 0..n-1; picture i has the same noise whatever n is."""
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(n))
    return jax.vmap(lambda key: jax.random.normal(key, tuple(latent_shape)))(keys)


def latent_distance(a: Latents, b: Latents) -> Float[np.ndarray, " n"]:
    """Mean squared difference of each pair of latents."""
    return np.square(np.asarray(a, np.float64) - np.asarray(b, np.float64)).mean(axis=(1, 2, 3))
