"""Line charts as SVG in the colours of a page, light and dark, with a legend beside."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jdecouple.train.pages.page import escaped, shown

_WIDTH, _HEIGHT = 400, 250  # of what is drawn; the page scales it
_RIGHT, _TOP, _BOTTOM = 10, 2, 40  # around the axes
_LETTER, _GAP = 7.5, 6  # width of a letter, and between a number and its line
_MARGIN = 6  # between the axes and the curves
_LOG_SCALE_ABOVE = 100.0  # ratio of the largest to the smallest value
_STEPS = [1, 2, 2.5, 5, 10]  # between ticks, times a power of ten
_LARGEST = 1e100  # that is drawn
_MOST_POINTS, _FEWEST = 8000, 80  # of a chart; of a curve of many
_MOST_NAMED = 12  # curves that a legend names one by one
_MARKERS_UP_TO = 20  # points of a curve
_CATEGORIES = 8  # colours that tell apart what has no order

DASHES = {"train": "1.5 3", "validation": "6 3", "test": ""}
"""How the lines of each split are drawn where a chart has several."""


class Curve(NamedTuple):
    """A line of a chart.

    Attributes:
        label: its name in the legend.
        xs: rising, such as steps.
        ys: a gap where one is not finite.
        colour: of CSS, such as one of `depths` or `categories`.
        dash: lengths of strokes and gaps, as of SVG; "" for a line.
    """

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    colour: str
    dash: str = ""


class Chart(NamedTuple):
    """A piece of a page: lines on common axes; the vertical one is logarithmic for a wide range.

    >>> curve = Curve("block 0", [1, 2, 3], [0.5, 0.25, math.nan], depths(1)[0])
    >>> "block 0: from 0.5 to 0.25" in Chart("Loss", [curve]).html()
    True

    Attributes:
        title: what is drawn, above it.
        curves: those without a finite value are left out; without any there is no chart.
        x_label: what the horizontal axis is.
        percent: whether values are fractions, to be shown in percent.
        points: whether every value is marked, and a line joins them only to guide the eye.
        named: how many curves a legend names one by one; of more it names three.
    """

    title: str
    curves: Sequence[Curve]
    x_label: str = "step"
    percent: bool = False
    points: bool = False
    named: int = _MOST_NAMED

    def html(self) -> str:
        """See `page.Piece`."""
        curves = [curve for curve in self.curves if any(map(math.isfinite, curve.ys))]
        if not curves:
            return ""
        several = len(curves) > 1 or curves[0].label != self.title
        legend = _legend(curves, self.named) if several else ""
        said = f"{self.title}, by {self.x_label}. {_in_words(curves, self.percent)}"
        return (
            f"<figure><figcaption>{escaped(self.title)}</figcaption>"
            f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escaped(said)}">'
            f"{''.join(self._drawn(curves))}</svg>{legend}</figure>"
        )

    def _drawn(self, curves: Sequence[Curve]) -> Iterator[str]:
        from matplotlib.ticker import LogLocator, MaxNLocator

        curves = [
            curve._replace(ys=np.clip(curve.ys, -_LARGEST, _LARGEST).tolist()) for curve in curves
        ]
        xs, ys = (np.concatenate([curve[i] for curve in curves]) for i in (1, 2))
        ys = ys[np.isfinite(ys)]
        wide = ys.max() > _LOG_SCALE_ABOVE * ys.min()
        log = not self.percent and ys.min() > 1 / _LARGEST and wide
        up = _Axis(ys.min(), ys.max(), _HEIGHT - _BOTTOM - _MARGIN, _TOP + _MARGIN, log)
        rows = up.ticks(LogLocator(numticks=6) if log else MaxNLocator(5, steps=_STEPS))
        texts = [f"{100 * y:.4g}%" if self.percent else f"{y:.6g}" for y in rows]
        # A sign of percent is as wide as two digits.
        left = _GAP + _LETTER * max((len(x) + x.count("%") for x in texts), default=0)
        right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
        across = _Axis(xs.min(), xs.max(), left + _MARGIN, right - _MARGIN)
        for y, text in zip(rows, texts, strict=True):
            yield f'<path class="rule" d="M{left:.1f} {up(y):.1f}H{right}"/>'
            yield _text(left - _GAP, up(y) + 4, text, "end")
        whole = across.high - across.low > 5
        for x in across.ticks(MaxNLocator(5, steps=_STEPS, integer=whole)):
            yield f'<path class="rule" d="M{across(x):.1f} {_TOP}V{bottom}"/>'
            yield _text(across(x), bottom + 16, f"{x:,.0f}" if x == round(x) else f"{x:.6g}")
        yield _text((left + right) / 2, _HEIGHT - 6, self.x_label)
        most = most_points(len(curves))
        for curve in curves:
            yield self._line(curve, across, up, most)

    def _line(self, curve: Curve, across: "_Axis", up: "_Axis", most: int) -> str:
        points = [(across(x), up(y)) for x, y in thinned(curve, most)]
        parts, pen = [], "M"
        for x, y in points:
            parts.append("" if math.isnan(y) else f"{pen}{x:.1f} {y:.1f}")
            pen = "M" if math.isnan(y) else "L"
        marks = ""
        if self.points or len(points) <= _MARKERS_UP_TO:
            marks = "".join(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in points if y == y
            )
        dash = f' stroke-dasharray="{curve.dash}"' if curve.dash else ""
        title = escaped(_in_words([curve], self.percent))
        return (
            f'<g style="--hue:{curve.colour}"><title>{title}</title>'
            f'<path class="curve" d="{"".join(parts)}"{dash}/>{marks}</g>'
        )


class _Axis:
    """From values between `low` and `high` to places between `start` and `end`."""

    def __init__(self, low: float, high: float, start: float, end: float, log: bool = False):
        if low == high:  # a flat line is in the middle
            margin = abs(low) * 0.1 or 1.0
            low, high = low - margin, high + margin
        self.low, self.high = float(low), float(high)
        self._scale: Callable[[float], float] = math.log if log else float
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        """Where a value is."""
        low, high = self._scale(self.low), self._scale(self.high)
        share = (self._scale(value) - low) / (high - low)
        return self._start + (self._end - self._start) * share

    def ticks(self, locator: object) -> list[float]:
        """The values of a locator of matplotlib that are on the axis."""
        values = locator.tick_values(self.low, self.high).tolist()  # type: ignore[attr-defined]
        slack = 1e-9 * (self.high - self.low)
        return [v for v in values if self.low - slack <= v <= self.high + slack]


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escaped(text)}</text>'


def depths(count: int) -> list[str]:
    """Colours that run with depth, from dark to light, as of blocks."""
    places = [i / max(1, count - 1) for i in range(count)]
    return [
        f"oklch(calc(var(--deep) + {t:.3f} * var(--rise)) 0.13 {290 - 190 * t:.0f})" for t in places
    ]


def categories(count: int) -> list[str]:
    """Colours that tell apart what has no order, as runs; beyond eight they come again."""
    return [f"var(--colour-{i % _CATEGORIES})" for i in range(count)]


def most_points(curves: int) -> int:
    """How many points each of so many curves may have in one chart."""
    return max(_FEWEST, _MOST_POINTS // curves)


def thinned(curve: Curve, most: int) -> list[tuple[float, float]]:
    """Points of a curve; of more than `most`, the lowest and the highest of each part."""
    points = [
        (x, y if math.isfinite(y) else math.nan) for x, y in zip(curve.xs, curve.ys, strict=True)
    ]
    if len(points) <= most:
        return points
    size, kept = math.ceil(2 * len(points) / most), []
    for first in range(0, len(points), size):
        part = points[first : first + size]
        known = [point for point in part if not math.isnan(point[1])]
        if known:
            kept += sorted({min(known, key=lambda p: p[1]), max(known, key=lambda p: p[1])})
        if len(known) < len(part):
            kept.append((part[-1][0], math.nan))  # the gap
    return kept


def _in_words(curves: Sequence[Curve], percent: bool) -> str:
    """What a chart shows: of every curve, or of many the first and the last."""

    def said(curve: Curve) -> str:
        known = [y for y in curve.ys if math.isfinite(y)]
        first, last = (f"{y:.2%}" if percent else shown(float(y)) for y in (known[0], known[-1]))
        way = last if len(known) == 1 else f"from {first} to {last}"
        return f"{curve.label}: {way}"

    if len(curves) > _MOST_NAMED:
        return f"{len(curves)} lines; {said(curves[0])}; {said(curves[-1])}"
    return "; ".join(map(said, curves))


def _legend(curves: Sequence[Curve], most: int) -> str:
    """Names of the curves with their colours; of many, the first and the last."""
    named = curves if len(curves) <= most else [curves[0], curves[len(curves) // 2], curves[-1]]
    items = "".join(
        f'<li><svg viewBox="0 0 24 8" aria-hidden="true" style="--hue:{curve.colour}">'
        f'<path class="curve" d="M0 4H24"'
        + (f' stroke-dasharray="{curve.dash}"' if curve.dash else "")
        + f"/></svg>{escaped(curve.label)}</li>"
        for curve in named
    )
    return f'<ul class="legend">{items}</ul>'
