"""The losses beside the consistency loss: their gradients, their critics, and a whole step with all of them."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from analytic import GaussianTeacher
from small_runs import SCHEDULE, random_like, settings
from toy_denoiser import LATENT_SHAPE, toy_apply, toy_batch, toy_conditioning, toy_params

from mlcm_jax.diffusion.parameterization import add_noise
from mlcm_jax.distillation.context import DistillationContext
from mlcm_jax.distillation.losses import Examples, LossInputs, read_frozen_networks
from mlcm_jax.distillation.losses.adversarial import generator_loss
from mlcm_jax.distillation.losses.base import critic_optimizer
from mlcm_jax.distillation.losses.distribution_matching import fake_score_loss, matching_loss
from mlcm_jax.distillation.losses.feature_critic import discriminator_loss
from mlcm_jax.distillation.losses.preference import DECODER, FORMS, Preference
from mlcm_jax.distillation.state import Critic, Frozen, create
from mlcm_jax.distillation.step import make_train_step
from mlcm_jax.errors import UserError
from mlcm_jax.hub.pipeline import Network, load_network, network_shapes, read_architecture
from mlcm_jax.models.unet import UNet2DConditionModel
from mlcm_jax.rng import seed_words
from mlcm_jax.training.batch_plan import batch_plan
from mlcm_jax.training.checks import validate
from mlcm_jax.training.program import build_program

EMOJI = Path(__file__).parents[2] / "examples" / "emoji"
HELD_OUT, REWARD_MODEL, TEACHER = EMOJI / "guard", EMOJI / "scorer", EMOJI / "teacher"


def noised(key, x0, n=4096):
    noise_key, time_key = jax.random.split(jax.random.key(key))
    t = jax.random.randint(time_key, (n,), 20, 981)
    noise = jax.random.normal(noise_key, (n, 1, 1, 1))
    return add_noise(SCHEDULE, jnp.broadcast_to(x0, noise.shape), noise, t), noise, t


def test_matching_moves_the_student_to_the_teachers_distribution():
    """Gaussians: the student shifts its samples; with exact scores it ends at the teacher's mean and spread."""
    teacher = GaussianTeacher(SCHEDULE, mean=0.8, std=0.5)
    base = jax.random.normal(jax.random.key(0), (4096, 1, 1, 1))

    def loss(params, key):
        x0 = params["mean"] + params["std"] * base
        fake = GaussianTeacher(SCHEDULE, *jax.lax.stop_gradient((params["mean"], params["std"])))
        z, _, t = noised(key, x0)
        z = jax.lax.stop_gradient(z)
        return matching_loss(x0, teacher.x0(z, t), fake.x0(z, t)).mean()

    params = {"mean": jnp.float32(-1.0), "std": jnp.float32(0.1)}
    optimizer = optax.adam(0.02)
    state = optimizer.init(params)

    @jax.jit
    def update(params, state, key):
        updates, state = optimizer.update(jax.grad(loss)(params, key), state)
        return optax.apply_updates(params, updates), state

    for key in range(300):
        params, state = update(params, state, key)
    np.testing.assert_allclose([params["mean"], params["std"]], [0.8, 0.5], atol=0.05)


def test_matching_gradient_is_the_normalised_difference_of_the_scores():
    x0, real, fake = jax.random.normal(jax.random.key(0), (3, 2, 4, 4, 3))
    gradient = jax.grad(lambda x: matching_loss(x, real, fake).sum())(x0)
    size = np.abs(x0 - real).mean(axis=(1, 2, 3), keepdims=True)
    np.testing.assert_allclose(gradient * 48, (fake - real) / size, rtol=1e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_perfect_denoiser_has_no_fake_score_loss(prediction_type):
    schedule = dataclasses.replace(SCHEDULE, prediction_type=prediction_type)
    point = GaussianTeacher(schedule, mean=0.3, std=0.0)  # all data in one place: every noising can be undone
    z, noise, t = noised(1, jnp.float32(0.3), 64)
    x0 = jnp.full_like(noise, 0.3)
    assert float(fake_score_loss(schedule, point.output(z, t), x0, noise, t).max()) < 1e-5
    wrong = point.output(z, t) + 0.1
    np.testing.assert_allclose(fake_score_loss(schedule, wrong, x0, noise, t), 0.01, rtol=0.05)


def test_hinge_losses():
    real, fake = [jnp.array([[2.0], [0.5]]), jnp.array([[-1.0], [3.0]])], [jnp.array([[-3.0], [0.0]])] * 2
    assert float(discriminator_loss(real, fake)) == pytest.approx(np.mean([0.25 + 0.5, 1.0 + 0.5]))
    assert float(generator_loss(fake)) == pytest.approx(1.5)


@pytest.fixture(scope="module")
def convolutional(architecture):
    """The tiny pipeline around a UNet without attention, in shapes only: a third of the time to compile a step."""
    plain = {
        "down_block_types": ["DownBlock2D"],
        "mid_block_type": "UNetMidBlock2D",
        "up_block_types": ["UpBlock2D"],
        "block_out_channels": [16],
    }
    config = architecture.unet.config | plain
    module = UNet2DConditionModel.from_config(config)
    return dataclasses.replace(architecture, unet=Network(module, network_shapes(module, config), config))


def all_losses(trainable):
    config = settings(num_segments=2, states="student", student_steps=2, target="x0", trainable=trainable, batch_size=4)
    config.lora.update({"rank": 4, "alpha": 8.0, "targets": (r"/conv[12]$",)})
    config.distribution_matching.update({"weight": 0.5, "updates": 2, "learning_rate": 1e-3})
    config.adversarial.update({"weight": 0.1, "width": 8})
    config.preference.update({"weight": 0.2, "reward_model": f"clip={REWARD_MODEL}"})
    config.preference.held_out_reward_model = f"pick_score={REWARD_MODEL}"
    config.preference.update({"form": "margin", "target": 1.0, "negative_prompt": "grey"})
    config.optim.clip_norm = 1e6
    return config


def test_a_full_students_fake_score_is_a_whole_denoiser(convolutional):
    state = build_program(all_losses("full"), convolutional, jax.devices()[:1]).state
    fake = state.critics["distribution_matching"].params
    assert jax.tree.map(jnp.shape, fake) == jax.tree.map(jnp.shape, state.params)
    assert set(state.critics) == {"distribution_matching", "adversarial"}, "a reward model is no critic"


def test_a_step_with_all_losses_trains_student_and_critics(convolutional):
    program = build_program(all_losses("lora"), convolutional, jax.devices()[:1])
    (stage,) = program.stages
    decoder = random_like(program.frozen.networks["decoder"], 3, 0.1)
    vae = dataclasses.replace(convolutional.vae, params={"encoder": {}, **decoder})
    frozen = Frozen(
        random_like(program.frozen.teacher, 0, 0.1),
        random_like(program.frozen.unconditional, 1, 1.0),
        program.networks.placed(program.frozen.networks, vae),
    )
    state = program.init_state(None)
    prompts = ["red heart", "blue circle", "green leaf", "sun"]
    batch = stage.batch.replace(
        prompt_tokens=jax.tree.map(jnp.asarray, program.networks.tokenize(prompts)),
        conditioning=random_like(stage.batch.conditioning, 2, 1.0),
        num_segments=jnp.int32(2),
        guidance_scale=jnp.full(4, 3.0),
        seed=jnp.asarray(seed_words(0)),
        trajectory_step=jnp.asarray(batch_plan((stage.stage,), 0).trajectory_step, jnp.int32),
    )
    before = jax.device_get(state)
    state, metrics = stage.step(state, frozen, batch)
    weights = {"consistency": 1.0, "distribution_matching": 0.5, "adversarial": 0.1, "preference": 0.2}
    for name in weights:
        assert np.isfinite(metrics[name]), name
    np.testing.assert_allclose(metrics["loss"], sum(w * metrics[name] for name, w in weights.items()), rtol=1e-5)
    scale = np.exp(float(frozen.networks["reward_model"]["clip"]["logit_scale"]))
    np.testing.assert_allclose(metrics["preference_held_out"], scale * metrics["preference_score"], rtol=1e-3)
    assert set(state.critics) == {"distribution_matching", "adversarial"}
    fake = state.critics["distribution_matching"].params
    assert jax.tree.structure(fake) == jax.tree.structure(state.params), "the fake score is trained as the student is"
    for was, now in (
        (before.params, state.params),
        *((before.critics[n].params, r.params) for n, r in state.critics.items()),
    ):
        moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), was, jax.device_get(now))
        assert max(jax.tree.leaves(moved)) > 1e-6
    first = float(metrics["adversarial_critic"])
    for _ in range(5):
        first_step = jax.device_put(np.int32(0), state.step.sharding)  # placed otherwise, the step compiles anew
        state, metrics = stage.step(dataclasses.replace(state, step=first_step), frozen, batch)
    assert float(metrics["adversarial_critic"]) < first, "at fixed draws the heads learn to discriminate"


def test_only_noisy_states_learn_from_the_losses_and_critics_see_all():
    optimizer, student, frozen = optax.sgd(1.0), toy_params(1), Frozen(toy_params(2), toy_conditioning(1, 4))
    config = settings(num_segments=2, states="student", timesteps="milestones", target="x0")
    config.consistency.weight = 0.0
    config.distribution_matching.weight = 1.0
    critic = Critic(toy_params(5), critic_optimizer(config, "distribution_matching").init(toy_params(5)))

    steps = {}
    for config.losses_min_timestep in (0, 999):
        context = DistillationContext(toy_apply, SCHEDULE, config.copy_and_resolve_references())
        step = make_train_step(context, optimizer, LATENT_SHAPE)
        steps[config.losses_min_timestep] = jax.jit(step)

    def update(lowest, trajectory_step):
        state = create(student, optimizer, critics={"distribution_matching": critic})
        after, _ = steps[lowest](state, frozen, toy_batch(4, 3, trajectory_step, 2))
        moved = jax.tree.map(jnp.subtract, after.params, student)
        return moved, after.critics["distribution_matching"].params

    noise, half = (0, 0, 0, 0), (1, 1, 1, 1)  # trajectory steps to states at timesteps 999 and 499
    (of_noise, _), (of_half, _), (both, critic_all) = (update(0, steps) for steps in (noise, half, (0, 1, 0, 1)))
    assert min(map(optax.tree.norm, (of_noise, of_half))) > 1e-3
    jax.tree.map(np.testing.assert_array_equal, update(999, noise)[0], of_noise)
    assert optax.tree.norm(update(999, half)[0]) == 0
    some, critic_some = update(999, (0, 1, 0, 1))
    assert 0 < optax.tree.norm(jax.tree.map(jnp.subtract, both, some)) < optax.tree.norm(both)
    jax.tree.map(np.testing.assert_array_equal, critic_some, critic_all)


def test_preference_forms():
    scores, negative = jnp.array([0.5, 3.0]), jnp.array([0.25, -1.0])
    np.testing.assert_allclose(FORMS["margin"](scores, negative, 2.0), [1.5 + 0.25, 0.0])
    np.testing.assert_allclose(FORMS["refl"](scores, None, 2.0), [1.5e-3, 0.0])


def test_preference_raises_the_score_and_never_learns_from_the_held_out_model():
    vae = load_network(TEACHER / "vae", "AutoencoderKL")
    config = settings()
    config.preference.update({"weight": 1.0, "target": 1.0, "reward_model": f"clip={REWARD_MODEL}"})
    config.preference.held_out_reward_model = f"clip={HELD_OUT}"
    architecture = dataclasses.replace(read_architecture(TEACHER), vae=vae)
    watched = read_frozen_networks([config], architecture)
    kept = {role: watched.by_role[role] for role in ("reward_model", DECODER)}
    alone = dataclasses.replace(watched, by_role=kept)
    x0 = jax.random.normal(jax.random.key(0), (2, 16, 16, 4))

    def loss(networks):
        def of(x0):
            tokens = networks.tokenize(["red heart", "sun"])
            frozen = Frozen({}, None, networks.weights | {DECODER: vae.params})
            inputs = LossInputs(x0, Examples(x0, None, None, None, x0, None, None, tokens), frozen, jax.random.key(0))
            return Preference(DistillationContext(None, SCHEDULE, config, networks))({}, inputs)

        return jax.jit(jax.value_and_grad(of, has_aux=True))

    (value, reported), gradient = loss(watched)(x0)
    (_, without), expected = loss(alone)(x0)
    assert set(reported) - set(without) == {"held_out"}
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5 * float(jnp.abs(expected).max()))
    np.testing.assert_allclose(value, 1e-3 * (1 - reported["score"]), rtol=1e-4)
    (_, after), _ = loss(alone)(x0 - gradient / jnp.linalg.norm(gradient))
    assert float(after["score"]) > float(reported["score"]) + 0.01


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward_model": ""}, "needs config.preference.reward_model"),
        ({"form": "margin"}, "needs config.preference.negative_prompt"),
        ({"form": "hinge"}, "one of margin, refl"),
        ({"held_out_reward_model": "clip=somewhere"}, "is the reward model itself"),
    ],
)
def test_preferences_that_cannot_work_are_refused(changes, message):
    config = settings(teacher="t", prompts="p")
    config.sample.prompts = "p"
    config.preference.update({"weight": 1.0, "reward_model": "clip=somewhere", **changes})
    with pytest.raises(UserError, match=message):
        validate(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward_model": "beauty=somewhere"}, "config.preference.reward_model has the entry 'beauty=somewhere'"),
        ({"decoder": str(REWARD_MODEL)}, "no autoencoder"),
    ],
)
def test_reward_models_that_cannot_work_are_refused(changes, message):
    config = settings()
    config.preference.update({"weight": 1.0, "reward_model": f"clip={REWARD_MODEL}", **changes})
    with pytest.raises(UserError, match=message):
        read_frozen_networks([config], read_architecture(TEACHER))


def test_a_discriminator_without_clean_latents_is_refused():
    config = settings(teacher="t", prompts="p", states="streaming")
    config.sample.prompts = "p"
    config.adversarial.weight = 0.1
    with pytest.raises(UserError, match="states='streaming' has none"):
        validate(config)
