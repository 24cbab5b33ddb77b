"""Classifier-free guidance (arXiv 2207.12598, in the form eps_u + w (eps_c - eps_u))."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mlcm_jax.types import Latents

# A pytree of arrays [n ...]: the UNet's TextConditioning, or whatever the predict function takes.
Conditioning = TypeVar("Conditioning")
Predict = Callable[[Latents, Array, Conditioning], Latents]
GuidanceScale = float | int | Float[Array, ""] | Float[Array, " n"]


def guide(output_uncond: Latents, output_cond: Latents, guidance_scale: GuidanceScale) -> Latents:
    """output_uncond + w (output_cond - output_uncond) in float32; w is one number or one for each example.

    For a fixed z, eps, v and x0 are affine in each other, so guiding one guides them all.
    """
    scale = jnp.asarray(guidance_scale, jnp.float32)
    scale = scale.reshape(-1, 1, 1, 1) if scale.ndim else scale
    uncond, cond = output_uncond.astype(jnp.float32), output_cond.astype(jnp.float32)
    return uncond + scale * (cond - uncond)


def guided_predict(
    predict: Predict,
    z: Latents,
    timesteps: Array,
    conditioning: Conditioning,
    unconditional: Conditioning,
    guidance_scale: GuidanceScale,
) -> Latents:
    """Guided network output [n h w c], float32, from one call with the doubled batch (unconditional half first).

    predict: (latents, timesteps[n], conditioning) -> network output.
    """
    both = jax.tree.map(_joined, unconditional, conditioning)
    output = predict(_joined(z, z), _joined(timesteps, timesteps), both)
    uncond, cond = jnp.split(output, 2)
    return guide(uncond, cond, guidance_scale)


def _joined(first: Array, second: Array) -> Array:
    return jnp.concatenate([first, second])
