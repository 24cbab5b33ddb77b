"""Chinese-CLIP's text tower against transformers, and the adapter against the same layers in torch, in float32."""

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch_weights import assert_close, randomise, through_files

from mlcm_jax.errors import UserError
from mlcm_jax.hub.pipeline import load_network
from mlcm_jax.hub.save import write_json
from mlcm_jax.models.chinese_clip import ChineseCLIPTextModel

TEXT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "max_position_embeddings": 9,
    "pad_token_id": 3,
}
VISION = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
# Rows of different lengths; 3 is padding, and 0, transformers' default for it, is a word.
IDS = np.array([[1, 7, 0, 9, 22, 2, 3, 3], [1, 30, 2, 3, 3, 3, 3, 3], [1, 5, 6, 39, 10, 11, 12, 2]])
ADAPTER = {"input_dim": 16, "hidden_dim": 24, "pooled_dim": 10, "states_dim": 14, "num_tokens": 8}


def theirs(model):
    with torch.no_grad():
        return model(torch.from_numpy(IDS), attention_mask=torch.from_numpy(IDS != 3).long()).last_hidden_state


def test_tower_is_transformers(tmp_path):
    model = randomise(transformers.ChineseCLIPTextModel(transformers.ChineseCLIPTextConfig(**TEXT)))
    network = through_files(model, tmp_path)
    ours = jax.jit(network.module.apply)({"params": network.params}, IDS)
    assert_close(ours, theirs(model))
    without_mask = np.where(IDS == 3, 4, IDS)
    assert not np.allclose(network.module.apply({"params": network.params}, without_mask)[0, :6], ours[0, :6])


def test_tower_of_a_whole_model(tmp_path):
    config = transformers.ChineseCLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=6)
    model = transformers.ChineseCLIPModel(config)
    model.text_model = transformers.ChineseCLIPTextModel(config.text_config, add_pooling_layer=False)  # as published
    network = through_files(randomise(model), tmp_path, "ChineseCLIPTextModel")
    assert_close(jax.jit(network.module.apply)({"params": network.params}, IDS), theirs(model.text_model))


class TorchAdapter(torch.nn.Module):
    """PEA-Diffusion's adapter as the paper has it (arXiv 2311.17086)."""

    def __init__(self):
        super().__init__()
        layer, gelu, (d, h, p, s, _) = torch.nn.Linear, torch.nn.GELU(), ADAPTER.values()
        self.layernorm = torch.nn.LayerNorm(d)
        self.projector = torch.nn.Sequential(layer(d, h, False), gelu, layer(h, h, False), gelu, layer(h, p, False))
        self.fc = layer(p, s)

    def forward(self, x):
        x = self.projector(self.layernorm(x))
        return self.fc(torch.nn.functional.gelu(x)), x.mean(dim=1)


def test_adapter_is_torch(tmp_path):
    model = randomise(TorchAdapter())
    save_file(model.state_dict(), tmp_path / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    write_json(ADAPTER, tmp_path / "config.json")
    network = load_network(tmp_path, "TextAdapter")
    x = np.random.default_rng(0).standard_normal((2, 8, 16), np.float32)
    ours = network.module.apply({"params": network.params}, x)
    with torch.no_grad():
        states, pooled = model(torch.from_numpy(x))
    assert_close(ours.penultimate, states)
    assert_close(ours.last_hidden_state, states)
    assert_close(ours.pooled, pooled)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "clip_text_model"}, "model_type='clip_text_model', which is not supported"),
        ({"model_type": "chinese_clip", "text_config": 5}, "ChineseCLIPModel's config.json has no text_config"),
        ({**TEXT, "num_attention_heads": 3}, "num_attention_heads=3 does not divide"),
        ({**TEXT, "position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        ({"model_type": "chinese_clip", "text_config": {"hidden_act": "tanh"}}, "hidden_act='tanh'"),
    ],
)
def test_settings_that_are_not_supported(config, message):
    with pytest.raises(UserError, match=message):
        ChineseCLIPTextModel.from_config(config)
