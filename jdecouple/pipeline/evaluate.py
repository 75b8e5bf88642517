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

from jdecouple.methods.routes import Carry, Stage, StageState
from jdecouple.pipeline.batch import check_batch, check_like
from jdecouple.pipeline.build import abstract
from jdecouple.pipeline.distributed import gather
from jdecouple.pipeline.mesh import StageDevices, compiler_options
from jdecouple.pipeline.transfer import transfer

Sums = dict[str, jax.Array]


class EvalShapes(NamedTuple):
    """What a batch of one size looks like on its way.

    Attributes:
        carries: shapes of the carry that every stage receives.
        targets: shapes of what every stage receives from above; of the last one, from itself.
        names: of all sums.
    """

    carries: list[Any]
    targets: list[Any]
    names: list[str]


class EvalInFlight(NamedTuple):
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
    stage: Stage, state: StageState, carry: Carry, sums: Sums | None
) -> tuple[Carry, Sums]:
    """Evaluation forward of one stage, as a pure function.

    Args:
        stage: the stage.
        state: its "params" and "stats"; not changed.
        carry: batch with "weight" [batch], 0 for padding.
        sums: sums over earlier batches.

    Returns:
        The carry for the next stage, from the last one what comes down, or None; the weighted
        number of hits and the summed cross-entropy of every exit of the stage.
    """
    carry = stage.prepare(carry, jnp.zeros(2, jnp.int32), False)
    found: Sums = {}
    for unit, params, stats in zip(stage.units, state["params"], state["stats"], strict=True):
        features, logits = unit.evaluate(params, stats, carry)
        carry = {**carry, "x": features}
        if logits is not None:
            found |= _scores(unit.index, logits, carry)
    handed: Any = carry
    if stage.is_last:
        handed = None
        if unit.descends:
            handed = _descend(stage, state, unit.turn(params, stats, features))
    return handed, found if sums is None else jax.tree.map(jnp.add, sums, found)


def answer_stage(
    stage: Stage, state: StageState, target: Any, carry: Carry, sums: Sums | None, last: int
) -> tuple[Any, Sums | None]:
    """Evaluation of one stage on the way down, as a pure function.

    Args:
        stage: the stage; the last one has been passed by `evaluate_stage`.
        state: its "params" and "stats"; not changed.
        target: what came down from the stage above.
        carry: "label" and "weight" of the batch, for the first stage.
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
    found = _scores(last, target, carry)
    return None, found if sums is None else jax.tree.map(jnp.add, sums, found)


def _descend(stage: Stage, state: StageState, target: Any) -> Any:
    units = list(zip(stage.units, state["params"], state["stats"], strict=True))
    for unit, params, stats in reversed(units):
        if unit.descends:
            target = unit.descend(params, stats, target)
    return target


def _scores(index: int, logits: jax.Array, carry: Carry) -> Sums:
    """Weighted hits and summed cross-entropy of an exit."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    hits = jnp.argmax(logits, axis=-1) == carry["label"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, carry["label"])
    return {
        f"exit_{index}/accuracy": jnp.sum(hits * carry["weight"]),
        f"exit_{index}/loss": jnp.sum(losses * carry["weight"], dtype=jnp.float32),
    }


class Evaluator:
    """Runs `evaluate_stage` over all stages and batches, then `answer_stage` where heads descend.

    Batches go up while earlier ones still come down.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        placements: Sequence[StageDevices],
        example: Carry,
        *,
        fuse: bool,
        max_in_flight: int,
    ):
        """Prepares the calls; an example gives the shapes of a batch."""
        self._example = example
        self._known: dict[int, EvalShapes] = {}
        self._stages = tuple(stages)
        self._placements = tuple(placements)
        self._fuse = fuse
        self._max_in_flight = max_in_flight
        units = [unit for stage in self._stages for unit in stage.units]
        self._last = units[-1].index
        self._descends = units[-1].descends
        # As many batches rise as there are calls there and back. Between processes they go one by
        # one: JAX's sockets (0.10) may come to a stop where arrays cross in both directions.
        self._whole = all(placement.fully_addressable for placement in placements)
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
        replicas = math.lcm(*(len(placement.devices) for placement in self._placements))
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

    def _ascend(self, states: tuple, batch: Carry, sums: tuple) -> tuple[tuple, EvalInFlight]:
        """Takes a batch up through all stages; all the way, where they are fused."""
        placements, totals = self._placements, list(sums)
        carry = placements[0].place(batch) if placements[0].addressable else None
        if self._fuse:
            return self._fused(states, carry, sums), EvalInFlight(None, None, None)
        shapes = self._shapes(batch)
        first = carry and {name: carry[name] for name in ("label", "weight")}
        for k, placement in enumerate(placements):
            if k:
                carry = transfer(carry, shapes.carries[k], placements[k - 1], placement)
            if placement.addressable:
                carry, totals[k] = self._calls[k](states[k], carry, sums[k])
        return tuple(totals), EvalInFlight(carry, first, shapes)

    def _answer(self, states: tuple, passed: EvalInFlight, sums: tuple) -> tuple:
        """Takes what became of a batch down through all stages, where heads descend."""
        if self._fuse or not self._descends:
            return sums
        placements, target, total = self._placements, passed.target, None
        for k in reversed(range(len(placements))):
            placement = placements[k]
            if k + 1 < len(placements):
                target = transfer(target, passed.shapes.targets[k], placements[k + 1], placement)
            if placement.addressable and (k == 0 or k + 1 < len(placements)):
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

        def compiled(stage: Stage, placement: StageDevices) -> Any:
            def call(*arguments):
                handed, sums = function(stage, *arguments)
                constrain = jax.lax.with_sharding_constraint
                handed = jax.tree.map(lambda x: constrain(x, placement.sharding(x)), handed)
                return handed, constrain(sums, placement.replicated)

            return jax.jit(call, compiler_options=compiler_options(placement))

        return [
            compiled(stage, placement)
            for stage, placement in zip(self._stages, self._placements, strict=True)
        ]

    @cached_property
    def _fused(self) -> Any:
        def whole(states, carry, sums):
            first, totals = carry, []
            for stage, state, each in zip(self._stages, states, sums[:-1], strict=True):
                carry, total = evaluate_stage(stage, state, carry, each)
                totals.append(total)
            answered = sums[-1]
            if self._descends:
                for stage, state in reversed(list(zip(self._stages, states, strict=True))):
                    carry, answered = answer_stage(stage, state, carry, first, sums[-1], self._last)
            return (*totals, answered)

        placement = self._placements[0]
        options = compiler_options(placement)
        return jax.jit(whole, out_shardings=placement.replicated, compiler_options=options)

    @cached_property
    def _names(self) -> list[str]:
        label = self._example["label"]
        weight = jax.ShapeDtypeStruct(label.shape, jnp.float32)
        return self._trace({**self._example, "weight": weight}).names

    def _shapes(self, batch: Carry) -> EvalShapes:
        """What the stages receive; needed where it comes from afar."""
        if self._whole:
            nothing = [None] * len(self._placements)
            return EvalShapes(nothing, nothing, [])
        size = batch["label"].shape[0]
        if size not in self._known:
            self._known[size] = self._trace(abstract(batch))
        return self._known[size]

    def _trace(self, carry: Any) -> EvalShapes:
        first, found = carry, EvalShapes([], [], [])
        for stage in self._stages:
            found.carries.append(carry)
            carry, sums = jax.eval_shape(
                functools.partial(evaluate_stage, stage, sums=None),
                jax.eval_shape(stage.initial),
                carry,
            )
            found.names.extend(sums)
        if self._descends:
            for stage in reversed(self._stages):
                found.targets.insert(0, carry)
                answer = functools.partial(answer_stage, stage, sums=None, last=self._last)
                carry, sums = jax.eval_shape(answer, jax.eval_shape(stage.initial), carry, first)
                found.names.extend(sums or ())
        return found


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
