"""Dynamic loss scaling: float16 gets the gradients of a loss that is multiplied by a power of two.

Float16 knows no number below 6e-8 and none above 65504. Gradients are computed of a larger loss, so
that few of them vanish, and divided in the dtype of the weights. Where one of them overflows, the
step is left out and the scale halved; after enough good steps it doubles (Micikevicius et al.,
arXiv 1710.03740, section 3.2). The rule is that of `flax.training.dynamic_scale`, which ties it to
one call of `jax.value_and_grad`, while a pipeline cuts that into pieces.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# A scale falls by half in a step and doubles in 2000: it begins high, and a few steps pay for it.
# That of DeInfoReg's losses on CIFAR-10 stays at 2**20.
START, LEAST, MOST = 2.0**24, 1.0, 2.0**32
PERIOD = 2000  # good steps until the scale doubles

Scale = dict[str, jax.Array]
"""Of one unit: "scale", the factor, and "good_steps", how many there were since it changed."""


def is_for(dtype: Any) -> bool:
    """Whether losses are scaled that are computed in a dtype (None: that of the weights)."""
    return dtype is not None and jnp.dtype(dtype) == jnp.float16


def initial() -> Scale:
    """The scale to begin with."""
    return {"scale": jnp.float32(START), "good_steps": jnp.int32(0)}


def fresh(blocks: Iterable[int]) -> dict[str, np.ndarray]:
    """The scales to begin with, of blocks by their indices, as a checkpoint would hold them.

    >>> list(fresh([1]))
    ['block_1/loss_scale/scale', 'block_1/loss_scale/good_steps']
    """
    values = {"scale": np.asarray(START, np.float32), "good_steps": np.asarray(0, np.int32)}
    return {f"block_{i}/loss_scale/{name}": x for i in blocks for name, x in values.items()}


def adjusted(scale: Scale, finite: jax.Array) -> Scale:
    """The scale of the next step, for one whose gradients were finite or not.

    >>> finite = jnp.array([True, False])
    >>> scale = adjusted(initial(), finite)
    >>> print(jnp.log2(scale["scale"]), scale["good_steps"])
    [24. 23.] [1 0]
    """
    factor, good = scale["scale"], scale["good_steps"] + 1
    grows = finite & (good >= PERIOD)
    larger = jnp.minimum(jnp.where(grows, 2 * factor, factor), MOST)
    return {
        "scale": jnp.where(finite, larger, jnp.maximum(factor / 2, LEAST)),
        "good_steps": jnp.where(finite & ~grows, good, 0),
    }


def factor_of(state: dict[str, Any], number: int = 0) -> jax.Array | None:
    """The factor of unit `number` of a stage's state; None where no loss is scaled."""
    return state["loss_scale"][number]["scale"] if "loss_scale" in state else None


def seed(loss: jax.Array, factor: jax.Array | None) -> jax.Array:
    """The cotangent of a loss with which its backward begins."""
    return jnp.ones_like(loss) if factor is None else jnp.full_like(loss, factor)


def unscaled(gradients: Any, factor: jax.Array | None) -> Any:
    """The gradients of the loss from those of the scaled one."""
    return gradients if factor is None else times(gradients, 1 / factor)


def times(tree: Any, factor: jax.Array) -> Any:
    """Arrays times a factor, computed in the wider dtype of both and given in their own."""
    return jax.tree.map(lambda leaf: (leaf * factor).astype(leaf.dtype), tree)


def all_finite(tree: Any) -> jax.Array:
    """Whether no entry of any array is infinite or NaN."""
    leaves = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]
    return jnp.stack(leaves).all() if leaves else jnp.array(True)


def select(which: jax.Array, first: Any, second: Any) -> Any:
    """The first tree where `which` holds, else the second."""
    return jax.tree.map(lambda one, other: jnp.where(which, one, other), first, second)
