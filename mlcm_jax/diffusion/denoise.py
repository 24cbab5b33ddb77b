"""Sampling any diffusers folder by the scheduler that its own scheduler_config.json names.

The scheduler is a table of numbers (mlcm_jax/diffusion/samplers.py) that one loop goes through. The numbers are
arguments of the compiled program, so that it serves every number of steps.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mlcm_jax.diffusion.parameterization import convert_output
from mlcm_jax.diffusion.step_table import StepTable
from mlcm_jax.errors import UserError
from mlcm_jax.types import AnyKey, Latents


def noise_rng(table: StepTable, rng: AnyKey | None) -> AnyKey | None:
    """The key that the sampler needs, None where it adds no noise; raises UserError where one is needed and missing."""
    if not table.noise.any():
        return None
    if rng is None:
        raise UserError("This sampler adds fresh noise at each step: pass rng, a jax.random.key.")
    return rng


def denoise(
    network: Callable[[Latents, Array], Latents],
    prediction_type: str,
    table: dict[str, Array],
    latents: Latents,
    rng: AnyKey | None,
    image: Float[Array, "#n h w c"] | None = None,
    mask: Float[Array, "#n h w 1"] | None = None,
) -> Float[Array, "n h w c"]:
    """Denoise standard normal ``latents`` by a table (``StepTable.arrays``, which may be traced).

    network: (latents, timesteps[n]) -> output, guided already. rng: None where the sampler adds no noise. image: clean
    latents to start from, of a table that is made ``from_image``. mask: 1 where they are made new; where it is 0 each
    step is followed by the image with the noise ``latents`` at the next step's level, and the last by the image.
    """
    columns = {name: column for name, column in table.items() if column.ndim}
    noise = latents.astype(jnp.float32)

    def row_of(i):
        return {name: column[i] for name, column in columns.items()}

    def known(i, image):
        def noised():
            level = row_of(i)
            return (level["alpha"] * image + level["sigma"] * noise) / level["input_scale"]

        return jax.lax.cond(i < table["num_calls"], noised, lambda: jnp.broadcast_to(image, noise.shape))

    def step(i, histories):
        samples, older_x0, older_eps = histories
        row = row_of(i)
        x = row["input_scale"] * samples[0]
        output = network(x, jnp.broadcast_to(row["timesteps"], x.shape[:1]))
        prediction = convert_output(prediction_type, output, x, row["alpha"], row["sigma"])
        x0s = (jnp.clip(prediction.x0, -table["clip_range"], table["clip_range"]), *older_x0)
        all_eps = (prediction.eps, *older_eps)
        x = _weighted(row["sample"], samples) + _weighted(row["x0"], x0s) + _weighted(row["eps"], all_eps)
        if rng is not None:
            x = x + row["noise"] * jax.random.normal(jax.random.fold_in(rng, i), x.shape)
        if image is not None and mask is not None:
            x = mask * x + (1 - mask) * known(i + 1, image)
        return (x, *samples[:-1]), x0s[: len(older_x0)], all_eps[: len(older_eps)]

    first = table["init_noise_sigma"] * noise
    if image is not None:
        first = first + table["init_image"] * image
    zeros = jnp.zeros_like(first)
    widths = (columns[name].shape[1] for name in ("sample", "x0", "eps"))
    older_samples, older_x0, older_eps = ((zeros,) * max(width - 1, 0) for width in widths)
    histories = jax.lax.fori_loop(0, table["num_calls"], step, ((first, *older_samples), older_x0, older_eps))
    return histories[0][0]


def _weighted(weights: Float[Array, " k"], terms: tuple) -> Float[Array, "..."]:
    """Sum of the first k terms, each times its weight; 0 when k is 0."""
    return sum((weights[j] * terms[j] for j in range(weights.shape[0])), jnp.zeros(()))
