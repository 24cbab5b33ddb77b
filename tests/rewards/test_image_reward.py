"""ImageReward against the package of its authors, and the folder that it is read from."""

import json

import jax
import numpy as np
import pytest
from recorded_weights import example_images, recorded
from safetensors.numpy import save_file
from torch_weights import assert_close, network_weights

from mlcm_jax.errors import UserError
from mlcm_jax.hub.load import load_params
from mlcm_jax.hub.pipeline import parameter_shapes
from mlcm_jax.hub.preprocess import Preprocessor
from mlcm_jax.rewards import reward_model
from mlcm_jax.rewards.image_reward import load_image_reward
from mlcm_jax.rewards.networks.blip import ImageReward, VisionConfig, read_text_config

BLIP_VISION = VisionConfig(24, 2, 3, 32, 16)
MED = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
MED |= {"vocab_size": 40, "max_position_embeddings": 36, "pad_token_id": 0, "encoder_width": 24}
SMALL = Preprocessor(32, (32, 32), 3, 1 / 255, (0.5, 0.4, 0.3), (0.5, 0.6, 0.7))


def test_scores_are_the_package_s(tmp_path):
    want, tensors = recorded("image_reward")
    save_file(tensors, tmp_path / "w.safetensors")
    module = ImageReward(BLIP_VISION, read_text_config(MED | {"max_position_embeddings": 10}))
    pixels = example_images(3, 32, 32).astype(np.float32) / 255
    shapes = parameter_shapes(module, pixels, want["ids"])
    got = jax.jit(module.apply)({"params": load_params(shapes, tmp_path / "w.safetensors")}, pixels, want["ids"])
    assert_close(got, want["scores"])


@pytest.fixture
def folder(tmp_path):
    """A folder as docs/evaluate.md describes it, of another size."""
    module = ImageReward(BLIP_VISION, read_text_config(MED))
    tensors = network_weights(module, np.zeros((1, 32, 32, 3)), np.zeros((1, 2), int))
    extra = {"blip.vision_proj.weight": np.zeros((3, 24), np.float32), "blip.text_proj.bias": np.zeros(3, np.float32)}
    extra["blip.text_encoder.embeddings.position_ids"] = np.arange(36)[None]
    save_file(tensors | extra, tmp_path / "image_reward.safetensors")
    (tmp_path / "med_config.json").write_text(json.dumps(MED))
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "red",
        "heart",
        "blue",
        "car",
        *"abcdefghijklmnopqrstuvwxyz,",
    ]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    return tmp_path


def test_folder(folder, monkeypatch):
    monkeypatch.setattr(reward_model, "CHUNK", 3)
    model, images = load_image_reward(folder, vision=BLIP_VISION, preprocessor=SMALL), example_images(3, 48, 48)
    tokens = model.tokenize(["Red heart", "blue car " * 30, ""])
    assert tokens.shape == (3, 35)
    assert tokens[0, :5].tolist() == [2, 5, 6, 3, 0] and tokens[1, -1] == 3 and tokens[2, :3].tolist() == [2, 3, 0]
    scores = model(images, ["red heart", "blue car", ""])
    padded = np.concatenate([tokens, np.zeros((3, 1), np.int32)], axis=1)
    want = jax.jit(model.module.apply)({"params": model.params}, model.preprocessor(images), padded)
    assert np.isfinite(scores).all() and np.ptp(scores) > 0.01
    np.testing.assert_allclose(scores[[0, 2]], want[np.array([0, 2])], atol=1e-5)  # more padding changes nothing


def test_unfit_folders(folder):
    (folder / "med_config.json").write_text(json.dumps(MED | {"vocab_size": 7}))
    with pytest.raises(UserError, match=r"word_embeddings\.weight is \[40, 16\], not \[7, 16\]"):
        load_image_reward(folder, vision=BLIP_VISION)
    (folder / "med_config.json").write_text(json.dumps(MED | {"hidden_act": "relu"}))
    with pytest.raises(UserError, match=r"med_config\.json has hidden_act='relu', which is not supported"):
        load_image_reward(folder, vision=BLIP_VISION)
