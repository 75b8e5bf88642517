"""Draws what each stage did when: calls as boxes on a time axis, simulated or measured."""

from collections.abc import Iterable, Sequence
from typing import Any

from jdecouple.schedules.schedule import Kind
from jdecouple.schedules.simulation import Span

# Four of Okabe and Ito's colours, which the colour-blind tell apart.
_COLOURS = {
    Kind.FORWARD: "#56B4E9",
    Kind.BACKWARD: "#E69F00",
    Kind.WEIGHT: "#CC79A7",
    Kind.STEP: "#009E73",
}
_WIDTH, _LINE_HEIGHT, _DPI = 12.0, 0.55, 120  # inches, inches, dots per inch
_FONT = 8.0  # points
_DIGIT = 0.65 * _FONT  # points across
_BOX = 0.8  # share of a line's height
_PALEST = 0.6  # how far the last stage of a line fades towards white


def draw(spans: Iterable[Span], *, title: str = "") -> Any:
    """Draws calls as boxes, one line per device group.

    >>> from jdecouple.schedules import Costs, build, simulate
    >>> figure = draw(simulate(build("1f1b", 2, 4), Costs(forward=1e-3, backward=2e-3)).spans)
    >>> figure.savefig("/dev/null", format="png")

    A call of several actions is one box with a band for each: the parts of its time are not known.
    The number in a box is its microbatch; where a batch is one microbatch, the batch. Time counts
    from the first call. Where stages share a device group, the later ones are paler.

    Args:
        spans: the calls, such as `Simulation.spans`.
        title: heading of the figure, plain text.

    Returns:
        A `matplotlib.figure.Figure`; its `savefig` writes a picture.

    Raises:
        ValueError: no spans.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    spans = list(spans)
    if not spans:
        raise ValueError("spans is empty: a timeline needs at least one call")
    lines = [
        sorted({span.stage for span in spans if span.device_group == group})
        for group in sorted({span.device_group for span in spans})
    ]
    size = _WIDTH, 1.2 + _LINE_HEIGHT * len(lines)
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    _draw_boxes(axes, spans, lines)
    names = [f"stage{'s' * (len(stages) > 1)} {', '.join(map(str, stages))}" for stages in lines]
    axes.set_yticks(range(len(lines)), names)
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.set_xlabel("time (ms)")
    axes.spines[["top", "right"]].set_visible(False)
    kinds = {kind for span in spans for kind in span.kinds}
    handles = [
        Patch(facecolor=colour, edgecolor="black", linewidth=0.4, label=kind.name.lower())
        for kind, colour in _COLOURS.items()
        if kind in kinds
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), fontsize="small")
    if title:
        plain = title.encode(errors="backslashreplace").decode()
        axes.set_title(plain, loc="left", parse_math=False)
    return figure


def _draw_boxes(axes: Any, spans: Sequence[Span], lines: Sequence[list[int]]) -> None:
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import to_rgb

    first = min(span.start for span in spans)
    total = 1e3 * (max(span.end for span in spans) - first) or 1.0
    points = 0.9 * 72 * _WIDTH / total  # across, per millisecond
    one_microbatch = all(number <= 0 for span in spans for number in span.microbatches)
    corners, colours = [], []
    for span in spans:
        left, right = 1e3 * (span.start - first), 1e3 * (span.end - first)
        line, stages = next((i, stages) for i, stages in enumerate(lines) if span.stage in stages)
        pale = _PALEST * stages.index(span.stage) / max(1, len(stages) - 1)
        height = _BOX / len(span.kinds)
        for band, (kind, number) in enumerate(zip(span.kinds, span.microbatches, strict=True)):
            top = line - _BOX / 2 + band * height
            bottom = top + height
            corners.append([(left, top), (right, top), (right, bottom), (left, bottom)])
            colours.append([part + (1 - part) * pale for part in to_rgb(_COLOURS[kind])])
            number += span.batch if one_microbatch else 0
            fits = len(str(number)) * _DIGIT < points * (right - left)
            if kind is not Kind.STEP and number >= 0 and fits:  # negative: before the first batch
                centre = (left + right) / 2, top + height / 2
                axes.text(*centre, str(number), fontsize=_FONT, ha="center", va="center")
    boxes = PolyCollection(corners, facecolors=colours, edgecolors="black", linewidths=0.4)
    axes.add_collection(boxes)
    axes.set_xlim(0, total)
