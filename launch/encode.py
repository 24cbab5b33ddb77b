"""Encode latents or text states before a training, which then reads them from a file.

    python launch/encode.py --model=DIR --images=DIR2 --out=latents.safetensors
    python launch/encode.py --model=DIR --prompts=FILE --out=latents.safetensors
    python launch/encode.py --model=DIR --prompts=FILE --sample_prompts=FILE2 --text_only --out=states.array_record

Latents are for config.latents. --images: a folder of images, taken in the order of their names, or an .npy file of
uint8 [n, H, W, 3]; image i belongs to row i of the prompts that the training is given. Without images the model
makes one for each prompt. Text states are for config.text_states: with them a training holds no text encoders. With
--text=DIR they are those of other text encoders, in another language say, of equal widths and length.
"""

from collections.abc import Iterator

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from mlcm_jax.cli import run_main
from mlcm_jax.data.latents import save_latents
from mlcm_jax.data.prompts import open_prompts, read_prompts
from mlcm_jax.data.real_images import RealImages
from mlcm_jax.data.text_states import TextState, TextStatesWriter
from mlcm_jax.errors import UserError
from mlcm_jax.hub.model_index import TEXT_ENCODERS
from mlcm_jax.hub.pipeline import Pipeline
from mlcm_jax.image_size import ImageSize
from mlcm_jax.model_flags import load_model
from mlcm_jax.outputs import check_file
from mlcm_jax.rng import MAX_SEED
from mlcm_jax.sampling.conditioning import encode_prompts, unconditional
from mlcm_jax.sampling.decode import encode
from mlcm_jax.sampling.text_to_image import TextToImage
from mlcm_jax.size_flags import flagged_size
from mlcm_jax.types import TextConditioning

IMAGES = flags.DEFINE_string("images", None, "Folder of images, or an .npy file of them.")
PROMPTS = flags.DEFINE_string("prompts", None, "Prompts, to make an image for each instead, or for --text_only.")
PROMPTS_COLUMN = flags.DEFINE_string("prompts_column", "", "Of a table or data set, as config.prompts_column.")
TEXT_ONLY = flags.DEFINE_bool("text_only", False, "Write text states instead of latents.")
SAMPLE_PROMPTS = flags.DEFINE_string("sample_prompts", None, "The training's config.sample.prompts, with --text_only.")
NEGATIVE_PROMPT = flags.DEFINE_string("negative_prompt", "", "The training's, with --text_only.")
DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Of text states and of the encoders' weights, as in training."
)
STEPS = flags.DEFINE_integer("steps", 25, "Sampling steps, where the model makes images.")
GUIDANCE_SCALE = flags.DEFINE_float("guidance_scale", None, "Default: 1 (none) for distilled models, 5 for others.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of the initial noise, where the model makes images.", 0, MAX_SEED)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Images or texts at a time.", lower_bound=1)
OUT = flags.DEFINE_string("out", None, "The file, .safetensors for latents.", required=True)


def encoded(pipeline: Pipeline, place: str, image_size: ImageSize) -> Iterator[np.ndarray]:
    """Latents of the images, a batch at a time."""
    images, n = RealImages(place, image_size), BATCH_SIZE.value
    for batch in tqdm(images.batches(n, len(images)), total=-(-len(images) // n), unit="batch"):
        padded = np.concatenate([batch, np.repeat(batch[-1:], n - len(batch), axis=0)])
        yield encode(pipeline.vae, padded)[: len(batch)]


def sampled(pipeline: Pipeline, prompts: list[str]) -> Iterator[np.ndarray]:
    """Latents that the model samples for the prompts, a batch at a time."""
    n, sampler = BATCH_SIZE.value, TextToImage(pipeline)
    noise = sampler.noise(len(prompts), seed=SEED.value, image_size=flagged_size())
    for start in tqdm(range(0, len(prompts), n), unit="batch"):
        rows = np.arange(start, start + n) % len(prompts)
        latents = sampler.sample(
            [prompts[i] for i in rows],
            latents=noise[rows],
            num_steps=STEPS.value,
            guidance_scale=GUIDANCE_SCALE.value,
            seed=SEED.value,
        )
        yield np.asarray(latents)[: len(prompts) - start]


def write_latents(images: str | None, prompts: str | None) -> str:
    """The file of latents; returns what it holds, in words."""
    pipeline = load_model()
    if prompts is None:
        size = flagged_size() or pipeline.image_size
        pipeline.latent_shape(size)  # answers a size that cannot be
        batches = encoded(pipeline, str(images), size)
    else:
        batches = sampled(pipeline, read_prompts(prompts, PROMPTS_COLUMN.value))
    latents = np.concatenate(list(batches))
    save_latents(latents, OUT.value)
    return f"{len(latents)} latents of {list(latents.shape[1:])} (height, width, channels)"


def write_text_states(prompts: str, sample_prompts: str) -> str:
    """The file of text states; returns what it holds, in words."""
    source, samples = open_prompts(prompts, PROMPTS_COLUMN.value), read_prompts(sample_prompts)
    pipeline, n = load_model(DTYPE.value, DTYPE.value, TEXT_ENCODERS), BATCH_SIZE.value

    def states(texts: list[str]) -> TextState:
        padded = texts + [""] * (-len(texts) % n)  # one shape, one program
        parts = [_states(encode_prompts(pipeline, padded[i : i + n], 0)) for i in range(0, len(padded), n)]
        return TextState(*(np.concatenate(part)[: len(texts)] for part in zip(*parts, strict=True)))

    writer, num_texts = TextStatesWriter(OUT.value), 0
    for start in tqdm(range(0, len(source), n), unit="batch"):
        rows = source.__getitems__(range(start, min(start + n, len(source))))
        whole, done = states([text for texts in rows for text in texts]), 0
        for texts in rows:
            writer.write(texts, TextState(*(part[done : done + len(texts)] for part in whole)))
            done += len(texts)
        num_texts += done
    negative = NEGATIVE_PROMPT.value
    writer.finish(_states(unconditional(pipeline, 1, 0, negative)), negative, states(samples), samples)
    return f"states of {num_texts} texts in {len(source)} rows, and of {len(samples)} sample prompts"


def _states(conditioning: TextConditioning) -> TextState:
    return TextState(*jax.device_get((conditioning.hidden_states, conditioning.pooled)))


def main():
    check_file("out", OUT.value)
    images, prompts, sample_prompts = IMAGES.value, PROMPTS.value, SAMPLE_PROMPTS.value
    if TEXT_ONLY.value:
        if prompts is None or sample_prompts is None or images is not None:
            raise UserError("--text_only takes --prompts and --sample_prompts, those of the training, and no --images.")
        held = write_text_states(prompts, sample_prompts)
    elif (images is None) == (prompts is None):
        raise UserError("Give either --images, images to encode, or --prompts, for which the model makes some.")
    else:
        held = write_latents(images, prompts)
    print(f"{OUT.value}: {held}.")


if __name__ == "__main__":
    run_main(main)
