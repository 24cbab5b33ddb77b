"""The learnt distance of latents: what it is, that it learns from judgements, and that a run uses it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image
from small_runs import SCHEDULE, settings
from toy_denoiser import LATENT_SHAPE, toy_apply, toy_batch, toy_conditioning, toy_params, toy_state

from mlcm_jax.distillation.context import DistillationContext
from mlcm_jax.distillation.frozen_networks import FrozenNetwork, FrozenNetworks
from mlcm_jax.distillation.losses import read_frozen_networks
from mlcm_jax.distillation.state import Frozen
from mlcm_jax.distillation.step import make_train_step
from mlcm_jax.errors import UserError
from mlcm_jax.hub.pipeline import Network, load_network
from mlcm_jax.hub.save import save_params
from mlcm_jax.models.latent_lpips import LatentLPIPS
from mlcm_jax.training.checks import validate
from mlcm_jax.training.latent_lpips import (
    Triplets,
    bapps_triplets,
    distort,
    train_lpips,
    two_afc,
    with_non_negative_heads,
)

CONFIG = {"latent_channels": 2, "block_out_channels": [4, 4, 8, 8, 8], "layers_per_block": [1, 1, 1, 1, 1]}
MODULE = LatentLPIPS.from_config(CONFIG)
LATENTS = jax.random.normal(jax.random.key(0), (6, 4, 4, 2))


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(MODULE.init, jax.random.key(1), LATENTS, LATENTS)["params"]
    generator = np.random.default_rng(0)
    return jax.tree.map(lambda a: jnp.asarray(np.abs(generator.normal(0.05, 0.3, a.shape)), jnp.float32), shapes)


def test_it_is_a_distance_of_examples(params):
    distance = jax.jit(lambda a, b: MODULE.apply({"params": params}, a, b))
    a, b = LATENTS[:3], LATENTS[3:]
    np.testing.assert_allclose(distance(a, a), 0.0, atol=1e-10)
    np.testing.assert_allclose(distance(a, b), distance(b, a), rtol=1e-5)
    assert float(distance(a, b).min()) > 0
    moved = distance(a.at[1].add(1.0), b)
    np.testing.assert_array_equal(np.abs(np.asarray(moved - distance(a, b))) > 1e-6, [False, True, False])
    gradient = jax.grad(lambda x: distance(x, a).sum())(a)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-5)


def test_features_are_compared_by_direction_and_weighted_by_channel(params):
    """Doubled heads double the distance."""
    doubled = {k: jax.tree.map(lambda a: 2 * a, v) if k.startswith("head") else v for k, v in params.items()}
    distance = jax.jit(lambda p: MODULE.apply({"params": p}, LATENTS[:3], LATENTS[3:]))
    once, twice = distance(params), distance(doubled)
    np.testing.assert_allclose(twice, 2 * once, rtol=1e-5)
    projected = with_non_negative_heads(jax.tree.map(jnp.negative, params))
    assert float(projected["head0"]["scale"].max()) == 0
    np.testing.assert_array_equal(projected["block0_conv0"]["kernel"], -params["block0_conv0"]["kernel"])


def test_it_learns_from_judgements_and_is_read_again(tmp_path):
    generator = np.random.default_rng(0)
    ref, *noise = generator.standard_normal((3, 64, 4, 4, 2)).astype(np.float32)
    judge = np.arange(64) % 2
    sizes = np.where(judge == 1, [[1.0], [0.2]], [[0.2], [1.0]]).reshape(2, 64, 1, 1, 1).astype(np.float32)
    p0, p1 = (ref + size * eps for size, eps in zip(sizes, noise, strict=True))
    triplets, losses = Triplets(ref, p0, p1, judge.astype(np.float32)), []
    options = {"num_steps": 60, "batch_size": 16, "learning_rate": 1e-2}
    learnt = train_lpips(MODULE, triplets, **options, report=lambda _, loss: losses.append(loss))
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:3])
    assert two_afc(MODULE, learnt, triplets, chunk=48) > 0.9
    assert min(float(v["scale"].min()) for k, v in learnt.items() if k.startswith("head")) >= 0
    save_params(learnt, CONFIG, tmp_path, file_name="diffusion_pytorch_model.safetensors")
    again = load_network(tmp_path, "LatentLPIPS")
    jax.tree.map(np.testing.assert_array_equal, again.params, learnt)


def test_stronger_distortions_are_further_away():
    z = jax.random.normal(jax.random.key(0), (64, 8, 8, 4))
    a, b = (distort(z, key) for key in jax.random.split(jax.random.key(1)))
    moved = np.square(np.asarray(a - z)).mean(axis=(1, 2, 3))
    assert a.shape == z.shape and (moved > 0).mean() > 0.9 and np.isfinite(a).all()
    assert float(jnp.abs(a - b).max()) > 0.1


def test_judgements_in_bapps_layout(tmp_path, vae_folder):
    for name in ("ref", "p0", "p1"):
        (tmp_path / "cnn" / name).mkdir(parents=True)
        for i in range(3):
            image = np.random.default_rng(i).integers(0, 255, (16, 16, 3), np.uint8)
            Image.fromarray(image).save(tmp_path / "cnn" / name / f"{i:06d}.png")
    vae = load_network(vae_folder, "AutoencoderKL")
    with pytest.raises(UserError, match="holds no judgements"):
        bapps_triplets(tmp_path, vae, 16)
    (tmp_path / "cnn" / "judge").mkdir()
    for i, judge in enumerate((0.0, 0.5, 1.0)):
        np.save(tmp_path / "cnn" / "judge" / f"{i:06d}.npy", np.array([judge], np.float32))
    triplets = bapps_triplets(tmp_path, vae, 16)
    assert triplets.ref.shape == (3, 8, 8, 4)
    np.testing.assert_array_equal(triplets.judge, [0.0, 0.5, 1.0])
    (tmp_path / "cnn" / "judge" / "000002.npy").unlink()
    with pytest.raises(UserError, match="2 judgements for 3, 3, 3 images"):
        bapps_triplets(tmp_path, vae, 16)


def test_a_step_uses_it(params):
    """The loss of a step is the learnt distance, by the weights in ``frozen``: doubled heads double it."""
    config = settings(distance="latent_lpips", latent_lpips="somewhere")
    networks = FrozenNetworks({"latent_lpips": FrozenNetwork(Network(MODULE, params, CONFIG))})
    optimizer = optax.sgd(0.1)
    context = DistillationContext(toy_apply, SCHEDULE, config, networks)
    step = jax.jit(make_train_step(context, optimizer, LATENT_SHAPE))
    state, batch = toy_state(toy_params(1), optimizer, 4), toy_batch(4, 3, [0] * 4, 4)
    doubled = {k: jax.tree.map(lambda a: 2 * a, v) if k.startswith("head") else v for k, v in params.items()}
    losses = []
    for weights in (params, doubled):
        frozen = Frozen(toy_params(2), toy_conditioning(1, 4), {"latent_lpips": weights})
        after, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    assert losses[0] > 0 and losses[1] == pytest.approx(2 * losses[0], rel=1e-4)
    assert float(jnp.abs(after.params["a"] - state.params["a"]).max()) > 0


def test_a_distance_that_cannot_work_is_refused(tmp_path, architecture, params):
    config = settings(teacher="t", prompts="p", distance="latent_lpips")
    config.sample.prompts = "p"
    with pytest.raises(UserError, match=r"needs config.latent_lpips: name"):
        validate(config)
    save_params(params, CONFIG, tmp_path, file_name="diffusion_pytorch_model.safetensors")
    config.latent_lpips = str(tmp_path)
    with pytest.raises(UserError, match="latents of 2 channels, and the teacher's have 4"):
        read_frozen_networks([config], architecture)
