"""Trajectory segmented consistency (Hyper-SD, arXiv 2404.13686): its losses written after the paper, and its stages."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from analytic import GaussianTeacher
from small_runs import SCHEDULE, settings
from toy_denoiser import LATENT_SHAPE, toy_apply, toy_batch, toy_conditioning, toy_params

from configs import methods, sdxl
from mlcm_jax import rng
from mlcm_jax.distillation.context import DistillationContext
from mlcm_jax.distillation.segments import draw_timesteps
from mlcm_jax.distillation.state import Frozen, create
from mlcm_jax.distillation.step import make_train_step
from mlcm_jax.distillation.targets.within_segment import draw_end
from mlcm_jax.errors import UserError
from mlcm_jax.training.checks import validate
from mlcm_jax.training.stages import read_stages

N = 64
EDGES = np.array([749, 499, 249, 0])


def tscd_settings(**values):
    chosen = {"num_segments": 4, "states": "data", "skip": 20, "target": "within_segment"}
    return settings(**chosen | {"target_network": "ema", "ema_decay": 0.95, "noise_offset": 0.05} | values)


def tscd_batch():
    batch = toy_batch(N, 3, [1 + i % 4 for i in range(N)], 4)
    latents = jax.random.normal(jax.random.key(9), (N, *LATENT_SHAPE))
    return batch.replace(latents=latents, guidance_scale=jnp.linspace(7.0, 8.0, N))


def step_of(config, apply, state, teacher):
    step = make_train_step(DistillationContext(apply, SCHEDULE, config), optax.sgd(1.0), LATENT_SHAPE)
    return jax.jit(step)(state, Frozen(teacher, toy_conditioning(1, 4)), tscd_batch())


def tscd_loss(student, average, teacher, batch, unconditional, seed=0):
    """Squared error of the two jumps to a time between the segment's end and where the teacher came to."""
    abar, conditioning = np.asarray(SCHEDULE.alphas_cumprod), batch.conditioning
    segment = np.asarray(batch.trajectory_step) - 1
    t, edge = draw_timesteps(rng.stream(seed, "timesteps", 0), jnp.asarray(segment), 4), EDGES[segment]
    t_n = np.maximum(np.asarray(t) - 20, edge)
    end = np.asarray(jax.random.randint(rng.stream(seed, "ends", 0), (N,), edge, t_n + 1))
    assert len(set(end - edge)) > 30 and (end > edge).any() and (end < t_n).any()

    def at(u):
        return abar[np.asarray(u)].reshape(-1, 1, 1, 1)

    def jump(z, eps, t, s):
        return at(s) ** 0.5 * (z - (1 - at(t)) ** 0.5 * eps) / at(t) ** 0.5 + (1 - at(s)) ** 0.5 * eps

    noise = jax.random.normal(rng.stream(seed, "noise", 0), (N, *LATENT_SHAPE))
    key = rng.named(rng.stream(seed, "student_samples", 0), "noise_offset")
    noise += 0.05 * jax.random.normal(key, (N, 1, 1, LATENT_SHAPE[-1]))
    z = at(t) ** 0.5 * batch.latents + (1 - at(t)) ** 0.5 * noise
    no, yes = (toy_apply({"params": teacher}, z, t, c) for c in (unconditional, conditioning))
    z_n = jump(z, no + batch.guidance_scale[:, None, None, None] * (yes - no), t, t_n)
    target = jump(z_n, toy_apply({"params": average}, z_n, t_n, conditioning), t_n, end)

    def loss(params):
        return jnp.mean((jump(z, toy_apply({"params": params}, z, t, conditioning), t, end) - target) ** 2)

    return jax.jit(jax.value_and_grad(loss))(student)


def test_loss_and_gradient_are_the_papers():
    student, average, teacher = (toy_params(seed) for seed in (1, 5, 2))
    state = dataclasses.replace(create(student, optax.sgd(1.0), with_ema=True), ema=average)
    after, metrics = step_of(tscd_settings(), toy_apply, state, teacher)
    unconditional = jax.tree.map(lambda a: jnp.repeat(a, N, axis=0), toy_conditioning(1, 4))
    loss, grads = tscd_loss(student, average, teacher, tscd_batch(), unconditional)
    np.testing.assert_allclose(metrics["consistency"], loss, rtol=1e-3)
    for name, gradient in grads.items():
        scale = float(jnp.abs(gradient).max())
        np.testing.assert_allclose(student[name] - after.params[name], gradient, atol=2e-3 * scale, rtol=0)


def test_ends_lie_from_the_boundary_to_the_teachers_state_both_included():
    t_n, boundary = jnp.full(5000, 12), jnp.full(5000, 9)
    ends, counts = np.unique(draw_end(jax.random.key(0), t_n, boundary), return_counts=True)
    assert list(ends) == [9, 10, 11, 12] and abs(counts - 1250).max() < 150
    np.testing.assert_array_equal(draw_end(jax.random.key(0), boundary, boundary), boundary)


def test_where_clean_latents_are_known_the_teachers_prediction_has_no_loss_at_any_end():
    """One jump serves all ends of a segment where trajectories are straight: data in one place. Elsewhere none does."""

    def loss(deviation):
        teacher = GaussianTeacher(SCHEDULE, mean=0.4, std=deviation)

        def apply(variables, z, t, conditioning):
            return teacher.eps(z, t) + 0 * variables["params"]["unused"]

        state = create({"unused": jnp.zeros(())}, optax.sgd(1.0), with_ema=True)
        return float(step_of(tscd_settings(), apply, state, {"unused": jnp.zeros(())})[1]["consistency"])

    assert loss(0.0) < 1e-8
    assert loss(0.5) > 1e-5


def test_segments_fall_to_one_and_the_adversarial_loss_takes_over():
    for file in (methods, sdxl):
        stages = [stage.config for stage in read_stages(file.get_config("tscd"))]
        assert [config.num_segments for config in stages] == [8, 4, 2, 1, 1]
        squared = [config.consistency.weight for config in stages[:4]]
        adversarial = [config.adversarial_consistency.weight for config in stages[:4]]
        assert squared == sorted(squared, reverse=True) and squared[1] == 1.0 > squared[2] > squared[3]
        assert adversarial == sorted(adversarial) and adversarial[1] == 0.0 < adversarial[2] < adversarial[3]
        last = stages[-1]
        assert last.distribution_matching.weight > 0 and last.consistency.weight > 0
        assert (last.states, last.timesteps) == ("streaming", "milestones"), "from pure noise alone"
    rewarded = [stage.config.preference.weight for stage in read_stages(methods.get_config("tscd_reward"))]
    assert [weight > 0 for weight in rewarded] == [False] * 4 + [True, False]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise_offset": 0.1}, "states='streaming' does not give"),
        ({"noise_offset": -0.1}, "0 or more"),
        ({"target": "inside"}, "one of boundary, within_segment, x0"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message):
    config = settings(teacher="t", prompts="p")
    config.sample.prompts = "p"
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        validate(config)
