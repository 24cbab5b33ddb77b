"""Tables of settings for tests: a small network of each class, and what builds it or a sampler of its settings."""

import importlib

import jax
import numpy as np

from mlcm_jax.diffusion.samplers import step_table
from mlcm_jax.diffusion.schedule import Schedule
from mlcm_jax.hub.network import NETWORKS, network_shapes
from mlcm_jax.models import (
    chinese_clip,
    clip_config,
    controlnet_config,
    latent_lpips,
    t2i_adapter,
    tiny_vae,
    unet_config,
    vae,
)

TOWER = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 9}
BLOCKS = {"block_out_channels": [8], "norm_num_groups": 4, "layers_per_block": 1}
UNET = BLOCKS | {
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D"],
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 2,
    "projection_class_embeddings_input_dim": 20,
}
CONTROLNET = {k: v for k, v in UNET.items() if k != "up_block_types"} | {"conditioning_embedding_out_channels": [4, 8]}
ADAPTER = {"channels": [8, 8], "num_res_blocks": 1, "downscale_factor": 2}
VISION = {k: v for k, v in TOWER.items() if k != "vocab_size"} | {"image_size": 8, "patch_size": 4}
TINY = {f"{half}_block_out_channels": [8, 8] for half in ("encoder", "decoder")}
TINY |= {f"num_{half}_blocks": [1, 1] for half in ("encoder", "decoder")}
# a network's class: a small config.json, and the table of its keys
NETWORK_TABLES = {
    "UNet2DConditionModel": (UNET, unet_config.CONFIG_KEYS),
    "ControlNetModel": (CONTROLNET, controlnet_config.CONFIG_KEYS),
    "T2IAdapter": (ADAPTER, t2i_adapter.CONFIG_KEYS),
    "AutoencoderKL": (BLOCKS, vae.CONFIG_KEYS),
    "AutoencoderTiny": (TINY, tiny_vae.CONFIG_KEYS),
    "CLIPTextModel": (TOWER, clip_config.TEXT_KEYS),
    "CLIPTextModelWithProjection": (TOWER, clip_config.TEXT_KEYS),
    "CLIPVisionModelWithProjection": (VISION, clip_config.VISION_KEYS),
    "CLIPModel": ({"text_config": TOWER, "vision_config": VISION}, clip_config.CLIP_KEYS),
    "ChineseCLIPTextModel": (TOWER, chinese_clip.TEXT_KEYS),
    "TextAdapter": ({}, chinese_clip.ADAPTER_KEYS),
    "LatentLPIPS": ({"block_out_channels": [8], "layers_per_block": [1]}, latent_lpips.KEYS),
}

SEEN = set()


def build_network(_folder, class_name, config):
    spec = NETWORKS[class_name]
    named = {"architectures": [class_name]} if spec.library == "transformers" else {}
    module = getattr(importlib.import_module(spec.module), spec.attribute).from_config(config | named)
    if module not in SEEN:  # most values that are taken change nothing
        assert all(0 < leaf.size < 1e9 for leaf in jax.tree.leaves(network_shapes(module, config)))
        SEEN.add(module)


def build_scheduler(_folder, class_name, config):
    config = config | {"_class_name": class_name}
    assert np.isfinite(Schedule.from_config(config).alphas_cumprod).all()
    table = step_table(config, 4)
    rows = np.concatenate(
        [np.reshape(v, (len(table.timesteps), -1)) for v in table if isinstance(v, np.ndarray)], axis=1
    )
    assert len(rows) and np.isfinite(rows).all() and table.clip_range > 0
