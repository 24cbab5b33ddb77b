"""A user's mistakes: each is one sentence on stderr and exit status 2, before any training begins."""

import importlib.util
import json
import shutil
import socket

import numpy as np
import pytest
from one_sentence import assert_one_sentence
from safetensors.numpy import load_file, save_file

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def files(tmp_path_factory, sdxl_folder):
    """Inputs with one thing wrong each, beside good ones."""
    folder = tmp_path_factory.mktemp("bad_input")
    (folder / "prompts.txt").write_text("red heart\n")
    (folder / "empty.txt").write_text("\n \n")
    (folder / "latin1.txt").write_bytes("h\xe9art\n".encode("latin-1"))
    (folder / "no_model").mkdir()
    (folder / "config_error.py").write_text(
        "from mlcm_jax.config import base\n\ndef get_config():\n    config = base()\n    config.bach_size = 1\n"
        "    return config\n"
    )
    np.save(folder / "three_channels.npy", np.zeros((1, 3, 16, 16), np.float32))
    np.save(folder / "two_images.npy", np.zeros((2, 32, 32, 3), np.uint8))
    (folder / "nine.txt").write_text("red heart\n" * 9)
    for name in ("missing_tensor", "wrong_shape", "wrong_activation"):
        shutil.copytree(sdxl_folder, folder / name)
    tensors = load_file(sdxl_folder / UNET_FILE)
    save_file({k: v for k, v in tensors.items() if k != "conv_in.weight"}, folder / "missing_tensor" / UNET_FILE)
    save_file(tensors | {"conv_in.weight": tensors["conv_in.weight"][:-1]}, folder / "wrong_shape" / UNET_FILE)
    config_file = folder / "wrong_activation" / "unet" / "config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"act_fn": "mish2"}))
    return folder


@pytest.fixture
def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


SAMPLE = {
    "a wrong path": (["--model={files}/nowhere"], ["{files}/nowhere does not exist"]),
    "a file": (["--model={files}/prompts.txt"], ["is a file"]),
    "no model": (["--model={files}/no_model"], ["has no model_index.json"]),
    "a missing tensor": (["--model={files}/missing_tensor"], ["conv_in.weight", "unet"]),
    "a wrong shape": (["--model={files}/wrong_shape"], ["conv_in.weight", "[31, 4, 3, 3]"]),
    "an unsupported setting": (["--model={files}/wrong_activation"], ["act_fn", "mish2"]),
    "no steps": (["--model={model}", "--steps=0"], ["num_steps=0"]),
    "steps that are no number": (["--model={model}", "--steps=four"], ["--steps=four"]),
    "latents of another model": (["--model={model}", "--latents={files}/three_channels.npy"], ["[1, 3, 16, 16]"]),
    "no text folder": (["--model={model}", "--text={files}/nowhere"], ["{files}/nowhere/text_encoder does not exist"]),
    "latents that are text": (["--model={model}", "--latents={files}/prompts.txt"], ["not a readable .npy"]),
    "an image size": (["--model={model}", "--image_size=31"], ["image_size=31"]),
    "a width": (["--model={model}", "--height=32", "--width=30"], ["height=32, width=30", "multiple of 4"]),
    "a height alone": (["--model={model}", "--height=32"], ["height=32 and width=0"]),
    "a square and both": (["--model={model}", "--image_size=32", "--height=32", "--width=16"], ["leave one out"]),
    "a seed below 0": (["--model={model}", "--seed=-1"], ["--seed=-1"]),
    "a seed of more than 64 bits": (["--model={model}", "--seed=18446744073709551616"], ["18446744073709551615"]),
}


@pytest.mark.parametrize("mistake", SAMPLE)
def test_sample(launch, files, sdxl_folder, tmp_path, mistake):
    args, words = SAMPLE[mistake]
    places = {"files": files, "model": sdxl_folder}
    args = [arg.format(**places) for arg in args]
    result = launch("sample", "--prompt=x", f"--out={tmp_path / 'x.png'}", *args)
    assert_one_sentence(result, *(word.format(**places) for word in words))
    assert not (tmp_path / "x.png").exists()


def test_sample_of_a_model_without_a_prompt(launch, sdxl_folder):
    assert_one_sentence(launch("sample", f"--model={sdxl_folder}"), "no prompt", "--prompt")


TRAIN = {
    "a misspelt setting": (["--config.num_stepz=3"], ["'num_stepz'", "did you mean 'num_steps'"]),
    "a misspelt inner setting": (["--config.optim.learning_rat=3"], ["'learning_rat'", "'learning_rate'"]),
    "an unheard-of setting": (["--config.zzz=3"], ["'zzz'"]),
    "a setting of no group": (["--config.lora.rank.x=3"], ["lora.rank.x"]),
    "a setting of another type": (["--config.num_steps=many"], ["num_steps=many"]),
    "no configuration file": (["--config=configs/nope.py"], ["--config=configs/nope.py is not"]),
    "a mistake in the configuration file": (["--config={files}/config_error.py"], ["'bach_size'", "'batch_size'"]),
    "a wrong variant": (["--config=configs/sdxl.py:small"], ["'small'", "full, lora"]),
    "a variant of what has none": (["--config=configs/emoji_lcm.py:lora"], ["no variants"]),
    "no teacher": (["--config.teacher={files}/nowhere"], ["{files}/nowhere does not exist"]),
    "a teacher that is no model": (["--config.teacher={files}/no_model"], ["has no model_index.json"]),
    "a teacher without a tensor": (["--config.teacher={files}/missing_tensor"], ["conv_in.weight"]),
    "an empty prompt file": (["--config.prompts={files}/empty.txt"], ["empty.txt is empty"]),
    "a prompt file that is not text": (["--config.prompts={files}/latin1.txt"], ["not UTF-8"]),
    "no prompt file": (["--config.sample.prompts={files}/nowhere.txt"], ["nowhere.txt does not exist"]),
    "a seed of more than 64 bits": (["--config.seed=18446744073709551616"], ["config.seed=18446744073709551616"]),
    "no segments": (["--config.num_segments=0"], ["num_segments=0", "1 to 100"]),
    "no prompts a step": (["--config.batch_size=0"], ["batch_size=0"]),
    "a batch that the mesh cannot share": (["--config.batch_size=6"], ["batch_size=6", "multiple of 4"]),
    "a mesh of other devices": (["--config.mesh.fsdp=3"], ["fsdp 3", "4 devices"]),
    "an image size": (["--config.image_size=33"], ["image_size=33", "multiple of 4"]),
    "a height": (["--config.height=33", "--config.width=32"], ["height=33, width=32", "multiple of 4"]),
    "an unknown distance": (["--config.distance=l3"], ["distance='l3'", "l2, pseudo_huber"]),
    "unknown states": (["--config.states=noise"], ["states='noise'", "streaming, mds, data, student"]),
    "data without latents": (["--config.states=data"], ["config.latents", "launch/encode.py"]),
    "latents that are not there": (["--config.latents={files}/nowhere"], ["{files}/nowhere does not exist"]),
    "an average that is not kept": (["--config.target_network=ema", "--config.ema_decay=0"], ["config.ema_decay"]),
    "a stage without a start": (["--config.stages=({{'num_segments':2}},)"], ["stage 2", "start"]),
    "a stage that cannot work": (["--config.stages=({{'start':2,'skip':0}},)"], ["config.skip=0"]),
    "a discriminator of trajectories": (["--config.adversarial.weight=1.0"], ["adversarial", "states='streaming'"]),
    "a LoRA without layers": (
        ["--config.trainable=lora", "--config.lora.targets=('nothing',)"],
        ["'nothing' matches no layer"],
    ),
    "a LoRA to start all weights from": (["--config.lora.start=examples/emoji/student"], ["trainable='lora'"]),
    "a LoRA of another rank": (
        ["--config=configs/emoji.py:lora", "--config.lora.start=examples/emoji/student", "--config.lora.rank=8"],
        ["examples/emoji/student", "config.lora.rank"],
    ),
    "a LoRA of another model": (
        ["--config.trainable=lora", "--config.lora.start=examples/emoji/student"],
        ["student/pytorch_lora_weights.safetensors is no LoRA for this model"],
    ),
    "a wrong variant of stages": (
        ["--config=configs/emoji_full.py:first"],
        ["'first'", "matching, trajectories, two_segments, across, reward, gpu"],
    ),
}


@pytest.mark.parametrize("mistake", TRAIN)
def test_train(launch, files, sdxl_folder, tmp_path, mistake):
    args, words = TRAIN[mistake]
    places = {"files": files, "model": sdxl_folder}
    good = {"teacher": sdxl_folder, "prompts": files / "prompts.txt", "sample.prompts": files / "prompts.txt"}
    args = [arg.format(**places) for arg in args]
    if not any(arg.startswith("--config=") for arg in args):
        given = [arg.partition("=")[0] for arg in args]
        defaults = [f"--config.{k}={v}" for k, v in good.items() if f"--config.{k}" not in given]
        args = ["--config=configs/emoji.py", *defaults, *args]
    result = launch("train", f"--workdir={tmp_path / 'run'}", *args)
    assert_one_sentence(result, *(word.format(**places) for word in words))
    assert not (tmp_path / "run" / "checkpoints").exists()


EXPORT = {
    "no run": (["--workdir={files}"], ["holds no run"]),
    "an unknown format": (["--workdir={files}", "--format=onnx"], ["onnx", "diffusers"]),
}


@pytest.mark.parametrize("mistake", EXPORT)
def test_export(launch, files, tmp_path, mistake):
    args, words = EXPORT[mistake]
    result = launch("export", f"--out={tmp_path / 'out'}", *(arg.format(files=files) for arg in args))
    assert_one_sentence(result, *words)
    assert not (tmp_path / "out").exists()


ENCODE = {
    "neither images nor prompts": ([], ["--images", "--prompts"]),
    "no images": (["--images={files}/nowhere"], ["nowhere does not exist"]),
    "no prompts": (["--prompts={files}/empty.txt"], ["empty.txt is empty"]),
    "a seed below 0": (["--seed=-1"], ["--seed=-1"]),
}


@pytest.mark.parametrize("mistake", ENCODE)
def test_encode(launch, files, sdxl_folder, tmp_path, mistake):
    args, words = ENCODE[mistake]
    args = [f"--model={sdxl_folder}", *(arg.format(files=files) for arg in args)]
    assert_one_sentence(launch("encode", f"--out={tmp_path / 'out'}", *args), *words)
    assert not (tmp_path / "out").exists()


EVALUATE = {
    "no model": (["--model={files}/no_model"], ["has no model_index.json"]),
    "no baseline": (["--baseline={files}/nowhere"], ["{files}/nowhere does not exist"]),
    "a baseline of other images": (
        ["--baseline=examples/emoji/teacher"],
        ["images of 32 x 32 px", "images of 64 x 64 px"],
    ),
    "too many images": (["--num_images=10"], ["--num_images=10 is more than the 9 prompts"]),
    "too few images": (["--num_images=3"], ["--num_images=3"]),
    "steps that are no number": (["--steps=1,x"], ["--steps=1,x is no list of whole numbers"]),
    "a seed below 0": (["--seed=-1"], ["--seed=-1"]),
    "no steps": (["--steps=0"], ["num_steps=0 is not possible"]),
    "no scorer": (["--scorer={files}/nowhere"], ["{files}/nowhere"]),
    "an unknown scorer": (["--scorers=beauty=x"], ["--scorers has the entry 'beauty=x'", "clip"]),
    "features of nothing": (["--features=clip"], ["--features has the entry 'clip'", "NAME=PLACE"]),
    "no real images": (["--data={files}/no_model"], ["no_model holds no images"]),
    "latents as images": (["--data={files}/three_channels.npy"], ["float32 [1, 3, 16, 16]", "uint8"]),
    "too few real images": (["--data={files}/two_images.npy"], ["has 2 images: give 4 or more"]),
    "images of fewer prompts": (
        ["--data={files}/two_images.npy", "--data_matches_prompts"],
        ["has 2 images: give 9 or more"],
    ),
    "a file to write to": (["--out={files}/nine.txt"], ["nine.txt is a file: name a folder"]),
}


@pytest.mark.parametrize("mistake", EVALUATE)
def test_evaluate(launch, files, sdxl_folder, tmp_path, mistake):
    args, words = EVALUATE[mistake]
    good = [f"--model={sdxl_folder}", f"--prompts={files / 'nine.txt'}", "--num_images=9", f"--out={tmp_path / 'out'}"]
    result = launch("evaluate", *good, *(arg.format(files=files) for arg in args))
    assert_one_sentence(result, *(word.format(files=files) for word in words))
    assert not (tmp_path / "out").exists()


DEMO = {
    "a wrong path": (["--model={files}/nowhere"], ["{files}/nowhere does not exist"]),
    "no model": (["--model={files}/no_model"], ["has no model_index.json"]),
    "an unsupported setting": (["--model={files}/wrong_activation"], ["act_fn", "mish2"]),
    "a port that is no number": (["--port=http"], ["--port=http"]),
    "no port": (["--port=0"], ["--port=0"]),
    "too large a port": (["--port=65536"], ["--port=65536"]),
    "no teacher": (["--model={model}", "--teacher={files}/nowhere"], ["{files}/nowhere does not exist"]),
    "a teacher of other images": (
        ["--model={model}", "--teacher=examples/emoji/teacher"],
        ["images of 32 x 32 px", "images of 64 x 64 px"],
    ),
    "no steps of the teacher": (["--model={model}", "--teacher={model}", "--teacher_steps=0"], ["num_steps=0"]),
    "a LoRA's scale": (["--lora=x:strong"], ["'strong', which is no scale"]),
    "no ControlNet": (
        ["--model={model}", "--controlnet={files}/nowhere"],
        ["{files}/nowhere/config.json does not exist"],
    ),
    "no guidance scale": (["--guidance_scale=nan"], ["--guidance_scale=nan"]),
}


@pytest.mark.parametrize("mistake", DEMO)
def test_demo(launch, files, sdxl_folder, free_port, mistake):
    args, words = DEMO[mistake]
    places = {"files": files, "model": sdxl_folder}
    result = launch("demo", f"--port={free_port}", *(arg.format(**places) for arg in args))
    assert_one_sentence(result, *(word.format(**places) for word in words))


def test_demo_at_a_port_that_is_in_use(launch, free_port):
    with socket.create_server(("127.0.0.1", free_port)):
        assert_one_sentence(
            launch("demo", "--model=/no/such/model", f"--port={free_port}"), f"--port={free_port}", "in use"
        )


@pytest.mark.skipif(importlib.util.find_spec("gradio") is not None, reason="gradio is installed")
def test_demo_without_gradio(launch, sdxl_folder, free_port):
    assert_one_sentence(launch("demo", f"--model={sdxl_folder}", f"--port={free_port}"), "gradio", "make demo")


@pytest.mark.parametrize("topology", ["v9:2x2", "v5e:2xx", "v5e"])
def test_compile_for_a_slice_that_does_not_exist(launch, files, sdxl_folder, topology):
    args = [f"--config.teacher={sdxl_folder}", f"--config.prompts={files / 'prompts.txt'}"]
    assert_one_sentence(launch("compile", "--config=configs/emoji.py", *args, f"--topology={topology}"), topology)
