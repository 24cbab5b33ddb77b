"""PEFT's settings of a LoRA, from an adapter_config.json or from the header that diffusers writes.

They hold what the tensors do not: alpha, for all modules and for some, and whether alpha is divided by the rank or by
its square root (arXiv 2312.03732).
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from mlcm_jax.errors import UserError, listed, shortened
from mlcm_jax.hub.lora_names import ADAPTER_CONFIG
from mlcm_jax.hub.tensor_reader import TensorReader, read_json

METADATA_KEY = "lora_adapter_metadata"  # of the safetensors header, read by diffusers from 0.34 on
DEFAULT_ALPHA = 8  # PEFT's

# Settings that the tensors show anyway, that count in training alone, or that say where the adapter came from.
UNUSED = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r"),
    *("rank_pattern", "target_modules", "exclude_modules", "lora_dropout", "fan_in_fan_out", "layers_to_transform"),
    *("layers_pattern", "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config"),
    *("lora_ga_config", "qalora_group_size", "runtime_config", "ensure_weight_tying", "velora_config"),
}
USED = {"lora_alpha", "alpha_pattern", "use_rslora"}
# Settings of which only some values leave the weights as they are: an initial "pissa", say, changes the model itself.
SUPPORTED: dict[str, tuple] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """What scales an adapter's weights. source: the file, for messages."""

    source: str
    alpha: float
    alpha_pattern: tuple[tuple[str, float], ...]
    use_rslora: bool

    def factor(self, module: str, rank: int) -> float:
        """What PEFT multiplies the product of a module's factors by. module: its name as the adapter spells it."""
        alpha = next((a for pattern, a in self.alpha_pattern if self._matches(pattern, module)), self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def _matches(self, pattern: str, module: str) -> bool:
        try:
            return re.match(rf"(.*\.)?({pattern})$", module) is not None
        except re.error as e:
            raise UserError(
                f"{self.source} has {pattern!r} in alpha_pattern, no regular expression ({shortened(e)})."
            ) from None


def read_adapter_config(reader: TensorReader) -> AdapterConfig:
    """The settings beside a file with PEFT's own names; raises UserError where there are none, and as ``_parse``."""
    file = reader.source.with_name(ADAPTER_CONFIG)
    if not file.is_file():
        raise UserError(
            f"{reader.source} has PEFT's names, but no {ADAPTER_CONFIG} is beside it, which says how much the LoRA "
            "counts (lora_alpha): copy PEFT's whole folder."
        )
    return _parse(read_json(file), str(file))


def read_header(reader: TensorReader, part: str) -> AdapterConfig | None:
    """The settings for a network in diffusers' header; None where the file has no header of this kind.

    part: the name before the settings, "unet", or "" for a file of one network without such names.
    """
    if METADATA_KEY not in reader.metadata:
        return None
    try:
        settings = json.loads(reader.metadata[METADATA_KEY])
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise UserError(f"{reader.source} has a damaged {METADATA_KEY} in its header: copy or download it again.")
    prefix = f"{part}." if part else ""
    own = {key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)}
    return _parse(own, f"{reader.source}'s {METADATA_KEY}") if own else None


def _parse(settings: Mapping[str, Any], source: str) -> AdapterConfig:
    """Raises UserError for a value of the wrong type and for a setting that changes the weights in another way."""
    unsupported = {
        shortened(f"{key}={value!r}", 60)
        for key, value in settings.items()
        if key not in UNUSED | USED and not (value in SUPPORTED[key] if key in SUPPORTED else not value)
    }
    if unsupported:
        raise UserError(
            f"{source} sets {listed(unsupported)}, which is not supported: fold the adapter into the model with PEFT's "
            "merge_and_unload, and use the result."
        )
    alpha, pattern = settings.get("lora_alpha", DEFAULT_ALPHA), settings.get("alpha_pattern") or {}
    rslora = settings.get("use_rslora", False)
    if not isinstance(pattern, dict) or not all(map(_is_number, [alpha, *pattern.values()])):
        raise UserError(
            f"{source} has lora_alpha={alpha!r}, alpha_pattern={shortened(pattern, 60)}: they must be finite numbers."
        )
    if not isinstance(rslora, bool):
        raise UserError(f"{source} has use_rslora={rslora!r}: it must be true or false.")
    return AdapterConfig(source, float(alpha), tuple((k, float(v)) for k, v in pattern.items()), rslora)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
