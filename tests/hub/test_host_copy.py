"""Copies into another order and dtype are NumPy's own, to the bit."""

import jax
import ml_dtypes
import numpy as np
import pytest

from mlcm_jax.hub.host_copy import copy_into, empty_aligned
from mlcm_jax.hub.load import place

SHAPES = [(), (7,), (33, 70), (3, 2, 40, 65), (1, 1, 5, 3), (0, 4)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("read", [np.float16, np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("wanted", [np.float16, np.float32, ml_dtypes.bfloat16])
def test_copies_are_numpys(shape, read, wanted):
    values = np.asarray(np.random.default_rng(0).normal(size=shape[::-1]), read)
    source, target = values.T, np.empty((2, *shape), wanted)
    copy_into(target[1, ...], source)
    expected = np.asarray(source, wanted, order="C")
    np.testing.assert_array_equal(*(a.reshape(-1).view(np.uint8) for a in (target[1], expected)))


@pytest.mark.parametrize("shape", [(), (3, 5), (2, 0, 4), (40, 1000)])
@pytest.mark.parametrize("dtype", ["float32", ml_dtypes.bfloat16])
def test_a_cpu_device_takes_aligned_arrays_over(shape, dtype):
    array = empty_aligned(shape, dtype)
    array[...] = np.arange(array.size).reshape(shape)
    with jax.default_device(jax.devices("cpu")[0]):
        placed = place(array, None)
    assert placed.shape == shape and placed.dtype == dtype
    np.testing.assert_array_equal(np.asarray(placed), array)
    if array.size:
        assert placed.unsafe_buffer_pointer() == array.ctypes.data
