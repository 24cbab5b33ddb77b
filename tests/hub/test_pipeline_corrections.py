"""What diffusers' pipelines change of a folder's settings when they load it, and networks that fit no pipeline."""

import inspect
import json
import shutil

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from function_sampler import sample
from one_sentence import assert_one_sentence

from mlcm_jax.diffusion.scheduler_config import of_class
from mlcm_jax.errors import UserError
from mlcm_jax.hub.lora import save_lora, with_loras
from mlcm_jax.hub.model_index import corrected_unet_config
from mlcm_jax.hub.pipeline import load_pipeline, read_architecture, save_pipeline
from mlcm_jax.models import lora as low_rank

NOISE = jax.random.normal(jax.random.key(0), (2, 4, 4, 4))
LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
# as the folders of SD 1.x had them
SCHEDULERS = {
    "the issue's": {"_class_name": "DDIMScheduler", **LATENT, "set_alpha_to_one": False},
    "an offset of null": {"_class_name": "DDIMScheduler", **LATENT, "steps_offset": None, "clip_sample": True},
    "PNDM": {"_class_name": "PNDMScheduler", **LATENT, "skip_prk_steps": True},
    "Euler, leading": {"_class_name": "EulerDiscreteScheduler", **LATENT, "timestep_spacing": "leading"},
    "DPM, leading": {"_class_name": "DPMSolverMultistepScheduler", **LATENT, "timestep_spacing": "leading"},
    "right ones": {"_class_name": "DDIMScheduler", **LATENT, "steps_offset": 1, "clip_sample": False},
    "TCD": {"_class_name": "TCDScheduler", **LATENT, "clip_sample": True, "steps_offset": 0},
}


def pipeline_of(kind, scheduler, **parts):
    nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "unet"))
    if kind is StableDiffusionPipeline:
        nothing |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    else:
        nothing |= {"text_encoder_2": None, "tokenizer_2": None, "add_watermarker": False}
    return kind(**nothing | {"scheduler": scheduler} | parts)


def torch_samples(scheduler, num_steps):
    scheduler.set_timesteps(num_steps)
    x = torch.from_numpy(np.array(NOISE)) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        z = scheduler.scale_model_input(x, t)
        options = {"eta": 0.0} if "eta" in inspect.signature(scheduler.step).parameters else {}  # as pipelines do
        x = scheduler.step(torch.sin(z + t.float() / 300) + 0.3 * z, t, x, **options).prev_sample
    return x.numpy()


def predict(z, t, _conditioning):
    return jnp.sin(z + t[:, None, None, None] / 300) + 0.3 * z


def our_samples(scheduler_config, num_steps):
    return np.asarray(jax.jit(lambda z: sample(predict, scheduler_config, z, None, None, 1.0, num_steps))(NOISE))


def write_scheduler(folder, config):
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", config["_class_name"]]
    (folder / "model_index.json").write_text(json.dumps(index))


@pytest.fixture
def sd15(sd15_folder, tmp_path):
    return shutil.copytree(sd15_folder, tmp_path / "sd15")


@pytest.fixture
def sdxl(sdxl_folder, tmp_path):
    return shutil.copytree(sdxl_folder, tmp_path / "sdxl")


def assert_samples_are_diffusers(kind, config, ours):
    theirs = pipeline_of(kind, getattr(diffusers, config["_class_name"]).from_config(config)).scheduler
    expected = torch_samples(theirs, 5)
    np.testing.assert_allclose(our_samples(ours, 5), expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max()))
    return expected


@pytest.mark.parametrize("case", SCHEDULERS)
def test_the_scheduler_of_sd15(sd15, tmp_path, case):
    config = SCHEDULERS[case]
    write_scheduler(sd15, config)
    pipeline = read_architecture(sd15)
    corrected = assert_samples_are_diffusers(StableDiffusionPipeline, config, pipeline.scheduler_config)
    if case == "the issue's":
        plain = torch_samples(diffusers.DDIMScheduler.from_config(config), 5)
        assert np.abs(corrected - plain).max() > 0.1, "the correction is seen"
        # what is written draws the same, and so does a sampler of a LoRA's folder and one that a flag names
        save_pipeline(load_pipeline(sd15), tmp_path / "out")
        written = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
        assert written == pipeline.scheduler_config
        pndm = pipeline.with_scheduler(SCHEDULERS["PNDM"])
        asked = pndm.with_scheduler(of_class(pndm.scheduler_config, "DDIMScheduler")).scheduler_config
        assert asked["clip_sample"] is False and asked["steps_offset"] == 1


@pytest.mark.parametrize("case", ["the issue's", "Euler, leading"])
def test_the_scheduler_of_sdxl_stays_as_it_is(sdxl, case):
    config = SCHEDULERS[case]
    write_scheduler(sdxl, config)
    ours = read_architecture(sdxl).scheduler_config
    assert ours == config
    assert_samples_are_diffusers(StableDiffusionXLPipeline, config, ours)


def test_a_loras_sampler(sd15, tmp_path):
    """One that comes with a LoRA's folder is set as one of the model's own."""
    pipeline = load_pipeline(sd15)
    lora = tmp_path / "lora"
    save_lora(low_rank.init(jax.random.key(0), pipeline.unet.params, 1, ["to_q$"]), lora)
    (lora / "scheduler_config.json").write_text(json.dumps(SCHEDULERS["the issue's"]))
    adapted = with_loras(pipeline, [str(lora)]).scheduler_config
    assert adapted == SCHEDULERS["the issue's"] | {"steps_offset": 1, "clip_sample": False}


VERSIONS = ["0.6.0", "0.8.1", "0.9.0.dev0", "0.9.0", "0.42.1", "0.10.0", None]


@pytest.mark.parametrize("size", [16, 64, 96, [12, 16]])
@pytest.mark.parametrize("version", VERSIONS)
def test_the_size_of_an_old_unet(version, size):
    config = {"sample_size": size} | ({} if version is None else {"_diffusers_version": version})
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
        sample_size=size,
    )
    unet.register_to_config(**config)
    for kind in (StableDiffusionPipeline, StableDiffusionXLPipeline):
        unet._internal_dict = diffusers.configuration_utils.FrozenDict(dict(unet.config) | config)
        scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
        theirs = pipeline_of(kind, scheduler, unet=unet).unet.config.sample_size
        assert corrected_unet_config(config, kind.__name__)["sample_size"] == theirs


def test_an_old_folder_draws_at_its_real_size(sd15):
    edit(sd15 / "unet" / "config.json", _diffusers_version="0.6.0")
    pipeline = read_architecture(sd15)
    assert pipeline.latent_size == (64, 64) and pipeline.unet.config["sample_size"] == 64


def edit(file, **settings):
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


UNFIT = {
    "inpainting": ("unet", {"in_channels": 9}, ["an inpainting UNet", "in_channels=9", "4 channels"]),
    "editing": ("unet", {"in_channels": 8}, ["a UNet that edits an image", "in_channels=8"]),
    "other channels": ("unet", {"in_channels": 6}, ["a UNet of 6 channels"]),
    "a variance": ("unet", {"out_channels": 8}, ["out_channels=8", "predicts the noise alone"]),
    "other states": ("unet", {"cross_attention_dim": 48}, ["cross_attention_dim=48", "32 + 32 wide"]),
    "a narrow encoder": ("text_encoder", {"hidden_size": 16}, ["cross_attention_dim=64", "16 + 32 wide"]),
    "another projection": ("text_encoder_2", {"projection_dim": 16}, ["input_dim=80", "16 + 6 x 8 wide"]),
    "no time ids": ("unet", {"addition_embed_type": None}, ["addition_embed_type=None, not 'text_time'"]),
    "other latents": ("vae", {"latent_channels": 16}, ["in_channels=4", "latents have 16 channels"]),
}


@pytest.mark.parametrize("case", UNFIT)
def test_networks_that_do_not_fit_each_other(sdxl, case):
    part, settings, words = UNFIT[case]
    edit(sdxl / part / "config.json", **settings)
    for read in (read_architecture, load_pipeline):
        with pytest.raises(UserError) as e:
            read(sdxl)
        assert all(word in str(e.value) for word in words), e.value
        assert len(str(e.value).replace(str(sdxl), "")) < 250 and "\n" not in str(e.value)


def test_a_unet_of_sdxl_in_sd15(sd15):
    edit(sd15 / "unet" / "config.json", addition_embed_type="text_time", addition_time_embed_dim=8)
    edit(sd15 / "unet" / "config.json", projection_class_embeddings_input_dim=80)
    with pytest.raises(UserError, match="is a StableDiffusionPipeline, and its UNet has addition_embed_type="):
        read_architecture(sd15)


PROGRAMS = {
    "sample": ["--prompt=x", "--out={tmp}/x.png"],
    "convert": ["--out={tmp}/out"],
    "encode": ["--prompts={prompts}", "--out={tmp}/latents.npy"],
    "evaluate": ["--prompts={prompts}", "--num_images=9", "--out={tmp}/out"],
    "train": ["--config.prompts={prompts}", "--config.sample.prompts={prompts}", "--workdir={tmp}/run", "--plan_only"],
    "compile": ["--topology=v5e:2x2"],
}
CONFIGURED = ("train", "compile")


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_says_what_the_model_is(launch, sdxl, tmp_path, program):
    edit(sdxl / "unet" / "config.json", in_channels=9)
    (tmp_path / "prompts.txt").write_text("red heart\n" * 9)
    args = [arg.format(tmp=tmp_path, prompts=tmp_path / "prompts.txt") for arg in PROGRAMS[program]]
    configured = ["--config=configs/emoji.py", f"--config.teacher={sdxl}"]
    result = launch(program, *(configured if program in CONFIGURED else [f"--model={sdxl}"]), *args)
    assert_one_sentence(result, "an inpainting UNet", "in_channels=9", "use a text-to-image model")
