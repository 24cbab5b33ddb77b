"""Compile a run's step for a TPU slice, without the slice: python launch/compile.py --config=configs/sdxl.py \
--topology=v5e:4x4.

The TPU compiler runs on the host's CPU (pip install libtpu). Prints the memory that each chip needs and has, the FLOPs
of a step and the bytes that a chip exchanges in it. Full-size SDXL needs `ulimit -s unlimited`, about 20 GB of host
memory and, on 2 cores, tens of minutes. --memory_only takes a tenth of that: it stops when the compiler has assigned
the buffers and checked that they fit, and generates no code.
"""

import os
import resource
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags

from mlcm_jax.cli import run_main
from mlcm_jax.errors import UserError
from mlcm_jax.hub.save import write_json
from mlcm_jax.outputs import check_file
from mlcm_jax.training.batch_plan import source_of
from mlcm_jax.training.checks import validate
from mlcm_jax.training.compile_steps import StepMemory, compile_step, step_memory
from mlcm_jax.training.hlo import collective_bytes, read_buffer_assignment
from mlcm_jax.training.program import build_program
from mlcm_jax.training.run import describe_teacher

CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file, such as configs/sdxl.py.")
TOPOLOGY = flags.DEFINE_string("topology", "v5e:4x4", "TPU generation and slice shape.")
OUT = flags.DEFINE_string("out", None, "JSON file for the figures.")
STAGE = flags.DEFINE_integer("stage", 1, "Number of the stage whose step is compiled.")
MEMORY_ONLY = flags.DEFINE_bool("memory_only", False, "Stop when the compiler has assigned the buffers.")
flags.mark_flag_as_required("config")

# What the TPU compiler writes while it works: a step's memory, its program and, after both, the program once more when
# it has checked that the step fits. Where the step does not fit, it ends with an error instead.
BUFFERS, PROGRAM, FITS = (
    f"*.after_optimizations{name}.txt" for name in ("-buffer-assignment", "", "_after_buffer_assignment")
)
POLL_SECONDS = 0.2
STACK_BYTES = 2**30  # the compiler's recursion at SDXL's size; only what is used takes memory

# generation: (prefix of the accelerator type, HBM of a chip in GB)
GENERATIONS = {
    "v4": ("v4", 32),
    "v5e": ("v5litepod", 16),
    "v5p": ("v5p", 95),
    "v6e": ("v6e", 32),
}


def topology_devices(topology: str):
    """Descriptions of the slice's chips. Raises UserError for a slice that does not exist."""
    generation, _, shape = topology.partition(":")
    sides = shape.split("x")
    if generation not in GENERATIONS or not all(side.isdigit() for side in sides):
        raise UserError(
            f"--topology={topology} is unknown: write one of {', '.join(GENERATIONS)} and a shape, v5e:4x4."
        )
    chips = 1
    for side in sides:
        chips *= int(side)
    # Off the cloud libtpu has no metadata server to ask.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    # Compiling takes no chip, so it may go on beside a training and beside itself; else libtpu is one process's alone.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{GENERATIONS[generation][0]}-{chips}")
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # libtpu's own errors have no common type
        raise UserError(f"--topology={topology} cannot be compiled for ({str(error).splitlines()[0][:200]}).") from None


def _stage_number(num_stages: int) -> int:
    if not 1 <= STAGE.value <= num_stages:
        raise UserError(f"--stage={STAGE.value} does not exist: this configuration has {num_stages}.")
    return STAGE.value - 1


def compile_whole(lowered, name: str) -> tuple[StepMemory, str]:
    """Memory and program of a compiled step. Raises UserError when it does not fit into a chip's memory."""
    compiled = compile_step(lowered, name)
    return step_memory(compiled), compiled.as_text()


def assign_buffers(lowered, name: str) -> tuple[StepMemory, str]:
    """The same, read from the compiler's debugging output before it generates code.

    Nothing stops the compiler: it goes on in its thread until ``leave`` ends the process. Raises UserError when the
    step does not fit into a chip's memory.
    """
    jax.config.update("jax_enable_compilation_cache", False)  # a compiled step from there has no such output
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        raised: list[Exception] = []

        def work():
            try:
                compile_step(lowered, name, options)
            except Exception as error:
                raised.append(error)

        threading.stack_size(STACK_BYTES)
        compiler = threading.Thread(target=work, daemon=True)
        compiler.start()
        dump = Path(folder)
        while compiler.is_alive() and not list(dump.glob(FITS)):
            time.sleep(POLL_SECONDS)
        if raised:
            raise raised[0]
        ((memory,), (program,)) = (list(dump.glob(pattern)) for pattern in (BUFFERS, PROGRAM))
        return read_buffer_assignment(memory.read_text()), program.read_text()


def leave():
    """End the process at once: the compiler's thread would crash in an interpreter that shuts down around it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def main():
    if OUT.value:
        check_file("out", OUT.value)
    config = CONFIG.value
    validate(config)
    devices = topology_devices(TOPOLOGY.value)
    program = build_program(config, describe_teacher(config, weights_needed=False), devices)
    print(program.plan, flush=True)
    start = time.perf_counter()
    stage = program.stages[_stage_number(len(program.stages))]
    lowered = stage.step.lower(program.state, program.frozen, stage.batch)
    print(f"   lowered  in {time.perf_counter() - start:.0f} s", flush=True)
    start, cpu_start = time.perf_counter(), time.process_time()
    look = assign_buffers if MEMORY_ONLY.value else compile_whole
    memory, hlo = look(lowered, f"stage {STAGE.value} on {TOPOLOGY.value}")
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    traffic = collective_bytes(hlo, source_of(stage.stage).average_loop_trips(stage.stage.config))
    figures = {
        "topology": TOPOLOGY.value,
        "trainable": config.trainable,
        "stage": STAGE.value,
        "batch_size": config.batch_size,
        "memory_only": MEMORY_ONLY.value,
        "compile_seconds": round(seconds),
        "compile_cpu_seconds": round(cpu_seconds),
        "host_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "arguments_gb": memory.arguments / 1e9,
        "temporaries_gb": memory.temporaries / 1e9,
        "used_gb": memory.total / 1e9,
        "hbm_gb": GENERATIONS[TOPOLOGY.value.partition(":")[0]][1],
        "collectives_gb": {kind: moved / 1e9 for kind, moved in traffic.items()},
        "tflop_per_step": stage.flops / 1e12,
    }
    done = "assigned" if MEMORY_ONLY.value else "compiled"
    print(f"{done:>10}  in {seconds:.0f} s: {memory}, which has {figures['hbm_gb']} GB")
    print(" exchanged  " + (", ".join(f"{kind} {moved / 1e9:.3g} GB" for kind, moved in traffic.items()) or "nothing"))
    if OUT.value:
        write_json(figures, OUT.value)
    if MEMORY_ONLY.value:
        leave()


if __name__ == "__main__":
    run_main(main)
