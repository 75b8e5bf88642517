"""What the stages hold between two iterations of a delayed schedule."""

from typing import Any

import jax
import jax.numpy as jnp

from jdecouple.routes import Route, Stage
from jdecouple.schedules import Schedule

Carried = dict[str, dict[tuple[int, int], Any]]
"""What waits for an action: "messages", "residuals", "errors", each by (stage, microbatch)."""


def shapes(schedule: Schedule, route: Route, stages: tuple[Stage, ...], index: int) -> Any:
    """Shapes of what one stage adds to its state, {} where nothing overlaps.

    Returns:
        "since" (number of the first batch after the stages were last empty), and "waiting": tuples,
        oldest first, of "messages", "residuals" and "errors".
    """
    if not schedule.overlapping:
        return {}
    stage, held = stages[index], schedule.waiting(index)
    found: dict[str, Any] = {"messages": stage.message, "residuals": None, "errors": None}
    if held.residuals:
        tick = jax.ShapeDtypeStruct((2,), jnp.int32)
        found["residuals"] = jax.eval_shape(
            lambda state, message, tick: route.forward(stage, state, message, tick)[2],
            jax.eval_shape(stage.initial),
            stage.message,
            tick,
        )
        found["errors"] = stages[index + 1].message["x"]
    return {
        "since": jax.ShapeDtypeStruct((), jnp.int32),
        "waiting": {
            kind: (found[kind],) * len(batches) for kind, batches in held._asdict().items()
        },
    }


def unpack(schedule: Schedule, states: tuple) -> tuple[tuple, Carried]:
    """Takes what waits out of the states of the stages."""
    carried: Carried = {"messages": {}, "residuals": {}, "errors": {}}
    cores = list(states)
    for stage, state in enumerate(states):
        if state is None or "waiting" not in state:
            continue
        cores[stage] = {key: value for key, value in state.items() if key != "waiting"}
        for kind, batches in schedule.waiting(stage)._asdict().items():
            for microbatch, value in zip(batches, state["waiting"][kind], strict=True):
                carried[kind][stage, microbatch] = value
    return tuple(cores), carried


def pack(schedule: Schedule, cores: tuple, carried: Carried) -> tuple:
    """Puts it back, an iteration older."""
    if not schedule.overlapping:
        return cores
    states = list(cores)
    for stage, core in enumerate(cores):
        if core is None:
            continue
        waiting = {
            kind: tuple(carried[kind][stage, microbatch + 1] for microbatch in batches)
            for kind, batches in schedule.waiting(stage)._asdict().items()
        }
        states[stage] = {**core, "waiting": waiting}
    return tuple(states)
