"""What a CLIP config.json may say, and what follows from it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from torch_weights import assert_close, randomise, through_files

from mlcm_jax.errors import UserError
from mlcm_jax.hub.pipeline import load_network
from mlcm_jax.models.clip import CLIPModel, CLIPTextModel, CLIPVisionModel

END = 49
TEXT = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
    "projection_dim": 12,
    "bos_token_id": 48,
    "eos_token_id": END,
    "pad_token_id": END,
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 20,
    "patch_size": 8,  # does not divide image_size: the last pixels are left out
    "projection_dim": 12,
}
IDS = np.array([[48, 3, 4, END, END, END, END], [48, 5, 6, 7, 8, END, 0], [48, 9, 2, END, 0, 0, 0]])
# What old config.json files hold for generation, in every tower; openai's own CLIP models have it.
GENERATION = {"top_k": 50, "do_sample": False, "max_length": 20, "id2label": {"0": "LABEL_0"}, "pruned_heads": {}}


def run(network, *inputs, **kwargs):
    return jax.jit(lambda params: network.module.apply({"params": params}, *inputs, **kwargs))(network.params)


def text_model(**settings):
    return randomise(transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT | settings)))


def clip_model():
    text, vision = TEXT | {"projection_dim": 5}, VISION | {"projection_dim": 7}  # not the widths that count
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    return randomise(transformers.CLIPModel(config))


def test_the_state_before_the_only_layer_is_the_embeddings(tmp_path):
    model = text_model(num_hidden_layers=1)
    assert_close(run(through_files(model, tmp_path), IDS).penultimate, model.embeddings(torch.from_numpy(IDS)))


def test_later_tokens_do_not_matter(tmp_path):
    network = through_files(text_model(), tmp_path)
    changed = IDS.copy()
    changed[:, 4:] = 1
    a, b = (np.asarray(run(network, ids).last_hidden_state) for ids in (IDS, changed))
    np.testing.assert_allclose(a[:, :4], b[:, :4], atol=1e-5)
    assert np.abs(a[:, 4:] - b[:, 4:]).max() > 0.1


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_patches_that_do_not_fill_the_image(act, tmp_path):
    config = transformers.CLIPVisionConfig(**VISION, hidden_act=act)
    model = randomise(transformers.CLIPVisionModelWithProjection(config))
    pixels = np.random.default_rng(0).standard_normal((3, 20, 20, 3), np.float32)
    with torch.no_grad():
        want = model(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())).image_embeds
    assert_close(run(through_files(model, tmp_path), pixels), want)


def test_compute_in_bfloat16(tmp_path):
    model = text_model()
    model.save_pretrained(tmp_path)
    network = load_network(tmp_path, "CLIPTextModel", dtype=jnp.bfloat16)
    got = run(network, IDS)
    assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(network.params)} == {jnp.dtype(jnp.float32)}
    with torch.no_grad():
        assert_close(np.float32(got.pooled), model(torch.from_numpy(IDS)).pooler_output, tolerance=0.05)


def test_logit_scale_starts_at_the_setting():
    config = {"text_config": TEXT, "vision_config": VISION, "logit_scale_init_value": 1.5}
    pixels = np.zeros((1, 20, 20, 3), np.float32)
    module = CLIPModel.from_config(config)
    params = module.init(jax.random.key(0), pixels, method="encode_images")["params"]
    assert params["logit_scale"].shape == () and params["logit_scale"] == 1.5


def test_settings_that_change_nothing_are_read():
    assert CLIPTextModel.from_config(TEXT | GENERATION) == CLIPTextModel.from_config(TEXT)
    assert CLIPVisionModel.from_config(VISION | GENERATION) == CLIPVisionModel.from_config(VISION)
    every_key = clip_model().config.to_dict()  # save_pretrained leaves out what is at its default
    assert CLIPModel.from_config(every_key).projection_dim == 12


def test_a_tower_that_is_given_twice(tmp_path):
    """openai/clip-vit-large-patch14's config.json repeats its towers; transformers reads text_config_dict."""
    model = clip_model()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"text_config_dict": TEXT, "text_config": config["text_config"] | {"hidden_act": "gelu"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert transformers.CLIPConfig.from_pretrained(tmp_path).text_config.hidden_act == "quick_gelu"
    network = load_network(tmp_path, "CLIPModel")
    with torch.no_grad():
        want = model.get_text_features(torch.from_numpy(IDS)).pooler_output
    assert_close(run(network, IDS, method="encode_texts"), want)


UNSUPPORTED = {
    "key": (CLIPTextModel, TEXT | {"rope_theta": 1.0}, "CLIPTextModel's config.json has keys .* rope_theta"),
    "class": (CLIPTextModel, TEXT | {"architectures": ["CLIPModel"]}, "is a CLIPModel's, not a text encoder's"),
    "heads": (CLIPTextModel, TEXT | {"num_attention_heads": 3}, "hidden_size=16, which num_attention_heads=3 does not"),
    "eos": (CLIPTextModel, TEXT | {"eos_token_id": [1, 2]}, r"eos_token_id=\[1, 2\], .*: use a whole number"),
    "decoder": (CLIPTextModel, TEXT | {"is_decoder": True}, "is_decoder=True, which is not supported: use False"),
    "sides": (CLIPVisionModel, VISION | {"image_size": [8, 16]}, r"image_size=\[8, 16\], .*: use a whole"),
    "channels": (CLIPVisionModel, VISION | {"num_channels": 4}, "num_channels=4, which is not supported: use 3"),
    "no tower": (CLIPModel, {"text_config": TEXT}, "has no vision_config"),
    "tower": (CLIPModel, {"text_config": TEXT | {"x": 1}, "vision_config": VISION}, "CLIPModel.text_config's .* x;"),
    "top": (CLIPModel, {"text_config": TEXT, "vision_config": VISION, "y": 1}, "CLIPModel's config.json .* y;"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported_settings(case):
    network, config, message = UNSUPPORTED[case]
    with pytest.raises(UserError, match=message) as e:
        network.from_config(config)
    assert "\n" not in str(e.value)
