"""Units of the residual nets against NumPy, dropout, and initial weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jdecouple import models
from jdecouple.models import layers
from jdecouple.models.resnet import resnet_of_groups


def correlate(x, convolution):
    """Convolution in loops, zero-padded by half the kernel, as PyTorch aligns it."""
    kernel = np.asarray(convolution.kernel[...])
    strides, half = convolution.strides, kernel.shape[0] // 2
    x = np.pad(x, ((0, 0), (half, half), (half, half), (0, 0)))
    rows = range(0, x.shape[1] - 2 * half, strides)
    columns = range(0, x.shape[2] - 2 * half, strides)
    y = np.zeros((len(x), len(rows), len(columns), kernel.shape[-1]))
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            patch = x[:, row : row + 2 * half + 1, column : column + 2 * half + 1]
            y[:, i, j] = np.einsum("bhwc,hwcd->bd", patch, kernel)
    return y if convolution.bias is None else y + np.asarray(convolution.bias[...])


@nnx.jit
def apply(module, x):
    return module(x)


def normalise(x, norm):
    y = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5)
    return y * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])


def relu(x):
    return np.maximum(x, 0)


def leaky(x):
    return np.where(x > 0, x, 0.01 * x)


def perturbed(module):
    """The module with every parameter moved off its initial value, so that none is 0 or 1."""
    rng = np.random.default_rng(1)
    state = nnx.state(module, nnx.Param)
    nnx.update(module, jax.tree.map(lambda p: p + rng.normal(0, 0.3, p.shape), state))
    return module


def activations(channels, pixels=5):
    return np.random.default_rng(0).normal(size=(3, pixels, pixels, channels))


@pytest.mark.parametrize("pixels", [6, 5])
@pytest.mark.parametrize("shortcut", ["pad", "projection"])
def test_a_unit_of_stride_2_equals_numpy(shortcut, pixels, x64):
    options = {"width": 1 / 8, "shortcut": shortcut, "param_dtype": jnp.float64}
    unit = perturbed(models.resnet(2, depth=8, **options, rngs=nnx.Rngs(0)).blocks[2])
    x = activations(2, pixels)
    residual = unit.layers[0]
    first, norm, _, second, other = residual.branch.layers
    y = normalise(correlate(relu(normalise(correlate(x, first), norm)), second), other)
    if shortcut == "pad":
        bypass = np.zeros_like(y)
        bypass[..., 1:3] = x[:, ::2, ::2]
    else:
        projection, norm = residual.shortcut.layers
        bypass = normalise(correlate(x, projection), norm)
    np.testing.assert_allclose(apply(unit, x), relu(y + bypass), atol=1e-12)


def test_a_unit_that_keeps_the_shape_equals_numpy(x64):
    options = {"width": 1 / 8, "param_dtype": jnp.float64}
    unit = perturbed(models.resnet(2, depth=8, **options, rngs=nnx.Rngs(0)).blocks[1])
    x = activations(2)
    first, norm, _, second, other = unit.layers[0].branch.layers
    y = normalise(correlate(relu(normalise(correlate(x, first), norm)), second), other)
    np.testing.assert_allclose(apply(unit, x), relu(y + x), atol=1e-12)


def test_a_bottleneck_equals_numpy(x64):
    options = {"width": 1 / 64, "param_dtype": jnp.float64}
    net = {"bottleneck": True, "shortcut": "projection", "splits": {}}
    net["groups"] = [(64, 1), (128, 1), (256, 1), (512, 1)]
    model = resnet_of_groups(2, **net, **options, rngs=nnx.Rngs(0))
    unit = perturbed(model.blocks[2])
    x = activations(4)
    residual = unit.layers[0]
    a, norm_a, _, b, norm_b, _, c, norm_c = residual.branch.layers
    y = relu(normalise(correlate(x, a), norm_a))
    y = relu(normalise(correlate(y, b), norm_b))
    y = normalise(correlate(y, c), norm_c)
    projection, norm = residual.shortcut.layers
    y += normalise(correlate(x, projection), norm)
    assert y.shape == (3, 3, 3, 8)
    np.testing.assert_allclose(apply(unit, x), relu(y), atol=1e-12)


@pytest.mark.slow
def test_a_wide_unit_and_the_classifier_equal_numpy(x64):
    model = models.wide_resnet(3, depth=10, widen=1, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    unit, classifier = perturbed(model.blocks[2]), perturbed(model.classifier)
    x = activations(16)
    norm, _, first, other, _, second = unit.branch.layers
    y = correlate(relu(normalise(x, norm)), first)
    y = correlate(relu(normalise(y, other)), second) + correlate(x, unit.shortcut)
    np.testing.assert_allclose(apply(unit, x), y, atol=1e-12)
    x = activations(64, 2)
    norm, *_, linear = classifier.layers
    y = relu(normalise(x, norm)).mean((1, 2)) @ np.asarray(linear.kernel[...])
    y += np.asarray(linear.bias[...])
    np.testing.assert_allclose(apply(classifier, x), y, atol=1e-12)


def test_the_last_block_of_scpl_and_the_classifier_equal_numpy(x64):
    net = {"bottleneck": False, "shortcut": "projection", "splits": {}, "variant": "scpl"}
    net["groups"] = [(64, 1), (128, 1)]
    options = {"width": 1 / 32, "channels": 2, "param_dtype": jnp.float64}
    model = resnet_of_groups(3, **net, **options, rngs=nnx.Rngs(0))
    stem, block, classifier = map(perturbed, (model.blocks[0], model.blocks[2], model.classifier))
    x = activations(2)
    y = leaky(normalise(correlate(x, stem.layers[0]), stem.layers[1]))
    np.testing.assert_allclose(apply(stem, x), y, atol=1e-12)
    residual = block.layers[0]
    first, norm, _, second, other = residual.branch.layers
    y = normalise(correlate(leaky(normalise(correlate(x, first), norm)), second), other)
    projection, norm = residual.shortcut.layers
    assert projection.kernel_size == (3, 3)
    y = leaky(y + normalise(correlate(x, projection), norm)).mean((1, 2))
    np.testing.assert_allclose(apply(block, x), y, atol=1e-12)
    linear = classifier.layers[-1]
    logits = y @ np.asarray(linear.kernel[...]) + np.asarray(linear.bias[...])
    np.testing.assert_allclose(apply(classifier, y), logits, atol=1e-12)


@pytest.mark.slow
def test_dropout_drops_in_training_alone():
    model = models.wide_resnet(2, depth=10, widen=1, dropout=0.5, rngs=nnx.Rngs(0))
    unit, x = model.blocks[1], jnp.asarray(activations(16), jnp.float32)
    assert not np.array_equal(unit(x), unit(x))
    unit.eval()
    np.testing.assert_array_equal(unit(x), unit(x))
    plain = models.wide_resnet(2, depth=10, widen=1, rngs=nnx.Rngs(0))
    assert not nnx.state(list(plain.blocks), nnx.RngState)


def test_he_init():
    conv = layers.conv(8, 32, init="he", use_bias=True, rngs=nnx.Rngs(0))
    assert conv.kernel[...].std() == pytest.approx(np.sqrt(2 / (9 * 32)), rel=0.05)
    assert not conv.bias[...].any()
    linear = layers.linear(64, 20, init="he", rngs=nnx.Rngs(0))
    assert linear.kernel[...].std() == pytest.approx(np.sqrt(2 / 64), rel=0.05)
    assert not linear.bias[...].any()
    assert np.abs(linear.kernel[...]).max() > 2.5 * np.sqrt(2 / 64)  # normal, not cut off


def test_he_out_init_is_that_of_torch_but_for_the_weights_of_convolutions():
    conv = layers.conv(8, 32, init="he_out", use_bias=True, rngs=nnx.Rngs(0))
    assert conv.kernel[...].std() == pytest.approx(np.sqrt(2 / (9 * 32)), rel=0.05)
    assert np.abs(conv.kernel[...]).max() > 2.5 * np.sqrt(2 / (9 * 32))
    torch = layers.conv(8, 32, init="torch", use_bias=True, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(conv.bias[...], torch.bias[...])
    dense = [layers.linear(64, 20, init=init, rngs=nnx.Rngs(0)) for init in ("he_out", "torch")]
    for name in ("kernel", "bias"):
        np.testing.assert_array_equal(*(getattr(layer, name)[...] for layer in dense))
