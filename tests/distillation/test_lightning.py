"""SDXL-Lightning (arXiv 2402.13929): the teacher's steps, both objectives, and the discriminator that is a copy."""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from analytic import GaussianTeacher
from small_runs import SCHEDULE, settings
from toy_denoiser import LATENT_SHAPE, toy_batch, toy_conditioning

from mlcm_jax import rng
from mlcm_jax.diffusion.schedule import alpha_sigma
from mlcm_jax.distillation.context import DistillationContext
from mlcm_jax.distillation.distances import l2
from mlcm_jax.distillation.losses import create_critics
from mlcm_jax.distillation.losses.base import CriticShapes, Examples, LossInputs
from mlcm_jax.distillation.losses.progressive_adversarial import ProgressiveAdversarial
from mlcm_jax.distillation.segments import boundaries, segment_boundaries
from mlcm_jax.distillation.state import Frozen, create
from mlcm_jax.distillation.states import Draws, SourceContext
from mlcm_jax.distillation.step import make_train_step
from mlcm_jax.distillation.targets import to_boundary
from mlcm_jax.errors import UserError
from mlcm_jax.training.checks import validate

N, M, NAME = 8, 2, "progressive_adversarial"
ABAR = np.asarray(SCHEDULE.alphas_cumprod)


class Middle(nn.Module):
    @nn.compact
    def __call__(self, h):
        return jnp.tanh(nn.Dense(8, name="mix")(h))


class Toy(nn.Module):
    """A denoiser with the parts of a UNet that a discriminator takes."""

    @nn.compact
    def __call__(self, z, t, conditioning):
        shift = (t / 1000 + conditioning.pooled.mean(axis=1))[:, None, None, None]
        h = jnp.tanh(nn.Dense(8, name="conv_in")(z) + shift)
        return nn.Dense(2, name="conv_out")(Middle(name="mid_block")(h))


def feature(params, z, t, conditioning):
    """The middle of ``Toy``, written down."""
    shift = (jnp.asarray(t) / 1000 + conditioning.pooled.mean(axis=1))[:, None, None, None]
    h = jnp.tanh(z @ params["conv_in"]["kernel"] + params["conv_in"]["bias"] + shift)
    mix = params["mid_block"]["mix"]
    return jnp.tanh(h @ mix["kernel"] + mix["bias"])


def toy_params(seed):
    z = jnp.zeros((1, *LATENT_SHAPE))
    return Toy().init(jax.random.key(seed), z, jnp.zeros(1), toy_conditioning(1, 0))["params"]


STUDENT, PREVIOUS, TEACHER = (toy_params(seed) for seed in (1, 2, 3))
FROZEN = Frozen(TEACHER, toy_conditioning(1, 4))
BATCH = toy_batch(N, 3, jnp.arange(N) % M, M).replace(
    latents=jax.random.normal(jax.random.key(9), (N, *LATENT_SHAPE)), renews_teacher=jnp.bool_(False)
)
T, BOUNDARY = (np.array(side)[np.arange(N) % M] for side in ([999, 499], [499, 0]))


def lightning(**values):
    milestones = {"timesteps": "milestones", "skip": 1000, "solver_steps": 2, "num_segments": M}
    config = settings(**milestones | {"states": "data", "pure_noise": True, "teacher_network": "previous"} | values)
    config.consistency.weight = 0.0
    config[NAME].update({"weight": 1.0, "width": 4})
    return config


def moved(params, z, t, s, prediction_type=""):
    """One DDIM step from t to s by a network without guidance, whose output is the noise or, "sample", x0."""
    a, b = (ABAR[u].reshape(-1, 1, 1, 1) for u in (t, s))
    output = Toy().apply({"params": params}, z, jnp.asarray(t), BATCH.conditioning)
    x0, eps = (z - np.sqrt(1 - a) * output) / np.sqrt(a), output
    if prediction_type == "sample":
        x0, eps = output, (z - np.sqrt(a) * output) / np.sqrt(1 - a)
    return np.sqrt(b) * x0 + np.sqrt(1 - b) * eps


@partial(jax.jit, static_argnums=0)
def states(former_type):
    """Noised latents, the noise alone at t = 999, and where the student of four steps comes to in two."""
    noise = jax.random.normal(rng.stream(0, "noise", 0), (N, *LATENT_SHAPE))
    a = ABAR[T].reshape(-1, 1, 1, 1)
    noised = np.sqrt(a) * BATCH.latents + np.sqrt(1 - a) * noise
    z = jnp.where((T == 999)[:, None, None, None], noise, noised)
    middle = np.where(T == 999, 749, 249)
    former = partial(moved, PREVIOUS, prediction_type=former_type)
    return z, former(former(z, T, middle), middle, BOUNDARY)


def head_of(params, begin, end):
    """The head in a few lines: norms of two groups, as the width is 4."""
    x = jnp.concatenate([begin, end], axis=-1)
    for i in range(2):
        conv, norm = params[f"convs_{i}"], params[f"norms_{i}"]
        same = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
        x = jax.lax.conv_general_dilated(x, conv["kernel"], (2, 2), [(1, 1), (1, 1)], **same) + conv["bias"]
        groups = x.reshape(len(x), -1, 2, 2)
        mean, variance = (f(groups, axis=(1, 3), keepdims=True) for f in (jnp.mean, jnp.var))
        x = ((groups - mean) / jnp.sqrt(variance + 1e-5)).reshape(x.shape) * norm["scale"] + norm["bias"]
        x = x / (1 + jnp.exp(-x))
    return (x @ params["out"]["kernel"][0, 0] + params["out"]["bias"]).mean(axis=(1, 2))


def logit(critic, z, end, relaxed):
    encoder = {name: jax.tree.map(jnp.add, TEACHER[name], critic["encoder"][name]) for name in ("conv_in", "mid_block")}
    there = feature(encoder, end, BOUNDARY, BATCH.conditioning)
    begin = 0 * there if relaxed else feature(encoder, z, T, BATCH.conditioning)
    return head_of(critic["head"], begin, there)


def critic_of(config, scale=0.0, former_type=""):
    """The loss's context and its critic, whose parameters are moved by random numbers of that size."""
    context = DistillationContext(Toy().apply, SCHEDULE, config, former_prediction_type=former_type)
    latents = jnp.zeros((N, *LATENT_SHAPE))
    shapes = CriticShapes(*jax.eval_shape(lambda *a: a, TEACHER, BATCH.conditioning, latents))
    critics = create_critics(context, jax.random.key(5), STUDENT, shapes)
    draw = np.random.default_rng(6).standard_normal
    params = jax.tree.map(lambda a: a + np.float32(scale) * draw(a.shape, np.float32), critics[NAME].params)
    return context, {NAME: dataclasses.replace(critics[NAME], params=params)}


@pytest.mark.parametrize(
    ("relaxed", "own", "former"), [(False, "", ""), (True, "", ""), (False, "sample", ""), (True, "sample", "sample")]
)
def test_the_step_is_lightnings(relaxed, own, former):
    """softplus(-D) of the student's state after one step, the squared distance to the teacher's state after two."""
    config, optimizer = lightning(student_prediction_type=own), optax.sgd(1.0)
    config[NAME].relaxed = relaxed
    context, critics = critic_of(config, 0.3, former)
    critic = critics[NAME].params
    state = create(STUDENT, optimizer, critics=critics, with_previous=True).replace(previous_student=PREVIOUS)
    after, metrics = jax.jit(make_train_step(context, optimizer, LATENT_SHAPE))(state, FROZEN, BATCH)
    z, real = states(former)

    @jax.jit
    @jax.value_and_grad
    def generator(params):
        return jnp.mean(jnp.log1p(jnp.exp(-logit(critic, z, moved(params, z, T, BOUNDARY, own), relaxed))))

    @jax.jit
    def fake_and_logits():
        fake = moved(STUDENT, z, T, BOUNDARY, own)
        return fake, *(logit(critic, z, end, relaxed) for end in (fake, real))

    fake, ours, theirs = jax.device_get(fake_and_logits())
    np.testing.assert_allclose(metrics["consistency"], np.mean((fake - real) ** 2), rtol=1e-3)
    loss, grads = jax.device_get(generator(STUDENT))
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-4)
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(grads))
    before, critic, after = jax.device_get((STUDENT, critic, after))
    jax.tree.map(
        lambda a, b, g: np.testing.assert_allclose(a - b, g, atol=2e-3 * scale, rtol=0), before, after.params, grads
    )
    discriminator = np.mean(np.log1p(np.exp(-theirs))) + np.mean(np.log1p(np.exp(ours)))
    np.testing.assert_allclose(metrics[f"{NAME}_critic"], discriminator, rtol=1e-4)
    trained = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), critic, after.critics[NAME].params)
    assert min(jax.tree.leaves((trained["encoder"], trained["head"]["convs_1"]))) > 0, "the encoder is trained, too"


def test_the_discriminator_starts_as_the_teachers_encoder():
    context, critics = critic_of(lightning())
    critic = critics[NAME].params
    assert set(critic["encoder"]) == {"conv_in", "mid_block"}
    assert all(not leaf.any() for leaf in jax.tree.leaves(critic["encoder"]))
    z, end = jax.random.normal(jax.random.key(0), (2, N, *LATENT_SHAPE))

    @jax.jit
    def both():
        examples = Examples(z, jnp.asarray(T), jnp.asarray(BOUNDARY), jnp.full(N, 500), end, None, BATCH.condition, {})
        inputs = LossInputs(end, examples, FROZEN, jax.random.key(0))
        return ProgressiveAdversarial(context)._logits(critic, inputs, end), logit(critic, z, end, False)

    np.testing.assert_allclose(*both(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("segments", [1, 2, 4])
def test_a_former_student_is_asked_where_it_was_trained_and_true_ones_have_no_loss(segments):
    """Down to the last timestep: the student of 2 M steps is asked at its own boundaries, the last of which is 124."""
    teacher, asked = GaussianTeacher(SCHEDULE, mean=-0.3, std=0.6), []
    fine = boundaries(2 * segments)
    after = jnp.zeros(1000, jnp.int32).at[fine[:-1]].set(fine[1:])
    place = jnp.arange(N) % segments
    t, boundary = segment_boundaries(place, segments)
    z = teacher.flow(jax.random.normal(jax.random.key(2), (N, 3, 3, 2)), jnp.full(N, 999), t)

    def true_x0(z, t, end=None):
        end = after[t] if end is None else end
        (a_t, s_t), (a_s, s_s) = alpha_sigma(SCHEDULE, t), alpha_sigma(SCHEDULE, end)
        return (teacher.flow(z, t, end) - s_s / s_t * z) / (a_s - a_t * s_s / s_t)

    def watched(z, t):
        jax.debug.callback(lambda t: asked.extend(np.asarray(t).tolist()), t)
        return true_x0(z, t)

    config = lightning(num_segments=segments)
    source = SourceContext(SCHEDULE, config, watched, true_x0, jax.random.key(0), jax.random.key(1))
    real = source.teacher_step(Draws(place, jnp.int32(segments), z), z, t, boundary, z)
    jax.effects_barrier()
    assert set(asked) == set(fine[:-1].tolist())
    answer = to_boundary(SCHEDULE, z, true_x0(z, t, boundary), t, boundary)
    assert float(l2(answer, real).max()) < 1e-8


def test_a_discriminator_without_the_teachers_state_is_refused():
    config = lightning(teacher="t", prompts="p", latents="l", skip=20)
    config.sample.prompts = "p"
    with pytest.raises(UserError, match="set target='boundary' and skip=1000"):
        validate(config)
