"""Tasks in processes of their own, some at a time, each with a log; one that fails does not stop the others."""

import ctypes
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from mlcm_jax.errors import UserError, shortened

GRACE = 60.0  # seconds that a stopped task has to write a checkpoint
DEATH_OF_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)


class Task(NamedTuple):
    """run: called in the process. needs: names of the tasks that have to be done before."""

    name: str
    run: Callable[[], Any]
    log: Path
    needs: Sequence[str] = ()


def run_all(
    tasks: Sequence[Task], *, jobs: int, deadline: float, done: Callable[[Task], None]
) -> tuple[dict[str, str], list[str]]:
    """Run tasks, the first that can begin first, and at most ``jobs`` at a time.

    Processes are forked, so that imports are paid once: nothing before may touch a device or start a thread.
    deadline: of time.monotonic(); then those that run get SIGTERM, and none is started. done: called here after each
    task that succeeds. Returns why tasks failed, by name, and the names of those that are still to be run.
    """
    waiting, running, finished, failed = list(tasks), {}, set(), {}
    try:
        while (waiting or running) and time.monotonic() < deadline:
            for task, process in [(t, p) for t, p in running.items() if not p.is_alive()]:
                del running[task]
                if process.exitcode:
                    failed[task.name] = _why(task, process)
                else:
                    finished.add(task.name)
                    done(task)
            waiting = [task for task in waiting if not _fails_with(task, failed, tasks)]
            for task in [t for t in waiting if finished.issuperset(t.needs)][: jobs - len(running)]:
                waiting.remove(task)
                running[task] = _start(task)
            time.sleep(0.1)
    finally:
        _stop(running.values())
    return failed, [task.name for task in (*running, *waiting)]


def _fails_with(task: Task, failed: Mapping[str, str], tasks: Sequence[Task]) -> bool:
    """Whether a task cannot run, since one that it needs has failed."""
    needed = [other for other in tasks if other.name in task.needs]
    return any(other.name in failed or _fails_with(other, failed, tasks) for other in needed)


def _start(task: Task) -> BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=_in_child, args=(task,))
    process.start()
    return process


def _in_child(task: Task) -> None:
    ctypes.CDLL(None).prctl(DEATH_OF_PARENT, signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    task.log.parent.mkdir(parents=True, exist_ok=True)
    with task.log.open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        task.run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except Exception as error:
        traceback.print_exc()
        print(f"error: {type(error).__name__}: {shortened(error, 200)}", file=sys.stderr, flush=True)
        sys.exit(1)


def _why(task: Task, process: BaseProcess) -> str:
    """The sentence of a task that failed: the last line of its log, and the signal that ended it."""
    lines = [line.strip() for line in task.log.read_text(errors="replace").splitlines()] if task.log.is_file() else []
    last = next(filter(None, reversed(lines)), "").removeprefix("error: ")
    code = process.exitcode or 0
    ended = f"ended by signal {-code}; its last line: " if code < 0 else ""
    return shortened(f"{ended}{last}", 300)


def _stop(processes: Sequence[BaseProcess]) -> None:
    end = time.monotonic() + GRACE
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(max(end - time.monotonic(), 0.0))
        if process.is_alive():
            process.kill()
            process.join()
