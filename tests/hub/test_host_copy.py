"""Copies into another order and dtype are NumPy's own, to the bit."""

import ml_dtypes
import numpy as np
import pytest

from mlcm_jax.hub.host_copy import copy_into

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
