"""What is downloaded and read for a variant and a revision."""

import fnmatch
import shutil

import jax
import jax.numpy as jnp
import pytest

from mlcm_jax.errors import UserError
from mlcm_jax.hub import fetch
from mlcm_jax.hub.pipeline import load_pipeline, save_pipeline

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
