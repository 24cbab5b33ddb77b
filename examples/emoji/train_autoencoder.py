"""Train the emoji autoencoder: python examples/emoji/train_autoencoder.py --data_dir=DIR --workdir=DIR --out=DIR."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from batches import Batches
from emoji_dataset.dataset import load_split
from recipe import AUTOENCODER, VAE_CONFIG, config_flag
from training import run, start

from mlcm_jax import rng
from mlcm_jax.cli import run_main
from mlcm_jax.hub.pipeline import WEIGHT_FILES
from mlcm_jax.hub.save import save_params
from mlcm_jax.images import image_grid, to_float, to_uint8
from mlcm_jax.models.vae import AutoencoderKL

DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder that build_data.py wrote.", required=True)
WORKDIR = flags.DEFINE_string("workdir", "runs/emoji_autoencoder", "Checkpoints, samples and metrics.")
OUT = flags.DEFINE_string("out", None, "Folder for the autoencoder (diffusers' vae folder).", required=True)
CONFIG = config_flag(AUTOENCODER)

KL_WEIGHT = 1e-6


def edges(images):
    """Differences between neighbours, down and across: an error here is a blurred outline."""
    return images[:, 1:] - images[:, :-1], images[:, :, 1:] - images[:, :, :-1]


def make_loss(model: AutoencoderKL):
    """Absolute error of pixels and of outlines, with a touch of the KL term that keeps latents near the normal."""

    def loss_fn(params, images, key):
        images = to_float(images)
        mean, logvar = model.apply({"params": params}, images, method="encode")
        latents = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
        recon = model.apply({"params": params}, latents, method="decode")
        pixel = jnp.abs(recon - images).mean()
        edge = sum(jnp.abs(a - b).mean() for a, b in zip(edges(recon), edges(images), strict=True))
        kl = 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar).sum(axis=(1, 2, 3)).mean()
        mse = jnp.square(jnp.clip(recon, -1, 1) - images).mean()
        return pixel + edge + KL_WEIGHT * kl, {"psnr": 10 * jnp.log10(4.0 / mse), "kl": kl}

    return loss_fn


def latent_std(model, params, images) -> float:
    """Standard deviation of the latents' means over ``images``; its inverse is scaling_factor."""
    encode = jax.jit(lambda x: model.apply({"params": params}, x, method="encode")[0])
    return float(np.std(np.concatenate([encode(to_float(b)) for b in np.array_split(images, len(images) // 64)])))


def main():
    config, out = CONFIG.value, Path(OUT.value)
    data, heldout = load_split(DATA_DIR.value, "train"), load_split(DATA_DIR.value, "heldout")
    model = AutoencoderKL.from_config(VAE_CONFIG)
    params = model.init(rng.stream(config.seed, "init", 0), to_float(data["image"][:1]))["params"]
    state, step = start(params, make_loss(model), config)
    batches = Batches(data, seed=config.seed, batch_size=config.batch_size)
    held = heldout["image"][:: max(1, len(heldout["image"]) // 256)][:256]
    reconstruct = jax.jit(lambda p, x: model.apply({"params": p}, x))

    def sample(state):
        recon = np.asarray(to_uint8(reconstruct(state.ema, to_float(held[:16]))))
        return image_grid(np.concatenate([held[:16], recon]), columns=16)

    state = run(
        state,
        step,
        lambda step: data["image"][batches.indices(step)],
        config,
        Path(WORKDIR.value),
        sample_fn=sample,
    )
    std = latent_std(model, state.ema, data["image"][:2048])
    recon = np.concatenate(
        [np.asarray(to_uint8(reconstruct(state.ema, to_float(b)))) for b in np.array_split(held, len(held) // 64)]
    )
    mse = np.square((recon.astype(np.float64) - held) / 255.0).mean(axis=(1, 2, 3))
    psnr = float(np.mean(-10 * np.log10(mse)))
    vae_config = {**VAE_CONFIG, "scaling_factor": 1.0 / std}
    save_params(state.ema, vae_config, out, file_name=WEIGHT_FILES["diffusers"], dtype=jnp.float16)
    print(json.dumps({"heldout_psnr_db": psnr, "latent_std": std, "images": len(held)}))


if __name__ == "__main__":
    run_main(main)
