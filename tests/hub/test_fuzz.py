"""Mutated files: each is one sentence, or a right result; never another exception, a hang or much memory.

The slow tests draw as many as a campaign does, the quick ones a few of the same; what was found stays as examples.
"""

import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fuzzing import CAMPAIGN, QUICK, SHAPES, TENSORS, VALUES, one_sentence, read_within_bounds, shape_of
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save
from small_settings import NETWORK_TABLES, build_network, build_scheduler

from mlcm_jax.diffusion.scheduler_config import SCHEDULERS
from mlcm_jax.errors import UserError
from mlcm_jax.hub.adapter_config import METADATA_KEY
from mlcm_jax.hub.load import load_params
from mlcm_jax.hub.lora import save_lora
from mlcm_jax.hub.lora_reader import load_lora
from mlcm_jax.hub.tensor_reader import read_json
from mlcm_jax.models import lora


@st.composite
def safetensors_files(draw):
    """A safetensors file with some of its header's values, names or bytes changed."""
    data = save(TENSORS)
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(sorted(header) or ["conv.weight"]))
        kind = draw(st.sampled_from(["value", "name", "drop", "entry", "copy"]))
        if kind == "drop":
            header.pop(name, None)
        elif kind == "name":
            header[draw(st.text(max_size=300))] = header.pop(name, {})
        elif kind == "copy":
            header[name] = header.get(draw(st.sampled_from(sorted(TENSORS))), {})
        elif kind == "entry" or not isinstance(header.get(name), dict):
            header[name] = draw(VALUES)
        else:
            header[name] = header[name] | {draw(st.sampled_from(["dtype", "shape", "data_offsets"])): draw(VALUES)}
    text = json.dumps(header).encode()
    length = draw(st.one_of(st.just(len(text)), st.integers(0, 2**64 - 1)))
    data = bytearray(struct.pack("<Q", length) + text + body)
    for _ in range(draw(st.sampled_from([0, 0, 1, 5]))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.one_of(st.just(len(data)), st.integers(0, len(data))))])


def check_safetensors(folder, data):
    file = folder / "x.safetensors"
    file.write_bytes(data)
    params = read_within_bounds(lambda: load_params(SHAPES, file))
    if params is None:
        return
    tensors = load(data)
    assert {name: t.shape for name, t in tensors.items()} == {name: t.shape for name, t in TENSORS.items()}
    np.testing.assert_array_equal(params["conv"]["kernel"], tensors["conv.weight"].transpose(2, 3, 1, 0))
    assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(params))


@st.composite
def configs(draw):
    """A class and its settings, some of which are changed, left out, new or nested."""
    name = draw(st.sampled_from([*NETWORK_TABLES, *SCHEDULERS]))
    config, table = NETWORK_TABLES.get(name) or ({"skip_prk_steps": True} if "PNDM" in name else {}, SCHEDULERS[name])
    config = dict(config)
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.one_of(st.sampled_from(sorted(table)), st.text(max_size=6)))
        if draw(st.booleans()) and key in config:
            del config[key]
        else:
            config[key] = draw(VALUES)
    text = bytearray(json.dumps(config).encode())
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 3]))):
        text[draw(st.integers(0, len(text) - 1))] = draw(st.integers(0, 255))
    return name, bytes(text)


def check_config(folder, name, text):
    file = folder / "config.json"
    file.write_bytes(text)

    def read():
        config = read_json(file)
        (build_network if name in NETWORK_TABLES else build_scheduler)(folder, name, config)

    try:
        read()
    except UserError as e:
        one_sentence(e)


@pytest.fixture(scope="module")
def lora_file(tmp_path_factory):
    """A LoRA of two layers in both namings, and the shapes of their kernels."""
    shapes = {"to_q": {"kernel": shape_of(4, 4)}, "conv1": {"kernel": shape_of(3, 3, 4, 4)}}
    tree = lora.init(jax.random.key(0), shapes, 2, ["."])
    file = save_lora(jax.tree.map(jnp.ones_like, tree), tmp_path_factory.mktemp("lora"))
    peft = load(file.read_bytes())
    spelt = {"unet.": "lora_unet_", ".lora_A.": ".lora_down.", ".lora_B.": ".lora_up."}
    kohya = {}
    for name, tensor in peft.items():
        for ours, theirs in spelt.items():
            name = name.replace(ours, theirs)
        kohya[name] = tensor
    kohya |= {f"lora_unet_{module}.alpha": np.float32(1) for module in ("to_q", "conv1")}
    return shapes, [peft, {k: np.asarray(v) for k, v in kohya.items()}]


def mutated_lora(draw, tensors):
    tensors = dict(tensors)
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(sorted(tensors) or ["x"]))
        kind = draw(st.sampled_from(["drop", "name", "shape", "dtype", "value", "flat"]))
        tensor = tensors.pop(name, np.zeros(1, np.float32))
        if kind == "name":
            tensors[draw(st.text(min_size=1, max_size=300))] = tensor
        elif kind == "shape":
            tensors[name] = np.ones(draw(st.lists(st.integers(0, 5), max_size=5)), np.float32)
        elif kind == "dtype":
            tensors[name] = tensor.astype(draw(st.sampled_from(["float16", "float64", "int64", "uint8", "bool"])))
        elif kind == "value":
            tensors[name] = np.full_like(tensor, draw(st.sampled_from([np.nan, np.inf, 3e38, 0, -1])))
        elif kind == "flat":
            tensors[name] = tensor.reshape(-1)
    keys = st.sampled_from(["unet.lora_alpha", "unet.alpha_pattern", "unet.use_rslora", "unet.x"])
    adapter = draw(st.dictionaries(keys, VALUES))
    text = draw(st.sampled_from([None, json.dumps(adapter), "[", "[]", "[" * 5000]))
    return save(tensors, None if text is None else {METADATA_KEY: text})


def check_lora(folder, shapes, data):
    file = folder / "x.safetensors"
    file.write_bytes(data)
    tree = read_within_bounds(lambda: load_lora(file, shapes, dtype=np.float32))
    for module, factors in (tree or {}).items():
        kernel = shapes[module]["kernel"].shape
        delta = jnp.matmul(factors["down"], factors["up"])
        assert delta.shape == kernel and np.isfinite(delta).all()


@given(data=safetensors_files())
@QUICK
def test_safetensors(tmp_path_factory, data):
    check_safetensors(tmp_path_factory.getbasetemp(), data)


@given(case=configs())
@QUICK
@example(case=("CLIPTextModel", b"[" * 100_000))
def test_configs(tmp_path_factory, case):
    check_config(tmp_path_factory.getbasetemp(), *case)


@given(data=st.data())
@QUICK
def test_loras(tmp_path_factory, lora_file, data):
    shapes, kinds = lora_file
    check_lora(tmp_path_factory.getbasetemp(), shapes, mutated_lora(data.draw, data.draw(st.sampled_from(kinds))))


@pytest.mark.slow
@given(data=safetensors_files())
@CAMPAIGN
def test_safetensors_campaign(tmp_path_factory, data):
    check_safetensors(tmp_path_factory.getbasetemp(), data)


@pytest.mark.slow
@given(case=configs())
@CAMPAIGN
def test_configs_campaign(tmp_path_factory, case):
    check_config(tmp_path_factory.getbasetemp(), *case)


@pytest.mark.slow
@given(data=st.data())
@settings(CAMPAIGN, max_examples=200)
def test_loras_campaign(tmp_path_factory, lora_file, data):
    shapes, kinds = lora_file
    check_lora(tmp_path_factory.getbasetemp(), shapes, mutated_lora(data.draw, data.draw(st.sampled_from(kinds))))
