"""What a slow link between two stages costs: local, delayed and synchronous methods.

    python bench/links.py --output runs/slow_links.json

Linux, root, iproute2 and two cores. Two processes, each in a network namespace and pinned to a core
of its own, train one stage each. The namespaces are joined by a relay that holds every packet for
the delay (`bench/relay.py`); nothing else of this machine's network takes part or changes. The same
two processes train every row at every delay, in turns: a few batches that do not count, then a
segment of about `--seconds`, from the first dispatch until all work is done.

Rows are those of `bench/throughput.py`. A local row may have `--in-flight` batches dispatched and
unfinished (the Trainer's `max_in_flight`): their number must cover two delays, in which a message
goes up and word of its end comes back. JAX's socket transport has a bound of its own, about four
arrays from a process in a round trip. A message is one array; where that is still too little, as
for 45 ms a batch at a delay of 100 ms, T batches must make one message (T=4).

Columns, as medians (lowest to highest) over the segments:

    kept        throughput, over that of the same row at the first delay, turn by turn
    simulated   ms of a batch in the simulated segment, from the median time of every call on one
                core alone, the latency and bandwidth of the link at no delay, and the delay
    extra       ms of a batch more than at the first delay: measured, simulated, and the error
    relay       processor time of the relay, as a share of one core: it takes it from the stages
"""

import contextlib
import functools
import math
import signal
import statistics
import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import rows as row_specs
import runner
from relay import ADDRESSES, LinkError, SlowLink, missing
from rows import Row
from runner import Columns, Processes, Spread

ROWS = (
    *("deinforeg,K=2", "deinforeg,K=2,T=4", "fdg,K=2"),
    *("bp:1f1b,K=2,M=4", "bp:gpipe,K=2,M=4"),
)
DELAYS = (0.0, 10.0, 50.0, 100.0)
NET = {"hidden": 1024, "depth": 12, "batch": 200}
PORTS = {"coordinator": f"{ADDRESSES[0]}:7000", "transfer_port": 7001}  # all are free there
FEWEST_BATCHES = 8
WARM_UP_SHARE = 0.25  # of a segment
COST_BATCHES = 5
SMALLEST_EXTRA = 1.0  # ms; an error of less says nothing


def measure(rows: Sequence[Row], options: dict[str, Any]) -> dict[str, Any]:
    """Trains every row at every delay: "link" at none, "costs" by row, "segments" by both."""
    cores, delays = runner.cores(), options["delays"]
    net = {name: options[name] for name in ("model", *NET, "head", "in_flight")}
    shared = {**PORTS, "num_processes": len(ADDRESSES)}
    addresses = [{**shared, "process_id": k, "address": x} for k, x in enumerate(ADDRESSES)]
    costs: dict[Row, list[dict]] = {}
    with contextlib.ExitStack() as stack:
        link = stack.enter_context(SlowLink())
        link.set(0.0, options["bandwidth"])
        prefixes = [link.prefix(end) for end in range(len(ADDRESSES))]
        pair = stack.enter_context(Processes(cores[:2], addresses, prefixes))
        alone = stack.enter_context(Processes(cores[:1]))
        for row in rows:
            pair.ask("build", str(row), net | row.options())
            pair.ask("run", str(row), FEWEST_BATCHES)
            alone.ask("build", str(row), net | row.alone.options())
            costs[row] = alone.ask("costs", str(row), COST_BATCHES)
        measured = {"link": pair.link(), "costs": costs}

        def train(delay: float, row: Row, batches: int) -> dict[str, Any]:
            link.set(delay / 1e3, options["bandwidth"])
            warm_up = max(FEWEST_BATCHES // 2, math.ceil(WARM_UP_SHARE * batches))
            pair.ask("run", str(row), warm_up)
            before = link.used()
            segment = pair.segment(str(row), batches, lambda: link.used()["processor"])
            relay = link.used()["processor"] - before["processor"]
            if delay == delays[-1]:
                costs[row] += alone.ask("costs", str(row), COST_BATCHES)
            kept = {name: segment[name] for name in ("ms", "others")}
            return {**kept, "batches": batches, "relay": relay / segment["seconds"]}

        arms = {}
        for delay in delays:
            for row in rows:  # segments of the wanted length, by simulation
                ms = simulated(row, delay, 4 * FEWEST_BATCHES * row.chunk, measured, options)
                wanted = max(FEWEST_BATCHES, math.ceil(1e3 * options["seconds"] / ms))
                batches = row.chunk * math.ceil(wanted / row.chunk)
                arms[delay, row] = functools.partial(train, delay, row, batches)
        return {**measured, "segments": runner.turns(arms, options["repeats"])}


def simulated(
    row: Row, delay: float, batches: int, measured: dict[str, Any], options: dict[str, Any]
) -> float:
    """Milliseconds of a batch in a simulated segment."""
    link = measured["link"]
    link = {**link, "latency": link["latency"] + delay / 1e3}
    seconds = row.simulated(measured["costs"][row], link, batches, options["in_flight"])
    return 1e3 * seconds / batches


def compare(
    rows: Sequence[Row], measured: dict[str, Any], options: dict[str, Any]
) -> list[dict[str, Any]]:
    """What the segments say of each row at each delay."""
    results: list[dict[str, Any]] = []
    for row in rows:
        first = measured["segments"][options["delays"][0], row]
        near: dict[str, Any] = {}
        for delay in options["delays"]:
            segments = measured["segments"][delay, row]
            ms, batches = Spread.of(x["ms"] for x in segments), segments[0]["batches"]
            played = simulated(row, delay, batches, measured, options)
            near = near or {"ms": ms.median, "simulated": played}
            extra, expected = ms.median - near["ms"], played - near["simulated"]
            results.append(
                {
                    "row": str(row),
                    "delay_ms": delay,
                    "batches": batches,
                    "ms": ms,
                    "kept": runner.ratios(first, segments),
                    "simulated_ms": played,
                    "simulated_error": played / ms.median - 1,
                    "extra_ms": extra,
                    "simulated_extra_ms": expected,
                    "extra_error": expected / extra - 1 if extra > SMALLEST_EXTRA else None,
                    "relay": statistics.median(x["relay"] for x in segments),
                }
            )
    return results


COLUMNS: Columns = {
    "row": lambda r: f"`{r['row']}`",
    "delay ms": lambda r: f"{r['delay_ms']:g}",
    "batches": lambda r: r["batches"],
    "ms per batch": lambda r: r["ms"].show(),
    "kept": lambda r: r["kept"].show(2),
    "simulated ms": lambda r: f"{r['simulated_ms']:.1f} ({r['simulated_error']:+.1%})",
    "extra ms: measured, simulated": lambda r: (
        f"{r['extra_ms']:.1f}, {r['simulated_extra_ms']:.1f}"
        + (f" ({r['extra_error']:+.1%})" if r["extra_error"] is not None else "")
    ),
    "relay": lambda r: f"{r['relay']:.1%}",
}


def parse() -> tuple[Namespace, list[Row]]:
    """Options and rows."""
    parser = runner.flags(__doc__)
    runner.net_flags(parser, ("mlp", "vgg"), rows=ROWS, **NET)
    delay, bandwidth = runner.at_least(0.0), runner.at_least(1.0)
    parser.add_argument("--delays", nargs="+", type=delay, default=DELAYS, help="ms one way")
    parser.add_argument("--bandwidth", type=bandwidth, default=math.inf, help="bytes/s of the link")
    parser.add_argument("--in-flight", type=runner.count, default=16, help="batches at most")
    parser.add_argument("--seconds", type=runner.at_least(0.01), default=4.0, help="of a segment")
    parser.add_argument("--repeats", type=runner.count, default=3, help="segments of row and delay")
    options = parser.parse_args()
    try:
        rows = [row_specs.parse(text) for text in options.rows]
        for row in rows:
            row.check(options.depth, options.batch)
            if row.engine == row_specs.TORCH:
                raise ValueError(f"row '{row}': PyTorch's rows are those of throughput.py")
            if (row.groups, row.data) != (2, 1):
                raise ValueError(f"row '{row}': two stages on two devices are needed, K=2")
    except ValueError as error:
        parser.error(str(error))
    if problem := missing():
        parser.error(f"a slow link needs {problem}")
    if len(runner.cores()) < 2:
        parser.error("two cores are needed, one for each stage")
    return options, rows


def main() -> None:
    arguments, rows = parse()
    options = vars(arguments)
    output = options.pop("output")
    options |= {"rows": [str(row) for row in rows], "delays": sorted(set(options["delays"]))}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # clean up on the way out
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    setup = runner.describe()
    try:
        measured = measure(rows, options)
    except LinkError as error:
        sys.exit(f"error: {error}")
    results = compare(rows, measured, options)
    segments = [segment for arm in measured["segments"].values() for segment in arm]
    texts = (
        runner.options_line(options, "links.py"),
        runner.columns(COLUMNS, results),
        f"- The link without delay: {runner.link_text(measured['link'])}.",
        *runner.others_note(segments, "Other processes and the kernel's network"),
    )
    by_row = {str(row): {"costs": measured["costs"][row], "segments": {}} for row in rows}
    for (delay, row), arm in measured["segments"].items():
        by_row[str(row)]["segments"][delay] = arm
    values = {"link": measured["link"], "rows": by_row, "results": results}
    runner.publish(setup, "\n".join(texts), output, options=options, **values)


if __name__ == "__main__":
    main()
