"""The flags that name a program's model."""

from collections.abc import Collection, Sequence
from pathlib import Path

import jax.numpy as jnp
from absl import flags

from mlcm_jax.hub.model_index import TEXT_ENCODERS
from mlcm_jax.hub.pipeline import Pipeline, load_pipeline
from mlcm_jax.hub.text import with_text

MODEL = flags.DEFINE_string("model", None, "Diffusers folder, hub id or single .safetensors file.", required=True)
ARCHITECTURE = flags.DEFINE_string(
    "architecture", None, "With a single file: diffusers folder or hub id of its settings and tokenizers."
)
VARIANT = flags.DEFINE_string("variant", None, "Of the weights files, such as fp16; default: full precision.")
REVISION = flags.DEFINE_string("revision", None, "Of a hub id: branch, tag or commit.")
TEXT = flags.DEFINE_string("text", None, "Folder of text encoders and tokenizers to use in place of the model's own.")

EMOJI = Path("examples/emoji")  # the shipped models: the teacher, and the student as a LoRA for it


def allow_shipped_model() -> None:
    """Let a program do without --model: it then takes the shipped teacher, with the LoRAs of ``chosen_loras``."""
    flags.set_default(MODEL, str(EMOJI / "teacher"))


def named_model() -> bool:
    """Whether there is a --model."""
    return bool(flags.FLAGS[MODEL.name].present)


def chosen_loras(given: Sequence[str] | None) -> list[str]:
    """A program's LoRAs, each PLACE or PLACE:SCALE; the shipped student's where neither they nor a model are named."""
    return list(given or ([] if named_model() else [str(EMOJI / "student")]))


def load_model(
    dtype: str = "float32", param_dtype: str | None = None, parts: Collection[str] | None = None
) -> Pipeline:
    """The pipeline that the flags name, to be computed in ``dtype``; the rest and errors are ``load_pipeline``'s."""
    weights = param_dtype and jnp.dtype(param_dtype)
    if TEXT.value:  # the model's own text encoders are not read
        parts = [part for part in parts or ("unet", "vae") if part not in TEXT_ENCODERS]
    pipeline = load_pipeline(
        str(MODEL.value),
        architecture=ARCHITECTURE.value,
        variant=VARIANT.value,
        revision=REVISION.value,
        dtype=jnp.dtype(dtype),
        param_dtype=weights,
        parts=parts,
    )
    if TEXT.value:
        return with_text(pipeline, TEXT.value, dtype=jnp.dtype(dtype), param_dtype=weights)
    return pipeline
