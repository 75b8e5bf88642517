"""What `Trainer.save` writes, `Trainer.restore` reads: whole, by any partition, or refused."""

import functools
from pathlib import Path
from typing import Any

import nets
import pytest

import jdecouple as jd
from jdecouple.checkpoint import Checkpointer

DATA = nets.batches()


@functools.cache
def shared(name: str, stages: int = 2) -> jd.Trainer:
    return nets.build(name, num_stages=stages)


def step(trainer: jd.Trainer, state: Any) -> Any:
    return trainer.step(state, DATA[state.step % len(DATA)])[0]


@pytest.mark.parametrize("name", nets.marked(["deinforeg", "fdg"], ["fdg"]))
def test_a_restored_state_trains_on_to_the_bit(name, tmp_path):
    trainer = shared(name)
    state = functools.reduce(lambda state, _: step(trainer, state), range(3), trainer.init())
    trainer.save(state, tmp_path / "state")
    moved = trainer.restore(tmp_path / "state")
    assert moved.step == 3
    assert nets.same_bits(nets.to_arrays(trainer, moved), nets.to_arrays(trainer, state))
    one, two = step(trainer, state), step(trainer, moved)
    assert nets.same_bits(nets.to_arrays(trainer, one), nets.to_arrays(trainer, two))


def test_another_number_of_stages_reads_it(tmp_path):
    trainer, other = shared("deinforeg"), nets.build("deinforeg")
    state = trainer.init()
    trainer.save(state, str(tmp_path))
    found = other.restore(str(tmp_path))
    assert nets.same_bits(nets.to_arrays(other, found), nets.to_arrays(trainer, state))


def test_a_later_state_takes_the_place_once_it_is_whole(tmp_path, monkeypatch):
    trainer = shared("deinforeg")
    state = trainer.init()
    trainer.save(state, tmp_path)
    state = step(trainer, state)
    with monkeypatch.context() as patched:
        patched.setattr(Checkpointer, "_finish", lambda self: 1 / 0)
        nets.assert_clear(
            ValueError, ("could not be written",), lambda: trainer.save(state, tmp_path)
        )
    assert "0" in {path.name for path in tmp_path.iterdir()}
    later = step(trainer, state)
    trainer.save(later, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"2"}
    assert trainer.restore(tmp_path).step == 2
    nets.assert_clear(
        ValueError, ("not after", "2"), lambda: trainer.save(trainer.init(), tmp_path)
    )
    assert trainer.restore(tmp_path).step == 2


def test_what_does_not_fit_is_refused(tmp_path):
    trainer = shared("deinforeg")
    trainer.save(trainer.init(), tmp_path / "it")
    other = nets.build("deinforeg", model=nets.mlp(depth=3))
    nets.assert_clear(
        ValueError, ("leaf", "block", "expected"), lambda: other.restore(tmp_path / "it")
    )
    empty = tmp_path / "none"
    nets.assert_clear(ValueError, ("no checkpoint", "none"), lambda: trainer.restore(empty))
    assert not empty.exists()
    nets.assert_clear(TypeError, ("state", "NoneType"), lambda: trainer.save(None, empty))


def test_the_checkpoints_of_a_run_are_left_alone(tmp_path: Path):
    trainer = shared("deinforeg")
    state = trainer.init()
    with Checkpointer(tmp_path) as run:
        run.save(0, trainer.to_arrays(state), {"config": 1})
    later = step(trainer, state)
    nets.assert_clear(ValueError, ("of a run",), lambda: trainer.save(later, tmp_path))
    assert trainer.restore(tmp_path).step == 0
