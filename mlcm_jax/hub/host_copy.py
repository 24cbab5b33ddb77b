"""Host arrays on their way to a device: into another memory order and dtype, and where the device can take them.

NumPy casts a transposed array one element at a time across memory, which takes several times as long as reading the
file. A few columns at a time, cast in the order that they are stored in and then transposed as plain integers, stay in
the processor's cache.
"""

import math
from typing import Any

import numpy as np

ALIGNMENT = 64  # bytes, what XLA's CPU device asks of memory that it takes over; NumPy gives 16
COLUMNS = 32  # two lines of a cache, of 16-bit numbers


def empty_aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """``np.empty`` in memory that a CPU device can use without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def copy_into(target: np.ndarray, source: np.ndarray) -> None:
    """``target[...] = source``, for arrays of one shape."""
    if source.ndim < 2:
        target[...] = source
        return
    bits = np.dtype(f"u{target.itemsize}")
    for start in range(0, source.shape[-1], COLUMNS):
        columns = (..., slice(start, start + COLUMNS))
        target.view(bits)[columns] = source[columns].astype(target.dtype, order="K", copy=False).view(bits)
