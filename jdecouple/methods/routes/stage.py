"""What the routes share: the stage, its keys, its metrics and its optimiser step."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jdecouple.methods.objectives import HeadOutput
from jdecouple.methods.routes import loss_scale
from jdecouple.methods.routes.unit import Arrays, Carry, Tie, Unit
from jdecouple.methods.routes.updates import ahead, begin_average, has_stepped, move_average

StageState = dict[str, Any]
"""What a stage trains: "params", "stats" and "opt", where weights are averaged "ema", and where
losses are scaled "loss_scale", each a tuple with one entry a unit; also "tied", optimiser states of
shared parameters, where a unit is the first to use one. With two versions of the weights "previous"
are those before the latest step, as "params", and "passes" counts backward passes.
"""
Metrics = dict[str, jax.Array]
"""Scalars by name, such as "block_0/loss"; after T batches in one call arrays `[T]`."""
Transform = Callable[[Carry, jax.Array, bool], Carry]

NORM = "gradient_norm"


class Accumulated(NamedTuple):
    """What a stage adds up over the microbatches of one batch."""

    gradients: Any
    metrics: Metrics


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """Consecutive units that live on one device group.

    Attributes:
        index: k, 0 to K-1.
        num_stages: K.
        units: the blocks of the stage with their heads.
        optimizer: the transformation that every unit has a state of.
        seed: root of all random keys.
        num_microbatches: M; gradients and metrics are means over it.
        transform: augmentation, run by the first stage alone.
        clip_norm: bound on the norm of the gradient of all stages together; None clips nothing.
        ema: decay of the moving averages of weights and statistics; None keeps none.
        remat: what a forward keeps for its backward, one of `REMATS`.
        carry: shapes of the carry that the stage receives, one microbatch.
        scaling: whose overflow leaves a step out and halves the scale of the loss, a "block"'s, the
            "stage"'s or that of the whole "model"; None where no loss is scaled.
        gradient_norms: whether metrics tell the norm of every unit's gradient.
        wire: the form in which arrays go to and from the other stages, see
            `jdecouple.pipeline.wire`; None rounds nothing.
        ties: the parameters that units share, of all stages; see `jdecouple.methods.routes.ties`.
        passes_per_version: backward passes to a version of the weights, of which that before the
            current one is kept, too; None keeps none.
        rebuilds_input: whether the stage makes its input anew of its output, which comes back with
            the error, and keeps nothing.
        returns_input: whether the stage sends its input back with the error: the stage below makes
            its own of it.
    """

    index: int
    num_stages: int
    units: tuple[Unit, ...]
    optimizer: optax.GradientTransformation
    seed: int
    num_microbatches: int
    transform: Transform | None
    clip_norm: float | None
    ema: float | None
    remat: str
    carry: Carry
    scaling: str | None = None
    gradient_norms: bool = False
    wire: str | None = None
    ties: tuple[Tie, ...] = ()
    passes_per_version: int | None = None
    rebuilds_input: bool = False
    returns_input: bool = False

    @property
    def is_last(self) -> bool:
        """Whether the model ends here."""
        return self.index == self.num_stages - 1

    def parts(self) -> list["Stage"]:
        """A stage for every unit, as if each lived alone."""
        last = [unit is self.units[-1] and self.is_last for unit in self.units]
        return [
            dataclasses.replace(
                self,
                index=unit.index,
                num_stages=unit.index + (1 if is_last else 2),
                units=(unit,),
            )
            for unit, is_last in zip(self.units, last, strict=True)
        ]

    def initial(self) -> StageState:
        """Fresh state: weights of the modules, optimiser states of the units."""
        pairs = [unit.initial() for unit in self.units]
        params = tuple(params for params, _ in pairs)
        state: StageState = {
            "params": params,
            "stats": tuple(stats for _, stats in pairs),
            "opt": tuple(
                () if unit.frozen else self.optimizer.init(unit.own(unit_params))
                for unit, unit_params in zip(self.units, params, strict=True)
            ),
        }
        if any(map(self.owned, self.units)):
            state["tied"] = tuple(
                self.optimizer.init({name: own[name] for name in names}) if names else ()
                for own, names in zip(params, map(self.owned, self.units), strict=True)
            )
        if self.ema is not None:
            state["ema"] = tuple(
                begin_average({"params": params, "stats": stats}) for params, stats in pairs
            )
        if self.scaling is not None:
            state["loss_scale"] = tuple(
                {} if unit.frozen else loss_scale.initial() for unit in self.units
            )
        if self.passes_per_version is not None:
            state |= {"previous": params, "passes": jnp.int32(0)}
        return state

    @property
    def shares(self) -> bool:
        """Whether a unit has parameters that others use, too."""
        return any(unit.shared for unit in self.units)

    def tie_of(self, unit: Unit, name: str) -> Tie:
        """The tie of a unit's parameter."""
        return next(tie for tie in self.ties if (unit.index, name) in tie.uses)

    def owned(self, unit: Unit) -> list[str]:
        """Names of the shared parameters that a unit is the first to use."""
        uses = ((name, self.tie_of(unit, name).uses[0]) for name in sorted(unit.shared))
        return [name for name, first in uses if first == (unit.index, name)]

    @property
    def owned_ties(self) -> list[str]:
        """Names of the ties that the stage steps: its units are the first to use them."""
        return [self.tie_of(unit, name).name for unit in self.units for name in self.owned(unit)]

    def ahead(self, state: StageState) -> tuple[Arrays, ...]:
        """Parameters that a forward computes with whose backward is late.

        They are as far ahead as optimisers look; those that units share stay as they are.
        """
        parts = zip(self.units, state["params"], state["opt"], strict=True)
        return tuple({**own, **ahead(unit.own(own), opt)} for unit, own, opt in parts)

    def prepare(self, carry: Carry, step_id: jax.Array, train: bool) -> Carry:
        """Applies the transform to what enters the first stage.

        Keys are folded from (seed, step, index in the global batch), so that an example is
        augmented alike whatever the microbatches and the sharding are.
        """
        if self.index or self.transform is None:
            return carry
        return transformed(self.transform, self.seed, carry, step_id, train)

    def key(self, unit: Unit, step_id: jax.Array) -> jax.Array:
        """Key of a unit for (step, microbatch); independent of the schedule and of K."""
        key = jax.random.fold_in(jax.random.key(self.seed), step_id[0])
        # Offset so that no unit shares a key with an example of `prepare`.
        key = jax.random.fold_in(key, np.uint32(2**32 - 1) - self.number(unit))
        return jax.random.fold_in(key, step_id[1])

    def number(self, unit: Unit) -> Any:
        """Index of a unit in the model, as its keys count it."""
        return np.uint32(unit.index)

    @property
    def follows_above(self) -> bool:
        """Whether the last unit has averages of what the stage above has."""
        return not self.is_last and bool(self.units[-1].follows) and not self.units[-1].frozen

    def following(self, stats: Any, params: Any) -> tuple[Any, ...]:
        """Statistics behind a batch, from those that its forwards left and its parameters.

        Averages of what other stages have stay as they are.
        """
        above = [
            {**of_params, **of_stats} for of_params, of_stats in zip(params, stats, strict=True)
        ]
        pairs = zip(self.units, stats, above[1:], strict=False)
        moved = tuple(unit.following(own, other) for unit, own, other in pairs)
        return (*moved, *stats[len(moved) :])

    @property
    def needs_norm(self) -> bool:
        """Whether a step waits for the norm of the gradient of all stages."""
        return self.clip_norm is not None or self.scaling == "model"

    def squared_norm(self, gradients: Any) -> jax.Array:
        """Squared norm of the mean of the microbatches' gradients."""
        dtype = jax.dtypes.canonicalize_dtype(jnp.float64)
        leaves = [jnp.sum(jnp.square(leaf.astype(dtype))) for leaf in jax.tree.leaves(gradients)]
        return sum(leaves, jnp.zeros((), dtype)) / self.num_microbatches**2

    @property
    def norm_names(self) -> list[str]:
        """Names of the metrics that `norms` gives."""
        trained = [unit.index for unit in self.units if not unit.frozen]
        return [f"block_{index}/{NORM}" for index in trained] if self.gradient_norms else []

    def norms(self, gradients: Any) -> Metrics:
        """Norm of every trained unit's mean of the microbatches' gradients, {} if not asked for.

        What units share does not count.
        """
        pairs = zip(self.units, gradients, strict=True)
        trained = [unit.own(own) for unit, own in pairs if not unit.frozen and self.gradient_norms]
        norms = [jnp.sqrt(self.squared_norm(own)).astype(jnp.float32) for own in trained]
        return dict(zip(self.norm_names, norms, strict=True))

    def step(
        self, state: StageState, gradients: Any, squared_norm: jax.Array | None = None
    ) -> tuple[StageState, Metrics]:
        """`update`, left out for units whose scaled loss has overflowed; their scale moves.

        Where a version of the weights is complete, the one before becomes the previous one. Metrics
        tell norms, if asked for; where losses are scaled, the scale of the gradients, and 1 if the
        step is left out, else 0.
        """
        new, metrics = self._step(state, gradients, squared_norm)
        return {**new, **self._versions(state)}, metrics

    def _versions(self, state: StageState) -> StageState:
        """What a backward pass changes of the version that is kept, from the state before it."""
        if self.passes_per_version is None:
            return {}
        passes = state["passes"] + 1
        is_complete = passes % self.passes_per_version == 0

        def kept(new: jax.Array, old: jax.Array) -> jax.Array:
            return new if self.passes_per_version == 1 else jnp.where(is_complete, new, old)

        previous = jax.tree.map(kept, state["params"], state["previous"])
        return {"previous": previous, "passes": passes}

    def _step(
        self, state: StageState, gradients: Any, squared_norm: jax.Array | None
    ) -> tuple[StageState, Metrics]:
        clipped = None if self.clip_norm is None else squared_norm
        new = self.update(state, gradients, clipped)
        metrics = self.norms(gradients)
        if self.scaling is None:
            return new, metrics
        if self.scaling == "model":
            assert squared_norm is not None
            finite = [jnp.isfinite(squared_norm)] * len(self.units)
        elif self.scaling == "stage":
            finite = [loss_scale.all_finite(gradients)] * len(self.units)
        else:
            finite = [loss_scale.all_finite(unit) for unit in gradients]
        for part in new:
            if new[part] is not state[part]:
                units = zip(finite, new[part], state[part], strict=True)
                new[part] = tuple(loss_scale.select(*each) for each in units)
        moved = []
        for unit, scale, good in zip(self.units, state["loss_scale"], finite, strict=True):
            moved.append(loss_scale.adjusted(scale, good) if scale else scale)
            if scale:
                prefix = "" if self.scaling == "model" else f"block_{unit.index}/"
                metrics[prefix + "loss_scale"] = scale["scale"]
                metrics[prefix + "skipped"] = 1 - good.astype(jnp.float32)
        return {**new, "loss_scale": tuple(moved)}, metrics

    def update(
        self, state: StageState, gradients: Any, squared_norm: jax.Array | None = None
    ) -> StageState:
        """One optimiser step of every unit with the mean of the microbatches' summed gradients.

        Averages move where the optimiser does step, and does not wait for further gradients.
        Frozen units stay as they are, and so do parameters that units share. `squared_norm` is that
        of the mean gradient of all stages, where it is to be clipped.
        """
        params, opt = [], []
        parts = zip(self.units, gradients, state["params"], state["opt"], strict=True)
        for unit, grads, weights, unit_opt in parts:
            if unit.frozen:
                params.append(weights)
                opt.append(unit_opt)
                continue
            new_weights, new_opt = self.moved(
                unit, unit.own(grads), unit_opt, unit.own(weights), squared_norm
            )
            params.append({**weights, **new_weights} if unit.shared else new_weights)
            opt.append(new_opt)
        new = {**state, "params": tuple(params), "opt": tuple(opt)}
        return new if self.ema is None else {**new, "ema": self._averages(state, new)}

    def moved(
        self, unit: Unit, gradients: Arrays, opt: Any, weights: Arrays, squared_norm: Any
    ) -> tuple[Arrays, Any]:
        """Weights and optimiser state of (parts of) a unit after a step; see `update`."""
        if self.num_microbatches > 1 or squared_norm is not None:
            scale: Any = 1.0 / self.num_microbatches
            if squared_norm is not None and self.clip_norm is not None:
                norm = jnp.sqrt(squared_norm)
                scale = scale * jnp.where(norm > self.clip_norm, self.clip_norm / norm, 1.0)
            gradients = jax.tree.map(lambda g: (g * scale).astype(g.dtype), gradients)
        updates, opt = self.optimizer.update(gradients, opt, weights)
        return optax.apply_updates(weights, unit.scaled(updates)), opt

    def _averages(self, before: StageState, after: StageState) -> tuple:
        assert self.ema is not None
        averages = []
        for number, unit in enumerate(self.units):
            average = before["ema"][number]
            if not unit.frozen:
                arrays = {kind: after[kind][number] for kind in ("params", "stats")}
                stepped = has_stepped(before["opt"][number], after["opt"][number])
                moved = move_average(self.ema, average, arrays, stepped)
                kept = {name: average["params"][name] for name in unit.shared}
                average = {**moved, "params": {**moved["params"], **kept}} if kept else moved
            averages.append(average)
        return tuple(averages)

    def mean(self, metrics: Metrics) -> Metrics:
        """Turns sums over the microbatches into means."""
        if self.num_microbatches == 1:
            return metrics
        return {name: value / self.num_microbatches for name, value in metrics.items()}


def transformed(
    transform: Transform, seed: int, carry: Carry, step_id: jax.Array, train: bool
) -> Carry:
    """A carry after the transform, with the keys that `Stage.prepare` folds."""
    count = jax.tree.leaves(carry["x"])[0].shape[0]
    root = jax.random.fold_in(jax.random.key(seed), step_id[0])
    indices = step_id[1] * count + jnp.arange(count)
    keys = jax.vmap(lambda index: jax.random.fold_in(root, index))(indices)
    return transform(carry, keys, train)


def error_shapes(carry: Carry, scaling: str | None, returns_input: bool) -> Any:
    """Shapes of the error that a stage sends down, from those of the carry that it receives.

    Where every stage has a scale of its own, that of the error goes with it, [batch]; and where the
    input is returned, that does.
    """
    error = floating(carry["x"])
    more: dict[str, Any] = {}
    if scaling == "stage":
        size = carry["label"].shape[0]
        more["scale"] = jax.ShapeDtypeStruct((size,), jnp.float32)
    if returns_input:
        more["input"] = carry["x"]
    return {"x": error, **more} if more else error


def floating(x: Any) -> Any:
    """The part of a tree that has an error; None in the place of integers and masks."""
    return jax.tree.map(lambda leaf: leaf if jnp.issubdtype(leaf.dtype, jnp.floating) else None, x)


def with_floating(part: Any, x: Any) -> Any:
    """The tree `x` with the arrays of `part`, which is as `floating` gives it."""

    def choose(new: Any, old: Any) -> Any:
        return old if new is None else new

    return jax.tree.map(choose, part, x, is_leaf=lambda leaf: leaf is None)


def add(first: Any, second: Any) -> Any:
    """Sum of two trees; None is zero."""
    if first is None:
        return second
    return jax.tree.map(jnp.add, first, second)


def block_metrics(unit: Unit, output: HeadOutput, carry: Carry) -> Metrics:
    """Metrics of one block: its loss, the loss's terms, its exit's training accuracy."""
    prefix = f"block_{unit.index}/"
    metrics = {prefix + "loss": output.loss}
    metrics |= {prefix + name: value for name, value in output.metrics.items()}
    if output.logits is not None:
        labels = carry["label"] if output.labels is None else output.labels
        metrics[prefix + "accuracy"] = accuracy(output.logits, labels)
    return {name: value.astype(jnp.float32) for name, value in metrics.items()}


def next_carry(carry: Carry, features: Any, output: HeadOutput | None) -> Carry:
    """What the block above receives: the carry, the head's outputs, the features."""
    head_outputs = {} if output is None else jax.lax.stop_gradient(dict(output.carry))
    return {**carry, **head_outputs, "x": features}


def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Fraction of arg-maxes that hit; of positions, those with a label."""
    hits = jnp.argmax(logits, axis=-1) == labels
    if labels.ndim == 1:
        return jnp.mean(hits, dtype=jnp.float32)
    return jnp.sum(hits, dtype=jnp.float32) / jnp.maximum(jnp.sum(labels >= 0), 1)


def totals(carry: Carry, metrics: Metrics) -> tuple[Metrics, Carry]:
    """Adds the sums over all blocks so far to metrics and carry, in which they travel.

    The metrics get "loss", and "accuracy" where the stage has an exit; the carry gets "loss" if any
    block so far has one.
    """
    losses = [value for name, value in metrics.items() if name.endswith("/loss")]
    loss = sum(losses, carry.get("loss", jnp.zeros((), jnp.float32)))
    exits = [value for name, value in metrics.items() if name.endswith("/accuracy")]
    if losses or "loss" in carry:
        carry = {**carry, "loss": loss}
    return {**metrics, "loss": loss, **({"accuracy": exits[-1]} if exits else {})}, carry


def with_whole_norm(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics, or arrays of them, with the norm of the whole gradient where they have the blocks'.

    Norms that are there stay as they are.

    >>> with_whole_norm({"block_0/gradient_norm": 3.0, "block_1/gradient_norm": 4.0})[NORM]
    5.0
    """
    squares = [value * value for name, value in metrics.items() if name.endswith(f"/{NORM}")]
    return {NORM: sum(squares[1:], squares[0]) ** 0.5, **metrics} if squares else metrics
