"""What a slow link between two stages costs: local, delayed and synchronous methods.

    python bench/slow_links.py --output runs/slow_links.json --picture docs/slow-links.png

Linux, root, iproute2 and two cores. Two processes, each in a network namespace and pinned to a core
of its own, train one stage each. The namespaces are joined by a relay that holds every packet for
the delay (`bench/link.py`); nothing else of this machine's network takes part or changes. The same
two processes train every row at every delay, in turns: a few batches that do not count, then a
segment of about `--seconds`, from the first dispatch until all work is done.

Rows are those of `bench/throughput.py`. A local row may have `--in-flight` batches dispatched and
unfinished (the Trainer's `max_in_flight`): their number must cover the time in which a message goes
up and word of its end comes back, two delays, or the link would hold the lower stage back. JAX's
socket transport has a bound of its own, about four arrays from a process in a round trip. A message
is one array; where that is still too little, as for 45 ms a batch at a delay of 100 ms, T batches
must make one message (T=4).

Columns, as medians (lowest to highest) over the segments:

    kept        throughput, over that of the same row at the first delay, turn by turn
    simulated   ms of a batch in the simulated segment, from the median time of every call on one
                core alone, the latency and bandwidth of the link at no delay, and the delay
    extra       ms of a batch more than at the first delay: measured, simulated, and the error
    relay       processor time of the relay, as a share of one core: it takes it from the stages
"""

import argparse
import contextlib
import math
import os
import signal
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rows as row_specs
import workers
from common import OTHERS_SHARE, Spread, busy_seconds, describe, heading, save, table
from link import ADDRESSES, SETTINGS, LinkError, SlowLink, missing
from rows import Row
from workers import Processes

ROWS = (
    *("deinforeg,K=2", "deinforeg,K=2,T=4", "fdg,K=2"),
    *("bp:1f1b,K=2,M=4", "bp:gpipe,K=2,M=4"),
)
DELAYS = (0.0, 10.0, 50.0, 100.0)
COORDINATOR_PORT, TRANSFER_PORT = 7000, 7001
FEWEST_BATCHES = 8
WARM_UP_SHARE = 0.25  # of a segment
COST_BATCHES = 5
CURVE_POINTS = 41
SMALLEST_EXTRA = 1.0  # ms; an error of less says nothing
# Okabe and Ito's colours, which the colour-blind tell apart.
COLOURS = ("#0072B2", "#009E73", "#D55E00", "#E69F00", "#CC79A7", "#56B4E9")


def measure(rows: Sequence[Row], options: dict[str, Any]) -> dict[str, Any]:
    """Trains every row at every delay.

    Returns:
        "link" at no delay; by row "costs" (replies of `Run.costs`), "batches" and "segments", both
        by delay.
    """
    cores, delays = workers.cores(), options["delays"]
    shared = {
        **{name: options[name] for name in ("model", "hidden", "depth", "batch", "head")},
        "dtype": "float32",
        "input": "placed",
        "in_flight": options["in_flight"],
    }
    found: dict[str, Any] = {str(row): {"costs": []} for row in rows}
    with contextlib.ExitStack() as stack:
        link = stack.enter_context(SlowLink())
        link.set(0.0, options["bandwidth"])
        pair = stack.enter_context(Processes(cores[:2], places(), [link.prefix(0), link.prefix(1)]))
        alone = stack.enter_context(Processes(cores[:1]))
        for row in rows:
            pair.ask("build", str(row), {**shared, **row.options(apart=False)})
            pair.ask("run", str(row), FEWEST_BATCHES)
            alone.ask("build", str(row), {**shared, **row.options(apart=True)})
            found[str(row)]["costs"] += alone.ask("costs", str(row), COST_BATCHES)
        measured = workers.measured_link(pair)
        for row in rows:
            counts = {delay: batches(row, found, measured, delay, options) for delay in delays}
            found[str(row)] |= {"batches": counts, "segments": {delay: [] for delay in delays}}
        for repeat in range(options["repeats"]):
            for delay in delays:
                link.set(delay / 1e3, options["bandwidth"])
                for row in rows:
                    count = found[str(row)]["batches"][delay]
                    each = segment(link, pair, row, count)
                    found[str(row)]["segments"][delay].append(each)
                    text = f"{delay:g} ms, {row}: {each['ms']:.1f} ms per batch, {count} batches"
                    print(f"repeat {repeat + 1}, delay {text}", file=sys.stderr)
            for row in rows if repeat else ():
                found[str(row)]["costs"] += alone.ask("costs", str(row), COST_BATCHES)
    return {"rows": found, "link": measured}


def places() -> list[dict[str, Any]]:
    """Arguments of `distributed.initialize` in the two namespaces, where all ports are free."""
    shared = {
        "coordinator": f"{ADDRESSES[0]}:{COORDINATOR_PORT}",
        "num_processes": len(ADDRESSES),
        "transfer_port": TRANSFER_PORT,
    }
    return [{**shared, "process_id": k, "address": each} for k, each in enumerate(ADDRESSES)]


def batches(
    row: Row, found: dict[str, Any], link: dict[str, float], delay: float, options: dict[str, Any]
) -> int:
    """Batches of a segment of about the wanted length, by simulation."""
    some = 4 * FEWEST_BATCHES * row.chunk
    each = simulated(row, found, link, delay, options, some) / some
    wanted = max(FEWEST_BATCHES, math.ceil(1e3 * options["seconds"] / each))
    return row.chunk * math.ceil(wanted / row.chunk)


def simulated(
    row: Row,
    found: dict[str, Any],
    link: dict[str, float],
    delay: float,
    options: dict[str, Any],
    count: int,
) -> float:
    """Milliseconds of a segment of so many batches."""
    wire = {**link, "latency": link["latency"] + delay / 1e3}
    seconds = row.simulated(found[str(row)]["costs"], wire, count, options["in_flight"])
    return 1e3 * seconds


def segment(link: SlowLink, pair: Processes, row: Row, count: int) -> dict[str, float]:
    """One measurement; "others" is the share of the machine that others took."""
    pair.ask("run", str(row), max(FEWEST_BATCHES // 2, math.ceil(WARM_UP_SHARE * count)))
    busy, before = busy_seconds(), link.used()
    replies = pair.ask("run", str(row), count)
    after, seconds = link.used(), workers.seconds(replies)
    relay = after["processor"] - before["processor"]
    own = relay + sum(reply["processor"] for reply in replies)
    return {
        "ms": 1e3 * seconds / count,
        "relay": relay / seconds,
        "bytes_per_second": (after["bytes"] - before["bytes"]) / seconds,
        "others": max(0.0, (busy_seconds() - busy - own) / seconds / (os.cpu_count() or 1)),
    }


def compare(
    rows: Sequence[Row], found: dict[str, Any], options: dict[str, Any]
) -> list[dict[str, Any]]:
    """What the segments say of each row at each delay."""
    results: list[dict[str, Any]] = []
    for row in rows:
        mine = found["rows"][str(row)]
        first: dict[str, Any] = {}
        for delay in options["delays"]:
            segments, count = mine["segments"][delay], mine["batches"][delay]
            times = [each["ms"] for each in segments]
            played = simulated(row, found["rows"], found["link"], delay, options, count) / count
            median = statistics.median(times)
            first = first or {"times": times, "median": median, "simulated": played}
            extra, foreseen = median - first["median"], played - first["simulated"]
            results.append(
                {
                    "row": str(row),
                    "delay_ms": delay,
                    "batches": count,
                    "ms": Spread.of(times),
                    "examples_per_second": Spread.of(
                        1e3 * options["batch"] / time for time in times
                    ),
                    "kept": Spread.of(a / b for a, b in zip(first["times"], times, strict=True)),
                    "simulated_ms": played,
                    "simulated_error": played / median - 1,
                    "extra_ms": extra,
                    "simulated_extra_ms": foreseen,
                    "extra_error": foreseen / extra - 1 if extra > SMALLEST_EXTRA else None,
                    "relay": statistics.median(each["relay"] for each in segments),
                    "megabytes_per_second": statistics.median(
                        each["bytes_per_second"] / 1e6 for each in segments
                    ),
                }
            )
    return results


def report(options: dict[str, Any], found: dict[str, Any], results: list[dict[str, Any]]) -> str:
    """The result as Markdown."""
    header = (
        *("row", "delay ms", "batches", "ms per batch", "examples/s", "kept"),
        *("simulated ms", "extra ms: measured, simulated", "relay", "MB/s"),
    )
    lines = []
    for each in results:
        extra = f"{each['extra_ms']:.1f}, {each['simulated_extra_ms']:.1f}"
        if each["extra_error"] is not None:
            extra += f" ({each['extra_error']:+.1%})"
        lines.append(
            (
                f"`{each['row']}`",
                f"{each['delay_ms']:g}",
                each["batches"],
                each["ms"].show(),
                f"{each['examples_per_second'].median:.0f}",
                each["kept"].show(2),
                f"{each['simulated_ms']:.1f} ({each['simulated_error']:+.1%})",
                extra,
                f"{each['relay']:.1%}",
                f"{each['megabytes_per_second']:.1f}",
            )
        )
    link = found["link"]
    rate = f", {link['bandwidth'] / 1e6:.0f} MB/s" if "bandwidth" in link else ""
    shown = ", ".join(f"{k} {v}" for k, v in options.items() if v is not None and k != "rows")
    segments = [
        each
        for row in found["rows"].values()
        for delay in row["segments"].values()
        for each in delay
    ]
    share = statistics.median(each["others"] for each in segments)
    valid = ": NOT VALID" if share > OTHERS_SHARE else ""
    settings = ", ".join(f"{name} = {value}" for name, value in SETTINGS.items())
    return "\n".join(
        (
            f"{shown}; medians (lowest to highest); columns: see bench/slow_links.py\n",
            table(header, lines),
            f"- The link without delay: {1e6 * link['latency']:.0f} us{rate}.",
            f"- In both namespaces: {settings}.",
            f"- Other processes and the kernel's network took {share:.1%} of the machine{valid}.",
        )
    )


def draw(
    rows: Sequence[Row],
    found: dict[str, Any],
    options: dict[str, Any],
    results: Sequence[dict[str, Any]],
    path: Path,
) -> None:
    """Measured points and simulated curves of the throughput against the delay, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    longest = max(options["delays"])
    delays = [longest * point / (CURVE_POINTS - 1) for point in range(CURVE_POINTS)]
    for row, colour, marker in zip(rows, COLOURS, "osD^vP", strict=False):
        speeds = []
        for delay in delays:
            count = batches(row, found["rows"], found["link"], delay, options)
            time = simulated(row, found["rows"], found["link"], delay, options, count) / count
            speeds.append(1e3 * options["batch"] / time)
        axes.plot(delays, speeds, color=colour, linewidth=1.2)
        mine = [each for each in results if each["row"] == str(row)]
        spreads = [each["examples_per_second"] for each in mine]
        errors = [
            [each.median - each.low for each in spreads],
            [each.high - each.median for each in spreads],
        ]
        axes.errorbar(
            [each["delay_ms"] for each in mine],
            [each.median for each in spreads],
            errors,
            linestyle="",
            capsize=3,
            color=colour,
            marker=marker,
            markeredgecolor="black",
            label=str(row),
        )
    axes.set_ylim(bottom=0)
    axes.set_xlabel("delay of the link, one way (ms)")
    axes.set_ylabel("examples/s")
    net = f"{options['depth']} blocks of {options['hidden']}, batch {options['batch']}"
    title = (
        f"Two stages over a slow link ({options['model']}, {net}): measured, and simulated (lines)"
    )
    axes.set_title(title, loc="left", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=120)


def parse() -> tuple[argparse.Namespace, list[Row]]:
    """Options and rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", nargs="+", default=ROWS, metavar="ROW")
    parser.add_argument("--delays", nargs="+", type=float, default=DELAYS, help="ms one way")
    parser.add_argument(
        "--bandwidth", type=float, default=math.inf, help="bytes/s of the link; default: any"
    )
    parser.add_argument("--in-flight", type=int, default=16, help="batches in flight at most")
    parser.add_argument("--model", choices=("mlp", "vgg"), default="mlp")
    parser.add_argument("--hidden", type=int, default=1024, help="width of a layer, or channels")
    parser.add_argument("--depth", type=int, default=12, help="number of equal blocks")
    parser.add_argument("--batch", type=int, default=200, help="examples of a global batch")
    parser.add_argument("--head", type=int, default=64, help="features of a block's projector")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a segment")
    parser.add_argument("--repeats", type=int, default=3, help="segments of each row and delay")
    parser.add_argument("--output", type=Path, help="JSON file to write, and .md beside it")
    parser.add_argument("--picture", type=Path, help="PNG to write")
    options = parser.parse_args()
    try:
        rows = [row_specs.parse(each) for each in options.rows]
        check(options, rows)
    except ValueError as error:
        parser.error(str(error))
    if problem := missing():
        parser.error(f"a slow link needs {problem}")
    if len(workers.cores()) < 2:
        parser.error("two cores are needed, one for each stage")
    return options, rows


def check(options: argparse.Namespace, rows: Sequence[Row]) -> None:
    """Raises ValueError for options that do not fit."""
    for name in ("in_flight", "hidden", "depth", "batch", "head", "repeats"):
        if getattr(options, name) < 1:
            label = name.replace("_", "-")
            raise ValueError(f"--{label} is {getattr(options, name)}: at least 1 is needed")
    for row in rows:
        if (row.rows, row.data) != (2, 1):
            raise ValueError(f"row {str(row)!r}: two stages on two devices are needed, as in K=2")
        if options.depth % row.stages or options.batch % row.microbatches:
            raise ValueError(f"row {str(row)!r}: --depth, --batch must be multiples of K and of M")
    if not all(0 <= each < math.inf for each in options.delays):
        raise ValueError(f"--delays are {options.delays}: milliseconds of at least 0 are needed")
    if not options.bandwidth > 0 or not 0 < options.seconds < math.inf:
        raise ValueError("--bandwidth and --seconds must be above 0")


def main() -> None:
    arguments, rows = parse()
    options = vars(arguments)
    output, picture = options.pop("output"), options.pop("picture")
    options["rows"] = [str(row) for row in rows]
    options["delays"] = sorted(set(options["delays"]))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # clean up on the way out
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    setup = describe()
    try:
        found = measure(rows, options)
    except LinkError as error:
        sys.exit(f"error: {error}")
    results = compare(rows, found, options)
    text = f"{heading(setup)}\n{report(options, found, results)}\n"
    print(text)
    if picture:
        draw(rows, found, options, results, picture)
    if output:
        save(output, {"setup": setup, "options": options, **found, "results": results})
        output.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
