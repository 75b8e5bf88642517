"""The engine of a run: what its schedule is, where its stages lie, and what executes them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from jdecouple import schedules
from jdecouple.methods.routes import Carry, Route, Stage
from jdecouple.pipeline.mesh import StageDevices, assign_devices
from jdecouple.pipeline.mpmd.executor import Executor
from jdecouple.pipeline.mpmd.multi_step import MultiStep
from jdecouple.pipeline.spmd import executor as spmd
from jdecouple.schedules import Schedule

ENGINES = ("mpmd", "spmd", "auto")


class Engine(NamedTuple):
    """What runs the stages.

    Attributes:
        name: "mpmd" or "spmd".
        schedule: the actions of one batch.
        placements: devices of each stage.
        executor: runs one batch.
        chunks: runs several.
        fuse: whether all stages are one call.
        max_in_flight: batches, or chunks of them, that may be dispatched and unfinished.
    """

    name: str
    schedule: Schedule
    placements: tuple[StageDevices, ...]
    executor: Any
    chunks: Any
    fuse: bool
    max_in_flight: int


def make_engine(
    name: str,
    stages: tuple[Stage, ...],
    rows: Sequence[tuple[jax.Device, ...]],
    route: Route,
    *,
    schedule: str,
    fuse: bool | None,
    max_in_flight: int | None,
    carries: Sequence[Carry],
) -> Engine:
    """Chooses and builds the engine.

    Args:
        name: one of `ENGINES`.
        stages: all stages.
        rows: devices of the mesh, a row for every stage that has its own.
        route: how error reaches a block.
        schedule: the name of one of the route's, or "auto" for the first.
        fuse: whether all stages are one call; None where they share their devices.
        max_in_flight: None for 2K.
        carries: shapes of the carry that every block receives.

    Raises:
        ValueError: an engine or `fuse` that does not fit, with the reason.
    """
    if name not in ENGINES:
        raise ValueError(f"engine is {name!r}: allowed are {', '.join(ENGINES)}")
    placements = tuple(map(StageDevices.on, assign_devices(rows, len(stages))))
    layout = spmd.fitting(
        name,
        stages,
        placements,
        route,
        schedule=schedule,
        fuse=fuse,
        carries=carries,
    )
    if layout is not None:
        schedule = spmd.schedule_of(route)
    elif schedule == "auto":
        schedule = route.schedules[0]
    table = schedules.build(schedule, len(stages), stages[0].num_microbatches)
    devices = assign_devices(rows, table.num_device_groups)
    placements = tuple(StageDevices.on(devices[table.device_group(k)]) for k in range(len(stages)))
    together = all(placement.devices == placements[0].devices for placement in placements)
    if fuse and not together:
        raise ValueError("fuse=True needs all stages on the same devices")
    fuse = together if fuse is None else fuse
    limit = max_in_flight or 2 * len(stages)
    if layout is not None:
        program = spmd.SpmdExecutor(layout, route, table, limit)
        return Engine("spmd", table, placements, program, spmd.SpmdChunks(program), fuse, limit)
    executor = Executor(stages, placements, route, table, fuse, limit)
    return Engine("mpmd", table, placements, executor, MultiStep(executor), fuse, limit)
