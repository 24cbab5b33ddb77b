"""Stochastic consistency distillation (SCott, arXiv 2403.01505): its losses written after the paper."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_runs import SCHEDULE, random_like, settings
from toy_denoiser import LATENT_SHAPE, toy_apply, toy_batch, toy_conditioning, toy_features, toy_params

from configs import methods, sdxl
from mlcm_jax import rng
from mlcm_jax.distillation.context import DistillationContext
from mlcm_jax.distillation.losses.adversarial import Adversarial
from mlcm_jax.distillation.losses.base import critic_optimizer
from mlcm_jax.distillation.segments import draw_timesteps
from mlcm_jax.distillation.state import Critic, Frozen, create
from mlcm_jax.distillation.step import make_train_step
from mlcm_jax.errors import UserError
from mlcm_jax.models.discriminator import DiscriminatorHeads
from mlcm_jax.training.checks import validate

N = 32


def scott_settings(**values):
    config = settings(
        num_segments=1,
        states="data",
        skip=24,
        solver_steps=3,
        target_solver="er_sde",
        target_noise=0.5,
        target="x0",
        target_network="ema",
        ema_decay=0.95,
        distance="pseudo_huber",
        **values,
    )
    config.adversarial.update({"weight": 0.4, "width": 8, "features": "decoder"})
    return config


def sde_step(z, eps, a_t, a_s, noise, strength):
    """ER-SDE's first order step in its own form, whose noise is made weaker at the same marginal."""
    phi = [x * (jnp.exp(x**0.3) + 10) for x in (((1 - a) / a) ** 0.5 for a in (a_t, a_s))]
    l_t, l_s = (((1 - a) / a) ** 0.5 for a in (a_t, a_s))
    added = strength * a_s**0.5 * jnp.sqrt(l_s**2 - (l_t * phi[1] / phi[0]) ** 2)
    x0 = (z - (1 - a_t) ** 0.5 * eps) / a_t**0.5
    return a_s**0.5 * x0 + jnp.sqrt(1 - a_s - added**2) * eps + added * noise


@functools.partial(jax.jit, static_argnames="seed")
def scott_losses(student, average, teacher, heads, batch, unconditional, seed=0):
    """Consistency, the student's adversarial loss and the discriminator's; the gradient."""
    abar, conditioning = SCHEDULE.alphas_cumprod, batch.conditioning

    def at(u):
        return abar[jnp.asarray(u)].reshape(-1, 1, 1, 1)

    def x0(params, z, u):
        return (z - (1 - at(u)) ** 0.5 * toy_apply({"params": params}, z, u, conditioning)) / at(u) ** 0.5

    noise = jax.random.normal(rng.stream(seed, "noise", 0), (N, *LATENT_SHAPE))
    t = draw_timesteps(rng.stream(seed, "timesteps", 0), jnp.zeros(N, jnp.int32), 1)
    z = z_m = at(t) ** 0.5 * batch.latents + (1 - at(t)) ** 0.5 * noise
    key = rng.named(rng.stream(seed, "student_samples", 0), "target_solver")
    for j in range(3):
        u, v = t - 8 * j, t - 8 * (j + 1)
        no, yes = (toy_apply({"params": teacher}, z, u, c) for c in (unconditional, conditioning))
        eps = no + batch.guidance_scale[:, None, None, None] * (yes - no)
        z = sde_step(z, eps, at(u), at(v), jax.random.normal(jax.random.fold_in(key, j), z.shape), 0.5)
    target = jnp.where((v == 0)[:, None, None, None], z, x0(average, z, v))

    def discriminate(latents, key):
        time_key, noise_key = jax.random.split(key)
        u = jax.random.randint(time_key, (N,), 20, 981)
        noised = at(u) ** 0.5 * latents + (1 - at(u)) ** 0.5 * jax.random.normal(noise_key, latents.shape)
        feature = toy_features(teacher, noised, u, conditioning) ** 2  # the decoder's
        return DiscriminatorHeads(8).apply({"params": heads}, {"up_blocks_0": feature})[0]

    def student_loss(params):
        fake = x0(params, z_m, t)
        huber = jnp.mean(jnp.sqrt((fake - target) ** 2 + 1e-6) - 1e-3)
        adversarial = -jnp.mean(discriminate(fake, rng.named(rng.stream(seed, "terms", 0), "adversarial")))
        return huber + 0.4 * adversarial, (huber, adversarial)

    key = jax.random.fold_in(rng.stream(seed, "adversarial_rival", 0), 0)
    real, fake = (discriminate(latents, key) for latents in (batch.latents, x0(student, z_m, t)))
    rival = jnp.mean(jnp.maximum(1 - real, 0)) + jnp.mean(jnp.maximum(1 + fake, 0))
    (_, losses), grads = jax.value_and_grad(student_loss, has_aux=True)(student)
    return (*losses, rival), grads


def test_losses_and_gradient_are_the_papers():
    student, average, teacher = (toy_params(seed) for seed in (1, 5, 2))
    seed = next(s for s in range(99) if _timesteps(s).min() >= 24)
    batch = toy_batch(N, 3, [1] * N, 1, run_seed=seed)
    batch = batch.replace(latents=jax.random.normal(jax.random.key(9), (N, *LATENT_SHAPE)))
    features = {"up_blocks_0": jnp.zeros((1, *LATENT_SHAPE[:2], 16))}
    heads = DiscriminatorHeads(8).init(jax.random.key(8), features)["params"]
    config, optimizer = scott_settings(), optax.sgd(1.0)
    critics = {"adversarial": Critic(heads, critic_optimizer(config, "adversarial").init(heads))}
    state = dataclasses.replace(create(student, optimizer, with_ema=True, critics=critics), ema=average)
    step = make_train_step(DistillationContext(toy_apply, SCHEDULE, config), optimizer, LATENT_SHAPE)
    after, metrics = jax.jit(step)(state, Frozen(teacher, toy_conditioning(1, 4)), batch)
    unconditional = jax.tree.map(lambda a: jnp.repeat(a, N, axis=0), toy_conditioning(1, 4))
    losses, grads = scott_losses(student, average, teacher, heads, batch, unconditional, seed)
    for name, loss in zip(("consistency", "adversarial", "adversarial_critic"), losses, strict=True):
        np.testing.assert_allclose(metrics[name], loss, rtol=1e-3, err_msg=name)
    student, after, grads = jax.device_get((student, after.params, grads))
    for name, gradient in grads.items():
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(student[name] - after[name], gradient, atol=2e-3 * scale, rtol=0)


def _timesteps(seed):
    return np.asarray(draw_timesteps(rng.stream(seed, "timesteps", 0), jnp.zeros(N, jnp.int32), 1))


def test_the_discriminator_reads_the_decoder_and_knows_time_and_text(architecture):
    """The heads are made for the blocks on the way up; their logits change with the timestep and with the prompt."""
    apply, config = architecture.unet.module.apply, scott_settings()
    loss = Adversarial(DistillationContext(apply, SCHEDULE, config))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, np.float32, sharding=place), architecture.unet.params)
    teacher = random_like(shapes, 0, 0.1)
    z = jax.random.normal(jax.random.key(0), (1, 8, 8, 4))
    conditioning = toy_conditioning(1, 1).replace(
        hidden_states=jax.random.normal(jax.random.key(2), (1, 7, 64)), pooled=jnp.ones((1, 32))
    )

    @jax.jit
    def features(t, conditioning):
        return loss._features(teacher, z, t, conditioning)

    first = features(jnp.array([500]), conditioning)
    assert set(first) == {"up_blocks_0"}
    later = features(jnp.array([700]), conditioning)
    other = features(jnp.array([500]), conditioning.replace(hidden_states=-conditioning.hidden_states))
    for changed in (later, other):
        assert float(jnp.abs(changed["up_blocks_0"] - first["up_blocks_0"]).max()) > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_solver": "er_sde"}, "states='streaming' has none"),
        ({"trajectory_solver": "ddim_sde"}, "one of ddim, dpmpp_2m, addim"),
        ({"target_noise": 1.5}, "from 0 to 1"),
        ({"adversarial.features": "middle"}, "one of encoder, decoder"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message):
    config = settings(teacher="t", prompts="p")
    config.sample.prompts = "p"
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        validate(config)


def test_the_configurations_are_the_papers():
    for file in (methods, sdxl):
        config = file.get_config("scott")
        assert (config.skip, config.solver_steps, config.target, config.ema_decay) == (24, 3, "x0", 0.95)
        assert (config.adversarial.weight, config.adversarial.features) == (0.4, "decoder")
        assert config.sampler == "lcm", "which noises clean latents, as the states are made"
