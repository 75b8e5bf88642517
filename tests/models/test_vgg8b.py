"""VGG8b: its layers, what is dropped, and a run of its local losses."""

import jax
import jax.numpy as jnp
import nets
import numpy as np
import pytest
from flax import nnx

import jdecouple as jd
from jdecouple import models
from jdecouple.models.renewal import output_of
from jdecouple.pipeline.design import make_design

SMALL = {"width": 1 / 32, "hidden": 8, "image_size": 16}


def test_layers_and_parameters_are_the_papers():
    model = nnx.eval_shape(lambda: nnx.List(modules(models.vgg8b(10, rngs=nnx.Rngs(0)))))
    kinds = [
        [type(m).__name__ for m in block.layers if isinstance(m, nnx.Module)] for block in model
    ]
    layer = ["Conv", "BatchNorm"]
    assert kinds == [
        layer,
        ["Dropout", *layer],
        ["Dropout", "MaxPool", *layer],
        ["Dropout", *layer],
        *[["Dropout", "MaxPool", *layer]] * 2,
        ["Dropout", "MaxPool", "Flatten", "Linear", "BatchNorm"],
        ["Dropout", "Linear"],
    ]
    dense = [m for block in model for m in block.layers if isinstance(m, nnx.Conv | nnx.Linear)]
    assert [m.out_features for m in dense] == [128, 256, 256, 512, 512, 512, 1024, 10]
    assert all(m.bias is not None for m in dense)
    sizes = [leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]
    assert sum(sizes) == 8_903_434


def modules(model):
    return [*model.blocks, model.classifier]


def test_maps_lose_whole_channels_and_the_dense_layer_single_numbers():
    model = models.vgg8b(5, dropout=0.5, rngs=nnx.Rngs(0), **SMALL)
    maps = jnp.ones((64, 4, 4, 8))
    dropped = np.asarray(model.blocks[1].layers[0](maps))
    assert set(np.unique(dropped)) == {0, 2}
    assert (dropped == dropped[:, :1, :1]).all()
    assert 0.4 < dropped.mean() / 2 < 0.6
    first, second = np.asarray(model.classifier.layers[0](jnp.ones((2, 64))))
    assert set(np.unique(first)) == {0, 2}
    assert (first != second).any()
    model.blocks[1].eval()
    np.testing.assert_array_equal(model.blocks[1].layers[0](maps), maps)


def test_activation_and_output_layer():
    x = -jnp.ones((1, 3))
    for arguments, least in (({}, -0.01), ({"activation": "relu"}, 0)):
        model = models.vgg8b(5, rngs=nnx.Rngs(0), **arguments, **SMALL)
        assert {float(block.layers[-1](x).min()) for block in model.blocks} == {np.float32(least)}
        assert not model.classifier.layers[-1].kernel[...].any()
    model = models.vgg8b(5, zero_output=False, dropout=0, rngs=nnx.Rngs(0), **SMALL)
    assert model.classifier.layers[-1].kernel[...].any()
    assert len(model.classifier.layers) == 1


def test_a_layer_anew_fits_other_maps():
    """A convolution halves what is larger than its output; the dense layer pools to its side."""
    blocks = models.vgg8b(5, rngs=nnx.Rngs(0), **SMALL).blocks
    options = {"init": "flax", "param_dtype": jnp.float32, "rngs": nnx.Rngs(1)}

    def anew(index, received, output):
        shapes = [jax.ShapeDtypeStruct((2, *shape), jnp.float32) for shape in (received, output)]
        copy = blocks[index].anew(*shapes, **options)
        return copy, output_of(copy, shapes[0]).shape

    same, shape = anew(2, (16, 16, 8), (8, 8, 8))
    assert jax.tree.map(jnp.shape, nnx.state(same)) == jax.tree.map(jnp.shape, nnx.state(blocks[2]))
    assert shape == (2, 8, 8, 8)
    assert anew(3, (16, 16, 3), (8, 8, 16))[1] == (2, 8, 8, 16)
    assert anew(3, (8, 8, 3), (8, 8, 16))[1] == (2, 8, 8, 16)
    dense, shape = anew(6, (16, 16, 3), (8,))
    assert (shape, dense.layers[-3].in_features) == ((2, 8), 3)


@pytest.mark.parametrize("name", nets.marked(("auglocal", "man"), ("auglocal",)))
def test_auxiliary_nets_of_its_layers(name):
    """Fresh layers above every layer but the last: nothing is computed."""

    def model(rngs):
        return models.vgg8b(5, rngs=rngs, **SMALL)

    example = {"x": np.zeros((4, 16, 16, 3), np.float32), "label": np.zeros(4, np.int32)}
    arguments = {"depth": 3, "decay": 0.0} if name == "auglocal" else {"aux": "linear"}
    method = jd.methods.get(name, **arguments)
    design = make_design(model, method, jd.optim.sgd(0.1), num_stages=1, example=example)
    fronts = [
        {path: leaf.shape for path, leaf in unit.params.items() if path.startswith("head/front")}
        for unit in design.built.units
    ]
    kernels = [[shape for path, shape in each.items() if "kernel" in path] for each in fronts]
    if name == "man":
        assert kernels[0] == [(3, 3, 4, 8)]
        assert kernels[5] == [(16, 8)]
    else:  # units 2, 4 and 6
        assert kernels[0] == [(3, 3, 4, 8), (3, 3, 8, 16), (16, 8)]
    assert not kernels[6]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"activation": "tanh"}, "activation is 'tanh': allowed are leaky_relu, relu"),
        ({"dropout": 1}, r"dropout is 1: a number in \[0, 1\) is needed"),
        ({"zero_output": None}, "zero_output is None: True or False is needed"),
        ({"image_size": 15}, "4 poolings need at least 16"),
        ({"hidden": 0}, "hidden is 0: a whole number of at least 1"),
    ],
)
def test_bad_arguments_get_one_clear_line(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        models.vgg8b(5, rngs=nnx.Rngs(0), **{**SMALL, **arguments})
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_local_losses_train_every_layer_and_the_output_layer():
    rng = np.random.default_rng(0)
    label, patterns = np.arange(32) % 4, rng.normal(size=(4, 16, 16, 3))
    x = patterns[label] + 0.3 * rng.normal(size=(32, 16, 16, 3))
    batch = {"x": x.astype(np.float32), "label": label}
    model = models.vgg8b(4, init="torch", rngs=nnx.Rngs(0), **SMALL | {"hidden": 32})
    method = jd.methods.get("predsim", dim_in_decoder=64, classifier=0.01, init="torch")
    trainer = jd.Trainer(model, method, jd.optim.adam(0.01), example=batch, num_stages=2)
    _, metrics = nets.trained(trainer, [batch], 40)
    first, last = metrics[0], metrics[-1]
    terms = [f"block_{i}/{term}" for i in range(7) for term in ("cross_entropy", "similarity")]
    assert all(last[term] < 0.9 * first[term] for term in [*terms, "block_6/classifier"])
    assert first["block_6/classifier"] == pytest.approx(np.log(4), rel=0.1)
