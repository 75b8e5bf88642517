"""What training changes, how its arrays are called, and where they lie."""

import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jdecouple.methods.routes import Route, Stage, averaged, loss_scale
from jdecouple.methods.routes.stage import error_shapes
from jdecouple.methods.routes.unit import share
from jdecouple.pipeline.mesh import StageDevices
from jdecouple.pipeline.stage_views import USED_UP, StageViews, is_deleted
from jdecouple.pipeline.wire import feedback_shapes, is_feedback
from jdecouple.schedules import Schedule

_SAVED_AS = {"queues": "waiting", "carries": "messages"}  # names in checkpoints never change


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Everything that training changes.

    Training donates it: keep the state that is returned, not the one that was given.

    Attributes:
        step: batches dispatched so far.
        stages: state of every stage ("params", "stats", "opt", with averages "ema", in float16
            "loss_scale", by a delayed schedule "queues", with a `wire` "feedback", of two versions
            of the weights "previous" and "passes", and "tied", the optimiser state of what blocks
            share); None for the stages of other processes. Small
            arrays are joined, with engine "spmd" all are stacked: they are cut when a stage is
            asked for.
        since: number of the first batch after the stages were last empty, as their states hold it.
    """

    step: int
    stages: Sequence[Any]
    since: int = 0


class Loads(Protocol):
    """An engine, as far as states know it."""

    name: str
    schedule: Schedule
    placements: tuple[StageDevices, ...]

    def load(self, states: Iterable[Any]) -> Sequence[Any]:
        """Puts the states of all stages, one after another, on their devices."""


class OwnStates:
    """The states that a trainer has made, and the check of those that callers give.

    What it has made and nothing has consumed needs no check that costs time in every step.

    Attributes:
        stages: all stages.
        placements: devices of each.
        engine: name of the engine.
        schedule: the actions of one batch.
        route: how error reaches the blocks.
    """

    def __init__(self, stages: tuple[Stage, ...], engine: Loads, route: Route):
        self.stages, self.route = stages, route
        self.placements, self.schedule = engine.placements, engine.schedule
        self.engine = engine.name
        self._load = engine.load
        self._made: weakref.WeakValueDictionary[int, State] = weakref.WeakValueDictionary()

    @cached_property
    def shapes(self) -> tuple[Any, ...]:
        """Shapes of the state of every stage."""
        return tuple(
            jax.eval_shape(stage.initial) | self.queues(stage.index) for stage in self.stages
        )

    @cached_property
    def metric_names(self) -> list[str]:
        """Names of the metrics of all stages, in order."""
        return [name for stage in self.stages for name in metric_names(stage, self.route)]

    @cached_property
    def waits(self) -> bool:
        """Whether something of a batch waits in the stages for the next one."""
        return any(map(self.queues, range(len(self.stages))))

    def queues(self, index: int) -> Any:
        """Shapes of what one stage adds to its state, see `queue_shapes`."""
        return queue_shapes(self.schedule, self.route, self.stages, index)

    def make(self, step: int, stages: Sequence[Any], since: int = 0) -> State:
        """A state of what the engine returned."""
        state = State(step, stages, since)
        self._made[id(state)] = state
        return state

    def load(self, step: int, values: Callable[[int], Any]) -> State:
        """Places the values of this process's stages, one after another."""
        own = (values(k) if p.addressable else None for k, p in enumerate(self.placements))
        stages, since = self._load(own), 0
        if self.schedule.overlapping:
            since = max(int(values["since"]) for values in stages if values)
        return self.make(step, stages, since)

    def restart(self, step: int, stages: StageViews) -> State:
        """A state of stages that are empty: those behind a step, whose next batch is the first."""
        since = {"since": np.int32(step)}
        arrays = tuple(
            values and {**values, **place(self.stages[k], self.placements[k], since)}
            for k, values in enumerate(stages.arrays)
        )
        return self.make(step, dataclasses.replace(stages, arrays=arrays), step)

    def take(self, state: State) -> Any:
        """The states of the stages, for a call that consumes them."""
        self.check(state, queues=True)
        self._made.pop(id(state), None)
        return state.stages

    def empty(self, step: int, stages: Sequence[Any]) -> State:
        """A state of what stages have trained so far, in which nothing waits."""

        def values(k: int) -> Any:
            queues = self.queues(k)
            fresh = zeros(queues) | ({"since": np.int32(step)} if "since" in queues else {})
            return {**stages[k], **fresh}

        return self.load(step, values)

    def check(self, state: State, *, abstract: bool = False, queues: bool = False) -> None:
        """Checks a state; with `abstract` its shapes are enough.

        What waits in the stages may be another trainer's, of examples of other shapes, unless the
        `queues` are looked at.

        Raises:
            TypeError: no State.
            ValueError: one that training has consumed; or another trainer's, of other stages,
                shapes or devices, or another engine.
        """
        if state is not None and self._made.get(id(state)) is state and _is_alive(state):
            return
        if not isinstance(state, State):
            given = type(state).__name__
            raise TypeError(f"state is a {given}: what trainer.init or trainer.step gave is needed")
        if any(map(is_deleted, jax.tree.leaves(state.stages))):
            raise ValueError(USED_UP)
        if difference := self._difference(state.stages, abstract, queues):
            raise ValueError(
                f"this is the state of another trainer: {difference}; from_arrays(state.step, "
                "other.to_arrays(state)) takes it over where the nets are equal"
            )

    def _difference(self, found: Any, abstract: bool, queues: bool) -> str | None:
        """Where a state differs from those that are made here, if anywhere."""
        count = len(self.placements)
        engine = found.layout.engine if isinstance(found, StageViews) else "mpmd"
        if not isinstance(found, Sequence) or len(found) != count:
            stages = len(found) if isinstance(found, Sequence) else "no"
            return f"it has {stages} stages, this one {count}"
        if not abstract and engine != self.engine:
            return f"its engine is {engine}, this one's {self.engine}"
        for k, (shapes, placement) in enumerate(zip(self.shapes, self.placements, strict=True)):
            own = found[k]
            if own is None and (abstract or not placement.addressable):
                continue
            waits = () if queues else self.queues(k)
            has, needs = (
                _specs({name: x for name, x in tree.items() if name not in waits})
                for tree in (own, shapes)
            )
            for name in [*needs, *has]:
                one, other = has.get(name, "nothing"), needs.get(name, "nothing")
                if one != other:
                    return f"{name} of its stage {k} is {one}, of this one {other}"
            for leaf in jax.tree.leaves(own):
                if not abstract and not isinstance(leaf, jax.Array | np.ndarray):
                    return f"its stage {k} holds shapes, this one arrays"
                if getattr(leaf, "committed", False) and leaf.devices() != {*placement.devices}:
                    return f"its stage {k} is on other devices"
        return None


def _is_alive(state: State) -> bool:
    """Whether no call has consumed a state, judged by one array: a call consumes them all."""

    def first(tree: Any) -> Any:
        if isinstance(tree, dict):
            tree = tree.values()
        elif not isinstance(tree, tuple | list):
            return tree
        for child in tree:
            if (leaf := first(child)) is not None:
                return leaf
        return None

    return not is_deleted(first(getattr(state.stages, "arrays", state.stages)))


def _specs(tree: Any) -> dict[str, str]:
    """Dtype and shape of every leaf by name."""
    return {
        "/".join(jax.tree_util.keystr((key,), simple=True) for key in path): spec(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def spec(leaf: Any) -> str:
    """Dtype and shape of an array in JAX's dtypes, such as "float32[3, 4]"."""
    if not hasattr(leaf, "dtype"):
        return type(leaf).__name__
    return f"{jax.dtypes.canonicalize_dtype(leaf.dtype)}{list(leaf.shape)}"


def leaf_names(stage: Stage, values: Any) -> list[str]:
    """Names of the leaves of a stage's state, in the order of its leaves."""
    names = []
    for path, _ in jax.tree_util.tree_leaves_with_path(values):
        kind, *rest = (jax.tree_util.keystr((key,), simple=True) for key in path)
        owner = f"stage_{stage.index}"
        if kind in ("params", "previous", "stats", "opt", "tied", "ema", "loss_scale"):
            unit, *rest = rest
            owner = f"block_{stage.units[int(unit)].index}"
        if kind == "queues":
            kind, rest[0] = (_SAVED_AS.get(part, part) for part in (kind, rest[0]))
        names.append("/".join([owner, kind, *rest]))
    return names


def to_arrays(stages: Sequence[Stage], state: State) -> dict[str, Any]:
    """The arrays of this process's stages by their names."""
    return {
        name: leaf
        for stage, values in zip(stages, state.stages, strict=True)
        if values is not None
        for name, leaf in zip(leaf_names(stage, values), jax.tree.leaves(values), strict=True)
    }


def from_arrays(stage: Stage, shapes: Any, arrays: Mapping[str, Any]) -> Any:
    """A stage's state of these shapes from arrays by name; ValueError for one that does not fit.

    Scales of losses that the arrays do not hold, as those of another dtype, begin fresh; and so
    does the feedback of errors, which depends on stages, microbatches and `wire`.
    """
    leaves = []
    arrays = {**loss_scale.fresh(unit.index for unit in stage.units), **arrays}
    for name, shape in zip(leaf_names(stage, shapes), jax.tree.leaves(shapes), strict=True):
        found = spec(arrays[name]) if name in arrays else "nothing"
        if found != spec(shape) and is_feedback(name):
            leaves.append(np.zeros(shape.shape, shape.dtype))
            continue
        if found != spec(shape):
            raise ValueError(f"arrays hold {found} as {name!r}: {spec(shape)} is needed")
        leaves.append(arrays[name])
    state = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
    if (passes := stage.passes_per_version) is not None and state["passes"] < passes:
        state["previous"] = state["params"]  # no step has made another version yet
    return state


def zeros(shapes: Any) -> Any:
    """Host arrays of these shapes."""
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def place(stage: Stage, placement: StageDevices, values: Any) -> Any:
    """Puts (parts of) the state of a stage on its devices, in memory of its own."""
    size = stage.carry["label"].shape[0]
    return placement.place(values, placement.state_shardings(values, size))


def place_states(
    stages: Sequence[Stage], placements: Sequence[StageDevices], states: Iterable[Any]
) -> tuple:
    """Puts the states of all stages on their devices, one after another; None stays None."""
    return tuple(
        values and place(stage, placement, values)
        for stage, placement, values in zip(stages, placements, states, strict=True)
    )


def modules(
    stages: Sequence[Stage], state: State, average: bool = True
) -> list[tuple[nnx.Module | None, nnx.Module | None]]:
    """Every block and its head as nnx modules; None for those of other processes.

    They have averages of the weights, where there are any and these are asked for. Parameters that
    blocks of this process share are one variable, as in the model.
    """
    pairs: list[tuple[nnx.Module | None, nnx.Module | None]] = []
    for stage, values in zip(stages, state.stages, strict=True):
        if values is None:
            pairs += [(None, None)] * len(stage.units)
            continue
        # Copies, because the next step donates the state's own buffers; bound to no device, because
        # a caller applies blocks of several stages to one input.
        values = averaged(values) if average else values
        arrays = values["params"], values["stats"]
        copies = jax.tree.map(lambda leaf: jnp.asarray(np.array(leaf)), arrays)
        pairs += [unit.modules(*pair) for unit, *pair in zip(stage.units, *copies, strict=True)]
    share(stages[0].ties, pairs)
    return pairs


def or_nan(exists: Any, values: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Puts nan where a value does not exist.

    Compiled calls return a number there: JAX refuses a nan that comes out of one, where
    `jax_debug_nans` is set.
    """
    with jax.debug_nans(False):
        return {name: jnp.where(exists, value, jnp.nan) for name, value in values.items()}


Queues = dict[str, dict[tuple[int, int], Any]]
"""What is queued for an action: "carries", "residuals", "errors", each by (stage, microbatch)."""


def forward_shapes(stage: Stage, route: Route) -> tuple[Any, Any, Any, Any]:
    """Shapes of what `route.forward` returns: statistics, metrics, residuals, the next carry."""
    forward = functools.partial(route.forward, stage)
    step_id = jax.ShapeDtypeStruct((2,), jnp.int32)
    return jax.eval_shape(forward, jax.eval_shape(stage.initial), stage.carry, step_id)


def metric_names(stage: Stage, route: Route) -> list[str]:
    """Names of the metrics of a stage, but for those that all stages have alike."""
    names = list(forward_shapes(stage, route)[1])
    if stage.scaling not in (None, "model"):
        owners = [f"block_{unit.index}/" for unit in stage.units if not unit.frozen]
        names += [owner + name for owner in owners for name in ("loss_scale", "skipped")]
    return names + stage.norm_names


def queue_shapes(schedule: Schedule, route: Route, stages: tuple[Stage, ...], index: int) -> Any:
    """Shapes of what one stage adds to its state, {} where nothing overlaps or is rounded.

    "since" is the number of the first batch after the stages were last empty; "queues" are tuples,
    oldest first, of "carries", "residuals" and "errors"; "feedback" is what rounding took from
    errors that were sent.
    """
    stage = stages[index]
    added: dict[str, Any] = {}
    if index and not route.local:
        error = error_shapes(stage.carry, stage.scaling, stage.returns_input)
        added = {"feedback": feedback_shapes(error, stage.num_microbatches, stage.wire)}
    added = {name: shapes for name, shapes in added.items() if shapes}
    if not schedule.overlapping:
        return added
    queued = schedule.in_flight(index)
    shapes: dict[str, Any] = {"carries": stage.carry, "residuals": None, "errors": None}
    if queued.residuals:
        shapes["residuals"] = forward_shapes(stage, route)[2]
        above = stages[index + 1]
        shapes["errors"] = error_shapes(above.carry, above.scaling, above.returns_input)
    return added | {
        "since": jax.ShapeDtypeStruct((), jnp.int32),
        "queues": {
            kind: (shapes[kind],) * len(batches) for kind, batches in queued._asdict().items()
        },
    }


def take_queues(schedule: Schedule, states: tuple) -> tuple[tuple, Queues]:
    """Takes the queues out of the states of the stages."""
    queues: Queues = {"carries": {}, "residuals": {}, "errors": {}}
    if not schedule.overlapping:
        return states, queues
    for stage, state in enumerate(states):
        batches = schedule.in_flight(stage)._asdict()
        for kind, values in (state["queues"] if state else {}).items():
            keys = [(stage, microbatch) for microbatch in batches[kind]]
            queues[kind] |= dict(zip(keys, values, strict=True))
    cores = [state and {k: v for k, v in state.items() if k != "queues"} for state in states]
    return tuple(cores), queues


def put_queues(schedule: Schedule, cores: tuple, queues: Queues) -> tuple:
    """Puts the queues back, an iteration older."""
    if not schedule.overlapping:
        return cores

    def queued(stage: int) -> Any:
        return {
            kind: tuple(queues[kind][stage, microbatch + 1] for microbatch in batches)
            for kind, batches in schedule.in_flight(stage)._asdict().items()
        }

    return tuple(core and {**core, "queues": queued(k)} for k, core in enumerate(cores))
