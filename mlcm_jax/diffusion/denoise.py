"""Sampling any diffusers folder by the scheduler that its own scheduler_config.json names.

The scheduler is a table of numbers (mlcm_jax/diffusion/samplers.py) that one loop walks along. The numbers are
arguments of the compiled program, so that it serves every number of steps.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt32

from mlcm_jax.diffusion.guidance import Conditioning, Predict, guided_predict
from mlcm_jax.diffusion.parameterization import convert_output
from mlcm_jax.diffusion.samplers import StepTable, step_table
from mlcm_jax.errors import UserError
from mlcm_jax.types import Latents

AnyKey = Key[Array, ""] | UInt32[Array, "2"]


def sample(
    predict: Predict,
    scheduler_config: dict[str, Any],
    latents: Latents,
    conditioning: Conditioning,
    unconditional: Conditioning | None,
    guidance_scale: float | int,
    num_steps: int,
    rng: AnyKey | None = None,
    *,
    eta: float | int = 0.0,
) -> Float[Array, "n h w c"]:
    """Denoise standard normal ``latents`` to clean (still scaled) latents, float32. Call it inside ``jax.jit``.

    predict: (latents, timesteps[n], conditioning) -> network output. guidance_scale: as in diffusers, a value <= 1
    means no unconditional call. rng: the noise of LCMScheduler and of TCDScheduler with ``eta`` > 0.
    Raises UserError for a scheduler, a config value or a number of steps that is not supported.
    """
    table = step_table(scheduler_config, num_steps, eta)
    rng = noise_rng(table, rng)
    if guidance_scale > 1 and unconditional is None:
        raise UserError(f"guidance_scale={guidance_scale} needs the unconditional conditioning: pass it.")

    def network(x, timesteps):
        if guidance_scale > 1:
            return guided_predict(predict, x, timesteps, conditioning, unconditional, guidance_scale)
        return predict(x, timesteps, conditioning)

    return walk(network, table.prediction_type, table.arrays, latents, rng)


def noise_rng(table: StepTable, rng: AnyKey | None) -> AnyKey | None:
    """The key that the sampler needs, None where it adds no noise; raises UserError where one is needed and missing."""
    if not table.noise.any():
        return None
    if rng is None:
        raise UserError("This sampler adds fresh noise at each step: pass rng, a jax.random.key.")
    return rng


def walk(
    network: Callable[[Latents, Array], Latents],
    prediction_type: str,
    table: dict[str, Array],
    latents: Latents,
    rng: AnyKey | None,
) -> Float[Array, "n h w c"]:
    """Denoise standard normal ``latents`` along a table (``StepTable.arrays``, which may be traced).

    network: (latents, timesteps[n]) -> output, guided already. rng: None where the sampler adds no noise.
    """
    columns = {name: column for name, column in table.items() if column.ndim}

    def step(i, histories):
        samples, older_x0, older_eps = histories
        row = {name: column[i] for name, column in columns.items()}
        x = row["input_scale"] * samples[0]
        output = network(x, jnp.broadcast_to(row["timesteps"], x.shape[:1]))
        prediction = convert_output(prediction_type, output, x, row["alpha"], row["sigma"])
        x0s = (jnp.clip(prediction.x0, -table["clip_range"], table["clip_range"]), *older_x0)
        all_eps = (prediction.eps, *older_eps)
        x = _weighted(row["sample"], samples) + _weighted(row["x0"], x0s) + _weighted(row["eps"], all_eps)
        if rng is not None:
            x = x + row["noise"] * jax.random.normal(jax.random.fold_in(rng, i), x.shape)
        return (x, *samples[:-1]), x0s[: len(older_x0)], all_eps[: len(older_eps)]

    first = table["init_noise_sigma"] * latents.astype(jnp.float32)
    zeros = jnp.zeros_like(first)
    widths = (columns[name].shape[1] for name in ("sample", "x0", "eps"))
    older_samples, older_x0, older_eps = ((zeros,) * max(width - 1, 0) for width in widths)
    histories = jax.lax.fori_loop(0, table["num_calls"], step, ((first, *older_samples), older_x0, older_eps))
    return histories[0][0]


def timesteps(scheduler_config: dict[str, Any], num_steps: int) -> Int[np.ndarray, " m"] | Float[np.ndarray, " m"]:
    """The timesteps at which the network is called: int32, or float32 where Euler's spacing falls between them.

    One a step, save PNDM's one call more. Raises UserError as ``sample`` does.
    """
    return step_table(scheduler_config, num_steps).timesteps


def _weighted(weights: Float[Array, " k"], terms: tuple) -> Float[Array, "..."]:
    """Sum of the first k terms, each times its weight; 0 when k is 0."""
    return sum((weights[j] * terms[j] for j in range(weights.shape[0])), jnp.zeros(()))
