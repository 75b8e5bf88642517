"""Which states and placed batches a Trainer goes on with, and what it says of others."""

import functools

import jax
import nets
import numpy as np
import optax
import pytest

import jdecouple as jd
from jdecouple.checkpoint import Checkpointer

DATA = nets.batches()
ENGINES = pytest.mark.parametrize("engine", ["fused", "apart", "spmd"])


def build(engine: str, name: str = "bp", **options) -> jd.Trainer:
    """A trainer of two stages whose optimiser steps at every second batch."""
    options = {
        "model": nets.mlp(),
        "optimizer": optax.MultiSteps(jd.optim.sgd(0.1, momentum=0.9), 2),
        "engine": "spmd" if engine == "spmd" else "mpmd",
        "mesh": jd.make_mesh(2, devices=jax.devices()[: 1 if engine == "fused" else 2]),
        **options,
    }
    return nets.build(name, **options)


shared = functools.cache(build)


# --- An optimiser that steps at every second batch ----------------------------------------------


@ENGINES
def test_multi_steps_resumes(engine, tmp_path):
    """Also between two batches of one step."""
    trainer = shared(engine)
    wanted, _ = nets.trained(trainer, DATA, 5)
    state, _ = nets.trained(trainer, DATA, 3)
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(state.step, trainer.to_arrays(state), {})
        restored = checkpoints.restore(trainer.to_arrays(trainer.abstract()))
    state = trainer.from_arrays(restored.step, restored.arrays)
    for batch in (DATA[3], DATA[0]):
        state, _ = trainer.step(state, batch)
    assert nets.same_bits(nets.to_arrays(trainer, state), nets.to_arrays(trainer, wanted))


@ENGINES
def test_multi_steps_is_one_step_of_a_batch_twice_as_large(engine):
    whole = {key: np.concatenate([batch[key] for batch in DATA[:2]]) for key in DATA[0]}
    once = nets.build("bp", model=nets.mlp(), example=whole)
    wanted, _ = once.step(once.init(), whole)
    state, _ = nets.trained(shared(engine), DATA, 2)
    found = nets.weights(shared(engine), state)
    assert nets.largest_error(found, nets.weights(once, wanted)) < 1e-6
    assert not nets.same_bits(found, nets.weights(once, once.init()))
