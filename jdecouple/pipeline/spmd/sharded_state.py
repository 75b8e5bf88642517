"""States of stages stacked over the rows of a mesh, and their views stage by stage."""

import collections
import dataclasses
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jdecouple.methods.routes import Stage, StageState
from jdecouple.pipeline.mesh import StageDevices

PARTS = ("params", "stats", "opt")


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """Where the state of every block lies in arrays that are cut over the rows of a mesh.

    A slot holds one block of a kind in every row. An array of a slot is the concatenation of the
    rows' arrays, so what lies on a device is the array of its own block, without a copy. Rows with
    fewer blocks of the kind hold zeros in the param_slots that are left.

    Attributes:
        stages: all stages.
        placements: devices of each stage.
        block_classes: the kind of every block; blocks of a kind have equal states.
    """

    stages: tuple[Stage, ...]
    placements: tuple[StageDevices, ...]
    block_classes: tuple[int, ...]

    @cached_property
    def rows(self) -> tuple[tuple[int, ...], ...]:
        """Stages of every row, in order."""
        found: dict[tuple, list[int]] = {}
        for k, placement in enumerate(self.placements):
            found.setdefault(placement.devices, []).append(k)
        return tuple(map(tuple, found.values()))

    @cached_property
    def mesh(self) -> Mesh:
        """The rows as a mesh with the axes `stage` and `data`."""
        return Mesh(
            np.array([self.placements[row[0]].devices for row in self.rows]), ("stage", "data")
        )

    @cached_property
    def sharding(self) -> NamedSharding:
        """Sharding of the stacked arrays."""
        return NamedSharding(self.mesh, PartitionSpec("stage"))

    @cached_property
    def param_slots(self) -> tuple[tuple[int, int], ...]:
        """All param_slots: (kind, number)."""
        return tuple(sorted({slot for row in self._param_slots for slot in row}))

    @cached_property
    def _param_slots(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """Slots of the blocks of every row, in order."""
        found = []
        for row in self.rows:
            taken: collections.Counter = collections.Counter()
            param_slots = []
            for kind in (
                self.block_classes[unit.index] for k in row for unit in self.stages[k].units
            ):
                param_slots.append((kind, taken[kind]))
                taken[kind] += 1
            found.append(tuple(param_slots))
        return tuple(found)

    def of_row(self, row: int) -> tuple[tuple[int, ...], ...]:
        """Indices of the param_slots of the blocks of every stage of a row."""
        param_slots = iter(self._param_slots[row])
        return tuple(
            tuple(self.param_slots.index(next(param_slots)) for _ in self.stages[k].units)
            for k in self.rows[row]
        )

    @cached_property
    def owner(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """DeviceGroup of every stage, and the indices of its blocks' param_slots."""
        return tuple(
            (number, param_slots)
            for number in range(len(self.rows))
            for param_slots in self.of_row(number)
        )

    def stack(self, states: Sequence[StageState]) -> "ShardedState":
        """Stacks placed states of all stages, whose memory it takes over."""
        held = {
            (row, slot): {part: state[part][number] for part in PARTS}
            for (row, param_slots), state in zip(self.owner, states, strict=True)
            for number, slot in enumerate(param_slots)
        }
        stacked = []
        for slot in range(len(self.param_slots)):
            present = {row: held[row, slot] for row in range(len(self.rows)) if (row, slot) in held}
            leaves = {row: jax.tree.leaves(tree) for row, tree in present.items()}
            arrays = [
                self._join({row: each[number] for row, each in leaves.items()})
                for number in range(len(next(iter(leaves.values()))))
            ]
            structure = jax.tree.structure(next(iter(present.values())))
            stacked.append(jax.tree.unflatten(structure, arrays))
        return ShardedState(self, {part: tuple(each[part] for each in stacked) for part in PARTS})

    def _join(self, leaves: dict[int, jax.Array]) -> jax.Array:
        some = next(iter(leaves.values()))
        shape = some.shape or (1,)
        pieces = []
        for number, row in enumerate(self.mesh.devices):
            if number in leaves:
                here = {shard.device: shard.data for shard in leaves[number].addressable_shards}
                pieces += [here[device].reshape(shape) for device in row]
            else:
                nothing = np.zeros(shape, some.dtype)
                pieces += [jax.device_put(nothing, device, may_alias=False) for device in row]
        return jax.make_array_from_single_device_arrays(
            (len(self.rows) * shape[0], *shape[1:]), self.sharding, pieces
        )

    def view(self, arrays: Any, stage: int) -> StageState:
        """The state of one stage, in the memory of the stacked one."""
        row, param_slots = self.owner[stage]
        placement = self.placements[stage]
        shapes = self.shapes[stage]

        def cut(array: jax.Array, shape: Any) -> jax.Array:
            here = {shard.device: shard.data for shard in array.addressable_shards}
            pieces = [here[device].reshape(shape.shape) for device in self.mesh.devices[row]]
            return jax.make_array_from_single_device_arrays(
                shape.shape, placement.replicated, pieces
            )

        return {
            part: tuple(
                jax.tree.map(cut, arrays[part][slot], shape)
                for slot, shape in zip(param_slots, shapes[part], strict=True)
            )
            for part in PARTS
        }

    @cached_property
    def shapes(self) -> tuple[StageState, ...]:
        """Shapes of the state of every stage."""
        return tuple(jax.eval_shape(stage.initial) for stage in self.stages)


@jax.tree_util.register_pytree_node_class
class ShardedState(Sequence):
    """States of all stages in stacked arrays; as a sequence, stage by stage, on demand.

    Attributes:
        layout: where each block's state lies.
        arrays: "params", "stats" and "opt": each a tuple with one entry a slot.
    """

    def __init__(self, layout: Layout, arrays: dict[str, tuple]):
        self.layout = layout
        self.arrays = arrays

    def tree_flatten(self) -> tuple[tuple, Layout]:
        """Children and static part, for JAX."""
        return (self.arrays,), self.layout

    @classmethod
    def tree_unflatten(cls, layout: Layout, children: tuple) -> "ShardedState":
        """Inverse of `tree_flatten`."""
        return cls(layout, *children)

    def __len__(self) -> int:
        return len(self.layout.stages)

    def __getitem__(self, stage: Any) -> Any:
        """State of a stage, without a copy: the next step donates it like the whole."""
        if isinstance(stage, slice):
            return [self[k] for k in range(len(self))[stage]]
        return self.layout.view(self.arrays, range(len(self))[stage])
