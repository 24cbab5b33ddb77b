"""Read a diffusers model into Flax and write it back: every tensor keeps its name, dtype and value.

Names that only some versions use (hub/load.py, ALIASES) are written as all versions read them.

    python launch/convert.py --model=DIR --out=DIR2
    python launch/convert.py --model=DIR --text=DIR3 --out=DIR2     # with the text encoders and tokenizers of DIR3
"""

from pathlib import Path

from absl import flags

from mlcm_jax.cli import run_main
from mlcm_jax.errors import UserError
from mlcm_jax.hub.pipeline import load_pipeline, save_pipeline
from mlcm_jax.hub.text import with_text

MODEL = flags.DEFINE_string("model", None, "Folder of a diffusers model, or a hub id like owner/name.", required=True)
TEXT = flags.DEFINE_string("text", None, "Folder of text encoders and tokenizers to use in place of the model's own.")
OUT = flags.DEFINE_string("out", None, "Folder to write; it must not exist yet or be empty.", required=True)


def main():
    out = Path(OUT.value)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out={out} exists and is not an empty folder: choose another.")
    pipeline = load_pipeline(MODEL.value)
    if TEXT.value:
        pipeline = with_text(pipeline, TEXT.value)
    save_pipeline(pipeline, out)
    print(f"wrote {', '.join(pipeline.networks())} to {out}")


if __name__ == "__main__":
    run_main(main)
