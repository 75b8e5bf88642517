"""What goes with an optimiser's update: gradients of several batches, averages of the weights."""

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax


def accumulating(
    optimizer: optax.GradientTransformation, batches: int, *, mean: bool = True
) -> optax.GradientTransformation:
    """The optimiser, which then steps once for so many gradients, by their mean or their sum."""
    if batches == 1:
        return optimizer
    return optax.MultiSteps(
        optimizer,
        int(batches),
        use_grad_mean=mean,
        accumulator_dtype=jax.dtypes.canonicalize_dtype(jnp.float64),
    ).gradient_transformation()


def has_stepped(before: Any, after: Any) -> Any:
    """Whether an update of an optimiser's state was a step, or one of the gradients to one."""
    pairs = zip(_steps(before), _steps(after), strict=True)
    changed = [old != new for old, new in pairs]
    return jnp.all(jnp.stack(changed)) if changed else True


def _steps(state: Any) -> Iterator[Any]:
    """Counts of the steps in an optimiser's state that wait for several gradients."""

    def waits(node: Any) -> bool:
        return isinstance(node, optax.MultiStepsState)

    for node in filter(waits, jax.tree.leaves(state, is_leaf=waits)):
        yield node.gradient_step
        yield from _steps(node.inner_opt_state)


def begin_average(arrays: Any) -> Any:
    """The average of arrays so far, which is they themselves, in float32 at least."""

    def begin(leaf: Any) -> Any:
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return leaf
        return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))

    return jax.tree.map(begin, arrays)


def move_average(decay: float, average: Any, arrays: Any, stepped: Any = True) -> Any:
    """An exponential moving average, moved if the arrays have; whole numbers are taken over.

    It becomes decay x average + (1 - decay) x arrays.
    """

    def move(old: jax.Array, leaf: jax.Array) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            leaf = (decay * old + (1 - decay) * leaf.astype(old.dtype)).astype(old.dtype)
        return leaf if stepped is True else jnp.where(stepped, leaf, old)

    return jax.tree.map(move, average, arrays)


def averaged(state: dict[str, Any]) -> dict[str, Any]:
    """What a stage is evaluated with: its "params" and "stats", or averages where it has them."""
    own = {kind: state[kind] for kind in ("params", "stats")}
    if "ema" not in state:
        return own
    averages = {kind: tuple(average[kind] for average in state["ema"]) for kind in own}
    return jax.tree.map(lambda average, leaf: average.astype(leaf.dtype), averages, own)


@runtime_checkable
class LooksAhead(Protocol):
    """Part of an optimiser's state that knows where the weights are going."""

    def ahead_by(self, weights: Any) -> Any:
        """What to add to the weights for a forward whose backward is late."""


def ahead(weights: Any, opt: Any) -> Any:
    """The weights that a forward with a late backward computes with, by an optimiser's state.

    They are those given unless something in the state looks ahead.
    """
    for node in looking_ahead(opt):
        weights = optax.apply_updates(weights, node.ahead_by(weights))
    return weights


def looking_ahead(opt: Any) -> list[LooksAhead]:
    """The parts of an optimiser's state that look ahead."""

    def looks(node: Any) -> bool:
        return isinstance(node, LooksAhead)

    return list(filter(looks, jax.tree.leaves(opt, is_leaf=looks)))
