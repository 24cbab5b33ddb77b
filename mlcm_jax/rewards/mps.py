"""Multi-dimensional Preference Score (arXiv 2405.14705): people's choices between two images, under a condition."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mlcm_jax.hub.layout import Layout, Place
from mlcm_jax.hub.load import load_params, read_json
from mlcm_jax.hub.network import parameter_shapes
from mlcm_jax.hub.preprocess import Preprocessor
from mlcm_jax.models.clip import CLIPModel
from mlcm_jax.rewards.clip_features import clip_tokens, load_clip_tokenizer
from mlcm_jax.rewards.networks.cross_model import CrossModel
from mlcm_jax.rewards.reward_model import RewardModel, RewardModelSpec, unit, weights_file

WEIGHTS = "mps.safetensors"
# What the published weights compare images by for the overall score.
CONDITION = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, "
    "texture, quantity, attributes, position, number, location, word, things."
)
THRESHOLD = 0.3  # of the likeness by which a word counts; its authors' evaluation has the same

# ours -> the file's
RULES = (
    (r"\.cross\.ff_in\.", ".cross.ff.0."),
    (r"\.cross\.ff\.out\.", ".cross.ff.2."),
    (r"\.own\.fused\.", ".own.fused_attn_ff_proj."),
    (r"\.own\.ff\.out\.", ".own.ff_out.1."),
    (r"\.cross\.", ".0.fn."),
    (r"\.own\.", ".1.fn."),
)
UNUSED = (re.compile(r"\.rotary_emb\.inv_freq$"),)  # made anew


def _places(names) -> dict[str, Place]:
    return {name: Place(_spelt(name)) for name in names}


def _spelt(name: str) -> str:
    if name.startswith("cross_model."):
        for pattern, replacement in RULES:
            name = re.sub(pattern, replacement, name)
    return name


LAYOUT = Layout(_places)


class MPS(nn.Module):
    """Scaled cosine of a prompt and its image under a condition.

    condition: token ids of what images are compared by, as many as a prompt has.
    """

    model: CLIPModel
    condition: tuple[int, ...]
    layers: int = 4
    heads: int = 16
    head_dim: int = 64

    def setup(self):
        clip = self.model
        self.cross_model = CrossModel(clip.projection_dim, self.layers, self.heads, self.head_dim, clip.dtype)

    def __call__(self, pixels: Float[Array, "n h w 3"], tokens: Int[Array, "n t"]) -> Float[Array, " n"]:
        words, texts = self._texts(tokens)
        condition, _ = self._texts(jnp.asarray(self.condition, jnp.int32)[None])
        images = self.model.visual_projection(self.model.vision_model(pixels).last_hidden_state)
        images = self.cross_model(images, words, meant(words, condition))[:, 0]
        scale = jnp.exp(self.model.logit_scale.astype(jnp.float32))
        return scale * (unit(images) * unit(texts)).sum(axis=-1)

    def _texts(self, tokens):
        """Projections of all tokens' states, and of the end's."""
        out = self.model.text_model(tokens)
        return self.model.text_projection(out.last_hidden_state), self.model.text_projection(out.pooled)


def meant(words: Float[Array, "n t d"], condition: Float[Array, "1 t d"]) -> Bool[Array, "n 1 1 t"]:
    """Which words the condition is about: those like any of its own, compared with the prompt's most alike."""
    alike = jnp.einsum("ntd,sd->nts", words.astype(jnp.float32), condition[0].astype(jnp.float32)).max(axis=-1)
    return (alike / alike.max(axis=-1, keepdims=True) > THRESHOLD)[:, None, None]


def load_mps(folder: str | Path, *, dtype: Any = jnp.float32, **sizes: Any) -> RewardModel:
    """Read ``mps.safetensors`` in the folder of the CLIP that it was tuned from; scores are 10 or so.

    The folder (laion/CLIP-ViT-H-14-laion2B-s32B-b79K) has config.json, tokenizer and preprocessor_config.json.
    sizes: of the layers on top, where they are not the published ones. Raises UserError for a missing
    file, an unsupported setting and unfit weights.
    """
    file = weights_file(folder, WEIGHTS)
    preprocessor, tokenizer = Preprocessor.from_folder(folder), load_clip_tokenizer(folder)
    clip = CLIPModel.from_config(read_json(Path(folder) / "config.json"), dtype=dtype)
    tokens = partial(clip_tokens, tokenizer, clip.text)
    condition = tokens([CONDITION])
    module = MPS(clip, tuple(condition[0].tolist()), **sizes)
    side = clip.vision.image_size
    shapes = parameter_shapes(module, jnp.zeros((1, side, side, 3)), jnp.asarray(condition))
    return RewardModel(module, load_params(shapes, file, layout=LAYOUT, ignored=UNUSED), preprocessor, tokens)


MPS_SCORE = RewardModelSpec("mps", "MPS", "preference of people for the prompt, over all its conditions", load_mps)
