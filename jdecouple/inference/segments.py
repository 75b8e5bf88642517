"""The blocks between two exits at which an example may leave, and what joins them, compiled."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdecouple.inference.rules import Rule, leave, score
from jdecouple.methods.routes import Carry
from jdecouple.pipeline.mesh import StageDevices, jit
from jdecouple.pipeline.predict import Predictor, States
from jdecouple.pipeline.transfer import transfer


class Rows(NamedTuple):
    """What goes on from block to block, each array with the batch first.

    Attributes:
        carry: what blocks read.
        previous: logits of the exit before, divided by its temperature, if the rule reads them.
        streak: for how many exits in succession the scores were high, if the rule counts them.
    """

    carry: Carry
    previous: jax.Array | None = None
    streak: jax.Array | None = None


class Passed(NamedTuple):
    """A batch behind a segment.

    Attributes:
        rows: what goes on.
        logits: of the exit at the end, `[batch, classes]`.
        leaves: whether each row leaves there, `[batch]`; None at the last exit.
    """

    rows: Rows
    logits: jax.Array
    leaves: jax.Array | None


class Step(NamedTuple):
    """A block of a segment: its number in the network, its leg, and its exit if it has one."""

    unit: int
    leg: int
    exit: int | None


class Segments:
    """The blocks of a predictor, cut where an example may leave by a rule.

    Attributes:
        stops: the exit at the end of every segment.
    """

    def __init__(self, predictor: Predictor, states: States, rule: Rule):
        self._predictor, self._rule = predictor, rule
        self.stops = _stops(rule, len(predictor.exits))
        # Thresholds and temperatures of all exits, as arguments: others compile nothing anew.
        bounds = np.array([rule.thresholds, rule.temperatures], np.float32)
        self._bounds = [tuple(each) for each in bounds.T]
        self._legs = predictor.legs
        self._calls: list[Any] = []
        self._arrays: list[tuple[Any, Any]] = []  # parameters and statistics of every block
        steps: list[list[Step]] = [[]]
        for number, leg in enumerate(self._legs):
            for unit, call, (stage, slot) in zip(leg.units, leg.up, leg.slots, strict=True):
                known = unit.index in predictor.exits
                exit = predictor.exits.index(unit.index) if known else None
                steps[-1].append(Step(len(self._calls), number, exit))
                self._calls.append(call)
                state = states[stage]
                self._arrays.append((state["params"][slot], state["stats"][slot]))
                if exit in self.stops:
                    steps.append([])
        self._steps = steps[: len(self.stops)]  # nothing behind the last exit

    def enter(self, batch: Carry) -> Rows:
        """Puts a batch on the devices of the first stage."""
        weight = np.ones(len(batch["label"]), np.float32)
        return Rows(self._predictor.placements[0].place({**batch, "weight": weight}))

    def run(self, number: int, rows: Rows) -> Passed:
        """Dispatches a segment."""
        here = self._steps[number - 1][-1].leg if number else 0
        leaves = logits = None
        for step in self._steps[number]:
            if step.leg != here:
                source, target = (self._legs[leg].placement for leg in (here, step.leg))
                rows, here = transfer(rows, None, source, target, named=True), step.leg
            changed, logits = self._calls[step.unit](*self._arrays[step.unit], rows.carry)
            rows = rows._replace(carry={**rows.carry, **changed})
            if step.exit is not None and step.exit != self.stops[-1]:
                placement = self._legs[step.leg].placement
                decide = _decision(self._rule.name, self._rule.patience, placement)
                bounds = self._bounds[step.exit]
                leaves, previous, streak = decide(logits, rows.previous, rows.streak, *bounds)
                rows = Rows(rows.carry, previous, streak)
        assert logits is not None
        return Passed(rows, logits, None if number + 1 == len(self.stops) else leaves)

    def take(self, number: int, rows: Rows, chosen: np.ndarray) -> Rows:
        """The chosen rows of a batch behind a segment."""
        return _take(self._placement(number))(rows, chosen)

    def join(self, number: int, rows: Rows, others: Rows, chosen: np.ndarray) -> Rows:
        """The chosen rows of two batches behind a segment; those of the second count on."""
        return _join(self._placement(number))(rows, others, chosen)

    def _placement(self, number: int) -> StageDevices:
        return self._legs[self._steps[number][-1].leg].placement


def _stops(rule: Rule, count: int) -> tuple[int, ...]:
    """Exits at which an example may leave: not before patience is over, nor at no price."""
    assert isinstance(rule.thresholds, tuple)
    soonest = rule.patience - 1 + (rule.name == "cosine")  # which asks for an exit before
    early = (i for i in range(soonest, count - 1) if rule.thresholds[i] < math.inf)
    return (*early, count - 1)


@functools.cache
def _decision(name: str, patience: int, placement: StageDevices) -> Any:
    def decide(logits, previous, streak, threshold, temperature):
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32)) / temperature
        if streak is None:
            streak = jnp.zeros(len(logits), jnp.int32)
        leaves, streak = leave(score(name, logits, previous), threshold, streak, patience)
        kept = logits if name == "cosine" else None, streak if patience > 1 else None
        return placement.constrain((leaves, *kept))

    return jit(decide, placement)


@functools.cache
def _take(placement: StageDevices) -> Any:
    def take(rows: Rows, chosen: jax.Array) -> Rows:
        return placement.constrain(jax.tree.map(lambda leaf: leaf[chosen], rows))

    return jit(take, placement)


@functools.cache
def _join(placement: StageDevices) -> Any:
    def join(rows: Rows, others: Rows, chosen: jax.Array) -> Rows:
        def choose(leaf: jax.Array, other: jax.Array) -> jax.Array:
            count = len(leaf)
            is_first = jnp.reshape(chosen < count, (-1,) + (1,) * (leaf.ndim - 1))
            first = leaf[jnp.minimum(chosen, count - 1)]
            return jnp.where(is_first, first, other[jnp.maximum(chosen - count, 0)])

        return placement.constrain(jax.tree.map(choose, rows, others))

    return jit(join, placement)
