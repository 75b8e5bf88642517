"""Plays a schedule against given times: how long it takes, who waits, and what it holds."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import NamedTuple

from jdecouple.schedules.schedule import Kind, Schedule

PerStage = float | Sequence[float]


@dataclasses.dataclass(frozen=True)
class Costs:
    """What the actions and the messages of a schedule cost; one number stands for all stages.

    A call takes the sum of its actions' times, unless `calls` has a time for it.

    Attributes:
        forward: seconds of one microbatch, for each of the K stages; not needed beside all `calls`.
        backward: as forward.
        step: seconds of one optimiser step, for each stage.
        message_bytes: of one microbatch's activations, for each of the K-1 boundaries.
        error_bytes: of one microbatch's errors, for each boundary.
        bandwidth: bytes per second of a link in one direction, above 0.
        latency: seconds that a message takes beside its bytes.
        dispatch: seconds of the host per call. A host dispatches one call after another.
        hosts: the process that drives each stage; by default one drives all.
        calls: seconds of whole calls by (stage, kinds), such as `pipeline.measured_costs` gives.
            What joins several actions in one call is faster than the actions one by one.

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
    calls: Mapping[tuple[int, tuple[Kind, ...]], float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("forward", "backward", "step", "message_bytes", "error_bytes"):
            given = getattr(self, name)
            if given is None and self.calls and name in ("forward", "backward"):
                continue
            for each in given if isinstance(given, Iterable) else [given]:
                _check_number(name, each)
        for key, seconds in self.calls.items():
            _check_key(key)
            _check_number(f"calls[{_label(*key)}]", seconds)
        _check_number("latency", self.latency)
        _check_number("dispatch", self.dispatch)
        if not isinstance(self.bandwidth, Real) or not self.bandwidth > 0:
            raise ValueError(
                f"bandwidth is {self.bandwidth!r}: bytes per second above 0 are needed"
            )


class Span(NamedTuple):
    """One call on the time axis, simulated or measured.

    Attributes:
        stage: index of the stage.
        device_group: devices that the call occupied.
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
        busy: share of the makespan in which each row of devices ran a call.
        peak_live: microbatches of each stage that are forwarded with the backward to come, at most.
        bytes_moved: bytes of all batches that went from one row to another.
        spans: every call, in order of dispatch.
    """

    makespan: float
    busy: tuple[float, ...]
    peak_live: tuple[int, ...]
    bytes_moved: float
    spans: tuple[Span, ...]

    @property
    def idle(self) -> tuple[float, ...]:
        """Share of the makespan in which each row of devices waited."""
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

    The calls are dispatched in the schedule's order, batch after batch, without waiting. A call
    begins when it is dispatched, its row of devices is free and its inputs are there; it takes its
    own time or the times of its actions; what it sends leaves at its end. A message takes latency +
    bytes / bandwidth from row to row and nothing within a row; a link carries one at a time each
    way. An action of a delayed schedule takes its time also before its first input exists, because
    the executor computes and discards it.

    Args:
        schedule: a valid schedule.
        costs: what it costs.
        batches: global batches (iterations, in a delayed schedule), at least 1.
        max_in_flight: batches that may be dispatched and unfinished; by default any number.

    Returns:
        Times, shares and every call.

    Raises:
        ValueError: the schedule is not valid, costs of another number of stages or without a time
            for a call, or counts below 1.
    """
    schedule.validate()
    _check_count("batches", batches)
    if max_in_flight is not None:
        _check_count("max_in_flight", max_in_flight)
    stages, calls = schedule.num_stages, tuple(schedule.calls())
    seconds = _seconds(schedule, costs)
    hosts = _spread("hosts", 0 if costs.hosts is None else costs.hosts, stages)
    links = _Links(schedule, costs)
    dispatched: dict[float, float] = defaultdict(float)  # host -> when it is free
    free, work = [0.0] * schedule.num_device_groups, [0.0] * schedule.num_device_groups
    arrived: dict[tuple[int, Kind, int], float] = {}
    spans: list[Span] = []
    ends: list[float] = []
    for batch in range(batches):
        opened = 0.0
        if max_in_flight is not None and batch >= max_in_flight:
            opened = ends[batch - max_in_flight]
        for stage, kinds, microbatches in calls:
            row, host = schedule.device_group(stage), hosts[stage]
            dispatched[host] = max(dispatched[host], opened) + costs.dispatch
            # What never arrives belongs to a batch before the first.
            parts = [batch * schedule.num_microbatches + each for each in microbatches]
            takes = [(stage, kind, part) for kind, part in zip(kinds, parts, strict=True)]
            ready = [arrived.pop(each, 0.0) for each in takes]
            start = max(free[row], dispatched[host], *ready)
            free[row] = end = start + seconds[stage, kinds]
            work[row] += end - start
            spans.append(Span(stage, row, kinds, microbatches, batch, start, end))
            for _, kind, part in takes:
                target = stage + _DIRECTION[kind]
                if (stage, target) in links.sizes:
                    arrived[target, kind, part] = links.send(stage, target, end)
        ends.append(max(free))
    makespan = ends[-1]
    return Simulation(
        makespan,
        busy=tuple(min(1.0, each / makespan) if makespan else 0.0 for each in work),
        peak_live=_peak_live(schedule),
        bytes_moved=links.moved,
        spans=tuple(spans),
    )


_DIRECTION = {Kind.FORWARD: 1, Kind.BACKWARD: -1, Kind.STEP: 0}
_LIVE = {Kind.FORWARD: 1, Kind.BACKWARD: -1, Kind.STEP: 0}


class _Links:
    """Times of arrival; a link between two rows carries one message at a time each way."""

    def __init__(self, schedule: Schedule, costs: Costs):
        boundaries = schedule.num_stages - 1
        upwards = _spread("message_bytes", costs.message_bytes, boundaries)
        downwards = _spread("error_bytes", costs.error_bytes, boundaries)
        self.sizes = {(k, k + 1): size for k, size in enumerate(upwards)}
        if not schedule.local:
            self.sizes |= {(k + 1, k): size for k, size in enumerate(downwards)}
        self.moved = 0.0
        self._schedule, self._costs = schedule, costs
        self._free: dict[tuple[int, int], float] = defaultdict(float)

    def send(self, source: int, target: int, now: float) -> float:
        """When the target stage has what the source stage sends now."""
        link = self._schedule.device_group(source), self._schedule.device_group(target)
        if link[0] == link[1]:
            return now
        size = self.sizes[source, target]
        self.moved += size
        self._free[link] = max(now, self._free[link]) + size / self._costs.bandwidth
        return self._free[link] + self._costs.latency


def _seconds(schedule: Schedule, costs: Costs) -> dict[tuple[int, tuple[Kind, ...]], float]:
    """What each call of a schedule takes, by (stage, kinds)."""
    stages = schedule.num_stages
    forward, backward = (
        None if given is None else _spread(name, given, stages)
        for name, given in (("forward", costs.forward), ("backward", costs.backward))
    )
    step = _spread("step", costs.step, stages)
    each = {Kind.FORWARD: forward, Kind.BACKWARD: backward, Kind.STEP: step}
    found = {}
    for stage, kinds, _ in schedule.calls():
        key = stage, kinds
        if key in costs.calls:
            found[key] = costs.calls[key]
            continue
        times = [each[kind] for kind in kinds]
        if None in times:
            raise ValueError(
                f"calls has no time for {_label(*key)}: that or forward and backward are needed"
            )
        found[key] = sum(time[stage] for time in times if time)
    return found


def _peak_live(schedule: Schedule) -> tuple[int, ...]:
    live = [len(schedule.in_flight(stage).residuals) for stage in range(schedule.num_stages)]
    peak = list(live)
    for stage, kind, _ in schedule.actions:
        live[stage] += _LIVE[kind]
        peak[stage] = max(peak[stage], live[stage])
    return tuple(peak)


def _spread(name: str, given: PerStage, count: int) -> tuple[float, ...]:
    """One value for each stage (or boundary)."""
    if not isinstance(given, Iterable):
        return (given,) * count
    values = tuple(given)
    if len(values) != count:
        raise ValueError(
            f"{name} has {len(values)} values: one number or {count} values are needed"
        )
    return values


def _label(stage: int, kinds: Iterable[Kind]) -> str:
    return f"stage {stage}: {''.join(kind.value for kind in kinds)}"


def _check_key(key: object) -> None:
    match key:
        case (Integral(), (Kind(), *_) as kinds) if all(isinstance(each, Kind) for each in kinds):
            return
    raise ValueError(f"calls has the key {key!r}: (stage, kinds of its actions) is needed")


def _check_number(name: str, value: object) -> None:
    if not isinstance(value, Real) or not 0 <= float(value) < math.inf:
        raise ValueError(f"{name} is {value!r}: a finite number of at least 0 is needed")


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, Integral) or int(value) < 1:
        raise ValueError(f"{name} is {value!r}: a whole number of at least 1 is needed")
