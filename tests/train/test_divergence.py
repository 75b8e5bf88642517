"""Checkpoints are suspect once a training has left its range, and never in an ordinary one."""

import json
import os

import chex
import numpy as np
import pytest
from runs import arrays_at, cheap, fingerprint

from jdecouple.checkpoint import Checkpointer
from jdecouple.train.divergence import GROWTH, LEAST, Range
from jdecouple.train.loop import NonFiniteError, train_and_evaluate

STEPS = 1500
TIME = np.arange(STEPS)
DECAY = 0.01 + 2.3 * np.exp(-TIME / 200)


def ordinary(seed):
    """Losses of trainings in which nothing is wrong, by name."""
    rng = np.random.default_rng(seed)
    noise = np.exp(0.3 * rng.normal(size=STEPS))
    rare = rng.random(STEPS) < 0.01
    warm_up = np.where(TIME < 60, 2.3, np.where(TIME < 90, 9.0, 2.3 * np.exp((90 - TIME) / 200)))
    return {
        "plain": DECAY * noise,
        "small batches": DECAY * np.exp(1.5 * rng.normal(size=STEPS)),
        "warm-up with a hump": warm_up * noise,
        "a rough start": (DECAY + 300 * np.exp(-TIME / 3)) * noise,
        "learnt by heart, but for hard examples": 1e-4 * noise + DECAY**4 + 3 * rare,
        "below zero": -5 + DECAY * noise,
        "around zero": 0.1 * rng.normal(size=STEPS),
        "a far offset": 1e4 + DECAY * noise,
        "does not move": np.full(STEPS, 2.3),
        "zero, and then not": np.where(TIME < 100, 0.0, 1.0),
        "a rate that is far too high": 2.3 + 5 * np.abs(rng.standard_t(3, size=STEPS)),
    }


@pytest.mark.parametrize("name", ordinary(0))
def test_ordinary_trainings_are_never_suspect(name):
    for seed in range(10):
        losses = Range(latency=2)
        for step, loss in enumerate(ordinary(seed)[name].tolist(), start=1):
            assert losses.add(step, loss) is None, (seed, step)


def diverging(after):
    """Losses from the step on that follows `first`, the first one that is too high."""
    return {
        "at once": np.full(after, 1e5),
        "a plateau": np.full(after, 60.0),
        "threefold": 3.0 * 3.0 ** np.arange(after),
        "beyond float32": np.full(after, 1e300),
    }


@pytest.mark.parametrize("latency", [0, 2])
@pytest.mark.parametrize("name", diverging(1))
def test_divergence_is_dated_back_to_its_first_step(name, latency):
    losses, good = Range(latency), 400
    noise = np.exp(0.1 * np.random.default_rng(0).normal(size=good))
    for step, loss in enumerate((DECAY[:good] * noise).tolist(), start=1):
        assert losses.add(step, loss) is None
    said = []
    for step, loss in enumerate(diverging(60)[name].tolist(), start=good + 1):
        said.append(losses.add(step, loss))
        losses = Range(latency, json.loads(json.dumps(losses.values)))  # as of a checkpoint
    (told,) = filter(None, said)
    assert said.index(told) <= 10
    assert "far above the run's own range" in told
    assert losses.suspect == good - latency


def test_suspicion_ends_where_the_level_was_and_not_at_chance():
    spoilt = Range(0)
    for step, loss in enumerate(DECAY[:600].tolist(), start=1):
        spoilt.add(step, loss)
    assert spoilt.add(601, 1e6)
    recovered = Range(0, json.loads(json.dumps(spoilt.values)))
    for step in range(602, 1500):
        spoilt.add(step, 2.303)
        recovered.add(step, 0.12)
    assert spoilt.suspect == 600
    assert recovered.suspect is None
    assert recovered.add(1500, 1e6)
    assert recovered.suspect == 1499


def test_the_first_rows_only_make_the_range():
    losses = Range(0)
    for step in range(1, LEAST + 1):
        assert losses.add(step, 10.0**step) is None
    assert losses.add(LEAST + 1, 10.0**LEAST) is None


def test_weights():
    weights = Range(0)
    for step, largest in ((0, 1e-3), (10, 0.99 * GROWTH), (20, 0.98 * GROWTH**2)):
        assert weights.weigh(step, largest) is None
    assert "the largest weight after step 40 is 1e+30" in weights.weigh(40, 1e30)
    assert weights.suspect == 40
    assert weights.weigh(50, 1e32) is None
    assert weights.suspect == 40


SANE = {"optimizer__learning_rate": 0.05, "checkpoint__every": 5, "eval_every": 1000}
SANE |= {"checkpoint__keep": 2, "log_every": 10}
HIGH = {**SANE, "checkpoint__every": 1, "optimizer__learning_rate": 1e5}


def steps(folder):
    return Checkpointer(folder / "checkpoints", read_only=True).steps()


@pytest.mark.slow
def test_a_run_that_explodes_goes_back_by_itself(tmp_path, caplog, capsys):
    train_and_evaluate(cheap(**SANE, steps=30), tmp_path)
    assert caplog.messages == []
    before = fingerprint(tmp_path / "checkpoints" / "30")
    train_and_evaluate(cheap(**HIGH, steps=32), tmp_path)
    (told,) = caplog.messages
    assert told.startswith("the largest weight after step 31 is ")
    assert "from step 31 on may be spoilt, the last good one is 30; to go back, stop" in told
    assert steps(tmp_path) == [30, 31, 32]  # of which two were to be kept
    chex.assert_tree_all_finite(arrays_at(tmp_path, 32))

    caplog.clear()
    with pytest.raises(NonFiniteError) as error:
        train_and_evaluate(cheap(**HIGH, steps=90), tmp_path)
    assert caplog.messages[0].startswith("checkpoint 32 is suspect: checkpoints from step 31 on")
    assert (
        " at step 33; the last good checkpoint is 30 (31, 32, suspect, moved to "
        "checkpoints_refused/); the same command goes on from there" in str(error.value)
    )
    assert steps(tmp_path) == [30]
    assert sorted(os.listdir(tmp_path / "checkpoints_refused")) == ["31", "32"]

    capsys.readouterr()
    caplog.clear()
    assert train_and_evaluate(cheap(**SANE, steps=35), tmp_path)["finished"]
    assert "continuing from step 30 of 35" in capsys.readouterr().out
    assert caplog.messages == []
    assert fingerprint(tmp_path / "checkpoints" / "30") == before


@pytest.mark.slow
def test_weights_that_explode_at_once(tmp_path, caplog):
    """The first loss after the step is none, and nothing else tells of what was saved between."""
    train_and_evaluate(cheap(**SANE, steps=10), tmp_path)
    values = {**HIGH, "optimizer__learning_rate": 3e38}
    with pytest.raises(NonFiniteError) as error:
        train_and_evaluate(cheap(**values, steps=20), tmp_path)
    assert "the largest weight after step 11 is " in caplog.messages[0]
    assert "the last good checkpoint is 10 (11, suspect, moved to " in str(error.value)
    assert steps(tmp_path) == [10]


def test_no_good_checkpoint_is_left(tmp_path):
    values = {**HIGH, "optimizer__learning_rate": 3e38}
    said = r"no good checkpoint is left \(1, suspect, moved to .*the same command begins anew"
    with pytest.raises(NonFiniteError, match=said):
        train_and_evaluate(cheap(**values, steps=20), tmp_path)
    assert steps(tmp_path) == []


def test_set_aside(tmp_path):
    with Checkpointer(tmp_path / "checkpoints", keep=1) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, {"x": np.arange(3)}, {}, spare=3)
        checkpoints.save(4, {"x": np.arange(3)}, {}, spare=3)
        checkpoints.wait()
        assert checkpoints.steps() == [2, 4]
        before = fingerprint(checkpoints.directory / "4")
        aside = checkpoints.set_aside([4])
        assert fingerprint(aside / "4") == before
        assert checkpoints.steps() == [2]
        checkpoints.save(4, {"x": np.arange(3)}, {})
        checkpoints.wait()
        assert checkpoints.steps() == [4]
