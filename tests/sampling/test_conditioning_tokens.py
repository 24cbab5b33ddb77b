"""Tokenizers and text encoders that differ from or do not fit each other, default zeros, and long lists of prompts."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from tiny_models import TEXT, tiny_tokenizer
from torch_weights import assert_close, randomise, through_files
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from mlcm_jax.errors import UserError
from mlcm_jax.sampling import conditioning
from mlcm_jax.sampling.conditioning import encode_prompts, tokenize, unconditional

PROMPTS = ["a cat", "", "word " * 60]
# The second encoder differs from the first in all that could be mixed up between the two.
TEXT_2 = TEXT | {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "hidden_act": "gelu"}


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """Diffusers' pipeline; as in SDXL, the second tokenizer pads with "!", the id 0."""
    vocab = tmp_path_factory.mktemp("vocab")
    tokenizer, tokenizer_2 = tiny_tokenizer(vocab), tiny_tokenizer(vocab)
    tokenizer_2.pad_token = "!"
    assert tokenizer_2.pad_token_id == 0 != tokenizer.pad_token_id
    return StableDiffusionXLPipeline(
        vae=None,
        unet=None,
        text_encoder=randomise(CLIPTextModel(CLIPTextConfig(**TEXT)), 0),
        text_encoder_2=randomise(CLIPTextModelWithProjection(CLIPTextConfig(**TEXT_2, projection_dim=20)), 1),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        scheduler=DDIMScheduler(),
        force_zeros_for_empty_prompt=False,
    )


@pytest.fixture(scope="module")
def networks(stock, tmp_path_factory):
    return [through_files(e, tmp_path_factory.mktemp("encoder")) for e in (stock.text_encoder, stock.text_encoder_2)]


@pytest.fixture
def pipeline(stock, networks):
    model_index = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": False}
    tokenizers = (stock.tokenizer, stock.tokenizer_2)
    return SimpleNamespace(text_encoders=networks, tokenizers=tokenizers, model_index=model_index)


def test_tokenizers_that_pad_differently(stock, pipeline):
    with torch.no_grad():
        states, empty_states, pooled, empty_pooled = stock.encode_prompt(PROMPTS, do_classifier_free_guidance=True)
    got, empty = encode_prompts(pipeline, PROMPTS, 64), unconditional(pipeline, 3, 64)
    assert got.hidden_states.shape == (3, 77, 32 + 24) and got.pooled.shape == (3, 20)
    for ours, theirs in (
        (got.hidden_states, states),
        (got.pooled, pooled),
        (empty.hidden_states, empty_states),
        (empty.pooled, empty_pooled),
    ):
        assert_close(ours, theirs, tolerance=1e-5)


def test_long_prompts_are_cut(stock):
    ids = tokenize(stock.tokenizer_2, ["word " * 60, "a"])
    assert ids.shape == (2, 77) and ids.dtype == np.int32
    assert ids[0, 0] == ids[1, 0] == 512 and ids[0, -1] == ids[1, 2] == 513  # start and end survive the cut
    assert not ids[1, 3:].any()


def test_zeros_by_default_for_sdxl_only(pipeline):
    """The default of diffusers' StableDiffusionXLPipeline is True, for folders that do not say."""
    pipeline.model_index = {"_class_name": "StableDiffusionXLPipeline"}
    zeros = unconditional(pipeline, 2, 64)
    assert not np.any(zeros.pooled) and not np.any(zeros.hidden_states) and np.all(zeros.time_ids[:, 0] == 64)
    pipeline.model_index = {"_class_name": "StableDiffusionPipeline"}
    assert np.any(unconditional(pipeline, 2, 64).hidden_states)


@pytest.mark.parametrize("n", [8, 9, 21])
def test_all_chunks_are_one_compilation(pipeline, n, monkeypatch):
    monkeypatch.setattr(conditioning, "CHUNK", 8)
    prompts = [f"image {i}" for i in range(n)]
    conditioning._encode.clear_cache()
    got = encode_prompts(pipeline, prompts, 64)
    assert conditioning._encode._cache_size() == 1
    assert {len(leaf) for leaf in jax.tree.leaves(got)} == {n}
    for i in (0, n - 1):
        jax.tree.map(
            lambda many, one, i=i: np.testing.assert_allclose(many[i], one[0], atol=1e-4),
            got,
            encode_prompts(pipeline, prompts[i : i + 1], 64),
        )


def test_tokenizers_that_do_not_fit(pipeline, tmp_path):
    """Without these checks the states would be NaN: JAX reads nothing beyond a table's end."""
    longer, richer = tiny_tokenizer(tmp_path / "a"), tiny_tokenizer(tmp_path / "b")
    longer.model_max_length = 100
    richer.add_tokens([f"<new{i}>" for i in range(10)])
    fitting = pipeline.tokenizers[0]
    pipeline.tokenizers = (fitting, longer)
    with pytest.raises(UserError, match="model_max_length is 100, but its text encoder takes 77 tokens"):
        encode_prompts(pipeline, ["a"], 64)
    pipeline.tokenizers = (richer, fitting)
    encode_prompts(pipeline, ["a"], 64)
    with pytest.raises(UserError, match="made the id 523, but its text encoder has 520 tokens"):
        encode_prompts(pipeline, ["a <new9>"], 64)
