"""Write the file that train_unet.py --packed trains from: examples/emoji/pack.py --data_dir=DIR --out=FILE."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from absl import flags
from batches import row_weights
from denoiser import encode_images
from emoji_dataset.dataset import load_split
from emoji_dataset.prompts import rows_of
from packed import Packed, fingerprint, save_packed

from mlcm_jax.cli import run_main
from mlcm_jax.data.prompts import read_prompts
from mlcm_jax.hub.pipeline import load_network

HERE = Path(__file__).resolve().parent
DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder that build_data.py wrote.", required=True)
TEACHER = flags.DEFINE_string("teacher", str(HERE / "teacher"), "Folder with the autoencoder, vae/.")
PROMPTS = flags.DEFINE_string("prompts", str(HERE / "prompts" / "eval.txt"), "Captions whose images are packed too.")
NUM_REAL = flags.DEFINE_integer("num_real", 512, "Of these images, the first ones.", lower_bound=0)
OUT = flags.DEFINE_string("out", None, "The .safetensors file, at most 30 MB.", required=True)


def main():
    folder, out = Path(TEACHER.value) / "vae", Path(OUT.value)
    train, heldout = load_split(DATA_DIR.value, "train"), load_split(DATA_DIR.value, "heldout")
    real_captions = read_prompts(PROMPTS.value)[: NUM_REAL.value]
    real = train["image"][rows_of(train, real_captions)]
    vae = load_network(folder, "AutoencoderKL", param_dtype=jnp.float32)
    latents, heldout_latents = (encode_images(vae, split["image"]).astype(np.float16) for split in (train, heldout))
    packed = Packed(
        latents=latents,
        captions=train["caption"],
        weights=row_weights(train).astype(np.float32),
        heldout_latents=heldout_latents,
        heldout_captions=heldout["caption"],
        real=real,
        real_captions=real_captions,
        vae=fingerprint(folder),
    )
    size = save_packed(packed, out)
    print(f"{out}: {len(latents)} + {len(heldout_latents)} latents, {len(real)} images, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_main(main)
