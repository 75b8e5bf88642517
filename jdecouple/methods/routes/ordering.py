"""Which of two computations of one program comes first."""

from typing import Any

import jax
import jax.numpy as jnp


def after(first: Any, tree: Any) -> Any:
    """The arrays of `tree`, to be used once those of `first` are computed.

    On CPUs XLA drops an `optimization_barrier` before it merges equal computations and orders them,
    so that there the floating-point arrays depend on those of `first` by data.
    """
    return jax.lax.platform_dependent(first, tree, cpu=_by_data, default=_by_barrier)


def _by_barrier(first: Any, tree: Any) -> Any:
    return jax.lax.optimization_barrier((first, tree))[1]


def _by_data(first: Any, tree: Any) -> Any:
    signs = [
        jax.lax.bitcast_convert_type(leaf.ravel()[0].astype(jnp.float32), jnp.uint32) >> 31
        for leaf in jax.tree.leaves(first)
        if leaf.size and jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    if not signs:
        return tree
    never = sum(signs) > len(signs)

    def bound(leaf: jax.Array) -> jax.Array:
        is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
        if not is_float or jax.typeof(leaf).memory_space != jax.typeof(never).memory_space:
            return leaf  # what waits on the host comes back when it is used
        return jnp.where(never, jnp.zeros((), leaf.dtype), leaf)

    return jax.tree.map(bound, tree)
