"""The engine of a run: what its schedule is, where its stages lie, and what executes them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from jdecouple import schedules
from jdecouple.pipeline import spmd
from jdecouple.pipeline.chunk import Chunks
from jdecouple.pipeline.executor import Executor
from jdecouple.pipeline.placement import Seat, spread
from jdecouple.routes import Message, Route, Stage
from jdecouple.schedules import Schedule


class Engine(NamedTuple):
    """What runs the stages.

    Attributes:
        name: "mpmd" or "spmd".
        schedule: the actions of one batch.
        seats: devices of each stage.
        executor: runs one batch.
        chunks: runs several.
        fuse: whether all stages are one call.
        max_in_flight: batches, or chunks of them, that may be dispatched and unfinished.
    """

    name: str
    schedule: Schedule
    seats: tuple[Seat, ...]
    executor: Any
    chunks: Any
    fuse: bool
    max_in_flight: int


def start(
    name: str,
    stages: tuple[Stage, ...],
    rows: Sequence[tuple[jax.Device, ...]],
    route: Route,
    *,
    schedule: str,
    fuse: bool | None,
    max_in_flight: int | None,
    messages: Sequence[Message],
) -> Engine:
    """Chooses and builds the engine.

    Args:
        name: one of `spmd.ENGINES`.
        stages: all stages.
        rows: devices of the mesh, a row for every stage that has its own.
        route: how error reaches a block.
        schedule: the name of one of the route's, or "auto" for the first.
        fuse: whether all stages are one call; None where they share their devices.
        max_in_flight: None for 2K.
        messages: shapes of the message that every block receives.

    Raises:
        ValueError: an engine or `fuse` that does not fit, with the reason.
    """
    seats = tuple(map(Seat.on, spread(rows, len(stages))))
    layout = spmd.fitting(
        name,
        stages,
        seats,
        route,
        schedule=schedule,
        fuse=fuse,
        messages=messages,
    )
    if layout is not None:
        schedule = spmd.schedule_of(route)
    elif schedule == "auto":
        schedule = route.schedules[0]
    table = schedules.build(schedule, len(stages), stages[0].num_microbatches)
    devices = spread(rows, table.num_rows)
    seats = tuple(Seat.on(devices[table.row(k)]) for k in range(len(stages)))
    together = all(seat.devices == seats[0].devices for seat in seats)
    if fuse and not together:
        raise ValueError("fuse=True needs all stages on the same devices")
    fuse = together if fuse is None else fuse
    limit = max_in_flight or 2 * len(stages)
    if layout is not None:
        program = spmd.SpmdExecutor(layout, route, table, limit)
        return Engine("spmd", table, seats, program, spmd.SpmdChunks(program), fuse, limit)
    executor = Executor(stages, seats, route, table, fuse, limit)
    return Engine("mpmd", table, seats, executor, Chunks(executor), fuse, limit)
