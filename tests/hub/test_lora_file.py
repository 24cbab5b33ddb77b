"""LoRA files: read by stock diffusers and PEFT with the same result as the Flax network, and read back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from flax import traverse_util
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mlcm_jax.errors import UserError
from mlcm_jax.hub.load import listed
from mlcm_jax.hub.lora import METADATA_KEY, load_lora, save_lora
from mlcm_jax.hub.pipeline import load_network, network_shapes
from mlcm_jax.models import lora
from mlcm_jax.types import TextConditioning

RANK, ALPHA = 4, 10.0


@pytest.fixture(scope="module")
def unet(sdxl_folder):
    return load_network(sdxl_folder / "unet", "UNet2DConditionModel")


@pytest.fixture(scope="module")
def shapes(unet):
    return network_shapes(unet.module, unet.config)


@pytest.fixture(scope="module")
def tree(shapes):
    """A scaled LoRA with random factors on all default targets, alpha other than rank."""
    flat = traverse_util.flatten_dict(lora.init(jax.random.key(0), shapes, RANK))
    rng = np.random.default_rng(0)
    flat = {k: jnp.asarray(rng.normal(size=v.shape) * 0.1, jnp.float32) for k, v in flat.items()}
    return lora.scaled(traverse_util.unflatten_dict(flat), ALPHA, RANK)


def inputs():
    rng = np.random.default_rng(1)
    sample, states, pooled = (rng.normal(size=s).astype("float32") for s in ((2, 16, 16, 4), (2, 7, 64), (2, 32)))
    return sample, np.array([999, 30]), states, pooled, np.array([[32, 32, 0, 0, 32, 32]] * 2, "float32")


def flax_output(network, params, lora_tree=None):
    sample, t, states, pooled, time_ids = (jnp.asarray(a) for a in inputs())
    variables = {"params": params} | ({} if lora_tree is None else {"lora": lora_tree})
    return np.asarray(jax.jit(network.module.apply)(variables, sample, t, TextConditioning(states, pooled, time_ids)))


def torch_output(unet):
    sample, t, states, pooled, time_ids = (torch.from_numpy(a) for a in inputs())
    added = {"text_embeds": pooled, "time_ids": time_ids}
    with torch.no_grad():
        out = unet(sample.permute(0, 3, 1, 2), t, encoder_hidden_states=states, added_cond_kwargs=added).sample
    return out.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("header", [True, False])
def test_diffusers_reads_the_same_network(sdxl_folder, unet, tree, tmp_path, header):
    file = save_lora(tree, tmp_path)
    if not header:  # what a loader does that looks at the tensors alone
        save_file(load_file(file), file)
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl_folder, local_files_only=True)
    plain = torch_output(pipe.unet)
    pipe.load_lora_weights(tmp_path if header else str(file))
    adapted = torch_output(pipe.unet)
    ours = flax_output(unet, unet.params, tree)
    scale = np.abs(adapted).max()
    assert np.abs(adapted - plain).max() > 0.05 * scale
    np.testing.assert_allclose(ours / scale, adapted / scale, atol=1e-4)
    loaded = {n.split(".lora_A")[0] for n, _ in pipe.unet.named_parameters() if ".lora_A." in n}
    with safe_open(file, "np") as f:
        assert loaded == {k.removeprefix("unet.").split(".lora_A")[0] for k in sorted(f.keys()) if "lora_A" in k}


def test_merged_equals_low_rank_path(unet, tree):
    ours = flax_output(unet, unet.params, tree)
    merged = flax_output(unet, lora.merge(unet.params, tree))
    np.testing.assert_allclose(merged, ours, atol=1e-4 * np.abs(ours).max())


def test_read_back(tree, shapes, tmp_path):
    file = save_lora(tree, tmp_path / "a" / "mine.safetensors")
    assert file == tmp_path / "a" / "mine.safetensors"
    back = load_lora(file, shapes)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, back, tree)
    save_lora(tree, tmp_path, dtype=jnp.bfloat16)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(load_lora(tmp_path, shapes))} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(load_lora(tmp_path, shapes, dtype=jnp.float32))} == {"float32"}


def test_alpha_of_a_foreign_header_is_applied(tree, shapes, tmp_path):
    file = save_lora(tree, tmp_path)
    tensors = load_file(file)

    def with_header(**adapter):
        save_file(tensors, file, {METADATA_KEY: json.dumps({f"unet.{k}": v for k, v in adapter.items()})})
        return load_lora(file, shapes)

    half = with_header(r=RANK, lora_alpha=RANK / 2)
    np.testing.assert_allclose(
        half["mid_block"]["resnets_0"]["conv1"]["up"], 0.5 * tree["mid_block"]["resnets_0"]["conv1"]["up"]
    )
    for refused in ({"use_dora": True}, {"alpha_pattern": {"x": 1}}, {"use_rslora": True}):
        with pytest.raises(UserError, match=f"sets {next(iter(refused))}"):
            with_header(r=RANK, lora_alpha=RANK, **refused)


def pop_layer(tensors):
    name = next(k for k in tensors if "transformer_blocks.1." in k and "to_q.lora_A" in k)
    del tensors[name]


SPOILT = {
    "layer": (pop_layer, "lacks tensors that belong to its others: unet.*transformer_blocks.1.*to_q.lora_A"),
    "other": (lambda t: t.update({"unet.nowhere.lora_A.weight": torch.zeros(4, 4)}), "this UNet: unet.nowhere"),
    "encoder": (lambda t: t.update({"text_encoder.x.lora_A.weight": torch.zeros(4, 4)}), "this UNet: text_encoder.x"),
    "shape": (lambda t: t.update({"unet.mid_block.resnets.0.conv1.lora_B.weight": torch.zeros(3, 4, 1, 1)}), "shape"),
    "empty": (lambda t: t.clear(), "it holds no tensors"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_spoilt_files(tree, shapes, tmp_path, case):
    change, message = SPOILT[case]
    file = save_lora(tree, tmp_path)
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(UserError, match=message):
        load_lora(tmp_path, shapes)


def test_absent_file(shapes, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_lora(tmp_path, shapes)


def test_listed():
    assert listed("ba") == "a, b" and listed("abcdefg") == "a, b, c, d, e and 2 more"
