"""The Trainer: a model, a method, an optimiser and a mesh, joined."""

import itertools
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from jdecouple.methods import Method
from jdecouple.methods.routes import Metrics
from jdecouple.methods.routes.stage import Transform
from jdecouple.models import Model
from jdecouple.pipeline.batch import (
    BatchSpec,
    PlacedBatch,
    check_batch,
    check_count,
    check_labels,
    check_type,
)
from jdecouple.pipeline.build import (
    abstract,
    build_stages,
    build_units,
    model_input,
    split_blocks,
    unit_costs,
)
from jdecouple.pipeline.distributed import gather
from jdecouple.pipeline.engine import make_engine
from jdecouple.pipeline.evaluate import Evaluator
from jdecouple.pipeline.evaluate_descending import DescendingEvaluator
from jdecouple.pipeline.mesh import StageMesh, as_stage_mesh, make_mesh
from jdecouple.pipeline.partition import first_blocks
from jdecouple.pipeline.state import State, leaf_names, metric_names, modules, place, queue_shapes
from jdecouple.schedules import Call, Costs, Kind

Batch = Mapping[str, Any]


class Trainer:
    """Trains a model by a method on the stages of a mesh.

    Under `jax.distributed` every process builds the same Trainer and makes the same calls;
    each compiles and runs only the stages that touch its own devices.

    Attributes:
        boundaries: index of the first block of every stage.
        num_classes: width of the logits.
        stages: all stages, with their blocks and heads.
        engine: "mpmd" or "spmd".
        schedule: the actions of one batch.
        placements: devices of every stage.
        calls: the calls of a step in the order of dispatch; fused into one where `fuse` says so.
        latency: iterations by which metrics are late: those of step t are of batch t - latency.

    >>> import jdecouple as jd
    >>> model = jd.models.mlp(2, input_size=4, hidden=8, depth=2, rngs=nnx.Rngs(0))
    >>> x = np.linspace(-1, 1, 32, dtype=np.float32).reshape(8, 4)
    >>> batch = {"x": x, "label": (x[:, 0] > 0).astype(np.int32)}
    >>> trainer = Trainer(
    ...     model, jd.methods.get("scpl"), jd.optim.sgd(0.1), num_stages=2, example=batch
    ... )
    >>> state = trainer.init()
    >>> for _ in range(20):
    ...     state, metrics = trainer.step(state, batch)
    >>> state.step, sorted(metrics)[:3]
    (20, ['accuracy', 'block_0/loss', 'block_1/accuracy'])
    >>> trainer.evaluate(state, batch)["accuracy"]
    1.0
    """

    def __init__(
        self,
        model: Model,
        method: Method,
        optimizer: optax.GradientTransformation,
        *,
        num_stages: int | None = None,
        boundaries: Sequence[int] | str | None = None,
        mesh: StageMesh | Mesh | None = None,
        microbatches: int = 1,
        schedule: str = "auto",
        example: Batch,
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
            boundaries: block indices at which a stage begins, or the name of one of the model's
                published splits; by default a split that balances floating-point operations.
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
            clip_norm: bound on the norm of the gradient of all blocks (synchronous methods; to
                clip each block of others, put `optax.clip_by_global_norm` in the optimizer).
            remat: whether stages keep their inputs alone and repeat the forward in the
                backward; for all, or one a stage.
            fuse: compile all stages into one call; by default where they share their devices.
            max_in_flight: batches, or lists of them, that may be dispatched and unfinished; by
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
        check_count("num_stages", num_stages)
        if num_stages is None and not isinstance(boundaries, str | None):
            num_stages = len(first_blocks(boundaries))
        grid = as_stage_mesh(make_mesh(num_stages or 1) if mesh is None else mesh)
        num_stages = num_stages or grid.shape["stage"]
        check_batch(example, num_classes)
        self._example = abstract(dict(example))
        self._spec = BatchSpec(self._example, microbatches, grid.shape["data"])
        received = self._spec.split(self._example)[0]
        built = build_units(
            model, method, model_input(received, transform), num_classes, seed, dtype
        )
        if num_classes is None:
            check_labels(example["label"], built.num_classes)
        self.model, self.method, self.microbatches = model, method, microbatches
        self.num_classes = built.num_classes
        self.boundaries = split_blocks(model, built, method.route, num_stages, boundaries)
        self.stages = build_stages(
            built,
            method,
            self.boundaries,
            received,
            optimizer,
            remat=remat,
            clip_norm=clip_norm,
            seed=seed,
            num_microbatches=microbatches,
            transform=transform,
        )
        self._built = built
        self._engine = make_engine(
            engine,
            self.stages,
            grid,
            method,
            schedule=schedule,
            fuse=fuse,
            max_in_flight=max_in_flight,
            carries=built.carries,
        )
        self.engine = self._engine.name
        self.schedule = self._engine.schedule
        self.placements = self._engine.placements
        self.calls = self._engine.calls
        self.latency = self.schedule.latency
        evaluator = DescendingEvaluator if built.units[-1].descends else Evaluator
        self._evaluate = evaluator(
            self.stages,
            self.placements,
            self._example,
            fuse=self._engine.fuse,
            max_in_flight=self._engine.max_in_flight,
        )

    # --- State ------------------------------------------------------------------------------------

    def init(self) -> State:
        """Initial state: the weights of the model's blocks and of the heads, step 0.

        The queues of a delayed method are there from the start, full of zeros that nothing uses.
        """

        def initial(k: int) -> Any:
            return {**self.stages[k].initial(), **_zeros(self._queue_shapes(k))}

        return self._load(0, initial)

    def abstract(self, *, addressable: bool = False) -> State:
        """Shapes and dtypes of the state, without allocating it: of all stages, or of this process.

        Args:
            addressable: leave out the stages of other processes, as `init` does.
        """
        shapes = [
            self._shapes(k) if self.placements[k].addressable or not addressable else None
            for k in range(len(self.stages))
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
            arrays: by the names of `to_arrays`, from a trainer of any partition; those of the
                stages of this process are enough.
        """

        def read(k: int) -> Any:
            shapes = self._shapes(k)
            leaves = [arrays[name] for name in leaf_names(self.stages[k], shapes)]
            return jax.tree.unflatten(jax.tree.structure(shapes), leaves)

        return self._load(step, read)

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

    # --- Batches ----------------------------------------------------------------------------------

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

    def put(self, batch: Batch | Sequence[Batch | PlacedBatch]) -> PlacedBatch:
        """Uploads a global batch for `step`, or a list of T for `steps`, to the first stage.

        Args:
            batch: host (NumPy) or device arrays. Under several processes each passes the same
                global batch, and only what the process's own devices need is uploaded. Those of a
                list are stacked on the host and uploaded at once.

        Raises:
            TypeError: not a mapping with integer labels.
            ValueError: other shapes or dtypes than the example's, labels out of range, or numbers
                that are not finite; a list that is empty or that `check_steps` refuses.
        """
        if isinstance(batch, Mapping) or not isinstance(batch, Sequence):
            return self._engine.put([self._spec.checked(batch, self.num_classes)])
        if not batch:
            raise ValueError("batches is empty: at least one batch is needed")
        self.check_steps(len(batch))
        parts = [
            self._one(item)
            if isinstance(item, PlacedBatch)
            else self._spec.checked(item, self.num_classes)
            for item in batch
        ]
        return self._engine.put(parts, len(batch))

    def check_steps(self, count: int) -> None:
        """Checks that `steps` can take so many batches.

        Raises:
            ValueError: fewer than 1, or more than 1 where a stage needs its neighbours in every
                batch and is not fused with them.
        """
        check_count("chunk", count)
        if count > 1 and not self._engine.multi_step:
            raise ValueError(
                f"a chunk of {count} batches needs a local method, or all stages fused on the same "
                f"devices: {self.method.name} has {len(self.stages)} stages apart, which need "
                "one another in every batch"
            )

    # --- Training ---------------------------------------------------------------------------------

    def step(self, state: State, batch: Batch | PlacedBatch) -> tuple[State, Metrics]:
        """Trains on one global batch; returns as soon as all calls are dispatched.

        Args:
            state: current state; donated.
            batch: {"x": [batch, ...], "label": [batch]} on the host, or what `put` returned.

        Returns:
            The new state, and metrics as futures: "loss" (sum over the blocks), "accuracy"
            (of the last exit) and per block "block_{i}/loss", its terms and
            "block_{i}/accuracy". Under several processes they cover the process's stages.
        """
        stages, metrics = self._engine.run(state.stages, self._one(batch), state.step)
        return State(state.step + 1, stages), metrics

    def steps(
        self, state: State, batches: Sequence[Batch | PlacedBatch] | PlacedBatch
    ) -> tuple[State, Metrics]:
        """Trains on T batches as T calls of `step` would, with the dispatches of one.

        Every stage scans its batches in one compiled call (all stages together, with engine
        "spmd"), which is compiled anew for another T.

        Args:
            state: current state; donated.
            batches: T of what `step` takes, or what `put` returned for them.

        Returns:
            The new state, and the metrics of `step` as arrays [T].

        Raises:
            TypeError, ValueError: what `put` refuses.
        """
        if not isinstance(batches, PlacedBatch):
            if isinstance(batches, Mapping) or not isinstance(batches, Sequence):
                kind = type(batches).__name__
                raise TypeError(f"batches is a {kind}: a list of batches is needed")
            batches = self.put(batches)
        if batches.count is None:
            raise ValueError("batches is one batch: what `put` returns for a list is needed")
        stages, metrics = self._engine.run(state.stages, batches, state.step)
        return State(state.step + batches.count, stages), metrics

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
        stages: Any = state.stages
        nothing = self._engine.put([self._spec.split(_zeros(self._example))])
        for late in range(self.schedule.depth):
            stages, _ = self._engine.run(stages, nothing, state.step + late, state.step)
        since = {"since": np.int32(state.step)}
        stages = tuple(
            values and {**values, **place(self.stages[k], self.placements[k], since)}
            for k, values in enumerate(stages)
        )
        return State(state.step, stages)

    def wait(self, state: State) -> None:
        """Blocks until everything that was dispatched has run."""
        self._engine.wait(state.stages)

    # --- Evaluation and measurements --------------------------------------------------------------

    def evaluate(self, state: State, data: Iterable[Batch] | Batch) -> dict[str, float]:
        """Evaluates every exit; batches of any size, each example counted once.

        Args:
            state: state; not changed.
            data: batches, or one batch.

        Returns:
            "loss" (mean cross-entropy) and "accuracy" of the final exit, and
            "exit_{i}/loss", "exit_{i}/accuracy" of the exit at block i. Under several
            processes all call it and all get all of them.

        Raises:
            ValueError: no examples, or a batch that `put` would refuse for another reason than
                its size.
        """
        return self._evaluate(state.stages, data, self.num_classes)

    def gather_metrics(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Metrics of `step` of all processes as floats; every process calls it."""
        names = [name for stage in self.stages for name in metric_names(stage, self.method.route)]
        values = {name: float(value) for name, value in metrics.items()}
        blocks = gather(values, [name for name in names if name.startswith("block_")])
        losses = [value for name, value in blocks.items() if name.endswith("/loss")]
        exits = [value for name, value in blocks.items() if name.endswith("/accuracy")]
        return {"loss": sum(losses), **({"accuracy": exits[-1]} if exits else {}), **blocks}

    def block_costs(self) -> list[float]:
        """Floating-point operations of every block, forward and backward, on one microbatch."""
        return unit_costs(self._built.units, self._built.carries, self.method.route)

    def measure(
        self, state: State, batch: Batch | PlacedBatch
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
        stages, seconds = self._engine.measure(state.stages, self._one(batch), state.step)
        return State(state.step + 1, stages), seconds

    def measured_costs(
        self, state: State, batches: Iterable[Batch | PlacedBatch], repeats: int = 10
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
        check_count("repeats", repeats)
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

    # --- Helpers ----------------------------------------------------------------------------------

    def _one(self, batch: Batch | PlacedBatch) -> PlacedBatch:
        """A single batch on the devices."""
        if not isinstance(batch, PlacedBatch):
            return self._engine.put([self._spec.checked(batch, self.num_classes)])
        if batch.count is not None:
            raise ValueError(f"batch holds a list of {batch.count}: a single batch is needed")
        return batch

    def _load(self, step: int, values: Any) -> State:
        """The state of which `values(k)` gives this process's stages, placed."""
        stages = (
            values(k) if placement.addressable else None
            for k, placement in enumerate(self.placements)
        )
        return State(step, self._engine.load(stages))

    def _queue_shapes(self, k: int) -> Any:
        return queue_shapes(self.schedule, self.method.route, self.stages, k)

    def _shapes(self, k: int) -> Any:
        return {**jax.eval_shape(self.stages[k].initial), **self._queue_shapes(k)}


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def _num_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
