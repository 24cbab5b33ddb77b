"""T2I-Adapters and IP-Adapters that do not fit, and what is none: one sentence before a weight is read."""

import dataclasses
import json
import re
import shutil

import pytest
import torch
from adapter_cases import PIPELINES, SIDE, TOWER, save_adapters
from safetensors.torch import load_file, save_file
from tiny_models import ONE_LEVEL_XL, save_sdxl
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

from mlcm_jax.errors import UserError
from mlcm_jax.hub.ip_adapter import load_ip_adapter
from mlcm_jax.hub.pipeline import load_pipeline
from mlcm_jax.hub.preprocess import clip_preprocessor
from mlcm_jax.hub.t2i_adapter import load_t2i_adapter


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return load_pipeline(save_sdxl(tmp_path_factory.mktemp("one_level"), ONE_LEVEL_XL))


@pytest.fixture(scope="module")
def places(pipeline, sd15_folder, tmp_path_factory):
    """A folder with adapters by family."""
    root = tmp_path_factory.mktemp("adapters")
    for family, folder in (("sdxl", pipeline.folder), ("sd15", sd15_folder)):
        save_adapters(PIPELINES[family].from_pretrained(folder, local_files_only=True).unet, root / family, family)
    return root


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"_class_name": "ControlNetModel"}, "holds ControlNetModel, not T2IAdapter"),
        ({"channels": [32, 64]}, "another UNet (features' widths and pixels along a place: [[32, 2], [64, 2]]"),
        ({"downscale_factor": 8}, "[[64, 8], [64, 8]], and the model has [[64, 2], [64, 2]]): use a T2I-Adapter"),
        ({"channels": [64, 64, 64]}, "[[64, 2], [64, 2], [64, 4]], and the model has [[64, 2], [64, 2]]"),
        ({"num_res_blocks": 2}, "lacks"),
        ({"in_channels": 2}, "in_channels=2, which is not supported"),
    ],
)
def test_a_t2i_adapter_that_does_not_fit_is_refused(pipeline, places, tmp_path, settings, words):
    folder = shutil.copytree(places / "sdxl" / "t2i_1", tmp_path / "t2i")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    with pytest.raises(UserError, match=re.escape(words)):
        load_t2i_adapter(folder, pipeline)


def renamed(file, out, **changes):
    """The file's tensors, some under another name."""
    tensors = load_file(file)
    save_file({changes.get(name.replace(".", "_"), name): tensor for name, tensor in tensors.items()}, out)


@pytest.fixture(scope="module")
def broken(places, tmp_path_factory):
    """Files and folders that hold no IP-Adapter that can be used, by name."""
    root, file = tmp_path_factory.mktemp("broken"), places / "sdxl" / "ip-adapter.safetensors"
    for name in ("pickles", "several", "none", "alone", "other_encoder"):
        (root / name).mkdir()
    (root / "pickles" / "ip-adapter.bin").write_bytes(b"")
    for name in ("several/a", "several/b", "alone/a", "other_encoder/a"):
        shutil.copy(file, root / f"{name}.safetensors")
    encoder = CLIPVisionConfig(**TOWER, image_size=SIDE, patch_size=8, projection_dim=8)
    CLIPVisionModelWithProjection(encoder).save_pretrained(root / "other_encoder" / "image_encoder")
    renamed(file, root / "plus.safetensors", image_proj_proj_weight="image_proj.latents")
    renamed(file, root / "face.safetensors", ip_adapter_1_to_k_ip_weight="ip_adapter.0.to_q_lora.up.weight")
    save_file({"weight": torch.zeros(1)}, root / "else.safetensors")
    return root


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pickles", "ip-adapter.bin is a pickle, never read here: convert it to safetensors"),
        ("pickles/ip-adapter.bin", "is a pickle"),
        ("several", "holds a.safetensors, b.safetensors: name one"),
        ("none", "holds no .safetensors file: name one"),
        ("nowhere.safetensors", "does not exist"),
        ("plus.safetensors", "an IP-Adapter of another kind (Plus, Full Face or FaceID), which is not supported"),
        ("face.safetensors", "another UNet (projections of images: 3, and the model has 4)"),
        ("else.safetensors", "is no IP-Adapter: it has no tensor image_proj.proj.weight"),
        ("alone", "There is no image encoder at"),
        ("other_encoder", "takes embeddings of 12 numbers, and"),
    ],
)
def test_what_is_no_ip_adapter_is_refused(pipeline, broken, name, words):
    with pytest.raises(UserError, match=re.escape(words)) as error:
        load_ip_adapter(broken / name, pipeline)
    assert len(str(error.value).replace(str(broken), "")) < 300


def test_an_ip_adapter_of_another_unet_is_refused(pipeline, places):
    with pytest.raises(UserError, match="cross_attention_dim: 32, and the model has 64"):
        load_ip_adapter(places / "sd15", pipeline)


def test_the_pipelines_own_preprocessor_counts(pipeline, places, tmp_path):
    assert load_ip_adapter(places / "sdxl", pipeline).preprocessor == clip_preprocessor(SIDE)
    for size, mean in ((SIDE, 0.25), (SIDE + 8, 0.5)):
        processor = CLIPImageProcessorPil(size=size, crop_size=size, image_mean=[mean] * 3)
        processor.save_pretrained(tmp_path / "feature_extractor")
        index = pipeline.model_index | {"feature_extractor": ["transformers", "CLIPImageProcessor"]}
        own = dataclasses.replace(pipeline, folder=tmp_path, model_index=index)
        if size == SIDE:
            assert load_ip_adapter(places / "sdxl", own).preprocessor.mean == (mean,) * 3
        else:
            with pytest.raises(UserError, match="come out at 24 x 24 pixels, but the CLIP takes 16 x 16"):
                load_ip_adapter(places / "sdxl", own)
