"""Weights that a stage hands down to one whose averages follow them.

What the stage above had in a batch is what the averages below move by behind that batch. It is
copied before the batch goes up and arrives when the stage below has trained on it: so a stage
waits for the last batch but one of the stage above, and two that follow one another still overlap.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jdecouple.methods.routes import Stage, StageState
from jdecouple.pipeline.mesh import StageDevices, jit
from jdecouple.pipeline.mpmd.flat_state import FlatLayout
from jdecouple.pipeline.transfer import crosses, pack, packed, transfer, unpack

GIVE, FOLLOW = "give", "follow"

Functions = dict[tuple[int, Any], Callable]
"""By stage and what they do: `GIVE` of (parts of) a state, or `FOLLOW` of that and what was given.
"""


@dataclasses.dataclass(frozen=True)
class Following:
    """A stage whose last unit follows the first of the stage above.

    Attributes:
        stage: the stage below; its unit knows the names.
        above: the stage above.
        placements: devices of the two.
        fuse: whether they are in one compiled call.
    """

    stage: Stage
    above: Stage
    placements: tuple[StageDevices, StageDevices]
    fuse: bool

    @property
    def functions(self) -> Functions:
        """Pure functions of the two stages."""
        return {
            (self.above.index, GIVE): self._copy,
            (self.stage.index, FOLLOW): self._move,
        }

    def compiled(self, layout: FlatLayout) -> Functions:
        """The functions of this process's stages, jitted."""
        below, above = self.placements
        calls: Functions = {}
        if above.addressable:
            sharding = above.batched if self._crosses else above.replicated
            copy = self._on_flat(layout, self.above.index, self._copy)
            calls[self.above.index, GIVE] = jit(copy, above, out_shardings=sharding)
        if below.addressable:
            move = self._on_flat(layout, self.stage.index, self._move)
            options = {"donate_argnums": 0, "out_shardings": below.replicated}
            calls[self.stage.index, FOLLOW] = jit(move, below, **options)
        return calls

    def give(self, functions: Functions, states: Sequence[Any]) -> Any:
        """A copy of what the stage above has before a batch, whose calls write over it."""
        key = self.above.index, GIVE
        if key not in functions:
            return None
        state = states[self.above.index]
        return functions[key]({part: state[part] for part in ("params", "stats")})["given"]

    def follow(self, functions: Functions, given: Any, states: list[Any]) -> None:
        """Sends down what was given, and puts the state that has followed in the place of the old.

        All processes call it in one order.
        """
        key = self.stage.index, FOLLOW
        arrived = self._send(given)
        if key in functions:
            moved = functions[key]({"stats": states[key[0]]["stats"]}, arrived)
            states[key[0]] = {**states[key[0]], **moved["state"]}

    @staticmethod
    def _on_flat(layout: FlatLayout, k: int, function: Callable) -> Callable:
        call = layout.on_flat(k, function)
        call.__name__ = f"stage{k}{function.__name__}"
        return call

    def _send(self, given: Any) -> Any:
        below, above = self.placements
        if self.fuse:
            return given
        if not self._crosses:
            return jax.device_put(given, below.replicated)
        return transfer(given, packed(self._rows), above, below)

    def _copy(self, state: StageState) -> dict[str, Any]:
        own = {**state["params"][0], **state["stats"][0]}
        arrays = {name: own[name] for name in self._shapes}
        if self._crosses:
            count = self._replicas
            rows = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), arrays)
            return {"given": pack(rows)}
        # JAX gives what a call does not change as it took it.
        return {"given": arrays if self.fuse else jax.tree.map(jnp.copy, arrays)}

    def _move(self, state: StageState, given: Any) -> dict[str, Any]:
        if self._crosses:
            given = jax.tree.map(lambda rows: rows[0], unpack(given, self._rows))
        unit, stats = self.stage.units[-1], state["stats"]
        return {"state": {"stats": (*stats[:-1], unit.following(stats[-1], given))}}

    @property
    def _crosses(self) -> bool:
        return not self.fuse and crosses(*self.placements)

    @property
    def _replicas(self) -> int:
        """Rows of a message, which are alike: every replica has one or more."""
        return math.lcm(*(len(placement.devices) for placement in self.placements))

    @property
    def _shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        params, stats = jax.eval_shape(self.above.units[0].initial)
        names = dict.fromkeys(source.name for source in self.stage.units[-1].follows.values())
        return {name: {**params, **stats}[name] for name in names}

    @property
    def _rows(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {
            name: jax.ShapeDtypeStruct((self._replicas, *leaf.shape), leaf.dtype)
            for name, leaf in self._shapes.items()
        }


def followings(
    stages: Sequence[Stage], placements: Sequence[StageDevices], fuse: bool
) -> tuple[Following, ...]:
    """Those of all stages, from the first."""
    return tuple(
        Following(stage, stages[k + 1], (placements[k], placements[k + 1]), fuse)
        for k, stage in enumerate(stages)
        if stage.follows_above
    )
