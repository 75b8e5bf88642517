"""One process of `concurrency.py`: trains on command and tells how long it took.

The argument is a JSON object with "options" (those of `concurrency.py`) and, for one of several
processes, "distributed" (arguments of `distributed.initialize`). Commands come on standard input,
one a line, and each is answered by one line of JSON on standard output. NAME is a set-up: it
begins from the initial weights when it is first named, and "fused" compiles all stages into one
call, any other name a call each.

    run NAME N      trains on N batches and waits for them: seconds, processor seconds, losses
    digest NAME     SHA-256 of the parameters, statistics and optimiser state of every block held
    stages NAME N   times every stage by itself over N batches (the state of the run moves on)
"""

import hashlib
import itertools
import json
import os
import sys
import time
from typing import Any

import jax
import numpy as np
from flax import nnx

import jdecouple as jd
from jdecouple.pipeline import distributed

NUM_CLASSES = 10
IMAGE_SIZE = 16  # of the vgg, in pixels
DISTINCT_BATCHES = 4


def build_model(options: dict[str, Any]) -> tuple[jd.Model, tuple[int, ...]]:
    """A net of equal blocks, so that equal numbers of blocks are equal work.

    Returns:
        The model and the shape of one input.
    """
    hidden, depth, rngs = options["hidden"], options["depth"], nnx.Rngs(0)
    if options["model"] == "mlp":
        model = jd.models.mlp(NUM_CLASSES, input_size=hidden, hidden=hidden, depth=depth, rngs=rngs)
        return model, (hidden,)
    layout = [[hidden, hidden]] * depth
    size = {"image_size": IMAGE_SIZE, "channels": hidden}
    model = jd.models.vgg(NUM_CLASSES, blocks=layout, **size, rngs=rngs)
    return model, (IMAGE_SIZE, IMAGE_SIZE, hidden)


def build_method(options: dict[str, Any]) -> jd.methods.Method:
    """The method with small heads: one dense layer to `head` features."""
    arguments: dict[str, dict] = {
        "bp": {},
        "deinforeg": {"projector": (options["head"],)},
        "scpl": {"projector": "linear", "features": options["head"]},
    }
    return jd.methods.get(options["method"], **arguments[options["method"]])


class Run:
    """A trainer with its state and batches that are on the devices already."""

    def __init__(self, options: dict[str, Any], fuse: bool):
        model, shape = build_model(options)
        rng = np.random.default_rng(0)
        size, stages = options["batch"], options["stages"]
        batches = [
            {
                "x": rng.normal(size=(size, *shape)).astype(np.float32),
                "label": rng.integers(0, NUM_CLASSES, size).astype(np.int32),
            }
            for _ in range(DISTINCT_BATCHES)
        ]
        self.trainer = jd.Trainer(
            model,
            build_method(options),
            jd.optim.sgd(0.01, momentum=0.9),
            mesh=jd.make_mesh(stages=stages),
            boundaries=[stage * options["depth"] // stages for stage in range(stages)],
            example=batches[0],
            fuse=fuse,
        )
        self.state = self.trainer.init()
        self.batches = itertools.cycle([self.trainer.put(batch) for batch in batches])

    def run(self, steps: int) -> dict[str, Any]:
        """Trains; the time runs from the first dispatch to the end of the last computation."""
        found = []
        start, processor = time.perf_counter(), time.process_time()
        for _ in range(steps):
            self.state, metrics = self.trainer.step(self.state, next(self.batches))
            found.append(metrics)
        self.trainer.wait(self.state)
        seconds, processor = time.perf_counter() - start, time.process_time() - processor
        losses = [
            {name: float(value) for name, value in each.items() if name.endswith("/loss")}
            for each in found
        ]
        cores = sorted(os.sched_getaffinity(0))
        return {"seconds": seconds, "processor": processor, "losses": losses, "cores": cores}

    def digest(self) -> dict[str, str]:
        """A hash of everything that training changes, by block; of the blocks held here."""
        hashes = {}
        for stage, held in zip(self.trainer.stages, self.state.stages, strict=True):
            for number, unit in enumerate(stage.units if held else ()):
                leaves = jax.tree.leaves(
                    [held[part][number] for part in ("params", "stats", "opt")]
                )
                data = b"".join(np.asarray(leaf).tobytes() for leaf in leaves)
                hashes[str(unit.index)] = hashlib.sha256(data).hexdigest()
        return hashes

    def stages(self, steps: int) -> list[list[float]]:
        """Seconds of every stage for each of `steps` batches, every call waited for."""
        found = []
        for _ in range(steps):
            self.state, calls = self.trainer.measure(self.state, next(self.batches))
            seconds = [0.0] * len(self.trainer.stages)
            for call, taken in calls:
                seconds[call.stage] += taken
            found.append(seconds)
        return found


def main() -> None:
    # Whatever else prints on standard output goes to standard error.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    spec = json.loads(sys.argv[1])
    if spec["distributed"]:
        distributed.initialize(**spec["distributed"])
    runs: dict[str, Run] = {}
    for line in sys.stdin:
        command, name, *numbers = line.split()
        if name not in runs:
            runs[name] = Run(spec["options"], fuse=name == "fused")
        reply = getattr(runs[name], command)(*map(int, numbers))
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
