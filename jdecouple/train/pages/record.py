"""What a workdir holds of its run, as far as it can be read."""

import dataclasses
import datetime
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jdecouple._errors import first_line
from jdecouple._files import any_folder, resolved, written_at
from jdecouple.checkpoint import Checkpointer
from jdecouple.train import config as configuration
from jdecouple.train import report
from jdecouple.train.early_stopping import EarlyStopping
from jdecouple.train.errors import ConfigError
from jdecouple.train.metrics import FILE_NAME, Line, read_metrics
from jdecouple.train.pages.times import Seconds
from jdecouple.train.rules import MOST

CONFIG_NAME = "config.json"
_KINDS: dict[str, Any] = {
    "total_steps": int,
    "parameters": int,
    "boundaries": list,
    "devices": list,
    "history": list,
    "device_kind": str,
    "versions": dict,
}
"""Of what type is what `config.json` holds beside the configuration."""


@dataclasses.dataclass(frozen=True)
class Record:
    """A run, by the files of its workdir.

    Attributes:
        folder: the workdir.
        content: that of `config.json`, without what is damaged; {} where it cannot be read.
        config: the complete configuration; None where this program does not know one like it.
        lines: those of `metrics.jsonl`.
        extra: what the last sound checkpoint says beside its arrays; {} without one.
        steps: of the sound checkpoints.
        best_step: that of the highest validation accuracy; None where none has been validated.
        notes: what could not be read, and why.
    """

    folder: Path
    content: Mapping[str, Any]
    config: ConfigDict | None
    lines: list[Line]
    extra: Mapping[str, Any]
    steps: tuple[int, ...]
    best_step: int | None
    notes: tuple[str, ...]

    def name(self, section: str) -> str:
        """What the run's method, model or data set is called."""
        given = self.content.get("config", {})
        found = given.get(section, {}) if isinstance(given, Mapping) else {}
        return str(found.get("name", "unknown") if isinstance(found, Mapping) else "unknown")

    @property
    def title(self) -> str:
        """Method, model and data set; the workdir's name where they are not known."""
        if not self.content:
            return resolved(self.folder).name
        return f"{self.name('method')} on {self.name('model')} on {self.name('data')}"

    @property
    def step(self) -> int:
        """The last step that is known of."""
        return max([0, *self.steps, *(line["step"] for line in self.lines)])

    @property
    def total_steps(self) -> int | None:
        """Length of the run; None where `config.json` does not say."""
        return self.content.get("total_steps")

    @property
    def batch_size(self) -> float:
        """Examples of a step, which do not change in a run; NaN where they are damaged."""
        default = configuration.default().batch_size
        size = self.content.get("config", {}).get("batch_size", default)
        return size if type(size) is int and 0 < size <= MOST else math.nan

    @property
    def stopped_early(self) -> str | None:
        """Why early stopping has ended the run; None where it has not."""
        values = self.extra.get("early_stopping")
        if self.config is None or not values:
            return None
        return EarlyStopping(self.config.early_stopping, values).reason

    @property
    def finished(self) -> bool:
        """Whether nothing is left to train or to evaluate."""
        tests = (line["step"] for line in self.lines if line["split"] == "test")
        last = max(self.steps or tests, default=0)  # checkpoints may have been cleared away
        ended = last == self.total_steps or self.stopped_early is not None
        return ended and not self.extra.get("evaluate")

    @property
    def lost(self) -> int:
        """Lines that `metrics.jsonl` no longer holds."""
        return max(0, self.extra.get("rows", 0) - len(self.lines))

    @property
    def seconds(self) -> float | None:
        """About how long was trained, see `times.Seconds`; None where lines do not say."""
        seconds = Seconds(self.lines, self.batch_size)(self.step)
        return seconds if 0 < seconds < math.inf else None

    @property
    def written(self) -> datetime.datetime | None:
        """When the metrics were last written, in UTC."""
        for name in (FILE_NAME, CONFIG_NAME):
            if (path := self.folder / name).is_file():
                return datetime.datetime.fromtimestamp(written_at(path), datetime.UTC)
        return None

    def summary(self) -> dict[str, Any]:
        """As `report.summary`, of the steps so far where the run has not finished.

        Raises:
            ValueError: there is no test to sum up.
        """
        tested = {line["step"] for line in self.lines if line["split"] == "test"}
        # A run may be between its validation and its test.
        lines = [x for x in self.lines if x["split"] != "validation" or x["step"] in tested]
        step = max(self.steps, default=None) if self.finished else None
        return report.summary(lines, step, len(lines) + 1 if self.lost else 0)


def read(workdir: str | os.PathLike[str]) -> Record:
    """Reads what a workdir holds; a part that is damaged becomes a note.

    Raises:
        ValueError: it is no workdir, in one line.
    """
    folder = any_folder(workdir)
    if not any((folder / name).is_file() for name in (CONFIG_NAME, FILE_NAME)):
        raise ConfigError(
            f"there is no run in '{folder}': it has neither {CONFIG_NAME} nor {FILE_NAME}"
        )
    notes: list[str] = []
    content = _content(folder, notes)
    lines = _lines(folder, notes)
    extra, steps, best_step = _checkpoints(folder, notes)
    config = None
    if content:
        try:
            config = configuration.filled(content["config"])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            notes.append(f"The configuration is shown as it was written: {first_line(error)}.")
    return Record(folder, content, config, lines, extra, steps, best_step, tuple(notes))


def _content(folder: Path, notes: list[str]) -> Mapping[str, Any]:
    try:
        content = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        if isinstance(content, dict) and isinstance(content.get("config"), dict):
            damaged = [name for name in _KINDS.keys() & content if not _is_sound(name, content)]
            if damaged:
                listed = ", ".join(sorted(damaged))
                notes.append(f"What {CONFIG_NAME} says of {listed} is damaged and left out.")
            return {name: value for name, value in content.items() if name not in damaged}
        reason = "it holds no configuration"
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
    notes.append(f"{CONFIG_NAME} cannot be read: {reason}.")
    return {}


def _is_sound(name: str, content: Mapping[str, Any]) -> bool:
    if type(value := content[name]) is not _KINDS[name]:
        return False
    if name == "history":
        known = all(isinstance(x, dict) and {"step", "key", "old", "new"} <= {*x} for x in value)
        return known and all(type(x["step"]) is int and type(x["key"]) is str for x in value)
    return not isinstance(value, int) or 0 < value < 2**63


def _lines(folder: Path, notes: list[str]) -> list[Line]:
    try:
        lines = [line for line in read_metrics(folder) if _is_possible(line)]
        written = (folder / FILE_NAME).read_bytes() if (folder / FILE_NAME).exists() else b""
    except OSError as error:
        notes.append(f"{FILE_NAME} cannot be read: {error.strerror}.")
        return []
    if left_out := sum(1 for raw in written.splitlines() if raw.strip()) - len(lines):
        notes.append(f"{left_out} damaged or half-written line(s) of {FILE_NAME} are left out.")
    return lines


def _is_possible(line: Line) -> bool:
    """Whether a run can have written a line: its step is one, and results are fractions."""
    results = [line.get("accuracy"), *report.exits(line).values()]
    fractions = line["split"] == "train" or all(x is None or 0 <= x <= 1 for x in results)
    return fractions and 0 <= line["step"] <= MOST


def _checkpoints(
    folder: Path, notes: list[str]
) -> tuple[Mapping[str, Any], tuple[int, ...], int | None]:
    """What the last one says, the steps of all, and the best by validation."""
    try:
        checkpoints = Checkpointer(folder / "checkpoints", read_only=True)
        extras, best_step = checkpoints.extras(), checkpoints.best_step
    except (OSError, ValueError) as error:
        notes.append(f"The checkpoints cannot be read: {first_line(error)}.")
        return {}, (), None
    steps = tuple(sorted(extras))
    return (extras[steps[-1]] if steps else {}), steps, best_step
