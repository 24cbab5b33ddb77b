"""Encode before a training what it would else encode on its way: clean latents, or text states.

    python launch/encode.py --model=DIR --images=DIR2 --out=latents.safetensors
    python launch/encode.py --model=DIR --prompts=FILE --out=latents.safetensors
    python launch/encode.py --model=DIR --prompts=FILE --sample_prompts=FILE2 --text_only --out=states.array_record

Latents are for config.latents. --images: a folder of pictures, taken in the order of their names, or an .npy file of
uint8 [n, H, W, 3]; picture i belongs to row i of the prompts that the training is given. Without pictures the model
draws one for each prompt. Text states are for config.text_states: with them a training holds no text encoders.
"""

from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from mlcm_jax.cli import run_main
from mlcm_jax.data.latents import save_latents
from mlcm_jax.data.prompts import open_prompts, read_prompts
from mlcm_jax.data.text_states import States, TextStatesWriter
from mlcm_jax.diffusion.samplers import step_table
from mlcm_jax.errors import UserError
from mlcm_jax.evaluation.real_images import RealImages
from mlcm_jax.hub.model_index import TEXT_ENCODERS
from mlcm_jax.hub.pipeline import Pipeline
from mlcm_jax.model_flags import load_model
from mlcm_jax.rng import MAX_SEED
from mlcm_jax.sampling.conditioning import encode_prompts, unconditional
from mlcm_jax.sampling.decode import encode
from mlcm_jax.sampling.sample import default_guidance_scale, draw_noise, sample_latents
from mlcm_jax.types import TextConditioning

IMAGES = flags.DEFINE_string("images", None, "Folder of pictures, or an .npy file of them.")
PROMPTS = flags.DEFINE_string("prompts", None, "Prompts, to draw a picture for each instead, or for --text_only.")
PROMPTS_COLUMN = flags.DEFINE_string("prompts_column", "", "Of a table or data set, as config.prompts_column.")
TEXT_ONLY = flags.DEFINE_bool("text_only", False, "Write text states instead of latents.")
SAMPLE_PROMPTS = flags.DEFINE_string("sample_prompts", None, "The training's config.sample.prompts, with --text_only.")
NEGATIVE_PROMPT = flags.DEFINE_string("negative_prompt", "", "The training's, with --text_only.")
DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Of text states and of the encoders' weights, as in training."
)
STEPS = flags.DEFINE_integer("steps", 25, "Sampling steps, where the model draws.")
GUIDANCE_SCALE = flags.DEFINE_float("guidance_scale", None, "Default: 1 (none) for distilled models, 5 for others.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of the initial noise, where the model draws.", 0, MAX_SEED)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Pictures or texts at a time.", lower_bound=1)
OUT = flags.DEFINE_string("out", None, "The file, .safetensors for latents.", required=True)


def encoded(pipeline: Pipeline, images: str, image_size: int) -> Iterator[np.ndarray]:
    """Latents of the pictures, a batch at a time."""
    pictures, n = RealImages(images, image_size), BATCH_SIZE.value
    for batch in tqdm(pictures.batches(n, len(pictures)), total=-(-len(pictures) // n), unit="batch"):
        padded = np.concatenate([batch, np.repeat(batch[-1:], n - len(batch), axis=0)])
        yield encode(pipeline.vae, padded)[: len(batch)]


def drawn(
    pipeline: Pipeline, prompts: list[str], image_size: int, latent_shape: tuple[int, int, int]
) -> Iterator[np.ndarray]:
    """Latents that the model draws for the prompts, a batch at a time."""
    n = BATCH_SIZE.value
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


def write_latents(images: str | None, prompts: str | None) -> str:
    """The file of latents; returns what it holds, in words."""
    pipeline = load_model()
    side, channels = pipeline.latent_side, pipeline.unet.config.get("in_channels", 4)
    image_size = side * pipeline.downscale
    if prompts is None:
        batches = encoded(pipeline, str(images), image_size)
    else:
        lines = read_prompts(prompts, PROMPTS_COLUMN.value)
        batches = drawn(pipeline, lines, image_size, (side, side, channels))
    latents = np.concatenate(list(batches))
    Path(OUT.value).parent.mkdir(parents=True, exist_ok=True)
    save_latents(latents, OUT.value)
    return f"{len(latents)} latents of {list(latents.shape[1:])} (height, width, channels)"


def write_text_states(prompts: str, sample_prompts: str) -> str:
    """The file of text states; returns what it holds, in words."""
    source, samples = open_prompts(prompts, PROMPTS_COLUMN.value), read_prompts(sample_prompts)
    pipeline, n = load_model(DTYPE.value, DTYPE.value, TEXT_ENCODERS), BATCH_SIZE.value

    def states(texts: list[str]) -> States:
        padded = texts + [""] * (-len(texts) % n)  # one shape, one program
        parts = [_states(encode_prompts(pipeline, padded[i : i + n], 0)) for i in range(0, len(padded), n)]
        return States(*(np.concatenate(part)[: len(texts)] for part in zip(*parts, strict=True)))

    writer, num_texts = TextStatesWriter(OUT.value), 0
    for start in tqdm(range(0, len(source), n), unit="batch"):
        rows = source.__getitems__(range(start, min(start + n, len(source))))
        whole, done = states([text for texts in rows for text in texts]), 0
        for texts in rows:
            writer.write(texts, States(*(part[done : done + len(texts)] for part in whole)))
            done += len(texts)
        num_texts += done
    negative = NEGATIVE_PROMPT.value
    writer.finish(_states(unconditional(pipeline, 1, 0, negative)), negative, states(samples), samples)
    return f"states of {num_texts} texts in {len(source)} rows, and of {len(samples)} sample prompts"


def _states(conditioning: TextConditioning) -> States:
    return States(*jax.device_get((conditioning.hidden_states, conditioning.pooled)))


def main():
    images, prompts, sample_prompts = IMAGES.value, PROMPTS.value, SAMPLE_PROMPTS.value
    if TEXT_ONLY.value:
        if prompts is None or sample_prompts is None or images is not None:
            raise UserError("--text_only takes --prompts and --sample_prompts, those of the training, and no --images.")
        held = write_text_states(prompts, sample_prompts)
    elif (images is None) == (prompts is None):
        raise UserError("Give either --images, pictures to encode, or --prompts, for which the model draws some.")
    else:
        held = write_latents(images, prompts)
    print(f"{OUT.value}: {held}.")


if __name__ == "__main__":
    run_main(main)
