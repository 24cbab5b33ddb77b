"""How alike a model draws from Chinese and from English: examples/emoji/measure_chinese.py --data_dir=DIR --model=DIR.

For captions of both splits, from the same noise: images drawn from the English caption, from the Chinese one by each
--text, and from the English caption of another image. A JSON object a split:

    prediction  squared difference of the UNet's outputs for the English and the other conditioning, at noisy latents of
                the English images, as a part of the difference between English and none
    latents     squared distance of the drawn latents to the English ones
    clip_score  of the drawn images against the English captions
    unseen      that of the captions with a Chinese character that no training caption has, and their number
"""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from emoji_dataset.chinese import chinese_captions
from emoji_dataset.dataset import load_split
from PIL import Image
from recipe import IMAGE_SIZE

from mlcm_jax.cli import run_main
from mlcm_jax.data.prompts import read_prompts
from mlcm_jax.diffusion.parameterization import add_noise
from mlcm_jax.diffusion.schedule import Schedule
from mlcm_jax.hub.pipeline import load_pipeline
from mlcm_jax.hub.text import with_text
from mlcm_jax.images import image_grid
from mlcm_jax.rewards.clip_score import load_clip_score
from mlcm_jax.sampling.conditioning import encode_prompts, unconditional
from mlcm_jax.sampling.decode import decode
from mlcm_jax.sampling.sample import draw_noise, latent_distance, sample_latents

HERE = Path(__file__).resolve().parent

DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder that build_data.py wrote.", required=True)
MODEL = flags.DEFINE_string("model", str(HERE / "teacher"), "The teacher's folder or a student's.")
TEXT = flags.DEFINE_multi_string("text", str(HERE / "chinese"), "Chinese text encoders; give it again to compare.")
SCORER = flags.DEFINE_string("scorer", str(HERE / "scorer"), "Folder of a CLIPModel with its tokenizer.")
NUM_IMAGES = flags.DEFINE_integer("num_images", 128, "Captions of each split.", lower_bound=2)
STEPS = flags.DEFINE_integer("steps", 8, "Sampling steps.")
GUIDANCE_SCALE = flags.DEFINE_float("guidance_scale", 5.0, "1 for a student, which has it within.")
OUT = flags.DEFINE_string("out", None, "Folder for grids: English above, below it Chinese by each --text.")

IN_GRID = 8


def choose_captions(split: str) -> tuple[list[str], list[str]]:
    """English and Chinese captions without a skin tone, drawn with a fixed seed."""
    data = load_split(DATA_DIR.value, split)
    plain = [i for i, tone in enumerate(data["skin_tone"]) if not tone]
    rows = np.random.default_rng(0).permutation(plain)[: NUM_IMAGES.value]
    chinese = chinese_captions(data)
    return [data["caption"][i] for i in rows], [chinese[i] for i in rows]


def predictions(unet, schedule: Schedule, latents, conditionings: dict) -> dict[str, jax.Array]:
    """The UNet's outputs at one noise level for each image, by conditioning."""
    n = len(latents)
    t = jnp.asarray((np.arange(n) * 1000 + 500) // n, jnp.int32)
    z = add_noise(schedule, latents, jax.random.normal(jax.random.key(1), latents.shape), t)
    apply = jax.jit(partial(unet.module.apply, {"params": unet.params}))
    return {who: apply(z, t, conditioning) for who, conditioning in conditionings.items()}


def measure(pipeline, chinese_pipelines: dict, score, split: str) -> dict[str, dict[str, float]]:
    english, chinese = choose_captions(split)
    n, side = len(english), pipeline.unet.config["sample_size"]
    none = unconditional(pipeline, n, IMAGE_SIZE)
    conditionings = {
        "english": encode_prompts(pipeline, english, IMAGE_SIZE),
        **{who: encode_prompts(one, chinese, IMAGE_SIZE) for who, one in chinese_pipelines.items()},
        "another": encode_prompts(pipeline, [*english[1:], english[0]], IMAGE_SIZE),
    }
    noise = draw_noise(0, n, (side, side, pipeline.unet.config["in_channels"]))
    draw = partial(sample_latents, guidance_scale=GUIDANCE_SCALE.value, num_steps=STEPS.value)
    latents = {
        who: draw(pipeline.unet, pipeline.scheduler_config, noise, conditioning, none, rng=jax.random.key(2))
        for who, conditioning in conditionings.items()
    }
    images = {who: decode(pipeline.vae, one) for who, one in latents.items()}
    schedule = Schedule.from_config(pipeline.scheduler_config)
    outputs = predictions(pipeline.unet, schedule, latents["english"], conditionings | {"none": none})
    difference = {who: float(jnp.square(one - outputs["english"]).mean()) for who, one in outputs.items()}
    if OUT.value:
        grid = image_grid(
            np.concatenate([images[who][:IN_GRID] for who in images if who != "another"]), columns=IN_GRID
        )
        Path(OUT.value).mkdir(parents=True, exist_ok=True)
        Image.fromarray(grid).save(Path(OUT.value) / f"{split}.png")
        print("\n".join(f"{a} | {b}" for a, b in zip(english[:IN_GRID], chinese[:IN_GRID], strict=True)))
    scores = {who: np.asarray(score(one, english)) for who, one in images.items()}
    seen = set("".join(read_prompts(HERE / "prompts" / "chinese" / "train.txt")))
    unseen = np.array([bool(set(caption) - seen) for caption in chinese])
    others = [who for who in images if who != "english"]
    measured = {
        "prediction": {who: difference[who] / difference["none"] for who in others},
        "latents": {who: float(latent_distance(latents[who], latents["english"]).mean()) for who in others},
        "clip_score": {who: float(one.mean()) for who, one in scores.items()},
    }
    if unseen.any():
        measured["unseen"] = {who: float(one[unseen].mean()) for who, one in scores.items()} | {
            "captions": unseen.sum()
        }
    return measured


def main():
    pipeline = load_pipeline(MODEL.value)
    chinese_pipelines = {folder: with_text(pipeline, folder) for folder in TEXT.value}
    score = load_clip_score(SCORER.value)
    for split in ("train", "heldout"):
        measured = measure(pipeline, chinese_pipelines, score, split)
        rounded = {key: {who: round(float(value), 4) for who, value in row.items()} for key, row in measured.items()}
        print(json.dumps({split: rounded}))


if __name__ == "__main__":
    run_main(main)
