"""The Trainer: a model, a method, an optimiser and a mesh, joined."""

import itertools
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from jdecouple.methods import Method
from jdecouple.methods.routes import Carry, Stage, Synchronous
from jdecouple.methods.routes.stage import Transform
from jdecouple.models import Model
from jdecouple.pipeline.batch import BatchSpec, check_batch, check_counts, check_options, check_type
from jdecouple.pipeline.build import (
    abstract,
    build_stages,
    build_units,
    metric_names,
    model_input,
    split_blocks,
    unit_costs,
)
from jdecouple.pipeline.distributed import gather
from jdecouple.pipeline.engine import make_engine
from jdecouple.pipeline.evaluate import Evaluator
from jdecouple.pipeline.mesh import StageDevices, as_stage_mesh, make_mesh
from jdecouple.pipeline.state import (
    PlacedBatch,
    PlacedChunk,
    State,
    leaf_names,
    modules,
    place,
    queue_shapes,
)
from jdecouple.schedules import Call, Costs, Kind


class Trainer:
    """Trains a model by a method on the stages of a mesh.

    Under `jax.distributed` every process builds the same Trainer and makes the same calls;
    each compiles and runs only the stages that touch its own devices.
    """

    def __init__(
        self,
        model: Model,
        method: Method,
        optimizer: optax.GradientTransformation,
        *,
        num_stages: int | None = None,
        boundaries: Sequence[int] | str | None = None,
        mesh: Any = None,
        microbatches: int = 1,
        schedule: str = "auto",
        example: Mapping[str, Any],
        num_classes: int | None = None,
        seed: int = 0,
        transform: Transform | None = None,
        dtype: Any = None,
        clip_norm: float | None = None,
        remat: bool | Sequence[bool] = False,
        fuse: bool | None = None,
        max_in_flight: int | None = None,
        engine: str = "mpmd",
    ):
        """Places the stages and prepares their functions; compiles at the first step.

        Args:
            model: blocks with their initial weights, and a classifier.
            method: a row of `jdecouple.methods`.
            optimizer: an optax transformation; every block gets a state of its own.
            num_stages: K; by default the number of boundaries, else the mesh's.
            boundaries: block indices at which a stage begins, or the name of one of the
                model's published splits; by default a split that balances the stages'
                floating-point operations.
            mesh: `jdecouple.make_mesh(...)`, or a `jax.sharding.Mesh` with the axes `stage`
                and `data`; by default the first `num_stages` devices.
            microbatches: M; parts that the batch is cut into. Losses and BatchNorm
                statistics are those of the part, gradients the mean over the parts.
            schedule: name of a schedule, or "auto" for the route's own.
            example: a global batch {"x": [batch, ...], "label": [batch]}; read for its
                shapes and dtypes.
            num_classes: by default the width of the model's logits.
            seed: root of the keys of heads, dropout and augmentation.
            transform: `(carry, keys, train) -> carry`, run inside the first stage's
                compiled call; see `jdecouple.data.augment`.
            dtype: compute dtype of blocks and heads, such as `jnp.bfloat16`; parameters,
                statistics and losses keep theirs. None leaves everything as it is.
            clip_norm: bound on the norm of the whole net's gradient (synchronous methods; to
                clip each block of others, put `optax.clip_by_global_norm` in the optimizer).
            remat: whether stages keep their inputs alone and repeat the forward in the
                backward; for all, or one a stage.
            fuse: compile all stages into one call; by default where they share their
                devices.
            max_in_flight: batches, or chunks of them, that may be dispatched and unfinished; by
                default 2K.
            engine: "mpmd" compiles calls for every stage; "spmd" compiles one program for all,
                which needs equal blocks between the first and the last, and a local method or
                `gpipe`; "auto" takes "spmd" where it fits and there are devices for two stages.

        Raises:
            TypeError: an argument of a wrong type.
            ValueError: sizes that do not fit one another, or a method that needs what the
                model lacks.
        """
        check_type("model", model, Model)
        check_type("method", method, Method)
        check_type("optimizer", optimizer, optax.GradientTransformation)
        check_counts(
            num_stages=num_stages,
            microbatches=microbatches,
            num_classes=num_classes,
            max_in_flight=max_in_flight,
        )
        check_options(
            seed=seed,
            dtype=dtype,
            boundaries=boundaries,
            transform=transform,
            clip_norm=clip_norm,
        )
        if num_stages is None and not isinstance(boundaries, str | None):
            num_stages = len(boundaries) + (not boundaries or boundaries[0] != 0)
        grid = as_stage_mesh(make_mesh(num_stages or 1) if mesh is None else mesh)
        if num_stages is None:
            num_stages = grid.shape["stage"]
        check_batch(example, num_classes)
        self.model = model
        self.method = method
        self.microbatches = microbatches
        self._example = abstract(dict(example))
        self._intake = BatchSpec(self._example, microbatches, grid.shape["data"])
        received = self._intake.split(self._example)[0]
        prepared = self._prepared = model_input(received, transform)
        built = build_units(model, method, prepared, num_classes, seed, dtype)
        self.num_classes = built.num_classes
        check_batch(example, self.num_classes)
        if isinstance(boundaries, str):
            boundaries = model.boundaries(boundaries, num_stages)
        route = method.route
        self.boundaries = split_blocks(built.units, route, prepared, num_stages, boundaries)
        if clip_norm is not None and not isinstance(route, Synchronous):
            raise ValueError(
                f"clip_norm needs a synchronous method: given {method.name}, whose stages do not "
                "wait for one another"
            )
        self.stages = build_stages(
            built,
            self.boundaries,
            received,
            [route.optimizer(k, optimizer) for k in range(num_stages)],
            [remat] * num_stages if isinstance(remat, bool) else list(remat),
            seed=seed,
            num_microbatches=microbatches,
            transform=transform,
            clip_norm=clip_norm,
        )
        if schedule != "auto" and schedule not in route.schedules:
            raise ValueError(
                f"schedule {schedule!r} does not fit method {method.name}: "
                f"allowed are auto, {', '.join(route.schedules)}"
            )
        chosen = make_engine(
            engine,
            self.stages,
            grid.rows,
            route,
            schedule=schedule,
            fuse=fuse,
            max_in_flight=max_in_flight,
            carries=built.carries,
        )
        self.engine, self.schedule, self.placements = (
            chosen.name,
            chosen.schedule,
            chosen.placements,
        )
        self._executor, self._chunks = chosen.executor, chosen.chunks
        self._evaluator = Evaluator(
            self.stages,
            self.placements,
            self._example,
            fuse=chosen.fuse,
            max_in_flight=chosen.max_in_flight,
        )

    def block_costs(self) -> list[float]:
        """Floating-point operations of every block, forward and backward, on one microbatch."""
        units = [unit for stage in self.stages for unit in stage.units]
        return unit_costs(tuple(units), self.method.route, self._prepared)

    @property
    def calls(self) -> tuple[Call, ...]:
        """The calls of a step in the order of dispatch; fused into one where `fuse` says so."""
        return self._executor.order

    @property
    def latency(self) -> int:
        """Iterations by which metrics are late: those of step t are of batch t - latency."""
        return self.schedule.latency

    def init(self) -> State:
        """Initial state: the weights of the model's blocks and of the heads, step 0.

        The queues of a delayed method are there from the start, full of zeros that nothing uses.
        """
        stages = []
        for k, (stage, placement) in enumerate(zip(self.stages, self.placements, strict=True)):
            empty = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), self._waiting(k))
            stages.append(
                place(self.stages[k], self.placements[k], {**stage.initial(), **empty})
                if placement.addressable
                else None
            )
        return State(0, self._executor.load(stages))

    def abstract(self, *, addressable: bool = False) -> State:
        """Shapes and dtypes of the state, without allocating it: of all stages, or of this process.

        Args:
            addressable: leave out the stages of other processes, as `init` does.
        """
        shapes = [
            {**jax.eval_shape(stage.initial), **self._waiting(k)}
            if self.placements[k].addressable or not addressable
            else None
            for k, stage in enumerate(self.stages)
        ]
        return State(0, tuple(shapes))

    def to_arrays(self, state: State) -> dict[str, Any]:
        """The state's arrays by names that do not depend on the partition.

        Args:
            state: a state; its own arrays are returned, not copies.

        Returns:
            "block_{i}/params/...", "block_{i}/stats/...", "block_{i}/opt/..." to array, for the
            blocks of this process; what a checkpoint holds.
        """
        return {
            name: leaf
            for stage, values in zip(self.stages, state.stages, strict=True)
            if values is not None
            for name, leaf in zip(leaf_names(stage, values), jax.tree.leaves(values), strict=True)
        }

    def from_arrays(self, step: int, arrays: Mapping[str, Any]) -> State:
        """The state that `arrays` was read from, placed on this trainer's devices.

        Args:
            step: batches trained so far.
            arrays: by the names of `arrays`, from a trainer of any partition; those of the stages
                of this process are enough.
        """

        def read(stage: Stage, placement: StageDevices, shapes: Any) -> Any:
            leaves = [arrays[name] for name in leaf_names(stage, shapes)]
            return place(stage, placement, jax.tree.unflatten(jax.tree.structure(shapes), leaves))

        shapes = self.abstract(addressable=True).stages
        each = zip(self.stages, self.placements, shapes, strict=True)
        stages = [known and read(stage, placement, known) for stage, placement, known in each]
        return State(step, self._executor.load(stages))

    def local_indices(self, size: int, parts: int = 1) -> np.ndarray:
        """Examples of a global batch that the devices of this process take in.

        Args:
            size: examples in the batch.
            parts: microbatches that it is cut into.

        Returns:
            Their positions, rising; none without the first stage.
        """
        own = self.placements[0].local_indices(size // parts)
        return np.concatenate([part * (size // parts) + own for part in range(parts)])

    def put(self, batch: Mapping[str, Any]) -> PlacedBatch:
        """Uploads a global batch to the first stage, so that a later step need not.

        Args:
            batch: host (NumPy) or device arrays; under several processes each passes the
                same global batch, and only what the process's own devices need is uploaded.

        Raises:
            TypeError: not a mapping with integer labels.
            ValueError: other shapes or dtypes than the example's, labels out of range, or numbers
                that are not finite.
        """
        return PlacedBatch(self._executor.put(self._checked(batch)))

    def put_chunk(self, batches: Sequence[Mapping[str, Any] | PlacedBatch]) -> PlacedChunk:
        """Uploads consecutive global batches to the first stage, stacked on the host, at once.

        Args:
            batches: T of what `put` takes or has returned.

        Raises:
            TypeError: not a sequence, or as `put`.
            ValueError: no batches, more than `check_chunk` allows, or as `put`.
        """
        if isinstance(batches, Mapping) or not isinstance(batches, Sequence):
            raise TypeError(f"batches is a {type(batches).__name__}: a list of batches is needed")
        if not batches:
            raise ValueError("batches is empty: at least one batch is needed")
        self.check_chunk(len(batches))
        if len(batches) == 1:
            (batch,) = batches
            return PlacedChunk(
                (batch if isinstance(batch, PlacedBatch) else self.put(batch)).parts, 1
            )
        parts = [
            batch.parts
            if isinstance(batch, PlacedBatch)
            else self._intake.checked(batch, self.num_classes)
            for batch in batches
        ]
        return PlacedChunk(self._chunks.stack(parts), len(batches))

    def check_chunk(self, count: int) -> None:
        """Checks that `steps` can take so many batches.

        Raises:
            ValueError: fewer than 1, or more than 1 where a stage needs its neighbours in every
                batch and is not fused with them.
        """
        check_counts(chunk=count)
        if count > 1 and not self._chunks.possible:
            raise ValueError(
                f"a chunk of {count} batches needs a local method, or all stages fused on the same "
                f"devices: {self.method.name} has {len(self.stages)} stages apart, which need "
                "one another in every batch"
            )

    def step(
        self, state: State, batch: Mapping[str, Any] | PlacedBatch
    ) -> tuple[State, dict[str, jax.Array]]:
        """Trains on one global batch; returns as soon as all calls are dispatched.

        Args:
            state: current state; donated.
            batch: {"x": [batch, ...], "label": [batch]} on the host, or what `put` returned.

        Returns:
            The new state, and metrics as futures: "loss" (sum over the blocks), "accuracy"
            (of the last exit) and per block "block_{i}/loss", its terms and
            "block_{i}/accuracy". Under several processes they cover the process's stages.
        """
        placed = batch if isinstance(batch, PlacedBatch) else self.put(batch)
        stages, found = self._executor.run(state.stages, placed.parts, state.step)
        metrics: dict[str, Any] = {}
        for each in found:
            metrics |= each or {}
        return State(state.step + 1, stages), metrics

    def steps(
        self, state: State, batches: Sequence[Mapping[str, Any] | PlacedBatch] | PlacedChunk
    ) -> tuple[State, list[dict[str, Any]]]:
        """Trains on T batches as T calls of `step` would, with the dispatches of one.

        Every stage scans its batches in one compiled call (all stages together, with engine
        "spmd"), which is compiled anew for another T.

        Args:
            state: current state; donated.
            batches: T of what `step` takes, or what `put_chunk` returned.

        Returns:
            The new state, and for every batch the metrics of `step`.

        Raises:
            TypeError, ValueError: what `put_chunk` refuses.
        """
        chunk = batches if isinstance(batches, PlacedChunk) else self.put_chunk(batches)
        if chunk.count == 1:
            state, metrics = self.step(state, PlacedBatch(chunk.parts))
            return state, [metrics]
        state, found = self._run(state, chunk, apart=True)
        each_batch: list[dict[str, jax.Array]] = [{} for _ in range(chunk.count)]
        for stage in found:
            for metrics, more in zip(each_batch, stage or (), strict=bool(stage)):
                metrics |= more
        return state, each_batch

    def run_chunk(self, state: State, chunk: PlacedChunk) -> tuple[State, dict[str, jax.Array]]:
        """As `steps`, with metrics that cost less to dispatch and to bring to the host.

        Args:
            state: current state; donated.
            chunk: what `put_chunk` returned.

        Returns:
            The new state, and the metrics of `step` as arrays [T]; as scalars where T is 1.
        """
        if chunk.count == 1:
            return self.step(state, PlacedBatch(chunk.parts))
        state, found = self._run(state, chunk, apart=False)
        stacked: dict[str, jax.Array] = {}
        for each in found:
            stacked |= each or {}
        return state, stacked

    def measure(
        self, state: State, batch: Mapping[str, Any] | PlacedBatch
    ) -> tuple[State, list[tuple[Call, float]]]:
        """Trains on one global batch like `step`, waiting for every compiled call on its own.

        Args:
            state: current state; donated.
            batch: as for `step`.

        Returns:
            The new state, and `calls`, each with its seconds.

        Raises:
            ValueError: the stages are fused (`fuse=False` keeps them apart), or some are in other
                processes.
        """
        if not all(placement.fully_addressable for placement in self.placements):
            raise ValueError("measuring needs all stages in one process")
        placed = batch if isinstance(batch, PlacedBatch) else self.put(batch)
        stages, found = self._executor.measure(state.stages, placed.parts, state.step)
        return State(state.step + 1, stages), found

    def measured_costs(
        self,
        state: State,
        batches: Iterable[Mapping[str, Any] | PlacedBatch],
        repeats: int = 10,
    ) -> tuple[State, Costs]:
        """Trains on some batches, and takes the median time of every compiled call.

        The calls run one after another, so none disturbs another. One batch more than `repeats` is
        trained on: the first compiles, and does not count.

        Args:
            state: current state; donated.
            batches: batches as for `step`; begun again when they end.
            repeats: batches that count, at least 1.

        Returns:
            The state after the batches, and costs with the seconds of every call of the schedule
            and the bytes of its carries. The link is free: `dataclasses.replace` gives the costs a
            bandwidth and a latency.

        Raises:
            ValueError: fewer than 1 repeat, no batches, or a trainer that `measure` refuses.
        """
        check_counts(repeats=repeats)
        seconds: defaultdict[tuple[int, tuple[Kind, ...]], list[float]] = defaultdict(list)
        trained = -1
        for trained, batch in enumerate(itertools.islice(itertools.cycle(batches), repeats + 1)):
            state, timed_calls = self.measure(state, batch)
            for call, time in timed_calls if trained else ():
                seconds[call.stage, call.kinds].append(time)
        if trained < 0:
            raise ValueError("batches is empty: at least one batch is needed")
        carries = [stage.carry for stage in self.stages[1:]]
        return state, Costs(
            calls={key: statistics.median(times) for key, times in seconds.items()},
            message_bytes=[_num_bytes(carry) for carry in carries],
            error_bytes=[_num_bytes(carry["x"]) for carry in carries],
        )

    def finish(self, state: State) -> State:
        """Applies what a delayed method still has queued; other methods have nothing.

        The stages go on without new batches until every batch has trained every stage. A step
        after it fills them again from empty. Gradients that `accumulate` has not yet completed to
        a step stay in the optimiser's state.

        Args:
            state: current state; donated.

        Returns:
            The state with empty queues, at the same step.
        """
        if not self.schedule.overlapping:
            return state
        stages = state.stages
        nothing = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), self._example)
        parts = self._executor.put(self._intake.split(nothing))
        for late in range(self.schedule.depth):
            stages, _ = self._executor.run(stages, parts, state.step + late, end=state.step)
        since = np.int32(state.step)
        return State(
            state.step,
            tuple(
                values and {**values, **place(self.stages[k], self.placements[k], {"since": since})}
                for k, values in enumerate(stages)
            ),
        )

    def wait(self, state: State) -> None:
        """Blocks until everything that was dispatched has run."""
        self._executor.wait(state.stages)

    def evaluate(
        self, state: State, data: Iterable[Mapping[str, Any]] | Mapping[str, Any]
    ) -> dict[str, float]:
        """Evaluates every exit; batches of any size, each example counted once.

        Args:
            state: state; not changed.
            data: batches, or one batch.

        Returns:
            "loss" (mean cross-entropy) and "accuracy" of the final exit, and
            "exit_{i}/loss", "exit_{i}/accuracy" of the exit at block i. Under several
            processes all call it and all get the whole.

        Raises:
            ValueError: no examples, or a batch that `put` would refuse for another reason than
                its size.
        """
        return self._evaluator(state.stages, data, self.num_classes)

    def gather_metrics(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Metrics of all processes as floats; every process calls it."""
        values = {name: float(value) for name, value in metrics.items()}
        blocks = gather(values, self._metric_names)
        losses = [value for name, value in blocks.items() if name.endswith("/loss")]
        exits = [value for name, value in blocks.items() if name.endswith("/accuracy")]
        return {"loss": sum(losses), **({"accuracy": exits[-1]} if exits else {}), **blocks}

    def modules(self, state: State) -> list[nnx.Module | None]:
        """Trained nnx modules: one per block, then the classifier if the model has one.

        A classifier that the method does not train is returned as it was given; blocks of
        other processes are None.
        """
        pairs = modules(self.stages, state)
        blocks = [block for block, _ in pairs]
        if self.model.classifier is None:
            return blocks
        trained = self.method.objective.trains_classifier
        head = pairs[-1][1]
        return [*blocks, getattr(head, "classifier", None) if trained else self.model.classifier]

    def heads(self, state: State) -> list[nnx.Module | None]:
        """Trained heads, one per block; None where a block has none."""
        return [head for _, head in modules(self.stages, state)]

    @cached_property
    def _metric_names(self) -> tuple[str, ...]:
        return metric_names(self.stages, self.method.route)

    def _waiting(self, index: int) -> Any:
        return queue_shapes(self.schedule, self.method.route, self.stages, index)

    def _run(self, state: State, chunk: PlacedChunk, apart: bool) -> tuple[State, tuple]:
        stages, found = self._chunks.run(state.stages, chunk.parts, state.step, chunk.count, apart)
        return State(state.step + chunk.count, stages), found

    def _checked(self, batch: Mapping[str, Any]) -> list[Carry]:
        return self._intake.checked(batch, self.num_classes)


def _num_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
