"""Which carries and errors go from stage to stage as one array."""

import dataclasses
import itertools
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import jax

from jdecouple.methods.routes import Carry, Stage
from jdecouple.methods.routes.stage import error_shapes
from jdecouple.pipeline.memory import num_bytes
from jdecouple.pipeline.mesh import StageDevices
from jdecouple.pipeline.mpmd.stage_fns import compile_unpack, message_shape
from jdecouple.pipeline.transfer import crosses, without_loss

MESSAGE_BYTES = 2**18
"""Bytes of the largest carry that goes to another device of a process as one array.

One array takes the host about 100 us less than three do; the limit is chosen, not measured.
"""


class Message(NamedTuple):
    """What has been sent to a queue, still packed, and the call that unpacks it."""

    array: jax.Array
    unpack: Callable


def opened(received: Any) -> Any:
    """What has been sent, unpacked."""
    return received.unpack(received.array) if isinstance(received, Message) else received


@dataclasses.dataclass(frozen=True, eq=False)
class Messages:
    """How stages send.

    Attributes:
        stages: all stages.
        placements: devices of each.
        overlapping: whether carries may wait for a later batch.
    """

    stages: tuple[Stage, ...]
    placements: tuple[StageDevices, ...]
    overlapping: bool

    @cached_property
    def packed(self) -> list[Carry | None]:
        """For every stage, and for the end, shapes of its carry where that comes as one array.

        It does from another process, and from another device if it is small, unless carries may be
        queued in the state of the stage and are not rounded: what a checkpoint holds does not
        depend on the placement.
        """
        pairs = zip(itertools.pairwise(self.placements), self.stages[1:], strict=True)
        return [None, *(self._packed(stage, *pair) for pair, stage in pairs), None]

    def _packed(self, stage: Stage, below: StageDevices, above: StageDevices) -> Carry | None:
        crossing = crosses(below, above)
        small = num_bytes(stage.carry) <= MESSAGE_BYTES
        moves = crossing or (small and below.devices != above.devices)
        if not moves or (self.overlapping and stage.wire is None):
            return None
        _, shapes = without_loss(None, stage.carry)
        # Sums of losses wait with the carry; to another process they do not go.
        if "loss" in stage.carry and (self.overlapping or not crossing):
            size = stage.carry["label"].shape[:1]
            shapes["loss"] = jax.ShapeDtypeStruct(size, stage.carry["loss"].dtype)
        return shapes

    @cached_property
    def _trees(self) -> dict[tuple[int, bool], Any]:
        """By the stage above, and whether it is an error: shapes of what comes as one array."""
        trees: dict[tuple[int, bool], Any] = {}
        for stage, carry in zip(self.stages, self.packed[:-1], strict=True):
            if carry is not None:
                error = error_shapes(carry, stage.scaling, stage.returns_input)
                trees |= {(stage.index, False): carry, (stage.index, True): error}
        return {key: tree for key, tree in trees.items() if jax.tree.leaves(tree)}

    @cached_property
    def shapes(self) -> dict[tuple[int, bool], jax.ShapeDtypeStruct]:
        """By the stage above, and whether it is an error: the shape of that array."""
        return {
            (k, down): message_shape(tree, self.stages[k].wire)
            for (k, down), tree in self._trees.items()
        }

    @cached_property
    def unpacked(self) -> dict[tuple[int, bool], Callable]:
        """By the stage above, and whether it is an error: what unpacks a message for a queue."""
        return {
            (k, down): compile_unpack(self.placements[k - down], tree, self.stages[k].wire)
            for (k, down), tree in self._trees.items()
            if self.placements[k - down].addressable
        }
