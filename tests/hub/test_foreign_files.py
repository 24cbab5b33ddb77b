"""Good files of other programs: what their own loaders ignore is ignored, what changes the result is taken over."""

import json
import shutil

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file

from mlcm_jax.diffusion.samplers import step_table
from mlcm_jax.diffusion.scheduler_config import of_class
from mlcm_jax.hub.pipeline import load_pipeline, read_architecture
from mlcm_jax.hub.single_file import save_single_file


@pytest.fixture
def folder(sd15_folder, tmp_path):
    return shutil.copytree(sd15_folder, tmp_path / "model")


def write(folder, file, **scheduler_config):
    pipeline = load_pipeline(folder)
    params = {part: network.params for part, network in pipeline.networks().items()}
    config = pipeline.scheduler_config | scheduler_config
    save_single_file(pipeline.model_index["_class_name"], params, file, scheduler_config=config)
    return pipeline, load_file(file)


def assert_same_networks(a, b):
    for part, network in a.networks().items():
        jax.tree.map(np.testing.assert_array_equal, network.params, b.networks()[part].params)


MARKERS = [(), ("v_pred",), ("v_pred", "ztsnr")]


@pytest.mark.parametrize("markers", MARKERS)
def test_markers_of_v_prediction_and_zero_snr(folder, tmp_path, markers):
    """NoobAI-XL's: empty tensors beside the model's."""
    file = tmp_path / "model.safetensors"
    pipeline, tensors = write(folder, file)
    save_file(tensors | {name: torch.zeros(0) for name in markers}, file)
    marked = load_pipeline(file, architecture=folder)
    assert_same_networks(marked, pipeline)
    says = {"prediction_type": "v_prediction"} if markers else {}
    says |= {"rescale_betas_zero_snr": True} if "ztsnr" in markers else {}
    assert marked.scheduler_config == pipeline.scheduler_config | says
    table = step_table(marked.scheduler_config, 3)
    assert table.prediction_type == ("v_prediction" if markers else "epsilon")
    if markers == ("v_pred", "ztsnr"):  # our own file has them, too, and settings beside a file go before them
        _, written = write(folder, tmp_path / "ours.safetensors", **says)
        assert set(written) - set(tensors) == set(markers)
        (tmp_path / "scheduler_config.json").write_text('{"_class_name": "TCDScheduler"}')
        assert load_pipeline(file, architecture=folder).scheduler_config == {"_class_name": "TCDScheduler"}


ENCODER = "cond_stage_model.transformer.text_model."
SPELLINGS = {
    "without text_model": (ENCODER, "cond_stage_model.transformer."),
    "ComfyUI's": (ENCODER, "cond_stage_model.clip_l.transformer.text_model."),
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_other_prefixes_of_the_text_encoder(folder, tmp_path, case):
    ours, theirs = SPELLINGS[case]
    file = tmp_path / "model.safetensors"
    pipeline, tensors = write(folder, file)
    renamed = {name.replace(ours, theirs): t for name, t in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, file)
    assert_same_networks(load_pipeline(file, architecture=folder), pipeline)
    # both spellings in one file: the usual one counts, as an odd one is left over from a merge
    save_file(tensors | {k: t + 1 for k, t in renamed.items() if k not in tensors}, file)
    assert_same_networks(load_pipeline(file, architecture=folder), pipeline)


EXTRA = {
    "sd15_folder": {
        "cond_stage_model.logit_scale": torch.ones(()),
        "cond_stage_model.clip_l.logit_scale": torch.ones(()),
        "cond_stage_model.transformer.text_projection.weight": torch.ones(32, 32),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
    },
    "sdxl_folder": {
        "conditioner.embedders.0.logit_scale": torch.ones(()),
        "conditioner.embedders.0.transformer.logit_scale": torch.ones(()),
        "conditioner.embedders.0.transformer.text_projection.weight": torch.ones(32, 32),
        "conditioner.embedders.0.text_projection": torch.ones(32, 32),
        "conditioner.embedders.1.model.logit_scale": torch.ones(()),
        "conditioner.embedders.1.logit_scale": torch.ones(()),
    },
}


@pytest.mark.parametrize("name", EXTRA)
def test_tensors_beside_a_text_encoders(name, request, tmp_path):
    folder, file = request.getfixturevalue(name), tmp_path / "model.safetensors"
    pipeline, tensors = write(folder, file)
    save_file(tensors | EXTRA[name], file)
    assert_same_networks(load_pipeline(file, architecture=folder), pipeline)


def test_the_second_encoders_projection_as_a_linear_layer(sdxl_folder, tmp_path):
    file, name = tmp_path / "model.safetensors", "conditioner.embedders.1.model.text_projection"
    pipeline, tensors = write(sdxl_folder, file)
    matrix = tensors.pop(name)
    save_file(tensors | {f"{name}.weight": matrix.T.contiguous()}, file)
    assert_same_networks(load_pipeline(file, architecture=sdxl_folder), pipeline)


def test_a_text_encoder_in_a_whole_clip_models_file(folder):
    """transformers leaves out what CLIPTextModel does not have."""
    before = load_pipeline(folder)
    file = folder / "text_encoder" / "model.safetensors"
    others = {"text_projection.weight": torch.ones(8, 32), "logit_scale": torch.ones(())}
    others |= {"vision_model.embeddings.class_embedding": torch.ones(8), "visual_projection.weight": torch.ones(8, 8)}
    save_file(load_file(file) | others, file, {"format": "pt"})
    assert_same_networks(load_pipeline(folder), before)


def test_the_settings_of_a_moving_average(folder):
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    ema = EMAModel(unet.parameters(), model_cls=UNet2DConditionModel, model_config=unet.config, use_ema_warmup=True)
    with torch.no_grad():
        for p in unet.parameters():
            p.add_(1)
    ema.step(unet.parameters())
    shutil.rmtree(folder / "unet")
    ema.save_pretrained(folder / "unet")
    assert "optimization_step" in json.loads((folder / "unet" / "config.json").read_text())
    theirs = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    ours = load_pipeline(folder).unet.params["conv_out"]["bias"]
    np.testing.assert_array_equal(ours, theirs.conv_out.bias.detach().numpy())


def test_layers_of_several_dtypes(folder):
    before = load_pipeline(folder)
    file = folder / "text_encoder" / "model.safetensors"
    mixed = {k: t.half() if ".layers.0." in k else t for k, t in load_file(file).items()}
    save_file(mixed, file, {"format": "pt"})
    got = load_pipeline(folder).text_encoders[0].params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), got, before.text_encoders[0].params)
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("written", ["UniPCMultistepScheduler", "DEISMultistepScheduler", "HeunDiscreteScheduler"])
def test_the_scheduler_flag_over_a_sampler_that_is_not_supported(folder, written):
    theirs = getattr(diffusers, written)(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    theirs.save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text()) | {"scheduler": ["diffusers", written]}
    (folder / "model_index.json").write_text(json.dumps(index))
    asked = diffusers.DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    asked.set_timesteps(4)
    ours = read_architecture(folder).scheduler_config
    assert ours["_class_name"] == written
    table = step_table(of_class(ours, "DDIMScheduler"), 4)
    np.testing.assert_array_equal(table.timesteps, asked.timesteps.numpy())
    np.testing.assert_allclose(np.square(table.alpha), asked.alphas_cumprod[asked.timesteps].numpy(), rtol=1e-5)
