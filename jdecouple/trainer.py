"""The Trainer: a model, a method, an optimiser and a mesh, joined."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from jdecouple._errors import require_int, require_type
from jdecouple.methods import Method
from jdecouple.methods.routes.stage import Transform
from jdecouple.models import Model
from jdecouple.pipeline import state as states
from jdecouple.pipeline.batch import PlacedBatch
from jdecouple.pipeline.design import make_design
from jdecouple.pipeline.diagnostics import measured_costs
from jdecouple.pipeline.distributed import gather_metrics
from jdecouple.pipeline.engine import make_engine
from jdecouple.pipeline.evaluate import Evaluator
from jdecouple.pipeline.intake import Intake
from jdecouple.pipeline.mesh import StageMesh
from jdecouple.pipeline.optimizing import Optimizer
from jdecouple.pipeline.predict import Predictor
from jdecouple.pipeline.state import State
from jdecouple.pipeline.step_metrics import StepMetrics
from jdecouple.schedules import Call, Costs

Batch = Mapping[str, Any]


class Trainer:
    """Trains a model by a method on the stages of a mesh.

    Under `jax.distributed` every process builds the same Trainer and makes the same calls;
    each compiles and runs only the stages that touch its own devices.

    Attributes:
        boundaries: index of the first block of every stage.
        stages: all stages, with their blocks and heads; `placements` are their devices.
        options: its arguments but for the model, with the shapes of the example.
        design: what it is as shapes and tables alone; `shared` are parameters that blocks share.
        schedule: the actions of one batch; `calls` are its calls in the order of dispatch.
        latency: iterations by which metrics are late: those of step t are of batch t - latency.
        waits: whether something of a batch waits in the stages for the next one.
        predictor: the evaluation forward of all stages.

    >>> import jdecouple as jd
    >>> model = jd.models.mlp(2, input_size=4, hidden=8, depth=2, rngs=nnx.Rngs(0))
    >>> x = np.linspace(-1, 1, 32, dtype=np.float32).reshape(8, 4)
    >>> batch = {"x": x, "label": (x[:, 0] > 0).astype(np.int32)}
    >>> method, optimizer = jd.methods.get("greedy_exit"), jd.optim.sgd(0.5)
    >>> trainer = Trainer(model, method, optimizer, num_stages=2, example=batch)
    >>> state = trainer.init()
    >>> for _ in range(20):
    ...     state, metrics = trainer.step(state, batch)
    >>> sorted(metrics)[-2:]
    ['block_1/loss', 'loss']
    >>> state, metrics = trainer.steps(state, [batch] * 3)
    >>> state.step, metrics["loss"].shape
    (23, (3,))
    >>> trainer.evaluate(state, batch)["accuracy"], trainer.predict(state, {"x": x}).shape
    (1.0, (2, 8, 2))
    """

    def __init__(
        self,
        model: Model,
        method: Method,
        optimizer: Optimizer,
        *,
        num_stages: int | None = None,
        boundaries: Sequence[int] | str | None = None,
        mesh: StageMesh | jax.sharding.Mesh | None = None,
        microbatches: int = 1,
        schedule: str = "auto",
        example: Batch,
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
    ):
        """Places the stages and prepares their functions; compiles at the first step.

        Args:
            model: blocks with their initial weights, and a classifier.
            method: what `jdecouple.methods.get` returns.
            optimizer: an optax transformation that needs nothing but gradients and weights, or what
                makes one for a stage's `delay` (`jd.optim.corrected`); every block has a state.
            num_stages: K; by default the number of boundaries, else the mesh's.
            boundaries: blocks at which stages begin, or the name of one of the model's published
                splits; by default a split that balances the operations.
            mesh: what `jdecouple.make_mesh` returns, or a `jax.sharding.Mesh` with the axes `stage`
                and `data`; by default the first `num_stages` devices.
            microbatches: M, parts that a batch is cut into. Losses and BatchNorm statistics are
                those of a part, gradients the mean over the parts.
            schedule: name of a schedule, or "auto" for the route's own.
            example: a global batch {"x": [batch, ...], "label": [batch]} of the shapes to come;
                labels of positions are [batch, length], -1 where there is none.
            num_classes: by default the width of the model's logits.
            seed: root of the keys of heads, dropout and augmentation; 32 bits.
            transform: `(carry, keys, train) -> carry` in the first stage's call, for augmentation.
            dtype: compute dtype of blocks and heads, such as `jnp.bfloat16`; parameters,
                statistics and losses keep theirs. `jnp.float16` scales losses, None casts nothing.
            clip_norm: bound on the norm of the gradient of all blocks (synchronous methods; for
                others, `optax.clip_by_global_norm` in the optimizer clips each block).
            accumulate: batches to an optimiser step, which takes the mean of their gradients.
            ema: decay, in (0, 1), of an exponential moving average of weights and statistics, to
                evaluate with; it moves with every optimiser step. None keeps none.
            remat: what a forward keeps for its backward: "none" (all that differentiation asks
                for), "elementwise" (results of products and convolutions), "blocks" or "stages"
                (inputs), "offload" (as "elementwise", on the host); or one of these a stage.
                "auto" is "none" under a local method and "elementwise" where an error comes down.
            fuse: compile the training of all stages into one call; by default where they share
                their devices.
            max_in_flight: batches, or lists of them, that may be unfinished; by default 2K.
            engine: "mpmd" compiles calls for every stage; "spmd" one program for all, which needs
                equal blocks between the first and the last, and a local method or `gpipe`; "auto"
                takes "spmd" where it fits and there are devices for two stages.
            frozen: indices of blocks that are not trained (local methods).
            gradient_norms: whether metrics tell the norms of gradients, which costs a reduction.
            wire: the form in which floating-point arrays go from stage to stage in training, on any
                devices: "float32", "bfloat16", or "int8" with a scale an example. What rounding
                takes from an error is added to the next. None rounds nothing.
            shard_optimizer: cut the optimiser's state over the replicas of each stage: every one
                makes its part of a step, and all get the whole.

        Raises:
            TypeError: an argument of a wrong type.
            ValueError: values that do not fit, or a method that needs what the model lacks.
        """
        options = {key: value for key, value in locals().items() if key not in ("self", "model")}
        require_type(Model, model=model)
        design = self.design = make_design(model, **options)
        self.model, self.method, self.microbatches = model, method, microbatches
        self.num_classes, self._spec = design.num_classes, design.spec
        shapes = design.spec.example
        self.options = options | {"example": shapes, "num_classes": design.num_classes}
        self.boundaries, self.stages, self.shared = design.boundaries, design.stages, design.shared
        made = self._engine = make_engine(design.engine, self.stages, method.route)
        self.engine, self.schedule, self.latency = made.name, made.schedule, made.schedule.latency
        self.placements, self.calls = made.placements, made.calls
        self.predictor = Predictor.of(self.stages, self._engine, shapes)
        self._evaluate = Evaluator(self.predictor)
        self._intake = Intake(self._spec, self.num_classes, self._engine)
        self._states = states.OwnStates(self.stages, self._engine, method.route)
        self.waits = self._states.waits

    def init(self) -> State:
        """Initial state: step 0, weights of the model's blocks and of the heads, empty queues."""
        return self._states.load(
            0, lambda k: self.stages[k].initial() | states.zeros(self._states.queues(k))
        )

    def abstract(self, *, addressable: bool = False) -> State:
        """Shapes and dtypes of the state; of the addressable stages alone, or of all."""
        own = [placement.addressable or not addressable for placement in self.placements]
        return State(0, tuple(self._states.shapes[k] if own[k] else None for k in range(len(own))))

    def to_arrays(self, state: State) -> dict[str, Any]:
        """The state's own arrays by names that do not depend on the partition.

        Returns:
            "block_{i}/params/...", "block_{i}/stats/...", "block_{i}/opt/...", with `ema` also
            "block_{i}/ema/...", in float16 "block_{i}/loss_scale/...", by a delayed schedule and
            where `wire` rounds errors "stage_{k}/...", to array, for the stages of this process;
            what a checkpoint holds.
        """
        self._states.check(state, abstract=True)
        return states.to_arrays(self.stages, state)

    def from_arrays(self, step: int, arrays: Mapping[str, Any]) -> State:
        """The state that `arrays` was read from, placed on this trainer's devices.

        Args:
            step: batches trained so far.
            arrays: by the names of `to_arrays`, from a trainer of any partition; those of the
                stages of this process are enough.

        Raises:
            ValueError: a step that is no count, or an array that is missing or of another shape.
        """
        require_int(0, step=step)
        return self._states.load(
            step, lambda k: states.from_arrays(self.stages[k], self._states.shapes[k], arrays)
        )

    def save(self, state: State, directory: str | os.PathLike[str]) -> None:
        """Writes a state for `restore`, and deletes an earlier one there once it is whole.

        Raises:
            TypeError: no state.
            ValueError: the directory holds a later state or a run's, or cannot be written; or some
                stages are in other processes.
        """
        from jdecouple.checkpoint import save_alone  # Orbax is a tenth of the start-up

        self._states.check(state)
        whole = all(placement.fully_addressable for placement in self.placements)
        save_alone(directory, state.step, self.to_arrays(state) if whole else None)

    def restore(self, directory: str | os.PathLike[str]) -> State:
        """The last state in a directory, on this trainer's devices; of any number of stages.

        Raises:
            ValueError: there is none, or it is of another net or optimizer.
        """
        from jdecouple.checkpoint import restore_alone

        restored = restore_alone(directory, self.to_arrays(self.abstract()))
        return self.from_arrays(restored.step, restored.arrays)

    def modules(self, state: State, *, averaged: bool = True) -> list[nnx.Module | None]:
        """Trained nnx modules: one per block, then the classifier if the model has one.

        A classifier that the method does not train is returned as it was given; blocks of
        other processes are None. With `ema` they hold the averages, unless not `averaged`.
        """
        self._states.check(state)
        pairs = states.modules(self.stages, state, averaged)
        blocks = [block for block, _ in pairs]
        if self.model.classifier is None:
            return blocks
        if self.method.objective.trains_classifier:
            return [*blocks, getattr(pairs[-1][1], "classifier", None)]
        return [*blocks, self.model.classifier]

    def heads(self, state: State, *, averaged: bool = True) -> list[nnx.Module | None]:
        """Trained heads, one per block; None where a block has none. Averages as in `modules`."""
        self._states.check(state)
        return [head for _, head in states.modules(self.stages, state, averaged)]

    def local_indices(self, size: int, parts: int = 1) -> np.ndarray:
        """Which examples of a batch of `size` in `parts` microbatches this process takes in."""
        own = self.placements[0].local_indices(size // parts)
        return np.concatenate([part * (size // parts) + own for part in range(parts)])

    def put(self, batch: Batch | Sequence[Batch | PlacedBatch]) -> PlacedBatch:
        """Uploads a global batch for `step`, or a list of T for `steps`, to the first stage.

        Args:
            batch: arrays on the host or on devices, or what NumPy reads as such: tensors, data
                frames, lists. Where it can, JAX uses the memory of NumPy arrays and tensors itself:
                leave it unchanged until the batch has been trained on. Under several processes each
                passes the same global batch, and only what the process's own devices need is
                uploaded. Those of a list are stacked on the host and uploaded at once.

        Raises:
            TypeError: not a mapping of arrays of numbers with integer labels.
            ValueError: other shapes or dtypes than the example's, labels out of range (those that a
                device has yet to compute are looked at in a later call), or numbers on the host
                that are not finite; a list that is empty or that `check_steps` refuses.
        """
        if isinstance(batch, Mapping) or not isinstance(batch, Sequence):
            return self._intake.single(batch)
        if not batch:
            raise ValueError("batches is empty: at least one batch is needed")
        self.check_steps(len(batch))
        return self._intake.several(batch)

    def check_steps(self, count: int) -> None:
        """Raises ValueError unless `steps` can take so many batches.

        More than one need schedule "local" or fused stages: others need one another in every batch.
        """
        self.design.check_steps(count)

    def step(self, state: State, batch: Batch | PlacedBatch) -> tuple[State, StepMetrics]:
        """Trains on one global batch; returns as soon as all calls are dispatched.

        Args:
            state: current state; donated, as in all that trains.
            batch: {"x": [batch, ...], "label": [batch]} as `put` takes it, or what it returned.

        Returns:
            The new state, and metrics as futures: "loss" (sum over the blocks), "accuracy"
            (of the last exit) and per block "block_{i}/loss", its terms and "block_{i}/accuracy".
            With `gradient_norms` also "gradient_norm" and "block_{i}/gradient_norm", of one batch's
            gradient, unscaled, neither clipped nor accumulated; nan until a late error has come.
            Under several processes they cover the process's stages.

        Raises:
            TypeError, ValueError: what `put` refuses; a state that training has used up, or that
                does not fit this trainer.
        """
        placed = self._intake.single(batch)
        stages = self._states.take(state)
        stages, metrics = self._engine.run(stages, placed, state.step, state.since)
        return self._states.make(state.step + 1, stages, state.since), metrics

    def steps(
        self, state: State, batches: Sequence[Batch | PlacedBatch] | PlacedBatch
    ) -> tuple[State, StepMetrics]:
        """Trains on T batches as T calls of `step` would, with the dispatches of one.

        Every stage scans its batches in one compiled call (all stages together, with engine
        "spmd"), which is compiled anew for another T.

        Args:
            state: current state.
            batches: T of what `step` takes, or what `put` returned for them.

        Returns:
            The new state, and the metrics of `step` as arrays [T].

        Raises:
            TypeError, ValueError: what `put` refuses.
        """
        own = self._intake.own
        placed = own(batches) if isinstance(batches, PlacedBatch) else self.put(batches)
        if placed.count is None:
            raise TypeError(f"batches is a {type(batches).__name__}: a list of batches is needed")
        stages = self._states.take(state)
        stages, metrics = self._engine.run(stages, placed, state.step, state.since)
        return self._states.make(state.step + placed.count, stages, state.since), metrics

    def finish(self, state: State) -> State:
        """Applies what a delayed schedule still has queued; the state stays at the same step.

        The stages go on without new batches until every batch has trained every stage. A step
        after it fills the queues again from empty. Gradients that `accumulate` has not yet
        completed to a step stay in the optimiser's state.
        """
        if not self.schedule.overlapping:
            self._states.check(state)
            return state
        stages: Any = self._states.take(state)
        nothing = self._engine.put([self._spec.split(states.zeros(self._spec.example))])
        for late in range(self.schedule.depth):
            stages, _ = self._engine.run(stages, nothing, state.step + late, end=state.step)
        return self._states.restart(state.step, stages)

    def take_over(self, other: "Trainer", state: State) -> State:
        """The state of a trainer that differs in the shape of its examples alone; donated.

        What waits in the stages has that shape: a delayed schedule applies what is queued
        (`finish`) and begins empty, and what rounding took from errors is dropped.

        Raises:
            ValueError: weights of other shapes.
        """
        if other is self or not self.waits:
            return state
        state = other.finish(state)
        return self._states.empty(state.step, other._states.take(state))

    def wait(self, state: State) -> None:
        """Blocks until everything that was dispatched has run."""
        self._states.check(state)
        self._intake.check_labels.look(wait=True)
        self._engine.wait(state.stages)

    def evaluate(self, state: State, data: Iterable[Batch] | Batch) -> dict[str, float]:
        """Evaluates every exit; batches of any size, each example counted once.

        Args:
            state: state; not changed.
            data: batches, or one batch.

        Returns:
            "loss" (mean cross-entropy) and "accuracy" of the final exit, and
            "exit_{i}/loss", "exit_{i}/accuracy" of the exit at block i. Under several
            processes all call it and all get all of them. With `ema` they are the averages'.

        Raises:
            ValueError: no examples, or what `put` refuses for another reason than its size.
        """
        self._states.check(state)
        return self._evaluate(state.stages, data, self.num_classes)

    @property
    def exits(self) -> tuple[int, ...]:
        """Index of the block of every exit, in the order of `predict`."""
        return self.predictor.exits

    def predict(self, state: State, data: Iterable[Batch] | Batch) -> np.ndarray:
        """Logits of every exit for all examples, in the order given.

        They are the same numbers as `evaluate` scores. Where an answer comes down from the last
        block, as with "al", it is the only exit.

        Args:
            state: state; not changed.
            data: batches {"x": [batch, ...]} of any size, or one; labels are not looked at.

        Returns:
            `[exits, n, classes]`, of positions `[exits, n, length, classes]`, in float32, or wider
            where the logits are; on the host. Under several processes all call it and all get the
            whole.

        Raises:
            TypeError, ValueError: no examples, or what `put` refuses but for size and labels.
        """
        self._states.check(state)
        return self.predictor.predict(state.stages, data)

    def gather_metrics(self, metrics: StepMetrics) -> dict[str, float]:
        """Metrics of `step` of all processes as floats; every process calls it."""
        summed = not self.schedule.sums_late
        return gather_metrics(metrics, self._states.metric_names, summed=summed)

    def block_costs(self) -> list[float]:
        """Floating-point operations of every block, forward and backward, on one microbatch."""
        return self.design.block_costs()

    def block_outputs(self) -> list[Any]:
        """Shapes of what every block gives for one microbatch."""
        return self.design.block_outputs()

    def measure(
        self, state: State, batch: Batch | PlacedBatch
    ) -> tuple[State, list[tuple[Call, float]]]:
        """Trains like `step`, waiting for every compiled call; gives `calls` with their seconds.

        Raises:
            ValueError: the stages are fused (not with `fuse=False`), or in several processes.
        """
        return self._measured(self._engine.measure, state, batch)

    def _measured(self, run: Any, state: State, batch: Any) -> tuple[State, Any]:
        placed = self._intake.single(batch)
        stages, found = run(self._states.take(state), placed, state.step)
        return self._states.make(state.step + 1, stages, state.since), found

    def measured_costs(
        self, state: State, batches: Iterable[Batch | PlacedBatch], repeats: int = 10
    ) -> tuple[State, Costs]:
        """Trains by `measure` on one batch that compiles, and on `repeats` that count.

        Returns:
            The new state, and costs with the median seconds of every call of the schedule and the
            bytes of its carries. The link is free: `dataclasses.replace` gives it a bandwidth and a
            latency. `batches` are begun again when they end.

        Raises:
            ValueError: fewer than 1 repeat, no batches, or a trainer that `measure` refuses.
        """
        return measured_costs(self, state, batches, repeats)
