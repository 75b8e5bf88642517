"""The convolution's own gradients are those of JAX."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdecouple.models.convolution import convolve

# filter, stride, padding, pixels a side
GEOMETRIES = [(3, 1, 1, 8), (3, 2, 1, 8), (3, 2, 1, 7), (1, 2, 0, 7), (5, 3, 2, 10), (3, 2, 1, 2)]


@pytest.mark.parametrize(("size", "stride", "padding", "side"), GEOMETRIES)
@pytest.mark.usefixtures("x64")
def test_gradients_are_those_of_jax(size, stride, padding, side):
    def plain(x, kernel):
        layout = ("NHWC", "HWIO", "NHWC")
        pads = [(padding, padding)] * 2
        return jax.lax.conv_general_dilated(
            x, kernel, (stride,) * 2, pads, dimension_numbers=layout
        )

    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, side, side + 1, 3)))
    kernel = jnp.asarray(rng.normal(size=(size, size, 3, 5)))
    y, pullback = jax.vjp(plain, x, kernel)
    cotangent = jnp.asarray(rng.normal(size=y.shape))

    @jax.jit
    def own(x, kernel, cotangent):
        y, pullback = jax.vjp(lambda *a: convolve(*a, stride, padding), x, kernel)
        return y, pullback(cotangent)

    expected = y, pullback(cotangent)
    chex.assert_trees_all_close(own(x, kernel, cotangent), expected, rtol=1e-12, atol=1e-13)
