"""Parameters of the papers' nets, as their released code builds them.

Images are those of CIFAR-10, texts have 1,000 words and 4 classes.
"""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jdecouple as jd
from jdecouple.pipeline import build
from jdecouple.pipeline.design import same_keys  # one key for all layers, quick to trace


def slow(*row):
    return pytest.param(*row, marks=pytest.mark.slow)


def built(name, arguments):
    return jd.models.get(name)(**{"num_classes": 10, **arguments}, rngs=same_keys(0))


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


SCPL_VGG = {"layout": "scpl", "classifier": "scpl"}
SCPL_RESNET = {"variant": "scpl", "cut": "paper"}
WORDS, LENGTH = 1_000, 60
LSTM = {"num_classes": 4, "vocabulary_size": WORDS, "max_length": LENGTH}
LSTM |= {"merge": "concat", "classifier": "deinforeg"}
SECOND_BIASES = 4 * 2 * 4 * 300  # PyTorch's, of both directions of four LSTMs
MERGE = {"projector": "identity", "activation": "tanh", "batch_norm": False}


@pytest.mark.parametrize(
    ("name", "arguments", "parameters"),
    [
        ("vgg8", {"classifier": "deinforeg"}, 13_663_370),  # DeInfoReg's BP
        ("vgg8", SCPL_VGG, 11_938_294),
        ("resnet18", {"variant": "scpl"}, 12_550_218),
        ("resnet18", {}, 11_173_962),  # DeInfoReg, FDG
        ("resnet34", {}, 21_282_122),
        ("resnet50", {}, 23_520_842),
        slow("resnet101", {}, 42_512_970),
        ("resnet20", {}, 269_722),  # FDG, Features Replay, DDG
        ("resnet56", {}, 853_018),
        slow("resnet110", {}, 1_727_962),
        ("resnet", {"depth": 32, "shortcut": "projection"}, 466_906),  # InfoPro
        slow("resnet110", {"shortcut": "projection"}, 1_730_714),
        ("wrn28_10", {}, 36_489_290),  # FDG
        ("vgg8b", {}, 8_903_434),  # PredSim's BP
        ("lstm", LSTM, 8_240_404 - SECOND_BIASES),  # DeInfoReg's BP
    ],
)
def test_of_the_net_with_its_classifier(name, arguments, parameters):
    def params():
        model = built(name, arguments)
        return nnx.state([*model.blocks, model.classifier], nnx.Param)

    assert size(nnx.eval_shape(params)) == parameters


@pytest.mark.parametrize(
    ("method", "options", "name", "arguments", "parameters"),
    [
        # Projectors 2048-2048-2048 and a classifier behind each, instead of the net's own.
        ("deinforeg", {}, "vgg8", {}, 265_454_760),
        slow("deinforeg", {}, "resnet18", {"cut": "paper"}, 296_537_192),
        # Projectors 512-1024, and the net's classifier.
        ("scpl", {}, "vgg8", SCPL_VGG, 69_616_118),
        slow("scpl", {}, "resnet18", SCPL_RESNET, 73_635_914),
        # Classifiers of every LSTM, tanh and dense, instead of the net's own.
        ("deinforeg", MERGE, "lstm", LSTM, 8_244_016 - SECOND_BIASES),
    ],
)
def test_of_the_net_with_the_heads_of_a_method(method, options, name, arguments, parameters):
    x = ((2, LENGTH), jnp.int32) if name == "lstm" else ((2, 32, 32, 3), jnp.float32)
    carry = {"x": jax.ShapeDtypeStruct(*x), "label": jax.ShapeDtypeStruct((2,), jnp.int32)}

    def params():
        model, trained_by = built(name, arguments), jd.methods.get(method, **options)
        units = build.build_units(model, trained_by, carry, None, 0, None).units
        return [unit.initial()[0] for unit in units]

    assert size(jax.eval_shape(params)) == parameters
