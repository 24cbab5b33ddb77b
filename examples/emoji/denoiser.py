"""The emoji denoiser's loss, its data and the pipeline around it; both of its trainings use them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from recipe import MODEL_INDEX, SCHEDULER_CONFIG, UNET_CONFIG

from mlcm_jax.diffusion.parameterization import add_noise
from mlcm_jax.diffusion.schedule import Schedule, alpha_sigma
from mlcm_jax.hub.pipeline import Network, Pipeline, load_network, network_shapes
from mlcm_jax.hub.tokenizer import load_tokenizer
from mlcm_jax.models.attention_backend import AUTO, AttentionBackend
from mlcm_jax.models.unet import UNet2DConditionModel
from mlcm_jax.sampling.decode import encode

CAPTION_DROPOUT = 0.1
MIN_SNR_GAMMA = 5.0
GRID_PROMPTS = Path(__file__).resolve().parent / "prompts" / "grid.txt"
GRID_STEPS = 25
CHUNK = 64  # images that are encoded at a time


def make_loss(predict: Callable[..., Array], schedule: Schedule, *, caption_dropout: float = CAPTION_DROPOUT):
    """Noise prediction with min-SNR weights (arXiv 2303.09556), timesteps stratified over the batch.

    (params, (latents, conditioning, ...), key) -> loss and {"mse"}, float32 whatever the network computes in.
    predict: (params, noisy latents, timesteps, conditioning, ...) -> noise, with what else the batch has.
    """

    def loss_fn(params, batch, key) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        latents, conditioning, *more = batch
        n = latents.shape[0]
        t_key, noise_key, drop_key, offset_key = jax.random.split(key, 4)
        offset = jax.random.uniform(offset_key, (n,))
        t = (1000 * (jax.random.permutation(t_key, n) + offset) / n).astype(jnp.int32)
        noise = jax.random.normal(noise_key, latents.shape)
        keep = jax.random.bernoulli(drop_key, 1 - caption_dropout, (n,))
        conditioning = conditioning.replace(
            hidden_states=conditioning.hidden_states * keep[:, None, None], pooled=conditioning.pooled * keep[:, None]
        )
        eps = predict(params, add_noise(schedule, latents, noise, t), t, conditioning, *more)
        error = jnp.square(eps.astype(jnp.float32) - noise).mean(axis=(1, 2, 3))
        alpha, sigma = alpha_sigma(schedule, t)
        weight = jnp.minimum(1.0, MIN_SNR_GAMMA * jnp.square(sigma / alpha))[:, 0, 0, 0]
        return (weight * error).mean(), {"mse": error.mean()}

    return loss_fn


def unet_predict(unet: UNet2DConditionModel) -> Callable[..., Array]:
    """The UNet as ``make_loss`` takes it."""
    return lambda params, *inputs: unet.apply({"params": params}, *inputs)


def encode_images(vae: Network, images: UInt8[np.ndarray, "n H W 3"]) -> Float[np.ndarray, "n h w c"]:
    """Scaled latents, the means of the encoder's distributions, float32."""
    padded = np.concatenate([images, np.repeat(images[-1:], -len(images) % CHUNK, axis=0)])
    return np.concatenate([encode(vae, chunk) for chunk in np.split(padded, len(padded) // CHUNK)])[: len(images)]


def load_parts(folder: Path, *, attention: AttentionBackend = AUTO, dtype: Any = jnp.float32) -> Pipeline:
    """The pipeline with a UNet yet to be trained: ``unet.params`` are shapes. dtype: that it computes in."""
    unet = UNet2DConditionModel.from_config(UNET_CONFIG, dtype=dtype, attention=attention)
    shapes = network_shapes(unet, UNET_CONFIG)
    parts = {
        part: load_network(folder / part, MODEL_INDEX[part][1], param_dtype=jnp.float32)
        for part in ("vae", "text_encoder", "text_encoder_2")
    }
    return Pipeline(
        unet=Network(unet, shapes, UNET_CONFIG),
        vae=parts["vae"],
        text_encoders=(parts["text_encoder"], parts["text_encoder_2"]),
        tokenizers=tuple(load_tokenizer(folder / t, "CLIPTokenizer") for t in ("tokenizer", "tokenizer_2")),
        scheduler_config=SCHEDULER_CONFIG,
        model_index=MODEL_INDEX,
        folder=folder,
    )
