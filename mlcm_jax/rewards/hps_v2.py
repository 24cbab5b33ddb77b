"""Human Preference Score v2 (arXiv 2306.09341): a CLIP ViT-H/14 fine-tuned on rankings of images for a prompt."""

from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from mlcm_jax.hub.load import load_params, read_json
from mlcm_jax.hub.open_clip import OPEN_CLIP
from mlcm_jax.hub.pipeline import network_shapes
from mlcm_jax.hub.preprocess import Preprocessor
from mlcm_jax.models.clip import CLIPModel
from mlcm_jax.rewards.clip_features import clip_tokens, load_clip_tokenizer
from mlcm_jax.rewards.clip_score import Similarity
from mlcm_jax.rewards.reward_model import RewardModel, RewardModelSpec, weights_file

WEIGHTS = "hps_v2.safetensors"


def load_hps_v2(folder: str | Path, *, dtype: Any = jnp.float32) -> RewardModel:
    """Read ``hps_v2.safetensors`` (open_clip's layout) in the folder of the CLIP that it was tuned from.

    The folder (laion/CLIP-ViT-H-14-laion2B-s32B-b79K) has config.json, tokenizer and preprocessor_config.json. Scores
    are cosines; published tables show them times 100. Raises UserError for a missing file, an unsupported setting and
    unfit weights.
    """
    file = weights_file(folder, WEIGHTS)
    preprocessor, tokenizer = Preprocessor.from_folder(folder), load_clip_tokenizer(folder)
    config = read_json(Path(folder) / "config.json")
    module = CLIPModel.from_config(config, dtype=dtype)
    params = load_params(network_shapes(module, config), file, layout=OPEN_CLIP)
    tokens = partial(clip_tokens, tokenizer, module.text)
    return RewardModel(Similarity(module, scaled=False), {"clip": params}, preprocessor, tokens)


HPS_V2 = RewardModelSpec("hps_v2", "HPS v2", "preference of people for the prompt, a cosine", load_hps_v2)
