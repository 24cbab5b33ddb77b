"""The CLIP towers against transformers in float32, with weights that go through transformers' own files."""

import jax
import numpy as np
import pytest
import torch
import transformers
from torch_weights import assert_close, channels_first, randomise, through_files

from mlcm_jax.errors import UserError
from mlcm_jax.hub.load import load_params, read_json
from mlcm_jax.models.clip import CLIPModel, CLIPTextModel

TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "projection_dim": 10,
}
TEXT = {**TOWER, "vocab_size": 50, "max_position_embeddings": 9, "bos_token_id": 1, "pad_token_id": 0}
VISION = {**TOWER, "image_size": 12, "patch_size": 4, "hidden_size": 8}
EOS = 7
# The last token of interest by either rule is at another place: the largest id, and the first EOS (where there is one).
IDS = np.array([[1, 4, 49, 30, EOS, 2, EOS, 0], [1, EOS, 12, 13, 2, 48, 48, 48], [3, 2, 5, 6, 9, 4, 33, 8]])


@pytest.mark.parametrize(
    ("class_name", "hidden_act", "eos_token_id"),
    [
        ("CLIPTextModel", "quick_gelu", EOS),
        ("CLIPTextModel", "gelu", 2),
        ("CLIPTextModelWithProjection", "gelu", EOS),
        ("CLIPTextModelWithProjection", "quick_gelu", 2),
    ],
)
def test_text_tower_is_transformers(class_name, hidden_act, eos_token_id, tmp_path):
    config = transformers.CLIPTextConfig(**TEXT, hidden_act=hidden_act, eos_token_id=eos_token_id)
    model = randomise(getattr(transformers, class_name)(config))
    network = through_files(model, tmp_path)
    ours = jax.jit(network.module.apply)({"params": network.params}, IDS)
    with torch.no_grad():
        theirs = model(input_ids=torch.from_numpy(IDS), output_hidden_states=True)
    assert_close(ours.penultimate, theirs.hidden_states[-2])
    assert_close(ours.last_hidden_state, theirs.last_hidden_state)
    assert_close(ours.pooled, theirs.text_embeds if network.module.with_projection else theirs.pooler_output)


def test_end_of_text_rules_differ_on_these_ids():
    """Else the parity above would not tell them apart."""
    assert ((IDS == EOS).argmax(-1) != IDS.argmax(-1)).all()


def test_vision_tower_is_transformers(tmp_path):
    model = randomise(transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**VISION)))
    network = through_files(model, tmp_path)
    pixels = np.random.default_rng(0).standard_normal((2, 12, 12, 3), np.float32)
    ours = jax.jit(network.module.apply)({"params": network.params}, pixels)
    with torch.no_grad():
        assert_close(ours, model(channels_first(pixels)).image_embeds)


def test_both_towers_are_transformers(tmp_path):
    model = transformers.CLIPModel(
        transformers.CLIPConfig(text_config={**TEXT, "eos_token_id": EOS}, vision_config=VISION, projection_dim=10)
    )
    randomise(model).save_pretrained(tmp_path)
    module = CLIPModel.from_config(read_json(tmp_path / "config.json"))
    pixels = np.random.default_rng(0).standard_normal((2, 12, 12, 3), np.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), IDS, pixels)["params"]
    params = load_params(shapes, tmp_path)
    images, texts = jax.jit(module.apply)({"params": params}, IDS, pixels)
    with torch.no_grad():
        theirs = model(input_ids=torch.from_numpy(IDS), pixel_values=channels_first(pixels))
    ours_unit, texts_unit = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (images, texts))
    assert_close(ours_unit, theirs.image_embeds)
    assert_close(texts_unit, theirs.text_embeds)
    assert_close(np.exp(params["logit_scale"]) * ours_unit @ texts_unit.T, theirs.logits_per_image)


def test_unsupported_activation_is_named():
    with pytest.raises(UserError, match=r"hidden_act='relu'"):
        CLIPTextModel.from_config({**TEXT, "hidden_act": "relu"})
