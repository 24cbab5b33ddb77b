"""All prompts of an evaluation drawn with one pipeline, batch by batch, from noise that every sampler shares."""

import dataclasses
import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jaxtyping import UInt8

from mlcm_jax.conditioning import encode_prompts, unconditional
from mlcm_jax.diffusion.samplers import step_table
from mlcm_jax.errors import UserError
from mlcm_jax.generate import decode, draw_noise, sample_latents
from mlcm_jax.hub.pipeline import Pipeline
from mlcm_jax.types import Latents

AFTER_ALL_PICTURES = 2**32 - 1  # folded into the seed where draw_noise folds in a picture's number


def latent_shape(pipeline: Pipeline) -> tuple[int, int, int]:
    """Height, width and channels of the latents that the model was trained on."""
    unet = pipeline.unet.config
    return unet["sample_size"], unet["sample_size"], unet.get("in_channels", 4)


def pixels(pipeline: Pipeline) -> int:
    """Height and width of its pictures."""
    return latent_shape(pipeline)[0] * 2 ** (len(pipeline.vae.config["block_out_channels"]) - 1)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A batch. rows: which prompts. latents: scaled. seconds: an image, sampling and decoding, without compiling."""

    rows: slice
    latents: Latents
    images: UInt8[np.ndarray, "n H W 3"]
    seconds: float


class Artist:
    """Draws prompts with one pipeline by its own scheduler; picture i has the same noise for every artist and n."""

    def __init__(
        self, pipeline: Pipeline, prompts: Sequence[str], *, name: str, guidance_scale: float, batch_size: int
    ):
        self.name, self.scheduler, self.guidance_scale = name, pipeline.scheduler_config["_class_name"], guidance_scale
        self._pipeline, self._size, self._programs = pipeline, min(batch_size, len(prompts)), set()
        self._conditioning = encode_prompts(pipeline, list(prompts), pixels(pipeline))
        self._unconditional = unconditional(pipeline, self._size, pixels(pipeline))

    def draw(self, num_steps: int, *, seed: int, n: int) -> Iterator[Drawn]:
        """The first n prompts. All batches have one size, so that a program compiles once; the last one is cut."""
        noise = draw_noise(seed, n, latent_shape(self._pipeline))
        sampler_rng = jax.random.fold_in(jax.random.key(seed), AFTER_ALL_PICTURES)
        self._compile(noise, num_steps)
        for batch, start in enumerate(range(0, n, self._size)):
            begin = time.perf_counter()
            latents, images = self._batch(noise, num_steps, start, jax.random.fold_in(sampler_rng, batch))
            seconds = (time.perf_counter() - begin) / self._size
            yield Drawn(slice(start, min(start + self._size, n)), latents[: n - start], images[: n - start], seconds)

    def _batch(self, noise: Latents, num_steps: int, start: int, rng: jax.Array) -> tuple[Latents, np.ndarray]:
        rows = np.arange(start, start + self._size) % len(noise)
        latents = sample_latents(
            self._pipeline.unet,
            self._pipeline.scheduler_config,
            noise[rows],
            jax.tree.map(lambda x: x[rows], self._conditioning),
            self._unconditional,
            guidance_scale=self.guidance_scale,
            num_steps=num_steps,
            rng=rng,
        )
        return latents, decode(self._pipeline.vae, latents)

    def _compile(self, noise: Latents, num_steps: int) -> None:
        """Draw a batch for nothing when the next one would meet a program that has not been compiled."""
        arrays = step_table(self._pipeline.scheduler_config, num_steps).arrays
        program = tuple((name, array.shape, array.dtype.name) for name, array in arrays.items())
        if program not in self._programs:
            self._batch(noise, num_steps, 0, jax.random.key(0))
            self._programs.add(program)


def check_samplers(pipelines: dict[str, Pipeline], steps: Sequence[int], reference_steps: int) -> None:
    """Raise UserError for a step count that a scheduler does not take, and for models that cannot share their noise."""
    for name, pipeline in pipelines.items():
        for num_steps in [*steps, reference_steps] if name == "baseline" else steps:
            step_table(pipeline.scheduler_config, num_steps)
    shapes = {name: list(latent_shape(pipeline)) for name, pipeline in pipelines.items()}
    if len({tuple(shape) for shape in shapes.values()}) > 1:
        raise UserError(
            f"The model's latents are {shapes['model']} and the baseline's {shapes['baseline']}: name a model that was "
            "distilled from this baseline."
        )
