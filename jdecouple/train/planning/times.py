"""How long a batch takes on every schedule of a method: simulated from what its calls take."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jdecouple import schedules
from jdecouple.pipeline.build import flops
from jdecouple.pipeline.design import Design
from jdecouple.pipeline.diagnostics import message_sizes
from jdecouple.pipeline.mesh import StageMesh, placed
from jdecouple.schedules import Costs, Kind, Schedule, simulate

_LEAST_BATCHES = 8  # that are simulated
_REPEATED = ("blocks", "stages", "offload")  # values of `remat` that repeat most of the forward

Kinds = tuple[int, tuple[Kind, ...]]
"""A stage and what it does in one call."""


class Work(NamedTuple):
    """Floating-point operations of a block on one microbatch, by XLA's analysis.

    Attributes:
        forward: of its forward and its head's, in training.
        backward: of what comes beside it.
    """

    forward: float
    backward: float

    @property
    def total(self) -> float:
        """Of both."""
        return self.forward + self.backward


def work_of(design: Design) -> tuple[Work, ...]:
    """The work of every block; what a `remat` repeats does not count."""
    works = []
    units, carries = design.built.units, design.built.carries
    for unit, carry, total in zip(units, carries, design.block_costs(), strict=True):

        def forward(params, stats, carry, unit=unit):
            features, output, _ = unit.train(params, stats, carry, jax.random.key(0))
            return features, output and (output.loss, dict(output.carry))

        forward_flops = total
        if not unit.frozen:
            forward_flops = flops(forward, *jax.eval_shape(unit.initial), carry)
        works.append(Work(min(forward_flops, total), max(0.0, total - forward_flops)))
    return tuple(works)


def estimated(
    design: Design,
    works: Sequence[Work],
    rate: float,
    bandwidth: float,
    latency: float,
    speed: Callable[[Sequence[Any]], float] = lambda _: 1.0,
) -> Costs:
    """What calls and messages cost, from operations and the rate at which a device does them.

    Replicas share a stage's work evenly; their gradients are summed over the
    same links, for every microbatch. `speed` of a group of devices multiplies the rate.
    """
    forward, backward, weight = [], [], []
    replays = getattr(design.method.route, "replay", False)
    for stage, devices in zip(design.stages, design.device_groups, strict=True):
        own = [works[unit.index] for unit in stage.units]
        count, own_rate = len(devices), rate * speed(devices)
        first, both = (sum(getattr(work, name) for work in own) for name in Work._fields)
        second = third = both / 2  # of a layer's two gradients each is a product of its size
        if stage.remat in _REPEATED or (replays and not stage.is_last):
            second += first
        params = jax.tree.leaves(jax.eval_shape(stage.initial)["params"])
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in params)
        forward.append(first / count / own_rate)
        backward.append(second / count / own_rate)
        weight.append(third / count / own_rate + 2 * (count - 1) / count * size / bandwidth)
    links: dict[str, Any] = {"bandwidth": bandwidth, "latency": latency}
    sizes = message_sizes(design.stages)
    return Costs(forward, backward, weight=weight, **sizes, **links)


class Timing(NamedTuple):
    """A batch on one schedule.

    Attributes:
        schedule: its name.
        seconds: from the end of one batch to that of the next, once the stages are full.
        bubble: share of the devices' time in which they wait.
        groups: device groups that work: interleaved stages take fewer than one each.
    """

    schedule: str
    seconds: float
    bubble: float
    groups: int


def tables(design: Design, mesh: StageMesh) -> dict[str, Schedule]:
    """The schedules of the method for the design's stages and microbatches, its own first."""
    counts = len(design.stages), design.stages[0].num_microbatches
    names = dict.fromkeys((design.schedule.name, *design.method.route.schedules))
    built = [schedules.build(name, *counts) for name in names if name in schedules.names(*counts)]
    return {table.name: placed(table, mesh) for table in built if design.fits(table)}


def timing(table: Schedule, costs: Costs, max_in_flight: int) -> Timing:
    """Plays a schedule until its stages are full, and longer."""
    batches = max(_LEAST_BATCHES, 4 * table.num_stages)
    played = simulate(table, costs, batches=batches, max_in_flight=max_in_flight)
    seconds = played.seconds_per_batch
    work = sum(span.end - span.start for span in played.spans) / batches
    full = seconds * table.num_device_groups
    bubble = max(0.0, 1 - work / full) if full else 0.0
    return Timing(table.name, seconds, bubble, table.num_device_groups)


def by_stage(table: Schedule, costs: Costs) -> list[float]:
    """Seconds in which each stage works on a batch."""
    seconds = [0.0] * table.num_stages
    for span in simulate(table, costs).spans:
        seconds[span.stage] += span.end - span.start
    return seconds


def measured(
    make_trainer: Callable[..., Any], plans: Mapping[str, Schedule], batch: Any, repeats: int
) -> Mapping[bool, Mapping[Kinds, float]]:
    """Median seconds of every call of all schedules, on one device of this process.

    `make_trainer(schedule=name)` gives a `jdecouple.Trainer` whose stages are calls apart. Where
    backwards are split (True) they are other calls than where they are not.
    """
    found: dict[bool, dict[Kinds, float]] = {}
    for name, table in plans.items():
        calls = found.get(table.splits, {})
        if not _missing(calls, table):
            continue
        trainer = make_trainer(schedule=name)
        _, costs = trainer.measured_costs(trainer.init(), [trainer.put(batch)], repeats)
        found[table.splits] = calls = {**costs.calls, **calls}
        # Steps that wait for the norm of all gradients are calls of their own.
        calls |= {key: _of_parts(calls, *key) for key in _missing(calls, table)}
    return found


def _missing(calls: Mapping[Kinds, float], table: Schedule) -> list[Kinds]:
    found = dict.fromkeys((stage, kinds) for stage, kinds, _ in table.calls())
    return [key for key in found if key not in calls]


def _of_parts(calls: Mapping[Kinds, float], stage: int, kinds: tuple[Kind, ...]) -> float:
    """Seconds of a call as those of the longest parts of it that are calls."""
    if not kinds:
        return 0.0
    size = next(n for n in range(len(kinds), 0, -1) if (stage, kinds[:n]) in calls)
    return calls[stage, kinds[:size]] + _of_parts(calls, stage, kinds[size:])
