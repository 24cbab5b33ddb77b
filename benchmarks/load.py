"""Peak host memory and time of loading a full-size SDXL UNet, 5.1 GB of float16, at bfloat16 onto the CPU device.

    python benchmarks/load.py            # needs 6 GB of disk and 12 GB of memory

The weights are random. Loading and plain reading run in a fresh process each; before both, the file is dropped from the
page cache ("cold"), or is in it ("warm").
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs/architectures/sdxl/unet/config.json"
BLOCK = 1 << 24
GB = 1e9
REPEATS = 3


def write_weights(folder: Path) -> Path:
    """A UNet's config.json and random float16 weights."""
    from mlcm_jax.hub.network import describe_network
    from mlcm_jax.hub.save import Entry, param_entries, write_json, write_safetensors

    write_json(json.loads(CONFIG.read_text()), folder / "config.json")
    rng = np.random.default_rng(0)
    noise = rng.normal(size=1 << 20).astype(np.float16)

    def entry(e: Entry) -> Entry:
        def read():
            return [np.resize(noise, e.shape) for _ in e.names]

        return e._replace(read=read)

    shapes = describe_network(folder, "UNet2DConditionModel", np.float32).params
    file = folder / "diffusion_pytorch_model.safetensors"
    write_safetensors([entry(e) for e in param_entries(shapes, np.float16)], file)
    return file


def read(file: Path) -> dict[str, float]:
    """Read the bytes, keeping none."""
    buffer = bytearray(BLOCK)
    start = time.perf_counter()
    with file.open("rb", buffering=0) as f:
        while f.readinto(buffer):
            pass
    return {"seconds": time.perf_counter() - start}


def load(file: Path) -> dict[str, float]:
    """Load the network; peak memory is over what the process had just before."""
    import jax
    import jax.numpy as jnp

    from mlcm_jax.hub.network import load_network

    jax.block_until_ready(jnp.zeros(8) + 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    start = time.perf_counter()
    network = load_network(file.parent, "UNet2DConditionModel", dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    jax.block_until_ready(network.params)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {"seconds": seconds, "peak": peak, "parameters": sum(a.nbytes for a in jax.tree.leaves(network.params))}


def drop_from_cache(file: Path) -> None:
    with file.open("rb") as f:
        os.fsync(f.fileno())
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def fresh(action: str, file: Path) -> dict[str, float]:
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, action, str(file)]
    return json.loads(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout)


def main():
    with tempfile.TemporaryDirectory() as folder:
        file = write_weights(Path(folder))
        print(f"{file.stat().st_size / GB:.2f} GB of float16 on disk; median (lowest to highest) of {REPEATS} runs")
        print("| page cache | parameters | peak over the baseline | load | read | ratio |\n|---|---|---|---|---|---|")
        for state in ("cold", "warm"):
            rows = []
            for _ in range(REPEATS):
                results = {}
                for action in ("read", "load"):
                    if state == "cold":
                        drop_from_cache(file)
                    results[action] = fresh(action, file)
                rows.append(results)
            seconds = {action: [row[action]["seconds"] for row in rows] for action in ("load", "read")}
            ratios = [a / b for a, b in zip(seconds["load"], seconds["read"], strict=True)]
            print(
                f"| {state} | {rows[0]['load']['parameters'] / GB:.2f} GB "
                f"| {max(row['load']['peak'] for row in rows) / GB:.2f} GB "
                f"| {spread(seconds['load'], ' s')} | {spread(seconds['read'], ' s')} | {spread(ratios)} |",
                flush=True,
            )


def spread(values: list[float], unit: str = "") -> str:
    return f"{np.median(values):.2f}{unit} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps({"read": read, "load": load}[sys.argv[1]](Path(sys.argv[2]))))
    else:
        main()
