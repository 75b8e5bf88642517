"""Local route: every block trains on its own loss behind a stop_gradient."""

import dataclasses
from typing import Any, ClassVar

import jax

from jdecouple.methods.routes import loss_scale
from jdecouple.methods.routes.ordering import after
from jdecouple.methods.routes.remat import repeated
from jdecouple.methods.routes.route import Forward, Route
from jdecouple.methods.routes.stage import (
    Metrics,
    Stage,
    StageState,
    block_metrics,
    next_carry,
    totals,
)
from jdecouple.methods.routes.unit import Carry
from jdecouple.methods.routes.updates import averaged


@dataclasses.dataclass(frozen=True)
class Local(Route):
    """No error crosses a block boundary, so a stage needs nothing from the stages above it.

    The staleness of weights and of error is zero for any number of stages: pipelined
    training equals sequential training.
    """

    local: ClassVar[bool] = True
    scaling: ClassVar[str] = "block"
    schedules: ClassVar[tuple[str, ...]] = ("local", "interleaved")

    @property
    def automatic_remat(self) -> str:
        """The backward of a unit follows its forward at once."""
        return "none"

    def forward(self, stage: Stage, state: StageState, carry: Carry, step_id: jax.Array) -> Forward:
        """Forward of every unit with its loss; the residuals hold its backward.

        That of a frozen unit, which is as it is evaluated, has neither.
        """
        carry = stage.prepare(carry, step_id, True)
        moved: list[Any] = []
        residuals: list[Any] = []
        metrics: Metrics = {}
        fixed = averaged(state)
        units = zip(stage.units, state["params"], state["stats"], strict=True)
        for number, (unit, params, stats) in enumerate(units):
            if unit.frozen:
                moved.append(stats)
                residuals.append(None)
                values = fixed["params"][number], fixed["stats"][number]
                carry = next_carry(carry, *unit.pass_on(*values, carry))
                continue

            def loss(params, unit=unit, stats=stats, carry=carry):
                outputs = unit.train_inline(params, stats, carry, stage.key(unit, step_id))
                return outputs[1].loss, outputs

            if stage.remat != "none":
                loss = repeated(loss, stage.remat)
            _, pullback, (features, output, new_stats) = jax.vjp(loss, params, has_aux=True)
            moved.append(new_stats)
            residuals.append((pullback, output.loss))
            metrics |= block_metrics(unit, output, carry)
            carry = next_carry(carry, jax.lax.stop_gradient(features), output)
        metrics, carry = totals(carry, metrics)
        return tuple(moved), metrics, residuals, carry

    def backward(
        self, stage: Stage, state: StageState, residuals: Any, cotangent: Any, step_id: jax.Array
    ) -> tuple[Any, Any]:
        """Gradient of every unit's own loss; nothing is sent back."""
        gradients: list[Any] = []
        for number, (unit, kept) in enumerate(zip(stage.units, residuals, strict=True)):
            if unit.frozen:
                gradients.append(None)
                continue
            pullback, loss = kept
            if stage.remat != "none":
                pullback = after(loss, pullback)
            factor = loss_scale.factor_of(state, number)
            (gradient,) = pullback(loss_scale.seed(loss, factor))
            gradients.append(loss_scale.unscaled(gradient, factor))
        return tuple(gradients), None
