"""Our convolution against XLA's: values, gradients, what it keeps, where it is used."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from nets import images, largest_error, method, trained, weights

import jdecouple as jd
from jdecouple.models import convolution, layers

LAYOUT = ("NHWC", "HWIO", "NHWC")


def arrays(shape, features, size, dtype):
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape)
    kernel = rng.normal(size=(*size, shape[-1], features))
    return jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)


def gradients(function, x, kernel, strides, padding):
    """Value, and gradients of a loss that weighs every output differently."""

    def loss(x, kernel):
        y = function(x, kernel, strides, padding, dimension_numbers=LAYOUT)
        wave = jnp.sin(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        return jnp.sum(y * wave.astype(y.dtype)), y

    (_, y), found = jax.value_and_grad(loss, (0, 1), has_aux=True)(x, kernel)
    return {"y": y, "x": found[0], "kernel": found[1]}


def assert_equal(found, wanted, tolerance):
    for name in wanted:
        assert found[name].dtype == wanted[name].dtype
        one, other = (np.asarray(each[name], np.float64) for each in (found, wanted))
        error = np.max(np.abs(one - other)) / np.max(np.abs(other))
        assert error < tolerance, (name, error)


@pytest.mark.parametrize(
    ("shape", "size", "strides", "padding"),
    [
        ((6, 8, 8, 3), (3, 3), (1, 1), ((1, 1), (1, 1))),
        ((6, 9, 9, 3), (3, 3), (2, 2), ((1, 1), (1, 1))),
        ((4, 8, 8, 3), (3, 3), (2, 2), ((1, 1), (1, 1))),  # the last column meets no window
        ((5, 7, 7, 2), (1, 1), (1, 1), ((0, 0), (0, 0))),
        ((3, 8, 8, 2), (1, 1), (2, 2), ((0, 0), (0, 0))),
        ((1, 6, 9, 2), (3, 5), (1, 3), ((0, 2), (2, 1))),
        ((2, 3, 3, 1), (3, 3), (1, 1), ((0, 0), (0, 0))),
    ],
)
@pytest.mark.usefixtures("x64")
def test_equals_xla_in_double_precision(shape, size, strides, padding):
    x, kernel = arrays(shape, 4, size, jnp.float64)
    run = jax.jit(gradients, static_argnums=(0, 3, 4))
    found = run(convolution.conv_general_dilated, x, kernel, strides, padding)
    assert_equal(found, run(lax.conv_general_dilated, x, kernel, strides, padding), 1e-13)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_keeps_the_dtype(dtype, tolerance):
    x, kernel = arrays((4, 9, 9, 3), 4, (3, 3), dtype)
    options = (2, 2), ((1, 1), (1, 1))
    found = gradients(convolution.conv_general_dilated, x, kernel, *options)
    assert {each.dtype for each in found.values()} == {jnp.dtype(dtype)}
    assert_equal(found, gradients(lax.conv_general_dilated, x, kernel, *options), tolerance)


def test_sums_bfloat16_in_single_precision(monkeypatch):
    """1024 ones, two at a time: a sum that would stop growing in bfloat16."""
    monkeypatch.setattr(convolution, "_PATCHES", 1)
    x, kernel = jnp.ones((1024, 1, 1, 1), jnp.bfloat16), jnp.ones((1, 1, 1, 1), jnp.bfloat16)

    def loss(kernel):
        y = convolution.conv_general_dilated(x, kernel, (1, 1), ((0, 0), (0, 0)))
        return y.astype(jnp.float32).sum()

    assert jax.grad(loss)(kernel).item() == 1024


@pytest.mark.parametrize(("batch", "count"), [(1, 1), (7, 1), (6, 2), (128, 8), (96, 8)])
def test_images_of_one_product(batch, count, monkeypatch):
    monkeypatch.setattr(convolution, "_PATCHES", 800)
    assert convolution._images(batch, 100) == count
    assert convolution._images(batch, 1000) == min(count, 2)


@pytest.mark.usefixtures("x64")
def test_steps_over_the_images_add_up(monkeypatch):
    monkeypatch.setattr(convolution, "_PATCHES", 1)
    x, kernel = arrays((8, 4, 4, 2), 3, (3, 3), jnp.float64)
    options = (1, 1), ((1, 1), (1, 1))
    found = gradients(convolution.conv_general_dilated, x, kernel, *options)
    assert_equal(found, gradients(lax.conv_general_dilated, x, kernel, *options), 1e-13)


@pytest.mark.usefixtures("x64")
def test_under_checkpoint():
    x, kernel = arrays((4, 5, 5, 2), 3, (3, 3), jnp.float64)

    def loss(kernel, convolve):
        y = convolve(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=LAYOUT)
        return jnp.sum(jnp.tanh(y) ** 2)

    again = jax.checkpoint(lambda kernel: loss(kernel, convolution.conv_general_dilated))
    found, wanted = (
        jax.jit(jax.grad(again))(kernel),
        jax.grad(loss)(kernel, lax.conv_general_dilated),
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_keeps_input_and_kernel_alone():
    """And what it keeps may leave the compiled call, as in the delayed route."""
    x, kernel = arrays((4, 5, 5, 2), 3, (3, 3), jnp.float64)
    error = jnp.ones((4, 5, 5, 3))

    def forward(x, kernel):
        def convolve(x, kernel):
            return convolution.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)))

        return jax.vjp(convolve, x, kernel)[1]

    pullback = jax.jit(forward)(x, kernel)
    assert sorted(leaf.shape for leaf in jax.tree.leaves(pullback)) == [kernel.shape, x.shape]
    found = jax.jit(lambda pullback, error: pullback(error))(pullback, error)
    wanted = jax.vjp(
        lambda x, kernel: lax.conv_general_dilated(
            x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=LAYOUT
        ),
        x,
        kernel,
    )[1](error)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("devices", "batch"), [(2, 8), (4, 8), (2, 2)])
@pytest.mark.usefixtures("x64")
def test_on_a_sharded_batch(devices, batch, monkeypatch):
    monkeypatch.setattr(convolution, "_PATCHES", 1)  # 2 images a product: fewer than 4 devices
    mesh = Mesh(np.array(jax.devices()[:devices]), "data")
    x, kernel = arrays((batch, 5, 5, 2), 3, (3, 3), jnp.float64)
    options = (1, 1), ((1, 1), (1, 1))
    wanted = gradients(lax.conv_general_dilated, x, kernel, *options)
    x = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    kernel = jax.device_put(kernel, NamedSharding(mesh, PartitionSpec()))
    run = jax.jit(gradients, static_argnums=(0, 3, 4))
    arguments = (convolution.conv_general_dilated, x, kernel, *options)
    assert_equal(run(*arguments), wanted, 1e-13)
    if devices == 2:
        assert "all-gather" not in run.lower(*arguments).compile().as_text()


@pytest.mark.parametrize(("platform", "own"), [("cpu", True), ("cuda", False), ("tpu", False)])
def test_platform_is_that_of_the_call(platform, own):
    definition, params = nnx.split(layers.conv(2, 3, rngs=nnx.Rngs(0)))

    def loss(params, x):
        return nnx.merge(definition, params)(x).sum()

    x = jax.ShapeDtypeStruct((2, 4, 4, 2), jnp.float32)
    traced = jax.jit(jax.grad(loss)).trace(params, x)
    lowered = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("stablehlo.dot_general" in lowered) == own
    assert lowered.count("stablehlo.convolution") == (0 if own else 1)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("deinforeg", {}), ("fdg", {"current_weights": True}), ("fr", {})],
)
@pytest.mark.usefixtures("x64")
def test_trains_like_xla(name, arguments):
    """Two stages on two devices each, residuals that wait, float64 but for the losses' metrics."""

    def train(convolve):
        model = jd.models.vgg(
            5,
            blocks="4,M|6,M",
            image_size=8,
            channels=1,
            param_dtype=jnp.float64,
            rngs=nnx.Rngs(0),
        )
        for block in model.blocks:
            for _, node in nnx.iter_graph(block):
                if isinstance(node, nnx.Conv):
                    node.conv_general_dilated = convolve
        data = [{"x": each["x"] / np.float64(255), "label": each["label"]} for each in images(4, 8)]
        trainer = jd.Trainer(
            model,
            method(name, **arguments),
            jd.optim.sgd(0.1, momentum=0.9),
            mesh=jd.make_mesh(stages=2, data=2),
            example=data[0],
            num_classes=5,
        )
        state, _ = trained(trainer, list(itertools.islice(itertools.cycle(data), 6)), 6)
        return weights(trainer, state)

    found = train(convolution.conv_general_dilated)
    assert largest_error(found, train(lax.conv_general_dilated)) < 1e-11
