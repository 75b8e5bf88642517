"""PETRA (arXiv 2406.02052): late errors without queues, by blocks that have an inverse.

Stage j gets its output back with the error, and makes its input of it by its current weights, of
which it also takes the gradient (equation 5, algorithm 1). In iteration t

    x_j(t+1)  = F_j(x_(j-1)(t), w_j(t))                 the newest batch goes up
    x'(t+1)   = inverse of F_j(x'_j(t), w_j(t))         an old one comes back
    gradients = those of F_j at x'(t+1) by w_j(t), for the error of the stage above
    w_j(t+1)  = a step by them

A stage with a block that has no inverse keeps its inputs until then, as in DSP (1909.02625).
"""

import dataclasses
from typing import Any, ClassVar

import jax

from jdecouple.methods.routes import loss_scale
from jdecouple.methods.routes.delayed import Delayed, with_scale
from jdecouple.methods.routes.route import Forward
from jdecouple.methods.routes.stage import Stage, StageState, floating, with_floating
from jdecouple.methods.routes.unit import Carry


@dataclasses.dataclass(frozen=True)
class Reversible(Delayed):
    """Delayed backpropagation whose stages make their inputs of their outputs, where they can.

    Attributes:
        accumulate: backward passes to one optimiser step, by the mean of their gradients.
    """

    forward_pass: str = "pipelined"
    replay: bool = True
    forward_first: bool = True
    accumulate_mean: bool = True
    rebuilds: ClassVar[bool] = True

    def forward(self, stage: Stage, state: StageState, carry: Carry, step_id: jax.Array) -> Forward:
        """As DSP's, but nothing is kept for what comes back."""
        stats, metrics, residuals, sent = super().forward(stage, state, carry, step_id)
        if stage.rebuilds_input:
            residuals = ()
        elif stage.is_last and stage.returns_input:
            residuals = residuals, carry["x"]
        return stats, metrics, residuals, sent

    def backward(
        self, stage: Stage, state: StageState, residuals: Any, cotangent: Any, step_id: jax.Array
    ) -> tuple[Any, Any]:
        """Pulls a late error back from the input that was kept or made anew, and returns both."""
        if stage.rebuilds_input:
            output = cotangent["input"]
            error = {name: x for name, x in cotangent.items() if name != "input"}
            error = error if stage.scaling == "stage" else error["x"]
            gradients, sent, received = self._rebuilt(stage, state, output, error, step_id)
        else:
            received = None
            if stage.is_last and stage.returns_input:
                residuals, received = residuals
            elif not stage.is_last:
                received = residuals["x"]
            gradients, sent = super().backward(stage, state, residuals, cotangent, step_id)
        if stage.returns_input:
            sent = {**(sent if stage.scaling == "stage" else {"x": sent}), "input": received}
        return gradients, sent

    def _rebuilt(
        self, stage: Stage, state: StageState, x: Any, cotangent: Any, step_id: jax.Array
    ) -> tuple[Any, Any, Any]:
        """Gradients, the error to send and the input, of the output `x`, unit by unit from above.

        A unit's branch is the same operation in the inverse and in the differentiation, of which
        the compiler makes one.
        """
        factor = loss_scale.factor_of(state)
        error = self.received(factor, cotangent)
        gradients = []
        parts = zip(stage.units, state["params"], state["stats"], strict=True)
        for unit, params, stats in reversed([*parts]):
            key = stage.key(unit, step_id)
            x = unit.invert(params, stats, x, key)

            def run(params, part, unit=unit, stats=stats, x=x, key=key):
                carry = {"x": with_floating(part, x)}
                return floating(unit.train(params, stats, carry, key)[0])

            gradient, error = jax.vjp(run, params, floating(x))[1](error)
            gradients.append(loss_scale.unscaled(gradient, factor))
        sent = error if stage.index else None
        return *with_scale(stage, factor, tuple(reversed(gradients)), sent), x
