"""The distance of latents from the baseline's reference sample."""

from mlcm_jax.evaluation.metrics.base import ImageMetric
from mlcm_jax.sampling.sample import latent_distance

LATENT_DISTANCE = ImageMetric(
    "latent_mse", "latent distance", "lower", 4, latent_distance, needs=("latents", "baseline_latents")
)
