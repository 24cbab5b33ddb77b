"""PickScore, HPS v2 and the aesthetic predictor against transformers and open_clip."""

import json

import jax
import numpy as np
import pytest
import torch
from recorded_weights import example_images, recorded
from safetensors.numpy import save_file
from tiny_models import TEXT, tiny_tokenizer
from torch_weights import assert_close, randomise
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from mlcm_jax.errors import UserError
from mlcm_jax.rewards import reward_model
from mlcm_jax.rewards.aesthetic import load_aesthetic
from mlcm_jax.rewards.hps_v2 import load_hps_v2
from mlcm_jax.rewards.image_reward import load_image_reward
from mlcm_jax.rewards.pick_score import load_pick_score

VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 32, "patch_size": 8}
PROMPTS = ["red heart", "a", "blue car, noto style", "x" * 100, ""]


@pytest.fixture(scope="module")
def clip_model():
    return randomise(CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=12)), 0)


@pytest.fixture
def clip_folder(clip_model, tmp_path):
    clip_model.save_pretrained(tmp_path / "clip")
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32).save_pretrained(tmp_path / "clip")
    tiny_tokenizer(tmp_path / "vocabulary").save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def theirs(clip_model, folder, images):
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    inputs = tokenizer(PROMPTS, padding="max_length", truncation=True, return_tensors="pt")
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(list(images), return_tensors="pt")
    with torch.no_grad():
        return clip_model(**inputs, **pixels)


def test_pick_score_is_transformers(clip_model, clip_folder, monkeypatch):
    """More images than are scored at a time."""
    monkeypatch.setattr(reward_model, "CHUNK", 3)
    model, images = load_pick_score(clip_folder), example_images(5, 48, 48)
    scores = model(images, PROMPTS)
    assert scores.dtype == np.float32
    assert_close(scores, theirs(clip_model, clip_folder, images).logits_per_image.diagonal())
    swapped = model(images, PROMPTS[::-1])
    assert np.abs(swapped[2] - scores[2]) < 1e-5 * np.abs(scores).max() < np.abs(swapped[0] - scores[0])


def test_hps_v2_is_open_clip(clip_folder):
    """A folder of transformers' CLIP, with weights in open_clip's layout beside its own."""
    want, tensors = recorded("open_clip")
    text = {"hidden_size": 24, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    text |= {"vocab_size": 520, "eos_token_id": 513, "hidden_act": "gelu"}
    vision = VISION | {"image_size": 28, "patch_size": 14, "hidden_act": "gelu"}
    config = {"text_config": text, "vision_config": vision, "projection_dim": 12}
    (clip_folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, clip_folder / "hps_v2.safetensors")
    model, pixels = load_hps_v2(clip_folder), example_images(3, 28, 28).astype(np.float32) / 255
    assert_close(jax.jit(model.module.apply)({"params": model.params}, pixels, want["ids"]), want["scores"])


class TorchHead(torch.nn.Module):
    """The predictor's layers as its authors published them."""

    def __init__(self, width):
        super().__init__()
        widths, drops = (width, 1024, 128, 64, 16, 1), (0.2, 0.2, 0.1, None, None)
        layers = []
        for i, drop in enumerate(drops):
            layers += [torch.nn.Linear(widths[i], widths[i + 1]), *([torch.nn.Dropout(drop)] if drop else [])]
        self.layers = torch.nn.Sequential(*layers)


def test_aesthetic(clip_model, clip_folder):
    head = randomise(TorchHead(12), 5)
    save_file({k: v.numpy() for k, v in head.state_dict().items()}, clip_folder / "aesthetic.safetensors")
    model, images = load_aesthetic(clip_folder), example_images(5, 48, 48)
    with torch.no_grad():
        want = head.layers(theirs(clip_model, clip_folder, images).image_embeds)[:, 0]
    scores = model(images, PROMPTS)
    assert_close(scores, want)
    np.testing.assert_array_equal(scores, model(images, PROMPTS[::-1]))


def test_rewards_are_differentiable(clip_folder):
    """The gradient is the slope, and the value is the score up to PIL's rounding."""
    model, images = load_pick_score(clip_folder), example_images(2, 48, 48)
    floats, tokens = images.astype(np.float32) / 127.5 - 1, model.tokenize(PROMPTS[:2])

    def reward(x):
        return model.reward(model.params, x, tokens).sum()

    value, gradient = jax.jit(jax.value_and_grad(reward))(0.9 * floats)
    assert value == pytest.approx(model(np.uint8(np.round((0.9 * floats + 1) * 127.5)), PROMPTS[:2]).sum(), abs=0.05)
    direction = np.random.default_rng(0).normal(size=floats.shape).astype(np.float32)
    step = 1e-2 * direction
    slope = (jax.jit(reward)(0.9 * floats + step) - jax.jit(reward)(0.9 * floats - step)) / 2
    assert float((gradient * step).sum()) == pytest.approx(float(slope), rel=0.02)


MISTAKES = {
    "no head": (load_aesthetic, r"aesthetic\.safetensors does not exist: docs/evaluate\.md"),
    "no weights": (load_hps_v2, r"hps_v2\.safetensors does not exist"),
    "no reward": (load_image_reward, r"image_reward\.safetensors does not exist"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_missing_files(case, clip_folder):
    load, message = MISTAKES[case]
    with pytest.raises(UserError, match=message):
        load(clip_folder)


def test_head_of_another_clip(clip_folder):
    head = randomise(TorchHead(768), 5)
    save_file({k: v.numpy() for k, v in head.state_dict().items()}, clip_folder / "aesthetic.safetensors")
    with pytest.raises(UserError, match=r"layers\.0\.weight is \[1024, 768\], not \[1024, 12\]"):
        load_aesthetic(clip_folder)


def test_prompts_for_each_image(clip_folder):
    with pytest.raises(UserError, match="5 images and 2 prompts"):
        load_pick_score(clip_folder)(example_images(5, 48, 48), PROMPTS[:2])
