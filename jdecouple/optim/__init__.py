"""Optimisers, correctors of late gradients and learning-rate schedules, from optax parts.

A learning rate is a number or a schedule, a function of the count of steps taken (as in optax).
"""

from collections.abc import Callable
from typing import Any

import optax

from jdecouple._errors import choices
from jdecouple.optim.correctors import (
    corrected,
    error_feedback,
    look_ahead,
    rate_scaling,
    spike_compensation,
    weight_prediction,
)
from jdecouple.optim.imported import imported
from jdecouple.optim.optimizers import adam, adamw, lars, muon, nadam, nadamw, sgd
from jdecouple.optim.schedules import (
    LearningRate,
    Schedule,
    constant,
    cosine,
    every,
    per_epoch,
    step_decay,
    warmup,
)

__all__ = [
    "LearningRate",
    "Schedule",
    "adam",
    "adamw",
    "constant",
    "corrected",
    "cosine",
    "error_feedback",
    "every",
    "get",
    "get_schedule",
    "lars",
    "look_ahead",
    "muon",
    "nadam",
    "nadamw",
    "names",
    "per_epoch",
    "rate_scaling",
    "sgd",
    "spike_compensation",
    "step_decay",
    "warmup",
    "weight_prediction",
]

_OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "adam": adam,
    "adamw": adamw,
    "lars": lars,
    "muon": muon,
    "nadam": nadam,
    "nadamw": nadamw,
    "sgd": sgd,
}
_SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "constant": constant,
    "cosine": cosine,
    "step_decay": step_decay,
}


def names() -> tuple[str, ...]:
    """Names of optimisers that :func:`get` knows, sorted."""
    return tuple(_OPTIMIZERS)


def get(name: str) -> Callable[..., optax.GradientTransformation]:
    """Optimiser called `name`, or any other as "module:function", such as "optax:lion".

    The function is called with the learning rate as `learning_rate`, or as its first argument where
    that has another name.

    >>> import jax.numpy as jnp
    >>> get("optax:lion")(0.01, b1=0.8).init({"w": jnp.ones(2)})[0].count
    Array(0, dtype=int32)

    Raises:
        ValueError: there is none; it names those known. What it returns raises one for arguments
            that its function refuses, and for a function that makes no optax transformation.
    """
    if ":" in name:
        return imported(name)
    if name not in _OPTIMIZERS:
        known = (*names(), "module:function")
        raise ValueError(f"unknown optimizer {name!r}: {choices(name, known)}")
    return _OPTIMIZERS[name]


def get_schedule(name: str) -> Callable[..., Schedule]:
    """Learning-rate schedule called `name`; ValueError names those known."""
    if name not in _SCHEDULES:
        raise ValueError(f"unknown learning-rate schedule {name!r}: {choices(name, _SCHEDULES)}")
    return _SCHEDULES[name]
