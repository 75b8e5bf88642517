"""Early exit of every example: where a plain reading of the rule says, and for less work."""

import functools
from typing import Any

import jax
import nets
import numpy as np
import pytest

import jdecouple as jd
from jdecouple.inference import rules
from jdecouple.inference.adaptive import AdaptivePredictor
from jdecouple.inference.rules import Rule

COUNT = 150
X = np.concatenate([batch["x"] for batch in nets.batches(10)])[:COUNT]
RULES = [(name, patience) for name in rules.NAMES for patience in (1, 2)]


@functools.cache
def trained(stages: int, method: str = "greedy_exit") -> tuple[jd.Trainer, Any]:
    """Four blocks with an exit each, as their weights are at first."""
    trainer = nets.build(method, model=nets.mlp(depth=4, batch_norm=True), num_stages=stages)
    return trainer, trainer.init()


@functools.cache
def logits() -> np.ndarray:
    trainer, state = trained(1)
    return trainer.predict(state, {"x": X})


@functools.cache
def rule(name: str, patience: int) -> Rule:
    """A threshold for every exit that a part of the examples exceeds, and none is close to."""
    thresholds = []
    for row in rules.scores(Rule(name, 0.0).for_exits(4), logits()):
        known = np.sort(row[np.isfinite(row)])
        known = known[len(known) // 4 : len(known) // 2]
        gap = np.argmax(np.diff(known)) if len(known) > 1 else None
        thresholds.append(0.0 if gap is None else float(known[gap : gap + 2].mean()))
    return Rule(name, tuple(thresholds), patience)


def predictor(stages: int, size: int, name: str, patience: int) -> AdaptivePredictor:
    trainer, state = trained(stages)
    return AdaptivePredictor(trainer.predictor, state.stages, rule(name, patience), size)


@pytest.mark.parametrize("stages", nets.marked((1, 3), fast=(3,)))
@pytest.mark.parametrize("size", nets.marked((1, 7, 128), fast=(7,)))
def test_examples_leave_where_a_plain_reading_says(stages, size):
    for name, patience in RULES:
        wanted = rules.exits(rule(name, patience), logits())
        assert len(set(wanted)) > 1
        count = min(COUNT, 10 * size + 3)
        answers = predictor(stages, size, name, patience).predict({"x": X[:count]})
        np.testing.assert_array_equal(answers.exits, wanted[:count])
        own = logits()[wanted[:count], np.arange(count)]
        np.testing.assert_allclose(answers.logits, own, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("stages", nets.marked((1, 3), fast=(3,)))
def test_nothing_is_compiled_after_the_warm_up(stages, monkeypatch, caplog):
    early = predictor(stages, 7, "cosine", 1)
    jax.clear_caches()
    early.warm_up()
    with nets.nothing_compiles(monkeypatch, caplog):
        for count in (1, 2, 5, 7, 20, 40, 61, 150):
            early.predict({"x": X[:count]})


def test_the_order_is_that_of_the_input_whatever_the_batches():
    early = predictor(1, 7, "confidence", 1)
    wanted = early.predict({"x": X})
    for cuts in ([1, 2, 90], list(range(3, COUNT, 3))):
        found = early.predict([{"x": part} for part in np.split(X, cuts)])
        np.testing.assert_array_equal(found.exits, wanted.exits)
        np.testing.assert_allclose(found.logits, wanted.logits, rtol=1e-5, atol=1e-6)


def test_blocks_run_on_those_that_stay_in_full_batches(monkeypatch):
    """At most the last batch of a segment is not full."""
    early = predictor(1, 7, "margin", 1)
    run, rows = early._segments.run, {}

    def count(segment, batch):
        rows.setdefault(segment, []).append(len(batch.carry["label"]))
        return run(segment, batch)

    monkeypatch.setattr(early._segments, "run", count)
    exits = early.predict({"x": X}).exits
    for segment, sizes in rows.items():
        assert set(sizes[:-1]) <= {7}
        assert 0 <= sum(sizes) - np.sum(exits >= segment) < 7
    everybody = AdaptivePredictor(
        trained(1)[0].predictor, trained(1)[1].stages, Rule("margin", -1.0), 7
    )
    rows.clear()
    run = everybody._segments.run
    monkeypatch.setattr(everybody._segments, "run", count)
    assert set(everybody.predict({"x": X}).exits) == {0}
    assert rows.keys() == {0}


def test_exits_that_nobody_may_leave_at_are_not_asked():
    trainer, state = trained(1)

    def stops(*arguments: Any) -> tuple[int, ...]:
        early = AdaptivePredictor(trainer.predictor, state.stages, Rule(*arguments))
        return early._segments.stops

    assert stops("margin", 0.5) == (0, 1, 2, 3)
    assert stops("margin", (0.5, np.inf, 0.5, 0.5)) == (0, 2, 3)
    assert stops("margin", 0.5, 2) == (1, 2, 3)
    assert stops("cosine", 0.5) == (1, 2, 3)
    assert stops("cosine", 0.5, 3) == (3,)


def test_the_temperature_is_what_calibration_says():
    trainer, state = trained(1)
    hot = Rule("confidence", 0.3, temperatures=(3.0, 0.5, 2.0, 1.0))
    early = AdaptivePredictor(trainer.predictor, state.stages, hot, 128)
    np.testing.assert_array_equal(early.predict({"x": X}).exits, rules.exits(hot, logits()))


@pytest.mark.slow
def test_replicas_round_the_sizes_up():
    trainer = nets.build("greedy_exit", model=nets.mlp(depth=4), mesh=jd.make_mesh(2, 2))
    state = trainer.init()
    early = AdaptivePredictor(trainer.predictor, state.stages, Rule("margin", 0.1), 7)
    assert early.sizes == (8, 2)
    found = early.predict({"x": X[:30]})
    wanted = trainer.predict(state, {"x": X[:30]})
    np.testing.assert_array_equal(found.exits, rules.exits(Rule("margin", 0.1), wanted))


@pytest.mark.parametrize(
    ("method", "rule", "size", "kind", "words"),
    [
        ("al", Rule("margin", 0.1), 7, ValueError, ("comes down",)),
        ("bp", Rule("margin", 0.1), 7, ValueError, ("1 exit", "2 or more")),
        ("greedy_exit", Rule("margin", (0.1, 0.2)), 7, ValueError, ("2", "4")),
        ("greedy_exit", Rule("margin", 0.1), 0, ValueError, ("batch_size", "0")),
        ("greedy_exit", "margin", 7, TypeError, ("rule", "str")),
    ],
)
def test_what_cannot_leave_early_is_refused(method, rule, size, kind, words):
    trainer, state = trained(1, method)
    nets.assert_clear(
        kind, words, lambda: AdaptivePredictor(trainer.predictor, state.stages, rule, size)
    )
    nets.assert_clear(
        TypeError,
        ("predictor", "Trainer"),
        lambda: AdaptivePredictor(trainer, state.stages, rule, size),
    )
