"""Evaluation of every exit, pipelined over the stages like training."""

import collections
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

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


class Shapes(NamedTuple):
    """What a batch of one size looks like on its way.

    Attributes:
        messages: shapes of the message that every stage receives.
        targets: shapes of what every stage receives from above; of the last one, from itself.
        names: of all sums.
    """

    messages: list[Any]
    targets: list[Any]
    names: list[str]


class Passed(NamedTuple):
    """What became of a batch that has passed all stages.

    Attributes:
        target: what comes down from the last stage, or None.
        first: "label" and "weight" on the first stage.
        shapes: of what the stages receive.
    """

    target: Any
    first: Any
    shapes: Any


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
        The message for the next stage, from the last one what comes down, or None; the weighted
        number of hits and the summed cross-entropy of every exit of the stage.
    """
    message = stage.prepare(message, jnp.zeros(2, jnp.int32), False)
    found: Sums = {}
    for unit, params, stats in zip(stage.units, state["params"], state["stats"], strict=True):
        features, logits = unit.evaluate(params, stats, message)
        message = {**message, "x": features}
        if logits is not None:
            found |= _scores(unit.index, logits, message)
    handed: Any = message
    if stage.is_last:
        handed = None
        if unit.descends:
            handed = _descend(stage, state, unit.turn(params, stats, features))
    return handed, found if sums is None else jax.tree.map(jnp.add, sums, found)


def answer_stage(
    stage: Stage, state: StageState, target: Any, message: Message, sums: Sums | None, last: int
) -> tuple[Any, Sums | None]:
    """Evaluation of one stage on the way down, as a pure function.

    Args:
        stage: the stage; the last one has been passed by `evaluate_stage`.
        state: its "params" and "stats"; not changed.
        target: what came down from the stage above.
        message: "label" and "weight" of the batch, for the first stage.
        sums: of the first stage, over earlier batches.
        last: index of the model's last block.

    Returns:
        What the stage below receives; from the first stage the sums, as those of an exit at the
        last block.
    """
    if not stage.is_last:
        target = _descend(stage, state, target)
    if stage.index:
        return target, None
    found = _scores(last, target, message)
    return None, found if sums is None else jax.tree.map(jnp.add, sums, found)


def _descend(stage: Stage, state: StageState, target: Any) -> Any:
    units = list(zip(stage.units, state["params"], state["stats"], strict=True))
    for unit, params, stats in reversed(units):
        if unit.descends:
            target = unit.descend(params, stats, target)
    return target


def _scores(index: int, logits: jax.Array, message: Message) -> Sums:
    """Weighted hits and summed cross-entropy of an exit."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    hits = jnp.argmax(logits, axis=-1) == message["label"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, message["label"])
    return {
        f"exit_{index}/accuracy": jnp.sum(hits * message["weight"]),
        f"exit_{index}/loss": jnp.sum(losses * message["weight"], dtype=jnp.float32),
    }


class Evaluator:
    """Runs `evaluate_stage` over all stages and batches, then `answer_stage` where heads descend.

    Batches go up while earlier ones still come down.
    """

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
        self._known: dict[int, Shapes] = {}
        self._stages = tuple(stages)
        self._seats = tuple(seats)
        self._fuse = fuse
        self._max_in_flight = max_in_flight
        units = [unit for stage in self._stages for unit in stage.units]
        self._last = units[-1].index
        self._descends = units[-1].descends
        # As many batches rise as there are calls there and back. Between processes they go one by
        # one: JAX's sockets (0.10) may come to a stop where arrays cross in both directions.
        self._whole = all(seat.whole for seat in seats)
        self._rising = 2 * len(self._stages) if self._whole else 1

    def __call__(
        self, states: Sequence[Any], data: Iterable[Mapping] | Mapping, num_classes: int
    ) -> dict[str, float]:
        """Evaluates all batches; see `jdecouple.Trainer.evaluate`."""
        states = tuple(
            state and {"params": state["params"], "stats": state["stats"]} for state in states
        )
        sums: tuple = (None,) * (len(self._stages) + 1)  # the last of what came down
        rising: collections.deque = collections.deque()
        flying: collections.deque = collections.deque()
        count = size = 0
        replicas = math.lcm(*(len(seat.devices) for seat in self._seats))
        for batch in [data] if isinstance(data, Mapping) else data:
            check_batch(batch, num_classes)
            check_like(batch, self._example, any_size=True)
            examples = len(batch["label"])
            count += examples
            size = max(size, -(-examples // replicas) * replicas)
            sums, passed = self._ascend(states, _pad(batch, size), sums)
            rising.append(passed)
            if len(rising) == self._rising:
                sums = self._answer(states, rising.popleft(), sums)
            flying.append(sums)
            if len(flying) > self._max_in_flight:
                jax.block_until_ready(flying.popleft())
        while rising:
            sums = self._answer(states, rising.popleft(), sums)
        if not count:
            raise ValueError("the data to evaluate on holds no examples")
        own = {name: float(total) for each in sums if each for name, total in each.items()}
        if not self._whole:
            own = gather(own, self._names)
        means = {name: total / count for name, total in own.items()}
        last = max(int(name.split("/")[0].removeprefix("exit_")) for name in means)
        final = {each: means[f"exit_{last}/{each}"] for each in ("loss", "accuracy")}
        return {**final, **means}

    def _ascend(self, states: tuple, batch: Message, sums: tuple) -> tuple[tuple, Passed]:
        """Takes a batch up through all stages; all the way, where they are fused."""
        seats, totals = self._seats, list(sums)
        message = seats[0].place(batch) if seats[0].mine else None
        if self._fuse:
            return self._fused(states, message, sums), Passed(None, None, None)
        shapes = self._shapes(batch)
        first = message and {name: message[name] for name in ("label", "weight")}
        for k, seat in enumerate(seats):
            if k:
                message = transfer(message, shapes.messages[k], seats[k - 1], seat)
            if seat.mine:
                message, totals[k] = self._calls[k](states[k], message, sums[k])
        return tuple(totals), Passed(message, first, shapes)

    def _answer(self, states: tuple, passed: Passed, sums: tuple) -> tuple:
        """Takes what became of a batch down through all stages, where heads descend."""
        if self._fuse or not self._descends:
            return sums
        seats, target, total = self._seats, passed.target, None
        for k in reversed(range(len(seats))):
            seat = seats[k]
            if k + 1 < len(seats):
                target = transfer(target, passed.shapes.targets[k], seats[k + 1], seat)
            if seat.mine and (k == 0 or k + 1 < len(seats)):
                labels = (passed.first, sums[-1]) if k == 0 else (None, None)
                target, total = self._answers[k](states[k], target, *labels)
            if not self._whole:
                jax.block_until_ready((target, total))
        return (*sums[:-1], total)

    @cached_property
    def _calls(self) -> list[Any]:
        return self._compiled(evaluate_stage)

    @cached_property
    def _answers(self) -> list[Any]:
        return self._compiled(functools.partial(answer_stage, last=self._last))

    def _compiled(self, function: Any) -> list[Any]:
        """Jits a function for every stage; cuts what it hands on, and its sums are everywhere."""

        def compiled(stage: Stage, seat: Seat) -> Any:
            def call(*arguments):
                handed, sums = function(stage, *arguments)
                constrain = jax.lax.with_sharding_constraint
                handed = jax.tree.map(lambda x: constrain(x, seat.sharding(x)), handed)
                return handed, constrain(sums, seat.replicated)

            return jax.jit(call, compiler_options=compiler_options(seat))

        return [
            compiled(stage, seat) for stage, seat in zip(self._stages, self._seats, strict=True)
        ]

    @cached_property
    def _fused(self) -> Any:
        def whole(states, message, sums):
            first, totals = message, []
            for stage, state, each in zip(self._stages, states, sums[:-1], strict=True):
                message, total = evaluate_stage(stage, state, message, each)
                totals.append(total)
            answered = sums[-1]
            if self._descends:
                for stage, state in reversed(list(zip(self._stages, states, strict=True))):
                    message, answered = answer_stage(
                        stage, state, message, first, sums[-1], self._last
                    )
            return (*totals, answered)

        seat = self._seats[0]
        options = compiler_options(seat)
        return jax.jit(whole, out_shardings=seat.replicated, compiler_options=options)

    @cached_property
    def _names(self) -> list[str]:
        label = self._example["label"]
        weight = jax.ShapeDtypeStruct(label.shape, jnp.float32)
        return self._trace({**self._example, "weight": weight}).names

    def _shapes(self, batch: Message) -> Shapes:
        """What the stages receive; needed where it comes from afar."""
        if self._whole:
            nothing = [None] * len(self._seats)
            return Shapes(nothing, nothing, [])
        size = batch["label"].shape[0]
        if size not in self._known:
            self._known[size] = self._trace(abstract(batch))
        return self._known[size]

    def _trace(self, message: Any) -> Shapes:
        first, found = message, Shapes([], [], [])
        for stage in self._stages:
            found.messages.append(message)
            message, sums = jax.eval_shape(
                functools.partial(evaluate_stage, stage, sums=None),
                jax.eval_shape(stage.initial),
                message,
            )
            found.names.extend(sums)
        if self._descends:
            for stage in reversed(self._stages):
                found.targets.insert(0, message)
                answer = functools.partial(answer_stage, stage, sums=None, last=self._last)
                message, sums = jax.eval_shape(
                    answer, jax.eval_shape(stage.initial), message, first
                )
                found.names.extend(sums or ())
        return found


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
