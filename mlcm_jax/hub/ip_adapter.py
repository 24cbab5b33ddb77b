"""IP-Adapters in the layout of their authors' .safetensors files, for a pipeline that they fit."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from mlcm_jax.errors import UserError, listed
from mlcm_jax.hub import names
from mlcm_jax.hub.fit import check_made_for
from mlcm_jax.hub.layout import RenamedReader
from mlcm_jax.hub.load import load_params
from mlcm_jax.hub.network import Network, build_module, load_network, parameter_shapes
from mlcm_jax.hub.pipeline import Pipeline
from mlcm_jax.hub.preprocess import Preprocessor, clip_preprocessor
from mlcm_jax.hub.tensor_reader import PICKLES, TensorReader, refuse_pickle
from mlcm_jax.models.ip_adapter import NUM_TOKENS, ImageProjection
from mlcm_jax.types import Params

ENCODER_CLASS, ENCODER_FOLDER = "CLIPVisionModelWithProjection", "image_encoder"
PROJECTION, PROJECTION_WEIGHT = "image_proj", "image_proj.proj.weight"
PARTS = ("down_blocks", "up_blocks", "mid_block")  # in the order of diffusers' attention processors


class IPAdapter(NamedTuple):
    """attention: projections to keys and values of images, where they are in the UNet's parameters."""

    projection: ImageProjection
    params: Params
    attention: Params
    encoder: Network
    preprocessor: Preprocessor


def load_ip_adapter(
    place: str | Path, pipeline: Pipeline, *, image_encoder: str | Path | None = None, dtype: Any = jnp.float32
) -> IPAdapter:
    """The IP-Adapter in a file, or in a folder that holds one, for the pipeline's UNet. dtype: compute dtype.

    image_encoder: folder of its CLIPVisionModelWithProjection; None: ``image_encoder`` beside the file.
    Raises UserError for a pickle, another kind of IP-Adapter, and one that was made for another UNet or encoder.
    """
    file = _find(Path(place))
    reader = TensorReader(file)
    _check_kind(reader)
    _check_unet(reader, pipeline)
    embedding, folder = _side(reader, PROJECTION_WEIGHT, 1), Path(image_encoder or file.parent / ENCODER_FOLDER)
    side = _check_encoder(folder, file, embedding)
    projection = ImageProjection(_context_width(pipeline), dtype)
    shapes = {PROJECTION: parameter_shapes(projection, jnp.zeros((1, embedding)))} | _attention(pipeline.unet.params)
    ours = _names(pipeline.unet.params)
    params = load_params(shapes, RenamedReader(reader, lambda name: ours.get(name, name)))
    projected = params.pop(PROJECTION)
    encoder = load_network(folder, ENCODER_CLASS, dtype=dtype)
    return IPAdapter(projection, projected, params, encoder, _preprocessor(pipeline, side))


def _find(place: Path) -> Path:
    """The file that ``place`` is, or the only one in it."""
    refuse_pickle(place)
    if not place.is_dir():
        return place
    files = sorted(place.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    for pickle in (file for pattern in PICKLES for file in place.glob(pattern) if not files):
        refuse_pickle(pickle)
    held = listed(file.name for file in files) or "no .safetensors file"
    raise UserError(f"{place} holds {held}: name one .safetensors file of an IP-Adapter.")


def _check_kind(reader: TensorReader) -> None:
    found = reader.names()
    if PROJECTION_WEIGHT in found:
        return
    if any(name.startswith(f"{PROJECTION}.") for name in found):
        raise UserError(
            f"{reader.source} is an IP-Adapter of another kind (Plus, Full Face or FaceID), which is not supported: "
            "use ip-adapter_sdxl, ip-adapter_sd15 or another that makes 4 tokens of one embedding."
        )
    raise UserError(f"{reader.source} is no IP-Adapter: it has no tensor {PROJECTION_WEIGHT}.")


def _context_width(pipeline: Pipeline) -> int:
    return pipeline.unet.config.get("cross_attention_dim", 1280)


def _check_unet(reader: TensorReader, pipeline: Pipeline) -> None:
    """What the file's shapes say about its UNet, compared before anything is read."""
    of_file = [name for name in reader.names() if name.endswith(("to_k_ip.weight", "to_v_ip.weight"))]
    ours = [leaf.shape[-1] for _, leaf, layers in names.walk(_attention(pipeline.unet.params)) for _ in layers]
    expected = {
        "cross_attention_dim": _context_width(pipeline),
        "projections of images": len(ours),
        "their widths": sorted(set(ours)),
    }
    widths = sorted({_side(reader, name, 0) for name in of_file})
    found = _side(reader, PROJECTION_WEIGHT, 0) // NUM_TOKENS, len(of_file), widths
    check_made_for(Path(reader.source), expected, dict(zip(expected, found, strict=True)), "an IP-Adapter")


def _check_encoder(folder: Path, file: Path, embedding: int) -> int:
    """The side of the images that the encoder in ``folder`` takes, in pixels, if it makes such embeddings."""
    if not folder.is_dir():
        raise UserError(f"There is no image encoder at {folder}: name its folder with --ip_adapter_image_encoder.")
    module: Any
    module, _ = build_module(folder, ENCODER_CLASS, jnp.float32)
    if embedding != module.config.projection_dim:
        raise UserError(
            f"{file} takes embeddings of {embedding} numbers, and {folder} makes {module.config.projection_dim}: name "
            "the image encoder that belongs to it with --ip_adapter_image_encoder."
        )
    return module.config.image_size


def _side(reader: TensorReader, name: str, axis: int) -> int:
    """Of a matrix; 0 for what is none."""
    shape = reader.shape(name)
    return shape[axis] if len(shape) == 2 else 0


def _attention(unet_params: Params) -> Params:
    """Shapes of the projections of images: those of the prompt's states, beside them."""
    flat: dict[names.Path, Any] = traverse_util.flatten_dict(unet_params)
    found = {path: leaf for path, leaf in flat.items() if path[-3:-1] in (("attn2", "to_k"), ("attn2", "to_v"))}
    shapes = {
        (*path[:-2], f"{path[-2]}_ip", path[-1]): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for path, leaf in found.items()
    }
    return traverse_util.unflatten_dict(shapes)


def _names(unet_params: Params) -> dict[str, str]:
    """From a file's names of these projections, which are numbered in the order of diffusers' attention processors (the
    prompt's have the odd numbers), to those of their places in the UNet."""

    def place(name: str) -> tuple[int, list[int]]:
        part, *rest = name.split(".")
        return PARTS.index(part), [int(word) for word in rest if word.isdigit()]

    groups = (group for _, _, group in names.walk(_attention(unet_params)))
    ours = [name.rsplit(".", 2) for group in groups for name in group]
    modules = sorted({module for module, _, _ in ours}, key=place)
    number = {module: 2 * i + 1 for i, module in enumerate(modules)}
    return {f"ip_adapter.{number[module]}.{to}.{leaf}": f"{module}.{to}.{leaf}" for module, to, leaf in ours}


def _preprocessor(pipeline: Pipeline, side: int) -> Preprocessor:
    """As diffusers' pipeline has it: its own, or else one that is made for the encoder.

    Raises UserError for one whose images do not come out at ``side``, the encoder's size.
    """
    own = pipeline.folder / "feature_extractor"
    named = pipeline.model_index.get("feature_extractor") or [None]
    if not named[0] or not own.is_dir():
        return clip_preprocessor(side)
    preprocessor = Preprocessor.from_folder(own)
    preprocessor.for_tower(np.zeros((1, 2 * side, 3 * side, 3), np.uint8), side)
    return preprocessor
