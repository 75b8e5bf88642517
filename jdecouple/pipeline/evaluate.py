"""Evaluation of every exit: the logits that `Predictor` gives, added up where they lie."""

import collections
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jdecouple.methods.routes import Carry
from jdecouple.pipeline.batch import LabelCheck, as_arrays, check_like, each_batch
from jdecouple.pipeline.distributed import gather
from jdecouple.pipeline.mesh import StageDevices, jit
from jdecouple.pipeline.predict import Predictor, States

METRICS = ("accuracy", "loss")
_SUMS = (*METRICS, "count")


def exit_sums(logits: jax.Array, labels: Carry) -> jax.Array:
    """Weighted numbers of hits, summed cross-entropy and number of labels of an exit, in float32.

    Of the labels of positions, `[batch, length]`, those below 0 do not count.
    """
    label, weight = labels["label"], labels["weight"]
    if label.ndim > 1:
        weight, label = weight[:, None] * (label >= 0), jnp.maximum(label, 0)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    hits = jnp.argmax(logits, axis=-1) == label
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    sums = [
        jnp.sum(values * weight, dtype=jnp.float32)
        for values in (hits, losses, jnp.ones_like(losses))
    ]
    return jnp.stack(sums)


class Evaluator:
    """Adds up what the exits of a predictor answer."""

    def __init__(self, predictor: Predictor):
        self._predictor = predictor

    def __call__(
        self, states: States, data: Iterable[Mapping] | Mapping, num_classes: int
    ) -> dict[str, float]:
        """Evaluates all batches; see `jdecouple.Trainer.evaluate`."""
        predictor, check_labels = self._predictor, LabelCheck(num_classes)
        sums: dict[int, jax.Array] = {}
        in_flight: collections.deque[list[jax.Array]] = collections.deque()
        empty = True
        for answer in predictor.forward(states, self._labelled(data, check_labels)):
            empty = False
            for exit in answer.exits:
                if exit.block not in sums:
                    nothing = np.zeros(len(_SUMS), np.float32)
                    sums[exit.block] = exit.placement.place(nothing, exit.placement.replicated)
                add = _adder(exit.placement)
                sums[exit.block] = add(sums[exit.block], exit.logits, exit.labels)
            in_flight.append([*sums.values()])
            if len(in_flight) > predictor.max_in_flight:
                jax.block_until_ready(in_flight.popleft())
        if empty:
            raise ValueError("the data to evaluate on holds no examples")
        check_labels.look(wait=True)
        own = {
            f"exit_{index}/{metric}": float(total)
            for index, totals in sums.items()
            for metric, total in zip(_SUMS, np.asarray(totals), strict=True)
        }
        if not predictor.one_process:
            own = gather(own, [f"exit_{i}/{metric}" for i in predictor.exits for metric in _SUMS])
        counts = {_exit(name): own.pop(name) for name in [*own] if name.endswith("/count")}
        if not all(counts.values()):
            raise ValueError("the data to evaluate on holds no labels")
        means = {name: total / counts[_exit(name)] for name, total in own.items()}
        last = max(counts)
        final = {metric: means[f"exit_{last}/{metric}"] for metric in ("loss", "accuracy")}
        return {**final, **means}

    def _labelled(
        self, data: Iterable[Mapping] | Mapping, check_labels: LabelCheck
    ) -> Iterator[Carry]:
        for given in each_batch(data):
            batch = as_arrays(given)
            if self._predictor.example is not None:
                check_like(batch, self._predictor.example, any_size=True)
            check_labels(batch["label"])
            yield batch


def _exit(name: str) -> int:
    """The block of "exit_3/loss"."""
    return int(name.partition("/")[0].removeprefix("exit_"))


@functools.cache
def _adder(placement: StageDevices) -> Callable[..., Any]:
    def add(total: jax.Array, logits: jax.Array, labels: Carry) -> jax.Array:
        total = total + exit_sums(logits, labels)
        return jax.lax.with_sharding_constraint(total, placement.replicated)

    return jit(add, placement)
