"""Train a perceptual distance of latents for config.distance=latent_lpips.

    python launch/train_lpips.py --model=DIR --bapps=BAPPS/2afc/train --heldout=BAPPS/2afc/val --out=latent_lpips
    python launch/train_lpips.py --model=DIR --images=IMAGES --heldout=OTHERS --scorer=CLIP --out=latent_lpips

--bapps: people's judgements, folders ref, p0, p1 and judge (arXiv 1801.03924). --images: images instead; two
distortions of the same latents are drawn, and the one whose decoded image is closer, in the inner features of
--scorer or pixel by pixel, is the closer one. --heldout: the same kind, to measure the agreement on.
"""

from functools import partial
from pathlib import Path

import jax
import numpy as np
from absl import flags

from mlcm_jax.cli import run_main
from mlcm_jax.data.real_images import RealImages
from mlcm_jax.errors import UserError
from mlcm_jax.evaluation.metrics.perceptual_distance import perceptual_distance
from mlcm_jax.hub.pipeline import WEIGHT_FILES, Network, load_pipeline
from mlcm_jax.hub.save import save_params
from mlcm_jax.models.latent_lpips import LatentLPIPS
from mlcm_jax.outputs import check_folder
from mlcm_jax.rewards.clip_features import load_clip_encoder
from mlcm_jax.rng import MAX_SEED, next_seed
from mlcm_jax.sampling.decode import encode
from mlcm_jax.training.latent_lpips import (
    Triplets,
    bapps_triplets,
    distorted_triplets,
    image_mse,
    train_lpips,
    two_afc,
)

MODEL = flags.DEFINE_string("model", None, "Diffusers folder or hub id, for its autoencoder.", required=True)
BAPPS = flags.DEFINE_string("bapps", None, "Folder of judgements to learn from.")
IMAGES = flags.DEFINE_string("images", None, "Folder of images, or an .npy file of them, to distort and learn from.")
HELDOUT = flags.DEFINE_string("heldout", None, "Judgements or images to measure on.", required=True)
SCORER = flags.DEFINE_string("scorer", None, "Transformers CLIPModel folder that judges distortions; none: pixels.")
IMAGE_SIZE = flags.DEFINE_integer("image_size", 64, "Pixels of the sides that images are encoded at.", lower_bound=8)
REPEATS = flags.DEFINE_integer("repeats", 2, "Pairs of distortions of each image.", lower_bound=1)
WIDTHS = flags.DEFINE_list("widths", ["64", "128", "256", "512", "512"], "Channels of the five blocks.")
STEPS = flags.DEFINE_integer("steps", 2000, "Updates.", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Triplets an update.", lower_bound=1)
LEARNING_RATE = flags.DEFINE_float("learning_rate", 1e-3, "At the start; it falls to 0.", lower_bound=0.0)
SEED = flags.DEFINE_integer("seed", 0, "Of weights, distortions and batches.", 0, MAX_SEED)
OUT = flags.DEFINE_string("out", None, "Folder for config.json and weights.", required=True)


def triplets(place: str | None, vae: Network, seed: int) -> Triplets:
    """Judged triplets of latents from the kind of place that --bapps or --images is."""
    place = str(place)
    if BAPPS.value:
        return bapps_triplets(place, vae, IMAGE_SIZE.value)
    images = RealImages(place, IMAGE_SIZE.value)
    latents = np.concatenate([encode(vae, batch) for batch in images.batches(64, len(images))])
    distance = partial(perceptual_distance, load_clip_encoder(SCORER.value)) if SCORER.value else image_mse
    return distorted_triplets(latents, vae, distance, seed=seed, repeats=REPEATS.value)


def widths() -> list[int]:
    if len(WIDTHS.value) != 5 or not all(width.isdigit() and int(width) > 0 for width in WIDTHS.value):
        raise UserError(f"--widths={','.join(WIDTHS.value)} must be five whole numbers above 0.")
    return [int(width) for width in WIDTHS.value]


def report(step: int, loss: float):
    if step % 50 == 0 or step == STEPS.value:
        print(f"step {step}: ranking loss {loss:.4f}", flush=True)


def main():
    check_folder("out", OUT.value)
    if (BAPPS.value is None) == (IMAGES.value is None):
        raise UserError("Give either --bapps, judgements, or --images, images to distort.")
    config = {"_class_name": "LatentLPIPS", "block_out_channels": widths(), "layers_per_block": [2, 2, 3, 3, 3]}
    vae = load_pipeline(MODEL.value).vae
    config["latent_channels"] = vae.config.get("latent_channels", 4)
    module = LatentLPIPS.from_config(config)
    learnt, heldout = (
        triplets(place, vae, seed)
        for place, seed in ((BAPPS.value or IMAGES.value, SEED.value), (HELDOUT.value, next_seed(SEED.value)))
    )
    print(f"{len(learnt.judge)} triplets to learn from, {len(heldout.judge)} to measure on.", flush=True)
    params = train_lpips(
        module,
        learnt,
        num_steps=STEPS.value,
        batch_size=BATCH_SIZE.value,
        learning_rate=LEARNING_RATE.value,
        seed=SEED.value,
        report=report,
    )
    path = save_params(params, config, Path(OUT.value), file_name=WEIGHT_FILES["diffusers"])
    plain = np.square(heldout.ref - heldout.p0).mean((1, 2, 3)), np.square(heldout.ref - heldout.p1).mean((1, 2, 3))
    l2 = np.where(plain[1] < plain[0], heldout.judge, 1 - heldout.judge).mean()
    numbers = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(
        f"{path}: {numbers} weights; agreement on held-out triplets {two_afc(module, params, heldout):.4f}, "
        f"of the mean squared difference of latents {l2:.4f}."
    )


if __name__ == "__main__":
    run_main(main)
