"""ControlNets in diffusers' layout, for a pipeline that they fit."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from mlcm_jax.hub.fit import check_class_name, check_made_for
from mlcm_jax.hub.network import Network, build_module, load_network
from mlcm_jax.hub.pipeline import Pipeline
from mlcm_jax.models.controlnet_config import CLASS_NAME


def load_controlnet(folder: str | Path, pipeline: Pipeline, *, dtype: Any = jnp.float32) -> Network:
    """The ControlNetModel in ``folder``, which is to control the pipeline's UNet and computes attention as it does.

    dtype: compute dtype. Raises UserError when the folder holds none, and for one that was made for another UNet.
    """
    folder, unet = Path(folder), pipeline.unet
    check_class_name(folder, CLASS_NAME, "a ControlNet")
    module: Any
    module, config = build_module(folder, CLASS_NAME, dtype)
    own: Any = unet.module
    ours, its = _shape(own, unet.config), _shape(module, config)
    ours["pixels along a latent"], its["pixels along a latent"] = pipeline.downscale, module.downscale
    check_made_for(folder, ours, its, "a ControlNet")
    network = load_network(folder, CLASS_NAME, dtype=dtype)
    return dataclasses.replace(network, module=module.with_attention(own.config.attention))


def _shape(module: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a UNet and its copy have in common, by the keys of config.json."""
    encoder, pooled = module.config, "projection_class_embeddings_input_dim"
    return {
        "in_channels": config.get("in_channels", 4),
        "block_out_channels": list(encoder.block_out_channels),
        "layers_per_block": [len(depths) for depths in encoder.down_depths],
        "cross_attention_dim": config.get("cross_attention_dim", 1280),
        "addition_time_embed_dim": encoder.addition_time_embed_dim,
        pooled: encoder.addition_time_embed_dim and config[pooled],
    }
