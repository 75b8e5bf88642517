"""Pictures of a report: the confusion matrix, the worst examples, accuracy against cost."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jdecouple.inference import pictures
from jdecouple.inference.tables import Row

MOST_IMAGES = 60

_LONGEST_NAME = 18  # letters of a class name that a picture shows
_CLASSES_WITH_NAMES = 40
_CLASSES_WITH_COUNTS = 15
_COLUMNS = 6  # of the worst examples
_STYLES: dict[str, dict[str, Any]] = {
    "cosine": {"color": "C0", "marker": "."},
    "confidence": {"color": "C1", "marker": "."},
    "entropy": {"color": "C2", "marker": "."},
    "margin": {"color": "C3", "marker": "."},
    "ensemble": {"color": "C4", "linestyle": "--", "marker": "s"},
    "exits": {"color": "black", "linestyle": ":", "marker": "D"},
}
_LABELS = {"exits": "each exit alone", "ensemble": "mean of the logits so far"}


def confusion(matrix: np.ndarray, names: Sequence[str], path: Path, title: str) -> None:
    """Draws a confusion matrix, coloured by the fraction of each row's examples."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    count = len(matrix)
    size = 4 + 0.42 * min(count, _CLASSES_WITH_COUNTS)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.subplots()
    fractions = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(fractions, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(image, ax=axes, label="fraction of the label's examples", shrink=0.8)
    if count <= _CLASSES_WITH_NAMES:
        shown = [plain(name) for name in names]
        small = {"fontsize": 9 if count <= _CLASSES_WITH_COUNTS else 6, "parse_math": False}
        axes.set_xticks(range(count), shown, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(count), shown)
        for text in (*axes.get_xticklabels(), *axes.get_yticklabels()):
            text.set(**small)
    else:
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(nbins=10, integer=True))
    if count <= _CLASSES_WITH_COUNTS:
        for (row, column), number in np.ndenumerate(matrix):
            dark = fractions[row, column] > 0.5
            axes.text(
                *(column, row, str(number)),
                ha="center",
                va="center",
                fontsize=8,
                color="white" if dark else "black",
            )
    axes.set_xlabel("prediction")
    axes.set_ylabel("label")
    axes.set_title(plain(title, None), parse_math=False)
    pictures.save(figure, path, dpi=120)


def worst(rows: Sequence[Row], images: Any, path: Path, title: str) -> None:
    """Draws the images of `tables.worst`, `[height, width]` or `[height, width, 1, 3 or 4]`.

    Above each stand its index, its label, and the prediction with its probability.
    """
    from matplotlib.figure import Figure

    lines = -(-len(rows) // _COLUMNS)
    figure = Figure(figsize=(1.7 * _COLUMNS, 2.1 * lines + 0.5), layout="constrained")
    grid = figure.subplots(lines, _COLUMNS, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    for axes, row in zip(grid, rows, strict=False):
        axes.imshow(_shown(images[row["index"]]), cmap="gray", vmin=0, vmax=1)
        answer = f"{plain(row['prediction'])} ({row['probability']:.0%})"
        text = f"{row['index']}: {plain(row['label'])}\n→ {answer}"
        axes.set_title(text, fontsize=8, parse_math=False)
    figure.suptitle(plain(title, None), parse_math=False)
    pictures.save(figure, path, dpi=120)


def accuracy_against_cost(
    curves: Mapping[str, np.ndarray],
    path: Path,
    *,
    cost_name: str,
    exits: Sequence[int],
    chosen: tuple[str, float, float] | None = None,
    title: str = "",
) -> None:
    """Draws the curves of `calibration.curves`.

    Args:
        curves: Pairs of mean cost and accuracy by name.
        path: Of the PNG.
        cost_name: What a cost is, with its unit.
        exits: Number of every exit, for the points of each exit alone.
        chosen: Name of a rule, its mean cost and accuracy: a star.
        title: Above the picture.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, points in curves.items():
        axes.plot(*points.T, label=_LABELS.get(name, name), markersize=5, **_STYLES[name])
    for exit, point in zip(exits, curves["exits"], strict=True):
        axes.annotate(f"exit {exit}", point, (4, -12), textcoords="offset points", fontsize=8)
    if chosen is not None:
        name, *point = chosen
        axes.plot(*point, "*", color="red", markersize=14, label=f"chosen ({name})", zorder=5)
    axes.set_xlabel(plain(cost_name, None), parse_math=False)
    axes.set_ylabel("accuracy")
    axes.set_xlim(0, 1.1 * max(curves["exits"][:, 0].max(), 1e-300))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    axes.set_title(plain(title, None), parse_math=False)
    pictures.save(figure, path, dpi=120)


def plain(text: str, longest: int | None = _LONGEST_NAME) -> str:
    """Text on one line that any font has letters for, cut where it is longer."""
    line = " ".join(text.encode(errors="backslashreplace").decode().split())
    return line if longest is None or len(line) <= longest else line[: longest - 1] + "…"


def _shown(image: Any) -> np.ndarray:
    """An image of numbers from 0 to 1; others are stretched to that range."""
    pixels = np.asarray(image)
    if pixels.dtype == np.uint8:
        pixels = pixels / 255
    pixels = pixels.astype(np.float64)
    low, high = pixels.min(), pixels.max()
    if low < 0 or high > 1:
        pixels = (pixels - low) / max(high - low, 1e-12)
    return pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels
