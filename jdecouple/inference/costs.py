"""What an answer costs at every exit."""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jdecouple._errors import require_int
from jdecouple.methods.routes import Carry, Unit
from jdecouple.pipeline.build import abstract, flops


def flops_by_exit(units: Sequence[Unit], carries: Sequence[Carry]) -> np.ndarray:
    """Floating-point operations of an example up to every exit, by XLA's analysis.

    They are those of the evaluation forward of all blocks up to the exit and of all exits there,
    since a rule reads each. An answer that comes down from the last block has its way down too.

    Args:
        units: Every block with its head.
        carries: Shapes of the carry that each block receives, as `BuiltModel` has them; of what it
            reads at least, such as "x", `[batch, ...]`.

    Returns:
        Operations `[exits]`, never falling.
    """
    costs, total, features = [], 0.0, None
    for unit, carry in zip(units, carries, strict=True):
        read = {name: carry[name] for name in unit.entries}
        arguments = (*abstract(unit.initial()), read)
        total += flops(unit.evaluate, *arguments)
        features, logits = jax.eval_shape(unit.evaluate, *arguments)
        if logits is not None:
            costs.append(total)
    if units[-1].descends:
        ways = [(units[-1], Unit.turn), *((u, Unit.descend) for u in reversed(units) if u.descends)]
        for unit, way in ways:
            step = functools.partial(way, unit)
            arguments = (*abstract(unit.initial()), features)
            total += flops(step, *arguments)
            features = jax.eval_shape(step, *arguments)
        costs.append(total)
    return np.array(costs) / jax.tree.leaves(carries[0]["x"])[0].shape[0]


def seconds_by_exit(
    answer: Callable[[int], Any], exits: int, examples: int, *, runs: int = 7
) -> np.ndarray:
    """Seconds an example up to every exit, measured.

    Every exit answers once unmeasured, which compiles; then all take turns. The figure of an exit
    is its median, or that of an exit before it where that is larger: no exit costs less than the
    one before, and a difference below the noise of the clock is none.

    Args:
        answer: Takes the same examples up to an exit, given its number, and returns its arrays.
        exits: Number of exits.
        examples: Number of examples in a call.
        runs: Number of measured calls of each exit.

    Returns:
        Seconds `[exits]`, never falling.

    Raises:
        ValueError: A number is not allowed.
    """
    require_int(1, exits=exits, examples=examples, runs=runs)
    times: list[list[float]] = [[] for _ in range(exits)]
    for turn in range(runs + 1):
        for exit in range(exits):
            start = time.perf_counter()
            jax.block_until_ready(answer(exit))
            if turn:
                times[exit].append(time.perf_counter() - start)
    medians = [statistics.median(measured) for measured in times]
    return np.maximum.accumulate(medians) / examples
