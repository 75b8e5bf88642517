"""Runs a schedule: one compiled call for each run of actions, dispatched without waiting."""

import collections
import dataclasses
import itertools
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdecouple.pipeline.placement import Seat, transfer
from jdecouple.pipeline.waiting import Carried, pack, unpack
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
    ticks: jax.Array,
) -> dict[str, Any]:
    """What one stage does in consecutive actions, as a pure function.

    Args:
        stage: the stage.
        route: the route.
        kinds: the actions, in order.
        state: state of the stage. If it holds "since", batches before that one do not exist, and
            what an action on one of them would change stays as it is.
        accumulated: sums over the microbatches so far; None before the first.
        residuals: what the forward left, where that was an earlier call.
        message: from the stage below; None without a forward.
        cotangent: from the stage above; None without a backward, and on the last stage.
        ticks: [batch, microbatch] of every action; batch -1 does not exist.

    Returns:
        What changed: "state", "accumulated", "residuals", "message", "cotangent", "metrics".
    """
    out: dict[str, Any] = {}
    gradients: Any
    sums: Any
    gradients, sums = accumulated or (None, None)
    for number, kind in enumerate(kinds):
        tick = ticks[number]
        if kind is Kind.FORWARD:
            stats, metrics, residuals, out["message"] = route.forward(stage, state, message, tick)
            sums = add(sums, _if_exists(tick, state, metrics, dict.fromkeys(metrics, jnp.nan)))
            state = {**state, "stats": _if_exists(tick, state, stats, state["stats"])}
            out["state"] = {**out.get("state", {}), "stats": state["stats"]}
            out["residuals"] = residuals
        elif kind is Kind.BACKWARD:
            found, out["cotangent"] = route.backward(stage, state, residuals, cotangent, tick)
            gradients = add(gradients, found)
            out.pop("residuals", None)
        else:
            updated = stage.update(state, gradients)
            state = out["state"] = _if_exists(tick, state, updated, state)
            gradients = None
    if Kind.STEP in kinds:  # a forward after the step, of another batch, reports here too
        out["metrics"] = stage.mean(sums)
    else:
        out["accumulated"] = Accumulated(gradients, sums)
    if stage.is_last:
        out.pop("message", None)
    return out


def _if_exists(tick: jax.Array, state: StageState, new: Any, old: Any) -> Any:
    if "since" not in state:
        return new
    exists = tick[0] >= state["since"]
    return jax.tree.map(lambda new, old: jnp.where(exists, new, old), new, old)


@dataclasses.dataclass(frozen=True, eq=False)
class Executor:
    """Executes one schedule again and again on the seats of its stages.

    Attributes:
        stages: all stages, of all processes.
        seats: devices of each stage.
        route: what the actions mean.
        schedule: the actions of one batch.
        fuse: compile all stages into one call; they must share their devices.
        max_in_flight: batches that may be dispatched and unfinished.
    """

    stages: tuple[Stage, ...]
    seats: tuple[Seat, ...]
    route: Route
    schedule: Schedule
    fuse: bool
    max_in_flight: int
    _flying: collections.deque = dataclasses.field(default_factory=collections.deque)

    def run(
        self, states: tuple, batch: Sequence[Message | None], step: int, end: int | None = None
    ) -> tuple[tuple, tuple[Metrics | None, ...]]:
        """Dispatches one batch and returns at once, unless too many are in flight.

        Args:
            states: state of every stage; None for those of other processes. Donated.
            batch: one placed message a microbatch (None where stage 0 is elsewhere).
            step: number of the batch, from 0.
            end: number of the first batch that does not exist; by default none.

        Returns:
            The new states and the metrics of the stages that this process runs.
        """
        while len(self._flying) >= self.max_in_flight:
            jax.block_until_ready(self._flying.popleft())
        states, carried = unpack(self.schedule, states)
        taken = {
            kind: {key: carried[kind].pop(key) for key in sorted(carried[kind]) if key in keys}
            for kind, keys in self._needed.items()
        }
        arguments = states, taken, tuple(batch), self._ticks(step, end)
        if self.fuse:
            states, left, metrics = self._fused(*arguments)
        else:
            states, left, metrics = self._dispatch(self._calls, *arguments)
        left = {kind: carried[kind] | left[kind] for kind in carried}
        states = pack(self.schedule, states, left)
        self._flying.append([each["loss"] for each in metrics if each] + self._credits(metrics))
        return states, metrics

    def wait(self, states: Any) -> None:
        """Blocks until all that was dispatched has run."""
        jax.block_until_ready((states, list(self._flying)))
        self._flying.clear()

    @cached_property
    def _order(self) -> tuple[Call, ...]:
        return tuple(self.schedule.calls())

    @cached_property
    def _functions(self) -> dict[tuple[int, tuple[Kind, ...]], Any]:
        """The pure function of every (stage, kinds) that the schedule contains."""
        return {
            (call.stage, call.kinds): _bind(self.stages[call.stage], self.route, call.kinds)
            for call in self._order
        }

    @cached_property
    def _calls(self) -> dict[tuple[int, tuple[Kind, ...]], Any]:
        waits = self._size if self.schedule.overlapping else None
        return {
            (stage, kinds): _compile(function, self.seats[stage], kinds, waits)
            for (stage, kinds), function in self._functions.items()
            if self.seats[stage].mine
        }

    @cached_property
    def _fused(self) -> Any:
        def whole(states: tuple, taken: Carried, batch: tuple, ticks: jax.Array) -> tuple:
            states, left, metrics = self._dispatch(self._functions, states, taken, batch, ticks)
            seat = self.seats[0]
            lay = jax.lax.with_sharding_constraint
            left = jax.tree.map(lambda leaf: lay(leaf, seat.waiting(leaf, self._size)), left)
            return lay(states, seat.replicated), left, lay(metrics, seat.replicated)

        return jax.jit(whole, donate_argnums=(0, 1))

    @cached_property
    def _needed(self) -> dict[str, set]:
        """What the calls of an iteration take, by (stage, microbatch)."""
        forwards, backwards = set(), set()
        for stage, kinds, microbatches in self._order:
            forward, backward = _batches(kinds, microbatches)
            forwards.add((stage, forward))
            backwards.add((stage, backward))
        return {"messages": forwards, "residuals": backwards, "errors": backwards}

    @property
    def _size(self) -> int:
        """Examples in a microbatch."""
        return self.stages[0].message["label"].shape[0]

    def _ticks(self, step: int, end: int | None) -> np.ndarray:
        """[batch, microbatch] of every action, in the schedule's order."""
        parts = self.schedule.num_microbatches
        pairs = [divmod(action.microbatch, parts) for action in self.schedule.actions]
        ticks = np.array([(step + entered, part) for entered, part in pairs], np.int32)
        if end is not None:
            ticks[ticks[:, 0] >= end, 0] = -1
        return ticks

    def _dispatch(
        self,
        functions: dict,
        states: tuple,
        taken: Carried,
        batch: tuple[Message | None, ...],
        ticks: Any,
    ) -> tuple[tuple, Carried, tuple[Metrics | None, ...]]:
        """Goes through the schedule; also traced as a whole where the stages are fused.

        Returns:
            The new states, what no call has taken, and the metrics of the stages.
        """
        new_states = list(states)
        metrics: list[Metrics | None] = [None] * len(self.stages)
        accumulated: list[Accumulated | None] = [None] * len(self.stages)
        messages, residuals, errors = (
            dict(taken[kind]) for kind in ("messages", "residuals", "errors")
        )
        messages |= {(0, microbatch): part for microbatch, part in enumerate(batch)}
        first = 0
        for stage, kinds, microbatches in self._order:
            forward, backward = _batches(kinds, microbatches)
            out: dict[str, Any] = {}
            if self.seats[stage].mine:
                out = functions[stage, kinds](
                    new_states[stage],
                    accumulated[stage],
                    residuals.pop((stage, backward), None),
                    messages.pop((stage, forward), None),
                    errors.pop((stage, backward), None),
                    ticks[first : first + len(kinds)],
                )
                new_states[stage] = {**new_states[stage], **out.get("state", {})}
                accumulated[stage] = out.get("accumulated")
                metrics[stage] = out.get("metrics", metrics[stage])
                if "residuals" in out:
                    residuals[stage, forward] = out["residuals"]
            first += len(kinds)
            if forward is not None and stage + 1 < len(self.stages):
                messages[stage + 1, forward] = self._send(stage, stage + 1, out.get("message"))
            if backward is not None and stage > 0 and not self.route.local:
                errors[stage - 1, backward] = self._send(stage, stage - 1, out.get("cotangent"))
        left = {"messages": messages, "residuals": residuals, "errors": errors}
        return tuple(new_states), left, tuple(metrics)

    def _send(self, source: int, target: int, message: Any) -> Any:
        """Hands a message (or, downwards, an error) to a neighbouring stage."""
        if self.fuse:
            return message
        ends = self.seats[source], self.seats[target]
        if ends[0].whole and ends[1].whole:
            return transfer(message, None, *ends)
        shapes: Any = self.stages[max(source, target)].message
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


def _batches(kinds: tuple[Kind, ...], microbatches: tuple[int, ...]) -> tuple[Any, Any]:
    """Microbatches that a call takes forward and backward; None where it does not."""
    at = dict(zip(kinds, microbatches, strict=True))
    return at.get(Kind.FORWARD), at.get(Kind.BACKWARD)


def _bind(stage: Stage, route: Route, kinds: tuple[Kind, ...]) -> Any:
    def call(state, accumulated, residuals, message, cotangent, ticks):
        return run_actions(
            stage, route, kinds, state, accumulated, residuals, message, cotangent, ticks
        )

    call.__name__ = f"stage{stage.index}_" + "".join(kind.value for kind in kinds)
    return call


def _compile(function: Any, seat: Seat, kinds: tuple[Kind, ...], waits: int | None) -> Any:
    """Jits a call; donates what the call replaces.

    Args:
        function: the call.
        seat: where it runs.
        kinds: its actions.
        waits: examples in a microbatch, where residuals outlive the iteration.
    """
    lay = jax.lax.with_sharding_constraint

    def constrained(*arguments: Any) -> dict[str, Any]:
        out = function(*arguments)
        for name in out:
            if name == "message":
                out[name] = jax.tree.map(lambda leaf: lay(leaf, seat.sharding(leaf)), out[name])
            elif name == "cotangent":
                out[name] = lay(out[name], seat.batched)
            elif name != "residuals":
                out[name] = lay(out[name], seat.replicated)
            elif waits is not None:
                out[name] = jax.tree.map(
                    lambda leaf: lay(leaf, seat.waiting(leaf, waits)), out[name]
                )
        return out

    constrained.__name__ = function.__name__
    donated: tuple[int, ...] = (0,) if Kind.STEP in kinds else (1,)
    if Kind.STEP in kinds and kinds[-1] is Kind.FORWARD:
        donated = (0, 2)  # the new residuals take the place of the old
    return jax.jit(constrained, donate_argnums=donated)
