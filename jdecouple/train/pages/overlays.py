"""The curves of several runs in common charts, by step, examples or seconds."""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

from jdecouple.train.pages.charts import DASHES, Chart, Curve, categories, most_points, thinned
from jdecouple.train.pages.choice import Choice, Variants
from jdecouple.train.pages.page import Fold, Grid, Note, Piece, Text
from jdecouple.train.pages.record import Record
from jdecouple.train.pages.times import Seconds

AXES = {"step": "step", "examples": "examples", "seconds": "seconds of training"}
"""What curves can be drawn by, and what that axis is called."""

_MOST_CHARTS = 60  # of metrics beside the main ones
_MAIN = {
    ("train", "loss"): "Training loss",
    ("test", "accuracy"): "Accuracy of the last exit, test",
    ("validation", "accuracy"): "Accuracy of the last exit, validation",
    ("train", "accuracy"): "Accuracy of the last exit, training",
}
_FRACTIONS = ("accuracy", "input_wait")
_OF_LOSSES = (
    "The training loss is what a method minimises, summed over its blocks: between methods its "
    "height says nothing."
)

Metric = tuple[str, str]  # a split, and the name of a metric
Place = Callable[[int], float]  # where a step is on an axis; NaN where that is not known


def pieces(runs: Sequence[Record], names: Sequence[str], by: str) -> list[Piece]:
    """Charts of the metrics that runs share, and the choice of what they are drawn by.

    Args:
        runs: two or more.
        names: what each is called in the legends.
        by: one of `AXES`, which is chosen when the page is opened.
    """
    main, others = shared(runs)
    if not main:
        return [Text("No run has metrics yet.")]
    drawn, left_out = others[:_MOST_CHARTS], others[_MOST_CHARTS:]
    parts = [metric for metric in drawn if re.match(r"(block|exit)_\d+/", metric[1])]
    places = [_places(run) for run in runs]

    def charts(metrics: Sequence[Metric]) -> Grid:
        return Grid([Variants(_by_every_axis(m, runs, names, places)) for m in metrics])

    found: list[Piece] = [Note(_OF_LOSSES), charts(main)]
    for title, metrics in (
        ("Other metrics", [metric for metric in drawn if metric not in parts]),
        ("Metrics of blocks and exits", parts),
    ):
        if metrics:
            found.append(Fold(f"{title} ({len(metrics)})", [charts(metrics)]))
    if left_out:
        listed = ", ".join(f"{name} ({split})" for split, name in left_out)
        found.append(Note(f"There are more metrics than are drawn; left out are {listed}."))
    return [Choice("Curves by", [*AXES], [*AXES].index(by), found)]


def shared(runs: Sequence[Record]) -> tuple[list[Metric], list[Metric]]:
    """The main metrics that any run has, and all others that two or more have, in their order."""
    counts: Counter[Metric] = Counter()
    for run in runs:
        counts.update(
            {
                (line["split"], name)
                for line in run.lines
                for name, value in line.items()
                if name not in ("step", "split") and value is not None
            }
        )
    others = [metric for metric, count in counts.items() if count > 1 and metric not in _MAIN]
    return [metric for metric in _MAIN if counts[metric]], sorted(others, key=_in_order)


def _in_order(metric: Metric) -> list[tuple[str, int]]:
    """By name, then by split, with block 10 behind block 9."""
    split, name = metric
    return [
        (text, int(number or 0)) for text, number in re.findall(r"(\D+)(\d{0,6})", name + split)
    ]


def _places(run: Record) -> list[Place]:
    """Where a step is on each of `AXES`."""
    size = run.batch_size
    return [float, lambda step: float(step * size), Seconds(run.lines, size)]


def _by_every_axis(
    metric: Metric, runs: Sequence[Record], names: Sequence[str], places: Sequence[Sequence[Place]]
) -> list[Chart]:
    split, name = metric
    title = _MAIN.get(metric, f"{name}, {split}")
    percent = name.rpartition("/")[2] in _FRACTIONS
    colours = categories(len(runs))
    dashes = ["", *filter(None, DASHES.values())]
    curves = []
    for k, run in enumerate(runs):
        lines = [line for line in run.lines if line["split"] == split and name in line]
        ys = [math.nan if line[name] is None else line[name] for line in lines]
        dash = dashes[k // len({*colours}) % len(dashes)]  # where colours come again
        curves.append(Curve(names[k], [line["step"] for line in lines], ys, colours[k], dash))
    points = [thinned(curve, most_points(len(runs))) for curve in curves]
    charts = []
    for axis, label in enumerate(AXES.values()):
        placed = []
        for curve, found, at in zip(curves, points, places, strict=True):
            known = [(x, y) for step, y in found if math.isfinite(x := at[axis](int(step)))]
            placed.append(curve._replace(xs=[x for x, _ in known], ys=[y for _, y in known]))
        charts.append(Chart(title, placed, label, percent, named=len(runs)))
    return charts
