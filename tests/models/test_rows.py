"""Sums over rows and the gradient of BatchNorm, against JAX's own in float64."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdecouple.models import rows

RNG = np.random.default_rng(0)


def plain_batch_norm(x, scale, bias):
    axes = tuple(range(x.ndim - 1))
    mean = x.mean(axes)
    variance = ((x - mean) ** 2).mean(axes)
    return (x - mean) / jnp.sqrt(variance + 1e-5) * scale + bias, mean, variance


@pytest.mark.parametrize(
    "shape", [pytest.param((7, 3), marks=pytest.mark.slow), (5, 4, 4, 3), (1, 3)]
)
def test_batch_norm_and_its_gradient(shape, x64):
    x, error = (jnp.asarray(RNG.normal(1, 2, shape)) for _ in range(2))
    scale, bias = jnp.asarray(RNG.normal(1, 0.3, shape[-1])), jnp.asarray(RNG.normal(size=3))
    wanted, pull_wanted = jax.vjp(plain_batch_norm, x, scale, bias)
    found, pull = jax.vjp(lambda *given: rows.batch_norm(*given, 1e-5), x, scale, bias)
    chex.assert_trees_all_close(found, wanted, rtol=1e-10, atol=1e-12)
    cotangent = (error, jnp.zeros(3), jnp.zeros(3))
    chex.assert_trees_all_close(pull(cotangent), pull_wanted(cotangent), rtol=1e-9, atol=1e-10)


def test_batch_norm_keeps_its_input_alone(x64):
    x, vector = jnp.ones((8, 4, 4, 3)), jnp.ones(3)
    _, pull = jax.vjp(lambda *given: rows.batch_norm(*given, 1e-5), x, vector, vector)
    large = [leaf for leaf in jax.tree.leaves(pull) if leaf.size > 3]
    assert [leaf.shape for leaf in large] == [x.shape]


@pytest.mark.parametrize("platform", ["_product", "_sum"])
def test_sums_and_what_is_spread(platform, x64):
    x = jnp.asarray(RNG.normal(size=(4, 5, 3)))
    np.testing.assert_allclose(getattr(rows, platform)(x.reshape(-1, 3)), x.sum((0, 1)))
    weights = jnp.arange(3.0)
    found = jax.grad(lambda x: weights @ rows.mean_rows(x))(x)
    np.testing.assert_allclose(found, jnp.broadcast_to(weights / 20, x.shape))
    found = jax.grad(lambda w: (rows.broadcast_rows(w, x.shape) * x).sum())(weights)
    np.testing.assert_allclose(found, x.sum((0, 1)))


def test_bfloat16_is_summed_in_float32():
    x = jnp.full((4096, 2), 1.0, jnp.bfloat16)
    assert rows.sum_rows(x).dtype == jnp.float32
    np.testing.assert_array_equal(rows.sum_rows(x), 4096)
    gradient = jax.grad(lambda x: rows.sum_rows(x).sum())(x)
    assert gradient.dtype == jnp.bfloat16


@pytest.mark.parametrize("lead", [(), (2,)])
def test_a_product_and_its_gradient(lead, x64):
    x, kernel = (jnp.asarray(RNG.normal(size=size)) for size in ((*lead, 7, 4), (4, 3)))
    error = jnp.asarray(RNG.normal(size=(*lead, 7, 3)))
    wanted, pull_wanted = jax.vjp(jnp.matmul, x, kernel)
    found, pull = jax.vjp(rows.multiply_rows, x, kernel)
    np.testing.assert_array_equal(found, wanted)
    chex.assert_trees_all_close(pull(error), pull_wanted(error), rtol=1e-12, atol=1e-13)


def test_a_product_of_two_dtypes():
    x, kernel = jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 4))
    y, pull = jax.vjp(rows.multiply_rows, x, kernel)
    assert [y.dtype, *(each.dtype for each in pull(y))] == [jnp.float32, jnp.bfloat16, jnp.float32]
