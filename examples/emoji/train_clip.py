"""Train the emoji text encoders: examples/emoji/train_clip.py --data_dir=DIR --workdir=DIR --out=DIR --scorer=DIR.

Two text towers are trained against one image tower, contrastively (CLIP, arXiv 2103.00020). The towers become the
teacher's text_encoder and text_encoder_2; the second one and the image tower are kept together as the scorer.
"""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from batches import Batches
from emoji_dataset.dataset import load_split
from recipe import CLIP, CLIP_PREPROCESSOR, SCORER_CONFIG, TEXT_2_CONFIG, TEXT_CONFIG, config_flag
from training import run, start

from mlcm_jax import rng
from mlcm_jax.cli import run_main
from mlcm_jax.hub.pipeline import WEIGHT_FILES
from mlcm_jax.hub.save import save_params, write_json
from mlcm_jax.hub.tokenizer import load_tokenizer
from mlcm_jax.models.clip import CLIPModel, CLIPTextModel

DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder that build_data.py wrote.", required=True)
WORKDIR = flags.DEFINE_string("workdir", "runs/emoji_clip", "Checkpoints and metrics.")
OUT = flags.DEFINE_string("out", None, "Teacher's folder, for the text encoders and tokenizers.", required=True)
SCORER = flags.DEFINE_string("scorer", None, "Folder for the scorer (transformers' CLIPModel).", required=True)
CONFIG = config_flag(CLIP)

TOKENIZER = Path(__file__).parent / "tokenizer"
MAX_SHIFT = 4  # pixels that a training image is moved by, at most


def normalise(images):
    """uint8 images to what the image tower takes."""
    mean, std = (jnp.asarray(CLIP_PREPROCESSOR[key]) for key in ("image_mean", "image_std"))
    return (images.astype(jnp.float32) / 255.0 - mean) / std


def shifted(images, key):
    """Each image moved by a few pixels on white."""
    n, height, width, _ = images.shape
    padded = jnp.pad(images, ((0, 0), (MAX_SHIFT, MAX_SHIFT), (MAX_SHIFT, MAX_SHIFT), (0, 0)), constant_values=255)
    corners = jax.random.randint(key, (n, 2), 0, 2 * MAX_SHIFT + 1)
    crop = jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, (at[0], at[1], 0), (height, width, 3)))
    return crop(padded, corners)


def contrastive(image_embeds, text_embeds, logit_scale):
    """Symmetric cross-entropy of matching images and captions, and the accuracy of finding the image."""
    image_embeds, text_embeds = (e / jnp.linalg.norm(e, axis=-1, keepdims=True) for e in (image_embeds, text_embeds))
    logits = jnp.exp(logit_scale) * text_embeds @ image_embeds.T
    labels = jnp.arange(len(logits))
    losses = [optax.softmax_cross_entropy_with_integer_labels(side, labels).mean() for side in (logits, logits.T)]
    return sum(losses) / 2, (logits.argmax(-1) == labels).mean()


def make_loss(clip: CLIPModel, text_1: CLIPTextModel):
    def loss_fn(params, batch, key):
        images, tokens = batch
        pixels = normalise(shifted(images, key))
        image_embeds, text_2_embeds = clip.apply({"params": params["clip"]}, tokens, pixels)
        text_1_embeds = text_1.apply({"params": params["text_1"]}, tokens).pooled
        scale = jnp.minimum(params["clip"]["logit_scale"], jnp.log(100.0))
        loss_1, accuracy_1 = contrastive(image_embeds, text_1_embeds, scale)
        loss_2, accuracy_2 = contrastive(image_embeds, text_2_embeds, scale)
        return loss_1 + loss_2, {"accuracy_1": accuracy_1, "accuracy_2": accuracy_2}

    return loss_fn


def retrieval_accuracy(clip: CLIPModel, params, tokenizer, split) -> float:
    """How often a caption finds its own image among all images of the split."""
    embed = jax.jit(lambda tokens, images: clip.apply({"params": params}, tokens, normalise(images)))
    tokens = tokenise(tokenizer, split["caption"])
    parts = [embed(tokens[i : i + 64], split["image"][i : i + 64]) for i in range(0, len(tokens), 64)]
    images, texts = (np.concatenate([np.asarray(p[k]) for p in parts]) for k in (0, 1))
    images, texts = (e / np.linalg.norm(e, axis=-1, keepdims=True) for e in (images, texts))
    return float(((texts @ images.T).argmax(-1) == np.arange(len(texts))).mean())


def tokenise(tokenizer, captions: list[str]) -> np.ndarray:
    encoded = tokenizer(captions, padding="max_length", truncation=True, return_tensors="np")
    return encoded["input_ids"].astype(np.int32)


def main():
    config, out = CONFIG.value, Path(OUT.value)
    data, heldout = load_split(DATA_DIR.value, "train"), load_split(DATA_DIR.value, "heldout")
    tokenizer = load_tokenizer(TOKENIZER, "CLIPTokenizer")
    tokens = tokenise(tokenizer, data["caption"])
    batches = Batches(data, seed=config.seed, batch_size=config.batch_size)
    clip = CLIPModel.from_config(SCORER_CONFIG)
    # The first tower gets a projection to be trained with; SDXL takes its states only, so it is not kept.
    text_1 = CLIPTextModel.from_config({**TEXT_CONFIG, "architectures": ["CLIPTextModelWithProjection"]})
    keys = jax.random.split(rng.stream(config.seed, "init", 0))
    params = {
        "clip": clip.init(keys[0], tokens[:1], normalise(data["image"][:1]))["params"],
        "text_1": text_1.init(keys[1], tokens[:1])["params"],
    }

    def batch(step: int):
        rows = batches.indices(step)
        return data["image"][rows], tokens[rows]

    state, step = start(params, make_loss(clip, text_1), config)
    trained = run(state, step, batch, config, Path(WORKDIR.value)).ema
    text_1_params = {key: trained["text_1"][key] for key in ("text_model",)}
    text_2_params = {key: trained["clip"][key] for key in ("text_model", "text_projection")}
    for folder, network_params, network_config in (
        (out / "text_encoder", text_1_params, TEXT_CONFIG),
        (out / "text_encoder_2", text_2_params, TEXT_2_CONFIG),
        (Path(SCORER.value), trained["clip"], SCORER_CONFIG),
    ):
        save_params(network_params, network_config, folder, file_name=WEIGHT_FILES["transformers"], dtype=jnp.float16)
    write_json(CLIP_PREPROCESSOR, Path(SCORER.value) / "preprocessor_config.json")
    for folder in (out / "tokenizer", out / "tokenizer_2", Path(SCORER.value)):
        shutil.copytree(TOKENIZER, folder, dirs_exist_ok=True)
    print(json.dumps({"heldout_retrieval_accuracy": retrieval_accuracy(clip, trained["clip"], tokenizer, heldout)}))


if __name__ == "__main__":
    run_main(main)
