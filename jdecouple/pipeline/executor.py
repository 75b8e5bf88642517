"""Runs a schedule: one compiled call for each run of actions, dispatched without waiting."""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdecouple.pipeline.placement import Seat, transfer
from jdecouple.routes import Accumulated, Message, Metrics, Route, Stage, StageState, add
from jdecouple.schedules import Call, Kind, Schedule


def run_actions(
    stage: Stage,
    route: Route,
    kinds: tuple[Kind, ...],
    state: StageState,
    accumulated: Accumulated | None,
    residuals: Any,
    message: Any,
    cotangent: Any,
    tick: jax.Array,
) -> dict[str, Any]:
    """What one stage does in consecutive actions on one microbatch, as a pure function.

    Args:
        stage: the stage.
        route: the route.
        kinds: the actions, in order.
        state: state of the stage.
        accumulated: sums over the microbatches so far; None before the first.
        residuals: what the forward left, where that was an earlier call.
        message: from the stage below; None without a forward.
        cotangent: from the stage above; None without a backward, and on the last stage.
        tick: [step, microbatch].

    Returns:
        What changed: "state", "accumulated", "residuals", "message", "cotangent", "metrics".
    """
    out: dict[str, Any] = {}
    gradients: Any
    sums: Any
    gradients, sums = accumulated or (None, None)
    for kind in kinds:
        if kind is Kind.FORWARD:
            message = stage.prepare(message, tick, True)
            stats, metrics, residuals, out["message"] = route.forward(stage, state, message, tick)
            sums = add(sums, metrics)
            out["state"] = {"stats": stats}
            out["residuals"] = residuals
            state = {**state, "stats": stats}
        elif kind is Kind.BACKWARD:
            found, out["cotangent"] = route.backward(residuals, cotangent)
            gradients = add(gradients, found)
            out.pop("residuals", None)
        else:
            state = out["state"] = stage.update(state, gradients)
            out["metrics"] = stage.mean(sums)
            gradients = sums = None
    if gradients is not None or sums is not None:
        out["accumulated"] = Accumulated(gradients, sums)
    if stage.is_last:
        out.pop("message", None)
    return out


@dataclasses.dataclass(frozen=True, eq=False)
class Executor:
    """Executes one schedule again and again on the seats of its stages.

    Attributes:
        stages: all stages, of all processes.
        seats: devices of each stage.
        route: what the actions mean.
        schedule: the actions of one batch.
        shapes: gives the `jax.ShapeDtypeStruct`s of the message that each stage receives;
            called only where messages cross processes.
        fuse: compile all stages into one call; they must share their devices.
        max_in_flight: batches that may be dispatched and unfinished.
    """

    stages: tuple[Stage, ...]
    seats: tuple[Seat, ...]
    route: Route
    schedule: Schedule
    shapes: Callable[[], tuple[Message, ...]]
    fuse: bool
    max_in_flight: int
    _flying: collections.deque = dataclasses.field(default_factory=collections.deque)

    def run(
        self, states: tuple, batch: Sequence[Message | None], step: int
    ) -> tuple[tuple, tuple[Metrics | None, ...]]:
        """Dispatches one batch and returns at once, unless too many are in flight.

        Args:
            states: state of every stage; None for those of other processes. Donated.
            batch: one placed message a microbatch (None where stage 0 is elsewhere).
            step: number of the batch, from 0.

        Returns:
            The new states and the metrics of the stages that this process runs.
        """
        while len(self._flying) >= self.max_in_flight:
            jax.block_until_ready(self._flying.popleft())
        if self.fuse:
            states, metrics = self._fused(states, tuple(batch), np.int32(step))
        else:
            states, metrics = self._dispatch(self._calls, states, batch, step)
        self._flying.append([each["loss"] for each in metrics if each] + self._credits(metrics))
        return states, metrics

    def wait(self, states: Any) -> None:
        """Blocks until all that was dispatched has run."""
        jax.block_until_ready((states, list(self._flying)))
        self._flying.clear()

    @cached_property
    def _functions(self) -> dict[tuple[int, tuple[Kind, ...]], Any]:
        """The pure function of every (stage, kinds) that the schedule contains."""
        return {
            (call.stage, call.kinds): _bind(self.stages[call.stage], self.route, call.kinds)
            for call in self._order
        }

    @cached_property
    def _order(self) -> tuple[Call, ...]:
        return tuple(self.schedule.calls())

    @cached_property
    def _calls(self) -> dict[tuple[int, tuple[Kind, ...]], Any]:
        return {
            (stage, kinds): _compile(function, self.seats[stage], kinds)
            for (stage, kinds), function in self._functions.items()
            if self.seats[stage].mine
        }

    @cached_property
    def _fused(self) -> Any:
        def whole(states: tuple, batch: tuple, step: jax.Array) -> tuple:
            return self._dispatch(self._functions, states, batch, step)

        replicated = self.seats[0].replicated
        return jax.jit(whole, donate_argnums=0, out_shardings=replicated)

    def _dispatch(
        self, functions: dict, states: tuple, batch: Sequence[Message | None], step: Any
    ) -> tuple[tuple, tuple[Metrics | None, ...]]:
        """Goes through the schedule; also traced as a whole where the stages are fused."""
        new_states = list(states)
        metrics: list[Metrics | None] = [None] * len(self.stages)
        accumulated: list[Accumulated | None] = [None] * len(self.stages)
        residuals: dict[tuple[int, int], Any] = {}
        forward = {(0, microbatch): part for microbatch, part in enumerate(batch)}
        backward: dict[tuple[int, int], Any] = {}
        for stage, kinds, microbatch in self._order:
            here = (stage, microbatch)
            out: dict[str, Any] = {}
            if self.seats[stage].mine:
                out = functions[stage, kinds](
                    new_states[stage],
                    accumulated[stage],
                    residuals.pop(here, None),
                    forward.pop(here, None),
                    backward.pop(here, None),
                    _tick(step, microbatch),
                )
                new_states[stage] = {**new_states[stage], **out.get("state", {})}
                accumulated[stage] = out.get("accumulated")
                metrics[stage] = out.get("metrics", metrics[stage])
                if "residuals" in out:
                    residuals[here] = out["residuals"]
            if Kind.FORWARD in kinds and stage + 1 < len(self.stages):
                forward[stage + 1, microbatch] = self._send(stage, stage + 1, out.get("message"))
            if Kind.BACKWARD in kinds and stage > 0 and not self.route.local:
                backward[stage - 1, microbatch] = self._send(stage, stage - 1, out.get("cotangent"))
        return tuple(new_states), tuple(metrics)

    def _send(self, source: int, target: int, message: Any) -> Any:
        """Hands a message (or, downwards, a cotangent) to a neighbouring stage."""
        if self.fuse:
            return message
        ends = self.seats[source], self.seats[target]
        if ends[0].whole and ends[1].whole:
            return transfer(message, None, *ends)
        shapes: Any = self.shapes()[max(source, target)]
        if target < source:
            shapes = shapes["x"]
        else:
            # Sums of losses stay in their process: its metrics cover its own stages.
            shapes = {name: leaf for name, leaf in shapes.items() if name != "loss"}
            message = message and {name: message[name] for name in shapes}
        return transfer(message, shapes, *ends)

    def _credits(self, metrics: Sequence[Metrics | None]) -> list[jax.Array]:
        """Scalars that other processes return once they have trained on this batch.

        A local stage gets nothing back from the stages above it; without these it would run
        ahead of a slower process without bound.
        """
        if not self.route.local:
            return []
        scalar = jax.ShapeDtypeStruct((), jnp.float32)
        received = []
        for stage, (below, above) in enumerate(itertools.pairwise(self.seats)):
            if not (below.whole and above.whole):
                mine = metrics[stage + 1]
                received.append(transfer(mine and mine["loss"], scalar, above, below))
        return [credit for credit in received if credit is not None]


def _tick(step: Any, microbatch: int) -> Any:
    if isinstance(step, jax.Array):  # traced, in the fused call
        return jnp.stack([step, np.int32(microbatch)])
    return np.array([step, microbatch], np.int32)


def _bind(stage: Stage, route: Route, kinds: tuple[Kind, ...]) -> Any:
    def call(state, accumulated, residuals, message, cotangent, tick):
        return run_actions(
            stage, route, kinds, state, accumulated, residuals, message, cotangent, tick
        )

    call.__name__ = f"stage{stage.index}_" + "".join(kind.value for kind in kinds)
    return call


def _compile(function: Any, seat: Seat, kinds: tuple[Kind, ...]) -> Any:
    """Jits a call; donates the state where a step replaces it, else the running sums."""

    def constrained(*arguments: Any) -> dict[str, Any]:
        out = function(*arguments)
        for name in out:
            if name == "message":
                out[name] = jax.tree.map(
                    lambda leaf: jax.lax.with_sharding_constraint(leaf, seat.sharding(leaf)),
                    out[name],
                )
            elif name == "cotangent":
                out[name] = jax.lax.with_sharding_constraint(out[name], seat.batched)
            elif name != "residuals":
                out[name] = jax.lax.with_sharding_constraint(out[name], seat.replicated)
        return out

    constrained.__name__ = function.__name__
    return jax.jit(constrained, donate_argnums=0 if Kind.STEP in kinds else 1)
