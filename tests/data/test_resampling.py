"""Adaptive pooling and bilinear interpolation against their definitions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdecouple.models.resampling import adaptive_average_pool, bilinear

SIZES = [((8, 6), (4, 3)), ((7, 5), (3, 2)), ((5, 5), (5, 1)), ((3, 1), (4, 2)), ((2, 4), (9, 7))]


def image(height, width):
    return np.random.default_rng(0).normal(size=(2, height, width, 3))


@pytest.mark.parametrize(("before", "after"), SIZES)
def test_adaptive_average_pool_by_pytorchs_bins(before, after, x64):
    x = image(*before)
    found = adaptive_average_pool(jnp.asarray(x), *after)
    assert found.shape == (2, *after, 3)
    for i in range(after[0]):
        rows = slice(i * before[0] // after[0], math.ceil((i + 1) * before[0] / after[0]))
        for j in range(after[1]):
            columns = slice(j * before[1] // after[1], math.ceil((j + 1) * before[1] / after[1]))
            expected = x[:, rows, columns].mean((1, 2))
            np.testing.assert_allclose(found[:, i, j], expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize(("before", "after"), SIZES)
def test_bilinear_holds_the_corners_and_is_linear_between(before, after, x64):
    x = image(*before)
    found = np.asarray(bilinear(jnp.asarray(x), *after))
    expected = x
    for axis in (0, 1):
        at = np.linspace(0, before[axis] - 1, after[axis])
        expected = np.apply_along_axis(
            lambda line, at=at: np.interp(at, np.arange(len(line)), line), axis + 1, expected
        )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-14)


def test_against_pytorch(x64):
    torch = pytest.importorskip("torch")
    for before, after in SIZES:
        x = image(*before)
        planes = torch.tensor(np.moveaxis(x, -1, 1).copy())
        pooled = torch.nn.functional.adaptive_avg_pool2d(planes, after)
        between = torch.nn.functional.interpolate(
            planes, size=after, mode="bilinear", align_corners=True
        )
        for ours, theirs in ((adaptive_average_pool, pooled), (bilinear, between)):
            found = np.moveaxis(np.asarray(ours(jnp.asarray(x), *after)), -1, 1)
            np.testing.assert_allclose(found, theirs.numpy(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("resample", [adaptive_average_pool, bilinear])
def test_half_precision_stays_and_the_same_size_changes_nothing(resample):
    x = jnp.asarray(image(4, 5), jnp.bfloat16)
    assert resample(x, 3, 2).dtype == jnp.bfloat16
    np.testing.assert_array_equal(resample(x, 4, 5), x)
    gradient = jax.grad(lambda x: resample(x, 3, 2).astype(jnp.float32).sum())(x)
    assert gradient.dtype == jnp.bfloat16
    total = np.asarray(gradient, np.float32).sum((1, 2))
    np.testing.assert_allclose(total, np.full((2, 3), 6), rtol=0.02)
