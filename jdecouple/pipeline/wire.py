"""The form in which floating-point arrays go from one stage to the next.

Rounding belongs to the numbers of a training, whatever the placement: a stage rounds what it sends
wherever the next one is. Between processes the narrow form itself travels.
"""

import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import tree_leaves_with_path, tree_map_with_path

WIRES = ("float32", "bfloat16", "int8")
_LEVELS = 127  # of int8, on each side of zero


def encode(tree: Any, wire: str | None) -> Any:
    """Arrays [batch, ...] as they go over a wire; "int8" is {"values", "scale"} of an array.

    "int8" divides an example by its scale, the largest magnitude / 127, and rounds to the nearest
    whole number. An example that holds what is not finite has a scale of nan. Integers, masks and
    losses, by their name, and what the form makes no smaller stay as they are.

    >>> codes = encode({"x": jnp.array([[1.0, -127.0, 0.4]]), "label": jnp.array([7])}, "int8")
    >>> print(codes["x"]["values"], codes["x"]["scale"], codes["label"])
    [[   1 -127    0]] [1.] [7]
    """
    return tree_map_with_path(
        lambda path, leaf: _encoded(leaf, wire) if _is_rounded(path, leaf, wire) else leaf, tree
    )


def decode(codes: Any, shapes: Any) -> Any:
    """The arrays of these shapes and dtypes that were encoded, rounded.

    >>> x = jnp.array([[1.0, -127.0, 0.4], [0.0, 0.0, 0.0], [1.0, jnp.inf, 0.0]])
    >>> print(decode(encode(x, "int8"), x))
    [[   1. -127.    0.]
     [   0.    0.    0.]
     [  nan   nan   nan]]
    """
    return jax.tree.map(lambda leaf, code: _decoded(code, leaf), shapes, codes)


def coded(shapes: Any, wire: str | None) -> Any:
    """Shapes of what `encode` makes of arrays of these shapes."""
    return jax.eval_shape(lambda tree: encode(tree, wire), shapes)


def feedback_shapes(error: Any, microbatches: int, wire: str | None) -> tuple:
    """Shapes of what rounding takes from errors of these shapes: [batch, M, ...] of each array.

    Microbatch m has a part of its own, so that the order of the microbatches plays no role.
    """
    return tuple(
        jax.ShapeDtypeStruct((leaf.shape[0], microbatches, *leaf.shape[1:]), leaf.dtype)
        for leaf in itertools.compress(jax.tree.leaves(error), _rounded(error, wire))
    )


def is_feedback(name: str) -> bool:
    """Whether an array of a state, by its name, is such feedback.

    >>> is_feedback("stage_1/feedback/0"), is_feedback("block_1/params/block/feedback/kernel")
    (True, False)
    """
    return re.match(r"stage_\d+/feedback/", name) is not None


def encode_error(
    error: Any, feedback: Sequence[jax.Array], microbatch: Any, wire: str | None
) -> tuple[Any, tuple]:
    """As `encode`, with error feedback (1-bit SGD, Seide et al. 2014; arXiv 1901.09847).

    What rounding took from the last error of the microbatch is added to this one.

    Args:
        error: arrays [batch, ...].
        feedback: what it took from each that is rounded, see `feedback_shapes`.
        microbatch: m; may be traced.
        wire: the form.

    Returns:
        The codes, and what rounding took this time: 0 where that is not finite.
    """
    leaves, structure = jax.tree.flatten(error)
    late, taken, codes = iter(feedback), [], []
    for leaf, rounds in zip(leaves, _rounded(error, wire), strict=True):
        if not rounds:
            codes.append(leaf)
            continue
        before = next(late)
        whole = leaf + jax.lax.dynamic_index_in_dim(before, microbatch, 1, keepdims=False)
        codes.append(_encoded(whole, wire))
        left = whole - _decoded(codes[-1], leaf)
        left = jnp.where(jnp.isfinite(left), left, 0)
        taken.append(jax.lax.dynamic_update_index_in_dim(before, left, microbatch, 1))
    return jax.tree.unflatten(structure, codes), tuple(taken)


def _rounded(tree: Any, wire: str | None) -> list[bool]:
    """For every array of a tree, or one of its shape, whether it is sent in a smaller form."""
    return [_is_rounded(path, leaf, wire) for path, leaf in tree_leaves_with_path(tree)]


def _is_rounded(path: tuple, leaf: Any, wire: str | None) -> bool:
    is_kept = bool(path) and getattr(path[-1], "key", None) in ("mask", "loss")
    if wire is None or is_kept or not leaf.ndim or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return False
    size, scale = math.prod(leaf.shape[1:]), 4 if wire == "int8" else 0
    return size * jnp.dtype(wire).itemsize + scale < size * leaf.dtype.itemsize


def _encoded(leaf: jax.Array, wire: str | None) -> Any:
    assert wire is not None
    if wire != "int8":
        form = jnp.finfo(wire)
        # XLA drops a conversion there and back, but not this.
        return jax.lax.reduce_precision(leaf, form.nexp, form.nmant).astype(wire)
    wide = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
    largest = jnp.max(jnp.abs(wide), axis=tuple(range(1, wide.ndim)))
    scale = (largest / _LEVELS).astype(jnp.float32)
    scale = jnp.where(jnp.isfinite(scale), scale, jnp.nan)
    divisor = jnp.where(scale == 0, 1, scale).astype(wide.dtype)
    return {"values": jnp.round(wide / _rows(divisor, wide)).astype(jnp.int8), "scale": scale}


def _decoded(code: Any, leaf: Any) -> jax.Array:
    if not isinstance(code, dict):
        return code.astype(leaf.dtype)
    wide = jnp.promote_types(leaf.dtype, jnp.float32)
    scale = _rows(code["scale"].astype(wide), code["values"])
    return (code["values"].astype(wide) * scale).astype(leaf.dtype)


def _rows(column: jax.Array, like: jax.Array) -> jax.Array:
    """[batch] as [batch, 1, ...]."""
    return column.reshape(-1, *[1] * (like.ndim - 1))
