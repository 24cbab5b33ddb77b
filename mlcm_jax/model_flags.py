"""The flags that name a program's model."""

from collections.abc import Collection

import jax.numpy as jnp
from absl import flags

from mlcm_jax.hub.pipeline import Pipeline, load_pipeline

MODEL = flags.DEFINE_string("model", None, "Diffusers folder, hub id or single .safetensors file.", required=True)
ARCHITECTURE = flags.DEFINE_string(
    "architecture", None, "With a single file: diffusers folder or hub id of its settings and tokenizers."
)
VARIANT = flags.DEFINE_string("variant", None, "Of the weights files, such as fp16; default: full precision.")
REVISION = flags.DEFINE_string("revision", None, "Of a hub id: branch, tag or commit.")


def load_model(
    dtype: str = "float32", param_dtype: str | None = None, parts: Collection[str] | None = None
) -> Pipeline:
    """The pipeline that the flags name, to be computed in ``dtype``; the rest and errors are ``load_pipeline``'s."""
    return load_pipeline(
        str(MODEL.value),
        architecture=ARCHITECTURE.value,
        variant=VARIANT.value,
        revision=REVISION.value,
        dtype=jnp.dtype(dtype),
        param_dtype=param_dtype and jnp.dtype(param_dtype),
        parts=parts,
    )
