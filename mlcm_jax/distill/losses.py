"""Distances between two predictions, in float32: one number an example."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from mlcm_jax.types import Latents

HUBER_C = 1e-3


def l2(a: Latents, b: Latents) -> Float[Array, " n"]:
    """Mean squared difference."""
    return jnp.square(a - b).mean(axis=(1, 2, 3))


def pseudo_huber(a: Latents, b: Latents) -> Float[Array, " n"]:
    """sqrt(d^2 + c^2) - c, elementwise and averaged, c = 1e-3 (arXiv 2310.14189, eq. 9; used by LCM)."""
    return (jnp.sqrt(jnp.square(a - b) + HUBER_C**2) - HUBER_C).mean(axis=(1, 2, 3))


DISTANCES = {"l2": l2, "pseudo_huber": pseudo_huber}
