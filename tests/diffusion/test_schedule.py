import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scheduler_configs import PUBLISHED, SD15, SD21, SDXL, with_class

from mlcm_jax.diffusion.parameterization import add_noise, convert_output, predict_x0_eps, training_target
from mlcm_jax.diffusion.schedule import Schedule, alpha_sigma
from mlcm_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("strict_arrays")

VARIANTS = {
    **PUBLISHED,
    "ddim defaults": {"_class_name": "DDIMScheduler"},
    "euler defaults": {"_class_name": "EulerDiscreteScheduler"},
    "tcd defaults": {"_class_name": "TCDScheduler"},
    "lcm defaults": {"_class_name": "LCMScheduler"},
    "cosine": with_class(SD21, "DDIMScheduler", beta_schedule="squaredcos_cap_v2"),
    "zero snr ddim": with_class(SD21, "DDIMScheduler", rescale_betas_zero_snr=True),
    "zero snr euler": with_class(SDXL, "EulerDiscreteScheduler", rescale_betas_zero_snr=True),
    "zero snr dpm": with_class(SDXL, "DPMSolverMultistepScheduler", rescale_betas_zero_snr=True),
    "trained betas": with_class(SD15, "DDIMScheduler", trained_betas=np.linspace(0.001, 0.01, 1000).tolist()),
    "class without a sampler": with_class(SDXL, "UniPCMultistepScheduler"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_table_equals_diffusers(name):
    config = VARIANTS[name]
    theirs = getattr(diffusers, config["_class_name"]).from_config(config)
    schedule = Schedule.from_config(config)
    assert schedule.alphas_cumprod.dtype == jnp.float32
    np.testing.assert_allclose(schedule.alphas_cumprod, theirs.alphas_cumprod.numpy(), rtol=1e-6, atol=1e-9)
    assert schedule.prediction_type == theirs.config.prediction_type


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"beta_schedule": "sigmoid"}, "beta_schedule='sigmoid'.*scaled_linear"),
        ({"prediction_type": "flow_prediction"}, "prediction_type='flow_prediction'.*v_prediction"),
        ({"num_train_timesteps": 100}, "num_train_timesteps=100"),
        ({"trained_betas": [0.1, 0.2]}, "1000 numbers"),
        ({"beta_start": 0.0, "beta_schedule": "linear"}, "1000 betas"),
        ({"_class_name": None}, "_class_name"),
        ({"_class_name": "TCDScheduler", "rescale_betas_zero_snr": True}, "use v_prediction"),
    ],
)
def test_unsupported_value_is_named(changes, words):
    with pytest.raises(UserError, match=words):
        Schedule.from_config({**SDXL, **changes})


def test_class_with_unknown_defaults_must_write_them_out():
    with pytest.raises(UserError, match=r"FlowMatchEulerDiscreteScheduler.*beta_start, beta_end, beta_schedule"):
        Schedule.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})


def test_alpha_sigma_under_jit():
    schedule = Schedule.from_config(SDXL)
    t = jnp.array([0, 500, 999])
    alpha, sigma = jax.jit(alpha_sigma)(schedule, t)
    assert alpha.shape == sigma.shape == (3, 1, 1, 1)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-6)
    np.testing.assert_allclose(alpha[:, 0, 0, 0] ** 2, np.asarray(schedule.alphas_cumprod)[t], rtol=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_perfect_output_gives_back_x0_and_noise(prediction_type):
    schedule = Schedule.from_config({**SDXL, "prediction_type": prediction_type})
    x0, noise = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 2))
    t = jnp.array([0, 400, 700])
    z = add_noise(schedule, x0, noise, t)
    prediction = predict_x0_eps(schedule, training_target(schedule, x0, noise, t), z, t)
    np.testing.assert_allclose(prediction.x0, x0, atol=2e-5)
    np.testing.assert_allclose(prediction.eps, noise, atol=2e-5)


def test_bfloat16_output_is_converted_in_float32():
    z = jnp.ones((1, 2, 2, 1), jnp.bfloat16)
    prediction = convert_output("epsilon", z, z, jnp.float32(0.6), jnp.float32(0.8))
    assert prediction.x0.dtype == prediction.eps.dtype == jnp.float32
