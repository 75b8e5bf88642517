"""What a Trainer is before anything is placed or compiled: shapes, stages, a schedule, devices."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx

from jdecouple._errors import require_int, require_type
from jdecouple.methods import Method
from jdecouple.methods.routes import Stage, Staleness
from jdecouple.methods.routes.stage import Transform
from jdecouple.methods.routes.unit import share_traces
from jdecouple.models import Model
from jdecouple.pipeline import build
from jdecouple.pipeline.batch import BatchSpec, as_arrays, check_labels
from jdecouple.pipeline.engine import EngineDesign, design_engine
from jdecouple.pipeline.mesh import StageMesh, as_stage_mesh, make_mesh
from jdecouple.pipeline.partition import first_blocks
from jdecouple.schedules import Call, Schedule


class SharedParameter(NamedTuple):
    """A parameter that several blocks share.

    Attributes:
        names: of the copies, one a block, among the arrays of a state; the first one's stage makes
            the step.
        stages: of each block.
        staleness: of the gradient of each copy.
    """

    names: tuple[str, ...]
    stages: tuple[int, ...]
    staleness: tuple[Staleness, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Design:
    """A training as shapes and tables; `jdecouple.Trainer` places what one says.

    Attributes:
        method: an objective and a route.
        spec: `spec.example` are the shapes of a global batch, `spec.split(spec.example)` those of
            its microbatches.
        built: the units, with shapes of the carry that each receives and of what it gives.
        boundaries: index of the first block of every stage.
        stages: with their units, heads and optimisers; `jax.eval_shape(stage.initial)` is the state
            of one, but for its queues (`jdecouple.pipeline.state.queue_shapes`).
        engine: which engine runs them ("name"), by which schedule, on which devices.
    """

    method: Method
    spec: BatchSpec
    built: build.BuiltModel
    boundaries: tuple[int, ...]
    stages: tuple[Stage, ...]
    engine: EngineDesign

    @property
    def schedule(self) -> Schedule:
        """The actions of one batch."""
        return self.engine.schedule

    @property
    def calls(self) -> tuple[Call, ...]:
        """The calls of one batch in the order of dispatch."""
        return self.engine.calls

    @property
    def device_groups(self) -> tuple[tuple[Any, ...], ...]:
        """Devices of every stage, one a replica; stages may share them."""
        return self.engine.device_groups

    @property
    def num_classes(self) -> int:
        """Width of the logits."""
        return self.built.num_classes

    def block_costs(self) -> list[float]:
        """Floating-point operations of every block, forward and backward, on one microbatch."""
        return build.unit_costs(self.built.units, self.built.carries, self.method.route)

    def block_outputs(self) -> list[Any]:
        """Shapes of what every block gives for one microbatch."""
        return list(self.built.outputs)

    @property
    def shared(self) -> tuple[SharedParameter, ...]:
        """The parameters that blocks share, each with its copies."""
        stage_of = {unit.index: stage.index for stage in self.stages for unit in stage.units}
        count, route = len(self.stages), self.method.route
        found = []
        for tie in self.built.ties:
            own = tuple(stage_of[block] for block, _ in tie.uses)
            apart = len({*own}) > 1
            staleness = tuple(route.staleness(k, count, shared=apart) for k in own)
            found.append(SharedParameter(tie.names, own, staleness))
        return tuple(found)

    @property
    def crossing(self) -> tuple[str, ...]:
        """Names of the parameters that blocks of different stages share."""
        return tuple(each.names[0] for each in self.shared if len({*each.stages}) > 1)

    def fits(self, schedule: Schedule) -> bool:
        """Whether a schedule of the method trains stages that need one another on one batch."""
        late = schedule.overlapping and self._follows_above
        return not (late or (schedule.sums_late and self.crossing))

    @property
    def _follows_above(self) -> bool:
        return any(stage.follows_above for stage in self.stages)

    def check_steps(self, count: int) -> None:
        """Raises ValueError unless so many batches can be one dispatch."""
        require_int(1, chunk=count)
        alone = self.method.route.local and not (
            self.schedule.sums_late or self.crossing or self._follows_above
        )
        in_one_call = self.engine.fuse or self.engine.name == "spmd" or len(self.stages) == 1
        if count > 1 and not (alone or in_one_call):
            raise ValueError(
                f"a chunk of {count} batches needs a local method by schedule local, or all stages "
                f"fused on the same devices: {self.method.name} has {len(self.stages)} stages "
                "apart, which need one another in every batch"
                + "".join(f" (they share {name})" for name in self.crossing[:1])
            )


def make_design(
    model: Model | Callable[[nnx.Rngs], Model] | build.BuiltModel,
    method: Method,
    optimizer: build.Optimizer,
    *,
    num_stages: int | None = None,
    boundaries: Sequence[int] | str | None = None,
    mesh: StageMesh | jax.sharding.Mesh | None = None,
    microbatches: int = 1,
    schedule: str = "auto",
    example: Mapping[str, Any],
    num_classes: int | None = None,
    seed: int = 0,
    transform: Transform | None = None,
    dtype: Any = None,
    clip_norm: float | None = None,
    accumulate: int = 1,
    ema: float | None = None,
    remat: str | Sequence[str] = "auto",
    fuse: bool | None = None,
    max_in_flight: int | None = None,
    engine: str = "mpmd",
    frozen: Sequence[int] = (),
    gradient_norms: bool = False,
    wire: str | None = None,
    shard_optimizer: bool = False,
) -> Design:
    """The design of a training; its arguments are those of `jdecouple.Trainer`.

    Nothing is placed or compiled. `model` may be a function that makes it from a source of keys: it
    is traced and not run, no array is made, and the variables of the units hold shapes. It may be
    the `built` of another design for the same microbatches and boundaries by number. `mesh` may
    be of `jdecouple.pipeline.mesh.described` devices, which need not be there, and `example` of
    `jax.ShapeDtypeStruct`s. So any net may be designed anywhere:

    >>> import functools
    >>> import jdecouple as jd
    >>> from jdecouple.pipeline.mesh import described
    >>> wide = functools.partial(jd.models.mlp, 10, input_size=1000, hidden=50_000, depth=8)
    >>> found = make_design(
    ...     lambda rngs: wide(rngs=rngs),
    ...     jd.methods.get("fdg"),
    ...     jd.optim.sgd(0.1),
    ...     mesh=make_mesh(8, devices=described(8)),
    ...     example={
    ...         "x": jax.ShapeDtypeStruct((64, 1000), "float32"),
    ...         "label": jax.ShapeDtypeStruct((64,), "int32"),
    ...     },
    ... )
    >>> found.boundaries, found.device_groups[-1]
    ((0, 1, 2, 3, 4, 5, 6, 7), (described device 7,))
    >>> state = jax.eval_shape(found.stages[1].initial)
    >>> sum(leaf.size for leaf in jax.tree.leaves(state["params"]))
    2500050000

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: values that do not fit, or a method that needs what the model lacks.
    """
    require_type(Method, method=method)
    sizes = {"num_stages": num_stages, "num_classes": num_classes}
    require_int(1, **{label: size for label, size in sizes.items() if size is not None})
    if num_stages is None and not isinstance(boundaries, str | None):
        num_stages = len(first_blocks(boundaries))
    stage_mesh = as_stage_mesh(make_mesh(num_stages or 1) if mesh is None else mesh)
    num_stages = num_stages or stage_mesh.shape["stage"]
    arrays = as_arrays(example)
    if num_classes is not None:
        check_labels(arrays["label"], num_classes)
    shapes = build.abstract(arrays)
    spec = BatchSpec(shapes, microbatches, stage_mesh.shape["data"])
    received = spec.split(shapes)[0]
    carry = build.model_input(received, transform)
    whole, built = _units(model, method, carry, num_classes, seed, dtype, frozen)
    check_labels(arrays["label"], built.num_classes)
    starts = build.split_blocks(whole, built, method.route, num_stages, boundaries)
    common: dict[str, Any] = {"seed": seed, "num_microbatches": microbatches}
    common |= {"transform": transform, "accumulate": accumulate, "ema": ema}
    common |= {"wire": wire, "gradient_norms": gradient_norms}
    stages = build.build_stages(
        built, method, starts, received, optimizer, remat, clip_norm, **common
    )
    engines = design_engine(
        engine,
        stages,
        stage_mesh,
        method,
        schedule,
        fuse,
        max_in_flight,
        built.carries,
        shard_optimizer,
    )
    design = Design(method, spec, built, starts, stages, engines)
    if not design.fits(design.schedule):
        raise ValueError(
            f"schedule {design.schedule.name!r} trains stages on different batches: blocks of "
            f"several stages share {design.crossing[0]}, which needs schedule 'local'"
        )
    if stages[0].passes_per_version is not None and design.crossing:
        raise ValueError(
            f"method {method.name} has two versions of the weights in every stage: blocks of "
            f"several stages share {design.crossing[0]}, which needs another method"
        )
    return design


def _units(model: Any, *arguments: Any) -> tuple[Model | None, build.BuiltModel]:
    """The units of a model; abstract ones, without an array, of a function that makes it."""
    if isinstance(model, build.BuiltModel):
        return None, model
    if isinstance(model, Model):
        return model, build.build_units(model, *arguments)
    made: list[tuple[Model, build.BuiltModel]] = []

    def make() -> Any:
        whole = model(same_keys(0))
        built = build.build_units(whole, *arguments)
        made.append((whole, built))
        return [unit.variables() for unit in built.units]

    variables = jax.eval_shape(make)
    ((whole, built),) = made
    pairs = zip(built.units, variables, strict=True)
    units = share_traces([unit.abstract(shapes) for unit, shapes in pairs])
    return whole, built._replace(units=units)


def same_keys(seed: int) -> nnx.Rngs:
    """A source that gives the same key again: counting while JAX traces takes quadratic time."""
    rngs = nnx.Rngs(seed)
    setattr(rngs, "default", _OneKey(seed, tag="default"))  # noqa: B010 - no attribute for types
    return rngs


class _OneKey(nnx.RngStream):
    def __call__(self) -> jax.Array:
        return self.key[...]
