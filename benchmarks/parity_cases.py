"""The networks that benchmarks/parity.py compares: their settings, and what they are given."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from mlcm_jax.models.controlnet_config import config_for_unet

ROOT = Path(__file__).parents[1]
EMOJI = ROOT / "examples" / "emoji"
TEACHER = EMOJI / "teacher"
SDXL = ROOT / "configs" / "architectures" / "sdxl"
PARTS = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
}
SDXL_ADAPTER = {"adapter_type": "full_adapter_xl", "downscale_factor": 16}
CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
_SMALL_UNET = {
    "block_out_channels": [32, 64],
    "cross_attention_dim": 32,
    "norm_num_groups": 8,
    "down_block_types": [CROSS_DOWN, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", CROSS_UP],
}
_DEEP = {"down_block_types": [CROSS_DOWN] * 2, "up_block_types": [CROSS_UP] * 2, "use_linear_projection": True}
SMALL_UNETS: dict[str, dict[str, Any]] = {
    "SD 1.5": {**_SMALL_UNET, "attention_head_dim": 8},
    "SD 2.1": {
        **_SMALL_UNET,
        "attention_head_dim": [2, 4],
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "SSD-1B": {
        **_SMALL_UNET,
        **_DEEP,
        "attention_head_dim": [2, 4],
        "layers_per_block": [2, 1],
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": [[1, 2], 1],
        "reverse_transformer_layers_per_block": [[3, 1], 2],
    },
    "LCM student": {**_SMALL_UNET, "attention_head_dim": 8, "time_cond_proj_dim": 16},
}


def cases(full: bool) -> dict[str, tuple[str, str | dict[str, Any], bool]]:
    """{row: (torch class, folder of a config.json or the config, whether the folder has weights)}."""
    rows: dict[str, tuple[str, str | dict[str, Any], bool]] = {}
    for part, class_name in PARTS.items():
        rows[f"{part}, emoji teacher"] = (class_name, str(TEACHER / part), True)
    rows["controlnet, emoji"] = ("ControlNetModel", str(EMOJI / "controlnet"), True)
    for name, config in SMALL_UNETS.items():
        rows[f"unet, small {name}"] = ("UNet2DConditionModel", config, False)
    if full:
        rows["controlnet, SDXL"] = ("ControlNetModel", config_for_unet(read_config(str(SDXL / "unet"))), False)
        rows["t2i_adapter, SDXL"] = ("T2IAdapter", SDXL_ADAPTER, False)
        for part, class_name in reversed(PARTS.items()):
            rows[f"{part}, SDXL"] = (class_name, str(SDXL / part), False)
    return rows


def read_config(source: str | dict[str, Any]) -> dict[str, Any]:
    return source if isinstance(source, dict) else json.loads((Path(source) / "config.json").read_text())


def make_inputs(class_name: str, config: dict[str, Any]) -> dict[str, np.ndarray]:
    """The same numbers for both sides; images are channels-last."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape, np.float32)

    if class_name in ("UNet2DConditionModel", "ControlNetModel"):
        width = config.get("projection_class_embeddings_input_dim")
        inputs = {
            "sample": normal(1, 16, 16, 4),
            "timesteps": np.array([749]),
            "hidden_states": normal(1, 77, config["cross_attention_dim"]),
            "pooled": normal(1, width - 6 * config["addition_time_embed_dim"] if width else 1),
            "time_ids": np.array([[1024, 1024, 0, 0, 1024, 1024]], np.float32),
        }
        if class_name == "ControlNetModel":
            side = 16 * 2 ** (len(config.get("conditioning_embedding_out_channels", range(4))) - 1)
            return inputs | {"image": rng.random((1, side, side, 3), np.float32)}
        guidance = config.get("time_cond_proj_dim")
        return inputs | ({"guidance": normal(1, guidance)} if guidance else {})
    if class_name == "AutoencoderKL":
        return {"images": rng.uniform(-1, 1, (1, 128, 128, 3)).astype(np.float32), "latents": normal(1, 16, 16, 4)}
    if class_name == "T2IAdapter":
        return {"images": rng.random((1, 256, 256, 3), np.float32)}
    return {"ids": rng.integers(0, min(config["vocab_size"], 49407), (1, config["max_position_embeddings"]))}
