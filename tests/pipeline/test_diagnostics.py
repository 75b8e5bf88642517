"""The sufficient direction of Features Replay, against gradients taken by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import nets
import numpy as np
import optax
import pytest
from flax import nnx

import jdecouple as jd
from jdecouple.pipeline.diagnostics import SufficientDirection

STAGES = 3
DATA = nets.batches(dtype=np.float64)


def trainer(rate: float, mesh: Any = None) -> jd.Trainer:
    return jd.Trainer(
        nets.mlp(depth=STAGES, batch_norm=True, param_dtype=jnp.float64),
        nets.method("fr"),
        jd.optim.sgd(rate),
        num_stages=STAGES,
        mesh=mesh,
        example=DATA[0],
    )


def backpropagated(modules: list, batch: dict, block: int) -> np.ndarray:
    """Gradient of one block's parameters, through plain nnx modules in training mode."""
    for module in modules:
        module.train()

    def loss(modules):
        x = jnp.asarray(batch["x"])
        for module in modules:
            x = module(x)
        return optax.softmax_cross_entropy_with_integer_labels(x, batch["label"]).mean()

    return flat(nnx.grad(loss)(nnx.List(modules))[block])


def flat(tree) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize("apart", nets.marked([False, True], []))
def test_it_is_that_of_gradients_taken_by_hand(x64, apart):
    """The gradient that is used is read off the weights: the rate is 1."""
    trained = trainer(1.0, jd.make_mesh(STAGES if apart else 1))
    state, _ = nets.trained(trained, DATA, 7)
    found = SufficientDirection(trained)(state)
    before = trained.modules(state)
    wanted = {}
    after = trained.modules(trained.step(state, DATA[7 % len(DATA)])[0])
    for k in range(STAGES - 1):
        used = flat(nnx.state(before[k], nnx.Param)) - flat(nnx.state(after[k], nnx.Param))
        batch = DATA[(7 - (STAGES - 1 - k)) % len(DATA)]
        true = backpropagated(before, batch, k)
        wanted[f"stage_{k}/sufficient_direction"] = true @ used / (true @ true)
        wanted[f"stage_{k}/cosine"] = true @ used / np.sqrt(true @ true * (used @ used))
    assert {key: float(value) for key, value in found.items()} == pytest.approx(wanted, rel=1e-9)
    assert 0.05 < wanted["stage_0/cosine"] < 0.999


@pytest.mark.slow
def test_without_movement_the_direction_is_exact(x64):
    trained = trainer(1e-12)
    state, _ = nets.trained(trained, DATA, 5)
    found = SufficientDirection(trained)(state)
    assert {key: float(value) for key, value in found.items()} == pytest.approx(
        dict.fromkeys(found, 1.0), rel=1e-9
    )


@pytest.mark.slow
def test_nothing_to_replay_yet(x64):
    trained = trainer(0.1)
    state, _ = nets.trained(trained, DATA, 1)
    found = SufficientDirection(trained)(state)
    assert np.isnan(found["stage_0/cosine"])  # its first replay is of batch -1
    assert np.isfinite(found["stage_1/cosine"])


@pytest.mark.slow
def test_it_changes_nothing(x64):
    trained = trainer(0.1)
    state, _ = nets.trained(trained, DATA, 5)
    before = nets.to_arrays(trained, state)
    SufficientDirection(trained)(state)
    assert nets.same_bits(nets.to_arrays(trained, state), before)


@pytest.mark.parametrize("name", ["bp", "fdg", "ddg"])
def test_methods_without_replay_are_refused(name):
    nets.assert_clear(
        ValueError, (f"method {name}", "fr"), lambda: SufficientDirection(nets.build(name))
    )
