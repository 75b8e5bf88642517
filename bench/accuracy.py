r"""Accuracy of methods x data sets x models x seeds, and of any other key of the configuration.

    python bench/accuracy.py --methods bp scpl deinforeg --data cifar10 fashion_mnist \
        --models vgg8 --seeds 0 1 2 --set epochs=2 model.width=0.25 \
        --set-for deinforeg method.projector=256-256 --sweep data.label_noise 0 0.4 \
        --jobs 2 --output runs/table
    python bench/accuracy.py @bench/label_noise.txt --jobs 2 --output runs/label-noise

Every cell is a run of train.py in a folder of its own below --output. The same command again goes
on where it stopped: finished cells are not trained again, killed ones continue. It writes
results.md, results.csv (a row a cell) and results.png. `@FILE` stands for the arguments in a file,
in which # begins a comment. Of language models it tells bits per byte instead. Jobs on one GPU take
turns there; under NVIDIA's Multi-Process Service (`nvidia-cuda-mps-control -d`) they run at once.
"""

import argparse
import csv
import functools
import itertools
import os
import shlex
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matrix
import runner
from matrix import Cell, Outcome

EQUAL = Path(__file__).resolve().parents[1] / "configs" / "equal.py"
# Keys of a cell's result, and their columns.
COLUMNS = {
    "test": "last step",
    "test_by_exit": "exit by validation",
    "test_by_step": "step by validation",
    "papers": "best test epoch (papers)",
    "loss": "loss",
}
TOKEN_COLUMNS = {
    "bits_per_byte": "bits per byte",
    "each": "of each seed",
    "bits_by_exit": "exit by validation",
    "test": "accuracy, %",
}
PLAIN = ("loss", "bits_per_byte", "bits_by_exit")  # all others are shares
LEGEND = """Test accuracy in %, mean ± sample standard deviation over the seeds. *Last step*: final
exit after the last step, and *loss* its mean cross-entropy. *Exit by validation*: after the last
step, the exit that is best on the validation split. *Step by validation*: final exit at the
evaluation that is best on the validation split. *Best test epoch (papers)*: best exit at its best
evaluation, both chosen by the test accuracy itself, as the papers report it; not a result.
"""
TOKEN_LEGEND = """Bits per byte of the test split after the last step, mean ± sample standard
deviation over the seeds. *Bits per byte* and *accuracy* (share of tokens that were the likeliest)
are those of the final exit. *Exit by validation*: the exit with fewest on the validation split.
"""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C564B")
LOOKS = (("test", "last step", "o", "", "-"), ("test_by_exit", "exit by validation", "D", "w", ":"))
TOKEN_LOOKS = tuple(
    (key, *look) for key, (_, *look) in zip(("bits_per_byte", "bits_by_exit"), LOOKS, strict=True)
)
LOSS_LOOKS = (("loss", "last step", "o", "", "-"),)
MOST_UPRIGHT = 5  # names of values along an axis that are not turned
MOST_INSIDE = 6  # lines whose legend has a place in their panel


def parser(description: str | None = __doc__) -> argparse.ArgumentParser:
    """Flags of a matrix."""
    layout = argparse.RawDescriptionHelpFormatter
    flags = argparse.ArgumentParser(
        description=description, formatter_class=layout, fromfile_prefix_chars="@"
    )
    read_line = functools.partial(shlex.split, comments=True)
    flags.convert_arg_line_to_args = read_line  # type: ignore[method-assign]

    def several(name: str, metavar: Any, words: str, **more: Any) -> None:
        flags.add_argument(name, nargs="+", metavar=metavar, help=words, **more)

    for name in ("methods", "data", "models"):
        several(f"--{name}", "NAME", "an axis of the matrix")
    several("--seeds", "SEED", "another", default=["0"])
    flags.add_argument(
        "--config",
        default=os.path.relpath(EQUAL) + ":{data},{model},{method}",
        help="of train.py; {data}, {model}, {method} and what is swept are replaced (default: "
        "configs/equal.py)",
    )
    words = "override the configuration of all cells"
    several("--set", "KEY=VALUE", words, action="extend", default=[])
    words = "override that of the cells of a method, data set or model, or of several at once"
    several("--set-for", ("NAME[,NAME]", "KEY=VALUE"), words, action="append", default=[])
    words = "one more axis, of a key or of what stands in braces in --config"
    several("--sweep", ("KEY", "VALUE"), words, action="append", default=[])
    words = "METHOD with settings of its own, as one more method of the matrix"
    several("--variant", ("NAME", "METHOD"), words, action="append", default=[])
    words = "leave out the cells that have all of these values"
    flags.add_argument(
        "--without", metavar="VALUE[,VALUE]", action="append", default=[], help=words
    )
    flags.add_argument("--along", metavar="AXIS", help="of the picture (default: what is swept)")
    words = "what the picture shows (default: accuracy, or bits per byte)"
    flags.add_argument("--draw", choices=("loss",), help=words)
    flags.add_argument("--jobs", type=int, default=1, help="runs side by side, with cores each")
    several("--gpus", "ID", "GPUs of the jobs, one each in turn", default=[])
    flags.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    return flags


def cells_of(options: argparse.Namespace) -> list[Cell]:
    """The cells that the flags ask for; raises ValueError with a line if something is wrong."""
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
    variants: dict[str, str] = {}
    for name, *rest in options.variant:
        if not rest:
            raise ValueError(f"--variant {name}: a method, and KEY=VALUE for it, are needed")
        variants[name] = rest[0]
        own.append(([name], rest[1:]))
    axes["method"] = [*axes["method"], *variants]
    if options.along not in (None, *axes):
        raise ValueError(f"--along {options.along}: {', '.join(axes)} are the axes")
    # The method last, for tables in which the methods of one setting are neighbours.
    axes["method"] = axes.pop("method")
    axes["seed"] = options.seeds
    without = [values.split(",") for values in options.without]
    folder = options.output / "cells"
    return matrix.cells(options.config, axes, options.set, own, folder, variants, without)


def of_tokens(rows: Iterable[Mapping[str, Any]]) -> bool:
    """Whether these are results of language models."""
    return any("bits_per_byte" in row for row in rows)


def grouped(rows: Sequence[dict[str, Any]]) -> dict[tuple, list[dict]]:
    """Rows that differ in their seed alone, by the axes that they share."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        axes = itertools.takewhile(lambda item: item[0] != "seed", row.items())
        groups.setdefault(tuple(axes), []).append(row)
    return groups


def mean_and_deviation(rows: Sequence[dict[str, Any]], key: str) -> tuple[float, float] | None:
    """Mean and sample standard deviation (0 of one), of accuracies in %; None without any value."""
    factor = 1 if key in PLAIN else 100
    values = [factor * row[key] for row in rows if row.get(key) is not None]
    if not values:
        return None
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def write(folder: Path, setup: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """Writes results.md and results.csv; returns the former."""
    devices = list(dict.fromkeys(row["device"] for row in rows if "device" in row))
    text = f"{runner.heading({**setup, 'devices': devices})}\n{markdown(rows)}"
    (folder / "results.md").write_text(text)
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, dict.fromkeys(key for row in rows for key in row))
        writer.writeheader()
        writer.writerows(rows)
    return text


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table of means, and what has failed."""
    columns, legend = (TOKEN_COLUMNS, TOKEN_LEGEND) if of_tokens(rows) else (COLUMNS, LEGEND)

    def shown(group: Sequence[dict[str, Any]], key: str) -> str:
        if key == "each":
            return ", ".join(f"{row['bits_per_byte']:.4f}" for row in group if "test" in row)
        numbers = mean_and_deviation(group, key) or ()
        several = sum(row.get(key) is not None for row in group) > 1
        digits = 4 if key in PLAIN else 2
        return " ± ".join(f"{number:.{digits}f}" for number in numbers[: 1 + several])

    lines, notes = [], []
    for axes, group in grouped(rows).items():
        missing = [row for row in group if row["state"] != "finished"]
        done = f"{len(group) - len(missing)} of {len(group)}" if missing else str(len(group))
        lines.append([*dict(axes).values(), done, *(shown(group, key) for key in columns)])
        names = [matrix.short(key) for key, _ in axes]
        for row in missing:
            cell = " ".join(f"{name}={value}" for name, (_, value) in zip(names, axes, strict=True))
            error = f": `{row['error']}`" if row["error"] else ""
            notes.append(f"\n- {cell} seed={row['seed']}: {row['state']}{error}")
    text = runner.table([*names, "seeds", *columns.values()], lines)
    return f"{text}\n{legend}{''.join(notes)}".rstrip("\n") + "\n"


def draw(
    rows: Sequence[dict[str, Any]], along: str, path: Path, measure: str | None = None
) -> None:
    """Draws means with deviations along an axis, a panel for every data set and model.

    Filled: the last step; hollow: the exit by validation, where that is another number. What has
    one value of an axis of numbers goes through the panel as a line. `measure` is None or "loss".
    """
    from matplotlib.figure import Figure

    looks, name = (TOKEN_LOOKS, "bits per byte") if of_tokens(rows) else (LOOKS, "accuracy, %")
    if measure:
        looks, name = LOSS_LOOKS, measure
    panels: dict[str, dict[str, dict[str, list[dict]]]] = {}
    for axes, group in grouped(rows).items():
        chosen = dict(axes)
        panel, x = f"{chosen.pop('data')} {chosen.pop('model')}", chosen.pop(along)
        label = " ".join(
            value if key == "method" else f"{matrix.short(key)}={value}"
            for key, value in chosen.items()
        )
        panels.setdefault(panel, {}).setdefault(label, {})[x] = group
    most = max(len(lines) for lines in panels.values())
    width = 4.5 if most <= MOST_INSIDE else 7.5
    figure = Figure(figsize=(max(6, width * len(panels)), 4.5), layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (panel, lines) in zip(all_axes, panels.items(), strict=True):
        draw_panel(axes, lines, looks)
        axes.set(title=panel, xlabel=matrix.short(along), ylabel=f"test {name}")
        axes.grid(alpha=0.3)
        beside = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if most > MOST_INSIDE else {}
        axes.legend(*axes.get_legend_handles_labels(), fontsize="small", **beside)
    figure.savefig(path, format="png", dpi=120)


def draw_panel(
    axes: Any, lines: Mapping[str, Mapping[str, list[dict]]], looks: Sequence[tuple] = LOOKS
) -> None:
    """Draws a line for every label; values that are no numbers stand side by side, unconnected."""
    values = list(dict.fromkeys(x for groups in lines.values() for x in groups))
    try:
        places, joined = {x: float(x) for x in values}, True
    except ValueError:
        places, joined = {x: float(place) for place, x in enumerate(values)}, False
        turned = {"rotation": 30, "ha": "right"} if len(values) > MOST_UPRIGHT else {}
        axes.set_xticks(range(len(values)), values, **turned)
        axes.set_xlim(-0.5, len(values) - 0.5)
    for number, (label, groups) in enumerate(lines.items()):
        last: list[tuple] = []
        for key, name, marker, fill, line in looks:
            means = {places[x]: mean_and_deviation(group, key) for x, group in groups.items()}
            points = [(place, *mean) for place, mean in means.items() if mean]
            if not joined:  # else a line would lack points
                points = [point for point in points if point not in last]
            if not points or set(points) <= set(last):
                continue
            x, y, deviations = zip(*points, strict=True)
            colour = COLOURS[number % len(COLOURS)]
            if number >= len(COLOURS) and line == "-":  # each colour for a second time
                marker, line = "s", "--"
            look = {"color": colour, "marker": marker, "markerfacecolor": fill or colour}
            names = [label, name] if len(looks) > 1 else [label or name]
            shown, line = ", ".join(filter(None, names)), line if joined else ""
            if joined and len(points) == 1 and len(places) > 1:
                axes.axhline(y[0], color=colour, linewidth=1, linestyle=line)
            axes.errorbar(x, y, deviations, capsize=3, label=shown, linestyle=line, **look)
            last = points


def main(options: argparse.Namespace, flags: argparse.ArgumentParser) -> int:
    """Trains what is not trained yet and writes the results.

    Returns:
        0; 1 if a cell failed or was stopped, 130 after SIGTERM or Ctrl-C.
    """
    try:
        cells = cells_of(options)
        finished = sum([matrix.is_finished(cell) for cell in cells])
        options.output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        flags.error(str(error))
    print(f"{len(cells)} cells, {finished} of them finished", flush=True)
    setup, number = runner.describe(), itertools.count(1)
    by_cell = {cell.folder: {**cell.axes, "state": "waiting", "error": ""} for cell in cells}
    rows = by_cell.values()

    def ended(cell: Cell, outcome: Outcome) -> None:
        result = matrix.result(cell) if outcome.state == "finished" else {}
        by_cell[cell.folder] |= {"state": outcome.state, "error": outcome.line, **result}
        shown = outcome.line
        if result:
            bits = result.get("bits_per_byte")
            shown = f"{100 * result['test']:.2f} %" if bits is None else f"{bits:.4f}"
        line = f"[{next(number)}/{len(cells)}] {cell.title}: {outcome.state} {shown}"
        print(line.rstrip(), flush=True)
        write(options.output, setup, list(rows))

    by_seed = sorted(cells, key=lambda cell: options.seeds.index(cell.axes["seed"]))
    complete = matrix.run(by_seed, matrix.slots(options.jobs, options.gpus), ended)
    print(f"\n{write(options.output, setup, list(rows))}")
    along = options.along or next((key for key, *_ in options.sweep), "method")
    draw(list(rows), along, options.output / "results.png", options.draw)
    return 130 if not complete else int(any(row["state"] != "finished" for row in rows))


if __name__ == "__main__":
    flags = parser()
    sys.exit(main(flags.parse_args(), flags))
