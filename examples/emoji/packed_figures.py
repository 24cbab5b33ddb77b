"""What a finished denoiser is measured by: a grid of samples, CLIP score and Frechet distance."""

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from denoiser import GRID_PROMPTS, GRID_STEPS
from jaxtyping import UInt8
from packed import Packed
from PIL import Image
from recipe import IMAGE_SIZE

from mlcm_jax.data.prompts import read_prompts
from mlcm_jax.evaluation.extractors.registry import load_extractor
from mlcm_jax.evaluation.measure import set_figures
from mlcm_jax.evaluation.metrics.base import FeaturePair
from mlcm_jax.evaluation.provenance import provenance
from mlcm_jax.evaluation.statistics.bootstrap import Figure, mean_figure
from mlcm_jax.hub.pipeline import Pipeline
from mlcm_jax.hub.save import write_json
from mlcm_jax.images import image_grid
from mlcm_jax.rewards.registry import REWARD_MODELS, kind_of
from mlcm_jax.rewards.reward_model import batch_indices
from mlcm_jax.sampling.conditioning import encode_prompts, unconditional
from mlcm_jax.sampling.decode import decode
from mlcm_jax.sampling.sample import draw_noise, sample_latents

GUIDANCE_SCALES = (3.0, 5.0)
CHUNK = 128  # samples that are drawn at a time
RESAMPLES = 50  # of the distances between sets
SEED = 0  # launch/evaluate.py's, so that both draw the same images


def draw(pipeline: Pipeline, prompts: Sequence[str], guidance_scale: float) -> UInt8[np.ndarray, "n H W 3"]:
    """An image of each prompt in 25 steps, float32; image i has the noise that launch/evaluate.py gives it."""
    side, channels = pipeline.unet.config["sample_size"], pipeline.unet.config["in_channels"]
    noise = draw_noise(SEED, len(prompts), (side, side, channels))
    text = encode_prompts(pipeline, prompts, IMAGE_SIZE)
    empty = unconditional(pipeline, min(CHUNK, len(prompts)), IMAGE_SIZE)
    images = []
    for indices in batch_indices(len(prompts), CHUNK):
        conditioning = jax.tree.map(lambda a, indices=indices: a[indices], text)
        latents = sample_latents(
            pipeline.unet,
            pipeline.scheduler_config,
            noise[indices],
            conditioning,
            empty,
            guidance_scale=guidance_scale,
            num_steps=GRID_STEPS,
        )
        images.append(decode(pipeline.vae, latents))
    return np.concatenate(images)[: len(prompts)]


def measure(
    pipeline: Pipeline, packed: Packed, out: Path, *, num_images: int, scorers: dict[str, str], features: dict[str, str]
) -> None:
    """Write OUT/grid.png, the grid's prompts at both guidance scales, and OUT/figures.json.

    num_images: captions of the packed real images that are drawn and compared, the first ones; 0: the grid alone.
    scorers, features: {name: folder}, as launch/evaluate.py takes them.
    """
    begin = time.perf_counter()
    grid_prompts, captions = read_prompts(GRID_PROMPTS), packed.real_captions[:num_images]
    extractors = {name: load_extractor(name, place) for name, place in features.items()} if captions else {}
    models = {name: REWARD_MODELS[kind_of(name)].load(place) for name, place in scorers.items()} if captions else {}
    real = {name: extractor.extract(packed.real[:num_images]) for name, extractor in extractors.items()}
    grids, rows = [], []
    for guidance_scale in GUIDANCE_SCALES:
        images = draw(pipeline, [*captions, *grid_prompts], guidance_scale)
        drawn = images[: len(captions)]
        grids.append(image_grid(images[len(captions) :], columns=8))
        row = {f"{name}_score": summary(mean_figure(score(drawn, captions))) for name, score in models.items()}
        for name, extractor in extractors.items():
            compared = extractor.extract(drawn), real[name]
            found = set_figures(FeaturePair(*compared, True, RESAMPLES, extractor.spec.components))
            row |= {f"{metric}/{name}": summary(figure) for metric, figure in found.items()}
        rows.append({"guidance_scale": guidance_scale, "images": len(captions), "steps": GRID_STEPS, **row})
        print(json.dumps(rows[-1]), flush=True)
    Image.fromarray(image_grid(np.stack(grids), columns=1, gap=8)).save(out / "grid.png")
    seconds = round(time.perf_counter() - begin, 1)
    write_json({**provenance(), "figures": rows, "seconds": seconds}, out / "figures.json")


def summary(figure: Figure) -> dict[str, float | list[float]]:
    """Value and its 95 % bootstrap interval."""
    return {"value": figure.value, "interval": list(figure.interval)}


def with_weights(pipeline: Pipeline, params: dict) -> Pipeline:
    """The pipeline with trained weights, computing in float32 from what float16 keeps of them, as they are stored."""
    stored = jax.tree.map(lambda p: p.astype(np.float16).astype(np.float32), jax.device_get(params))
    unet = dataclasses.replace(
        pipeline.unet, module=pipeline.unet.module.clone(dtype=jnp.float32), params=jax.device_put(stored)
    )
    return dataclasses.replace(pipeline, unet=unet)
