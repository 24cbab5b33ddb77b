"""Read a model into Flax and write it as a diffusers folder or as a single file; tensors keep dtype and value.

Names that only some versions use (hub/load.py, ALIASES) are written as all versions read them.

    python launch/convert.py --model=DIR --out=DIR2
    python launch/convert.py --model=DIR --out=model.safetensors                       # the original names
    python launch/convert.py --model=model.safetensors --architecture=DIR --out=DIR2
    python launch/convert.py --model=DIR --lora=style.safetensors:0.8 --out=DIR2       # folded into the weights
    python launch/convert.py --model=DIR --text=DIR3 --out=DIR2     # with the text encoders and tokenizers of DIR3
"""

from pathlib import Path

import jax.numpy as jnp
from absl import flags

from mlcm_jax.cli import run_main
from mlcm_jax.errors import UserError
from mlcm_jax.hub.lora import parse_lora, with_loras
from mlcm_jax.hub.pipeline import save_pipeline
from mlcm_jax.hub.single_file import save_single_file
from mlcm_jax.model_flags import load_model
from mlcm_jax.outputs import check_file, check_folder

LORA = flags.DEFINE_multi_string("lora", None, "LoRA to fold in, PLACE or PLACE:SCALE; give it again for more.")
DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "float16", "bfloat16"], "Of what is written; default: as read.")
OUT = flags.DEFINE_string("out", None, "Folder, or .safetensors file, to write; it must not exist yet.", required=True)


def main():
    out, dtype = Path(OUT.value), None if DTYPE.value is None else jnp.dtype(DTYPE.value)
    single = out.suffix == ".safetensors"
    if out.exists() and (single or not out.is_dir() or any(out.iterdir())):
        what = "exists" if single else "exists and is not an empty folder"
        raise UserError(f"--out={out} {what}: choose another.")
    (check_file if single else check_folder)("out", out)
    for entry in LORA.value or []:
        parse_lora(entry)  # answers a mistake before the model is read
    pipeline = with_loras(load_model(), LORA.value or [])
    networks = pipeline.diffusers_networks()
    if single:
        params = {part: network.params for part, network in networks.items()}
        class_name, scheduler_config = pipeline.model_index["_class_name"], pipeline.scheduler_config
        save_single_file(class_name, params, out, scheduler_config=scheduler_config, dtype=dtype)
    else:
        save_pipeline(pipeline, out, dtype=dtype)
    print(f"wrote {', '.join(networks)} to {out}")


if __name__ == "__main__":
    run_main(main)
