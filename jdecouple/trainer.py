"""The Trainer: a model, a method, an optimiser and a mesh, joined."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jdecouple import schedules
from jdecouple._checks import check_batch, check_counts, check_like, check_options, check_type
from jdecouple.assembly import (
    abstract,
    build_stages,
    build_units,
    metric_names,
    model_input,
    split_blocks,
    unit_costs,
)
from jdecouple.evaluation import Evaluator
from jdecouple.methods import Method
from jdecouple.models import Model
from jdecouple.pipeline import (
    Chunks,
    Executor,
    Seat,
    SpmdChunks,
    SpmdExecutor,
    as_stage_mesh,
    gather,
    make_mesh,
    spmd,
    spread,
    waiting,
)
from jdecouple.routes import Message, Stage, Synchronous
from jdecouple.routes.stage import Transform
from jdecouple.schedules import Call
from jdecouple.state import PlacedBatch, PlacedChunk, State, leaf_names, place


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
            transform: `(message, keys, train) -> message`, run inside the first stage's
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
        self._replicas = grid.shape["data"]
        self._example = abstract(dict(example))
        received = self._split(self._example)[0]
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
        layout = spmd.fitting(
            engine,
            self.stages,
            tuple(map(Seat.on, spread(grid.rows, num_stages))),
            route,
            schedule=schedule,
            fuse=fuse,
            messages=built.messages,
        )
        self.engine = "mpmd" if layout is None else "spmd"
        if layout is not None:
            schedule = spmd.schedule_of(route)
        self.schedule = schedules.build(
            route.schedules[0] if schedule == "auto" else schedule, num_stages, microbatches
        )
        devices = spread(grid.rows, self.schedule.num_rows)
        self.seats = tuple(Seat.on(devices[self.schedule.row(k)]) for k in range(num_stages))
        together = all(seat.devices == self.seats[0].devices for seat in self.seats)
        if fuse and not together:
            raise ValueError("fuse=True needs all stages on the same devices")
        fuse = together if fuse is None else fuse
        max_in_flight = max_in_flight or 2 * num_stages
        self._executor: Any
        self._chunks: Any
        if layout is not None:
            self._executor = SpmdExecutor(layout, route, self.schedule, max_in_flight)
            self._chunks = SpmdChunks(self._executor)
        else:
            self._executor = Executor(
                stages=self.stages,
                seats=self.seats,
                route=route,
                schedule=self.schedule,
                fuse=fuse,
                max_in_flight=max_in_flight,
            )
            self._chunks = Chunks(self._executor)
        self._evaluator = Evaluator(
            self.stages, self.seats, self._example, fuse=fuse, max_in_flight=max_in_flight
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
        for k, (stage, seat) in enumerate(zip(self.stages, self.seats, strict=True)):
            empty = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), self._waiting(k))
            stages.append(
                place(self.stages[k], self.seats[k], {**stage.initial(), **empty})
                if seat.mine
                else None
            )
        return State(0, self._executor.load(stages))

    def abstract(self, *, mine: bool = False) -> State:
        """Shapes and dtypes of the state, without allocating it: of all stages, or of this process.

        Args:
            mine: leave out the stages of other processes, as `init` does.
        """
        shapes = [
            {**jax.eval_shape(stage.initial), **self._waiting(k)}
            if self.seats[k].mine or not mine
            else None
            for k, stage in enumerate(self.stages)
        ]
        return State(0, tuple(shapes))

    def arrays(self, state: State) -> dict[str, Any]:
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

    def with_arrays(self, step: int, arrays: Mapping[str, Any]) -> State:
        """The state that `arrays` was read from, placed on this trainer's devices.

        Args:
            step: batches trained so far.
            arrays: by the names of `arrays`, from a trainer of any partition; those of the stages
                of this process are enough.
        """

        def read(stage: Stage, seat: Seat, shapes: Any) -> Any:
            leaves = [arrays[name] for name in leaf_names(stage, shapes)]
            return place(stage, seat, jax.tree.unflatten(jax.tree.structure(shapes), leaves))

        shapes = self.abstract(mine=True).stages
        each = zip(self.stages, self.seats, shapes, strict=True)
        stages = [known and read(stage, seat, known) for stage, seat, known in each]
        return State(step, self._executor.load(stages))

    def share(self, size: int, parts: int = 1) -> np.ndarray:
        """Examples of a global batch that the devices of this process take in.

        Args:
            size: examples in the batch.
            parts: microbatches that it is cut into.

        Returns:
            Their positions, rising; none without the first stage.
        """
        own = self.seats[0].share(size // parts)
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
            batch.parts if isinstance(batch, PlacedBatch) else self._checked(batch)
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
        if not all(seat.whole for seat in self.seats):
            raise ValueError("measuring needs all stages in one process")
        placed = batch if isinstance(batch, PlacedBatch) else self.put(batch)
        stages, found = self._executor.measure(state.stages, placed.parts, state.step)
        return State(state.step + 1, stages), found

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
        parts = self._executor.put(self._split(nothing))
        for late in range(self.schedule.depth):
            stages, _ = self._executor.run(stages, parts, state.step + late, end=state.step)
        since = np.int32(state.step)
        return State(
            state.step,
            tuple(
                values and {**values, **place(self.stages[k], self.seats[k], {"since": since})}
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
        pairs = self._pairs(state)
        blocks = [block for block, _ in pairs]
        if self.model.classifier is None:
            return blocks
        trained = self.method.objective.trains_classifier
        head = pairs[-1][1]
        return [*blocks, getattr(head, "classifier", None) if trained else self.model.classifier]

    def heads(self, state: State) -> list[nnx.Module | None]:
        """Trained heads, one per block; None where a block has none."""
        return [head for _, head in self._pairs(state)]

    @cached_property
    def _metric_names(self) -> tuple[str, ...]:
        return metric_names(self.stages, self.method.route)

    def _waiting(self, index: int) -> Any:
        return waiting.shapes(self.schedule, self.method.route, self.stages, index)

    def _pairs(self, state: State) -> list[tuple[nnx.Module | None, nnx.Module | None]]:
        pairs: list[tuple[nnx.Module | None, nnx.Module | None]] = []
        for stage, values in zip(self.stages, state.stages, strict=True):
            for number, unit in enumerate(stage.units):
                if values is None:
                    pairs.append((None, None))
                    continue
                # Copies, because the next step donates the state's own buffers; bound to no
                # device, because a caller applies blocks of several stages to one input.
                own = values["params"][number], values["stats"][number]
                copy = jax.tree.map(lambda leaf: jnp.asarray(np.array(leaf)), own)
                pairs.append(unit.modules(*copy))
        return pairs

    def _run(self, state: State, chunk: PlacedChunk, apart: bool) -> tuple[State, tuple]:
        stages, found = self._chunks.run(state.stages, chunk.parts, state.step, chunk.count, apart)
        return State(state.step + chunk.count, stages), found

    def _checked(self, batch: Mapping[str, Any]) -> list[Message]:
        """The microbatches of a batch that is like the example."""
        check_batch(batch, self.num_classes)
        check_like(batch, self._example, any_size=False)
        return self._split(batch)

    def _split(self, batch: Mapping[str, Any]) -> list[Message]:
        """Cuts a batch (of arrays or of shapes) into microbatches."""
        count = batch["label"].shape[0]
        parts = self.microbatches
        if count % (parts * self._replicas):
            raise ValueError(
                f"a batch of {count} does not divide into {parts} microbatch(es) on "
                f"{self._replicas} replica(s)"
            )
        size = count // parts

        def cut(leaf: Any, part: int) -> Any:
            if isinstance(leaf, jax.ShapeDtypeStruct):
                return jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype)
            return leaf if parts == 1 else leaf[part * size : (part + 1) * size]

        return [
            jax.tree.map(lambda leaf, part=part: cut(leaf, part), dict(batch))
            for part in range(parts)
        ]
