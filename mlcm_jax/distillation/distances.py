"""Distances between two predictions, in float32: one number an example."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from mlcm_jax.types import Latents

HUBER_C = 1e-3

Learnt = Callable[[Latents, Latents], Float[Array, " n"]]


def l2(a: Latents, b: Latents, learnt: Learnt | None = None) -> Float[Array, " n"]:
    """Mean squared difference."""
    return jnp.square(a - b).mean(axis=(1, 2, 3))


def pseudo_huber(a: Latents, b: Latents, learnt: Learnt | None = None) -> Float[Array, " n"]:
    """sqrt(d^2 + c^2) - c, elementwise and averaged, c = 1e-3 (arXiv 2310.14189, eq. 9; used by LCM)."""
    return (jnp.sqrt(jnp.square(a - b) + HUBER_C**2) - HUBER_C).mean(axis=(1, 2, 3))


def latent_lpips(a: Latents, b: Latents, learnt: Learnt | None = None) -> Float[Array, " n"]:
    """In the features of a network that has learnt what looks alike (arXiv 1801.03924; on latents, 2406.05768)."""
    if learnt is None:
        raise ValueError("latent_lpips needs a learnt distance")
    return learnt(a, b)


# (prediction, target, a learnt distance of latents where there is one)
Distance = Callable[[Latents, Latents, Learnt | None], Float[Array, " n"]]
DISTANCES: dict[str, Distance] = {"l2": l2, "pseudo_huber": pseudo_huber, "latent_lpips": latent_lpips}
