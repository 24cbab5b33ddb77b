"""Every parameter of the full-size networks has the name and shape that diffusers and transformers give it."""

import math
from pathlib import Path

import configs_full_size
import diffusers
import pytest
import torch
import transformers
from torch_weights import named_shapes

from mlcm_jax.hub.load import read_json
from mlcm_jax.hub.pipeline import network_shapes, read_architecture
from mlcm_jax.models.unet import UNet2DConditionModel
from mlcm_jax.models.vae import AutoencoderKL

SDXL = Path(__file__).parents[2] / "configs" / "architectures" / "sdxl"


@pytest.fixture(scope="module")
def networks():
    return read_architecture(SDXL).networks()


def torch_shapes(config, class_name):
    """Names and shapes of torch's model, on a device that allocates nothing."""
    with torch.device("meta"):
        if hasattr(diffusers, class_name):
            cls = getattr(diffusers, class_name)
            model = cls.from_config(config)
        else:
            cls = getattr(transformers, class_name)
            model = cls(transformers.CLIPTextConfig(**config))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    if class_name == "CLIPTextModel" and "final_layer_norm.weight" in shapes:
        # transformers 5 leaves out the prefix that the published files have
        shapes = {f"text_model.{name}": shape for name, shape in shapes.items()}
    return shapes


@pytest.mark.parametrize(
    ("part", "class_name"),
    [
        ("unet", "UNet2DConditionModel"),
        ("vae", "AutoencoderKL"),
        ("text_encoder", "CLIPTextModel"),
        ("text_encoder_2", "CLIPTextModelWithProjection"),
    ],
)
def test_names_and_shapes_are_torch(networks, part, class_name):
    config = read_json(SDXL / part / "config.json")
    assert named_shapes(networks[part].params) == torch_shapes(config, class_name)


@pytest.mark.parametrize("name", configs_full_size.VAES)
def test_autoencoders_names_and_shapes_are_torch(name):
    config = configs_full_size.VAES[name]
    module = AutoencoderKL.from_config(config)
    assert named_shapes(network_shapes(module, config)) == torch_shapes(config, "AutoencoderKL")
    assert module.config.force_upcast == (name != "sdxl fp16-fix")  # diffusers' default is to upcast
    assert module.config.scaling_factor == (0.18215 if name == "sd15" else 0.13025)


@pytest.mark.parametrize(
    ("name", "millions"), [("SD15", 859.5), ("SD21", 865.9), ("SSD1B", 1331), ("VEGA", 745.2), ("LCM_SD15", 859.6)]
)
def test_other_unets_names_and_shapes_are_torch(name, millions):
    config = getattr(configs_full_size, name)
    ours = named_shapes(network_shapes(UNet2DConditionModel.from_config(config), config))
    assert ours == torch_shapes(config, "UNet2DConditionModel")
    assert sum(map(math.prod, ours.values())) / 1e6 == pytest.approx(millions, rel=1e-3)
