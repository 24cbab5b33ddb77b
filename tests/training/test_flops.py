"""FLOPs counted on a jaxpr against XLA's own count of the compiled program."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from mlcm_jax.training.flops import count_flops

IMAGE = jnp.ones((2, 32, 32, 16))
KERNEL = jnp.ones((3, 3, 16, 32))
X, W = jnp.ones((32, 64)), jnp.ones((64, 64))


def dense(x, w):
    return x @ w


def attention(q, k):
    return jnp.einsum("bqhd,bkhd->bhqk", q, k)


def conv(image, kernel):
    # valid padding: XLA does not count the products with padded zeros, the jaxpr's count does
    return lax.conv_general_dilated(image, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def grad_of_dense(x, w):
    return jax.grad(lambda x, w: jnp.sum(jnp.square(x @ w)), argnums=(0, 1))(x, w)


def xla_flops(fn, *args):
    return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]


@pytest.mark.parametrize(
    ("fn", "args"),
    [
        (dense, (X, W)),
        (attention, (jnp.ones((2, 24, 4, 16)), jnp.ones((2, 40, 4, 16)))),
        (conv, (IMAGE, KERNEL)),
        (grad_of_dense, (X, W)),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_matrix_products_and_convolutions(fn, args):
    assert count_flops(fn, *args) == pytest.approx(xla_flops(fn, *args), rel=0.03)


def test_a_scan_counts_its_length():
    def scanned(x, w):
        return lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=5)[0]

    def unrolled(x, w):
        for _ in range(5):
            x = jnp.tanh(x @ w)
        return x

    assert count_flops(scanned, X, W) == count_flops(unrolled, X, W) == 5 * count_flops(dense, X, W)
    assert count_flops(scanned, X, W) == pytest.approx(xla_flops(unrolled, X, W), rel=0.03)


def test_a_gradient_through_a_scan_costs_three_times_the_forward_pass():
    def scanned(w):
        return lax.scan(lambda x, _: (jnp.tanh(x @ w), None), X, length=4)[0].sum()

    # of the first step's input there is no gradient, but the scan computes it all the same
    assert count_flops(jax.grad(scanned), W) == 3 * count_flops(scanned, W)


def test_a_traced_loop_counts_the_trips_it_is_given():
    def looped(x, w, n):
        return lax.fori_loop(0, n, lambda _, x: x @ w, x)

    assert count_flops(looped, X, W, 3, while_trips=4.5) == 4.5 * count_flops(dense, X, W)


def test_a_strided_convolution_and_its_gradient():
    def strided(image, kernel):
        return lax.conv_general_dilated(image, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    forward = count_flops(strided, IMAGE, KERNEL)
    assert forward == 2 * (2 * 16 * 16 * 32) * (3 * 3 * 16)
    grads = jax.grad(lambda image, kernel: strided(image, kernel).sum(), argnums=(0, 1))
    # two transposed convolutions; the output itself is not needed for them, yet it is traced
    assert count_flops(grads, IMAGE, KERNEL) == pytest.approx(3 * forward, rel=0.15)


def test_abstract_arguments_will_do():
    assert count_flops(dense, jax.ShapeDtypeStruct((8, 4), "float32"), jax.ShapeDtypeStruct((4, 2), "float32")) == 128
