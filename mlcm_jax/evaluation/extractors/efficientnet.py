"""Features of EfficientNet-Lite, which has seen neither captions nor the images of examples/emoji."""

from mlcm_jax.evaluation.extractors.base import PHOTOGRAPHS, ExtractorSpec
from mlcm_jax.rewards.efficientnet_features import load_efficientnet

EFFICIENTNET = ExtractorSpec("efficientnet", load_efficientnet, PHOTOGRAPHS, independent=True, components=256)
