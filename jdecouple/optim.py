"""Optimisers and learning-rate schedules of the papers, from optax parts.

A learning rate is a number or a schedule, a function of the count of steps taken (as in optax).
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from jdecouple._errors import choices, require_int, require_number

Schedule: TypeAlias = Callable[[Any], Any]
LearningRate: TypeAlias = float | Schedule


def _rate(learning_rate: LearningRate) -> LearningRate:
    """A schedule, or a number that is checked."""
    if not callable(learning_rate):
        require_number(positive=True, learning_rate=learning_rate)
    return learning_rate


def lars(
    learning_rate: LearningRate,
    *,
    weight_decay: float = 1e-4,
    momentum: float = 0.9,
    trust_coefficient: float = 0.001,
) -> optax.GradientTransformation:
    """LARS (arXiv 1708.03888) as DeInfoReg's authors define it.

    A parameter p of two or more axes with gradient g moves along q (g + weight_decay p), where
    q = trust_coefficient |p| / |g + weight_decay p|, or 1 where either norm is 0. Parameters of
    fewer axes (biases, BatchNorm) get neither decay nor adaptation. Momentum accumulates these, and
    the learning rate multiplies last (in `optax.lars` it comes before the momentum).

    >>> params = {"kernel": jnp.ones((2, 2))}
    >>> optimizer = lars(0.2, weight_decay=0.0)
    >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
    >>> updates["kernel"][0]  # 0.2 x 0.001
    Array([-0.0002, -0.0002], dtype=float32)

    Args:
        learning_rate: Number or schedule.
        weight_decay: L2 coefficient.
        momentum: Decay of the accumulated update, in [0, 1).
        trust_coefficient: The factor eta of q.

    Raises:
        ValueError: A number is out of range.
    """
    require_number(weight_decay=weight_decay)
    require_number(positive=True, trust_coefficient=trust_coefficient)
    require_number(below=1, momentum=momentum)

    def has_axes(params: Any) -> Any:
        return jax.tree.map(lambda p: p.ndim > 1, params)

    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask=has_axes),
        optax.masked(optax.scale_by_trust_ratio(trust_coefficient=trust_coefficient), has_axes),
        optax.trace(momentum),
        optax.scale_by_learning_rate(_rate(learning_rate)),
    )


def adam(
    learning_rate: LearningRate,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """Adam (arXiv 1412.6980); with `weight_decay` > 0 AdamW (arXiv 1711.05101).

    The decay is decoupled: it is added after the scaling by the moments and multiplied by the
    learning rate. (The papers' code ignored weight decay under Adam.)

    Args:
        learning_rate: Number or schedule.
        b1: Decay of the first moment, in [0, 1).
        b2: Decay of the second moment, in [0, 1).
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay coefficient.

    Raises:
        ValueError: A number is out of range.
    """
    require_number(weight_decay=weight_decay, eps=eps)
    require_number(below=1, b1=b1, b2=b2)
    if weight_decay == 0:  # not AdamW, whose state has another layout in checkpoints
        return optax.adam(_rate(learning_rate), b1=b1, b2=b2, eps=eps)
    return optax.adamw(_rate(learning_rate), b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)


def sgd(
    learning_rate: LearningRate,
    *,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """Stochastic gradient descent; the decay is L2, added to the gradient before the momentum.

    Args:
        learning_rate: Number or schedule.
        momentum: Decay of the accumulated gradient, in [0, 1).
        nesterov: Whether the step looks ahead along the momentum.
        weight_decay: L2 coefficient, on every parameter.

    Raises:
        ValueError: A number is out of range, or `nesterov` without momentum.
    """
    require_number(weight_decay=weight_decay)
    require_number(below=1, momentum=momentum)
    if nesterov and momentum == 0:
        raise ValueError("nesterov is True: a momentum above 0 is needed")
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.trace(momentum, nesterov=nesterov) if momentum else optax.identity(),
        optax.scale_by_learning_rate(_rate(learning_rate)),
    )


def constant(value: float) -> Schedule:
    """The same learning rate at every step."""
    require_number(positive=True, value=value)
    return optax.constant_schedule(value)


def cosine(base: float, end: float, steps: int) -> Schedule:
    """Half a cosine from `base` at step 0 to `end` at step `steps` and after.

    >>> schedule = cosine(0.2, 0.0, 10)
    >>> [round(float(schedule(step)), 3) for step in (0, 5, 10, 99)]
    [0.2, 0.1, 0.0, 0.0]

    Raises:
        ValueError: `base` or `steps` is not positive, or `end` is negative.
    """
    require_number(positive=True, base=base)
    require_number(end=end)
    require_int(1, steps=steps)
    return optax.cosine_decay_schedule(base, steps, alpha=end / base)


def step_decay(base: float, boundaries: Sequence[int], factor: float) -> Schedule:
    """`base`, multiplied by `factor` once for each boundary (a count of steps) reached.

    Raises:
        ValueError: `base` or `factor` is not positive, or the boundaries do not increase.
    """
    require_number(positive=True, base=base, factor=factor)
    for boundary in boundaries:
        require_int(1, boundary=boundary)
    if list(boundaries) != sorted(set(boundaries)):
        raise ValueError(f"boundaries are {list(boundaries)}: increasing ones are needed")
    return optax.piecewise_constant_schedule(base, dict.fromkeys(boundaries, factor))


def warmup(schedule: Schedule, steps: int, start: float = 0.01) -> Schedule:
    """`schedule` times a factor that rises linearly over the first `steps` steps to 1.

    The factor of step n (from 0) is start + (1 - start) (n + 1) / steps, as in ADL
    (arXiv 2012.03747), which warms up from 0.01 over 5 epochs.

    Raises:
        ValueError: `steps` is not a positive integer, or `start` is outside [0, 1).
    """
    require_int(1, steps=steps)
    require_number(below=1, start=start)

    def warmed(count: Any) -> Any:
        return schedule(count) * jnp.minimum(start + (1 - start) * (count + 1) / steps, 1.0)

    return warmed


def every(schedule: Schedule, passes: int) -> Schedule:
    """`schedule`, whose steps are backward passes, for an optimiser that steps at each `passes`-th.

    Raises:
        ValueError: `passes` is not a positive integer.
    """
    require_int(1, passes=passes)
    return schedule if passes == 1 else lambda count: schedule(count * passes)


def per_epoch(schedule: Schedule, steps_per_epoch: int) -> Schedule:
    """`schedule` read at the start of each epoch and held, as the papers' code does.

    Raises:
        ValueError: `steps_per_epoch` is not a positive integer.
    """
    require_int(1, steps_per_epoch=steps_per_epoch)
    return lambda count: schedule(count // steps_per_epoch * steps_per_epoch)


_OPTIMIZERS: dict[str, Callable[..., Any]] = {"adam": adam, "lars": lars, "sgd": sgd}
_SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "constant": constant,
    "cosine": cosine,
    "step_decay": step_decay,
}


def names() -> tuple[str, ...]:
    """Names of optimisers that :func:`get` knows, sorted."""
    return tuple(_OPTIMIZERS)


def get(name: str) -> Callable[..., optax.GradientTransformation]:
    """Optimiser called `name`; ValueError names those known."""
    if name not in _OPTIMIZERS:
        raise ValueError(f"unknown optimizer {name!r}: {choices(name, names())}")
    return _OPTIMIZERS[name]


def get_schedule(name: str) -> Callable[..., Schedule]:
    """Learning-rate schedule called `name`; ValueError names those known."""
    if name not in _SCHEDULES:
        raise ValueError(f"unknown learning-rate schedule {name!r}: {choices(name, _SCHEDULES)}")
    return _SCHEDULES[name]
