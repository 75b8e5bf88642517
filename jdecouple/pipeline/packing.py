"""A message as one array, for links that carry few arrays at a time.

JAX's socket transport (0.10) has at most four arrays on their way from a process, and a place is
free again after the link's round trip: on a slow link the arrays of a message would wait for one
another.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdecouple.pipeline.placement import Seat


def packed(shapes: Any, axis: int) -> jax.ShapeDtypeStruct | None:
    """Shape of a message as one array; None where it cannot be one, or is.

    Args:
        shapes: `jax.ShapeDtypeStruct`s of the message, each [..., batch, ...].
        axis: the one that counts examples; all before it are equal.
    """
    leaves = jax.tree.leaves(shapes)
    if len(leaves) < 2 or any(leaf.ndim <= axis for leaf in leaves):
        return None
    unit = _unit(leaves)
    width = sum(_words(leaf, axis, unit) for leaf in leaves)
    return jax.ShapeDtypeStruct((*leaves[0].shape[: axis + 1], width), unit)


@functools.cache
def packer(seat: Seat) -> Any:
    """The compiled function that packs the messages of a stage, bit for bit."""

    def pack(message: Any) -> jax.Array:
        leaves = jax.tree.leaves(message)
        unit = _unit(leaves)
        rows = [
            _bits(leaf, unit).reshape(*leaf.shape[: seat.axis + 1], _words(leaf, seat.axis, unit))
            for leaf in leaves
        ]
        return jnp.concatenate(rows, axis=-1)

    return jax.jit(pack, out_shardings=seat.batched)


def unpack(array: jax.Array, shapes: Any, seat: Seat) -> Any:
    """The message that an array was packed from, on the seat where it has arrived."""
    leaves, structure = jax.tree.flatten(shapes)
    kinds = tuple((leaf.shape, np.dtype(leaf.dtype)) for leaf in leaves)
    return jax.tree.unflatten(structure, _unpacker(seat, kinds)(array))


@functools.cache
def _unpacker(seat: Seat, kinds: tuple[tuple[tuple[int, ...], np.dtype], ...]) -> Any:
    leaves = [jax.ShapeDtypeStruct(*kind) for kind in kinds]
    ends = np.cumsum([_words(leaf, seat.axis, _unit(leaves)) for leaf in leaves])

    def call(array: jax.Array) -> list[jax.Array]:
        rows = jnp.split(array, ends[:-1], axis=-1)
        return [_from_bits(row, leaf) for row, leaf in zip(rows, leaves, strict=True)]

    return jax.jit(call, out_shardings=seat.batched)


def _unit(leaves: Any) -> np.dtype:
    """The unsigned integers that all leaves divide into."""
    return np.dtype(f"uint{8 * min(np.dtype(leaf.dtype).itemsize for leaf in leaves)}")


def _words(leaf: Any, axis: int, unit: np.dtype) -> int:
    """How many units an example of a leaf has."""
    return math.prod(leaf.shape[axis + 1 :]) * (np.dtype(leaf.dtype).itemsize // unit.itemsize)


def _bits(leaf: jax.Array, unit: np.dtype) -> jax.Array:
    if leaf.dtype.kind == "b":
        return leaf.astype(unit)
    return jax.lax.bitcast_convert_type(leaf, unit)


def _from_bits(row: jax.Array, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    dtype = np.dtype(leaf.dtype)
    if dtype.kind == "b":
        return row.reshape(leaf.shape).astype(bool)
    ratio = dtype.itemsize // row.dtype.itemsize
    parts = row.reshape(*leaf.shape, *([ratio] if ratio > 1 else []))
    return jax.lax.bitcast_convert_type(parts, dtype)
