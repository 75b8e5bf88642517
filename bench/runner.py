"""What the benchmarks share: pinned processes, turns, spreads, tables and files."""

import argparse
import collections
import contextlib
import dataclasses
import json
import math
import os
import platform
import shlex
import socket
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

Name = TypeVar("Name")
Columns = dict[str, Callable[[Any], Any]]  # text of a result, by heading

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
OTHERS_SHARE = 0.02  # of the machine that others take, beyond which a measurement is not valid
WORKER, TORCH_WORKER = (Path(__file__).with_name(x) for x in ("worker.py", "torch_worker.py"))
NET = ("model", "hidden", "depth", "modules", "batch", "head")  # options of every worker's net
STOP_SECONDS = 30
LINK_BYTES, LINK_REPEATS = 2**20, 20
# glibc would give every large array's pages back when it is freed and fault them in again for the
# next: up to a third of a call's time, and more the more arrays come and go. It still would, in any
# thread that has an arena of its own, whatever the other three say.
KEEP_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TOP_PAD_": str(2**28),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
}
ON_CPU = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", **KEEP_MEMORY}
# Several processes share a GPU, and the peak of one must not be what it took beforehand.
ON_DEVICES = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median and range of repeated measurements, in their unit."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """Spread of at least one value."""
        ordered = sorted(values)
        return cls(statistics.median(ordered), ordered[0], ordered[-1])

    def show(self, digits: int = 1) -> str:
        """The spread as text, "median (lowest to highest)"."""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def turns(arms: Mapping[Name, Callable[[], dict]], repeats: int) -> dict[Name, list[dict]]:
    """Segments of arms that take turns, so that a machine that slows down slows all of them.

    An arm trains a segment and returns its measurements, "ms" among them.
    """
    segments: dict[Name, list[dict]] = {name: [] for name in arms}
    for repeat in range(repeats):
        for name, arm in arms.items():
            segments[name].append(arm())
            text = f"repeat {repeat + 1}: {name}, {segments[name][-1]['ms']:.1f} ms"
            print(text, file=sys.stderr)
    return segments


def ratios(over: Sequence[dict], under: Sequence[dict], key: str = "ms") -> Spread:
    """Ratios of segments that are neighbours in time: a slow drift of the machine cancels."""
    return Spread.of(a[key] / b[key] for a, b in zip(over, under, strict=True))


def flags(description: str | None) -> argparse.ArgumentParser:
    """A parser with the flag of all benchmarks, --output."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, help="JSON file to write, and .md beside it")
    return parser


def net_flags(parser: argparse.ArgumentParser, models: Iterable[str], **defaults: Any) -> None:
    """Adds the flags of the net and its rows."""
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="see bench/throughput.py")
    parser.add_argument("--model", choices=tuple(models), default="mlp", metavar="MODEL")
    parser.add_argument("--hidden", type=count, help="width of a layer, channels, or arrays")
    parser.add_argument("--depth", type=count, help="number of equal blocks")
    parser.add_argument("--modules", type=count, help="equal local modules of them; by default all")
    parser.add_argument("--batch", type=count, help="examples of a global batch")
    parser.add_argument("--head", type=int, default=64, help="features of a block's head; 0: none")
    parser.set_defaults(**defaults)


def sized(options: argparse.Namespace, sizes: Mapping[str, Mapping[str, int]]) -> None:
    """Fills in what is not given of the net; ValueError for modules of unequal depth."""
    for name, value in sizes[options.model].items():
        setattr(options, name, getattr(options, name) or value)
    options.modules = options.modules or options.depth
    if options.depth % options.modules:
        raise ValueError(f"--depth {options.depth} is no multiple of --modules {options.modules}")


def at_least(low: float, kind: Callable[[str], Any] = float) -> Callable[[str], Any]:
    """The type of a flag: a finite number from `low` on."""

    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if low <= (value := kind(text)) < math.inf:
                return value
        raise argparse.ArgumentTypeError(f"{text} is no number of at least {low}")

    return parse


count = at_least(1, int)


def describe(**more: Any) -> dict[str, Any]:
    """Machine, versions and command of this run, and what else sets it up."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "environment": {
            name: value for name, value in os.environ.items() if name.startswith(("JAX_", "XLA_"))
        },
        "load_average_at_start": os.getloadavg()[0],
        **more,
    }


def heading(setup: Mapping[str, Any]) -> str:
    """The set-up as Markdown, from `describe`; its "devices", if any, name each device."""
    versions = ", ".join(f"{name} {version}" for name, version in setup["versions"].items())
    environment = shlex.join(f"{name}={value}" for name, value in setup["environment"].items())
    kinds = collections.Counter(setup.get("devices", ()))
    devices = ", ".join(f"{number} x {kind}" for kind, number in kinds.items())
    return (
        f"    {setup['command']}\n\n"
        f"{setup['cpu']}, {setup['cores']} cores, load average at start "
        f"{setup['load_average_at_start']:.2f}; Python {setup['python']}, {versions}"
        f"{'; ' + devices if devices else ''}{'; ' + environment if environment else ''}\n"
    )


def table(header: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; all but the first column are aligned right."""
    ruler = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(map(str, x))} |" for x in [header, ruler, *lines]) + "\n"


def columns(shown: Columns, results: Iterable[Any]) -> str:
    """A table with a line for every result, from the text of each column."""
    return table(list(shown), [[show(result) for show in shown.values()] for result in results])


def options_line(options: Mapping[str, Any], script: str) -> str:
    """The options of a run as text, without lists and what is not set."""
    given = {x: y for x, y in options.items() if y is not None and not isinstance(y, list)}
    shown = ", ".join(f"{name} {value}" for name, value in given.items())
    return f"{shown}; medians (lowest to highest); columns: see bench/{script}\n"


def link_text(link: Mapping[str, float]) -> str:
    """Latency and bandwidth of a link as text."""
    speed = f", {link['bandwidth'] / 1e6:.0f} MB/s" if "bandwidth" in link else ""
    return f"{1e6 * link.get('latency', 0):.0f} us{speed}"


def publish(setup: dict[str, Any], text: str, output: Path | None, **values: Any) -> None:
    """Prints a result below its set-up; writes it as JSON, and as Markdown beside it."""
    text = f"{heading(setup)}\n{text}\n"
    print(text)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        result = json.dumps({"setup": setup, **values}, indent=1, default=dataclasses.asdict)
        output.write_text(result + "\n")
        output.with_suffix(".md").write_text(text)


def _cpu_model() -> str:
    """Model name as the kernel gives it, else as Python does."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor()])[0]


class Processes(contextlib.AbstractContextManager):
    """Processes of `worker.py`, under `jax.distributed` if they are several; idle between commands.

    Args:
        cores: the core of each process, which then has one CPU device; None is one process that
            is not pinned and has the devices that JAX finds, or `size` of another worker.
        addresses: arguments of `distributed.initialize` for each of several, by default local.
        prefixes: words before the command of each process, by default none.
        worker: script that the processes run.
        size: number of processes that are not pinned.
    """

    def __init__(
        self,
        cores: Sequence[int] | None,
        addresses: Sequence[dict[str, Any]] | None = None,
        prefixes: Sequence[Sequence[str]] = (),
        *,
        worker: Path = WORKER,
        size: int = 1,
    ):
        self._pinned = cores is not None
        size = len(cores) if cores else size
        arguments = (addresses or distributed_arguments(size)) if size > 1 else [None]
        environment = {**os.environ, **(ON_CPU if self._pinned else ON_DEVICES)}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._processes: list[Any] = []
        for index, argument in enumerate(arguments):
            prefix = prefixes[index] if prefixes else ()
            command = [*prefix, sys.executable, worker, json.dumps(argument)]
            with pinned(cores[index : index + 1] if cores else ()):
                self._processes.append(subprocess.Popen(command, env=environment, **pipes))

    def ask(self, command: str, *arguments: Any) -> list[Any]:
        """Sends a command to all processes at once; returns the reply of each."""
        with contextlib.suppress(BrokenPipeError):
            for process in self._processes:
                print(json.dumps([command, *arguments]), file=process.stdin, flush=True)
        lines = [process.stdout.readline() for process in self._processes]
        if not all(lines):  # end of file
            raise RuntimeError(f"a process ended during {command!r}: its message is above")
        return [json.loads(line) for line in lines]

    def segment(
        self, name: str, batches: int, helper: Callable[[], float] = lambda: 0.0
    ) -> dict[str, Any]:
        """Trains the run of this name on some batches, and measures, see also `worker.Run.run`.

        "others" is the share of the machine that others took, None unless processes are pinned;
        `helper` gives the processor seconds of something else that works for the segment.
        """
        before = busy_seconds() - helper() if self._pinned else 0.0
        replies = self.ask("run", name, batches)
        # The processes share a machine, hence the clock of `time.perf_counter`.
        seconds = max(r["end"] for r in replies) - min(r["start"] for r in replies)
        others = None
        if self._pinned:
            busy = busy_seconds() - helper() - before - sum(r["processor"] for r in replies)
            others = max(0.0, busy / seconds / (os.cpu_count() or 1))
        peaks = [reply["peak"] for reply in replies]
        return {
            "ms": 1e3 * seconds / batches,
            "seconds": seconds,
            "others": others,
            "processor_ms": [1e3 * reply["processor"] / batches for reply in replies],
            "peak": None if None in peaks else max(peaks),
            "state": max(reply["state"] for reply in replies),
            "cores": [reply["cores"] for reply in replies],
            "losses": union(reply["losses"] for reply in replies),
        }

    def link(self) -> dict[str, float]:
        """Bandwidth (bytes/s) and latency (s) of a message between the first two processes."""
        small, large = self.ask("link", [1, LINK_BYTES], LINK_REPEATS)[0]
        speed = {"bandwidth": 2 * LINK_BYTES / (large - small)} if large > small else {}
        return {"latency": small / 2, **speed}

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


def others_note(segments: Iterable[Mapping[str, Any]], who: str = "Other processes") -> list[str]:
    """A line on what others took of the machine, and whether the measurement is valid."""
    shares = [segment["others"] for segment in segments if segment["others"] is not None]
    if not shares:
        return []
    share = statistics.median(shares)
    valid = ": NOT VALID" if share > OTHERS_SHARE else ""
    return [f"- {who} took {share:.1%} of the machine{valid}."]


def union(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Values of which several processes hold a part each."""
    return {name: value for part in parts for name, value in part.items()}


def cores() -> list[int]:
    """Cores that this process may use; none where a process cannot be pinned."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


@contextlib.contextmanager
def pinned(own: Sequence[int]) -> Iterator[None]:
    """Starts processes on some cores, if any: they inherit them, before XLA counts the cores."""
    if not own:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, own)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def busy_seconds() -> float:
    """Processor time that processes have spent on all cores since boot, in seconds; Linux only.

    Without interrupts, which belong to no process: messages over loopback cause most of them.
    """
    ticks = map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:])
    user, nice, system, _, _, _, _, stolen, *_ = ticks
    return (user + nice + system + stolen) / os.sysconf("SC_CLK_TCK")


def distributed_arguments(size: int) -> list[dict[str, Any]]:
    """Arguments of `distributed.initialize` for every process, with ports that are free now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(size + 1)]
        for listener in sockets:
            listener.bind(("127.0.0.1", 0))
        coordinator, *ports = [listener.getsockname()[1] for listener in sockets]
    shared = {"coordinator": f"127.0.0.1:{coordinator}", "num_processes": size}
    return [{**shared, "process_id": i, "transfer_port": port} for i, port in enumerate(ports)]
