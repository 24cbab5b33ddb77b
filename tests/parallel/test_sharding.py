"""Meshes and placements on fake devices: rules, moved axes, whole states and the full-size SDXL UNet."""

import json
import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from mlcm_jax.config import SHARDING_RULES
from mlcm_jax.distillation import state as train_state
from mlcm_jax.errors import UserError
from mlcm_jax.hub.pipeline import network_shapes
from mlcm_jax.models.clip import CLIPTextModel
from mlcm_jax.models.layers import Conv
from mlcm_jax.models.unet import UNet2DConditionModel
from mlcm_jax.models.vae import AutoencoderKL
from mlcm_jax.parallel import sharding

SDXL = Path(__file__).resolve().parents[2] / "configs" / "architectures" / "sdxl"


def mesh_of(data=1, fsdp=1, tensor=1):
    """A mesh of any size: shardings are computed without devices."""
    return AbstractMesh((data, fsdp, tensor), sharding.AXES)


def tree_of(**shapes):
    """Nested dict of ShapeDtypeStructs from "a__b": shape."""
    tree = {}
    for name, shape in shapes.items():
        *outer, leaf = name.split("__")
        node = tree
        for part in outer:
            node = node.setdefault(part, {})
        node[leaf] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return tree


def spec(mesh, path, shape, rules=SHARDING_RULES):
    """The PartitionSpec of one array as a tuple with one entry a dimension."""
    (leaf,) = jax.tree.leaves(sharding.param_shardings(tree_of(**{path: shape}), mesh, rules, min_size=1))
    return tuple(leaf.spec) + (None,) * (len(shape) - len(leaf.spec))


def with_shardings(tree, mesh, **kwargs):
    shardings = sharding.param_shardings(tree, mesh, **kwargs)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, shardings)


@pytest.fixture
def devices():
    assert len(jax.devices()) == 8, "tests/conftest.py asks XLA for eight CPU devices"
    return jax.devices()


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        ({"data": -1, "fsdp": 1, "tensor": 1}, (8, 1, 1)),
        ({"data": 1, "fsdp": -1, "tensor": 2}, (1, 4, 2)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 2)),
        ({"tensor": -1, "fsdp": 8, "data": 1}, (1, 8, 1)),
    ],
)
def test_mesh(devices, config, shape):
    mesh = sharding.make_mesh(config)
    assert (mesh.axis_names, mesh.devices.shape) == (("data", "fsdp", "tensor"), shape)
    assert set(mesh.devices.flat) == set(devices)


def test_mesh_of_some_devices(devices):
    mesh = sharding.make_mesh({"data": 1, "fsdp": -1, "tensor": 1}, devices[:3])
    assert mesh.shape["fsdp"] == 3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"data": 3, "fsdp": 1, "tensor": 1}, "data 3 x fsdp 1 x tensor 1 does not fit 8 devices"),
        ({"data": -1, "fsdp": 3, "tensor": 1}, "data -1 x fsdp 3 x tensor 1 does not fit 8 devices"),
        ({"data": -1, "fsdp": 16, "tensor": 1}, "does not fit 8 devices"),
        ({"data": -1, "fsdp": -1, "tensor": 1}, "-1 for data and fsdp"),
        ({"data": 0, "fsdp": -1, "tensor": 1}, r"config\.mesh\.data=0 cannot be"),
        ({"data": -2, "fsdp": 1, "tensor": 1}, r"config\.mesh\.data=-2 cannot be"),
        ({"data": 8, "fsdp": 1}, "has the axes data, fsdp: it needs data, fsdp, tensor"),
        ({"data": 8, "fsdp": 1, "tensor": 1, "model": 1}, "and no others"),
    ],
)
def test_mesh_mistakes(devices, config, message):
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(config)


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("attn1__to_q__kernel", (64, 128), ("fsdp", "tensor")),
        ("transformer_blocks__attn1__to_q__kernel", (10, 64, 128), (None, "fsdp", "tensor")),
        ("transformer_blocks__attn1__to_out_0__kernel", (10, 64, 128), (None, "tensor", "fsdp")),
        ("ff__net_0__proj__kernel", (64, 512), ("fsdp", "tensor")),
        ("ff__net_2__kernel", (256, 64), ("tensor", "fsdp")),
        ("resnets_0__conv1__kernel", (3, 3, 64, 128), (None, None, "fsdp", "tensor")),
        ("resnets_0__conv2__kernel", (3, 3, 64, 128), (None, None, "tensor", "fsdp")),
        ("resnets_0__conv1__bias", (128,), ("fsdp",)),
        ("transformer_blocks__norm1__scale", (10, 64), (None, "fsdp")),
        ("token_embedding__embedding", (512, 64), ("tensor", "fsdp")),
        ("attn1__to_q__down", (10, 64, 8), (None, "fsdp", None)),
        ("conv1__up", (1, 1, 8, 64), (None, None, None, "fsdp")),
        ("down_blocks_0__kernel", (64, 128), ("fsdp", "tensor")),  # "down" is the LoRA rule's for leaves only
        ("something__else", (64, 128), (None, None)),
    ],
)
def test_rules(path, shape, expected):
    assert spec(mesh_of(data=2, fsdp=4, tensor=2), path, shape) == expected


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((3, 3, 4, 320), (None, None, None, ("tensor", "fsdp"))),  # fsdp does not divide 4 and joins tensor
        ((3, 3, 320, 6), (None, None, "fsdp", "tensor")),
        ((3, 3, 320, 5), (None, None, ("fsdp", "tensor"), None)),  # tensor does not divide 5 and joins fsdp
        ((3, 3, 6, 4), (None, None, None, "tensor")),  # 8 divides nothing that is left: replicated along fsdp
        ((8, 8, 3, 5), (None, None, None, None)),  # dimensions in front of the rule's are never split
        ((8, 3, 10), (None, None, "tensor")),
    ],
)
def test_an_axis_that_does_not_divide_moves(shape, expected):
    assert spec(mesh_of(fsdp=8, tensor=2), "conv_in__kernel", shape) == expected


def test_a_moved_axis_prefers_a_free_then_a_large_dimension():
    rules = [("", ("fsdp", "tensor", None, None))]
    assert spec(mesh_of(fsdp=4, tensor=2), "a", (3, 64, 8, 16), rules) == (None, "tensor", None, "fsdp")
    assert spec(mesh_of(fsdp=4, tensor=2), "a", (3, 64, 16, 16), rules) == (None, "tensor", None, "fsdp")
    assert spec(mesh_of(fsdp=4, tensor=2), "a", (3, 64, 3, 3), rules) == (None, ("tensor", "fsdp"), None, None)


def test_axes_of_one_device_are_left_out():
    assert spec(mesh_of(fsdp=4), "to_q__kernel", (64, 64)) == ("fsdp", None)
    assert spec(mesh_of(data=8), "to_q__kernel", (64, 64)) == (None, None)


def test_the_first_matching_rule_counts_and_rules_survive_json():
    rules = [["to_q/kernel$", [None, ["fsdp", "tensor"]]], ["kernel$", ["fsdp", None]]]
    assert spec(mesh_of(fsdp=2, tensor=2), "to_q__kernel", (8, 8), rules) == (None, ("fsdp", "tensor"))
    assert spec(mesh_of(fsdp=2, tensor=2), "to_k__kernel", (8, 8), rules) == ("fsdp", None)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (("(", ("fsdp",)), "is not a regular expression"),
        (("kernel", ("model", None)), "names the axis 'model': use data, fsdp, tensor"),
        (("kernel", ("fsdp", "fsdp")), "names an axis twice"),
        (("kernel", (None, "fsdp", "tensor")), r"to_q/kernel names 3 dimensions.*\(8, 8\)"),
    ],
)
def test_rule_mistakes(rule, message):
    with pytest.raises(UserError, match=message):
        spec(mesh_of(fsdp=2), "to_q__kernel", (8, 8), [rule])


def test_small_arrays_are_replicated():
    at_limit, below = tree_of(a__kernel=(128, 128)), tree_of(a__kernel=(128, 127))
    shardings = [sharding.param_shardings(t, mesh_of(fsdp=4))["a"]["kernel"] for t in (at_limit, below)]
    assert [s.is_fully_replicated for s in shardings] == [False, True]


def test_a_whole_train_state_follows_its_parameters():
    params = tree_of(transformer_blocks__to_q__kernel=(4, 64, 128), conv_in__kernel=(3, 3, 4, 1024))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = jax.eval_shape(lambda p: train_state.create(p, optimizer, with_ema=True), params)
    placed = sharding.param_shardings(state, mesh_of(fsdp=8))
    adam = placed.opt_state[1][0]
    assert adam.mu == adam.nu == placed.ema == placed.params
    assert placed.params["transformer_blocks"]["to_q"]["kernel"].spec == PartitionSpec(None, "fsdp", None)
    assert adam.count.is_fully_replicated and placed.step.is_fully_replicated


def test_fraction_and_bytes():
    tree = tree_of(a__kernel=(128, 256), b__kernel=(128, 128), c__something=(1 << 14,))
    tree["b"]["kernel"] = jax.ShapeDtypeStruct((128, 128), jnp.bfloat16)
    placed = with_shardings(tree, mesh_of(data=2, fsdp=4, tensor=2))
    assert sharding.sharded_fraction(placed) == 0.75
    assert sharding.bytes_per_device(placed) == 128 * 256 * 4 // 8 + 128 * 128 * 2 // 8 + (1 << 14) * 4


def test_the_low_rank_activations_of_a_convolution_keep_their_batch_split(devices):
    """Else a TPU's compiler gathers them on 64 chips: SDXL's LoRA step then takes 7.5 GB a chip (docs/scale.md)."""
    mesh = sharding.make_mesh({"data": 1, "fsdp": 8, "tensor": 1}, devices)
    x, kernel = jnp.zeros((8, 4, 4, 6)), jnp.zeros((3, 3, 6, 8))
    variables = {"params": {"kernel": kernel, "bias": jnp.zeros(8)}}
    variables["lora"] = {"down": jnp.zeros((3, 3, 6, 4)), "up": jnp.zeros((1, 1, 4, 8))}
    jaxpr = jax.make_jaxpr(sharding.traced_on(mesh, Conv(8).apply))(variables, x)
    (held,) = (eqn for eqn in jaxpr.eqns if eqn.primitive.name == "sharding_constraint")
    assert held.outvars[0].aval.shape == (8, 4, 4, 4)
    assert held.params["sharding"].spec[0] == ("data", "fsdp")


@pytest.mark.parametrize(("tensor", "whole"), [(1, PartitionSpec()), (2, PartitionSpec(None, None, None, "tensor"))])
def test_gathered_weights_are_whole_along_fsdp(devices, tensor, whole):
    """Else a TPU's compiler computes SDXL's decoder in loops, which take 6.4 GB a chip more (docs/scale.md)."""
    mesh = sharding.make_mesh({"data": 1, "fsdp": 8 // tensor, "tensor": tensor}, devices)
    params = {"conv1": {"kernel": jnp.arange(3.0 * 3 * 64 * 128).reshape(3, 3, 64, 128)}}
    placed = jax.device_put(params, sharding.param_shardings(params, mesh))
    kernel = placed["conv1"]["kernel"]
    assert not kernel.sharding.is_fully_replicated
    gathered = jax.jit(sharding.traced_on(mesh, partial(sharding.gathered, rules=SHARDING_RULES)))(placed)
    got = gathered["conv1"]["kernel"]
    assert got.sharding.is_equivalent_to(NamedSharding(mesh, whole), got.ndim)
    np.testing.assert_array_equal(got, kernel)


def test_placement_and_computation_on_eight_devices(devices):
    """A sharded two-layer step gives the numbers of one device, and each device holds what was announced."""
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "ff": {
            "fc1": {"kernel": jax.random.normal(keys[0], (128, 256)) / 16},
            "fc2": {"kernel": jax.random.normal(keys[1], (256, 128)) / 16},
        }
    }
    x = jax.random.normal(keys[2], (8, 128))

    def loss(params, x):
        hidden = jax.nn.silu(x @ params["ff"]["fc1"]["kernel"])
        return jnp.square(hidden @ params["ff"]["fc2"]["kernel"]).mean()

    placed = jax.device_put(params, sharding.param_shardings(params, mesh))
    batch = jax.device_put(x, sharding.batch_sharding(mesh))
    assert batch.addressable_shards[0].data.shape == (2, 128)
    held = sum(p.addressable_shards[3].data.nbytes for p in jax.tree.leaves(placed))
    assert held == sharding.bytes_per_device(placed) == 2 * 128 * 256 * 4 // 4
    assert sharding.sharded_fraction(placed) == 1.0
    grads = jax.jit(jax.grad(loss), out_shardings=jax.tree.map(lambda p: p.sharding, placed))(placed, batch)
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(jax.grad(loss)(params, x)), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.fixture(scope="module")
def sdxl_unet():
    config = json.loads((SDXL / "unet" / "config.json").read_text())
    shapes = network_shapes(UNet2DConditionModel.from_config(config), config)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == 2_567_463_684
    return shapes


@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"fsdp": 16}, {"data": 2, "fsdp": 64}, {"fsdp": 4, "tensor": 2}])
def test_the_sdxl_unet_is_sharded(sdxl_unet, axes):
    """A device holds its even share of the 10.3 GB and little more."""
    placed = with_shardings(sdxl_unet, mesh_of(**axes))
    assert sharding.sharded_fraction(placed) >= 0.999
    even_share = 2_567_463_684 * 4 / (axes["fsdp"] * axes.get("tensor", 1))
    # what is replicated below the size limit, 4 MB, weighs more where the share is small
    assert even_share <= sharding.bytes_per_device(placed) <= 1.001 * even_share + 4e6
    for path, leaf in jax.tree_util.tree_leaves_with_path(placed):
        if math.prod(leaf.shape) >= sharding.MIN_SHARDED_SIZE:
            assert not leaf.sharding.is_fully_replicated, jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    ("folder", "network"),
    [("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModel), ("vae", AutoencoderKL)],
)
def test_the_other_networks_are_sharded(folder, network):
    config = json.loads((SDXL / folder / "config.json").read_text())
    placed = with_shardings(network_shapes(network.from_config(config), config), mesh_of(fsdp=8))
    assert sharding.sharded_fraction(placed) >= 0.99
