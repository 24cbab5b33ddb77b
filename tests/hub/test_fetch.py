"""What is downloaded and read for a variant and a revision."""

import fnmatch
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlcm_jax.errors import UserError
from mlcm_jax.hub import fetch
from mlcm_jax.hub.lora import with_loras
from mlcm_jax.hub.lora_names import FILE_NAMES
from mlcm_jax.hub.pipeline import load_pipeline, save_pipeline
from mlcm_jax.hub.single_file import save_single_file

LORA = FILE_NAMES[0]
EMOJI = Path(__file__).resolve().parents[2] / "examples" / "emoji"

SETTINGS = ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json", "tokenizer/merges.txt"]
PLAIN = ["unet/diffusion_pytorch_model-00001-of-00002.safetensors", "vae/diffusion_pytorch_model.safetensors"]
HALF = [
    "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
    "vae/diffusion_pytorch_model.fp16.safetensors",
    "text_encoder/model-00001-of-00002.fp16.safetensors",
]
OTHERS = [
    "sd_xl_base_1.0.safetensors",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "vae_1_0/diffusion_pytorch_model.safetensors",
    "unet/openvino_model.xml",
    "safety_checker/model.safetensors",
    "text_encoder/flax_model.msgpack",
]


@pytest.mark.parametrize(
    ("variant", "weights", "wanted"), [(None, True, PLAIN), ("fp16", True, HALF), (None, False, [])]
)
def test_what_is_downloaded(monkeypatch, tmp_path, variant, weights, wanted):
    asked = {}

    def download(repository, *, revision, allow_patterns):
        asked.update(repository=repository, revision=revision)
        files = SETTINGS + PLAIN + HALF + OTHERS
        asked["files"] = [f for f in files if any(fnmatch.fnmatch(f, p) for p in allow_patterns)]
        return str(tmp_path)

    monkeypatch.setattr(fetch.huggingface_hub, "snapshot_download", download)
    assert fetch.resolve_folder("a/b", variant=variant, revision="v1", weights=weights) == tmp_path
    assert asked == {"repository": "a/b", "revision": "v1", "files": SETTINGS + wanted}


def test_a_variant_is_read_and_nothing_else(sd15_folder, tmp_path):
    folder = shutil.copytree(sd15_folder, tmp_path / "model")
    save_pipeline(load_pipeline(sd15_folder), tmp_path / "half", dtype=jnp.float16)
    with pytest.raises(UserError, match=r"of the variant fp16: expected .*fp16.safetensors or .*it has diffusion"):
        load_pipeline(folder, variant="fp16")
    for file in (tmp_path / "half").rglob("*.safetensors"):
        part = file.parent.name
        file.rename(folder / part / file.name.replace(".safetensors", ".fp16.safetensors"))
    dtypes = {
        variant: {leaf.dtype.name for n in pipeline.networks().values() for leaf in jax.tree.leaves(n.params)}
        for variant in (None, "fp16")
        if (pipeline := load_pipeline(folder, variant=variant))
    }
    assert dtypes == {None: {"float32"}, "fp16": {"float16"}}


def test_revisions_are_the_hubs(sd15_folder):
    with pytest.raises(UserError, match="has no revisions: leave out the revision v1"):
        load_pipeline(sd15_folder, revision="v1")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """hub(files): repositories that hold copies of these, by name; what was asked of it is returned as it grows."""

    def make(files):
        asked = []

        def download(repository, *, revision, allow_patterns):
            folder = tmp_path / "hub" / repository
            folder.mkdir(parents=True, exist_ok=True)
            for name, source in files.items():
                if any(fnmatch.fnmatch(name, p) for p in allow_patterns):
                    shutil.copyfile(source, folder / name)
            asked.append((repository, revision))
            return str(folder)

        monkeypatch.setattr(fetch.huggingface_hub, "snapshot_download", download)
        return asked

    return make


def test_a_single_file_of_the_hub(hub, sd15_folder, tmp_path):
    pipeline = load_pipeline(sd15_folder)
    params = {part: network.params for part, network in pipeline.networks().items()}
    save_single_file("StableDiffusionPipeline", params, tmp_path / "x.safetensors", scheduler_config={})
    asked = hub({"x.safetensors": tmp_path / "x.safetensors"})
    read = load_pipeline("owner/name/x.safetensors", architecture=sd15_folder, revision="v1")
    assert asked == [("owner/name", "v1")]
    jax.tree.map(np.testing.assert_array_equal, read.unet.params, pipeline.unet.params)
    with pytest.raises(UserError, match=r"owner/name has no file y\.safetensors on the hub"):
        load_pipeline("owner/name/y.safetensors", architecture=sd15_folder)


def test_a_lora_of_the_hub(hub, tmp_path):
    asked = hub({LORA: EMOJI / "student" / LORA, "scheduler_config.json": EMOJI / "student" / "scheduler_config.json"})
    teacher = load_pipeline(EMOJI / "teacher")
    here = with_loras(teacher, [str(EMOJI / "student")])
    for place in ("owner/name", f"owner/name/{LORA}"):
        there = with_loras(teacher, [f"{place}:1.0"])
        jax.tree.map(np.testing.assert_array_equal, there.unet.params, here.unet.params)
        assert (there.scheduler_config == here.scheduler_config) == (place == "owner/name"), "a file is weights alone"
    assert asked == [("owner/name", None)] * 3, "PEFT's settings are looked for beside a file"
    hub({})
    with pytest.raises(UserError, match=r"other/name has no pytorch_lora_weights\.safetensors or adapter.* on the hub"):
        with_loras(teacher, ["other/name"])
