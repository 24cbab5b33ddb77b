"""Make a file of clean latents for config.latents: python launch/encode.py --model=DIR --images=DIR2 --out=FILE.

--images: a folder of pictures, taken in the order of their names, or an .npy file of uint8 [n, H, W, 3]; picture i
belongs to line i of the prompt file that the training is given. Without pictures, --prompts=FILE has the model draw
one for each line.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from absl import flags
from tqdm import tqdm

from mlcm_jax.cli import run_main
from mlcm_jax.conditioning import encode_prompts, unconditional
from mlcm_jax.data.latents import save_latents
from mlcm_jax.data.prompts import read_prompts
from mlcm_jax.diffusion.samplers import step_table
from mlcm_jax.errors import UserError
from mlcm_jax.evaluation.real_pictures import RealPictures
from mlcm_jax.generate import default_guidance_scale, draw_noise, encode, sample_latents
from mlcm_jax.hub.pipeline import Pipeline
from mlcm_jax.model_flags import load_model

IMAGES = flags.DEFINE_string("images", None, "Folder of pictures, or an .npy file of them.")
PROMPTS = flags.DEFINE_string("prompts", None, "Prompt file, to draw a picture for each line instead.")
STEPS = flags.DEFINE_integer("steps", 25, "Sampling steps, with --prompts.")
GUIDANCE_SCALE = flags.DEFINE_float("guidance_scale", None, "Default: 1 (none) for distilled models, 5 for others.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of the initial noise, with --prompts.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Pictures at a time.", lower_bound=1)
OUT = flags.DEFINE_string("out", None, "The latents file, .safetensors.", required=True)


def encoded(pipeline: Pipeline, images: str, image_size: int) -> Iterator[np.ndarray]:
    """Latents of the pictures, a batch at a time."""
    pictures, n = RealPictures(images, image_size), BATCH_SIZE.value
    for batch in tqdm(pictures.batches(n, len(pictures)), total=-(-len(pictures) // n), unit="batch"):
        padded = np.concatenate([batch, np.repeat(batch[-1:], n - len(batch), axis=0)])
        yield encode(pipeline.vae, padded)[: len(batch)]


def drawn(
    pipeline: Pipeline, prompt_file: str, image_size: int, latent_shape: tuple[int, int, int]
) -> Iterator[np.ndarray]:
    """Latents that the model draws for the prompts, a batch at a time."""
    prompts, n = read_prompts(prompt_file), BATCH_SIZE.value
    step_table(pipeline.scheduler_config, STEPS.value)  # answers a wrong --steps before anything is compiled
    noise = draw_noise(SEED.value, len(prompts), latent_shape)
    scale = GUIDANCE_SCALE.value
    for start in tqdm(range(0, len(prompts), n), unit="batch"):
        rows = np.arange(start, start + n) % len(prompts)
        latents = sample_latents(
            pipeline.unet,
            pipeline.scheduler_config,
            noise[rows],
            encode_prompts(pipeline, [prompts[i] for i in rows], image_size),
            unconditional(pipeline, n, image_size),
            guidance_scale=default_guidance_scale(pipeline) if scale is None else scale,
            num_steps=STEPS.value,
        )
        yield np.asarray(latents)[: len(prompts) - start]


def main():
    images, prompts = IMAGES.value, PROMPTS.value
    if (images is None) == (prompts is None):
        raise UserError("Give either --images, pictures to encode, or --prompts, for which the model draws some.")
    pipeline = load_model()
    side, channels = pipeline.unet.config["sample_size"], pipeline.unet.config.get("in_channels", 4)
    image_size = side * pipeline.downscale
    if prompts is None:
        batches = encoded(pipeline, str(images), image_size)
    else:
        batches = drawn(pipeline, prompts, image_size, (side, side, channels))
    latents = np.concatenate(list(batches))
    Path(OUT.value).parent.mkdir(parents=True, exist_ok=True)
    save_latents(latents, OUT.value)
    print(f"{OUT.value}: {len(latents)} latents of {list(latents.shape[1:])} (height, width, channels).")


if __name__ == "__main__":
    run_main(main)
