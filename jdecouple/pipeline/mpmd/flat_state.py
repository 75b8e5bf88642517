"""States of stages whose small arrays are joined, so that a compiled call takes and gives few."""

import dataclasses
import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any, ClassVar

import jax
import numpy as np

from jdecouple.methods.routes import Stage, StageState
from jdecouple.pipeline.memory import num_bytes
from jdecouple.pipeline.mesh import StageDevices
from jdecouple.pipeline.stage_views import USED_UP, StageViews, is_deleted
from jdecouple.pipeline.state import place

JOINED_BYTES = 2**14
"""Bytes of the largest array that is joined with others: chosen, not measured."""
STAGE_BYTES = {"cpu": 2**18, "gpu": 2**18}
"""Bytes of the largest stage whose arrays are joined, state and carry, by platform.

Chosen so that the tests' VGG, whose step by `bp` needs more memory with joined arrays, is not
joined. On TPUs nothing has been measured, and nothing is joined.
"""

Flat = tuple[dict[str, Any], tuple[Any, ...]]
"""One array [n] for every dtype, and the arrays that are not joined."""


@dataclasses.dataclass(frozen=True, eq=False)
class FlatPart:
    """How a part of a stage's state, such as "params", lies in few arrays.

    Arrays are joined by dtype, in the order of the tree.

    Attributes:
        structure: of its tree.
        leaves: shapes of the tree's leaves.
        joined: positions of the leaves that are joined, in order, by their dtype.
        others: positions of those that are not.
    """

    structure: Any
    leaves: tuple[jax.ShapeDtypeStruct, ...]
    joined: dict[str, tuple[int, ...]]
    others: tuple[int, ...]

    @classmethod
    def of(cls, shapes: Any, joins: bool) -> "FlatPart":
        """The part with these shapes; joins what is small, if it `joins` at all."""
        leaves, structure = jax.tree.flatten(shapes)
        small = defaultdict(list)
        for position, leaf in enumerate(leaves):
            # The dtype of a weak type is not its own, a key has none that NumPy knows.
            numbers = isinstance(leaf.dtype, np.dtype) and not leaf.weak_type
            if joins and numbers and leaf.size * leaf.dtype.itemsize <= JOINED_BYTES:
                small[str(leaf.dtype)].append(position)
        joined = {dtype: tuple(own) for dtype, own in small.items() if len(own) > 1}
        others = set(range(len(leaves))).difference(*joined.values())
        return cls(structure, tuple(leaves), joined, tuple(sorted(others)))

    def cut(self, joined: dict[str, Any]) -> dict[int, Any]:
        """The leaves that were joined, by their positions."""
        leaves = {}
        for dtype, positions in self.joined.items():
            start = 0
            for position in positions:
                shape = self.leaves[position].shape
                end = start + math.prod(shape)
                leaves[position] = joined[dtype][start:end].reshape(shape)
                start = end
        return leaves

    def tree(self, cut: dict[int, Any], others: tuple[Any, ...]) -> Any:
        """The tree of its leaves."""
        leaves = cut | dict(zip(self.others, others, strict=True))
        return jax.tree.unflatten(self.structure, [leaves[n] for n in range(len(leaves))])

    def join(self, tree: Any) -> Flat:
        """The flat form of a tree of host or device arrays; what is joined is on the host."""
        leaves = jax.tree.leaves(tree)
        small = jax.device_get({n: leaves[n] for own in self.joined.values() for n in own})
        joined = {
            dtype: np.concatenate([np.ravel(small[n]) for n in own])
            for dtype, own in self.joined.items()
        }
        return joined, tuple(leaves[n] for n in self.others)

    def update(self, flat: Flat, tree: Any, last_first: bool) -> Flat:
        """The flat form of a traced tree, written over that of an older one, leaf by leaf.

        What a leaf is computed from is kept until those before it have been written: `last_first`
        is the order in which a backward finds them.
        """
        leaves = jax.tree.leaves(tree)
        joined = {}
        for dtype, positions in self.joined.items():
            array = flat[0][dtype]
            starts = np.cumsum([0, *(self.leaves[n].size for n in positions)])
            pairs = [*zip(starts, positions, strict=False)]
            for start, position in reversed(pairs) if last_first else pairs:
                leaf = leaves[position].astype(array.dtype).reshape(-1)
                array = jax.lax.dynamic_update_slice(array, leaf, (start,))
            joined[dtype] = array
        return joined, tuple(leaves[n] for n in self.others)


@dataclasses.dataclass(frozen=True, eq=False)
class FlatLayout:
    """How the states of this process's stages lie in few arrays.

    Only what every stage has is flat, by its parts; what waits for a later batch stays a tree.

    Attributes:
        stages: all stages.
        placements: devices of each.
        last_first: whether the gradients of a stage's last block come first.
    """

    stages: tuple[Stage, ...]
    placements: tuple[StageDevices, ...]
    last_first: bool
    engine: ClassVar[str] = "mpmd"

    @cached_property
    def parts(self) -> tuple[dict[str, FlatPart], ...]:
        """The flat parts of every stage; {} for those of other processes."""
        parts = []
        for stage, placement in zip(self.stages, self.placements, strict=True):
            shapes = jax.eval_shape(stage.initial) if placement.addressable else {}
            limit = STAGE_BYTES.get(placement.devices[0].platform, 0)
            joins = num_bytes((shapes, stage.carry)) <= limit
            cut = ("opt", "tied") if placement.shard_optimizer else ()  # each array by itself
            parts.append(
                {
                    name: FlatPart.of(tree, joins and name not in cut)
                    for name, tree in shapes.items()
                }
            )
        return tuple(parts)

    def load(self, states: Iterable[StageState | None]) -> StageViews:
        """Puts the states of the stages on their devices, one after another, in memory of its own.

        None stays None.
        """
        arrays = []
        for k, state in enumerate(states):
            if state is not None:
                parts = self.parts[k]
                flat = {n: parts[n].join(x) if n in parts else x for n, x in state.items()}
                state = place(self.stages[k], self.placements[k], flat)
            arrays.append(state)
        return StageViews(self, tuple(arrays))

    def trees(self, states: Sequence[Any]) -> tuple[StageState, ...]:
        """The states of all stages from their flat form, in a trace."""
        return tuple(self.tree(k, state) for k, state in enumerate(states))

    def flats(self, old: Sequence[Any], states: Sequence[StageState]) -> tuple:
        """The flat form of the states of all stages, in a trace; see `FlatPart.update`."""
        pairs = zip(old, states, strict=True)
        return tuple(self.flat(k, *pair) for k, pair in enumerate(pairs))

    def tree(self, k: int, state: Any) -> StageState:
        """The state of stage `k` from its flat form, in a trace."""
        parts = self.parts[k]
        return {
            name: parts[name].tree(parts[name].cut(value[0]), value[1]) if name in parts else value
            for name, value in state.items()
        }

    def flat(self, k: int, old: Any, state: StageState) -> Any:
        """The flat form of (parts of) the state of stage `k`, in a trace; see `FlatPart.update`."""
        parts = self.parts[k]
        return {
            n: parts[n].update(old[n], value, self.last_first) if n in parts else value
            for n, value in state.items()
        }

    def on_flat(self, k: int, function: Callable) -> Callable:
        """A call of stage `k` as one that takes and gives its state flat."""

        def call(state: Any, *others: Any) -> dict[str, Any]:
            out = function(self.tree(k, state), *others)
            return {**out, "state": self.flat(k, state, out["state"])} if "state" in out else out

        call.__name__ = function.__name__
        return call

    def view(self, arrays: Any, k: int) -> StageState | None:
        """The state of one stage; arrays that were joined are copies, for which it is waited.

        Of traced arrays, shapes and arrays on the host it is as they are.

        Raises:
            ValueError: training has used it up.
        """
        state, parts = arrays[k], self.parts[k]
        if state is None:
            return None
        joined = {name: state[name][0] for name in parts}
        leaves = jax.tree.leaves(joined)
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
            return jax.eval_shape(functools.partial(self.tree, k), state)
        if any(isinstance(leaf, jax.core.Tracer | np.ndarray) for leaf in leaves):
            return self.tree(k, state)
        if any(map(is_deleted, leaves)):
            raise ValueError(USED_UP)
        # Copies, because the next step writes over the state, and JAX does not donate what NumPy
        # looks at; cut on the host, where nothing compiles.
        own = jax.tree.map(
            lambda leaf: leaf if leaf.is_fully_addressable else leaf.addressable_data(0), joined
        )
        joined = jax.device_get(jax.device_put(own, may_alias=False))
        cut = {name: parts[name].cut(x) for name, x in joined.items()}
        cut = place(self.stages[k], self.placements[k], jax.tree.map(np.array, cut))
        return {
            name: parts[name].tree(cut[name], value[1]) if name in parts else value
            for name, value in state.items()
        }
