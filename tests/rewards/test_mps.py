"""MPS against the layers that its authors published, and the folder that it is read from."""

import json

import jax
import numpy as np
import pytest
from recorded_weights import example_images, recorded
from safetensors.numpy import save_file
from tiny_models import tiny_tokenizer
from torch_weights import assert_close, network_weights
from transformers import CLIPImageProcessorPil

from mlcm_jax.errors import UserError
from mlcm_jax.hub.load import load_params
from mlcm_jax.hub.pipeline import parameter_shapes
from mlcm_jax.models.clip import CLIPModel
from mlcm_jax.rewards.mps import LAYOUT, MPS, UNUSED, load_mps

TOWER = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": "gelu"}
TEXT = TOWER | {"hidden_size": 24, "intermediate_size": 32, "vocab_size": 60, "eos_token_id": 59}
TEXT |= {"max_position_embeddings": 8}
VISION = TOWER | {"hidden_size": 16, "intermediate_size": 24, "image_size": 32, "patch_size": 8}
CONFIG = {"text_config": TEXT, "vision_config": VISION, "projection_dim": 12}
SIZES = {"layers": 2, "heads": 3, "head_dim": 8}
CONDITION = (5, 6, 7, *[59] * 5)


def test_scores_are_the_authors(tmp_path):
    """The recorded prompts have words that count and words that do not."""
    want, tensors = recorded("mps")
    tensors |= {name: np.zeros_like(t) for name, t in tensors.items() if name.endswith(".fn.norm.bias")}
    save_file(tensors, tmp_path / "w.safetensors")
    module = MPS(CLIPModel.from_config(CONFIG), CONDITION, **SIZES)
    pixels = example_images(3, 32, 32).astype(np.float32) / 255
    shapes = parameter_shapes(module, pixels, want["ids"])
    params = load_params(shapes, tmp_path / "w.safetensors", layout=LAYOUT, ignored=UNUSED)
    score = jax.jit(MPS.apply, static_argnums=0)
    assert_close(score(module, {"params": params}, pixels, want["ids"]), want["scores"])
    everything = MPS(module.model, (58, *[59] * 7), **SIZES)
    other = score(everything, {"params": params}, pixels, want["ids"])
    assert np.abs(other - want["scores"]).max() > 1e-3 * np.abs(want["scores"]).max(), "the condition changes nothing"


@pytest.fixture
def folder(tmp_path):
    """A folder as docs/evaluate.md describes it, of another size."""
    text = TEXT | {"vocab_size": 520, "eos_token_id": 513, "max_position_embeddings": 77}
    config = CONFIG | {"text_config": text}
    tiny_tokenizer(tmp_path / "vocabulary").save_pretrained(tmp_path)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    module = MPS(CLIPModel.from_config(config), (1,) * 77, **SIZES)
    tensors = network_weights(module, np.zeros((1, 32, 32, 3)), np.zeros((1, 77), int))
    save_file({LAYOUT.places([name])[name].name: t for name, t in tensors.items()}, tmp_path / "mps.safetensors")
    return tmp_path


def test_folder(folder):
    model, images = load_mps(folder, **SIZES), example_images(2, 48, 48)
    scores = model(images, ["red heart", "blue car"])
    assert scores.dtype == np.float32 and np.isfinite(scores).all()
    assert np.abs(scores - model(images, ["blue car", "red heart"])).min() > 1e-4
    tokens = model.tokenize(["red heart", "blue car"])
    gradient = jax.jit(jax.grad(lambda x: model.reward(model.params, x, tokens).sum()))
    assert np.abs(gradient(images.astype(np.float32) / 127.5 - 1)).max() > 0


def test_weights_of_another_size(folder):
    with pytest.raises(UserError, match=r"cross_model\.layers\.2\.0\.fn\."):
        load_mps(folder, **SIZES | {"layers": 3})
