"""The inner features of a CLIP image tower against transformers', and the distance in them against its definition."""

import jax
import numpy as np
import pytest
import torch
from tiny_models import TEXT
from torch_weights import assert_close, randomise
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from mlcm_jax.evaluation.metrics import perceptual_distance as perceptual
from mlcm_jax.evaluation.metrics.perceptual_distance import layer_features, perceptual_distance
from mlcm_jax.rewards.clip_features import load_clip_encoder, tower_pixels

VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
VISION |= {"image_size": 32, "patch_size": 8}


@pytest.fixture(scope="module")
def torch_model():
    return randomise(CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=12)), 0)


@pytest.fixture(scope="module")
def clip(torch_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    torch_model.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return load_clip_encoder(folder)


def random_images(seed, n=5):
    return np.random.default_rng(seed).integers(0, 256, (n, 32, 32, 3)).astype(np.uint8)


def torch_features(torch_model, clip, images):
    pixels = torch.from_numpy(tower_pixels(clip, images).transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        return torch_model.vision_model(pixels, output_hidden_states=True).hidden_states[1:]


def test_layer_features(torch_model, clip):
    images = random_images(0)
    got = jax.jit(layer_features, static_argnums=0)(clip.module, clip.params, tower_pixels(clip, images))
    want = torch_features(torch_model, clip, images)
    assert got.shape == (3, 5, 17, 16)
    for mine, theirs in zip(got, want, strict=True):
        assert_close(mine, theirs.numpy())


@pytest.mark.parametrize("chunk", [2, 8])
def test_distance(chunk, torch_model, clip, monkeypatch):
    monkeypatch.setattr(perceptual, "CHUNK", chunk)
    a, b = random_images(0), random_images(1)
    got, layers = perceptual_distance(clip, a, b), []
    for first, second in zip(*(torch_features(torch_model, clip, images) for images in (a, b)), strict=True):
        unit = [x[:, 1:] / x[:, 1:].norm(dim=-1, keepdim=True) for x in (first, second)]
        layers.append((unit[0] - unit[1]).pow(2).sum(-1).mean(-1))
    assert_close(got, torch.stack(layers).mean(0).numpy())
    assert got.min() > 1e-3
    np.testing.assert_allclose(perceptual_distance(clip, b, a), got, rtol=1e-4)
    np.testing.assert_allclose(perceptual_distance(clip, a, a), 0, atol=1e-9)
