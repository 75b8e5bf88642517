"""Rows of the throughput benchmark: a method on a schedule, its stages, replicas, microbatches."""

import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from jdecouple import methods, schedules
from jdecouple.schedules import Costs, Kind, Schedule, simulate

COUNTS = {"K": "stages", "D": "data", "M": "microbatches", "T": "chunk"}
TOGETHER = "together"


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table; its text is what `parse` reads.

    Attributes:
        method: name of the method.
        schedule: name of the schedule.
        stages: K.
        data: D, replicas of every stage.
        microbatches: M.
        chunk: T, batches of a call.
        together: all stages on one device.
    """

    method: str
    schedule: str
    stages: int = 1
    data: int = 1
    microbatches: int = 1
    chunk: int = 1
    together: bool = False

    @cached_property
    def plan(self) -> Schedule:
        """The schedule of one batch."""
        return schedules.build(self.schedule, self.stages, self.microbatches)

    @property
    def rows(self) -> int:
        """Rows of devices."""
        return 1 if self.together else self.plan.num_device_groups

    @property
    def devices(self) -> int:
        """Devices that the row is made for."""
        return self.rows * self.data

    @property
    def reference(self) -> "Row":
        """The same method on one device, at its best: a stage and a microbatch.

        A delayed method keeps its stages, because what it computes depends on them.
        """
        first = methods.get(self.method).route.schedules[0]
        if self.plan.delayed and self.stages > 1:
            return Row(self.method, self.schedule, self.stages, together=True)
        return Row(self.method, first)

    def fitted(self, devices: int) -> "Row":
        """The row where there are so many devices: on one, the stages are together."""
        alone = self.data == devices == 1 and self.rows > 1
        return dataclasses.replace(self, together=True) if alone else self

    def ideal(self, batches: int) -> float:
        """Speed over one device where stages are equal and nothing else takes time.

        Of a segment of some batches, in which the stages of a local method fill and drain once.
        """
        if self.rows == 1:
            return float(self.data)
        forward, backward = 1.0, 2.0
        work = batches * self.stages * self.microbatches * (forward + backward)
        return (
            self.data
            * work
            / simulate(self.plan, Costs(forward, backward), batches=batches).makespan
        )

    def simulated(
        self,
        found: Sequence[dict],
        link: dict[str, Any],
        batches: int,
        in_flight: int | None = None,
    ) -> float:
        """Seconds of a segment, simulated from the times of the calls alone.

        Args:
            found: replies of `Run.costs`; of each call the median of them counts.
            link: bandwidth and latency.
            batches: length of the segment.
            in_flight: batches (or chunks) that may be; by default as many as the trainer's default.
        """
        seconds = defaultdict(list)
        for reply in found:
            for stage, kinds, each in reply["calls"]:
                seconds[stage, tuple(map(Kind, kinds))].append(each)
        costs = Costs(
            calls={key: self.chunk * statistics.median(each) for key, each in seconds.items()},
            message_bytes=[self.chunk * each for each in found[0]["message_bytes"]],
            error_bytes=[self.chunk * each for each in found[0]["error_bytes"]],
            hosts=[self.plan.row(stage) for stage in range(self.stages)],
            **link,
        )
        flying = in_flight or 2 * self.stages
        chunks = -(-batches // self.chunk)
        return simulate(self.plan, costs, batches=chunks, max_in_flight=flying).makespan

    def options(self, apart: bool) -> dict[str, Any]:
        """The row's part of the options of `run.Run`; `apart`: one device, a call a call."""
        return {
            "method": self.method,
            "schedule": self.schedule,
            "stages": self.stages,
            "microbatches": self.microbatches,
            "chunk": 1 if apart else self.chunk,
            "rows": 1 if apart else self.rows,
            "data": 1 if apart else self.data,
            "fuse": False if apart else None,
        }

    def __str__(self) -> str:
        usual = self.schedule == methods.get(self.method).route.schedules[0]
        counts = [f"{key}={getattr(self, name)}" for key, name in COUNTS.items()]
        settings = [each for each in counts if not each.endswith("=1")]
        head = self.method if usual else f"{self.method}:{self.schedule}"
        return ",".join([head, *settings, *[TOGETHER] * self.together])


BP = Row("bp", "sequential")


def parse(text: str) -> Row:
    """Reads `method[:schedule][,K=2][,D=1][,M=4][,T=1][,together]`.

    Raises:
        ValueError: in one line, whatever is wrong with it.
    """
    head, *settings = text.split(",")
    method, _, schedule = head.partition(":")
    try:
        allowed = methods.get(method).route.schedules
        if schedule and schedule not in allowed:
            raise ValueError(f"method {method} runs on {', '.join(allowed)}, not on {schedule!r}")
        values: dict[str, Any] = {}
        for setting in settings:
            key, _, value = setting.partition("=")
            if setting == TOGETHER:
                values[TOGETHER] = True
            elif key in COUNTS and value.isdigit() and int(value) >= 1:
                values[COUNTS[key]] = int(value)
            else:
                raise ValueError(
                    f"{setting!r} is none of K=, D=, M=, T= with a count of at least 1, {TOGETHER}"
                )
        row = Row(method, schedule or allowed[0], **values)
        if row.together and row.data > 1:
            raise ValueError(f"{TOGETHER} means one device, D is {row.data}")
        _ = row.plan
    except ValueError as error:
        raise ValueError(f"row {text!r}: {error}") from None
    return row


def with_references(rows: Sequence[Row]) -> list[Row]:
    """The rows, and before them what they are compared with: BP and themselves on one device."""
    references = [row.reference for row in rows]
    return list(
        dict.fromkeys([BP, *(row for pair in zip(references, rows, strict=True) for row in pair)])
    )
