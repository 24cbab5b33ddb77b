"""Whole models in one .safetensors file with the original names, as ComfyUI and A1111 take them."""

import re
from pathlib import Path
from typing import Any

from etils import epath

from mlcm_jax.errors import UserError
from mlcm_jax.hub import ldm, open_clip
from mlcm_jax.hub.layout import Layout, lay_out, unchanged
from mlcm_jax.hub.save import param_entries, write_safetensors
from mlcm_jax.hub.tensor_reader import TensorReader, listed
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
# Schedule tables, a moving average beside the weights, and CLIP's temperature: nothing that is drawn with.
IGNORED = (
    re.compile(r"^(betas|alphas_cumprod|alphas_cumprod_prev|(sqrt|log)_\w+|posterior_\w+|logvar)$"),
    re.compile(r"^(model_ema\.|denoiser\.sigmas$)"),
    re.compile(r"^conditioner\.embedders\.1\.model\.logit_scale$"),
    re.compile(r"\.embeddings\.position_ids$"),
)


def class_of_checkpoint(file: Path) -> str:
    """The pipeline class of a single file, told by its names.

    Raises UserError for a file that is neither SDXL nor SD 1.x, lacks a network, or holds more than these.
    """
    reader = TensorReader(file)
    names = [n for n in reader.names() if not any(rule.search(n) for rule in IGNORED)]
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


def save_single_file(class_name: str, networks: dict[str, Params], file: epath.PathLike, *, dtype: Any = None) -> None:
    """Write a pipeline's networks to one file; of several processes the first writes, all must call.

    dtype: of the written tensors; None keeps the parameters'. Raises UserError for a network without original names.
    """
    entries = [
        entry
        for part, layout in LAYOUTS[class_name].items()
        for entry in lay_out(param_entries(networks[part], dtype), layout)
    ]
    write_safetensors(entries, file)
