"""Delayed methods: their limits, and what leaves their queues alone."""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import nets
import numpy as np
import pytest
from flax import nnx

import jdecouple as jd
from jdecouple.methods.objectives import CrossEntropy
from jdecouple.methods.routes import Delayed
from jdecouple.models import layers

pytestmark = pytest.mark.usefixtures("module_x64")

STEPS = 12
DATA = nets.batches(dtype=np.float64)
DELAYED = pytest.mark.parametrize("name", nets.marked(nets.DELAYED, ("fdg",)))


def trainer(method: Any, stages: int, **options: Any) -> jd.Trainer:
    return jd.Trainer(
        nets.user_model(depth=3, param_dtype=jnp.float64),
        nets.method(method) if isinstance(method, str) else method,
        jd.optim.sgd(0.1, momentum=0.9, weight_decay=1e-3),
        **{"num_stages": stages, "example": DATA[0], **options},
    )


@functools.cache
def shared(name: str) -> jd.Trainer:
    """Three stages on three devices."""
    return trainer(name, 3)


def trained(method: Any, stages: int) -> tuple:
    run = trainer(method, stages, mesh=jd.make_mesh(1))
    state, metrics = nets.trained(run, DATA, STEPS)
    return nets.to_arrays(run, state), metrics


@functools.cache
def backpropagated() -> tuple:
    return trained("bp", 1)


# --- Where nothing is late, it is backpropagation ------------------------------------------------


@pytest.mark.parametrize("name", nets.marked(nets.DELAYED, ()))  # test_delayed_golden.py has one
def test_one_stage_is_backpropagation_to_the_bit(name):
    method = nets.method(name, **({"accumulate": 1} if name in ("adl", "2bw") else {}))
    arrays, metrics = trained(method, 1)
    assert nets.same_bits(arrays, backpropagated()[0])
    assert metrics == backpropagated()[1]


@pytest.mark.slow
@pytest.mark.parametrize("replay", nets.marked([False, True], [False]))
@pytest.mark.parametrize("stages", nets.marked((2, 4), (2,)))
def test_without_delay_it_is_backpropagation(replay, stages):
    route = Delayed("locked", backward_pass="locked", replay=replay)
    arrays, metrics = trained(jd.methods.Method("mine", CrossEntropy(), route), stages)
    assert nets.largest_error(arrays, backpropagated()[0]) < 1e-12
    for here, there in zip(metrics, backpropagated()[1], strict=True):
        assert here == pytest.approx(there, rel=2e-6)


@pytest.mark.slow
@DELAYED
def test_with_delay_it_is_not(name):
    arrays, _ = trained(name, 3)
    wanted, _ = backpropagated()
    weights = {key: value for key, value in arrays.items() if "/params/" in key}
    assert nets.largest_error(weights, {key: wanted[key] for key in weights}) > 1e-3


def test_no_delay_is_no_staleness():
    route = Delayed("locked", backward_pass="locked")
    assert route.schedules == ("sequential",)
    assert {route.staleness(k, 4) for k in range(4)} == {(0, 0)}


# --- Around the queues ---------------------------------------------------------------------------


@pytest.mark.slow
@DELAYED
def test_evaluation_in_the_middle_disturbs_nothing(name):
    run = shared(name)
    state, _ = nets.trained(run, DATA, 5)
    before = nets.to_arrays(run, state)
    assert any("/waiting/" in key for key in before)
    run.evaluate(state, DATA)
    run.modules(state)
    assert nets.same_bits(nets.to_arrays(run, state), before)
    wanted, _ = nets.trained(run, DATA, 5)
    assert nets.same_bits(nets.to_arrays(run, wanted), before)


@DELAYED
def test_state_goes_through_its_arrays(name):
    """As a checkpoint does: to the host and back, on other devices."""
    run, other = shared(name), trainer(name, 3, mesh=jd.make_mesh(3, 2))
    state, _ = nets.trained(run, DATA, 5)
    arrays = nets.to_arrays(run, state)
    again, moved = run.from_arrays(5, arrays), other.from_arrays(5, arrays)
    assert nets.same_bits(nets.to_arrays(other, moved), arrays)
    for step in range(5, 9):
        state, first = run.step(state, DATA[step % 4])
        again, second = run.step(again, DATA[step % 4])
        moved, third = other.step(moved, DATA[step % 4])
    assert nets.same_bits(nets.to_arrays(run, again), nets.to_arrays(run, state))
    assert nets.largest_error(nets.to_arrays(other, moved), nets.to_arrays(run, state)) < 1e-12
    assert float(first["loss"]) == float(second["loss"]) == pytest.approx(float(third["loss"]))


@DELAYED
def test_queues_are_in_the_abstract_state(name):
    run = shared(name)
    state, _ = run.step(run.init(), DATA[0])
    arrays, template = run.to_arrays(state), run.to_arrays(run.abstract())
    chex.assert_trees_all_equal_shapes_and_dtypes(arrays, template)


@pytest.mark.parametrize("name", nets.marked(nets.EXACT, ("bp", "deinforeg")))
def test_other_methods_have_nothing_to_finish(name):
    run = nets.build(name)
    state = run.init()
    assert run.finish(state) is state
    assert run.latency == 0


@pytest.mark.slow
def test_views_double_what_waits():
    """An augmentation may make more examples than the batch holds."""
    images = nets.images()
    found = []
    for mesh in (jd.make_mesh(1), jd.make_mesh(2, 2)):
        run = jd.Trainer(
            nets.user_model(64, depth=2, param_dtype=jnp.float64),
            nets.method("fdg"),
            jd.optim.sgd(0.05),
            num_stages=2,
            mesh=mesh,
            example=images[0],
            transform=jd.data.augment.get("two_views", mean=[0.5], std=[0.25]),
        )
        state, _ = nets.trained(run, images, 5)
        found.append(nets.to_arrays(run, state))
    assert nets.largest_error(*found) < 1e-12
    assert found[0]["stage_1/waiting/messages/0/label"].shape == (32,)


# --- What is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", nets.marked(nets.DELAYED))
def test_microbatches_are_refused(name):
    nets.assert_clear(
        ValueError,
        ("num_microbatches is 2", "takes 1"),
        lambda: trainer(name, 2, microbatches=2),
    )


@pytest.mark.parametrize(
    ("name", "schedule", "own"),
    [
        ("fdg", "delayed_locked", "delayed"),
        ("fr", "delayed", "delayed_locked"),
        ("ddg", "sequential", "delayed_locked"),
        ("bp", "delayed", "sequential"),
        ("scpl", "delayed", "local"),
    ],
)
def test_schedule_of_another_route_is_refused(name, schedule, own):
    """It would be another method."""
    nets.assert_clear(
        ValueError,
        (repr(schedule), f"method {name}", own),
        lambda: nets.build(name, num_stages=2, schedule=schedule),
    )


def test_a_method_is_a_row_of_settings():
    """Four published methods differ in nothing but the settings of one route."""
    default = Delayed("locked")
    rows = {name: jd.methods.get(name).route for name in ("ddg", "fr", "fdg", "adl")}
    assert all(isinstance(route, Delayed) for route in rows.values())
    settings = {
        name: {
            field.name: getattr(route, field.name)
            for field in dataclasses.fields(route)
            if getattr(route, field.name) != getattr(default, field.name)
        }
        for name, route in rows.items()
    }
    assert settings == {
        "ddg": {},
        "fr": {"replay": True},
        "fdg": {"forward_pass": "pipelined"},
        "adl": {"forward_pass": "pipelined", "accumulate": 4},
    }


# --- The reading of FDG's released code ----------------------------------------------------------


def test_current_weights_multiply_kept_activations():
    """As in PyTorch where weights move in place: BatchNorm's scale is one of them.

    The error goes back through the scale of the moment and the normalised activations of forward
    time, so that a scale grown by 1.6 makes the gradients below it 1.6 times as large.
    """
    rngs = nnx.Rngs(0)
    options = {"param_dtype": jnp.float64, "rngs": rngs}
    first = nnx.Sequential(
        layers.linear(nets.FEATURES, 6, **options), layers.BatchNorm(6, **options)
    )
    model = jd.Model([first, layers.linear(6, nets.CLASSES, **options)])
    method = jd.methods.get("fdg", current_weights=True)
    run = jd.Trainer(model, method, jd.optim.sgd(0.1), num_stages=2, example=DATA[0])
    stage, route, step_id = run.stages[0], method.route, jnp.zeros(2, jnp.int32)
    state = stage.initial()
    carry = {key: jnp.asarray(value) for key, value in DATA[0].items()}
    kept = jax.jit(lambda s, m: route.forward(stage, s, m, step_id)[2])(state, carry)
    error = jnp.asarray(np.random.default_rng(0).normal(size=(16, 6)))
    backward = jax.jit(lambda s, kept: route.backward(stage, s, kept, error, step_id)[0][0])
    before = backward(state, kept)
    scale = "block/layers/1/scale"
    params = {**state["params"][0], scale: 1.6 * state["params"][0][scale]}
    after = backward({**state, "params": (params,)}, kept)
    for name, factor in {
        "block/layers/0/kernel": 1.6,
        "block/layers/0/bias": 1.6,
        scale: 1.0,
        "block/layers/1/bias": 1.0,
    }.items():
        np.testing.assert_allclose(after[name], factor * before[name], rtol=1e-12, atol=1e-14)
    assert np.abs(before["block/layers/0/kernel"]).max() > 0.1
