"""LoRA trees: initialisation, scaling and folding into the kernels."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlcm_jax.config import LORA_TARGETS
from mlcm_jax.errors import UserError
from mlcm_jax.models import lora
from mlcm_jax.models.layers import Conv, Dense


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.silu(Dense(6, name="to_q")(x)), None


class Net(nn.Module):
    """One of each kind of kernel: convolutions (strided, 1x1), linear, and a stack of linear layers."""

    @nn.compact
    def __call__(self, x):
        x = Conv(8, stride=2, name="conv1")(x)
        x = Conv(6, kernel_size=1, padding=0, name="conv_shortcut")(x)
        stack = nn.scan(Layer, variable_axes={"params": 0, "lora": 0}, split_rngs={"params": True}, length=3)
        x, _ = stack(name="transformer_blocks")(x, None)
        return Dense(5, name="to_out_0")(x)


TARGETS = ("conv1$", "conv_shortcut$", "to_(q|out_0)$")
X = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))


@pytest.fixture(scope="module")
def params():
    return Net().init(jax.random.key(1), X)["params"]


def random_up(tree, seed=2):
    """A LoRA that has learnt something: every up factor random."""
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return treedef.unflatten([0.3 * jax.random.normal(k, a.shape) for k, a in zip(keys, leaves, strict=True)])


def test_shapes_and_initial_values(params):
    tree = lora.init(jax.random.key(0), jax.eval_shape(Net().init, jax.random.key(0), X)["params"], 2, TARGETS)
    assert jax.tree.map(jnp.shape, tree) == {
        "conv1": {"down": (3, 3, 4, 2), "up": (1, 1, 2, 8)},
        "conv_shortcut": {"down": (1, 1, 8, 2), "up": (1, 1, 2, 6)},
        "transformer_blocks": {"to_q": {"down": (3, 6, 2), "up": (3, 2, 6)}},
        "to_out_0": {"down": (6, 2), "up": (2, 5)},
    }
    assert not tree["to_out_0"]["up"].any() and not tree["conv1"]["up"].any()
    for down, fan_in in ((tree["conv1"]["down"], 36), (tree["transformer_blocks"]["to_q"]["down"], 6)):
        assert 0.8 * fan_in**-0.5 < jnp.abs(down).max() <= fan_in**-0.5
    stack = tree["transformer_blocks"]["to_q"]["down"]
    assert not jnp.array_equal(stack[0], stack[1])
    plain = Net().apply({"params": params}, X)
    np.testing.assert_array_equal(Net().apply({"params": params, "lora": tree}, X), plain)


def test_numbers_of_a_module_do_not_depend_on_the_other_targets(params):
    few = lora.init(jax.random.key(0), params, 2, ("to_q",))
    many = lora.init(jax.random.key(0), params, 2, TARGETS)
    name = "transformer_blocks"
    np.testing.assert_array_equal(few[name]["to_q"]["down"], many[name]["to_q"]["down"])
    assert few.keys() == {name}


def test_merged_weights_equal_the_low_rank_path(params):
    tree = lora.scaled(random_up(lora.init(jax.random.key(0), params, 2, TARGETS)), alpha=3.0, rank=2)
    plain = Net().apply({"params": params}, X)
    with_path = Net().apply({"params": params, "lora": tree}, X)
    merged = Net().apply({"params": lora.merge(params, tree)}, X)
    assert jnp.abs(with_path - plain).max() > 0.1
    np.testing.assert_allclose(merged, with_path, atol=1e-5)


def test_scaled(params):
    tree = random_up(lora.init(jax.random.key(0), params, 2, TARGETS))
    out = lora.scaled(tree, alpha=8.0, rank=2)
    np.testing.assert_allclose(out["to_out_0"]["up"], 4 * tree["to_out_0"]["up"])
    np.testing.assert_array_equal(out["to_out_0"]["down"], tree["to_out_0"]["down"])


def test_merge_keeps_dtypes_and_untouched_weights(params):
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    tree = random_up(lora.init(jax.random.key(0), params, 2, ("conv1$",)))
    merged = lora.merge(half, tree)
    assert all(p.dtype == jnp.bfloat16 for p in jax.tree.leaves(merged))
    np.testing.assert_array_equal(merged["to_out_0"]["kernel"], half["to_out_0"]["kernel"])
    assert (merged["conv1"]["kernel"] != half["conv1"]["kernel"]).any()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"rank": 2, "targets": ("conv1$", "to_z")}, "'to_z' matches no layer of the network: its layers are like c"),
        ({"rank": 0, "targets": TARGETS}, "rank 0"),
        ({"rank": 2, "targets": ("(",)}, "not a regular expression"),
    ],
)
def test_mistakes(params, kwargs, message):
    with pytest.raises(UserError, match=message):
        lora.init(jax.random.key(0), params, **kwargs)


def test_default_targets_select_the_layers_of_peft_recipes(params):
    assert json.dumps(LORA_TARGETS)  # a config file can hold them
    paths = ("a/to_q", "a/attn1/to_out_0", "a/proj_in", "b/ff/net_0/proj", "b/ff/net_2", "r/conv1", "r/conv_shortcut")
    paths += ("r/time_emb_proj", "d/downsamplers_0/conv", "d/upsamplers_0/conv")
    others = ("conv_in", "conv_out", "time_embedding/linear_1", "add_embedding/linear_2")
    tree = {}
    for path in paths + others:
        *outer, name = path.split("/")
        node = tree
        for part in outer:
            node = node.setdefault(part, {})
        node[name] = {"kernel": jax.ShapeDtypeStruct((2, 2), jnp.float32)}
    selected = lora.target_modules(tree, LORA_TARGETS)
    assert {"/".join(p) for p in selected} == set(paths)
