"""The numbers of a batch stay on the devices, where its calls make those of the next."""

import jax
import nets
import pytest

import jdecouple as jd

DATA = nets.batches(4)


@pytest.mark.parametrize("fuse", [True, False])
def test_numbers_are_those_of_the_batch_whatever_came_before(fuse, monkeypatch, caplog):
    """Two trainings in turn, one a batch behind, and one alone; all are drained once."""
    mesh = jd.make_mesh(2, devices=jax.devices()[: 1 if fuse else 2])
    model = nets.user_model(dropout=0.5)  # the number says what is dropped
    trainer = nets.build("fdg", model=model, num_stages=2, mesh=mesh)
    assert trainer._engine._executor.fuse is fuse

    def steps(state):
        for number, batch in enumerate(DATA):
            state = trainer.finish(state) if number == 2 else state
            state, _ = trainer.step(state, batch)
            yield nets.to_arrays(trainer, state)

    before, found = steps(trainer.init()), steps(trainer.init())
    next(before)
    in_turn = [next(found)]
    next(before)
    in_turn += found
    alone = trainer.init()
    with nets.nothing_compiles(monkeypatch, caplog):
        for own, expected in zip(in_turn, steps(alone), strict=True):
            assert nets.largest_error(own, expected) == 0
