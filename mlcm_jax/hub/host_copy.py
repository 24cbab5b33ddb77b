"""Copies of host arrays into another memory order and dtype.

NumPy casts a transposed array one element at a time across memory, which takes several times as long as reading the
file. A few columns at a time, cast in the order that they are stored in and then transposed as plain integers, stay in
the processor's cache.
"""

import numpy as np

COLUMNS = 32  # two lines of a cache, of 16-bit numbers


def copy_into(target: np.ndarray, source: np.ndarray) -> None:
    """``target[...] = source``, for arrays of one shape."""
    if source.ndim < 2:
        target[...] = source
        return
    bits = np.dtype(f"u{target.itemsize}")
    for start in range(0, source.shape[-1], COLUMNS):
        columns = (..., slice(start, start + COLUMNS))
        target.view(bits)[columns] = source[columns].astype(target.dtype, order="K", copy=False).view(bits)
