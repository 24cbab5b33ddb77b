"""Conditioning against the encode_prompt of diffusers' own pipelines, with tiny random encoders."""

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import transformers
from torch_weights import assert_close, randomise, through_files

from mlcm_jax.hub.pipeline import Pipeline
from mlcm_jax.hub.tokenizer import load_tokenizer
from mlcm_jax.sampling.conditioning import CHUNK, encode_prompts, unconditional

TOKENIZER = Path(__file__).parents[2] / "examples" / "emoji" / "tokenizer"
PROMPTS = ["a red heart", "", "grinning face " * 60, "clown, with sunglasses!"]
MANY = [f"{i} {PROMPTS[i % len(PROMPTS)]}" for i in range(CHUNK + 5)]


def text_config(tokenizer, width, **kwargs):
    return transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=24,
        num_attention_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=tokenizer.model_max_length,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **kwargs,
    )


def our_pipeline(theirs, encoders, tokenizer, folder, **model_index):
    networks = tuple(through_files(encoder, folder / str(i)) for i, encoder in enumerate(encoders))
    return Pipeline(
        unet=None,
        vae=None,
        text_encoders=networks,
        tokenizers=(tokenizer,) * len(networks),
        scheduler_config={},
        model_index={"_class_name": type(theirs).__name__, **model_index},
        folder=folder,
    )


@pytest.fixture(scope="module", params=[True, False], ids=["zeros", "empty prompt"])
def sdxl(request, tmp_path_factory):
    """(diffusers' pipeline, ours): two encoders; the unconditional branch by either rule."""
    tokenizer = load_tokenizer(TOKENIZER, "CLIPTokenizer")
    encoders = (
        randomise(transformers.CLIPTextModel(text_config(tokenizer, 8)), 0),
        randomise(
            transformers.CLIPTextModelWithProjection(text_config(tokenizer, 12, projection_dim=10, hidden_act="gelu")),
            1,
        ),
    )
    theirs = diffusers.StableDiffusionXLPipeline(
        vae=None,
        unet=None,
        scheduler=None,
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        force_zeros_for_empty_prompt=request.param,
        add_watermarker=False,
    )
    folder = tmp_path_factory.mktemp("sdxl")
    return theirs, our_pipeline(theirs, encoders, tokenizer, folder, force_zeros_for_empty_prompt=request.param)


@pytest.mark.parametrize("prompts", [PROMPTS, MANY], ids=["one chunk", "two chunks"])
def test_sdxl_conditioning_is_diffusers(sdxl, prompts):
    theirs, ours = sdxl
    with torch.no_grad():
        states, negative_states, pooled, negative_pooled = theirs.encode_prompt(prompts, device="cpu")
    conditioning = encode_prompts(ours, prompts, 64)
    assert_close(conditioning.hidden_states, states)
    assert_close(conditioning.pooled, pooled)
    np.testing.assert_array_equal(conditioning.time_ids, [[64, 64, 0, 0, 64, 64]] * len(prompts))
    empty = unconditional(ours, len(prompts), 64)
    assert_close(empty.hidden_states, negative_states)
    assert_close(empty.pooled, negative_pooled)
    assert np.asarray(empty.pooled).any() != theirs.config.force_zeros_for_empty_prompt
    np.testing.assert_array_equal(empty.time_ids, conditioning.time_ids)


def test_sd_conditioning_is_diffusers(tmp_path):
    tokenizer = load_tokenizer(TOKENIZER, "CLIPTokenizer")
    encoder = randomise(transformers.CLIPTextModel(text_config(tokenizer, 8)))
    theirs = diffusers.StableDiffusionPipeline(
        vae=None,
        unet=None,
        scheduler=None,
        text_encoder=encoder,
        tokenizer=tokenizer,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    ours = our_pipeline(theirs, (encoder,), tokenizer, tmp_path)
    with torch.no_grad():
        states, negative_states = theirs.encode_prompt(PROMPTS, "cpu", 1, True)
    assert_close(encode_prompts(ours, PROMPTS, 64).hidden_states, states)
    assert_close(unconditional(ours, len(PROMPTS), 64).hidden_states, negative_states)
