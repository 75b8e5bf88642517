"""States of stages stacked over the device groups of a mesh, and their views stage by stage."""

import collections
import dataclasses
import functools
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jdecouple.methods.routes import Stage, StageState
from jdecouple.pipeline.mesh import StageDevices
from jdecouple.pipeline.stage_views import StageViews

Slot = tuple[int, int]
"""(block class, number): room for one block of the class in every device group."""

Arrays = dict[str, dict[Slot, Any]]
"""State of all stages, or of a device group: "params", "stats" and the like of every slot."""


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """Where the state of every block lies in arrays that are cut over the device groups of a mesh.

    A slot holds one block of a class in every device group. An array of a slot is the concatenation
    of the groups' arrays, so what lies on a device is the array of its own block, without a copy.
    Groups with fewer blocks of the class hold zeros in the slots that are left.

    Attributes:
        stages: all stages.
        placements: devices of each stage.
        block_classes: the class of every block; blocks of a class have equal states.
    """

    stages: tuple[Stage, ...]
    placements: tuple[StageDevices, ...]
    block_classes: tuple[int, ...]
    engine: ClassVar[str] = "spmd"

    @cached_property
    def device_groups(self) -> tuple[tuple[int, ...], ...]:
        """Stages of every device group, in order."""
        groups: dict[tuple, list[int]] = {}
        for k, placement in enumerate(self.placements):
            groups.setdefault(placement.devices, []).append(k)
        return tuple(map(tuple, groups.values()))

    @cached_property
    def mesh(self) -> Mesh:
        """The device groups as a mesh with the axes `stage` and `data`."""
        devices = [self.placements[stages[0]].devices for stages in self.device_groups]
        return Mesh(np.array(devices), ("stage", "data"))

    @cached_property
    def shardings(self) -> Arrays:
        """Shardings of the stacked arrays."""

        def sharding(spec: PartitionSpec) -> NamedSharding:
            first, *others = tuple(spec) or (None,)
            axes = ("stage", first) if first else "stage"
            return NamedSharding(self.mesh, PartitionSpec(axes, *others))

        return {part: jax.tree.map(sharding, tree) for part, tree in self.specs.items()}

    @cached_property
    def specs(self) -> Arrays:
        """How the arrays of every slot lie on the replicas of a device group."""
        shardings = self.placements[0].state_shardings(self.slot_shapes, 1)
        return jax.tree.map(lambda sharding: sharding.spec, shardings)

    @cached_property
    def shapes(self) -> tuple[StageState, ...]:
        """Shapes of the state of every stage."""
        return tuple(jax.eval_shape(stage.initial) for stage in self.stages)

    @cached_property
    def owner(self) -> tuple[tuple[int, tuple[Slot, ...]], ...]:
        """Device group of every stage, and the slots of its blocks."""
        owners = []
        for group, members in enumerate(self.device_groups):
            used: collections.Counter[int] = collections.Counter()
            for k in members:
                slots = []
                for unit in self.stages[k].units:
                    block_class = self.block_classes[unit.index]
                    slots.append((block_class, used[block_class]))
                    used[block_class] += 1
                owners.append((group, tuple(slots)))
        return tuple(owners)

    @cached_property
    def slot_shapes(self) -> Arrays:
        """Shapes of the state of the block in every slot."""
        shapes: Arrays = {part: {} for part in self.shapes[0]}
        for (_, slots), state in zip(self.owner, self.shapes, strict=True):
            for part in shapes:
                shapes[part] |= zip(slots, state[part], strict=True)
        return shapes

    def stack(self, states: Sequence[StageState]) -> StageViews:
        """Stacks placed states of all stages, whose memory it takes over."""
        arrays: Arrays = {}
        for part in self.shapes[0]:
            blocks: dict[Slot, dict[int, Any]] = collections.defaultdict(dict)  # by device group
            for (group, slots), state in zip(self.owner, states, strict=True):
                for slot, block in zip(slots, state[part], strict=True):
                    blocks[slot][group] = block
            arrays[part] = {
                slot: jax.tree.map(
                    functools.partial(self._concatenate, list(by_group)),
                    self.shardings[part][slot],
                    *by_group.values(),
                )
                for slot, by_group in blocks.items()
            }
        return StageViews(self, arrays)

    def _concatenate(
        self, groups: Sequence[int], sharding: NamedSharding, *given: jax.Array
    ) -> jax.Array:
        """Joins the arrays of the device groups that have one; the others get zeros."""
        arrays = dict(zip(groups, given, strict=True))
        shape, dtype = given[0].shape or (1,), given[0].dtype
        whole = (len(self.device_groups) * shape[0], *shape[1:])
        piece = sharding.shard_shape(whole)
        pieces = []
        for group, devices in enumerate(self.mesh.devices):
            if group in arrays:
                shards = {shard.device: shard.data for shard in arrays[group].addressable_shards}
                pieces += [shards[device].reshape(piece) for device in devices]
            else:
                zeros = np.zeros(piece, dtype)
                pieces += [jax.device_put(zeros, device, may_alias=False) for device in devices]
        return jax.make_array_from_single_device_arrays(whole, sharding, pieces)

    def view(self, arrays: Arrays, stage: int) -> StageState:
        """The state of one stage, in the memory of the stacked one."""
        group, slots = self.owner[stage]
        shapes = self.shapes[stage]
        shardings = self.placements[stage].state_shardings(shapes, 1)

        def cut(
            array: jax.Array, shape: jax.ShapeDtypeStruct, sharding: NamedSharding
        ) -> jax.Array:
            shards = {shard.device: shard.data for shard in array.addressable_shards}
            piece = sharding.shard_shape(shape.shape)
            pieces = [shards[device].reshape(piece) for device in self.mesh.devices[group]]
            return jax.make_array_from_single_device_arrays(shape.shape, sharding, pieces)

        return {
            part: tuple(
                jax.tree.map(cut, arrays[part][slot], *own)
                for slot, *own in zip(slots, shapes[part], shardings[part], strict=True)
            )
            for part in shapes
        }
