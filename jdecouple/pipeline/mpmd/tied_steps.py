"""The steps of parameters that stages share: gradients go to one stage, and what comes out back."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from jdecouple.methods.routes import Stage, ties
from jdecouple.pipeline.mesh import StageDevices, jit
from jdecouple.pipeline.mpmd.flat_state import FlatLayout
from jdecouple.pipeline.mpmd.stage_fns import make_tie_fns
from jdecouple.pipeline.transfer import transfer_whole

Functions = Mapping[tuple[int, Any], Callable]
"""Those of an executor; of (owner, owner) the step, of (stage, owner) the copy of what came out."""


@dataclasses.dataclass(frozen=True, eq=False)
class TiedSteps:
    """The end of an iteration where units share parameters; see `jdecouple.methods.routes.ties`.

    Attributes:
        stages: all stages.
        placements: devices of each.
        moves: whether arrays are sent from stage to stage.
        counts: whether gradients may not exist.
    """

    stages: tuple[Stage, ...]
    placements: tuple[StageDevices, ...]
    moves: bool
    counts: bool

    @cached_property
    def owners(self) -> dict[int, dict[int, list[str]]]:
        """By the stage that steps them, names of ties by every stage that uses them."""
        stage_of = {unit.index: stage.index for stage in self.stages for unit in stage.units}
        found: dict[int, dict[int, list[str]]] = {}
        for tie in self.stages[0].ties:
            first, *_ = users = [stage_of[block] for block, _ in tie.uses]
            for user in sorted({*users}):
                found.setdefault(first, {}).setdefault(user, []).append(tie.name)
        return found

    @cached_property
    def functions(self) -> dict[tuple[int, Any], Callable]:
        """Pure functions of the steps and copies."""
        pairs = [make_tie_fns(stage) for stage in self.stages] if self.owners else []
        return {
            (user, owner): pairs[user][user != owner]
            for owner, users in self.owners.items()
            for user in users
        }

    def compiled(self, layout: FlatLayout) -> dict[tuple[int, Any], Callable]:
        """The functions of this process's stages on states that lie flat; they donate these."""
        return {
            (user, owner): _compile(layout.on_flat(user, function), self.placements[user])
            for (user, owner), function in self.functions.items()
            if self.placements[user].addressable
        }

    def received(self, owner: int, sums: Sequence[ties.Sums | None]) -> list[ties.Sums | None]:
        """What the other stages add to the gradients of what a stage steps, on its devices."""
        found = []
        for user, names in self.owners.get(owner, {}).items():
            if user != owner:
                names = [*names, ties.COUNT] if self.counts else names
                own = sums[user]
                part = own and {name: own[name] for name in names}
                shapes = {name: self._shapes[name]["params"] for name in names}
                found.append(self._move(part, shapes, user, owner))
        return found

    def finish(
        self,
        functions: Functions,
        states: list[Any],
        tied: Sequence[ties.Sums | None],
        received: Mapping[int, list[Any]],
        norms: list[Any] | None,
        stages: set[int],
    ) -> None:
        """Steps what is shared, and writes new states in the place of old ones.

        Args:
            functions: of the executor.
            states: of all stages.
            tied: what every stage adds to shared gradients.
            received: what `received` gave, where it has been called; by owner.
            norms: squared norm of the whole gradient on every stage, where steps need it.
            stages: that run.
        """
        for owner in sorted(self.owners.keys() & stages):
            others = received.get(owner) or self.received(owner, tied)
            self._step(functions, states, owner, [tied[owner], *others], norms and norms[owner])

    def _step(
        self,
        functions: Functions,
        states: list[Any],
        owner: int,
        sums: Sequence[ties.Sums | None],
        norm: Any,
    ) -> None:
        out: dict[str, Any] = {}
        if self.placements[owner].addressable:
            out = functions[owner, owner](_parts(states[owner]), sums, norm)
            states[owner] = {**states[owner], **out["state"]}
        for user, names in self.owners[owner].items():
            if user == owner:
                continue
            values = {name: out["values"][name] for name in names} if out else None
            shapes = {name: self._shapes[name] for name in names}
            arrived = self._move(values, shapes, owner, user)
            if self.placements[user].addressable:
                new = functions[user, owner](_parts(states[user]), arrived)
                states[user] = {**states[user], **new["state"]}

    def _move(self, tree: Any, shapes: Any, source: int, target: int) -> Any:
        if not self.moves:
            return tree
        return transfer_whole(tree, shapes, self.placements[source], self.placements[target])

    @cached_property
    def _shapes(self) -> dict[str, dict[str, Any]]:
        """Shapes of what comes out of a step; that of a count as "params"."""
        found: dict[str, dict[str, Any]] = {
            ties.COUNT: {"params": jax.ShapeDtypeStruct((), jnp.int32)}
        }
        for owner in self.owners:
            stage = self.stages[owner]
            state = jax.eval_shape(stage.initial)
            for number, unit in enumerate(stage.units):
                for name in stage.owned(unit):
                    own = {"params": state["params"][number][name]}
                    if "ema" in state:
                        own["ema"] = state["ema"][number]["params"][name]
                    found[stage.tie_of(unit, name).name] = own
        return found


def _parts(state: Any) -> Any:
    return {kind: state[kind] for kind in ties.KINDS if kind in state}


def _compile(function: Callable, placement: StageDevices) -> Callable:
    constrain = jax.lax.with_sharding_constraint

    def call(*arguments: Any) -> dict[str, Any]:
        out = function(*arguments)
        shardings = placement.state_shardings(out["state"], 1)
        out["state"] = constrain(out["state"], shardings)
        if "values" in out:
            out["values"] = constrain(out["values"], placement.replicated)
        return out

    call.__name__ = function.__name__
    return jit(call, placement, donate_argnums=0)
