"""The metrics, in the order in which a report shows those of one kind."""

from mlcm_jax.evaluation.metrics.background_noise import BACKGROUND_NOISE
from mlcm_jax.evaluation.metrics.base import ImageMetric, Metric, SeedMetric, SetMetric
from mlcm_jax.evaluation.metrics.diversity import DIVERSITY
from mlcm_jax.evaluation.metrics.frechet_distance import FRECHET_DISTANCE
from mlcm_jax.evaluation.metrics.high_frequency_energy import HIGH_FREQUENCY_ENERGY
from mlcm_jax.evaluation.metrics.kernel_distance import KERNEL_DISTANCE
from mlcm_jax.evaluation.metrics.latent_distance import LATENT_DISTANCE
from mlcm_jax.evaluation.metrics.noise_level import NOISE_LEVEL
from mlcm_jax.evaluation.metrics.perceptual_distance import PERCEPTUAL_DISTANCE
from mlcm_jax.evaluation.metrics.precision_recall import PRECISION, RECALL
from mlcm_jax.evaluation.metrics.seconds_per_image import SECONDS_PER_IMAGE

METRICS: tuple[Metric, ...] = (
    FRECHET_DISTANCE,
    KERNEL_DISTANCE,
    PRECISION,
    RECALL,
    HIGH_FREQUENCY_ENERGY,
    NOISE_LEVEL,
    BACKGROUND_NOISE,
    LATENT_DISTANCE,
    PERCEPTUAL_DISTANCE,
    SECONDS_PER_IMAGE,
    DIVERSITY,
)

SET_METRICS = tuple(metric for metric in METRICS if isinstance(metric, SetMetric))
IMAGE_METRICS = tuple(metric for metric in METRICS if isinstance(metric, ImageMetric))
SEED_METRICS = tuple(metric for metric in METRICS if isinstance(metric, SeedMetric))
