"""The calls of one batch, traced in order with shapes alone: what each takes, gives and needs."""

import dataclasses
import functools
import types
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from jdecouple.pipeline.design import Design
from jdecouple.pipeline.mesh import replica_spec
from jdecouple.pipeline.mpmd.executor import Executor
from jdecouple.pipeline.mpmd.stage_fns import donated_by
from jdecouple.pipeline.mpmd.step_ids import by_call
from jdecouple.pipeline.plan.graph import graph_of, size_of
from jdecouple.pipeline.plan.liveness import needed, temporaries
from jdecouple.pipeline.state import queue_shapes

_HERE = types.SimpleNamespace(addressable=True)


class Leaf(NamedTuple):
    """An array between calls.

    Attributes:
        key: tells it from others.
        size: bytes.
    """

    key: int
    size: int


@dataclasses.dataclass(frozen=True)
class TracedCall:
    """One call of an iteration.

    Attributes:
        stage: index of the stage; None of the one call of fused stages.
        taken: arrays that it takes, by what they are: "state", "accumulated", "residuals",
            "carry", "cotangent".
        given: arrays that it makes, by the same names and "metrics".
        donated: keys of arrays that are gone after it.
        needed: bytes beside those taken: all that it makes and does not put where donated arrays
            were, and what it needs in between.
        fresh: keys of arrays given that do not lie where donated ones did.
    """

    stage: int | None
    taken: dict[str, list[Leaf]]
    given: dict[str, list[Leaf]]
    donated: frozenset[int]
    needed: int
    fresh: frozenset[int]


@dataclasses.dataclass(frozen=True)
class Iteration:
    """One batch through all stages.

    Attributes:
        calls: in the order of dispatch.
        states: arrays of every stage's state by their kind ("params", ..., "queues").
        parts: arrays of the batch.
        left: keys of what remains in the new states.
    """

    calls: list[TracedCall]
    states: list[dict[str, list[Leaf]]]
    parts: list[Leaf]
    left: frozenset[int]


def trace(design: Design, replicas: int, platform: str) -> Iteration:
    """Traces an iteration as one replica of `replicas` sees it; nothing is compiled or placed."""
    return _Recorder(design, replicas, platform).iteration()


class _Recorder:
    def __init__(self, design: Design, replicas: int, platform: str):
        self._platform = platform
        self._parts_of_update = replicas if design.engine.shard_optimizer else 1
        self._calls: list[TracedCall] = []
        self._known: dict[Any, tuple[Any, int, dict[int, int]]] = {}
        self._kept: list[Any] = []  # so that no two shapes have the same address
        stages = tuple(
            dataclasses.replace(stage, carry=_share(stage.carry, replicas))
            for stage in design.stages
        )
        placements: Any = (_HERE,) * len(stages)
        self._executor = Executor(stages, placements, design.method.route, design.schedule, True)
        self._design = design
        parts = design.spec.split(design.spec.example)
        self._parts = tuple(_fresh(_share(part, replicas)) for part in parts)

    def iteration(self) -> Iteration:
        executor, design = self._executor, self._design
        route, schedule = design.method.route, design.schedule
        states = [
            _fresh(
                jax.eval_shape(stage.initial)
                | queue_shapes(schedule, route, executor.stages, stage.index)
            )
            for stage in executor.stages
        ]
        if design.engine.fuse:
            dispatch: Any = self._fused
        else:
            functions: Any = {
                key: functools.partial(self._stage, *key, function)
                for key, function in executor.functions.items()
            }
            dispatch = functools.partial(executor.dispatch, executor.calls, functions)
        ids = by_call(executor.calls, executor.step_ids(executor.calls, 0))
        new, *_ = executor.iterate(dispatch, states, self._parts, ids)
        return Iteration(
            self._calls,
            [{kind: self._leaves(kind, tree) for kind, tree in state.items()} for state in states],
            _leaves(self._parts),
            frozenset(leaf.key for leaf in _leaves(new)),
        )

    def _fused(self, *arguments: Any) -> Any:
        executor = self._executor
        run = functools.partial(executor.dispatch, executor.calls, executor.functions)
        states, taken, parts, _ = arguments
        out, size, fresh = self._trace("fused", run, arguments, (states, taken))
        given = {"state": out[0], "residuals": out[1], "metrics": out[2]}
        self._add(
            None,
            {"state": states, "residuals": taken, "carry": parts},
            given,
            (states, taken),
            size,
            fresh,
        )
        return out

    def _stage(self, stage: int, kinds: Any, function: Any, *arguments: Any) -> Any:
        scheduled = isinstance(kinds, tuple) and kinds
        places = donated_by(kinds) if scheduled else () if kinds == () else (0,)
        donated = tuple(arguments[number] for number in places)
        out, *needs = self._trace((stage, kinds), function, arguments, donated)
        if isinstance(kinds, int):  # the step of what stages share, or a copy of it
            taken = {"state": arguments[0], "accumulated": arguments[1:]}
            self._add(stage, taken, out, donated, *needs)
            return out
        if not kinds:
            self._add(stage, {"accumulated": arguments}, {"metrics": out}, (), *needs)
            return out
        names = ("state", "accumulated", "residuals", "carry", "cotangent")
        taken = dict(zip(names, arguments, strict=False))
        self._add(stage, taken, out, donated, *needs)
        return out

    def _trace(
        self, what: Any, function: Callable, arguments: Any, donated: Any
    ) -> tuple[Any, int, frozenset[int]]:
        """Shapes of what a call gives, as new objects, and its needs."""
        key = what, tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(arguments))
        if key not in self._known:
            jaxpr, out = jax.make_jaxpr(function, return_shape=True)(*arguments)
            reused = _reused(jax.tree.leaves(arguments), donated, jax.tree.leaves(out))
            size = needed(graph_of(jaxpr, self._platform, temporaries), reused)
            self._known[key] = out, size, reused
        out, size, reused = self._known[key]
        out = _fresh(out)
        fresh = [id(leaf) for n, leaf in enumerate(jax.tree.leaves(out)) if n not in reused]
        return out, size, frozenset(fresh)

    def _add(self, stage: Any, taken: Any, given: Any, donated: Any, *needs: Any) -> None:
        self._kept.append((taken, given))
        self._calls.append(
            TracedCall(
                stage,
                {name: self._leaves(name, tree) for name, tree in taken.items()},
                {name: self._leaves(name, tree) for name, tree in given.items()},
                frozenset(leaf.key for leaf in _leaves(donated)),
                *needs,
            )
        )

    def _leaves(self, name: str, tree: Any) -> list[Leaf]:
        """Leaves of what is called so, of which a replica may hold a part alone."""
        leaves, parts = _leaves(tree), self._parts_of_update
        if name not in ("opt", "tied", "accumulated"):
            return leaves
        return [
            leaf._replace(size=leaf.size // (parts if replica_spec(shape, parts) else 1))
            for leaf, shape in zip(leaves, jax.tree.leaves(tree), strict=True)
        ]


def _reused(arguments: Sequence[Any], donated: Any, given: Sequence[Any]) -> dict[int, int]:
    """Places of results that lie where donated arrays of the same shape and dtype did, and whose.

    JAX gives a result the first donated array that fits and is free.
    """
    places = {id(leaf): place for place, leaf in enumerate(arguments)}
    free: dict[Any, list[int]] = defaultdict(list)
    for leaf in jax.tree.leaves(donated):
        free[leaf.shape, leaf.dtype].append(places[id(leaf)])
    reused = {}
    for place, leaf in enumerate(given):
        if free[leaf.shape, leaf.dtype]:
            reused[place] = free[leaf.shape, leaf.dtype].pop(0)
    return reused


def _leaves(tree: Any) -> list[Leaf]:
    return [Leaf(id(leaf), size_of(leaf)) for leaf in jax.tree.leaves(tree)]


def _fresh(tree: Any) -> Any:
    """The same shapes as objects of their own, each of which stands for one array."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def _share(carry: Any, replicas: int) -> Any:
    """Shapes of one replica's examples."""
    if replicas == 1:
        return carry
    return jax.tree.map(
        lambda leaf: (
            jax.ShapeDtypeStruct((leaf.shape[0] // replicas, *leaf.shape[1:]), leaf.dtype)
            if leaf.shape
            else leaf
        ),
        carry,
    )
