"""The implementations of attention against each other, and which one is taken where."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding, PartitionSpec
from torch_weights import assert_close

from mlcm_jax.errors import UserError
from mlcm_jax.models.attention_backend import XLA, AttentionBackend, dot_product_attention
from mlcm_jax.models.unet import UNet2DConditionModel
from mlcm_jax.parallel.sharding import BATCH_AXES, make_mesh
from mlcm_jax.types import TextConditioning

FLASH = AttentionBackend("flash", "tpu")
# queries, keys, heads, channels of a head
SELF, PROMPT, WIDE = (256, 256, 2, 8), (200, 77, 2, 8), (128, 77, 1, 160)
SDXL, SDXL_PROMPT, SD15_PROMPT = (4096, 4096, 10, 64), (1024, 77, 20, 64), (1024, 77, 8, 160)


def arrays(tokens, keys, heads, width, n=1, dtype=jnp.float32):
    """q, k, v and the output's cotangent."""
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((n, t, heads * width)), dtype) for t in (tokens, keys, keys, tokens)]


def output_and_gradients(backend, heads, q, k, v, cotangent):
    output, vjp = jax.vjp(lambda q, k, v: dot_product_attention(q, k, v, heads, backend=backend), q, k, v)
    return output, *vjp(cotangent)


def test_xla_is_softmax_attention():
    q, k, v, _ = arrays(*PROMPT)
    split = [np.asarray(a, np.float64)[0].reshape(len(a[0]), 2, 8).swapaxes(0, 1) for a in (q, k, v)]
    scores = split[0] @ split[1].swapaxes(1, 2) / np.sqrt(8)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = (weights / weights.sum(-1, keepdims=True) @ split[2]).swapaxes(0, 1).reshape(q.shape)
    assert_close(dot_product_attention(q, k, v, 2), expected, 1e-5)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_scores_are_float32_whatever_the_inputs_are(dtype):
    """diffusers' upcast_attention: scores of 90,000 and more, beyond float16 and too coarse in bfloat16."""
    q, k, v, _ = arrays(*PROMPT)
    q, k = (100 * jnp.sign(a) + a for a in (q, k))
    q, k, v = (a.astype(dtype) for a in (q, k, v))
    exact = dot_product_attention(*(a.astype(jnp.float32) for a in (q, k, v)), 2)
    scores = np.einsum("tc,sc->ts", *(np.asarray(a[0, :, :8], np.float32) for a in (q, k)))
    assert scores.max() > 7e4
    assert_close(dot_product_attention(q, k, v, 2).astype(jnp.float32), exact, 1e-2)


@pytest.mark.parametrize("sizes", [SELF, PROMPT, WIDE], ids=["self", "prompt", "wide heads"])
def test_the_tpu_kernel_is_attention(sizes):
    """In Pallas' interpreter, which runs the kernel's blocks and memory on the CPU; its gradients too."""
    inputs, heads = arrays(*sizes), sizes[2]
    expected = output_and_gradients(XLA, heads, *inputs)
    with pltpu.force_tpu_interpret_mode():
        got = output_and_gradients(FLASH, heads, *inputs)
    for ours, theirs in zip(got, expected, strict=True):
        assert_close(ours, np.asarray(theirs), 1e-5)


@pytest.mark.parametrize("heads", [2, 3], ids=["heads split", "heads that do not divide"])
def test_the_tpu_kernel_on_a_mesh(heads):
    mesh = make_mesh({"data": 2, "fsdp": 1, "tensor": 2}, jax.devices()[:4])
    placed = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    *inputs, _ = (jax.device_put(a, placed) for a in arrays(128, 77, heads, 8, n=2))
    backend = AttentionBackend("flash", "tpu", mesh)
    with pltpu.force_tpu_interpret_mode():
        got = jax.jit(lambda q, k, v: dot_product_attention(q, k, v, heads, backend=backend))(*inputs)
    assert_close(got, np.asarray(dot_product_attention(*inputs, heads)), 1e-5)


@pytest.mark.parametrize("sizes", [SDXL, SDXL_PROMPT, SD15_PROMPT], ids=["4096", "1024 to 77", "sd15"])
def test_the_tpu_kernel_lowers_at_full_size(sizes):
    inputs = [jax.ShapeDtypeStruct(a.shape, jnp.bfloat16) for a in jax.eval_shape(lambda: arrays(*sizes))]

    def both_ways(*inputs):
        return output_and_gradients(FLASH, sizes[2], *inputs)

    text = jax.jit(both_ways).trace(*inputs).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") >= 3  # forward, queries' gradient, keys' gradient


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(1024, 1024, 10, 64), SDXL_PROMPT, (4096, 4096, 8, 40)])
def test_cudnn_is_attention(sizes):
    if jax.default_backend() != "gpu":
        pytest.skip("no CUDA device")
    inputs, heads = arrays(*sizes, n=2, dtype=jnp.bfloat16), sizes[2]
    for backend in (AttentionBackend("cudnn"), AttentionBackend("auto")):
        got = jax.jit(lambda *a, backend=backend: output_and_gradients(backend, heads, *a))(*inputs)
        expected = output_and_gradients(XLA, heads, *(a.astype(jnp.float32) for a in inputs))
        for ours, theirs in zip(got, expected, strict=True):
            assert_close(np.float32(ours), np.asarray(theirs), 0.02)  # bfloat16 has 8 bits


@pytest.mark.parametrize(
    ("platform", "sizes", "dtype", "chosen"),
    [
        ("cpu", (4096, 4096, 64), "bfloat16", "xla"),
        ("gpu", (4096, 4096, 64), "bfloat16", "cudnn"),
        ("gpu", (4096, 77, 64), "float16", "cudnn"),
        ("gpu", (4096, 4096, 64), "float32", "xla"),
        ("gpu", (256, 256, 160), "bfloat16", "xla"),
        ("gpu", (256, 256, 12), "bfloat16", "xla"),
        ("tpu", (4096, 4096, 64), "bfloat16", "flash"),
        ("tpu", (1024, 1024, 64), "float32", "flash"),
        ("tpu", (4096, 77, 64), "bfloat16", "xla"),
        ("tpu", (256, 256, 64), "bfloat16", "xla"),
    ],
)
def test_auto_takes_what_the_device_has(platform, sizes, dtype, chosen):
    assert AttentionBackend("auto", platform).choose(*sizes, jnp.dtype(dtype)) == chosen


@pytest.mark.parametrize(
    ("name", "platform", "words"),
    [
        ("flash", "gpu", "attention=flash needs a tpu, and this is a gpu"),
        ("cudnn", None, "attention=cudnn needs a gpu, and this is a cpu"),
        ("pallas", "tpu", "attention=pallas is unknown.*auto, xla, cudnn, flash"),
    ],
)
def test_what_a_platform_lacks_is_refused(name, platform, words):
    with pytest.raises(UserError, match=words):
        AttentionBackend(name, platform)


@pytest.mark.parametrize(("width", "dtype"), [(64, "float32"), (160, "bfloat16"), (12, "bfloat16")])
def test_sizes_that_cudnn_lacks_are_refused(width, dtype):
    with pytest.raises(UserError, match=f"heads of {width} channels in {dtype}.*use auto"):
        AttentionBackend("cudnn", "gpu").choose(64, 64, width, jnp.dtype(dtype))


def test_the_unet_uses_what_it_is_given():
    blocks = {"down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D"]}
    widths = {"block_out_channels": [32], "layers_per_block": 1, "cross_attention_dim": 8}
    module = UNet2DConditionModel.from_config(blocks | widths)
    prompt = TextConditioning(jnp.zeros((1, 5, 8)), jnp.zeros((1, 8)), jnp.zeros((1, 6)))
    inputs = (jnp.zeros((1, 4, 4, 4)), jnp.zeros(1), prompt)
    variables = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    counts = []
    for backend in (XLA, FLASH):
        traced = jax.make_jaxpr(module.with_attention(backend).apply)(variables, *inputs)
        counts.append(str(traced).count("pallas_call"))
    assert counts[0] == 0 and counts[1] > 0
