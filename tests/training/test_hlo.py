"""What a compiled step needs of a device: no activation of the whole batch, and figures read from XLA's text."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec
from small_runs import settings

from mlcm_jax.training.compile_steps import StepMemory
from mlcm_jax.training.hlo import collective_bytes, read_buffer_assignment
from mlcm_jax.training.program import build_program

BATCH = 88  # no width and no number of tokens is a multiple of 11
TOKENS, PROMPT_TOKENS = 64, 77  # of the tiny UNet
CHANNELS = 16  # of the tiny decoder's activations, which are smaller than the UNet's
JUDGE_TOKENS = 65  # of an image in the emoji scorer


def arrays_of_the_whole_batch(hlo, tensor):
    """Types in the program of one device that hold an activation for every example, or for the doubled batch."""
    whole = {n * tokens for n in (BATCH, 2 * BATCH) for tokens in (1, TOKENS, JUDGE_TOKENS)}
    found = set()
    for dtype, dims in re.findall(r"(\w+)\[([\d,]+)\]", hlo):
        sizes = [int(dim) for dim in dims.split(",")]
        if PROMPT_TOKENS in sizes:  # the compiler splits the prompts' width while it joins the two halves
            continue
        if whole & set(sizes) and math.prod(sizes) >= BATCH * TOKENS * CHANNELS // tensor:
            found.add(f"{dtype}[{dims}]")
    return found


JUDGED = {"reward_model": "clip=examples/emoji/scorer", "weight": 1.0}


@pytest.mark.parametrize(
    ("fsdp", "tensor", "preference"),
    [
        (4, 2, {}),
        pytest.param(8, 1, {}, marks=pytest.mark.slow),
        pytest.param(8, 1, JUDGED, marks=pytest.mark.slow),
    ],
)
def test_no_device_computes_the_whole_batch(architecture, fsdp, tensor, preference):
    config = settings(batch_size=BATCH, skip=1000)  # the teacher and the student, once each
    config.mesh.update({"data": 1, "fsdp": fsdp, "tensor": tensor})
    config.preference.update(preference)
    program = build_program(config, architecture, jax.devices())
    step = program.stages[0].step.lower(program.state, program.frozen, program.stages[0].batch)
    assert arrays_of_the_whole_batch(step.compile().as_text(), tensor) == set()


def compiled_on_eight(function, x, given, returned):
    """The text of the program for eight devices; given, returned: mesh axes of the argument and of the result."""
    mesh = jax.make_mesh((8,), ("data",))
    placed, out = (jax.NamedSharding(mesh, PartitionSpec(*axes)) for axes in (given, returned))
    x = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed)
    return jax.jit(function, out_shardings=out).lower(x).compile().as_text()


def test_an_array_of_the_whole_batch_is_seen():
    x = jax.ShapeDtypeStruct((BATCH, TOKENS, CHANNELS), jnp.float32)
    hlo = compiled_on_eight(lambda x: jnp.concatenate([x, 2 * x]), x, ("data",), ())
    assert f"f32[{2 * BATCH},{TOKENS},{CHANNELS}]" in arrays_of_the_whole_batch(hlo, 1)


def total_in_turns(x, turns):
    """The sum over the first axis of x, cos(x), cos(cos(x)) ...: one all-reduce in each turn."""

    def turn(_, carry):
        x, total = carry
        return jnp.cos(x), total + x.sum(0)

    return jax.lax.fori_loop(0, turns, turn, (x, jnp.zeros(x.shape[1:], x.dtype)))[1]


@pytest.mark.parametrize(("turns", "expected"), [(1, 1), (5, 5), (None, 3.5)], ids=["once", "loop", "traced"])
def test_collectives_count_as_often_as_their_loop_turns(turns, expected):
    x = jax.ShapeDtypeStruct((16, 32, 4), jnp.float32)

    def function(x):
        return total_in_turns(x, jnp.int32(jnp.isfinite(x).sum()) if turns is None else turns)

    moved = collective_bytes(compiled_on_eight(function, x, ("data",), ()), traced_trips=3.5)
    bound = 4 if turns is None else 0  # bytes of the sum that makes it
    assert moved == {"all-reduce": expected * 32 * 4 * 4 + bound}


def test_a_gather_counts_with_what_it_returns():
    x = jax.ShapeDtypeStruct((16, 32), jnp.float32)
    assert collective_bytes(compiled_on_eight(lambda x: x, x, ("data",), ())) == {"all-gather": 16 * 32 * 4}


# As a TPU's compiler writes them: a gather that three fusions share, a reduce-scatter as a fusion, and a pair.
TPU_HLO = """
%fused_computation.1 (param_0.1: bf16[40,128]) -> (bf16[80,128], s32[2]) {
  %param_0.1 = bf16[40,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[80,128]{1,0:T(8,128)(2,1)} all-gather(%param_0.1), channel_id=7, dimensions={0}
}

%async_collective_fusion.2 (param_0.2: bf16[40,128]) -> bf16[80,128] {
  %param_0.2 = bf16[40,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[80,128]{1,0:T(8,128)(2,1)} all-gather(%param_0.2), channel_id=7, dimensions={0}
}

%all-reduce-scatter.3 (param_0.3: f32[64,128]) -> f32[32,128] {
  %param_0.3 = f32[64,128]{1,0:T(8,128)} parameter(0)
  %all-reduce.3 = f32[64,128]{1,0:T(8,128)} all-reduce(%param_0.3), channel_id=8, to_apply=%add.1
  ROOT %slice.3 = f32[32,128]{1,0:T(8,128)} slice(%all-reduce.3), slice={[0:32], [0:128]}
}

%body.4 (param.4: (bf16[4,32], u32[])) -> (bf16[4,32], u32[]) {
  %param.4 = (bf16[4,32]{1,0}, u32[]{:T(128)}) parameter(0)
  %a.4 = bf16[4,32]{1,0:T(4,128)} get-tuple-element(%param.4), index=0
  %start.4 = (bf16[4,32]{1,0}, bf16[4,32]{1,0}, u32[]{:S(2)}) collective-permute-start(%a.4), channel_id=9
  %done.4 = bf16[4,32]{1,0:T(4,128)(2,1)} collective-permute-done(%start.4)
  %fusion.4 = bf16[80,128]{1,0} fusion(%a.4), kind=kCustom, calls=%async_collective_fusion.2
  %i.4 = u32[]{:T(128)} get-tuple-element(%param.4), index=1
  %one.4 = u32[]{:T(128)} constant(1)
  %next.4 = u32[]{:T(128)} add(%i.4, %one.4)
  ROOT %tuple.4 = (bf16[4,32]{1,0}, u32[]{:T(128)}) tuple(%done.4, %next.4)
}

%cond.4 (param.5: (bf16[4,32], u32[])) -> pred[] {
  %constant.5 = u32[]{:T(128)} constant(16)
  %param.5 = (bf16[4,32]{1,0}, u32[]{:T(128)}) parameter(0)
  %i.5 = u32[]{:T(128)} get-tuple-element(%param.5), index=1
  ROOT %compare.5 = pred[]{:T(512)} compare(%i.5, %constant.5), direction=LT
}

ENTRY %main.1_spmd (param.6: bf16[40,128], param.7: f32[64,128]) -> f32[32,128] {
  %param.6 = bf16[40,128]{1,0:T(8,128)(2,1)} parameter(0)
  %param.7 = f32[64,128]{1,0:T(8,128)} parameter(1)
  %fusion.6 = (bf16[80,128]{1,0}, s32[2]{0:S(2)}) fusion(%param.6), kind=kCustom, calls=%fused_computation.1
  %while.6 = (bf16[4,32]{1,0}, u32[]{:T(128)}) while(%tuple.6), condition=%cond.4, body=%body.4
  ROOT %fusion.7 = f32[32,128]{1,0:T(8,128)} fusion(%param.7), kind=kCustom, calls=%all-reduce-scatter.3
}
"""


@pytest.mark.parametrize(("stride", "turns"), [(1, 16), (2, 8), (3, 6)])
def test_collectives_of_a_tpu(stride, turns):
    """The counter of a loop that the compiler has unrolled goes up by more than one."""
    hlo = TPU_HLO.replace("%one.4 = u32[]{:T(128)} constant(1)", f"%one.4 = u32[]{{:T(128)}} constant({stride})")
    assert collective_bytes(hlo) == {
        "all-gather": 80 * 128 * 2,
        "collective-permute": turns * 4 * 32 * 2,
        "reduce-scatter": 64 * 128 * 4,
    }


BUFFER_ASSIGNMENT = """
BufferAssignment:
allocation 0: size 4096, page 0, thread-local:
allocation 1: size 147456, page 0, parameter 38, shape |f32[3,3,32,32]| at ShapeIndex {}, maybe-live-out:
 value: <36 param.40 @0> (size=147456,offset=0): f32[3,3,32,32]{3,2,1,0:T(8,128)}
allocation 2: size 788480, page 0, parameter 2, shape |bf16[4,77,64]| at ShapeIndex {}:
allocation 3: size 512, page 0, constant:
allocation 4: size 68096, page 0, maybe-live-out:
allocation 5: size 3072, page 0, output shape is |(f32[], f32[4,16])|, maybe-live-out:
allocation 6: size 28606976, page 0, preallocated-temp:
allocation 7: size 42555124, color 1, page 0, preallocated-temp:
"""


def test_memory_from_a_buffer_assignment():
    arguments, temporaries, outputs = 147456 + 788480, 28606976, 68096 + 3072
    expected = StepMemory(arguments, temporaries, arguments + temporaries + outputs)
    assert read_buffer_assignment(BUFFER_ASSIGNMENT) == expected
