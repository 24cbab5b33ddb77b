"""The training step against the same step in PyTorch and diffusers: python benchmarks/train_step.py.

Random weights, made on the device. Ours and torch's take turns in one process; a ratio is torch's time by ours, the
median over the turns with quartiles. Without torch, diffusers and peft ours is timed alone. --model=small is SDXL's
architecture in small: a dry run of what --model=sdxl does on a GPU.
"""

import functools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import timing
import workload
from absl import app, flags
from options import DTYPE, MODEL, OUT, REPEATS, TIME_LIMIT

from mlcm_jax.distillation.state import Frozen
from mlcm_jax.training.program import Program

TRAINABLE = flags.DEFINE_list("trainable", ["full", "lora"], "full, lora, or both.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Prompts a step.")
REMAT = flags.DEFINE_bool("remat", False, "Recompute activations in the backward pass, on both sides.")

# Steps that are queued before their results are waited for: training, too, queues the next step while one runs.
STEPS_IN_A_TURN = 3
TOLERANCE = 1e-4
CHECKED_STEPS = 3


def start(program: Program) -> tuple[Any, Frozen]:
    """The state at step 0 and what is not trained, random, on the device."""
    frozen = workload.random_frozen(program)
    full = program.config.trainable == "full"
    return program.init_state(workload.random_params(program.state.params) if full else None), frozen


def compile_start(program: Program) -> None:
    """Compile what ``start`` runs into the compilation cache; nothing is allocated."""
    full = program.config.trainable == "full"
    shardings = jax.tree.map(lambda a: a.sharding, program.state)
    jax.jit(program.create_state, out_shardings=shardings).lower(program.state.params if full else None).compile()


def compile_step(program: Program) -> tuple[Any, dict[str, Any]]:
    """The program's step for its own arguments; seconds as ``timing.compile_timed`` has them, and unet_evaluations."""
    stage, start = program.stages[0], time.perf_counter()
    with timing.same_precision(program.config.compute_dtype):
        evaluations = our_evaluations(program)
        traced = time.perf_counter() - start
        compiled, figures = timing.compile_timed(stage.step, program.state, program.frozen, stage.batch)
    return compiled, {
        "trace_seconds": figures["trace_seconds"] + traced,
        "compile_seconds": figures["compile_seconds"],
        "unet_evaluations": evaluations,
    }


def check_losses(program: Program, compiled: Any) -> tuple[list[float], list[float]]:
    """Losses of the first steps, ours and torch's, from equal weights on equal inputs."""
    import torch_reference

    state, frozen = start(program)
    device = timing.torch_device()
    lora = state.params if program.config.trainable == "lora" else None
    reference = torch_reference.make_train_step(program, frozen.unconditional, device, frozen.teacher, lora)
    if lora is None:
        torch_reference.copy_params(reference.student, state.params)
    ours, theirs = [], []
    dtype = torch_reference.DTYPES[program.config.frozen_dtype]
    for step in range(CHECKED_STEPS):
        batch = workload.batch_at(program, step)
        draws = workload.draws_at(program, step, np.asarray(batch.trajectory_step))
        state, metrics = compiled(state, frozen, batch)
        ours.append(float(metrics["loss"]))
        theirs.append(float(reference(torch_reference.make_rows(batch, draws, device, dtype))))
    return ours, theirs


def largest_difference(program: Program, compiled: Any) -> float:
    """Of the losses, relative."""
    ours, theirs = check_losses(program, compiled)
    return max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True))


def checked_program(program: Program, scratch: Path) -> Program:
    """What is compared: the program itself, or, where that is large or not float32, SDXL's architecture in small."""
    if MODEL.value != "sdxl" and DTYPE.value == "float32":
        return program
    folder = workload.architecture_folder("small", scratch)
    trainable = program.config.trainable
    return workload.make_program(workload.step_settings(folder, trainable, 2, "float32", remat=REMAT.value, rank=8))


def our_side(program: Program, compiled: Any, steps: int = STEPS_IN_A_TURN) -> timing.Side:
    """Our compiled step, ``steps`` times a turn, going on from its own state."""
    state, frozen = start(program)
    batch = workload.batch_at(program, program.config.num_segments)
    carried = [state]

    def run():
        for _ in range(steps):
            state, _ = compiled(carried.pop(), frozen, batch)
            carried.append(state)
        jax.block_until_ready(carried)

    return timing.Side(run, functools.partial(timing.compiled_memory, compiled), steps)


def reference_side(program: Program, evaluations: int, *, compiled: bool) -> timing.Side:
    """torch's step on random weights of its own. Raises AssertionError where it takes other UNet evaluations."""
    import torch_reference

    device = timing.torch_device()
    unconditional = workload.random_inputs(program.frozen.unconditional, 2)
    step = torch_reference.make_train_step(program, unconditional, device)
    batch = workload.batch_at(program, program.config.num_segments)
    draws = workload.draws_at(program, 0, np.asarray(batch.trajectory_step))
    dtype = torch_reference.DTYPES[program.config.frozen_dtype]
    rows = torch_reference.make_rows(batch, draws, device, dtype)
    step(rows)
    if step.evaluations != evaluations:
        raise AssertionError(f"the UNets are called with {step.evaluations} rows, ours with {evaluations}")
    return timing.torch_side(functools.partial(step.compiled() if compiled else step, rows), device, STEPS_IN_A_TURN)


def our_evaluations(program: Program) -> int:
    """Rows that the UNets are called with in a step."""
    stage = program.stages[0]
    return workload.unet_evaluations(stage.step, program.state, program.frozen, stage.batch)


def measure(
    program: Program, evaluations: int, ours: timing.Side, sides: dict[str, bool], deadline: float
) -> Iterator[dict[str, Any]]:
    """One row of the table, as far as it has got. sides: as ``timing.torch_sides``."""
    theirs = {name: functools.partial(reference_side, program, evaluations, compiled=c) for name, c in sides.items()}
    config = program.config
    recomputed = ", remat" * bool(config.remat)
    row = {
        "work": f"{MODEL.value}, {config.trainable}{recomputed}, batch {config.batch_size}, "
        f"{program.image_size[0]} px, {config.compute_dtype}",
        "images": config.batch_size,
        "flops": program.stages[0].flops,
        "unet_evaluations": evaluations,
        "peak_flops": timing.measured_peak(),
    }
    for figures in timing.compare(ours, theirs, REPEATS.value, deadline):
        yield row | figures


def main(argv):
    del argv
    deadline = time.monotonic() + TIME_LIMIT.value
    missing = timing.torch_missing()
    report = timing.Report(Path(OUT.value), "train_step", timing.notes("train_step.py", missing))
    differences = {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        architecture = workload.architecture_folder(MODEL.value, scratch)
        for trainable in TRAINABLE.value:
            if time.monotonic() > deadline:
                report.notes["left out"] = f"{trainable}: out of time"
                continue
            settings = (trainable, BATCH_SIZE.value, DTYPE.value)
            program = workload.make_program(workload.step_settings(architecture, *settings, remat=REMAT.value))
            compiled, figures = compile_step(program)
            sides = timing.torch_sides(compiled=True)
            evaluations = figures["unet_evaluations"]
            report.add_row(measure(program, evaluations, our_side(program, compiled), sides, deadline))
            report.notes["rows that the UNets are called with in a step, on either side"] = evaluations
            if not missing:
                checked = checked_program(program, scratch)
                step = compiled if checked is program else compile_step(checked)[0]
                differences[trainable] = largest_difference(checked, step)
                report.notes[f"largest difference of {CHECKED_STEPS} losses, {trainable}"] = differences[trainable]
            report.write()
    print(report.write())
    if any(not difference <= TOLERANCE for difference in differences.values()):
        raise SystemExit(f"The losses differ by more than {TOLERANCE}: the two sides did not do the same work.")


if __name__ == "__main__":
    app.run(main)
