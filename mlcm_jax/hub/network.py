"""One network of a diffusers folder: the module that its config.json describes, and its weights."""

import dataclasses
import functools
import importlib
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mlcm_jax.errors import UserError, listed, shortened
from mlcm_jax.hub.layout import Layout
from mlcm_jax.hub.load import load_params
from mlcm_jax.hub.single_file import IGNORED
from mlcm_jax.hub.tensor_reader import TensorReader, find_weights, read_json
from mlcm_jax.types import Params, TextConditioning

# (component name, tree of ShapeDtypeStructs) -> one sharding or a tree of them, as load_params takes it
ShardingRule = Callable[[str, Params], Any]


def _input(*shape: int, dtype: Any = jnp.float32) -> Any:
    """In place of an array: nothing here starts a backend."""
    return jax.ShapeDtypeStruct(shape, dtype)


def _image(size: int) -> Any:
    return _input(1, size, size, 3)


def _unet_inputs(config: Mapping[str, Any]) -> tuple:
    side = 2 ** len(config.get("block_out_channels", (320, 640, 1280, 1280)))
    width = config.get("cross_attention_dim", 1280)
    pooled = 1
    if config.get("addition_embed_type") == "text_time":
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    conditioning = TextConditioning(
        hidden_states=_input(1, 2, width if isinstance(width, int) else width[0]),
        pooled=_input(1, pooled),
        time_ids=_input(1, 6),
    )
    sample = _input(1, side, side, config.get("in_channels", 4))
    inputs = (sample, _input(1, dtype=jnp.int32), conditioning)
    guidance_width = config.get("time_cond_proj_dim")
    return inputs if guidance_width is None else (*inputs, _input(1, guidance_width))


def _controlnet_inputs(config: Mapping[str, Any]) -> tuple:
    sample, timesteps, conditioning, *_ = _unet_inputs(config)
    levels = len(config.get("conditioning_embedding_out_channels", (16, 32, 96, 256)))
    side = sample.shape[1] * 2 ** (levels - 1)
    return sample, timesteps, conditioning, _image(side)


def _t2i_adapter_inputs(config: Mapping[str, Any]) -> tuple:
    side = 8 * config.get("downscale_factor", 8)
    return (_input(1, side, side, config.get("in_channels", 3)),)


def _text_inputs(config: Mapping[str, Any]) -> tuple:
    return (_input(1, min(2, config.get("max_position_embeddings", 77)), dtype=jnp.int32),)


def _vision_inputs(config: Mapping[str, Any]) -> tuple:
    return (_image(config.get("image_size", 224)),)


def _clip_inputs(config: Mapping[str, Any]) -> tuple:
    text, vision = (config.get(f"{part}_dict") or config[part] for part in ("text_config", "vision_config"))
    return *_text_inputs(text), *_vision_inputs(vision)


def _vae_inputs(config: Mapping[str, Any]) -> tuple:
    return (_image(2 ** len(config.get("block_out_channels", (64,)))),)


def _tiny_vae_inputs(config: Mapping[str, Any]) -> tuple:
    return (_image(2 ** len(config.get("num_encoder_blocks", (1, 3, 3, 3)))),)


def _adapter_inputs(config: Mapping[str, Any]) -> tuple:
    return (_input(1, 2, config.get("input_dim", 1024)),)


def _lpips_inputs(config: Mapping[str, Any]) -> tuple:
    return (_input(1, 2, 2, config.get("latent_channels", 4)),) * 2


class NetworkClass(NamedTuple):
    """Where the Flax module of a torch class is, and the smallest inputs that its ``init`` takes.

    library: "diffusers" or "transformers", as whose files those of this class are looked for.
    """

    module: str
    attribute: str
    inputs: Callable[[Mapping[str, Any]], tuple]
    library: str = "diffusers"


_CHINESE = "mlcm_jax.models.chinese_clip"
_TEXT = NetworkClass("mlcm_jax.models.clip", "CLIPTextModel", _text_inputs, "transformers")
NETWORKS = {
    "UNet2DConditionModel": NetworkClass("mlcm_jax.models.unet", "UNet2DConditionModel", _unet_inputs),
    "ControlNetModel": NetworkClass("mlcm_jax.models.controlnet", "ControlNetModel", _controlnet_inputs),
    "T2IAdapter": NetworkClass("mlcm_jax.models.t2i_adapter", "T2IAdapter", _t2i_adapter_inputs),
    "AutoencoderKL": NetworkClass("mlcm_jax.models.vae", "AutoencoderKL", _vae_inputs),
    "AutoencoderTiny": NetworkClass("mlcm_jax.models.tiny_vae", "AutoencoderTiny", _tiny_vae_inputs),
    "CLIPTextModel": _TEXT,
    "CLIPTextModelWithProjection": _TEXT,
    "CLIPVisionModelWithProjection": _TEXT._replace(attribute="CLIPVisionModel", inputs=_vision_inputs),
    "CLIPModel": _TEXT._replace(attribute="CLIPModel", inputs=_clip_inputs),
    "ChineseCLIPTextModel": NetworkClass(_CHINESE, "ChineseCLIPTextModel", _text_inputs, "transformers"),
    "TextAdapter": NetworkClass(_CHINESE, "TextAdapter", _adapter_inputs),
    "LatentLPIPS": NetworkClass("mlcm_jax.models.latent_lpips", "LatentLPIPS", _lpips_inputs),
}


# What whole CLIP models have beside a text tower, and transformers leaves out where it reads that alone.
_OF_CLIP = (re.compile(r"^visual_projection\."), re.compile(r"^vision_model\."), re.compile(r"^logit_scale$"))
_POOLER = re.compile(r"^(text_model\.)?pooler\.")  # of the first token; the adapter takes the states of all
UNUSED = {
    "ChineseCLIPTextModel": (*_OF_CLIP, re.compile(r"^text_projection\."), _POOLER),
    "CLIPTextModel": (*_OF_CLIP, re.compile(r"^text_projection\.")),
    "CLIPTextModelWithProjection": _OF_CLIP,
}


class Weights(NamedTuple):
    """A file, the index of its shards or its tensors, and how it keeps them (None: as diffusers does)."""

    place: Path | TensorReader
    layout: Layout | None = None


@dataclasses.dataclass(frozen=True)
class Network:
    """A module, its parameters and the config.json that both were made from."""

    module: nn.Module
    params: Params
    config: dict[str, Any]


def network_shapes(module: nn.Module, config: Mapping[str, Any]) -> Params:
    """Shapes of a network's parameters (a tree of ShapeDtypeStructs); no parameter is allocated."""
    spec = next(n for n in NETWORKS.values() if n.attribute == type(module).__name__)
    return parameter_shapes(module, *spec.inputs(config))


def parameter_shapes(module: nn.Module, *inputs: Any) -> Params:
    """Shapes of a module's parameters, a tree of ShapeDtypeStructs; ``inputs`` are what its ``__call__`` takes."""
    leaves, structure = jax.tree.flatten(inputs)
    shapes = _traced_shapes(module, structure, tuple((jnp.shape(a), jnp.result_type(a)) for a in leaves))
    return jax.tree.map(lambda a: a, shapes)  # the dicts are the caller's


@functools.lru_cache(maxsize=32)
def _traced_shapes(module: nn.Module, structure: Any, leaves: tuple) -> Params:
    """A run asks for those of its teacher three times: to plan, to load and to export; tracing one takes seconds."""
    inputs = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(*leaf) for leaf in leaves])
    return jax.eval_shape(lambda *given: module.init(jax.random.key(0), *given), *inputs)["params"]


def check_class(folder: Path, class_name: str, supported: Collection[str] = tuple(NETWORKS)):
    if class_name not in supported:
        raise UserError(f"{folder} is a {shortened(class_name, 60)}, which is not supported: use {listed(supported)}.")


def load_network(
    folder: str | Path,
    class_name: str,
    *,
    dtype: Any = jnp.float32,
    param_dtype: Any = None,
    shardings: ShardingRule | None = None,
    weights: Weights | None = None,
) -> Network:
    """Build one component from its config.json and read its weights.

    Args:
      class_name: the torch class, a key of ``NETWORKS``, whatever the config.json says.
      weights: where they are; None: full precision, or else fp16, in the folder.
      dtype: compute dtype of the module. param_dtype: of the parameters; None keeps the file's.
      shardings: called with the folder's name and the tree of shapes.

    An autoencoder that asks for it (``force_upcast``, as diffusers reads it) computes in float32 and keeps the file's
    dtype. Raises UserError for a class or a setting that is not supported and as ``load_params`` does.
    """
    network = describe_network(Path(folder), class_name, dtype)
    if class_name == "AutoencoderKL" and network.module.config.force_upcast:
        network, param_dtype = describe_network(Path(folder), class_name, jnp.float32), None
    placed = None if shardings is None else shardings(Path(folder).name, network.params)
    source, layout = weights or Weights(find_weights(Path(folder), library=NETWORKS[class_name].library))
    ignored = IGNORED if layout else UNUSED.get(class_name, ())
    params = load_params(network.params, source, dtype=param_dtype, shardings=placed, ignored=ignored, layout=layout)
    return dataclasses.replace(network, params=params)


def describe_network(folder: Path, class_name: str, dtype: Any) -> Network:
    """A component by its config.json alone: its parameters are ShapeDtypeStructs."""
    module, config = build_module(folder, class_name, dtype)
    return Network(module, network_shapes(module, config), config)


def build_module(folder: Path, class_name: str, dtype: Any) -> tuple[nn.Module, dict[str, Any]]:
    """The module that a component's config.json describes, and the config.json."""
    check_class(folder, class_name)
    config = read_json(folder / "config.json")
    spec = NETWORKS[class_name]
    module_class = getattr(importlib.import_module(spec.module), spec.attribute)
    # transformers builds the class that it is asked for; ours looks there whether it has a projection
    named = {"architectures": [class_name]} if spec.library == "transformers" else {}
    return module_class.from_config(config | named, dtype=dtype), config
