"""Which steps are compiled before the first one, and what is said of those that do not fit."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlcm_jax.errors import UserError
from mlcm_jax.training.compile_steps import compile_steps

MATRIX = jax.ShapeDtypeStruct((256, 256), jnp.float32)
NUM_BYTES = 256 * 256 * 4


def program(bytes_limit=None, num_steps=30):
    """Stages from steps 0, 10 and 20 on, of which the last two share a step."""
    first, second = (jax.jit(lambda state, frozen, batch, k=k: state @ frozen + k * batch) for k in (1, 2))
    stages = [
        SimpleNamespace(step=step, batch=MATRIX, stage=SimpleNamespace(start=start, end=start + 10))
        for start, step in ((0, first), (10, second), (20, second))
    ]
    device = SimpleNamespace(process_index=0, memory_stats=lambda: bytes_limit and {"bytes_limit": bytes_limit})
    mesh = SimpleNamespace(devices=np.array([device]))
    config = SimpleNamespace(num_steps=num_steps)
    return SimpleNamespace(
        stages=stages, mesh=mesh, state=MATRIX, frozen=MATRIX, config=config, image_sizes=((64, 64),)
    )


@pytest.mark.parametrize(
    ("first_step", "num_steps", "expected"),
    [
        (0, 30, ["stage 1", "stages 2, 3"]),
        (0, 10, ["stage 1"]),
        (9, 20, ["stage 1", "stage 2"]),
        (10, 30, ["stages 2, 3"]),
        (20, 30, ["stage 3"]),
    ],
)
def test_each_program_ahead_is_compiled_once(capsys, first_step, num_steps, expected):
    executables = compile_steps(program(num_steps=num_steps), first_step)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("compiled  ")[1].split(" after")[0] for line in lines] == expected
    assert len(executables) == len(expected)


def test_an_executable_computes_its_step_and_its_memory_is_reported(capsys):
    whole = program()
    executables = compile_steps(whole)
    state, frozen, batch = (np.full((256, 256), value, np.float32) for value in (1, 2, 3))
    results = [executables[stage.step](state, frozen, batch)[0, 0] for stage in whole.stages]
    assert results == [512 + 3, 512 + 6, 512 + 6]
    total = (3 + 1) * NUM_BYTES  # arguments and result; a CPU needs little beside them
    (told,) = {float(line.split(" s: ")[1].split(" MB")[0]) for line in capsys.readouterr().out.splitlines()}
    assert total <= told * 1e6 + 1e5 and told * 1e6 < 3 * total


def test_a_later_step_that_cannot_fit_ends_the_run_before_it_starts():
    assert compile_steps(program(bytes_limit=100 * NUM_BYTES))
    with pytest.raises(UserError, match=r"The step of stage 1 does not fit: it needs .* MB on each device, which has"):
        compile_steps(program(bytes_limit=NUM_BYTES))
