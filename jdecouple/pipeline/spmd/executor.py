"""The SPMD engine: a pipeline of equal blocks as one compiled program for several batches."""

import collections
import dataclasses
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jdecouple.methods.routes import Carry, Local, Route, Stage, StageState, Synchronous
from jdecouple.pipeline.mesh import StageDevices
from jdecouple.pipeline.spmd.block_classes import block_classes
from jdecouple.pipeline.spmd.entry import Entry
from jdecouple.pipeline.spmd.program import BATCHES, Program
from jdecouple.pipeline.spmd.sharded_state import Layout, ShardedState
from jdecouple.schedules import Call, Schedule


def schedule_of(route: Route) -> str:
    """Name of the schedule that the engine runs a route by."""
    return "local" if route.local else "gpipe"


@dataclasses.dataclass(frozen=True, eq=False)
class SpmdExecutor:
    """Trains on several batches in one call.

    Attributes:
        layout: the stages, their devices, and where the state of each block lies.
        route: local or synchronous.
        schedule: what the calls amount to, `local` or `gpipe`.
        max_in_flight: batches that may be dispatched and unfinished; two calls always may.
    """

    layout: Layout
    route: Route
    schedule: Schedule
    max_in_flight: int
    _flying: collections.deque = dataclasses.field(default_factory=collections.deque)

    @cached_property
    def program(self) -> Program:
        """What the rows run."""
        return Program(self.layout, self.route)

    def load(self, states: Sequence[StageState]) -> ShardedState:
        """Stacks the placed states of all stages, and takes their memory over."""
        return self.layout.stack(states)

    def put(self, *batches: Sequence[Carry]) -> tuple[Carry]:
        """Uploads batches to the first row at once; for the other rows there are zeros.

        Args:
            *batches: the microbatches of every batch, on the host or on devices.

        Returns:
            One carry whose leaves are [T, M, batch, ...] on every row.
        """
        parts = [part for each in batches for part in each]
        return (jax.tree.map(lambda *leaves: self._place(leaves, len(batches)), *parts),)

    def run(
        self, states: ShardedState, batches: Sequence[Carry], step: int
    ) -> tuple[ShardedState, list[dict[str, Entry]]]:
        """Dispatches one call and returns at once, unless too many batches are in flight.

        Args:
            states: states of all stages; donated.
            batches: what calls of `put` returned, one after another.
            step: number of the first batch, from 0.

        Returns:
            The new states, and the metrics of every batch.
        """
        count = sum(batch["label"].shape[0] for batch in batches) // len(self.layout.rows)
        while len(self._flying) > 1 and self._in_flight + count > self.max_in_flight:
            jax.block_until_ready(self._flying.popleft()[1])
        arrays, table = self.program.call(states.arrays, tuple(batches), np.int32(step))
        self._flying.append((count, table))
        columns = self.program.columns.items()
        metrics = [
            {name: Entry(table, (row * count + number, column)) for name, (row, column) in columns}
            for number in range(count)
        ]
        return ShardedState(self.layout, arrays), metrics

    def measure(self, states: Any, batch: Any, step: int) -> NoReturn:
        """Refuses to time stages that are compiled into one program."""
        del states, batch, step
        raise ValueError("engine 'spmd' has no calls of single stages: measuring needs 'mpmd'")

    def wait(self, states: Any) -> None:
        """Blocks until all that was dispatched has run."""
        jax.block_until_ready((states, [table for _, table in self._flying]))
        self._flying.clear()

    @property
    def order(self) -> tuple[Call, ...]:
        """The schedule's calls, all of which are in the one."""
        return tuple(self.schedule.calls())

    @property
    def _in_flight(self) -> int:
        return sum(count for count, _ in self._flying)

    @cached_property
    def _zeros(self) -> dict[tuple, jax.Array]:
        """What batches are on rows that do not read them, by device, shape and dtype."""
        return {}

    def _place(self, leaves: Sequence[Any], count: int) -> jax.Array:
        here = all(isinstance(leaf, np.ndarray) for leaf in leaves)
        stacked = np.stack(leaves) if here else jnp.stack(leaves)
        stacked = stacked.reshape(count, -1, *stacked.shape[1:])
        mesh = self.layout.mesh
        placement = self.layout.placements[0]
        target = NamedSharding(placement.batched.mesh, PartitionSpec(None, *BATCHES[1:]))
        first = jax.device_put(stacked, target)
        pieces = {shard.device: shard.data for shard in first.addressable_shards}
        some = pieces[placement.devices[0]]
        for device in mesh.devices[1:].flat:
            key = device, some.shape, some.dtype
            if key not in self._zeros:
                self._zeros[key] = jax.device_put(np.zeros(some.shape, some.dtype), device)
            pieces[device] = self._zeros[key]
        return jax.make_array_from_single_device_arrays(
            (len(mesh.devices) * count, *first.shape[1:]),
            NamedSharding(mesh, BATCHES),
            [pieces[device] for device in mesh.devices.flat],
        )


@dataclasses.dataclass(frozen=True)
class SpmdChunks:
    """Several batches for the engine, as `MultiStep` has them for calls of single stages.

    Attributes:
        executor: the engine.
        possible: whether the stages can go through several batches without one another.
    """

    executor: SpmdExecutor
    possible: bool = True

    def stack(self, batches: Sequence[Sequence[Carry]]) -> tuple[Carry, ...]:
        """Uploads the microbatches of T batches at once; what is on the rows already stays there.

        Args:
            batches: of every batch the microbatches, or what the engine's `put` returned.
        """
        if not any(map(self._placed, batches)):
            return self.executor.put(*batches)
        return tuple(
            carry
            for batch in batches
            for carry in (batch if self._placed(batch) else self.executor.put(batch))
        )

    def run(
        self, states: ShardedState, parts: Sequence[Carry], step: int, count: int, apart: bool
    ) -> tuple[ShardedState, tuple[Any, ...]]:
        """Dispatches T batches, as `MultiStep.run`."""
        states, metrics = self.executor.run(states, parts, step)
        if apart:
            return states, (metrics,)
        return states, ({name: entry.column(count) for name, entry in metrics[0].items()},)

    def _placed(self, batch: Sequence[Carry]) -> bool:
        sharding = getattr(batch[0]["label"], "sharding", None)
        return sharding == NamedSharding(self.executor.layout.mesh, BATCHES)


def fitting(
    engine: str,
    stages: tuple[Stage, ...],
    placements: tuple[StageDevices, ...],
    route: Route,
    *,
    schedule: str,
    fuse: bool | None,
    carries: Sequence[Carry],
) -> Layout | None:
    """The layout of a training that the engine can run, and is to run.

    Args:
        engine: one of `ENGINES`.
        stages: all stages.
        placements: devices of each stage.
        route: how error reaches the blocks.
        schedule: name of the schedule, or "auto".
        fuse: the Trainer's option.
        carries: shapes of the carry that every block receives.

    Returns:
        None where the stages are to be compiled one by one.

    Raises:
        ValueError: an unknown engine, or "spmd" where it does not fit, with the reason.
    """
    if engine == "mpmd" or (
        engine == "auto" and len({placement.devices for placement in placements}) == 1
    ):
        return None
    reason = _misfit(stages, placements, route, schedule, fuse)
    if not reason:
        units = [unit for stage in stages for unit in stage.units]
        found, difference = block_classes(units, carries)
        if not difference:
            return Layout(stages, placements, found)
        reason = f"needs equal blocks between the first and the last: {difference}"
    if engine == "spmd":
        raise ValueError(f"engine 'spmd' {reason}")
    return None


def _misfit(
    stages: tuple[Stage, ...],
    placements: tuple[StageDevices, ...],
    route: Route,
    schedule: str,
    fuse: bool | None,
) -> str | None:
    if not isinstance(route, Local | Synchronous):
        return "runs local and synchronous methods: given a delayed one"
    if schedule not in ("auto", schedule_of(route)):
        return f"runs the schedule {schedule_of(route)}: given {schedule!r}"
    if fuse is not None:
        return f"is always one call: given fuse={fuse}"
    remat = [stage.remat for stage in stages]
    if not route.local and len(set(remat)) > 1:
        return (
            f"repeats the forwards of all stages of {schedule_of(route)} or of none: given {remat}"
        )
    if not all(placement.fully_addressable for placement in placements):
        return "needs all devices in one process"
    rows = list(dict.fromkeys(placement.devices for placement in placements))
    sizes = [len(row) for row in rows]
    if len(set(sizes)) > 1:
        return f"needs equally many replicas of every stage: given {', '.join(map(str, sizes))}"
    order = [rows.index(placement.devices) for placement in placements]
    if len({device for row in rows for device in row}) < sum(sizes) or order != sorted(order):
        return "needs a row of devices for every stage, or for consecutive stages"
    return None
