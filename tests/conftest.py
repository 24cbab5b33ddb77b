"""What all tests share: the default backend, run-time shape checks and strict array arithmetic."""

import atexit
import dataclasses
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from asked_devices import wants_gpu

if not wants_gpu(sys.argv):  # before jax is imported
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"  # for meshes
# The older emitters of fused loops compile the toy networks' programs in a third less time, whole UNets in a tenth
# less and a training step in half, for programs that tests start, too. XLA ends a process that has a flag which it does
# not know, so versions that nobody tried go without it.
if version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# One cache of compiled programs for this session: its workers and the programs that they start inherit the variables.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="mlcm_jax_xla_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing that a test reads is elsewhere
# What is tested is computed once or twice: quick compiling counts. Read when jax is imported, by programs, too.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.pop("PYTHONPATH", None)  # for programs that tests start: the install alone has to find what they import

import hypothesis
import jax
import pytest
from jaxtyping import install_import_hook

# Shapes and dtypes in the signatures of these packages are checked at each call (at trace time under jit).
CHECKED = ("segments", "trajectory", "states", "targets", "distances", "losses")
install_import_hook(("mlcm_jax.diffusion", *(f"mlcm_jax.distillation.{m}" for m in CHECKED)), "beartype.beartype")

hypothesis.settings.register_profile("tests", deadline=None, max_examples=50, derandomize=True)
hypothesis.settings.load_profile("tests")


UNET = {
    "_class_name": "UNet2DConditionModel",
    "block_out_channels": [64],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["UpBlock2D"],
    "attention_head_dim": [4],
    "norm_num_groups": 8,
    "sample_size": 8,
    "use_linear_projection": True,
    "transformer_layers_per_block": [1],
    "cross_attention_dim": 64,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
}


def pytest_collection_finish():
    """What is imported by now stays, and tracing makes little garbage: to look for it took a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture
def strict_arrays():
    """No silent broadcasting across ranks, no silent promotion between dtypes."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="module")
def quick_programs():
    """For tests whose programs run for longer than they compile."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


# tiny_models imports torch and diffusers, which most tests do without: only a test that asks for a folder waits.


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory):
    from tiny_models import save_sdxl

    return save_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="session")
def smallest_folder(tmp_path_factory):
    """The SDXL whose steps compile soonest, for whole runs; its predictions have the size of the noise."""
    from tiny_models import SMALLEST_XL, save_sdxl

    return save_sdxl(tmp_path_factory.mktemp("smallest"), SMALLEST_XL, gain=10.0)


@pytest.fixture(scope="session")
def sd15_folder(tmp_path_factory):
    from tiny_models import save_sd15

    return save_sd15(tmp_path_factory.mktemp("sd15"))


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory):
    from tiny_models import save_vae

    return save_vae(tmp_path_factory.mktemp("vae"))


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def launch(sdxl_folder):
    """launch(program, *args) -> {"status", "stdout", "stderr"} of a process of its own."""
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    env["XLA_FLAGS"] += " --xla_force_host_platform_device_count=4"  # the last one counts
    command = [sys.executable, "tests/launch_server.py"]
    server = subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdin and server.stdout

    def run(*argv):
        server.stdin.write(json.dumps([str(a) for a in argv]) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())

    run("preload", sdxl_folder)  # the model of most runs
    yield run
    server.stdin.close()
    assert server.wait(timeout=300) == 0


@pytest.fixture(scope="session")
def efficientnet_folder(launch, tmp_path_factory):
    """EfficientNet-Lite2's published weights, converted."""
    folder = tmp_path_factory.mktemp("efficientnet")
    result = launch("convert_efficientnet", f"--out={folder}")
    assert result["status"] == 0, result["stderr"]
    return folder


@pytest.fixture(scope="module")
def architecture(sdxl_folder):
    """The tiny pipeline around a UNet of one level with attention on its way down, in shapes only."""
    from mlcm_jax.hub.pipeline import Network, network_shapes, read_architecture
    from mlcm_jax.models.unet import UNet2DConditionModel

    module = UNet2DConditionModel.from_config(UNET)
    return dataclasses.replace(read_architecture(sdxl_folder), unet=Network(module, network_shapes(module, UNET), UNET))
