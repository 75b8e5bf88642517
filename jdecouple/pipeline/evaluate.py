"""Evaluation of every exit, pipelined over the stages like training."""

import collections
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jdecouple.methods.routes import Carry, Stage, StageState, add
from jdecouple.pipeline.batch import LabelCheck, as_arrays, check_like
from jdecouple.pipeline.build import abstract
from jdecouple.pipeline.distributed import gather
from jdecouple.pipeline.engine import Engine
from jdecouple.pipeline.mesh import StageDevices, jit
from jdecouple.pipeline.transfer import transfer

Sums = dict[str, jax.Array]
"""Weighted number of hits and summed cross-entropy of every exit of a stage."""


def exit_sums(index: int, logits: jax.Array, carry: Carry) -> Sums:
    """Weighted hits and summed cross-entropy of the exit at block `index`."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    hits = jnp.argmax(logits, axis=-1) == carry["label"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, carry["label"])
    return {
        f"exit_{index}/accuracy": jnp.sum(hits * carry["weight"]),
        f"exit_{index}/loss": jnp.sum(losses * carry["weight"], dtype=jnp.float32),
    }


class EvalShapes(NamedTuple):
    """What a batch of one size looks like on its way.

    Attributes:
        carries: shapes of the carry that every stage receives.
        targets: shapes of what every stage receives from above, if anything comes down.
        names: of the sums of all stages.
    """

    carries: list[Any]
    targets: list[Any]
    names: list[str]


class Evaluator:
    """Takes batches up through all stages, and adds up what their exits answer.

    The engine says where the stages lie, whether they are one call, and how much may be in flight.
    The example is the shapes of a batch.
    """

    def __init__(self, stages: tuple[Stage, ...], engine: Engine, example: Carry):
        self._stages = stages
        self._placements = engine.placements
        self._example = example
        self._fuse = engine.fuse
        self._max_in_flight = engine.max_in_flight
        self._one_process = all(placement.fully_addressable for placement in engine.placements)
        self._shapes: dict[int, EvalShapes] = {}  # by the size of a batch
        self._calls = self._compile(self.ascend_stage)
        self._add: Callable = self.add
        if self._fuse:
            placement = self._placements[0]
            self._add = jit(self.add, placement, out_shardings=placement.replicated)

    def __call__(
        self, states: Sequence[Any], data: Iterable[Mapping] | Mapping, num_classes: int
    ) -> dict[str, float]:
        """Evaluates all batches; see `jdecouple.Trainer.evaluate`."""
        states = tuple(
            state and {"params": state["params"], "stats": state["stats"]} for state in states
        )
        sums = self.begin()
        in_flight: collections.deque = collections.deque()
        count = size = 0
        first = self._placements[0]
        replicas = math.lcm(*(len(placement.devices) for placement in self._placements))
        check_labels = LabelCheck(num_classes)
        for given in [data] if isinstance(data, Mapping) else _iterator(data):
            batch = as_arrays(given)
            check_like(batch, self._example, any_size=True)
            check_labels(batch["label"])
            examples = len(batch["label"])
            count += examples
            size = max(size, -(-examples // replicas) * replicas)
            padded = _pad(batch, size)
            shapes = None if self._fuse or self._one_process else self._shapes_of(padded)
            carry = first.place(padded) if first.addressable else None
            sums = self._add(states, carry, sums, shapes)
            in_flight.append(sums)
            if len(in_flight) > self._max_in_flight:
                jax.block_until_ready(in_flight.popleft())
        if not count:
            raise ValueError("the data to evaluate on holds no examples")
        check_labels.look(wait=True)
        own = {
            name: float(total)
            for stage_sums in self.end(states, sums)
            for name, total in (stage_sums or {}).items()
        }
        if not self._one_process:
            own = gather(own, self._shapes_of(self._example).names)
        means = {name: total / count for name, total in own.items()}
        last = max(int(name.split("/")[0].removeprefix("exit_")) for name in means)
        final = {metric: means[f"exit_{last}/{metric}"] for metric in ("loss", "accuracy")}
        return {**final, **means}

    # --- What `DescendingEvaluator` extends -------------------------------------------------------

    def begin(self) -> tuple:
        """Sums over no batch: an entry for every stage."""
        return (None,) * len(self._stages)

    def add(
        self, states: tuple, carry: Carry | None, sums: tuple, shapes: EvalShapes | None
    ) -> tuple:
        """Dispatches a batch; the sums with its own added. Traced where the stages are fused."""
        return self.ascend(states, carry, sums, shapes)[1]

    def end(self, states: tuple, sums: tuple) -> tuple:
        """The sums over all batches."""
        del states
        return sums

    def turn(self, stage: Stage, state: StageState, carry: Carry) -> Any:
        """What the last stage sends: nothing."""
        del stage, state, carry

    def trace(self, carry: Any) -> EvalShapes:
        """Shapes by abstract evaluation, from those of a batch with its weights."""
        shapes = EvalShapes([], [], [])
        for stage in self._stages:
            shapes.carries.append(carry)
            carry, sums = call_shapes(self.ascend_stage, stage, carry)
            shapes.names.extend(sums)
        shapes.targets.append(carry)
        return shapes

    # --- Up through all stages --------------------------------------------------------------------

    def ascend_stage(
        self, stage: Stage, state: StageState, carry: Carry, sums: Sums | None
    ) -> tuple[Any, Sums]:
        """Evaluation forward of one stage, as a pure function: what it sends, and the sums."""
        carry = stage.prepare(carry, jnp.zeros(2, jnp.int32), False)
        own: Sums = {}
        for unit, params, stats in zip(stage.units, state["params"], state["stats"], strict=True):
            features, logits = unit.evaluate(params, stats, carry)
            carry = {**carry, "x": features}
            if logits is not None:
                own |= exit_sums(unit.index, logits, carry)
        return self.turn(stage, state, carry) if stage.is_last else carry, add(sums, own)

    def ascend(
        self, states: tuple, carry: Carry | None, sums: tuple, shapes: EvalShapes | None
    ) -> tuple[Any, tuple]:
        """Calls every stage; what the last one sends, and the sums."""
        totals = list(sums)
        for k, placement in enumerate(self._placements):
            if k:
                received = shapes and shapes.carries[k]
                carry = transfer(carry, received, self._placements[k - 1], placement)
            if placement.addressable:
                carry, totals[k] = self._calls[k](states[k], carry, sums[k])
        return carry, tuple(totals)

    def _compile(self, function: Callable) -> list[Callable]:
        """A function for every stage, jitted unless all are fused; its sums are everywhere."""

        def compiled(stage: Stage, placement: StageDevices) -> Callable:
            def call(*arguments):
                carry, sums = function(stage, *arguments)
                sums = jax.lax.with_sharding_constraint(sums, placement.replicated)
                return placement.constrain(carry), sums

            return jit(call, placement)

        if self._fuse:
            return [functools.partial(function, stage) for stage in self._stages]
        return [*map(compiled, self._stages, self._placements)]

    def _shapes_of(self, batch: Carry) -> EvalShapes:
        """What a batch of this one's size looks like on its way."""
        size = batch["label"].shape[0]
        if size not in self._shapes:
            weight = jax.ShapeDtypeStruct((size,), jnp.float32)
            self._shapes[size] = self.trace({**abstract(dict(batch)), "weight": weight})
        return self._shapes[size]


def call_shapes(function: Callable, stage: Stage, *carries: Any) -> Any:
    """Shapes of what a function of a stage gives for these."""
    call = functools.partial(function, stage, sums=None)
    return jax.eval_shape(call, jax.eval_shape(stage.initial), *carries)


def _iterator(data: Any) -> Iterator:
    try:
        return iter(data)
    except TypeError:
        given = type(data).__name__
        raise TypeError(f"data is a {given}: batches or one batch are needed") from None


def _pad(batch: Mapping, size: int) -> Carry:
    """Repeats the last example up to `size`, with weight 0."""
    count, numbers = len(batch["label"]), np.arange(size)
    padded = dict(batch)
    if count < size:
        indices = np.minimum(numbers, count - 1)
        padded = jax.tree.map(lambda leaf: np.asarray(leaf)[indices], padded)
    return {**padded, "weight": (numbers < count).astype(np.float32)}
