"""The settings of diffusers' UNet2DConditionModel: its config.json against a table of what is supported."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from mlcm_jax.json_config import (
    FRACTION,
    LAYERS,
    NAMES,
    NOT_NEGATIVE,
    NUMBER,
    SIZE,
    SIZES,
    UNREAD,
    ConfigValues,
    Kind,
    Table,
    either,
    is_size,
    or_null,
    read_config,
    sizes,
)
from mlcm_jax.models.attention_backend import AttentionBackend

CLASS_NAME = "UNet2DConditionModel"
# block type: whether it has attention
DOWN_BLOCKS = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
MID_BLOCKS = {"UNetMidBlock2D": False, "UNetMidBlock2DCrossAttn": True}
UP_BLOCKS = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}
DEPTHS_KEY = "transformer_layers_per_block"
OFF = (False, (False,))
ABSENT = (None, (None,))

SAMPLE_SIZE = or_null(either(SIZE, Kind("height and width", lambda v: SIZES.holds(v) and len(v) == 2)))
DEPTHS = either(LAYERS, sizes(each=LAYERS.holds))
NESTED = either(LAYERS, sizes("whole numbers above 0 or lists of them", each=DEPTHS.holds))
# key: (diffusers' default, supported values or their kind)
CONFIG_KEYS: Table = {
    "sample_size": (None, SAMPLE_SIZE),
    "in_channels": (4, SIZE),
    "out_channels": (4, SIZE),
    "center_input_sample": OFF,
    "flip_sin_to_cos": (True, (True, False)),
    "freq_shift": (0, NUMBER),
    "down_block_types": (("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), NAMES),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", tuple(MID_BLOCKS)),
    "up_block_types": (("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, NAMES),
    "only_cross_attention": OFF,
    "block_out_channels": ((320, 640, 1280, 1280), SIZES),
    "layers_per_block": (2, DEPTHS),
    "downsample_padding": (1, (1,)),
    "mid_block_scale_factor": (1, (1,)),
    "dropout": (0.0, FRACTION),  # of torch's training alone
    "act_fn": ("silu", ("silu", "swish")),
    "norm_num_groups": (32, SIZE),
    "norm_eps": (1e-5, NOT_NEGATIVE),
    "cross_attention_dim": (1280, SIZE),
    "transformer_layers_per_block": (1, NESTED),
    "reverse_transformer_layers_per_block": (None, or_null(NESTED)),
    "encoder_hid_dim": ABSENT,
    "encoder_hid_dim_type": ABSENT,
    "attention_head_dim": (8, either(SIZE, SIZES)),
    "num_attention_heads": ABSENT,
    "dual_cross_attention": OFF,
    "use_linear_projection": (False, (True, False)),
    "class_embed_type": ABSENT,
    "addition_embed_type": (None, (None, "text_time")),
    "addition_time_embed_dim": (None, or_null(SIZE)),
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
    "time_cond_proj_dim": (None, or_null(SIZE)),
    "conv_in_kernel": (3, (3,)),
    "conv_out_kernel": (3, (3,)),
    "projection_class_embeddings_input_dim": (None, or_null(SIZE)),
    "attention_type": ("default", ("default",)),
    "class_embeddings_concat": OFF,
    "mid_block_only_cross_attention": (None, (None, False)),
    "cross_attention_norm": ABSENT,
    "addition_embed_type_num_heads": (64, UNREAD),
}


Depths = tuple[int | None, ...]  # transformer blocks after each resnet of a stage; None: no attention


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """The keys of config.json that shape the way down and the middle; tuples have one entry for each stage in the order
    it runs."""

    block_out_channels: tuple[int, ...]
    down_depths: tuple[Depths, ...]
    mid_depths: Depths
    num_heads: tuple[int, ...]  # of each resolution, the highest first
    norm_num_groups: int
    norm_eps: float
    act_fn: str
    use_linear_projection: bool
    flip_sin_to_cos: bool
    freq_shift: float
    addition_time_embed_dim: int | None  # None: no pooled state and time ids
    remat: str | None  # policy of models/remat.py; None: all activations are kept
    attention: AttentionBackend
    unroll: int  # transformer blocks in a turn of their loop


@dataclasses.dataclass(frozen=True)
class UNetConfig(EncoderConfig):
    """And those of the way up."""

    up_depths: tuple[Depths, ...]
    out_channels: int
    time_cond_proj_dim: int | None

    @classmethod
    def read(
        cls, config: dict[str, Any], remat: str | None, attention: AttentionBackend, unroll: int = 1
    ) -> "UNetConfig":
        """Validate diffusers' config.json; raises UserError for a setting that is not supported."""
        values = read_config(config, CONFIG_KEYS, CLASS_NAME)
        read_here = encoder_fields(values, is_size) | {"up_depths": _up_depths(values)}
        read_here |= {"remat": remat, "attention": attention, "unroll": unroll}
        return joined_fields(cls, values, read_here)


Config = TypeVar("Config", bound=EncoderConfig)


def joined_fields(cls: type[Config], values: ConfigValues, read_here: dict[str, Any]) -> Config:
    """A configuration of what was made of the values, and of the values themselves."""
    fields = [f.name for f in dataclasses.fields(cls)]
    return cls(**{name: read_here[name] if name in read_here else values[name] for name in fields})


def encoder_fields(values: ConfigValues, is_depth: Callable[[Any], bool]) -> dict[str, Any]:
    """The fields of an EncoderConfig that are no keys themselves. is_depth: of the blocks in a transformer.

    Raises UserError for values that do not fit each other.
    """
    channels, groups = values["block_out_channels"], values["norm_num_groups"]
    fits = all(c % groups == 0 for c in channels)
    values.check("block_out_channels", fits, f"a list of multiples of norm_num_groups={groups}")
    # the frequencies' exponents are divided by what is left of half the width
    values.check("freq_shift", values["freq_shift"] < channels[0] // 2, f"a number below {channels[0] // 2}")
    layers, down = _each_level(values, "layers_per_block"), _down_levels(values)
    has_attention = _has_attention(values, "down_block_types", DOWN_BLOCKS)
    mid_depths: Depths = (None,)
    if MID_BLOCKS[values["mid_block_type"]]:
        deepest = down[-1] if isinstance(down[-1], tuple) else (down[-1],)
        values.check(DEPTHS_KEY, deepest and is_depth(deepest[0]), "numbers above 0")
        mid_depths = (deepest[0], None)
    return {
        "down_depths": _stage_depths(values, DEPTHS_KEY, down, layers, has_attention, is_depth),
        "mid_depths": mid_depths,
        "num_heads": _num_heads(values),
        "addition_time_embed_dim": _time_ids_width(values),
    }


def _each_level(values: ConfigValues, key: str) -> tuple[int, ...]:
    """One number for each resolution, from a number for all or a list."""
    count, value = len(values["block_out_channels"]), values[key]
    levels = value if isinstance(value, tuple) else (value,) * count
    values.check(key, len(levels) == count and all(map(is_size, levels)), f"a number or a list of {count} numbers")
    return levels


def _has_attention(values: ConfigValues, key: str, types: dict[str, bool]) -> tuple[bool, ...]:
    """Whether each block attends to the prompt."""
    count, blocks = len(values["block_out_channels"]), values[key]
    fits = len(blocks) == count and set(blocks) <= set(types)
    values.check(key, fits, f"{count} of {', '.join(types)}")
    return tuple(types[name] for name in blocks)


def _num_heads(values: ConfigValues) -> tuple[int, ...]:
    """Heads at each resolution; diffusers reads them from a key that is named after their width."""
    key, channels = "attention_head_dim", values["block_out_channels"]
    heads = _each_level(values, key)
    divide = all(c % h == 0 for c, h in zip(channels, heads, strict=True))
    values.check(key, divide, f"numbers of heads that divide block_out_channels={list(channels)}")
    return heads


def _time_ids_width(values: ConfigValues) -> int | None:
    """Width of each time id's embedding, or None where the network takes no pooled state and time ids."""
    if values["addition_embed_type"] is None:
        return None
    key, width = "addition_time_embed_dim", values["addition_time_embed_dim"]
    values.check(key, is_size(width) and width % 2 == 0, "an even number, as addition_embed_type is text_time")
    key, joined = "projection_class_embeddings_input_dim", values["projection_class_embeddings_input_dim"]
    values.check(key, is_size(joined) and joined > 6 * width, f"a number above six times {width}, the time ids'")
    return width


def _down_levels(values: ConfigValues) -> tuple:
    """Depths of each stage on the way down: a number for all its resnets, or a list of them."""
    down = values[DEPTHS_KEY]
    return down if isinstance(down, tuple) else (down,) * len(values["block_out_channels"])


def _up_depths(values: ConfigValues) -> tuple[Depths, ...]:
    """Depths of the stages on the way up.

    It mirrors the way down, with one resnet more a stage, unless ``reverse_transformer_layers_per_block`` lists its
    depths (as SSD-1B does, arXiv 2401.02677).
    """
    key, down = "reverse_transformer_layers_per_block", _down_levels(values)
    up = values[key]
    if up is None:
        nested, count = any(isinstance(level, tuple) for level in down), len(down)
        values.check(key, not nested, f"a list of {count} entries, as {DEPTHS_KEY} has a list within")
        key, up = DEPTHS_KEY, down[::-1]
    layers = [n + 1 for n in _each_level(values, "layers_per_block")[::-1]]
    return _stage_depths(values, key, up, layers, _has_attention(values, "up_block_types", UP_BLOCKS), is_size)


def _stage_depths(
    values: ConfigValues,
    key: str,
    levels: Any,
    num_layers: Iterable[int],
    has_attention: tuple[bool, ...],
    is_depth: Callable[[Any], bool],
) -> tuple[Depths, ...]:
    count = len(has_attention)
    values.check(key, isinstance(levels, tuple) and len(levels) == count, f"a number or a list of {count} entries")
    stages = []
    for level, n, attends in zip(levels, num_layers, has_attention, strict=True):
        depths = level if isinstance(level, tuple) else (level,) * n
        fits = not attends or (len(depths) == n and all(map(is_depth, depths)))
        values.check(key, fits, f"a number above 0 or a list of {n} for a block of {n} resnets")
        stages.append(depths if attends else (None,) * n)
    return tuple(stages)
