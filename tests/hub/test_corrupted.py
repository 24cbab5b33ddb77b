"""Corrupted weights files: one sentence and exit status 2 from a program, and nothing is ever unpickled."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from one_sentence import assert_one_sentence
from safetensors.numpy import load_file, save_file

NAME = "diffusion_pytorch_model.safetensors"
BIAS = "conv_out.bias"


def change(file, **tensors):
    save_file(load_file(file) | {k.replace("__", "."): v for k, v in tensors.items()}, file, {"format": "pt"})


def index(file, where, *, names=None):
    """An index beside the file that says that its tensors are in ``where``."""
    weight_map = dict.fromkeys(names or load_file(file), where)
    file.with_name(f"{NAME}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def traverse(file):
    index(file, "../../outside.safetensors")
    file.rename(file.parents[2] / "outside.safetensors")


def absent_shard(file):
    index(file, "diffusion_pytorch_model-00001-of-00002.safetensors")
    file.unlink()


def false_index(file):
    index(file, "shard.safetensors", names=[*load_file(file), "no.such"])
    file.rename(file.with_name("shard.safetensors"))


class Bomb:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def pickled(file, name):
    file.unlink()
    file.with_name(name).write_bytes(pickle.dumps(Bomb(file.parents[2] / "unpickled")))


def claims(file, length=None, **entry):
    """A header that is longer than the file, or an entry in it that claims other bytes than its own."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header[BIAS] |= entry
    text = json.dumps(header).encode()
    file.write_bytes((length or len(text)).to_bytes(8, "little") + text + data[8 + size :])


CASES = {
    "truncated": (lambda f: f.write_bytes(f.read_bytes()[:-5]), ["not a complete safetensors file"]),
    "truncated header": (lambda f: f.write_bytes(f.read_bytes()[:100]), ["not a complete safetensors file"]),
    "empty": (lambda f: f.write_bytes(b""), ["not a complete safetensors file"]),
    "integers": (lambda f: change(f, conv_out__bias=np.zeros(4, np.int64)), [f"{BIAS} is I64"]),
    "doubles": (lambda f: change(f, conv_out__bias=np.zeros(4)), [f"{BIAS} is F64"]),
    "a NaN": (lambda f: change(f, conv_out__bias=np.array([0, np.nan, 0, 0], np.float32)), [BIAS, "no finite"]),
    "infinity": (lambda f: change(f, conv_out__bias=np.array([0, -np.inf, 0, 0], np.float16)), [BIAS, "no finite"]),
    "an extra key": (lambda f: change(f, conv_out__extra=np.zeros(4, np.float32)), ["does not have: conv_out.extra"]),
    "an index that leaves its folder": (traverse, ["../../outside.safetensors", "not a safetensors file beside it"]),
    "an index of absent shards": (absent_shard, ["-00001-of-00002.safetensors does not exist"]),
    "an index of absent tensors": (false_index, ["do not hold: no.such"]),
    "an index that is no JSON": (
        lambda f: f.rename(f.with_name(f"{NAME}.index.json")),
        ["not a readable JSON file"],
    ),
    "only a pickle": (lambda f: pickled(f, "diffusion_pytorch_model.bin"), ["only as a pickle", "never read"]),
    "a pickle by this name": (lambda f: pickled(f, NAME), ["not a complete safetensors file"]),
    "a header of 2 ** 60 bytes": (lambda f: claims(f, length=2**60), ["not a complete safetensors file"]),
    "an entry beyond the file": (lambda f: claims(f, data_offsets=[0, 2**50]), ["not a complete safetensors file"]),
    "an entry of a huge shape": (lambda f: claims(f, shape=[2**40]), ["not a complete safetensors file"]),
}


@pytest.mark.parametrize("case", CASES)
def test_corrupted_weights(launch, sdxl_folder, tmp_path, case):
    spoil, words = CASES[case]
    folder = tmp_path / "model"
    shutil.copytree(sdxl_folder, folder)
    spoil(folder / "unet" / NAME)
    result = launch("sample", f"--model={folder}", "--prompt=x", f"--out={tmp_path / 'x.png'}")
    assert_one_sentence(result, str(folder / "unet"), *words)
    assert not (tmp_path / "unpickled").exists() and not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("flag", ["model", "lora"])
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_a_pickle_as_a_single_file(launch, sdxl_folder, tmp_path, flag, suffix):
    file = tmp_path / f"model{suffix}"
    file.write_bytes(pickle.dumps(Bomb(tmp_path / "unpickled")))
    given = {"model": sdxl_folder, "prompt": "x", "out": tmp_path / "x.png"} | {flag: file}
    result = launch("sample", *(f"--{name}={value}" for name, value in given.items()))
    assert_one_sentence(result, str(file), {".ckpt": "pickle", ".safetensors": "not a complete safetensors"}[suffix])
    assert not (tmp_path / "unpickled").exists()
