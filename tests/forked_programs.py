"""Programs in processes that are forked from one which has imported everything: a start costs no imports."""

import contextlib
import multiprocessing
import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["mlcm_jax.training.run", "mlcm_jax.training.sample_grids", "tensorboardX"])


def start(program: str, args: list[str], env: dict[str, str], out: Path, err: Path | None = None, devices: int = 1):
    """A running process of a program (its path in the repository) on CPU devices of its own.

    env: of what jax has read while it was imported, this process's count. out: what it prints goes to the end of this
    file; err: where its errors go instead.
    """
    return _started(_run_program, program, [str(a) for a in args], env, out, err, devices)


def start_toy_run(workdir: Path, num_steps: int, env: dict[str, str], log: Path):
    """The same of ``toy_run.run``."""
    return _started(_run_toy, workdir, num_steps, env, log)


def _started(target, *args):
    process = CONTEXT.Process(target=target, args=args)
    process.start()
    return process


class Started:
    """A program that runs, with the part of ``subprocess.Popen``'s interface that tests use; folder: of its output."""

    def __init__(self, program: str, args: list[str], env: dict[str, str], folder: Path, devices: int):
        number = len(list(folder.glob("process_*.out")))
        self._out, self._err = folder / f"process_{number}.out", folder / f"process_{number}.err"
        self._out.touch()
        self._process = start(program, args, env, self._out, self._err, devices)

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    poll = returncode.fget

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it has printed by its end; raises TimeoutError for one that runs on."""
        self._process.join(timeout)
        if self.returncode is None:
            raise TimeoutError(self._err.read_text())
        return self._out.read_text(), self._err.read_text()

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()


def _run_program(program: str, args: list[str], env: dict[str, str], *place) -> None:
    _set_up(env, *place)
    sys.argv = [program, *args]
    runpy.run_path(program, run_name="__main__")


def _run_toy(workdir: Path, num_steps: int, env: dict[str, str], log: Path) -> None:
    _set_up(env, log)
    from toy_run import run  # jax is touched after the environment is set

    run(str(workdir), num_steps)


def _set_up(env: dict[str, str], out: Path, err: Path | None = None, devices: int = 1) -> None:
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"  # the last one counts
    os.environ.update(env, XLA_FLAGS=flags)
    for stream, path in ((1, out), (2, err or out)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, stream)
        os.close(file)
    os.chdir(ROOT)
