"""The keys of a diffusers scheduler_config.json: which scheduler class reads which, with its defaults."""

from typing import Any

from mlcm_jax.errors import UserError, shortened
from mlcm_jax.json_config import COUNT, FRACTION, POSITIVE, SIZE, ConfigValues, Kind, Table, is_number, read_config

NUM_TRAIN_TIMESTEPS = 1000
LAST_TIMESTEP = NUM_TRAIN_TIMESTEPS - 1

BETAS = Kind(
    f"null or a list of {NUM_TRAIN_TIMESTEPS} numbers from 0 to 1",
    lambda v: v is None or (isinstance(v, tuple) and len(v) == NUM_TRAIN_TIMESTEPS and all(map(FRACTION.holds, v))),
)
LOWEST = Kind("a number, or -Infinity for none", lambda v: is_number(v) or v == -float("inf"))

NOISE: Table = {
    "num_train_timesteps": (NUM_TRAIN_TIMESTEPS, (NUM_TRAIN_TIMESTEPS,)),
    "beta_start": (0.0001, FRACTION),
    "beta_end": (0.02, FRACTION),
    "beta_schedule": ("linear", ("linear", "scaled_linear", "squaredcos_cap_v2")),
    "trained_betas": (None, BETAS),
    "rescale_betas_zero_snr": (False, (False, True)),
    "prediction_type": ("epsilon", ("epsilon", "v_prediction", "sample")),
}
LATENT_NOISE: Table = {
    **NOISE,
    "beta_start": (0.00085, FRACTION),
    "beta_end": (0.012, FRACTION),
    "beta_schedule": ("scaled_linear", NOISE["beta_schedule"][1]),
}
CLIP: Table = {
    "thresholding": (False, (False,)),
    "clip_sample": (False, (False, True)),
    "clip_sample_range": (1.0, POSITIVE),
}
SPACINGS = ("leading", "trailing", "linspace")
# absent, null and false all mean the plain spacing of the noise levels
PLAIN_SIGMAS: Table = {
    key: (False, (False, None)) for key in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
}

# class: the keys that it reads
SCHEDULERS: dict[str, Table] = {
    "DDIMScheduler": {
        **NOISE,
        **CLIP,
        "clip_sample": (True, (False, True)),
        "set_alpha_to_one": (True, (False, True)),
        "steps_offset": (0, COUNT),
        "timestep_spacing": ("leading", SPACINGS),
    },
    "PNDMScheduler": {
        **{key: rule for key, rule in NOISE.items() if key != "rescale_betas_zero_snr"},
        "prediction_type": ("epsilon", ("epsilon",)),
        "skip_prk_steps": (False, (True,)),
        "set_alpha_to_one": (False, (False, True)),
        "steps_offset": (0, COUNT),
        "timestep_spacing": ("leading", SPACINGS),
    },
    "EulerDiscreteScheduler": {
        **NOISE,
        **PLAIN_SIGMAS,
        "interpolation_type": ("linear", ("linear",)),
        "timestep_type": ("discrete", ("discrete",)),
        "final_sigmas_type": ("zero", ("zero", "sigma_min")),
        "steps_offset": (0, COUNT),
        "timestep_spacing": ("linspace", SPACINGS),
    },
    "TCDScheduler": {**LATENT_NOISE, "original_inference_steps": (50, SIZE)},
    "LCMScheduler": {
        **LATENT_NOISE,
        **CLIP,
        "original_inference_steps": (50, SIZE),
        "timestep_scaling": (10.0, POSITIVE),
    },
    "DPMSolverMultistepScheduler": {
        **NOISE,
        **PLAIN_SIGMAS,
        "thresholding": (False, (False,)),
        "algorithm_type": ("dpmsolver++", ("dpmsolver++",)),
        "solver_order": (2, (1, 2)),
        "solver_type": ("midpoint", ("midpoint",)),
        "lower_order_final": (True, (False, True)),
        "euler_at_final": (False, (False, True)),
        "use_lu_lambdas": (False, (False, None)),
        "use_flow_sigmas": (False, (False, None)),
        "use_dynamic_shifting": (False, (False, None)),
        "final_sigmas_type": ("zero", ("zero", "sigma_min")),
        "lambda_min_clipped": (-float("inf"), LOWEST),
        "variance_type": (None, (None,)),
        "steps_offset": (0, COUNT),
        "timestep_spacing": ("linspace", SPACINGS),
    },
}
# diffusers writes a config of one class from another's, so the keys of all classes meet in one file
KNOWN_KEYS = {key for table in SCHEDULERS.values() for key in table} | {
    "dynamic_thresholding_ratio",
    "flow_shift",
    "sample_max_value",
    "sigma_max",
    "sigma_min",
    "time_shift_type",
}
CORRECTIONS = {"StableDiffusionPipeline": {"steps_offset": 1, "clip_sample": False}}


def of_class(scheduler_config: dict[str, Any], name: str) -> dict[str, Any]:
    """The settings handed to the class ``name``, as diffusers' ``from_config`` and ``from_pretrained`` do it.

    Keys that only the file's own class reads are left out.
    """
    if scheduler_config.get("_class_name") == name:
        return scheduler_config
    kept = {k: v for k, v in scheduler_config.items() if k in KNOWN_KEYS or k.startswith("_")}
    return kept | {"_class_name": name}


def as_pipelines_set(scheduler_config: dict[str, Any], pipeline_class: str) -> dict[str, Any]:
    """The settings as diffusers' pipeline uses them: its constructor may replace some of the file's and the defaults.

    StableDiffusionPipeline does so since the first models' files lacked them; StableDiffusionXLPipeline does not.
    """
    corrections = CORRECTIONS.get(pipeline_class, {})
    read = SCHEDULERS.get(str(scheduler_config.get("_class_name")), {})
    return scheduler_config | {k: v for k, v in corrections.items() if k in read or k in scheduler_config}


def class_name(scheduler_config: dict[str, Any]) -> str:
    """Name of the diffusers scheduler class. Raises UserError when the file does not say it."""
    name = scheduler_config.get("_class_name")
    if not name or not isinstance(name, str):
        raise UserError("scheduler_config.json has no _class_name: add diffusers' class, such as DDIMScheduler.")
    return name


def read_sampler_config(scheduler_config: dict[str, Any]) -> ConfigValues:
    """All keys that the scheduler class reads, validated; keys that belong to other classes are left out.

    Raises UserError for a class, a key or a value that is not supported.
    """
    name = class_name(scheduler_config)
    if name not in SCHEDULERS:
        raise UserError(
            f"Sampling with {shortened(name, 60)} is not supported: use {', '.join(SCHEDULERS)} (--scheduler of "
            "launch/sample.py, or the class in model_index.json)."
        )
    table = SCHEDULERS[name]
    own = {k: v for k, v in scheduler_config.items() if k in table or k not in KNOWN_KEYS}
    return read_config(own, table, name, file_name="scheduler_config.json")


def read_noise_config(scheduler_config: dict[str, Any]) -> ConfigValues:
    """The keys that set the noise schedule, for any class: one that is not in SCHEDULERS must write them out.

    Raises UserError for a value that is not supported and for an absent key whose default is not known.
    """
    name = class_name(scheduler_config)
    written = {k: v for k, v in scheduler_config.items() if k in NOISE}
    if name in SCHEDULERS:
        table = {**NOISE, **{k: rule for k, rule in SCHEDULERS[name].items() if k in NOISE}}
        return read_config(written, table, name, file_name="scheduler_config.json")
    required = ("trained_betas",) if written.get("trained_betas") else ("beta_start", "beta_end", "beta_schedule")
    missing = [key for key in required if key not in written]
    if missing:
        raise UserError(f"{name}'s scheduler_config.json has no {', '.join(missing)}: write the noise schedule out.")
    return read_config(written, NOISE, name, file_name="scheduler_config.json")
