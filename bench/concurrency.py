"""Speed of K processes on K cores, one stage each, against one process on one core.

    python bench/concurrency.py --output runs/concurrency.json

Three set-ups train the same net on the same global batches with the same method:

    pair    K processes under `jax.distributed`, each pinned to its own core, one stage each
    fused   one process pinned to one core, all stages compiled into one call
    apart   the same with the stages compiled apart: the calls of `pair`, one after another

All processes live from beginning to end, and all but those of one set-up wait for a command: so
nothing is compiled between the measurements, and the set-ups take turns (pair, fused, apart, pair,
...). A segment is N batches, from the first dispatch until all work is done; for `pair` it is the
longer of its processes' times. The batches are on the devices beforehand: input is not measured.
A process that is pinned to one core before it starts gets a thread pool of one thread from XLA.

A segment of N batches takes N + K - 1 ticks in `pair`: at best it is K N / (N + K - 1) times as
fast as `apart`. The losses of all batches and the state after the last one must be equal in `pair`
and `apart` to the last bit, otherwise the exit code is 1. Linux only.
"""

import argparse
import contextlib
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import Spread, describe, heading, save, table

WORKER = Path(__file__).with_name("concurrency_worker.py")
SET_UPS = ("pair", "fused", "apart")
SIZES = {
    "mlp": {"hidden": 1024, "depth": 10, "batch": 256},
    "vgg": {"hidden": 32, "depth": 4, "batch": 64},
}
STAGE_BATCHES = 9
WARM_UP = 3
STOP_SECONDS = 30


class SetUp:
    """The pinned processes of one set-up; idle between commands."""

    def __init__(self, cores: Sequence[int], options: dict[str, Any], fuse: bool):
        distributed: list[dict | None] = [None]
        if len(cores) > 1:
            coordinator, *ports = free_ports(len(cores) + 1)
            distributed = [
                {
                    "coordinator": f"127.0.0.1:{coordinator}",
                    "num_processes": len(cores),
                    "process_id": index,
                    "transfer_port": port,
                }
                for index, port in enumerate(ports)
            ]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
        self._processes = []
        for core, place in zip(cores, distributed, strict=True):
            spec = json.dumps({"options": options, "fuse": fuse, "distributed": place})
            process = subprocess.Popen(
                [sys.executable, str(WORKER), spec],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
                # Pinned before Python starts, thus before XLA counts the cores.
                preexec_fn=lambda core=core: os.sched_setaffinity(0, {core}),
            )
            self._processes.append(process)

    def ask(self, command: str = "") -> list[Any]:
        """Sends a command (none: awaits the start) to all processes; gives their replies."""
        for process in self._processes if command else ():
            print(command, file=process.stdin, flush=True)
        lines = [process.stdout.readline() for process in self._processes]
        if not all(lines):
            raise RuntimeError(f"a worker ended during {command or 'its start'!r}: see its message")
        return [json.loads(line) for line in lines]

    def __enter__(self) -> "SetUp":
        return self

    def __exit__(self, *problem: object) -> None:
        for process in self._processes:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            if problem[0]:
                process.kill()
        for process in self._processes:
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def segment(replies: Sequence[dict[str, Any]], steps: int) -> dict[str, Any]:
    """One measurement from the replies of a set-up's processes."""
    return {
        "ms": 1e3 * max(reply["seconds"] for reply in replies) / steps,
        "processor_ms": [1e3 * reply["processor_seconds"] / steps for reply in replies],
        "losses": [
            {name: value for losses in batch for name, value in losses.items()}
            for batch in zip(*(reply["losses"] for reply in replies), strict=True)
        ],
    }


def measure(options: dict[str, Any], cores: Sequence[int], repeats: int, steps: int) -> dict:
    """Runs the set-ups in turn.

    Returns:
        "segments" by set-up (the first is the warm-up), "digests" by set-up and block,
        "stage_ms" (a list a batch, of one time a stage) and "cores" of the processes.
    """
    with contextlib.ExitStack() as stack:
        places = {"pair": cores, "fused": cores[:1], "apart": cores[:1]}
        running = {
            name: stack.enter_context(SetUp(places[name], options, fuse=name == "fused"))
            for name in SET_UPS
        }
        pinned = {name: [reply["cores"] for reply in each.ask()] for name, each in running.items()}
        segments: dict[str, list] = {name: [] for name in SET_UPS}
        for repeat in range(repeats + 1):
            count = steps if repeat else WARM_UP
            for name, each in running.items():
                segments[name].append(segment(each.ask(f"run {count}"), count))
                label = f"repeat {repeat}" if repeat else "warm-up"
                print(f"{label}: {name} {segments[name][-1]['ms']:.1f} ms", file=sys.stderr)
        digests = {
            name: {block: value for reply in each.ask("digest") for block, value in reply.items()}
            for name, each in running.items()
        }
        times = running["apart"].ask(f"stages {STAGE_BATCHES}")[0]
    stage_ms = [[1e3 * seconds for seconds in batch] for batch in times]
    return {"cores": pinned, "segments": segments, "digests": digests, "stage_ms": stage_ms}


def compare(found: dict[str, Any]) -> dict[str, Any]:
    """What the segments say: times, ratios, and whether the numbers agree."""
    timed = {name: found["segments"][name][1:] for name in SET_UPS}
    times = {name: [each["ms"] for each in timed[name]] for name in SET_UPS}
    losses = {
        name: [batch for each in found["segments"][name] for batch in each["losses"]]
        for name in SET_UPS
    }
    digests = found["digests"]
    differences = [
        abs(first[name] - second[name]) / abs(second[name])
        for first, second in zip(losses["fused"], losses["apart"], strict=True)
        for name in second
    ]
    return {
        "ms": {name: Spread.of(times[name]) for name in SET_UPS},
        "processor_ms": {
            name: [
                statistics.median(each["processor_ms"][process] for each in timed[name])
                for process in range(len(found["cores"][name]))
            ]
            for name in SET_UPS
        },
        # Neighbours in time are compared, so that a slow drift of the machine cancels.
        "speed_up": {
            name: Spread.of(one / two for one, two in zip(times[name], times["pair"], strict=True))
            for name in SET_UPS
        },
        "batches": len(losses["pair"]),
        "bit_equal": losses["pair"] == losses["apart"] and digests["pair"] == digests["apart"],
        "fused_loss_difference": max(differences),
        "stage_ms": [Spread.of(each) for each in zip(*found["stage_ms"], strict=True)],
    }


def report(options: dict[str, Any], steps: int, found: dict, result: dict) -> str:
    """The result as Markdown."""
    rows = [
        (
            name,
            ", ".join("+".join(map(str, cores)) for cores in found["cores"][name]),
            result["ms"][name].show(),
            ", ".join(f"{value:.1f}" for value in result["processor_ms"][name]),
            result["speed_up"][name].show(2),
        )
        for name in SET_UPS
    ]
    header = ("set-up", "cores", "ms per batch", "processor ms", "`pair` is faster by")
    stages = [(stage, each.show()) for stage, each in enumerate(result["stage_ms"])]
    count = options["stages"]
    equal = "equal to the last bit" if result["bit_equal"] else "NOT EQUAL"
    return "\n".join(
        [
            ", ".join(f"{name} {value}" for name, value in options.items())
            + f"; segments of {steps} batches; medians (lowest to highest)\n",
            table(header, rows),
            table(("stage alone, in `apart`", "ms per batch"), stages),
            f"Ideal: {count:.1f}, and {count * steps / (steps + count - 1):.2f} with the pipeline "
            f"filled and drained in every segment.",
            f"`pair` and `apart` after {result['batches']} batches: losses, parameters, statistics "
            f"and optimiser state are {equal}.",
            f"`fused` against `apart`: losses differ by at most "
            f"{result['fused_loss_difference']:.1e} (relative).",
        ]
    )


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
    available = len(os.sched_getaffinity(0))
    if not 2 <= options.stages <= available:
        parser.error(f"--stages is {options.stages}: 2 to {available} (one core each) is allowed")
    if options.depth < 1 or options.depth % options.stages:
        parser.error(f"--depth is {options.depth}: a multiple of --stages is needed")
    if options.steps < 1 or options.repeats < 1:
        parser.error("--steps and --repeats must be at least 1")
    return options


def main() -> None:
    arguments = parse()
    names = ("method", "model", "hidden", "depth", "batch", "head", "stages")
    options = {name: getattr(arguments, name) for name in names}
    cores = list(itertools.islice(sorted(os.sched_getaffinity(0)), options["stages"]))
    setup = describe()
    found = measure(options, cores, arguments.repeats, arguments.steps)
    result = compare(found)
    print(heading(setup))
    print(report(options, arguments.steps, found, result))
    if arguments.output:
        named = {key: value for key, value in vars(arguments).items() if key != "output"}
        save(arguments.output, {"setup": setup, "options": named, **found, "result": result})
    if not result["bit_equal"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
