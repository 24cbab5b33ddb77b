"""TRACT (arXiv 2303.04248): its loss, the student that becomes the teacher, and that a resumed run keeps it."""

from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from analytic import GaussianTeacher
from small_runs import SCHEDULE, settings
from toy_denoiser import LATENT_SHAPE, toy_apply, toy_batch, toy_conditioning, toy_params

from mlcm_jax import rng
from mlcm_jax.diffusion.schedule import alpha_sigma
from mlcm_jax.distillation.context import DistillationContext
from mlcm_jax.distillation.distances import DISTANCES, Answers
from mlcm_jax.distillation.segments import boundaries, draw_from_grid, segment_boundaries, segment_of
from mlcm_jax.distillation.state import Frozen, create
from mlcm_jax.distillation.states import Draws, SourceContext
from mlcm_jax.distillation.step import make_train_step
from mlcm_jax.distillation.targets import to_boundary
from mlcm_jax.errors import UserError
from mlcm_jax.training.batch_plan import renews_teacher
from mlcm_jax.training.checkpoint import Checkpoints
from mlcm_jax.training.checks import validate
from mlcm_jax.training.stages import read_stages

N, M, GRID = 16, 2, 8
TRACT = {
    "num_segments": M,
    "states": "data",
    "timesteps": "grid",
    "grid": GRID,
    "target_network": "ema",
    "ema_decay": 0.5,
    "distance": "x0_snr",
    "teacher_network": "previous",
}
STUDENT, AVERAGE, PREVIOUS, TEACHER = (toy_params(seed) for seed in (1, 5, 6, 2))
FROZEN = Frozen(TEACHER, toy_conditioning(1, 4))


def tract_loss(student, self_teacher, teacher, clean, noise, t, batch):
    """The loss of a phase from 8 steps to 2; t: of the 8, on which the teacher takes one step."""
    after = {int(t): int(s) for t, s in zip(boundaries(GRID)[:-1], boundaries(GRID)[1:], strict=True)}
    t, mid = np.asarray(t), np.array([after[int(u)] for u in t])
    end = np.where(t > 499, 499, 0)
    g = np.asarray(SCHEDULE.alphas_cumprod)
    (g0, g1, g2) = (g[u].reshape(-1, 1, 1, 1) for u in (t, mid, end))

    def x0(params, x, u, a):
        return (x - np.sqrt(1 - a) * toy_apply({"params": params}, x, jnp.asarray(u), batch.conditioning)) / np.sqrt(a)

    def move(x, u, x0, a, b):
        return np.sqrt(b) * x0 + np.sqrt(1 - b) * (x - np.sqrt(a) * x0) / np.sqrt(1 - a)

    x_t = np.sqrt(g0) * clean + np.sqrt(1 - g0) * noise
    x_mid = move(x_t, t, x0(teacher, x_t, t, g0), g0, g1)
    x_end = move(x_mid, mid, x0(self_teacher, x_mid, mid, g1), g1, g2)
    x_end = np.where((mid == end)[:, None, None, None], x_mid, x_end)
    aim = (x_t * np.sqrt(1 - g2) - x_end * np.sqrt(1 - g0)) / (np.sqrt(g0 * (1 - g2)) - np.sqrt(g2 * (1 - g0)))
    return jnp.mean(np.maximum(g0 / (1 - g0), 1) * (x0(student, x_t, t, g0) - aim) ** 2)


def drawn(step=0):
    segment = jnp.arange(N) % M
    batch = toy_batch(N, 3, 1 + segment, M)
    batch = batch.replace(latents=jax.random.normal(jax.random.key(9), (N, *LATENT_SHAPE)))
    noise = jax.random.normal(rng.stream(0, "noise", step), (N, *LATENT_SHAPE))
    return batch, noise, draw_from_grid(rng.stream(0, "timesteps", step), segment, M, GRID)


def toy_step(config, optimizer):
    return jax.jit(make_train_step(DistillationContext(toy_apply, SCHEDULE, config), optimizer, LATENT_SHAPE))


@pytest.mark.parametrize("renews", [False, True])
def test_the_step_is_tracts(renews):
    """The teacher is the student of the phase before, without guidance; at the start of a phase, the present one."""
    optimizer = optax.sgd(1.0)
    state = create(STUDENT, optimizer, with_ema=True, with_previous=True).replace(
        ema=AVERAGE, previous_student=PREVIOUS
    )
    batch, noise, t = drawn()
    batch = batch.replace(renews_teacher=jnp.bool_(renews))
    after, metrics = toy_step(settings(**TRACT), optimizer)(state, FROZEN, batch)
    teacher = AVERAGE if renews else PREVIOUS
    loss, grads = jax.value_and_grad(tract_loss)(STUDENT, AVERAGE, teacher, batch.latents, noise, t, batch)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-3)
    for name, gradient in grads.items():
        scale = float(jnp.abs(gradient).max())
        np.testing.assert_allclose(STUDENT[name] - after.params[name], gradient, atol=1e-2 * scale, rtol=0)
        np.testing.assert_array_equal(after.previous_student[name], teacher[name])


def test_timesteps_are_those_of_the_grid_in_the_segment():
    segment = jnp.arange(400) % M
    t = np.asarray(draw_from_grid(jax.random.key(0), segment, M, GRID))
    assert set(t) == set(boundaries(GRID)[:-1].tolist())
    np.testing.assert_array_equal(segment_of(jnp.asarray(t), M), segment)


def test_true_solutions_have_no_loss():
    """A student and a teacher before it that go along the flow exactly: no solver is left that could be wrong."""
    teacher = GaussianTeacher(SCHEDULE, mean=-0.3, std=0.6)
    segment = jnp.arange(N) % M
    t, boundary = draw_from_grid(jax.random.key(1), segment, M, GRID), segment_boundaries(segment, M)[1]
    t_n = segment_boundaries(segment_of(t, GRID), GRID)[1]
    z = teacher.flow(jax.random.normal(jax.random.key(2), (N, 3, 3, 2)), jnp.full(N, 999), t)

    def true_x0(end):
        def predict(z, t):
            (a_t, s_t), (a_s, s_s) = alpha_sigma(SCHEDULE, t), alpha_sigma(SCHEDULE, end)
            return (teacher.flow(z, t, end) - s_s / s_t * z) / (a_s - a_t * s_s / s_t)

        return predict

    source = SourceContext(
        SCHEDULE, settings(**TRACT), true_x0(t_n), true_x0(t_n), *jax.random.split(jax.random.key(0))
    )
    z_n = source.teacher_step(Draws(segment, jnp.int32(M), z), z, t, t_n, z)
    target = jnp.where((t_n == boundary)[:, None, None, None], z_n, teacher.flow(z_n, t_n, boundary))
    context = DistillationContext(None, SCHEDULE, settings(**TRACT))

    def loss(x0):
        answer = to_boundary(SCHEDULE, z, x0, t, boundary)
        return DISTANCES["x0_snr"].measure(context, Answers(answer, target, t, boundary), {})

    assert float(loss(true_x0(boundary)(z, t)).max()) < 1e-6
    assert float(loss(true_x0(boundary)(z, t) + 0.1).min()) > 0.009


def test_the_teacher_is_renewed_where_the_number_of_segments_changes():
    config = settings(num_steps=12)
    config.stages = (
        {"start": 3, "num_segments": 2, "teacher_network": "previous"},
        {"start": 6, "optim.learning_rate": 1e-5},
        {"start": 9, "num_segments": 1},
    )
    stages = read_stages(config)
    assert [step for step in range(12) if renews_teacher(stages, step)] == [0, 3, 9]


def test_a_resumed_run_keeps_its_teacher(tmp_path):
    """From a checkpoint in the middle of a phase, to the bit what the run without a stop has."""
    optimizer = optax.sgd(0.05)
    step = toy_step(settings(**TRACT), optimizer)

    def go_on(state, steps):
        for number in steps:
            batch = drawn(number)[0].replace(renews_teacher=jnp.bool_(number == 2))
            state, _ = step(state, FROZEN, batch)
        return state

    start = create(STUDENT, optimizer, with_ema=True, with_previous=True)
    halfway = go_on(jax.tree.map(jnp.copy, start), range(4))
    with closing(Checkpoints(tmp_path / "checkpoints")) as checkpoints:
        checkpoints.save(halfway, 4)
        read = checkpoints.restore(start)
    whole, resumed = go_on(halfway, range(4, 6)), go_on(read, range(4, 6))
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    teacher = go_on(start, range(2)).trained
    jax.tree.map(np.testing.assert_array_equal, resumed.previous_student, teacher)
    assert float(optax.tree.norm(jax.tree.map(jnp.subtract, resumed.trained, teacher))) > 1e-4


def test_states_without_a_teacher_of_their_own_are_saved_as_before(tmp_path):
    state = create(STUDENT, optax.sgd(1.0))
    with closing(Checkpoints(tmp_path / "checkpoints")) as checkpoints:
        checkpoints.save(state, 1)
        assert checkpoints.restore(state).previous_student is None
    names = (tmp_path / "checkpoints" / "1" / "default" / "_METADATA").read_text()
    assert "params" in names and "previous_student" not in names


def test_a_grid_that_does_not_fit_the_segments_is_refused():
    config = settings(teacher="t", prompts="p", timesteps="grid", num_segments=4, grid=6)
    config.sample.prompts = "p"
    with pytest.raises(UserError, match="a multiple of num_segments=4"):
        validate(config)
