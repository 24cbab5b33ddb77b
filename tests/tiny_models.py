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
from safetensors.torch import save_file
from transformers import (
    ChineseCLIPTextConfig,
    ChineseCLIPTextModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

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
# Without attention in the middle, too: for whole runs, whose subject is not the network.
SMALLEST_XL = ONE_LEVEL_XL | {"mid_block_type": "UNetMidBlock2D"}


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


def tiny_adapted_text(folder, **widths):
    """A Chinese-CLIP tower with an adapter to save_sdxl's UNet, seven tokens a caption, and their tokenizer."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"红心hi", "##i"]
    config = ChineseCLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=8,
    )
    tower = randomise(ChineseCLIPTextModel(config), 4)
    tower.embeddings.word_embeddings.weight.data[0] = 0.0  # as transformers 5 has it once it is read, whatever the file
    tower.save_pretrained(folder / "text_encoder")
    for part in ("adapter", "tokenizer"):
        (folder / part).mkdir()
    (folder / "tokenizer" / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    dims = {"input_dim": 16, "hidden_dim": 20, "pooled_dim": 32, "states_dim": 64, "num_tokens": 7} | widths
    d, h, p, s, _ = dims.values()
    shapes = {"projector.0.weight": (h, d), "projector.2.weight": (h, h), "projector.4.weight": (p, h)}
    shapes |= {"fc.weight": (s, p), "fc.bias": (s,), "layernorm.weight": (d,), "layernorm.bias": (d,)}
    generator = torch.Generator().manual_seed(5)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, folder / "adapter" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    (folder / "adapter" / "config.json").write_text(json.dumps(dims))
    return folder
