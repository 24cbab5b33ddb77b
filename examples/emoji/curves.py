"""Draw the teacher's training curves: examples/emoji/curves.py --out=curves.png, from the three workdirs."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from absl import flags

from mlcm_jax.cli import run_main
from mlcm_jax.errors import UserError

AUTOENCODER = flags.DEFINE_string("autoencoder", "runs/emoji_autoencoder", "Workdir of train_autoencoder.py.")
CLIP = flags.DEFINE_string("clip", "runs/emoji_clip", "Workdir of train_clip.py.")
UNET = flags.DEFINE_string("unet", "runs/emoji_unet", "Workdir of train_unet.py.")
OUT = flags.DEFINE_string("out", "curves.png", "The image.")

# Workdir, metric of its metrics.jsonl, what the axis says
PANELS = (
    (AUTOENCODER, "psnr", "autoencoder: PSNR of the batch, dB"),
    (CLIP, "loss", "text encoders and image tower: loss"),
    (UNET, "loss", "UNet: min-SNR-weighted loss"),
)


def read_curve(workdir: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a metric; of a step that was repeated after an interruption the last one."""
    file = Path(workdir) / "metrics.jsonl"
    if not file.is_file():
        raise UserError(f"{file} does not exist: name the folder that the training wrote its metrics to.")
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    values = {row["step"]: row[key] for row in rows if key in row}
    steps = sorted(values)
    return np.array(steps), np.array([values[step] for step in steps])


def main():
    figure, all_axes = plt.subplots(1, len(PANELS), figsize=(13, 3.6), layout="constrained")
    for axes, (workdir, key, label) in zip(all_axes, PANELS, strict=True):
        steps, values = read_curve(workdir.value, key)
        axes.plot(steps, values, alpha=0.3)
        window = max(1, len(values) // 40)
        axes.plot(steps[window - 1 :], np.convolve(values, np.ones(window) / window, mode="valid"))
        axes.set(xlabel="step", ylabel=label, yscale="log" if key == "loss" else "linear")
    figure.savefig(OUT.value, dpi=90)
    print(f"The curves are in {OUT.value}.")


if __name__ == "__main__":
    run_main(main)
