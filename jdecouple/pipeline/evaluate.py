"""Evaluation of every exit, pipelined over the stages like training."""

import collections
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jdecouple.methods.routes import Carry, Stage, StageState, add
from jdecouple.pipeline.batch import check_batch, check_like
from jdecouple.pipeline.build import abstract
from jdecouple.pipeline.distributed import gather
from jdecouple.pipeline.engine import Engine
from jdecouple.pipeline.mesh import StageDevices, compiler_options
from jdecouple.pipeline.transfer import transfer

Sums = dict[str, jax.Array]
"""Weighted number of hits and summed cross-entropy of every exit of a stage."""


def evaluate_stage(
    stage: Stage, state: StageState, carry: Carry, sums: Sums | None
) -> tuple[Carry, Sums]:
    """Evaluation forward of one stage, as a pure function.

    Args:
        stage: the stage.
        state: its "params" and "stats"; not changed.
        carry: batch with "weight" [batch], 0 for padding.
        sums: sums over earlier batches.

    Returns:
        The carry for the next stage, and the sums.
    """
    carry = stage.prepare(carry, jnp.zeros(2, jnp.int32), False)
    own: Sums = {}
    for unit, params, stats in zip(stage.units, state["params"], state["stats"], strict=True):
        features, logits = unit.evaluate(params, stats, carry)
        carry = {**carry, "x": features}
        if logits is not None:
            own |= exit_sums(unit.index, logits, carry)
    return carry, add(sums, own)


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
    """Runs `evaluate_stage` over all stages and batches.

    Args:
        stages: all stages.
        engine: says where they lie, whether they are one call, and how much may be in flight.
        example: shapes of a batch.
    """

    def __init__(self, stages: tuple[Stage, ...], engine: Engine, example: Carry):
        self._stages = stages
        self._placements = engine.placements
        self._example = example
        self._fuse = engine.fuse
        self._max_in_flight = engine.max_in_flight
        self._one_process = all(placement.fully_addressable for placement in engine.placements)
        self._shapes: dict[int, EvalShapes] = {}  # by the size of a batch

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
        replicas = math.lcm(*(len(placement.devices) for placement in self._placements))
        for batch in [data] if isinstance(data, Mapping) else data:
            check_batch(batch, num_classes)
            check_like(batch, self._example, any_size=True)
            examples = len(batch["label"])
            count += examples
            size = max(size, -(-examples // replicas) * replicas)
            sums = self.add(states, _pad(batch, size), sums)
            in_flight.append(sums)
            if len(in_flight) > self._max_in_flight:
                jax.block_until_ready(in_flight.popleft())
        if not count:
            raise ValueError("the data to evaluate on holds no examples")
        return self._means(self.end(states, sums), count)

    def _means(self, sums: tuple, count: int) -> dict[str, float]:
        own = {
            name: float(total)
            for stage_sums in sums
            if stage_sums
            for name, total in stage_sums.items()
        }
        if not self._one_process:
            own = gather(own, self.shapes(self._example).names)
        means = {name: total / count for name, total in own.items()}
        last = max(int(name.split("/")[0].removeprefix("exit_")) for name in means)
        final = {metric: means[f"exit_{last}/{metric}"] for metric in ("loss", "accuracy")}
        return {**final, **means}

    # --- What `DescendingEvaluator` extends -------------------------------------------------------

    def begin(self) -> tuple:
        """Sums over no batch: an entry for every stage."""
        return (None,) * len(self._stages)

    def add(self, states: tuple, batch: Carry, sums: tuple) -> tuple:
        """Dispatches one batch; the sums with its own added."""
        carry = self._put(batch)
        if self._fuse:
            return self._fused(states, carry, sums)
        return self._ascend(states, batch, carry, sums)[1]

    def end(self, states: tuple, sums: tuple) -> tuple:
        """The sums over all batches."""
        del states
        return sums

    def ascend_stage(
        self, stage: Stage, state: StageState, carry: Carry, sums: Sums | None
    ) -> tuple[Any, Sums]:
        """`evaluate_stage`; nothing goes on from the last stage."""
        carry, sums = evaluate_stage(stage, state, carry, sums)
        return None if stage.is_last else carry, sums

    def all_stages(self, states: tuple, carry: Carry, sums: tuple) -> tuple:
        """`add` where all stages are one call, as a pure function."""
        return self._ascend_fused(states, carry, sums)[1]

    def trace(self, carry: Any) -> EvalShapes:
        """Shapes by abstract evaluation, from those of a batch with its weights."""
        shapes = EvalShapes([], [], [])
        for stage in self._stages:
            shapes.carries.append(carry)
            carry, sums = jax.eval_shape(
                functools.partial(self.ascend_stage, stage, sums=None),
                jax.eval_shape(stage.initial),
                carry,
            )
            shapes.names.extend(sums)
        shapes.targets.append(carry)
        return shapes

    # --- Up through all stages --------------------------------------------------------------------

    def _put(self, batch: Carry) -> Carry | None:
        placement = self._placements[0]
        return placement.place(batch) if placement.addressable else None

    def _ascend(
        self, states: tuple, batch: Carry, carry: Carry | None, sums: tuple
    ) -> tuple[Any, tuple]:
        """Calls every stage; what the last one sends, and the sums."""
        totals = list(sums)
        for k, placement in enumerate(self._placements):
            if k:
                shapes = None if self._one_process else self.shapes(batch).carries[k]
                carry = transfer(carry, shapes, self._placements[k - 1], placement)
            if placement.addressable:
                carry, totals[k] = self._calls[k](states[k], carry, sums[k])
        return carry, tuple(totals)

    def _ascend_fused(self, states: tuple, carry: Carry, sums: tuple) -> tuple[Any, tuple]:
        totals = []
        own_sums = sums[: len(self._stages)]
        for stage, state, own in zip(self._stages, states, own_sums, strict=True):
            carry, total = self.ascend_stage(stage, state, carry, own)
            totals.append(total)
        return carry, tuple(totals)

    @cached_property
    def _calls(self) -> list[Callable]:
        return self._compile(self.ascend_stage)

    def _compile(self, function: Callable) -> list[Callable]:
        """Jits a function for every stage; what it sends is cut, and its sums are everywhere."""

        def compiled(stage: Stage, placement: StageDevices) -> Callable:
            def call(*arguments):
                carry, sums = function(stage, *arguments)
                sums = jax.lax.with_sharding_constraint(sums, placement.replicated)
                return placement.constrain(carry), sums

            return jax.jit(call, compiler_options=compiler_options(placement))

        return [
            compiled(stage, placement)
            for stage, placement in zip(self._stages, self._placements, strict=True)
        ]

    @cached_property
    def _fused(self) -> Callable:
        placement = self._placements[0]
        return jax.jit(
            self.all_stages,
            out_shardings=placement.replicated,
            compiler_options=compiler_options(placement),
        )

    def shapes(self, batch: Carry) -> EvalShapes:
        """What a batch of this one's size looks like on its way."""
        size = batch["label"].shape[0]
        if size not in self._shapes:
            weight = jax.ShapeDtypeStruct((size,), jnp.float32)
            self._shapes[size] = self.trace({**abstract(dict(batch)), "weight": weight})
        return self._shapes[size]


def _pad(batch: Mapping, size: int) -> Carry:
    """Repeats the last example up to `size`, with weight 0."""
    count = len(batch["label"])
    weight = (np.arange(size) < count).astype(np.float32)

    def pad(leaf: Any) -> Any:
        if count == size:
            return leaf
        leaf = np.asarray(leaf)
        return np.concatenate([leaf, np.repeat(leaf[-1:], size - count, axis=0)])

    return {**jax.tree.map(pad, dict(batch)), "weight": weight}
