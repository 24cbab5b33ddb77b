from itertools import pairwise

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from analytic import GaussianTeacher
from function_sampler import sample
from scheduler_configs import PUBLISHED, SD15, SD21, SDXL, with_class

from mlcm_jax.diffusion.parameterization import predict_x0_eps
from mlcm_jax.diffusion.samplers import SAMPLERS, step_table
from mlcm_jax.diffusion.schedule import Schedule
from mlcm_jax.diffusion.solvers import ddim_step
from mlcm_jax.distillation.segments import boundaries
from mlcm_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("strict_arrays")

NOISE = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
COND, UNCOND = jnp.array([0.3, -0.2]), jnp.zeros(2)
KEY = jax.random.key(7)


def predict(z, t, conditioning):
    """A smooth nonlinear stand-in for a network."""
    t = t[:, None, None, None].astype(jnp.float32)
    return jnp.sin(z + t / 300) + 0.3 * z + conditioning[:, None, None, None]


def torch_predict(z, t, conditioning):
    return torch.sin(z + t.float() / 300) + 0.3 * z + conditioning


def diffusers_states(config, num_steps, guidance_scale, **step_options):
    """Every latent state of a diffusers pipeline's loop, channels-last."""
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    scheduler.set_timesteps(num_steps)
    cond, uncond = (torch.from_numpy(np.array(c)).reshape(-1, 1, 1, 1) for c in (COND, UNCOND))
    x = torch.from_numpy(np.array(NOISE)) * scheduler.init_noise_sigma
    states = []
    for t in scheduler.timesteps:
        z = scheduler.scale_model_input(x, t)
        output = torch_predict(z, t, cond)
        if guidance_scale > 1:
            base = torch_predict(z, t, uncond)
            output = base + guidance_scale * (output - base)
        x = scheduler.step(output, t, x, **step_options).prev_sample
        states.append(x.numpy())
    return scheduler, states


def run(config, num_steps, guidance_scale=1.0, rng=None, eta=0.0):
    """Our last latents, and the inputs and timesteps of every network call."""
    calls = []

    def spied(z, t, conditioning):
        jax.debug.callback(lambda z, t: calls.append((np.array(t[0]), np.array(z))), z, t, ordered=True)
        return predict(z, t, conditioning)

    final = jax.jit(lambda noise, c, u: sample(spied, config, noise, c, u, guidance_scale, num_steps, rng, eta=eta))(
        NOISE, COND, UNCOND
    )
    jax.effects_barrier()
    return np.array(final), calls


def assert_close(got, expected):
    """Within 1e-5 of the largest magnitude, where latents of size 1 are the least that a step handles."""
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * max(1.0, np.abs(expected).max()))


def feed_noise(monkeypatch, module):
    """Give diffusers the noise that our sampler draws."""
    draws = iter(range(1000))

    def draw(shape, **_):
        return torch.from_numpy(np.array(jax.random.normal(jax.random.fold_in(KEY, next(draws)), shape)))

    monkeypatch.setattr(module, "randn_tensor", draw)


CONFIGS = {
    **PUBLISHED,
    "sdxl, trailing": {**SDXL, "timestep_spacing": "trailing"},
    "sdxl, linspace": {**SDXL, "timestep_spacing": "linspace"},
    "sdxl, to sigma_min": {**SDXL, "final_sigmas_type": "sigma_min"},
    "sdxl, v, zero snr": {**SDXL, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    "sdxl, sample": {**SDXL, "prediction_type": "sample"},
    "ddim": with_class(SD15, "DDIMScheduler"),
    "ddim, to one": with_class(SD15, "DDIMScheduler", set_alpha_to_one=True),
    "ddim, trailing": with_class(SD15, "DDIMScheduler", timestep_spacing="trailing"),
    "ddim, linspace": with_class(SD15, "DDIMScheduler", timestep_spacing="linspace"),
    "ddim, clipped": with_class(SD15, "DDIMScheduler", clip_sample=True, clip_sample_range=0.9),
    "ddim, zero snr": {**SD21, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    "pndm, trailing": {**SD15, "timestep_spacing": "trailing"},
    "pndm, to one": {**SD15, "set_alpha_to_one": True},
    "ddim from sdxl": with_class(SDXL, "DDIMScheduler"),
    "euler from sd15": with_class(SD15, "EulerDiscreteScheduler"),
    "euler from sd21": with_class(SD21, "EulerDiscreteScheduler"),
    "tcd": with_class(SDXL, "TCDScheduler", original_inference_steps=1000),
    "tcd, default": with_class(SDXL, "TCDScheduler"),
    "tcd, v": with_class(SD21, "TCDScheduler", original_inference_steps=1000),
    "tcd, zero snr": with_class(SD21, "TCDScheduler", original_inference_steps=1000, rescale_betas_zero_snr=True),
    "tcd, sample, zero snr": with_class(
        SD21, "TCDScheduler", prediction_type="sample", original_inference_steps=1000, rescale_betas_zero_snr=True
    ),
    "euler, trained betas": {**SDXL, "trained_betas": np.linspace(0.001, 0.01, 1000).tolist()},
    "ddim, cosine": {**SD21, "beta_schedule": "squaredcos_cap_v2"},
    "ddim, linear, sample": {**SD21, "beta_schedule": "linear", "prediction_type": "sample"},
    "dpm, v, zero snr": with_class(SD21, "DPMSolverMultistepScheduler", rescale_betas_zero_snr=True),
    "dpm from sdxl": with_class(SDXL, "DPMSolverMultistepScheduler"),
    "dpm from sd15": with_class(SD15, "DPMSolverMultistepScheduler"),
    "dpm from sd21": with_class(SD21, "DPMSolverMultistepScheduler"),
    "dpm, trailing": with_class(SDXL, "DPMSolverMultistepScheduler", timestep_spacing="trailing"),
    "dpm, first order": with_class(SD15, "DPMSolverMultistepScheduler", solver_order=1),
    "dpm, to sigma_min": with_class(SD15, "DPMSolverMultistepScheduler", final_sigmas_type="sigma_min"),
    "dpm, full order at the end": with_class(
        SD15, "DPMSolverMultistepScheduler", final_sigmas_type="sigma_min", lower_order_final=False
    ),
    "dpm, euler at the end": with_class(
        SD15, "DPMSolverMultistepScheduler", final_sigmas_type="sigma_min", euler_at_final=True
    ),
    "dpm, clipped cosine": with_class(
        SD15, "DPMSolverMultistepScheduler", beta_schedule="squaredcos_cap_v2", lambda_min_clipped=-5.1
    ),
}
DETERMINISTIC = {"eta": 0.0}


def options(config):
    return DETERMINISTIC if config["_class_name"] == "TCDScheduler" else {}


@pytest.mark.parametrize("num_steps", [1, 2, 7, 20])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_step_equals_diffusers(name, num_steps):
    config = CONFIGS[name]
    scheduler, states = diffusers_states(config, num_steps, 1.0, **options(config))
    final, calls = run(config, num_steps)
    np.testing.assert_allclose([t for t, _ in calls], scheduler.timesteps.numpy(), rtol=1e-6)
    inputs = [np.array(NOISE) * float(scheduler.init_noise_sigma), *states[:-1]]
    scales = np.ones(len(calls))
    if config["_class_name"] == "EulerDiscreteScheduler":
        scales = 1 / np.sqrt(1 + scheduler.sigmas[:-1].numpy() ** 2)
    for (_, z), x, scale in zip(calls, inputs, scales, strict=True):
        assert_close(z, x * scale)
    assert_close(final, states[-1])


@pytest.mark.parametrize("num_steps", [1, 2, 7, 20])
def test_euler_from_pure_noise_is_more_exact_than_diffusers(num_steps):
    """At sigma = 4096 diffusers' step rounds x0 away in float32; ours is held against the same steps in float64."""
    config = with_class(SD21, "EulerDiscreteScheduler", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    scheduler, states = diffusers_states(config, num_steps, 1.0)
    sigmas = scheduler.sigmas.double().numpy()
    x = np.array(NOISE, np.float64) * float(scheduler.init_noise_sigma)
    for sigma, later, t in zip(sigmas[:-1], sigmas[1:], scheduler.timesteps.numpy(), strict=True):
        alpha = 1 / np.sqrt(1 + sigma**2)
        z = alpha * x
        v = np.sin(z + t / 300) + 0.3 * z + np.array(COND, np.float64)[:, None, None, None]
        x = alpha * (z - sigma * v) + later * alpha * (sigma * z + v)
    final, _ = run(config, num_steps)
    assert_close(final, x)
    np.testing.assert_allclose(states[-1], x, atol=1e-3 * np.abs(x).max())


@pytest.mark.parametrize("name", PUBLISHED)
def test_guided_samples_equal_diffusers(name):
    _, states = diffusers_states(PUBLISHED[name], 12, 5.0)
    final, calls = run(PUBLISHED[name], 12, guidance_scale=5.0)
    assert all(z.shape[0] == 2 * NOISE.shape[0] for _, z in calls)
    # guidance at 5 amplifies the rounding of two float32 runs by about as much
    np.testing.assert_allclose(final, states[-1], rtol=0, atol=1e-4 * np.abs(states[-1]).max())


def test_guidance_scale_of_one_makes_no_unconditional_call():
    _, calls = run(SDXL, 3, guidance_scale=1.0)
    assert [z.shape[0] for _, z in calls] == [2, 2, 2]


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_stochastic_tcd_equals_diffusers(monkeypatch, eta):
    feed_noise(monkeypatch, diffusers.schedulers.scheduling_tcd)
    config = CONFIGS["tcd"]
    _, states = diffusers_states(config, 8, 1.0, eta=eta)
    assert_close(run(config, 8, rng=KEY, eta=eta)[0], states[-1])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        {"clip_sample": True, "clip_sample_range": 0.8},
        {"timestep_scaling": 0.01},
        {"original_inference_steps": 1000},
    ],
)
@pytest.mark.parametrize("num_steps", [1, 4])
def test_lcm_equals_diffusers(monkeypatch, changes, num_steps):
    feed_noise(monkeypatch, diffusers.schedulers.scheduling_lcm)
    config = with_class(SDXL, "LCMScheduler", **changes)
    _, states = diffusers_states(config, num_steps, 1.0)
    assert_close(run(config, num_steps, rng=KEY)[0], states[-1])


@pytest.mark.parametrize("num_steps", range(1, 9))
def test_tcd_takes_ddim_jumps_from_edge_to_edge(num_steps):
    schedule = Schedule.from_config(CONFIGS["tcd"])
    z, bounds = NOISE, boundaries(num_steps)
    np.testing.assert_array_equal(step_table(CONFIGS["tcd"], num_steps).timesteps, bounds[:-1])
    for upper, lower in pairwise(bounds):
        t, s = jnp.full((2,), int(upper)), jnp.full((2,), int(lower))
        z = ddim_step(schedule, z, predict_x0_eps(schedule, predict(z, t, COND), z, t).x0, t, s)
    assert_close(run(CONFIGS["tcd"], num_steps)[0], np.array(z))


@pytest.mark.parametrize("name", CONFIGS)
def test_timesteps_equal_diffusers_at_many_step_counts(name):
    config = CONFIGS[name]
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    most = getattr(scheduler.config, "original_inference_steps", 250)
    for num_steps in {n for n in (*range(1, 41), 50, 61, 100, 103, 250) if n <= most}:
        scheduler.set_timesteps(num_steps)
        theirs = scheduler.timesteps.numpy()
        # for some counts, 61 the first, diffusers' trailing spacing goes on to timestep -1
        np.testing.assert_allclose(step_table(config, num_steps).timesteps, theirs[theirs >= 0], rtol=1e-6)


@pytest.mark.parametrize("name", ["ddim", "sd21", "sdxl", "sd15", "dpm from sd15"])
def test_many_steps_find_the_gaussian_data(name):
    """A perfect network's samples reach the flow map's end, whatever the scheduler."""
    config = CONFIGS[name]
    teacher = GaussianTeacher(Schedule.from_config(config), mean=0.7, std=0.5)

    def perfect(z, t, _):
        return teacher.output(z, t)

    final = jax.jit(lambda z: sample(perfect, config, z, COND, None, 1.0, 250))(NOISE)
    exact = teacher.flow(NOISE, jnp.full((2,), 999), jnp.full((2,), 0))
    assert float(jnp.abs(final - exact).max()) < 0.05


@pytest.mark.parametrize(
    ("config", "arguments", "words"),
    [
        ({**SDXL, "_class_name": "HeunDiscreteScheduler"}, {}, f"HeunDiscreteScheduler.*{', '.join(SAMPLERS)}"),
        ({**SDXL, "use_karras_sigmas": True}, {}, "use_karras_sigmas=True"),
        ({**SDXL, "timestep_spacing": "even"}, {}, "timestep_spacing='even'.*leading"),
        ({**SDXL, "stepz_offset": 1}, {}, "stepz_offset"),
        ({**SD15, "skip_prk_steps": False}, {}, "skip_prk_steps=False"),
        (with_class(SD15, "DDIMScheduler", thresholding=True), {}, "thresholding=True"),
        (SDXL, {"num_steps": 0}, "num_steps=0.*1 to 1000"),
        (SDXL, {"num_steps": -3}, "num_steps=-3"),
        (SDXL, {"num_steps": 1001}, "num_steps=1001"),
        (SDXL, {"num_steps": 1000}, "use fewer steps"),
        (with_class(SDXL, "TCDScheduler"), {"num_steps": 51}, "original_inference_steps=50"),
        (with_class(SDXL, "DPMSolverMultistepScheduler"), {"num_steps": 999}, "num_steps=999"),
        (with_class(SDXL, "LCMScheduler"), {}, "pass rng"),
        (SD21, {"eta": 0.5}, "DDIMScheduler with eta=0.5"),
        (CONFIGS["tcd"], {"eta": 1.5}, "eta=1.5"),
    ],
)
def test_what_cannot_be_sampled_is_named(config, arguments, words):
    options = {"guidance_scale": 1.0, "num_steps": 4, **arguments}
    with pytest.raises(UserError, match=words):
        sample(predict, config, NOISE, COND, None, **options)


def test_compiled_size_does_not_grow_with_steps():
    def size(num_steps):
        traced = jax.make_jaxpr(lambda z: sample(predict, SDXL, z, COND, UNCOND, 5.0, num_steps))(NOISE)
        return len(traced.eqns)

    assert size(50) == size(5)
