"""The engine of a run: what its schedule is, where its stages lie, and what executes them."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import jax

from jdecouple import schedules
from jdecouple._errors import choices, require_bool, require_int, require_one_of
from jdecouple.methods import Method
from jdecouple.methods.routes import Carry, Route, Stage
from jdecouple.pipeline.batch import PlacedBatch
from jdecouple.pipeline.mesh import StageDevices, StageMesh, assign_devices, device_groups
from jdecouple.pipeline.mpmd.engine import MpmdEngine
from jdecouple.pipeline.mpmd.executor import Executor
from jdecouple.pipeline.mpmd.stage_fns import calls_of
from jdecouple.pipeline.replicas import on_replicas
from jdecouple.pipeline.spmd.engine import SpmdEngine
from jdecouple.pipeline.spmd.fitting import fitting, schedule_of
from jdecouple.pipeline.spmd.sharded_state import Layout
from jdecouple.pipeline.step_metrics import StepMetrics
from jdecouple.schedules import Call, Schedule

ENGINES = ("mpmd", "spmd", "auto")


class Engine(Protocol):
    """What runs the stages.

    The states are a sequence with one entry a stage, None for the stages of other processes; what
    `load` or `run` returned belongs to the engine that returned it.

    Attributes:
        name: "mpmd" or "spmd".
        schedule: the actions of one batch.
        placements: devices of each stage.
        calls: the calls of a batch in the order of dispatch.
        fuse: whether all stages are one call.
        max_in_flight: batches, or lists of them, that may be dispatched and unfinished.
    """

    name: str
    schedule: Schedule
    placements: tuple[StageDevices, ...]
    calls: tuple[Call, ...]
    fuse: bool
    max_in_flight: int

    def load(self, states: Iterable[Any]) -> Sequence[Any]:
        """Puts the states of all stages, one after another, on their devices."""

    def put(
        self, batches: Sequence[Sequence[Carry] | PlacedBatch], count: int | None = None
    ) -> PlacedBatch:
        """Uploads the microbatches of `count` batches, or takes what `put` returned for one.

        A `count` of None says that the batch was given alone, not in a list.
        """

    def run(
        self, states: Any, batch: PlacedBatch, step: int, since: int = 0, end: int | None = None
    ) -> tuple[Sequence[Any], StepMetrics]:
        """Trains on what `put` returned; returns at once, unless too much is in flight.

        Args:
            states: states of all stages; donated.
            batch: one batch or several.
            step: number of the first, from 0.
            since: number of the first batch in the stages.
            end: number of the first batch that does not exist; None if there is none.

        Returns:
            The new states; the metrics of this process's stages, scalars or arrays [T], nan where
            they would be of a batch before `since`.
        """

    def measure(
        self, states: Any, batch: PlacedBatch, step: int
    ) -> tuple[Sequence[Any], list[tuple[Call, float]]]:
        """Trains on one batch, waiting for every call; gives each with its seconds.

        Raises:
            ValueError: the stages have no calls of their own.
        """

    def measure_memory(
        self, states: Any, batch: PlacedBatch, step: int
    ) -> tuple[Sequence[Any], dict[jax.Device, int]]:
        """Trains on one batch, waiting for every call; gives the most bytes of each device.

        Raises:
            ValueError: stages in several processes.
        """

    def wait(self, states: Any) -> None:
        """Blocks until all that was dispatched has run."""


class EngineDesign(NamedTuple):
    """Which engine runs a training; nothing is placed yet.

    Attributes:
        name: "mpmd" or "spmd".
        schedule: the actions of one batch.
        calls: the calls of a batch in the order of dispatch.
        device_groups: devices of each stage.
        fuse: whether all stages are one call.
        max_in_flight: batches, or lists of them, that may be dispatched and unfinished.
        block_classes: of engine "spmd", the class of every block; else None.
        shard_optimizer: whether every replica holds a part of the optimiser's state alone.
    """

    name: str
    schedule: Schedule
    calls: tuple[Call, ...]
    device_groups: tuple[tuple[Any, ...], ...]
    fuse: bool
    max_in_flight: int
    block_classes: tuple[int, ...] | None
    shard_optimizer: bool


def design_engine(
    name: str,
    stages: tuple[Stage, ...],
    mesh: StageMesh,
    method: Method,
    schedule: str,
    fuse: bool | None,
    max_in_flight: int | None,
    carries: Sequence[Carry],
    shard_optimizer: bool,
) -> EngineDesign:
    """Chooses the engine; ValueError for an argument that does not fit.

    `name`, `schedule`, `fuse`, `max_in_flight` and `shard_optimizer` are the Trainer's arguments;
    `carries` are shapes of what every block receives.
    """
    route, num_stages = method.route, len(stages)
    if schedule != "auto" and schedule not in route.schedules:
        allowed = choices(schedule, ("auto", *route.schedules))
        raise ValueError(f"schedule {schedule!r} does not fit method {method.name}: {allowed}")
    require_one_of(ENGINES, engine=name)
    require_bool(shard_optimizer=shard_optimizer)
    limit = 2 * num_stages if max_in_flight is None else max_in_flight
    require_int(1, max_in_flight=limit)
    if not isinstance(fuse, bool | None):
        raise ValueError(f"fuse is {fuse!r}: True, False or None is needed")
    groups = assign_devices(mesh.device_groups, num_stages)
    classes = fitting(name, stages, groups, route, schedule=schedule, fuse=fuse, carries=carries)
    if classes is not None:
        schedule = schedule_of(route)
    elif schedule == "auto":
        schedule = route.schedules[0]
    table = schedules.build(schedule, num_stages, stages[0].num_microbatches)
    if table.overlapping and any(stage.follows_above for stage in stages):
        raise ValueError(
            f"schedule {schedule!r} has stages at different batches, but method {method.name} "
            "follows the weights of the stage above batch by batch: allowed is 'local'"
        )
    groups = device_groups(table, mesh)
    together = all(devices == groups[0] for devices in groups)
    if fuse and not together:
        raise ValueError("fuse=True needs all stages on the same devices")
    if classes is not None:
        calls = tuple(table.calls())
        return EngineDesign("spmd", table, calls, groups, together, limit, classes, shard_optimizer)
    calls = calls_of(table, stages[0].needs_norm)
    fuse = together if fuse is None else fuse
    return EngineDesign("mpmd", table, calls, groups, fuse, limit, None, shard_optimizer)


def make_engine(design: EngineDesign, stages: tuple[Stage, ...], route: Route) -> Engine:
    """Builds the engine that a design has chosen, on devices that are there."""
    _, table, _, groups, fuse, limit, classes, shards = design
    placements = tuple(StageDevices.on(devices, shards) for devices in groups)
    named = classes is None  # one program has a mesh of its own
    stages = tuple(
        dataclasses.replace(stage, optimizer=on_replicas(stage.optimizer, placement, named))
        for stage, placement in zip(stages, placements, strict=True)
    )
    if classes is not None:
        return SpmdEngine(Layout(stages, placements, classes), route, table, fuse, limit)
    return MpmdEngine(Executor(stages, placements, route, table, fuse), limit)
