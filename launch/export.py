"""Export a run's student: python launch/export.py --workdir=runs/emoji --format=diffusers --out=DIR.

It needs the CPU only, and works while the run goes on with the accelerator.
"""

import jax
import jax.numpy as jnp
from absl import flags

from mlcm_jax.cli import run_main
from mlcm_jax.outputs import check_folder
from mlcm_jax.training.export import FORMATS, export
from mlcm_jax.training.run import read_student

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
FORMAT = flags.DEFINE_enum(
    "format", "diffusers", FORMATS, "A pipeline folder, a single file, or a LoRA file in PEFT's or kohya's naming."
)
OUT = flags.DEFINE_string("out", None, "Folder to write to.", required=True)
DTYPE = flags.DEFINE_enum("dtype", "float16", ["float32", "float16", "bfloat16"], "Of the written tensors.")


def main():
    check_folder("out", OUT.value, remote=True)
    jax.config.update("jax_platforms", "cpu")
    config, pipeline, trained = read_student(WORKDIR.value, FORMAT.value)
    export(pipeline, trained, config, OUT.value, format=FORMAT.value, dtype=jnp.dtype(DTYPE.value))
    print(f"Wrote {OUT.value}")


if __name__ == "__main__":
    run_main(main)
