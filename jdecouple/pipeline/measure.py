"""Costs of a trainer's compiled calls, measured one after another, for the simulator."""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax

from jdecouple.schedules import Costs, Kind

if TYPE_CHECKING:
    from jdecouple.trainer import PlacedBatch, State, Trainer


def measured_costs(
    trainer: Trainer,
    state: State,
    batches: Iterable[Mapping[str, Any] | PlacedBatch],
    repeats: int = 10,
) -> tuple[State, Costs]:
    """Trains on some batches, waiting for every compiled call, and takes each one's median time.

    The calls run one after another, so none disturbs another. One batch more than `repeats` is
    trained on: the first compiles, and does not count.

    Args:
        trainer: with its stages apart (`fuse=False`) and all in this process.
        state: its state; donated.
        batches: batches as for `Trainer.step`; begun again when they end.
        repeats: batches that count, at least 1.

    Returns:
        The state after the batches, and costs with the seconds of every call of the trainer's
        schedule and the bytes of its messages. The link is free: `dataclasses.replace` gives the
        costs a bandwidth and a latency.

    Raises:
        ValueError: fewer than 1 repeat, no batches, or a trainer that `Trainer.measure` refuses.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}: at least 1 is needed")
    seconds: defaultdict[tuple[int, tuple[Kind, ...]], list[float]] = defaultdict(list)
    trained = -1
    for trained, batch in enumerate(itertools.islice(itertools.cycle(batches), repeats + 1)):
        state, found = trainer.measure(state, batch)
        for call, time in found if trained else ():
            seconds[call.stage, call.kinds].append(time)
    if trained < 0:
        raise ValueError("batches is empty: at least one batch is needed")
    received = [stage.message for stage in trainer.stages[1:]]
    costs = Costs(
        calls={key: statistics.median(times) for key, times in seconds.items()},
        message_bytes=[_bytes(message) for message in received],
        error_bytes=[_bytes(message["x"]) for message in received],
    )
    return state, costs


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
