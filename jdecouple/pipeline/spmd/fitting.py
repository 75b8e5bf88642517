"""Which trainings the SPMD engine can run."""

from collections.abc import Sequence

from jdecouple.methods.routes import Carry, Local, Route, Stage, Synchronous
from jdecouple.pipeline.mesh import StageDevices
from jdecouple.pipeline.spmd.block_classes import block_classes
from jdecouple.pipeline.spmd.sharded_state import Layout


def schedule_of(route: Route) -> str:
    """Name of the schedule that the engine runs a route by."""
    return "local" if route.local else "gpipe"


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
    """The layout of a training that the engine can run, and is to run; else None.

    `engine`, `schedule` and `fuse` are the Trainer's arguments; `carries` are shapes of what every
    block receives. A ValueError says why "spmd" does not fit.
    """
    if engine == "mpmd" or (
        engine == "auto" and len({placement.devices for placement in placements}) == 1
    ):
        return None
    reason = _misfit(stages, placements, route, schedule, fuse)
    if not reason:
        units = [unit for stage in stages for unit in stage.units]
        classes, difference = block_classes(units, carries)
        if not difference:
            return Layout(stages, placements, classes)
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
    """Why a training does not fit, or None; blocks are not compared."""
    if not isinstance(route, Local | Synchronous):
        return "runs local and synchronous methods: given a delayed one"
    if schedule not in ("auto", schedule_of(route)):
        return f"runs the schedule {schedule_of(route)}: given {schedule!r}"
    if fuse is not None:
        return f"is always one call: given fuse={fuse}"
    if frozen := [unit.index for stage in stages for unit in stage.units if unit.frozen]:
        return f"trains all blocks: given frozen ones, {', '.join(map(str, frozen))}"
    remat = [stage.remat for stage in stages]
    if not route.local and len(set(remat)) > 1:
        return f"keeps the same of all stages of {schedule_of(route)}: given remat {remat}"
    if not all(placement.fully_addressable for placement in placements):
        return "needs all devices in one process"
    groups = list(dict.fromkeys(placement.devices for placement in placements))
    sizes = [len(group) for group in groups]
    if len(set(sizes)) > 1:
        return f"needs equally many replicas of every stage: given {', '.join(map(str, sizes))}"
    order = [groups.index(placement.devices) for placement in placements]
    devices = {device for group in groups for device in group}
    if len(devices) < sum(sizes) or order != sorted(order):
        return "needs a row of devices for every stage, or for consecutive stages"
    return None
