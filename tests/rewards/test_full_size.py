"""The networks of reward models and features at their published sizes, by names and shapes alone."""

import json
import math

import configs_full_size
import numpy as np
import pytest
import torch
import transformers
from recorded_weights import recorded
from torch_weights import named_shapes

from mlcm_jax.evaluation.networks.inception import InceptionV3
from mlcm_jax.hub.pipeline import network_shapes, parameter_shapes
from mlcm_jax.models.clip import CLIPModel
from mlcm_jax.rewards.networks.blip import ImageReward, VisionConfig, read_text_config


@pytest.mark.parametrize(("name", "millions"), [("CLIP_L14", 427.6), ("CLIP_H14", 986.1), ("CLIP_G14", 1366.7)])
def test_clip(name, millions):
    config = getattr(configs_full_size, name)
    ours = named_shapes(network_shapes(CLIPModel.from_config(config), config))
    with torch.device("meta"):
        model = transformers.CLIPModel(transformers.CLIPConfig(**config))
    assert ours == {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert sum(map(math.prod, ours.values())) / 1e6 == pytest.approx(millions, rel=1e-3)


def test_image_reward():
    module = ImageReward(VisionConfig(), read_text_config(configs_full_size.MED_CONFIG))
    ours = named_shapes(parameter_shapes(module, np.zeros((1, 224, 224, 3)), np.zeros((1, 35), int)))
    theirs = json.loads(str(recorded("image_reward")[0]["full_size_shapes"]))
    assert ours == {name: tuple(shape) for name, shape in theirs.items()}


def test_inception():
    """torchvision counts 27.2 M with both classifiers; the names are compared in test_inception_features.py."""
    ours = named_shapes(parameter_shapes(InceptionV3(), np.zeros((1, 299, 299, 3))))
    statistics = sum(math.prod(shape) for name, shape in ours.items() if "running" in name)
    assert sum(map(math.prod, ours.values())) - statistics == 21_785_568
