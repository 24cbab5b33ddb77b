"""The steps of a run, compiled ahead of time: what does not fit is said before the first step, not at a later stage."""

import dataclasses
import re
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from mlcm_jax.errors import UserError
from mlcm_jax.parallel.distributed import say
from mlcm_jax.training.plan import format_bytes
from mlcm_jax.training.program import Program, StageProgram

# Programs that are compiled at a time: each takes gigabytes of the host's memory at SDXL's size.
THREADS = 2

# jit-ed step of a StageProgram: the executable that takes the same arguments
Executables = Mapping[Any, Any]


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """Bytes that one device needs for a step, by the compiler's buffer assignment. total: with outputs that are not
    written over arguments."""

    arguments: int
    temporaries: int
    total: int

    def __str__(self) -> str:
        parts = f"{format_bytes(self.arguments)} arguments, {format_bytes(self.temporaries)} temporaries"
        return f"{format_bytes(self.total)} on each device ({parts})"


def step_memory(executable: Any) -> StepMemory:
    """What a compiled step needs."""
    sizes = executable.memory_analysis()
    arguments, temporaries = sizes.argument_size_in_bytes, sizes.temp_size_in_bytes
    return StepMemory(
        arguments, temporaries, arguments + temporaries + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    )


def compile_steps(program: Program, first_step: int = 0) -> Executables:
    """Compile the steps of all stages that a run from ``first_step`` (0: a new run) still reaches, each program once.

    Prints a line for each: time and memory. Raises UserError when a step needs more memory than a device has.
    """
    ahead: dict[Any, list[tuple[int, StageProgram]]] = {}
    for index, stage in enumerate(program.stages):
        number = index // len(program.image_sizes) + 1
        if stage.stage.end > first_step and stage.stage.start < program.config.num_steps:
            ahead.setdefault(stage.step, []).append((number, stage))
    start, executables = time.perf_counter(), {}
    with ThreadPoolExecutor(THREADS) as pool:
        compiling = {}
        for step, stages in ahead.items():  # traced here, one after the other, while the threads compile
            lowered = step.lower(program.state, program.frozen, stages[0][1].batch)
            compiling[step] = pool.submit(compile_step, lowered, _names(stages))
        for step, stages in ahead.items():
            executables[step] = compiling[step].result()
            memory, seconds = step_memory(executables[step]), time.perf_counter() - start
            say(f"{'compiled':>10}  {_names(stages)} after {seconds:.0f} s: {memory}")
            _require_room(memory, _names(stages), program)
    return executables


def compile_step(lowered: Any, name: str, options: Mapping[str, Any] | None = None) -> Any:
    """The executable of a lowered step. Raises UserError where the compiler finds that it does not fit; ``name`` says
    there what the step is. options: XLA's, such as {"xla_dump_to": FOLDER}."""
    try:
        return lowered.compile(options)
    except jax.errors.JaxRuntimeError as error:
        needs = re.search(r"required for .*? \(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)", str(error))
        if needs is None:
            raise
        # The message of a TPU calls them temporaries; arguments are in the sum.
        raise _too_large(name, f"{needs[1]} GiB", f"{needs[2]} GiB") from None


def _require_room(memory: StepMemory, name: str, program: Program) -> None:
    """Raise UserError for a step that is sure to run out of memory; a backend that does not know its own is trusted."""
    device = next(d for d in program.mesh.devices.flat if d.process_index == jax.process_index())
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit and memory.total > limit:
        raise _too_large(name, format_bytes(memory.total), format_bytes(limit))


def _too_large(name: str, needs: str, has: str) -> UserError:
    return UserError(
        f"The step of {name} does not fit: it needs {needs} on each device, which has {has}: use more devices with "
        "mesh.fsdp=-1, a smaller batch_size or image_size, remat=True, microbatches, or trainable=lora."
    )


def _names(stages: list[tuple[int, StageProgram]]) -> str:
    numbers = ", ".join(str(number) for number, _ in stages)
    return f"stage{'s' * (len(stages) > 1)} {numbers}"
