"""Runs programs of launch/ for tests: imports are paid once, then every run is a forked process of its own.

Reads a JSON list [program, argument...] a line from stdin, answers with a JSON line: status, stdout, stderr.
["preload", FOLDER] traces the networks of a diffusers folder once for all runs to come, which then find their shapes.
Nothing may start threads before the forks, so JAX's backends are first touched in the children.
"""

import json
import os
import runpy
import sys
import tempfile
import traceback
from unittest import mock

import mlcm_jax.training.run
import mlcm_jax.training.sample_grids  # noqa: F401
from mlcm_jax.hub.pipeline import read_architecture


def run_forked(argv: list[str]) -> dict:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            os._exit(_run_as_main(argv))
        _, status = os.waitpid(child, 0)
        out.seek(0)
        err.seek(0)
        return {"status": os.waitstatus_to_exitcode(status), "stdout": out.read(), "stderr": err.read()}


def _run_as_main(argv: list[str]) -> int:
    """The exit status that the interpreter would give to ``python launch/<program>.py arguments``."""
    sys.argv = [f"launch/{argv[0]}.py", *argv[1:]]
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else int(e.code is not None)
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def preload(folder: str) -> dict:
    with mock.patch("jax.default_backend", return_value="cpu"):  # would start one
        read_architecture(folder)
    return {}


if __name__ == "__main__":
    for line in sys.stdin:
        argv = json.loads(line)
        print(json.dumps(preload(argv[1]) if argv[0] == "preload" else run_forked(argv)), flush=True)
