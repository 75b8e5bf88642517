"""Whole units of predsim and infopro against the recordings: layer, head, losses, statistics."""

import functools

import golden_vectors as gv
import jax
import jax.numpy as jnp
import nets
import numpy as np
import pytest
from flax import nnx

from jdecouple import models
from jdecouple.methods.objectives import (
    BlockInfo,
    InformationPropagation,
    PredictionSimilarity,
)

LIMIT = 1e-10
FAST = ("predsim_block__conv_c3_c16_s8_d256", "infopro__aux_c16_s8_contrast_balanced")


class Unit(nnx.Module):
    """A block and its head, under one state."""

    def __init__(self, block, head):
        self.block, self.head = block, head

    def __call__(self, x, message):
        features = self.block(x)
        return self.head(features, message), features


@nnx.jit
def differentiated(unit, x, message):
    """Output and features; `unit` holding gradients in place of parameters; gradient of x."""

    def loss(unit, x):
        output, features = unit(x, message)
        return output.loss, (output, features)

    (in_params, in_x), found = nnx.grad(loss, argnums=(0, 1), has_aux=True)(unit, x)
    in_unit = nnx.clone(unit)
    nnx.update(in_unit, in_params)
    return found, in_unit, in_x


def unit_of(block, head):
    """A unit of what the two functions build, without drawing weights that would be replaced."""
    unit = nnx.eval_shape(lambda: Unit(block(), head()))
    for path, each in nnx.to_flat_state(nnx.state(unit)):
        each.set_value((jnp.ones if path[-1] == "var" else jnp.zeros)(each.shape, each.dtype))
    return unit


def site(shape, index, num_classes, image=None):
    features = jax.ShapeDtypeStruct(shape, jnp.float64)
    options = {"param_dtype": jnp.float64, "input": features if image is None else image}
    return BlockInfo(index, 4, features, num_classes, **options)


def variable(layer, name, pooled=None):
    """Variable of a layer that PyTorch calls `name`, and how to turn its array over.

    `pooled` is the image [C, H, W] that a dense layer reads flattened.
    """
    if name.startswith("running"):
        return getattr(layer, name.removeprefix("running_")), np.asarray
    if name == "bias":
        return layer.bias, np.asarray
    if isinstance(layer, nnx.Conv):
        return layer.kernel, gv.conv_kernel
    if isinstance(layer, nnx.Linear):
        return layer.kernel, functools.partial(gv.dense_kernel, image=pooled)
    return layer.scale, np.asarray


def check(golden, unit, layer_of, x, message, *, normalised, pooled=None):
    """Runs `unit` under the weights of `golden`, and compares gradients and running statistics.

    `layer_of` finds the layer of a unit that a key names; BatchNorm is over `normalised` numbers.
    """

    def locate(unit, key):
        layer, _, name = key.rpartition(".")
        return variable(layer_of(unit, layer), name, pooled if layer == "decoder_y" else None)

    weights = golden.group("w/")
    for key, weight in weights.items():
        found, convert = locate(unit, key)
        assert found.shape == convert(weight).shape, key
        found.set_value(jnp.asarray(convert(weight)))
    count = sum(each.size for each in jax.tree.leaves(nnx.state(unit, nnx.Param)))
    assert count == sum(weight.size for weight in weights.values())
    (output, features), in_unit, in_x = differentiated(unit, x, message)
    assert gv.relative_error(output.loss, golden["loss"]) < LIMIT
    for key, gradient in golden.group("g/").items():
        found, convert = locate(in_unit, key)
        scale = None
        if np.max(np.abs(gradient)) < 1e-15:  # of a bias under BatchNorm: rounding of its kernel's
            assert key.endswith("bias")
            scale = np.max(np.abs(golden[f"g/{key.removesuffix('bias')}weight"]))
        assert gv.relative_error(found[...], convert(gradient), scale) < LIMIT, key
    for key, statistic in golden.group("running/").items():
        found = np.asarray(locate(unit, key)[0][...])
        if key.endswith("running_var"):  # ours is biased, PyTorch's is not
            found = 0.9 + (found - 0.9) * normalised / (normalised - 1)
        assert gv.relative_error(found, statistic) < LIMIT, key
    return output, features, in_x


def predsim_layer(unit, name):
    block = {type(layer).__name__: layer for layer in unit.block.layers}
    own = unit.head.layer
    return {
        "encoder": block.get("Conv") or block.get("Linear"),
        "bn": block["BatchNorm"],
        "conv_loss": own,
        "linear_loss": getattr(own, "layers", [None])[-1],
        "decoder_y": unit.head.decoder.layers[-1],
    }[name]


@pytest.mark.parametrize("case", nets.marked(gv.cases("predsim_block__"), FAST))
def test_predsim_units_golden(case, x64):
    """Units of `vgg8b` with ReLU: a convolution that is the first, the dense layer on the last."""
    golden = gv.load(case)
    x, h, labels = (golden[key] for key in "xhy")
    arguments = {"activation": "relu", "dropout": 0, "image_size": 16, "param_dtype": jnp.float64}
    classes, pooled, most = golden["w/decoder_y.weight"].shape[0], None, 4096
    if x.ndim == 4:
        width = h.shape[1] / 128
        where, arguments = 0, arguments | {"channels": x.shape[1], "width": width}
        x, h, most = gv.images(x), gv.images(h), int(golden["dim_in_decoder"])
    else:  # below it is a pooling: of four pixels the first is the largest
        width, hidden = x.shape[1] / 512, h.shape[1]
        where, arguments = -1, arguments | {"hidden": hidden, "width": width}
        pixels = np.full((len(x), 2, 2, x.shape[1]), -1e3)
        pixels[:, 0, 0], x = x, pixels
    objective = PredictionSimilarity(dim_in_decoder=most)
    unit = unit_of(
        lambda: models.vgg8b(classes, **arguments, rngs=nnx.Rngs(0)).blocks[where],
        lambda: objective.head(site(h.shape, 1, classes), nnx.Rngs(0)),
    )
    if unit.head.pooled is not None:
        pooled = (h.shape[-1], *unit.head.pooled)
    counts = {"normalised": h.size // h.shape[-1], "pooled": pooled}
    message = {"label": jnp.asarray(labels)}
    output, features, in_x = check(golden, unit, predsim_layer, jnp.asarray(x), message, **counts)
    assert gv.relative_error(features, h) < LIMIT
    assert gv.relative_error(0.01 * output.metrics["cross_entropy"], golden["loss_pred"]) < LIMIT
    assert gv.relative_error(0.99 * output.metrics["similarity"], golden["loss_sim"]) < LIMIT
    if golden["x"].ndim == 4:
        expected = gv.images(golden["grad_x"])
    else:
        expected = np.zeros(in_x.shape)
        expected[:, 0, 0] = golden["grad_x"]
    assert gv.relative_error(in_x, expected) < LIMIT


def infopro_layer(unit, name):
    part, _, index = name.partition(".")
    if part == "decoder":
        return unit.head.decoder.net.layers[int(index)]
    convolution, norm, _, _, dense = unit.head.task_net.layers
    return {0: convolution, 1: norm, 5: dense.layers[1], 7: dense.layers[3]}[int(index)]


@pytest.mark.parametrize("case", nets.marked(gv.cases("infopro__"), FAST))
def test_infopro_heads_golden(case, x64):
    golden = gv.load(case)
    features = jnp.asarray(gv.images(golden["features"]))
    batch, height, width, _ = features.shape
    if "decoder" in case:
        objective = InformationPropagation((1, 1), (0, 0))
        message = {"image": jnp.asarray(gv.images(golden["image"])), "label": jnp.arange(batch)}
        image, normalised = message["image"], message["image"].size // 3
        classes = 4
    else:
        hidden, classes = golden["w/head.5.bias"].size, int(golden["num_classes"])
        task_loss = "cross_entropy" if case.endswith("ce") else "contrastive"
        objective = InformationPropagation(
            (0, 0), (1, 1), task_loss, hidden=hidden, features=hidden, count_self=False
        )
        message, image = {"label": jnp.asarray(golden["y"])}, features
        normalised = batch * height * width // 4  # its convolution leaves every second pixel
    where = site(features.shape, 1, classes, image)
    unit = unit_of(nnx.Sequential, lambda: objective.head(where, nnx.Rngs(0)))
    _, _, in_features = check(golden, unit, infopro_layer, features, message, normalised=normalised)
    assert gv.relative_error(in_features, gv.images(golden["grad_features"])) < LIMIT
