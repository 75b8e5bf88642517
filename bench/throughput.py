"""Speed, memory and compile time of methods on schedules, against BP on one device.

    python bench/throughput.py --output runs/throughput.json
    python bench/throughput.py --rows bp:1f1b,K=2,M=4 deinforeg,K=2 fdg,K=2 bp,D=2

A row is `method[:schedule][,K=2][,D=1][,M=4][,T=1][,together]`: K stages, D replicas of each, M
microbatches, T batches a call, and `together` keeps the stages on one device. All rows train the
same net on the same global batches. BP on one device and every row's method on one device are added
as references.

Every row has processes of its own, which live from beginning to end. The rows take turns: each
trains a segment of N batches, while the others idle, and so on, again and again. A segment lasts
from the first dispatch until all work is done, so that stages that fill and drain do it once a
segment. Two ways to place a row:

    processes   K x D processes under `jax.distributed`, each pinned to a core of its own that is
                its only device (Linux; the default where JAX has no other device and the cores
                suffice)
    devices     one process with all devices of JAX, such as GPUs; where there are fewer than
                stages, stages share them; on one device all are together, in one call

Columns, as medians (lowest to highest) over the segments:

    x bp, x same method   time of BP, and of the same method, on one device over the row's, turn by
                turn; the same method has one stage and one microbatch, a delayed one its K stages
    ideal       the schedule's ratio to the same method with equal stages and nothing else, for
                segments of N batches
    simulated   ms of a batch in the simulated segment, from the median time of every call on one
                device alone and from the link, and its error; not for replicas
    dispatch    processor time of the dispatching thread inside `Trainer.step`, a compiled call
    input wait  share of the time without a batch; "placed" batches are on the devices beforehand,
                `--input host` uploads each in a thread
    peak        of the fullest process: on GPUs the most bytes ever in use on a device (the process
                has trained this row only); elsewhere the state and the most that the resident
                set has grown during a segment
    state       parameters, statistics, optimiser and queues of the fullest device
    compile     first step, with tracing
"""

import argparse
import contextlib
import inspect
import math
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rows as row_specs
import workers
from common import OTHERS_SHARE, SIZES, Spread, busy_seconds, describe, heading, save, table
from rows import BP, Row
from workers import Processes

from jdecouple import models

ROWS = (
    *("bp,D=2", "bp:gpipe,K=2,M=4", "bp:1f1b,K=2,M=4", "deinforeg,K=2", "scpl,K=2"),
    *("fdg,K=2", "ddg,K=2", "fr,K=2"),
)
MODELS = (
    *SIZES,
    *(
        name
        for name in models.names()
        if name not in SIZES and "image_size" in inspect.signature(models.get(name)).parameters
    ),
)
OTHER_SIZES = {"hidden": None, "depth": None, "batch": 128}
WARM_UP_BATCHES = 3
COST_BATCHES = 5
NOT_MEASURED = "not measured"


def measure(rows: Sequence[Row], options: dict[str, Any], count: int | None) -> dict[str, Any]:
    """Lets the rows take turns.

    Args:
        rows: the rows, references included.
        options: of the command line.
        count: devices of every process; None if every device is a process.

    Returns:
        By row "compile" (seconds), "segments" and "costs" (replies of `Run.costs`); and "link".
    """
    cores = workers.cores() if count is None else None
    shared = {
        name: options[name]
        for name in ("model", "hidden", "depth", "batch", "head", "dtype", "input")
    }
    found: dict[str, Any] = {str(row): {"segments": [], "costs": []} for row in rows}
    simulated = [row for row in rows if is_simulated(row, count)]
    with contextlib.ExitStack() as stack:

        def start(needed: int) -> Processes:
            return stack.enter_context(Processes(cores and cores[:needed]))

        groups = {row: start(row.devices) for row in rows}
        alone: Any = start(1) if simulated else None
        for row, group in groups.items():
            group.ask("build", "row", {**shared, **row.options(apart=False)})
            found[str(row)]["compile"] = workers.seconds(group.ask("run", "row", 1))
            segment(group, row, WARM_UP_BATCHES)
        for row in simulated:
            alone.ask("build", str(row), {**shared, **row.options(apart=True)})
        pairs = [group for row, group in groups.items() if cores and row.devices > 1]
        link = workers.measured_link(pairs[0]) if pairs else {}
        for repeat in range(options["repeats"]):
            for row, group in groups.items():
                each = segment(group, row, options["steps"])
                found[str(row)]["segments"].append(each)
                print(f"repeat {repeat + 1}: {row}, {each['ms']:.1f} ms per batch", file=sys.stderr)
                if row in simulated:
                    found[str(row)]["costs"] += alone.ask("costs", str(row), COST_BATCHES)
    given = {name: options[name] for name in ("bandwidth", "latency") if options[name] is not None}
    return {"rows": found, "link": {**link, **given}}


def is_simulated(row: Row, count: int | None) -> bool:
    return row.rows > 1 and row.data == 1 and (count is None or row.devices <= count)


def segment(processes: Processes, row: Row, batches: int) -> dict[str, Any]:
    """One measurement of a row; "others" is the share of the machine that others took."""
    busy = busy_seconds() if processes.pinned else None
    replies = processes.ask("run", "row", batches)
    seconds = workers.seconds(replies)
    own = sum(reply["processor"] for reply in replies)
    others = busy and max(0.0, (busy_seconds() - busy - own) / seconds / (os.cpu_count() or 1))
    peaks = [reply["peak"] for reply in replies]
    return {
        "ms": 1e3 * seconds / batches,
        "others": others,
        "dispatch_us": 1e6 * sum(r["dispatch"] for r in replies) / sum(r["calls"] for r in replies),
        "input_wait": max(reply["waited"] for reply in replies) / seconds,
        "peak": None if None in peaks else max(peaks),
        "state": max(reply["state"] for reply in replies),
        "cores": [reply["cores"] for reply in replies],
    }


def compare(
    rows: Sequence[Row], found: dict[str, Any], options: dict[str, Any], count: int | None
) -> list[dict[str, Any]]:
    """What the segments say of each row."""
    steps, batch = options["steps"], options["batch"]
    times = {row: [each["ms"] for each in found["rows"][str(row)]["segments"]] for row in rows}

    def ratio(reference: Row, row: Row) -> Spread:
        # Neighbours in time are divided, so that a slow drift of the machine cancels.
        return Spread.of(a / b for a, b in zip(times[reference], times[row], strict=True))

    results = []
    for row in rows:
        mine = found["rows"][str(row)]
        segments, milliseconds = mine["segments"], Spread.of(times[row])
        used = min(row.rows, (count or row.devices) // row.data)
        ideal = row.ideal(steps) if used == row.rows else float(row.data) if used == 1 else None
        simulated = None
        if mine["costs"]:
            simulated = 1e3 * row.simulated(mine["costs"], found["link"], steps) / steps
        peaks = [each["peak"] for each in segments]
        results.append(
            {
                "row": str(row),
                "stages": row.stages,
                "devices": used * row.data,
                "ms": milliseconds,
                "examples_per_second": 1e3 * batch / milliseconds.median,
                "ratio_to_bp": ratio(BP, row),
                "ratio_to_method": ratio(row.reference, row),
                "ideal": ideal,
                "simulated_ms": simulated,
                "simulated_error": simulated and simulated / milliseconds.median - 1,
                "dispatch_us": statistics.median(each["dispatch_us"] for each in segments),
                "input_wait": statistics.median(each["input_wait"] for each in segments),
                "peak_bytes": None if None in peaks else max(peaks),
                "state_bytes": segments[-1]["state"],
                "compile_seconds": mine["compile"],
            }
        )
    return results


def report(options: dict[str, Any], found: dict[str, Any], results: list[dict[str, Any]]) -> str:
    """The result as Markdown."""
    header = (
        *("row", "devices", "ms per batch", "examples/s", "x bp", "x same method", "ideal"),
        *("simulated ms", "dispatch us", "input wait", "peak MB", "state MB", "compile s"),
    )
    lines = []
    for each in results:
        simulated, error = each["simulated_ms"], each["simulated_error"]
        peak = each["peak_bytes"]
        lines.append(
            (
                f"`{each['row']}`",
                each["devices"],
                each["ms"].show(),
                f"{each['examples_per_second']:.0f}",
                each["ratio_to_bp"].show(2),
                each["ratio_to_method"].show(2),
                "" if each["ideal"] is None else f"{each['ideal']:.2f}",
                "" if simulated is None else f"{simulated:.1f} ({error:+.1%})",
                f"{each['dispatch_us']:.0f}",
                "placed" if options["input"] == "placed" else f"{each['input_wait']:.1%}",
                NOT_MEASURED if peak is None else f"{peak / 1e6:.0f}",
                f"{each['state_bytes'] / 1e6:.1f}",
                f"{each['compile_seconds']:.1f}",
            )
        )
    shown = ", ".join(f"{k} {v}" for k, v in options.items() if v is not None and k != "rows")
    notes = [f"{shown}; medians (lowest to highest); columns: see bench/throughput.py\n"]
    notes.append(table(header, lines))
    errors = [abs(each["simulated_error"]) for each in results if each["simulated_ms"]]
    if errors:
        link = found["link"]
        wire = f"{1e6 * link.get('latency', 0):.0f} us"
        if "bandwidth" in link:
            wire += f", {link['bandwidth'] / 1e9:.2f} GB/s"
        notes.append(f"- Largest error of the simulation: {max(errors):.1%}; link: {wire}.")
    segments = [each for row in found["rows"].values() for each in row["segments"]]
    others = [each["others"] for each in segments if each["others"] is not None]
    if others:
        share = statistics.median(others)
        valid = ": NOT VALID" if share > OTHERS_SHARE else ""
        notes.append(f"- Other processes took {share:.1%} of the machine{valid}.")
    return "\n".join(notes)


def parse() -> tuple[argparse.Namespace, list[Row], list[str]]:
    """Options, rows with their references, and kinds of the devices of every process.

    No kinds: every device is a process.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", nargs="+", metavar="ROW", help=f"default: {' '.join(ROWS)}")
    parser.add_argument("--place", choices=("processes", "devices"))
    parser.add_argument("--model", choices=MODELS, default="mlp", metavar="MODEL")
    parser.add_argument("--hidden", type=int, help="width of a dense layer, or channels")
    parser.add_argument("--depth", type=int, help="number of equal blocks (mlp, vgg)")
    parser.add_argument("--batch", type=int, help="examples of a global batch")
    parser.add_argument("--head", type=int, default=64, help="features of a block's projector")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--input", choices=("placed", "host"), default="placed")
    parser.add_argument("--steps", type=int, default=40, help="batches of a segment")
    parser.add_argument("--repeats", type=int, default=5, help="segments of each row")
    parser.add_argument("--bandwidth", type=float, help="bytes/s of the simulated link")
    parser.add_argument("--latency", type=float, help="seconds of the simulated link")
    parser.add_argument("--output", type=Path, help="JSON file to write, and .md beside it")
    options = parser.parse_args()
    try:
        complete(options)
        rows = [row_specs.parse(each) for each in options.rows or ROWS]
        kinds = place(options, rows)
        if kinds:
            known = rows if options.rows else [row for row in rows if row.data <= len(kinds)]
            rows = [row.fitted(len(kinds)) for row in known]
        rows = row_specs.with_references(rows)
        check(options, rows)
    except ValueError as error:
        parser.error(str(error))
    return options, rows, kinds


def complete(options: argparse.Namespace) -> None:
    """Fills in the sizes of the net; raises ValueError for bad numbers."""
    for name, value in SIZES.get(options.model, OTHER_SIZES).items():
        given = getattr(options, name)
        if value is None and given is not None:
            raise ValueError(f"--{name} is for {' and '.join(SIZES)}, --model is {options.model}")
        setattr(options, name, value if given is None else given)
    for name in ("hidden", "depth", "batch", "head", "steps", "repeats"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} is {value}: at least 1 is needed")
    if options.bandwidth is not None and not options.bandwidth > 0:
        raise ValueError(f"--bandwidth is {options.bandwidth}: bytes/s above 0 are needed")
    if options.latency is not None and not 0 <= options.latency < math.inf:
        raise ValueError(f"--latency is {options.latency}: seconds of at least 0 are needed")


def check(options: argparse.Namespace, rows: Sequence[Row]) -> None:
    """Raises ValueError for rows that the net or the batch does not fit."""
    for row in rows:
        if options.depth and options.depth % row.stages:
            raise ValueError(f"row {str(row)!r}: --depth {options.depth} is no multiple of K")
        if options.steps % row.chunk:
            raise ValueError(f"row {str(row)!r}: --steps {options.steps} is no multiple of T")
        if options.batch % (row.microbatches * row.data):
            raise ValueError(f"row {str(row)!r}: --batch {options.batch} is no multiple of M x D")


def place(options: argparse.Namespace, rows: Sequence[Row]) -> list[str]:
    """Kinds of the devices of every process; none if every device is a process.

    Raises:
        ValueError: too few cores or devices.
    """
    cores, needed = workers.cores(), max(row.devices for row in rows)
    if options.place == "processes" and needed > len(cores):
        raise ValueError(f"the rows need {needed} cores, {len(cores)} can be had")
    kinds = [] if options.place == "processes" else workers.devices()
    if options.place is None:
        on_cpu = all(kind.startswith("cpu") for kind in kinds)
        options.place = "processes" if on_cpu and needed <= len(cores) else "devices"
    if options.place == "processes":
        return []
    replicas = max(row.data for row in rows)
    if options.rows and replicas > len(kinds):
        raise ValueError(f"the rows need {replicas} devices, {len(kinds)} can be had")
    return kinds


def main() -> None:
    arguments, rows, kinds = parse()
    options, count = vars(arguments), len(kinds) or None
    output = options.pop("output")
    options["rows"] = [str(row) for row in rows]
    setup = {**describe(), "devices": kinds}
    found = measure(rows, options, count)
    results = compare(rows, found, options, count)
    text = f"{heading(setup)}\n{report(options, found, results)}\n"
    print(text)
    if output:
        save(output, {"setup": setup, "options": options, **found, "results": results})
        output.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
