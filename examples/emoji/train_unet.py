"""Train the emoji denoiser, from the images or, on a GPU, from the one file that pack.py writes.

python examples/emoji/train_unet.py --data_dir=DIR --teacher=DIR --workdir=DIR --out=DIR
python examples/emoji/train_unet.py --packed=FILE --minutes=7 --out=DIR

--teacher holds vae/, text_encoder/, text_encoder_2/, tokenizer/ and tokenizer_2/. From images --out becomes a whole
StableDiffusionXLPipeline folder with them; from a packed file it gets unet/ alone, and figures.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from denoiser import GRID_PROMPTS, GRID_STEPS, encode_images, load_parts, make_loss, unet_predict
from ml_collections import ConfigDict
from packed import fingerprint, load_packed
from packed_figures import measure, with_weights
from recipe import IMAGE_SIZE, SCHEDULER_CONFIG, UNET, UNET_CONFIG, UNET_PACKED, config_flag
from train_packed import train_packed
from training import run, start

from mlcm_jax import rng
from mlcm_jax.cli import run_main
from mlcm_jax.data.prompts import read_prompts
from mlcm_jax.diffusion.schedule import Schedule
from mlcm_jax.errors import UserError
from mlcm_jax.evaluation.extractors.registry import FEATURE_EXTRACTORS
from mlcm_jax.hub.pipeline import Network, Pipeline, save_pipeline
from mlcm_jax.images import image_grid
from mlcm_jax.models.attention_backend import XLA
from mlcm_jax.rewards.registry import REWARD_MODELS, parse_places
from mlcm_jax.sampling.conditioning import encode_prompts, unconditional
from mlcm_jax.sampling.decode import decode
from mlcm_jax.sampling.sample import sample_latents
from mlcm_jax.types import TextConditioning

HERE = Path(__file__).resolve().parent
DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder that build_data.py wrote.")
PACKED = flags.DEFINE_string("packed", None, "Instead of --data_dir: the file that pack.py wrote.")
TEACHER = flags.DEFINE_string("teacher", str(HERE / "teacher"), "Folder with the other parts of the pipeline.")
WORKDIR = flags.DEFINE_string("workdir", "runs/emoji_unet", "Checkpoints, samples and metrics, from images.")
OUT = flags.DEFINE_string("out", None, "Folder for the finished pipeline, or UNet and figures.", required=True)
CONFIG = config_flag(UNET)

# These are of --packed.
MINUTES = flags.DEFINE_float("minutes", 7.0, "Time to train for, after compilation.", lower_bound=0.01)
BATCH_SIZE = flags.DEFINE_integer("batch_size", UNET_PACKED.batch_size, "Examples a step.", lower_bound=1)
LEARNING_RATE = flags.DEFINE_float("learning_rate", UNET_PACKED.learning_rate, "Its highest value.")
STEPS_PER_CALL = flags.DEFINE_integer("steps_per_call", UNET_PACKED.steps_per_call, "In one program.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", UNET_PACKED.seed, "Of the weights, the batches and the noise.", 0, rng.MAX_SEED)
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Of the arithmetic; weights are float32.")
NUM_IMAGES = flags.DEFINE_integer("num_images", 512, "Samples that are measured; 0: the grid alone.", lower_bound=0)
SCORERS_FLAG = flags.DEFINE_list(
    "scorers", [f"clip={HERE / 'scorer'}", f"clip-guard={HERE / 'guard'}"], "NAME=PLACE,... of CLIP scores."
)
FEATURES = flags.DEFINE_list("features", [f"clip={HERE / 'scorer'}"], "NAME=PLACE,... of Frechet distances.")

GRID_GUIDANCE = 5.0
MIN_IMAGES = 8  # resamples of fewer may hold one image alone, which has no spread


def make_sampler(pipeline: Pipeline, seed: int):
    """A function of the UNet's parameters: one guided image for each of the grid's prompts."""
    prompts = read_prompts(GRID_PROMPTS)
    conditioning = encode_prompts(pipeline, prompts, IMAGE_SIZE)
    empty = unconditional(pipeline, len(prompts), IMAGE_SIZE)
    side = UNET_CONFIG["sample_size"]
    noise = jax.random.normal(rng.stream(seed, "samples", 0), (len(prompts), side, side, 4))

    def images(params):
        latents = sample_latents(
            pipeline.unet,
            SCHEDULER_CONFIG,
            noise,
            conditioning,
            empty,
            guidance_scale=GRID_GUIDANCE,
            num_steps=GRID_STEPS,
            variables={"params": params},
        )
        return image_grid(decode(pipeline.vae, latents), columns=8)

    return images


def from_images(config: ConfigDict, out: Path):
    """Train as recipe.UNET says, resumable; write a whole pipeline."""
    # A machine that trains from a packed file need not have what reads the images.
    from batches import Batches
    from emoji_dataset.dataset import load_split

    pipeline = load_parts(Path(TEACHER.value))
    data = load_split(DATA_DIR.value, "train")
    batches = Batches(data, seed=config.seed, batch_size=config.batch_size)
    latents = encode_images(pipeline.vae, data["image"])
    text = jax.tree.map(np.asarray, encode_prompts(pipeline, data["caption"], IMAGE_SIZE))
    schedule = Schedule.from_config(SCHEDULER_CONFIG)
    module = pipeline.unet.module

    def batch(step: int) -> tuple[np.ndarray, TextConditioning]:
        rows = batches.indices(step)
        return latents[rows], jax.tree.map(lambda a: a[rows], text)

    first = jax.tree.map(lambda a: a[:1], (latents, text))
    params = module.init(rng.stream(config.seed, "init", 0), first[0], np.zeros(1, np.int32), first[1])["params"]
    state, step = start(params, make_loss(unet_predict(module), schedule), config)
    images = make_sampler(pipeline, config.seed)
    state = run(state, step, batch, config, Path(WORKDIR.value), sample_fn=lambda s: images(s.ema))
    finished = Network(module, state.ema, UNET_CONFIG)
    save_pipeline(dataclasses.replace(pipeline, unet=finished), out, dtype=jnp.float16)


def from_packed(out: Path):
    """Train as recipe.UNET_PACKED and the flags say, by the clock; write the UNet, a grid and figures."""
    config = UNET_PACKED.copy_and_resolve_references()
    config.update(
        batch_size=BATCH_SIZE.value,
        learning_rate=LEARNING_RATE.value,
        steps_per_call=STEPS_PER_CALL.value,
        seed=SEED.value,
    )
    scorers = parse_places("scorers", SCORERS_FLAG.value, REWARD_MODELS)
    features = parse_places("features", FEATURES.value, FEATURE_EXTRACTORS)
    packed, teacher = load_packed(Path(PACKED.value)), Path(TEACHER.value)
    if packed.vae != fingerprint(teacher / "vae"):
        raise UserError(f"{PACKED.value} is of another autoencoder than {teacher / 'vae'}: pack again with --teacher.")
    if 0 < NUM_IMAGES.value < MIN_IMAGES:
        raise UserError(f"--num_images={NUM_IMAGES.value} are too few to compare: take {MIN_IMAGES} or more, or 0.")
    if NUM_IMAGES.value > len(packed.real_captions):
        raise UserError(f"--num_images={NUM_IMAGES.value}: {PACKED.value} has {len(packed.real_captions)}; lower it.")
    # The sequences are short: 64 positions at most. XLA's attention is exact in any size and has a gradient everywhere.
    pipeline = load_parts(teacher, attention=XLA, dtype=jnp.dtype(DTYPE.value))
    finished = with_weights(pipeline, train_packed(pipeline, packed, config, out, MINUTES.value))
    measure(finished, packed, out, num_images=NUM_IMAGES.value, scorers=scorers, features=features)


def main():
    out = Path(OUT.value)
    if out.resolve() == Path(TEACHER.value).resolve():
        raise UserError(f"--out={out} is --teacher: choose another folder to write to.")
    if bool(DATA_DIR.value) == bool(PACKED.value):
        raise UserError("Give either --data_dir, to train from images, or --packed, to train on a GPU.")
    if PACKED.value:
        from_packed(out)
    else:
        from_images(CONFIG.value, out)


if __name__ == "__main__":
    run_main(main)
