"""What tests of mutated files share: the good ones, the values that are put in, and what a reader may do with them."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from mlcm_jax.errors import UserError


def shape_of(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


SHAPES = {
    "conv": {
        "kernel": jax.ShapeDtypeStruct((3, 3, 2, 4), jnp.float32),
        "bias": jax.ShapeDtypeStruct((4,), jnp.float32),
    },
    "norm": {"scale": jax.ShapeDtypeStruct((4,), jnp.float32)},
}
TENSORS = {
    "conv.weight": np.arange(72, dtype=np.float32).reshape(4, 2, 3, 3),
    "conv.bias": np.ones(4, np.float16),
    "norm.weight": np.ones(4, np.float32),
}
CAMPAIGN = settings(max_examples=1000, suppress_health_check=list(HealthCheck), derandomize=False)
QUICK = settings(max_examples=40, suppress_health_check=list(HealthCheck))
MOST_MEMORY = 2_000_000  # bytes, for files of a few hundred

NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([-1, 0, 1, 2, 8, 2**31, 2**63, 2**64, 10**30]))
CODES = st.sampled_from(["F32", "F64", "I64", "U8", "BF16"])
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=8), CODES)


def nested(values):
    return st.lists(values, max_size=4) | st.dictionaries(st.text(max_size=4), values, max_size=3)


VALUES = st.recursive(LEAVES, nested, max_leaves=6)


def one_sentence(error):
    text = str(error)
    assert text and "\n" not in text and len(text) < 450, text  # of which a folder of tests is a part


def read_within_bounds(read):
    """The result of ``read``, None where it answered with a sentence."""
    tracemalloc.start()
    try:
        return read()
    except UserError as e:
        one_sentence(e)
        return None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MOST_MEMORY
