"""Where a model's files are: in a folder, in a single file with settings elsewhere, or to download from the hub."""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError, HFValidationError

from mlcm_jax.errors import UserError, shortened
from mlcm_jax.hub.lora_names import ADAPTER_CONFIG, FILE_NAMES
from mlcm_jax.hub.single_file import class_of_checkpoint
from mlcm_jax.hub.tensor_reader import BASE_NAMES, has_variant, refuse_pickle

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
WEIGHTS_NAMES: dict[str, str] = {  # of each part of a folder, by the library that wrote it
    "unet": BASE_NAMES["diffusers"],
    "vae": BASE_NAMES["diffusers"],
    "text_encoder": BASE_NAMES["transformers"],
    "text_encoder_2": BASE_NAMES["transformers"],
}
SCHEDULER_NAME = "scheduler_config.json"  # diffusers' own name
SHARD = "-?????-of-?????"
# the settings that a single file does not hold, by its pipeline's class; tokenizers are not among them
ARCHITECTURES = {"StableDiffusionXLPipeline": "sdxl", "StableDiffusionPipeline": "sd15"}
ARCHITECTURE_FOLDER = Path(__file__).parents[2] / "configs" / "architectures"
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
_HUB_FILE = re.compile(r"^([\w.-]+/[\w.-]+)/(.+\.safetensors)$")


@dataclasses.dataclass(frozen=True)
class Source:
    """folder: model_index.json, config.json files, tokenizers and, without ``checkpoint``, the weights.

    checkpoint: a single file that holds all weights. variant: of the folder's weights files; None: full precision, or
    fp16 where that is all there is.
    """

    folder: Path
    checkpoint: Path | None = None
    variant: str | None = None

    @property
    def scheduler_config(self) -> Path:
        """The sampler's settings: those beside a single file, as a student is exported, or else the folder's."""
        beside = self.checkpoint.with_name(SCHEDULER_NAME) if self.checkpoint else None
        return beside if beside and beside.is_file() else self.folder / "scheduler" / SCHEDULER_NAME


def find_model(
    model: str | Path,
    *,
    architecture: str | Path | None = None,
    variant: str | None = None,
    revision: str | None = None,
) -> Source:
    """The files of a model that is a diffusers folder, a hub id ("owner/name") or a single .safetensors file, which may
    be on the hub as well ("owner/name/FILE.safetensors").

    Args:
      architecture: with a single file, the diffusers folder or hub id that its settings and tokenizers come from; None:
        configs/architectures, which has no tokenizers.
      variant, revision: as diffusers' ``from_pretrained`` takes them.

    Of a hub repository only the safetensors of the variant and the settings are downloaded. Raises UserError for a path
    that is none of these.
    """
    path = resolve_file(model, revision)
    if path.is_file() and path.suffix == ".safetensors":
        if variant:
            raise UserError(
                f"{model} is a single file, which has no variants: leave out the variant {variant} (--variant)."
            )
        own = ARCHITECTURE_FOLDER / ARCHITECTURES[class_of_checkpoint(path)]
        settings_revision = revision if Path(model).exists() else None  # otherwise it was the file's
        return Source(resolve_folder(architecture or own, revision=settings_revision, weights=False), path)
    return Source(resolve_folder(model, variant=variant, revision=revision), None, variant)


def resolve_folder(
    model: str | Path, *, variant: str | None = None, revision: str | None = None, weights: bool = True
) -> Path:
    """The local folder of a model: the path itself, or a download when it looks like a hub id ("owner/name").

    weights: False downloads settings and tokenizers only.
    """
    folder = Path(model)
    if folder.is_dir():
        if revision:
            raise UserError(
                f"{model} is a folder here, which has no revisions: leave out the revision {revision} (--revision)."
            )
        return folder
    if folder.exists():
        refuse_pickle(folder)
        raise UserError(
            f"{model} is a file: name the folder of a diffusers model, the one with model_index.json, or a single "
            ".safetensors file."
        )
    if not _HUB_ID.match(str(model)) or str(model).startswith("."):
        raise UserError(f"{model} does not exist: name the folder of a diffusers model, or a hub id like owner/name.")
    folder = download(str(model), snapshot_patterns(variant, weights), revision)
    if variant and weights:  # a part that has none of the variant is read in full precision
        parts = [part for part in WEIGHTS_NAMES if (folder / part).is_dir()]
        others = [part for part in parts if not has_variant(folder / part, variant)]
        if 0 < len(others) < len(parts):
            download(str(model), weights_patterns(None, others), revision)
    return folder


def resolve_file(place: str | Path, revision: str | None = None) -> Path:
    """The path itself; where nothing is there and it reads like a file of the hub ("owner/name/FILE.safetensors"), that
    file, downloaded. Raises UserError where the repository does not have it."""
    on_hub = _hub_file(place)
    if on_hub is None:
        return Path(place)
    repository, name = on_hub
    file = download(repository, [name], revision) / name
    if not file.is_file():
        raise UserError(f"{repository} has no file {name} on the hub, and {place} is none here.")
    return file


def _hub_file(place: str | Path) -> tuple[str, str] | None:
    """Repository and file of a place that is nothing here and reads like a file of the hub."""
    match = _HUB_FILE.match(str(place))
    if match is None or str(place).startswith(".") or Path(place).exists():
        return None
    return match[1], match[2]


def resolve_lora(place: str | Path) -> Path:
    """The file or folder of a LoRA: a path, a file of the hub, or a hub id whose repository has a LoRA of usual name.

    The settings beside it are downloaded, too: all of a hub id, PEFT's of a file.
    """
    on_hub = _hub_file(place)
    if on_hub is not None:
        download(on_hub[0], [str(PurePosixPath(on_hub[1]).with_name(ADAPTER_CONFIG))])
    path = resolve_file(place)
    if path.exists() or path.suffix == ".safetensors" or not _HUB_ID.match(str(place)) or str(place).startswith("."):
        return path
    folder = download(str(place), [*FILE_NAMES, "*.json"])
    if not any((folder / name).is_file() for name in FILE_NAMES):
        raise UserError(
            f"{place} has no {' or '.join(FILE_NAMES)} on the hub: name the LoRA's file, {place}/FILE.safetensors."
        )
    return folder


def snapshot_patterns(variant: str | None, weights: bool = True) -> list[str]:
    """What to download of a diffusers repository: settings and tokenizers, and the safetensors of one variant."""
    settings = ["model_index.json", *(f"{part}/*.{suffix}" for part in PARTS for suffix in ("json", "txt"))]
    return settings + weights_patterns(variant, WEIGHTS_NAMES) if weights else settings


def weights_patterns(variant: str | None, parts: Iterable[str]) -> list[str]:
    """The safetensors of one variant in the folders of ``parts``."""
    dot = f".{variant}" if variant else ""
    forms = (f"{dot}.safetensors", f"{dot}{SHARD}.safetensors", f"{SHARD}{dot}.safetensors")
    return [f"{part}/{WEIGHTS_NAMES[part]}{form}" for part in parts for form in dict.fromkeys(forms)]


def download(repository: str, patterns: Sequence[str], revision: str | None = None) -> Path:
    """Files of a hub repository in huggingface_hub's cache, with its own ways for tokens and for being offline.

    Raises UserError where that fails.
    """
    try:
        folder = huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=list(patterns))
    except (OSError, EntryNotFoundError, HFValidationError) as e:
        reason = shortened(e, 150)
        raise UserError(
            f"{repository} is no folder here, and it could not be downloaded from the hub ({reason})."
        ) from None
    return Path(folder)
