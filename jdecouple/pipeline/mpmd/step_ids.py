"""Numbers of the batches and microbatches that compiled calls work on."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from jdecouple.pipeline.mesh import StageDevices
from jdecouple.schedules import Call

NEXT_BATCH = np.array([1, 0], np.int32)
"""What the numbers of the next batch have more."""


def step_ids(
    calls: Sequence[Call], num_microbatches: int, step: Any, end: int | None = None
) -> Any:
    """[batch, microbatch] of every action of some calls that begin with batch `step`.

    Batches from `end` on do not exist: theirs is -1. Without `end`, `step` may be traced.

    >>> from jdecouple.schedules import Kind
    >>> step_ids([Call(0, (Kind.FORWARD, Kind.STEP), (3, 1))], 2, 10).tolist()
    [[11, 1], [10, 1]]
    """
    pairs = [divmod(number, num_microbatches) for call in calls for number in call.microbatches]
    ids = np.array(pairs, np.int32) + step * NEXT_BATCH
    if end is not None:
        ids[ids[:, 0] >= end, 0] = -1
    return ids


def by_call(calls: Sequence[Call], ids: Any) -> list[Any]:
    """The numbers of each call's actions, cut from those of all."""
    ends = itertools.accumulate((len(call.kinds) for call in calls), initial=0)
    return [ids[first:last] for first, last in itertools.pairwise(ends)]


@dataclasses.dataclass(frozen=True, eq=False)
class PlacedIds:
    """Numbers as compiled calls are given them, on their devices.

    What a batch's calls give for the next stays there: an array of NumPy costs the host 5 to 30 us
    a call.

    Attributes:
        calls: of a batch.
        num_microbatches: in a batch.
        placements: the devices of every stage.
        fuse: whether all calls are one.
    """

    calls: Sequence[Call]
    num_microbatches: int
    placements: Sequence[StageDevices]
    fuse: bool
    _kept: dict[int, Any] = dataclasses.field(default_factory=dict)

    def take(self, step: int, end: int | None) -> Any:
        """Those of batch `step`; what is kept can be taken once, as calls donate it."""
        kept = self._kept.pop(step, None) if end is None else None
        return self.of(self.calls, step, end) if kept is None else kept

    def keep(self, step: int, end: int | None, ids: Any) -> None:
        """Keeps what the calls of batch `step` - 1 gave, if that was not after `end`."""
        self._kept.clear()
        if end is None:
            self._kept[step] = ids

    def of(self, calls: Sequence[Call], step: int, end: int | None = None) -> Any:
        """Uploads those of some calls: an array for each, one for all where they are fused."""
        ids = step_ids(calls, self.num_microbatches, step, end)
        if self.fuse:
            return self.placements[0].place(ids, self.placements[0].replicated)
        own = [self.placements[call.stage] for call in calls]
        return [
            placement.place(part, placement.replicated) if placement.addressable else None
            for placement, part in zip(own, by_call(calls, ids), strict=True)
        ]
