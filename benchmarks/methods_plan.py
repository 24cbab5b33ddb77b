"""Work and memory of each few-step method at SDXL's size, without weights: python benchmarks/methods_plan.py --docs

A row for each method of configs/methods.py, but for tscd_reward, with the settings of configs/sdxl.py, as --plan_only
of launch/train.py has them: FLOPs are traced, nothing is computed.
"""

import json
from pathlib import Path

import jax
from absl import flags

from configs.methods import METHODS
from configs.sdxl import get_config
from examples.emoji.results_tables import put_into_page
from mlcm_jax.cli import run_main
from mlcm_jax.training.plan import Plan, format_bytes
from mlcm_jax.training.program import build_program
from mlcm_jax.training.run import describe_teacher

PLANNED = [name for name in METHODS if name != "tscd_reward"]  # which needs a reward model's weights
DOCS = flags.DEFINE_bool("docs", False, "Write the table into docs/methods.md.")
PAGE, MARKER = Path("docs/methods.md"), "sdxl plan"


def plan_of(name: str) -> Plan:
    """On one device, which holds everything."""
    config = get_config(name)
    config.mesh.data, config.mesh.fsdp = 1, 1
    return build_program(config, describe_teacher(config, weights_needed=False), jax.devices()[:1]).plan


def row(name: str, plan: Plan) -> str:
    per_example = [stage.flops_per_step / stage.batch_size / 1e12 for stage in plan.stages]
    low, high = (f"{value:.3g}" for value in (min(per_example), max(per_example)))
    total = sum(stage.flops_per_step * (stage.end - stage.start) for stage in plan.stages)
    work = low if low == high else f"{low} to {high}"
    cells = [name, plan.num_steps, plan.batch_size, work, f"{total / 1e18:.3g}"]
    cells += [format_bytes(plan.state_bytes), format_bytes(plan.frozen_bytes)]
    return "| " + " | ".join(map(str, cells)) + " |"


def main():
    lines = [
        "| method | steps | batch | TFLOP an example | EFLOP in all | trained weights, optimizer, critics | frozen |",
        "|---" * 7 + "|",
    ]
    for name in PLANNED:
        lines.append(row(name, plan_of(name)))
        print(json.dumps(lines[-1]), flush=True)
    if DOCS.value:
        put_into_page(PAGE, MARKER, "\n".join(lines))


if __name__ == "__main__":
    run_main(main)
