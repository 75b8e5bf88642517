"""Processes of the benchmarks: started together, each on its core, idle between commands."""

import contextlib
import functools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("worker.py")
STOP_SECONDS = 30
LINK_BYTES, LINK_REPEATS = 2**20, 20
# glibc would give every large array's pages back when it is freed and fault them in again for the
# next: up to a third of a call's time, and more the more arrays come and go.
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TOP_PAD_": str(2**28),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
}
ON_CPU = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", **KEEP_MEMORY}
# Several processes share a GPU, and the peak of one must not be what it took beforehand.
ON_DEVICES = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


class Processes:
    """The processes of one set-up, under `jax.distributed` if they are several.

    Args:
        cores: the core of each process, which then has one CPU device; None is one process that
            is not pinned and has the devices that JAX finds.
        places: arguments of `distributed.initialize` for each of several processes; by default
            they find one another on this machine.
        prefixes: words before the command of each process, by default none.

    Attributes:
        pinned: whether every process has a core.
    """

    def __init__(
        self,
        cores: Sequence[int] | None,
        places: Sequence[dict[str, Any]] | None = None,
        prefixes: Sequence[Sequence[str]] = (),
    ):
        self.pinned = cores is not None
        count = len(cores or [None])
        arguments = (places or distributed_arguments(count)) if count > 1 else [None]
        environment = {**os.environ, **(ON_DEVICES if cores is None else ON_CPU)}
        self._processes: list[Any] = [
            subprocess.Popen(
                [*prefix, sys.executable, WORKER, json.dumps(place)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
                # Before Python starts, thus before XLA counts the cores.
                preexec_fn=functools.partial(os.sched_setaffinity, 0, {core}) if cores else None,
            )
            for core, place, prefix in zip(
                cores or [None], arguments, prefixes or [()] * count, strict=True
            )
        ]

    def ask(self, command: str, *arguments: Any) -> list[Any]:
        """Sends a command to all processes at once; gives the reply of each.

        Raises:
            RuntimeError: a process ended; it has written why.
        """
        with contextlib.suppress(BrokenPipeError):
            for process in self._processes:
                print(json.dumps([command, *arguments]), file=process.stdin, flush=True)
        lines = [process.stdout.readline() for process in self._processes]
        if not all(lines):  # end of file
            raise RuntimeError(f"a process ended during {command!r}: its message is above")
        return [json.loads(line) for line in lines]

    def __enter__(self) -> "Processes":
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


def cores() -> list[int]:
    """Cores that this process may use; none where a process cannot be pinned."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def devices() -> list[str]:
    """Kinds of the devices that JAX finds; asked in another process, which lets go of them."""
    with Processes(None) as one:
        return one.ask("devices")[0]


def measured_link(processes: Processes) -> dict[str, float]:
    """Bandwidth (bytes/s) and latency (s) of a message between two processes, half a round trip."""
    small, large = processes.ask("link", [1, LINK_BYTES], LINK_REPEATS)[0]
    found = {"latency": small / 2}
    return {**found, "bandwidth": 2 * LINK_BYTES / (large - small)} if large > small else found


def distributed_arguments(count: int) -> list[dict[str, Any]]:
    """Arguments of `distributed.initialize` for every process, with ports that are free now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count + 1)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        coordinator, *ports = [each.getsockname()[1] for each in sockets]
    shared = {"coordinator": f"127.0.0.1:{coordinator}", "num_processes": count}
    return [{**shared, "process_id": index, "transfer_port": p} for index, p in enumerate(ports)]


def seconds(replies: Sequence[Mapping[str, Any]]) -> float:
    """From the first process's start of a segment to the last one's end.

    The processes share a machine, hence the clock of `time.perf_counter`.
    """
    return max(each["end"] for each in replies) - min(each["start"] for each in replies)
