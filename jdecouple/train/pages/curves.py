"""The metrics of a run as charts: whatever `metrics.jsonl` holds."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jdecouple.train.metrics import SPLITS, Line
from jdecouple.train.pages import charts
from jdecouple.train.pages.page import Fold, Grid, Piece, Section, Text

# What a reader looks for first, in this order: a metric of each block or exit, and of a run.
_FIRST_OF_PARTS = ("loss", "bits_per_byte", "accuracy", "gradient_norm")
_FIRST_OF_RUN = ("learning_rate", "gradient_norm", "examples_per_second", "input_wait")
_LAST = len(_FIRST_OF_PARTS) + len(_FIRST_OF_RUN)
_TITLES = {
    "examples_per_second": "Throughput in training: examples a second",
    "input_wait": "Share of the time that training waits for input",
}
_FRACTIONS = ("accuracy", "input_wait")
_PART = re.compile(r"(block|exit)_(\d{1,6})/(.+)")


class _Metric(NamedTuple):
    """A metric of every block or exit (`part`), or of the run (""), on a split."""

    split: str
    part: str
    name: str

    @property
    def title(self) -> str:
        """What a chart of it is called."""
        said = self.name.replace("_", " ").replace("/", ", ")
        if not self.part:
            return _TITLES.get(self.name, f"{said.capitalize()}, {_of(self.split)}")
        return f"{said.capitalize()} of each {self.part}, {_of(self.split)}"

    @property
    def rank(self) -> int:
        """Its place among what is looked for first; `_LAST` behind."""
        first = _FIRST_OF_PARTS if self.part else _FIRST_OF_RUN
        behind = 0 if self.part else len(_FIRST_OF_PARTS)
        return first.index(self.name) + behind if self.name in first else _LAST


def section(lines: Sequence[Line]) -> Section:
    """Charts of all metrics; those that few look for are folded."""
    metrics = _gathered(lines)
    first = sorted((m for m in metrics if m.rank < _LAST), key=lambda m: m.rank)
    rest = [m for m in metrics if m.rank == _LAST and not _is_repeated(m, metrics)]
    pieces: list[Piece] = []
    if first:
        pieces.append(Grid([_chart(metric, metrics[metric]) for metric in first]))
    if rest:
        grid = Grid([_chart(metric, metrics[metric]) for metric in rest])
        pieces.append(Fold(f"Further metrics ({len(rest)})", [grid]))
    return Section("Curves", pieces or [Text("There are no metrics yet.")])


def _gathered(lines: Sequence[Line]) -> dict[_Metric, dict[int, tuple[list[float], list[float]]]]:
    """Steps and values of every metric by the number of its block or exit, 0 of a run."""
    found: dict[_Metric, dict[int, tuple[list[float], list[float]]]] = {}
    for line in sorted(lines, key=lambda line: SPLITS.index(line["split"])):
        for key, value in line.items():
            if key in ("step", "split"):
                continue
            match = _PART.fullmatch(key)
            part, number, name = match.groups() if match else ("", 0, key)
            metric = _Metric(line["split"], part, name)
            steps, values = found.setdefault(metric, {}).setdefault(int(number), ([], []))
            steps.append(line["step"])
            values.append(math.nan if value is None else value)
    return found


def _chart(metric: _Metric, series: Mapping[int, tuple[list[float], list[float]]]) -> charts.Chart:
    colours = charts.depths(len(series)) if metric.part else charts.categories(1)
    curves = [
        charts.Curve(f"{metric.part} {i}" if metric.part else metric.title, *series[i], colour)
        for i, colour in zip(sorted(series), colours, strict=True)
    ]
    percent = metric.name in _FRACTIONS
    return charts.Chart(metric.title, curves, percent=percent, points=metric.split != "train")


def _is_repeated(metric: _Metric, metrics: Mapping[_Metric, object]) -> bool:
    """Whether a metric of the run is that of its last exit or block."""
    parts = ("block",) if metric.split == "train" else ("exit",)
    known = any(_Metric(metric.split, part, metric.name) in metrics for part in parts)
    repeated = ("accuracy", "bits_per_byte", "perplexity")
    return not metric.part and metric.name in repeated and known


def _of(split: str) -> str:
    return "in training" if split == "train" else f"on the {split} split"
