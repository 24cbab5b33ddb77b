"""The settings of CLIP's towers: transformers' config.json against tables of what is supported."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from mlcm_jax.errors import UserError
from mlcm_jax.json_config import (
    COUNT,
    LAYERS,
    MAPPING,
    NOT_NEGATIVE,
    NUMBER,
    SIZE,
    UNREAD,
    Table,
    or_null,
    read_config,
)

# What transformers writes into every config.json for generation, classification and training. The networks read none
# of it, except where a value other than the one listed would change them.
COMMON: Table = {
    **dict.fromkeys(
        (
            *("architectures", "model_type", "transformers_version", "dtype", "torch_dtype", "return_dict", "prefix"),
            *("output_attentions", "output_hidden_states", "output_scores", "return_dict_in_generate", "torchscript"),
            *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params"),
            *("tie_word_embeddings", "tie_encoder_decoder", "tokenizer_class", "use_bfloat16", "tf_legacy_loss"),
            *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"),
            *(
                "bad_words_ids",
                "forced_bos_token_id",
                "forced_eos_token_id",
                "suppress_tokens",
                "begin_suppress_tokens",
            ),
            *("max_length", "min_length", "early_stopping", "num_beams", "num_beam_groups", "num_return_sequences"),
            *("do_sample", "temperature", "top_k", "top_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
            *("diversity_penalty", "length_penalty", "repetition_penalty", "exponential_decay_length_penalty"),
            *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "remove_invalid_values"),
            *("attention_dropout", "dropout", "initializer_factor", "initializer_range", "gradient_checkpointing"),
        ),
        (None, UNREAD),
    ),
    "add_cross_attention": (False, (False,)),
    "chunk_size_feed_forward": (0, (0,)),
    "cross_attention_hidden_size": (None, (None,)),
    "is_decoder": (False, (False,)),
    "is_encoder_decoder": (False, (False,)),
    "pruned_heads": ({}, ({},)),
}
_TOWER: Table = {
    **COMMON,
    "hidden_act": ("quick_gelu", ("quick_gelu", "gelu")),
    "layer_norm_eps": (1e-5, NOT_NEGATIVE),
    "num_hidden_layers": (12, LAYERS),
    "projection_dim": (512, SIZE),
}
TEXT_KEYS: Table = {
    **_TOWER,
    "hidden_size": (512, SIZE),
    "intermediate_size": (2048, SIZE),
    "num_attention_heads": (8, SIZE),
    "vocab_size": (49408, SIZE),
    "max_position_embeddings": (77, SIZE),
    "eos_token_id": (49407, COUNT),
}
VISION_KEYS: Table = {
    **_TOWER,
    "hidden_size": (768, SIZE),
    "intermediate_size": (3072, SIZE),
    "num_attention_heads": (12, SIZE),
    "image_size": (224, SIZE),
    "patch_size": (32, SIZE),
    "num_channels": (3, (3,)),
}
CLIP_KEYS: Table = {
    **COMMON,
    "text_config": (None, or_null(MAPPING)),
    "vision_config": (None, or_null(MAPPING)),
    "text_config_dict": (None, or_null(MAPPING)),
    "vision_config_dict": (None, or_null(MAPPING)),
    "projection_dim": (512, SIZE),
    "logit_scale_init_value": (2.6592, NUMBER),
}
TEXT_CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection")


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """The keys of config.json that shape either tower."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_hidden_layers: int
    hidden_act: str
    layer_norm_eps: float
    projection_dim: int

    KEYS: ClassVar[Table]

    @classmethod
    def read(cls, config: Mapping[str, Any], class_name: str) -> Self:
        """Check one tower's settings; raises UserError for a key or a value that is not supported."""
        values = read_config(dict(config), cls.KEYS, class_name)
        if values["hidden_size"] % values["num_attention_heads"]:
            raise UserError(
                f"{values.source} has hidden_size={values['hidden_size']}, which "
                f"num_attention_heads={values['num_attention_heads']} does not divide."
            )
        return cls(**{f.name: values[f.name] for f in dataclasses.fields(cls)})


@dataclasses.dataclass(frozen=True)
class TextTowerConfig(TowerConfig):
    """Those of the text tower."""

    vocab_size: int
    max_position_embeddings: int
    eos_token_id: int

    KEYS = TEXT_KEYS


@dataclasses.dataclass(frozen=True)
class VisionTowerConfig(TowerConfig):
    """Those of the vision tower; images and patches are square, in pixels."""

    image_size: int
    patch_size: int

    KEYS = VISION_KEYS


def text_class(config: Mapping[str, Any]) -> str:
    """The torch class that a text tower's config.json names; raises UserError when it is not a text tower alone."""
    names = config.get("architectures") or ["CLIPTextModel"]
    name = names[0] if isinstance(names, list) else names
    if name not in TEXT_CLASSES:
        raise UserError(f"config.json is a {name}'s, not a text encoder's: use {' or '.join(TEXT_CLASSES)}.")
    return name


def read_clip(config: Mapping[str, Any]) -> tuple[TextTowerConfig, VisionTowerConfig, int, float]:
    """Text tower, vision tower, width of the common space and initial logit_scale of a CLIPModel's config.json.

    Where old files repeat a tower as ``text_config_dict`` or ``vision_config_dict``, that one counts, as in
    transformers. Raises UserError for a key or a value that is not supported.
    """
    values = read_config(dict(config), CLIP_KEYS, "CLIPModel")
    text = TextTowerConfig.read(_tower(values, "text_config"), "CLIPModel.text_config")
    vision = VisionTowerConfig.read(_tower(values, "vision_config"), "CLIPModel.vision_config")
    return text, vision, values["projection_dim"], values["logit_scale_init_value"]


def _tower(values: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    settings = values[part] if values[f"{part}_dict"] is None else values[f"{part}_dict"]
    if not isinstance(settings, Mapping):
        raise UserError(f"CLIPModel's config.json has no {part}: name a folder of transformers' CLIPModel.")
    return settings
