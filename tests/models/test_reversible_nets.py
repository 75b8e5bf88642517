"""Blocks with an inverse, and the nets of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jdecouple import models
from jdecouple.models.reversible import ReversibleUnit, is_reversible


def test_a_unit_adds_its_branch_and_swaps_the_streams():
    branch = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
    x = jnp.arange(12.0).reshape(2, 6)
    y = ReversibleUnit(branch)(x)
    np.testing.assert_allclose(y[:, :3], x[:, 3:] + branch(x[:, :3]), rtol=1e-6)
    np.testing.assert_array_equal(y[:, 3:], x[:, :3])
    with pytest.raises(ValueError, match="have 5 features: an even number is needed"):
        ReversibleUnit(branch)(x[:, :5])


def test_revnet18_has_the_papers_parameters():
    """12.2 million on ImageNet (arXiv 2406.02052, table 2), whose stem is one of 7x7 pixels."""

    def net() -> nnx.List:
        model = models.revnet18(1000, rngs=nnx.Rngs(0))
        return nnx.List([*model.blocks, model.classifier])

    leaves = jax.tree.leaves(nnx.state(nnx.eval_shape(net), nnx.Param))
    sizes = sum(leaf.size for leaf in leaves)
    assert round((sizes + (49 - 9) * 3 * 128) / 1e6, 1) == 12.2


def test_what_halves_the_maps_has_no_inverse():
    model = models.revnet(10, depth=14, width=1 / 4, image_size=8, channels=1, rngs=nnx.Rngs(0))
    found = [is_reversible(block) for block in model.blocks]
    assert found == [False, True, True, False, True, False, True]
    parts = models.revnet(10, depth=14, width=1 / 4, cut=(0, 1, 3, 5), rngs=nnx.Rngs(0)).blocks
    assert [is_reversible(part) for part in parts] == [False, True, False, False]


@pytest.mark.slow
def test_shapes_are_those_of_a_resnet_with_two_streams():
    net = models.revnet(10, depth=8, rngs=nnx.Rngs(0))
    shapes, x = [], jnp.ones((2, 32, 32, 3))
    for block in net.blocks:
        x = block(x)
        shapes.append(x.shape[1:])
    assert shapes == [(32, 32, 32), (32, 32, 32), (16, 16, 64), (8, 8, 128)]
    assert net.classifier(x).shape == (2, 10)


def test_a_reversible_perceptron():
    net = models.mlp(3, input_size=5, hidden=6, depth=3, reversible=True, rngs=nnx.Rngs(0))
    assert [is_reversible(block) for block in net.blocks] == [False, True, True]
    x = net.blocks[0](jnp.ones((2, 5)))
    y = net.blocks[1](x)
    np.testing.assert_allclose(net.blocks[1].inverse(y), x, atol=1e-6)
    with pytest.raises(ValueError, match="hidden is 7: two streams need an even number"):
        models.mlp(3, input_size=5, hidden=7, depth=3, reversible=True, rngs=nnx.Rngs(0))
