"""Correctors: what an optimiser does about gradients that are late, once it is told how late.

A corrector is a function of an optimiser and a delay, and makes an optax transformation. The delay
is that of a stage, in its steps, and need not be whole: the greater age of weights and error in
`staleness` of its route. With a delay of 0 every corrector gives the optimiser itself. What each
assumes is in docs/delay.md.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jdecouple._errors import choices, require_int, require_number

Corrected = Callable[[float], optax.GradientTransformation]
"""An optimiser that is to be told its delay, as a Trainer takes it."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trail:
    """Where the weights come from: the part of an optimiser's state that says where they go.

    A forward whose backward is late computes with the weights plus `ahead_by`. Any optimiser whose
    state holds an object with such a method moves the forwards of its stage.

    Attributes:
        previous: the weights before the last step.
        steps: how many steps there were.
        reach: how many steps ahead.
    """

    previous: Any
    steps: jax.Array
    reach: float = dataclasses.field(metadata={"static": True})

    def ahead_by(self, weights: Any) -> Any:
        """How far the last step, made `reach` times, would bring them; 0 before the first."""

        def offset(leaf: jax.Array, before: jax.Array) -> jax.Array:
            return jnp.where(self.steps > 0, self.reach * (leaf - before), 0)

        return jax.tree.map(offset, weights, self.previous)

    def on(self, weights: Any) -> "Trail":
        """The trail behind a step from these weights."""
        return dataclasses.replace(self, previous=weights, steps=self.steps + 1)


def none(optimizer: optax.GradientTransformation, delay: float) -> optax.GradientTransformation:
    """Late gradients are taken as they come."""
    return optimizer


def weight_prediction(
    optimizer: optax.GradientTransformation, delay: float, *, horizon: float = 1.0
) -> optax.GradientTransformation:
    """Forwards compute with the weights that are expected when their gradient comes.

    With delay D the forward computes with w + `horizon` D (w - w'), where w' are the weights before
    the last step. So the direction is the optimiser's: the momentum of SGD in SpecTrain (arXiv
    1809.02839), Adam's in XPipe (1911.04610), or any other's. It is the linear weight prediction of
    Kosson et al. (2003.11666) in the form that takes differences of weights.

    Args:
        optimizer: what steps.
        delay: of the stage, in its steps.
        horizon: How far ahead, in delays; Kosson et al. try 2 as well.

    Raises:
        ValueError: A number is out of range.
    """
    require_number(delay=delay)
    require_number(positive=True, horizon=horizon)
    if not delay:
        return optimizer
    return _trailing(optimizer, horizon * delay, lambda updates, *_: updates)


def look_ahead(
    optimizer: optax.GradientTransformation, delay: float, *, momentum: float = 0.9
) -> optax.GradientTransformation:
    """Nesterov's method for late gradients (Ajanthan et al., arXiv 2505.01099, equation 10).

    With d = m (w - w'), w' the weights before the last step and m the momentum, a step goes from w
    to w + d + (1 - m) u, where u is what the optimiser makes of a gradient that was computed with
    w + d of its time. The optimiser should have no momentum of its own.

    Args:
        optimizer: what steps.
        delay: of the stage, in its steps; where it is above 0 its size makes no difference.
        momentum: The factor m, in [0, 1).

    Raises:
        ValueError: A number is out of range.
    """
    require_number(delay=delay)
    require_number(below=1, momentum=momentum)
    if not delay:
        return optimizer

    def mix(updates: Any, weights: Any, trail: Trail) -> Any:
        ahead = trail.ahead_by(weights)
        return jax.tree.map(lambda u, d: d + (1 - momentum) * u, updates, ahead)

    return _trailing(optimizer, momentum, mix)


class _TrailedState(NamedTuple):
    inner: Any
    trail: Trail


def _trailing(
    optimizer: optax.GradientTransformation,
    reach: float,
    change: Callable[[Any, Any, Trail], Any],
) -> optax.GradientTransformation:
    """The optimiser, with a trail in its state, and its updates changed."""

    def init(weights: Any) -> _TrailedState:
        previous = jax.tree.map(jnp.zeros_like, weights)  # not the same arrays, which are donated
        trail = Trail(previous, jnp.zeros((), jnp.int32), reach)
        return _TrailedState(optimizer.init(weights), trail)

    def update(gradients: Any, state: _TrailedState, weights: Any = None) -> tuple[Any, Any]:
        updates, inner = optimizer.update(gradients, state.inner, weights)
        updates = change(updates, weights, state.trail)
        return updates, _TrailedState(inner, state.trail.on(weights))

    return optax.GradientTransformation(init, update)


def spike_compensation(
    optimizer: optax.GradientTransformation, delay: float, *, momentum: float = 0.9
) -> optax.GradientTransformation:
    """A late gradient makes up at once for the steps of momentum that it has missed.

    Kosson et al. (arXiv 2003.11666): with delay D and momentum m, v = m v + g moves the weights by
    -rate (a v + b g), where a = m^D and b = (1 - m^D) / (1 - m). That is momentum on
    (a + b) g - m b g', with g' the gradient before, which is what the optimiser gets here. So it is
    the paper's for SGD without Nesterov's momentum; a decay of weights, which is never late, is not
    compensated. The second moment of Adam would undo it.

    Args:
        optimizer: what steps, with that momentum.
        delay: of the stage, in its steps.
        momentum: The factor m of the optimiser's momentum, in [0, 1); in a configuration by default
            that of the optimizer.

    Raises:
        ValueError: A number is out of range.
    """
    require_number(delay=delay)
    require_number(below=1, momentum=momentum)
    if not delay or not momentum:
        return optimizer
    a = momentum**delay
    b = (1 - a) / (1 - momentum)

    def init(weights: Any) -> Any:
        return jax.tree.map(jnp.zeros_like, weights)

    def update(gradients: Any, before: Any, weights: Any = None) -> tuple[Any, Any]:
        spiked = jax.tree.map(lambda g, old: (a + b) * g - momentum * b * old, gradients, before)
        return spiked, gradients

    return optax.chain(optax.GradientTransformation(init, update), optimizer)


class _Steps(NamedTuple):
    last: Any  # [D, ...], in turn
    place: jax.Array


def error_feedback(
    optimizer: optax.GradientTransformation, delay: float, *, strength: float = 1.0
) -> optax.GradientTransformation:
    """A step adds what an earlier one should have been and was not.

    Zmushko et al. (arXiv 2606.30634) for a delay of one step: the optimiser's step u moves the
    weights by u + `strength` (u - u'), where u' is the one before: the gradient of u was asked for
    when u' was made. With delay D, rounded up, u' is here the step D before: not in the paper.

    Args:
        optimizer: what steps.
        delay: of the stage, in its steps; so many steps are kept.
        strength: Share of the error that is fed back; 1 in the paper.

    Raises:
        ValueError: A number is out of range.
    """
    require_number(delay=delay, strength=strength)
    if not delay:
        return optimizer
    length = math.ceil(delay)

    def init(weights: Any) -> _Steps:
        last = jax.tree.map(lambda leaf: jnp.zeros((length, *leaf.shape), leaf.dtype), weights)
        return _Steps(last, jnp.zeros((), jnp.int32))

    def update(steps: Any, state: _Steps, weights: Any = None) -> tuple[Any, Any]:
        def corrected(step: jax.Array, last: jax.Array) -> jax.Array:
            return step + strength * (step - last[state.place])

        fed = jax.tree.map(corrected, steps, state.last)
        last = jax.tree.map(lambda step, old: old.at[state.place].set(step), steps, state.last)
        return fed, _Steps(last, (state.place + 1) % length)

    return optax.chain(optimizer, optax.GradientTransformation(init, update))


def rate_scaling(
    optimizer: optax.GradientTransformation, delay: float, *, power: float = 1.0, steps: int = 0
) -> optax.GradientTransformation:
    """Stages learn the slower, the later their gradients are.

    With delay D above 1 updates are divided by D^p. In PipeMare (arXiv 1910.05124, technique T1) p
    falls from 1 to 0 over the first steps; Ajanthan et al. (2505.01099) keep it.

    Args:
        optimizer: what steps.
        delay: of the stage, in its steps; one below 1 counts as 1.
        power: The exponent p that it begins with.
        steps: Steps over which p falls to 0, linearly; 0: it stays.

    Raises:
        ValueError: A number is out of range.
    """
    require_number(delay=delay, power=power)
    require_int(0, steps=steps)
    if delay <= 1:
        return optimizer

    def factor(count: Any) -> Any:
        left = jnp.maximum(1 - jnp.asarray(count, float) / steps, 0) if steps else 1.0
        return delay ** (-power * left)

    scale = optax.scale_by_schedule(factor) if steps else optax.scale(factor(0))
    return optax.chain(optimizer, scale)


_CORRECTORS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "none": none,
    "weight_prediction": weight_prediction,
    "look_ahead": look_ahead,
    "spike_compensation": spike_compensation,
    "error_feedback": error_feedback,
    "rate_scaling": rate_scaling,
}


def names() -> tuple[str, ...]:
    """Names of correctors that `get` knows; "none" among them."""
    return tuple(_CORRECTORS)


def get(name: str) -> Callable[..., optax.GradientTransformation]:
    """Corrector called `name`; ValueError names those known."""
    if name not in _CORRECTORS:
        raise ValueError(f"unknown corrector {name!r}: {choices(name, _CORRECTORS)}")
    return _CORRECTORS[name]


def corrected(optimizer: optax.GradientTransformation, name: str, **options: Any) -> Corrected:
    """An optimiser with a corrector, for a Trainer to tell the delays of its stages.

    >>> import jax.numpy as jnp
    >>> slowed = corrected(optax.sgd(0.1), "rate_scaling", power=0.5)
    >>> late, gradient = slowed(delay=4), {"w": jnp.ones(1)}
    >>> late.update(gradient, late.init(gradient))[0]["w"]  # 0.1 / 4 ** 0.5
    Array([-0.05], dtype=float32)

    Args:
        optimizer: what steps.
        name: of the corrector, one of `jdecouple.optim.correctors.names()`.
        **options: of the corrector.

    Raises:
        ValueError: There is no such corrector; or, once it is told a delay, a bad option.
    """
    return functools.partial(get(name), optimizer, **options)
