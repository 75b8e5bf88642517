"""Rows of a benchmark: a method on a schedule, its stages, replicas, microbatches and batches."""

import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

from jdecouple import methods, schedules
from jdecouple.schedules import Costs, Kind, Schedule, simulate

COUNTS = {"K": "stages", "D": "data", "M": "microbatches", "T": "chunk"}
BLOCKS = "blocks"
TOGETHER, APART, SPMD = "together", "apart", "spmd"
TORCH = "torch"  # method and engine of the rows of PyTorch


class TorchSchedule(NamedTuple):
    """What a row of PyTorch runs.

    Attributes:
        takes: settings.
        name: the class in `torch.distributed.pipelining`, if it is one.
        chunks: stages of a process. Two lie as a V, so that the first process has the last stage.
    """

    takes: tuple[str, ...] = ()
    name: str = ""
    chunks: int = 1


_PIPELINE = ("stages", "microbatches")
TORCH_SCHEDULES = {
    "eager": TorchSchedule(),
    "compiled": TorchSchedule(),
    "ddp": TorchSchedule(("data",)),
    "gpipe": TorchSchedule(_PIPELINE, "ScheduleGPipe"),
    "1f1b": TorchSchedule(_PIPELINE, "Schedule1F1B"),
    "zero_bubble": TorchSchedule(_PIPELINE, "ScheduleInterleavedZeroBubble"),
    "zbv": TorchSchedule(_PIPELINE, "ScheduleZBVZeroBubble", 2),
    "dualpipe_v": TorchSchedule(_PIPELINE, "ScheduleDualPipeV", 2),
}


@dataclasses.dataclass(frozen=True, repr=False)
class Row:
    """One line of a table; its text is what `parse` reads."""

    method: str
    schedule: str
    stages: int = 1  # K
    data: int = 1  # D, replicas of every stage
    microbatches: int = 1  # M
    chunk: int = 1  # T, batches of a call
    place: str = ""  # TOGETHER: all stages on one device, in one call; APART: a call each
    engine: str = "mpmd"
    blocks: tuple[int, ...] = ()  # of every stage, where they are not equally many

    @cached_property
    def plan(self) -> Schedule:
        """The schedule of one batch."""
        return schedules.build(self.schedule, self.stages, self.microbatches)

    @property
    def groups(self) -> int:
        """Device groups of the stages."""
        return 1 if self.place else self.plan.num_device_groups

    @property
    def devices(self) -> int:
        """Devices that the row is made for."""
        return self.groups * self.data

    @property
    def reference(self) -> "Row":
        """The same method on one device, at its best: a stage and a microbatch.

        A delayed method keeps the number of its stages, because what it computes depends on it.
        """
        if self.plan.delayed and not self.plan.local and self.stages > 1:
            return Row(self.method, self.schedule, self.stages, place=TOGETHER)
        return Row(self.method, methods.get(self.method).route.schedules[0])

    @property
    def alone(self) -> "Row":
        """The row with which its calls are measured: on one device, a batch a call."""
        return dataclasses.replace(self, place=APART, chunk=1)

    def together(self) -> "Row":
        """The row where there is one device only."""
        fits = self.data == 1 and self.groups > 1
        return dataclasses.replace(self, place=TOGETHER) if fits else self

    def twin(self, rows: Sequence["Row"]) -> "Row | None":
        """That of the rows which computes the same by a call a batch, or on more devices."""
        plain = dataclasses.replace(self, chunk=1, engine="mpmd")
        wide = dataclasses.replace(self, place="")
        return next((row for row in (plain, wide) if row != self and row in rows), None)

    def check(self, modules: int, batch: int) -> None:
        """Raises ValueError if the net, of so many modules, or the batch does not fit."""
        if modules % self.stages and not self.blocks:
            raise ValueError(f"row '{self}': {modules} modules are no multiple of K")
        if self.blocks and sum(self.blocks) != modules:
            raise ValueError(f"row '{self}': {modules} modules are not the sum of the blocks")
        if batch % (self.microbatches * self.data):
            raise ValueError(f"row '{self}': --batch {batch} is no multiple of M x D")

    def ideal(self, batches: int) -> float:
        """Speed over one device, of a segment of equal blocks in which nothing else takes time."""
        if self.groups == 1:
            return float(self.data)
        own = self.blocks or (1,) * self.stages
        costs = Costs(forward=own, backward=own, weight=own)
        alone = batches * sum(own) * self.microbatches * 3
        return self.data * alone / simulate(self.plan, costs, batches=batches).makespan

    def simulated(
        self, replies: Sequence[dict], link: dict, batches: int, in_flight: int | None = None
    ) -> float:
        """Seconds of a segment of some batches over a link, from replies of `Run.costs`."""
        seconds = defaultdict(list)
        for reply in replies:
            for stage, kinds, time in reply["calls"]:
                seconds[stage, tuple(map(Kind, kinds))].append(time)
        costs = Costs(
            calls={key: self.chunk * statistics.median(times) for key, times in seconds.items()},
            message_bytes=[self.chunk * size for size in replies[0]["message_bytes"]],
            error_bytes=[self.chunk * size for size in replies[0]["error_bytes"]],
            hosts=[self.plan.device_group(stage) for stage in range(self.stages)],
            **link,
        )
        limit, chunks = in_flight or 2 * self.stages, -(-batches // self.chunk)
        return simulate(self.plan, costs, batches=chunks, max_in_flight=limit).makespan

    def options(self) -> dict[str, Any]:
        """The row's part of the options of `worker.Run`."""
        names = (
            "method",
            "schedule",
            "stages",
            "microbatches",
            "chunk",
            "data",
            "engine",
            "blocks",
        )
        fuse = False if self.place == APART else None
        return {name: getattr(self, name) for name in names} | {"groups": self.groups, "fuse": fuse}

    @property
    def usual(self) -> str:
        """The schedule that the text leaves out."""
        return methods.get(self.method).route.schedules[0]

    def __str__(self) -> str:
        usual = self.schedule == self.usual
        counts = [f"{key}={getattr(self, name)}" for key, name in COUNTS.items()]
        blocks = self.blocks and f"{BLOCKS}={'+'.join(map(str, self.blocks))}"
        words = [word for word in (blocks, self.place, SPMD * (self.engine == SPMD)) if word]
        head = self.method if usual else f"{self.method}:{self.schedule}"
        return ",".join([head, *(text for text in counts if not text.endswith("=1")), *words])

    __repr__ = __str__


@dataclasses.dataclass(frozen=True, repr=False)
class TorchRow(Row):
    """BP in PyTorch, a process a device."""

    method: str = TORCH
    schedule: str = "eager"
    engine: str = TORCH

    usual = "eager"

    @cached_property
    def plan(self) -> Schedule:
        """Ours that is like it."""
        name = "zb_h1" if self.schedule == "zero_bubble" else self.schedule
        return schedules.build(name, self.stages, self.microbatches)

    @property
    def groups(self) -> int:
        """A stage has a device, or two share one."""
        return self.stages // TORCH_SCHEDULES[self.schedule].chunks

    @property
    def reference(self) -> Row:
        """PyTorch on one device, eager."""
        return TorchRow()

    def twin(self, rows: Sequence[Row]) -> Row | None:
        """Nothing is compared to the last bit."""
        return None

    def check(self, modules: int, batch: int) -> None:
        """Raises ValueError if the net or the batch does not fit, or the schedule takes less."""
        super().check(modules, batch)
        takes, in_pipelining, chunks = TORCH_SCHEDULES[self.schedule]
        if other := [key for key, x in COUNTS.items() if getattr(self, x) > 1 and x not in takes]:
            raise ValueError(f"row '{self}': {self.schedule} takes no {other[0]}")
        if self.place:
            raise ValueError(f"row '{self}': PyTorch's rows take no {self.place}")
        if in_pipelining and (
            self.groups < 2 or self.stages % chunks or self.microbatches % self.stages
        ):
            raise ValueError(
                f"row '{self}': K of at least {2 * chunks} and a multiple of it as M are needed"
            )


BP = Row("bp", "sequential")


def parse(text: str) -> Row:
    """Reads a row, see `throughput.py`; raises ValueError for whatever is wrong with it."""
    head, *settings = text.split(",")
    method, _, schedule = head.partition(":")
    try:
        ours = method != TORCH
        allowed = methods.get(method).route.schedules if ours else tuple(TORCH_SCHEDULES)
        if schedule and schedule not in allowed:
            raise ValueError(f"method {method} runs on {', '.join(allowed)}, not on {schedule!r}")
        values: dict[str, Any] = {}
        for setting in settings:
            key, _, value = setting.partition("=")
            if setting in (TOGETHER, APART):
                values["place"] = setting
            elif setting == SPMD and ours:
                values["engine"] = SPMD
            elif key == BLOCKS and all(x.isdigit() and int(x) for x in value.split("+")):
                values["blocks"] = tuple(map(int, value.split("+")))
            elif key in COUNTS and value.isdigit() and int(value) >= 1:
                values[COUNTS[key]] = int(value)
            else:
                counts = "K=, D=, M=, T= with a count of at least 1"
                words = f"{BLOCKS}=7+13, {TOGETHER}, {APART}, {SPMD}"
                raise ValueError(f"{setting!r} is none of {counts}, {words}")
        row = (Row if ours else TorchRow)(method, schedule or allowed[0], **values)
        if row.place and row.data > 1:
            raise ValueError(f"{row.place} means one device, D is {row.data}")
        if row.blocks and (len(row.blocks) != row.stages or not ours):
            raise ValueError(f"{BLOCKS} of {len(row.blocks)} stages of ours, K is {row.stages}")
        _ = ours and row.plan
    except ValueError as error:
        raise ValueError(f"row {text!r}: {error}") from None
    return row


def with_references(rows: Sequence[Row]) -> list[Row]:
    """The rows, and before them what they are compared with: BP and themselves on one device."""
    pairs = [(row.reference, row) for row in rows]
    return list(dict.fromkeys([BP, *(row for pair in pairs for row in pair)]))
