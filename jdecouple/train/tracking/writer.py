"""The protocol of what writes metrics somewhere, and what it begins with."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

from ml_collections import ConfigDict


class TrackingError(RuntimeError):
    """A writer of the user's own has raised an exception, which is the cause; one line."""


@dataclasses.dataclass(frozen=True)
class Start:
    """What a writer begins with.

    Attributes:
        config: the complete configuration.
        workdir: folder of the run.
        step: the step that the run goes on from; None where it is new.
        lines: what metrics.jsonl holds until then, as `jdecouple.train.metrics.read_metrics` says.
    """

    config: ConfigDict
    workdir: Path
    step: int | None
    lines: Sequence[Mapping[str, Any]]

    def written(self) -> Iterator[tuple[int, str, dict[str, Any]]]:
        """Yields what `Writer.write` takes, of the lines that are there."""
        for line in self.lines:
            values = {name: x for name, x in line.items() if name not in ("step", "split")}
            yield line["step"], line["split"], values


@runtime_checkable
class Writer(Protocol):
    """Takes the metrics of a run, a line of metrics.jsonl at a time.

    Only the first of several processes has writers.
    """

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Takes in a line.

        Args:
            step: steps that are trained.
            split: "train", "validation" or "test".
            values: metrics by name; some may not be finite.
        """

    def close(self) -> None:
        """Ends the writing, also where the run ends by an error."""


Callback: TypeAlias = Writer | Callable[[int, str, Mapping[str, float]], object]
"""A writer, or a function that is one's `write`."""


def finite(values: Mapping[str, float | None]) -> dict[str, float]:
    """The values that are finite numbers.

    >>> finite({"loss": 0.5, "block_0/variance": float("nan"), "block_1/variance": None})
    {'loss': 0.5}
    """
    return {k: float(v) for k, v in values.items() if v is not None and math.isfinite(v)}
