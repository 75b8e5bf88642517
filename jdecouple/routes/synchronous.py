"""Synchronous route: exact backpropagation, cut into the backward passes of the stages."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jdecouple.routes.route import Route
from jdecouple.routes.stage import (
    Metrics,
    Stage,
    StageState,
    block_metrics,
    handed_on,
    totals,
)
from jdecouple.routes.unit import Message


@dataclasses.dataclass(frozen=True)
class Synchronous(Route):
    """Every stage waits for the error of the stage above it; weights and error are never stale.

    Losses may stand at any block; their gradients flow end to end.
    """

    schedules: ClassVar[tuple[str, ...]] = ("sequential", "gpipe", "1f1b", "interleaved_1f1b")

    def forward(
        self, stage: Stage, state: StageState, message: Message, tick: jax.Array
    ) -> tuple[Any, Metrics, Any, Message]:
        """Forward of the whole stage; the residuals hold its vector-Jacobian product."""
        return linearize(stage, state, message, tick)

    def backward(
        self, stage: Stage, state: StageState, residuals: Any, cotangent: Any, tick: jax.Array
    ) -> tuple[Any, Any]:
        """Pulls the error of the stage above, and of the stage's own losses, back."""
        del stage, state, tick
        return pull_back(residuals, cotangent)


def advance(
    stage: Stage, params: tuple, stats: tuple, message: Message, tick: jax.Array
) -> tuple[Message, jax.Array, tuple, Metrics]:
    """Forward of the units of a stage on a message that is already prepared.

    Returns:
        The message on, with gradients through its "x" alone; the sum of the units' losses, moved
        statistics, metrics.
    """
    loss = jnp.zeros((), jnp.float32)
    moved: list[Any] = []
    metrics: Metrics = {}
    for unit, unit_params, unit_stats in zip(stage.units, params, stats, strict=True):
        key = stage.key(unit, tick)
        features, output, new_stats = unit.train(unit_params, unit_stats, message, key)
        moved.append(new_stats)
        if output is not None:
            loss = loss + output.loss
            metrics |= block_metrics(unit, output, message)
        message = handed_on(message, features, output)
    return message, loss, tuple(moved), metrics


def linearize(
    stage: Stage, state: StageState, message: Message, tick: jax.Array
) -> tuple[Any, Metrics, tuple[Callable, jax.Array], Message]:
    """Forward of a stage, and its linearisation: what `pull_back` takes.

    Returns:
        Moved statistics, metrics, (vector-Jacobian product, loss), the message on.
    """
    message = stage.prepare(message, tick, True)

    def run(params, x):
        received = {**message, "x": x}
        handed, loss, stats, metrics = advance(stage, params, state["stats"], received, tick)
        return (None if stage.is_last else handed["x"], loss), (stats, metrics, handed)

    if stage.remat:
        run = jax.checkpoint(run)
    if stage.index:
        result = jax.vjp(run, state["params"], message["x"], has_aux=True)
    else:  # the input of the model, which may be integers, gets no gradient
        result = jax.vjp(lambda params: run(params, message["x"]), state["params"], has_aux=True)
    (_, loss), pullback, (stats, metrics, handed) = result
    metrics, handed = totals(handed, metrics)
    return stats, metrics, (pullback, loss), handed


def pull_back(linearized: tuple[Callable, jax.Array], cotangent: Any) -> tuple[Any, Any]:
    """Gradients of the units' parameters, and of the input (None on the first stage)."""
    pullback, loss = linearized
    gradients, *back = pullback((cotangent, jnp.ones_like(loss)))
    return gradients, back[0] if back else None
