"""The trained student as others use it: a whole diffusers folder, or a LoRA file for one."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from etils import epath
from ml_collections import ConfigDict

from mlcm_jax.diffusion.scheduler_config import NUM_TRAIN_TIMESTEPS, read_noise_config
from mlcm_jax.errors import UserError
from mlcm_jax.hub.fetch import SCHEDULER_NAME
from mlcm_jax.hub.lora import save_lora
from mlcm_jax.hub.pipeline import Network, Pipeline, save_pipeline
from mlcm_jax.hub.save import write_json
from mlcm_jax.hub.single_file import save_single_file
from mlcm_jax.models import lora
from mlcm_jax.rules import check_rules, one_of
from mlcm_jax.types import Params

FORMATS = ("diffusers", "single_file", "lora", "kohya")
SINGLE_FILE = "model.safetensors"
SAMPLERS = {
    "tcd": {"_class_name": "TCDScheduler"},
    "lcm": {"_class_name": "LCMScheduler", "clip_sample": False, "timestep_scaling": 10.0},
}
NOISE_KEYS = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr", "prediction_type")


def check(config: ConfigDict) -> None:
    """Raise UserError for settings of the export that cannot work."""
    check_rules(config, {"sampler": one_of(*SAMPLERS)})


def student_scheduler_config(
    teacher_config: dict[str, Any], sampler: str = "tcd", prediction_type: str = ""
) -> dict[str, Any]:
    """The scheduler whose M steps begin where M segments do, on the teacher's noise schedule.

    sampler: "tcd" goes from boundary to boundary; the pipeline's default eta = 0 keeps it deterministic. "lcm" predicts
    x0 at each boundary and noises it to the next one. diffusers' classes then step over every timestep
    (original_inference_steps=1000) to the boundaries of distillation/segments.py; their default of 50 would miss them.
    prediction_type: of the student; "": the teacher's.
    """
    values = read_noise_config(teacher_config)
    noise = {key: values[key] for key in NOISE_KEYS}
    noise["prediction_type"] = prediction_type or noise["prediction_type"]
    return {
        **SAMPLERS[sampler],
        "num_train_timesteps": NUM_TRAIN_TIMESTEPS,
        "original_inference_steps": NUM_TRAIN_TIMESTEPS,
        **noise,
    }


def ddim_scheduler_config(teacher_config: dict[str, Any]) -> dict[str, Any]:
    """DDIM on the teacher's noise schedule, from timestep 999 down: the solver that a student is distilled from."""
    return student_scheduler_config(teacher_config) | {
        "_class_name": "DDIMScheduler",
        "timestep_spacing": "trailing",
        "clip_sample": False,
        "set_alpha_to_one": False,
    }


def student_network(teacher: Network, config: ConfigDict) -> Network:
    """The teacher's network as the student has it: conditioned on its guidance scale where the run says so."""
    dim = config.guidance_embedding_dim
    if not dim:
        return teacher
    module: Any = teacher.module
    conditioned = {**teacher.config, "time_cond_proj_dim": dim}
    return dataclasses.replace(teacher, module=module.with_guidance_embedding(dim), config=conditioned)


def student_unet(teacher: Network, trained: Params, config: ConfigDict) -> Network:
    """The student as one network: its own weights, or the teacher's with the low-rank factors folded in."""
    if config.trainable == "full":
        return dataclasses.replace(student_network(teacher, config), params=trained)
    scaled = lora.scaled(trained, config.lora.alpha, config.lora.rank)
    return dataclasses.replace(teacher, params=lora.merge(teacher.params, scaled))


def exported_parts(architecture: Pipeline, config: ConfigDict, format: str) -> list[str]:
    """The networks whose weights ``export`` takes from the teacher: none for a LoRA, and no UNet for a student that
    has all of its own. architecture: the teacher, which may be without weights."""
    if format in ("lora", "kohya"):
        return []
    return [part for part in architecture.networks() if part != "unet" or config.trainable == "lora"]


def export(
    pipeline: Pipeline,
    trained: Params,
    config: ConfigDict,
    folder: epath.PathLike,
    *,
    format: str,
    dtype: Any = jnp.float16,
) -> None:
    """Write the student to ``folder``.

    pipeline: the teacher. trained: the run's parameters. config: by which they were trained last
    (``stages.settings_after``). dtype: of the written tensors.
    format: "diffusers", a pipeline folder whose scheduler visits the boundaries of training, or with its
    config beside it "single_file", model.safetensors in the original names, or
    "lora" and "kohya", pytorch_lora_weights.safetensors in PEFT's or in kohya's naming.
    Raises UserError for another format, and for a LoRA of a run that trained all weights.
    """
    if format not in FORMATS:
        raise UserError(f"--format={format} is unknown: use one of {', '.join(FORMATS)}.")
    folder = epath.Path(folder)
    scheduler_config = student_scheduler_config(
        pipeline.scheduler_config, config.sampler, config.student_prediction_type
    )
    if format == "diffusers":
        student = dataclasses.replace(pipeline, unet=student_unet(pipeline.unet, trained, config))
        save_pipeline(student, folder, dtype=dtype, scheduler_config=scheduler_config)
        return
    if format == "single_file":
        params = {part: network.params for part, network in pipeline.networks().items()}
        params["unet"] = student_unet(pipeline.unet, trained, config).params
        class_name = pipeline.model_index["_class_name"]
        save_single_file(class_name, params, folder / SINGLE_FILE, scheduler_config=scheduler_config, dtype=dtype)
        write_json(scheduler_config, folder / SCHEDULER_NAME)
        return
    if config.trainable != "lora":
        raise UserError("This run trained all weights, so there is no LoRA to export: use --format=diffusers.")
    scaled = lora.scaled(trained, config.lora.alpha, config.lora.rank)
    naming = "kohya" if format == "kohya" else "peft"
    save_lora(scaled, folder, naming=naming, unet_shapes=pipeline.unet.params, dtype=dtype)
    write_json(scheduler_config, folder / SCHEDULER_NAME)
