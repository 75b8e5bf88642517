"""Bytes of a device where the optimiser's state is cut over the replicas, or whole on each.

    python bench/replicas.py --output runs/replicas.json

One stage of D replicas trains by backpropagation and Adam on as many devices. Bytes are those of
one device: what the arrays of weights and of the optimiser's state hold there, and the most that a
step holds (`jd.diagnostics.measured_memory`). Milliseconds are those of a step, as medians (lowest
to highest) of segments, in which the two ways take turns; "of whole" is the ratio of neighbours.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

import jax
import numpy as np
import runner
from flax import nnx
from runner import Columns, Spread

import jdecouple as jd

MIB = 2**20
NUM_CLASSES = 10
NETS = {
    "vgg8": lambda rngs: jd.models.vgg8(num_classes=NUM_CLASSES, width=0.25, rngs=rngs),
    "mlp": lambda rngs: jd.models.mlp(
        NUM_CLASSES, input_size=1024, hidden=1024, depth=8, rngs=rngs
    ),
}
SHAPES = {"vgg8": (32, 32, 3), "mlp": (1024,)}
COLUMNS: Columns = {
    "net": lambda r: r["net"],
    "replicas": lambda r: r["replicas"],
    "optimizer": lambda r: "in parts" if r["shards"] else "whole",
    "MiB of weights": lambda r: f"{r['params'] / MIB:.1f}",
    "of optimizer": lambda r: f"{r['opt'] / MIB:.1f}",
    "at most in a step": lambda r: f"{r['most'] / MIB:.1f}",
    "ms a step": lambda r: Spread.of(x["ms"] for x in r["segments"]).show(),
    "of whole": lambda r: runner.ratios(r["segments"], r["whole"]).show(2) if r["shards"] else "",
}


def held(state: Any, part: str) -> int:
    """Bytes of a part of the state on the first device."""
    return sum(
        shard.data.nbytes
        for stage in state.stages
        for leaf in jax.tree.leaves(stage[part])
        for shard in leaf.addressable_shards
        if shard.device == jax.devices()[0]
    )


def measure(net: str, replicas: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of a net: the state whole, and in parts."""
    rng = np.random.default_rng(0)
    batch = {
        "x": rng.normal(size=(options.batch, *SHAPES[net])).astype(np.float32),
        "label": rng.integers(0, NUM_CLASSES, options.batch).astype(np.int32),
    }
    rows, arms = [], {}
    for shards in (False, True):
        trainer = jd.Trainer(
            NETS[net](nnx.Rngs(0)),
            jd.methods.get("bp"),
            jd.optim.adam(1e-3),
            mesh=jd.make_mesh(1, replicas, devices=jax.devices()[:replicas]),
            example=batch,
            shard_optimizer=shards,
        )
        state, most = jd.diagnostics.measured_memory(trainer, trainer.init(), batch)
        row = {"net": net, "replicas": replicas, "shards": shards, "most": max(most.values())}
        rows.append(row | {part: held(state, part) for part in ("params", "opt")})
        arms[shards] = timed(trainer, state, batch, options.steps)
    segments = runner.turns(arms, options.repeats)
    for row in rows:
        row |= {"segments": segments[row["shards"]], "whole": segments[False]}
        print(row, file=sys.stderr, flush=True)
    return rows


def timed(trainer: jd.Trainer, state: Any, batch: Any, steps: int) -> Callable[[], dict[str, Any]]:
    """Trains so many steps from where the last call has come; the first call compiles."""

    def segment() -> dict[str, Any]:
        nonlocal state
        began = time.perf_counter()
        for _ in range(steps):
            state, _ = trainer.step(state, batch)
        trainer.wait(state)
        return {"ms": 1e3 * (time.perf_counter() - began) / steps}

    segment()
    return segment


def main() -> int:
    parser = runner.flags(__doc__)
    parser.add_argument("--nets", nargs="+", choices=tuple(NETS), default=list(NETS))
    parser.add_argument("--replicas", nargs="+", type=runner.count, default=[2, 4])
    parser.add_argument("--batch", type=runner.count, default=64)
    parser.add_argument("--steps", type=runner.count, default=10, help="of a segment")
    parser.add_argument("--repeats", type=runner.count, default=7, help="segments of each")
    options = parser.parse_args()
    setup = runner.describe(devices=[device.device_kind for device in jax.devices()])
    rows = [
        row
        for net in options.nets
        for replicas in options.replicas
        for row in measure(net, replicas, options)
    ]
    runner.publish(setup, runner.columns(COLUMNS, rows), options.output, results=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
