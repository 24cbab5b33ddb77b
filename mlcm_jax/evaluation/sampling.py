"""Samples of all prompts of an evaluation by one pipeline, batch by batch, from noise that every sampler shares."""

import dataclasses
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from mlcm_jax.diffusion.samplers import step_table
from mlcm_jax.hub.pipeline import Pipeline
from mlcm_jax.image_size import ImageSize
from mlcm_jax.rng import seed_key
from mlcm_jax.sampling.conditioning import encode_prompts, unconditional
from mlcm_jax.sampling.decode import decode
from mlcm_jax.sampling.sample import draw_noise, sample_latents
from mlcm_jax.sampling.side_by_side import check_shared_noise
from mlcm_jax.types import Latents

AFTER_ALL_IMAGES = 2**32 - 1  # folded into the seed where draw_noise folds in an image's index


@dataclasses.dataclass(frozen=True)
class SampledBatch:
    """indices: of its images. latents: scaled. seconds: an image, sampling and decoding, without compiling."""

    indices: slice
    latents: Latents
    images: UInt8[np.ndarray, "n H W 3"]
    seconds: float


class Sampler:
    """Samples prompts with one pipeline by its own scheduler; image i has the same noise for every sampler and n."""

    def __init__(
        self,
        pipeline: Pipeline,
        prompts: Sequence[str],
        *,
        name: str,
        guidance_scale: float,
        batch_size: int,
        image_size: ImageSize | None = None,
    ):
        self.name, self.scheduler, self.guidance_scale = name, pipeline.scheduler_config["_class_name"], guidance_scale
        self._pipeline, self._size, self._programs = pipeline, min(batch_size, len(prompts)), set()
        self._latent_shape, size = pipeline.latent_shape(image_size), image_size or pipeline.image_size
        self._conditioning = encode_prompts(pipeline, list(prompts), size)
        self._unconditional = unconditional(pipeline, self._size, size)

    def sample(self, num_steps: int, *, seeds: Sequence[int], n: int) -> Iterator[SampledBatch]:
        """The first n prompts from the first seed's noise, then from the next one's.

        All batches have one size, so that a program compiles once; the last one is cut.
        """
        noise = jnp.concatenate([draw_noise(seed, n, self._latent_shape) for seed in seeds])
        sampler_rng = jax.random.fold_in(seed_key(seeds[0]), AFTER_ALL_IMAGES)
        self._compile(noise, num_steps, n)
        for batch, start in enumerate(range(0, len(noise), self._size)):
            begin = time.perf_counter()
            latents, images = self._batch(noise, num_steps, start, n, jax.random.fold_in(sampler_rng, batch))
            seconds = (time.perf_counter() - begin) / self._size
            indices = slice(start, min(start + self._size, len(noise)))
            yield SampledBatch(indices, latents[: indices.stop - start], images[: indices.stop - start], seconds)

    def _batch(self, noise: Latents, num_steps: int, start: int, n: int, rng: jax.Array) -> tuple[Latents, np.ndarray]:
        indices = np.arange(start, start + self._size) % len(noise)
        latents = sample_latents(
            self._pipeline.unet,
            self._pipeline.scheduler_config,
            noise[indices],
            jax.tree.map(lambda x: x[indices % n], self._conditioning),
            self._unconditional,
            guidance_scale=self.guidance_scale,
            num_steps=num_steps,
            rng=rng,
        )
        return latents, decode(self._pipeline.vae, latents)

    def _compile(self, noise: Latents, num_steps: int, n: int) -> None:
        """Sample a batch, and forget it, when the next one would meet a program that has not been compiled."""
        arrays = step_table(self._pipeline.scheduler_config, num_steps).arrays
        program = tuple((name, array.shape, array.dtype.name) for name, array in arrays.items())
        if program not in self._programs:
            self._batch(noise, num_steps, 0, n, jax.random.key(0))
            self._programs.add(program)


def check_samplers(
    pipelines: dict[str, Pipeline], steps: Sequence[int], reference_steps: int, image_size: ImageSize | None = None
) -> None:
    """Raise UserError for a step count that a scheduler does not take, and for models that cannot share their noise."""
    for name, pipeline in pipelines.items():
        for num_steps in [*steps, reference_steps] if name == "baseline" else steps:
            step_table(pipeline.scheduler_config, num_steps)
    check_shared_noise(pipelines, image_size)
