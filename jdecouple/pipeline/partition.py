"""Where stages begin, and how many devices each gets."""

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import Any

from jdecouple import schedules
from jdecouple.pipeline.mesh import StageMesh, device_groups, placed
from jdecouple.schedules import Costs


def balance(
    costs: Sequence[float], num_stages: int, speeds: Sequence[float] | None = None
) -> tuple[int, ...]:
    """Cuts a row of costs into consecutive parts with the smallest possible maximum.

    Args:
        costs: cost of every block, in any unit.
        num_stages: K, between 1 and the number of blocks.
        speeds: of each stage, such as the devices that share its cost; by default one.

    Returns:
        Index of the first block of each stage, beginning with 0.
    """
    check_num_stages(num_stages, len(costs))
    speeds = [1] * num_stages if speeds is None else list(speeds)
    # best[i] = (maximum, starts) of blocks i.. over the stages counted so far, from the last.
    best: list[Any] = [(sum(costs[i:]) / speeds[-1], (i,)) for i in range(len(costs))]
    for speed in reversed(speeds[:-1]):
        best = [
            min(
                (
                    (max(sum(costs[i:j]) / speed, best[j][0]), (i, *best[j][1]))
                    for j in range(i + 1, len(costs))
                    if best[j] is not None
                ),
                default=None,
            )
            for i in range(len(costs))
        ]
    return best[0][1]


def check_num_stages(num_stages: int, num_blocks: int) -> None:
    """Raises ValueError unless every stage can have a block."""
    if not 1 <= num_stages <= num_blocks:
        raise ValueError(
            f"num_stages is {num_stages}: between 1 and the model's {num_blocks} blocks is allowed"
        )


def first_blocks(boundaries: Sequence[int]) -> tuple[int, ...]:
    """Block indices at which stages begin, checked to be such; a missing leading 0 is added."""
    if not isinstance(boundaries, Sequence) or not all(
        isinstance(index, Integral) and not isinstance(index, bool) for index in boundaries
    ):
        raise ValueError(f"boundaries {boundaries!r} are no sequence of block indices")
    return tuple(boundaries) if boundaries and boundaries[0] == 0 else (0, *boundaries)


def check_boundaries(
    boundaries: Sequence[int], num_stages: int, num_blocks: int
) -> tuple[int, ...]:
    """`first_blocks`; ValueError unless they are K, increasing, and within the blocks."""
    starts = first_blocks(boundaries)
    ordered = all(a < b for a, b in itertools.pairwise(starts))
    if not ordered or starts[-1] >= num_blocks or len(starts) != num_stages:
        raise ValueError(
            f"boundaries {tuple(boundaries)} do not cut {num_blocks} blocks into {num_stages} "
            f"stages: give {num_stages - 1} increasing block indices between 1 and {num_blocks - 1}"
        )
    return starts


_BATCHES = 8  # enough for a steady state
_MOST_DEVICES = 16  # beyond which there are too many ways to share them out


@dataclasses.dataclass(frozen=True)
class Proposal:
    """One way to place a net.

    Attributes:
        boundaries: index of the first block of every stage.
        replicas: devices of every group of the mesh, one for each stage.
        time: simulated time of a batch, in that of one device of speed 1 alone.
        idle: share of the time in which the devices of each stage wait.
    """

    boundaries: tuple[int, ...]
    replicas: tuple[int, ...]
    time: float
    idle: tuple[float, ...]

    def __str__(self) -> str:
        stages = ", ".join(
            f"blocks from {start} on {count} device(s), idle {idle:.0%}"
            for start, count, idle in zip(self.boundaries, self.replicas, self.idle, strict=True)
        )
        return f"{1 / self.time:.2f} times one device (simulated): {stages}"


def autoplace(
    costs: Sequence[float],
    num_stages: int,
    num_devices: int,
    *,
    schedule: str = "local",
    microbatches: int = 1,
    batch_size: int | None = None,
    speeds: Sequence[float] | None = None,
) -> Proposal:
    """Finds the boundaries and replicas with the shortest simulated batch.

    Replicas are taken to share a stage's work evenly, so that the slowest sets their pace, and
    carries to cost nothing. Of equal times the one with fewer devices is proposed.

    Args:
        costs: cost of every block, forward and backward, in any unit.
        num_stages: K.
        num_devices: devices to share out, at least K; not all need be used.
        schedule: name of the schedule.
        microbatches: M.
        batch_size: examples of a global batch; a microbatch must divide among the replicas.
        speeds: of every device, in the order of the mesh, relative to one on which a block takes
            its cost: of measured calls, seconds there over seconds here. By default all are equal.

    Raises:
        ValueError: costs or speeds that are no numbers above 0, devices that are too few or too
            many, or a batch that none of the ways divides.

    >>> proposal = autoplace([4, 1, 1], num_stages=2, num_devices=3)
    >>> proposal.boundaries, proposal.replicas, round(1 / proposal.time, 2)
    ((0, 1), (2, 1), 3.0)
    >>> autoplace([1, 1, 1], num_stages=2, num_devices=2, speeds=[1, 0.5]).boundaries
    (0, 2)
    """
    speeds = [1.0] * num_devices if speeds is None else list(speeds)
    if not costs or not all(0 < cost < math.inf for cost in costs):
        raise ValueError(f"costs are {tuple(costs)}: a finite number above 0 for every block")
    check_num_stages(num_stages, len(costs))
    if not num_stages <= num_devices <= _MOST_DEVICES:
        raise ValueError(
            f"num_devices is {num_devices}: {num_stages} (a device a stage) to {_MOST_DEVICES} is "
            "allowed"
        )
    check_speeds(speeds, num_devices)
    proposals = []
    for replicas in _shares(num_stages, num_devices):
        if batch_size is not None and batch_size % (microbatches * math.lcm(*replicas)):
            continue
        table = schedules.build(schedule, len(replicas), microbatches)
        mesh = StageMesh(tuple((number,) * count for number, count in enumerate(replicas)))
        groups = device_groups(table, mesh)
        firsts = [0, *itertools.accumulate(replicas)]
        slowest = [min(speeds[a:b]) for a, b in itertools.pairwise(firsts)]
        rates = [len(group) * slowest[group[0]] for group in groups]
        starts = balance(costs, len(rates), rates)
        parts = itertools.pairwise((*starts, len(costs)))
        work = [
            sum(costs[a:b]) / rate / microbatches for (a, b), rate in zip(parts, rates, strict=True)
        ]
        third = [cost / 3 for cost in work]  # a forward, and each of a backward's two gradients
        call_costs = Costs(forward=third, backward=third, weight=third)
        played = schedules.simulate(placed(table, mesh), call_costs, batches=_BATCHES)
        time = played.seconds_per_batch
        busy: dict[tuple, float] = defaultdict(float)
        for group, cost in zip(groups, work, strict=True):
            busy[group] += microbatches * cost
        idle = tuple(max(0.0, 1 - busy[group] / time) for group in groups)
        proposals.append(Proposal(starts, replicas, time / sum(costs), idle))
    if not proposals:
        raise ValueError(
            f"a batch of {batch_size} does not divide into {microbatches} microbatch(es) on any "
            f"replicas of {num_stages} stages"
        )
    return min(proposals, key=lambda option: (round(option.time, 9), sum(option.replicas)))


def check_speeds(speeds: Sequence[float], num_devices: int) -> None:
    """Raises ValueError unless there is a finite number above 0 for every device."""
    if len(speeds) != num_devices or not all(0 < speed < math.inf for speed in speeds):
        raise ValueError(
            f"speeds are {tuple(speeds)}: a finite number above 0 is needed for each of "
            f"{num_devices} devices"
        )


def _shares(num_stages: int, num_devices: int) -> Iterator[tuple[int, ...]]:
    """All ways to give every stage a device or more, of `num_devices`."""
    for used in range(num_stages, num_devices + 1):
        for cuts in itertools.combinations(range(1, used), num_stages - 1):
            yield tuple(b - a for a, b in itertools.pairwise((0, *cuts, used)))
