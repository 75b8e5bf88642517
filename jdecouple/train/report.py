"""What a run leaves behind for people: config.json, the closing table and the curves."""

import importlib.metadata
import json
import math
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from jdecouple._errors import first_line
from jdecouple._files import any_folder, replace
from jdecouple.inference import pictures
from jdecouple.train.metrics import SPLITS, Line, read_metrics
from jdecouple.train.run import Run
from jdecouple.trainer import Trainer

CURVES_NAME = "curves.png"

_PACKAGES = ("jdecouple", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_STYLES: dict[str, dict[str, Any]] = {
    "train": {"linestyle": ":", "marker": "."},
    "validation": {"linestyle": "--", "marker": "o"},
    "test": {"linestyle": "-", "marker": "D"},
}
_LOG_SCALE_ABOVE = 100.0  # ratio of the largest to the smallest loss
_MARKERS_UP_TO = 20  # points of a curve

Series = tuple[list[int], list[float]]


def write_config(folder: Path, run: Run, history: Sequence[Mapping[str, Any]] = ()) -> None:
    """Writes `config.json`: the configuration, the versions, the devices, the partition.

    Its `history` says at which step which key of the configuration changed, from what to what.
    """
    trainer = run.trainer
    content = {
        "config": run.config.to_dict(),
        "history": list(history),
        "total_steps": run.total_steps,
        "engine": trainer.engine,
        "boundaries": list(trainer.boundaries),
        "parameters": parameters(trainer),
        "devices": [list(map(str, placement.devices)) for placement in trainer.placements],
        "device_kind": jax.devices()[0].device_kind,
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in _PACKAGES},
    }
    text = json.dumps(content, indent=2) + "\n"
    replace(folder / "config.json", lambda temporary: temporary.write_text(text))


def parameters(trainer: Trainer) -> int:
    """Numbers that a trainer's blocks, heads and classifier learn."""
    leaves = trainer.to_arrays(trainer.abstract())
    weights = (leaf for name, leaf in leaves.items() if name.split("/")[1] == "params")
    return sum(int(np.prod(leaf.shape)) for leaf in weights)


def summary(
    lines: Sequence[Mapping[str, Any]], step: int | None = None, rows: int = 0
) -> dict[str, Any]:
    """Test results of a finished run, of the lines of `metrics.jsonl`, chosen three ways.

    Args:
        lines: all that are there.
        step: the last of the run; by default that of the last test.
        rows: lines that should be there. Where some are lost, so may be the best.

    Returns:
        "test" at the last step; "test_at_best_validation" at the step with the highest
        validation accuracy (the first of equals), if there was a validation split;
        "best_test" at the step with the highest test accuracy of any exit, as the papers
        report: not a result, since the test set chose it. With lost lines, the first alone.

    Raises:
        ValueError: there is no test of the last step.
    """
    scored = [line for line in lines if line.get("accuracy") is not None and exits(line)]
    tests = {line["step"]: line for line in scored if line["split"] == "test"}
    validations = [line for line in scored if line["split"] == "validation"]
    last = max(tests, default=None) if step is None else step
    if last not in tests:
        raise ValueError(
            f"metrics.jsonl holds no test accuracy of the last step, {step}: there is no result; "
            f"to measure it again, move checkpoints/{step} elsewhere and give the same command"
        )
    results = {"test": tests[last]}
    if len(lines) < rows:
        return results
    if validations:
        best = max(validations, key=lambda line: line["accuracy"])
        results["test_at_best_validation"] = tests[best["step"]]
    results["best_test"] = max(tests.values(), key=lambda line: max(exits(line).values()))
    return results


def show(
    result: Mapping[str, Any], folder: Path, best_step: int | None, curves: Path | None
) -> None:
    """Prints the closing table, and where the rest is."""
    labels = {
        "test": "last step",
        "test_at_best_validation": "best validation",
        "best_test": "best exit at its best test step (as the papers report; not a result)",
    }
    print("\ntest accuracy")
    for key, label in labels.items():
        if key not in result:
            continue
        line, accuracies = result[key], exits(result[key])
        value = max(accuracies.values()) if key == "best_test" else line["accuracy"]
        listed = ", ".join(f"{name} {accuracy:.2%}" for name, accuracy in accuracies.items())
        print(f"  {label}: {value:.2%} at step {line['step']} ({listed})")
    if found := exits(result["test"], "bits_per_byte"):
        listed = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
        print(f"test bits per byte, last step: {listed}")
    if "best_test" not in result:
        print("  best steps: not known, metrics.jsonl has lost lines")
    if curves is not None:
        print(f"curves:      {curves}")
    best = "" if best_step is None else f" (best by validation: step {best_step})"
    print(f"checkpoints: {folder / 'checkpoints'}{best}")


def exits(line: Mapping[str, Any], metric: str = "accuracy") -> dict[str, float]:
    """Accuracy (or another metric) by exit, such as "exit_0", of a line of `metrics.jsonl`."""
    return {
        name.removesuffix(f"/{metric}"): value
        for name, value in line.items()
        if name.startswith("exit_") and name.endswith(f"/{metric}") and value is not None
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def try_plot_curves(workdir: Path, *, title: str) -> Path | None:
    """As `plot_curves`; None after a warning if that fails, which costs no result."""
    try:
        return plot_curves(workdir, title=title)
    except Exception as error:
        logging.warning("no %s: %s", CURVES_NAME, first_line(error))
        return None


def plot_curves(
    workdir: str | os.PathLike[str], path: str | os.PathLike[str] | None = None, *, title: str = ""
) -> Path:
    """Draws loss per block (train) and accuracy per exit (every split) against the step.

    Colours tell blocks apart, line styles splits. The loss axis is logarithmic where the losses
    span more than two decades. The PNG, by default ``curves.png``, appears atomically; returns it.
    A title is plain text, whatever characters it has.
    """
    from matplotlib.figure import Figure

    target = any_folder(workdir) / CURVES_NAME if path is None else Path(path)
    lines = read_metrics(workdir)
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    _draw_losses(losses, lines)
    _draw_accuracies(accuracies, lines)
    if title:
        plain = title.encode(errors="backslashreplace").decode()
        figure.suptitle(plain, parse_math=False)
    pictures.save(figure, target, dpi=120)
    return target


def _draw_losses(axes: Any, lines: Sequence[Line]) -> None:
    train = [line for line in lines if line["split"] == "train"]
    blocks = _indices(train, "block", "loss")
    series = {f"block {i}": _series(train, f"block_{i}/loss") for i in blocks}
    series = series or {"loss": _series(train, "loss")}
    for label, colour in zip(series, block_colours(len(series)), strict=True):
        _draw(axes, series[label], label=label, color=colour, marker="o")
    values = [y for _, ys in series.values() for y in ys if math.isfinite(y)]
    if values and min(values) > 0 and max(values) > _LOG_SCALE_ABOVE * min(values):
        axes.set_yscale("log")
    _finish(axes, "training loss", [])


def _draw_accuracies(axes: Any, lines: Sequence[Line]) -> None:
    exits = _indices(lines, "(?:exit|block)", "accuracy")
    colours = {f"exit {i}": c for i, c in zip(exits, block_colours(len(exits)), strict=True)}
    drawn = []
    for split in SPLITS:
        part = [line for line in lines if line["split"] == split]
        prefix = "block" if split == "train" else "exit"
        series = {f"exit {i}": _series(part, f"{prefix}_{i}/accuracy") for i in exits}
        final = _series(part, "accuracy")
        known = {point for values in series.values() for point in zip(*values, strict=True)}
        if not known.issuperset(zip(*final, strict=True)):  # else the deepest exit of each step
            series["final"] = final
        for label, points in series.items():
            if points[0]:
                colour = colours.get(label, "black")
                _draw(axes, points, label=label, color=colour, **_STYLES[split])
                drawn.append(split)
    _finish(axes, "accuracy", dict.fromkeys(drawn))


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
    colours = {line.get_label(): line.get_color() for line in axes.lines}
    plain = [Line2D([], [], color=colour, label=label) for label, colour in colours.items()]
    styles = [Line2D([], [], color="gray", markersize=4, label=s, **_STYLES[s]) for s in splits]
    if entries := plain + styles:
        axes.legend(handles=entries, fontsize="small", ncols=1 + len(entries) // 9)


def block_colours(count: int) -> list[Any]:
    """Colours that run with depth, all dark enough on white."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.88 * i / max(1, count - 1)) for i in range(count)]


def _indices(lines: Iterable[Line], prefix: str, metric: str) -> list[int]:
    """Numbers i of the keys ``{prefix}_{i}/{metric}``."""
    pattern = re.compile(rf"{prefix}_(\d+)/{metric}")
    return sorted({int(m[1]) for line in lines for key in line if (m := pattern.fullmatch(key))})


def _series(lines: Iterable[Line], key: str) -> Series:
    points = [(line["step"], line[key]) for line in lines if key in line]
    return [step for step, _ in points], [math.nan if y is None else y for _, y in points]
