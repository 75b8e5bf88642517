"""Local route: every block trains on its own loss behind a stop_gradient."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jdecouple.methods.routes.route import Route
from jdecouple.methods.routes.stage import (
    Metrics,
    Stage,
    StageState,
    block_metrics,
    next_carry,
    totals,
)
from jdecouple.methods.routes.unit import Carry


@dataclasses.dataclass(frozen=True)
class Local(Route):
    """No error crosses a block boundary, so a stage needs nothing from the stages above it.

    The staleness of weights and of error is zero for any number of stages: pipelined
    training equals sequential training.
    """

    local: ClassVar[bool] = True
    schedules: ClassVar[tuple[str, ...]] = ("local",)

    def forward(
        self, stage: Stage, state: StageState, carry: Carry, step_id: jax.Array
    ) -> tuple[Any, Metrics, Any, Carry]:
        """Forward of every unit with its loss; the residuals hold its backward."""
        carry = stage.prepare(carry, step_id, True)
        stats, residuals = [], []
        metrics: Metrics = {}
        for unit, params, unit_stats in zip(
            stage.units, state["params"], state["stats"], strict=True
        ):

            def loss(params, unit=unit, unit_stats=unit_stats, carry=carry):
                features, output, moved = unit.train(
                    params, unit_stats, carry, stage.key(unit, step_id)
                )
                return output.loss, (features, output, moved)

            if stage.remat:
                loss = jax.checkpoint(loss)
            _, pullback, (features, output, moved) = jax.vjp(loss, params, has_aux=True)
            stats.append(moved)
            residuals.append((pullback, output.loss))
            metrics |= block_metrics(unit, output, carry)
            carry = next_carry(carry, jax.lax.stop_gradient(features), output)
        metrics, carry = totals(carry, metrics)
        return tuple(stats), metrics, residuals, carry

    def backward(
        self, stage: Stage, state: StageState, residuals: Any, cotangent: Any, step_id: jax.Array
    ) -> tuple[Any, Any]:
        """Gradient of every unit's own loss; nothing is sent back."""
        del stage, state, cotangent, step_id
        return tuple(pullback(jnp.ones_like(loss))[0] for pullback, loss in residuals), None
