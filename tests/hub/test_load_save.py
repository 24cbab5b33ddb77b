"""Weights in and out, and everything that can be wrong with a weights file."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.torch import load_file, save_file

from mlcm_jax.errors import UserError
from mlcm_jax.hub import save
from mlcm_jax.hub.load import find_weights, load_params
from mlcm_jax.hub.names import walk
from mlcm_jax.hub.pipeline import load_network, network_shapes
from mlcm_jax.hub.save import save_params
from mlcm_jax.models.vae import AutoencoderKL
from mlcm_jax.outputs import atomic_write

NAME = "diffusion_pytorch_model.safetensors"
TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture
def folder(vae_folder, tmp_path):
    """A copy of the tiny autoencoder that a test may spoil."""
    return shutil.copytree(vae_folder, tmp_path / "vae")


@pytest.fixture(scope="module")
def shapes(vae_folder):
    config = json.loads((vae_folder / "config.json").read_text())
    return network_shapes(AutoencoderKL.from_config(config), config)


def rewrite(folder, change, name=NAME):
    """Apply ``change`` to the tensors of the folder's file and write them under ``name``."""
    tensors = load_file(folder / NAME)
    (folder / NAME).unlink()
    changed = change(tensors)
    save_file(tensors if changed is None else changed, folder / name, {"format": "pt"})


def assert_same_files(a, b):
    a, b = load_file(a), load_file(b)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_round_trip_is_byte_equal(folder, tmp_path, dtype):
    rewrite(folder, lambda ts: {k: t.to(TORCH_DTYPES[dtype]) for k, t in ts.items()})
    network = load_network(folder, "AutoencoderKL")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(network.params)} == {dtype}
    save_params(network.params, network.config, tmp_path / "out", file_name=NAME)
    assert_same_files(folder / NAME, tmp_path / "out" / NAME)
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads((folder / "config.json").read_text())
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", NAME]


def test_dtypes_may_differ_within_a_file(folder, tmp_path, shapes):
    rewrite(folder, lambda ts: {k: t.half() if k.endswith("bias") else t for k, t in ts.items()})
    save_params(load_params(shapes, folder), {}, tmp_path, file_name=NAME)
    assert_same_files(folder / NAME, tmp_path / NAME)


def test_cast_on_load_and_on_save_rounds_as_torch(folder, tmp_path, shapes):
    params = load_params(shapes, folder, dtype=jnp.bfloat16)
    save_params(load_params(shapes, folder), {"torch_dtype": "float32"}, tmp_path, file_name=NAME, dtype=jnp.bfloat16)
    saved, original = load_file(tmp_path / NAME), load_file(folder / NAME)
    for path, leaf, (name,) in walk(params):
        assert leaf.dtype == jnp.bfloat16, path
        assert torch.equal(saved[name], original[name].bfloat16()), name
    assert_same_trees(params, load_params(shapes, tmp_path))
    assert json.loads((tmp_path / "config.json").read_text()) == {"torch_dtype": "bfloat16"}


def assert_same_trees(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_fp16_variant_shards_and_old_names(folder, shapes, tmp_path):
    params = load_params(shapes, folder)
    variant = shutil.copytree(folder, tmp_path / "variant")
    (variant / NAME).rename(variant / "diffusion_pytorch_model.fp16.safetensors")
    assert_same_trees(load_params(shapes, variant), params)

    old = shutil.copytree(folder, tmp_path / "old")
    spelling = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors):
        for ours, theirs in spelling.items():
            tensors = {k.replace(f".{ours}.", f".{theirs}."): t for k, t in tensors.items()}
        return tensors

    rewrite(old, rename)
    assert any(".query." in k for k in load_file(old / NAME))
    assert_same_trees(load_params(shapes, old), params)

    shards(folder)
    assert not (folder / NAME).exists()
    assert_same_trees(load_params(shapes, folder), params)


def shards(folder, edit=None):
    """Split the folder's file in two, with an index; ``edit`` may change the weight_map."""
    tensors = load_file(folder / NAME)
    weight_map = {}
    for i in range(2):
        file = f"diffusion_pytorch_model-{i + 1:05}-of-00002.safetensors"
        part = dict(list(tensors.items())[i::2])
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / NAME).unlink()
    if edit:
        edit(weight_map)
    (folder / f"{NAME}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_sharding(folder, shapes):
    mesh = Mesh(np.array(jax.devices()[:2]), ("fsdp",))
    one = NamedSharding(mesh, PartitionSpec())
    params = load_params(shapes, folder, shardings=one)
    assert all(leaf.sharding == one for leaf in jax.tree.leaves(params))
    split = NamedSharding(mesh, PartitionSpec(None, None, None, "fsdp"))
    tree = jax.tree.map(lambda s: split if s.ndim == 4 and s.shape[3] % 2 == 0 else one, shapes)
    halves = load_params(shapes, folder, shardings=tree)
    jax.tree.map(assert_sharded, halves, tree)
    assert halves["encoder"]["conv_in"]["kernel"].addressable_shards[1].data.shape == (3, 3, 3, 8)
    assert_same_trees(halves, params)
    assert_same_trees(params, load_params(shapes, folder))


def assert_sharded(leaf, sharding):
    assert leaf.sharding == sharding


def test_position_ids_are_ignored_and_only_they(folder, shapes):
    rewrite(folder, lambda ts: ts | {"text_model.embeddings.position_ids": torch.arange(77)})
    load_params(shapes, folder)
    rewrite(folder, lambda ts: ts | {"embeddings.position_idz": torch.arange(77.0)})
    with pytest.raises(UserError, match=r"1 tensors that the network does not have: embeddings\.position_idz"):
        load_params(shapes, folder)


def drop_six(tensors):
    for name in sorted(tensors)[:6]:
        del tensors[name]


SPOILT_TENSORS = {
    "missing": (drop_six, r"lacks 6 tensors of the network: decoder\.conv_in\.bias, .* and 1 more"),
    "misshapen": (
        lambda ts: ts | {"encoder.conv_in.weight": torch.zeros(3, 3, 3, 3)},
        r"encoder.conv_in.weight is \[3, 3, 3, 3\], not \[16, 3, 3, 3\]",
    ),
    "transposed": (
        lambda ts: ts | {"encoder.conv_in.weight": torch.zeros(3, 16, 3, 3)},
        "1 tensors have another shape",
    ),
    "integers": (lambda ts: ts | {"quant_conv.bias": torch.zeros(8, dtype=torch.int64)}, "quant_conv.bias is I64"),
    "double": (lambda ts: {k: t.double() for k, t in ts.items()}, "F64.*use F32, F16, BF16"),
}


@pytest.mark.parametrize("case", SPOILT_TENSORS)
def test_spoilt_tensors(folder, shapes, case):
    change, message = SPOILT_TENSORS[case]
    rewrite(folder, change)
    with pytest.raises(UserError, match=message) as e:
        load_params(shapes, folder)
    assert str(folder / NAME) in str(e.value)


def truncate(file, size):
    file.write_bytes(file.read_bytes()[:size])


def huge_header(file):
    file.write_bytes((2**60).to_bytes(8, "little") + file.read_bytes()[8:])


SPOILT_FILES = {
    "truncated": (lambda file: truncate(file, -5), "not a complete safetensors file"),
    "header only": (lambda file: truncate(file, 200), "not a complete safetensors file"),
    "empty": (lambda file: truncate(file, 0), "not a complete safetensors file"),
    "huge header": (huge_header, "not a complete safetensors file"),
    "a pickle under this name": (lambda file: torch.save({}, file), "not a complete safetensors file"),
    "a folder": (lambda file: (file.unlink(), file.mkdir()), "is not a file"),
    "gone": (lambda file: file.unlink(), "has no safetensors weights"),
    "only .bin": (lambda file: file.rename(file.with_suffix(".bin")), "only as a pickle .*never read"),
}


@pytest.mark.parametrize("case", SPOILT_FILES)
def test_spoilt_files(folder, shapes, case):
    spoil, message = SPOILT_FILES[case]
    spoil(folder / NAME)
    with pytest.raises(UserError, match=message) as e:
        load_params(shapes, folder)
    assert "\n" not in str(e.value)


OUTSIDE = ["../other.safetensors", "/etc/passwd", "a/b.safetensors", "..\\x.safetensors", ".."]


@pytest.mark.parametrize("target", OUTSIDE)
def test_an_index_may_not_leave_its_folder(folder, shapes, target):
    shutil.copy(folder / NAME, folder.parent / "other.safetensors")
    shards(folder, lambda m: m.update(dict.fromkeys(m, target)))
    with pytest.raises(UserError, match="not a safetensors file beside it"):
        load_params(shapes, folder)


def test_spoilt_index(folder, shapes):
    index = folder / f"{NAME}.index.json"
    shards(folder, lambda m: m.update({"no.such.tensor": next(iter(m.values()))}))
    with pytest.raises(UserError, match=r"names tensors that its files do not hold: no\.such\.tensor"):
        load_params(shapes, folder)
    next(folder.glob("*-of-*")).unlink()
    with pytest.raises(UserError, match="does not exist"):
        load_params(shapes, folder)
    for text, message in (("{", "not a readable JSON"), ("[]", "no JSON object"), ("{}", "no weight_map")):
        index.write_text(text)
        with pytest.raises(UserError, match=message):
            load_params(shapes, folder)


def test_full_precision_is_preferred(folder):
    shutil.copy(folder / NAME, folder / "diffusion_pytorch_model.fp16.safetensors")
    assert find_weights(folder).name == NAME


def test_a_failed_write_leaves_the_old_file(folder, shapes, monkeypatch):
    before = (folder / NAME).read_bytes()
    params = load_params(shapes, folder)
    calls = []

    def fail_late(array):
        calls.append(array)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return np.asarray(array) + 1

    monkeypatch.setattr(save, "host_array", fail_late)
    with pytest.raises(KeyboardInterrupt):
        save_params(params, {}, folder, file_name=NAME)
    assert (folder / NAME).read_bytes() == before
    assert sorted(os.listdir(folder)) == ["config.json", NAME]


def test_atomic_write_shows_the_file_only_when_complete(tmp_path):
    with atomic_write(tmp_path / "sub" / "a.json") as f:
        f.write(b"{}")
        assert not (tmp_path / "sub" / "a.json").exists()
    assert (tmp_path / "sub" / "a.json").read_bytes() == b"{}"


def test_unsupported_dtype_on_save(tmp_path):
    with pytest.raises(UserError, match=r"conv\.weight is int32"):
        save_params({"conv": {"kernel": jnp.zeros((2, 2), jnp.int32)}}, {}, tmp_path, file_name=NAME)
    assert os.listdir(tmp_path) == []


def test_stacked_layers(tmp_path):
    layers = [torch.randn(3, 5) for _ in range(12)]
    save_file({f"encoder.layers.{i}.fc1.weight": t for i, t in enumerate(layers)}, tmp_path / "model.safetensors")
    shapes = {"encoder": {"layers": {"fc1": {"kernel": jax.ShapeDtypeStruct((12, 5, 3), jnp.float32)}}}}
    kernel = load_params(shapes, tmp_path)["encoder"]["layers"]["fc1"]["kernel"]
    np.testing.assert_array_equal(kernel, np.stack([t.numpy().T for t in layers]))
    params = {"encoder": {"layers": {"fc1": {"kernel": kernel}}}}
    out = save_params(params, {}, tmp_path / "o", file_name="m.safetensors")
    assert_same_files(tmp_path / "model.safetensors", out)
    mixed = {f"encoder.layers.{i}.fc1.weight": t.half() if i else t for i, t in enumerate(layers)}
    save_file(mixed, tmp_path / "model.safetensors")
    kernel = load_params(shapes, tmp_path)["encoder"]["layers"]["fc1"]["kernel"]
    assert kernel.dtype == jnp.float32, "the smallest dtype that holds all of its layers"
    np.testing.assert_array_equal(kernel, np.stack([t.float().numpy().T for t in mixed.values()]))
    half = {f"encoder.layers.{i}.fc1.weight": t.half() if i else t.bfloat16() for i, t in enumerate(layers)}
    save_file(half, tmp_path / "model.safetensors")
    kernel = load_params(shapes, tmp_path)["encoder"]["layers"]["fc1"]["kernel"]
    np.testing.assert_array_equal(kernel, np.stack([t.float().numpy().T for t in half.values()]))
