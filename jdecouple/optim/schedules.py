"""Learning-rate schedules: functions of the count of steps taken, as in optax."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
import optax

from jdecouple._errors import require_int, require_number

Schedule: TypeAlias = Callable[[Any], Any]
"""A function from the number of steps taken to a learning rate."""
LearningRate: TypeAlias = float | Schedule
"""What an optimiser takes as its learning rate."""


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
