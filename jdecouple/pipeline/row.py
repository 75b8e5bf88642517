"""What a row of devices does with a message, where every row runs the same program."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jdecouple.routes import Message, Metrics, Route, Stage, StageState, Unit, add
from jdecouple.routes.stage import totals
from jdecouple.routes.synchronous import advance

Arrays = dict[str, Any]
"""State of a row: "params", "stats" and "opt", each a tuple with one entry a slot."""


@dataclasses.dataclass(frozen=True, eq=False)
class Shifted(Stage):
    """A stage that stands for an equal one further up.

    Attributes:
        shift: blocks between the two, possibly traced.
    """

    shift: Any = 0

    def number(self, unit: Unit) -> Any:
        """Index of the unit that this one stands for."""
        return super().number(unit) + jnp.asarray(self.shift, jnp.uint32)


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """Consecutive stages on one row of devices, and where their blocks' state is.

    Attributes:
        stages: the stages.
        slots: of every stage, the slots of its units in the arrays.
        route: how error reaches the blocks.
        is_first: whether batches enter here.
        is_last: whether nothing goes on from here, whatever the shape of its features.
    """

    stages: tuple[Stage, ...]
    slots: tuple[tuple[int, ...], ...]
    route: Route
    is_first: bool
    is_last: bool

    def shifted(self, shift: Any) -> "Row":
        """The same for a row whose blocks lie `shift` blocks further up."""
        stages = tuple(Shifted(**vars(stage), shift=shift) for stage in self.stages)
        return dataclasses.replace(self, stages=stages)

    def states(self, arrays: Arrays) -> list[StageState]:
        """The states of the stages."""
        return [
            {part: tuple(arrays[part][slot] for slot in slots) for part in arrays}
            for slots in self.slots
        ]

    def put(self, arrays: Arrays, states: list[StageState]) -> Arrays:
        """The arrays with the states of the stages put back."""
        new = {part: list(arrays[part]) for part in arrays}
        for slots, state in zip(self.slots, states, strict=True):
            for part, values in state.items():
                for slot, value in zip(slots, values, strict=True):
                    new[part][slot] = value
        return {part: tuple(values) for part, values in new.items()}

    def train(
        self, arrays: Arrays, messages: Message, number: jax.Array
    ) -> tuple[Arrays, Message, Metrics]:
        """Trains on one batch by a local route: forward, backward and step of every stage.

        Args:
            arrays: state of the row.
            messages: what it received, microbatches stacked: [M, batch, ...].
            number: number of the batch.

        Returns:
            The new state, the messages on, and the metrics.
        """
        states = self.states(arrays)
        count = messages["label"].shape[0]

        def part(stats: list, index: Any) -> tuple[list, Any]:
            """One microbatch: moved statistics; gradients, metrics and the message on."""
            message = jax.tree.map(lambda leaf: leaf[index], messages)
            tick = jnp.stack([number, jnp.asarray(index, number.dtype)])
            moved, gradients = [], []
            metrics: Metrics = {}
            for stage, state, old in zip(self.stages, states, stats, strict=True):
                state = {**state, "stats": old}
                new, found, residuals, message = self.route.forward(stage, state, message, tick)
                gradients.append(self.route.backward(stage, state, residuals, None, tick)[0])
                moved.append(new)
                metrics |= found
            return moved, (gradients, metrics, message)

        stats = [state["stats"] for state in states]
        if count == 1:
            stats, (gradients, metrics, message) = part(stats, 0)
            messages = jax.tree.map(lambda leaf: leaf[None], message)
        else:

            def body(carry: tuple, index: jax.Array) -> tuple:
                stats, sums = carry
                stats, (gradients, metrics, message) = part(stats, index)
                return (stats, add(sums, (gradients, metrics))), message

            shapes = jax.eval_shape(part, stats, 0)[1]
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes[:2])
            (stats, (gradients, metrics)), messages = jax.lax.scan(
                body, (stats, zeros), jnp.arange(count)
            )
        states = [
            stage.update({**state, "stats": moved}, gradient)
            for stage, state, moved, gradient in zip(
                self.stages, states, stats, gradients, strict=True
            )
        ]
        return self.put(arrays, states), messages, self.stages[0].mean(metrics)

    def forward(
        self, params: tuple, stats: tuple, message: Message, tick: jax.Array
    ) -> tuple[tuple, Message, jax.Array, Metrics]:
        """Forward of one microbatch, to be differentiated as a whole.

        Args:
            params: parameters of all slots.
            stats: statistics of all slots.
            message: what the row received.
            tick: [batch, microbatch].

        Returns:
            Moved statistics of all slots, the message on, the row's own losses, and the metrics.
        """
        arrays = {"params": params, "stats": stats}
        loss = jnp.zeros((), jax.dtypes.canonicalize_dtype(jnp.float64))
        metrics: Metrics = {}
        moved: list[StageState] = []
        for stage, state in zip(self.stages, self.states(arrays), strict=True):
            message = stage.prepare(message, tick, True)
            message, own, new, found = advance(
                stage, state["params"], state["stats"], message, tick
            )
            found, message = totals(message, found)
            message = {**jax.lax.stop_gradient(message), "x": message["x"]}
            loss += own
            metrics |= found
            moved.append({"stats": new})
        message = {"loss": jnp.zeros((), jnp.float32), **message}
        stats = jax.lax.stop_gradient(self.put({"stats": stats}, moved)["stats"])
        return stats, message, loss, jax.lax.stop_gradient(metrics)

    def step(self, arrays: Arrays, gradients: tuple, squared_norm: jax.Array | None) -> Arrays:
        """Optimiser steps of all stages with the gradients of all slots."""
        states = [
            stage.update(state, tuple(gradients[slot] for slot in slots), squared_norm)
            for stage, slots, state in zip(
                self.stages, self.slots, self.states(arrays), strict=True
            )
        ]
        return self.put(arrays, states)

    def squared_norm(self, gradients: tuple) -> jax.Array:
        """Squared norm of the mean gradient of the row's stages."""
        norms = [
            stage.squared_norm(tuple(gradients[slot] for slot in slots))
            for stage, slots in zip(self.stages, self.slots, strict=True)
        ]
        return sum(norms[1:], norms[0])
