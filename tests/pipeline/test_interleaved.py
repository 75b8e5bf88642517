"""Stages of a local method that share devices in turns: delayed, and yet what `local` trains."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import nets
import numpy as np
import pytest

import jdecouple as jd
from jdecouple import growth
from jdecouple.pipeline.design import make_design
from jdecouple.pipeline.mesh import described
from jdecouple.pipeline.plan.device_bytes import planned_bytes

pytestmark = pytest.mark.usefixtures("module_x64")

STEPS, MIDDLE = 8, 4
DATA = nets.batches(dtype=np.float64)


@functools.cache
def trainer(name: str, devices: int, stages: int = 4, schedule: str = "interleaved") -> jd.Trainer:
    """Four blocks with BatchNorm and dropout of their own."""
    return jd.Trainer(
        nets.user_model(param_dtype=jnp.float64),
        nets.method(name),
        jd.optim.sgd(0.05, momentum=0.9),
        num_stages=stages,
        mesh=jd.make_mesh(devices),
        schedule=schedule,
        example=DATA[0],
    )


@functools.cache
def by_local(name: str) -> tuple[dict[str, np.ndarray], list[dict[str, float]]]:
    """What `local` trains, as one stage, and its metrics."""
    plain = trainer(name, 1, 1, "local")
    state, metrics = nets.trained(plain, DATA, STEPS)
    return nets.to_arrays(plain, state), metrics


def drained(own: jd.Trainer, state: Any) -> dict[str, np.ndarray]:
    """What is trained, without what waits."""
    arrays = nets.to_arrays(own, own.finish(state))
    return {name: leaf for name, leaf in arrays.items() if not name.startswith("stage_")}


def rest(own: jd.Trainer, state: Any) -> tuple[Any, list[dict[str, float]]]:
    return nets.trained(own, DATA, STEPS - MIDDLE, state)


@pytest.mark.parametrize(
    ("name", "devices"),
    [
        ("greedy_exit", 2),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("dgl", 2), ("al", 1), ("al", 2))
        ),
    ],
)
def test_drained_it_has_trained_as_local(name, devices):
    """With a checkpoint in the middle, from which one device goes on."""
    first, one = trainer(name, devices), trainer(name, 1)
    groups = [stage.devices for stage in first.placements]
    assert groups[:2] == groups[2:]
    assert len(set(groups)) == devices
    wanted, expected = by_local(name)
    state, metrics = nets.trained(first, DATA, MIDDLE)
    kept = nets.to_arrays(first, state)
    assert {key.split("/")[1] for key in kept if key.startswith("stage_")} == {"since", "waiting"}
    other, _ = rest(one, one.from_arrays(MIDDLE, kept))
    state, late = rest(first, state)
    assert nets.largest_error(nets.to_arrays(one, other), nets.to_arrays(first, state)) < 1e-12
    assert nets.largest_error(drained(first, state), wanted) < 1e-12
    for step, row in enumerate(metrics + late):  # those of block k are k batches old
        for key, value in row.items():
            block = int(key[6]) if key.startswith("block_") else 3
            there = expected[step - block][key] if step >= block else np.nan
            assert value == pytest.approx(there, rel=2e-6, nan_ok=True), (step, key)


def test_it_goes_on_after_it_was_drained():
    own = trainer("greedy_exit", 2)
    state, _ = nets.trained(own, DATA, MIDDLE)
    state, metrics = rest(own, own.finish(state))
    assert nets.largest_error(drained(own, state), by_local("greedy_exit")[0]) < 1e-12
    assert [np.isnan(row["loss"]) for row in metrics] == [True, True, True, False]


@pytest.mark.slow
def test_lists_of_batches():
    """Stages in one call take them; those apart would wait for one another."""
    own, apart = trainer("dgl", 1), trainer("dgl", 2)
    state = own.init()
    for _ in range(STEPS // len(DATA)):
        state, metrics = own.steps(state, DATA)
    assert nets.largest_error(drained(own, state), by_local("dgl")[0]) < 1e-12
    assert metrics["loss"].shape == (4,)
    words = ("chunk of 2", "schedule local", "4 stages apart")
    nets.assert_clear(ValueError, words, lambda: apart.put(DATA[:2]))


def test_what_it_does_not_take():
    def build(**options: Any) -> jd.Trainer:
        return nets.build("dgl", schedule="interleaved", **options)

    words = ("schedule interleaved takes 1",)
    nets.assert_clear(ValueError, words, lambda: build(num_stages=2, microbatches=2))
    words = ("engine 'spmd'", "'interleaved'")
    nets.assert_clear(ValueError, words, lambda: build(num_stages=2, engine="spmd"))
    own = trainer("dgl", 1)
    words = ("to grow", "schedule 'local'", "'interleaved'")
    nets.assert_clear(ValueError, words, lambda: growth.grow(own, own.init(), []))


@pytest.mark.slow
def test_a_device_with_little_memory_holds_few_blocks():
    """Two of eight, by boundaries: an early one, and a late one."""
    shapes = {"x": ((16, 64), "float32"), "label": ((16,), "int32")}
    design = make_design(
        lambda rngs: jd.models.mlp(10, input_size=64, hidden=64, depth=8, rngs=rngs),
        nets.method("dgl"),
        jd.optim.sgd(0.1, momentum=0.9),
        boundaries=[0, 1, 4, 5],
        mesh=jd.make_mesh(2, devices=described(2)),
        schedule="interleaved",
        example={key: jax.ShapeDtypeStruct(*value) for key, value in shapes.items()},
    )
    small, large = planned_bytes(design, "cpu")
    assert (small.stages, large.stages) == ((0, 2), (1, 3))
    assert large.weights == pytest.approx(3 * small.weights, rel=0.1)
    assert 2 * small.total < large.total
