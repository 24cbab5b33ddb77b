"""The settings of diffusers' ControlNetModel: its config.json against a table of what is supported."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mlcm_jax.json_config import COUNT, LAYERS, SIZES, Kind, Table, either, read_config, sizes
from mlcm_jax.models import unet_config
from mlcm_jax.models.attention_backend import AttentionBackend
from mlcm_jax.models.unet_config import DEPTHS_KEY, EncoderConfig, encoder_fields, joined_fields

CLASS_NAME = "ControlNetModel"
DEPTHS = either(COUNT, sizes("whole numbers, 0 or more", each=either(COUNT, sizes(each=COUNT.holds)).holds))
MOST_WIDTHS = 8  # 128 pixels along a latent
WIDTHS = Kind(f"a list of 1 to {MOST_WIDTHS} whole numbers", lambda v: SIZES.holds(v) and len(v) <= MOST_WIDTHS)
OF_UNETS = (
    "in_channels",
    "flip_sin_to_cos",
    "freq_shift",
    "down_block_types",
    "mid_block_type",
    "only_cross_attention",
    "block_out_channels",
    "downsample_padding",
    "mid_block_scale_factor",
    "act_fn",
    "norm_num_groups",
    "norm_eps",
    "cross_attention_dim",
    "encoder_hid_dim",
    "encoder_hid_dim_type",
    "attention_head_dim",
    "num_attention_heads",
    "use_linear_projection",
    "class_embed_type",
    "addition_embed_type",
    "addition_time_embed_dim",
    "num_class_embeds",
    "upcast_attention",
    "resnet_time_scale_shift",
    "projection_class_embeddings_input_dim",
    "addition_embed_type_num_heads",
)
CONFIG_KEYS: Table = {key: unet_config.CONFIG_KEYS[key] for key in OF_UNETS} | {
    "layers_per_block": (2, LAYERS),
    DEPTHS_KEY: (1, DEPTHS),  # small ones have transformers of no block: a norm and two projections
    "conditioning_channels": (3, (3,)),
    "conditioning_embedding_out_channels": ((16, 32, 96, 256), WIDTHS),
    "controlnet_conditioning_channel_order": ("rgb", ("rgb", "bgr")),
    "global_pool_conditions": (False, (False,)),
}


def config_for_unet(unet: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a ControlNet that copies the way down of a UNet with this one; the rest are defaults."""
    shared = (*OF_UNETS, "layers_per_block", DEPTHS_KEY)
    return {key: unet[key] for key in shared if key in unet} | {"_class_name": CLASS_NAME}


@dataclasses.dataclass(frozen=True)
class ControlNetConfig(EncoderConfig):
    """The keys of config.json that shape the network.

    conditioning_embedding_out_channels: each but the first is at half the height and width of the one before.
    """

    layers_per_block: int
    conditioning_embedding_out_channels: tuple[int, ...]
    controlnet_conditioning_channel_order: str

    @classmethod
    def read(cls, config: dict[str, Any], attention: AttentionBackend) -> "ControlNetConfig":
        """Validate diffusers' config.json; raises UserError for a setting that is not supported."""
        values = read_config(config, CONFIG_KEYS, CLASS_NAME)
        read_here = encoder_fields(values, COUNT.holds) | {"remat": None, "attention": attention, "unroll": 1}
        return joined_fields(cls, values, read_here)
