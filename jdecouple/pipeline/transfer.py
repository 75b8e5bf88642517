"""Hands a message from the devices of one stage to those of another."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding, SingleDeviceSharding

from jdecouple.pipeline.placement import Seat


def transfer(message: Any, shapes: Any, source: Seat, target: Seat) -> Any:
    """Moves a message to another stage's devices without waiting.

    Every process of the run calls it, in the same order, even one that runs neither stage: JAX
    numbers transfers between processes, and they must agree on the numbers.

    Args:
        message: the tree; None where this process does not run the source.
        shapes: its `jax.ShapeDtypeStruct`s; needed unless both stages are in this process.
        source: seat of the stage that sends.
        target: seat of the stage that receives.

    Returns:
        The tree on the target's devices; None where this process does not run the target.
    """
    if source.devices == target.devices:
        return message
    if source.whole and target.whole:
        if len(target.devices) == 1:
            return jax.device_put(message, target.devices[0])  # half the time of shardings
        return jax.device_put(message, jax.tree.map(target.sharding, message))
    if source.processes == target.processes and len(source.processes) == 1:
        return None  # inside another process
    if len(source.devices) != len(target.devices) or source.processes & target.processes:
        return _transfer_pieces(message, shapes, source, target)
    if not source.mine:
        message = jax.tree.map(lambda shape: _absent(shape, source.sharding(shape)), shapes)
    moved = jax.device_put(message, jax.tree.map(target.sharding, message))
    return moved if target.mine else None


def _transfer_pieces(message: Any, shapes: Any, source: Seat, target: Seat) -> Any:
    """Moves a message in the largest pieces that lie on one device before and after.

    JAX itself moves arrays between processes only if all their parts cross, and as they are cut.
    """
    count, axis = math.lcm(len(source.devices), len(target.devices)), source.axis
    cut, joined = count // len(source.devices), count // len(target.devices)
    leaves, tree = jax.tree.flatten(shapes)
    here = [_by_device(leaf) for leaf in jax.tree.leaves(message)]
    arrived: dict[jax.Device, list[list[jax.Array]]] = {}
    for number in range(count):
        start, end = source.devices[number // cut], target.devices[number // joined]
        starts_here = start.process_index == jax.process_index()
        if start.process_index == end.process_index and not starts_here:
            continue
        if starts_here:
            parts = [_part(shards[start], number % cut, cut, axis) for shards in here]
        else:
            lies = SingleDeviceSharding(start)
            parts = [_absent(_part(leaf, 0, count, axis), lies) for leaf in leaves]
        moved = jax.device_put(parts, SingleDeviceSharding(end))
        if end.process_index == jax.process_index():
            arrived.setdefault(end, []).append(moved)
    if not target.mine:
        return None
    columns = [
        [_join(pieces, axis) for pieces in zip(*each, strict=True)] for each in arrived.values()
    ]
    whole = [
        jax.make_array_from_single_device_arrays(leaf.shape, target.sharding(leaf), list(shards))
        for leaf, shards in zip(leaves, zip(*columns, strict=True), strict=True)
    ]
    return jax.tree.unflatten(tree, whole)


def _by_device(leaf: jax.Array) -> dict[jax.Device, jax.Array]:
    return {shard.device: shard.data for shard in leaf.addressable_shards}


def _part(leaf: Any, index: int, count: int, axis: int) -> Any:
    """One of `count` equal parts of an array or of its shape; a scalar is all of itself."""
    if count == 1 or leaf.ndim <= axis:
        return leaf
    size = leaf.shape[axis] // count
    if isinstance(leaf, jax.ShapeDtypeStruct):
        shape = (*leaf.shape[:axis], size, *leaf.shape[axis + 1 :])
        return jax.ShapeDtypeStruct(shape, leaf.dtype)
    return jax.lax.slice_in_dim(leaf, index * size, (index + 1) * size, axis=axis)


def _join(parts: Sequence[jax.Array], axis: int) -> jax.Array:
    whole = len(parts) == 1 or parts[0].ndim <= axis
    return parts[0] if whole else jnp.concatenate(parts, axis)


def _absent(shape: Any, sharding: Sharding) -> jax.Array:
    """An array of other processes, as a receiver holds it."""
    return jax.make_array_from_single_device_arrays(shape.shape, sharding, [], dtype=shape.dtype)
