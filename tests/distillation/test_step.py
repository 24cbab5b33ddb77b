"""The distillation step: its gradient, its schedule of segments, and the same result on every mesh."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_runs import SCHEDULE, random_like, settings
from toy_denoiser import LATENT_SHAPE, toy_apply, toy_batch, toy_conditioning, toy_params, toy_state

from mlcm_jax import rng
from mlcm_jax.distillation.context import DistillationContext
from mlcm_jax.distillation.segments import draw_timesteps, segment_boundaries
from mlcm_jax.distillation.state import Frozen, create, student_variables, update_ema
from mlcm_jax.distillation.step import make_train_step
from mlcm_jax.rng import seed_words
from mlcm_jax.training.batch_plan import batch_plan
from mlcm_jax.training.program import build_program


def reference_gradient(student, teacher, batch, unconditional, step, config):
    """Loss and gradient of one step from pure noise in plain Python: arXiv 2406.05768's stage 1."""
    n, conditioning = len(batch.trajectory_step), batch.conditioning
    z = jax.random.normal(rng.stream(config.seed, "noise", step), (n, *LATENT_SHAPE))
    trajectory_step = int(batch.trajectory_step[0])
    segment = jnp.full((n,), max(trajectory_step - 1, 0))
    upper, boundary = segment_boundaries(segment, config.num_segments)
    t_m = (
        draw_timesteps(rng.stream(config.seed, "timesteps", step), segment, config.num_segments)
        if trajectory_step
        else upper
    )
    t_n = jnp.maximum(t_m - config.skip, boundary)
    abar = np.asarray(SCHEDULE.alphas_cumprod, np.float64)

    def ddim(z, eps, t, s):
        a, b = (abar[np.asarray(u)][:, None, None, None].astype(np.float32) for u in (t, s))
        x0 = (z - np.sqrt(1 - a) * eps) / np.sqrt(a)
        return np.sqrt(b) * x0 + np.sqrt(1 - b) * eps

    def teacher_eps(z, t):
        no, yes = (toy_apply({"params": teacher}, z, t, c) for c in (unconditional, conditioning))
        return no + config.guidance_scale * (yes - no)

    def student_answer(params, z, t):
        return ddim(z, toy_apply({"params": params}, z, t, conditioning), t, boundary)

    times = [999 - (999 - np.asarray(t_m)) * j // max(trajectory_step, 1) for j in range(trajectory_step + 1)]
    for t, s in itertools.pairwise(times):
        z = ddim(z, teacher_eps(z, t), t, s)
    z_n = ddim(z, teacher_eps(z, t_m), t_m, t_n)
    target = student_answer(student, z_n, t_n)  # not a function of what the gradient is taken for
    return jax.value_and_grad(lambda p: jnp.mean((student_answer(p, z, t_m) - target) ** 2))(student)


def toy_step(config, optimizer):
    return jax.jit(make_train_step(DistillationContext(toy_apply, SCHEDULE, config), optimizer, LATENT_SHAPE))


@pytest.mark.parametrize(
    ("states", "trajectory_step", "skip"),
    [("mds", 1, 60), ("mds", 2, 60), ("mds", 3, 60), ("mds", 2, 1000), ("streaming", 0, 60), ("streaming", 0, 1000)],
)
def test_gradients_are_those_of_the_loss_with_teacher_and_target_held_fixed(states, trajectory_step, skip):
    config = settings(num_segments=3, skip=skip, states=states)
    student, teacher = toy_params(1), toy_params(2)
    unconditional, batch = toy_conditioning(1, 4), toy_batch(4, 3, [trajectory_step] * 4, 3)
    optimizer = optax.sgd(1.0)
    step_fn, state = toy_step(config, optimizer), toy_state(student, optimizer, 4)
    repeated = jax.tree.map(lambda a: jnp.repeat(a, 4, axis=0), unconditional)
    before = dataclasses.replace(state, step=jnp.int32(trajectory_step))
    after, metrics = step_fn(before, Frozen(teacher, unconditional), batch)
    loss, grads = reference_gradient(student, teacher, batch, repeated, trajectory_step, config)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-3)
    assert float(optax.tree.norm(grads)) > 1e-4
    for name, gradient in grads.items():
        scale = float(jnp.abs(gradient).max())
        np.testing.assert_allclose(student[name] - after.params[name], gradient, atol=2e-3 * scale, rtol=0)


def lcm_loss(student, target, teacher, batch, unconditional, step, config):
    """Latent consistency distillation (arXiv 2310.04378) in plain Python, after its paper and not after this code."""
    n, abar = len(batch.trajectory_step), np.asarray(SCHEDULE.alphas_cumprod)
    noise = jax.random.normal(rng.stream(config.seed, "noise", step), (n, *LATENT_SHAPE))
    t = draw_timesteps(rng.stream(config.seed, "timesteps", step), jnp.zeros(n, jnp.int32), 1)
    a, b = (abar[np.asarray(u)].reshape(n, 1, 1, 1) for u in (t, jnp.maximum(t - 20, 0)))
    z = a**0.5 * batch.latents + (1 - a) ** 0.5 * noise
    w = batch.guidance_scale[:, None, None, None] - 1  # the paper's w: 0 is no guidance
    yes, no = (toy_apply({"params": teacher}, z, t, c) for c in (batch.conditioning, unconditional))
    eps = yes + w * (yes - no)
    z_prev = b**0.5 * (z - (1 - a) ** 0.5 * eps) / a**0.5 + (1 - b) ** 0.5 * eps

    def f(params, z, t, a):
        c_skip = 0.25 / ((10.0 * t) ** 2 + 0.25)
        c_out = (10.0 * t) / ((10.0 * t) ** 2 + 0.25) ** 0.5
        x0 = (z - (1 - a) ** 0.5 * toy_apply({"params": params}, z, t, batch.conditioning)) / a**0.5
        return c_skip[:, None, None, None] * z + c_out[:, None, None, None] * x0

    d = f(student, z, t, a) - f(target, z_prev, jnp.maximum(t - 20, 0), b)
    return jnp.mean(jnp.sqrt(d**2 + 1e-6) - 1e-3)


def test_lcm_is_a_point_of_the_same_space():
    config = settings(
        num_segments=1,
        states="data",
        skip=20,
        target="x0",
        target_network="ema",
        distance="pseudo_huber",
        ema_decay=0.95,
    )
    student, average, teacher = (toy_params(seed) for seed in (1, 5, 2))
    batch = toy_batch(64, 3, [1] * 64, 1)
    batch = batch.replace(
        latents=jax.random.normal(jax.random.key(9), (64, *LATENT_SHAPE)),
        guidance_scale=jnp.linspace(3.0, 15.0, 64),
    )
    unconditional = toy_conditioning(1, 4)
    state = dataclasses.replace(create(student, optax.sgd(1.0), with_ema=True), ema=average)
    after, metrics = toy_step(config, optax.sgd(1.0))(state, Frozen(teacher, unconditional), batch)
    repeated = jax.tree.map(lambda a: jnp.repeat(a, 64, axis=0), unconditional)
    loss, grads = jax.value_and_grad(lcm_loss)(student, average, teacher, batch, repeated, 0, config)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-4)
    for name, gradient in grads.items():
        scale = float(jnp.abs(gradient).max())
        np.testing.assert_allclose(student[name] - after.params[name], gradient, atol=2e-3 * scale, rtol=0)
        np.testing.assert_allclose(after.ema[name], 0.95 * average[name] + 0.05 * after.params[name], rtol=1e-5)


@pytest.mark.parametrize("distance", ["l2", "pseudo_huber"])
def test_repeated_steps_lower_the_loss_and_keep_the_average(distance):
    config = settings(distance=distance, ema_decay=0.5)
    student, optimizer = toy_params(1), optax.sgd(0.0)
    still = toy_state(student, optimizer, 4, with_ema=True)
    frozen = Frozen(student, toy_conditioning(1, 4))
    batch = toy_batch(4, 3, [0] * 4, 4)
    state, metrics = toy_step(config, optimizer)(still, frozen, batch)
    assert int(state.step) == 1
    for a, b in zip(jax.tree.leaves((state.params, state.ema)), jax.tree.leaves((student, student)), strict=True):
        np.testing.assert_array_equal(a, b)

    optimizer = optax.sgd(0.05)
    moved, _ = toy_step(config, optimizer)(toy_state(student, optimizer, 4, with_ema=True), frozen, batch)
    assert moved.ema is not None and moved.trained is moved.ema
    for name in student:
        np.testing.assert_allclose(moved.ema[name], 0.5 * student[name] + 0.5 * moved.params[name], rtol=1e-5)
    # the step's draws are a function of state.step: at the same step the loss must be lower after the update
    again = dataclasses.replace(moved, step=still.step)
    assert float(toy_step(config, optimizer)(again, frozen, batch)[1]["loss"]) < float(metrics["loss"])


def test_one_program_serves_every_seed():
    optimizer, frozen = optax.sgd(0.1), Frozen(toy_params(2), toy_conditioning(1, 4))
    state, step = toy_state(toy_params(1), optimizer, 4), toy_step(settings(), optimizer)
    for seed in (0, 7, 7 + 2**32, rng.MAX_SEED):
        batch = toy_batch(4, 3, [0] * 4, 4, run_seed=seed)
        unconditional = jax.tree.map(lambda a: jnp.repeat(a, 4, axis=0), frozen.unconditional)
        alone = reference_gradient(state.params, frozen.teacher, batch, unconditional, 0, settings(seed=seed))
        np.testing.assert_allclose(step(state, frozen, batch)[1]["loss"], alone[0], rtol=1e-4)
    assert step._cache_size() == 1


def test_update_ema():
    ema = update_ema({"w": jnp.float32(1.0)}, {"w": jnp.bfloat16(3.0)}, 0.75)
    assert ema["w"].dtype == jnp.float32 and float(ema["w"]) == 1.5


# --- the real network on one device and on meshes of them

MESHES = {1: (1, 1, 1), 4: (2, 2, 1), 8: (2, 2, 2)}
ALONE = (1, 1)  # devices, microbatches
SHARDED = [[(8, 2)], pytest.param([(8, 1), (4, 1), (4, 2)], marks=pytest.mark.slow)]  # all at once; one thing at a time


def run_steps(architecture, config, num_devices, num_steps):
    data, fsdp, tensor = MESHES[num_devices]
    config.mesh.update({"data": data, "fsdp": fsdp, "tensor": tensor})
    program = build_program(config, architecture, jax.devices()[:num_devices])
    frozen = Frozen(random_like(program.frozen.teacher, 0, 0.1), random_like(program.frozen.unconditional, 1, 1.0))
    (stage,) = program.stages
    batch = stage.batch.replace(
        conditioning=random_like(stage.batch.conditioning, 2, 1.0),
        num_segments=jax.device_put(np.int32(config.num_segments), stage.batch.num_segments.sharding),
        guidance_scale=jax.device_put(np.full(config.batch_size, 3, np.float32), stage.batch.trajectory_step.sharding),
        seed=jax.device_put(seed_words(config.seed), stage.batch.seed.sharding),
    )
    teacher = random_like(program.frozen.teacher, 0, 0.1) if config.trainable == "full" else None
    state = program.init_state(teacher)
    before = jax.device_get((frozen.teacher, state.params))
    losses = []
    for step in range(num_steps):
        trajectory_step = batch_plan((stage.stage,), step).trajectory_step.astype(np.int32)
        batch = batch.replace(trajectory_step=jax.device_put(trajectory_step, stage.batch.trajectory_step.sharding))
        state, metrics = stage.step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, before[0], jax.device_get(frozen.teacher))))
    return program, losses, before[1], state


@pytest.mark.parametrize("runs", SHARDED, ids=str)
def test_full_training_is_the_same_on_every_mesh(architecture, runs):
    config = settings(num_segments=2, ema_decay=0.9)
    results = {}
    for devices, config.microbatches in (ALONE, *runs):
        results[devices, config.microbatches] = run_steps(
            architecture, config.copy_and_resolve_references(), devices, 3
        )
    _, losses, start, state = results[ALONE]
    expected = jax.device_get(state.params)
    assert min(losses) > 1e-5
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), expected, start)
    assert max(jax.tree.leaves(moved)) > 1e-4, "the updates are too small to compare"
    for run in runs:
        program, sharded_losses, _, sharded = results[run]
        assert program.plan.sharded_fraction > 0.3
        np.testing.assert_allclose(sharded_losses, losses, rtol=1e-4)
        difference = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), expected, jax.device_get(sharded.params))
        assert max(jax.tree.leaves(difference)) < 1e-5
        for array, planned in zip(jax.tree.leaves(sharded), jax.tree.leaves(program.state), strict=True):
            assert array.sharding.is_equivalent_to(planned.sharding, array.ndim)


def test_a_lora_starts_as_the_teacher_and_trains_beside_it(architecture):
    config = settings(num_segments=2, trainable="lora")
    config.lora.update({"rank": 4, "alpha": 8.0, "targets": (r"/to_(q|k|v|out_0)$", r"/conv[12]$")})
    program, losses, start, state = run_steps(architecture, config, 4, 1)
    assert np.isfinite(losses).all() and losses[0] > 1e-5
    ups = [jnp.abs(leaf).max() for path, leaf in jax.tree.leaves_with_path(state.params) if path[-1].key == "up"]
    assert min(float(up) for up in ups) > 0, "every factor is trained from the first step on"

    teacher = random_like(program.frozen.teacher, 0, 0.1)
    variables = student_variables(jax.device_put(start), teacher, config)
    latents = jax.random.normal(jax.random.key(0), (8, *program.latent_shape))
    t, conditioning = jnp.full((8,), 500), random_like(program.stages[0].batch.conditioning, 2, 1.0)
    module = architecture.unet.module
    student, reference = (jax.jit(module.apply)(v, latents, t, conditioning) for v in (variables, {"params": teacher}))
    np.testing.assert_allclose(student, reference, rtol=0, atol=1e-6 * float(jnp.abs(reference).max()))
