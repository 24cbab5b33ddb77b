"""Every parameter of the full-size SDXL networks has the name and shape that diffusers and transformers give it."""

from pathlib import Path

import diffusers
import pytest
import torch
import transformers

from mlcm_jax.hub import names
from mlcm_jax.hub.load import read_json
from mlcm_jax.hub.pipeline import read_architecture

SDXL = Path(__file__).parents[2] / "configs" / "architectures" / "sdxl"


@pytest.fixture(scope="module")
def networks():
    return read_architecture(SDXL).networks()


def torch_shapes(part, class_name):
    """Names and shapes of torch's model, on a device that allocates nothing."""
    config = read_json(SDXL / part / "config.json")
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
    ours = {
        name: names.torch_shape(path, leaf.shape)
        for path, leaf, torch_names in names.walk(networks[part].params)
        for name in torch_names
    }
    assert ours == torch_shapes(part, class_name)
