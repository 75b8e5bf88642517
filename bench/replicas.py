"""Bytes of a device where the optimiser's state is cut over the replicas, or whole on each.

    python bench/replicas.py --output runs/replicas.json

One stage of D replicas trains by backpropagation and Adam on as many devices. Bytes are those of
one device: what the arrays of weights and of the optimiser's state hold there, and the most that a
step holds (`jd.diagnostics.measured_memory`). Times are not measured.
"""

import os
import sys
from typing import Any

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

import jax
import numpy as np
import runner
from flax import nnx
from runner import Columns

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


def measure(net: str, replicas: int, shards: bool, size: int) -> dict[str, Any]:
    """The row of a net."""
    rng = np.random.default_rng(0)
    batch = {
        "x": rng.normal(size=(size, *SHAPES[net])).astype(np.float32),
        "label": rng.integers(0, NUM_CLASSES, size).astype(np.int32),
    }
    trainer = jd.Trainer(
        NETS[net](nnx.Rngs(0)),
        jd.methods.get("bp"),
        jd.optim.adam(1e-3),
        mesh=jd.make_mesh(1, replicas, devices=jax.devices()[:replicas]),
        example=batch,
        shard_optimizer=shards,
    )
    state, most = jd.diagnostics.measured_memory(trainer, trainer.init(), batch)
    own = {part: held(state, part) for part in ("params", "opt")}
    row = {"net": net, "replicas": replicas, "shards": shards, **own, "most": max(most.values())}
    print(row, file=sys.stderr, flush=True)
    return row


def main() -> int:
    parser = runner.flags(__doc__)
    parser.add_argument("--nets", nargs="+", choices=tuple(NETS), default=list(NETS))
    parser.add_argument("--replicas", nargs="+", type=runner.count, default=[2, 4])
    parser.add_argument("--batch", type=runner.count, default=64)
    options = parser.parse_args()
    setup = runner.describe(devices=[device.device_kind for device in jax.devices()])
    rows = [
        measure(net, replicas, shards, options.batch)
        for net in options.nets
        for replicas in options.replicas
        for shards in (False, True)
    ]
    runner.publish(setup, runner.columns(COLUMNS, rows), options.output, results=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
