"""The networks beside the teacher: where their weights wait, and that they are held once."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from small_runs import settings

from mlcm_jax.distillation.losses import read_frozen_networks
from mlcm_jax.hub.pipeline import load_network, read_architecture
from mlcm_jax.parallel import sharding

EMOJI = Path(__file__).parents[2] / "examples" / "emoji"


def test_weights_are_placed_once_and_sharded():
    config = settings()
    config.preference.update({"weight": 1.0, "reward_model": f"clip={EMOJI / 'scorer'}"})
    config.preference.held_out_reward_model = f"clip={EMOJI / 'guard'}"
    config.distance, config.latent_lpips = "latent_lpips", str(EMOJI / "latent_lpips")
    networks = read_frozen_networks([config], read_architecture(EMOJI / "teacher"))
    held = [frozen.network.params for frozen in networks.by_role.values()]
    assert {type(leaf) for leaf in jax.tree.leaves(held)} == {jax.ShapeDtypeStruct}

    mesh = sharding.make_mesh({"data": 2, "fsdp": 4, "tensor": 1})
    shapes = networks.shapes(jnp.bfloat16)
    assert (
        set(shapes) == {"reward_model", "held_out_reward_model", "latent_lpips", "decoder"}
        and "encoder" not in shapes["decoder"]
    )
    planned = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, sharding.param_shardings(shapes, mesh)
    )
    vae = load_network(EMOJI / "teacher" / "vae", "AutoencoderKL")
    expected = networks.weights["reward_model"]
    placed = networks.placed(planned, vae)
    assert networks.weights == {}, "nothing but what was placed holds them"
    for array, like in zip(jax.tree.leaves(placed), jax.tree.leaves(planned), strict=True):
        assert (array.dtype, array.sharding) == (like.dtype, like.sharding)
    assert sharding.sharded_fraction(placed["reward_model"]) > 0.5
    for ours, theirs in zip(jax.tree.leaves(placed["reward_model"]), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs).astype(jnp.bfloat16))
    kernel = placed["decoder"]["decoder"]["conv_in"]["kernel"]
    np.testing.assert_array_equal(np.asarray(kernel), np.asarray(vae.params["decoder"]["conv_in"]["kernel"]))
