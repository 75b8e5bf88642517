"""Replicas of a stage: what they compute, and what their compiled step sends between them."""

import itertools
import re

import jax
import jax.numpy as jnp
import nets
import numpy as np
import pytest
import sequence_nets

import jdecouple as jd
from jdecouple.pipeline.state import take_queues

pytestmark = pytest.mark.usefixtures("module_x64")


def trainer(name, data, *, batch_norm=True):
    return nets.build(
        name,
        model=nets.mlp(depth=2, batch_norm=batch_norm, param_dtype=jnp.float64),
        example=nets.batches(1, dtype=np.float64)[0],
        num_stages=2,
        mesh=jd.make_mesh(1, data, devices=jax.devices()[:data]),
    )


def compiled(trained, batch):
    """Text of the program of a step whose stages share their devices."""
    executor = trained._engine._executor
    cores, queues = take_queues(executor.schedule, trained.init().stages.arrays)
    step_ids = executor.step_ids(executor.calls, 0)
    lowered = executor._fused.lower(cores, queues, trained.put(batch).parts, step_ids)
    return lowered.compile().as_text()


def sums(text):
    """Shapes of what each all-reduce of a program sums, by the computation it stands in."""
    found, where = [], ""
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            where = line.split()[0]
        if match := re.match(r"\s+%?all-reduce\S* = (.*?) all-reduce\(", line):
            found.append((where, re.findall(r"\w+\[([\d,]*)\]", match[1])))
    return found


@pytest.mark.parametrize("name", nets.marked(["bp", "deinforeg", "fdg"], ("deinforeg",)))
def test_two_replicas_train_as_one_device(name):
    """One method of each route; statistics and losses are those of the whole batch."""
    data = nets.batches(dtype=np.float64)
    found, wanted = (trainer(name, count) for count in (2, 1))
    (state, metrics), (alone, expected) = (nets.trained(x, data, 4) for x in (found, wanted))
    arrays = nets.to_arrays(found, state), nets.to_arrays(wanted, alone)
    assert nets.largest_error(*arrays) < 1e-12
    for here, there in zip(metrics, expected, strict=True):
        assert here == pytest.approx(there, rel=2e-6, abs=1e-7, nan_ok=True)


@pytest.mark.parametrize("name", nets.marked(["bp", "deinforeg"], ("deinforeg",)))
def test_gradients_are_summed_in_few_calls(name):
    trained = trainer(name, 2, batch_norm=False)
    text = compiled(trained, nets.batches(1, dtype=np.float64)[0])
    kernels = [
        sorted(map(str, leaf.shape))
        for stage in trained.init().stages
        for leaf in jax.tree.leaves(stage["params"])
        if leaf.ndim == 2
    ]
    summed = [[sorted(shape.split(",")) for shape in shapes] for _, shapes in sums(text)]
    buckets = [[shape for shape in shapes if shape in kernels] for shapes in summed]
    assert sorted(itertools.chain(*buckets)) == sorted(kernels)
    assert len(list(filter(None, buckets))) == (2 if name == "deinforeg" else 1)  # one a loss


@pytest.mark.slow
def test_a_recurrence_sums_its_gradient_once():
    batch = sequence_nets.batches("lstm", 1)[0]
    model = sequence_nets.model("lstm", param_dtype=jnp.float64)
    mesh = jd.make_mesh(1, 2, devices=jax.devices()[:2])
    trained = jd.Trainer(model, nets.method("bp"), jd.optim.sgd(0.1), mesh=mesh, example=batch)
    found = sums(compiled(trained, batch))
    assert {where for where, _ in found} == {"ENTRY"}
    shapes = [shape for _, shapes in found for shape in shapes]
    weights = [w for stage in trained.init().stages for w in jax.tree.leaves(stage["params"])]
    # The kernels of each direction, and its recurrent weights, of the same shape here.
    assert shapes.count("8,32") == 2 * sum(leaf.shape == (2, 8, 32) for leaf in weights)
