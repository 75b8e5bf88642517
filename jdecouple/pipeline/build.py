"""From a model and a method to the units of a run."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jdecouple._errors import first_line
from jdecouple.methods import Method
from jdecouple.methods.objectives import BlockInfo
from jdecouple.methods.routes import Carry, Route, Stage, Unit
from jdecouple.methods.routes.stage import Transform
from jdecouple.models import Model
from jdecouple.pipeline.partition import balance, check_boundaries, check_num_stages, program_cost


class BuiltModel(NamedTuple):
    """The units of a run.

    Attributes:
        units: every block with its head.
        carries: shapes of the carry that every block receives.
        num_classes: width of the logits.
    """

    units: tuple[Unit, ...]
    carries: tuple[Carry, ...]
    num_classes: int


def abstract(tree: Any) -> Any:
    """The `jax.ShapeDtypeStruct`s of a tree of arrays, in JAX's own dtypes."""

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
        return jax.ShapeDtypeStruct(leaf.shape, dtype)

    return jax.tree.map(shape, tree)


def model_input(example: Carry, transform: Transform | None) -> Carry:
    """Shapes of a batch after the transform."""
    batch = abstract(dict(example))
    if transform is None:
        return batch
    count = batch["label"].shape[0]
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), count))
    return jax.eval_shape(lambda batch, keys: transform(batch, keys, True), batch, keys)


def block_output(index: int, block: nnx.Module, x: Any, dtype: Any) -> Any:
    """Shapes of a block's output for the shapes of its input.

    Raises:
        ValueError: the block fails on this input.
    """
    unit = Unit.build(index, block, None, dtype)
    carry = {"x": x, "label": None}
    try:
        return jax.eval_shape(
            lambda params, stats, x: unit.train(
                params, stats, {**carry, "x": x}, jax.random.key(0)
            )[0],
            *abstract(unit.initial()),
            x,
        )
    except (TypeError, ValueError) as error:
        shape = jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", x)
        raise ValueError(
            f"block {index} ({type(block).__name__}) fails on an input of {shape}: "
            f"{first_line(error)}"
        ) from error


def infer_num_classes(model: Model, method: Method, outputs: Sequence[Any], dtype: Any) -> int:
    """Width of the model's logits.

    Raises:
        ValueError: the model has no classifier and the method trains none.
    """
    logits = outputs[-1]
    if model.classifier is not None:
        logits = block_output(len(model.blocks), model.classifier, logits, dtype)
    elif not method.objective.trains_classifier:
        raise ValueError("num_classes is needed: the model has no classifier to read it from")
    return logits.shape[-1]


def build_units(
    model: Model,
    method: Method,
    carry: Carry,
    num_classes: int | None,
    seed: int,
    dtype: Any,
) -> BuiltModel:
    """Gives every block its head.

    The key of a head depends on the seed and the block alone, never on the partition.

    Raises:
        ValueError: a block that fails on its input, a missing classifier, one of another number
            of classes, or a block that a local method leaves without a loss.
    """
    objective = method.objective
    if objective.needs_classifier and model.classifier is None:
        raise ValueError(
            f"method {method.name} needs a classifier: give one as Model(blocks, classifier)"
        )
    outputs: list[Any] = []
    for index, block in enumerate(model.blocks):
        x = outputs[-1] if outputs else carry["x"]
        outputs.append(block_output(index, block, x, dtype))
    if num_classes is None or (objective.trains_classifier and model.classifier is not None):
        width = infer_num_classes(model, method, outputs, dtype)
        if num_classes not in (None, width):
            raise ValueError(f"num_classes is {num_classes}: the model's logits have width {width}")
        num_classes = width
    # The last key of the 32-bit range: steps count up from 0 and never reach it.
    root = jax.random.fold_in(jax.random.key(seed), np.uint32(2**32 - 1))
    inputs = carry["x"]
    units = []
    carries: list[Carry] = []
    for index, (block, features) in enumerate(zip(model.blocks, outputs, strict=True)):
        site = BlockInfo(
            index=index,
            num_blocks=len(model.blocks),
            features=features,
            num_classes=num_classes,
            classifier=model.classifier,
            init=method.init,
            param_dtype=_param_dtype(block),
            is_embedding=getattr(block, "is_embedding", False),
            input=inputs,
        )
        head = objective.head(site, nnx.Rngs(jax.random.fold_in(root, index)))
        if head is None and method.route.local:
            raise ValueError(f"method {method.name} gives block {index} no loss of its own")
        units.append(Unit.build(index, block, head, dtype))
        carries.append(carry)
        carry = {**carry, **units[-1].head_outputs(features, carry), "x": features}
    return BuiltModel(tuple(units), tuple(carries), num_classes)


def split_blocks(
    units: tuple[Unit, ...],
    route: Route,
    carry: Carry,
    num_stages: int,
    boundaries: Sequence[int] | None,
) -> tuple[int, ...]:
    """Index of the first block of every stage: given, or balanced by cost.

    Raises:
        ValueError: more stages than blocks, or boundaries that do not fit.
    """
    check_num_stages(num_stages, len(units))
    if boundaries is not None:
        return check_boundaries(boundaries, num_stages, len(units))
    if num_stages == 1:
        return (0,)
    if num_stages == len(units):
        return tuple(range(num_stages))
    return balance(unit_costs(units, route, carry), num_stages)


def unit_costs(units: tuple[Unit, ...], route: Route, carry: Carry) -> list[float]:
    """Floating-point operations of one forward and backward of every unit."""
    costs = []
    carry = dict(carry)
    for unit in units:

        def work(params, stats, carry, unit=unit):
            def loss(params, x):
                features, output, _ = unit.train(
                    params, stats, {**carry, "x": x}, jax.random.key(0)
                )
                total = jnp.zeros((), jnp.float32) if output is None else output.loss
                if not route.local:
                    total += sum(jnp.sum(leaf) for leaf in jax.tree.leaves(features))
                return total, (features, {} if output is None else dict(output.carry))

            if route.local or unit.index == 0:
                return jax.grad(loss, has_aux=True)(params, carry["x"])
            return jax.grad(loss, (0, 1), has_aux=True)(params, carry["x"])

        arguments = (*abstract(unit.initial()), carry)
        costs.append(program_cost(work, *arguments))
        features, written = jax.eval_shape(work, *arguments)[1]
        carry |= {**written, "x": features}
    return costs


def build_stages(
    built: BuiltModel,
    boundaries: Sequence[int],
    received: Carry,
    optimizers: Sequence[optax.GradientTransformation],
    remat: Sequence[bool],
    **common: Any,
) -> tuple[Stage, ...]:
    """Cuts the units into stages.

    Args:
        built: the units.
        boundaries: index of the first block of every stage.
        received: shapes of a microbatch, before the transform.
        optimizers: of every stage.
        remat: of every stage.
        **common: `seed`, `num_microbatches`, `transform` and `clip_norm` of all.

    Raises:
        ValueError: `remat` of another number of stages.
    """
    if len(remat) != len(boundaries):
        raise ValueError(
            f"remat has {len(remat)} entries: one is needed for each of {len(boundaries)} stages"
        )
    stages = []
    for k, (start, end) in enumerate(itertools.pairwise((*boundaries, len(built.units)))):
        carry = dict(built.carries[start]) if k else received
        if any(unit.has_loss for unit in built.units[:start]):
            carry["loss"] = jax.ShapeDtypeStruct((), jnp.float32)
        stages.append(
            Stage(
                index=k,
                num_stages=len(boundaries),
                units=built.units[start:end],
                optimizer=optimizers[k],
                remat=remat[k],
                carry=carry,
                **common,
            )
        )
    return tuple(stages)


def metric_names(stages: Sequence[Stage], route: Route) -> tuple[str, ...]:
    """Names of the metrics of all blocks, by abstract evaluation alone."""
    names: list[str] = []
    for stage in stages:
        metrics = jax.eval_shape(
            lambda state, carry, step_id, stage=stage: route.forward(stage, state, carry, step_id)[
                1
            ],
            jax.eval_shape(stage.initial),
            stage.carry,
            jax.ShapeDtypeStruct((2,), jnp.int32),
        )
        names += [name for name in metrics if name.startswith("block_")]
    return tuple(names)


def _param_dtype(block: nnx.Module) -> Any:
    for leaf in jax.tree.leaves(nnx.state(block, nnx.Param)):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf.dtype
    return jnp.float32
