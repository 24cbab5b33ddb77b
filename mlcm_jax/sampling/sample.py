"""Clean latents from a pipeline's UNet: initial noise and sampling, compiled once for each size."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mlcm_jax.diffusion.denoise import denoise, noise_rng
from mlcm_jax.diffusion.guidance import guided_predict
from mlcm_jax.diffusion.samplers import step_table
from mlcm_jax.hub.pipeline import Network, Pipeline
from mlcm_jax.models.controlnet import Controlled
from mlcm_jax.models.unet import guidance_embedding
from mlcm_jax.rng import seed_key
from mlcm_jax.types import HostLatents, Latents, Params, TextConditioning

Conditioning = TextConditioning | Controlled  # the second of a UNet with ControlNets
DISTILLED = ("TCDScheduler", "LCMScheduler")


class ImageStart(NamedTuple):
    """An image that sampling starts from.

    latents: clean and scaled. strength: 0 to 1, the part of the steps that is taken. mask: 1 where it is made new.
    """

    latents: Float[np.ndarray, "1 h w c"]
    strength: float
    mask: Float[np.ndarray, "1 h w 1"] | None = None


def default_guidance_scale(pipeline: Pipeline) -> float:
    """1 (none) for the schedulers of distilled models, which have their guidance within; 5 for others.

    8.5 for a student that is conditioned on its guidance scale (arXiv 2310.04378), as diffusers' pipeline for it has
    it.
    """
    if _guidance_width(pipeline.unet):
        return 8.5
    return 1.0 if pipeline.scheduler_config["_class_name"] in DISTILLED else 5.0


def takes_negative_prompt(pipeline: Pipeline, guidance_scale: float | None = None) -> bool:
    """Whether sampling at this guidance scale, None being the usual one, has an unconditional call to change."""
    scale = default_guidance_scale(pipeline) if guidance_scale is None else guidance_scale
    return scale > 1 and not _guidance_width(pipeline.unet)


def _guidance_width(unet: Network) -> int | None:
    """Width of the guidance scale's embedding, for a student that is conditioned on it; None for all other networks."""
    return unet.config.get("time_cond_proj_dim")


@partial(jax.jit, static_argnames=("module", "prediction_type", "guidance_width"))
def sampling_program(
    module,
    prediction_type,
    guidance_width,
    table,
    variables,
    latents,
    conditioning,
    unconditional,
    guidance_scale,
    rng,
    image=None,
    mask=None,
):
    """What ``sample_latents`` runs."""
    predict = partial(module.apply, variables)
    timestep_cond = None
    if guidance_width:
        timestep_cond = guidance_embedding(jnp.full(latents.shape[:1], guidance_scale), guidance_width)

    def network(x, timesteps):
        if guidance_width or guidance_scale is None:
            return predict(x, timesteps, conditioning, timestep_cond)
        return guided_predict(predict, x, timesteps, conditioning, unconditional, guidance_scale)

    return denoise(network, prediction_type, table, latents, rng, image, mask)


def sample_latents(
    unet: Network,
    scheduler_config: dict[str, Any],
    latents: Latents,
    conditioning: Conditioning,
    unconditional: Conditioning,
    *,
    guidance_scale: float,
    num_steps: int,
    variables: Params | None = None,
    rng: Array | None = None,
    eta: float = 0.0,
    start: ImageStart | None = None,
) -> Latents:
    """Clean latents (scaled, float32) from standard normal noise; one program serves every number of steps.

    guidance_scale: a value <= 1 means no unconditional call; a network with ``time_cond_proj_dim`` takes it
    instead. variables: instead of {"params": unet.params}. rng: a key for samplers that add noise. eta: 0 to 1, how
    much of it TCDScheduler adds. start: an image to start from; as in diffusers, one with a mask and a strength of 1
    starts from the noise alone. Raises UserError for a scheduler, number of steps or strength that is not supported.
    """
    table, width = step_table(scheduler_config, num_steps, eta, start.strength if start else 1.0), _guidance_width(unet)
    if start and (start.mask is None or start.strength < 1):
        table = table.from_image()
    scale = jnp.float32(guidance_scale) if width or guidance_scale > 1 else None
    variables = {"params": unet.params} if variables is None else variables
    args = (table.arrays, variables, latents, conditioning, unconditional, scale, noise_rng(table, rng))
    edited = (start.latents, start.mask) if start else ()
    return sampling_program(unet.module, table.prediction_type, width, *args, *edited)


def draw_noise(seed: int, n: int, latent_shape: Sequence[int]) -> Latents:
    """The initial noise of images 0..n-1; image i has the same noise whatever n is."""
    keys = jax.vmap(partial(jax.random.fold_in, seed_key(seed)))(jnp.arange(n))
    return jax.vmap(lambda key: jax.random.normal(key, tuple(latent_shape)))(keys)


def latent_distance(a: Latents | HostLatents, b: Latents | HostLatents) -> Float[np.ndarray, " n"]:
    """Mean squared difference of each pair of latents."""
    return np.square(np.asarray(a, np.float64) - np.asarray(b, np.float64)).mean(axis=(1, 2, 3))
