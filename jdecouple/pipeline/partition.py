"""Splits blocks over stages so that the slowest stage is as fast as possible."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax


def balance(
    costs: Sequence[float], num_stages: int, replicas: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Cuts a row of costs into consecutive parts with the smallest possible maximum.

    Args:
        costs: cost of every block, in any unit.
        num_stages: K, between 1 and the number of blocks.
        replicas: devices of each stage, which share its cost; by default one.

    Returns:
        Index of the first block of each stage, beginning with 0.

    Raises:
        ValueError: K out of range.
    """
    check_num_stages(num_stages, len(costs))
    speeds = [1] * num_stages if replicas is None else list(replicas)
    # best[i] = (maximum, starts) of blocks i.. over the stages counted so far, from the last.
    best: list[Any] = [(sum(costs[i:]) / speeds[-1], (i,)) for i in range(len(costs))]
    for speed in reversed(speeds[:-1]):
        best = [
            min(
                (
                    (max(sum(costs[i:j]) / speed, best[j][0]), (i, *best[j][1]))
                    for j in range(i + 1, len(costs))
                    if best[j] is not None
                ),
                default=None,
            )
            for i in range(len(costs))
        ]
    return best[0][1]


def check_num_stages(num_stages: int, num_blocks: int) -> None:
    """Raises ValueError unless every stage can have a block."""
    if not 1 <= num_stages <= num_blocks:
        raise ValueError(
            f"num_stages is {num_stages}: between 1 and the model's {num_blocks} blocks is allowed"
        )


def check_boundaries(boundaries: Sequence[int], num_stages: int, num_blocks: int) -> tuple:
    """Validates block indices at which stages begin; a missing leading 0 is added.

    Raises:
        ValueError: not increasing, out of range, or another number than K.
    """
    starts = tuple(boundaries)
    if not starts or starts[0] != 0:
        starts = (0, *starts)
    ordered = all(a < b for a, b in itertools.pairwise(starts))
    if not ordered or starts[-1] >= num_blocks or len(starts) != num_stages:
        raise ValueError(
            f"boundaries {tuple(boundaries)} do not cut {num_blocks} blocks into {num_stages} "
            f"stages: give {num_stages - 1} increasing block indices between 1 and {num_blocks - 1}"
        )
    return starts


def program_cost(function: Any, *arguments: Any) -> float:
    """Cost of a function by XLA's analysis of its program: floating-point operations.

    Args:
        function: a pure function of array trees.
        *arguments: arrays or `jax.ShapeDtypeStruct`s.
    """
    lowered = jax.jit(function).lower(*arguments)
    cost = lowered.cost_analysis() or lowered.compile().cost_analysis() or {}
    return float(cost.get("flops", 0.0))
