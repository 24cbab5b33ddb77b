"""The inner features of a CLIP image tower against transformers', and the distance in them against its definition."""

import jax
import numpy as np
import pytest
import torch
from tiny_models import TEXT
from torch_weights import assert_close, randomise
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from mlcm_jax.evaluation import perceptual
from mlcm_jax.evaluation.perceptual import layer_features, perceptual_distance
from mlcm_jax.rewards.clip_features import load_scorer, tower_pixels

VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
VISION |= {"image_size": 32, "patch_size": 8}


@pytest.fixture(scope="module")
def torch_model():
    return randomise(CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=12)), 0)


@pytest.fixture(scope="module")
def scorer(torch_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scorer")
    torch_model.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return load_scorer(folder)


def pictures(seed, n=5):
    return np.random.default_rng(seed).integers(0, 256, (n, 32, 32, 3)).astype(np.uint8)


def torch_features(torch_model, scorer, images):
    pixels = torch.from_numpy(tower_pixels(scorer, images).transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        return torch_model.vision_model(pixels, output_hidden_states=True).hidden_states[1:]


def test_layer_features(torch_model, scorer):
    images = pictures(0)
    got = jax.jit(layer_features, static_argnums=0)(
        scorer.network.module, scorer.network.params, tower_pixels(scorer, images)
    )
    want = torch_features(torch_model, scorer, images)
    assert got.shape == (3, 5, 17, 16)
    for mine, theirs in zip(got, want, strict=True):
        assert_close(mine, theirs.numpy())


@pytest.mark.parametrize("chunk", [2, 8])
def test_distance(chunk, torch_model, scorer, monkeypatch):
    monkeypatch.setattr(perceptual, "CHUNK", chunk)
    a, b = pictures(0), pictures(1)
    got, layers = perceptual_distance(scorer, a, b), []
    for first, second in zip(*(torch_features(torch_model, scorer, images) for images in (a, b)), strict=True):
        unit = [x[:, 1:] / x[:, 1:].norm(dim=-1, keepdim=True) for x in (first, second)]
        layers.append((unit[0] - unit[1]).pow(2).sum(-1).mean(-1))
    assert_close(got, torch.stack(layers).mean(0).numpy())
    assert got.min() > 1e-3
    np.testing.assert_allclose(perceptual_distance(scorer, b, a), got, rtol=1e-4)
    np.testing.assert_allclose(perceptual_distance(scorer, a, a), 0, atol=1e-9)
