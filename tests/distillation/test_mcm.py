"""MCM's loss against one written from its paper (arXiv 2403.06807), and at the true solution of a known flow."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from analytic import GaussianTeacher
from small_runs import SCHEDULE, settings
from toy_denoiser import LATENT_SHAPE, toy_apply, toy_batch, toy_conditioning, toy_params, toy_state

from mlcm_jax import rng
from mlcm_jax.diffusion.schedule import alpha_sigma
from mlcm_jax.distillation.context import DistillationContext
from mlcm_jax.distillation.distances import DISTANCES, Answers
from mlcm_jax.distillation.segments import annealed_skip, draw_timesteps, segment_boundaries
from mlcm_jax.distillation.state import Frozen, create
from mlcm_jax.distillation.states import Draws, SourceContext
from mlcm_jax.distillation.step import make_train_step
from mlcm_jax.distillation.targets import to_boundary
from mlcm_jax.errors import UserError
from mlcm_jax.training.checks import validate

MCM = {"num_segments": 4, "skip": 16, "skip_end": 1, "distance": "x0_norm", "num_steps": 100}


def mcm_loss(student, teacher, z, t, edge, skip, clean, batch, unconditional):
    """The loss of MCM's algorithm 2: both sides are clean latents predicted at t."""
    t_step = jnp.maximum(t - skip, edge)
    (a_t, s_t), (a_n, s_n), (a_s, s_s) = (alpha_sigma(SCHEDULE, u) for u in (t, t_step, edge))

    def x0(params, z, t, conditioning, a, s):
        return (z - s * toy_apply({"params": params}, z, t, conditioning)) / a

    no, yes = (x0(teacher, z, t, c, a_t, s_t) for c in (unconditional, batch.conditioning))
    x = no + batch.guidance_scale[:, None, None, None] * (yes - no)
    axes = (1, 2, 3)
    x_var = 0.1 / (2 + a_t**2 / s_t**2)
    if clean is not None:
        x_var = 0.75 * jnp.mean((x - clean) ** 2, axes, keepdims=True)
    eps = (z - a_t * x) / s_t
    longer = x_var * (a_n - a_t * s_n / s_t) ** 2 / jnp.mean(eps**2, axes, keepdims=True)
    z_step = a_n * x + jnp.sqrt(s_n**2 + longer) * eps
    there = x0(jax.lax.stop_gradient(student), z_step, t_step, batch.conditioning, a_n, s_n)
    z_s = a_s * there + s_s * (z_step - a_n * there) / s_n
    z_s = jnp.where((t_step == edge)[:, None, None, None], z_step, z_s)
    aim = (z_s - s_s / s_t * z) / (a_s - a_t * s_s / s_t)
    difference = x0(student, z, t, batch.conditioning, a_t, s_t) - jax.lax.stop_gradient(aim)
    snr = (a_t**2 / s_t**2)[:, 0, 0, 0]
    return jnp.mean((snr + 1) * jnp.sqrt(jnp.sum(difference**2, axes)))


@pytest.mark.parametrize("step", [0, 25, 80])
@pytest.mark.parametrize("source", ["data", "streaming"])
def test_the_step_is_mcms(source, step):
    """On noised data and without data, from the teacher's own noise; the teacher's step gets shorter on the way."""
    solver = "addim_data" if source == "data" else "addim"
    config = settings(states=source, target_solver=solver, **MCM)
    student, teacher, n = toy_params(1), toy_params(2), 16
    unconditional = toy_conditioning(1, 4)
    place = [1 + i % 4 for i in range(n)] if source == "data" else [0] * n
    batch = toy_batch(n, 3, place, 4)
    noise = jax.random.normal(rng.stream(config.seed, "noise", step), (n, *LATENT_SHAPE))
    clean, z, t = None, noise, jnp.full(n, 999)
    edge = segment_boundaries(jnp.zeros(n, jnp.int32), 4)[1]
    optimizer, state = optax.sgd(1.0), None
    if source == "data":
        segment = jnp.asarray(place) - 1
        clean = jax.random.normal(jax.random.key(9), (n, *LATENT_SHAPE))
        batch, edge = batch.replace(latents=clean), segment_boundaries(segment, 4)[1]
        t = draw_timesteps(rng.stream(config.seed, "timesteps", step), segment, 4)
        alpha, sigma = alpha_sigma(SCHEDULE, t)
        z, state = alpha * clean + sigma * noise, create(student, optimizer)
    state = toy_state(student, optimizer, n) if state is None else state
    state = dataclasses.replace(state, step=jnp.int32(step))
    skip = {0: 16, 25: 4, 80: 1}[step]  # 16 (1 / 16)^(2 step / 100), and 1 from the middle of the run on
    train_step = jax.jit(make_train_step(DistillationContext(toy_apply, SCHEDULE, config), optimizer, LATENT_SHAPE))
    after, metrics = train_step(state, Frozen(teacher, unconditional), batch)
    repeated = jax.tree.map(lambda a: jnp.repeat(a, n, axis=0), unconditional)
    loss, grads = jax.value_and_grad(mcm_loss)(student, teacher, z, t, edge, skip, clean, batch, repeated)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-3)
    for name, gradient in grads.items():
        scale = float(jnp.abs(gradient).max())
        np.testing.assert_allclose(student[name] - after.params[name], gradient, atol=1e-2 * scale, rtol=0)


@pytest.mark.parametrize("solver", ["ddim", "addim"])
def test_the_true_solution_has_no_loss_but_the_solvers_error(solver):
    """The norm is not squared, so that the loss falls by 2^2 when the teacher's step is halved."""
    teacher, segment, n = GaussianTeacher(SCHEDULE, mean=-0.3, std=0.6), jnp.full(4, 1), 4
    upper, boundary = segment_boundaries(segment, 4)
    t = upper - 40 * jnp.arange(n)
    z = teacher.flow(jax.random.normal(jax.random.key(2), (n, 3, 3, 2)), jnp.full(n, 999), t)

    def true_x0(z, t):
        (a_t, s_t), (a_s, s_s) = alpha_sigma(SCHEDULE, t), alpha_sigma(SCHEDULE, boundary)
        return (teacher.flow(z, t, boundary) - s_s / s_t * z) / (a_s - a_t * s_s / s_t)

    def loss(skip):
        config = settings(**MCM | {"target_solver": solver, "skip": skip, "skip_end": 0})
        source = SourceContext(SCHEDULE, config, teacher.x0, teacher.x0, jax.random.key(0), jax.random.key(1))
        z_n = source.teacher_step(Draws(segment, jnp.int32(4), z), z, t, t - skip, z)
        answers = (to_boundary(SCHEDULE, y, true_x0(y, u), u, boundary) for y, u in ((z, t), (z_n, t - skip)))
        context = DistillationContext(None, SCHEDULE, config)
        return DISTANCES["x0_norm"].measure(context, Answers(*answers, t, boundary), {})

    coarse, fine = loss(32), loss(16)
    assert float(fine.max()) < 0.05
    np.testing.assert_allclose(np.log2(coarse / fine), 2.0, atol=0.35)


def test_the_teachers_step_is_annealed_over_the_first_half():
    config = settings(**MCM)
    found = [int(annealed_skip(config, step)) for step in (0, 12, 25, 37, 50, 75, 100)]
    assert found == [16, 8, 4, 2, 1, 1, 1]
    assert annealed_skip(settings(skip=20), 50) == 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"states": "streaming", "target_solver": "addim_data"}, "states='streaming' has none"),
        ({"target_solver": "dpmpp_2m"}, "one of ddim, addim, addim_data"),
        ({"trajectory_solver": "addim_data"}, "one of ddim, dpmpp_2m, addim"),
        ({"skip": 4, "skip_end": 5}, "from 0 to 4"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message):
    config = settings(teacher="t", prompts="p", **changes)
    config.sample.prompts = "p"
    with pytest.raises(UserError, match=message):
        validate(config)
