"""When a run has trained enough: its validation accuracy no longer improves."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict


class EarlyStopping:
    """Counts evaluations that do not improve on the best one.

    >>> config = ConfigDict({"patience": 2, "min_delta": 0.0})
    >>> stopping = EarlyStopping(config)
    >>> for step, accuracy in ((10, 0.5), (20, 0.6), (30, 0.6), (40, 0.4)):
    ...     stopping.add(step, accuracy)
    >>> stopping.reason
    'none of the last 2 evaluations is above the validation accuracy of step 20, 60.00%'

    Args:
        section: `early_stopping` of a configuration. Without a `patience` nothing is counted.
        values: `values` that a checkpoint holds; None for a new run.

    Attributes:
        values: all that it knows, as JSON: accuracy and step of the best, and the count since.
    """

    def __init__(self, section: ConfigDict, values: Mapping[str, Any] | None = None):
        self._patience, self._least = section.patience, section.min_delta
        self.values: dict[str, Any] = dict(values or {"best": None, "step": None, "count": 0})

    def add(self, step: int, accuracy: float) -> None:
        """Takes in the validation accuracy of a step."""
        best = self.values["best"]
        if best is None or accuracy > best + self._least:
            self.values = {"best": accuracy, "step": step, "count": 0}
        else:
            self.values = {**self.values, "count": self.values["count"] + 1}

    @property
    def reason(self) -> str | None:
        """Why the run has trained enough; None where it has not."""
        if self._patience is None or self.values["count"] < self._patience:
            return None
        count, best = self.values["count"], self.values["best"]
        none = (
            f"none of the last {count} evaluations is"
            if count > 1
            else "the last evaluation is not"
        )
        least = f", by more than {self._least:g}" if self._least else ""
        return (
            f"{none} above the validation accuracy of step {self.values['step']}, {best:.2%}{least}"
        )
