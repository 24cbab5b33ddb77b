"""LoRA files: read by stock diffusers and PEFT with the same result as the Flax network, and read back."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mlcm_jax.errors import UserError
from mlcm_jax.hub.adapter_config import METADATA_KEY
from mlcm_jax.hub.fetch import SCHEDULER_NAME
from mlcm_jax.hub.lora import save_lora, with_loras
from mlcm_jax.hub.lora_reader import load_lora
from mlcm_jax.hub.pipeline import load_pipeline
from mlcm_jax.models import lora
from mlcm_jax.types import TextConditioning

RANK = 4  # of the fixture ``tree``


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
    root = with_header(r=RANK, lora_alpha=RANK, use_rslora=True)
    np.testing.assert_allclose(
        root["mid_block"]["resnets_0"]["conv1"]["up"], 2 * tree["mid_block"]["resnets_0"]["conv1"]["up"], rtol=1e-6
    )
    with pytest.raises(UserError, match="sets use_dora"):
        with_header(r=RANK, lora_alpha=RANK, use_dora=True)


def spell_kohya_diffusers(name, tensor):
    module, _, factor = name.removeprefix("unet.").partition(".lora_")
    down = factor.startswith("A")
    return f"lora_unet_{module.replace('.', '_')}.lora_{'down' if down else 'up'}.weight", tensor


def spell_diffusers(name, tensor):
    return name.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up."), tensor


def spell_processor(name, tensor):
    name = re.sub(r"\.(attn\d)\.(to_[qkv]|to_out)(\.0)?\.lora_A", r".\1.processor.\2_lora.down", name)
    return re.sub(r"\.(attn\d)\.(to_[qkv]|to_out)(\.0)?\.lora_B", r".\1.processor.\2_lora.up", name), tensor


@pytest.mark.parametrize("spell", [spell_kohya_diffusers, spell_diffusers, spell_processor])
def test_other_namings(tree, shapes, tmp_path, spell):
    file = save_lora(tree, tmp_path)
    tensors = load_file(file)
    spelt = dict(spell(k, t) for k, t in tensors.items())
    assert sum(k in tensors for k in spelt) < len(tensors) / 2
    save_file(spelt, file)
    jax.tree.map(np.testing.assert_array_equal, load_lora(file, shapes), tree)


def adapters(pipe):
    return {n: p.detach() for n, p in pipe.unet.named_parameters() if ".lora_" in n}


def test_kohya(sdxl_folder, tree, shapes, tmp_path):
    peft, file = save_lora(tree, tmp_path / "peft"), save_lora(tree, tmp_path, naming="kohya", unet_shapes=shapes)
    tensors = load_file(file)
    assert "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q.lora_down.weight" in tensors
    alphas = {k: t.item() for k, t in tensors.items() if k.endswith(".alpha")}
    assert len(alphas) == len(tensors) // 3 and set(alphas.values()) == {RANK}
    jax.tree.map(np.testing.assert_array_equal, load_lora(file, shapes), tree)
    pipes = []
    for source in (peft, file):
        pipe = StableDiffusionXLPipeline.from_pretrained(sdxl_folder, local_files_only=True)
        pipe.load_lora_weights(str(source))
        pipes.append(adapters(pipe))
    assert pipes[0].keys() == pipes[1].keys()
    assert all(torch.equal(pipes[0][k], pipes[1][k]) for k in pipes[0])
    # another trainer's alpha counts
    save_file(tensors | {k: torch.tensor(a / 2) for k, a in alphas.items()}, file)
    halved = load_lora(file, shapes)["mid_block"]["resnets_0"]["conv1"]["up"]
    np.testing.assert_allclose(halved, 0.5 * tree["mid_block"]["resnets_0"]["conv1"]["up"])


ALPHAS = {
    "one number in a list": lambda a: torch.tensor([a]),
    "half precision": lambda a: torch.tensor(a).half(),
    "brain float": lambda a: torch.tensor([[a]]).bfloat16(),
    "doubles": lambda a: torch.tensor(a, dtype=torch.float64),
    "whole": lambda a: torch.tensor(a).long(),
    "small": lambda a: torch.tensor([a]).to(torch.uint8),
}


@pytest.mark.parametrize("case", ALPHAS)
def test_alphas_of_any_shape_and_dtype(tree, shapes, tmp_path, case):
    """As LyCORIS and sd-scripts write them; diffusers takes them with ``item()``."""
    file = save_lora(tree, tmp_path, naming="kohya", unet_shapes=shapes)
    tensors = load_file(file)
    save_file({k: ALPHAS[case](2.0) if k.endswith(".alpha") else t for k, t in tensors.items()}, file)
    half = load_lora(file, shapes)["mid_block"]["resnets_0"]["conv1"]["up"]
    np.testing.assert_allclose(half, 2 / RANK * tree["mid_block"]["resnets_0"]["conv1"]["up"])


SPOILT_ALPHAS = {
    "two numbers": (torch.ones(2), r"of shape \[2\] and dtype F32: it must be one number"),
    "none": (torch.ones(0), "it must be one number"),
    "a truth": (torch.tensor(True), "dtype BOOL: it must be one number"),
    "NaN": (torch.tensor(float("nan")), "alpha=nan, no finite number"),
    "infinity": (torch.tensor(float("inf"), dtype=torch.float64), "alpha=inf, no finite number"),
}


@pytest.mark.parametrize("case", SPOILT_ALPHAS)
def test_spoilt_alphas(tree, shapes, tmp_path, case):
    value, message = SPOILT_ALPHAS[case]
    file = save_lora(tree, tmp_path, naming="kohya", unet_shapes=shapes)
    tensors = load_file(file)
    save_file({k: value.clone() if k.endswith(".alpha") else t for k, t in tensors.items()}, file)
    with pytest.raises(UserError, match=message):
        load_lora(file, shapes)


def test_linear_layers_and_pointwise_convolutions_are_alike(tree, shapes, tmp_path):
    """sd-scripts writes 1 x 1 convolutions for layers that SD 1.5 has as such, and SDXL as linear ones."""
    file = save_lora(tree, tmp_path, naming="kohya", unet_shapes=shapes)
    tensors = load_file(file)
    linear = {k: t[..., None, None].clone() for k, t in tensors.items() if t.ndim == 2}
    pointwise = {k: t[..., 0, 0].clone() for k, t in tensors.items() if t.shape[2:] == (1, 1)}
    assert all(any(".lora_down" in k for k in group) for group in (linear, pointwise))
    save_file(tensors | linear | pointwise, file)
    jax.tree.map(np.testing.assert_array_equal, load_lora(file, shapes), tree)


def test_factors_of_several_dtypes(tree, shapes, tmp_path):
    file = save_lora(tree, tmp_path)
    mixed = {k: t.half() if "transformer_blocks.0." in k else t for k, t in load_file(file).items()}
    save_file(mixed, file)
    got = load_lora(file, shapes)["mid_block"]["attentions_0"]["transformer_blocks"]["attn1"]["to_q"]["down"]
    assert got.dtype == jnp.float32
    name = "unet.mid_block.attentions.0.transformer_blocks.{}.attn1.to_q.lora_A.weight"
    np.testing.assert_array_equal(got, np.stack([mixed[name.format(i)].float().numpy().T for i in range(2)]))


def test_layers_may_differ_in_rank_or_lack(tree, shapes, tmp_path):
    file = save_lora(tree, tmp_path)
    tensors = load_file(file)
    stack = "unet.mid_block.attentions.0.transformer_blocks.{}.attn1.to_q.lora_{}.weight"
    del tensors[stack.format(0, "A")], tensors[stack.format(0, "B")]
    tensors[stack.format(1, "A")] = tensors[stack.format(1, "A")][:2].clone()
    tensors[stack.format(1, "B")] = tensors[stack.format(1, "B")][:, :2].clone()
    save_file(tensors, file)
    got = load_lora(file, shapes)["mid_block"]["attentions_0"]["transformer_blocks"]["attn1"]["to_q"]
    want = tree["mid_block"]["attentions_0"]["transformer_blocks"]["attn1"]["to_q"]
    assert got["down"].shape == (2, 64, 2)
    np.testing.assert_array_equal(got["down"][0], 0)
    np.testing.assert_array_equal(got["down"][1], want["down"][1, :, :2])
    np.testing.assert_array_equal(got["up"][1], want["up"][1, :2])


def test_fused_into_a_pipeline_with_its_text_encoder(sdxl_folder, tree, tmp_path):
    pipeline = load_pipeline(sdxl_folder)
    file = save_lora(tree, tmp_path)
    rng = np.random.default_rng(3)
    query = "text_model_encoder_layers_1_self_attn_q_proj"
    down, up = (torch.from_numpy(rng.normal(size=s).astype("float32")) for s in ((2, 32), (32, 2)))
    text = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(1.0)}
    save_file(load_file(file) | {f"lora_te1_{query}.{k}": t for k, t in text.items()}, file)
    fused = with_loras(pipeline, [f"{file}:0.5"])
    want = lora.merge(pipeline.unet.params, lora.scaled(tree, 0.5, 1))
    jax.tree.map(np.testing.assert_array_equal, fused.unet.params, want)
    old, new = (
        p.text_encoders[0].params["text_model"]["encoder"]["layers"]["self_attn"]["q_proj"]["kernel"]
        for p in (pipeline, fused)
    )
    np.testing.assert_array_equal(new[0], old[0])
    np.testing.assert_allclose(new[1] - old[1], 0.5 * (1 / 2) * (up @ down).T.numpy(), atol=1e-6)
    with pytest.raises(UserError, match="ends in 'strong', which is no scale"):
        with_loras(pipeline, [f"{file}:strong"])


def test_styles_on_a_students_lora_equal_set_adapters(sdxl_folder, unet, shapes, tree, tmp_path):
    """A student's LoRA and two more, each with its weight, one of them in kohya's naming."""
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl_folder, local_files_only=True)
    scales = {"student": 1.0, "ink": 0.8, "flat": -0.3}
    for i, name in enumerate(scales):
        turned = jax.tree.map(lambda leaf, i=i: jnp.roll(leaf, i, axis=-1) * (1 + i), tree)
        naming = {"naming": "kohya", "unet_shapes": shapes} if name == "ink" else {}
        file = save_lora(turned, tmp_path / f"{name}.safetensors", **naming)
        pipe.load_lora_weights(str(file), adapter_name=name)
    pipe.set_adapters(list(scales), list(scales.values()))
    together = torch_output(pipe.unet)
    pipe.set_adapters(list(scales), [1.0, 0.0, 0.0])
    alone = torch_output(pipe.unet)
    fused = with_loras(load_pipeline(sdxl_folder), [f"{tmp_path / name}.safetensors:{s}" for name, s in scales.items()])
    size = np.abs(together).max()
    assert np.abs(together - alone).max() > 0.05 * size
    np.testing.assert_allclose(flax_output(unet, fused.unet.params) / size, together / size, atol=1e-4)


def test_a_students_folder_brings_its_sampler(sdxl_folder, tree, tmp_path):
    pipeline = load_pipeline(sdxl_folder)
    file = save_lora(tree, tmp_path)
    (tmp_path / SCHEDULER_NAME).write_text('{"_class_name": "TCDScheduler"}')
    assert with_loras(pipeline, [str(file)]).scheduler_config == pipeline.scheduler_config
    for place in (str(tmp_path), f"{tmp_path}:0.5"):
        assert with_loras(pipeline, [place]).scheduler_config == {"_class_name": "TCDScheduler"}
