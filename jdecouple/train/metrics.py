"""Metrics of a run: `metrics.jsonl`, the curves drawn from it, and progress on the console."""

import json
import math
import os
import re
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tqdm

from jdecouple.train.files import replace

FILE_NAME = "metrics.jsonl"
CURVES_NAME = "curves.png"
SPLITS = ("train", "validation", "test")

_STYLES: dict[str, dict[str, Any]] = {
    "train": {"linestyle": ":", "marker": "."},
    "validation": {"linestyle": "--", "marker": "o"},
    "test": {"linestyle": "-", "marker": "D"},
}
_LOG_SCALE_ABOVE = 100.0  # ratio of the largest to the smallest loss
_MARKERS_UP_TO = 20  # points of a curve

Line = dict[str, Any]
Series = tuple[list[int], list[float]]


class Means:
    """Running means of the metrics of many steps.

    Args:
        state: what another one's `state` gave; None begins anew.
    """

    def __init__(self, state: Mapping[str, Any] | None = None):
        self._count: int = state["count"] if state else 0
        self._sums: dict[str, float] = dict(state["sums"]) if state else {}

    @property
    def state(self) -> dict[str, Any]:
        """The counts and sums so far, as JSON."""
        return {"count": self._count, "sums": dict(self._sums)}

    def add(self, values: Mapping[str, Any]) -> None:
        """Counts the scalars of one step; every step has the same names."""
        self._count += 1
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value)

    def take(self) -> dict[str, float]:
        """Returns the means and begins anew."""
        means = {name: total / self._count for name, total in self._sums.items()}
        self._count, self._sums = 0, {}
        return means


class Clock(NamedTuple):
    """A time, and the seconds waited for input until then."""

    time: float
    waited: float

    @classmethod
    def now(cls, waited: float) -> "Clock":
        """The present."""
        return cls(time.perf_counter(), waited)

    def towards(self, other: "Clock", share: float) -> "Clock":
        """A clock between this one (share 0) and another (share 1)."""
        time, waited = (a + share * (b - a) for a, b in zip(self, other, strict=True))
        return Clock(time, waited)


class MetricsWriter:
    """Appends one JSON object a line to ``metrics.jsonl`` and flushes it.

    Args:
        workdir: directory of the run; created if missing.
        resume_step: step that the run goes on from. Lines of later steps and a half-written last
            line are dropped by an atomic rewrite, all other lines keep their bytes. None: a new
            run, which starts with an empty file.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, workdir: str | os.PathLike[str], *, resume_step: int | None):
        path = Path(workdir) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = b"" if resume_step is None else _until(_read(path), resume_step)
        replace(path, lambda temporary: temporary.write_bytes(kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """Appends ``{"step": step, "split": split, **values}``.

        Args:
            step: optimiser steps done.
            split: train, validation or test.
            values: name -> number or scalar array; one that is not finite becomes null.

        Raises:
            ValueError: the split is unknown, or a value is named `step` or `split`.
        """
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}: allowed are {', '.join(SPLITS)}")
        if clash := values.keys() & {"step", "split"}:
            raise ValueError(f"a metric may not be named {' or '.join(sorted(clash))}")
        numbers = {name: float(value) for name, value in values.items()}
        finite = {name: x if math.isfinite(x) else None for name, x in numbers.items()}
        line = {"step": int(step), "split": split, **finite}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file; may be called again."""
        self._file.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(workdir: str | os.PathLike[str]) -> list[Line]:
    """Returns the lines of ``metrics.jsonl`` in order, without a half-written one; [] without file.

    Values that were not finite are None.
    """
    parsed = (_parse(raw) for raw in _read(Path(workdir) / FILE_NAME).splitlines())
    return [line for line in parsed if line is not None]


def plot_curves(
    workdir: str | os.PathLike[str], path: str | os.PathLike[str] | None = None, *, title: str = ""
) -> Path:
    """Draws loss per block (train) and accuracy per exit (every split) against the step.

    Colours tell blocks apart, line styles splits. The loss axis is logarithmic where the losses
    span more than two decades.

    Args:
        workdir: directory with ``metrics.jsonl``.
        path: PNG to write, atomically; ``curves.png`` in `workdir` by default.
        title: heading of the figure.

    Returns:
        The path written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    target = Path(workdir) / CURVES_NAME if path is None else Path(path)
    lines = read_metrics(workdir)
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    losses, accuracies = figure.subplots(1, 2)
    _draw_losses(losses, lines)
    _draw_accuracies(accuracies, lines)
    if title:
        figure.suptitle(title)
    replace(target, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
    return target


class Progress:
    """Progress on stderr: a bar on a terminal, else one plain line for each `update` with values.

    Throughput and time left count from the first `update`, so that compilation is left out.

    Args:
        total_steps: steps at the end of the run.
        initial: steps done before this process started.
        examples_per_step: global batch size, for examples/s.
        enabled: False on all processes but the first: nothing is printed.
    """

    def __init__(
        self, total_steps: int, initial: int, examples_per_step: int, enabled: bool = True
    ):
        self._total = total_steps
        self._examples = examples_per_step
        self._enabled = enabled
        self._first: tuple[int, float] | None = None
        self._shown: list[str] = []
        self._bar: Any = None
        if enabled and sys.stderr.isatty():
            self._bar = tqdm.tqdm(
                total=total_steps,
                initial=initial,
                miniters=1,
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}",
            )

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """Shows that `step` steps are done.

        Args:
            step: optimiser steps done.
            values: numbers to show in this order, such as epoch, loss and accuracy; they are read
                here, so pass device arrays at intervals only. Empty: the last ones stay.
        """
        now = time.perf_counter()
        if self._first is None:
            self._first = (step, now)
        if not self._enabled:
            return
        self._shown = [_shown(name, x) for name, x in values.items()] or self._shown
        parts = [*self._speed(step, now), *self._shown]
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(parts), refresh=False)
            self._bar.update(step - self._bar.n)
        elif values:
            line = " | ".join([f"step {step}/{self._total}", *parts])
            print(line, file=sys.stderr, flush=True)

    def print(self, line: str) -> None:
        """Prints `line` on stdout, above the bar where there is one."""
        if self._bar is not None:
            tqdm.tqdm.write(line, file=sys.stdout)
        elif self._enabled:
            print(line, flush=True)

    def close(self) -> None:
        """Leaves the bar as it stands; may be called again."""
        if self._bar is not None:
            self._bar.close()

    def _speed(self, step: int, now: float) -> list[str]:
        assert self._first is not None
        done, seconds = step - self._first[0], now - self._first[1]
        if done <= 0 or seconds <= 0:
            return []
        left = tqdm.tqdm.format_interval((self._total - step) * seconds / done)
        return [f"{done * self._examples / seconds:,.0f} examples/s", f"{left} left"]


def _shown(name: str, value: Any) -> str:
    return f"{name} {value}" if isinstance(value, int | str) else f"{name} {float(value):.4g}"


def _draw_losses(axes: Any, lines: Iterable[Line]) -> None:
    train = [line for line in lines if line["split"] == "train"]
    blocks = _indices(train, "block", "loss")
    series = {f"block {i}": _series(train, f"block_{i}/loss") for i in blocks}
    series = series or {"loss": _series(train, "loss")}
    colours = _colours(len(series))
    for (label, points), colour in zip(series.items(), colours, strict=True):
        _draw(axes, points, label=label, color=colour, marker="o")
    values = [y for _, ys in series.values() for y in ys if math.isfinite(y)]
    if values and min(values) > 0 and max(values) > _LOG_SCALE_ABOVE * min(values):
        axes.set_yscale("log")
    _finish(axes, "training loss", [])


def _draw_accuracies(axes: Any, lines: Iterable[Line]) -> None:
    lines = list(lines)
    exits = sorted({*_indices(lines, "exit", "accuracy"), *_indices(lines, "block", "accuracy")})
    colours: dict[str, Any] = {
        f"exit {i}": c for i, c in zip(exits, _colours(len(exits)), strict=True)
    }
    used: dict[str, None] = {}
    for split in SPLITS:
        part = [line for line in lines if line["split"] == split]
        prefix = "block" if split == "train" else "exit"
        series = {f"exit {i}": _series(part, f"{prefix}_{i}/accuracy") for i in exits}
        final = _series(part, "accuracy")
        if final not in series.values():
            series["final"] = final
        for label, points in series.items():
            if points[0]:
                new = label not in used
                used[label] = used[split] = None
                _draw(
                    axes,
                    points,
                    label=label if new else None,
                    color=colours.get(label, "black"),
                    **_STYLES[split],
                )
    _finish(axes, "accuracy", [split for split in SPLITS if split in used])


def _draw(axes: Any, points: Series, **style: Any) -> None:
    if len(points[0]) > _MARKERS_UP_TO:
        style["marker"] = None
    axes.plot(*points, markersize=4, linewidth=1.4, **style)


def _finish(axes: Any, label: str, splits: Iterable[str]) -> None:
    """Labels the axes; the legend names the colours, then the line styles of `splits`."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axes.grid(alpha=0.3)
    handles, _ = axes.get_legend_handles_labels()
    plain = [Line2D([], [], color=h.get_color(), label=h.get_label()) for h in handles]
    styles = [Line2D([], [], color="gray", markersize=4, label=s, **_STYLES[s]) for s in splits]
    if entries := plain + styles:
        axes.legend(handles=entries, fontsize="small", ncols=1 + len(entries) // 9)


def _colours(count: int) -> list[Any]:
    """Colours that run with depth, all dark enough on white."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.88 * i / max(1, count - 1)) for i in range(count)]


def _indices(lines: Iterable[Line], prefix: str, metric: str) -> list[int]:
    """Numbers i of the keys ``{prefix}_{i}/{metric}``."""
    pattern = re.compile(rf"{prefix}_(\d+)/{metric}")
    return sorted({int(m[1]) for line in lines for key in line if (m := pattern.fullmatch(key))})


def _series(lines: Iterable[Line], key: str) -> Series:
    found = [(line["step"], line[key]) for line in lines if key in line]
    return [step for step, _ in found], [math.nan if y is None else y for _, y in found]


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def _parse(raw: bytes) -> Line | None:
    """The object on a line; None if there is none, as on a half-written line."""
    try:
        line = json.loads(raw)
    except ValueError:
        return None
    return line if isinstance(line, dict) and {"step", "split"} <= line.keys() else None


def _until(data: bytes, step: int) -> bytes:
    """Lines of steps up to `step`, byte for byte."""
    parsed = ((raw, _parse(raw)) for raw in data.splitlines())
    return b"".join(raw + b"\n" for raw, line in parsed if line and line["step"] <= step)
