"""From prompts to images in one call, for programs and notebooks."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mlcm_jax.diffusion.samplers import step_table
from mlcm_jax.hub.lora import with_loras
from mlcm_jax.hub.pipeline import Pipeline
from mlcm_jax.image_size import ImageSize
from mlcm_jax.rng import seed_key
from mlcm_jax.sampling.conditioning import encode_prompts, unconditional
from mlcm_jax.sampling.control import AnyControl, check_controls, controlled, controlled_unet
from mlcm_jax.sampling.decode import decode, in_tiles
from mlcm_jax.sampling.image_to_image import checked_strength, image_start
from mlcm_jax.sampling.sample import default_guidance_scale, draw_noise, sample_latents
from mlcm_jax.types import Latents

SAMPLER_STREAM = 1  # of the noise that a sampler adds, beside the streams of images


@dataclasses.dataclass(frozen=True)
class TextToImage:
    """A pipeline as a function: ``TextToImage(pipeline)(["red heart"], num_steps=4, seed=0)``."""

    pipeline: Pipeline

    def noise(self, n: int, *, seed: int = 0, image_size: ImageSize | None = None) -> Latents:
        """The initial noise of n images; image_size: height and width in pixels, None: what the UNet was trained on.

        Raises UserError for a size that the networks cannot take.
        """
        return draw_noise(seed, n, self.pipeline.latent_shape(image_size))

    def with_loras(self, *loras: str) -> "TextToImage":
        """Another one with LoRAs, each PLACE or PLACE:SCALE, folded in; errors are ``hub.lora.with_loras``'s.

        A student's folder, which has a scheduler_config.json beside the LoRA, brings its sampler along.
        """
        return TextToImage(with_loras(self.pipeline, loras))

    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        num_steps: int = 4,
        guidance_scale: float | None = None,
        negative_prompt: str = "",
        seed: int = 0,
        image_size: ImageSize | None = None,
        latents: Latents | None = None,
        eta: float = 0.0,
        controls: Sequence[AnyControl] = (),
        image: Image.Image | None = None,
        strength: float | None = None,
        mask: Image.Image | None = None,
        vae_tiling: str = "auto",
    ) -> UInt8[np.ndarray, "n H W 3"]:
        """An image of each prompt; the arguments are those of ``sample``. vae_tiling: as ``decode`` takes it."""
        noise = self._start(prompts, seed, image_size, latents)
        in_tiles(self.pipeline.vae, noise, vae_tiling)  # answers a mistake before anything is compiled
        guidance = {"guidance_scale": guidance_scale, "negative_prompt": negative_prompt}
        settings = {"num_steps": num_steps, "seed": seed, "eta": eta, "controls": controls}
        start = {"image": image, "strength": strength, "mask": mask}
        latents = self.sample(prompts, latents=noise, **settings, **guidance, **start)
        return decode(self.pipeline.vae, latents, vae_tiling)

    def sample(
        self,
        prompts: str | Sequence[str],
        *,
        num_steps: int = 4,
        guidance_scale: float | None = None,
        negative_prompt: str = "",
        seed: int = 0,
        image_size: ImageSize | None = None,
        latents: Latents | None = None,
        eta: float = 0.0,
        controls: Sequence[AnyControl] = (),
        image: Image.Image | None = None,
        strength: float | None = None,
        mask: Image.Image | None = None,
    ) -> Latents:
        """Clean latents of each prompt, scaled, by the pipeline's own scheduler.

        guidance_scale: None takes the scheduler's usual one: 1 for students, 5 for teachers. negative_prompt: what a
        guidance scale above 1 leads away from; "": what the pipeline does without one. latents: initial noise,
        scaled to unit variance, instead of that of ``seed`` and ``image_size``; one prompt serves all of it.
        eta: 0 to 1, the noise that TCDScheduler adds. controls: ControlNets, T2I-Adapters and IP-Adapters, each with
        its image. image: what to start from, for all prompts, with the noise of the first step that is taken.
        strength: 0 to 1, the part of the steps that is taken; None: 0.5. mask: white where the image is made new.
        Raises UserError, before anything is compiled, for a number of steps or a size that cannot work.
        """
        noise, pipeline = self._start(prompts, seed, image_size, latents), self.pipeline
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        n, height, width, _ = noise.shape
        size = height * pipeline.downscale, width * pipeline.downscale
        strength = checked_strength(image, strength, mask)
        # what answers a mistake goes before the prompts are encoded
        table = step_table(pipeline.scheduler_config, num_steps, eta, strength)
        check_controls(controls)
        start = None if image is None else image_start(pipeline, image, strength, mask, size)
        unet, negative = pipeline.unet, unconditional(pipeline, n, size, negative_prompt)
        conditioning = encode_prompts(pipeline, prompts if len(prompts) == n else prompts * n, size)
        if controls:
            unet = controlled_unet(unet, controls)
            taken = table.timesteps, int(num_steps * strength)
            conditioning, negative = controlled(conditioning, negative, controls, size, *taken)
        return sample_latents(
            unet,
            pipeline.scheduler_config,
            noise,
            conditioning,
            negative,
            guidance_scale=default_guidance_scale(pipeline) if guidance_scale is None else guidance_scale,
            num_steps=num_steps,
            rng=jax.random.fold_in(seed_key(seed), SAMPLER_STREAM),
            eta=eta,
            start=start,
        )

    def _start(
        self, prompts: str | Sequence[str], seed: int, image_size: ImageSize | None, latents: Latents | None
    ) -> Latents:
        n = 1 if isinstance(prompts, str) else len(prompts)
        return self.noise(n, seed=seed, image_size=image_size) if latents is None else latents
