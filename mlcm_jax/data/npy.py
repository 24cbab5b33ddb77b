"""Arrays of numbers from .npy files."""

from pathlib import Path

import numpy as np

from mlcm_jax.errors import UserError


def read_npy(file: str | Path, *, mmap: bool = False) -> np.ndarray:
    """The array of an .npy file. mmap: read from the disk where it is used, not whole.

    Raises UserError for a file that is absent, damaged, pickled or not one array.
    """
    try:
        array = np.load(file, mmap_mode="r" if mmap else None, allow_pickle=False)
    except Exception as error:  # OSError, ValueError, EOFError, errors of zipfile and of ast: it depends on the damage
        reason = " ".join(str(error).split())[:150]
        raise UserError(f"{file} is not a readable .npy file of numbers ({reason}).") from None
    if not isinstance(array, np.ndarray):
        raise UserError(f"{file} holds several arrays: it must be an .npy file of one.")
    return array
