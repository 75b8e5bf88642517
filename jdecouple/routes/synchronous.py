"""Synchronous route: exact backpropagation, cut into the backward passes of the stages."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jdecouple.routes.stage import Metrics, Stage, StageState, block_metrics, totals
from jdecouple.routes.unit import Message


@dataclasses.dataclass(frozen=True)
class Synchronous:
    """Every stage waits for the error of the stage above it; weights and error are never stale.

    Losses may stand at any block; their gradients flow end to end.
    """

    schedule: str = dataclasses.field(default="sequential", init=False)
    local: bool = dataclasses.field(default=False, init=False)

    def forward(
        self, stage: Stage, state: StageState, message: Message, tick: jax.Array
    ) -> tuple[Any, Metrics, Any, Message]:
        """Forward of the whole stage; the residuals hold its vector-Jacobian product."""

        def run(params, x):
            loss = jnp.zeros((), jnp.float32)
            stats: list[Any] = []
            metrics: Metrics = {}
            for unit, unit_params, unit_stats in zip(
                stage.units, params, state["stats"], strict=True
            ):
                here = {**message, "x": x}
                x, output, moved = unit.train(unit_params, unit_stats, here, stage.key(unit, tick))
                stats.append(moved)
                if output is not None:
                    loss = loss + output.loss
                    metrics |= block_metrics(unit, output, here)
            return (None if stage.is_last else x, loss), (tuple(stats), metrics, x)

        if stage.index:
            result = jax.vjp(run, state["params"], message["x"], has_aux=True)
        else:  # the input of the model, which may be integers, gets no gradient
            result = jax.vjp(
                lambda params: run(params, message["x"]), state["params"], has_aux=True
            )
        (_, loss), pullback, (stats, metrics, x) = result
        metrics, total = totals(message, metrics)
        return stats, metrics, (pullback, loss), {**message, "x": x, "loss": total}

    def backward(self, residuals: Any, cotangent: Any) -> tuple[Any, Any]:
        """Pulls the error of the stage above, and of the stage's own losses, back."""
        pullback, loss = residuals
        gradients, *back = pullback((cotangent, jnp.ones_like(loss)))
        return gradients, back[0] if back else None
