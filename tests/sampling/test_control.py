"""Sampling with ControlNets: the same images as diffusers' pipelines, and mistakes in one sentence."""

import json
import re
import shutil

import numpy as np
import pytest
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
)
from one_sentence import assert_one_sentence
from PIL import Image
from torch_weights import assert_close, channels_first, channels_last, randomise

from mlcm_jax import load_pipeline
from mlcm_jax.errors import UserError
from mlcm_jax.hub.controlnet import load_controlnet
from mlcm_jax.sampling.control import Control
from mlcm_jax.sampling.side_by_side import Request, SideBySide, TimedSampler

PROMPT = "red heart"
CASES = {
    "sdxl": ("sdxl_folder", StableDiffusionXLPipeline, StableDiffusionXLControlNetPipeline, (1, 2)),
    "sd15": ("sd15_folder", StableDiffusionPipeline, StableDiffusionControlNetPipeline, (1,)),
}


def drawing(seed, size=(40, 24)):
    """An image of edges, smaller and of another shape than the samples."""
    pixels = np.random.default_rng(seed).integers(0, 2, (size[1], size[0], 3)) * 255
    return Image.fromarray(pixels.astype(np.uint8))


def save_controlnet(unet, folder, seed=1):
    """A ControlNet for diffusers' UNet; the tiny pipelines have 2 pixels along a latent."""
    made = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8))
    model = randomise(made, seed)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """(diffusers' pipeline, ours, folders of ControlNets)."""
    name, plain, controlled, seeds = CASES[request.param]
    folder, root = request.getfixturevalue(name), tmp_path_factory.mktemp(request.param)
    pipe = plain.from_pretrained(folder, local_files_only=True)
    models = [save_controlnet(pipe.unet, root / str(seed), seed) for seed in seeds]
    options = {"safety_checker": None, "feature_extractor": None} if plain is StableDiffusionPipeline else {}
    components = {k: v for k, v in pipe.components.items() if k != "image_encoder"} | options
    reference = controlled(**components, controlnet=models if len(models) > 1 else models[0])
    reference.set_progress_bar_config(disable=True)
    return reference, load_pipeline(folder), [root / str(seed) for seed in seeds]


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_samples_are_diffusers(case, guidance_scale):
    reference, ours, folders = case
    images, scales = [drawing(i) for i in range(len(folders))], [0.7, 1.3][: len(folders)]
    noise = np.random.default_rng(0).standard_normal((2, 16, 16, 4), np.float32)
    one = len(folders) == 1
    theirs = reference(
        [PROMPT, "a cat"],
        image=images[0] if one else images,
        latents=channels_first(noise),
        controlnet_conditioning_scale=scales[0] if one else scales,
        guidance_scale=guidance_scale,
        num_inference_steps=2,
        height=32,
        width=32,
        output_type="latent",
    ).images
    networks = [load_controlnet(folder, ours.pipeline) for folder in folders]
    controls = [Control(*each) for each in zip(networks, images, scales, strict=True)]
    settings = {"latents": noise, "num_steps": 2, "guidance_scale": guidance_scale}
    found = ours.sample([PROMPT, "a cat"], **settings, controls=controls)
    assert_close(found, channels_last(theirs))
    off = ours.sample([PROMPT, "a cat"], **settings, controls=[c._replace(scale=0.0) for c in controls])
    assert np.abs(found - off).max() > 1e-2 * np.abs(off).max(), "it changes the image"


@pytest.fixture(scope="module")
def place(sdxl_folder, tmp_path_factory):
    """A folder with a ControlNet for the tiny SDXL and an image."""
    folder = tmp_path_factory.mktemp("control")
    save_controlnet(StableDiffusionXLPipeline.from_pretrained(sdxl_folder).unet, folder / "net")
    drawing(0).save(folder / "edges.png")
    return folder


@pytest.fixture(scope="module")
def pipeline(sdxl_folder):
    return load_pipeline(sdxl_folder)


def test_the_program_draws_what_the_function_does(launch, sdxl_folder, pipeline, place, tmp_path):
    out = tmp_path / "image.png"
    given = [f"--controlnet={place / 'net'}", f"--control_image={place / 'edges.png'}", "--control_scale=0.5"]
    result = launch("sample", f"--model={sdxl_folder}", f"--prompt={PROMPT}", "--steps=1", *given, f"--out={out}")
    assert result["status"] == 0, result["stderr"]
    control = Control(load_controlnet(place / "net", pipeline.pipeline), Image.open(place / "edges.png"), 0.5)
    expected, without = (
        pipeline([PROMPT], num_steps=1, controls=[control._replace(scale=scale)])[0].astype(int) for scale in (0.5, 0.0)
    )
    assert np.abs(np.asarray(Image.open(out), int) - expected).max() <= 1
    assert np.abs(without - expected).max() > 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"_class_name": "T2IAdapter"}, "holds T2IAdapter, not ControlNetModel"),
        ({"block_out_channels": [32, 32]}, "another UNet (block_out_channels: [32, 32], and the model has [32, 64])"),
        ({"layers_per_block": 2}, "layers_per_block: [2, 2], and the model has [1, 1]"),
        ({"addition_embed_type": None}, "addition_time_embed_dim: None, and the model has 8"),
        ({"conditioning_embedding_out_channels": [4, 8, 8]}, "pixels along a latent: 4, and the model has 2"),
        ({"global_pool_conditions": True}, "global_pool_conditions=True, which is not supported"),
    ],
)
def test_one_that_does_not_fit_is_refused(pipeline, place, tmp_path, settings, words):
    folder = shutil.copytree(place / "net", tmp_path / "net")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    with pytest.raises(UserError, match=re.escape(words)):
        load_controlnet(folder, pipeline.pipeline)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--controlnet=NET"], ["1 --controlnet, 0 --control_image and 0 --control_scale"]),
        (["--control_image=IMAGE"], ["0 --controlnet, 1 --control_image"]),
        (
            ["--controlnet=NET", "--control_image=IMAGE", "--control_scale=1", "--control_scale=2"],
            ["2 --control_scale"],
        ),
        (["--controlnet=NET", "--control_image=nowhere.png"], ["nowhere.png cannot be read as an image"]),
        (["--controlnet=nowhere", "--control_image=IMAGE"], ["nowhere/config.json does not exist"]),
        (["--controlnet=NET", "--control_image=IMAGE", "--control_scale=nan"], ["is no finite number"]),
    ],
)
def test_mistakes(launch, sdxl_folder, place, tmp_path, args, words):
    places = {"NET": str(place / "net"), "IMAGE": str(place / "edges.png")}
    given = [f"{flag}={places.get(value, value)}" for flag, _, value in (arg.partition("=") for arg in args)]
    result = launch("sample", f"--model={sdxl_folder}", "--prompt=a", *given, f"--out={tmp_path / 'a.png'}")
    assert_one_sentence(result, *words)


def test_a_timed_sampler_follows_the_image(pipeline, place):
    network, image = load_controlnet(place / "net", pipeline.pipeline), drawing(0)
    models = SideBySide(TimedSampler(pipeline, controlnet=network))
    for scale in (0.5, 0.0):
        (sample,) = models(Request(PROMPT, (32, 32), num_steps=1, control_image=image, control_scale=scale))
        expected = pipeline(PROMPT, num_steps=1, controls=[Control(network, image, scale)])[0]
        np.testing.assert_array_equal(sample.image, expected)
