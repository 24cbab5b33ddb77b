"""What saves memory changes no result: microbatches, what is recomputed, and smaller optimizer states."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_runs import SCHEDULE, settings
from toy_denoiser import LATENT_SHAPE, toy_apply, toy_batch, toy_conditioning, toy_params, toy_state

from mlcm_jax.distillation.context import DistillationContext
from mlcm_jax.distillation.microbatches import value_and_grad
from mlcm_jax.distillation.state import Frozen
from mlcm_jax.distillation.step import make_train_step
from mlcm_jax.errors import UserError
from mlcm_jax.models.layers import Dense
from mlcm_jax.models.remat import REMAT_POLICIES, rematerialised
from mlcm_jax.models.unet import UNet2DConditionModel
from mlcm_jax.training.checks import validate
from mlcm_jax.training.flops import count_flops
from mlcm_jax.training.optimizer import make_optimizer
from mlcm_jax.training.program import build_program


@pytest.mark.parametrize("parts", [2, 4])
def test_microbatches_make_the_same_update(parts):
    frozen, batch, results = Frozen(toy_params(2), toy_conditioning(1, 4)), toy_batch(8, 3, [0] * 8, 4), []
    for k in (1, parts):
        config, optimizer = settings(microbatches=k), optax.sgd(1.0)
        step = jax.jit(make_train_step(DistillationContext(toy_apply, SCHEDULE, config), optimizer, LATENT_SHAPE))
        results.append(step(toy_state(toy_params(1), optimizer, 8), frozen, batch))
    (whole, metrics), (sliced, same) = results
    assert metrics["loss"] > 0
    np.testing.assert_allclose(same["loss"], metrics["loss"], rtol=1e-5)
    np.testing.assert_allclose(same["grad_norm"], metrics["grad_norm"], rtol=1e-5)
    for name in whole.params:
        np.testing.assert_allclose(sliced.params[name], whole.params[name], atol=1e-6)
    np.testing.assert_array_equal(sliced.trajectory_buffer.z, whole.trajectory_buffer.z)


def test_rows_come_back_in_their_order():
    rows = jnp.arange(12.0).reshape(6, 2)

    def loss(params, rows, key):
        return (params * rows).mean(), ({"mean": rows.mean()}, rows)

    (_, (means, results)), grads = value_and_grad(loss, jnp.float32(2.0), rows, jax.random.key(0), 3)
    np.testing.assert_array_equal(results, rows)
    np.testing.assert_allclose([means["mean"], grads], [5.5, 5.5])


def test_microbatches_take_less_memory():
    def loss(params, rows, key):
        x = rows
        for _ in range(8):
            x = jnp.tanh(x @ params)
        return jnp.square(x).mean(), ({}, ())

    def temporaries(parts):
        args = jnp.ones((64, 64)), jnp.ones((512, 64)), jax.random.key(0)
        compiled = jax.jit(lambda *a: value_and_grad(loss, *a, parts)).lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(8) < 0.5 * temporaries(1)


def bytes_of(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("changes", "share"), [({"moment_dtype": "bfloat16"}, 0.76), ({"name": "adafactor"}, 0.02)], ids=str
)
def test_optimizer_states_are_smaller_and_still_descend(changes, share):
    params = {"kernel": jax.random.normal(jax.random.key(0), (256, 512)), "bias": jnp.zeros(512)}
    config = settings().optim
    config.learning_rate = 1e-2
    plain = make_optimizer(config, 10).init(params)
    config.update(changes)
    optimizer = make_optimizer(config, 10)
    state = optimizer.init(params)
    assert bytes_of(state) < share * bytes_of(plain)
    loss = lambda p: jnp.square(p["kernel"]).mean() + jnp.square(p["bias"] - 1).mean()  # noqa: E731
    first = loss(params)
    for _ in range(5):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
    assert float(loss(params)) < float(first)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


def test_every_policy_has_the_same_gradient_and_keeps_what_it_says():
    x, products, gradients = jax.random.normal(jax.random.key(0), (4, 8)), {}, {}
    for policy in (None, *REMAT_POLICIES):
        layer = rematerialised(Dense, policy)(8)
        params = Dense(8).init(jax.random.key(1), x)

        def loss(params, layer=layer):
            return jnp.sin(layer.apply(params, jnp.sin(layer.apply(params, x)))).sum()

        products[policy] = count_flops(jax.grad(loss), params)
        gradients[policy] = jax.grad(loss)(params)
    for gradient in gradients.values():
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), gradient, gradients[None])
    assert products["dots_saveable"] == products[None], "what is kept is not computed again"


def test_the_policy_reaches_the_network(architecture):
    config = architecture.unet.config
    policies = [UNet2DConditionModel.from_config(config, remat=r).config.remat for r in (False, True, "dots_saveable")]
    assert policies == [None, "nothing_saveable", "dots_saveable"]


REWARD = {"preference.weight": 1.0, "preference.reward_model": "clip=examples/emoji/scorer"}


@pytest.mark.parametrize("changes", [{}, REWARD], ids=["consistency", "a reward model"])
def test_what_is_recomputed_is_no_work_of_a_step(architecture, changes):
    flops = []
    for remat in (False, True):
        config = settings(remat=remat)
        config.update_from_flattened_dict(changes)
        flops.append(build_program(config, architecture, jax.devices()[:1]).stages[0].flops)
    assert flops[0] == flops[1] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"remat_policy": "everything"}, "one of nothing_saveable"),
        ({"optim.name": "adam8bit"}, "one of adamw, adafactor"),
        ({"microbatches": 0}, "above 0"),
        ({"guidance_embedding_dim": 7}, "0 or an even number"),
        ({"guidance_embedding_dim": 16, "trainable": "lora"}, "a LoRA has no place"),
    ],
)
def test_values_that_cannot_work_are_refused(changes, message):
    config = settings(teacher="t", prompts="p")
    config.sample.prompts = "p"
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        validate(config)


def test_a_batch_that_does_not_split_is_refused(architecture):
    with pytest.raises(UserError, match="in 3 microbatches: use a multiple of 3"):
        build_program(settings(microbatches=3), architecture, jax.devices()[:1])
