"""Which trainings the SPMD engine can run."""

from collections.abc import Sequence
from typing import Any

import jax

from jdecouple.methods.routes import Carry, Local, Route, Stage, Synchronous
from jdecouple.pipeline.spmd.block_classes import block_classes


def schedule_of(route: Route) -> str:
    """Name of the schedule that the engine runs a route by."""
    return "local" if route.local else "gpipe"


def fitting(
    engine: str,
    stages: tuple[Stage, ...],
    device_groups: Sequence[tuple[Any, ...]],
    route: Route,
    *,
    schedule: str,
    fuse: bool | None,
    carries: Sequence[Carry],
) -> tuple[int, ...] | None:
    """The class of every block in a training that the engine can run, and is to run; else None.

    `engine`, `schedule` and `fuse` are the Trainer's arguments; `device_groups` are the devices of
    every stage, `carries` shapes of what every block receives. A ValueError says why "spmd" does
    not fit.
    """
    if engine == "mpmd" or (engine == "auto" and len(set(device_groups)) == 1):
        return None
    reason = _misfit(stages, device_groups, route, schedule, fuse)
    if not reason:
        units = [unit for stage in stages for unit in stage.units]
        classes, difference = block_classes(units, carries)
        if not difference:
            return classes
        reason = f"needs equal blocks between the first and the last: {difference}"
    if engine == "spmd":
        raise ValueError(f"engine 'spmd' {reason}")
    return None


def _misfit(
    stages: tuple[Stage, ...],
    device_groups: Sequence[tuple[Any, ...]],
    route: Route,
    schedule: str,
    fuse: bool | None,
) -> str | None:
    """Why a training does not fit, or None; blocks are not compared."""
    if not isinstance(route, Local | Synchronous):
        return "runs local and synchronous methods: given a delayed one"
    if schedule not in ("auto", schedule_of(route)):
        return f"runs the schedule {schedule_of(route)}: given {schedule!r}"
    if (wire := stages[0].wire) is not None:
        return f"sends arrays as they are: given wire={wire!r}"
    if fuse is not None:
        return f"is always one call: given fuse={fuse}"
    if frozen := [unit.index for stage in stages for unit in stage.units if unit.frozen]:
        return f"trains all blocks: given frozen ones, {', '.join(map(str, frozen))}"
    if any(unit.follows for stage in stages for unit in stage.units):
        return "keeps the weights of blocks apart: given heads that follow those of the block above"
    if stages[0].ties:
        return f"gives every block weights of its own: given shared {stages[0].ties[0].name}"
    remat = [stage.remat for stage in stages]
    if not route.local and len(set(remat)) > 1:
        return f"keeps the same of all stages of {schedule_of(route)}: given remat {remat}"
    here = jax.process_index()
    if any(device.process_index != here for group in device_groups for device in group):
        return "needs all devices in one process"
    groups = list(dict.fromkeys(device_groups))
    sizes = [len(group) for group in groups]
    if len(set(sizes)) > 1:
        return f"needs equally many replicas of every stage: given {', '.join(map(str, sizes))}"
    order = [groups.index(group) for group in device_groups]
    devices = {device for group in groups for device in group}
    if len(devices) < sum(sizes) or order != sorted(order):
        return "needs a row of devices for every stage, or for consecutive stages"
    return None
