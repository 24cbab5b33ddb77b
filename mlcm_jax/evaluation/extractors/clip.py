"""The projected image embeddings of a transformers CLIPModel folder: those of CLIP-FID (arXiv 2203.06026)."""

from functools import partial
from pathlib import Path

from mlcm_jax.evaluation.extractors.base import Extract, ExtractorSpec
from mlcm_jax.rewards.clip_features import image_features, load_clip_encoder


def _load(folder: str | Path) -> Extract:
    return partial(image_features, load_clip_encoder(folder))


CLIP = ExtractorSpec("clip", _load, "images with captions: agreement with the text, not looks", independent=False)
