"""Phased consistency (PCM, arXiv 2405.18407): its losses written after the paper, and a student that can be guided."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from analytic import GaussianTeacher
from small_runs import SCHEDULE, settings
from toy_denoiser import LATENT_SHAPE, toy_apply, toy_batch, toy_conditioning, toy_features, toy_params

from configs import methods, sdxl
from mlcm_jax import rng
from mlcm_jax.diffusion.parameterization import add_noise, noise_further
from mlcm_jax.distillation.context import DistillationContext
from mlcm_jax.distillation.losses.base import critic_optimizer
from mlcm_jax.distillation.segments import draw_timesteps
from mlcm_jax.distillation.state import Critic, Frozen, create
from mlcm_jax.distillation.step import make_train_step
from mlcm_jax.errors import UserError
from mlcm_jax.models.discriminator import DiscriminatorHeads
from mlcm_jax.training.batch_plan import batch_plan
from mlcm_jax.training.checks import validate
from mlcm_jax.training.stages import read_stages

NAME = "adversarial_consistency"
EDGES = np.array([749, 499, 249, 0])  # where the phases end
N = 64


def head(params, feature, groups=4):
    """A 1x1 convolution, group norm, SiLU and another one."""
    x = feature @ params["mid_block_in"]["kernel"][0, 0] + params["mid_block_in"]["bias"]
    grouped = x.reshape(*x.shape[:3], groups, -1)
    mean, variance = (f(grouped, axis=(1, 2, 4), keepdims=True) for f in (jnp.mean, jnp.var))
    x = ((grouped - mean) / jnp.sqrt(variance + 1e-5)).reshape(x.shape)
    x = jax.nn.silu(x * params["mid_block_norm"]["scale"] + params["mid_block_norm"]["bias"])
    return x @ params["mid_block_out"]["kernel"][0, 0] + params["mid_block_out"]["bias"]


@jax.jit
def pcm_losses(student, teacher, heads, batch, unconditional, seed=0):
    """Consistency, the student's adversarial loss and the discriminator's, after the paper and not after this code.

    Also the gradient, and how many targets are the teacher's state, as its step ends at the edge.
    """
    abar, conditioning = SCHEDULE.alphas_cumprod, batch.conditioning
    segment = batch.trajectory_step - 1
    t, edge = draw_timesteps(rng.stream(seed, "timesteps", 0), segment, 4), jnp.asarray(EDGES)[segment]
    s = jnp.maximum(t - 25, edge)

    def at(u):
        return abar[jnp.asarray(u)].reshape(-1, 1, 1, 1)

    def ddim(z, eps, t, s):
        return at(s) ** 0.5 * (z - (1 - at(t)) ** 0.5 * eps) / at(t) ** 0.5 + (1 - at(s)) ** 0.5 * eps

    noise = jax.random.normal(rng.stream(seed, "noise", 0), (N, *LATENT_SHAPE))
    z = at(t) ** 0.5 * batch.latents + (1 - at(t)) ** 0.5 * noise
    yes, no = (toy_apply({"params": teacher}, z, t, c) for c in (conditioning, unconditional))
    w = batch.guidance_scale[:, None, None, None] - 1  # the paper's, from 6 to 7
    z_s = ddim(z, yes + w * (yes - no), t, s)

    def to_edge(params, z, u):
        return ddim(z, toy_apply({"params": params}, z, u, conditioning), u, edge)

    def discriminate(x, key):
        time_key, noise_key = jax.random.split(key)
        u = jax.random.randint(time_key, (N,), edge, edge + 250)
        kept = at(u) / at(edge)
        noised = kept**0.5 * x + (1 - kept) ** 0.5 * jax.random.normal(noise_key, x.shape)
        return head(heads, toy_features(teacher, noised, u, conditioning))

    target = jnp.where((s == edge)[:, None, None, None], z_s, to_edge(student, z_s, s))

    def student_loss(params):
        fake = to_edge(params, z, t)
        huber = jnp.mean(jnp.sqrt((fake - target) ** 2 + 1e-6) - 1e-3)
        key = rng.named(rng.stream(seed, "terms", 0), NAME)
        adversarial = jnp.mean(jnp.maximum(1 - discriminate(fake, key), 0))
        return huber + 0.1 * adversarial, (huber, adversarial)

    key = jax.random.fold_in(rng.stream(seed, f"{NAME}_rival", 0), 0)
    real, fake = (discriminate(x, key) for x in (target, to_edge(student, z, t)))
    rival = jnp.mean(jnp.maximum(1 - real, 0)) + jnp.mean(jnp.maximum(1 + fake, 0))
    (_, losses), grads = jax.value_and_grad(student_loss, has_aux=True)(student)
    return (*losses, rival), grads, (s == edge).sum()


def pcm_settings(**values):
    config = settings(num_segments=4, states="data", skip=25, distance="pseudo_huber", **values)
    config[NAME].update({"weight": 0.1, "width": 8})
    return config


def pcm_batch():
    batch = toy_batch(N, 3, [1 + i % 4 for i in range(N)], 4)
    latents = jax.random.normal(jax.random.key(9), (N, *LATENT_SHAPE))
    return batch.replace(latents=latents, guidance_scale=jnp.linspace(7.0, 8.0, N))


def step_of(config, heads, student, teacher, batch):
    context, optimizer = DistillationContext(toy_apply, SCHEDULE, config), optax.sgd(1.0)
    step = jax.jit(make_train_step(context, optimizer, LATENT_SHAPE))
    critics = {NAME: Critic(heads, critic_optimizer(config, NAME).init(heads))}
    return step(create(student, optimizer, critics=critics), Frozen(teacher, toy_conditioning(1, 4)), batch)


@pytest.fixture(scope="module")
def heads():
    features = {"mid_block": jnp.zeros((1, *LATENT_SHAPE[:2], 16))}
    return DiscriminatorHeads(8, kernel_size=1).init(jax.random.key(8), features)["params"]


def test_losses_and_gradient_are_the_papers(heads):
    student, teacher, batch = toy_params(1), toy_params(2), pcm_batch()
    after, metrics = step_of(pcm_settings(), heads, student, teacher, batch)
    unconditional = jax.tree.map(lambda a: jnp.repeat(a, N, axis=0), toy_conditioning(1, 4))
    losses, grads, at_edges = pcm_losses(student, teacher, heads, batch, unconditional)
    assert at_edges > 3
    for name, loss in zip(("consistency", NAME, f"{NAME}_critic"), losses, strict=True):
        np.testing.assert_allclose(metrics[name], loss, rtol=1e-3, err_msg=name)
    student, after, grads = jax.device_get((student, after.params, grads))
    for name, gradient in grads.items():
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(student[name] - after[name], gradient, atol=2e-3 * scale, rtol=0)


def test_examples_without_a_prompt_are_conditioned_as_the_unconditional_branch(heads):
    student, teacher, batch = toy_params(1), toy_params(2), pcm_batch()
    empty = jnp.arange(N) % 3 == 0
    none = toy_conditioning(1, 4)
    mixed = jax.tree.map(lambda a, b: jnp.where(empty.reshape(-1, *[1] * (a.ndim - 1)), b, a), batch.conditioning, none)
    (marked, _), (given, _), (without, _) = (
        step_of(pcm_settings(), heads, student, teacher, b)
        for b in (batch.replace(without_prompt=empty), batch.replace(conditioning=mixed), batch)
    )
    jax.tree.map(np.testing.assert_array_equal, marked.params, given.params)
    assert float(jnp.abs(marked.params["a"] - without.params["a"]).max()) > 1e-4


@pytest.mark.parametrize("states", ["streaming", "data"])
def test_a_tenth_of_the_prompts_is_left_out_as_long_as_a_trajectory_lasts(states):
    config = settings(empty_prompts=0.1, states=states, batch_size=64, num_steps=200)
    plans = [batch_plan(read_stages(config), step) for step in range(40)]
    of_prompt = {}
    for plan in plans:
        for prompt, empty in zip(plan.prompts, plan.without_prompt, strict=True):
            assert of_prompt.setdefault(int(prompt), bool(empty)) == empty
    share = np.mean(list(of_prompt.values()))
    assert abs(share - 0.1) < 3 * np.sqrt(0.1 * 0.9 / len(of_prompt))
    assert not batch_plan(read_stages(settings(states=states)), 0).without_prompt.any()


def test_a_teacher_without_guidance_is_asked_for_its_conditional_branch_alone():
    asked, frozen = [], Frozen(toy_params(2), toy_conditioning(1, 4))
    batch, z = toy_batch(8, 3, [0] * 8, 4, guidance_scale=1.0), jax.random.normal(jax.random.key(0), (8, *LATENT_SHAPE))

    def counted(variables, z, *rest):
        asked.append(len(z))
        return toy_apply(variables, z, *rest)

    def x0(**guidance):
        context = DistillationContext(counted, SCHEDULE, settings(**guidance))
        return jax.jit(context.teacher_x0)(frozen, batch.condition, z, jnp.full(8, 499))

    drawn = x0(guidance_scale=1.0, guidance_scale_max=2.0)
    np.testing.assert_allclose(x0(guidance_scale=1.0), drawn, atol=1e-5)
    assert asked == [16, 8]
    stages = read_stages(settings(guidance_scale=1.0, stages=({"start": 5, "guidance_scale": 2.0},)))
    assert stages[0].program_key() != stages[1].program_key()


def test_noising_further_is_noising():
    """Two steps of it have the moments of one: the mean of the clean latents, the variance of the later timestep."""
    x0, noise, more = (jax.random.normal(jax.random.key(k), (4096, 2, 2, 1)) for k in range(3))
    t, s = jnp.full(4096, 249), jnp.full(4096, 400)
    z = noise_further(SCHEDULE, add_noise(SCHEDULE, x0, noise, t), more, t, s)
    abar = float(SCHEDULE.alphas_cumprod[400])
    np.testing.assert_allclose(jnp.mean(z * x0), abar**0.5, atol=0.02)
    np.testing.assert_allclose(jnp.var(z - abar**0.5 * x0), 1 - abar, rtol=0.03)
    np.testing.assert_allclose(noise_further(SCHEDULE, z, more, s, s), z, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "x0", f"{NAME}.weight": 0.1}, "target='x0' compares clean ones"),
        ({f"{NAME}.width": 3}, "an even number"),
        ({"empty_prompts": 1.0}, "less than 1"),
        ({"empty_prompts": 0.1, "negative_prompt": "grey"}, "leave negative_prompt empty"),
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
        config = file.get_config("pcm")
        assert (config.num_segments, config.skip, config.states, config.target) == (4, 25, "data", "boundary")
        assert config[NAME].weight == 0.1
        without_cfg = file.get_config("pcm_no_cfg")
        assert (without_cfg.guidance_scale, without_cfg.empty_prompts) == (1.0, 0.1)
    assert (config.guidance_scale, config.guidance_scale_max) == (7.0, 8.0)


def test_the_true_solution_has_no_loss_but_the_solvers_error():
    """A student that goes along the teacher's flow to the boundary, in a whole step."""
    teacher = GaussianTeacher(SCHEDULE, mean=0.4, std=0.5)

    def apply(variables, z, t, conditioning):
        if "teacher" in variables["params"]:
            return teacher.eps(z, t)
        edge = jnp.asarray(EDGES)[jnp.clip((4 * (1000 - t) - 1) // 1000, 0, 3)]
        abar_t, abar_s = (SCHEDULE.alphas_cumprod[u][:, None, None, None] for u in (t, edge))
        ratio = jnp.sqrt((1 - abar_s) / (1 - abar_t))
        x0 = (teacher.flow(z, t, edge) - ratio * z) / (jnp.sqrt(abar_s) - ratio * jnp.sqrt(abar_t))
        wrong = variables["params"]["factor"]
        return (z - jnp.sqrt(abar_t) * wrong * x0) / jnp.sqrt(1 - abar_t)

    def loss(skip, factor=1.0):
        config = settings(num_segments=4, states="data", skip=skip, distance="l2")
        step = make_train_step(DistillationContext(apply, SCHEDULE, config), optax.sgd(0.0), LATENT_SHAPE)
        state = create({"factor": jnp.float32(factor)}, optax.sgd(0.0))
        frozen = Frozen({"teacher": jnp.zeros(1)}, toy_conditioning(1, 4))
        return float(jax.jit(step)(state, frozen, pcm_batch())[1]["consistency"])

    fine, coarse, wrong = loss(25), loss(50), loss(25, 1.2)
    assert fine < 0.3 * coarse and fine < 0.05 * wrong, (fine, coarse, wrong)
