"""model_index.json: which class each component of a diffusers folder is, whatever the component's own file says."""

from pathlib import Path
from typing import Any

from mlcm_jax.diffusion.scheduler_config import of_class
from mlcm_jax.errors import UserError
from mlcm_jax.hub.fetch import Source
from mlcm_jax.hub.network import check_class
from mlcm_jax.hub.single_file import marked_settings
from mlcm_jax.hub.tensor_reader import read_json

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")  # of which a pipeline may have the first alone
# pipeline class: (text encoders, tokenizers), in the order in which their states are joined
PIPELINES = {
    "StableDiffusionXLPipeline": (TEXT_ENCODERS, ("tokenizer", "tokenizer_2")),
    "StableDiffusionPipeline": (("text_encoder",), ("tokenizer",)),
}


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
        raise UserError(f"{folder} is a {class_name}, which is not supported: use {', '.join(PIPELINES)}.")
    _, tokenizers = PIPELINES[class_name]
    for part in (*network_parts(model_index), *tokenizers, "scheduler"):
        entry = model_index.get(part)
        if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(e, str) for e in entry):
            raise UserError(f"{folder}/model_index.json has no {part}, which a {class_name} needs.")
        if not (folder / part).is_dir() and (with_tokenizers or part not in tokenizers):
            raise UserError(f"{folder / part} does not exist, though model_index.json names it: copy the whole model.")
    for part in network_parts(model_index):
        check_class(folder / part, model_index[part][1])
    return model_index


def read_scheduler_config(source: Source, model_index: dict[str, Any]) -> dict[str, Any]:
    """The sampler's settings, for the class that model_index.json names; those beside a single file name their own.

    A single file that has none beside it says with its markers what the settings of its architecture do not know.
    """
    config = read_json(source.scheduler_config)
    if source.checkpoint is None:
        return of_class(config, model_index["scheduler"][1])
    if source.scheduler_config.parent == source.checkpoint.parent:
        return config
    return of_class(config, model_index["scheduler"][1]) | marked_settings(source.checkpoint)
