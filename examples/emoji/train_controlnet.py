"""Train a ControlNet that follows edges: train_controlnet.py --data_dir=DIR --workdir=DIR --out=DIR.

It adds to the teacher's UNet, which stays as it is (arXiv 2302.05543). measure_controlnet.py uses it with a student.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from batches import Batches
from denoiser import encode_images, make_loss
from edges import edges_of, moved
from emoji_dataset.dataset import EmojiSplit, load_split
from ml_collections import ConfigDict
from PIL import Image
from recipe import CONTROLNET, CONTROLNET_CAPTION_DROPOUT, CONTROLNET_CONFIG, IMAGE_SIZE, config_flag
from training import run, start

from mlcm_jax import rng
from mlcm_jax.cli import run_main
from mlcm_jax.diffusion.schedule import Schedule
from mlcm_jax.hub.pipeline import WEIGHT_FILES, Network, Pipeline, load_pipeline
from mlcm_jax.hub.save import save_params
from mlcm_jax.images import image_grid
from mlcm_jax.models.controlnet import ControlNetModel, copied_from_unet
from mlcm_jax.outputs import check_folder
from mlcm_jax.sampling.conditioning import encode_prompts
from mlcm_jax.sampling.control import Control
from mlcm_jax.sampling.text_to_image import TextToImage

HERE = Path(__file__).resolve().parent
DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder that build_data.py wrote.", required=True)
TEACHER = flags.DEFINE_string("teacher", str(HERE / "teacher"), "The pipeline whose UNet it adds to.")
WORKDIR = flags.DEFINE_string("workdir", "runs/emoji_controlnet", "Checkpoints, samples and metrics.")
OUT = flags.DEFINE_string("out", None, "Folder for the ControlNet, in diffusers' layout.", required=True)
CONFIG = config_flag(CONTROLNET)

PLACES = 4  # of each image, mirrored, smaller and elsewhere
GRID, GRID_GUIDANCE = 8, 1.5  # samples while training: of held-out captions, with the guidance that suits the teacher


def first_network(pipeline: Pipeline, seed: int) -> Network:
    """A copy of the UNet's way down that adds nothing yet."""
    module = ControlNetModel.from_config(CONTROLNET_CONFIG)
    latents, image = jnp.zeros((1, *pipeline.latent_shape())), jnp.zeros((1, IMAGE_SIZE, IMAGE_SIZE, 3))
    text = encode_prompts(pipeline, [""], IMAGE_SIZE)
    params = module.init(rng.stream(seed, "init", 0), latents, jnp.zeros(1, jnp.int32), text, image)["params"]
    return Network(module, copied_from_unet(params, pipeline.unet.params), CONTROLNET_CONFIG)


def make_batch(pipeline: Pipeline, data: EmojiSplit, config: ConfigDict):
    """The batch of a step: latents, conditioning and edges of images, each in one of its ``PLACES``."""
    batches = Batches(data, seed=config.seed, batch_size=config.batch_size)
    images = [moved(data["image"], np.random.default_rng([config.seed, i])) for i in range(PLACES)]
    latents = np.stack([encode_images(pipeline.vae, some) for some in images])
    edges = np.stack([edges_of(some) for some in images])
    text = jax.tree.map(np.asarray, encode_prompts(pipeline, data["caption"], IMAGE_SIZE))

    def batch(step: int):
        rows = batches.indices(step)
        place = np.random.default_rng([config.seed, step, 1]).integers(PLACES, size=len(rows))
        return latents[place, rows], jax.tree.map(lambda a: a[rows], text), edges[place, rows]

    return batch


def make_predict(pipeline: Pipeline, controlnet: ControlNetModel):
    """The frozen UNet's prediction with what the ControlNet adds, as denoiser.make_loss takes it."""
    unet = pipeline.unet

    def predict(params, latents, timesteps, text, edges):
        image = edges.astype(jnp.float32) / 255
        residuals = controlnet.apply({"params": params}, latents, timesteps, text, image)
        return unet.module.apply({"params": unet.params}, latents, timesteps, text, None, residuals)

    return predict


def make_sampler(pipeline: Pipeline, controlnet: Network, data: EmojiSplit):
    """A function of the ControlNet's parameters: edges of held-out images above, the teacher's samples below."""
    edges, sample = edges_of(data["image"][:GRID]), TextToImage(pipeline)

    def images(params):
        network = Network(controlnet.module, params, controlnet.config)
        made = [
            sample(
                caption, num_steps=25, guidance_scale=GRID_GUIDANCE, controls=[Control(network, Image.fromarray(one))]
            )
            for caption, one in zip(data["caption"], edges, strict=False)
        ]
        return image_grid(np.concatenate([edges, *made]), columns=GRID)

    return images


def main():
    config, out = CONFIG.value, Path(OUT.value)
    check_folder("out", out)
    pipeline = load_pipeline(TEACHER.value)
    batch = make_batch(pipeline, load_split(DATA_DIR.value, "train"), config)
    controlnet = first_network(pipeline, config.seed)
    predict = make_predict(pipeline, controlnet.module)
    schedule = Schedule.from_config(pipeline.scheduler_config)
    loss = make_loss(predict, schedule, caption_dropout=CONTROLNET_CAPTION_DROPOUT)
    state, step = start(controlnet.params, loss, config)
    images = make_sampler(pipeline, controlnet, load_split(DATA_DIR.value, "heldout"))
    state = run(state, step, batch, config, Path(WORKDIR.value), sample_fn=lambda s: images(s.ema))
    file_name = WEIGHT_FILES["diffusers"]
    save_params(state.ema, CONTROLNET_CONFIG, out, file_name=file_name, dtype=jnp.float16)


if __name__ == "__main__":
    run_main(main)
