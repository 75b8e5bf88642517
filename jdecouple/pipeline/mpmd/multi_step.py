"""Several batches in one compiled call a stage: a scan over what the executor does with one."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdecouple.methods.routes import Carry, StageState
from jdecouple.pipeline.mesh import StageDevices, compiler_options
from jdecouple.pipeline.mpmd.executor import Executor, without_loss
from jdecouple.pipeline.transfer import transfer


@dataclasses.dataclass(frozen=True, eq=False)
class MultiStep:
    """Executes T batches with the dispatches of one, where no stage waits for another in them.

    The stages of a local route hand T carries on at once; stages that are fused into one call,
    and a net of one stage, may follow any route.

    Attributes:
        executor: what runs one batch.
    """

    executor: Executor

    @property
    def possible(self) -> bool:
        """Whether the stages can go through several batches without one another."""
        engine = self.executor
        return engine.fuse or engine.route.local or len(engine.stages) == 1

    def stack(self, batches: Sequence[Sequence[Carry | None]]) -> tuple[Carry | None, ...]:
        """Uploads T batches as one: a carry [T, batch, ...] a microbatch.

        Args:
            batches: the microbatches of every batch; on the host they are stacked there and
                uploaded at once, on the devices they are stacked there.
        """
        return tuple(self._stack(parts) for parts in zip(*batches, strict=True))

    def run(
        self, states: tuple, parts: Sequence[Carry | None], step: int, count: int, apart: bool
    ) -> tuple[tuple, tuple[Any, ...]]:
        """Dispatches T batches and returns at once, unless too many chunks are in flight.

        Args:
            states: state of every stage; None for those of other processes. Donated.
            parts: what `stack` returned.
            step: number of the first batch, from 0.
            count: T.
            apart: whether every batch gets metrics of its own, which takes longer to dispatch.

        Returns:
            The new states, and of the stages that this process runs the metrics: each [T], or a
            list of those of every batch.
        """
        engine = self.executor
        engine.make_room()
        metrics: Sequence[Any]
        if engine.fuse:
            states, _, metrics = self._calls[0](states, parts, np.int32(step), apart)
        else:
            states, metrics = self._dispatch(states, parts, step, count, apart)
        if apart:
            engine.launched([each and each[-1] for each in metrics])
        else:
            engine.launched(metrics, (count,))
        return states, tuple(metrics)

    def _dispatch(
        self, states: tuple, parts: Sequence[Carry | None], step: int, count: int, apart: bool
    ) -> tuple[tuple, list[Any]]:
        new_states, metrics = list(states), [None] * len(states)
        for k, placement in enumerate(self._placements):
            if k:
                parts = [self._send(k, part, count) for part in parts]
            if placement.addressable:
                new_states[k], parts, metrics[k] = self._calls[k](
                    new_states[k], parts, np.int32(step), apart
                )
            else:
                parts = [None] * len(parts)
        return tuple(new_states), metrics

    def _send(self, target: int, carry: Carry | None, count: int) -> Carry | None:
        """Hands the stacked carry of stage `target - 1` on."""
        below, above = self._placements[target - 1], self._placements[target]
        shapes: Any = None
        if not (below.fully_addressable and above.fully_addressable):
            carry, shapes = without_loss(carry, self.executor.stages[target].carry)
            shapes = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype), shapes
            )
        return transfer(carry, shapes, below, above)

    def _stack(self, parts: Sequence[Carry | None]) -> Carry | None:
        placement = self._placements[0]
        if not placement.addressable:
            return None
        if all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(parts)):
            return placement.place(jax.tree.map(lambda *leaves: np.stack(leaves), *parts))
        return self._stack_there(*parts)

    @cached_property
    def _stack_there(self) -> Any:
        def stack(*parts: Carry) -> Carry:
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
            return _lay_messages(stacked, self._placements[0])

        return jax.jit(stack)

    @cached_property
    def _placements(self) -> tuple[StageDevices, ...]:
        return tuple(placement.stacked for placement in self.executor.placements)

    @cached_property
    def _calls(self) -> list[Any]:
        """The scan of every stage; of all stages together where they are fused."""
        if self.executor.fuse:
            return [self._scan(self._whole, 0, "chunk")]
        return [
            self._scan(functools.partial(self._stage, k), k, f"stage{k}_chunk")
            for k in range(len(self._placements))
        ]

    def _whole(self, states: tuple, parts: Sequence[Carry], step: Any) -> tuple:
        """One batch through all stages."""
        engine = self.executor
        function = functools.partial(engine.dispatch, engine.order, engine.functions)
        states, metrics = engine.iterate(function, states, parts, step)
        return tuple(self._lay_state(state, 0) for state in states), (), metrics

    def _stage(self, k: int, state: StageState, parts: Sequence[Carry], step: Any) -> tuple:
        """One batch through one stage: its microbatches in turn."""
        engine = self._alone
        order = [call for call in engine.order if call.stage == k]
        states: tuple = tuple(state if k == each else None for each in range(len(self._placements)))
        carries = {(k, microbatch): part for microbatch, part in enumerate(parts)}
        taken: dict[str, dict] = {"carries": carries, "residuals": {}, "errors": {}}
        states, left, metrics = engine.dispatch(
            order, engine.functions, states, taken, (), engine.step_ids(order, step)
        )
        above = k + 1
        handed = [left["carries"][above, m] for m in range(len(parts)) if above < len(states)]
        return self._lay_state(states[k], k), handed, metrics[k]

    @cached_property
    def _alone(self) -> Executor:
        """An executor that leaves the carries where they are: their turn comes after the scan."""
        return dataclasses.replace(self.executor, fuse=True)

    def _lay_state(self, state: StageState, k: int) -> StageState:
        placement, size = self.executor.placements[k], self.executor.size
        lay = jax.lax.with_sharding_constraint
        return {
            key: jax.tree.map(lambda leaf: lay(leaf, placement.waiting(leaf, size)), value)
            if key == "queues"
            else lay(value, placement.replicated)
            for key, value in state.items()
        }

    def _scan(self, batch: Callable, k: int, name: str) -> Any:
        """Jits a scan over batches, and donates the state that goes through it."""
        placement = self._placements[k]

        def chunk(state: Any, parts: Any, step: jax.Array, apart: bool) -> tuple[Any, Any, Any]:
            def body(state: Any, each: tuple) -> tuple[Any, Any]:
                number, parts = each
                state, *out = batch(state, parts, number)
                return state, out

            count = jax.tree.leaves(parts)[0].shape[0]
            numbers = step + jnp.arange(count, dtype=jnp.int32)
            state, (handed, metrics) = jax.lax.scan(body, state, (numbers, parts))
            if apart:  # a list for every stage, where there are several
                metrics = _unstack(metrics, count)
            metrics = jax.lax.with_sharding_constraint(metrics, placement.replicated)
            return state, _lay_messages(handed, placement), metrics

        chunk.__name__ = name
        options = compiler_options(placement)
        return jax.jit(chunk, donate_argnums=0, static_argnums=3, compiler_options=options)


def _lay_messages(carries: Any, placement: StageDevices) -> Any:
    lay = jax.lax.with_sharding_constraint
    return jax.tree.map(lambda leaf: lay(leaf, placement.sharding(leaf)), carries)


def _unstack(metrics: Any, count: int) -> Any:
    """Metrics [T] of a stage, or of each of several, as a list of those of every batch."""
    if isinstance(metrics, tuple):
        return tuple(_unstack(each, count) for each in metrics)
    return [{name: row[t] for name, row in metrics.items()} for t in range(count)]
