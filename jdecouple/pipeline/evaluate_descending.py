"""Evaluation where the answer comes down from the last block: heads that are `Descending`."""

import collections
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import jax

from jdecouple.methods.routes import Carry, Stage, StageState, add
from jdecouple.pipeline.evaluate import EvalShapes, Evaluator, Sums, call_shapes, exit_sums
from jdecouple.pipeline.transfer import transfer


class _AtTop(NamedTuple):
    """A batch that has passed all stages and has yet to come down.

    Attributes:
        target: what the last stage sends down.
        labels: "label" and "weight" on the first stage.
        shapes: of what every stage receives from above; None where all is in one process.
    """

    target: Any
    labels: Carry | None
    shapes: list[Any] | None


class DescendingEvaluator(Evaluator):
    """Takes every batch up through all stages, and its answer down again.

    Batches go up while earlier ones still come down. The sums have one entry more than there are
    stages: those of the answers, as an exit at the last block.
    """

    def begin(self) -> tuple:
        """Sums over no batch."""
        self._at_top: collections.deque[_AtTop] = collections.deque()
        return (*super().begin(), None)

    def add(
        self, states: tuple, carry: Carry | None, sums: tuple, shapes: EvalShapes | None
    ) -> tuple:
        """Takes a batch up, and the oldest of enough batches down."""
        target, totals = self.ascend(states, carry, sums, shapes)
        labels = carry and {name: carry[name] for name in ("label", "weight")}
        self._at_top.append(_AtTop(target, labels, shapes and shapes.targets))
        # As many batches rise as there are calls there and back. Between processes they go one by
        # one: JAX's sockets (0.10) may come to a stop where arrays cross in both directions.
        apart = self._one_process and not self._fuse
        if len(self._at_top) == (2 * len(self._stages) if apart else 1):
            totals = self._descend(states, self._at_top.popleft(), totals)
        return totals

    def end(self, states: tuple, sums: tuple) -> tuple:
        """Takes down what is still at the top."""
        while self._at_top:
            sums = self._descend(states, self._at_top.popleft(), sums)
        return sums

    def turn(self, stage: Stage, state: StageState, carry: Carry) -> Any:
        """What the last stage sends down: its answer."""
        target = stage.units[-1].turn(state["params"][-1], state["stats"][-1], carry["x"])
        return _descend_units(stage, state, target)

    def descend_stage(
        self, stage: Stage, state: StageState, target: Any, labels: Any, sums: Sums | None
    ) -> tuple[Any, Sums | None]:
        """The way down through one stage, as a pure function.

        The last stage has been passed by `turn`. The first takes "label" and "weight" of the batch,
        and returns sums; the others return what the stage below receives.
        """
        if not stage.is_last:
            target = _descend_units(stage, state, target)
        if stage.index:
            return target, None
        last = self._stages[-1].units[-1].index
        return None, add(sums, exit_sums(last, target, labels))

    def trace(self, carry: Any) -> EvalShapes:
        """Shapes on the way up and down."""
        shapes = super().trace(carry)
        target, sums = shapes.targets.pop(), None
        for stage in reversed(self._stages):
            shapes.targets.insert(0, target)
            target, sums = call_shapes(self.descend_stage, stage, target, carry)
        shapes.names.extend(sums or ())
        return shapes

    def _descend(self, states: tuple, batch: _AtTop, sums: tuple) -> tuple:
        """Calls every stage from the last to the first; the sums with the batch's own added."""
        placements, target, total = self._placements, batch.target, None
        for k in reversed(range(len(placements))):
            placement = placements[k]
            if k + 1 < len(placements):
                shapes = batch.shapes and batch.shapes[k]
                target = transfer(target, shapes, placements[k + 1], placement)
            if placement.addressable and (k == 0 or k + 1 < len(placements)):
                first = (batch.labels, sums[-1]) if k == 0 else (None, None)
                target, total = self._down_calls[k](states[k], target, *first)
            if batch.shapes is not None:
                jax.block_until_ready((target, total))
        return (*sums[:-1], total)

    @cached_property
    def _down_calls(self) -> list[Callable]:
        return self._compile(self.descend_stage)


def _descend_units(stage: Stage, state: StageState, target: Any) -> Any:
    units = list(zip(stage.units, state["params"], state["stats"], strict=True))
    for unit, params, stats in reversed(units):
        if unit.descends:
            target = unit.descend(params, stats, target)
    return target
