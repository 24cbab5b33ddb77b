"""The settings of diffusers' UNet2DConditionModel: its config.json against a table of what is supported."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from mlcm_jax.errors import UserError
from mlcm_jax.json_config import ConfigValues, Table, read_config
from mlcm_jax.models.attention_backend import AttentionBackend

CLASS_NAME = "UNet2DConditionModel"
# block type: whether it has attention
DOWN_BLOCKS = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
MID_BLOCKS = {"UNetMidBlock2D": False, "UNetMidBlock2DCrossAttn": True}
UP_BLOCKS = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}
OFF = (False, (False,))
ABSENT = (None, (None,))

# key: (diffusers' default, supported values or None for any)
CONFIG_KEYS: Table = {
    "sample_size": (None, None),
    "in_channels": (4, None),
    "out_channels": (4, None),
    "center_input_sample": OFF,
    "flip_sin_to_cos": (True, (True, False)),
    "freq_shift": (0, None),
    "down_block_types": (("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), None),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", tuple(MID_BLOCKS)),
    "up_block_types": (("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, None),
    "only_cross_attention": OFF,
    "block_out_channels": ((320, 640, 1280, 1280), None),
    "layers_per_block": (2, None),
    "downsample_padding": (1, (1,)),
    "mid_block_scale_factor": (1, (1,)),
    "dropout": (0.0, (0.0,)),
    "act_fn": ("silu", ("silu", "swish")),
    "norm_num_groups": (32, None),
    "norm_eps": (1e-5, None),
    "cross_attention_dim": (1280, None),
    "transformer_layers_per_block": (1, None),
    "reverse_transformer_layers_per_block": (None, None),
    "encoder_hid_dim": ABSENT,
    "encoder_hid_dim_type": ABSENT,
    "attention_head_dim": (8, None),
    "num_attention_heads": ABSENT,
    "dual_cross_attention": OFF,
    "use_linear_projection": (False, (True, False)),
    "class_embed_type": ABSENT,
    "addition_embed_type": (None, (None, "text_time")),
    "addition_time_embed_dim": (None, None),
    "num_class_embeds": ABSENT,
    # Both are the same here: scores and softmax are always float32 (attention_backend.py).
    "upcast_attention": (False, (True, False, None)),
    "resnet_time_scale_shift": ("default", ("default",)),
    "resnet_skip_time_act": OFF,
    "resnet_out_scale_factor": (1.0, (1, 1.0)),
    "time_embedding_type": ("positional", ("positional",)),
    "time_embedding_dim": ABSENT,
    "time_embedding_act_fn": ABSENT,
    "timestep_post_act": ABSENT,
    "time_cond_proj_dim": (None, None),
    "conv_in_kernel": (3, (3,)),
    "conv_out_kernel": (3, (3,)),
    "projection_class_embeddings_input_dim": (None, None),
    "attention_type": ("default", ("default",)),
    "class_embeddings_concat": OFF,
    "mid_block_only_cross_attention": (None, (None, False)),
    "cross_attention_norm": ABSENT,
    "addition_embed_type_num_heads": (64, None),
}


# keys that are one whole number above zero
SIZES = ("in_channels", "out_channels", "norm_num_groups", "cross_attention_dim")

Depths = tuple[int, ...]  # transformer blocks after each resnet of a stage; 0: no attention


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """The keys of config.json that shape the network; tuples have one entry for each stage in the order it runs."""

    block_out_channels: tuple[int, ...]
    down_depths: tuple[Depths, ...]
    mid_depths: Depths
    up_depths: tuple[Depths, ...]
    num_heads: tuple[int, ...]  # of each resolution, the highest first
    out_channels: int
    norm_num_groups: int
    norm_eps: float
    act_fn: str
    use_linear_projection: bool
    flip_sin_to_cos: bool
    freq_shift: float
    addition_time_embed_dim: int | None  # None: no pooled state and time ids
    time_cond_proj_dim: int | None
    remat: str | None  # policy of models/remat.py; None: all activations are kept
    attention: AttentionBackend
    unroll: int  # transformer blocks in a turn of their loop

    @classmethod
    def read(
        cls, config: dict[str, Any], remat: str | None, attention: AttentionBackend, unroll: int = 1
    ) -> "UNetConfig":
        """Validate diffusers' config.json; raises UserError for a setting that is not supported."""
        values = read_config(config, CONFIG_KEYS, CLASS_NAME)
        for key in SIZES:
            _require(values, key, _is_size(values[key]), "a whole number above 0")
        for key in ("norm_eps", "freq_shift"):
            _require(values, key, isinstance(values[key], int | float), "a number")
        width = values["time_cond_proj_dim"]
        _require(values, "time_cond_proj_dim", width is None or _is_size(width), "a whole number above 0 or null")
        channels, groups = values["block_out_channels"], values["norm_num_groups"]
        fits = isinstance(channels, tuple) and channels and all(_is_size(c) and c % groups == 0 for c in channels)
        _require(values, "block_out_channels", fits, f"a list of multiples of norm_num_groups={groups}")
        read_here: dict[str, Any] = {
            **_depths(values),
            "num_heads": _num_heads(values),
            "addition_time_embed_dim": _time_ids_width(values),
            "remat": remat,
            "attention": attention,
            "unroll": unroll,
        }
        fields = [f.name for f in dataclasses.fields(cls)]
        return cls(**{name: read_here[name] if name in read_here else values[name] for name in fields})


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _as_json(value: Any) -> Any:
    return [_as_json(v) for v in value] if isinstance(value, tuple) else value


def _require(values: ConfigValues, key: str, holds: Any, supported: str) -> None:
    if not holds:
        raise UserError(f"{values.source} has {key}={_as_json(values[key])}, which is not supported: use {supported}.")


def _each_level(values: ConfigValues, key: str) -> tuple[int, ...]:
    """One number for each resolution, from a number for all or a list."""
    count, value = len(values["block_out_channels"]), values[key]
    levels = value if isinstance(value, tuple) else (value,) * count
    _require(values, key, len(levels) == count and all(map(_is_size, levels)), f"a number or a list of {count} numbers")
    return levels


def _has_attention(values: ConfigValues, key: str, types: dict[str, bool]) -> tuple[bool, ...]:
    """Whether each block attends to the prompt."""
    count, blocks = len(values["block_out_channels"]), values[key]
    fits = isinstance(blocks, tuple) and len(blocks) == count and set(blocks) <= set(types)
    _require(values, key, fits, f"{count} of {', '.join(types)}")
    return tuple(types[name] for name in blocks)


def _num_heads(values: ConfigValues) -> tuple[int, ...]:
    """Heads at each resolution; diffusers reads them from a key that is named after their width."""
    key, channels = "attention_head_dim", values["block_out_channels"]
    heads = _each_level(values, key)
    divide = all(c % h == 0 for c, h in zip(channels, heads, strict=True))
    _require(values, key, divide, f"numbers of heads that divide block_out_channels={_as_json(channels)}")
    return heads


def _time_ids_width(values: ConfigValues) -> int | None:
    """Width of each time id's embedding, or None where the network takes no pooled state and time ids."""
    if values["addition_embed_type"] is None:
        return None
    key, width = "addition_time_embed_dim", values["addition_time_embed_dim"]
    _require(values, key, _is_size(width) and width % 2 == 0, "an even number, as addition_embed_type is text_time")
    key, joined = "projection_class_embeddings_input_dim", values["projection_class_embeddings_input_dim"]
    _require(values, key, _is_size(joined) and joined > 6 * width, f"a number above six times {width}, the time ids'")
    return width


def _depths(values: ConfigValues) -> dict[str, Any]:
    """Depths of all stages: ``down_depths``, ``mid_depths`` and ``up_depths``.

    The way up mirrors the way down, with one resnet more a stage, unless ``reverse_transformer_layers_per_block`` lists
    its depths (as SSD-1B does, arXiv 2401.02677). An entry is a number for all resnets of a stage or a list of them.
    """
    key, reverse_key = "transformer_layers_per_block", "reverse_transformer_layers_per_block"
    count = len(values["block_out_channels"])
    down, up = values[key], values[reverse_key]
    down = down if isinstance(down, tuple) else (down,) * count
    if up is None:
        nested = any(isinstance(level, tuple) for level in down)
        _require(values, reverse_key, not nested, f"a list of {count} entries, as {key} has a list within")
        up_key, up = key, down[::-1]
    else:
        up_key = reverse_key
    layers = _each_level(values, "layers_per_block")
    down_has_attention = _has_attention(values, "down_block_types", DOWN_BLOCKS)
    up_has_attention = _has_attention(values, "up_block_types", UP_BLOCKS)
    down_depths = _stage_depths(values, key, down, layers, down_has_attention)
    up_depths = _stage_depths(values, up_key, up, [n + 1 for n in layers[::-1]], up_has_attention)
    mid_depths: Depths = (0,)
    if MID_BLOCKS[values["mid_block_type"]]:
        deepest = down[-1] if isinstance(down[-1], tuple) else (down[-1],)
        _require(values, key, deepest and _is_size(deepest[0]), "numbers above 0")
        mid_depths = (deepest[0], 0)
    return {"down_depths": down_depths, "mid_depths": mid_depths, "up_depths": up_depths}


def _stage_depths(
    values: ConfigValues, key: str, levels: Any, num_layers: Iterable[int], has_attention: tuple[bool, ...]
) -> tuple[Depths, ...]:
    count = len(has_attention)
    _require(values, key, isinstance(levels, tuple) and len(levels) == count, f"a number or a list of {count} entries")
    stages = []
    for level, n, attends in zip(levels, num_layers, has_attention, strict=True):
        depths = level if isinstance(level, tuple) else (level,) * n
        fits = not attends or (len(depths) == n and all(map(_is_size, depths)))
        _require(values, key, fits, f"a number above 0 or a list of {n} for a block of {n} resnets")
        stages.append(depths if attends else (0,) * n)
    return tuple(stages)
