"""Runs a schedule: one compiled call for each run of actions, dispatched without waiting."""

import collections
import dataclasses
import functools
import itertools
import time
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdecouple.methods.routes import Accumulated, Carry, Metrics, Route, Stage
from jdecouple.pipeline.mesh import StageDevices, compiler_options
from jdecouple.pipeline.mpmd.stage_fns import (
    compile_stage_fn,
    make_norm_fn,
    make_stage_fn,
    microbatches_of,
    pack_io,
    steps_last,
)
from jdecouple.pipeline.state import Queues, put_queues, take_queues
from jdecouple.pipeline.transfer import packed, transfer
from jdecouple.schedules import Call, Kind, Schedule


@dataclasses.dataclass(frozen=True, eq=False)
class Executor:
    """Executes one schedule again and again on the placements of its stages.

    Attributes:
        stages: all stages, of all processes.
        placements: devices of each stage.
        route: what the actions mean.
        schedule: the actions of one batch.
        fuse: compile all stages into one call; they must share their devices.
        max_in_flight: batches that may be dispatched and unfinished.
    """

    stages: tuple[Stage, ...]
    placements: tuple[StageDevices, ...]
    route: Route
    schedule: Schedule
    fuse: bool
    max_in_flight: int
    _flying: collections.deque = dataclasses.field(default_factory=collections.deque)

    def load(self, states: Sequence[Any]) -> tuple:
        """The placed states of all stages as `run` takes them: as they are."""
        return tuple(states)

    def put(self, parts: Sequence[Carry]) -> tuple[Carry | None, ...]:
        """Uploads the microbatches of a batch to the first stage, where this process runs it."""
        placement = self.placements[0]
        return tuple(placement.place(part) if placement.addressable else None for part in parts)

    def run(
        self, states: tuple, batch: Sequence[Carry | None], step: int, end: int | None = None
    ) -> tuple[tuple, tuple[Metrics | None, ...]]:
        """Dispatches one batch and returns at once, unless too many are in flight.

        Args:
            states: state of every stage; None for those of other processes. Donated.
            batch: one placed carry a microbatch (None where stage 0 is elsewhere).
            step: number of the batch, from 0.
            end: number of the first batch that does not exist; by default none.

        Returns:
            The new states and the metrics of the stages that this process runs.
        """
        self.make_room()
        function = self._fused
        if not self.fuse:
            function = functools.partial(self.dispatch, self.order, self._calls)
        states, metrics = self.iterate(function, states, batch, step, end)
        self.launched(metrics)
        return states, metrics

    def make_room(self) -> None:
        """Waits until one more may be in flight."""
        while len(self._flying) >= self.max_in_flight:
            jax.block_until_ready(self._flying.popleft())

    def launched(self, metrics: Sequence[Metrics | None], shape: tuple[int, ...] = ()) -> None:
        """Counts what was dispatched as in flight until its losses, of this shape, are there."""
        losses = [each["loss"] for each in metrics if each]
        self._flying.append(losses + self._credits(metrics, shape))

    def iterate(
        self,
        function: Any,
        states: tuple,
        batch: Sequence[Carry | None],
        step: Any,
        end: int | None = None,
    ) -> tuple[tuple, tuple[Metrics | None, ...]]:
        """Gives a function what one iteration takes, and puts away what it leaves."""
        states, carried = take_queues(self.schedule, states)
        taken = {
            kind: {key: carried[kind].pop(key) for key in sorted(carried[kind]) if key in keys}
            for kind, keys in self._needed.items()
        }
        step_ids = self.step_ids(self.order, step, end)
        states, left, metrics = function(states, taken, tuple(batch), step_ids)
        left = {kind: carried[kind] | left[kind] for kind in carried}
        return put_queues(self.schedule, states, left), metrics

    def measure(
        self, states: tuple, batch: Sequence[Carry | None], step: int
    ) -> tuple[tuple, list[tuple[Call, float]]]:
        """As `run`, but waits for every call before the next; gives each with its seconds.

        Raises:
            ValueError: the stages are fused into one call.
        """
        if self.fuse:
            raise ValueError("the stages are fused into one call: measuring needs fuse=False")
        found: list[tuple[Call, float]] = []
        order = iter(self.order)

        def timed(call: Any) -> Any:
            def run(*arguments: Any) -> Any:
                jax.block_until_ready(arguments)
                start = time.perf_counter()
                out = jax.block_until_ready(call(*arguments))
                found.append((next(order), time.perf_counter() - start))
                return out

            return run

        calls = {key: timed(call) if key[1] else call for key, call in self._calls.items()}
        function = functools.partial(self.dispatch, self.order, calls)
        states, _ = self.iterate(function, states, batch, step)
        return states, found

    def wait(self, states: Any) -> None:
        """Blocks until all that was dispatched has run."""
        jax.block_until_ready((states, list(self._flying)))
        self._flying.clear()

    @cached_property
    def order(self) -> tuple[Call, ...]:
        """The schedule's calls; where a norm of all stages clips, their steps wait for it."""
        calls = tuple(self.schedule.calls())
        return steps_last(calls) if self._clips else calls

    @property
    def _clips(self) -> bool:
        return self.stages[0].clip_norm is not None

    @cached_property
    def functions(self) -> dict[tuple[int, tuple[Kind, ...]], Any]:
        """The pure function of every (stage, kinds) that the schedule contains."""
        functions = {
            (call.stage, call.kinds): make_stage_fn(self.stages[call.stage], self.route, call.kinds)
            for call in self.order
        }
        if self._clips:
            functions |= {(stage.index, ()): make_norm_fn(stage) for stage in self.stages}
        return functions

    @cached_property
    def _calls(self) -> dict[tuple[int, tuple[Kind, ...]], Any]:
        waits = self.size if self.schedule.overlapping else None
        calls = {}
        for (stage, kinds), function in self.functions.items():
            if self.placements[stage].addressable:
                if kinds:
                    function = pack_io(function, *self._joined[stage : stage + 2])
                calls[stage, kinds] = compile_stage_fn(
                    function, self.placements[stage], kinds, waits
                )
        return calls

    @cached_property
    def _fused(self) -> Any:
        def whole(states: tuple, taken: Queues, batch: tuple, step_ids: jax.Array) -> tuple:
            states, left, metrics = self.dispatch(
                self.order, self.functions, states, taken, batch, step_ids
            )
            placement = self.placements[0]
            lay = jax.lax.with_sharding_constraint
            left = jax.tree.map(lambda leaf: lay(leaf, placement.waiting(leaf, self.size)), left)
            return lay(states, placement.replicated), left, lay(metrics, placement.replicated)

        options = compiler_options(self.placements[0])
        return jax.jit(whole, donate_argnums=(0, 1), compiler_options=options)

    @cached_property
    def _needed(self) -> dict[str, set]:
        """What the calls of an iteration take, by (stage, microbatch)."""
        forwards, backwards = set(), set()
        for stage, kinds, microbatches in self.order:
            forward, backward = microbatches_of(kinds, microbatches)
            forwards.add((stage, forward))
            backwards.add((stage, backward))
        return {"carries": forwards, "residuals": backwards, "errors": backwards}

    @property
    def size(self) -> int:
        """Examples in a microbatch."""
        return self.stages[0].carry["label"].shape[0]

    def step_ids(self, order: Sequence[Call], step: Any, end: int | None = None) -> Any:
        """[batch, microbatch] of every action of some calls; `step` may be traced without `end`."""
        parts = self.schedule.num_microbatches
        pairs = [divmod(each, parts) for call in order for each in call.microbatches]
        step_ids = np.array(pairs, np.int32) + step * np.array([1, 0], np.int32)
        if end is not None:
            step_ids[step_ids[:, 0] >= end, 0] = -1
        return step_ids

    def dispatch(
        self,
        order: Sequence[Call],
        functions: dict,
        states: tuple,
        taken: Queues,
        batch: tuple[Carry | None, ...],
        step_ids: Any,
    ) -> tuple[tuple, Queues, tuple[Metrics | None, ...]]:
        """Goes through calls in order; also traced as a whole where the stages are fused.

        Returns:
            The new states, what no call has taken, and the metrics of the stages.
        """
        new_states = list(states)
        metrics: list[Metrics | None] = [None] * len(self.stages)
        accumulated: list[Accumulated | None] = [None] * len(self.stages)
        carries, residuals, errors = (
            dict(taken[kind]) for kind in ("carries", "residuals", "errors")
        )
        carries |= {(0, microbatch): part for microbatch, part in enumerate(batch)}
        norms: list[Any] | None = None
        first = 0
        for stage, kinds, microbatches in order:
            forward, backward = microbatches_of(kinds, microbatches)
            out: dict[str, Any] = {}
            if self._clips and Kind.STEP in kinds and norms is None:
                norms = self._norms(functions, accumulated)
            if self.placements[stage].addressable:
                out = functions[stage, kinds](
                    new_states[stage],
                    accumulated[stage],
                    residuals.pop((stage, backward), None),
                    carries.pop((stage, forward), None),
                    errors.pop((stage, backward), None),
                    step_ids[first : first + len(kinds)],
                    norms and norms[stage],
                )
                new_states[stage] = {**new_states[stage], **out.get("state", {})}
                accumulated[stage] = out.get("accumulated")
                metrics[stage] = out.get("metrics", metrics[stage])
                if "residuals" in out:
                    residuals[stage, forward] = out["residuals"]
            first += len(kinds)
            if forward is not None and stage + 1 < len(self.stages):
                carries[stage + 1, forward] = self._send(stage, stage + 1, out.get("carry"))
            if backward is not None and stage > 0 and not self.route.local:
                errors[stage - 1, backward] = self._send(stage, stage - 1, out.get("cotangent"))
        left = {"carries": carries, "residuals": residuals, "errors": errors}
        return tuple(new_states), left, tuple(metrics)

    def _norms(self, functions: dict, accumulated: Sequence[Accumulated | None]) -> list[Any]:
        """Squared norm of the gradient of all stages, on every stage: summed down, handed up."""
        scalar = jax.ShapeDtypeStruct((), jax.dtypes.canonicalize_dtype(jnp.float64))
        total: Any = None
        for stage in reversed(range(len(self.stages))):
            each = accumulated[stage]
            if each is not None:
                total = functions[stage, ()](each.gradients, total)
            if stage:
                total = self._hand(total, scalar, stage, stage - 1)
        norms = [total]
        for stage in range(1, len(self.stages)):
            norms.append(self._hand(norms[-1], scalar, stage - 1, stage))
        return norms

    def _hand(self, tree: Any, shapes: Any, source: int, target: int) -> Any:
        if self.fuse:
            return tree
        return transfer(tree, shapes, self.placements[source], self.placements[target])

    def _send(self, source: int, target: int, carry: Any) -> Any:
        """Hands a carry (or, downwards, an error) to a neighbouring stage."""
        if self.fuse or (
            self.placements[source].fully_addressable and self.placements[target].fully_addressable
        ):
            return self._hand(carry, None, source, target)
        above = max(source, target)
        joined = self._joined[above]
        shapes: Any = joined or self.stages[above].carry
        if target < source:
            shapes = shapes["x"]
        elif not joined:
            carry, shapes = without_loss(carry, shapes)
        return self._hand(carry, packed(shapes) if joined else shapes, source, target)

    @cached_property
    def _joined(self) -> list[Carry | None]:
        """For every stage, and for the end, shapes of its carry where that comes as one array.

        It does from another process, unless carries may wait in the state of the stage: what a
        checkpoint holds does not depend on the placement.
        """
        found: list[Carry | None] = [None]
        for (below, above), stage in zip(
            itertools.pairwise(self.placements), self.stages[1:], strict=True
        ):
            here = (
                below.fully_addressable and above.fully_addressable
            ) or below.devices == above.devices
            stays = here or self.schedule.overlapping
            found.append(None if stays else without_loss(None, stage.carry)[1])
        return [*found, None]

    def _credits(
        self, metrics: Sequence[Metrics | None], shape: tuple[int, ...]
    ) -> list[jax.Array]:
        """Scalars that other processes return once they have trained on this batch.

        A local stage gets nothing back from the stages above it; without these it would run
        ahead of a slower process without bound.
        """
        if not self.route.local:
            return []
        scalar = jax.ShapeDtypeStruct(shape, jnp.float32)
        received = []
        for stage, (below, above) in enumerate(itertools.pairwise(self.placements)):
            if not (below.fully_addressable and above.fully_addressable):
                mine = metrics[stage + 1]
                received.append(transfer(mine and mine["loss"], scalar, above, below))
        return [credit for credit in received if credit is not None]


def without_loss(carry: Carry | None, shapes: Carry) -> tuple[Carry | None, Carry]:
    """What of a carry, and of its shapes, goes to another process.

    Sums of losses stay in theirs: its metrics cover its own stages.
    """
    shapes = {name: leaf for name, leaf in shapes.items() if name != "loss"}
    return carry and {name: carry[name] for name in shapes}, shapes
