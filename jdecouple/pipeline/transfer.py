"""Sends a carry from the devices of one stage to those of another."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from jdecouple.pipeline.mesh import StageDevices


def crosses(source: StageDevices, target: StageDevices) -> bool:
    """Whether a carry between two stages may go to another process."""
    inside = source.fully_addressable and target.fully_addressable
    return not inside and source.devices != target.devices


def transfer(
    carry: Any, shapes: Any, source: StageDevices, target: StageDevices, *, named: bool = False
) -> Any:
    """Moves a carry to another stage's devices without waiting.

    Every process of the run calls it, in the same order, even one that runs neither stage: JAX
    numbers transfers between processes, and they must agree on the numbers.

    Args:
        carry: the tree; None where this process does not run the source.
        shapes: its `jax.ShapeDtypeStruct`s; needed where it `crosses`.
        source: devices of the stage that sends.
        target: devices of the stage that receives.
        named: shard what arrives as a call on the target shards its results, also on one device.
            Else one program is compiled for each, and sending takes half the time.

    Returns:
        The tree on the target's devices; None where this process does not run the target.
    """
    if source.devices == target.devices:
        return carry
    if not crosses(source, target):
        if len(target.devices) == 1 and not named:
            return jax.device_put(carry, target.devices[0])
        return jax.device_put(carry, jax.tree.map(target.sharding, carry))
    if source.processes == target.processes and len(source.processes) == 1:
        return None  # inside another process
    if len(source.devices) != len(target.devices) or source.processes & target.processes:
        return _transfer_pieces(carry, shapes, source, target)
    if not source.addressable:
        carry = jax.tree.map(lambda shape: _absent(shape, source.sharding(shape)), shapes)
    moved = jax.device_put(carry, jax.tree.map(target.sharding, carry))
    return moved if target.addressable else None


def transfer_whole(tree: Any, shapes: Any, source: StageDevices, target: StageDevices) -> Any:
    """As `transfer`, for arrays that every device of a stage holds whole, such as weights."""
    if source.devices == target.devices:
        return tree
    if not crosses(source, target):
        return jax.device_put(tree, target.replicated)
    leaves, structure = jax.tree.flatten(shapes)
    given = [
        {shard.device: shard.data for shard in leaf.addressable_shards}
        for leaf in jax.tree.leaves(tree)
    ]
    arrived: list[list[jax.Array]] = [[] for _ in leaves]
    for number, end in enumerate(target.devices):
        start = source.devices[number % len(source.devices)]
        here = jax.process_index()
        starts_here, ends_here = (device.process_index == here for device in (start, end))
        if start.process_index == end.process_index and not starts_here:
            continue
        parts = (
            [shards[start] for shards in given]
            if starts_here
            else [_absent(leaf, SingleDeviceSharding(start)) for leaf in leaves]
        )
        moved = jax.device_put(parts, SingleDeviceSharding(end))
        if ends_here:
            for own, leaf in zip(arrived, moved, strict=True):
                own.append(leaf)
    if not target.addressable:
        return None
    arrays = [
        jax.make_array_from_single_device_arrays(leaf.shape, target.replicated, own)
        for leaf, own in zip(leaves, arrived, strict=True)
    ]
    return jax.tree.unflatten(structure, arrays)


def _transfer_pieces(carry: Any, shapes: Any, source: StageDevices, target: StageDevices) -> Any:
    """Moves a carry in the largest pieces that lie on one device before and after.

    JAX itself moves arrays between processes only if all their parts cross, and as they are cut.
    """
    count, axis = math.lcm(len(source.devices), len(target.devices)), source.axis
    cut, joined = count // len(source.devices), count // len(target.devices)
    leaves, tree = jax.tree.flatten(shapes)
    sent = [
        {shard.device: shard.data for shard in leaf.addressable_shards}
        for leaf in jax.tree.leaves(carry)
    ]
    arrived: dict[jax.Device, list[list[jax.Array]]] = {}
    for number in range(count):
        start, end = source.devices[number // cut], target.devices[number // joined]
        starts_here = start.process_index == jax.process_index()
        if start.process_index == end.process_index and not starts_here:
            continue
        if starts_here:
            parts = [_part(shards[start], number % cut, cut, axis) for shards in sent]
        else:
            sharding = SingleDeviceSharding(start)
            parts = [_absent(_part(leaf, 0, count, axis), sharding) for leaf in leaves]
        moved = jax.device_put(parts, SingleDeviceSharding(end))
        if end.process_index == jax.process_index():
            arrived.setdefault(end, []).append(moved)
    if not target.addressable:
        return None
    shards = [
        [_join(pieces, axis) for pieces in zip(*moved, strict=True)] for moved in arrived.values()
    ]
    arrays = [
        jax.make_array_from_single_device_arrays(leaf.shape, target.sharding(leaf), list(own))
        for leaf, own in zip(leaves, zip(*shards, strict=True), strict=True)
    ]
    return jax.tree.unflatten(tree, arrays)


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
    complete = len(parts) == 1 or parts[0].ndim <= axis
    return parts[0] if complete else jnp.concatenate(parts, axis)


def _absent(shape: Any, sharding: Sharding) -> jax.Array:
    """An array of other processes, as a receiver holds it."""
    return jax.make_array_from_single_device_arrays(shape.shape, sharding, [], dtype=shape.dtype)


def without_loss(
    carry: dict[str, Any] | None, shapes: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """What of a carry, and of its shapes, goes to another process.

    Sums of losses stay in theirs: its metrics cover its own stages.
    """
    shapes = {name: leaf for name, leaf in shapes.items() if name != "loss"}
    return carry and {name: carry[name] for name in shapes}, shapes


def packed(shapes: Any) -> jax.ShapeDtypeStruct:
    """Shape of a tree of arrays [batch, ...], given by its shapes, as one array [batch, words]."""
    leaves = jax.tree.leaves(shapes)
    unit = _unit(leaves)
    words = sum(_words(leaf, unit) for leaf in leaves)
    return jax.ShapeDtypeStruct((leaves[0].shape[0], words), unit)


def pack(tree: Any) -> jax.Array:
    """Joins the arrays [batch, ...] of a tree, bit for bit."""
    leaves = jax.tree.leaves(tree)
    unit = _unit(leaves)
    words = [_bits(leaf, unit).reshape(leaf.shape[0], _words(leaf, unit)) for leaf in leaves]
    return jnp.concatenate(words, axis=1)


def unpack(array: jax.Array, shapes: Any) -> Any:
    """The tree of these `jax.ShapeDtypeStruct`s that an array was packed from."""
    leaves, structure = jax.tree.flatten(shapes)
    ends = np.cumsum([_words(leaf, array.dtype) for leaf in leaves])
    words = jnp.split(array, ends[:-1], axis=1)
    return jax.tree.unflatten(structure, map(_from_bits, words, leaves))


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


def _from_bits(words: jax.Array, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    if leaf.dtype == bool:
        return words.reshape(leaf.shape).astype(bool)
    ratio = np.dtype(leaf.dtype).itemsize // words.dtype.itemsize
    parts = words.reshape(*leaf.shape, *([ratio] if ratio > 1 else []))
    return jax.lax.bitcast_convert_type(parts, leaf.dtype)
