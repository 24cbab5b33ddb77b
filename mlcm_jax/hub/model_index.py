"""model_index.json: which class each component of a diffusers folder is, whatever the component's own file says."""

import re
from pathlib import Path
from typing import Any

from mlcm_jax.diffusion.scheduler_config import as_pipelines_set, of_class
from mlcm_jax.errors import UserError, shortened
from mlcm_jax.hub.fetch import Source
from mlcm_jax.hub.network import NETWORKS, check_class
from mlcm_jax.hub.single_file import marked_settings
from mlcm_jax.hub.tensor_reader import read_json
from mlcm_jax.models.clip_config import TEXT_CLASSES

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")  # of which a pipeline may have the first alone
# pipeline class: (text encoders, tokenizers), in the order in which their states are joined
PIPELINES = {
    "StableDiffusionXLPipeline": (TEXT_ENCODERS, ("tokenizer", "tokenizer_2")),
    "StableDiffusionPipeline": (("text_encoder",), ("tokenizer",)),
}
OUTDATED_BEFORE, SD_SAMPLE_SIZE = (0, 9, 0), 64  # of diffusers' StableDiffusionPipeline


def network_parts(model_index: dict[str, Any]) -> tuple[str, ...]:
    """Folders of a pipeline's networks."""
    encoders, _ = PIPELINES[model_index["_class_name"]]
    return ("unet", "vae", *encoders)


def read_model_index(folder: Path, *, with_tokenizers: bool = True) -> dict[str, Any]:
    """model_index.json, whose components are all there; raises UserError where they are not or are not supported."""
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{folder} has no model_index.json: name the folder of a diffusers model.")
    model_index = read_json(folder / "model_index.json")
    class_name = model_index.get("_class_name")
    if not isinstance(class_name, str) or class_name not in PIPELINES:
        raise UserError(
            f"{folder} is a {shortened(class_name, 60)}, which is not supported: use {', '.join(PIPELINES)}."
        )
    _, tokenizers = PIPELINES[class_name]
    for part in (*network_parts(model_index), *tokenizers, "scheduler"):
        entry = model_index.get(part)
        if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(e, str) for e in entry):
            raise UserError(f"{folder}/model_index.json has no {part}, which a {class_name} needs.")
        if not (folder / part).is_dir() and (with_tokenizers or part not in tokenizers):
            raise UserError(f"{folder / part} does not exist, though model_index.json names it: copy the whole model.")
    for part in network_parts(model_index):
        check_class(folder / part, model_index[part][1], TEXT_CLASSES if part in TEXT_ENCODERS else tuple(NETWORKS))
    return model_index


def read_scheduler_config(source: Source, model_index: dict[str, Any]) -> dict[str, Any]:
    """The sampler's settings as diffusers' pipeline uses them, for the class that model_index.json names.

    Those beside a single file name their own class.

    A single file that has none beside it says with its markers what the settings of its architecture do not know.
    """
    config = read_json(source.scheduler_config)
    beside = source.checkpoint is not None and source.scheduler_config.parent == source.checkpoint.parent
    if not beside:
        config = of_class(config, model_index["scheduler"][1])
        config |= marked_settings(source.checkpoint) if source.checkpoint else {}
    return as_pipelines_set(config, model_index["_class_name"])


def corrected_unet_config(config: dict[str, Any], pipeline_class: str) -> dict[str, Any]:
    """A UNet's config.json as diffusers' pipeline uses it: the first ones of SD 1.x named half of their size."""
    size, version = config.get("sample_size"), _version(config.get("_diffusers_version"))
    outdated = pipeline_class == "StableDiffusionPipeline" and version is not None and version < OUTDATED_BEFORE
    if outdated and isinstance(size, int) and size < SD_SAMPLE_SIZE:
        return config | {"sample_size": SD_SAMPLE_SIZE}
    return config


def _version(text: Any) -> tuple[int, ...] | None:
    """Major, minor and micro number; None where there is none. Endings such as ".dev0" do not count."""
    match = re.match(r"v?(\d+)\.(\d+)(?:\.(\d+))?", text) if isinstance(text, str) else None
    return tuple(int(number or 0) for number in match.groups()) if match else None
