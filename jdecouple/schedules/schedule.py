"""Schedules as plain data: which stage does what to which microbatch, in which order."""

import dataclasses
import enum
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import NamedTuple


class Kind(enum.Enum):
    """What a stage does in one action.

    In a schedule that splits its backwards BACKWARD is the gradient of the stage's input alone, and
    WEIGHT that of its weights.
    """

    FORWARD = "F"
    BACKWARD = "B"
    WEIGHT = "W"
    STEP = "S"

    __hash__ = object.__hash__  # that of enums is written in Python, and every dispatch asks for it


class Action(NamedTuple):
    """One entry of a schedule.

    Attributes:
        stage: index of the stage that acts, 0 to K-1.
        kind: forward, backward, weight gradient or optimiser step.
        microbatch: index of the microbatch, 0 to M-1; a step carries the last, M-1, whichever
            backward is before it. In a delayed schedule -n is the batch that entered n iterations
            ago.
    """

    stage: int
    kind: Kind
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind.value}{self.microbatch} of stage {self.stage}"


class Call(NamedTuple):
    """Consecutive actions of one stage that become one compiled call."""

    stage: int
    kinds: tuple[Kind, ...]
    microbatches: tuple[int, ...]


class InFlight(NamedTuple):
    """What a stage holds between two iterations, as the batches it belongs to, oldest first.

    Attributes:
        carries: sent by the stage below, and not yet used.
        residuals: forwarded, with the backward still to come.
        errors: sent by the stage above, and not yet used.
    """

    carries: range
    residuals: range
    errors: range


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The order in which one global batch goes through the stages.

    A delayed schedule is one iteration that repeats: every stage acts once of each kind, on a batch
    that entered some iterations ago.

    Attributes:
        name: name under which it was built.
        num_stages: K.
        num_microbatches: M.
        actions: every action in the order in which the host dispatches them.
        local: whether no errors go from stage to stage (local objectives).
        delayed: whether what an action needs may come from an earlier iteration.
        placement: number of each stage's device group, from 0; by default one each.
    """

    name: str
    num_stages: int
    num_microbatches: int
    actions: tuple[Action, ...]
    local: bool = False
    delayed: bool = False
    placement: tuple[int, ...] = ()

    @property
    def num_device_groups(self) -> int:
        """Device groups that the stages live on; K unless several share one."""
        return max(self.placement, default=self.num_stages - 1) + 1

    def device_group(self, stage: int) -> int:
        """Device group on which a stage lives."""
        return self.placement[stage] if self.placement else stage

    @cached_property
    def splits(self) -> bool:
        """Whether a backward is two actions: the input gradient, and the weight gradient."""
        return any(action.kind is Kind.WEIGHT for action in self.actions)

    def calls(self) -> Iterator[Call]:
        """Yields the actions with neighbours of one stage joined.

        Joined are those on one microbatch, a step with what is before it, and what a step of their
        stage precedes. A backward that sends an error is not joined with the weight gradient.
        """
        for actions in split(self.actions, joins):
            kinds = tuple(action.kind for action in actions)
            microbatches = tuple(action.microbatch for action in actions)
            yield Call(actions[0].stage, kinds, microbatches)

    @property
    def overlapping(self) -> bool:
        """Whether stages hold something between two iterations."""
        return self.delayed and any(action.microbatch < 0 for action in self.actions)

    @property
    def sums_late(self) -> bool:
        """Whether stages with losses of their own are at different batches in an iteration."""
        return self.local and self.overlapping

    @property
    def latency(self) -> int:
        """Iterations between a batch's entry and its end at the last stage."""
        return self.delay(self.num_stages - 1)

    def delay(self, stage: int, kind: Kind = Kind.FORWARD) -> int:
        """Iterations between a batch's entry and its forward, or backward, at a stage."""
        action = stage, kind
        return -min(a.microbatch for a in self.actions if a[:2] == action and a.microbatch <= 0)

    @property
    def depth(self) -> int:
        """Iterations after its entry in which a batch still trains a stage."""
        return -min(0, *(action.microbatch for action in self.actions))

    def in_flight(self, stage: int) -> InFlight:
        """What a stage holds when an iteration begins; nothing where nothing overlaps."""
        if not self.overlapping:
            return InFlight(range(0), range(0), range(0))
        at = {(action.stage, action.kind): action.microbatch for action in self.actions}
        forward, backward = at[stage, Kind.FORWARD], at[stage, Kind.BACKWARD]
        return InFlight(
            carries=range(forward, at.get((stage - 1, Kind.FORWARD), forward)),
            residuals=range(backward, forward),
            errors=range(backward, at.get((stage + 1, Kind.BACKWARD), backward)),
        )

    def validate(self) -> "Schedule":
        """Proves that every action's inputs exist when it is dispatched.

        Returns:
            The schedule itself, so that a call can be chained.

        Raises:
            ValueError: naming the first action that is out of range, done twice, without its
                inputs or too early, or missing; or the placement does not fit the stages.
        """
        groups = self.placement or range(self.num_stages)
        if len(groups) != self.num_stages or {*groups} != {*range(self.num_device_groups)}:
            raise ValueError(
                f"schedule {self.name}: placement is {self.placement}: a device group for each of "
                f"{self.num_stages} stages is needed, counted from 0 without a gap"
            )
        done: set[tuple] = set()
        for action in self.actions:
            if problem := self._problem(action, done):
                raise ValueError(f"schedule {self.name}: {action} {problem}")
            done |= {action, self._slot(action)}
        for action in self._needed():
            if self._slot(action) not in done:
                raise ValueError(f"schedule {self.name}: {action} is missing")
        return self

    def _slot(self, action: Action) -> tuple:
        """What is done once: an action, in a delayed schedule one of any batch."""
        return action[:2] if self.delayed else action

    def _needed(self) -> Iterator[Action]:
        for stage in range(self.num_stages):
            for microbatch in range(self.num_microbatches):
                yield Action(stage, Kind.FORWARD, microbatch)
                yield Action(stage, Kind.BACKWARD, microbatch)
                if self.splits:
                    yield Action(stage, Kind.WEIGHT, microbatch)
            yield self._last_step(stage)

    def _problem(self, action: Action, done: set[tuple]) -> str | None:
        stage, kind, microbatch = action
        if not 0 <= stage < self.num_stages:
            return f"names a stage outside 0..{self.num_stages - 1}"
        if not self.delayed and not 0 <= microbatch < self.num_microbatches:
            return f"names a microbatch outside 0..{self.num_microbatches - 1}"
        if self.delayed and microbatch > 0:
            return "names a batch that has not entered yet"
        if self._slot(action) in done:
            return "stands twice"
        for needed in self.inputs(action):
            if needed not in done and not self._waits(action, needed):
                return f"comes before {needed}"
        if not self.delayed and kind is not Kind.STEP and self._last_step(stage) in done:
            return f"comes after {self._last_step(stage)}"
        return None

    def _waits(self, taker: Action, needed: Action) -> bool:
        """Whether an earlier iteration of a delayed schedule has done what is needed.

        Gradients do not wait from one iteration to the next.
        """
        takes_gradients = taker.kind in (Kind.WEIGHT, Kind.STEP)
        return (
            self.delayed
            and not takes_gradients
            and any(
                action[:2] == needed[:2] and action.microbatch > needed.microbatch
                for action in self.actions
            )
        )

    def _last_step(self, stage: int) -> Action:
        return Action(stage, Kind.STEP, self.num_microbatches - 1)

    def inputs(self, action: Action) -> Iterator[Action]:
        """Yields the actions whose results an action takes."""
        stage, kind, microbatch = action
        if kind is Kind.FORWARD and stage > 0:
            yield Action(stage - 1, Kind.FORWARD, microbatch)
        elif kind is Kind.BACKWARD:
            yield Action(stage, Kind.FORWARD, microbatch)
            if not self.local and stage < self.num_stages - 1:
                yield Action(stage + 1, Kind.BACKWARD, microbatch)
        elif kind is Kind.WEIGHT:
            yield Action(stage, Kind.BACKWARD, microbatch)
        elif kind is Kind.STEP:
            last = Kind.WEIGHT if self.splits else Kind.BACKWARD
            for of in [microbatch] if self.delayed else range(self.num_microbatches):
                yield Action(stage, last, of)

    def __str__(self) -> str:
        """The grid: a line a stage, a column a tick; a device group acts once in a tick."""
        finished: dict[Action, int] = {}
        free = [0] * self.num_device_groups
        grid: list[dict[int, str]] = [{} for _ in range(self.num_stages)]
        for action in self.actions:
            group = self.device_group(action.stage)
            ready = [finished[needed] + 1 for needed in self.inputs(action) if needed in finished]
            finished[action] = tick = max([free[group], *ready])
            free[group] = tick + 1
            grid[action.stage][tick] = f"{action.kind.value}{action.microbatch}"
        width = max((len(cell) for cells in grid for cell in cells.values()), default=1)
        lines = []
        for stage, cells in enumerate(grid):
            line = " ".join(cells.get(tick, ".").ljust(width) for tick in range(max(free)))
            lines.append(f"stage {stage} | {line.rstrip()}")
        return "\n".join(lines)


def joins(before: Action, action: Action) -> bool:
    """Whether an action belongs to the call of the action before it.

    An error leaves at the end of a call: the weight gradient does not hold it up.
    """
    if before.stage != action.stage:
        return False
    if (before.kind, action.kind) == (Kind.BACKWARD, Kind.WEIGHT) and before.stage > 0:
        return False
    return before.microbatch == action.microbatch or Kind.STEP in (before.kind, action.kind)


def split(
    actions: Iterable[Action], joined: Callable[[Action, Action], bool]
) -> Iterator[list[Action]]:
    """Cuts actions between neighbours that are not joined."""
    run: list[Action] = []
    for action in actions:
        if run and not joined(run[-1], action):
            yield run
            run = []
        run.append(action)
    if run:
        yield run
