"""Schedules as plain data: which stage does what to which microbatch, in which order."""

import dataclasses
import enum
import itertools
from collections.abc import Iterator
from typing import NamedTuple


class Kind(enum.Enum):
    """What a stage does in one action."""

    FORWARD = "F"
    BACKWARD = "B"
    STEP = "S"


class Action(NamedTuple):
    """One entry of a schedule.

    Attributes:
        stage: index of the stage that acts, 0 to K-1.
        kind: forward, backward or optimiser step.
        microbatch: index of the microbatch, 0 to M-1; a step carries the last one.
    """

    stage: int
    kind: Kind
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind.value}{self.microbatch} of stage {self.stage}"


class Call(NamedTuple):
    """Consecutive actions of one stage on one microbatch: they become one compiled call."""

    stage: int
    kinds: tuple[Kind, ...]
    microbatch: int


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The order in which one global batch goes through the stages.

    Attributes:
        name: name under which it was built.
        num_stages: K.
        num_microbatches: M.
        actions: every action in the order in which the host dispatches them.
        local: whether the stages exchange no backward messages (local objectives).
    """

    name: str
    num_stages: int
    num_microbatches: int
    actions: tuple[Action, ...]
    local: bool = False

    def calls(self) -> Iterator[Call]:
        """Yields the actions with neighbours of one stage and microbatch joined."""
        for (stage, microbatch), run in itertools.groupby(
            self.actions, key=lambda action: (action.stage, action.microbatch)
        ):
            yield Call(stage, tuple(action.kind for action in run), microbatch)

    def validate(self) -> "Schedule":
        """Proves that every action's inputs exist when it is dispatched.

        Returns:
            The schedule itself, so that a call can be chained.

        Raises:
            ValueError: naming the first action that is out of range, done twice, without
                its inputs or too early, or the first that is missing.
        """
        done: set[Action] = set()
        for action in self.actions:
            problem = self._problem(action, done)
            if problem:
                raise ValueError(f"schedule {self.name}: {action} {problem}")
            done.add(action)
        for action in self._complete():
            if action not in done:
                raise ValueError(f"schedule {self.name}: {action} is missing")
        return self

    def _problem(self, action: Action, done: set[Action]) -> str | None:
        stage, kind, microbatch = action
        if not 0 <= stage < self.num_stages:
            return f"names a stage outside 0..{self.num_stages - 1}"
        if not 0 <= microbatch < self.num_microbatches:
            return f"names a microbatch outside 0..{self.num_microbatches - 1}"
        if action in done:
            return "stands twice"
        for needed in self._inputs(action):
            if needed not in done:
                return f"comes before {needed}"
        if kind is not Kind.STEP and self._last_step(stage) in done:
            return f"comes after {self._last_step(stage)}"
        return None

    def _last_step(self, stage: int) -> Action:
        return Action(stage, Kind.STEP, self.num_microbatches - 1)

    def _inputs(self, action: Action) -> Iterator[Action]:
        stage, kind, microbatch = action
        if kind is Kind.FORWARD:
            if stage > 0:
                yield Action(stage - 1, Kind.FORWARD, microbatch)
        elif kind is Kind.BACKWARD:
            yield Action(stage, Kind.FORWARD, microbatch)
            if not self.local and stage < self.num_stages - 1:
                yield Action(stage + 1, Kind.BACKWARD, microbatch)
        else:
            for each in range(self.num_microbatches):
                yield Action(stage, Kind.BACKWARD, each)

    def _complete(self) -> Iterator[Action]:
        for stage in range(self.num_stages):
            for microbatch in range(self.num_microbatches):
                yield Action(stage, Kind.FORWARD, microbatch)
                yield Action(stage, Kind.BACKWARD, microbatch)
            yield self._last_step(stage)

    def __str__(self) -> str:
        """The grid: a row a stage, a column a tick; a stage acts once in a tick."""
        finished: dict[Action, int] = {}
        free = [0] * self.num_stages
        rows: list[dict[int, str]] = [{} for _ in range(self.num_stages)]
        for action in self.actions:
            ready = [finished[each] + 1 for each in self._inputs(action) if each in finished]
            tick = max([free[action.stage], *ready])
            finished[action] = tick
            free[action.stage] = tick + 1
            rows[action.stage][tick] = f"{action.kind.value}{action.microbatch}"
        ticks = max(free, default=0)
        width = max((len(cell) for row in rows for cell in row.values()), default=1)
        lines = []
        for stage, row in enumerate(rows):
            cells = " ".join(row.get(tick, ".").ljust(width) for tick in range(ticks))
            lines.append(f"stage {stage} | {cells.rstrip()}")
        return "\n".join(lines)
