"""Hinge losses between real and fake logits (arXiv 1705.02894; in latent space arXiv 2403.12015)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# logits of one head: any shape with the batch first
Logits = Float[Array, "n *rest"]


def discriminator_loss(real: Sequence[Logits], fake: Sequence[Logits]) -> Float[Array, ""]:
    """Mean over the heads of relu(1 - real) + relu(1 + fake)."""
    pairs = zip(real, fake, strict=True)
    return _mean(jax.nn.relu(1 - r).mean() + jax.nn.relu(1 + f).mean() for r, f in pairs)


def generator_loss(fake: Sequence[Logits]) -> Float[Array, ""]:
    """Mean over the heads of -fake."""
    return _mean(-f.mean() for f in fake)


def _mean(values) -> Float[Array, ""]:
    return jnp.stack(list(values)).mean()
