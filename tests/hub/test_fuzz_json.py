"""Mutated JSON files and tokenizers: as tests/hub/test_fuzz.py says."""

import json

import numpy as np
import pytest
from fuzzing import CAMPAIGN, QUICK, SHAPES, TENSORS, VALUES, one_sentence, read_within_bounds, shape_of
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.numpy import save
from tiny_models import tiny_tokenizer

from mlcm_jax.errors import UserError
from mlcm_jax.hub.load import load_params
from mlcm_jax.hub.lora_reader import load_lora
from mlcm_jax.hub.model_index import read_model_index
from mlcm_jax.hub.tokenizer import load_tokenizer
from mlcm_jax.sampling.conditioning import tokenize


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
