"""Small UNets and ControlNets of each kind, and what they take, for comparisons with torch."""

import numpy as np
import torch
from torch_weights import channels_first

from mlcm_jax.types import TextConditioning

CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
XL = {
    "block_out_channels": (8, 16, 32),
    "down_block_types": ("DownBlock2D", CROSS_DOWN, CROSS_DOWN),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (1, 2, 4),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 6,
    "projection_class_embeddings_input_dim": 10 + 6 * 6,
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "conditioning_embedding_out_channels": (4, 8),
}
CONFIGS = {
    "sdxl": XL,
    "sd15": {
        "block_out_channels": (8, 16),
        "down_block_types": (CROSS_DOWN, "DownBlock2D"),
        "layers_per_block": 2,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
        "cross_attention_dim": 12,
        "conditioning_embedding_out_channels": (4, 8, 12, 16),
        "controlnet_conditioning_channel_order": "bgr",
    },
    # as diffusers/controlnet-canny-sdxl-1.0-small: transformers without a block
    "small": {**XL, "transformer_layers_per_block": (0, 0, 0)},
    "no attention": {**XL, "down_block_types": ("DownBlock2D",) * 3, "mid_block_type": "UNetMidBlock2D"},
}
UP_BLOCKS = {"sdxl": (CROSS_UP, CROSS_UP, "UpBlock2D"), "sd15": ("UpBlock2D", CROSS_UP)}


def inputs(config):
    """(sample, timesteps, conditioning), and an image; both are wider than high."""
    rng, side = np.random.default_rng(0), 2 ** (len(config["block_out_channels"]) - 1)
    pixels = 2 ** (len(config["conditioning_embedding_out_channels"]) - 1)
    conditioning = TextConditioning(
        hidden_states=rng.standard_normal((2, 5, 12), np.float32),
        pooled=rng.standard_normal((2, 10), np.float32),
        time_ids=np.array([[64, 48, 0, 8, 64, 64], [1024, 768, 16, 0, 1024, 1024]], np.float32),
    )
    sample = rng.standard_normal((2, 2 * side, 4 * side, 4), np.float32)
    image = rng.random((2, 2 * side * pixels, 4 * side * pixels, 3), np.float32)
    return (sample, np.array([999, 261]), conditioning), image


def for_torch(given):
    """The same inputs as diffusers' networks take them."""
    sample, timesteps, conditioning = given
    added = {"text_embeds": torch.from_numpy(conditioning.pooled), "time_ids": torch.from_numpy(conditioning.time_ids)}
    states = torch.from_numpy(conditioning.hidden_states)
    return {
        "sample": channels_first(sample),
        "timestep": torch.from_numpy(timesteps),
        "encoder_hidden_states": states,
        "added_cond_kwargs": added,
    }
