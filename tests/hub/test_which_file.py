"""Which of several files and classes is taken: the one that diffusers and transformers take of the same folder."""

import json
import shutil

import jax
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from mlcm_jax.diffusion.samplers import step_table
from mlcm_jax.hub import fetch
from mlcm_jax.hub.names import is_stacked, to_torch, walk
from mlcm_jax.hub.pipeline import load_pipeline, save_pipeline

WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


@pytest.fixture
def folder(sd15_folder, tmp_path):
    return shutil.copytree(sd15_folder, tmp_path / "model")


def torch_tensors(network):
    out = {}
    for path, leaf, names in walk(jax.device_get(network.params)):
        layers = leaf if is_stacked(path) else leaf[None]
        out |= {name: to_torch(path, layer) for name, layer in zip(names, layers, strict=True)}
    return out


def assert_as_diffusers(folder, variant=None):
    """All networks' numbers and dtypes are those of the folder in diffusers, and so is the scheduler."""
    ours = load_pipeline(folder, variant=variant)
    theirs = StableDiffusionPipeline.from_pretrained(folder, variant=variant, local_files_only=True)
    for part, network in ours.networks().items():
        tensors = getattr(theirs, part).state_dict()
        bare = any(name.startswith("embeddings.") for name in tensors)
        tensors = {f"text_model.{k}" if bare else k: t.float().numpy() for k, t in tensors.items()}
        got = torch_tensors(network)
        assert got.keys() == tensors.keys()
        for name in got:
            np.testing.assert_array_equal(np.asarray(got[name], np.float32), tensors[name], err_msg=f"{part} {name}")
    assert ours.scheduler_config["_class_name"] == type(theirs.scheduler).__name__
    return ours


def halved(folder, part, name=None, dtype=torch.float32):
    """Write the part's tensors, halved, under another name, so that it shows which file was read."""
    tensors = load_file(folder / part / f"{WEIGHTS[part]}.safetensors")
    name = name or f"{WEIGHTS[part]}-00001-of-00001.safetensors"
    save_file({k: (t / 2).to(dtype) for k, t in tensors.items()}, folder / part / name, {"format": "pt"})
    return dict.fromkeys(tensors, name)


def test_shards_beside_a_stale_file(folder):
    """diffusers reads the index, transformers the one file."""
    for part, base in WEIGHTS.items():
        index = {"metadata": {}, "weight_map": halved(folder, part)}
        (folder / part / f"{base}.safetensors.index.json").write_text(json.dumps(index))
    ours = assert_as_diffusers(folder)
    bias = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")["conv_out.bias"]
    np.testing.assert_array_equal(ours.unet.params["conv_out"]["bias"], bias / 2)


def test_the_other_librarys_name(folder):
    halved(folder, "text_encoder", "diffusion_pytorch_model.safetensors")
    halved(folder, "unet", "model.safetensors")
    assert_as_diffusers(folder)


VARIANT_INDICES = ["safetensors.index.fp16.json", "safetensors.fp16.index.json"]


@pytest.mark.parametrize("name", VARIANT_INDICES)
def test_a_variant_that_only_some_parts_have(folder, name):
    index = {"metadata": {}, "weight_map": halved(folder, "unet", "shard-1.fp16.safetensors", torch.float16)}
    (folder / "unet" / f"{WEIGHTS['unet']}.{name}").write_text(json.dumps(index))
    halved(folder, "unet", "diffusion_pytorch_model.fp16.safetensors")  # which the index precedes
    ours = assert_as_diffusers(folder, "fp16")
    assert {leaf.dtype for leaf in jax.tree.leaves(ours.unet.params)} == {np.dtype("float16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(ours.vae.params)} == {np.dtype("float32")}


def test_a_variant_of_the_hub_that_only_some_parts_have(folder, monkeypatch):
    halved(folder, "unet", "diffusion_pytorch_model.fp16.safetensors")
    asked = []

    def download(repository, *, revision, allow_patterns):
        asked.append(sorted(p for p in allow_patterns if p.endswith("model.safetensors")))
        return str(folder)

    monkeypatch.setattr(fetch.huggingface_hub, "snapshot_download", download)
    load_pipeline("owner/name", variant="fp16")
    assert asked == [[], ["text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"]]


def edit(file, remove=(), **entries):
    config = json.loads(file.read_text()) | entries
    file.write_text(json.dumps({k: v for k, v in config.items() if k not in remove}))


@pytest.mark.parametrize("written", ["DDIMScheduler", "UniPCMultistepScheduler", None])
def test_a_scheduler_of_another_class_than_its_file_says(folder, tmp_path, written):
    """model_index.json decides; settings of the other class alone are left out, its other ones count."""
    edit(folder / "model_index.json", scheduler=["diffusers", "EulerDiscreteScheduler"])
    file = folder / "scheduler" / "scheduler_config.json"
    edit(file, _class_name=written, solver_p=None, predict_x0=True, timestep_spacing="trailing")
    if written is None:
        edit(file, remove=("_class_name", "solver_p", "predict_x0"))
    ours = assert_as_diffusers(folder)
    scheduler = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True).scheduler
    scheduler.set_timesteps(7)
    np.testing.assert_allclose(step_table(ours.scheduler_config, 7).timesteps, scheduler.timesteps.numpy())
    save_pipeline(ours, tmp_path / "out")
    assert_as_diffusers(tmp_path / "out")


@pytest.mark.parametrize("architectures", [None, ["CLIPTextModel"], ["CLIPModel"], "absent"])
def test_text_encoders_are_of_the_class_that_the_index_names(sdxl_folder, tmp_path, architectures):
    folder = shutil.copytree(sdxl_folder, tmp_path / "model")
    for part in ("text_encoder", "text_encoder_2"):
        file = folder / part / "config.json"
        edit(file, remove=("architectures",) if architectures == "absent" else (), architectures=architectures)
    theirs = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)
    ours = load_pipeline(folder)
    for encoder, own in zip((theirs.text_encoder, theirs.text_encoder_2), ours.text_encoders, strict=True):
        assert ("text_projection" in own.params) == ("text_projection.weight" in encoder.state_dict())


def test_a_network_of_another_class_than_its_file_says(folder):
    edit(folder / "unet" / "config.json", _class_name="UNet2DModel")
    assert_as_diffusers(folder)
    UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
