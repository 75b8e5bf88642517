"""When a run cannot go on, and when it has left its range: which checkpoints may be spoilt."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jdecouple.methods.routes import loss_scale

# The rows of metrics that make the first range.
LEAST = 20
# How far above the range rows must be, in widths of it and added up while each is above.
FAR = 20.0
# How much larger the largest weight may be than at any checkpoint before, or than 1.
GROWTH = 100.0
# The share of a row in the level of the losses, and of the way back to it that must be gone.
_RATE, _BACK = 1 / 20, 0.9


def left_out(row: Mapping[str, Any]) -> list[str]:
    """Whose steps were left out for a scaled loss that overflowed: "" of all, or "block_0/", ..."""
    owners = [name.removesuffix("loss_scale") for name in row if name.endswith("loss_scale")]
    return [owner for owner in owners if row.get(owner + "skipped") == 1]


def fault(row: Mapping[str, Any]) -> str | None:
    """What in the metrics of a step is not finite, and a smaller scale of the loss cannot mend."""
    skipped = left_out(row)
    for owner in skipped:
        if row[owner + "loss_scale"] <= loss_scale.LEAST:
            whose = owner.rstrip("/") or "the model"
            return f"gradients of {whose} are not finite, with the least loss scale,"
    losses = [name for name, value in row.items() if name.endswith("/loss") and not _finite(value)]
    blocks = [name.removesuffix("loss") for name in losses]
    if _finite(row["loss"]) or "" in skipped or (blocks and {*blocks} <= {*skipped}):
        return None
    block = blocks[0].rstrip("/") if blocks else "the model"
    return f"the loss of {block} is {row['loss']}"


def _finite(value: Any) -> bool:
    return math.isfinite(value)


class Range:
    """The range of a run's losses and weights, and from which step on states are suspect.

    The range of the losses is that of all rows so far, at least as wide as its upper end is far
    from 0. A row above it counts by how many widths; once rows in succession come to 20, all states
    since before the first of them are suspect. The upper end rises with each, so that one outlier
    or a start that is not smooth does not; a loss that triples with every step takes ten.
    Suspicion ends when the level, a running mean over about 20 rows in which none counts for more
    than the upper end, has come back by nine tenths to what it was. The first 20 rows only make
    the range.

    A state is suspect, too, whose largest weight is 100 times that of the initial state and all
    checkpoints before, and above 100: its loss may be infinite at once.

    Args:
        latency: by how many steps metrics are late, and a weight may have been spoilt before.
        values: `values` of the range that a checkpoint holds; None for a new run.

    Attributes:
        values: all that it knows, as JSON.
    """

    def __init__(self, latency: int, values: dict[str, Any] | None = None):
        self._latency = latency
        self.values: dict[str, Any] = values or {
            "rows": 0,
            "low": 0.0,
            "high": 0.0,
            "level": 0.0,
            "weight": None,
            "above": 0.0,
            "first": None,
            "usual": 0.0,
            "suspect": None,
        }

    @property
    def suspect(self) -> int | None:
        """The first step whose state is suspect; None where none is."""
        return self.values["suspect"]

    def add(self, step: int, loss: float) -> str | None:
        """Takes in the finite loss of a step; returns what to say where suspicion begins."""
        of = self.values
        of["rows"] += 1
        if of["rows"] == 1:
            of |= {"low": loss, "high": loss, "level": loss}
        before, width = of["high"], max(of["high"] - of["low"], abs(of["high"]))
        of["level"] += _RATE * (min(loss, before) - of["level"])
        if of["suspect"] is not None:
            back = of["level"] - of["usual"] <= (1 - _BACK) * (before - of["usual"])
            if back and loss <= before:
                of |= {"suspect": None, "weight": None}
            return None
        of["low"] = min(of["low"], loss)
        if of["rows"] <= LEAST or loss <= before:
            of |= {"above": 0.0, "high": max(before, loss)}
            return None
        if of["above"] == 0:
            of |= {"first": step, "usual": of["level"]}
        of["above"] += (loss - before) / width if width else 0.0
        if of["above"] < FAR:
            of["high"] = loss
            return None
        # The loss of a step is that of the state before it.
        self._begin(of["first"] - 1 - self._latency)
        return f"the loss of step {step} is {loss:.3g}, far above the run's own range"

    def weigh(self, step: int, largest: float) -> str | None:
        """Takes in the largest weight of a state; returns what to say as `add` does."""
        before = self.values["weight"]
        if self.suspect is not None:
            return None
        if before is not None and largest > GROWTH * max(before, 1.0):
            self.values["usual"] = self.values["level"]
            self._begin(step)
            return f"the largest weight after step {step} is {largest:.3g}, it was {before:.3g}"
        self.values["weight"] = max(before or 0.0, largest)
        return None

    def _begin(self, step: int) -> None:
        self.values |= {"suspect": max(step, 0), "level": self.values["high"], "above": 0.0}


def not_finite(blocks: Iterable[tuple[str, np.ndarray]], *, but: str | None = None) -> str | None:
    """The first array, of names and elements, that is not finite; names may begin with `but`."""
    for name, block in blocks:
        if but is not None and name.startswith(but):
            continue
        if np.issubdtype(block.dtype, np.floating) and not np.isfinite(block).all():
            return name
    return None


def weights_of(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of arrays by their names in a checkpoint."""
    return {name: x for name, x in arrays.items() if _is_weight(name)}


def largest_weight(blocks: Iterable[tuple[str, np.ndarray]]) -> float:
    """The largest weight, without its sign, of the names and elements of arrays."""
    weights = (x for name, x in blocks if _is_weight(name) and x.size)
    return max((max(float(x.max()), -float(x.min())) for x in weights), default=0.0)


def _is_weight(name: str) -> bool:
    return name.split("/")[1] == "params"
