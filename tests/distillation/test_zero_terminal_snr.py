"""v-prediction and zero terminal SNR (arXiv 2305.08891): at t = 999 there is noise alone, from which epsilon says
nothing of x0. Every source, solver, target, distance and loss has to do without it there."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from analytic import GaussianTeacher
from scheduler_configs import SD21, SDXL, with_class
from small_runs import settings
from toy_denoiser import LATENT_SHAPE, toy_apply, toy_batch, toy_conditioning, toy_params, toy_state

from mlcm_jax.diffusion.parameterization import predict_x0_eps
from mlcm_jax.diffusion.schedule import Schedule
from mlcm_jax.diffusion.solvers import SOLVERS
from mlcm_jax.distillation.context import DistillationContext
from mlcm_jax.distillation.distances import DISTANCES, Answers
from mlcm_jax.distillation.losses.base import critic_optimizer
from mlcm_jax.distillation.state import Critic, Frozen
from mlcm_jax.distillation.states import STATE_SOURCES, Draws, SourceContext, empty_buffer
from mlcm_jax.distillation.step import make_train_step
from mlcm_jax.distillation.targets import TARGETS
from mlcm_jax.errors import UserError
from mlcm_jax.models.discriminator import DiscriminatorHeads
from mlcm_jax.training.export import student_scheduler_config

V = Schedule.from_config({**SD21, "rescale_betas_zero_snr": True})
SAMPLE = Schedule.from_config({**SD21, "rescale_betas_zero_snr": True, "prediction_type": "sample"})
MEAN, N = 0.4, 4
NOISE = jax.random.normal(jax.random.key(0), (N, *LATENT_SHAPE))
TOP, HALF = jnp.full(N, 999), jnp.full(N, 499)


def moved(schedule, s):
    """Where DDIM leads from the noise when the teacher says the mean: alpha_s mean + sigma_s noise."""
    abar = schedule.alphas_cumprod[s][:, None, None, None]
    return jnp.sqrt(abar) * MEAN + jnp.sqrt(1 - abar) * NOISE


def predict(schedule):
    teacher = GaussianTeacher(schedule, mean=MEAN, std=0.5)
    return lambda z, t: predict_x0_eps(schedule, teacher.output(z, t), z, t).x0


@pytest.mark.parametrize("schedule", [V, SAMPLE], ids=["v", "sample"])
def test_x0_of_noise_is_what_the_network_says(schedule):
    assert float(schedule.alphas_cumprod[999]) == 0
    output = jax.random.normal(jax.random.key(1), NOISE.shape)
    x0, eps = predict_x0_eps(schedule, output, NOISE, TOP)
    np.testing.assert_allclose(x0, -output if schedule is V else output, rtol=1e-6)
    np.testing.assert_allclose(eps, NOISE, rtol=1e-6)
    np.testing.assert_allclose(predict(schedule)(NOISE, TOP), jnp.full_like(NOISE, MEAN), rtol=1e-5)


@pytest.mark.parametrize("schedule", [V, SAMPLE], ids=["v", "sample"])
@pytest.mark.parametrize("name", STATE_SOURCES)
@pytest.mark.parametrize("skip", [20, 1000])
def test_states_at_the_start_are_the_noise_and_lead_to_the_teachers_x0(schedule, name, skip):
    config = settings(states=name, timesteps="milestones", skip=skip)
    x0 = predict(schedule)
    source = SourceContext(schedule, config, x0, x0, jax.random.key(1), jax.random.key(2))
    latents = jax.random.normal(jax.random.key(3), NOISE.shape)
    draws = Draws(jnp.zeros(N, jnp.int32), jnp.int32(2), NOISE, latents)
    kind = STATE_SOURCES[name]
    states, buffer = kind.states(source, draws, empty_buffer(N, LATENT_SHAPE) if kind.uses_buffer else None)
    np.testing.assert_array_equal(states.t_m, TOP)
    np.testing.assert_array_equal(states.z_m, NOISE)
    if kind.makes_target:
        np.testing.assert_allclose(states.z_n, moved(schedule, jnp.maximum(TOP - skip, 499)), atol=1e-5)
    following, buffer = kind.states(source, draws._replace(trajectory_step=jnp.ones(N, jnp.int32)), buffer)
    np.testing.assert_array_equal(following.t_m, HALF)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((states, following, buffer)))


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_step_from_noise(name):
    """With the deterministic part of DDIM: what they add beside it is finite, and vanishes where it has a strength."""
    solver = SOLVERS[name].knowing(jnp.full_like(NOISE, MEAN)).with_strength(0.0)
    noise = {"noise": NOISE} if solver.adds_noise else {}
    x0 = jnp.full_like(NOISE, MEAN)
    z = solver.step(V, NOISE, x0, x0, TOP, TOP, HALF, **noise)
    exact = "addim" not in name  # whose noise is longer by design
    np.testing.assert_allclose(z, moved(V, HALF), atol=1e-5 if exact else 0.1)
    later = solver.step(V, z, x0, x0, TOP, HALF, jnp.full(N, 300), **noise)
    assert np.isfinite(later).all()
    if solver.adds_noise:
        all_fresh = SOLVERS[name].with_strength(1.0).step(V, NOISE, x0, x0, TOP, TOP, HALF, noise=2 * NOISE)
        abar = float(V.alphas_cumprod[499])
        np.testing.assert_allclose(all_fresh, abar**0.5 * MEAN + 2 * (1 - abar) ** 0.5 * NOISE, atol=1e-5)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("distance", [name for name in DISTANCES if name != "latent_lpips"])
def test_distances_and_their_gradients_are_finite(target, distance):
    context = DistillationContext(toy_apply, V, settings(target=target, distance=distance))

    def measure(output):
        x0 = predict_x0_eps(V, output, NOISE, TOP).x0
        answer = TARGETS[target].consistency_function(V, NOISE, x0, TOP, HALF)
        return DISTANCES[distance].measure(context, Answers(answer, 0 * NOISE, TOP, HALF), {}).sum()

    value, gradient = jax.value_and_grad(measure)(0.1 * NOISE)
    assert np.isfinite(value) and float(value) > 0
    assert np.isfinite(gradient).all() and float(jnp.abs(gradient).max()) > 0


def test_a_step_from_noise_with_all_losses_is_finite():
    """States of the student, which all losses take; the preference sees x0 alone."""
    config = settings(num_segments=2, states="student", student_steps=2, timesteps="milestones")
    config.target = "within_segment"
    config.distribution_matching.weight = config.adversarial.weight = config.adversarial_consistency.weight = 0.5
    config.update_from_flattened_dict({"adversarial.width": 8, "adversarial_consistency.width": 8})
    features = {"mid_block": jnp.zeros((1, *LATENT_SHAPE[:2], 16))}
    start = {
        "distribution_matching": toy_params(1),
        "adversarial": DiscriminatorHeads(8).init(jax.random.key(8), features)["params"],
        "adversarial_consistency": DiscriminatorHeads(8, 1).init(jax.random.key(8), features)["params"],
    }
    critics = {name: Critic(p, critic_optimizer(config, name).init(p)) for name, p in start.items()}
    state = toy_state(toy_params(1), optax.sgd(1.0), N, critics=critics)
    step = jax.jit(make_train_step(DistillationContext(toy_apply, V, config), optax.sgd(1.0), LATENT_SHAPE))
    after, metrics = step(state, Frozen(toy_params(2), toy_conditioning(1, 4)), toy_batch(N, 3, [0, 0, 1, 1], 2))
    assert all(np.isfinite(value) for value in metrics.values()), metrics
    trained = after.params, {name: critic.params for name, critic in after.critics.items()}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trained))
    assert float(jnp.abs(after.params["b"] - state.params["b"]).max()) > 1e-4


def test_the_student_is_trained_on_the_schedule_that_it_is_sampled_on():
    """Euler's scheduler lifts the last level for itself alone; from there epsilon would say something, but no x0."""
    euler = with_class(SDXL, "EulerDiscreteScheduler", rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert float(Schedule.from_config(euler).alphas_cumprod[999]) > 0
    assert float(Schedule.from_config(student_scheduler_config(euler)).alphas_cumprod[999]) == 0
    with pytest.raises(UserError, match="use v_prediction or sample"):
        Schedule.from_config(student_scheduler_config({**euler, "prediction_type": "epsilon"}))
