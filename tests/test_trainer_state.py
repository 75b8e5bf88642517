"""Which states and placed batches a Trainer goes on with, and what it says of others."""

import dataclasses
import functools

import jax
import nets
import numpy as np
import optax
import pytest

import jdecouple as jd
from jdecouple.checkpoint import Checkpointer

DATA = nets.batches()
SLOW = pytest.mark.slow
ENGINES = pytest.mark.parametrize("engine", [pytest.param("fused", marks=SLOW), "apart", "spmd"])


def build(engine: str, name: str = "bp", **options) -> jd.Trainer:
    """A trainer of two stages whose optimiser steps at every second batch."""
    options = {
        "model": nets.mlp(),
        "optimizer": optax.MultiSteps(
            jd.optim.sgd(0.1, momentum=0.9), 2, should_skip_update_fn=optax.skip_not_finite
        ),
        "engine": "spmd" if engine == "spmd" else "mpmd",
        "mesh": jd.make_mesh(2, devices=jax.devices()[: 1 if engine == "fused" else 2]),
        **options,
    }
    return nets.build(name, **options)


shared = functools.cache(build)


# --- States that were used up -------------------------------------------------------------------

USES = {
    "step": lambda trainer, state: trainer.step(state, DATA[0]),
    "steps": lambda trainer, state: trainer.steps(state, DATA[:1]),
    "evaluate": lambda trainer, state: trainer.evaluate(state, DATA[0]),
    "to_arrays": lambda trainer, state: trainer.to_arrays(state),
    "modules": lambda trainer, state: trainer.modules(state),
    "heads": lambda trainer, state: trainer.heads(state),
    "measure": lambda trainer, state: trainer.measure(state, DATA[0]),
    "wait": lambda trainer, state: trainer.wait(state),
    "finish": lambda trainer, state: trainer.finish(state),
}
USED_UP = ("used up", "state, metrics = trainer.step(state, batch)", "trainer.init()")


@ENGINES
def test_a_state_that_was_used_up_says_so(engine):
    """A cell of a notebook that is run again: one line, and the process lives."""
    trainer = shared(engine)
    first = trainer.init()
    state, _ = trainer.step(first, DATA[0])
    for use in USES.values():
        nets.assert_clear(ValueError, USED_UP, functools.partial(use, trainer, first))
    trainer.step(state, DATA[1])  # what was returned is as good as before


@pytest.mark.slow
def test_a_state_that_finish_used_up_says_so():
    trainer = shared("apart", "fdg")
    state, _ = trainer.step(trainer.init(), DATA[0])
    trainer.finish(state)
    nets.assert_clear(ValueError, USED_UP, lambda: trainer.step(state, DATA[0]))


@ENGINES
def test_a_state_whose_copy_was_used_up_says_so(engine):
    trainer = shared(engine)
    state = trainer.init()
    copy = dataclasses.replace(state, step=5)
    after, _ = trainer.step(copy, DATA[0])
    assert after.step == 6
    nets.assert_clear(ValueError, USED_UP, lambda: trainer.step(state, DATA[0]))


def test_a_state_of_which_a_failed_step_used_up_a_part(monkeypatch):
    trainer = shared("apart")
    state = trainer.init()

    def fail(states, *arguments):
        jax.tree.leaves(states)[-1].delete()
        raise RuntimeError("out of memory")

    monkeypatch.setattr(trainer._engine, "run", fail)
    with pytest.raises(RuntimeError, match="memory"):
        trainer.step(state, DATA[0])
    monkeypatch.undo()
    nets.assert_clear(ValueError, USED_UP, lambda: trainer.step(state, DATA[0]))


def test_what_a_trainer_made_is_not_searched_again(monkeypatch):
    """The search costs about as much as the dispatch of a small net."""
    trainer = shared("fused")
    state = trainer.init()
    monkeypatch.setattr(type(trainer._states), "_difference", None)
    for _ in range(2):
        state, _ = trainer.step(state, DATA[0])
        trainer.evaluate(state, DATA[0])
    assert state.step == 2


# --- States of other trainers -------------------------------------------------------------------

NORMALISED = nets.mlp(batch_norm=True)
FOREIGN = {
    "other stages": ("apart", {"mesh": jd.make_mesh(1)}, ("1 stages", "2")),
    "another model": ("apart", {"model": NORMALISED}, ("block/layers", "stage 0", "nothing")),
    "another optimiser": ("apart", {"optimizer": jd.optim.sgd(0.1)}, ("opt/0", "nothing")),
    "other devices": (
        "apart",
        {"mesh": jd.make_mesh(2, devices=jax.devices()[2:4])},
        ("stage 0", "other devices"),
    ),
    "another engine": ("spmd", {}, ("engine is spmd", "mpmd")),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_the_state_of_another_trainer(case):
    engine, options, words = FOREIGN[case]
    state = build(engine, **options).init()
    words = ("another trainer", "from_arrays", *words)
    for use in ("step", "evaluate", "modules"):
        call = functools.partial(USES[use], shared("apart"), state)
        nets.assert_clear(ValueError, words, call)


def test_an_mpmd_state_in_the_spmd_engine():
    state = shared("apart").init()
    words = ("another trainer", "engine is mpmd", "spmd")
    nets.assert_clear(ValueError, words, lambda: shared("spmd").step(state, DATA[0]))


@pytest.mark.parametrize("state", [None, {}, DATA[0]], ids=["None", "empty", "batch"])
def test_no_state(state):
    words = (f"state is a {type(state).__name__}", "trainer.init")
    for use in USES.values():
        nets.assert_clear(TypeError, words, functools.partial(use, shared("apart"), state))


def test_shapes_are_no_state():
    trainer = shared("apart")
    assert trainer.to_arrays(trainer.abstract())
    words = ("holds shapes", "arrays")
    nets.assert_clear(ValueError, words, lambda: trainer.step(trainer.abstract(), DATA[0]))


@pytest.mark.parametrize("engine", ["apart", pytest.param("spmd", marks=SLOW)])
def test_a_trainer_that_is_built_again_goes_on(engine):
    first, second = shared(engine), build(engine)
    state, _ = first.step(first.init(), DATA[0])
    placed = first.put(DATA[1])
    state, _ = second.step(state, placed)
    wanted, _ = nets.trained(first, DATA, 2)
    assert nets.same_bits(nets.to_arrays(second, state), nets.to_arrays(first, wanted))


def test_host_copies_are_a_state():
    trainer = shared("apart")
    copied = jax.tree.map(np.array, trainer.init())
    found, _ = trainer.step(dataclasses.replace(copied, step=0), DATA[0])
    wanted, _ = trainer.step(trainer.init(), DATA[0])
    assert nets.same_bits(nets.to_arrays(trainer, found), nets.to_arrays(trainer, wanted))


def test_arrays_of_another_model():
    trainer = shared("apart")
    arrays = nets.to_arrays(trainer, trainer.init())
    name = next(key for key in arrays if "block_0/params" in key and key.endswith("kernel"))
    words = (name, "float32[20, 24]", "nothing")
    missing = {key: leaf for key, leaf in arrays.items() if key != name}
    nets.assert_clear(ValueError, words, lambda: trainer.from_arrays(0, missing))
    words = (name, "float32[20, 24]", "float32[24, 20]")
    turned = {**arrays, name: arrays[name].T}
    nets.assert_clear(ValueError, words, lambda: trainer.from_arrays(0, turned))
    for step in (-1, 0.5, True):
        words = (f"step is {step}", "at least 0")
        nets.assert_clear(ValueError, words, lambda step=step: trainer.from_arrays(step, arrays))


OTHER_BATCHES = {
    "of another size": ("apart", {"example": nets.batches(size=8)[0]}),
    "in microbatches": ("apart", {"microbatches": 2}),
    "of another engine": ("spmd", {}),
    "on other devices": ("apart", {"mesh": jd.make_mesh(2, devices=jax.devices()[2:4])}),
}


@pytest.mark.parametrize("case", OTHER_BATCHES)
def test_a_batch_that_another_trainer_put(case):
    engine, options = OTHER_BATCHES[case]
    trainer, other = shared("apart"), build(engine, **options)
    example = options.get("example", DATA[0])
    for placed, use in ((other.put(example), trainer.step), (other.put([example]), trainer.steps)):
        nets.assert_clear(
            ValueError,
            ("put by another trainer",),
            lambda placed=placed, use=use: use(trainer.init(), placed),
        )


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
