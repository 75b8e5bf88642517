"""One process of a benchmark: does what it is told and says what it found.

The argument is JSON: null, or arguments of `distributed.initialize` for one of several processes.
Commands come on standard input, one JSON list a line, and each is answered by one line of JSON on
standard output:

    devices                 kinds of all devices
    build NAME OPTIONS      begins a run from the initial weights, see `run.Run`
    run NAME N              trains on N batches and waits for them: see `Run.run`
    digest NAME             SHA-256 of the parameters, statistics and optimiser state of every block
    stages NAME N           seconds of every stage by itself for each of N batches
    costs NAME N            median seconds of every call by itself over N batches
    link SIZES N            median seconds of N round trips between the first two processes, for
                            messages of SIZES bytes
"""

import json
import os
import statistics
import sys
import time
from typing import Any

import jax
import numpy as np
from run import Run

from jdecouple.pipeline import distributed
from jdecouple.pipeline.mesh import StageDevices
from jdecouple.pipeline.transfer import transfer


class Worker:
    """The commands of a process."""

    def __init__(self) -> None:
        self._runs: dict[str, Run] = {}

    def answer(self, command: str, *arguments: Any) -> Any:
        """Does one command; what is not done here, the run that it names does."""
        if command in ("devices", "build", "link"):
            return getattr(self, command)(*arguments)
        name, *others = arguments
        return getattr(self._runs[name], command)(*others)

    def devices(self) -> list[str]:
        """Platform and kind of all devices."""
        return [f"{each.platform}: {each.device_kind}" for each in jax.devices()]

    def build(self, name: str, options: dict[str, Any]) -> None:
        """Begins a run."""
        self._runs[name] = Run(options)

    def link(self, sizes: list[int], repeats: int) -> list[float]:
        """Median seconds that messages take to the second process and back."""
        here, there = (StageDevices.on((device,)) for device in jax.devices()[:2])
        found = []
        for size in sizes:
            shape = {"x": jax.ShapeDtypeStruct((size,), np.uint8)}
            message = here.place({"x": np.zeros(size, np.uint8)}) if here.addressable else None
            seconds = []
            for _ in range(repeats + 1):
                start = time.perf_counter()
                moved = transfer(message, shape, here, there)
                message = jax.block_until_ready(transfer(moved, shape, there, here))
                seconds.append(time.perf_counter() - start)
            found.append(statistics.median(seconds[1:]))
        return found


def main() -> None:
    # Whatever else prints on standard output goes to standard error.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    place = json.loads(sys.argv[1])
    if place:
        distributed.initialize(**place)
    worker = Worker()
    for line in sys.stdin:
        print(json.dumps(worker.answer(*json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    main()
