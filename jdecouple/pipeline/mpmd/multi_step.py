"""Several batches in one compiled call a stage: a scan over what the executor does with one."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdecouple.methods.routes import Carry
from jdecouple.pipeline.mesh import StageDevices, jit
from jdecouple.pipeline.mpmd.executor import Executor
from jdecouple.pipeline.mpmd.stage_fns import message_shape
from jdecouple.pipeline.mpmd.step_ids import by_call
from jdecouple.pipeline.step_metrics import JoinedMetrics
from jdecouple.pipeline.transfer import crosses, transfer, without_loss
from jdecouple.schedules import Call


@dataclasses.dataclass(frozen=True, eq=False)
class MultiStep:
    """Runs T batches with the dispatches of one, where no stage waits for another in them.

    The stages of a local route send T carries at once. Stages that are fused into one call, and a
    net of one stage, may follow any route. The executor runs one batch.
    """

    executor: Executor

    def stack(self, parts: Sequence[Carry]) -> Carry:
        """Uploads one microbatch of T batches as a carry [T, batch, ...] of the first stage."""
        if all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(parts)):
            return self._placements[0].place(jax.tree.map(lambda *leaves: np.stack(leaves), *parts))
        return self._stack_on_devices(*parts)

    def run(
        self, states: Sequence[Any], parts: Sequence[Carry | None], step: int, count: int
    ) -> tuple[tuple, tuple[JoinedMetrics | None, ...]]:
        """Dispatches `count` batches from number `step` on, as `Executor.run` does with one.

        The carries are [T, batch, ...], and so the metrics are [T].
        """
        first = np.int32(step)
        if self.executor.fuse:
            fused_states, _, metrics = self._scans[0](tuple(states), parts, first)
            return fused_states, metrics
        new_states, stage_metrics = list(states), [None] * len(states)
        for k, placement in enumerate(self._placements):
            if k:
                parts = [self._send(k, part, count) for part in parts]
            if placement.addressable:
                new_states[k], parts, stage_metrics[k] = self._scans[k](new_states[k], parts, first)
            else:
                parts = [None] * len(parts)
        return tuple(new_states), tuple(stage_metrics)

    def _send(self, target: int, carry: Carry | None, count: int) -> Carry | None:
        """Sends T carries from stage `target - 1`."""
        below, above = self._placements[target - 1], self._placements[target]
        shapes: Any = None
        if crosses(below, above):
            stage = self.executor.stages[target]
            if stage.wire is None:
                carry, shapes = without_loss(carry, stage.carry)
            else:
                shapes = message_shape(without_loss(None, stage.carry)[1], stage.wire)
            shapes = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype), shapes
            )
        return transfer(carry, shapes, below, above)

    @cached_property
    def _placements(self) -> tuple[StageDevices, ...]:
        return tuple(placement.stacked for placement in self.executor.placements)

    @cached_property
    def _stack_on_devices(self) -> Any:
        def stack(*parts: Carry) -> Carry:
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
            return self._placements[0].constrain(stacked)

        return jit(stack, self._placements[0])

    @cached_property
    def _scans(self) -> list[Any]:
        """The scan of every stage; of all stages together where they are fused."""
        if self.executor.fuse:
            return [self._compile(self._all_stages, 0, "chunk")]
        return [
            self._compile(functools.partial(self._one_stage, k), k, f"stage{k}_chunk")
            for k in range(len(self._placements))
        ]

    def _compile(self, batch_fn: Callable, k: int, name: str) -> Any:
        """Jits a scan of a function of one batch, and donates the state that goes through it."""
        placement = self._placements[k]

        def chunk(state: Any, parts: Any, step: jax.Array) -> tuple[Any, Any, Any]:
            def body(state: Any, numbered: tuple) -> tuple[Any, Any]:
                number, parts = numbered
                state, *out = batch_fn(state, parts, number)
                return state, out

            count = jax.tree.leaves(parts)[0].shape[0]
            numbers = step + jnp.arange(count, dtype=jnp.int32)
            state, (carries, metrics) = jax.lax.scan(body, state, (numbers, parts))
            metrics = jax.lax.with_sharding_constraint(metrics, placement.replicated)
            return state, placement.constrain(carries), metrics

        chunk.__name__ = name
        return jit(chunk, placement, donate_argnums=0)

    def _all_stages(self, states: tuple, parts: Sequence[Carry], step: Any) -> tuple:
        """One batch through all stages."""
        dispatch = functools.partial(
            self._traced.dispatch, self._traced.calls, self._traced.functions
        )
        layout = self.executor.layout
        ids = self._ids(self._traced.calls, step)
        new, metrics, _ = self._traced.iterate(dispatch, layout.trees(states), parts, ids)
        new = tuple(self._constrain(state, 0) for state in layout.flats(states, new))
        return new, (), tuple(map(JoinedMetrics.of, metrics))

    def _one_stage(self, k: int, given: Any, parts: Sequence[Carry], step: Any) -> tuple:
        """One batch through one stage: its microbatches in turn."""
        engine = self._traced
        rounded = engine.stages[k].wire is not None
        functions = self.executor.message_functions if rounded else engine.functions
        calls = [call for call in engine.calls if call.stage == k]
        states: list[Any] = [None] * len(self._placements)
        states[k] = self.executor.layout.tree(k, given)
        carries = {(k, microbatch): part for microbatch, part in enumerate(parts)}
        new_states, left, metrics, _ = engine.dispatch(
            calls,
            functions,
            tuple(states),
            {"carries": carries, "residuals": {}, "errors": {}},
            (),
            self._ids(calls, step),
        )
        above = k + 1
        sent = [left["carries"][above, m] for m in range(len(parts)) if above < len(states)]
        new = self.executor.layout.flat(k, given, new_states[k])
        joined = JoinedMetrics.of(metrics[k], self.executor.single_metrics(k))
        return self._constrain(new, k), sent, joined

    def _ids(self, calls: Sequence[Call], step: Any) -> list[Any]:
        return by_call(calls, self.executor.step_ids(calls, step))

    @cached_property
    def _traced(self) -> Executor:
        """An executor that leaves carries where they are: they are sent after the scan."""
        return dataclasses.replace(self.executor, fuse=True)

    def _constrain(self, state: Any, k: int) -> Any:
        shardings = self.executor.placements[k].state_shardings(state, self.executor.size)
        return jax.lax.with_sharding_constraint(state, shardings)
