"""From a model and a method to the units and the stages of a run."""

import dataclasses
import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jdecouple._errors import (
    require_bool,
    require_int,
    require_number,
    require_one_of,
    require_type,
)
from jdecouple.methods import Method
from jdecouple.methods.objectives import BlockInfo, Fronted
from jdecouple.methods.objectives.following import linked
from jdecouple.methods.objectives.front import build_head
from jdecouple.methods.routes import (
    REMATS,
    Carry,
    Route,
    Stage,
    Synchronous,
    Unit,
    accumulating,
    loss_scale,
)
from jdecouple.methods.routes.stage import Transform, floating, with_floating
from jdecouple.methods.routes.unit import Tie, find_ties, parameters, share_traces
from jdecouple.models import Model
from jdecouple.models.cuts import Chain, first_embedding
from jdecouple.models.renewal import outputs_of, units_of
from jdecouple.pipeline.optimizing import Optimizer, check_accumulate, optimizers
from jdecouple.pipeline.outputs import block_output, outputs_of_blocks
from jdecouple.pipeline.partition import balance, check_boundaries, check_num_stages
from jdecouple.pipeline.wire import WIRES


class BuiltModel(NamedTuple):
    """The units of a run.

    Attributes:
        units: every block with its head.
        carries: shapes of the carry that every block receives.
        outputs: shapes of what every block gives, without what it hands on by name.
        num_classes: width of the logits.
        ties: the parameters that units share.
    """

    units: tuple[Unit, ...]
    carries: tuple[Carry, ...]
    outputs: tuple[Any, ...]
    num_classes: int
    ties: tuple[Tie, ...] = ()


def abstract(tree: Any) -> Any:
    """The `jax.ShapeDtypeStruct`s of a tree of arrays, in JAX's own dtypes."""
    canonical = jax.dtypes.canonicalize_dtype
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, canonical(leaf.dtype)), tree)


def model_input(batch: Carry, transform: Transform | None) -> Carry:
    """Shapes of a batch after the transform, from those before; TypeError if it is no function."""
    if transform is None:
        return batch
    if not callable(transform):
        raise TypeError(f"transform is a {type(transform).__name__}: a function is needed")
    count = batch["label"].shape[0]
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), count))
    return jax.eval_shape(lambda batch, keys: transform(batch, keys, True), batch, keys)


def build_units(
    model: Model,
    method: Method,
    carry: Carry,
    num_classes: int | None,
    seed: int,
    dtype: Any,
    frozen: Collection[int] = (),
) -> BuiltModel:
    """Gives every block its head; ValueError for arguments or blocks that do not fit.

    The key of a head depends on the seed and the block alone, never on the partition. `frozen` are
    indices of blocks that are not trained.
    """
    objective = method.objective
    require_int(0, 2**32 - 1, seed=seed)  # of which JAX takes the last 32 bits
    if dtype is not None and not _is_floating(dtype):
        raise ValueError(f"dtype is {dtype!r}: a floating-point dtype such as bfloat16 is needed")
    if objective.needs_classifier and model.classifier is None:
        raise ValueError(
            f"method {method.name} needs a classifier: give one as Model(blocks, classifier)"
        )
    _check_growth(model, method, frozen)
    outputs = outputs_of_blocks(model.blocks, carry, dtype)
    last = {**carry, "x": outputs[-1].features}
    num_classes = _num_classes(model, method, num_classes, last, dtype)
    # The last key of the 32-bit range: steps count up from 0 and never reach it.
    root = jax.random.fold_in(jax.random.key(seed), np.uint32(2**32 - 1))
    above: tuple = ()
    if isinstance(objective, Fronted) or method.attached:
        shapes = outputs_of(model.blocks, [x.features for x in outputs], carry["x"])
        above = tuple(zip(units_of(model.blocks), shapes, strict=True))
    inputs, units = carry["x"], []
    carries: list[Carry] = []
    held: list[dict[str, nnx.Variable]] = []
    for index, (block, output) in enumerate(zip(model.blocks, outputs, strict=True)):
        features = output.features
        own, embedding = model.at_block(index), first_embedding(block)
        received = carry["x"]
        if embedding is not None:
            received = block_output(index, embedding, carry, dtype).features
        number = len(units_of(model.blocks[: index + 1])) - 1
        info = BlockInfo(
            index=index,
            num_blocks=len(own.blocks),
            features=features,
            num_classes=num_classes,
            classifier=own.classifier,
            init=method.init,
            param_dtype=_param_dtype(block),
            is_embedding=getattr(block, "is_embedding", False),
            input=inputs,
            embedding=embedding,
            received=received,
            grown=own is not model,
            above=above[number + 1 : len(units_of(own.blocks))],
            unit=number,
        )
        rngs = nnx.Rngs(jax.random.fold_in(root, index))
        labels = carry["label"].shape
        length = labels[1] if len(labels) > 1 else None
        head = build_head(objective, info, rngs, length, method.attached)
        if head is None and method.route.local:
            raise ValueError(f"method {method.name} gives block {index} no loss of its own")
        unit = Unit.build(index, block, head, dtype, output.channels)
        held.append(parameters(block, head))
        handed = unit.head_outputs(features, carry)
        if index in frozen:
            unit = dataclasses.replace(unit, frozen=True, has_loss=False, hands_on=bool(handed))
        units.append(unit)
        carries.append(carry)
        carry = {**carry, **handed, "x": output.sent}
    units = _linked(units, model.blocks)
    ties = find_ties(held)
    uses = [use for tie in ties for use in tie.uses]
    for number, unit in enumerate(units):
        if shared := frozenset(name for index, name in uses if index == number):
            if unit.frozen:
                raise ValueError(
                    f"frozen block {number} shares {min(shared)} with another: give each its own"
                )
            units[number] = dataclasses.replace(unit, shared=shared)
    features = tuple(output.features for output in outputs)
    return BuiltModel(share_traces(units), tuple(carries), features, num_classes, ties)


def _linked(units: Sequence[Unit], blocks: Sequence[nnx.Module]) -> list[Unit]:
    """Units whose averages know what they follow by its names in the block above."""
    ends = [*itertools.accumulate(len(units_of([block])) for block in blocks)]
    found = list(units)
    for k, (unit, above) in enumerate(itertools.pairwise(units)):
        of_above = range(ends[k], ends[k + 1])
        is_chain = isinstance(blocks[k + 1], Chain)
        follows = linked(unit.follows, above.follows, of_above, is_chain)
        found[k] = dataclasses.replace(unit, follows=follows)
    return found


def _check_growth(model: Model, method: Method, frozen: Collection[int]) -> None:
    """Refuses a grown model or parts of one that the method cannot train; TypeError, ValueError."""
    require_type(Collection, frozen=frozen)  # an iterator would be empty the second time
    count = len(model.blocks)
    if not method.route.local and (len(frozen) or model.before is not None):
        what = "a model that was grown" if model.before is not None else "frozen blocks"
        raise ValueError(f"{what} needs a local method: given {method.name}")
    for index in frozen:
        require_int(0, count - 1, frozen=index)
    if method.attached and len(frozen):
        raise ValueError(
            f"attached is {method.attached}, whose weights frozen blocks would not hand on: given "
            f"frozen {', '.join(map(str, frozen))}"
        )
    if len(set(frozen)) == count:
        raise ValueError(f"frozen are all {count} blocks: at least one must be trained")


def _num_classes(model: Model, method: Method, given: int | None, carry: Carry, dtype: Any) -> int:
    """Width of the model's logits; the number that is given where the method trains none."""
    trains_classifier = method.objective.trains_classifier
    if given is not None and not (trains_classifier and model.classifier is not None):
        return given
    features = carry["x"]
    if model.classifier is not None:
        features = block_output(len(model.blocks), model.classifier, carry, dtype).features
    elif not trains_classifier:
        raise ValueError("num_classes is needed: the model has no classifier to read it from")
    width = features.shape[-1]
    if given not in (None, width):
        raise ValueError(f"num_classes is {given}: the model's logits have width {width}")
    return width


def _is_floating(dtype: Any) -> bool:
    try:
        return bool(jnp.issubdtype(jnp.dtype(dtype), jnp.floating))
    except TypeError:
        return False


def _param_dtype(block: nnx.Module) -> Any:
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(nnx.state(block, nnx.Param))]
    return next((dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)), jnp.float32)


def split_blocks(
    model: Model | None,
    built: BuiltModel,
    route: Route,
    num_stages: int,
    boundaries: Sequence[int] | str | None,
) -> tuple[int, ...]:
    """Index of the first block of every stage: given, of a published split, or balanced by cost."""
    num_blocks = len(built.units)
    check_num_stages(num_stages, num_blocks)
    if isinstance(boundaries, str):
        assert model is not None  # which has them by name
        boundaries = model.boundaries(boundaries, num_stages)
    if boundaries is not None:
        return check_boundaries(boundaries, num_stages, num_blocks)
    if num_stages in (1, num_blocks):
        return tuple(range(num_stages))
    return balance(unit_costs(built.units, built.carries, route), num_stages)


def unit_costs(units: Sequence[Unit], carries: Sequence[Carry], route: Route) -> list[float]:
    """Floating-point operations of a forward and backward of every unit, by XLA's analysis.

    A frozen unit has a forward alone.
    """
    costs = []
    for unit, carry in zip(units, carries, strict=True):

        def work(params, stats, carry, unit=unit):
            def loss(params, x):
                received = {**carry, "x": with_floating(x, carry["x"])}
                features, output, _ = unit.train(params, stats, received, jax.random.key(0))
                total = jnp.zeros((), jnp.float32) if output is None else output.loss
                if not route.local:
                    total += sum(jnp.sum(leaf) for leaf in jax.tree.leaves(floating(features)))
                return total, (features, {} if output is None else dict(output.carry))

            argnums = 0 if route.local or unit.index == 0 else (0, 1)
            return jax.grad(loss, argnums, has_aux=True)(params, floating(carry["x"]))

        program = unit.pass_on if unit.frozen else work
        costs.append(flops(program, *jax.eval_shape(unit.initial), carry))
    return costs


def flops(function: Callable, *shapes: Any) -> float:
    """Floating-point operations of a call, by XLA's analysis."""
    lowered = jax.jit(function).lower(*shapes)
    analysis = lowered.cost_analysis() or lowered.compile().cost_analysis() or {}
    return float(analysis.get("flops", 0.0))


def _remats(remat: Any, method: Method, num_stages: int) -> list[str]:
    """What every stage keeps, from what the user asks for."""
    allowed = ("auto", *REMATS)
    asked = [remat] * num_stages if isinstance(remat, str) else remat
    if not isinstance(asked, list | tuple) or not all(value in allowed for value in asked):
        raise ValueError(
            f"remat is {remat!r}: {', '.join(allowed)} are allowed, or one of them a stage"
        )
    if len(asked) != num_stages:
        raise ValueError(
            f"remat has {len(asked)} entries: one is needed for each of {num_stages} stages"
        )
    route = method.route
    chosen = [route.automatic_remat if value == "auto" else value for value in asked]
    for k, value in enumerate(chosen[:-1]):
        if value not in route.remats:
            raise ValueError(
                f"remat is {value!r} in stage {k}, whose activations wait for {method.name}: "
                f"allowed are {', '.join(map(repr, route.remats))}"
            )
    return chosen


def build_stages(
    built: BuiltModel,
    method: Method,
    boundaries: Sequence[int],
    received: Carry,
    optimizer: Optimizer,
    remat: str | Sequence[str],
    clip_norm: float | None,
    accumulate: int,
    ema: float | None,
    wire: str | None,
    **common: Any,
) -> tuple[Stage, ...]:
    """Cuts the units into stages.

    `received` are shapes of a microbatch before the transform; `remat` is of all stages or of
    each; `common` are `seed`, `num_microbatches`, `transform` and `gradient_norms`.

    Raises:
        TypeError: an optimizer that is none.
        ValueError: an optimizer that needs more than gradients, `remat` of another number of
            stages, a norm that the method cannot bound, a wire that the dtype cannot have, or
            values out of range.
    """
    require_bool(gradient_norms=common["gradient_norms"])
    check_accumulate(accumulate, method, clip_norm)
    if ema is not None:
        require_number(positive=True, below=1, ema=ema)
    num_stages = len(boundaries)
    steps = optimizers(optimizer, method, num_stages, accumulate, built.units)
    versions = method.route.passes_per_version(num_stages)
    remats = _remats(remat, method, num_stages)
    if clip_norm is not None:
        require_number(positive=True, clip_norm=clip_norm)
        if not isinstance(method.route, Synchronous):
            raise ValueError(
                f"clip_norm needs a synchronous method: given {method.name}, whose stages do not "
                "wait for one another"
            )
    scaled = loss_scale.is_for(built.units[0].dtype)
    if wire is not None:
        require_one_of(WIRES, wire=wire)
    if scaled and wire in WIRES[1:] and not method.route.local:
        raise ValueError(
            f"wire is {wire!r}: dtype float16 sends errors that may overflow, which are not rounded"
        )
    parts = [*itertools.pairwise((*boundaries, len(built.units)))]
    rebuild = [
        method.route.rebuilds and all(unit.reversible for unit in built.units[start:end])
        for start, end in parts[:-1]
    ]
    if wire is not None and any(rebuild):
        raise ValueError(
            f"wire is {wire!r}: stages of {method.name} make their inputs of what comes back, "
            "which is not rounded"
        )
    stages = []
    for k, (start, end) in enumerate(parts):
        carry = dict(built.carries[start]) if k else received
        if any(unit.has_loss for unit in built.units[:start]):
            carry["loss"] = jax.ShapeDtypeStruct((), jnp.float32)
        stages.append(
            Stage(
                index=k,
                num_stages=num_stages,
                units=built.units[start:end],
                optimizer=accumulating(method.route.optimizer(k, steps[k]), accumulate),
                remat=remats[k],
                clip_norm=clip_norm,
                ema=ema,
                carry=carry,
                scaling=method.route.scaling if scaled else None,
                wire=wire,
                ties=built.ties,
                passes_per_version=versions,
                rebuilds_input=k < num_stages - 1 and rebuild[k],
                returns_input=k > 0 and rebuild[k - 1],
                **common,
            )
        )
    return tuple(stages)
