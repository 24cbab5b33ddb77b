"""How a LoRA's tensors are called: one table of spellings, which reading and writing share."""

from collections.abc import Collection
from typing import NamedTuple

from mlcm_jax.hub import ldm

PARTS = ("unet", "text_encoder", "text_encoder_2")
FILE_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # in a folder: diffusers' and PEFT's
ADAPTER_CONFIG = "adapter_config.json"  # PEFT's settings, beside its file
PEFT_PREFIX = "base_model.model."  # in the files of PEFT's own folders
TEXT_MODEL = "text_model."


class Spelling(NamedTuple):
    """Names of the tensors of one module; a file may leave out ``alpha``. module: its name in PEFT's settings."""

    down: str
    up: str
    alpha: str
    module: str

    @property
    def tensors(self) -> tuple[str, str, str]:
        return self.down, self.up, self.alpha


def spellings(part: str, modules: Collection[str], tensors: Collection[str]) -> dict[str, dict[str, Spelling]]:
    """For each of a network's modules, its spelling in each naming ("peft", "kohya"...) that has one for it.

    part: of ``PARTS``. modules: torch names without ".weight". tensors: all tensors of the network.
    """
    original = {}
    if part == "unet":
        known = [t for t in tensors if "cond_proj" not in t]
        original = {t.removesuffix(".weight"): p.name.removesuffix(".weight") for t, p in _places(known)}
    return {module: _spellings(part, module, original.get(module)) for module in modules}


def _places(tensors: Collection[str]):
    return ldm.unet_places(tensors).items()


def _spellings(part: str, module: str, original: str | None) -> dict[str, Spelling]:
    diffusers = "lora" if part == "unet" else "lora_linear_layer"
    found = {
        "peft": _spell(f"{part}.{module}", ".lora_A", ".lora_B", module),
        "peft_folder": _spell(f"{PEFT_PREFIX}{module}", ".lora_A", ".lora_B", module),
        "peft_bare": _spell(module, ".lora_A", ".lora_B", module),
        "diffusers": _spell(f"{part}.{module}", f".{diffusers}.down", f".{diffusers}.up", module),
        "kohya_diffusers": _kohya(part, module),
    }
    if module.startswith(TEXT_MODEL):  # transformers 5 has CLIPTextModel's modules without this prefix
        short = _spellings(part, module.removeprefix(TEXT_MODEL), None)
        found |= {f"{kind}_5": spelling for kind, spelling in short.items()}
    head, _, last = module.removesuffix(".0").rpartition(".")
    if part == "unet" and last in ("to_q", "to_k", "to_v", "to_out"):
        found["attention_processor"] = _spell(f"{part}.{head}.processor.{last}_lora", ".down", ".up", module)
    if part == "text_encoder":
        found["kohya_one_encoder"] = _kohya("te", module)
    if original is not None:
        found["kohya_original"] = _kohya(part, original)
    return found


def _spell(base: str, down: str, up: str, module: str) -> Spelling:
    return Spelling(f"{base}{down}.weight", f"{base}{up}.weight", f"{base}.alpha", module)


KOHYA_PARTS = {"unet": "unet", "text_encoder": "te1", "text_encoder_2": "te2", "te": "te"}


def _kohya(part: str, module: str) -> Spelling:
    return _spell(f"lora_{KOHYA_PARTS[part]}_{module.replace('.', '_')}", ".lora_down", ".lora_up", module)


def kohya_naming(modules: Collection[str]) -> str:
    """The naming that sd-scripts writes for a UNet: the original names for SDXL, diffusers' for SD 1.5."""
    return "kohya_original" if any(m.startswith("add_embedding.") for m in modules) else "kohya_diffusers"
