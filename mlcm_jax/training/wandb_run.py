"""Metrics and images for Weights & Biases, as an extra: pip install mlcm_jax[wandb]."""

import importlib.util
import uuid
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from mlcm_jax.errors import UserError
from mlcm_jax.outputs import atomic_write, is_remote

ID_FILE = "wandb_id"


def check_wandb(config: ConfigDict) -> None:
    """Raise UserError when the run is to be logged there and the package is missing."""
    if config.wandb_project and importlib.util.find_spec("wandb") is None:
        raise UserError("config.wandb_project needs the package wandb: pip install wandb, or leave the project empty.")


class WandbRun:
    """The run of a workdir; a resumed one goes on where it was. Account, server and offline mode are wandb's own
    settings (WANDB_MODE=offline keeps everything below ``workdir``/wandb, or in wandb/ here where the workdir is at gs://)."""

    def __init__(self, config: ConfigDict, workdir: epath.PathLike):
        import wandb

        workdir = epath.Path(workdir)
        id_file = workdir / ID_FILE
        if not id_file.exists():
            with atomic_write(id_file) as f:
                f.write(uuid.uuid4().hex[:12].encode())
        self._image = wandb.Image
        self._run = wandb.init(
            project=config.wandb_project,
            dir=None if is_remote(workdir) else str(workdir),
            name=workdir.name,
            id=id_file.read_text(),
            resume="allow",
            config=config.to_dict(),
            settings=wandb.Settings(silent=True),  # the progress bar is what the terminal shows
        )

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """An image, uint8 [H, W, 3]."""
        self._run.log({name: self._image(image)}, step=step)

    def close(self) -> None:
        self._run.finish()
