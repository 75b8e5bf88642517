"""The compiled calls of a stage: what it does in consecutive actions, as pure functions."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jdecouple.methods.routes import (
    Accumulated,
    Carry,
    Metrics,
    Route,
    Stage,
    StageState,
    add,
    after,
    ties,
)
from jdecouple.methods.routes.splitting import defer
from jdecouple.methods.routes.stage import error_shapes
from jdecouple.pipeline.mesh import StageDevices, jit
from jdecouple.pipeline.mpmd.step_ids import NEXT_BATCH
from jdecouple.pipeline.step_metrics import JoinedMetrics
from jdecouple.pipeline.transfer import pack, packed, unpack
from jdecouple.pipeline.wire import coded, decode, encode, encode_error
from jdecouple.schedules import Call, Kind, Schedule

IDS = 5  # the argument of a call that numbers its actions
TRAINING = (Kind.FORWARD, Kind.BACKWARD, Kind.STEP)


def stage_step(
    stage: Stage,
    route: Route,
    kinds: tuple[Kind, ...],
    state: StageState,
    accumulated: Accumulated | None,
    residuals: Any,
    carry: Any,
    cotangent: Any,
    step_ids: jax.Array,
    squared_norm: jax.Array | None = None,
    *,
    splits: bool = False,
) -> dict[str, Any]:
    """What one stage does in consecutive actions, as a pure function.

    Args:
        stage: the stage.
        route: the route.
        kinds: the actions, in order.
        state: of the stage. What exists begins with batch "since", where it holds that: what an
            action on an earlier batch would change stays as it is.
        accumulated: sums over the microbatches so far; None before the first.
        residuals: what the forward left, where that was an earlier call; of a weight gradient what
            the backward left.
        carry: from the stage below; None without a forward.
        cotangent: from the stage above; None without a backward, and on the last stage.
        step_ids: [batch, microbatch] of every action; batch -1 does not exist.
        squared_norm: of the gradient of all stages, where a step needs it.
        splits: whether a weight gradient of the same or a later call follows a backward.

    Returns:
        What changed: "state", "accumulated", "residuals", "carry", "cotangent", "metrics"; and
        "tied", sums of gradients for the step of what is shared. What a backward leaves has `Taken`
        in the place of residuals that it was given.
    """
    taken = residuals
    at_once = not splits or Kind.WEIGHT in kinds
    out: dict[str, Any] = {}
    scaling: Metrics = {}
    gradients: Any
    sums: Any
    gradients, sums = accumulated or (None, None)
    for number, kind in enumerate(kinds):
        step_id = step_ids[number]
        if kind is Kind.FORWARD:
            stats, metrics, residuals, out["carry"] = route.forward(stage, state, carry, step_id)
            sums = add(sums, _if_exists(step_id, state, metrics, dict.fromkeys(metrics, 0)))
            state = {**state, "stats": _if_exists(step_id, state, stats, state["stats"])}
            out["state"] = {**out.get("state", {}), "stats": state["stats"]}
            out["residuals"] = residuals
        elif kind is Kind.BACKWARD and at_once:
            gradient, out["cotangent"] = route.backward(stage, state, residuals, cotangent, step_id)
            gradients = add(gradients, gradient)
            out.pop("residuals", None)
        elif kind is Kind.BACKWARD:
            backward = functools.partial(route.backward, stage)
            out["cotangent"], later = defer(backward, state, residuals, cotangent, step_id)
            out["residuals"] = without_taken(later, taken)
        elif kind is Kind.WEIGHT:
            if Kind.BACKWARD not in kinds:
                gradients = add(gradients, residuals())
        else:
            if stage.shares:
                out["tied"] = ties.sums_of(stage, gradients)
                if "since" in state:
                    out["tied"] = ties.existing(out["tied"], step_id[0] >= state["since"])
            updated, scaling = stage.step(state, gradients, squared_norm)
            updated["stats"] = stage.following(updated["stats"], state["params"])
            none = {name: x if name.endswith("loss_scale") else 0 for name, x in scaling.items()}
            scaling = _if_exists(step_id, state, scaling, none)
            state = out["state"] = _if_exists(step_id, state, updated, state)
            gradients = None
    if Kind.STEP in kinds:  # a forward after the step, of another batch, reports here too
        out["metrics"] = stage.mean(sums) | scaling
        if squared_norm is not None and stage.clip_norm is not None:
            out["metrics"]["gradient_norm"] = jnp.sqrt(squared_norm).astype(jnp.float32)
    else:
        out["accumulated"] = Accumulated(gradients, sums)
    if stage.is_last:
        out.pop("carry", None)
    return out


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Taken:
    """Stands for an array that a call would only give back: a leaf, by number, of what it took.

    The call would copy it.
    """

    leaf: int


def without_taken(tree: Any, taken: Any) -> Any:
    """`tree`, with a `Taken` for every array of the tree `taken`."""
    numbers = {id(leaf): number for number, leaf in enumerate(jax.tree.leaves(taken))}

    def replaced(leaf: Any) -> Any:
        return Taken(numbers[id(leaf)]) if id(leaf) in numbers else leaf

    return jax.tree.map(replaced, tree)


def with_taken(tree: Any, taken: Any) -> Any:
    """What `without_taken` was given; without anything taken, `tree` itself."""
    if taken is None:
        return tree
    leaves = jax.tree.leaves(taken)

    def replaced(leaf: Any) -> Any:
        return leaves[leaf.leaf] if isinstance(leaf, Taken) else leaf

    return jax.tree.map(replaced, tree, is_leaf=lambda leaf: isinstance(leaf, Taken))


def _in_turn(
    stage: Stage,
    route: Route,
    state: StageState,
    _accumulated: None,
    _residuals: None,
    carry: Any,
    _cotangent: None,
    step_ids: jax.Array,
    _squared_norm: None = None,
) -> dict[str, Any]:
    """As `stage_step` of `TRAINING` by a local route, but one unit after the other.

    What a unit keeps is free again before the next begins.
    """
    shared = {name: value for name, value in state.items() if name == "since"}
    units = [name for name in state if name not in shared]
    changed: dict[str, list] = {name: [] for name in units}
    metrics: Metrics = {}
    tied: list[ties.Sums] = []
    for number, part in enumerate(stage.parts()):
        own = {name: (state[name][number],) for name in units}
        out = stage_step(
            part, route, TRAINING, {**shared, **own}, None, None, carry, None, step_ids
        )
        if number + 1 < len(stage.units):
            (stats,) = out["state"]["stats"]
            above = {**state["params"][number + 1], **state["stats"][number + 1]}
            out["state"]["stats"] = (stage.units[number].following(stats, above),)
        for name in units:
            changed[name] += out["state"][name]
        metrics |= out["metrics"]
        tied += [out["tied"]] if "tied" in out else []
        if "carry" in out:
            carry = {**out["carry"], "x": after(out["state"], out["carry"]["x"])}
    result = {"state": {**shared, **{k: tuple(v) for k, v in changed.items()}}, "metrics": metrics}
    result |= {"tied": ties.total(tied)} if tied else {}
    return result if stage.is_last else {**result, "carry": carry}


def _if_exists(step_id: jax.Array, state: StageState, new: Any, old: Any) -> Any:
    if "since" not in state:
        return new
    exists = step_id[0] >= state["since"]
    return jax.tree.map(lambda new, old: jnp.where(exists, new, old), new, old)


class Microbatches(NamedTuple):
    """Those that a call works on; None for what it does not do.

    Attributes:
        forward: the one that it takes forward.
        backward: the one that it takes backward.
        takes: the one whose residuals it takes, if they are from an earlier call.
        leaves: the one whose residuals it leaves, if it leaves any.
    """

    forward: Any
    backward: Any
    takes: Any
    leaves: Any


@functools.cache
def microbatches_of(kinds: tuple[Kind, ...], microbatches: tuple[int, ...]) -> Microbatches:
    """Microbatches of a call's actions."""
    at = dict(zip(kinds, microbatches, strict=True))
    forward, backward = at.get(Kind.FORWARD), at.get(Kind.BACKWARD)
    leaves = backward if forward is None else forward
    return Microbatches(forward, backward, at.get(Kind.WEIGHT, backward), leaves)


def calls_of(schedule: Schedule, needs_norm: bool) -> tuple[Call, ...]:
    """A schedule's calls; where steps need the norm of all stages, they wait for it."""
    calls = tuple(schedule.calls())
    return _steps_last(calls) if needs_norm else calls


def _steps_last(calls: tuple[Call, ...]) -> tuple[Call, ...]:
    """Takes the steps out of the calls, and puts them behind all."""
    others, steps = [], []
    for stage, kinds, microbatches in calls:
        pairs = [*zip(kinds, microbatches, strict=True)]
        kept = [pair for pair in pairs if pair[0] is not Kind.STEP]
        if kept:
            others.append(Call(stage, *zip(*kept, strict=True)))
        steps += [
            Call(stage, (kind,), (microbatch,)) for kind, microbatch in pairs if kind is Kind.STEP
        ]
    return (*others, *steps)


def make_norm_fn(stage: Stage) -> Any:
    """Adds the squared norm of a stage's gradient to that of the stages above.

    Gives the sum, and what the stage adds to the gradients of what is shared. `received` is what
    the stages above add to those that the stage steps.
    """

    def call(gradients, above, received):
        units = zip(stage.units, gradients, strict=True)
        total = stage.squared_norm([unit.own(own) for unit, own in units])
        sums = ties.sums_of(stage, gradients)
        whole = ties.total([sums, *received])
        if names := stage.owned_ties:
            total += stage.squared_norm([whole[name] for name in names])
        return total if above is None else total + above, sums

    call.__name__ = f"stage{stage.index}_norm"
    return call


def make_tie_fns(stage: Stage) -> tuple[Any, Any]:
    """The step of what a stage is the first to share, and the copy of what came out elsewhere."""

    def step(state, received, squared_norm=None):
        state, values = ties.step(stage, state, ties.total(received), squared_norm)
        return {"state": ties.put(stage, state, values), "values": values}

    def copy(state, values):
        return {"state": ties.put(stage, state, values)}

    step.__name__, copy.__name__ = (f"stage{stage.index}_{what}" for what in ("tied", "copied"))
    return step, copy


def make_stage_fn(stage: Stage, route: Route, kinds: tuple[Kind, ...], splits: bool = False) -> Any:
    """`stage_step` of one stage and these actions; its name tells both in a profile."""
    function: Any = functools.partial(stage_step, stage, route, kinds, splits=splits)
    if route.local and kinds == TRAINING and stage.num_microbatches == 1:
        function = functools.partial(_in_turn, stage, route)
    function.__name__ = f"stage{stage.index}_" + "".join(kind.value for kind in kinds)
    return function


def with_messages(
    function: Any,
    stage: Stage,
    kinds: tuple[Kind, ...],
    below: Carry | None = None,
    above: Carry | None = None,
    *,
    unpacks: bool = True,
) -> Any:
    """The call of a stage that rounds what it sends, and sends as one array what crosses processes.

    `below` and `above` are shapes of the carries from and to stages that are elsewhere; what comes
    from there is one array, if it `unpacks`.
    """
    if below is None and above is None and stage.wire is None:
        return function

    def sent(codes: Any, like: Any, crosses: bool) -> Any:
        return pack(codes) if crosses else decode(codes, like)

    def call(state, accumulated, residuals, carry, cotangent, step_ids, *others):
        if below and unpacks and carry is not None:
            carry = unpack_codes(carry, below, stage.wire)
        if above and unpacks and cotangent is not None:
            shapes = error_shapes(above, stage.scaling, stage.rebuilds_input)
            cotangent = unpack_codes(cotangent, shapes, stage.wire)
        out = function(state, accumulated, residuals, carry, cotangent, step_ids, *others)
        if "carry" in out:
            whole = {name: out["carry"][name] for name in above or out["carry"]}
            if above and "loss" in above:
                whole["loss"] = jnp.full_like(above["loss"], whole["loss"])
            out["carry"] = sent(encode(whole, stage.wire), whole, above is not None)
        if (error := out.get("cotangent")) is not None:
            feedback = state.get("feedback", ())
            step_id = step_ids[kinds.index(Kind.BACKWARD)]
            codes, taken = encode_error(error, feedback, step_id[1], stage.wire)
            out["cotangent"] = sent(codes, error, below is not None)
            if feedback:
                taken = _if_exists(step_id, state, taken, feedback)
                out["state"] = {**out.get("state", {}), "feedback": taken}
        return out

    call.__name__ = function.__name__
    return call


def message_shape(shapes: Any, wire: str | None) -> jax.ShapeDtypeStruct:
    """Shape of the one array that carries a tree of these shapes to another process."""
    return packed(coded(shapes, wire))


def unpack_codes(array: jax.Array, shapes: Any, wire: str | None) -> Any:
    """The tree of these shapes that was rounded and packed, the sum of losses for every example."""
    tree = decode(unpack(array, coded(shapes, wire)), shapes)
    if isinstance(tree, dict) and "loss" in tree:
        tree["loss"] = tree["loss"][0]
    return tree


def compile_stage_fn(
    function: Any,
    placement: StageDevices,
    kinds: tuple[Kind, ...],
    queued: int | None,
    single_metrics: tuple[str, ...] = (),
) -> Any:
    """Jits a call; donates what the call replaces. It gives the numbers of the next batch too.

    `queued` are the examples in a microbatch, where residuals outlive the iteration;
    `single_metrics` are those that are not joined with the others.
    """
    constrain = jax.lax.with_sharding_constraint
    if not kinds:  # a norm
        return jit(function, placement, out_shardings=placement.replicated)

    def constrained(*arguments: Any) -> dict[str, Any]:
        out = function(*arguments)
        for name in out:
            if name == "state":
                out[name] = constrain(out[name], placement.state_shardings(out[name], 1))
            elif name == "carry":
                out[name] = placement.constrain(out[name])
            elif name == "cotangent":
                out[name] = constrain(out[name], placement.batched)
            elif name == "accumulated":
                out[name] = constrain(out[name], placement.update_shardings(out[name]))
            elif name == "metrics":
                joined = JoinedMetrics.of(out[name], single_metrics)
                out[name] = constrain(joined, placement.replicated)
            elif queued is not None:
                out[name] = placement.constrain_queue(out[name], queued)
        return out | {"ids": constrain(arguments[IDS] + NEXT_BATCH, placement.replicated)}

    constrained.__name__ = function.__name__
    return jit(constrained, placement, donate_argnums=(*donated_by(kinds), IDS))


def donated_by(kinds: tuple[Kind, ...]) -> tuple[int, ...]:
    """Which arguments a call replaces: the state, what is accumulated, or residuals."""
    if Kind.STEP not in kinds:
        return (1,)
    if kinds[-1] is not Kind.FORWARD or (Kind.WEIGHT in kinds and Kind.BACKWARD not in kinds):
        return (0,)
    return (0, 2)  # new residuals take the place of old


def compile_unpack(placement: StageDevices, shapes: Any, wire: str | None) -> Any:
    """Jits what unpacks a message that is held in a queue."""

    def unpack(array: jax.Array) -> Any:
        return placement.constrain(unpack_codes(array, shapes, wire))

    return jit(unpack, placement)
