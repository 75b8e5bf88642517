"""DGL's auxiliary nets: the authors' code, their definitions in NumPy, shapes and sizes."""

import itertools
from typing import Any

import golden_vectors as gv
import jax
import jax.numpy as jnp
import nets
import numpy as np
import pytest
from flax import nnx
from heads import CLASSES, MAPS, VECTORS, site

from jdecouple.methods.objectives import AuxiliaryNet

LIMIT = 1e-10


# The authors' code: blocks.LAYER.{0,1} are a convolution and its BatchNorm, classifier.INDEX the
# dense part. Its third BatchNorm, "bn", takes no part where there are hidden layers.


def layer_of(head: Any, key: str) -> Any:
    part, *indices, _ = key.split(".")
    if part == "blocks":
        number, inner = map(int, indices)
        return head.reduction.convolutions.layers[3 * number + inner]
    return head.readout.layers[1 + int(indices[0])]  # behind the flattening


def to_ours(key: str, value: np.ndarray) -> np.ndarray:
    """A recorded weight in flax's layout; the first dense layer reads 2 x 2 bins."""
    if value.ndim == 4:
        return gv.conv_kernel(value)
    if value.ndim == 2:
        image = (value.shape[1] // 4, 2, 2) if key == "classifier.0.weight" else None
        return gv.dense_kernel(value, image)
    return value


def variable_of(head: Any, key: str) -> nnx.Variable:
    layer, name = layer_of(head, key), key.rpartition(".")[2]
    if name == "weight":
        name = "scale" if isinstance(layer, nnx.BatchNorm) else "kernel"
    return getattr(layer, name.removeprefix("running_"))


@jax.jit
def train(graphdef, params, rest, x, labels):
    """Gradients of parameters and input, the head's output, and the head's statistics after it."""

    def loss(params, x):
        head = nnx.merge(graphdef, params, rest, copy=True)
        output = head(x, {"label": labels})
        return output.loss, (output, nnx.state(head, nnx.BatchStat))

    return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)


@pytest.mark.parametrize("case", nets.marked(gv.cases("dgl_aux__"), ("dgl_aux__study_c5_s2",)))
def test_the_authors_net(case, x64):
    golden = gv.load(case)
    names = [key.removeprefix("w/") for key in golden.arrays if key.startswith("w/")]
    names = [name for name in names if not name.startswith("bn.")]
    x, labels = jnp.asarray(gv.images(golden["x"])), jnp.asarray(golden["y"])
    where = site(x, num_classes=golden["logits"].shape[1])
    head = AuxiliaryNet().head(where, nnx.Rngs(0))
    for name in names:
        variable, value = variable_of(head, name), to_ours(name, golden[f"w/{name}"])
        assert variable.shape == value.shape, name
        variable.set_value(jnp.asarray(value))
    assert len(names) == len(jax.tree.leaves(nnx.state(head, nnx.Param)))

    parts = nnx.split(head, nnx.Param, ...)
    (in_params, in_x), (output, statistics) = train(*parts, x, labels)
    assert gv.relative_error(output.loss, golden["loss"]) < LIMIT
    assert gv.relative_error(output.logits, golden["logits"]) < LIMIT
    assert gv.relative_error(in_x, gv.images(golden["grad_x"])) < LIMIT
    gradients = nnx.merge(parts[0], in_params, parts[2])
    for name in names:
        expected = to_ours(name, golden[f"g/{name}"])
        scale = None
        if np.max(np.abs(expected)) < 1e-15:  # a bias that BatchNorm takes out again: rounding
            scale = np.max(np.abs(golden[f"g/{name.removesuffix('bias')}weight"]))
        assert gv.relative_error(variable_of(gradients, name)[...], expected, scale) < LIMIT, name

    nnx.update(head, statistics)
    batch, height, width, _ = x.shape
    pixels = -(-height // 4) * -(-width // 4)
    for key in (key for key in golden.arrays if key.startswith("running/")):
        name = key.removeprefix("running/")
        if name.startswith("bn."):
            continue
        variable, expected = variable_of(head, name), golden[key]
        found = np.asarray(variable[...])
        if name.endswith("running_var"):  # ours is biased, PyTorch's is not
            count = batch * (pixels if name.startswith("blocks") else 1)
            found = 0.9 + (found - 0.9) * count / (count - 1)
            variable.set_value(jnp.asarray(expected))
        assert gv.relative_error(found, expected) < LIMIT, name
    head.eval()
    assert gv.relative_error(nnx.jit(logits)(head, x), golden["eval_logits"]) < LIMIT


def logits(head: Any, x: jax.Array) -> jax.Array:
    return head.logits(x)


# By their definitions, in NumPy.


def pooled(x: np.ndarray, bins: tuple[int, int]) -> np.ndarray:
    """Means over PyTorch's adaptive bins, one at a time."""
    batch, *sides, channels = x.shape
    result = np.empty((batch, *bins, channels))
    for bin in np.ndindex(*bins):
        rows, columns = (
            slice(i * n // count, -(-(i + 1) * n // count))
            for i, n, count in zip(bin, sides, bins, strict=True)
        )
        result[:, *bin] = x[:, rows, columns].mean((1, 2))
    return result


def convolved(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """The sum over the places of a kernel of odd side, with zeros around the map."""
    side, (_, height, width, _) = len(kernel), x.shape
    around = np.pad(x, ((0, 0), *2 * [2 * (side // 2,)], (0, 0)))
    places = itertools.product(range(side), repeat=2)
    return sum(around[:, i : i + height, j : j + width] @ kernel[i, j] for i, j in places)


def normalized(x: np.ndarray, layer: dict[str, np.ndarray]) -> np.ndarray:
    axes = tuple(range(x.ndim - 1))
    return (x - x.mean(axes)) / np.sqrt(x.var(axes) + 1e-5) * layer["scale"] + layer["bias"]


def by_definition(aux: str, params: dict[str, Any], x: np.ndarray) -> np.ndarray:
    """Logits of one of the paper's nets, of maps `[batch, height, width, channels]`."""
    if aux != "cnn":
        x = pooled(x, (-(-x.shape[1] // 4), -(-x.shape[2] // 4)))
    for number in range({"mlp_sr": 3, "mlp": 0, "cnn": 2}[aux]):
        stack = params["reduction"]["convolutions"]["layers"]
        x = convolved(x, stack[3 * number]["kernel"])
        x = np.maximum(0, normalized(x, stack[3 * number + 1]))
    x = pooled(x, (2, 2))
    if aux == "cnn":
        x = normalized(x, params["reduction"]["norm"])
    x, stack = x.reshape(len(x), -1), params["readout"]["layers"]
    last = max(stack)
    for i in range(1, last, 3):
        x = x @ stack[i]["kernel"] + stack[i]["bias"]
        x = np.maximum(0, normalized(x, stack[i + 1]))
    return x @ stack[last]["kernel"] + stack[last]["bias"]


@pytest.mark.parametrize(
    ("aux", "sides"), [("mlp_sr", (8, 8)), ("mlp", (9, 6)), ("cnn", (5, 4)), ("cnn", (1, 1))]
)
def test_a_net_by_its_definition(aux, sides, x64):
    x = jax.random.normal(jax.random.key(0), (8, *sides, 3))
    head = AuxiliaryNet(aux).head(site(x), nnx.Rngs(0))
    rng = np.random.default_rng(0)
    for path, variable in nnx.to_flat_state(nnx.state(head, nnx.Param)):
        if path[-1] in ("scale", "bias"):  # so that none of them hides
            variable.set_value(jnp.asarray(rng.normal(size=variable.shape)))
    params = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(head, nnx.Param)))
    expected = by_definition(aux, params, np.asarray(x))
    np.testing.assert_allclose(nnx.jit(logits)(head, x), expected, rtol=0, atol=LIMIT)


# Shapes and sizes.


def sizes(objective: AuxiliaryNet, shape: tuple[int, ...], num_classes: int = CLASSES) -> list:
    """Shapes of all parameters but those of BatchNorm, and the number of all."""
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    where = site(x, num_classes=num_classes)
    params = nnx.eval_shape(lambda: nnx.state(objective.head(where, nnx.Rngs(0)), nnx.Param))
    flat = {path: leaf.shape for path, leaf in nnx.to_flat_state(params)}
    kernels = [shape for path, shape in flat.items() if path[-1] == "kernel"]
    return [sorted(kernels, key=len, reverse=True), sum(map(np.prod, flat.values()))]


@pytest.mark.parametrize(
    ("aux", "convolutions", "dense", "count"),
    [  # of maps of 16 channels and 10 classes
        ("mlp_sr", [(1, 1, 16, 16)] * 3, [(64, 64)] * 3 + [(64, 10)], 14378),
        ("mlp", [], [(64, 64)] * 3 + [(64, 10)], 13514),
        ("cnn", [(3, 3, 16, 16)] * 2, [(64, 10)], 5354),
    ],
)
@pytest.mark.parametrize("sides", [(32, 32), (8, 4), (2, 3), (1, 1)])
def test_a_net_is_of_one_size_on_every_map(aux, convolutions, dense, count, sides):
    found = sizes(AuxiliaryNet(aux), (2, *sides, 16), 10)
    assert found == [[*convolutions, *dense], count]


@pytest.mark.parametrize(
    ("arguments", "shape", "widths"),
    [
        ({"hidden": 9}, (8, 6, 6, 3), (12, 9, 9, 9, 5)),
        ({"aux": "mlp", "hidden": 9}, (8, 6, 6, 3), (12, 9, 9, 9, 5)),
        ({"aux": "cnn", "hidden": 9}, (8, 6, 6, 3), (12, 5)),
        ({}, (8, 7), (7, 7, 7, 7, 5)),
        ({"aux": "mlp"}, (8, 7), (7, 7, 7, 7, 5)),
        ({"aux": "cnn"}, (8, 7), (7, 5)),
    ],
)
def test_widths_of_the_dense_layers(arguments, shape, widths):
    kernels, _ = sizes(AuxiliaryNet(**arguments), shape)
    dense = [kernel for kernel in kernels if len(kernel) == 2]
    assert dense == list(itertools.pairwise(widths))


def test_the_linear_auxiliary_is_one_dense_layer():
    head = AuxiliaryNet("linear").head(site(), nnx.Rngs(0))
    params = nnx.state(head, nnx.Param)
    assert sorted(leaf.shape for leaf in jax.tree.leaves(params)) == [(5,), (108, 5)]
    flat = MAPS.reshape(8, -1)
    np.testing.assert_allclose(head.logits(MAPS), head.readout.layers[1](flat), rtol=1e-6)


@pytest.mark.parametrize("aux", ["mlp_sr", "mlp", "cnn"])
def test_what_is_no_map_goes_to_the_dense_layers(aux):
    head = AuxiliaryNet(aux).head(site(VECTORS), nnx.Rngs(0))
    found = nnx.jit(logits)(head, VECTORS)
    np.testing.assert_array_equal(found, nnx.jit(lambda net, x: net(x))(head.readout, VECTORS))
