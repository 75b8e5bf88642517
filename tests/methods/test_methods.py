"""What every row of the table of methods keeps to: one test for each promise, over all names.

Three blocks on images, with BatchNorm, in float64. A new method is tested here as soon as it has a
row; arguments that make its heads small belong in `nets.ARGUMENTS`.
"""

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

BLOCKS = 3
STEPS = 8  # enough for the late errors of delayed methods to reach the first stage
BATCH = 8


def without(*slow: str) -> Any:
    """All methods; others stand for the slow ones. A new row is a fast one."""
    return pytest.mark.parametrize("name", nets.marked(METHODS, {*METHODS} - {*slow}))


METHODS = jd.methods.names()
EACH = without()
SLOW = (
    *("early_exit", "scpl", "dgl", "predsim", "auglocal", "infopro", "lopt", "ddg", "fr"),
    *("2bw", "dsp", "petra"),
)
MOST = without(*SLOW, "adl")
FEW = without(*SLOW, "greedy_exit", "deinforeg", "man", "fdg", "adl")  # others have most of these

pytestmark = pytest.mark.usefixtures("module_x64")


def batches(count: int = 4) -> list[dict]:
    """Labelled images `[BATCH, 8, 8, 1]` in [0, 1]."""
    rng = np.random.default_rng(0)
    return [
        {
            "x": rng.uniform(size=(BATCH, 8, 8, 1)),
            "label": np.arange(BATCH, dtype=np.int32) % nets.CLASSES,
        }
        for _ in range(count)
    ]


@functools.cache
def trainer(name: str, stages: int = 1, devices: int = 1) -> jd.Trainer:
    model = jd.models.mlp(
        nets.CLASSES,
        image_size=8,
        channels=1,
        hidden=8,
        depth=BLOCKS,
        batch_norm=True,
        param_dtype=jnp.float64,
        rngs=nnx.Rngs(0),
    )
    return jd.Trainer(
        model,
        nets.method(name),
        jd.optim.sgd(0.02, momentum=0.9),
        mesh=jd.make_mesh(stages, devices=jax.devices()[:devices]),
        example=batches(1)[0],
    )


@functools.cache
def trained(name: str, stages: int = 1, devices: int = 1) -> tuple[Any, list[dict], dict]:
    """Arrays after eight steps, the metrics of each, and an evaluation at the end."""
    each = trainer(name, stages, devices)
    state, metrics = nets.trained(each, batches(), STEPS)
    return nets.to_arrays(each, state), metrics, each.evaluate(state, batches(2))


def blocks_with(ending: str, names: Any, prefix: str = "block") -> list[int]:
    """Indices of the blocks that have such a metric, in the order of the metrics."""
    found = [each.split("/") for each in names if each.startswith(prefix + "_")]
    return [int(first.removeprefix(prefix + "_")) for first, last in found if last == ending]


# --- Metrics and exits ----------------------------------------------------------------------


@EACH
def test_metrics(name):
    """A loss for every head, their sum, and the accuracy of the last exit that training sees."""
    each = trainer(name)
    state, metrics = each.step(each.init(), batches(1)[0])
    chex.assert_shape(list(metrics.values()), ())
    chex.assert_type(list(metrics.values()), jnp.float32)
    chex.assert_tree_all_finite(metrics)
    values = {key: float(value) for key, value in metrics.items()}
    heads = [index for index, head in enumerate(each.heads(state)) if head is not None]
    assert blocks_with("loss", metrics) == heads
    assert heads == list(range(BLOCKS)) if each.method.route.local else heads
    assert values["loss"] == pytest.approx(sum(values[f"block_{i}/loss"] for i in heads), rel=1e-6)
    exits = blocks_with("accuracy", metrics)
    assert values.get("accuracy") == (values[f"block_{exits[-1]}/accuracy"] if exits else None)
    assert each.gather_metrics(metrics) == pytest.approx(values, rel=1e-6)


@EACH
def test_exits(name):
    """The last block is always one; an exit has logits, or its answer comes down to the first."""
    each = trainer(name)
    state = each.init()
    found = each.evaluate(state, batches(2))
    exits = blocks_with("accuracy", found, "exit")
    assert exits == blocks_with("loss", found, "exit")
    assert set(found) == {"loss", "accuracy"} | {
        f"exit_{index}/{value}" for index in exits for value in ("loss", "accuracy")
    }
    assert max(exits) == BLOCKS - 1
    for value in ("loss", "accuracy"):
        assert found[value] == found[f"exit_{BLOCKS - 1}/{value}"]
    hits = 2 * BATCH * np.array([found[f"exit_{index}/accuracy"] for index in exits])
    assert np.allclose(hits, np.round(hits), atol=1e-5)

    x, with_logits = jnp.asarray(batches(1)[0]["x"]), []
    blocks, heads = each.modules(state)[:BLOCKS], each.heads(state)
    for index, (block, head) in enumerate(zip(blocks, heads, strict=True)):
        block.eval()
        x = block(x)
        if head is None:
            continue
        head.eval()
        logits = head.logits(x)
        if logits is None and index == BLOCKS - 1:
            logits = head.turn(x)
            for below in reversed(heads):
                logits = below.descend(logits)
        if logits is not None:
            assert logits.shape == (BATCH, nets.CLASSES)
            with_logits.append(index)
    assert sorted(exits) == with_logits


# --- Gradients ------------------------------------------------------------------------------


@functools.cache
def gradients(name: str) -> tuple[Any, Any]:
    """Of every block's loss to every block's weights, and what the route would train with.

    Each a list over the blocks of weights to arrays; the first with an axis of losses in front.
    """
    each = trainer(name)
    (stage,) = each.stages
    state, route = stage.initial(), each.method.route
    batch = jax.tree.map(jnp.asarray, batches(1)[0])
    tick = jnp.zeros(2, jnp.int32)

    def losses(params):
        metrics = route.forward(stage, {**state, "params": params}, batch, tick)[1]
        return jnp.stack([metrics.get(f"block_{i}/loss", jnp.zeros(())) for i in range(BLOCKS)])

    def used(params):
        now = {**state, "params": params}
        residuals = route.forward(stage, now, batch, tick)[2]
        return route.backward(stage, now, residuals, None, tick)[0]

    run = jax.jit(lambda params: (jax.jacrev(losses)(params), used(params)))
    return jax.tree.map(np.asarray, run(state["params"]))


def largest(arrays: dict[str, np.ndarray], loss: int) -> float:
    return max(float(np.abs(array[loss]).max()) for array in arrays.values())


@MOST
def test_only_the_own_loss_reaches_a_block_of_a_local_method(name):
    """And of the others every loss reaches all blocks below it."""
    of_losses, _ = gradients(name)
    each = trainer(name)
    with_loss = [unit.index for stage in each.stages for unit in stage.units if unit.has_loss]
    for loss in with_loss:
        for index, arrays in enumerate(of_losses):
            own = {key: value for key, value in arrays.items() if key.startswith("block/")}
            if index > loss or (each.method.route.local and index != loss):
                assert largest(arrays, loss) == 0, (loss, index)
            else:
                assert largest(own, loss) > 1e-12, (loss, index)


@MOST
def test_a_block_trains_on_the_losses_that_reach_it(name):
    of_losses, used = gradients(name)
    wanted = jax.tree.map(lambda each: each.sum(0), of_losses)
    chex.assert_trees_all_close(used, wanted, rtol=1e-9, atol=1e-12)


# --- Training -------------------------------------------------------------------------------


@FEW
def test_pipelined_equals_sequential(name):
    """Three stages on three devices; where lateness depends on them, three stages on one."""
    found = trained(name, BLOCKS, BLOCKS)
    wanted = trained(name, 1 if name in nets.EXACT else BLOCKS, 1)
    assert nets.largest_error(found[0], wanted[0]) < 1e-12
    for here, there in zip(found[1], wanted[1], strict=True):
        assert here == pytest.approx(there, rel=2e-6, abs=1e-7, nan_ok=True)
    assert found[2] == pytest.approx(wanted[2], rel=1e-6)


@FEW
def test_resumed_training_is_the_same_to_the_bit(name):
    """From the arrays of a checkpoint, on the host."""
    each, data = trainer(name, BLOCKS, BLOCKS), batches()
    state, _ = nets.trained(each, data, STEPS - 3)
    held = nets.to_arrays(each, state)
    state, _ = nets.trained(each, data[1:] + data[:1], 3, each.from_arrays(STEPS - 3, held))
    assert nets.same_bits(nets.to_arrays(each, state), trained(name, BLOCKS, BLOCKS)[0])


@EACH
def test_a_step_lowers_the_loss(name):
    """On the batch that it was made on; as many passes as make a step."""
    each = trainer(name)
    passes = each.method.route.accumulate
    _, metrics = nets.trained(each, batches(1), passes + 1)
    assert metrics[passes]["loss"] < metrics[0]["loss"] - 1e-6
