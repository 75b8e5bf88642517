"""The optimisers of stages: told how late their gradients are, and checked."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from jdecouple._errors import first_line, require_int, require_type
from jdecouple.methods import Method
from jdecouple.methods.routes import Unit
from jdecouple.methods.routes.updates import looking_ahead

Optimizer: TypeAlias = (
    optax.GradientTransformation | optax.MultiSteps | Callable[..., optax.GradientTransformation]
)
"""What steps: an optax transformation, or a function that makes one for a stage's `delay`."""


def optimizers(
    optimizer: Optimizer, method: Method, num_stages: int, accumulate: int, units: Sequence[Unit]
) -> list[optax.GradientTransformation]:
    """The optimiser of every stage, told its delay.

    Raises:
        TypeError: what is given, or made, is no optimiser.
        ValueError: it needs more than gradients and weights, or the method cannot have it.
    """
    delays = [method.route.delay(k, num_stages) / accumulate for k in range(num_stages)]
    told = {delay: told_delay(optimizer, delay) for delay in {*delays}}
    for each in told.values():
        _check_update(each, units)
        if not method.route.may_look_ahead and looking_ahead(jax.eval_shape(each.init, {})):
            raise ValueError(
                "optimizer computes forwards with other weights than are stored, by which "
                f"{method.name} does not go back: a corrector of gradients or steps is allowed"
            )
    return [told[delay] for delay in delays]


def told_delay(optimizer: Optimizer, delay: float) -> optax.GradientTransformation:
    """The optimiser of a stage whose gradients are late by `delay` of its steps.

    Raises:
        TypeError: what is given, or made, is no optimiser.
    """
    label = "optimizer"
    if callable(optimizer) and "delay" in inspect.signature(optimizer).parameters:
        optimizer, label = optimizer(delay=delay), "what optimizer returns"
    if isinstance(optimizer, optax.MultiSteps):
        optimizer = optimizer.gradient_transformation()
    require_type(optax.GradientTransformation, **{label: optimizer})
    return optimizer


def _check_update(optimizer: optax.GradientTransformation, units: Sequence[Unit]) -> None:
    """Raises ValueError for an optimizer that needs more than gradients and weights, or misfits."""

    def update(params: Any) -> Any:
        return optimizer.update(params, optimizer.init(params), params)[0]

    params: Any = {"weights": jax.ShapeDtypeStruct((2, 3), jnp.float32)}
    try:
        updates = jax.eval_shape(update, params)  # quick: there is next to nothing to trace
    except Exception:  # of any kind; it may be the lack of weights of other names
        states = (jax.eval_shape(unit.initial) for unit in units)
        params = next(filter(None, (params for params, _ in states)), {})
        try:
            updates = jax.eval_shape(update, params)
        except Exception as error:
            raise ValueError(
                "optimizer cannot step by gradients and weights alone, which is all that a block "
                f"has for it: {first_line(error)}"
            ) from error
    moved, weights = (list(map(jnp.shape, jax.tree.leaves(tree))) for tree in (updates, params))
    if moved != weights:  # else they would be broadcast
        raise ValueError(
            f"optimizer makes updates of shapes {moved} for weights of shapes {weights}: the same "
            "ones are needed"
        )


def check_accumulate(accumulate: int, method: Method, clip_norm: float | None) -> None:
    """Raises ValueError for a number of batches to a step that does not fit what else is asked."""
    require_int(1, accumulate=accumulate)
    if accumulate == 1:
        return
    if (passes := method.route.accumulate) > 1:
        raise ValueError(
            f"accumulate is {accumulate}, and method {method.name} accumulates {passes} backward "
            "passes of its own: leave one of them at 1"
        )
    if clip_norm is not None:
        raise ValueError(
            f"accumulate is {accumulate}, which clip_norm does not bound the sum of: leave it at "
            "None, or clip each block by optax.clip_by_global_norm in the optimizer"
        )
