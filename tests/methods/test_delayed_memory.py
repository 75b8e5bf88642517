"""What the stages of delayed methods keep in memory: live buffers, counted.

A stage of FDG holds 2(K-1-k) linearisations (inputs, results of products, and weights of forward
time), one of DDG K-1-k, and one of Features Replay K-1-k inputs.
"""

import functools
import gc
from typing import Any

import jax
import jax.numpy as jnp
import nets
import numpy as np
import pytest
from flax import nnx

import jdecouple as jd
from jdecouple.schedules import Kind

STAGES = 4
BATCH, WIDTH = 64, 32
DATA = [
    {
        "x": np.random.default_rng(0).normal(size=(BATCH, WIDTH)).astype(np.float32),
        "label": np.zeros(BATCH, np.int32),
    }
]
MESSAGE = BATCH * WIDTH * 4 + BATCH * 4
"""Bytes of one carry: activations and labels, as large as the input of the net."""
ERROR = BATCH * WIDTH * 4
HELD = {
    "fdg": lambda k: 2 * (STAGES - 1 - k),
    "adl": lambda k: 2 * (STAGES - 1 - k),
    "ddg": lambda k: STAGES - 1 - k,
    "fr": lambda k: STAGES - 1 - k,
}


class Block(nnx.Module):
    """Two dense layers with tanh: every activation is as large as the input."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.second = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.tanh(self.second(nnx.tanh(self.first(x))))


def trainer(name: str, remat: str = "auto", **options: Any) -> jd.Trainer:
    rngs = nnx.Rngs(0)
    model = jd.Model([Block(rngs) for _ in range(STAGES)], nnx.Linear(WIDTH, 3, rngs=rngs))
    method = nets.method(name, **options)
    # Not the default device, on which other arrays of the tests live.
    mesh = jd.make_mesh(STAGES, devices=jax.devices()[1:])
    optimizer = jd.optim.sgd(0.1)
    return jd.Trainer(model, method, optimizer, mesh=mesh, example=DATA[0], remat=remat)


def size(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def linearization(*, first: bool) -> int:
    """Bytes that the backward of one block needs, by JAX's differentiation outside the engine."""
    definition, params = nnx.split(Block(nnx.Rngs(0)))

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable)
    def run(params, x):
        return nnx.merge(definition, params)(x)

    x = jnp.asarray(DATA[0]["x"])
    if first:  # no error leaves it
        return size(jax.jit(lambda p: jax.vjp(lambda p: run(p, x), p)[1])(params))
    return size(jax.jit(lambda p, x: jax.vjp(run, p, x)[1])(params, x))


def inbox(name: str, k: int) -> int:
    """Bytes of what a neighbour has sent for the next iteration."""
    received = MESSAGE if k and name in ("fdg", "adl") else 0
    return received + (ERROR if k < STAGES - 1 else 0)


@pytest.mark.parametrize("name", nets.marked(HELD, ()))
def test_a_stage_holds_what_the_formula_says(name):
    """And nothing else on its device is alive but its weights, optimiser state and metrics."""
    gc.collect()
    others = jax.live_arrays()  # of other tests; held, so that no new array takes their place
    trained = trainer(name)
    state, _ = nets.trained(trained, DATA, 2 * STAGES)
    trained.wait(state)
    gc.collect()
    for k, placement in enumerate(trained.placements):
        each = MESSAGE if name == "fr" else linearization(first=k == 0)
        found = size(state.stages[k]["queues"])
        assert found == HELD[name](k) * each + inbox(name, k), k
        core = size({key: value for key, value in state.stages[k].items() if key != "queues"})
        known = set(map(id, others))
        alive = [array for array in jax.live_arrays() if id(array) not in known]
        on_device = [array for array in alive if array.devices() == set(placement.devices)]
        assert size(on_device) <= found + core + 1024, (k, size(on_device), found + core)


@pytest.mark.parametrize("name", nets.marked(("ddg", "fdg", "adl"), ("fdg",)))
def test_current_weights_are_not_kept(name):
    """Of a linearisation only the activations wait; the weights are those of the moment."""
    states = [trainer(name, "none", current_weights=flag).init() for flag in (False, True)]
    for k in range(STAGES - 1):
        kept, current = (size(state.stages[k]["queues"]["residuals"]) for state in states)
        matrices = (1 if k == 0 else 2) * WIDTH * WIDTH * 4
        assert kept - current == HELD[name](k) * matrices


@pytest.mark.parametrize(
    ("remat", "options"), [("stages", {"current_weights": True}), ("offload", {})]
)
def test_what_cannot_wait_in_a_queue(remat, options):
    told = f"remat is '{remat}' in stage 0", "wait for fdg: allowed are 'none'"
    nets.assert_clear(ValueError, told, lambda: trainer("fdg", remat, **options))


def test_constants_are_not_kept():
    """The derivative of ReLU selects from an array of zeros, which need not wait."""
    rngs = nnx.Rngs(0)
    blocks = [nnx.Sequential(nnx.Linear(WIDTH, WIDTH, rngs=rngs), nnx.relu) for _ in range(STAGES)]
    model = jd.Model(blocks, nnx.Linear(WIDTH, 3, rngs=rngs))
    trained = jd.Trainer(
        model,
        nets.method("fdg"),
        jd.optim.sgd(0.1),
        num_stages=STAGES,
        example=DATA[0],
        remat="none",
    )
    (first, *_) = trained.init().stages[1]["queues"]["residuals"]
    kinds = sorted((str(leaf.dtype), leaf.shape) for leaf in first)
    assert kinds == [
        ("bool", (BATCH, WIDTH)),  # where ReLU let through
        ("float32", (WIDTH, WIDTH)),  # weights
        ("float32", (BATCH, WIDTH)),  # input
    ]


def test_new_residuals_take_the_place_of_the_old():
    """The compiled call writes its state and residuals into the buffers that it was given."""
    trained = trainer("fdg")
    first, _ = trained.step(trained.init(), DATA[0])
    state, _ = trained.step(first, DATA[0])
    trained.wait(state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first.stages.arrays[0]["params"]))
    core = dict(state.stages.arrays[0])
    queues = core.pop("queues")
    call = trained._engine._executor._compiled[0, (Kind.BACKWARD, Kind.STEP, Kind.FORWARD)]
    carry = trained.put(DATA[0]).parts[0]
    arguments = core, None, queues["residuals"][0], carry, queues["errors"][0]
    lowered = call.lower(*arguments, np.zeros((3, 2), np.int32), None)
    reused = lowered.compile().memory_analysis().alias_size_in_bytes
    assert reused >= size((core, queues["residuals"][0])) - 64  # but for scalars
