"""A whole diffusers folder in and out: networks, tokenizers, scheduler_config.json and model_index.json."""

import dataclasses
import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from mlcm_jax.diffusion.scheduler_config import as_pipelines_set, of_class
from mlcm_jax.errors import UserError
from mlcm_jax.hub.fetch import SCHEDULER_NAME, Source, find_model
from mlcm_jax.hub.fetch import resolve_folder as resolve_folder
from mlcm_jax.hub.fit import check_fit
from mlcm_jax.hub.model_index import (
    PIPELINES,
    corrected_unet_config,
    network_parts,
    read_model_index,
    read_scheduler_config,
)
from mlcm_jax.hub.network import NETWORKS, Network, ShardingRule, Weights, build_module, describe_network, load_network
from mlcm_jax.hub.network import network_shapes as network_shapes
from mlcm_jax.hub.network import parameter_shapes as parameter_shapes
from mlcm_jax.hub.save import copy_folder, save_params, write_json
from mlcm_jax.hub.single_file import LAYOUTS, open_single_file
from mlcm_jax.hub.tensor_reader import find_weights, has_variant
from mlcm_jax.hub.tokenizer import load_tokenizer
from mlcm_jax.image_size import ImageSize, named
from mlcm_jax.models.attention_backend import AttentionBackend
from mlcm_jax.models.chinese_clip import AdaptedTextModel
from mlcm_jax.outputs import is_remote
from mlcm_jax.types import TextConditioning

ADAPTED = "adapted_text_encoder"
WEIGHT_FILES = {"diffusers": "diffusion_pytorch_model.safetensors", "transformers": "model.safetensors"}


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
    source: Source | None = None  # what the networks were read from

    def with_attention(self, attention: AttentionBackend) -> "Pipeline":
        """The pipeline with another implementation of the UNet's attention."""
        module: Any = self.unet.module
        return dataclasses.replace(self, unet=dataclasses.replace(self.unet, module=module.with_attention(attention)))

    def with_scheduler(self, scheduler_config: dict[str, Any]) -> "Pipeline":
        """The pipeline with another sampler, whose settings are as diffusers' pipeline would set them."""
        settings = as_pipelines_set(scheduler_config, self.model_index["_class_name"])
        return dataclasses.replace(self, scheduler_config=settings)

    def with_scheduler_class(self, name: str) -> "Pipeline":
        """The pipeline with another diffusers scheduler, which takes over the settings of its own one."""
        return self.with_scheduler(of_class(self.scheduler_config, name))

    @property
    def downscale(self) -> int:
        """Pixels along each side of a latent."""
        module: Any = self.vae.module
        return module.downscale

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the latents that the UNet was trained on; raises UserError where its config.json has no
        sample_size."""
        size = self.unet.config.get("sample_size")
        if size is None:
            raise UserError(
                f"{self.folder}/unet/config.json has no sample_size, so the size of the images is not known: name it "
                "with --image_size (config.image_size), or height and width."
            )
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    @property
    def image_size(self) -> ImageSize:
        """Height and width in pixels of the images that the UNet was trained on."""
        height, width = self.latent_size
        return height * self.downscale, width * self.downscale

    @property
    def size_multiple(self) -> int:
        """What divides height and width in pixels of all images that the networks can take."""
        return self.downscale * 2 ** (len(self.unet.config["block_out_channels"]) - 1)

    def latent_shape(self, image_size: ImageSize | None = None) -> tuple[int, int, int]:
        """Height, width and channels of the latents of images; None: of those that the UNet was trained on.

        Raises UserError for a size that the networks cannot take.
        """
        height, width = image_size or self.image_size
        multiple = self.size_multiple
        if min(height, width) < multiple or height % multiple or width % multiple:
            raise UserError(
                f"{named((height, width))} does not fit this model: use a multiple of {multiple}, {multiple} or more."
            )
        return height // self.downscale, width // self.downscale, self.unet.config.get("in_channels", 4)

    def networks(self) -> dict[str, Network]:
        """Networks by the name of their folder; an adapted text encoder, which has none of its own, by ``ADAPTED``."""
        own = {"unet": self.unet, "vae": self.vae}
        if isinstance(self.text_encoders[0].module, AdaptedTextModel):
            return own | {ADAPTED: self.text_encoders[0]}
        return own | dict(zip(PIPELINES[self.model_index["_class_name"]][0], self.text_encoders, strict=True))

    def diffusers_networks(self) -> dict[str, Network]:
        """``networks`` where diffusers has a place for all of them; raises UserError where it has none."""
        networks = self.networks()
        if ADAPTED in networks:
            raise UserError(
                "A model with a text adapter cannot be written, since diffusers has no place for it: write the model "
                "without --text, and give --text=DIR wherever it is used."
            )
        return networks


def read_architecture(
    model: str | Path,
    dtype: Any = jnp.float32,
    *,
    architecture: str | Path | None = None,
    variant: str | None = None,
    revision: str | None = None,
) -> Pipeline:
    """A pipeline by its config.json files alone: parameters are ShapeDtypeStructs, and there are no tokenizers.

    A folder without weights will do. Arguments and errors are ``load_pipeline``'s.
    """
    source = find_model(model, architecture=architecture, variant=variant, revision=revision)
    folder = source.folder
    model_index = read_model_index(folder, with_tokenizers=False)
    check_networks(folder, model_index, dtype)
    networks = {
        part: describe_network(folder / part, model_index[part][1], dtype) for part in network_parts(model_index)
    }
    return _joined(networks, model_index, folder, read_scheduler_config(source, model_index))


def check_networks(folder: Path, model_index: dict[str, Any], dtype: Any) -> None:
    """Raise UserError for settings of the networks that are not supported, or do not fit each other."""
    built = {part: build_module(folder / part, model_index[part][1], dtype) for part in network_parts(model_index)}
    modules = {part: module for part, (module, _) in built.items()}
    check_fit(folder, model_index["_class_name"], modules, built["unet"][1])


def _joined(
    networks: Mapping[str, Network], model_index: dict[str, Any], folder: Path, scheduler_config: dict[str, Any]
) -> Pipeline:
    """Networks as a pipeline without tokenizers."""
    class_name, unet = model_index["_class_name"], networks["unet"]
    encoders, _ = PIPELINES[class_name]
    return Pipeline(
        unet=dataclasses.replace(unet, config=corrected_unet_config(unet.config, class_name)),
        vae=networks["vae"],
        text_encoders=tuple(networks[part] for part in encoders),
        tokenizers=(),
        scheduler_config=scheduler_config,
        model_index=model_index,
        folder=folder,
    )


def conditioning_shapes(pipeline: Pipeline, n: int) -> TextConditioning:
    """Shapes of what ``conditioning.encode_prompts`` makes of n prompts with this pipeline."""
    encoders: list[Any] = [encoder.module for encoder in pipeline.text_encoders]
    last, width = encoders[-1], sum(encoder.states_dim for encoder in encoders)

    def zeros() -> TextConditioning:
        states, pooled = jnp.zeros((n, last.num_tokens, width), last.dtype), jnp.zeros((n, last.pooled_dim), last.dtype)
        return TextConditioning(states, pooled, jnp.zeros((n, 6), jnp.float32))

    return jax.eval_shape(zeros)


def load_pipeline(
    model: str | Path,
    *,
    architecture: str | Path | None = None,
    variant: str | None = None,
    revision: str | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = None,
    shardings: ShardingRule | None = None,
    parts: Collection[str] | None = None,
) -> Pipeline:
    """Read a StableDiffusionXLPipeline or StableDiffusionPipeline: a folder, a hub id or a single .safetensors file.

    Args:
      architecture, variant, revision: as ``hub.fetch.find_model`` takes them.
      dtype: compute dtype of all networks. param_dtype: of their parameters; None keeps the files'.
      shardings: called with a component's name and its tree of shapes; None puts everything on one device.
      parts: folders of the networks whose weights are read; the others' parameters are ShapeDtypeStructs. None: all.

    Raises UserError for a wrong path, an unsupported pipeline or setting, a missing part and unfit weights.
    """
    source = find_model(model, architecture=architecture, variant=variant, revision=revision)
    folder = source.folder
    model_index = read_model_index(folder, with_tokenizers=source.checkpoint is None)
    _, tokenizer_parts = PIPELINES[model_index["_class_name"]]
    if not all((folder / part).is_dir() for part in tokenizer_parts):
        raise UserError(
            f"{source.checkpoint} is a single file, which holds no tokenizers, and neither does {folder}: name a "
            "diffusers folder or hub id that has them, --architecture=DIR; its weights are not needed."
        )
    if source.variant and not any(has_variant(folder / part, source.variant) for part in network_parts(model_index)):
        find_weights(folder / "unet", source.variant)  # which says what there is
    # What is small comes first: its mistakes are answered before the weights are read.
    scheduler_config = read_scheduler_config(source, model_index)
    check_networks(folder, model_index, dtype)
    tokenizers = tuple(load_tokenizer(folder / part, model_index[part][1]) for part in tokenizer_parts)
    networks = {
        part: load_part(source, part, model_index, dtype=dtype, param_dtype=param_dtype, shardings=shardings)
        if parts is None or part in parts
        else describe_network(folder / part, model_index[part][1], dtype)
        for part in network_parts(model_index)
    }
    pipeline = _joined(networks, model_index, folder, scheduler_config)
    return dataclasses.replace(pipeline, tokenizers=tokenizers, source=source)


def load_part(source: Source, part: str, model_index: Mapping[str, Any], **settings: Any) -> Network:
    """One network of a pipeline, by its folder's name; ``settings`` and errors are ``load_network``'s.

    As in diffusers, a part without weights of the variant that was asked for is read in full precision.
    """
    folder = source.folder / part
    if source.checkpoint is None:
        of_variant = source.variant if source.variant and has_variant(folder, source.variant) else None
        weights = Weights(find_weights(folder, of_variant, NETWORKS[model_index[part][1]].library))
    else:
        weights = Weights(open_single_file(source.checkpoint), LAYOUTS[model_index["_class_name"]][part])
    return load_network(folder, model_index[part][1], weights=weights, **settings)


def save_pipeline(
    pipeline: Pipeline,
    folder: epath.PathLike,
    *,
    dtype: Any = None,
    scheduler_config: Mapping[str, Any] | None = None,
):
    """Write a folder that stock diffusers loads, also at gs://; of several processes the first writes, all must call.

    Tokenizers and components that are not networks here (a safety checker, say) are copied from ``pipeline.folder``;
    an optional one that is not there is written as absent. model_index.json comes last: without it, nothing loads.

    Args:
      dtype: of the written tensors; None keeps the parameters'.
      scheduler_config: replaces the pipeline's own; its ``_class_name`` is the scheduler that diffusers will use.

    Raises UserError when ``folder`` is the one that the pipeline was read from, or holds a file of its name.
    """
    folder = epath.Path(folder)
    if not is_remote(folder) and Path(folder).resolve() == pipeline.folder.resolve():
        raise UserError(f"{folder} is the folder that the model was read from: choose another to write to.")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: name a folder to write to.")
    scheduler_config = dict(scheduler_config or pipeline.scheduler_config)
    model_index = json.loads(json.dumps(pipeline.model_index))
    model_index["scheduler"] = ["diffusers", scheduler_config["_class_name"]]
    networks = pipeline.diffusers_networks()
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
                copy_folder(source / part, folder / part)
            else:
                model_index[part] = [None, None]
    # JSON has no infinity: a bound that is none is left out, as absent means the same
    written = {k: v for k, v in scheduler_config.items() if v != -math.inf}
    write_json(written, folder / "scheduler" / SCHEDULER_NAME)
    write_json(model_index, folder / "model_index.json")
