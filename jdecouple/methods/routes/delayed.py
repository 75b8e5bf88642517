"""Delayed routes: the error of the loss reaches a stage iterations after its forward.

DDG (arXiv 1804.10574), Features Replay (1807.04511), FDG (1906.09108), ADL (2012.03747) and DSP
(1909.02625) are settings of this one route.
"""

import dataclasses
import functools
import itertools
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jdecouple._errors import require_bool, require_int, require_number
from jdecouple.methods.routes import loss_scale
from jdecouple.methods.routes.remat import REMATS
from jdecouple.methods.routes.route import Forward, Route, Staleness
from jdecouple.methods.routes.stage import Stage, StageState
from jdecouple.methods.routes.synchronous import linearize, pull_back
from jdecouple.methods.routes.unit import Carry
from jdecouple.methods.routes.updates import accumulating

# (forward, backward): schedules, the second with early errors
_SCHEDULES = {
    ("locked", "locked"): ("sequential",),
    ("locked", "pipelined"): ("delayed_locked", "delayed_locked_split"),
    ("pipelined", "pipelined"): ("delayed", "delayed_split"),
}
_FORWARD_FIRST = ("delayed_forward", "delayed_forward_split")


@dataclasses.dataclass(frozen=True)
class Delayed(Route):
    """Backpropagation whose error takes one iteration from a stage to the one below.

    With K stages, stage k is late by K-1-k iterations where the forward is locked, and by
    2(K-1-k) where activations, too, take an iteration a stage. The last stage trains at once.

    Attributes:
        forward_pass: "locked" (a batch goes through all stages in one iteration) or "pipelined"
            (one stage an iteration).
        backward_pass: "pipelined", or "locked": no delay, which is exact backpropagation.
        replay: whether a stage keeps its inputs alone and repeats the forward with its current
            weights before the backward; else it keeps what the backward needs, activations and
            weights of forward time.
        current_weights: whether a backward of kept activations multiplies by the current weights.
        beta: factor in (0, 1] on the error at each boundary (gradient shrinking, 1906.09108).
        accumulate: backward passes to one optimiser step (2012.03747).
        accumulate_mean: whether the step uses the mean of their gradients instead of the sum.
        first_stage_lr_scale: factor on the updates of the first stage.
        forward_first: whether a stage forwards before it goes back and steps in an iteration, as it
            does in any case where the forward is locked.

    Raises:
        ValueError: a value that is out of range, or two that exclude each other.
    """

    forward_pass: str
    replay: bool = False
    backward_pass: str = "pipelined"
    current_weights: bool = False
    beta: float = 1.0
    accumulate: int = 1
    accumulate_mean: bool = False
    first_stage_lr_scale: float = 1.0
    forward_first: bool = False

    def __post_init__(self) -> None:
        for name in ("replay", "current_weights", "accumulate_mean", "forward_first"):
            require_bool(**{name: getattr(self, name)})
        if (self.forward_pass, self.backward_pass) not in list(_SCHEDULES):
            raise ValueError(
                f"forward_pass {self.forward_pass!r} with backward_pass {self.backward_pass!r}: "
                f"allowed are {', '.join(' with '.join(pair) for pair in _SCHEDULES)}"
            )
        if self.replay and self.current_weights:
            raise ValueError("current_weights has no meaning with replay, which always uses them")
        beta = self.beta
        if isinstance(beta, bool) or not isinstance(beta, Real) or not 0 < beta <= 1:
            raise ValueError(f"beta is {beta!r}: a number above 0 and at most 1 is needed")
        require_int(1, accumulate=self.accumulate)
        require_number(positive=True, first_stage_lr_scale=self.first_stage_lr_scale)

    @property
    def schedules(self) -> tuple[str, ...]:
        """The schedules that have these delays."""
        if self.forward_first and self.forward_pass == "pipelined":
            return _FORWARD_FIRST
        return _SCHEDULES[self.forward_pass, self.backward_pass]

    def forward(self, stage: Stage, state: StageState, carry: Carry, step_id: jax.Array) -> Forward:
        """Forward of the stage; the residuals may leave the compiled call for a queue."""
        state = {**state, "params": stage.ahead(state)}
        stats, metrics, linearized, sent = linearize(stage, state, carry, step_id)
        if stage.is_last:  # its backward follows in the same call
            residuals: Any = linearized
        elif self.replay:
            residuals = carry
        else:
            residuals = list(itertools.compress(jax.tree.leaves(linearized), self._kept(stage)))
        return stats, metrics, residuals, sent

    def backward(
        self, stage: Stage, state: StageState, residuals: Any, cotangent: Any, step_id: jax.Array
    ) -> tuple[Any, Any]:
        """Pulls a late error back, and adds the stage's own losses if it has any.

        Where losses are scaled, an error has the scale that its sender had when it sent it.
        """
        factor = loss_scale.factor_of(state)
        if stage.is_last:
            return with_scale(stage, factor, *pull_back(stage, residuals, None, factor))
        error = self.received(factor, cotangent)
        if self.replay:
            linearized = linearize(stage, state, residuals, step_id)[2]
        else:
            linearized = self._restored(stage, state, residuals)
        return with_scale(stage, factor, *pull_back(stage, linearized, error, factor))

    def received(self, factor: jax.Array | None, cotangent: Any) -> Any:
        """An error as a stage takes it: with its own scale, and shrunk."""
        if factor is not None:
            before = jnp.maximum(cotangent["scale"][0], loss_scale.LEAST)  # 0 in an empty queue
            cotangent = loss_scale.times(cotangent["x"], factor / before)
        if self.beta != 1:
            cotangent = jax.tree.map(lambda leaf: self.beta * leaf, cotangent)
        return cotangent

    @property
    def stashes_weights(self) -> bool:
        """Whether the weights of a forward wait for its backward with the activations."""
        return not self.current_weights

    @property
    def remats(self) -> tuple[str, ...]:
        """A queue is on the device, and with current weights activations cannot be repeated."""
        if self.replay:
            return REMATS
        return ("none",) if self.current_weights else ("none", "elementwise", "blocks", "stages")

    def optimizer(
        self, stage: int, optimizer: optax.GradientTransformation
    ) -> optax.GradientTransformation:
        """Accumulation over backward passes, and the first stage's factor."""
        if stage == 0 and self.first_stage_lr_scale != 1:
            optimizer = optax.chain(optimizer, optax.scale(self.first_stage_lr_scale))
        return accumulating(optimizer, self.accumulate, mean=self.accumulate_mean)

    def staleness(self, stage: int, num_stages: int, *, shared: bool = False) -> Staleness:
        """Staleness in the steady state; under accumulation the average over its passes.

        A pipelined stage steps before it forwards, so of the 2(K-1-k) iterations between its
        forward and its backward one less changes its weights; but all do with `forward_first`, and
        all change what is shared, which steps at the end of an iteration. With `current_weights`
        that is the age of the activations.
        """
        above = 0 if self.backward_pass == "locked" else num_stages - 1 - stage
        steps_first = not (shared or self.forward_first)
        late = 2 * above - steps_first if self.forward_pass == "pipelined" else above
        weights = 0 if self.replay else max(late, 0)
        return Staleness(weights / self.accumulate, above / self.accumulate)

    def _kept(self, stage: Stage) -> list[bool]:
        """For every leaf of a linearisation, whether it is kept for its backward.

        Constants need not, and weights only where the backward is to use those of forward time.
        """
        batch, state = _shapes(stage)
        jaxpr = jax.make_jaxpr(functools.partial(_linearized, stage))(batch, state).jaxpr
        count = len(jaxpr.invars) if self.stashes_weights else len(jax.tree.leaves(batch))
        reached = set(map(id, jaxpr.invars[:count]))
        for equation in jaxpr.eqns:
            if any(id(variable) in reached for variable in equation.invars):
                reached.update(map(id, equation.outvars))
        return [id(variable) in reached for variable in jaxpr.outvars]

    def _restored(self, stage: Stage, state: StageState, kept: list) -> Any:
        """The linearisation of which a forward kept some leaves.

        The others are computed anew: they depend on nothing but, unless those are kept too, the
        weights, and of the forward around them the compiler leaves nothing.
        """
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), _shapes(stage)[0])
        leaves, structure = jax.tree.flatten(_linearized(stage, zeros, state))
        residuals, keeps = iter(kept), self._kept(stage)
        restored = [next(residuals) if keep else x for x, keep in zip(leaves, keeps, strict=True)]
        return jax.tree.unflatten(structure, restored)


def with_scale(
    stage: Stage, factor: jax.Array | None, gradients: Any, error: Any
) -> tuple[Any, Any]:
    """Gradients, and the error for the stage below with its scale.

    One that overflows is no use below, so that the step must be left out here, too.
    """
    if factor is None or error is None:
        return gradients, error
    sound = loss_scale.all_finite(error)
    gradients = jax.tree.map(lambda leaf: jnp.where(sound, leaf, jnp.nan), gradients)
    size = stage.carry["label"].shape[0]
    return gradients, {"x": error, "scale": jnp.full(size, factor)}


def _linearized(stage: Stage, batch: tuple[Carry, jax.Array], state: StageState) -> Any:
    return linearize(stage, state, *batch)[2]


def _shapes(stage: Stage) -> tuple[tuple[Carry, jax.ShapeDtypeStruct], StageState]:
    """Shapes of the last two arguments of `_linearized`."""
    step_id = jax.ShapeDtypeStruct((2,), jnp.int32)
    return (stage.carry, step_id), jax.eval_shape(stage.initial)
