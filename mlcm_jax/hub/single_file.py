"""Whole models in one .safetensors file with the original names, as ComfyUI and A1111 take them."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from mlcm_jax.errors import UserError, listed
from mlcm_jax.hub import ldm, open_clip
from mlcm_jax.hub.layout import Layout, RenamedReader, lay_out, unchanged
from mlcm_jax.hub.save import Entry, param_entries, write_safetensors
from mlcm_jax.hub.tensor_reader import TensorReader
from mlcm_jax.types import Params

_UNET = Layout(ldm.unet_places, "model.diffusion_model.")
_VAE = Layout(ldm.vae_places, "first_stage_model.")
# pipeline class: how each of its networks is kept
LAYOUTS = {
    "StableDiffusionXLPipeline": {
        "unet": _UNET,
        "vae": _VAE,
        "text_encoder": Layout(unchanged, "conditioner.embedders.0.transformer."),
        "text_encoder_2": Layout(open_clip.places, "conditioner.embedders.1.model."),
    },
    "StableDiffusionPipeline": {
        "unet": _UNET,
        "vae": _VAE,
        "text_encoder": Layout(unchanged, "cond_stage_model.transformer."),
    },
}
# Other spellings of text encoders, as ComfyUI and A1111 have written and still read them.
ALIASES = (
    (re.compile(r"^cond_stage_model\.clip_l\."), "cond_stage_model."),
    (re.compile(r"^conditioner\.embedders\.0\.clip_l\."), "conditioner.embedders.0."),
    (
        re.compile(
            r"^((?:cond_stage_model|conditioner\.embedders\.0)\.transformer\.)(?=embeddings|encoder|final_layer)"
        ),
        r"\1text_model.",
    ),
)
# Schedule tables, a moving average beside the weights, CLIP's temperature, and the projection of a text encoder whose
# token states alone are used: nothing that is drawn with.
IGNORED = (
    re.compile(r"^(betas|alphas_cumprod|alphas_cumprod_prev|(sqrt|log)_\w+|posterior_\w+|logvar)$"),
    re.compile(r"^(model_ema\.|denoiser\.sigmas$)"),
    re.compile(r"^(cond_stage_model|conditioner\.embedders\.[01])\.(\w+\.)*logit_scale$"),
    re.compile(r"^(cond_stage_model|conditioner\.embedders\.0)\.(\w+\.)*text_projection(\.weight)?$"),
    re.compile(r"\.embeddings\.position_ids$"),
)
# Tensors without a number that say what a sampler needs to know, and the scheduler settings that they stand for.
MARKERS = {"v_pred": {"prediction_type": "v_prediction"}, "ztsnr": {"rescale_betas_zero_snr": True}}


def open_single_file(file: Path) -> TensorReader:
    """The tensors of a single file, under their usual names."""

    def usual(name: str) -> str:
        for pattern, replacement in ALIASES:
            name = pattern.sub(replacement, name)
        return name

    return RenamedReader(TensorReader(file), usual)


def marked_settings(file: Path) -> dict[str, Any]:
    """Scheduler settings that the markers in a single file stand for."""
    names = TensorReader(file).names()
    return {key: value for marker, settings in MARKERS.items() if marker in names for key, value in settings.items()}


def class_of_checkpoint(file: Path) -> str:
    """The pipeline class of a single file, known by its names.

    Raises UserError for a file that is neither SDXL nor SD 1.x, lacks a network, or holds more than these.
    """
    names = open_single_file(file).names()
    names = [n for n in names if n not in MARKERS and not any(rule.search(n) for rule in IGNORED)]
    for class_name, layouts in LAYOUTS.items():
        prefixes = tuple(layout.prefix for layout in layouts.values())
        if all(any(n.startswith(prefix) for n in names) for prefix in prefixes):
            others = [n for n in names if not n.startswith(prefixes)]
            if others:
                raise UserError(f"{file} holds {len(others)} tensors besides the model's: {listed(others)}.")
            return class_name
    raise UserError(
        f"{file} is no whole SDXL or SD 1.5 model in the original names: for SD 1.5, it needs tensors under "
        f"{' and '.join(prefixes)}."
    )


def save_single_file(
    class_name: str,
    networks: dict[str, Params],
    file: epath.PathLike,
    *,
    scheduler_config: Mapping[str, Any],
    dtype: Any = None,
) -> None:
    """Write a pipeline's networks to one file; of several processes the first writes, all must call.

    scheduler_config: written as markers, as far as there are any for it. dtype: of the written tensors; None keeps the
    parameters'. Raises UserError for a network without original names.
    """
    entries = [
        entry
        for part, layout in LAYOUTS[class_name].items()
        for entry in lay_out(param_entries(networks[part], dtype), layout)
    ]
    markers = [name for name, says in MARKERS.items() if says.items() <= dict(scheduler_config).items()]
    empty = np.zeros(0, np.float32)
    entries += [Entry([name], empty.shape, empty.dtype, lambda: [empty]) for name in markers]
    write_safetensors(entries, file)
