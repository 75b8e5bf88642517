"""Residual nets: published sizes, order of layers, named splits."""

import functools
import inspect

import jax
import jax.numpy as jnp
import nets
import numpy as np
import pytest
from flax import nnx

import jdecouple as jd
from jdecouple import models
from jdecouple.models import layers


@functools.cache
def built(name, **arguments):
    """Blocks and classifier without values, and the splits, of a model that is never allocated."""
    splits = {}

    def build():
        model = models.get(name)(10, **arguments, rngs=nnx.Rngs(0))
        splits.update(model.splits)
        return [*model.blocks, model.classifier]

    return nnx.eval_shape(build), splits


def outputs(name, image_size=32, **arguments):
    """Shapes of what the blocks and the classifier output."""

    def apply(modules, x):
        shapes = []
        for module in modules:
            x = module(x)
            shapes.append(x)
        return shapes

    modules, _ = built(name, image_size=image_size, **arguments)
    found = nnx.eval_shape(apply, modules, jnp.ones((2, image_size, image_size, 3)))
    return [each.shape for each in found]


def weighted(modules):
    """Paths of the layers with weights, as text."""
    return [
        "/".join(map(str, path))
        for path, node in nnx.iter_graph(modules)
        if isinstance(node, nnx.Conv | nnx.Linear)
    ]


# --- Structure ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "units"),
    [
        ("resnet20", 9),
        ("resnet32", 15),
        pytest.param("resnet56", 27, marks=pytest.mark.slow),
        pytest.param("resnet110", 54, marks=pytest.mark.slow),
        ("resnet18", 8),
        pytest.param("resnet34", 16, marks=pytest.mark.slow),
        ("resnet50", 16),
        pytest.param("resnet101", 33, marks=pytest.mark.slow),
        ("wrn28_10", 12),
    ],
)
def test_published_depths(name, units):
    modules, _ = built(name)
    assert len(modules) == 1 + units + 1
    layers_ = weighted(modules)
    if name == "wrn28_10":  # counts all convolutions
        assert len(layers_) - 1 == 28
    else:
        depth = int(name.removeprefix("resnet"))
        assert sum("shortcut" not in path for path in layers_) == depth


@pytest.mark.parametrize(
    ("name", "arguments", "stem", "groups"),
    [
        ("resnet20", {}, (32, 16), [(32, 16)] * 3 + [(16, 32)] * 3 + [(8, 64)] * 3),
        ("resnet", {"depth": 8}, (32, 16), [(32, 16), (16, 32), (8, 64)]),
        (
            "resnet",
            {"depth": 8, "width": 0.01, "image_size": 7},
            (7, 1),
            [(7, 1), (4, 1), (2, 1)],
        ),
        (
            "resnet18",
            {"width": 0.5},
            (32, 32),
            [(32, 32)] * 2 + [(16, 64)] * 2 + [(8, 128)] * 2 + [(4, 256)] * 2,
        ),
        pytest.param(
            *("resnet50", {}, (32, 64)),
            [(32, 256)] * 3 + [(16, 512)] * 4 + [(8, 1024)] * 6 + [(4, 2048)] * 3,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("wrn28_10", {}, (32, 16)),
            [(32, 160)] * 4 + [(16, 320)] * 4 + [(8, 640)] * 4,
            marks=pytest.mark.slow,
        ),
        ("wide_resnet", {"depth": 10, "widen": 1}, (32, 16), [(32, 16), (16, 32), (8, 64)]),
    ],
)
def test_shapes(name, arguments, stem, groups):
    found = outputs(name, **arguments)
    assert found == [*((2, n, n, features) for n, features in [stem, *groups]), (2, 10)]


def kinds(modules):
    """Names of the layers in order, activations included."""
    names = []
    for module in modules:
        if isinstance(module, nnx.Sequential):
            names += kinds(module.layers)
        elif isinstance(module, layers.Residual):
            names += ["(", *kinds([module.branch]), "|", *kinds([module.shortcut]), ")"]
        else:
            known = module if not isinstance(module, nnx.Module) else type(module)
            names.append(known.__name__)
    return names


CONV_NORM = ["Conv", "BatchNorm"]


@pytest.mark.parametrize(
    ("name", "arguments", "unit", "classifier"),
    [
        ("resnet20", {}, [*CONV_NORM, "relu", *CONV_NORM, "|", "Pad"], []),
        (
            "resnet20",
            {"shortcut": "projection"},
            [*CONV_NORM, "relu", *CONV_NORM, "|", *CONV_NORM],
            [],
        ),
        ("resnet18", {}, [*CONV_NORM, "relu", *CONV_NORM, "|", *CONV_NORM], []),
        (
            "resnet50",
            {},
            [*CONV_NORM, "relu", *CONV_NORM, "relu", *CONV_NORM, "|", *CONV_NORM],
            [],
        ),
        (
            "wide_resnet",
            {"widen": 1, "dropout": 0.3},
            ["BatchNorm", "relu", "Conv", "BatchNorm", "relu", "Dropout", "Conv", "|", "Conv"],
            ["BatchNorm", "relu"],
        ),
    ],
)
def test_order_of_layers(name, arguments, unit, classifier):
    modules, _ = built(name, **arguments)
    last = [] if name == "wide_resnet" else ["relu"]
    firsts = [i for i, each in enumerate(modules) if any("shortcut" in p for p in weighted(each))]
    firsts = firsts or [4, 7]  # "pad" has no weights
    for first in firsts:
        assert kinds([modules[first]]) == ["(", *unit, ")", *last]
        identity = unit[: unit.index("|") + 1]
        assert kinds([modules[first + 1]]) == ["(", *identity, ")", *last]
    assert kinds([modules[-1]]) == [*classifier, "GlobalAveragePool", "Linear"]
    stem = ["Conv"] if name == "wide_resnet" else [*CONV_NORM, "relu"]
    assert kinds([modules[0]]) == stem


def convolutions(module):
    return {
        "/".join(map(str, path)): (node.kernel_size, node.strides, node.use_bias)
        for path, node in nnx.iter_graph(module)
        if isinstance(node, nnx.Conv)
    }


def test_strides_stand_where_the_papers_code_has_them():
    """In the bottleneck's 3x3 convolution, in the second one of WRN, in every projection."""
    bottleneck = convolutions(built("resnet50")[0][4])
    assert list(bottleneck.values()) == [
        ((1, 1), 1, False),
        ((3, 3), 2, False),
        ((1, 1), 1, False),
        ((1, 1), 2, False),
    ]
    assert ["shortcut" in path for path in bottleneck] == [False, False, False, True]
    wide = convolutions(built("wrn28_10")[0][5])
    assert list(wide.values()) == [((3, 3), 1, True), ((3, 3), 2, True), ((1, 1), 2, True)]


# --- Splits ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fdg"),
    [
        ("resnet20", {2: (5,), 3: (4, 7)}),
        ("resnet56", {2: (14,), 3: (10, 19), 4: (7, 14, 21)}),
        pytest.param(
            "resnet110",
            {2: (28,), 3: (19, 37), 4: (14, 28, 42), 5: (11, 22, 33, 44)},
            marks=pytest.mark.slow,
        ),
        ("resnet18", {2: (5,), 3: (3, 6)}),
        ("resnet50", {2: (8,), 3: (6, 11), 4: (5, 9, 13)}),
        pytest.param(
            "resnet101",
            {2: (17,), 3: (12, 23), 4: (9, 17, 25), 5: (7, 14, 21, 28)},
            marks=pytest.mark.slow,
        ),
        ("wrn28_10", {2: (7,), 3: (5, 9), 4: (4, 7, 10)}),
    ],
)
def test_fdg_splits(name, fdg):
    assert built(name)[1]["fdg"] == fdg


@pytest.mark.parametrize(
    ("depth", "fr"),
    [
        (8, {2: (2,)}),  # convolution, BatchNorm, ReLU, unit | unit, unit, pooling
        (14, {2: (3,), 3: (2, 6)}),
        (20, {2: (5,), 3: (3, 8)}),  # into 4, the last part would be the pooling alone
        (56, {2: (14,), 3: (9, 20), 4: (6, 14, 22)}),
        pytest.param(110, {2: (27,), 3: (18, 38), 4: (13, 28, 43)}, marks=pytest.mark.slow),
    ],
)
def test_features_replay_splits(depth, fr):
    name = f"resnet{depth}"
    _, splits = built(name) if name in models.names() else built("resnet", depth=depth)
    assert splits["fr"] == fr


def parts(depth, num_stages):
    """Units in each part of the list of layers, cut by hand."""
    names = ["conv", "norm", "relu", *range(1, depth // 6 * 3 + 1), "pool"]
    length = -(-len(names) // num_stages)
    return [
        [each for each in names[i * length : (i + 1) * length] if isinstance(each, int)]
        for i in range(num_stages)
    ]


@pytest.mark.parametrize("depth", [8, 14, 20, 26, 32])
def test_features_replay_splits_are_its_list_of_layers_cut(depth):
    found = built("resnet", depth=depth)[1]["fr"]
    for num_stages in (2, 3, 4):
        wanted = parts(depth, num_stages)
        if all(wanted):
            assert found[num_stages] == tuple(part[0] for part in wanted[1:])
        else:
            assert num_stages not in found


@pytest.mark.parametrize(
    ("name", "fr"),
    [
        ("resnet50", {2: (9,), 3: (6, 12), 4: (5, 10, 15)}),
        pytest.param("resnet101", {2: (18,), 3: (12, 24), 4: (9, 18, 27)}, marks=pytest.mark.slow),
    ],
)
def test_features_replay_splits_of_bottlenecks(name, fr):
    assert built(name)[1]["fr"] == fr  # stem, units and pooling, cut into equal parts


def test_which_nets_have_which_splits():
    assert built("resnet", depth=32)[1].keys() == {"infopro", "dgl", "fr"}
    assert built("resnet", depth=50)[1].keys() == {"infopro", "dgl", "fr"}  # not of ResNet-50
    assert built("resnet", depth=20)[1] == built("resnet20")[1]
    assert built("resnet34")[1] == {"paper": {4: (4, 8, 14)}}
    assert built("resnet18")[1].keys() == {"paper", "fdg"}
    assert built("wide_resnet", depth=10)[1] == {"infopro": {2: (2,), 3: (2, 3), 4: (1, 2, 3)}}
    assert built("wide_resnet", depth=28)[1] == built("wrn28_10")[1]


def four_blocks(splits=None):
    rngs = nnx.Rngs(0)
    blocks = [nnx.Linear(2, 2, rngs=rngs) for _ in range(4)]
    return models.Model(blocks, None, splits or {})


def test_boundaries():
    model = four_blocks({"even": {2: [2], 4: (1, 2, 3)}, "late": {1: (), 2: (3,)}})
    assert model.boundaries("even", 2) == (2,)
    assert model.boundaries("even", 4) == (1, 2, 3)
    assert model.boundaries("late", 1) == ()
    hash(model)


@pytest.mark.parametrize(
    ("name", "num_stages", "words"),
    [
        ("odd", 2, ("no split 'odd'", "allowed are even, late")),
        ("even", 3, ("'even'", "into 3 stages", "allowed are 2, 4")),
    ],
)
def test_unknown_splits_get_one_clear_line(name, num_stages, words):
    model = four_blocks({"even": {2: (2,), 4: (1, 2, 3)}, "late": {2: (3,)}})
    nets.assert_clear(ValueError, words, lambda: model.boundaries(name, num_stages))


def test_a_model_without_splits_says_so():
    words = ("no split 'fdg'", "it has none")
    nets.assert_clear(ValueError, words, lambda: four_blocks().boundaries("fdg", 2))


@pytest.mark.parametrize(
    ("num_stages", "starts"),
    [(2, (0,)), (2, (4,)), (3, (2, 2)), (3, (3, 1)), (3, (1,)), (2, ()), (2, (1.5,)), ("2", (1,))],
)
def test_bad_splits_get_one_clear_line(num_stages, starts):
    words = ("split 'mine'", repr(starts), "K - 1 increasing", "from 1 to 3")
    nets.assert_clear(ValueError, words, lambda: four_blocks({"mine": {num_stages: starts}}))


# --- Use ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("resnet", {"depth": 18}, r"depth is 18: 6n\+2"),
        ("resnet", {"depth": 2}, r"depth is 2: 6n\+2 for a whole n of at least 1"),
        ("resnet", {"depth": 8.0}, "depth is 8.0: a whole number"),
        ("resnet", {"depth": "20"}, "depth is '20': a whole number"),
        ("resnet", {"shortcut": "C"}, "shortcut is 'C': allowed are pad, projection"),
        ("resnet", {"width": 0}, "width is 0: a finite number above 0"),
        ("resnet", {"image_size": 3}, "image_size is 3: 2 halvings need at least 4"),
        ("resnet", {"channels": 0}, "channels is 0: a whole number of at least 1"),
        ("resnet", {"init": "xavier"}, "init is 'xavier': allowed are flax, torch, he"),
        ("resnet18", {"image_size": 7}, "3 halvings need at least 8"),
        ("resnet18", {"variant": "fdg"}, "variant is 'fdg': allowed are deinforeg, scpl"),
        ("resnet50", {"width": -1.0}, "width is -1.0: a finite number above 0"),
        ("wide_resnet", {"depth": 20}, r"depth is 20: 6n\+4"),
        ("wide_resnet", {"depth": 4}, r"depth is 4: 6n\+4"),
        ("wide_resnet", {"widen": 0.5}, "widen is 0.5: a whole number of at least 1"),
        (
            "wide_resnet",
            {"dropout": 1.0},
            r"dropout is 1.0: a number in \[0, 1\)",
        ),
        ("wide_resnet", {"dropout": "half"}, "dropout is 'half': a number"),
        ("wrn28_10", {"image_size": 3}, "2 halvings need at least 4"),
    ],
)
def test_bad_arguments_get_one_clear_line(name, arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        models.get(name)(10, **arguments, rngs=nnx.Rngs(0))
    assert "\n" not in str(caught.value)


def test_bound_arguments_are_no_arguments():
    for name in (name for name in models.names() if "resnet" in name or "wrn" in name):
        builder = models.get(name)
        assert builder.__name__ == name
        left = inspect.signature(builder).parameters
        bound = set() if name in ("resnet", "wide_resnet") else {"depth", "widen", "groups"}
        assert not bound & left.keys()
        assert {"image_size", "channels", "init", "param_dtype", "rngs"} < left.keys()
    with pytest.raises(TypeError, match="multiple values for keyword argument 'depth'"):
        models.resnet20(10, depth=56, rngs=nnx.Rngs(0))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "boundaries"),
    [
        (
            lambda **sizes: models.resnet(nets.CLASSES, depth=8, width=0.25, **sizes),
            lambda model: model.boundaries("fr", 2),
        ),
        pytest.param(
            lambda **sizes: models.wide_resnet(
                nets.CLASSES, depth=10, widen=1, dropout=0.1, **sizes
            ),
            lambda model: (2,),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["resnet", "wide_resnet"],
)
def test_training_over_stages_lowers_the_loss(build, boundaries):
    model = build(image_size=8, channels=1, init="he", rngs=nnx.Rngs(0))
    batch = nets.images(1)[0]
    batch["x"] = batch["x"].astype(np.float32) / 255
    trainer = jd.Trainer(
        model,
        nets.method("bp"),
        jd.optim.sgd(0.05, momentum=0.9),
        boundaries=boundaries(model),
        mesh=jd.make_mesh(2, devices=jax.devices()[:2]),
        example=batch,
    )
    assert trainer.boundaries == (0, 2)
    _, metrics = nets.trained(trainer, [batch], 12)
    assert metrics[-1]["loss"] < 0.7 * metrics[0]["loss"]
