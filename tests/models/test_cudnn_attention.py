"""cuDNN's attention without a GPU: jax's own checks and the lowering for CUDA, for every call that the UNets make."""

import functools
import json
from functools import partial
from pathlib import Path

import configs_full_size
import cuda_driver
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_weights import assert_close

import mlcm_jax.models.attention
from mlcm_jax.hub.pipeline import network_shapes
from mlcm_jax.models import cudnn_attention
from mlcm_jax.models.attention_backend import XLA, AttentionBackend, dot_product_attention
from mlcm_jax.models.unet import UNet2DConditionModel
from mlcm_jax.types import TextConditioning

SDXL = Path(__file__).parents[2] / "configs" / "architectures" / "sdxl" / "unet" / "config.json"
CONFIGS = {"sdxl": json.loads(SDXL.read_text()), "sd15": configs_full_size.SD15, "sd21": configs_full_size.SD21}
AUTO = AttentionBackend("auto", "gpu")


@pytest.fixture(params=["8.0", "9.0"], ids=["Ampere", "Hopper"])
def gpu(request, monkeypatch):
    cuda_driver.answer(monkeypatch, request.param)


def inputs(tokens, keys, heads, width, dtype=jnp.bfloat16):
    """Shapes of q, k, v and the output's cotangent."""
    return [jax.ShapeDtypeStruct((2, t, heads * width), dtype) for t in (tokens, keys, keys, tokens)]


def both_ways(backend, heads, q, k, v, cotangent):
    output, vjp = jax.vjp(lambda q, k, v: dot_product_attention(q, k, v, heads, backend=backend), q, k, v)
    return output, *vjp(cotangent)


def cudnn_calls(fn, *args):
    """(forward, backward) calls of cuDNN in the program for CUDA."""
    return cuda_driver.attention_calls(jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text())


@functools.cache
def attention_calls(name):
    """(tokens, keys, heads, channels of a head) of each attention that the UNet calls, traced in bfloat16."""
    config, calls = CONFIGS[name], set()

    def record(q, k, v, heads, mask=None, backend=None):
        assert q.dtype == k.dtype == v.dtype == jnp.bfloat16
        calls.add((q.shape[1], k.shape[1], heads, q.shape[2] // heads))
        return q

    module = UNet2DConditionModel.from_config(config, jnp.bfloat16)
    side, context = config["sample_size"], config["cross_attention_dim"]
    f32 = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    prompt = TextConditioning(f32((2, 77, context)), f32((2, 1280)), f32((2, 6)))
    variables = {"params": network_shapes(module, config)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlcm_jax.models.attention, "dot_product_attention", record)
        jax.eval_shape(module.apply, variables, f32((2, side, side, 4)), f32((2,)), prompt)
    return calls


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("name", CONFIGS)
def test_every_call_of_a_unet_has_an_output_and_a_gradient(name):
    calls = attention_calls(name)
    assert {keys for _, keys, *_ in calls} >= {77} and len(calls) >= 4
    for tokens, keys, heads, width in calls:
        chosen = AUTO.choose(tokens, keys, width, jnp.bfloat16)
        assert chosen == ("xla" if width == 160 else "cudnn")  # SD 1.5's deepest layers have eight heads of 160
        counts = cudnn_calls(partial(both_ways, AUTO, heads), *inputs(tokens, keys, heads, width))
        assert counts == ((1, 1) if chosen == "cudnn" else (0, 0))


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_whatever_auto_chooses_has_a_gradient(dtype):
    for tokens, keys, width in ((64, 77, 8), (81, 77, 40), (81, 81, 128), (64, 64, 136), (64, 64, 12)):
        jax.jit(partial(both_ways, AUTO, 2)).trace(*inputs(tokens, keys, 2, width, dtype)).lower(
            lowering_platforms=("cuda",)
        )


@pytest.mark.usefixtures("gpu")
def test_jax_has_no_gradient_for_odd_lengths():
    """What the padding is for; where this fails, jax has learnt it and cudnn_attention can do less."""
    q, k, v, _ = (jax.ShapeDtypeStruct((2, a.shape[1], 2, 8), a.dtype) for a in inputs(64, 77, 2, 8))
    plain = partial(jax.nn.dot_product_attention, implementation="cudnn")
    assert cudnn_calls(plain, q, k, v) == (1, 0)
    with pytest.raises(NotImplementedError, match="KV 77"):
        cudnn_calls(jax.grad(lambda *a: plain(*a).astype(jnp.float32).sum()), q, k, v)


@pytest.mark.parametrize(("tokens", "keys"), [(8, 7), (9, 8), (9, 7), (8, 8)])
def test_odd_lengths_are_padded_and_masked(tokens, keys, monkeypatch):
    """With jax's XLA implementation in cuDNN's place, which takes the same lengths."""
    asked = []

    def stand_in(q, k, v, *, key_value_seq_lengths, implementation):
        assert implementation == "cudnn" and q.shape[1] % 2 == k.shape[1] % 2 == 0
        asked.append(key_value_seq_lengths is not None)
        return own(q, k, v, key_value_seq_lengths=key_value_seq_lengths, implementation="xla")

    own, rng = jax.nn.dot_product_attention, np.random.default_rng(0)
    q, k, v, cotangent = (
        jnp.asarray(rng.standard_normal((2, n, 12)), jnp.float32) for n in (tokens, keys, keys, tokens)
    )
    expected = both_ways(XLA, 3, q, k, v, cotangent)
    monkeypatch.setattr(cudnn_attention, "DTYPES", (jnp.float32,))
    monkeypatch.setattr(cudnn_attention, "HEAD_DIM_MULTIPLE", 4)
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    got = both_ways(AttentionBackend("cudnn", "gpu"), 3, q, k, v, cotangent)
    for ours, theirs in zip(got, expected, strict=True):
        assert_close(ours, np.asarray(theirs), 1e-6)
    assert asked == [keys == 7]
