"""Whole folders: byte-equal round trips, stock diffusers as the reader, and what can be wrong with a folder."""

import json
import shutil

import jax
import jax.numpy as jnp
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, TCDScheduler
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.torch import load_file

from mlcm_jax.errors import UserError
from mlcm_jax.hub import fetch
from mlcm_jax.hub.pipeline import load_pipeline, network_shapes, resolve_folder, save_pipeline

FOLDERS = {"sdxl_folder": StableDiffusionXLPipeline, "sd15_folder": StableDiffusionPipeline}


@pytest.fixture
def copy(sd15_folder, tmp_path):
    return shutil.copytree(sd15_folder, tmp_path / "model")


def canonical(tensors):
    """CLIPTextModel's names with the prefix that transformers 5 leaves out and every version reads."""
    bare = any(k.startswith("embeddings.") for k in tensors)
    return {f"text_model.{k}" if bare else k: t for k, t in tensors.items()}


@pytest.mark.parametrize("name", FOLDERS)
def test_round_trip(name, request, tmp_path):
    folder = request.getfixturevalue(name)
    pipeline = load_pipeline(folder)
    save_pipeline(pipeline, tmp_path / "out")
    files = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*") if p.is_file())
    for file in files:
        if file.suffix == ".safetensors":
            old, new = canonical(load_file(folder / file)), load_file(tmp_path / "out" / file)
            assert old.keys() == new.keys()
            assert all(torch.equal(old[k], new[k]) and old[k].dtype == new[k].dtype for k in old)
        elif file.suffix == ".json":
            assert json.loads((folder / file).read_text()) == json.loads((tmp_path / "out" / file).read_text())
    for a, b in zip(pipeline.text_encoders, load_pipeline(tmp_path / "out").text_encoders, strict=True):
        assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a.params, b.params))


@pytest.mark.parametrize("name", FOLDERS)
def test_stock_diffusers_samples_the_same_image_from_the_written_folder(name, request, tmp_path):
    folder = request.getfixturevalue(name)
    save_pipeline(load_pipeline(folder), tmp_path / "out")

    def sample(source):
        pipe = FOLDERS[name].from_pretrained(source, local_files_only=True)
        pipe.set_progress_bar_config(disable=True)
        options = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "pt"}
        return pipe("a cat", generator=torch.Generator().manual_seed(0), **options).images

    assert torch.equal(sample(folder), sample(tmp_path / "out"))


def test_export_dtype_and_scheduler(sd15_folder, tmp_path):
    scheduler = {**TCDScheduler(steps_offset=1).config, "_class_name": "TCDScheduler"}
    save_pipeline(load_pipeline(sd15_folder), tmp_path, dtype=jnp.float16, scheduler_config=scheduler)
    for file in tmp_path.rglob("*.safetensors"):
        assert {t.dtype for t in load_file(file).values()} == {torch.float16}
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path, local_files_only=True)
    assert isinstance(pipe.scheduler, TCDScheduler)
    assert json.loads((tmp_path / "text_encoder/config.json").read_text())["dtype"] == "float16"


def test_dtypes_and_shardings_reach_every_network(sd15_folder):
    sharding = NamedSharding(Mesh(jax.devices()[:1], ("data",)), PartitionSpec())
    seen = []

    def rule(name, shapes):
        seen.append(name)
        return jax.tree.map(lambda _: sharding, shapes)

    pipeline = load_pipeline(sd15_folder, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, shardings=rule)
    assert seen == ["unet", "vae", "text_encoder"] and list(pipeline.networks()) == seen
    # The autoencoder's force_upcast, True by default, keeps it in float32.
    for name, network in pipeline.networks().items():
        dtype = jnp.float32 if name == "vae" else jnp.bfloat16
        assert network.module.dtype == dtype
        assert all(p.dtype == dtype and p.sharding == sharding for p in jax.tree.leaves(network.params))


def test_network_shapes_are_the_loaded_ones(sdxl_folder):
    for network in load_pipeline(sdxl_folder).networks().values():
        shapes = network_shapes(network.module, network.config)
        assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, network.params)


def test_other_components_are_copied_or_marked_absent(copy, tmp_path):
    index = json.loads((copy / "model_index.json").read_text())
    index |= {"feature_extractor": ["transformers", "CLIPImageProcessor"], "safety_checker": ["stable_diffusion", "X"]}
    (copy / "model_index.json").write_text(json.dumps(index))
    (copy / "feature_extractor").mkdir()
    (copy / "feature_extractor" / "preprocessor_config.json").write_text("{}")
    save_pipeline(load_pipeline(copy), tmp_path / "out")
    written = json.loads((tmp_path / "out/model_index.json").read_text())
    assert written["feature_extractor"] == index["feature_extractor"] and written["safety_checker"] == [None, None]
    assert (tmp_path / "out/feature_extractor/preprocessor_config.json").read_text() == "{}"


def edit_index(folder, **entries):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | entries))


def edit_unet(folder, **entries):
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps(config | entries))


SPOILT = {
    "no index": (lambda f: (f / "model_index.json").unlink(), "has no model_index.json: name the folder"),
    "other pipeline": (lambda f: edit_index(f, _class_name="FluxPipeline"), "is a FluxPipeline, which is not"),
    "null part": (lambda f: edit_index(f, vae=[None, None]), "model_index.json has no vae"),
    "other class": (lambda f: edit_index(f, vae=["diffusers", "VQModel"]), "is a VQModel, which is not supported"),
    "no folder": (lambda f: shutil.rmtree(f / "text_encoder"), "text_encoder does not exist, though"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer does not exist, though"),
    "empty tokenizer": (lambda f: [p.unlink() for p in (f / "tokenizer").iterdir()], "holds no tokenizer: it needs"),
    "no config": (lambda f: (f / "unet/config.json").unlink(), "unet/config.json does not exist"),
    "spoilt tokenizer": (lambda f: [p.write_text("{") for p in (f / "tokenizer").iterdir()], "holds no readable CLIPT"),
    "no scheduler": (lambda f: (f / "scheduler/scheduler_config.json").unlink(), "_config.json does not exist"),
    "setting": (lambda f: edit_unet(f, class_embed_type="timestep"), "class_embed_type"),
    "wider": (lambda f: edit_unet(f, cross_attention_dim=48), "cross_attention_dim=48, and its text encoders"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_spoilt_folders(copy, case):
    spoil, message = SPOILT[case]
    spoil(copy)
    with pytest.raises(UserError, match=message) as e:
        load_pipeline(copy)
    assert "\n" not in str(e.value)


def test_paths(copy, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="is a file: name the folder"):
        resolve_folder(copy / "model_index.json")
    for wrong in ("/no/such/model", "./no/such", "no_such_model", "a/b/c"):
        with pytest.raises(UserError, match="does not exist"):
            resolve_folder(wrong)
    asked = []

    def download(repo, **kwargs):
        asked.append(repo)
        return str(copy)

    monkeypatch.setattr(fetch.huggingface_hub, "snapshot_download", download)
    assert resolve_folder("owner/name") == copy and asked == ["owner/name"]
    assert resolve_folder(copy) == copy and len(asked) == 1


def test_not_into_its_own_folder(copy, tmp_path):
    pipeline = load_pipeline(copy)
    with pytest.raises(UserError, match="choose another"):
        save_pipeline(pipeline, copy / "unet" / "..")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        save_pipeline(pipeline, tmp_path / "file")
