"""ImageReward (arXiv 2304.05977): BLIP with a head, trained on people's rankings of images for a prompt."""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from mlcm_jax.errors import UserError
from mlcm_jax.hub.load import load_params, read_json
from mlcm_jax.hub.pipeline import parameter_shapes
from mlcm_jax.hub.preprocess import CLIP_224, Preprocessor
from mlcm_jax.hub.tokenizer import load_tokenizer
from mlcm_jax.models.bert import BertConfig
from mlcm_jax.rewards.networks.blip import ImageReward, VisionConfig, read_text_config
from mlcm_jax.rewards.reward_model import RewardModel, RewardModelSpec, weights_file

WEIGHTS = "image_reward.safetensors"
MAX_TOKENS = 35  # of a prompt: BLIP's length, which the reward was trained with
UNUSED = (re.compile(r"^blip\.(vision|text)_proj\."),)  # of BLIP's contrastive loss


def load_image_reward(
    folder: str | Path,
    *,
    dtype: Any = jnp.float32,
    vision: VisionConfig = VisionConfig(),  # noqa: B008  (frozen)
    preprocessor: Preprocessor = CLIP_224,
) -> RewardModel:
    """Read ``image_reward.safetensors`` and med_config.json (THUDM/ImageReward) beside bert-base-uncased's tokenizer.

    Raises UserError for a missing file, an unsupported setting, unfit weights, and a tokenizer of another vocabulary.
    """
    file = weights_file(folder, WEIGHTS)
    text = read_text_config(read_json(Path(folder) / "med_config.json"))
    tokenizer = load_tokenizer(Path(folder), "BertTokenizer")
    module = ImageReward(vision, text, dtype)
    pixels = jnp.zeros((1, vision.image_size, vision.image_size, 3))
    shapes = parameter_shapes(module, pixels, jnp.zeros((1, 2), jnp.int32))
    params = load_params(shapes, file, ignored=UNUSED)
    return RewardModel(module, params, preprocessor, partial(_tokenize, tokenizer, text))


def _tokenize(tokenizer: Any, text: BertConfig, prompts: Sequence[str]) -> Int[np.ndarray, "n t"]:
    encoded = tokenizer(
        list(prompts), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="np"
    )
    tokens = encoded["input_ids"].astype(np.int32)
    if tokenizer.pad_token_id != text.pad_token_id or tokens.max() >= text.vocab_size:
        raise UserError(
            f"The tokenizer pads with {tokenizer.pad_token_id} and makes ids up to {tokens.max()}, but med_config.json "
            f"has pad_token_id={text.pad_token_id}, vocab_size={text.vocab_size}: use bert-base-uncased's tokenizer."
        )
    return tokens


IMAGE_REWARD = RewardModelSpec(
    "image_reward",
    "ImageReward",
    "preference of people for the prompt; 0 is average, 1 a spread above",
    load_image_reward,
)
