"""Metrics that a compiled call gives in few arrays."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdecouple.pipeline.step_metrics import JoinedMetrics, StepMetrics, on_host

VALUES = {"loss": 1.5, "exact": 3, "accuracy": 0.25}


def call(single=(), shape=()):
    dtypes = {"exact": jnp.int32}
    metrics = {n: jnp.full(shape, x, dtypes.get(n, jnp.float32)) for n, x in VALUES.items()}
    return jax.jit(lambda: JoinedMetrics.of(metrics, single))()


def test_an_array_a_dtype_leaves_a_call():
    joined = call()
    assert [(x.shape, x.dtype) for x in joined.arrays] == [((2,), "float32"), ((1,), "int32")]
    assert joined.names == (("loss", "accuracy"), ("exact",))


@pytest.mark.parametrize("single", [(), ("loss",), tuple(VALUES)])
@pytest.mark.parametrize("shape", [(), (4,)])
def test_they_are_read_as_they_were_given(single, shape):
    metrics = StepMetrics([call(single, shape)])
    assert {*metrics} == {*VALUES}
    on_the_host = on_host([metrics, metrics])[1]
    for name, value in VALUES.items():
        np.testing.assert_array_equal(on_the_host[name], np.full(shape, value))
        assert isinstance(metrics[name], jax.Array)
        assert metrics[name].shape == shape
        assert metrics[name].dtype == on_the_host[name].dtype
        np.testing.assert_array_equal(metrics[name], np.full(shape, value))


def test_later_parts_go_before_earlier_ones():
    metrics = StepMetrics([call(), {"loss": jnp.float32(2)}, StepMetrics([{"more": jnp.ones(())}])])
    assert dict(metrics) == {**VALUES, "loss": 2, "more": 1}
    assert {*metrics.without("loss"), *metrics.without("other")} == {*metrics}
    assert "loss" not in metrics.without("loss")


def test_they_are_a_tree_and_can_be_copied():
    metrics = StepMetrics([call()])
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(metrics)]
    assert [path[0].key for path in paths] == sorted(VALUES)
    assert dict(jax.tree.map(lambda x: 2 * x, metrics))["exact"] == 6
    assert dict(copy.deepcopy(metrics)) == VALUES


@jax.jit
def slowly():
    """[1], after matrix products of about a second."""
    matrix = jnp.full((256, 256), 1e-3, jnp.float32)
    done = jax.lax.fori_loop(0, 1000, lambda _, m: jnp.tanh(m @ m), matrix)
    return done[0, :1]


def test_reading_does_not_wait():
    """The entry of an array that is still being computed is a future too."""
    float(StepMetrics([JoinedMetrics((slowly(),), {}, (("loss",),))])["loss"])  # compiles
    array = slowly()
    metrics = StepMetrics([JoinedMetrics((array,), {}, (("loss",),))])
    loss = metrics["loss"]
    assert not array.is_ready()
    assert not loss.is_ready()
    assert loss is metrics["loss"]
    assert float(loss) == float(array[0])
