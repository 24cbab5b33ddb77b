"""Where figures come from: the command, the date, the hardware and the versions."""

import datetime
import importlib.metadata
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "pillow", "transformers")


def provenance() -> dict[str, Any]:
    """Of this process, as a JSON object."""
    versions = {"python": platform.python_version()}
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": _hardware(),
        "versions": versions | {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def _hardware() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpu = models[0] if models else platform.processor() or platform.machine()
    return {"cpu": cpu, "cores": os.cpu_count(), "jax_devices": [device.device_kind for device in jax.devices()]}
