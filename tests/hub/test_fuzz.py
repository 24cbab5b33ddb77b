"""Mutated files: each is one sentence, or a right result; never another exception, a hang or much memory.

The slow tests draw as many as a campaign does, the quick ones a few of the same; what was found stays as examples.
"""

import json
import struct
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save
from small_settings import NETWORK_TABLES, build_network, build_scheduler
from tiny_models import tiny_tokenizer

from mlcm_jax.diffusion.scheduler_config import SCHEDULERS
from mlcm_jax.errors import UserError
from mlcm_jax.hub.adapter_config import METADATA_KEY
from mlcm_jax.hub.load import load_params
from mlcm_jax.hub.lora import save_lora
from mlcm_jax.hub.lora_reader import load_lora
from mlcm_jax.hub.model_index import read_model_index
from mlcm_jax.hub.tensor_reader import read_json
from mlcm_jax.hub.tokenizer import load_tokenizer
from mlcm_jax.models import lora
from mlcm_jax.sampling.conditioning import tokenize


def shape_of(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


SHAPES = {
    "conv": {
        "kernel": jax.ShapeDtypeStruct((3, 3, 2, 4), jnp.float32),
        "bias": jax.ShapeDtypeStruct((4,), jnp.float32),
    },
    "norm": {"scale": jax.ShapeDtypeStruct((4,), jnp.float32)},
}
TENSORS = {
    "conv.weight": np.arange(72, dtype=np.float32).reshape(4, 2, 3, 3),
    "conv.bias": np.ones(4, np.float16),
    "norm.weight": np.ones(4, np.float32),
}
CAMPAIGN = settings(max_examples=1000, suppress_health_check=list(HealthCheck), derandomize=False)
QUICK = settings(max_examples=40, suppress_health_check=list(HealthCheck))
MOST_MEMORY = 2_000_000  # bytes, for files of a few hundred

NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([-1, 0, 1, 2, 8, 2**31, 2**63, 2**64, 10**30]))
CODES = st.sampled_from(["F32", "F64", "I64", "U8", "BF16"])
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=8), CODES)


def nested(values):
    return st.lists(values, max_size=4) | st.dictionaries(st.text(max_size=4), values, max_size=3)


VALUES = st.recursive(LEAVES, nested, max_leaves=6)


def one_sentence(error):
    text = str(error)
    assert text and "\n" not in text and len(text) < 450, text  # of which a folder of tests is a part


def read_within_bounds(read):
    """The result of ``read``, None where it answered with a sentence."""
    tracemalloc.start()
    try:
        return read()
    except UserError as e:
        one_sentence(e)
        return None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MOST_MEMORY


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


@st.composite
def json_files(draw):
    """model_index.json, an index of shards or PEFT's adapter_config.json, changed."""
    kind = draw(st.sampled_from(sorted(JSON_FILES)))
    config = dict(JSON_FILES[kind][0])
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.one_of(st.sampled_from(sorted(config) or ["x"]), st.text(max_size=6)))
        inner = config.get(key)
        if isinstance(inner, dict) and draw(st.booleans()):
            inner = inner | {
                draw(st.one_of(st.sampled_from(sorted(inner) or ["x"]), st.text(max_size=4))): draw(VALUES)
            }
        else:
            inner = draw(VALUES)
        config[key] = inner
    text = draw(st.sampled_from([json.dumps(config), json.dumps(config)[:-1], json.dumps([config]), "\ufeff{}", ""]))
    return kind, text.encode()


def read_index(folder):
    read_model_index(folder, with_tokenizers=False)


def read_shards(folder):
    load_params(SHAPES, folder)


def read_adapter(folder):
    tree = load_lora(folder / "peft", {"to_q": {"kernel": shape_of(4, 4)}}, dtype=np.float32)
    assert np.isfinite(tree["to_q"]["up"]).all()


SHARD = "model-00001-of-00001.safetensors"
PARTS = {part: ["diffusers", "UNet2DConditionModel"] for part in ("unet", "vae", "text_encoder", "scheduler")}
JSON_FILES = {
    "model_index.json": (
        {"_class_name": "StableDiffusionPipeline", "tokenizer": ["transformers", "CLIPTokenizer"], **PARTS},
        read_index,
    ),
    "model.safetensors.index.json": ({"metadata": {}, "weight_map": dict.fromkeys(TENSORS, SHARD)}, read_shards),
    "peft/adapter_config.json": (
        {
            "peft_type": "LORA",
            "r": 2,
            "lora_alpha": 8,
            "alpha_pattern": {"to_q": 4},
            "use_rslora": False,
            "bias": "none",
        },
        read_adapter,
    ),
}


@pytest.fixture(scope="module")
def json_folder(tmp_path_factory):
    """What the JSON files are about."""
    folder = tmp_path_factory.mktemp("json")
    for part in PARTS:
        (folder / part).mkdir()
    (folder / SHARD).write_bytes(save(TENSORS))
    (folder / "peft").mkdir()
    factors = {f"base_model.model.to_q.lora_{f}.weight": np.ones((2, 4) if f == "A" else (4, 2), "f4") for f in "AB"}
    (folder / "peft" / "adapter_model.safetensors").write_bytes(save(factors))
    return folder


def check_json(folder, kind, text):
    (folder / kind).write_bytes(text)
    read_within_bounds(lambda: JSON_FILES[kind][1](folder))


@given(case=json_files())
@QUICK
@example(case=("model_index.json", b'{"_class_name": ["pipeline", "Mine"]}'))
@example(case=("model_index.json", b'{"_class_name": {}}'))
def test_json_files(json_folder, case):
    check_json(json_folder, *case)


@pytest.mark.slow
@given(case=json_files())
@CAMPAIGN
def test_json_files_campaign(json_folder, case):
    check_json(json_folder, *case)


@pytest.fixture(scope="module")
def tokenizer_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(folder / "vocabulary").save_pretrained(folder)
    return folder, {
        name: json.loads((folder / name).read_text()) for name in ("tokenizer.json", "tokenizer_config.json")
    }


def changed(draw, value, depth):
    """The value with one of its parts, down to a depth, replaced."""
    if not isinstance(value, dict | list) or not value or depth == 0:
        return draw(VALUES)
    key = draw(st.sampled_from(sorted(value)[:40] if isinstance(value, dict) else range(len(value))))
    inner = changed(draw, value[key], depth - 1)
    return value | {key: inner} if isinstance(value, dict) else [*value[:key], inner, *value[key + 1 :]]


def check_tokenizer(files, draw):
    folder, contents = files
    name = draw(st.sampled_from(sorted(contents)))
    (folder / name).write_text(json.dumps(changed(draw, contents[name], draw(st.integers(1, 3)))))
    try:
        tokenizer = load_tokenizer(folder, "CLIPTokenizer")
        if tokenizer.model_max_length <= 77:  # others do not fit a text encoder, which is said where both are known
            assert len({len(row) for row in tokenize(tokenizer, ["a cat", ""])}) == 1
    except UserError as e:
        one_sentence(e)
    finally:
        (folder / name).write_text(json.dumps(contents[name]))


@given(data=st.data())
@QUICK
def test_tokenizers(tokenizer_files, data):
    check_tokenizer(tokenizer_files, data.draw)


@pytest.mark.slow
@given(data=st.data())
@CAMPAIGN
def test_tokenizers_campaign(tokenizer_files, data):
    check_tokenizer(tokenizer_files, data.draw)


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
