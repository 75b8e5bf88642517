"""Language models on replicas, in microbatches, and by the SPMD engine: the same numbers."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import nets
import pytest
import token_nets

import jdecouple as jd

pytestmark = [pytest.mark.usefixtures("module_x64"), pytest.mark.slow]
STEPS = 3


@functools.cache
def trained(name: str, stages: int = 1, data: int = 1, **options: Any) -> tuple:
    """Arrays, metrics and an evaluation."""
    mesh = jd.make_mesh(stages, data=data, devices=jax.devices()[: stages * data])
    net = token_nets.model(dropout=0.2, depth=3, param_dtype=jnp.float64)
    each = token_nets.trainer(name, model=net, mesh=mesh, **options)
    batches = token_nets.batches()
    state, metrics = nets.trained(each, batches, STEPS)
    return nets.to_arrays(each, state), metrics, each.evaluate(state, batches)


def assert_same(found: tuple, wanted: tuple) -> None:
    assert nets.largest_error(found[0], wanted[0]) < 1e-12
    for here, there in zip(found[1], wanted[1], strict=True):
        assert here == pytest.approx(there, rel=2e-6, abs=1e-7)
    assert found[2] == pytest.approx(wanted[2], rel=1e-6)


@pytest.mark.parametrize("name", ["bp", "dgl", "deinforeg"])
def test_replicas(name):
    assert_same(trained(name, 2, 2), trained(name))


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_microbatches(schedule):
    """Of rows with all labels; without dropout, whose keys are those of a microbatch."""
    found = []
    for stages, more in ((2, {"microbatches": 2, "schedule": schedule}), (1, {})):
        mesh = jd.make_mesh(stages, devices=jax.devices()[:stages])
        net = token_nets.model(depth=3, param_dtype=jnp.float64)
        each = token_nets.trainer("early_exit", model=net, mesh=mesh, **more)
        state, _ = nets.trained(each, token_nets.batches(padded=False), STEPS)
        found.append(nets.to_arrays(each, state))
    assert nets.largest_error(*found) < 1e-12


@pytest.mark.parametrize("name", ["bp", "greedy_exit", "deinforeg"])
def test_one_program_for_all_stages(name):
    more = {"schedule": "gpipe"} if name == "bp" else {}
    assert_same(trained(name, 2, engine="spmd", **more), trained(name))
