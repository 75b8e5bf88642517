"""Hands a message from the devices of one stage to those of another."""

from typing import Any

import jax

from jdecouple.pipeline.packing import packed, packer, unpack
from jdecouple.pipeline.placement import Seat


def transfer(message: Any, shapes: Any, source: Seat, target: Seat) -> Any:
    """Moves a message to another stage's devices without waiting.

    Every process that takes part in either stage calls it, in the same order.

    Args:
        message: the tree; None where this process does not run the source.
        shapes: its `jax.ShapeDtypeStruct`s.
        source: seat of the stage that sends.
        target: seat of the stage that receives.

    Returns:
        The tree on the target's devices; None where this process does not run the target.
    """
    if source.devices == target.devices:
        return message
    if not (source.mine or target.mine):
        return None
    far = not (source.whole and target.whole and source.mine and target.mine)
    if far and (single := packed(shapes, source.axis)):
        sent = packer(source)(message) if source.mine else None
        arrived = _move(sent, single, source, target)
        return unpack(arrived, shapes, target) if target.mine else None
    return _move(message, shapes, source, target)


def _move(message: Any, shapes: Any, source: Seat, target: Seat) -> Any:
    if not source.mine:
        message = jax.tree.map(
            lambda shape: jax.make_array_from_single_device_arrays(
                shape.shape, source.sharding(shape), [], dtype=shape.dtype
            ),
            shapes,
        )
    if source.whole and target.whole and len(target.devices) == 1:
        return jax.device_put(message, target.devices[0])  # half the time of shardings
    moved = jax.device_put(message, jax.tree.map(target.sharding, message))
    return moved if target.mine else None
