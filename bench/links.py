r"""What a slow or thin link between two stages costs: local, delayed and synchronous methods.

    python bench/links.py --output runs/slow_links.json
    python bench/links.py --delays 0 --bandwidth 1.25e6 1e7 1.25e8 --wires float32 bfloat16 int8 \
        --batch 100 --seconds 1.5 --output runs/thin_links.json \
        --rows deinforeg,K=2 fdg,K=2 bp:1f1b,K=2,M=4

Linux, root, iproute2 and two cores. Two processes, each in a network namespace and pinned to a core
of its own, train one stage each. The namespaces are joined by a relay that holds every packet for
the delay and lets through so many bytes a second (`bench/relay.py`); nothing else of this machine's
network takes part or changes. The same two processes train every row by every wire (the Trainer's
`wire`) at every delay and bandwidth, in turns: a few batches that do not count, then a segment of
about `--seconds`, from the first dispatch until all work is done.

Rows, models and modules are those of `bench/throughput.py`. Pipelines of PyTorch have a pair of
processes of their own in the same namespaces, and Gloo's messages go through the relay, too;
nothing of them is simulated, and they have no wires.

A local row may have `--in-flight` batches dispatched and unfinished (the Trainer's
`max_in_flight`): their number must cover two delays, in which a message goes up and word of its end
comes back. JAX's socket transport has a bound of its own, about four arrays from a process in a
round trip. A message is one array; where that is still too little, as for 45 ms a batch at a delay
of 100 ms, T batches must make one message (T=4).

Columns, as medians (lowest to highest) over the segments:

    kept        throughput, over that of the same row and wire on the first link, turn by turn
    gain        throughput, over that of the first wire on the same link, turn by turn
    kB          that go over the link in a batch, both ways, packets and all: of the relay
    simulated   ms of a batch in the simulated segment, from the median time of every call on one
                core alone, the latency and bandwidth of the free link, the delay and the bandwidth
    extra       ms of a batch more than on the first link: measured, simulated, and the error
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
from pathlib import Path
from typing import Any, NamedTuple

import rows as row_specs
import runner
import throughput
from relay import ADDRESSES, LinkError, SlowLink, missing
from rows import TORCH, Row
from runner import Columns, Processes, Spread

from jdecouple.pipeline.wire import WIRES

ROWS = (
    *("deinforeg,K=2", "deinforeg,K=2,T=4", "fdg,K=2"),
    *("bp:1f1b,K=2,M=4", "bp:gpipe,K=2,M=4"),
)
DELAYS = (0.0, 10.0, 50.0, 100.0)
SIZES = {
    "mlp": {"hidden": 1024, "depth": 12, "batch": 200},
    **{model: throughput.SIZES[model] for model in ("vgg", "gpt")},
}
PORTS = {"coordinator": f"{ADDRESSES[0]}:7000", "transfer_port": 7001}  # all are free there
TORCH_PORTS = {"coordinator": f"{ADDRESSES[0]}:7002"}
FEWEST_BATCHES = 8
WARM_UP_SHARE = 0.25  # of a segment
COST_BATCHES = 5
SMALLEST_EXTRA = 1.0  # ms; an error of less says nothing


class Link(NamedTuple):
    """A link: ms one way, and bytes a second of each way."""

    delay: float
    bandwidth: float

    @property
    def mbits(self) -> str:
        """Mbit/s as text."""
        return "free" if math.isinf(self.bandwidth) else f"{8 * self.bandwidth / 1e6:g}"

    def over(self, free: dict[str, float]) -> dict[str, float]:
        """The simulator's latency and bandwidth, from those of the free link."""
        bandwidth = min(self.bandwidth, free.get("bandwidth", math.inf))
        return {"latency": free["latency"] + self.delay / 1e3, "bandwidth": bandwidth}


class Training(NamedTuple):
    """A row by a wire."""

    row: Row
    wire: str | None

    @property
    def is_simulated(self) -> bool:
        """Whether the time of its calls is known."""
        return self.row.engine != TORCH

    def __str__(self) -> str:
        return " ".join([str(self.row), *([self.wire] if self.wire else [])])

    __repr__ = __str__


def measure(
    trainings: Sequence[Training], links: Sequence[Link], options: dict[str, Any]
) -> dict[str, Any]:
    """Trains all on every link: "link" if free, "costs" by training, "segments" by both."""
    cores = runner.cores()
    net = {name: options[name] for name in (*runner.NET, "in_flight")}
    costs: dict[Training, list[dict]] = {}
    with contextlib.ExitStack() as stack:
        slow = stack.enter_context(SlowLink())
        prefixes = [slow.prefix(end) for end in range(len(ADDRESSES))]

        def start(worker: Path, ports: dict[str, Any]) -> Processes:
            shared = {**ports, "num_processes": len(ADDRESSES)}
            addresses = [{**shared, "process_id": k, "address": x} for k, x in enumerate(ADDRESSES)]
            pair = Processes(cores[:2], addresses, prefixes, worker=worker)
            return stack.enter_context(pair)

        pairs = {True: start(runner.WORKER, PORTS)}
        if not all(training.is_simulated for training in trainings):
            pairs[False] = start(runner.TORCH_WORKER, TORCH_PORTS)
        alone = stack.enter_context(Processes(cores[:1]))
        for training in trainings:
            row, given = training.row, net | {"wire": training.wire}
            pair = pairs[training.is_simulated]
            pair.ask("build", str(training), given | row.options())
            pair.ask("run", str(training), FEWEST_BATCHES)
            if training.is_simulated:
                alone.ask("build", str(training), given | row.alone.options())
                costs[training] = alone.ask("costs", str(training), COST_BATCHES)
        measured = {"link": pairs[True].link(), "costs": costs}

        def estimated(link: Link, training: Training) -> float:
            """Milliseconds of a batch, simulated or of a few."""
            if training.is_simulated:
                batches = 4 * FEWEST_BATCHES * training.row.chunk
                return simulated(training, link, batches, measured, options)
            slow.set(link.delay / 1e3, link.bandwidth)
            return pairs[False].segment(str(training), FEWEST_BATCHES)["ms"]

        def train(link: Link, training: Training, batches: int) -> dict[str, Any]:
            slow.set(link.delay / 1e3, link.bandwidth)
            name, pair = str(training), pairs[training.is_simulated]
            pair.ask("run", name, max(FEWEST_BATCHES // 2, math.ceil(WARM_UP_SHARE * batches)))
            before = slow.used()
            segment = pair.segment(name, batches, lambda: slow.used()["processor"])
            used = {key: value - before[key] for key, value in slow.used().items()}
            if link == links[-1] and training.is_simulated:
                costs[training] += alone.ask("costs", name, COST_BATCHES)
            kept = {key: segment[key] for key in ("ms", "others")}
            relay, size = used["processor"] / segment["seconds"], used["bytes"] / batches
            return {**kept, "batches": batches, "relay": relay, "bytes": size}

        arms = {}
        for link in links:
            for training in trainings:  # segments of the wanted length
                chunk, ms = training.row.chunk, estimated(link, training)
                wanted = max(FEWEST_BATCHES, math.ceil(1e3 * options["seconds"] / ms))
                batches = chunk * math.ceil(wanted / chunk)
                arms[link, training] = functools.partial(train, link, training, batches)
        return {**measured, "segments": runner.turns(arms, options["repeats"])}


def simulated(
    training: Training, link: Link, batches: int, measured: dict[str, Any], options: dict[str, Any]
) -> float:
    """Milliseconds of a batch in a simulated segment."""
    costs, over = measured["costs"][training], link.over(measured["link"])
    seconds = training.row.simulated(costs, over, batches, options["in_flight"])
    return 1e3 * seconds / batches


def compare(
    trainings: Sequence[Training],
    links: Sequence[Link],
    measured: dict[str, Any],
    options: dict[str, Any],
) -> list[dict[str, Any]]:
    """What the segments say of each training on each link."""
    results: list[dict[str, Any]] = []
    all_segments = measured["segments"]
    for training in trainings:
        first = all_segments[links[0], training]
        near: dict[str, Any] = {}
        for link in links:
            segments = all_segments[link, training]
            unlike = all_segments[link, training._replace(wire=trainings[0].wire)]
            ms, batches = Spread.of(x["ms"] for x in segments), segments[0]["batches"]
            played = expected = None
            if training.is_simulated:
                played = simulated(training, link, batches, measured, options)
            near = near or {"ms": ms.median, "simulated": played}
            extra = ms.median - near["ms"]
            if played is not None:
                expected = played - near["simulated"]
            results.append(
                {
                    "row": str(training.row),
                    "wire": training.wire,
                    "delay_ms": link.delay,
                    "mbits": link.mbits,
                    "batches": batches,
                    "ms": ms,
                    "kept": runner.ratios(first, segments),
                    "gain": runner.ratios(unlike, segments),
                    "bytes": statistics.median(x["bytes"] for x in segments),
                    "simulated_ms": played,
                    "simulated_error": played and played / ms.median - 1,
                    "extra_ms": extra,
                    "simulated_extra_ms": expected,
                    "extra_error": expected / extra - 1
                    if expected is not None and extra > SMALLEST_EXTRA
                    else None,
                    "relay": statistics.median(x["relay"] for x in segments),
                }
            )
    return results


COLUMNS: Columns = {
    "row": lambda r: f"`{r['row']}`",
    "wire": lambda r: r["wire"] or "",
    "delay ms": lambda r: f"{r['delay_ms']:g}",
    "Mbit/s": lambda r: r["mbits"],
    "batches": lambda r: r["batches"],
    "ms per batch": lambda r: r["ms"].show(),
    "kept": lambda r: r["kept"].show(2),
    "gain": lambda r: r["gain"].show(2),
    "kB": lambda r: f"{r['bytes'] / 1e3:.0f}",
    "simulated ms": lambda r: (
        f"{r['simulated_ms']:.1f} ({r['simulated_error']:+.1%})" if r["simulated_ms"] else ""
    ),
    "extra ms: measured, simulated": lambda r: (
        f"{r['extra_ms']:.1f}"
        + (f", {r['simulated_extra_ms']:.1f}" if r["simulated_ms"] else "")
        + (f" ({r['extra_error']:+.1%})" if r["extra_error"] is not None else "")
    ),
    "relay": lambda r: f"{r['relay']:.1%}",
}


def columns(trainings: Sequence[Training], links: Sequence[Link]) -> Columns:
    """Those that tell something apart."""
    alike = {
        "wire": all(training.wire is None for training in trainings),
        "gain": len({training.wire for training in trainings}) == 1,
        "delay ms": len({link.delay for link in links}) == 1,
        "Mbit/s": all(math.isinf(link.bandwidth) for link in links),
    }
    return {name: column for name, column in COLUMNS.items() if not alike.get(name)}


def parse() -> tuple[Namespace, list[Row]]:
    """Options and rows."""
    parser = runner.flags(__doc__)
    runner.net_flags(parser, SIZES, rows=ROWS)
    delay, bandwidth = runner.at_least(0.0), runner.at_least(1.0)
    parser.add_argument("--delays", nargs="+", type=delay, default=DELAYS, help="ms one way")
    words = "bytes/s of the link"
    parser.add_argument("--bandwidth", nargs="+", type=bandwidth, default=(math.inf,), help=words)
    words = "forms of what crosses; without it, nothing is rounded"
    parser.add_argument("--wires", nargs="+", choices=WIRES, default=(None,), help=words)
    parser.add_argument("--in-flight", type=runner.count, default=16, help="batches at most")
    parser.add_argument("--seconds", type=runner.at_least(0.01), default=4.0, help="of a segment")
    parser.add_argument("--repeats", type=runner.count, default=3, help="segments of row and delay")
    options = parser.parse_args()
    try:
        runner.sized(options, SIZES)
        rows = [row_specs.parse(text) for text in options.rows]
        for row in rows:
            row.check(options.modules, options.batch)
            if (row.groups, row.data) != (2, 1):
                raise ValueError(f"row '{row}': two stages on two devices are needed, K=2")
            if reason := throughput.obstacle(row, options, ()):
                raise ValueError(f"row '{row}': {reason}")
            if row.engine == TORCH and any(options.wires):
                raise ValueError(f"row '{row}': PyTorch's rows take no --wires")
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
    options |= {name: list(options[name]) for name in ("bandwidth", "wires")}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # clean up on the way out
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    setup = runner.describe()
    trainings = [Training(row, wire) for row in rows for wire in options["wires"]]
    links = [Link(delay, each) for delay in options["delays"] for each in options["bandwidth"]]
    try:
        measured = measure(trainings, links, options)
    except LinkError as error:
        sys.exit(f"error: {error}")
    results = compare(trainings, links, measured, options)
    segments = [segment for arm in measured["segments"].values() for segment in arm]
    texts = (
        runner.options_line(options, "links.py"),
        runner.columns(columns(trainings, links), results),
        f"- The free link: {runner.link_text(measured['link'])}.",
        *runner.others_note(segments, "Other processes and the kernel's network"),
    )
    by_row = {str(x): {"costs": measured["costs"].get(x), "segments": {}} for x in trainings}
    for (link, training), arm in measured["segments"].items():
        by_row[str(training)]["segments"][f"{link.delay:g} ms, {link.mbits} Mbit/s"] = arm
    values = {"link": measured["link"], "rows": by_row, "results": results}
    runner.publish(setup, "\n".join(texts), output, options=options, **values)


if __name__ == "__main__":
    main()
