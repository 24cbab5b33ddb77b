"""A whole diffusers folder in and out: networks, tokenizers, scheduler_config.json and model_index.json."""

import dataclasses
import importlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import huggingface_hub
import jax
import jax.numpy as jnp
import transformers
from huggingface_hub.errors import EntryNotFoundError, HFValidationError

from mlcm_jax.errors import UserError
from mlcm_jax.hub.load import load_params, read_json
from mlcm_jax.hub.save import save_params, write_json
from mlcm_jax.models.attention_backend import AttentionBackend
from mlcm_jax.types import Params, TextConditioning

# pipeline class: (text encoders, tokenizers), in the order in which their states are joined
PIPELINES = {
    "StableDiffusionXLPipeline": (("text_encoder", "text_encoder_2"), ("tokenizer", "tokenizer_2")),
    "StableDiffusionPipeline": (("text_encoder",), ("tokenizer",)),
}
WEIGHT_FILES = {"diffusers": "diffusion_pytorch_model.safetensors", "transformers": "model.safetensors"}
DOWNLOADED = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
# tokenizer class that is read as itself: the files one of which groups it needs; others are transformers' to find
TOKENIZER_FILES = {
    "CLIPTokenizer": (("tokenizer.json",), ("vocab.json", "merges.txt")),
    "BertTokenizer": (("tokenizer.json",), ("vocab.txt",)),
    "AutoTokenizer": (("tokenizer.json",), ("vocab.json", "merges.txt")),
}
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")

# (component name, tree of ShapeDtypeStructs) -> one sharding or a tree of them, as load_params takes it
ShardingRule = Callable[[str, Params], Any]


def _image(size: int) -> jax.Array:
    return jnp.zeros((1, size, size, 3))


def _unet_inputs(config: Mapping[str, Any]) -> tuple:
    side = 2 ** len(config.get("block_out_channels", (320, 640, 1280, 1280)))
    width = config.get("cross_attention_dim", 1280)
    pooled = 1
    if config.get("addition_embed_type") == "text_time":
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    conditioning = TextConditioning(
        hidden_states=jnp.zeros((1, 2, width if isinstance(width, int) else width[0])),
        pooled=jnp.zeros((1, pooled)),
        time_ids=jnp.zeros((1, 6)),
    )
    sample = jnp.zeros((1, side, side, config.get("in_channels", 4)))
    inputs = (sample, jnp.zeros((1,), jnp.int32), conditioning)
    guidance_width = config.get("time_cond_proj_dim")
    return inputs if guidance_width is None else (*inputs, jnp.zeros((1, guidance_width)))


def _text_inputs(config: Mapping[str, Any]) -> tuple:
    return (jnp.zeros((1, min(2, config.get("max_position_embeddings", 77))), jnp.int32),)


def _vision_inputs(config: Mapping[str, Any]) -> tuple:
    return (_image(config.get("image_size", 224)),)


def _clip_inputs(config: Mapping[str, Any]) -> tuple:
    text, vision = (config.get(f"{part}_dict") or config[part] for part in ("text_config", "vision_config"))
    return *_text_inputs(text), *_vision_inputs(vision)


def _vae_inputs(config: Mapping[str, Any]) -> tuple:
    return (_image(2 ** len(config.get("block_out_channels", (64,)))),)


def _tiny_vae_inputs(config: Mapping[str, Any]) -> tuple:
    return (_image(2 ** len(config.get("num_encoder_blocks", (1, 3, 3, 3)))),)


def _lpips_inputs(config: Mapping[str, Any]) -> tuple:
    return (jnp.zeros((1, 2, 2, config.get("latent_channels", 4))),) * 2


class NetworkClass(NamedTuple):
    """Where the Flax module of a torch class is, and the smallest inputs that its ``init`` takes."""

    module: str
    attribute: str
    inputs: Callable[[Mapping[str, Any]], tuple]


NETWORKS = {
    "UNet2DConditionModel": NetworkClass("mlcm_jax.models.unet", "UNet2DConditionModel", _unet_inputs),
    "AutoencoderKL": NetworkClass("mlcm_jax.models.vae", "AutoencoderKL", _vae_inputs),
    "AutoencoderTiny": NetworkClass("mlcm_jax.models.tiny_vae", "AutoencoderTiny", _tiny_vae_inputs),
    "CLIPTextModel": NetworkClass("mlcm_jax.models.clip", "CLIPTextModel", _text_inputs),
    "CLIPTextModelWithProjection": NetworkClass("mlcm_jax.models.clip", "CLIPTextModel", _text_inputs),
    "CLIPVisionModelWithProjection": NetworkClass("mlcm_jax.models.clip", "CLIPVisionModel", _vision_inputs),
    "CLIPModel": NetworkClass("mlcm_jax.models.clip", "CLIPModel", _clip_inputs),
    "LatentLPIPS": NetworkClass("mlcm_jax.models.latent_lpips", "LatentLPIPS", _lpips_inputs),
}


@dataclasses.dataclass(frozen=True)
class Network:
    """A module, its parameters and the config.json that both were made from."""

    module: nn.Module
    params: Params
    config: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """The parts of a diffusers folder; ``folder`` is where other components are copied from when it is written.

    ``tokenizer_folder``: where the tokenizers came from, when that is another folder.
    """

    unet: Network
    vae: Network
    text_encoders: tuple[Network, ...]
    tokenizers: tuple[Any, ...]
    scheduler_config: dict[str, Any]
    model_index: dict[str, Any]
    folder: Path
    tokenizer_folder: Path | None = None

    def with_attention(self, attention: AttentionBackend) -> "Pipeline":
        """The pipeline with another implementation of the UNet's attention."""
        module: Any = self.unet.module
        return dataclasses.replace(self, unet=dataclasses.replace(self.unet, module=module.with_attention(attention)))

    @property
    def downscale(self) -> int:
        """Pixels along each side of a latent."""
        module: Any = self.vae.module
        return module.downscale

    def networks(self) -> dict[str, Network]:
        """Networks by the name of their folder."""
        encoders, _ = PIPELINES[self.model_index["_class_name"]]
        return {"unet": self.unet, "vae": self.vae, **dict(zip(encoders, self.text_encoders, strict=True))}


def network_shapes(module: nn.Module, config: Mapping[str, Any]) -> Params:
    """Shapes of a network's parameters (a tree of ShapeDtypeStructs); no parameter is allocated."""
    spec = next(n for n in NETWORKS.values() if n.attribute == type(module).__name__)
    return parameter_shapes(module, *spec.inputs(config))


def parameter_shapes(module: nn.Module, *inputs: Any) -> Params:
    """Shapes of a module's parameters, a tree of ShapeDtypeStructs; ``inputs`` are what its ``__call__`` takes."""
    return jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]


def _check_class(folder: Path, class_name: str):
    if class_name not in NETWORKS:
        raise UserError(f"{folder} is a {class_name}, which is not supported: use {', '.join(NETWORKS)}.")


def load_network(
    folder: str | Path,
    class_name: str,
    *,
    dtype: Any = jnp.float32,
    param_dtype: Any = None,
    shardings: ShardingRule | None = None,
) -> Network:
    """Build one component from its config.json and read its weights.

    Args:
      class_name: the torch class, a key of ``NETWORKS``.
      dtype: compute dtype of the module. param_dtype: of the parameters; None keeps the file's.
      shardings: called with the folder's name and the tree of shapes.

    An autoencoder that asks for it (``force_upcast``, as diffusers reads it) computes in float32 and keeps the file's
    dtype. Raises UserError for a class or a setting that is not supported and as ``load_params`` does.
    """
    network = _describe(Path(folder), class_name, dtype)
    if class_name == "AutoencoderKL" and network.module.config.force_upcast:
        network, param_dtype = _describe(Path(folder), class_name, jnp.float32), None
    placed = None if shardings is None else shardings(Path(folder).name, network.params)
    params = load_params(network.params, folder, dtype=param_dtype, shardings=placed)
    return dataclasses.replace(network, params=params)


def _describe(folder: Path, class_name: str, dtype: Any) -> Network:
    """A component by its config.json alone: its parameters are ShapeDtypeStructs."""
    _check_class(folder, class_name)
    config = read_json(folder / "config.json")
    spec = NETWORKS[class_name]
    module = getattr(importlib.import_module(spec.module), spec.attribute).from_config(config, dtype=dtype)
    return Network(module, network_shapes(module, config), config)


def read_architecture(folder: str | Path, dtype: Any = jnp.float32) -> Pipeline:
    """A pipeline by its config.json files alone: parameters are ShapeDtypeStructs, and there are no tokenizers.

    A folder without weights will do. Raises UserError as ``load_pipeline`` does.
    """
    folder = resolve_folder(folder)
    model_index = _read_model_index(folder, with_tokenizers=False)
    encoders, _ = PIPELINES[model_index["_class_name"]]
    return Pipeline(
        unet=_describe(folder / "unet", model_index["unet"][1], dtype),
        vae=_describe(folder / "vae", model_index["vae"][1], dtype),
        text_encoders=tuple(_describe(folder / part, model_index[part][1], dtype) for part in encoders),
        tokenizers=(),
        scheduler_config=read_json(folder / "scheduler" / "scheduler_config.json"),
        model_index=model_index,
        folder=folder,
    )


def conditioning_shapes(pipeline: Pipeline, n: int) -> TextConditioning:
    """Shapes of what ``conditioning.encode_prompts`` makes of n prompts with this pipeline."""
    encoders = [encoder.config for encoder in pipeline.text_encoders]
    last, index = encoders[-1], pipeline.model_index
    names, _ = PIPELINES[index["_class_name"]]
    projected = index[names[-1]][1] == "CLIPTextModelWithProjection"
    dtype = pipeline.text_encoders[-1].module.dtype
    width = sum(config["hidden_size"] for config in encoders)
    pooled = last["projection_dim"] if projected else last["hidden_size"]

    def zeros() -> TextConditioning:
        states = jnp.zeros((n, last["max_position_embeddings"], width), dtype)
        return TextConditioning(states, jnp.zeros((n, pooled), dtype), jnp.zeros((n, 6), jnp.float32))

    return jax.eval_shape(zeros)


def load_tokenizer(folder: Path, class_name: str) -> Any:
    """Read a tokenizer with transformers; raises UserError when the folder holds none."""
    loader = next((name for name in TOKENIZER_FILES if class_name.startswith(name)), "AutoTokenizer")
    # transformers makes an empty vocabulary of a folder without these files
    groups = TOKENIZER_FILES[loader]
    if not any(all((folder / f).is_file() for f in group) for group in groups):
        needed = " or ".join(" with ".join(group) for group in groups)
        raise UserError(f"{folder} holds no tokenizer: it needs {needed}.")
    try:
        return getattr(transformers, loader).from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise UserError(f"{folder} holds no readable {class_name} ({' '.join(str(e).split())[:200]}).") from None


def resolve_folder(model: str | Path) -> Path:
    """The local folder of a model: the path itself, or a download when it looks like a hub id ("owner/name").

    Of a hub repository only the full-precision safetensors of the parts that are used are downloaded.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{model} is a file: name the folder of a diffusers model, the one with model_index.json.")
    if not _HUB_ID.match(str(model)) or str(model).startswith("."):
        raise UserError(f"{model} does not exist: name the folder of a diffusers model, or a hub id like owner/name.")
    suffixes = ("json", "txt", "safetensors")
    patterns = ["model_index.json", *(f"{part}/*.{s}" for part in DOWNLOADED for s in suffixes)]
    try:
        return Path(huggingface_hub.snapshot_download(str(model), allow_patterns=patterns, ignore_patterns="*.fp16.*"))
    except (OSError, EntryNotFoundError, HFValidationError) as e:
        reason = " ".join(str(e).split())[:200]
        raise UserError(f"{model} is no folder here, and it could not be downloaded from the hub ({reason}).") from None


def _read_model_index(folder: Path, *, with_tokenizers: bool = True) -> dict[str, Any]:
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{folder} has no model_index.json: name the folder of a diffusers model.")
    model_index = read_json(folder / "model_index.json")
    class_name = model_index.get("_class_name")
    if class_name not in PIPELINES:
        raise UserError(f"{folder} is a {class_name}, which is not supported: use {', '.join(PIPELINES)}.")
    encoders, tokenizers = PIPELINES[class_name]
    for part in ("unet", "vae", *encoders, *tokenizers, "scheduler"):
        entry = model_index.get(part)
        if not isinstance(entry, list) or len(entry) != 2 or None in entry:
            raise UserError(f"{folder}/model_index.json has no {part}, which a {class_name} needs.")
        if not (folder / part).is_dir() and (with_tokenizers or part not in tokenizers):
            raise UserError(f"{folder / part} does not exist, though model_index.json names it: copy the whole model.")
    for part in ("unet", "vae", *encoders):
        _check_class(folder / part, model_index[part][1])
    return model_index


def load_pipeline(
    folder: str | Path,
    *,
    dtype: Any = jnp.float32,
    param_dtype: Any = None,
    shardings: ShardingRule | None = None,
) -> Pipeline:
    """Read a StableDiffusionXLPipeline or StableDiffusionPipeline folder, or a hub id.

    Args:
      dtype: compute dtype of all networks. param_dtype: of their parameters; None keeps the files'.
      shardings: called with a component's name and its tree of shapes; None puts everything on one device.

    Raises UserError for a wrong path, an unsupported pipeline or setting, a missing part and unfit weights.
    """
    folder = resolve_folder(folder)
    model_index = _read_model_index(folder)
    encoders, tokenizer_parts = PIPELINES[model_index["_class_name"]]
    # What is small comes first: its mistakes are answered before the weights are read.
    scheduler_config = read_json(folder / "scheduler" / "scheduler_config.json")
    tokenizers = tuple(load_tokenizer(folder / part, model_index[part][1]) for part in tokenizer_parts)
    networks = {
        part: load_network(
            folder / part, model_index[part][1], dtype=dtype, param_dtype=param_dtype, shardings=shardings
        )
        for part in ("unet", "vae", *encoders)
    }
    return Pipeline(
        unet=networks["unet"],
        vae=networks["vae"],
        text_encoders=tuple(networks[part] for part in encoders),
        tokenizers=tokenizers,
        scheduler_config=scheduler_config,
        model_index=model_index,
        folder=folder,
    )


def save_pipeline(
    pipeline: Pipeline, folder: str | Path, *, dtype: Any = None, scheduler_config: Mapping[str, Any] | None = None
):
    """Write a folder that stock diffusers loads; of several processes the first writes, all must call.

    Tokenizers and components that are not networks here (a safety checker, say) are copied from ``pipeline.folder``;
    an optional one that is not there is written as absent. model_index.json comes last: without it, nothing loads.

    Args:
      dtype: of the written tensors; None keeps the parameters'.
      scheduler_config: replaces the pipeline's own; its ``_class_name`` is the scheduler that diffusers will use.

    Raises UserError when ``folder`` is the one that the pipeline was read from, or holds a file of its name.
    """
    folder = Path(folder)
    if folder.resolve() == pipeline.folder.resolve():
        raise UserError(f"{folder} is the folder that the model was read from: choose another to write to.")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: name a folder to write to.")
    scheduler_config = dict(scheduler_config or pipeline.scheduler_config)
    model_index = json.loads(json.dumps(pipeline.model_index))
    model_index["scheduler"] = ["diffusers", scheduler_config["_class_name"]]
    networks = pipeline.networks()
    _, tokenizers = PIPELINES[model_index["_class_name"]]
    for part, network in networks.items():
        file_name = WEIGHT_FILES[model_index[part][0]]
        save_params(network.params, network.config, folder / part, file_name=file_name, dtype=dtype)
    if jax.process_index() != 0:
        return
    for part, entry in model_index.items():
        if isinstance(entry, list) and part not in networks and part != "scheduler" and None not in entry:
            source = (pipeline.tokenizer_folder or pipeline.folder) if part in tokenizers else pipeline.folder
            if (source / part).is_dir():
                shutil.copytree(source / part, folder / part, dirs_exist_ok=True)
            else:
                model_index[part] = [None, None]
    write_json(scheduler_config, folder / "scheduler" / "scheduler_config.json")
    write_json(model_index, folder / "model_index.json")
