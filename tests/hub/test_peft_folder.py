"""PEFT's own folders: the weights that PEFT's merge_and_unload gives, whatever its settings."""

import json

import jax
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from one_sentence import assert_one_sentence
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from mlcm_jax.errors import UserError
from mlcm_jax.hub.lora import with_loras
from mlcm_jax.hub.lora_reader import load_lora
from mlcm_jax.hub.names import is_stacked, to_torch, walk
from mlcm_jax.hub.pipeline import load_pipeline
from mlcm_jax.models import lora

SETTINGS = {
    "alpha": {"target_modules": ["to_q"]},
    "alpha of convolutions": {"target_modules": ["conv1", "proj_in", "conv_shortcut"]},
    "rank stabilised": {"target_modules": ["to_k"], "use_rslora": True},
    "patterns": {
        "target_modules": ["to_q", "to_v"],
        "rank_pattern": {"attn1.to_q": 3, r"^down_blocks\.1\..*to_v": 5},
        "alpha_pattern": {r"attn[12]\.to_v": 1, "up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q": 16.5},
    },
    "stabilised patterns": {"target_modules": ["to_q"], "rank_pattern": {"attn1.to_q": 3}, "use_rslora": True},
    "another start": {"target_modules": ["to_q"], "init_lora_weights": "gaussian"},
}


def save_adapter(model, folder, **settings):
    """A PEFT folder with random factors; returns the tensors of the model that it is folded into."""
    settings = {"r": 2, "lora_alpha": 8, "init_lora_weights": False} | settings
    adapted = get_peft_model(model, LoraConfig(**settings))
    generator = torch.Generator().manual_seed(0)
    for name, p in adapted.named_parameters():
        if ".lora_" in name:
            p.data = 0.1 * torch.randn(p.shape, generator=generator)
    adapted.save_pretrained(folder)
    return adapted.merge_and_unload().state_dict()


def torch_tensors(params):
    out = {}
    for path, leaf, names in walk(jax.device_get(params)):
        layers = leaf if is_stacked(path) else leaf[None]
        out |= {name: to_torch(path, layer) for name, layer in zip(names, layers, strict=True)}
    return out


def assert_same(params, tensors):
    ours = torch_tensors(params)
    assert ours.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_allclose(ours[name], tensor.numpy(), atol=2e-6, err_msg=name)


@pytest.fixture(scope="module")
def pipeline(sd15_folder):
    return load_pipeline(sd15_folder)


@pytest.mark.parametrize("case", SETTINGS)
def test_a_unet(sd15_folder, pipeline, tmp_path, case):
    unet = UNet2DConditionModel.from_pretrained(sd15_folder, subfolder="unet")
    merged = save_adapter(unet, tmp_path, **SETTINGS[case])
    file = tmp_path / "adapter_model.safetensors"
    for place in (tmp_path, file):
        assert_same(with_loras(pipeline, [str(place)]).unet.params, merged)
    # what a run's lora.start is read with
    assert_same(lora.merge(pipeline.unet.params, load_lora(tmp_path, pipeline.unet.params)), merged)


def test_a_text_encoder(sd15_folder, sdxl_folder, pipeline, tmp_path):
    encoder = CLIPTextModel.from_pretrained(sd15_folder / "text_encoder")
    merged = save_adapter(encoder, tmp_path, target_modules=["q_proj"], alpha_pattern={"layers.1.self_attn.q_proj": 3})
    adapted = with_loras(pipeline, [str(tmp_path)])
    assert_same(adapted.text_encoders[0].params, {f"text_model.{k}": t for k, t in merged.items()})
    assert adapted.unet.params is pipeline.unet.params
    with pytest.raises(UserError, match="fits text_encoder and text_encoder_2 alike"):
        with_loras(load_pipeline(sdxl_folder), [str(tmp_path)])  # both are of this width there


def test_diffusers_own_header_and_bare_names(sd15_folder, pipeline, tmp_path):
    pipe = StableDiffusionPipeline.from_pretrained(sd15_folder, local_files_only=True)
    settings = {"r": 2, "lora_alpha": 8, "target_modules": ["to_q"], "init_lora_weights": False, "use_rslora": True}
    pipe.unet.add_adapter(LoraConfig(**settings, alpha_pattern={"attn2.to_q": 1}))
    pipe.unet.save_lora_adapter(tmp_path)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert not any("unet" in name for name in load_file(tmp_path / "pytorch_lora_weights.safetensors"))
    assert_same(with_loras(pipeline, [str(tmp_path)]).unet.params, pipe.unet.state_dict())


def edit(folder, **settings):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def rename(folder):
    file = folder / "adapter_model.safetensors"
    save_file({"base_model.model." + k: t for k, t in load_file(file).items()}, file)


REFUSED = {
    "no settings": (lambda f: (f / "adapter_config.json").unlink(), "no adapter_config.json is beside it"),
    "another method": (lambda f: edit(f, peft_type="LOHA"), "sets peft_type='LOHA', which is not supported"),
    "magnitudes": (lambda f: edit(f, use_dora=True), "sets use_dora=True"),
    "another start of the model": (lambda f: edit(f, init_lora_weights="pissa_niter_4"), "sets init_lora_weights="),
    "biases": (lambda f: edit(f, bias="lora_only"), "sets bias='lora_only'"),
    "whole modules": (lambda f: edit(f, modules_to_save=["conv_in"]), "sets modules_to_save="),
    "a setting of tomorrow": (lambda f: edit(f, use_quux=True), "sets use_quux=True"),
    "alpha that is text": (lambda f: edit(f, lora_alpha="8"), "lora_alpha='8'.* must be finite numbers"),
    "alpha that is no number": (lambda f: edit(f, lora_alpha=float("nan")), "must be finite numbers"),
    "a pattern that is text": (lambda f: edit(f, alpha_pattern={"to_q": "1"}), "must be finite numbers"),
    "patterns in a list": (lambda f: edit(f, alpha_pattern=["to_q"]), "must be finite numbers"),
    "a broken pattern": (lambda f: edit(f, alpha_pattern={"to_q(": 1}), "no regular expression"),
    "a switch that is text": (lambda f: edit(f, use_rslora="no"), "use_rslora='no'"),
    "no object": (lambda f: (f / "adapter_config.json").write_text("[]"), "holds no JSON object"),
    "other names": (rename, "is no LoRA for this model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(sd15_folder, pipeline, tmp_path, case):
    spoil, message = REFUSED[case]
    save_adapter(UNet2DConditionModel.from_pretrained(sd15_folder, subfolder="unet"), tmp_path, target_modules=["to_q"])
    spoil(tmp_path)
    with pytest.raises(UserError, match=message) as e:
        load_lora(tmp_path, pipeline.unet.params)
    assert len(str(e.value).replace(str(tmp_path), "")) < 300


def test_the_programs(launch, sd15_folder, tmp_path):
    unet = UNet2DConditionModel.from_pretrained(sd15_folder, subfolder="unet")
    merged = save_adapter(unet, tmp_path / "a", target_modules=["to_q"])
    adapter = tmp_path / "a" / "adapter_model.safetensors"
    result = launch("convert", f"--model={sd15_folder}", f"--lora={adapter}", f"--out={tmp_path / 'out'}")
    assert result["status"] == 0, result["stderr"]
    assert_same(load_pipeline(tmp_path / "out").unet.params, merged)
    edit(tmp_path / "a", use_dora=True)
    result = launch("convert", f"--model={sd15_folder}", f"--lora={adapter}", f"--out={tmp_path / 'other'}")
    assert_one_sentence(result, "adapter_config.json sets use_dora=True")
