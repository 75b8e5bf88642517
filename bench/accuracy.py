r"""Accuracy of methods x data sets x models x seeds, and of any other key of the configuration.

    python bench/accuracy.py --methods bp scpl deinforeg --data cifar10 fashion_mnist \
        --models vgg8 --seeds 0 1 2 --set epochs=2 model.width=0.25 \
        --set-for deinforeg method.projector=256-256 --sweep data.label_noise 0 0.4 \
        --jobs 2 --output runs/table

Every cell is a run of train.py in a folder of its own below --output. The same command again goes
on where it stopped: finished cells are not trained again, killed ones continue. It writes
results.md, results.csv (a row a cell) and results.png. `@FILE` stands for the arguments in a file,
in which # begins a comment.
"""

import argparse
import csv
import itertools
import os
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matrix
from common import describe, heading, table
from matrix import Cell, Outcome

EQUAL = Path(__file__).resolve().parents[1] / "configs" / "equal.py"
# Keys of a cell's result, and their columns.
COLUMNS = {
    "test": "last step",
    "test_by_exit": "exit by validation",
    "test_by_step": "step by validation",
    "papers": "best test epoch (papers)",
}
LEGEND = """Test accuracy in %, mean ± sample standard deviation over the seeds. *Last step*: final
exit after the last step. *Exit by validation*: after the last step, the exit that is best on the
validation split. *Step by validation*: final exit at the evaluation that is best on the validation
split. *Best test epoch (papers)*: best exit at its best evaluation, both chosen by the test
accuracy itself, as the papers report it; not a result.
"""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C564B")


class Parser(argparse.ArgumentParser):
    """Reads arguments from a file as a shell would."""

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        """The arguments on a line."""
        return shlex.split(arg_line, comments=True)


def parser(description: str | None = __doc__) -> Parser:
    """Flags of a matrix."""
    flags = Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        fromfile_prefix_chars="@",
    )
    for name in ("methods", "data", "models"):
        flags.add_argument(f"--{name}", nargs="+", metavar="NAME")
    flags.add_argument("--seeds", nargs="+", metavar="SEED", default=["0"])
    flags.add_argument(
        "--config",
        default=os.path.relpath(EQUAL) + ":{data},{model},{method}",
        help="of train.py; {data}, {model} and {method} are replaced (default: configs/equal.py)",
    )
    lists: dict[str, Any] = {"nargs": "+", "default": []}
    flags.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="extend",
        help="override the configuration of all cells",
        **lists,
    )
    flags.add_argument(
        "--set-for",
        metavar=("NAME[,NAME]", "KEY=VALUE"),
        action="append",
        help="override that of the cells of a method, data set or model, or of several at once",
        **lists,
    )
    flags.add_argument(
        "--sweep",
        metavar=("KEY", "VALUE"),
        action="append",
        help="one more axis of the matrix",
        **lists,
    )
    flags.add_argument("--jobs", type=int, default=1, help="runs side by side, with cores each")
    flags.add_argument(
        "--gpus", nargs="+", default=[], metavar="ID", help="GPUs of the jobs, one each in turn"
    )
    flags.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    return flags


def main(options: argparse.Namespace, flags: Parser) -> int:
    """Trains what is not trained yet and writes the results.

    Returns:
        0; 1 if a cell failed or was stopped, 130 after SIGTERM or Ctrl-C.

    Raises:
        SystemExit: with code 2 after bad flags.
    """
    try:
        cells = cells_of(options)
        finished = sum([matrix.is_finished(cell) for cell in cells])
        options.output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        flags.error(str(error))
    print(f"{len(cells)} cells, {finished} of them finished", flush=True)
    setup, ends = describe(), itertools.count(1)
    rows = {cell.folder: {**cell.axes, "state": "waiting", "error": ""} for cell in cells}

    def ended(cell: Cell, outcome: Outcome) -> None:
        found = matrix.result(cell) if outcome.state == "finished" else {}
        rows[cell.folder] |= {"state": outcome.state, "error": outcome.line, **found}
        shown = f"{100 * found['test']:.2f} %" if found else outcome.line
        line = f"[{next(ends)}/{len(cells)}] {cell.title}: {outcome.state} {shown}"
        print(line.rstrip(), flush=True)
        write(options.output, setup, list(rows.values()))

    by_seed = sorted(cells, key=lambda cell: options.seeds.index(cell.axes["seed"]))
    whole = matrix.run(by_seed, matrix.slots(options.jobs, options.gpus), ended)
    found = list(rows.values())
    print(f"\n{write(options.output, setup, found)}")
    draw(found, [key for key, *_ in options.sweep], options.output / "results.png")
    return 130 if not whole else int(any(row["state"] != "finished" for row in found))


def cells_of(options: argparse.Namespace) -> list[Cell]:
    """The cells that the flags ask for.

    Raises:
        ValueError: in one line, what is wrong with them.
    """
    axes = {"data": options.data, "model": options.models, "method": options.methods}
    for name, values in axes.items():
        if not values:
            raise ValueError(f"--{name if name == 'data' else name + 's'} is needed")
    for key, *values in options.sweep:
        if not values or key in axes or key == "seed":
            raise ValueError(f"--sweep {key}: a key that is no axis yet, and values, are needed")
        axes = {**axes, key: values}
    if options.jobs < 1:
        raise ValueError(f"--jobs is {options.jobs}: at least 1 is needed")
    own = [(names.split(","), settings) for names, *settings in options.set_for]
    # The method last, for tables in which the methods of one setting are neighbours.
    axes["method"] = axes.pop("method")
    axes["seed"] = options.seeds
    return matrix.cells(options.config, axes, options.set, own, options.output / "cells")


def grouped(rows: Sequence[dict[str, Any]]) -> dict[tuple[tuple[str, str], ...], list[dict]]:
    """Rows that differ in their seed alone, by the axes that they share."""
    found: dict[tuple[tuple[str, str], ...], list[dict]] = {}
    for row in rows:
        axes = tuple((key, row[key]) for key in list(row)[: list(row).index("seed")])
        found.setdefault(axes, []).append(row)
    return found


def mean_and_deviation(rows: Sequence[dict[str, Any]], key: str) -> tuple[float, float] | None:
    """Mean and sample standard deviation (0 of one) in %; None without any value."""
    values = [100 * row[key] for row in rows if row.get(key) is not None]
    if not values:
        return None
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def write(folder: Path, setup: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """Writes results.md and results.csv; returns the former."""
    devices = {row["device"]: None for row in rows if "device" in row}
    text = f"{heading({**setup, 'devices': list(devices)})}\n{markdown(rows)}"
    (folder / "results.md").write_text(text)
    with (folder / "results.csv").open("w", newline="") as file:
        names = dict.fromkeys(key for row in rows for key in row)
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    return text


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table of means, and what has failed."""

    def shown(group: Sequence[dict[str, Any]], key: str) -> str:
        found = mean_and_deviation(group, key)
        if found is None:
            return ""
        several = sum(row.get(key) is not None for row in group) > 1
        return f"{found[0]:.2f} ± {found[1]:.2f}" if several else f"{found[0]:.2f}"

    lines = []
    for axes, group in grouped(rows).items():
        done = sum(row["state"] == "finished" for row in group)
        seeds = str(done) if done == len(group) else f"{done} of {len(group)}"
        lines.append([*dict(axes).values(), seeds, *(shown(group, key) for key in COLUMNS)])
    names = [matrix.short(key) for key, _ in next(iter(grouped(rows)))]
    text = table([*names, "seeds", *COLUMNS.values()], lines) + f"\n{LEGEND}"
    for row in rows:
        if row["state"] != "finished":
            axes = list(row.items())[: list(row).index("seed") + 1]
            title = " ".join(f"{matrix.short(key)}={value}" for key, value in axes)
            text += f"\n- {title}: {row['state']}" + (f": `{row['error']}`" if row["error"] else "")
    return text.rstrip("\n") + "\n"


def draw(rows: Sequence[dict[str, Any]], sweeps: Sequence[str], path: Path) -> None:
    """Draws means with standard deviations, a panel for every data set and model.

    Along the first swept key a line for every method; without any the methods side by side.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = grouped(rows)
    panels = list(dict.fromkeys((dict(axes)["data"], dict(axes)["model"]) for axes in groups))
    along = sweeps[0] if sweeps else "method"
    figure = Figure(figsize=(max(6, 4.5 * len(panels)), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, each in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        lines: dict[str, dict[str, Sequence[dict]]] = {}
        for axes, group in groups.items():
            chosen = dict(axes)
            if (chosen.pop("data"), chosen.pop("model")) == panel:
                place = chosen.pop(along)
                label = " ".join(
                    value if key == "method" else f"{matrix.short(key)}={value}"
                    for key, value in chosen.items()
                )
                lines.setdefault(label, {})[place] = group
        _draw_panel(each, lines, "-" if sweeps else "")
        each.set_title(" ".join(panel))
        each.set_xlabel(matrix.short(along))
        each.set_ylabel("test accuracy, %")
        each.grid(alpha=0.3)
        handles, labels = each.get_legend_handles_labels()
        each.legend(handles, labels, fontsize="small")
    figure.savefig(path, format="png", dpi=120)


def _draw_panel(axes: Any, lines: Mapping[str, Mapping[str, Any]], style: str) -> None:
    """Filled: the last step; hollow: the exit by validation, where it is another number."""
    places = list(dict.fromkeys(place for line in lines.values() for place in line))
    numeric = all(_is_number(place) for place in places)
    positions = {place: float(place) if numeric else at for at, place in enumerate(places)}
    if not numeric:
        axes.set_xticks(range(len(places)), places)
        axes.set_xlim(-0.5, len(places) - 0.5)
    for number, (label, line) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        final = {place: mean_and_deviation(group, "test") for place, group in line.items()}
        chosen = {place: mean_and_deviation(group, "test_by_exit") for place, group in line.items()}
        differs = any(chosen[place] not in (None, final[place]) for place in line)
        series = [(final, "last step", {"marker": "o", "linestyle": style})]
        if differs:
            hollow = {"marker": "D", "markerfacecolor": "white", "linestyle": ":" if style else ""}
            series.append((chosen, "exit by validation", hollow))
        for found, name, look in series:
            points = [(positions[place], *each) for place, each in found.items() if each]
            if points:
                x, means, deviations = zip(*points, strict=True)
                shown = f"{label}, {name}" if label else name
                axes.errorbar(x, means, deviations, color=colour, label=shown, capsize=3, **look)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


if __name__ == "__main__":
    flags = parser()
    sys.exit(main(flags.parse_args(), flags))
