"""Random T2I-Adapters and IP-Adapters for tiny pipelines, in the layout of their files."""

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, T2IAdapter
from PIL import Image
from safetensors.torch import save_file
from torch_weights import randomise
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

SIDE, EMBEDDING = 16, 12  # of the tiny image encoder: pixels, and numbers of an embedding
TOWER = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2}
PIPELINES = {"sdxl": StableDiffusionXLPipeline, "sd15": StableDiffusionPipeline}
# T2I-Adapters of a UNet of one level (a block and the middle) and of two
ADAPTERS = {
    "sdxl": {"channels": (64, 64), "downscale_factor": 2},
    "sd15": {"channels": (32, 64), "downscale_factor": 4, "in_channels": 1},
}


def drawing(seed, mode="RGB", size=(40, 24)):
    """An image, smaller and of another shape than the samples."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


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
    config = CLIPVisionConfig(**TOWER, image_size=SIDE, patch_size=8, projection_dim=EMBEDDING)
    randomise(CLIPVisionModelWithProjection(config), seed).save_pretrained(folder / "image_encoder")
    return folder / "ip-adapter.safetensors"


def save_adapters(unet, folder, family):
    """An IP-Adapter and two T2I-Adapters, t2i_1 and t2i_2."""
    save_ip_adapter(unet, folder)
    for seed in (1, 2):
        model = T2IAdapter(**ADAPTERS[family], num_res_blocks=1, adapter_type="full_adapter_xl")
        randomise(model, seed).save_pretrained(folder / f"t2i_{seed}")
