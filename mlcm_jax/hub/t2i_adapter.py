"""T2I-Adapters in diffusers' layout, for a pipeline that they fit."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp

from mlcm_jax.hub.fit import check_class_name, check_made_for
from mlcm_jax.hub.network import Network, build_module, load_network
from mlcm_jax.hub.pipeline import Pipeline
from mlcm_jax.models.t2i_adapter import CLASS_NAME


def load_t2i_adapter(folder: str | Path, pipeline: Pipeline, *, dtype: Any = jnp.float32) -> Network:
    """The T2IAdapter in ``folder``, which is to control the pipeline's UNet. dtype: compute dtype.

    Raises UserError when the folder holds none, and for one that was made for another UNet.
    """
    folder = Path(folder)
    check_class_name(folder, CLASS_NAME, "a T2I-Adapter")
    module: Any
    module, _ = build_module(folder, CLASS_NAME, dtype)
    side, its = module.config.downscale_factor, []
    for width, downsample in module.config.stages:
        side *= 2 if downsample else 1
        its.append([width, side])
    key = "features' widths and pixels along a place"
    check_made_for(folder, {key: _places(pipeline)[: len(its)]}, {key: its}, "a T2I-Adapter")
    return load_network(folder, CLASS_NAME, dtype=dtype)


def _places(pipeline: Pipeline) -> list[list[int]]:
    """Of each state of the UNet that a feature is added to its width, and the pixels along the side of a place."""
    module: Any = pipeline.unet.module
    cfg, places = module.config, []
    last = len(cfg.block_out_channels) - 1
    for level, (width, depths) in enumerate(zip(cfg.block_out_channels, cfg.down_depths, strict=True)):
        halved = level < last and depths[-1] is None  # a block without attention is added to at its end
        places.append([width, pipeline.downscale * 2 ** (level + halved)])
    return [*places, [cfg.block_out_channels[last], pipeline.downscale * 2**last]]
