"""Runs a schedule: one compiled call for each run of actions, dispatched without waiting."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from jdecouple.methods.routes import Accumulated, Carry, Route, Stage
from jdecouple.methods.routes.stage import error_shapes
from jdecouple.pipeline.memory import Meter
from jdecouple.pipeline.mesh import StageDevices, jit, require_one_process
from jdecouple.pipeline.mpmd.flat_state import FlatLayout
from jdecouple.pipeline.mpmd.following import Following, followings
from jdecouple.pipeline.mpmd.messages import Message, Messages, opened
from jdecouple.pipeline.mpmd.stage_fns import (
    calls_of,
    compile_stage_fn,
    make_norm_fn,
    make_stage_fn,
    microbatches_of,
    with_messages,
    with_taken,
)
from jdecouple.pipeline.mpmd.step_ids import NEXT_BATCH, PlacedIds, by_call, step_ids
from jdecouple.pipeline.mpmd.tied_steps import TiedSteps
from jdecouple.pipeline.state import Queues, put_queues, take_queues
from jdecouple.pipeline.step_metrics import JoinedMetrics
from jdecouple.pipeline.transfer import crosses, transfer
from jdecouple.schedules import Call, Kind, Schedule

Calls = dict[tuple[int, Any], Callable]
"""The function of every (stage, kinds) that a schedule contains; kinds are () for a norm.

Others are those of `jdecouple.pipeline.mpmd.following`; those for what stages share have the number
of the stage that steps it in the place of kinds.
"""


@dataclasses.dataclass(frozen=True, eq=False)
class Executor:
    """Runs one schedule again and again on the devices of its stages.

    Some stages may be in other processes. With `fuse` all are compiled into one call: they must
    share their devices. Compiled calls take and give states as `layout` has them.
    """

    stages: tuple[Stage, ...]
    placements: tuple[StageDevices, ...]
    route: Route
    schedule: Schedule
    fuse: bool

    def run(
        self, states: Sequence[Any], parts: Sequence[Carry | None], step: int, end: int | None
    ) -> tuple[tuple, tuple[JoinedMetrics | None, ...]]:
        """Dispatches batch `step`, given as one placed carry a microbatch.

        Batches from `end` on do not exist. The states are donated; those of other processes are
        None, as is a carry where stage 0 is elsewhere. Returns the new states, and the metrics of
        the stages that this process runs.
        """
        dispatch = self._fused
        if not self.fuse:
            dispatch = functools.partial(self.dispatch, self.calls, self._compiled)
        ids = self._ids.take(step, end)
        new_states, metrics, next_ids = self.iterate(dispatch, states, parts, ids)
        self._ids.keep(step + 1, end, next_ids)
        return new_states, metrics

    def run_stage(
        self, stage: int, states: Sequence[Any], carries: Sequence[Carry], step: int
    ) -> tuple[tuple, list[Carry], JoinedMetrics]:
        """As `run`, of one stage of a local method alone, given a carry a microbatch.

        Returns the new states, the carries for the stage above, [] from the last, and metrics.
        """
        taken: Queues = {"carries": {}, "residuals": {}, "errors": {}}
        taken["carries"] = {(stage, number): carry for number, carry in enumerate(carries)}
        calls = tuple(call for call in self.calls if call.stage == stage)
        ids = self._ids.of(calls, step)
        states, left, metrics, _ = self.dispatch(
            calls, self._compiled, tuple(states), taken, (), ids
        )
        return states, [left["carries"][key] for key in sorted(left["carries"])], metrics[stage]

    def measure(
        self, states: Sequence[Any], parts: Sequence[Carry | None], step: int
    ) -> tuple[tuple, list[tuple[Call, float]]]:
        """As `run`, but waits for every call before the next; gives each with its seconds."""
        require_one_process(self.placements)
        if self.fuse:
            raise ValueError("the stages are fused into one call: measuring needs fuse=False")
        seconds: list[tuple[Call, float]] = []
        calls = iter(self.calls)

        def timed(function: Callable) -> Callable:
            def call(*arguments: Any) -> Any:
                jax.block_until_ready(arguments)
                start = time.perf_counter()
                out = jax.block_until_ready(function(*arguments))
                seconds.append((next(calls), time.perf_counter() - start))
                return out

            return call

        scheduled = {(call.stage, call.kinds) for call in self.calls}
        functions = {
            key: timed(call) if key in scheduled else call for key, call in self._compiled.items()
        }
        dispatch = functools.partial(self.dispatch, self.calls, functions)
        states, *_ = self.iterate(dispatch, states, parts, self._ids.of(self.calls, step))
        return states, seconds

    def measure_memory(
        self, states: Sequence[Any], parts: Sequence[Carry | None], step: int
    ) -> tuple[tuple, dict[jax.Device, int]]:
        """As `run`, but waits for every call before the next; gives the most bytes of a device."""
        meter = Meter(self.placements, (states, parts))
        dispatch = meter.watch(self._fused, self.placements[0])
        if not self.fuse:
            functions = {
                key: meter.watch(call, self.placements[key[0]])
                for key, call in self._compiled.items()
            }
            dispatch = functools.partial(self.dispatch, self.calls, functions)
        states, *_ = self.iterate(dispatch, states, parts, self._ids.of(self.calls, step))
        return states, meter.most

    def iterate(
        self,
        dispatch: Callable,
        states: Sequence[Any],
        parts: Sequence[Carry | None],
        ids: Any,
    ) -> tuple[tuple, tuple[Any, ...], Any]:
        """Gives `dispatch` what one iteration takes from the queues, and queues what it leaves.

        Returns the new states, metrics, and the numbers of the next iteration.
        """
        cores, queues = take_queues(self.schedule, tuple(states))
        taken = {
            kind: {key: queues[kind].pop(key) for key in sorted(queues[kind]) if key in keys}
            for kind, keys in self._taken.items()
        }
        cores, left, metrics, next_ids = dispatch(cores, taken, tuple(parts), ids)
        queues = {kind: queues[kind] | left[kind] for kind in queues}
        return put_queues(self.schedule, cores, queues), metrics, next_ids

    def dispatch(
        self,
        calls: Sequence[Call],
        functions: Calls,
        states: tuple,
        taken: Queues,
        parts: tuple[Carry | None, ...],
        ids: Sequence[Any],
    ) -> tuple[tuple, Queues, tuple[Any, ...], list[Any]]:
        """Goes through calls in order; also traced as a whole where the stages are fused.

        `ids` are the numbers of every call. Returns the new states, what no call has taken, the
        metrics of the stages, and the numbers that compiled calls give for the next batch.
        """
        new_states = list(states)
        metrics: list[Any] = [None] * len(self.stages)
        accumulated: list[Accumulated | None] = [None] * len(self.stages)
        carries, residuals, errors = (
            dict(taken[kind]) for kind in ("carries", "residuals", "errors")
        )
        carries |= {(0, microbatch): part for microbatch, part in enumerate(parts)}
        norms: list[Any] | None = None
        given = [each.give(functions, states) for each in self._followings]
        tied: list[Any] = [None] * len(self.stages)
        received: dict[int, list[Any]] = {}
        next_ids: list[Any] = []
        for (stage, kinds, microbatches), own_ids in zip(calls, ids, strict=True):
            forward, backward, takes, leaves = microbatches_of(kinds, microbatches)
            out: dict[str, Any] = {}
            if self._needs_norm and Kind.STEP in kinds and norms is None:
                norms = self._norms(functions, accumulated, received)
            if self.placements[stage].addressable:
                held = residuals.get((stage, takes)) if self.schedule.splits else None
                out = functions[stage, kinds](
                    new_states[stage],
                    accumulated[stage],
                    residuals.pop((stage, takes), None),
                    opened(carries.pop((stage, forward), None)),
                    opened(errors.pop((stage, backward), None)),
                    own_ids,
                    norms and norms[stage],
                )
                new_states[stage] = {**new_states[stage], **out.get("state", {})}
                accumulated[stage] = out.get("accumulated")
                metrics[stage] = out.get("metrics", metrics[stage])
                tied[stage] = out.get("tied", tied[stage])
                if "residuals" in out:
                    residuals[stage, leaves] = with_taken(out["residuals"], held)
                del held
            next_ids.append(out.get("ids"))
            if forward is not None and stage + 1 < len(self.stages):
                carries[stage + 1, forward] = self._send(stage, stage + 1, out.get("carry"))
            if backward is not None and stage > 0 and not self.route.local:
                errors[stage - 1, backward] = self._send(stage, stage - 1, out.get("cotangent"))
        for following, arrays in zip(self._followings, given, strict=True):
            following.follow(functions, arrays, new_states)
        if self._tied.owners:
            ran = {call.stage for call in calls}
            self._tied.finish(functions, new_states, tied, received, norms, ran)
        # Calls of a device wait for one another: nothing that is still on its way may come between.
        carries, errors = ({x: opened(y) for x, y in held.items()} for held in (carries, errors))
        left = {"carries": carries, "residuals": residuals, "errors": errors}
        return tuple(new_states), left, tuple(metrics), next_ids

    def step_ids(self, calls: Sequence[Call], step: Any) -> Any:
        """[batch, microbatch] of every action of some calls; `step` may be traced."""
        return step_ids(calls, self.schedule.num_microbatches, step)

    @cached_property
    def _ids(self) -> PlacedIds:
        return PlacedIds(self.calls, self.schedule.num_microbatches, self.placements, self.fuse)

    # --- The calls, and their functions -----------------------------------------------------------

    @cached_property
    def calls(self) -> tuple[Call, ...]:
        """The calls of one batch in the order of dispatch."""
        return calls_of(self.schedule, self._needs_norm)

    @property
    def size(self) -> int:
        """Examples in a microbatch."""
        return self.stages[0].carry["label"].shape[0]

    @cached_property
    def layout(self) -> FlatLayout:
        """How the states lie."""
        return FlatLayout(self.stages, self.placements, last_first=not self.route.local)

    @cached_property
    def _followings(self) -> tuple[Following, ...]:
        return followings(self.stages, self.placements, self.fuse)

    @cached_property
    def functions(self) -> Calls:
        """Pure functions of the calls, which take and give carries and errors as they are."""
        calls = {key: self._with_messages(key, x) for key, x in self._stage_functions.items()}
        for following in self._followings:
            calls |= following.functions
        return calls

    @cached_property
    def message_functions(self) -> Calls:
        """Pure functions of the calls, to and from which messages cross processes."""
        return {
            key: self._with_messages(
                key,
                function,
                *self._messages.packed[key[0] : key[0] + 2],
                unpacks=not self.schedule.overlapping,
            )
            for key, function in self._stage_functions.items()
        }

    @cached_property
    def _stage_functions(self) -> Calls:
        functions: Calls = {
            (stage, kinds): make_stage_fn(
                self.stages[stage], self.route, kinds, self.schedule.splits
            )
            for stage, kinds, _ in self.calls
        }
        if self._needs_norm:
            functions |= {(stage.index, ()): make_norm_fn(stage) for stage in self.stages}
        return functions | self._tied.functions

    def _with_messages(self, key: tuple, function: Callable, *packed: Any, **options: Any) -> Any:
        stage, kinds = key
        if not isinstance(kinds, tuple) or not kinds:
            return function
        return with_messages(function, self.stages[stage], kinds, *packed, **options)

    @cached_property
    def _compiled(self) -> Calls:
        """The functions of this process's stages, jitted."""
        queued = self.size if self.schedule.overlapping else None
        compiled = {}
        for (stage, kinds), function in self.message_functions.items():
            placement = self.placements[stage]
            if placement.addressable and isinstance(kinds, tuple):
                if kinds:
                    function = self.layout.on_flat(stage, function)
                single = self.single_metrics(stage)
                compiled[stage, kinds] = compile_stage_fn(
                    function, placement, kinds, queued, single
                )
        for following in self._followings:
            compiled |= following.compiled(self.layout)
        return compiled | self._tied.compiled(self.layout)

    @cached_property
    def _fused(self) -> Callable:
        """All calls of an iteration as one, jitted."""

        def iteration(given: tuple, taken: Queues, parts: tuple, ids: jax.Array) -> tuple:
            trees, own_ids = self.layout.trees(given), by_call(self.calls, ids)
            states, left, metrics, _ = self.dispatch(
                self.calls, self.functions, trees, taken, parts, own_ids
            )
            placement = self.placements[0]
            constrain = jax.lax.with_sharding_constraint
            flat = self.layout.flats(given, states)
            return (
                constrain(flat, tuple(placement.state_shardings(x, 1) for x in flat)),
                placement.constrain_queue(left, self.size),
                constrain(tuple(map(JoinedMetrics.of, metrics)), placement.replicated),
                constrain(ids + NEXT_BATCH, placement.replicated),
            )

        return jit(iteration, self.placements[0], donate_argnums=(0, 1, 3))

    @cached_property
    def _taken(self) -> dict[str, set]:
        """What the calls of an iteration take, by (stage, microbatch)."""

        def keys(kind: Kind) -> set[tuple[int, int]]:
            actions = self.schedule.actions
            return {(action.stage, action.microbatch) for action in actions if action.kind is kind}

        backwards = keys(Kind.BACKWARD)
        return {"carries": keys(Kind.FORWARD), "residuals": backwards, "errors": backwards}

    # --- Between stages ---------------------------------------------------------------------------

    def single_metrics(self, stage: int) -> tuple[str, ...]:
        """Metrics of a stage that are not joined: what a process returns to the one below."""
        pair = self.placements[max(stage - 1, 0) : stage + 1]
        return ("loss",) if self.route.local and len(pair) > 1 and crosses(*pair) else ()

    @cached_property
    def _tied(self) -> TiedSteps:
        moves, counts = not self.fuse, self.schedule.overlapping
        return TiedSteps(self.stages, self.placements, moves, counts)

    @property
    def _needs_norm(self) -> bool:
        return self.stages[0].needs_norm

    def _norms(
        self, functions: Calls, accumulated: Sequence[Accumulated | None], received: dict[int, list]
    ) -> list[Any]:
        """Squared norm of the gradient of all stages, on every stage: summed down, sent up.

        What stages add to shared gradients is written into `received`, by who steps them.
        """
        scalar = jax.ShapeDtypeStruct((), jax.dtypes.canonicalize_dtype(jnp.float64))
        total: Any = None
        tied: list[Any] = [None] * len(self.stages)
        for stage in reversed(range(len(self.stages))):
            sums = accumulated[stage]
            received[stage] = self._tied.received(stage, tied)
            if sums is not None:
                call = functions[stage, ()]
                total, tied[stage] = call(sums.gradients, total, received[stage])
            if stage:
                total = self._transfer(total, scalar, stage, stage - 1)
        norms = [total]
        for stage in range(1, len(self.stages)):
            norms.append(self._transfer(norms[-1], scalar, stage - 1, stage))
        return norms

    def _send(self, source: int, target: int, carry: Any) -> Any:
        """Sends a carry (or, downwards, an error) to a neighbouring stage."""
        if self.fuse:
            return carry
        above, down = self.stages[max(source, target)], target < source
        key = above.index, down
        if (shape := self._messages.shapes.get(key)) is not None:
            arrived = self._transfer(carry, shape, source, target)
            queued = arrived is not None and self.schedule.overlapping
            return Message(arrived, self._messages.unpacked[key]) if queued else arrived
        shapes: Any = None
        if crosses(self.placements[source], self.placements[target]):
            shapes = above.carry
            if down:
                shapes = error_shapes(shapes, above.scaling, above.returns_input)
        return self._transfer(carry, shapes, source, target)

    @cached_property
    def _messages(self) -> Messages:
        return Messages(self.stages, self.placements, self.schedule.overlapping)

    def _transfer(self, tree: Any, shapes: Any, source: int, target: int) -> Any:
        if self.fuse:
            return tree
        return transfer(tree, shapes, self.placements[source], self.placements[target])
