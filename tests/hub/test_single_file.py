"""Single files in the original names: against diffusers' own conversion, in and out, and at full size by names."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors.torch import load_file, save_file

from mlcm_jax.errors import UserError
from mlcm_jax.hub import ldm
from mlcm_jax.hub.layout import lay_out
from mlcm_jax.hub.names import walk
from mlcm_jax.hub.pipeline import load_pipeline, read_architecture, save_pipeline
from mlcm_jax.hub.save import param_entries
from mlcm_jax.hub.single_file import LAYOUTS, class_of_checkpoint, save_single_file

CONFIGS = Path(__file__).parents[2] / "configs" / "architectures"
SDXL, SD15 = "StableDiffusionXLPipeline", "StableDiffusionPipeline"


def write(pipeline, file, **options):
    params = {part: network.params for part, network in pipeline.networks().items()}
    options = {"scheduler_config": pipeline.scheduler_config} | options
    save_single_file(pipeline.model_index["_class_name"], params, file, **options)
    return file


@pytest.fixture(scope="module")
def sdxl_file(sdxl_folder, tmp_path_factory):
    return write(load_pipeline(sdxl_folder), tmp_path_factory.mktemp("single") / "model.safetensors")


def part_tensors(folder, part):
    (file,) = (folder / part).glob("*.safetensors")
    tensors = load_file(file)
    bare = any(k.startswith("embeddings.") for k in tensors)
    return {f"text_model.{k}" if bare else k: t for k, t in tensors.items()}


def assert_equal(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]), name


def test_diffusers_converts_the_file_back_to_the_same_tensors(sdxl_folder, sdxl_file):
    tensors = load_file(sdxl_file)
    unet_config = json.loads((sdxl_folder / "unet/config.json").read_text())
    assert_equal(convert_ldm_unet_checkpoint(dict(tensors), unet_config), part_tensors(sdxl_folder, "unet"))
    vae_config = json.loads((sdxl_folder / "vae/config.json").read_text())
    assert_equal(convert_ldm_vae_checkpoint(dict(tensors), vae_config), part_tensors(sdxl_folder, "vae"))
    text = {k: v for k, v in tensors.items() if k.startswith("conditioner.embedders.0.")}
    assert_equal(convert_ldm_clip_checkpoint(text), part_tensors(sdxl_folder, "text_encoder"))
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl_folder, local_files_only=True)
    second = convert_open_clip_checkpoint(pipe.text_encoder_2, dict(tensors), "conditioner.embedders.1.model.")
    assert_equal(second, part_tensors(sdxl_folder, "text_encoder_2"))
    attention = tensors["first_stage_model.encoder.mid.attn_1.proj_out.weight"]
    assert attention.shape[2:] == (1, 1)


@pytest.mark.parametrize("network", [UNet2DConditionModel, AutoencoderKL])
def test_from_single_file(sdxl_folder, sdxl_file, network):
    part = "unet" if network is UNet2DConditionModel else "vae"
    model = network.from_single_file(str(sdxl_file), config=str(sdxl_folder), subfolder=part, local_files_only=True)
    assert_equal(dict(model.state_dict()), part_tensors(sdxl_folder, part))


@pytest.mark.parametrize("name", ["sdxl_folder", "sd15_folder"])
def test_round_trip(name, request, tmp_path):
    folder = request.getfixturevalue(name)
    pipeline = load_pipeline(folder)
    file = write(pipeline, tmp_path / "model.safetensors")
    tensors = load_file(file)
    # what original files hold besides
    extra = {"model_ema.decay": torch.ones(()), "alphas_cumprod": torch.ones(1000)}
    if name == "sdxl_folder":
        extra["conditioner.embedders.1.model.logit_scale"] = torch.ones(())
    save_file(tensors | extra, file)
    assert class_of_checkpoint(file) == pipeline.model_index["_class_name"]
    back = load_pipeline(file, architecture=folder)
    for part, network in pipeline.networks().items():
        jax.tree.map(np.testing.assert_array_equal, back.networks()[part].params, network.params)
    save_pipeline(back, tmp_path / "folder")
    assert_equal(part_tensors(tmp_path / "folder", "unet"), part_tensors(folder, "unet"))


def test_a_file_without_its_tokenizers(sdxl_file):
    with pytest.raises(UserError, match=r"holds no tokenizers, .*--architecture=DIR"):
        load_pipeline(sdxl_file)


SPOILT = {
    "a tensor of nothing": (lambda t: t.update({"edm_vpred": torch.ones(1)}), "besides the model's: edm_vpred"),
    "a tensor too many": (
        lambda t: t.update({"model.diffusion_model.out.3.weight": torch.ones(1)}),
        "does not have: model.diffusion_model.out.3.weight",
    ),
    "a tensor too few": (
        lambda t: t.pop("model.diffusion_model.out.2.bias"),
        "lacks 1 .*: model.diffusion_model.out.2",
    ),
    "a fused tensor too few": (
        lambda t: t.pop("conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_bias"),
        "lacks .*: conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_bias",
    ),
    "another shape": (
        lambda t: t.update({"model.diffusion_model.out.2.bias": torch.ones(9)}),
        r"model.diffusion_model.out.2.bias is \[9\], not \[4\]",
    ),
    "no text encoder": (
        lambda t: [t.pop(k) for k in list(t) if k.startswith("conditioner")],
        "no whole SDXL or SD 1.5 model",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_spoilt_files(sdxl_folder, sdxl_file, tmp_path, case):
    change, message = SPOILT[case]
    tensors = load_file(sdxl_file)
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message) as e:
        load_pipeline(tmp_path / "model.safetensors", architecture=sdxl_folder)
    assert "\n" not in str(e.value)


# shapes of the published files, by their well-known names
FULL_SIZE = {
    "sdxl": {
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight": (640, 2048),
        "model.diffusion_model.input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "model.diffusion_model.middle_block.1.transformer_blocks.9.ff.net.0.proj.weight": (10240, 1280),
        "model.diffusion_model.output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.5.2.conv.weight": (640, 640, 3, 3),
        "model.diffusion_model.output_blocks.8.0.skip_connection.weight": (320, 640, 1, 1),
        "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
        "first_stage_model.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        "first_stage_model.encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "conditioner.embedders.0.transformer.text_model.encoder.layers.11.mlp.fc1.weight": (3072, 768),
        "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight": (3840, 1280),
        "conditioner.embedders.1.model.positional_embedding": (77, 1280),
    },
    "sd15": {
        "model.diffusion_model.input_blocks.11.0.in_layers.2.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.8.2.conv.weight": (640, 640, 3, 3),
        "model.diffusion_model.output_blocks.11.1.proj_out.weight": (320, 320, 1, 1),
        "cond_stage_model.transformer.text_model.final_layer_norm.weight": (768,),
    },
}
# UNet, autoencoder and text encoders, without buffers and logit_scale
NUM_TENSORS = {"sdxl": 1680 + 248 + 196 + 389, "sd15": 686 + 248 + 196}


@pytest.mark.parametrize("architecture", FULL_SIZE)
def test_names_at_full_size(architecture):
    pipeline = read_architecture(CONFIGS / architecture)
    shapes = {}
    for part, layout in LAYOUTS[pipeline.model_index["_class_name"]].items():
        for entry in lay_out(param_entries(pipeline.networks()[part].params), layout):
            shapes |= dict.fromkeys(entry.names, entry.shape)
    assert {name: shapes.get(name) for name in FULL_SIZE[architecture]} == FULL_SIZE[architecture]
    assert len(shapes) == NUM_TENSORS[architecture]


def test_a_guidance_conditioned_student_has_no_original_name(sdxl_folder):
    names = [n for _, _, group in walk(read_architecture(sdxl_folder).unet.params) for n in group]
    with pytest.raises(UserError, match=r"cond_proj.weight has no name in a single file"):
        ldm.unet_places([*names, "time_embedding.cond_proj.weight"])
