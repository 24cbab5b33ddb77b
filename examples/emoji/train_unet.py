"""Train the emoji denoiser: python examples/emoji/train_unet.py --data_dir=DIR --teacher=DIR --workdir=DIR --out=DIR.

--teacher holds vae/, text_encoder/, text_encoder_2/, tokenizer/ and tokenizer_2/; --out becomes a whole
StableDiffusionXLPipeline folder with them.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from batches import Batches
from emoji_dataset.dataset import load_split
from recipe import IMAGE_SIZE, MODEL_INDEX, SCHEDULER_CONFIG, UNET, UNET_CONFIG, config_flag
from training import start

from mlcm_jax.cli import run_main
from mlcm_jax.conditioning import encode_prompts, unconditional
from mlcm_jax.data.prompts import read_prompts
from mlcm_jax.diffusion.parameterization import add_noise
from mlcm_jax.diffusion.schedule import Schedule, alpha_sigma
from mlcm_jax.errors import UserError
from mlcm_jax.generate import decode, encode, sample_latents
from mlcm_jax.hub.pipeline import Network, Pipeline, load_network, load_tokenizer, network_shapes, save_pipeline
from mlcm_jax.images import image_grid
from mlcm_jax.models.unet import UNet2DConditionModel
from mlcm_jax.train import rng
from mlcm_jax.train.loop import run
from mlcm_jax.types import TextConditioning

DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder that build_data.py wrote.", required=True)
TEACHER = flags.DEFINE_string("teacher", None, "Folder with the other parts of the pipeline.", required=True)
WORKDIR = flags.DEFINE_string("workdir", "runs/emoji_unet", "Checkpoints, samples and metrics.")
OUT = flags.DEFINE_string("out", None, "Folder for the finished pipeline.", required=True)
CONFIG = config_flag(UNET)

CAPTION_DROPOUT = 0.1
MIN_SNR_GAMMA = 5.0
GRID_PROMPTS = Path(__file__).parent / "prompts" / "grid.txt"
GRID_GUIDANCE, GRID_STEPS = 5.0, 25


def make_loss(unet: UNet2DConditionModel, schedule: Schedule):
    """Noise prediction with min-SNR weights (arXiv 2303.09556), timesteps stratified over the batch."""

    def loss_fn(params, batch, key):
        latents, conditioning = batch
        n = latents.shape[0]
        t_key, noise_key, drop_key, offset_key = jax.random.split(key, 4)
        offset = jax.random.uniform(offset_key, (n,))
        t = (1000 * (jax.random.permutation(t_key, n) + offset) / n).astype(jnp.int32)
        noise = jax.random.normal(noise_key, latents.shape)
        keep = jax.random.bernoulli(drop_key, 1 - CAPTION_DROPOUT, (n,))
        conditioning = conditioning.replace(
            hidden_states=conditioning.hidden_states * keep[:, None, None], pooled=conditioning.pooled * keep[:, None]
        )
        eps = unet.apply({"params": params}, add_noise(schedule, latents, noise, t), t, conditioning)
        error = jnp.square(eps - noise).mean(axis=(1, 2, 3))
        alpha, sigma = alpha_sigma(schedule, t)
        weight = jnp.minimum(1.0, MIN_SNR_GAMMA * jnp.square(sigma / alpha))[:, 0, 0, 0]
        return (weight * error).mean(), {"mse": error.mean()}

    return loss_fn


def encode_images(vae: Network, images: np.ndarray) -> np.ndarray:
    """Scaled latents of uint8 images, 64 at a time."""
    padded = np.concatenate([images, images[: -len(images) % 64]])
    return np.concatenate([encode(vae, chunk) for chunk in np.split(padded, len(padded) // 64)])[: len(images)]


def load_parts(folder: Path) -> Pipeline:
    """The pipeline with a UNet yet to be trained."""
    unet = UNet2DConditionModel.from_config(UNET_CONFIG)
    shapes = network_shapes(unet, UNET_CONFIG)
    parts = {
        part: load_network(folder / part, MODEL_INDEX[part][1], param_dtype=jnp.float32)
        for part in ("vae", "text_encoder", "text_encoder_2")
    }
    return Pipeline(
        unet=Network(unet, shapes, UNET_CONFIG),
        vae=parts["vae"],
        text_encoders=(parts["text_encoder"], parts["text_encoder_2"]),
        tokenizers=tuple(load_tokenizer(folder / t, "CLIPTokenizer") for t in ("tokenizer", "tokenizer_2")),
        scheduler_config=SCHEDULER_CONFIG,
        model_index=MODEL_INDEX,
        folder=folder,
    )


def make_sampler(pipeline: Pipeline, seed: int):
    """A function of the UNet's parameters: one guided picture for each of the grid's prompts."""
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


def main():
    config, out = CONFIG.value, Path(OUT.value)
    if out.resolve() == Path(TEACHER.value).resolve():
        raise UserError(f"--out={out} is --teacher: choose another folder to write to.")
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
    state, step = start(params, make_loss(module, schedule), config)
    images = make_sampler(pipeline, config.seed)
    state = run(state, step, batch, config, Path(WORKDIR.value), sample_fn=lambda s: images(s.ema))
    finished = Network(module, state.ema, UNET_CONFIG)
    save_pipeline(dataclasses.replace(pipeline, unet=finished), out, dtype=jnp.float16)


if __name__ == "__main__":
    run_main(main)
