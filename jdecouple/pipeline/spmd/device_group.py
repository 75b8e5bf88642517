"""What a device group does with a carry, where every group runs the same program."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jdecouple.methods.routes import (
    Carry,
    Metrics,
    Route,
    Stage,
    StageState,
    Unit,
    add,
    loss_scale,
)
from jdecouple.methods.routes.stage import totals
from jdecouple.methods.routes.synchronous import advance
from jdecouple.pipeline.spmd.sharded_state import Arrays, Slot

Slots = dict[Slot, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Shifted(Stage):
    """A stage that stands for an equal one, `shift` blocks (possibly traced) further up."""

    shift: Any = 0

    def number(self, unit: Unit) -> Any:
        """Index of the unit that this one stands for."""
        return super().number(unit) + jnp.asarray(self.shift, jnp.uint32)


@dataclasses.dataclass(frozen=True, eq=False)
class DeviceGroup:
    """Consecutive stages on the same devices, and where their blocks' state is.

    Attributes:
        stages: the stages.
        param_slots: of every stage, the slots of its units in the arrays.
        route: how error reaches the blocks.
        is_first: whether batches enter here.
        is_last: whether nothing goes on from here, whatever the shape of its features.
        names: of its metrics, in order.
    """

    stages: tuple[Stage, ...]
    param_slots: tuple[tuple[Slot, ...], ...]
    route: Route
    is_first: bool
    is_last: bool
    names: tuple[str, ...]

    def shifted(self, shift: Any) -> "DeviceGroup":
        """The same for a device group whose blocks lie `shift` blocks further up."""
        stages = tuple(Shifted(**vars(stage), shift=shift) for stage in self.stages)
        return dataclasses.replace(self, stages=stages)

    def states(self, arrays: Arrays) -> list[StageState]:
        """The states of the stages."""
        return [
            {part: tuple(arrays[part][slot] for slot in slots) for part in arrays}
            for slots in self.param_slots
        ]

    def put(self, arrays: Arrays, states: list[StageState]) -> Arrays:
        """The arrays with the states of the stages put back."""
        new = {part: dict(arrays[part]) for part in arrays}
        for slots, state in zip(self.param_slots, states, strict=True):
            for part, values in state.items():
                for slot, value in zip(slots, values, strict=True):
                    new[part][slot] = value
        return new

    def train(
        self, arrays: Arrays, carries: Carry, number: jax.Array
    ) -> tuple[Arrays, Carry, Metrics]:
        """Trains on batch `number` by a local route: forward, backward and step of every stage.

        What it receives are the carries of M microbatches, stacked: [M, batch, ...]. Returns the
        new state, the next carries, and the metrics.
        """
        states = self.states(arrays)
        count = carries["label"].shape[0]

        def part(stats: list, index: Any) -> tuple[list, Any]:
            """One microbatch: moved statistics; gradients, metrics and the next carry."""
            carry = jax.tree.map(lambda leaf: leaf[index], carries)
            step_id = jnp.stack([number, jnp.asarray(index, number.dtype)])
            moved, gradients = [], []
            metrics: Metrics = {}
            for stage, state, old in zip(self.stages, states, stats, strict=True):
                state = {**state, "stats": old}
                new, own, residuals, carry = self.route.forward(stage, state, carry, step_id)
                gradients.append(self.route.backward(stage, state, residuals, None, step_id)[0])
                moved.append(new)
                metrics |= own
            return moved, (gradients, metrics, carry)

        stats = [state["stats"] for state in states]
        if count == 1:
            stats, (gradients, metrics, carry) = part(stats, 0)
            carries = jax.tree.map(lambda leaf: leaf[None], carry)
        else:

            def body(loop: tuple, index: jax.Array) -> tuple:
                stats, sums = loop
                stats, (gradients, metrics, carry) = part(stats, index)
                return (stats, add(sums, (gradients, metrics))), carry

            shapes = jax.eval_shape(part, stats, 0)[1]
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes[:2])
            (stats, (gradients, metrics)), carries = jax.lax.scan(
                body, (stats, zeros), jnp.arange(count)
            )
        metrics = self.stages[0].mean(metrics)
        stepped = []
        for stage, state, moved, gradient in zip(
            self.stages, states, stats, gradients, strict=True
        ):
            new, scaling = stage.step({**state, "stats": moved}, gradient)
            stepped.append(new)
            metrics |= scaling
        return self.put(arrays, stepped), carries, metrics

    def forward(
        self, params: Slots, stats: Slots, carry: Carry, step_id: jax.Array
    ) -> tuple[Slots, Carry, jax.Array, Metrics]:
        """Forward of one microbatch, to be differentiated through all its stages.

        Returns moved statistics of all slots, the next carry, the group's own losses, and the
        metrics.
        """
        arrays = {"params": params, "stats": stats}
        loss = jnp.zeros((), jax.dtypes.canonicalize_dtype(jnp.float64))
        metrics: Metrics = {}
        moved: list[StageState] = []
        for stage, state in zip(self.stages, self.states(arrays), strict=True):
            carry = stage.prepare(carry, step_id, True)
            carry, own_loss, new, own = advance(
                stage, state["params"], state["stats"], carry, step_id
            )
            own, carry = totals(carry, own)
            carry = {**jax.lax.stop_gradient(carry), "x": carry["x"]}
            loss += own_loss
            metrics |= own
            moved.append({"stats": new})
        carry = {"loss": jnp.zeros((), jnp.float32), **carry}
        stats = jax.lax.stop_gradient(self.put({"stats": stats}, moved)["stats"])
        return stats, carry, loss, jax.lax.stop_gradient(metrics)

    def step(self, arrays: Arrays, gradients: Slots, squared_norm: jax.Array | None) -> Arrays:
        """Optimiser steps of all stages with the gradients of all slots."""
        states = [
            stage.step(state, tuple(gradients[slot] for slot in slots), squared_norm)[0]
            for stage, slots, state in zip(
                self.stages, self.param_slots, self.states(arrays), strict=True
            )
        ]
        return self.put(arrays, states)

    def loss_factor(self, arrays: Arrays) -> jax.Array | None:
        """What the loss is multiplied by, where it is."""
        return loss_scale.factor_of(self.states(arrays)[0])

    def squared_norm(self, gradients: Slots) -> jax.Array:
        """Squared norm of the mean gradient of the group's stages."""
        norms = [stage.squared_norm(own) for stage, own in self._own(gradients)]
        return sum(norms[1:], norms[0])

    def norms(self, gradients: Slots) -> Metrics:
        """Norms of the blocks' gradients, if they are asked for."""
        found: Metrics = {}
        for stage, own in self._own(gradients):
            found |= stage.norms(own)
        return found

    def _own(self, gradients: Slots) -> list[tuple[Stage, tuple]]:
        """Every stage with the gradients of its units."""
        pairs = zip(self.stages, self.param_slots, strict=True)
        return [(stage, tuple(gradients[slot] for slot in slots)) for stage, slots in pairs]
