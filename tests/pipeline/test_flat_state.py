"""Small arrays of a stage's state are joined: a call has few of them, a reader sees them all."""

import copy
import functools
import pickle

import jax
import jax.numpy as jnp
import nets
import numpy as np
import pytest

import jdecouple as jd
from jdecouple.pipeline.mpmd import flat_state
from jdecouple.pipeline.mpmd.flat_state import FlatPart
from jdecouple.pipeline.state import spec

DATA = nets.batches()


@functools.cache
def trainer() -> jd.Trainer:
    """Two stages in one call."""
    mesh = jd.make_mesh(2, devices=jax.devices()[:1])
    return nets.build("greedy_exit", model=nets.mlp(depth=2), num_stages=2, mesh=mesh)


@pytest.mark.parametrize("name", nets.marked(("bp", "deinforeg", "fdg"), ("fdg",)))
def test_joined_or_not_a_training_is_the_same(name, monkeypatch, x64):
    data = nets.batches(dtype=np.float64)
    found, arrays = [], []
    for limit in (flat_state.STAGE_BYTES, {}):
        monkeypatch.setattr(flat_state, "STAGE_BYTES", limit)
        model = nets.mlp(depth=2, param_dtype=jnp.float64)
        options = {"microbatches": 2} if name == "bp" else {}
        trained = nets.build(
            name, model=model, mesh=jd.make_mesh(2), ema=0.9, example=data[0], **options
        )
        state, _ = nets.trained(trained, data, 4)
        found.append(nets.to_arrays(trained, state))
        arrays.append(len(jax.tree.leaves(state.stages)))
    assert nets.largest_error(*found) < 1e-12
    assert arrays[0] < arrays[1] == len(found[1])


def test_stages_are_cut_when_they_are_asked_for():
    state = trainer().init()
    wanted = trainer().stages[1].initial()
    stages = state.stages
    assert len(stages) == 2
    for found in (stages[1], stages[-1], stages[1:][0], list(stages)[1]):
        jax.tree.map(np.testing.assert_array_equal, found, wanted)
    trainer().step(state, DATA[0])
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(found))
    with pytest.raises(ValueError, match="used up"):
        state.stages[0]


def test_states_that_a_caller_puts_together_are_used_up():
    given = jd.pipeline.state.State(0, tuple(trainer().init().stages))
    state, _ = trainer().step(given, DATA[0])
    wanted, _ = trainer().step(trainer().init(), DATA[0])
    assert nets.same_bits(*(nets.to_arrays(trainer(), x) for x in (state, wanted)))
    with pytest.raises(ValueError, match="used up"):
        trainer().step(given, DATA[0])


def test_a_state_is_a_tree_as_any():
    """Traced, as shapes, on the host, copied and pickled."""
    state = trainer().init()
    wanted = trainer().stages[1].initial()
    found = jax.jit(lambda state: state.stages[1])(state)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    shapes, abstract = jax.eval_shape(lambda x: x, state), trainer().abstract()
    specs = [jax.tree.map(spec, trainer().to_arrays(x)) for x in (shapes, abstract)]
    assert specs[0] == specs[1]
    host = jax.device_get(state).stages[1]
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(host))
    jax.tree.map(np.testing.assert_array_equal, host, wanted)
    copies = [copy.deepcopy(state), pickle.loads(pickle.dumps(state))]
    copies.append(jax.tree.map(lambda leaf: leaf + 0, state))
    steps = [nets.to_arrays(trainer(), trainer().step(x, DATA[0])[0]) for x in [*copies, state]]
    assert all(nets.same_bits(found, steps[-1]) for found in steps)


def test_the_state_of_a_trainer_that_joins_nothing(monkeypatch):
    """As one with larger batches; it is used up as well."""
    given, _ = trainer().step(trainer().init(), DATA[0])
    wanted, _ = trainer().step(trainer().step(trainer().init(), DATA[0])[0], DATA[1])
    monkeypatch.setattr(flat_state, "STAGE_BYTES", {})
    mesh = jd.make_mesh(2, devices=jax.devices()[:1])
    other = nets.build("greedy_exit", model=nets.mlp(depth=2), num_stages=2, mesh=mesh)
    state, _ = other.step(given, DATA[1])
    found, wanted = nets.to_arrays(other, state), nets.to_arrays(trainer(), wanted)
    assert nets.largest_error(found, wanted) < 1e-6
    with pytest.raises(ValueError, match="used up"):
        trainer().step(given, DATA[1])


def test_what_is_joined():
    """Small arrays of a dtype that has several; not keys, nor numbers without a dtype."""
    tree = {
        "small": [np.ones((2, 3), np.float32), np.float32(5), np.zeros(0, np.float32)],
        "whole": [np.int32(1), np.int32(2)],
        "alone": np.float16(1),
        "large": np.ones(flat_state.JOINED_BYTES // 4 + 1, np.float32),
        "key": jax.random.key(0),
        "weak": jnp.asarray(1.0),
    }
    shapes = jax.eval_shape(lambda: tree)
    part = FlatPart.of(shapes, True)
    joined, others = part.join(tree)
    assert {dtype: array.shape for dtype, array in joined.items()} == {
        "float32": (7,),
        "int32": (2,),
    }
    assert len(others) == 4
    assert FlatPart.of(shapes, False).joined == {}
    cut = part.tree(part.cut(joined), others)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), cut, tree))
