"""Compile a run's step for a TPU slice that is not there: python launch/compile.py --config=configs/sdxl.py \
--topology=v5e:4x4.

The real TPU compiler runs on the host's CPU (pip install libtpu; nothing needs to be attached). Prints the memory that
each chip needs against what it has, and the FLOPs of a step. Full-size SDXL needs `ulimit -s unlimited`, some 20 GB of
host memory and, on 2 cores, tens of minutes.
"""

import json
import os
import re
import time
from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags

from mlcm_jax.cli import run_main
from mlcm_jax.config import validate
from mlcm_jax.errors import UserError
from mlcm_jax.train.program import build_program
from mlcm_jax.train.run import describe_teacher

CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file, such as configs/sdxl.py.")
TOPOLOGY = flags.DEFINE_string("topology", "v5e:4x4", "TPU generation and slice shape.")
OUT = flags.DEFINE_string("out", None, "JSON file for the figures.")
STAGE = flags.DEFINE_integer("stage", 1, "Number of the stage whose step is compiled.")
flags.mark_flag_as_required("config")

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


def compile_for(lowered, topology: str):
    """The compiled step. Raises UserError when it does not fit into a chip's memory."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needs = re.search(r"required for .*? \(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)", str(error))
        if needs is None:
            raise
        raise UserError(
            f"The step does not fit {topology}: it needs {needs[1]} GiB of temporaries on each chip, which has "
            f"{needs[2]}. Use more chips, a smaller batch_size or image_size, or trainable=lora."
        ) from None


def main():
    config = CONFIG.value
    validate(config)
    devices = topology_devices(TOPOLOGY.value)
    program = build_program(config, describe_teacher(config, weights_needed=False), devices)
    print(program.plan, flush=True)
    start = time.perf_counter()
    stage = program.stages[_stage_number(len(program.stages))]
    lowered = stage.step.lower(program.state, program.frozen, stage.batch)
    lowering_seconds = time.perf_counter() - start
    print(f"   lowered  in {lowering_seconds:.0f} s", flush=True)
    compiled = compile_for(lowered, TOPOLOGY.value)
    memory = compiled.memory_analysis()
    hbm = GENERATIONS[TOPOLOGY.value.partition(":")[0]][1]
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    used -= memory.alias_size_in_bytes
    figures = {
        "topology": TOPOLOGY.value,
        "trainable": config.trainable,
        "compile_seconds": round(time.perf_counter() - start - lowering_seconds),
        "arguments_gb": memory.argument_size_in_bytes / 1e9,
        "temporaries_gb": memory.temp_size_in_bytes / 1e9,
        "used_gb": used / 1e9,
        "hbm_gb": hbm,
        "tflop_per_step": stage.flops / 1e12,
    }
    print(
        f"  compiled  in {figures['compile_seconds']} s: {figures['used_gb']:.2f} of {hbm} GB on each chip "
        f"({figures['arguments_gb']:.2f} arguments, {figures['temporaries_gb']:.2f} temporaries)"
    )
    if OUT.value:
        Path(OUT.value).write_text(json.dumps(figures, indent=2) + "\n")
    if used > hbm * 1e9:
        raise UserError(f"The step needs {used / 1e9:.1f} GB on each chip and there are {hbm}: use more chips.")


if __name__ == "__main__":
    run_main(main)
