"""DMD2 (arXiv 2405.14867): states that the student makes itself, its gradient, its critic and the discriminator."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_runs import SCHEDULE, random_like, settings
from toy_denoiser import LATENT_SHAPE, toy_apply, toy_batch, toy_conditioning, toy_params

from mlcm_jax import rng
from mlcm_jax.distillation.context import DistillationContext
from mlcm_jax.distillation.losses.base import critic_optimizer, train_critic
from mlcm_jax.distillation.losses.distribution_matching_gan import logistic_loss
from mlcm_jax.distillation.state import Critic, Frozen, create
from mlcm_jax.distillation.step import make_train_step
from mlcm_jax.errors import UserError
from mlcm_jax.rng import seed_words
from mlcm_jax.training.checks import validate
from mlcm_jax.training.program import build_program

N, NAME = 8, "distribution_matching"
STUDENT, FAKE, TEACHER = (toy_params(seed) for seed in (1, 5, 2))
TIMES, ABAR = (999, 749, 499, 249), np.asarray(SCHEDULE.alphas_cumprod)


def dmd2(name=NAME, states="simulation", **values):
    config = settings(num_segments=4, states=states, timesteps="milestones", **values)
    config.consistency.weight = 0.0
    config[name].update({"weight": 1.0, "updates": 5, "learning_rate": 1e-3})
    return config


def x0_of(params, z, t, conditioning):
    a = ABAR[np.asarray(t)].reshape(-1, 1, 1, 1)
    return (z - np.sqrt(1 - a) * toy_apply({"params": params}, z, jnp.asarray(t), conditioning)) / np.sqrt(a)


def simulated(student, batch, num_steps, step):
    """Backward simulation: the student's own way from noise, with fresh noise after each of its steps."""
    z = jax.random.normal(rng.stream(0, "noise", step), (N, *LATENT_SHAPE))
    for i in range(num_steps):
        x0 = x0_of(student, z, np.full(N, TIMES[i]), batch.conditioning)
        fresh = jax.random.normal(jax.random.fold_in(rng.stream(0, "student_samples", step), i), z.shape)
        z = np.sqrt(ABAR[TIMES[i + 1]]) * x0 + np.sqrt(1 - ABAR[TIMES[i + 1]]) * fresh
    return z


def dmd2_gradient(num_steps, batch, unconditional, step):
    """The gradient of the paper's eq. 2 with 2311.18828's normalisation, through the student's last step alone."""
    z = jax.lax.stop_gradient(simulated(STUDENT, batch, num_steps, step))
    t, condition = np.full(N, TIMES[num_steps]), batch.conditioning
    time_key, noise_key = jax.random.split(rng.named(rng.stream(0, "terms", step), NAME))
    renoised_to = np.asarray(jax.random.randint(time_key, (N,), 20, 981))
    a = ABAR[renoised_to].reshape(-1, 1, 1, 1)
    x0, pull = jax.vjp(lambda params: x0_of(params, z, t, condition), STUDENT)
    x_t = np.sqrt(a) * x0 + np.sqrt(1 - a) * jax.random.normal(noise_key, x0.shape)
    fake = x0_of(FAKE, x_t, renoised_to, condition)
    no, yes = (x0_of(TEACHER, x_t, renoised_to, c) for c in (unconditional, condition))
    real = no + batch.guidance_scale[:, None, None, None] * (yes - no)
    norm = jnp.abs(x0 - real).mean(axis=(1, 2, 3), keepdims=True)
    return pull((fake - real) / norm / x0.size)[0]


@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_the_step_is_dmd2s(num_steps):
    config, optimizer = dmd2(), optax.sgd(1.0)
    critic = Critic(FAKE, critic_optimizer(config, NAME).init(FAKE))
    state = create(STUDENT, optimizer, critics={NAME: critic})
    batch, unconditional = toy_batch(N, 3, [num_steps] * N, 4), toy_conditioning(1, 4)
    step = jax.jit(make_train_step(DistillationContext(toy_apply, SCHEDULE, config), optimizer, LATENT_SHAPE))
    after, metrics = step(state, Frozen(TEACHER, unconditional), batch)
    assert "consistency" not in metrics
    repeated = jax.tree.map(lambda a: jnp.repeat(a, N, axis=0), unconditional)
    for name, gradient in dmd2_gradient(num_steps, batch, repeated, 0).items():
        scale = float(jnp.abs(gradient).max())
        np.testing.assert_allclose(STUDENT[name] - after.params[name], gradient, atol=1e-2 * scale, rtol=0)
    counts = [leaf for leaf in jax.tree.leaves(after.critics[NAME].opt_state) if leaf.ndim == 0]
    assert [int(count) for count in counts] == [5], "five updates of the fake score to one of the student"


@pytest.mark.parametrize(("platform", "loops"), [("cpu", 0), ("cuda", 1), ("tpu", 1)])
def test_updates_of_a_critic_are_unrolled_for_the_cpu_alone(platform, loops):
    config, critic = dmd2(), Critic(FAKE, critic_optimizer(dmd2(), NAME).init(FAKE))

    def loss(params, rows, key):
        return optax.tree.norm(params), ({}, ())

    update = jax.jit(partial(train_critic, loss, config=config, name=NAME))
    key = jax.random.key(0, impl="unsafe_rbg")  # the usual one has loops of its own on the CPU
    text = update.trace(critic, (), key).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.while") == loops


def test_a_student_with_the_teachers_distribution_does_not_move():
    """With a perfect fake score, that is the teacher's without guidance, there is no gradient."""
    config, optimizer = dmd2(), optax.sgd(1.0)
    state = create(STUDENT, optimizer, critics={NAME: Critic(TEACHER, critic_optimizer(config, NAME).init(TEACHER))})
    batch = toy_batch(N, 3, [2] * N, 4, guidance_scale=1.0)
    step = jax.jit(make_train_step(DistillationContext(toy_apply, SCHEDULE, config), optimizer, LATENT_SHAPE))
    after, _ = step(state, Frozen(TEACHER, toy_conditioning(1, 4)), batch)
    for name, before in STUDENT.items():
        np.testing.assert_allclose(after.params[name], before, atol=1e-5)


def test_logistic_loss():
    real, fake = np.array([2.0, -1.0]), np.array([0.5, -3.0])
    expected = np.log1p(np.exp(-real)).mean() + np.log1p(np.exp(fake)).mean()
    np.testing.assert_allclose(logistic_loss(jnp.asarray(real), jnp.asarray(fake)), expected, rtol=1e-6)


def test_the_discriminator_learns_on_the_fake_scores_bottleneck(architecture):
    """A LoRA and its critic on the tiny pipeline: the head and the fake score under it move, and the student learns."""
    name = "distribution_matching_gan"
    config = dmd2(name, "simulation_data", trainable="lora", batch_size=4)
    config.lora.update({"rank": 4, "alpha": 8.0, "targets": (r"/conv[12]$",)})
    config[name].updates = 1  # five make a longer program; test_the_step_is_dmd2s has them
    program = build_program(config, architecture, jax.devices()[:1])
    frozen = Frozen(random_like(program.frozen.teacher, 0, 0.1), random_like(program.frozen.unconditional, 1, 1.0))
    (stage,) = program.stages
    batch = random_like(stage.batch, 2, 1.0).replace(
        num_segments=jnp.int32(4), trajectory_step=jnp.full(4, 1), guidance_scale=jnp.full(4, 3.0), seed=seed_words(0)
    )
    state = program.init_state(None)
    before = jax.device_get(state)
    assert set(before.critics[name].params) == {"score", "head"}
    for _ in range(2):  # a LoRA's first factors move after its second ones have
        state, metrics = stage.step(state, frozen, batch)
    assert {f"{name}_matching", f"{name}_adversarial", f"{name}_critic"} <= set(metrics)
    assert all(np.isfinite(float(value)) for value in metrics.values())
    for old, new in ((before.params, state.params), (before.critics[name].params, state.critics[name].params)):
        moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), old, jax.device_get(new))
        head = moved.get("head", {})
        assert min(jax.tree.leaves(head), default=1.0) > 0 and max(jax.tree.leaves(moved)) > 0


@pytest.mark.parametrize(
    ("changes", "weight", "message"),
    [
        ({"timesteps": "uniform"}, 0.0, "one of milestones"),
        ({}, 1.0, "makes no target: set config.consistency.weight=0"),
        ({"states": "simulation_data"}, 0.0, "needs config.latents"),
        ({"sampler": "ddim"}, 0.0, "one of tcd, lcm"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, weight, message):
    config = dmd2(teacher="t", prompts="p")
    config.sample.prompts = "p"
    config.update(changes)
    config.consistency.weight = weight
    with pytest.raises(UserError, match=message):
        validate(config)
