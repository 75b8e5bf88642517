"""Evaluation of every exit, pipelined over the stages like training."""

import collections
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jdecouple._checks import check_batch, check_like
from jdecouple.assembly import abstract
from jdecouple.pipeline import Seat, gather, transfer
from jdecouple.pipeline.compiler import compiler_options
from jdecouple.routes import Message, Stage, StageState

Sums = dict[str, jax.Array]


def evaluate_stage(
    stage: Stage, state: StageState, message: Message, sums: Sums | None
) -> tuple[Message, Sums]:
    """Evaluation forward of one stage, as a pure function.

    Args:
        stage: the stage.
        state: its "params" and "stats"; not changed.
        message: batch with "weight" [batch], 0 for padding.
        sums: sums over earlier batches.

    Returns:
        The message for the next stage; the weighted number of hits and the summed
        cross-entropy of every exit of the stage.
    """
    message = stage.prepare(message, jnp.zeros(2, jnp.int32), False)
    found: Sums = {}
    weight = message["weight"]
    for unit, params, stats in zip(stage.units, state["params"], state["stats"], strict=True):
        features, logits = unit.evaluate(params, stats, message)
        message = {**message, "x": features}
        if logits is not None:
            logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
            hits = jnp.argmax(logits, axis=-1) == message["label"]
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, message["label"])
            found[f"exit_{unit.index}/accuracy"] = jnp.sum(hits * weight)
            found[f"exit_{unit.index}/loss"] = jnp.sum(losses * weight, dtype=jnp.float32)
    return message, found if sums is None else jax.tree.map(jnp.add, sums, found)


class Evaluator:
    """Runs `evaluate_stage` over all stages and batches."""

    def __init__(
        self,
        stages: Sequence[Stage],
        seats: Sequence[Seat],
        example: Message,
        *,
        fuse: bool,
        max_in_flight: int,
    ):
        """Prepares the calls; an example gives the shapes of a batch."""
        self._example = example
        self._known: dict[int, list[Message]] = {}
        self._stages = tuple(stages)
        self._seats = tuple(seats)
        self._fuse = fuse
        self._max_in_flight = max_in_flight

    def __call__(
        self, states: Sequence[Any], data: Iterable[Mapping] | Mapping, num_classes: int
    ) -> dict[str, float]:
        """Evaluates all batches; see `jdecouple.Trainer.evaluate`."""
        states = tuple(
            state and {"params": state["params"], "stats": state["stats"]} for state in states
        )
        sums: tuple = (None,) * len(self._stages)
        flying: collections.deque = collections.deque()
        count = size = 0
        replicas = math.lcm(*(len(seat.devices) for seat in self._seats))
        for batch in [data] if isinstance(data, Mapping) else data:
            check_batch(batch, num_classes)
            check_like(batch, self._example, any_size=True)
            examples = len(batch["label"])
            count += examples
            size = max(size, -(-examples // replicas) * replicas)
            sums = self._batch(states, _pad(batch, size), sums)
            flying.append(sums)
            if len(flying) > self._max_in_flight:
                jax.block_until_ready(flying.popleft())
        if not count:
            raise ValueError("the data to evaluate on holds no examples")
        own = {name: float(total) for each in sums if each for name, total in each.items()}
        if not all(seat.whole for seat in self._seats):
            own = gather(own, self._names)
        means = {name: total / count for name, total in own.items()}
        last = max(int(name.split("/")[0].removeprefix("exit_")) for name in means)
        final = {each: means[f"exit_{last}/{each}"] for each in ("loss", "accuracy")}
        return {**final, **means}

    def _batch(self, states: tuple, batch: Message, sums: tuple) -> tuple:
        seats, totals = self._seats, list(sums)
        message = seats[0].place(batch) if seats[0].mine else None
        if self._fuse:
            return self._fused(states, message, sums)
        shapes = self._shapes(batch)
        for k, seat in enumerate(seats):
            if k:
                message = transfer(message, shapes[k], seats[k - 1], seat)
            if seat.mine:
                message, totals[k] = self._calls[k](states[k], message, sums[k])
        return tuple(totals)

    @cached_property
    def _calls(self) -> list[Any]:
        def compiled(stage: Stage, seat: Seat) -> Any:
            def call(state, message, sums):
                message, sums = evaluate_stage(stage, state, message, sums)
                constrain = jax.lax.with_sharding_constraint
                message = jax.tree.map(lambda x: constrain(x, seat.sharding(x)), message)
                return message, constrain(sums, seat.replicated)

            return jax.jit(call, compiler_options=compiler_options(seat))

        return [
            compiled(stage, seat) for stage, seat in zip(self._stages, self._seats, strict=True)
        ]

    @cached_property
    def _fused(self) -> Any:
        def whole(states, message, sums):
            totals = []
            for stage, state, each in zip(self._stages, states, sums, strict=True):
                message, total = evaluate_stage(stage, state, message, each)
                totals.append(total)
            return tuple(totals)

        seat = self._seats[0]
        options = compiler_options(seat)
        return jax.jit(whole, out_shardings=seat.replicated, compiler_options=options)

    @cached_property
    def _names(self) -> list[str]:
        label = self._example["label"]
        weight = jax.ShapeDtypeStruct(label.shape, jnp.float32)
        return _trace(self._stages, {**self._example, "weight": weight})[1]

    def _shapes(self, batch: Message) -> Sequence[Any]:
        """Shapes of the message that every stage receives; needed where it comes from afar."""
        if all(seat.whole for seat in self._seats):
            return [None] * len(self._seats)
        size = batch["label"].shape[0]
        if size not in self._known:
            self._known[size] = _trace(self._stages, abstract(batch))[0]
        return self._known[size]


def _trace(stages: Sequence[Stage], message: Message) -> tuple[list[Message], list[str]]:
    """Shapes of the message that every stage receives, and the names of all sums."""
    shapes, names = [], []
    for stage in stages:
        shapes.append(message)
        message, sums = jax.eval_shape(
            lambda state, message, stage=stage: evaluate_stage(stage, state, message, None),
            jax.eval_shape(stage.initial),
            message,
        )
        names += list(sums)
    return shapes, names


def _pad(batch: Mapping, size: int) -> Message:
    """Repeats the last example up to `size`, with weight 0."""
    count = len(batch["label"])
    weight = (np.arange(size) < count).astype(np.float32)

    def pad(leaf: Any) -> Any:
        if count == size:
            return leaf
        leaf = np.asarray(leaf)
        return np.concatenate([leaf, np.repeat(leaf[-1:], size - count, axis=0)])

    return {**jax.tree.map(pad, dict(batch)), "weight": weight}
