"""Plays a schedule against given times: how long it takes, who waits, and what it holds."""

import dataclasses
import math
import operator
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import NamedTuple

from jdecouple._errors import require_int, require_number
from jdecouple.schedules.schedule import Kind, Schedule

PerStage = float | Sequence[float]
Kinds = tuple[Kind, ...]


@dataclasses.dataclass(frozen=True)
class Costs:
    """What the actions and the messages of a schedule cost; one number stands for all stages.

    A call takes the sum of its actions' times, unless `calls` has a time for it.

    Attributes:
        forward: seconds of one microbatch, for each of the K stages; not needed beside all `calls`.
        backward: as forward. Beside `weight` it is the input gradient alone.
        step: seconds of one optimiser step, for each stage.
        message_bytes: of one microbatch's carry, for each of the K-1 boundaries.
        error_bytes: of one microbatch's errors, for each boundary.
        bandwidth: bytes per second of a link in one direction, above 0.
        latency: seconds that a message takes beside its bytes.
        dispatch: seconds of the host per call. A host dispatches one call after another.
        hosts: the process that drives each stage; by default one drives all.
        calls: seconds of whole calls by (stage, kinds), such as `Trainer.measured_costs` gives.
            What joins several actions in one call is faster than the actions one by one.
        weight: seconds of the weight gradient, as forward. A schedule that splits its backwards
            needs it; in any other a backward takes backward + weight.
        ties: parameters that stages share, such as (0, 2), 4096.0: the stages, of which the first
            makes the step, and bytes of the gradient and of what comes back.

    Raises:
        ValueError: a number that is negative or not finite (the bandwidth may be infinite), or a
            key of `calls` that is not a stage and kinds of actions.
    """

    forward: PerStage | None = None
    backward: PerStage | None = None
    step: PerStage = 0.0
    message_bytes: PerStage = 0.0
    error_bytes: PerStage = 0.0
    bandwidth: float = math.inf
    latency: float = 0.0
    dispatch: float = 0.0
    hosts: Sequence[int] | None = None
    calls: Mapping[tuple[int, Kinds], float] = dataclasses.field(default_factory=dict)
    weight: PerStage | None = None
    ties: Sequence[tuple[Sequence[int], float]] = ()

    def __post_init__(self) -> None:
        optional = ("forward", "backward", "weight") if self.calls else ("weight",)
        for name in ("forward", "backward", "weight", "step", "message_bytes", "error_bytes"):
            values = getattr(self, name)
            if values is None and name in optional:
                continue
            for value in values if isinstance(values, Iterable) else [values]:
                require_number(**{name: value})
        for key, seconds in self.calls.items():
            match key:
                case (Integral() as stage, (Kind(), *_) as kinds) if {*map(type, kinds)} == {Kind}:
                    require_number(**{f"calls[{_label(stage, kinds)}]": seconds})
                case _:
                    raise ValueError(
                        f"calls has the key {key!r}: (stage, kinds of its actions) is needed"
                    )
        for _, size in self.ties:
            require_number(ties=size)
        require_number(latency=self.latency, dispatch=self.dispatch)
        if self.bandwidth != math.inf:
            require_number(positive=True, bandwidth=self.bandwidth)


class Span(NamedTuple):
    """One call on the time axis, simulated or measured.

    Attributes:
        stage: index of the stage.
        device_group: device group that the call occupied.
        kinds: its actions, in order.
        microbatches: of each action, as in the schedule.
        batch: number of the iteration, from 0.
        start: seconds.
        end: seconds; all that the call sends leaves now.
    """

    stage: int
    device_group: int
    kinds: tuple[Kind, ...]
    microbatches: tuple[int, ...]
    batch: int
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class Simulation:
    """What a schedule did.

    Attributes:
        makespan: seconds from the first dispatch to the end of the last call.
        busy: share of the makespan in which each device group ran a call.
        peak_live: microbatches of each stage that are forwarded with the backward to come, at most;
            in a schedule that splits its backwards with the weight gradient to come.
        bytes_moved: bytes of all batches that went from one device group to another.
        spans: every call, in order of dispatch.
    """

    makespan: float
    busy: tuple[float, ...]
    peak_live: tuple[int, ...]
    bytes_moved: float
    spans: tuple[Span, ...]

    @property
    def idle(self) -> tuple[float, ...]:
        """Share of the makespan in which each device group waited."""
        return tuple(1.0 - share for share in self.busy)

    @property
    def seconds_per_batch(self) -> float:
        """Seconds from one batch's end to the next in the second half; their mean below four."""
        ends: dict[int, float] = {}
        for span in self.spans:
            ends[span.batch] = max(span.end, ends.get(span.batch, 0.0))
        last, half = len(ends) - 1, len(ends) // 2
        if last < 3:
            return self.makespan / len(ends)
        return (ends[last] - ends[half]) / (last - half)


def simulate(
    schedule: Schedule, costs: Costs, *, batches: int = 1, max_in_flight: int | None = None
) -> Simulation:
    """Plays consecutive batches as the executor runs them.

    >>> from jdecouple.schedules import build
    >>> played = simulate(build("gpipe", num_stages=2, num_microbatches=3), Costs(1.0, 2.0))
    >>> played.makespan, played.idle, played.peak_live
    (12.0, (0.25, 0.25), (3, 3))

    The calls are dispatched in the schedule's order, batch after batch, without waiting. A call
    begins when it is dispatched, its device group is free and its inputs are there; it takes its
    own time or the times of its actions; what it sends leaves at its end. A message takes latency +
    bytes / bandwidth between device groups and nothing within one; a link carries one at a time
    each way. Stages that share parameters wait at the end of every batch for the sum of their
    gradients and for what its step gives. An action of a delayed schedule takes its time also
    before its first input exists, because the executor computes and discards it.

    Args:
        schedule: a valid schedule.
        costs: what it costs.
        batches: global batches (iterations, in a delayed schedule), at least 1.
        max_in_flight: batches that may be dispatched and unfinished; by default any number.

    Raises:
        ValueError: the schedule is not valid, costs of another number of stages or without a time
            for a call, or counts below 1.
    """
    schedule.validate()
    require_int(1, batches=batches)
    if max_in_flight is not None:
        require_int(1, max_in_flight=max_in_flight)
    calls = tuple(schedule.calls())
    seconds = _seconds(schedule, costs)
    hosts = _per_stage("hosts", 0 if costs.hosts is None else costs.hosts, schedule.num_stages)
    links = _Links(schedule, costs)
    tied = [0.0] * schedule.num_stages  # when each has what was stepped
    dispatched: dict[float, float] = defaultdict(float)  # host -> when it is free
    free, work = [0.0] * schedule.num_device_groups, [0.0] * schedule.num_device_groups
    arrived: dict[tuple[int, Kind, int], float] = {}
    spans: list[Span] = []
    ends: list[float] = []
    for batch in range(batches):
        opened = 0.0
        if max_in_flight is not None and batch >= max_in_flight:
            opened = ends[batch - max_in_flight]
        done: dict[int, float] = {}  # the last call of every stage
        for stage, kinds, microbatches in calls:
            group, host = schedule.device_group(stage), hosts[stage]
            dispatched[host] = max(dispatched[host], opened) + costs.dispatch
            # What never arrives belongs to a batch before the first.
            actions = [
                (kind, batch * schedule.num_microbatches + microbatch)
                for kind, microbatch in zip(kinds, microbatches, strict=True)
            ]
            ready = [arrived.pop((stage, *action), 0.0) for action in actions]
            start = max(free[group], dispatched[host], tied[stage], *ready)
            free[group] = end = done[stage] = start + seconds[stage, kinds]
            work[group] += end - start
            spans.append(Span(stage, group, kinds, microbatches, batch, start, end))
            for kind, microbatch in actions:
                target = stage + _DIRECTION[kind]
                if (stage, target) in links.sizes:
                    size = links.sizes[stage, target]
                    arrived[target, kind, microbatch] = links.send(stage, target, end, size)
        for (owner, *others), size in costs.ties:
            summed = max(links.send(user, owner, done[user], size) for user in (owner, *others))
            for user in (owner, *others):
                tied[user] = max(tied[user], links.send(owner, user, summed, size))
        ends.append(max(*free, *tied))
    makespan = ends[-1]
    return Simulation(
        makespan,
        busy=tuple(min(1.0, seconds / makespan) if makespan else 0.0 for seconds in work),
        peak_live=_peak_live(schedule),
        bytes_moved=links.moved,
        spans=tuple(spans),
    )


_DIRECTION = {Kind.FORWARD: 1, Kind.BACKWARD: -1, Kind.WEIGHT: 0, Kind.STEP: 0}


class _Links:
    """Times of arrival; a link carries one message at a time each way."""

    def __init__(self, schedule: Schedule, costs: Costs):
        boundaries = schedule.num_stages - 1
        carries = _per_stage("message_bytes", costs.message_bytes, boundaries)
        errors = _per_stage("error_bytes", costs.error_bytes, boundaries)
        self.sizes = {(k, k + 1): size for k, size in enumerate(carries)}
        if not schedule.local:
            self.sizes |= {(k + 1, k): size for k, size in enumerate(errors)}
        self.moved = 0.0
        self._schedule, self._costs = schedule, costs
        self._free: dict[tuple[int, int], float] = defaultdict(float)

    def send(self, source: int, target: int, now: float, size: float) -> float:
        """When the target stage has the bytes that the source stage sends now."""
        link = self._schedule.device_group(source), self._schedule.device_group(target)
        if link[0] == link[1]:
            return now
        self.moved += size
        self._free[link] = max(now, self._free[link]) + size / self._costs.bandwidth
        return self._free[link] + self._costs.latency


def _seconds(schedule: Schedule, costs: Costs) -> dict[tuple[int, Kinds], float]:
    """What each call of a schedule takes, by (stage, kinds)."""
    times = {}
    for kind in Kind:
        name = kind.name.lower()
        values = getattr(costs, name)
        times[kind] = None if values is None else _per_stage(name, values, schedule.num_stages)
    backward, weight = times[Kind.BACKWARD], times[Kind.WEIGHT]
    if backward and weight and not schedule.splits:
        times[Kind.BACKWARD] = tuple(map(operator.add, backward, weight))
    seconds = {}
    for stage, kinds, _ in schedule.calls():
        parts = [time[stage] for kind in kinds if (time := times[kind])]
        if (stage, kinds) in costs.calls:
            seconds[stage, kinds] = costs.calls[stage, kinds]
        elif len(parts) == len(kinds):
            seconds[stage, kinds] = sum(parts)
        else:
            sums = "forward, backward and weight" if schedule.splits else "forward and backward"
            raise ValueError(
                f"calls has no time for {_label(stage, kinds)}: that or {sums} are needed"
            )
    return seconds


def _peak_live(schedule: Schedule) -> tuple[int, ...]:
    live = [len(schedule.in_flight(stage).residuals) for stage in range(schedule.num_stages)]
    peak = list(live)
    end = Kind.WEIGHT if schedule.splits else Kind.BACKWARD
    for stage, kind, _ in schedule.actions:
        live[stage] += (kind is Kind.FORWARD) - (kind is end)
        peak[stage] = max(peak[stage], live[stage])
    return tuple(peak)


def _per_stage(name: str, values: PerStage, count: int) -> tuple[float, ...]:
    """One value for each stage (or boundary)."""
    values = tuple(values) if isinstance(values, Iterable) else (values,) * count
    if len(values) != count:
        raise ValueError(
            f"{name} has {len(values)} values: one number or {count} values are needed"
        )
    return values


def _label(stage: int, kinds: Kinds) -> str:
    return f"stage {stage}: {''.join(kind.value for kind in kinds)}"
