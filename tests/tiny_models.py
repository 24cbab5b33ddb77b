"""Tiny random models in diffusers' folder layout, made by diffusers itself."""

import json

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

TEXT = {
    "vocab_size": 520,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "max_position_embeddings": 77,
    "bos_token_id": 512,
    "eos_token_id": 513,
    "pad_token_id": 513,
}
UNET = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (2, 4),
    "norm_num_groups": 8,
    "sample_size": 16,
}
XL = {
    "use_linear_projection": True,
    "transformer_layers_per_block": (1, 2),
    "cross_attention_dim": 64,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
}
# One level only, with attention on its way down: a third of the time to compile a train step.
ONE_LEVEL_XL = {
    **UNET,
    **XL,
    "block_out_channels": (64,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "attention_head_dim": (4,),
    "transformer_layers_per_block": (1,),
}


def tiny_vae():
    return AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        sample_size=32,
    )


def tiny_tokenizer(vocab_folder):
    """A byte-level CLIP tokenizer without merges; its vocabulary is written to vocab_folder."""
    vocab_folder.mkdir(parents=True, exist_ok=True)
    # The byte alphabet of GPT-2: printable bytes stand for themselves, the others are moved above 255.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (vocab_folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (vocab_folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(vocab_folder / "vocab.json"), str(vocab_folder / "merges.txt"), model_max_length=77)


def randomise(module, seed):
    """Diffusers zeroes some layers at the start; give every parameter a value that a mistake would show."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.1
    return module.eval()


def save_sdxl(folder, unet_config=None, gain=1.0):
    """A StableDiffusionXLPipeline: 16 x 16 latents, 32 x 32 images.

    gain multiplies the UNet's output: at 10 its prediction has the size of the noise, and shows in the images.
    """
    unet = randomise(UNet2DConditionModel(**(unet_config or UNET | XL)), 1)
    unet.conv_out.weight.data *= gain
    tokenizer = tiny_tokenizer(folder.with_name(folder.name + "_vocab"))
    StableDiffusionXLPipeline(
        vae=randomise(tiny_vae(), 0),
        unet=unet,
        text_encoder=randomise(CLIPTextModel(CLIPTextConfig(**TEXT)), 2),
        text_encoder_2=randomise(CLIPTextModelWithProjection(CLIPTextConfig(**TEXT, projection_dim=32)), 3),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", timestep_spacing="trailing"),
    ).save_pretrained(folder)
    return folder


def save_sd15(folder):
    """A StableDiffusionPipeline of the same sizes."""
    StableDiffusionPipeline(
        vae=randomise(tiny_vae(), 0),
        unet=randomise(UNet2DConditionModel(**UNET, cross_attention_dim=32), 1),
        text_encoder=randomise(CLIPTextModel(CLIPTextConfig(**TEXT)), 2),
        tokenizer=tiny_tokenizer(folder.with_name(folder.name + "_vocab")),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def save_vae(folder):
    randomise(tiny_vae(), 0).save_pretrained(folder)
    return folder
