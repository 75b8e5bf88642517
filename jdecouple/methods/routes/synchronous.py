"""Synchronous route: exact backpropagation, cut into the backward passes of the stages."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jdecouple.methods.routes import loss_scale
from jdecouple.methods.routes.ordering import after
from jdecouple.methods.routes.remat import repeated
from jdecouple.methods.routes.route import Forward, Route
from jdecouple.methods.routes.stage import (
    Metrics,
    Stage,
    StageState,
    block_metrics,
    floating,
    next_carry,
    totals,
    with_floating,
)
from jdecouple.methods.routes.unit import Carry


@dataclasses.dataclass(frozen=True)
class Synchronous(Route):
    """Every stage waits for the error of the stage above it; weights and error are never stale.

    Losses may stand at any block; their gradients flow end to end.
    """

    scaling: ClassVar[str] = "model"
    schedules: ClassVar[tuple[str, ...]] = (
        *("sequential", "gpipe", "1f1b", "interleaved_1f1b"),
        *("zb_h1", "zbv", "dualpipe_v"),
    )

    def forward(self, stage: Stage, state: StageState, carry: Carry, step_id: jax.Array) -> Forward:
        """Forward of the whole stage; the residuals hold its vector-Jacobian product."""
        return linearize(stage, state, carry, step_id)

    def backward(
        self, stage: Stage, state: StageState, residuals: Any, cotangent: Any, step_id: jax.Array
    ) -> tuple[Any, Any]:
        """Pulls the error of the stage above, and of the stage's own losses, back."""
        return pull_back(stage, residuals, cotangent, loss_scale.factor_of(state))


def advance(
    stage: Stage, params: tuple, stats: tuple, carry: Carry, step_id: jax.Array
) -> tuple[Carry, jax.Array, tuple, Metrics]:
    """Forward of the units of a stage on a carry that is already prepared.

    Returns the next carry, through whose "x" alone gradients flow, the sum of the units' losses,
    moved statistics and metrics.
    """
    loss = jnp.zeros((), jnp.float32)
    moved: list[Any] = []
    metrics: Metrics = {}
    for unit, unit_params, unit_stats in zip(stage.units, params, stats, strict=True):
        key = stage.key(unit, step_id)
        train = repeated(unit.train, "blocks") if stage.remat == "blocks" else unit.train
        features, output, new_stats = train(unit_params, unit_stats, carry, key)
        moved.append(new_stats)
        if output is not None:
            loss = loss + output.loss
            metrics |= block_metrics(unit, output, carry)
        carry = next_carry(carry, features, output)
    return carry, loss, tuple(moved), metrics


def linearize(
    stage: Stage, state: StageState, carry: Carry, step_id: jax.Array
) -> tuple[Any, Metrics, tuple[Callable, jax.Array], Carry]:
    """Forward of a stage; the residuals, for `pull_back`, are (vector-Jacobian product, loss)."""
    carry = stage.prepare(carry, step_id, True)

    def run(params, x):
        received = {**carry, "x": with_floating(x, carry["x"])}
        sent, loss, stats, metrics = advance(stage, params, state["stats"], received, step_id)
        return (None if stage.is_last else floating(sent["x"]), loss), (stats, metrics, sent)

    if stage.remat not in ("none", "blocks"):
        run = repeated(run, stage.remat)
    x = floating(carry["x"])
    if stage.index:
        result = jax.vjp(run, state["params"], x, has_aux=True)
    else:  # the input of the model gets no gradient
        result = jax.vjp(lambda params: run(params, x), state["params"], has_aux=True)
    (_, loss), pullback, (stats, metrics, sent) = result
    metrics, sent = totals(sent, metrics)
    return stats, metrics, (pullback, loss), sent


def pull_back(
    stage: Stage,
    linearized: tuple[Callable, jax.Array],
    cotangent: Any,
    factor: jax.Array | None = None,
) -> tuple[Any, Any]:
    """Gradients of the units' parameters, and of the input (None on the first stage).

    The loss is multiplied by `factor`, if there is one, as it was for the cotangent; the gradient
    of the input keeps it.
    """
    pullback, loss = linearized
    if stage.remat != "none":  # what is repeated must not be kept from the forward instead
        pullback = after((cotangent, loss), pullback)
    gradients, *back = pullback((cotangent, loss_scale.seed(loss, factor)))
    return loss_scale.unscaled(gradients, factor), back[0] if back else None
