"""Programs of launch/ in processes that are forked from one which has imported everything: a start costs no imports."""

import multiprocessing
import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["mlcm_jax.training.run", "mlcm_jax.training.sample_grids", "toy_run"])


def start(program: str, args: list[str], env: dict[str, str], log: Path):
    """A running process of a program on one CPU device; what it prints goes to the end of ``log``."""
    return _started(_run_program, program, args, env, log)


def start_toy_run(workdir: Path, num_steps: int, env: dict[str, str], log: Path):
    """The same of ``toy_run.run``."""
    return _started(_run_toy, workdir, num_steps, env, log)


def _started(target, *args):
    process = CONTEXT.Process(target=target, args=args)
    process.start()
    return process


def _run_program(program: str, args: list[str], env: dict[str, str], log: Path) -> None:
    _set_up(env, log)
    sys.argv = [f"launch/{program}.py", *args]
    runpy.run_path(sys.argv[0], run_name="__main__")


def _run_toy(workdir: Path, num_steps: int, env: dict[str, str], log: Path) -> None:
    _set_up(env, log)
    from toy_run import run  # jax is touched after the environment is set

    run(str(workdir), num_steps)


def _set_up(env: dict[str, str], log: Path) -> None:
    os.environ.update(env, XLA_FLAGS="--xla_force_host_platform_device_count=1")
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(ROOT)
