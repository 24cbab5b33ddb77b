"""What a compiled step needs of a device: no activation of the whole batch, and figures read from XLA's text."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from small_runs import settings

from mlcm_jax.train.compiled import Memory, collective_bytes, read_buffer_assignment
from mlcm_jax.train.program import build_program

BATCH = 88  # no width, and no number of tokens, is a multiple of 11
TOKENS, CHANNELS = 64, 64  # of the tiny UNet's activations


def arrays_of_the_whole_batch(hlo, tensor=1):
    """Types in the program of one device that hold an activation for every example, or for the doubled batch."""
    whole = {n * tokens for n in (BATCH, 2 * BATCH) for tokens in (1, TOKENS)}
    found = set()
    for dtype, dims in re.findall(r"(\w+)\[([\d,]+)\]", hlo):
        sizes = [int(dim) for dim in dims.split(",")]
        if whole & set(sizes) and math.prod(sizes) >= BATCH * TOKENS * CHANNELS // tensor:
            found.add(f"{dtype}[{dims}]")
    return found


def compiled_step(architecture, **axes):
    config = settings(batch_size=BATCH, remat=False)
    config.mesh.update(axes)
    program = build_program(config, architecture, jax.devices())
    (stage,) = program.stages
    return stage.step.lower(program.state, program.frozen, stage.batch).compile().as_text()


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize("axes", [{"data": 1, "fsdp": 8, "tensor": 1}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_no_device_computes_the_whole_batch(architecture, axes):
    assert arrays_of_the_whole_batch(compiled_step(architecture, **axes), axes["tensor"]) == set()


def test_an_array_of_the_whole_batch_is_seen():
    mesh = jax.make_mesh((8,), ("data",))
    split, whole = (jax.NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))

    def gathered(x):
        return jax.lax.with_sharding_constraint(jnp.concatenate([x, 2 * x]), whole) @ jnp.ones((CHANNELS, CHANNELS))

    x = jax.ShapeDtypeStruct((BATCH, TOKENS, CHANNELS), jnp.float32, sharding=split)
    hlo = jax.jit(gathered, out_shardings=split).lower(x).compile().as_text()
    assert f"f32[{2 * BATCH},{TOKENS},{CHANNELS}]" in arrays_of_the_whole_batch(hlo)
