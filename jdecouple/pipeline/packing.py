"""A message as one array, for links between processes.

JAX's socket transport (0.10) has at most four arrays on their way from a process, and a place is
free again after the link's round trip: the arrays of a message would wait for one another. A stage
packs what it sends, and unpacks what it gets, inside its own compiled call: a call in between
would wait for its turn on the device.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def packed(shapes: Any) -> jax.ShapeDtypeStruct:
    """Shape of a tree of arrays [batch, ...] as one array [batch, words].

    Args:
        shapes: its `jax.ShapeDtypeStruct`s.
    """
    leaves = jax.tree.leaves(shapes)
    unit = _unit(leaves)
    words = sum(_words(leaf, unit) for leaf in leaves)
    return jax.ShapeDtypeStruct((leaves[0].shape[0], words), unit)


def pack(tree: Any) -> jax.Array:
    """Joins the arrays [batch, ...] of a tree, bit for bit."""
    leaves = jax.tree.leaves(tree)
    unit = _unit(leaves)
    rows = [_bits(leaf, unit).reshape(leaf.shape[0], _words(leaf, unit)) for leaf in leaves]
    return jnp.concatenate(rows, axis=1)


def unpack(array: jax.Array, shapes: Any) -> Any:
    """The tree of these `jax.ShapeDtypeStruct`s that an array was packed from."""
    leaves, structure = jax.tree.flatten(shapes)
    ends = np.cumsum([_words(leaf, array.dtype) for leaf in leaves])
    rows = jnp.split(array, ends[:-1], axis=1)
    return jax.tree.unflatten(structure, map(_from_bits, rows, leaves))


def _unit(leaves: Sequence[Any]) -> np.dtype:
    """The unsigned integers that all leaves divide into."""
    return np.dtype(f"uint{8 * min(np.dtype(leaf.dtype).itemsize for leaf in leaves)}")


def _words(leaf: Any, unit: np.dtype) -> int:
    """How many units an example of a leaf has."""
    return math.prod(leaf.shape[1:]) * (np.dtype(leaf.dtype).itemsize // unit.itemsize)


def _bits(leaf: jax.Array, unit: np.dtype) -> jax.Array:
    if leaf.dtype == bool:
        return leaf.astype(unit)
    return jax.lax.bitcast_convert_type(leaf, unit)


def _from_bits(row: jax.Array, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    if leaf.dtype == bool:
        return row.reshape(leaf.shape).astype(bool)
    ratio = np.dtype(leaf.dtype).itemsize // row.dtype.itemsize
    parts = row.reshape(*leaf.shape, *([ratio] if ratio > 1 else []))
    return jax.lax.bitcast_convert_type(parts, leaf.dtype)
