"""Sampling with T2I-Adapters and IP-Adapters: the same latents as diffusers' pipelines, mistakes in one sentence."""

import shutil

import numpy as np
import pytest
import torch
from diffusers import (
    MultiAdapter,
    StableDiffusionAdapterPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLPipeline,
    T2IAdapter,
)
from PIL import Image
from safetensors.torch import save_file
from torch_weights import assert_close, channels_first, channels_last, randomise
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

from mlcm_jax import load_pipeline
from mlcm_jax.hub.ip_adapter import load_ip_adapter
from mlcm_jax.hub.t2i_adapter import load_t2i_adapter
from mlcm_jax.sampling.control import Adapter, ImagePrompt

PROMPTS = ["red heart", "a cat"]
NOISE = np.random.default_rng(0).standard_normal((2, 16, 16, 4), np.float32)
SIDE, EMBEDDING = 16, 12  # of the tiny image encoder: pixels, and numbers of an embedding
PIPELINES = {"sdxl": StableDiffusionXLPipeline, "sd15": StableDiffusionPipeline}


def drawing(seed, mode="RGB", size=(40, 24)):
    """An image, smaller and of another shape than the samples."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def save_t2i_adapter(folder, seed, **config):
    model = randomise(T2IAdapter(**config), seed)
    model.save_pretrained(folder)
    return model


def save_ip_adapter(unet, folder, seed=5):
    """A file in the layout of h94/IP-Adapter and an image encoder beside it."""
    generator, width = torch.Generator().manual_seed(seed), unet.config.cross_attention_dim

    def noise(*shape):
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    tensors = {"image_proj.proj.weight": noise(4 * width, EMBEDDING), "image_proj.proj.bias": noise(4 * width)}
    tensors |= {"image_proj.norm.weight": 1 + noise(width), "image_proj.norm.bias": noise(width)}
    for i, name in enumerate(unet.attn_processors):
        if "attn2" in name:
            inner = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            tensors |= {f"ip_adapter.{i}.{to}_ip.weight": noise(inner, width) for to in ("to_k", "to_v")}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "ip-adapter.safetensors")
    tower = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = CLIPVisionConfig(**tower, image_size=SIDE, patch_size=8, projection_dim=EMBEDDING)
    randomise(CLIPVisionModelWithProjection(config), seed).save_pretrained(folder / "image_encoder")
    return folder / "ip-adapter.safetensors"


@pytest.fixture(scope="module")
def places(sdxl_folder, sd15_folder, tmp_path_factory):
    """Folder with adapters for the tiny pipelines by family, and images."""
    root, folders = tmp_path_factory.mktemp("adapters"), {"sdxl": sdxl_folder, "sd15": sd15_folder}
    for family, folder in folders.items():
        save_ip_adapter(PIPELINES[family].from_pretrained(folder, local_files_only=True).unet, root / family)
        for seed in (1, 2):
            config = {"channels": (32, 64), "num_res_blocks": 1, "downscale_factor": 4}
            kind = {"adapter_type": "full_adapter_xl", "in_channels": 3 if family == "sdxl" else 1}
            save_t2i_adapter(root / family / f"t2i_{seed}", seed, **config, **kind)
    drawing(0).save(root / "edges.png")
    return root


@pytest.fixture(scope="module")
def loaded(sdxl_folder, sd15_folder):
    """(diffusers' parts, our pipeline) by family."""
    folders = {"sdxl": sdxl_folder, "sd15": sd15_folder}

    def load(family):
        plain = PIPELINES[family].from_pretrained(folders[family], local_files_only=True)
        plain.register_modules(feature_extractor=CLIPImageProcessorPil(size=SIDE, crop_size=SIDE))
        plain.set_progress_bar_config(disable=True)
        return plain, load_pipeline(folders[family])

    return load


def adapters_of(folder, pipeline, scales, mode, factor=1.0):
    networks = [load_t2i_adapter(folder / f"t2i_{i + 1}", pipeline) for i in range(len(scales))]
    images = [drawing(i, mode) for i in range(len(scales))]
    return [Adapter(*each, factor) for each in zip(networks, images, scales, strict=True)]


def assert_sampled(ours, controls, theirs, **settings):
    """Ours equal ``theirs``, and the controls have changed them."""
    found = ours.sample(PROMPTS, latents=NOISE, controls=controls, **settings)
    assert_close(found, channels_last(theirs))
    off = ours.sample(PROMPTS, latents=NOISE, controls=[c._replace(scale=0.0) for c in controls], **settings)
    assert np.abs(found - off).max() > 1e-2 * np.abs(off).max(), "they change the image"


SIZES = {"height": 32, "width": 32, "output_type": "latent"}


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_sdxl_with_two_adapters_and_an_image_prompt_is_diffusers(loaded, places, guidance_scale):
    plain, ours = loaded("sdxl")
    models = [T2IAdapter.from_pretrained(places / "sdxl" / f"t2i_{i}") for i in (1, 2)]
    parts = {k: v for k, v in plain.components.items() if k != "image_encoder"}
    reference = StableDiffusionXLAdapterPipeline(**parts, adapter=MultiAdapter(models))
    reference.set_progress_bar_config(disable=True)
    file = places / "sdxl" / "ip-adapter.safetensors"
    reference.load_ip_adapter(file.parent, subfolder=".", weight_name=file.name, local_files_only=True)
    reference.set_ip_adapter_scale(0.6)
    theirs = reference(
        PROMPTS,
        image=[drawing(0), drawing(1)],
        adapter_conditioning_scale=[0.7, 1.3],
        adapter_conditioning_factor=0.5,
        ip_adapter_image=drawing(7),
        latents=channels_first(NOISE),
        guidance_scale=guidance_scale,
        num_inference_steps=3,
        **SIZES,
    ).images
    controls = adapters_of(places / "sdxl", ours.pipeline, [0.7, 1.3], "RGB", factor=0.5)
    controls.append(ImagePrompt(load_ip_adapter(file.parent, ours.pipeline), drawing(7), 0.6))
    assert_sampled(ours, controls, theirs, num_steps=3, guidance_scale=guidance_scale)


def test_sd15_with_a_grey_adapter_is_diffusers(loaded, places):
    plain, ours = loaded("sd15")
    model = T2IAdapter.from_pretrained(places / "sd15" / "t2i_1")
    parts = {k: v for k, v in plain.components.items() if k != "image_encoder"}
    reference = StableDiffusionAdapterPipeline(**parts, adapter=model, requires_safety_checker=False)
    reference.set_progress_bar_config(disable=True)
    settings = {"guidance_scale": 5.0, "latents": channels_first(NOISE), "num_inference_steps": 2}
    theirs = reference(PROMPTS, image=drawing(0, "L"), adapter_conditioning_scale=0.7, **settings, **SIZES).images
    controls = adapters_of(places / "sd15", ours.pipeline, [0.7], "L")
    assert_sampled(ours, controls, theirs, num_steps=2, guidance_scale=5.0)


def test_sd15_with_two_image_prompts_is_diffusers(loaded, places):
    plain, ours = loaded("sd15")
    files = [places / "sd15" / "ip-adapter.safetensors", save_ip_adapter(plain.unet, places / "sd15" / "other", seed=6)]
    shutil.copytree(files[0].parent / "image_encoder", files[1].parent / "image_encoder", dirs_exist_ok=True)
    folders, names, scales = [f.parent for f in files], [f.name for f in files], [0.6, 1.2]
    plain.load_ip_adapter(folders, subfolder=".", weight_name=names, local_files_only=True)
    plain.set_ip_adapter_scale(scales)
    images = [drawing(7), drawing(8)]
    settings = {"guidance_scale": 5.0, "latents": channels_first(NOISE), "num_inference_steps": 2}
    theirs = plain(PROMPTS, ip_adapter_image=images, **settings, **SIZES).images
    adapters = [load_ip_adapter(file, ours.pipeline) for file in files]
    controls = [ImagePrompt(*each) for each in zip(adapters, images, scales, strict=True)]
    assert_sampled(ours, controls, theirs, num_steps=2, guidance_scale=5.0)
