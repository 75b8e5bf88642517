"""Arrays that are computed once, whatever uses them."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata


def materialize(tree: Any) -> Any:
    """`tree`, whose floating-point arrays are in memory before what follows; so are their errors.

    XLA computes sums and activations anew in everything that uses them. On CPUs those of a shortcut
    that goes on from block to block are thus computed anew from the first block on: time and
    compilation grow with the square of the depth. There only a call that is not inlined ends that,
    since barriers are dropped before. On other devices nothing is done.
    """
    return jax.tree.map(_materialized, tree)


def _materialized(leaf: Any) -> Any:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    return jax.lax.platform_dependent(leaf, cpu=_called, default=lambda leaf: leaf)


def _called(leaf: jax.Array) -> jax.Array:
    with set_xla_metadata(inlineable="false"):
        return _held(leaf)


# A function that returned its argument would vanish.
_held = jax.jit(jax.lax.optimization_barrier, inline=False)
