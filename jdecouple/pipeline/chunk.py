"""Several batches in one compiled call a stage: a scan over what the executor does with one."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdecouple.pipeline.compiler import compiler_options
from jdecouple.pipeline.executor import Executor, own_losses_kept
from jdecouple.pipeline.placement import Seat
from jdecouple.pipeline.transfer import transfer
from jdecouple.routes import Message, StageState


@dataclasses.dataclass(frozen=True, eq=False)
class Chunks:
    """Executes T batches with the dispatches of one, where no stage waits for another in them.

    The stages of a local route hand T messages on at once; stages that are fused into one call,
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

    def stack(self, batches: Sequence[Sequence[Message | None]]) -> tuple[Message | None, ...]:
        """Uploads T batches as one: a message [T, batch, ...] a microbatch.

        Args:
            batches: the microbatches of every batch; on the host they are stacked there and
                uploaded at once, on the devices they are stacked there.
        """
        return tuple(self._stack(parts) for parts in zip(*batches, strict=True))

    def run(
        self, states: tuple, parts: Sequence[Message | None], step: int, count: int, apart: bool
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
        self, states: tuple, parts: Sequence[Message | None], step: int, count: int, apart: bool
    ) -> tuple[tuple, list[Any]]:
        new_states, metrics = list(states), [None] * len(states)
        for k, seat in enumerate(self._seats):
            if k:
                parts = [self._send(k, part, count) for part in parts]
            if seat.mine:
                new_states[k], parts, metrics[k] = self._calls[k](
                    new_states[k], parts, np.int32(step), apart
                )
            else:
                parts = [None] * len(parts)
        return tuple(new_states), metrics

    def _send(self, target: int, message: Message | None, count: int) -> Message | None:
        """Hands the stacked message of stage `target - 1` on."""
        below, above = self._seats[target - 1], self._seats[target]
        shapes: Any = None
        if not (below.whole and above.whole):
            message, shapes = own_losses_kept(message, self.executor.stages[target].message)
            shapes = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype), shapes
            )
        return transfer(message, shapes, below, above)

    def _stack(self, parts: Sequence[Message | None]) -> Message | None:
        seat = self._seats[0]
        if not seat.mine:
            return None
        if all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(parts)):
            return seat.place(jax.tree.map(lambda *leaves: np.stack(leaves), *parts))
        return self._stack_there(*parts)

    @cached_property
    def _stack_there(self) -> Any:
        def stack(*parts: Message) -> Message:
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
            return _lay_messages(stacked, self._seats[0])

        return jax.jit(stack)

    @cached_property
    def _seats(self) -> tuple[Seat, ...]:
        return tuple(seat.stacked for seat in self.executor.seats)

    @cached_property
    def _calls(self) -> list[Any]:
        """The scan of every stage; of all stages together where they are fused."""
        if self.executor.fuse:
            return [self._scan(self._whole, 0, "chunk")]
        return [
            self._scan(functools.partial(self._stage, k), k, f"stage{k}_chunk")
            for k in range(len(self._seats))
        ]

    def _whole(self, states: tuple, parts: Sequence[Message], step: Any) -> tuple:
        """One batch through all stages."""
        engine = self.executor
        function = functools.partial(engine.dispatch, engine.order, engine.functions)
        states, metrics = engine.iterate(function, states, parts, step)
        return tuple(self._lay_state(state, 0) for state in states), (), metrics

    def _stage(self, k: int, state: StageState, parts: Sequence[Message], step: Any) -> tuple:
        """One batch through one stage: its microbatches in turn."""
        engine = self._alone
        order = [call for call in engine.order if call.stage == k]
        states: tuple = tuple(state if k == each else None for each in range(len(self._seats)))
        messages = {(k, microbatch): part for microbatch, part in enumerate(parts)}
        taken: dict[str, dict] = {"messages": messages, "residuals": {}, "errors": {}}
        states, left, metrics = engine.dispatch(
            order, engine.functions, states, taken, (), engine.ticks(order, step)
        )
        above = k + 1
        handed = [left["messages"][above, m] for m in range(len(parts)) if above < len(states)]
        return self._lay_state(states[k], k), handed, metrics[k]

    @cached_property
    def _alone(self) -> Executor:
        """An executor that leaves the messages where they are: their turn comes after the scan."""
        return dataclasses.replace(self.executor, fuse=True)

    def _lay_state(self, state: StageState, k: int) -> StageState:
        seat, size = self.executor.seats[k], self.executor.size
        lay = jax.lax.with_sharding_constraint
        return {
            key: jax.tree.map(lambda leaf: lay(leaf, seat.waiting(leaf, size)), value)
            if key == "waiting"
            else lay(value, seat.replicated)
            for key, value in state.items()
        }

    def _scan(self, batch: Callable, k: int, name: str) -> Any:
        """Jits a scan over batches, and donates the state that goes through it."""
        seat = self._seats[k]

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
            metrics = jax.lax.with_sharding_constraint(metrics, seat.replicated)
            return state, _lay_messages(handed, seat), metrics

        chunk.__name__ = name
        options = compiler_options(seat)
        return jax.jit(chunk, donate_argnums=0, static_argnums=3, compiler_options=options)


def _lay_messages(messages: Any, seat: Seat) -> Any:
    lay = jax.lax.with_sharding_constraint
    return jax.tree.map(lambda leaf: lay(leaf, seat.sharding(leaf)), messages)


def _unstack(metrics: Any, count: int) -> Any:
    """Metrics [T] of a stage, or of each of several, as a list of those of every batch."""
    if isinstance(metrics, tuple):
        return tuple(_unstack(each, count) for each in metrics)
    return [{name: row[t] for name, row in metrics.items()} for t in range(count)]
