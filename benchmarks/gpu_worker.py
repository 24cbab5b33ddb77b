"""One row of benchmarks/gpu.py in a process of its own: gets ready, waits for its turn, measures.

It writes JSON lines to stdout: what it took to get ready, then a row each time that it has got further. The line that
it reads from stdin in between is its turn: {"deadline": seconds of time.monotonic(), "torch": [sides]}; an empty line
sends it away.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import profiling
import sample
import timing
import train_step
import workload
from absl import app, flags
from options import DTYPE, MODEL

from mlcm_jax.compilation_cache import use_compilation_cache

ROW = flags.DEFINE_string("row", None, "Kind and batch size, as benchmarks/gpu.py has them.", required=True)
UNROLL = flags.DEFINE_integer("unroll", 1, "config.unroll of the step.")
STARTED = flags.DEFINE_float("started", None, "time.monotonic() when this process was started.")


class TrainRow:
    """kind: "lora", or "full", which recomputes its activations."""

    def __init__(self, kind: str, batch_size: int, scratch: Path):
        folder = workload.architecture_folder(MODEL.value, scratch)
        settings = workload.step_settings(folder, kind, batch_size, DTYPE.value, remat=kind == "full")
        settings.unroll = UNROLL.value
        self.program = workload.make_program(settings)

    def prepare(self) -> dict[str, Any]:
        """Compile all that a measurement runs; no array is made."""
        self.compiled, self.figures = train_step.compile_step(self.program)
        workload.compile_random(self.program.frozen.teacher)
        train_step.compile_start(self.program)
        memory = self.compiled.memory_analysis()
        if memory is not None:
            memory = {"arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes}
        return self.figures | (memory or {})

    def measure(self, sides: list[str], deadline: float) -> Iterator[dict[str, Any]]:
        ours = train_step.our_side(self.program, self.compiled)
        chosen = {name: compiled for name, compiled in timing.torch_sides(True).items() if name in sides}
        rows = train_step.measure(self.program, self.figures["unet_evaluations"], ours, chosen, deadline)
        yield {"row": next(rows)}
        if profile := profiling.kernel_times(ours.run, 1, count=ours.count):
            yield {"profile": profile}
        yield from ({"row": row} for row in rows)


class SampleRow:
    """All numbers of steps at a batch size, the first of ``--steps`` first; it is the one that is profiled."""

    def __init__(self, batch_size: int, scratch: Path):
        self.batch_size = batch_size
        self.folder = workload.architecture_folder(MODEL.value, scratch)
        self.pipeline = workload.describe(MODEL.value, scratch, DTYPE.value)

    def prepare(self) -> dict[str, Any]:
        figures = sample.compile_programs(self.pipeline, self.batch_size, DTYPE.value)
        for network in (self.pipeline.unet, self.pipeline.vae):
            workload.compile_random(sample.in_dtype(network, DTYPE.value))
        self.flops = sample.flops_of(self.pipeline, self.batch_size)
        return figures

    def measure(self, sides: list[str], deadline: float) -> Iterator[dict[str, Any]]:
        pipeline, dtype = self.pipeline, jnp.dtype(DTYPE.value)
        networks = tuple(sample.random_network(n, dtype) for n in (pipeline.unet, pipeline.vae))
        chosen = {name: compiled for name, compiled in timing.torch_sides(True).items() if name in sides}
        theirs = sample.torch_samplers(self.folder, pipeline, chosen)
        waiting = []
        for i, num_steps in enumerate(map(int, sample.STEPS.value)):
            if time.monotonic() > deadline:
                break
            rows = sample.measure(pipeline, networks, self.batch_size, num_steps, self.flops, theirs, deadline)
            yield {"row": next(rows)}
            waiting.append(rows)
            if i == 0 and (profile := self.profile(networks, num_steps)):
                yield {"profile": profile}
        for rows in waiting:  # ours at all numbers of steps comes before torch's at any
            yield from ({"row": row} for row in rows)

    def profile(self, networks: Any, num_steps: int) -> dict[str, Any] | None:
        run = sample.our_run(self.pipeline, networks, self.batch_size, num_steps)
        return profiling.kernel_times(run)


def make_row(name: str, scratch: Path) -> TrainRow | SampleRow:
    kind, batch_size = name.split(":")
    if kind == "sample":
        return SampleRow(int(batch_size), scratch)
    return TrainRow("lora" if kind == "start" else kind, int(batch_size), scratch)


def say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


def count_cache_misses() -> list[str]:
    """A list that grows by each program that the compilation cache does not hold."""
    missed = []
    jax.monitoring.register_event_listener(
        lambda event, **_: missed.append(event) if event.endswith("/cache_misses") else None
    )
    return missed


def first_step(row: TrainRow) -> dict[str, Any]:
    """Seconds from the start of this process to the end of its first step."""
    train_step.our_side(row.program, row.compiled, steps=1).run()
    return {"start": {"seconds": time.monotonic() - STARTED.value}}


def main(argv):
    del argv
    folder, missed = use_compilation_cache(), count_cache_misses()
    with tempfile.TemporaryDirectory() as scratch:
        row = make_row(ROW.value, Path(scratch))
        figures = row.prepare() | {"ready_seconds": time.monotonic() - STARTED.value}
        counted = {"cache_misses": len(missed), "cache": folder, "flags": os.environ.get("XLA_FLAGS", "")}
        say({"program": figures | counted, "notes": timing.machine()})
        turn = json.loads(sys.stdin.readline() or "null")
        if not turn:
            return
        if ROW.value.startswith("start"):
            say(first_step(row))
            return
        for message in row.measure(turn["torch"], turn["deadline"]):
            say(message)


if __name__ == "__main__":
    app.run(main)
