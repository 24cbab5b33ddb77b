"""Sampling with T2I-Adapters and IP-Adapters: the same latents as diffusers' pipelines, mistakes in one sentence."""

import shutil

import numpy as np
import pytest
from adapter_cases import PIPELINES, SIDE, drawing, save_adapters, save_ip_adapter
from diffusers import MultiAdapter, StableDiffusionAdapterPipeline, StableDiffusionXLAdapterPipeline, T2IAdapter
from one_sentence import assert_one_sentence
from PIL import Image
from tiny_models import ONE_LEVEL_XL, save_sdxl
from torch_weights import assert_close, channels_first, channels_last
from transformers import CLIPImageProcessorPil

from mlcm_jax import load_pipeline
from mlcm_jax.errors import UserError
from mlcm_jax.hub.ip_adapter import load_ip_adapter
from mlcm_jax.hub.t2i_adapter import load_t2i_adapter
from mlcm_jax.images import image_grid
from mlcm_jax.sampling.control import Adapter, ImagePrompt

PROMPTS = ["red heart", "a cat"]
NOISE = np.random.default_rng(0).standard_normal((2, 16, 16, 4), np.float32)


@pytest.fixture(scope="module")
def folders(sd15_folder, tmp_path_factory):
    """Pipelines by family: one level, a third of the time to compile, and two with attention on both ways."""
    return {"sdxl": save_sdxl(tmp_path_factory.mktemp("one_level"), ONE_LEVEL_XL), "sd15": sd15_folder}


@pytest.fixture(scope="module")
def loaded(folders):
    """(diffusers' pipeline, ours) by family."""

    def load(family):
        plain = PIPELINES[family].from_pretrained(folders[family], local_files_only=True)
        plain.register_modules(feature_extractor=CLIPImageProcessorPil(size=SIDE, crop_size=SIDE))
        plain.set_progress_bar_config(disable=True)
        return plain, load_pipeline(folders[family])

    return load


@pytest.fixture(scope="module")
def places(loaded, tmp_path_factory):
    """A folder with adapters for the tiny pipelines by family, and an image."""
    root = tmp_path_factory.mktemp("adapters")
    for family in PIPELINES:
        save_adapters(loaded(family)[0].unet, root / family, family)
    drawing(0).save(root / "edges.png")
    return root


def adapters_of(folder, pipeline, scales, mode, factor=1.0):
    networks = [load_t2i_adapter(folder / f"t2i_{i + 1}", pipeline) for i in range(len(scales))]
    images = [drawing(i, mode) for i in range(len(scales))]
    return [Adapter(*each, factor) for each in zip(networks, images, scales, strict=True)]


def sdxl_controls(folder, ours, scales, prompt_scale):
    """Two T2I-Adapters in half of the steps, and an IP-Adapter."""
    prompt = ImagePrompt(load_ip_adapter(folder, ours.pipeline), drawing(7), prompt_scale)
    return [*adapters_of(folder, ours.pipeline, scales, "RGB", factor=0.5), prompt]


def assert_sampled(ours, controls, theirs, **settings):
    """Ours equal ``theirs``, and the controls have changed them."""
    found = ours.sample(PROMPTS, latents=NOISE, controls=controls, **settings)
    assert_close(found, channels_last(theirs))
    off = ours.sample(PROMPTS, latents=NOISE, controls=[c._replace(scale=0.0) for c in controls], **settings)
    assert np.abs(found - off).max() > 1e-2 * np.abs(off).max(), "they change the image"


SIZES = {"height": 32, "width": 32, "output_type": "latent"}


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_sdxl_with_two_adapters_and_an_image_prompt_is_diffusers(loaded, places, guidance_scale):
    plain, ours = loaded("sdxl")
    models = [T2IAdapter.from_pretrained(places / "sdxl" / f"t2i_{i}") for i in (1, 2)]
    parts = {k: v for k, v in plain.components.items() if k != "image_encoder"}
    reference = StableDiffusionXLAdapterPipeline(**parts, adapter=MultiAdapter(models))
    reference.set_progress_bar_config(disable=True)
    file = places / "sdxl" / "ip-adapter.safetensors"
    reference.load_ip_adapter(file.parent, subfolder=".", weight_name=file.name, local_files_only=True)
    reference.set_ip_adapter_scale(0.6)
    theirs = reference(
        PROMPTS,
        image=[[drawing(0)] * 2, [drawing(1)] * 2],  # one image each for both prompts
        adapter_conditioning_scale=[0.7, 1.3],
        adapter_conditioning_factor=0.5,
        ip_adapter_image=drawing(7),
        latents=channels_first(NOISE),
        guidance_scale=guidance_scale,
        num_inference_steps=3,
        **SIZES,
    ).images
    controls = sdxl_controls(places / "sdxl", ours, (0.7, 1.3), 0.6)
    assert_sampled(ours, controls, theirs, num_steps=3, guidance_scale=guidance_scale)


def test_sd15_with_a_grey_adapter_is_diffusers(loaded, places):
    plain, ours = loaded("sd15")
    model = T2IAdapter.from_pretrained(places / "sd15" / "t2i_1")
    parts = {k: v for k, v in plain.components.items() if k != "image_encoder"}
    reference = StableDiffusionAdapterPipeline(**parts, adapter=model, requires_safety_checker=False)
    reference.set_progress_bar_config(disable=True)
    settings = {"guidance_scale": 5.0, "latents": channels_first(NOISE), "num_inference_steps": 2}
    theirs = reference(PROMPTS, image=[drawing(0, "L")] * 2, adapter_conditioning_scale=0.7, **settings, **SIZES).images
    controls = adapters_of(places / "sd15", ours.pipeline, [0.7], "L")
    assert_sampled(ours, controls, theirs, num_steps=2, guidance_scale=5.0)


def test_sd15_with_two_image_prompts_is_diffusers(loaded, places):
    plain, ours = loaded("sd15")
    files = [places / "sd15" / "ip-adapter.safetensors", save_ip_adapter(plain.unet, places / "sd15" / "other", seed=6)]
    shutil.copytree(files[0].parent / "image_encoder", files[1].parent / "image_encoder", dirs_exist_ok=True)
    folders, names, scales = [f.parent for f in files], [f.name for f in files], [0.6, 1.2]
    plain.load_ip_adapter(folders, subfolder=".", weight_name=names, local_files_only=True)
    plain.set_ip_adapter_scale(scales)
    images = [drawing(7), drawing(8)]
    settings = {"guidance_scale": 5.0, "latents": channels_first(NOISE), "num_inference_steps": 2}
    theirs = plain(PROMPTS, ip_adapter_image=images, **settings, **SIZES).images
    adapters = [load_ip_adapter(file, ours.pipeline) for file in files]
    controls = [ImagePrompt(*each) for each in zip(adapters, images, scales, strict=True)]
    assert_sampled(ours, controls, theirs, num_steps=2, guidance_scale=5.0)


def test_the_program_draws_what_the_function_does(launch, folders, loaded, places, tmp_path):
    out, folder, edges = tmp_path / "image.png", places / "sdxl", places / "edges.png"
    given = [f"--adapter_image={edges}", f"--ip_adapter_image={edges}", "--guidance_scale=1", "--adapter_factor=0.5"]
    given += [f"--t2i_adapter={folder / 't2i_1'}", "--adapter_scale=0.5", f"--ip_adapter={folder}"]
    given += [f"--t2i_adapter={folder / 't2i_2'}", "--adapter_scale=2", f"--adapter_image={edges}"]
    given += ["--ip_adapter_scale=2", *(f"--prompt={each}" for each in PROMPTS)]
    result = launch("sample", f"--model={folders['sdxl']}", "--steps=2", *given, f"--out={out}")
    assert result["status"] == 0, result["stderr"]
    _, ours = loaded("sdxl")
    controls = [control._replace(image=Image.open(edges)) for control in sdxl_controls(folder, ours, (0.5, 2.0), 2.0)]
    expected = ours(PROMPTS, num_steps=2, guidance_scale=1.0, controls=controls)
    assert np.abs(np.asarray(Image.open(out), int) - image_grid(expected, columns=2)).max() <= 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"scale": float("nan")}, "A control has the scale nan"),
        ({"factor": 1.5}, "A T2I-Adapter has the factor 1.5"),
        ({"factor": float("nan")}, "A T2I-Adapter has the factor nan"),
    ],
)
def test_mistakes(loaded, places, settings, words):
    _, ours = loaded("sdxl")
    (control,) = adapters_of(places / "sdxl", ours.pipeline, [1.0], "RGB")
    with pytest.raises(UserError, match=words):
        ours("a", num_steps=1, controls=[control._replace(**settings)])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--t2i_adapter=NET"], ["1 --t2i_adapter, 0 --adapter_image and 0 --adapter_scale"]),
        (["--ip_adapter_image=IMAGE"], ["0 --ip_adapter, 1 --ip_adapter_image"]),
        (["--adapter_factor=0.5"], ["There is --adapter_factor and no --t2i_adapter"]),
        (["--ip_adapter=NET", "--ip_adapter_image=nowhere.png"], ["nowhere.png cannot be read as an image"]),
        (["--ip_adapter=NET", "--ip_adapter_image=IMAGE", "--ip_adapter_scale=nan"], ["is no finite number"]),
        (["--t2i_adapter=NET", "--adapter_image=IMAGE", "--adapter_factor=2"], ["adapter_factor"]),
        (["--t2i_adapter=nowhere", "--adapter_image=IMAGE"], ["nowhere/config.json does not exist"]),
    ],
)
def test_mistakes_of_the_program(launch, folders, places, tmp_path, args, words):
    named = {"NET": str(places / "sdxl"), "IMAGE": str(places / "edges.png")}
    given = [f"{flag}={named.get(value, value)}" for flag, _, value in (arg.partition("=") for arg in args)]
    result = launch("sample", f"--model={folders['sdxl']}", "--prompt=a", *given, f"--out={tmp_path / 'a.png'}")
    assert_one_sentence(result, *words)
