"""Text features and CLIP scores against transformers' CLIPModel."""

import numpy as np
import pytest
import torch
from tiny_models import TEXT, tiny_tokenizer
from torch_weights import assert_close, randomise
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from mlcm_jax.errors import UserError
from mlcm_jax.rewards import clip_features
from mlcm_jax.rewards.clip_features import clip_tokens, load_clip_encoder, load_clip_tokenizer, text_features
from mlcm_jax.rewards.clip_score import load_clip_score

VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 32, "patch_size": 8}
PROMPTS = ["red heart", "a", "blue car, noto style", "", "x" * 100]


@pytest.fixture(scope="module")
def torch_model():
    return randomise(CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=12)), 0)


@pytest.fixture(scope="module")
def folder(torch_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    torch_model.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    tiny_tokenizer(folder.with_name("vocabulary")).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("chunk", [2, 5, 8])
def test_features_and_scores(chunk, torch_model, folder, monkeypatch):
    """More, as many and fewer prompts than are encoded at a time; the longest is cut."""
    monkeypatch.setattr(clip_features, "CHUNK", chunk)
    clip, tokenizer = load_clip_encoder(folder), load_clip_tokenizer(folder)
    images = np.random.default_rng(0).integers(0, 256, (len(PROMPTS), 32, 32, 3)).astype(np.uint8)
    pixels = clip.preprocessor(images).transpose(0, 3, 1, 2)
    inputs = tokenizer(PROMPTS, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        want = torch_model(**inputs, pixel_values=torch.from_numpy(pixels.copy()))
        want_texts = torch_model.get_text_features(**inputs).pooler_output.numpy()
    texts = text_features(clip, clip_tokens(tokenizer, clip.module.text, PROMPTS))
    assert texts.dtype == np.float32
    assert_close(texts, want_texts)
    scores = load_clip_score(folder)(images, PROMPTS)
    cosines = (want.logits_per_image / torch_model.logit_scale.exp()).diagonal().detach().numpy()
    assert np.ptp(cosines) > 0.01
    np.testing.assert_allclose(scores, cosines, atol=1e-4)


def test_another_tokenizer(folder):
    tokenizer = load_clip_tokenizer(folder)
    tokenizer.model_max_length = 80
    with pytest.raises(UserError, match=r"makes 80 tokens a prompt .* takes 77 tokens of 520: use the CLIP's own"):
        clip_tokens(tokenizer, load_clip_encoder(folder).module.text, PROMPTS)


def test_no_tokenizer(tmp_path):
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_clip_tokenizer(tmp_path)
