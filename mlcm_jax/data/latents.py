"""Files of clean latents: safetensors with "latents" [N, c, h, w], scaled, one for each line of a prompt file."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open

from mlcm_jax.errors import UserError, shortened
from mlcm_jax.hub.save import Entry, write_safetensors

NAME = "latents"


class LatentFile:
    """Rows of a latents file, read as they are asked for. Raises UserError for a file that does not fit.

    n: number of prompts. latent_shape: height, width, channels.
    """

    def __init__(self, path: str | Path, *, n: int, latent_shape: tuple[int, int, int]):
        if not Path(path).is_file():
            raise UserError(f"The latents file {path} does not exist: make one with launch/encode.py.")
        try:
            self._rows = safe_open(path, framework="np").get_slice(NAME)
        except SafetensorError as error:
            raise UserError(f"{path} is not a safetensors file with {NAME!r} in it ({shortened(error)}).") from None
        height, width, channels = latent_shape
        expected, found = [n, channels, height, width], list(self._rows.get_shape())
        if found != expected:
            raise UserError(
                f"{path} holds latents of shape {found}, but the prompts and the teacher need {expected}: make it "
                "anew from the same prompt file with launch/encode.py."
            )

    def __getitem__(self, rows: Sequence[int]) -> Float[np.ndarray, "n h w c"]:
        """Float32, channels last."""
        return np.stack([self._rows[int(i)].astype(np.float32) for i in rows]).transpose(0, 2, 3, 1)


def save_latents(latents: Float[np.ndarray, "n h w c"], path: str | Path) -> None:
    """Write a latents file, float32."""
    rows = latents.transpose(0, 3, 1, 2)
    write_safetensors([Entry([NAME], rows.shape, np.dtype(np.float32), lambda: [rows])], path)
