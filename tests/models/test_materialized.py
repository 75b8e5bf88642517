"""Arrays in memory between blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdecouple.models.materialized import materialize

SHAPE = 8, 16


def _loss(depth, between):
    """Of a deep net with shortcuts, as `DecoderBlock` has them."""

    def loss(kernels, x):
        for kernel in kernels:
            centred = x - x.mean(-1, keepdims=True)
            x = between(x + jnp.tanh(centred @ kernel))
        return (x**2).sum()

    return loss, [np.full((16, 16), 0.01 * (n + 1), np.float32) for n in range(depth)]


def _additions(depth, between):
    """In the compiled program, each as often as it is computed."""
    loss, kernels = _loss(depth, between)
    compiled = jax.jit(jax.grad(loss)).lower(kernels, np.ones(SHAPE, np.float32)).compile()
    return compiled.as_text().count(" add(")


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="this is of CPUs")
def test_work_grows_with_the_depth():
    assert _additions(16, materialize) < 5 * _additions(4, materialize)
    assert _additions(16, lambda x: x) > 8 * _additions(4, lambda x: x)  # else it can go


@pytest.mark.parametrize(("platform", "calls"), [("cpu", True), ("cuda", False), ("tpu", False)])
def test_other_devices_are_left_alone(platform, calls):
    loss, kernels = _loss(2, materialize)
    traced = jax.jit(jax.grad(loss)).trace(kernels, np.ones(SHAPE, np.float32))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("inlineable" in text) == ("optimization_barrier" in text) == calls


def test_numbers_and_gradients_stay():
    x = np.linspace(-1, 1, 128, dtype=np.float32).reshape(SHAPE)
    found = []
    for between in (materialize, lambda x: x):
        loss, kernels = _loss(4, between)
        found.append(jax.jit(jax.value_and_grad(loss, (0, 1)))(kernels, x))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *found)


def test_integers_and_masks_pass():
    tree = {"h": jnp.ones(3), "begins": jnp.arange(3), "mask": jnp.ones(3, bool)}
    jax.tree.map(np.testing.assert_array_equal, jax.jit(materialize)(tree), tree)


def test_it_can_be_mapped_and_repeated():
    tripled = jax.vmap(lambda x: 3 * jax.checkpoint(materialize)(x))
    np.testing.assert_array_equal(
        jax.vmap(jax.grad(lambda x: tripled(x).sum()))(jnp.ones((2, 3))), 3
    )
