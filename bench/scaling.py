"""Simulated speed-up of up to 256 stages, from the measured times of one stage and a given link.

    python bench/scaling.py --output runs/scaling.json --picture docs/scaling.png
    python bench/scaling.py --measured runs/throughput.json --bandwidth 50e9 --latency 5e-6

Measured: the calls of the middle one of three equal stages, one after another on one device (a
pinned core, or a GPU where JAX has one). Every call takes the same number of examples: a batch of a
local or delayed method, a microbatch of bp. Simulated: K such stages on K devices, one process
each, so that the net grows with K, and bp's batch with M. The speed-up is the time that all calls
of a batch take on one device, over the time from one batch's end to the next.

    local     deinforeg, M = 1        gpipe, 1f1b   bp, M = 4, 8 and 4 K
    delayed   fdg

The points of `--measured` are rows of a throughput benchmark without replicas: time of the same
method on one device over theirs. Theirs is a net of constant size, and a segment with its fill.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import rows as row_specs
import workers
from common import SIZES, describe, heading, save, table
from rows import Row

from jdecouple import schedules
from jdecouple.schedules import Costs, simulate

SPECS = {"local": "deinforeg,K=3", "delayed": "fdg,K=3", "bp": "bp:gpipe,K=3,M=2"}
MIDDLE = 1  # of three stages
LAST_POWER = 8  # of 2: 256 stages
BATCHES = 8  # of a simulation in which batches overlap
COLOURS = {"local": "#009E73", "delayed": "#CC79A7", "gpipe": "#0072B2", "1f1b": "#D55E00"}
STYLES = {"4": ":", "8": "--", "4K": "-", "": "-"}


class Series(NamedTuple):
    """A curve: a schedule and its microbatches, "4K" for four times the stages."""

    schedule: str
    microbatches: str = ""

    def count(self, stages: int) -> int:
        """M."""
        return 4 * stages if self.microbatches == "4K" else int(self.microbatches or 1)

    def __str__(self) -> str:
        return self.schedule + (f", M = {self.microbatches}" if self.microbatches else "")


SERIES = (
    *(Series("local"), Series("delayed")),
    *(Series(name, parts) for name in ("gpipe", "1f1b") for parts in ("4", "8", "4K")),
)


def measure(options: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Costs of the middle stage.

    Returns:
        Seconds of a call: "local" and "delayed", and of bp "F", "B" and "S"; and "message_bytes"
        and "error_bytes".
    """
    kinds = workers.devices()
    on_cpu = all(kind.startswith("cpu") for kind in kinds)
    shared = {**options, "depth": 3 * options["depth"], "dtype": "float32", "input": "placed"}
    found: dict[str, Any] = {"device": kinds[0]}
    with workers.Processes(workers.cores()[:1] or None if on_cpu else None) as one:
        for name, spec in SPECS.items():
            row = row_specs.parse(spec)
            size = {"batch": options["batch"] * row.microbatches}
            one.ask("build", name, {**shared, **size, **row.options(apart=True)})
            (reply,) = one.ask("costs", name, repeats)
            calls = {kinds: seconds for k, kinds, seconds in reply["calls"] if k == MIDDLE}
            found |= calls if name == "bp" else {name: sum(calls.values())}
            found |= {key: reply[key][MIDDLE] for key in ("message_bytes", "error_bytes")}
    return found


def speed_up(series: Series, stages: int, found: dict[str, Any], link: dict[str, Any]) -> float:
    """Of K equal stages on K devices over one device."""
    parts = series.count(stages)
    plan = schedules.build(series.schedule, stages, parts)
    whole = plan.local or plan.delayed
    each: dict[str, Any] = {"forward": found["F"], "backward": found["B"], "step": found["S"]}
    if whole:  # one call does all
        each = {"calls": {call[:2]: found[series.schedule] for call in plan.calls()}}
    costs = Costs(
        **each,
        **link,
        message_bytes=found["message_bytes"],
        error_bytes=found["error_bytes"],
        hosts=range(stages),
    )
    alone = found[series.schedule] if whole else parts * (found["F"] + found["B"]) + found["S"]
    simulated = simulate(plan, costs, batches=BATCHES if whole else 1)
    return stages * alone / simulated.seconds_per_batch


def measured_points(path: Path) -> list[dict[str, Any]]:
    """Rows of a throughput benchmark that have a curve.

    Raises:
        ValueError: not a file of that benchmark.
    """
    try:
        results = json.loads(path.read_text())["results"]
        rows = [(row_specs.parse(each["row"]), each) for each in results]
        return [
            {"row": str(row), "schedule": row.schedule, "stages": row.stages, **_ratio(each)}
            for row, each in rows
            if _has_curve(row) and each["devices"] == row.devices
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--measured {str(path)!r} is no JSON of throughput.py: {error}") from None


def _has_curve(row: Row) -> bool:
    return row.rows > 1 and row.data == 1 and row.schedule in COLOURS


def _ratio(result: dict[str, Any]) -> dict[str, float]:
    return {name: float(result["ratio_to_method"][name]) for name in ("median", "low", "high")}


def draw(
    curves: dict[Series, dict[int, float]], points: Sequence[dict[str, Any]], title: str, path: Path
) -> None:
    """Speed-up against K, both logarithmic, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    stages = list(next(iter(curves.values())))
    axes.plot(stages, stages, color="black", linewidth=0.8, linestyle="-.", label="K", zorder=9)
    for series, curve in curves.items():
        style: dict[str, Any] = {
            "color": COLOURS[series.schedule],
            "linestyle": STYLES[series.microbatches],
        }
        wide = 3.5 if series.schedule in ("local", "gpipe") else 1.5  # others lie on them
        axes.plot(list(curve), list(curve.values()), linewidth=wide, label=str(series), **style)
    for marker, point in zip("osD^vP*X" * len(points), points, strict=False):
        errors = [[point["median"] - point["low"]], [point["high"] - point["median"]]]
        place: dict[str, Any] = {
            "color": COLOURS[point["schedule"]],
            "marker": marker,
            "markeredgecolor": "black",
        }
        label = f"measured: {point['row']}"
        axes.errorbar(
            point["stages"], point["median"], errors, linestyle="", capsize=3, label=label, **place
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.set_xlabel("stages K, a device each")
    axes.set_ylabel("speed-up over one device")
    axes.set_title(title, loc="left", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=120)


def report(
    options: dict[str, Any],
    found: dict[str, Any],
    curves: dict[Series, dict[int, float]],
    points: Sequence[dict[str, Any]],
) -> str:
    """The result as Markdown."""
    shown = ", ".join(f"{name} {value}" for name, value in options.items())
    calls = (("F", "F"), ("B", "B"), ("S", "S"), ("local", "FBS, local"), ("delayed", "BSF, fdg"))
    times = [(name, f"{1e3 * found[key]:.3f}") for key, name in calls]
    header = ("K", *map(str, curves))
    stages = list(next(iter(curves.values())))
    lines = [(k, *(f"{curve[k]:.2f}" for curve in curves.values())) for k in stages]
    texts = [
        f"{shown}; a call of a stage on {found['device']}, {found['message_bytes']} bytes up and "
        f"{found['error_bytes']} down a message; see bench/scaling.py\n",
        table(("call", "ms"), times),
        table(header, lines),
    ]
    for point in points:
        schedule, parts = point["schedule"], row_specs.parse(point["row"]).microbatches
        series = Series(schedule, str(parts) if schedule in ("gpipe", "1f1b") else "")
        wanted = curves.get(series, {}).get(point["stages"])
        beside = "" if wanted is None else f"; simulated, constant work a device: {wanted:.2f}"
        texts.append(
            f"- Measured: `{point['row']}` {point['median']:.2f} "
            f"({point['low']:.2f} to {point['high']:.2f}){beside}"
        )
    return "\n".join(texts)


def parse() -> tuple[argparse.Namespace, list[dict[str, Any]]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=tuple(SIZES), default="mlp")
    parser.add_argument("--hidden", type=int, help="width of a dense layer, or channels")
    parser.add_argument("--depth", type=int, default=1, help="blocks of a stage")
    parser.add_argument("--batch", type=int, help="examples of a call")
    parser.add_argument("--head", type=int, default=64, help="features of a block's projector")
    parser.add_argument("--bandwidth", type=float, default=25e9, help="bytes/s of a link")
    parser.add_argument("--latency", type=float, default=10e-6, help="seconds of a message")
    parser.add_argument("--stages", type=int, default=2**LAST_POWER, help="largest K")
    parser.add_argument("--repeats", type=int, default=20, help="batches measured")
    parser.add_argument("--measured", type=Path, help="JSON of throughput.py to draw beside it")
    parser.add_argument("--output", type=Path, help="JSON file to write, and .md beside it")
    parser.add_argument("--picture", type=Path, help="PNG to write")
    options = parser.parse_args()
    for name in ("hidden", "batch"):
        if getattr(options, name) is None:
            setattr(options, name, SIZES[options.model][name])
    for name in ("hidden", "depth", "batch", "head", "stages", "repeats"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}: at least 1 is needed")
    if not options.bandwidth > 0 or not 0 <= options.latency < math.inf:
        parser.error("--bandwidth must be above 0, --latency finite and at least 0")
    try:
        return options, measured_points(options.measured) if options.measured else []
    except ValueError as error:
        parser.error(str(error))


def main() -> None:
    arguments, points = parse()
    options = vars(arguments)
    output, picture, _, repeats, largest = (
        options.pop(name) for name in ("output", "picture", "measured", "repeats", "stages")
    )
    setup = describe()
    link = {name: options[name] for name in ("bandwidth", "latency")}
    found = measure(options, repeats)
    numbers = [2**power for power in range(int(math.log2(largest)) + 1)]
    curves: dict[Series, dict[int, float]] = {}
    for series in SERIES:
        curves[series] = {k: speed_up(series, k, found, link) for k in numbers}
        print(f"{series}: {curves[series][numbers[-1]]:.1f} at K = {numbers[-1]}", file=sys.stderr)
    text = f"{heading(setup)}\n{report(options, found, curves, points)}\n"
    print(text)
    if picture:
        title = f"Simulated, link of {link['bandwidth'] / 1e9:g} GB/s and {1e6 * link['latency']:g}"
        draw(curves, points, f"{title} us", picture)
    if output:
        named = {str(series): curve for series, curve in curves.items()}
        result = {"costs": found, "speed_up": named, "measured": points}
        save(output, {"setup": setup, "options": {**options, "repeats": repeats}, **result})
        output.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
