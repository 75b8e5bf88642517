"""Speed of K processes on K cores, one stage each, against one process on one core.

    python bench/concurrency.py --output runs/concurrency.json

Three set-ups train the same net on the same global batches with the same method:

    pair    K processes under `jax.distributed`, each pinned to its own core, one stage each
    fused   one process pinned to one core, all stages compiled into one call
    apart   the same process, the stages compiled apart: the calls of `pair`, one after another

All processes live from beginning to end and wait for commands, and the set-ups take turns (pair,
fused, apart, pair, ...): while one runs the others are idle, and nothing is compiled after the
warm-up. A segment is N batches, from the first dispatch until all work is done, in whichever
process. The batches are on the devices beforehand: input is not measured. A process is pinned
before it starts, so that XLA's thread pool has one thread.

A segment of N batches takes N + K - 1 ticks in `pair`: with a local method it is at best
K N / (N + K - 1) times as fast as `apart`; the stages of bp wait for one another. The losses of all
batches and the state after the last one must be equal in `pair` and `apart` to the last bit,
otherwise the exit code is 1. Linux only; needs jdecouple installed.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import workers
from common import OTHERS_SHARE, SIZES, Spread, busy_seconds, describe, heading, save, table
from workers import Processes

SET_UPS = ("pair", "fused", "apart")
WARM_UP_BATCHES = 3
STAGE_BATCHES = 9


def union(parts: Sequence[dict]) -> dict:
    return {name: value for part in parts for name, value in part.items()}


def segment(processes: Processes, name: str, batches: int) -> dict[str, Any]:
    """One measurement of a set-up; "others" is the share of the machine that others took."""
    busy = busy_seconds()
    replies = processes.ask("run", name, batches)
    busy = busy_seconds() - busy - sum(reply["processor"] for reply in replies)
    seconds = workers.seconds(replies)
    return {
        "ms": 1e3 * seconds / batches,
        "others": max(0.0, busy / seconds / (os.cpu_count() or 1)),
        "processor_ms": [1e3 * reply["processor"] / batches for reply in replies],
        "cores": [reply["cores"] for reply in replies],
        "losses": [union(each) for each in zip(*(r["losses"] for r in replies), strict=True)],
    }


def measure(options: dict[str, Any], repeats: int, steps: int) -> dict[str, Any]:
    """Lets the set-ups take turns.

    Returns:
        "segments" by set-up (the first of each is the warm-up), "digests" by set-up and block,
        and "stage_ms", for each of some batches the times of the stages in `apart`.
    """
    cores = workers.cores()[: options["stages"]]
    segments: dict[str, list[dict]] = {name: [] for name in SET_UPS}
    shared = {**options, "schedule": "auto", "microbatches": 1, "data": 1}
    shared |= {"dtype": "float32", "input": "placed"}
    with Processes(cores) as several, Processes(cores[:1]) as one:
        place = {"pair": several, "fused": one, "apart": one}
        for name in SET_UPS:
            rows = options["stages"] if name == "pair" else 1
            fuse = False if name == "apart" else None
            place[name].ask("build", name, {**shared, "rows": rows, "fuse": fuse})
        for repeat in range(repeats + 1):
            batches = steps if repeat else WARM_UP_BATCHES
            for name in SET_UPS:
                found = segment(place[name], name, batches)
                segments[name].append(found)
                label = f"repeat {repeat}" if repeat else "warm-up (compiles)"
                print(f"{label}: {name}, {found['ms']:.1f} ms per batch", file=sys.stderr)
        digests = {name: union(place[name].ask("digest", name)) for name in SET_UPS}
        (times,) = one.ask("stages", "apart", STAGE_BATCHES)
    stage_ms = [[1e3 * seconds for seconds in batch] for batch in times]
    return {"segments": segments, "digests": digests, "stage_ms": stage_ms}


def compare(found: dict[str, Any]) -> dict[str, Any]:
    """What the segments say: times, ratios, and whether the numbers agree."""
    segments, digests = found["segments"], found["digests"]
    times = {name: [each["ms"] for each in segments[name][1:]] for name in SET_UPS}
    processor = {
        name: [
            statistics.median(values)
            for values in zip(*(each["processor_ms"] for each in segments[name][1:]), strict=True)
        ]
        for name in SET_UPS
    }
    losses = {name: [batch for s in segments[name] for batch in s["losses"]] for name in SET_UPS}
    differences = [
        abs(fused[name] - apart[name]) / (abs(apart[name]) or 1.0)
        for fused, apart in zip(losses["fused"], losses["apart"], strict=True)
        for name in apart
    ]
    return {
        "batches": len(losses["pair"]),
        "ms": {name: Spread.of(times[name]) for name in SET_UPS},
        "processor_ms": processor,
        # Neighbours in time are divided, so that a slow drift of the machine cancels.
        "speed_up": {
            name: Spread.of(a / b for a, b in zip(times[name], times["pair"], strict=True))
            for name in ("fused", "apart")
        },
        "others": statistics.median(s["others"] for name in SET_UPS for s in segments[name][1:]),
        "bit_equal": losses["pair"] == losses["apart"] and digests["pair"] == digests["apart"],
        "fused_difference": max(differences),  # relative
        "stage_ms": [Spread.of(each) for each in zip(*found["stage_ms"], strict=True)],
    }


def report(options: dict[str, Any], steps: int, segments: dict, result: dict) -> str:
    """The result as Markdown."""
    stages = options["stages"]
    ideal = 1 if options["method"] == "bp" else stages * steps / (steps + stages - 1)
    rows = []
    for name in SET_UPS:
        cores = " and ".join(str(core) for (core,) in segments[name][0]["cores"])
        processor = ", ".join(f"{value:.1f}" for value in result["processor_ms"][name])
        ratio = result["speed_up"][name].show(2) if name != "pair" else ""
        rows.append((name, cores, result["ms"][name].show(), processor, ratio))
    lines = [
        ", ".join(f"{name} {value}" for name, value in options.items())
        + f"; segments of {steps} batches; medians (lowest to highest)\n",
        table(("set-up", "cores", "ms per batch", "processor ms", "time / time of `pair`"), rows),
        table(("stage", "ms alone"), enumerate(each.show() for each in result["stage_ms"])),
        f"- Ideal time of `apart` / time of `pair`: {ideal:.2f}.",
        f"- `pair` and `apart` after {result['batches']} batches: losses, parameters, statistics "
        f"and optimiser state are {'' if result['bit_equal'] else 'NOT '}equal to the last bit.",
        f"- Losses of `fused` and `apart` differ by at most {result['fused_difference']:.1e}.",
        f"- Other processes took {result['others']:.1%} of the machine"
        f"{': NOT VALID' if result['others'] > OTHERS_SHARE else ''}.",
    ]
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--method", choices=("deinforeg", "scpl", "bp"), default="deinforeg")
    parser.add_argument("--model", choices=tuple(SIZES), default="mlp")
    parser.add_argument("--hidden", type=int, help="width of a dense layer, or channels")
    parser.add_argument("--depth", type=int, help="number of equal blocks")
    parser.add_argument("--batch", type=int, help="examples of a global batch")
    parser.add_argument("--head", type=int, default=64, help="features of a block's projector")
    parser.add_argument("--stages", type=int, default=2, help="K, and processes of `pair`")
    parser.add_argument("--steps", type=int, default=40, help="batches of a segment")
    parser.add_argument("--repeats", type=int, default=7, help="segments of each set-up")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    for name, value in SIZES[options.model].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    cores = len(workers.cores())
    if not 2 <= options.stages <= cores:
        parser.error(f"--stages is {options.stages}: 2 to {cores} (a core each) is allowed")
    if options.depth < 1 or options.depth % options.stages:
        parser.error(f"--depth is {options.depth}: a multiple of --stages is needed")
    if min(options.steps, options.repeats) < 1:
        parser.error("--steps and --repeats must be at least 1")
    return options


def main() -> None:
    arguments = vars(parse())
    output, repeats, steps = (arguments.pop(name) for name in ("output", "repeats", "steps"))
    setup = describe()
    found = measure(arguments, repeats, steps)
    result = compare(found)
    print(heading(setup))
    print(report(arguments, steps, found["segments"], result))
    if output:
        options = arguments | {"steps": steps, "repeats": repeats}
        save(output, {"setup": setup, "options": options, **found, "result": result})
    if not result["bit_equal"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
