"""Text encoders and tokenizers of another folder in a pipeline's place, with and without an adapter."""

import json
import shutil

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiny_models import tiny_adapted_text
from torch_weights import assert_close
from transformers import BertTokenizerFast, ChineseCLIPTextModel

from mlcm_jax.errors import UserError
from mlcm_jax.hub.lora import with_loras
from mlcm_jax.hub.pipeline import conditioning_shapes, load_pipeline, save_pipeline
from mlcm_jax.hub.text import load_adapted, with_text
from mlcm_jax.sampling.conditioning import encode_prompts, unconditional

PARTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


@pytest.fixture
def other_text(sdxl_folder, tmp_path):
    """The pipeline's own text parts with the first encoder's embeddings doubled and a mark in its tokenizer."""
    for part in PARTS:
        shutil.copytree(sdxl_folder / part, tmp_path / "text" / part)
    file = tmp_path / "text/text_encoder/model.safetensors"
    tensors = load_file(file)
    save_file({k: 2 * v if "token_embedding" in k else v for k, v in tensors.items()}, file, {"format": "pt"})
    (tmp_path / "text/tokenizer/mark.txt").write_text("new")
    return tmp_path / "text"


def test_the_written_pipeline_speaks_as_the_text_folder(sdxl_folder, other_text, tmp_path):
    own = load_pipeline(sdxl_folder)
    other = with_text(own, other_text)
    assert other.unet is own.unet and other.vae is own.vae
    save_pipeline(other, tmp_path / "out")
    assert (tmp_path / "out/tokenizer/mark.txt").is_file()
    states = [encode_prompts(p, ["a cat"], 32) for p in (own, other, load_pipeline(tmp_path / "out"))]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), states[1], states[2]))
    assert not (states[0].hidden_states == states[1].hidden_states).all()


def test_a_text_folder_that_does_not_fit(sdxl_folder, other_text):
    pipeline = load_pipeline(sdxl_folder)
    config_file = other_text / "text_encoder_2" / "config.json"
    width = json.loads(config_file.read_text())["projection_dim"]
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"projection_dim": width // 2}))
    file = other_text / "text_encoder_2/model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"text_projection.weight": tensors["text_projection.weight"][: width // 2]}, file)
    with pytest.raises(UserError, match=f"pooled states .* are {width // 2} wide, but the model takes {width}"):
        with_text(pipeline, other_text)
    shutil.rmtree(other_text / "tokenizer_2")
    with pytest.raises(UserError, match="tokenizer_2 does not exist"):
        with_text(pipeline, other_text)


@pytest.fixture
def adapted_text(tmp_path):
    return tiny_adapted_text(tmp_path / "adapted")


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_the_tower_is_given_what_transformers_makes_of_a_caption(adapted_text):
    network, tokenizer = load_adapted(adapted_text)
    texts = ["红心 hi", "红", "心" * 20]
    theirs = BertTokenizerFast.from_pretrained(adapted_text / "tokenizer")
    encoded = theirs(texts, padding="max_length", truncation=True, max_length=7, return_tensors="pt")
    ours = tokenizer(texts, padding="max_length", truncation=True, return_tensors="np")["input_ids"]
    np.testing.assert_array_equal(ours, encoded.input_ids.numpy())
    tower = ChineseCLIPTextModel.from_pretrained(adapted_text / "text_encoder").eval()
    with torch.no_grad():
        states = tower(encoded.input_ids, attention_mask=encoded.attention_mask).last_hidden_state
    module = network.module
    assert_close(module.tower.apply({"params": network.params["tower"]}, ours), states)
    said = module.adapter.apply({"params": network.params["adapter"]}, states.numpy())
    jax.tree.map(assert_close, module.apply({"params": network.params}, ours), jax.tree.map(np.asarray, said))


def test_an_adapted_tower_stands_for_both_text_encoders(sdxl_folder, adapted_text, tmp_path):
    pipeline = with_text(load_pipeline(sdxl_folder), adapted_text)
    said = encode_prompts(pipeline, ["红心", "心"], 32)
    assert said.hidden_states.shape == (2, 7, 64) and said.pooled.shape == (2, 32)
    assert not np.allclose(said.pooled[0], said.pooled[1])
    shapes = conditioning_shapes(pipeline, 2)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), said) == jax.tree.map(lambda a: (a.shape, a.dtype), shapes)
    assert unconditional(pipeline, 3, 32).hidden_states.shape == (3, 7, 64)
    assert with_loras(pipeline, []).text_encoders[0] is pipeline.text_encoders[0]
    with pytest.raises(UserError, match="A model with a text adapter cannot be written"):
        save_pipeline(pipeline, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda f: shutil.rmtree(f / "tokenizer"),
            "tokenizer does not exist: a text folder needs text_encoder, adapter",
        ),
        (
            lambda f: shutil.rmtree(f / "adapter"),
            "text_encoder_2 does not exist: .*, or text_encoder, adapter, tokenizer",
        ),
        (lambda f: (f / "tokenizer/vocab.txt").unlink(), "tokenizer holds no tokenizer: it needs .* vocab.txt"),
        (lambda f: edit(f / "adapter/config.json", num_tokens=9), "num_tokens=9, but text_encoder takes 8 tokens"),
        (lambda f: edit(f / "adapter/config.json", width=9), "keys that are not supported: width"),
        (lambda f: edit(f / "adapter/config.json", hidden_dim=9), "does not fit the network, 3 tensors have another"),
        (
            lambda f: edit(f / "text_encoder/config.json", pad_token_id=2),
            "pads with 0, but text_encoder has pad_token_id=2",
        ),
        (
            lambda f: edit(f / "text_encoder/config.json", model_type="bert"),
            "model_type='bert', which is not supported: use 'chinese_clip_text_model'",
        ),
        (
            lambda f: (f / "text_encoder/model.safetensors").rename(f / "text_encoder/pytorch_model.bin"),
            "pytorch_model.bin",
        ),
    ],
)
def test_an_adapted_text_folder_that_does_not_fit(sdxl_folder, adapted_text, spoil, message):
    spoil(adapted_text)
    with pytest.raises(UserError, match=message) as error:
        with_text(load_pipeline(sdxl_folder), adapted_text)
    assert len(str(error.value).replace(str(adapted_text), "DIR")) < 300


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"input_dim": 12}, "takes states 12 wide, but those of text_encoder are 16 wide"),
        ({"states_dim": 48}, "token states .* are 48 wide, but the model takes 64"),
        ({"pooled_dim": 20}, "pooled states .* are 20 wide, but the model takes 32"),
    ],
)
def test_widths_that_do_not_fit(sdxl_folder, tmp_path, widths, message):
    with pytest.raises(UserError, match=message):
        with_text(load_pipeline(sdxl_folder), tiny_adapted_text(tmp_path / "adapted", **widths))
