"""Draws what each stage did when: calls as boxes on a time axis, simulated or measured."""

from collections.abc import Iterable, Sequence
from typing import Any

from jdecouple.schedules.schedule import Kind
from jdecouple.schedules.simulation import Span

# Three of Okabe and Ito's colours, which the colour-blind tell apart.
_COLOURS = {Kind.FORWARD: "#56B4E9", Kind.BACKWARD: "#E69F00", Kind.STEP: "#009E73"}
_WIDTH, _ROW_HEIGHT, _DPI = 12.0, 0.55, 120  # inches, inches, dots per inch
_FONT = 8.0  # points
_DIGIT = 0.65 * _FONT  # points across
_BOX = 0.8  # share of a row's height
_PALEST = 0.6  # how far the last chunk of a row fades towards white


def draw(spans: Iterable[Span], *, title: str = "") -> Any:
    """Draws calls as boxes, one line per row of devices.

    A call of several actions is one box with a band for each: the parts of its time are not known.
    The number in a box is its microbatch; where a batch is one microbatch, the batch. Time counts
    from the first call. Where stages share a row, the later ones are paler.

    Args:
        spans: the calls, such as `Simulation.spans`.
        title: heading of the figure.

    Returns:
        A `matplotlib.figure.Figure`; its `savefig` writes a picture.

    Raises:
        ValueError: no spans.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    spans = list(spans)
    if not spans:
        raise ValueError("spans is empty: a timeline needs at least one call")
    rows = {
        row: sorted({s.stage for s in spans if s.device_group == row})
        for row in {s.device_group for s in spans}
    }
    rows = dict(sorted(rows.items()))
    figure = Figure(figsize=(_WIDTH, 1.2 + _ROW_HEIGHT * len(rows)), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    _draw_boxes(axes, spans, rows)
    axes.set_yticks(range(len(rows)), [_name(stages) for stages in rows.values()])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("time (ms)")
    axes.spines[["top", "right"]].set_visible(False)
    _draw_legend(figure, {kind for span in spans for kind in span.kinds})
    if title:
        axes.set_title(title, loc="left")
    return figure


def _draw_boxes(axes: Any, spans: Sequence[Span], rows: dict[int, list[int]]) -> None:
    from matplotlib.collections import PolyCollection

    first = min(span.start for span in spans)
    total = 1e3 * (max(span.end for span in spans) - first) or 1.0
    points = 0.9 * 72 * _WIDTH / total  # across, per millisecond
    numbers = _numbers(spans)
    places = {row: place for place, row in enumerate(rows)}
    corners, colours = [], []
    for span, labels in zip(spans, numbers, strict=True):
        left, right = 1e3 * (span.start - first), 1e3 * (span.end - first)
        height = _BOX / len(span.kinds)
        stages = rows[span.device_group]
        pale = _PALEST * stages.index(span.stage) / max(1, len(stages) - 1)
        for band, (kind, label) in enumerate(zip(span.kinds, labels, strict=True)):
            top = places[span.device_group] - _BOX / 2 + band * height
            bottom = top + height
            corners.append([(left, top), (right, top), (right, bottom), (left, bottom)])
            colours.append(_faded(_COLOURS[kind], pale))
            if label and len(label) * _DIGIT < points * (right - left):
                centre = (left + right) / 2, top + height / 2
                axes.text(*centre, label, fontsize=_FONT, ha="center", va="center")
    boxes = PolyCollection(corners, facecolors=colours, edgecolors="black", linewidths=0.4)
    axes.add_collection(boxes)
    axes.set_xlim(0, total)


def _numbers(spans: Sequence[Span]) -> list[list[str]]:
    """What to write on each action of each call; nothing on steps and before the first batch."""
    single = all(each <= 0 for span in spans for each in span.microbatches)
    numbers = []
    for span in spans:
        entered = span.batch if single else 0
        shown = zip(span.kinds, (entered + each for each in span.microbatches), strict=True)
        numbers.append(["" if kind is Kind.STEP or n < 0 else str(n) for kind, n in shown])
    return numbers


def _name(stages: Sequence[int]) -> str:
    return f"stage{'s' * (len(stages) > 1)} {', '.join(map(str, stages))}"


def _faded(colour: str, share: float) -> tuple[float, ...]:
    from matplotlib.colors import to_rgb

    return tuple(each + (1 - each) * share for each in to_rgb(colour))


def _draw_legend(figure: Any, kinds: set[Kind]) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor=colour, edgecolor="black", linewidth=0.4, label=kind.name.lower())
        for kind, colour in _COLOURS.items()
        if kind in kinds
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), fontsize="small")
