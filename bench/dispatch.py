"""What it costs the host to dispatch one stage call, against the number of leaves of its state.

    python bench/dispatch.py --output runs/dispatch.json
    python bench/dispatch.py --chunk 16

K stages train by deinforeg. A stage is one block: a tiny dense layer with many biases, all of them
trained, so that leaves come without computation (a perceptron with as many leaves spends more time
on its thousands of small operations than the dispatch takes). A sample is one `Trainer.step`, or
one `Trainer.steps` of T batches, with nothing in flight before it, on batches that are on the
devices, divided by K and T:

    dispatched   until it returns: the host's share
    done         until the batches are trained on: how little the computation adds

    devices   each stage on a device of its own (devices that the CPU is made to look like), so that
              messages are sent
    apart     all stages on one device, a call each: the difference is the cost of the messages
    fused     all stages on one device, compiled into one call
"""

import argparse
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import Spread, describe, heading, save, table
from flax import nnx

import jdecouple as jd

PLACEMENTS = ("devices", "apart", "fused")
OTHER_LEAVES = 4  # kernel and bias of the dense layer and of the head's classifier
NUM_CLASSES = 4
WIDTH = 4
BATCH = 8
WARM_UP = 10


class ManyBiases(nnx.Module):
    """A dense layer with `count` biases more than it needs, and ReLU."""

    def __init__(self, count: int, rngs: nnx.Rngs):
        self.dense = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.biases = nnx.List([nnx.Param(jnp.zeros(WIDTH)) for _ in range(count)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[batch, WIDTH] -> [batch, WIDTH]`."""
        return nnx.relu(sum((bias[...] for bias in self.biases), self.dense(x)))


def build(leaves: int, stages: int, placement: str) -> tuple[jd.Trainer, dict[str, np.ndarray]]:
    """A trainer whose stages have `leaves` leaves of state each, and a batch."""
    rng = np.random.default_rng(0)
    batch = {
        "x": rng.normal(size=(BATCH, WIDTH)).astype(np.float32),
        "label": rng.integers(0, NUM_CLASSES, BATCH).astype(np.int32),
    }
    devices = jax.devices()[: stages if placement == "devices" else 1]
    trainer = jd.Trainer(
        jd.Model([ManyBiases(leaves - OTHER_LEAVES, nnx.Rngs(index)) for index in range(stages)]),
        jd.methods.get("deinforeg", projector="identity", mode="unmerge"),
        jd.optim.sgd(0.01),
        mesh=jd.make_mesh(stages=stages, devices=devices),
        example=batch,
        num_classes=NUM_CLASSES,
        fuse=placement == "fused",
    )
    return trainer, batch


def measure(leaves: int, stages: int, placement: str, chunk: int, steps: int) -> dict[str, Any]:
    """Times single steps or chunks; "dispatched" and "done" are microseconds a stage and batch.

    Raises:
        RuntimeError: a stage's state has another number of leaves than asked for.
    """
    trainer, batch = build(leaves, stages, placement)
    state, placed = trainer.init(), trainer.put([batch] * chunk if chunk > 1 else batch)
    train = trainer.steps if chunk > 1 else trainer.step
    counted = {len(jax.tree.leaves(stage)) for stage in state.stages}
    if counted != {leaves}:
        raise RuntimeError(f"stages have {counted} leaves: {leaves} were asked for")
    dispatched, done = [], []
    for _ in range(WARM_UP + steps):
        trainer.wait(state)
        start = time.perf_counter()
        state, _ = train(state, placed)
        dispatched.append(time.perf_counter() - start)
        trainer.wait(state)
        done.append(time.perf_counter() - start)
    scale = 1e6 / (stages * chunk)
    return {
        "leaves": leaves,
        "placement": placement,
        "dispatched": Spread.of(scale * seconds for seconds in dispatched[WARM_UP:]),
        "done": Spread.of(scale * seconds for seconds in done[WARM_UP:]),
    }


def report(found: list[dict[str, Any]]) -> str:
    """The medians as a Markdown table."""
    header = ["leaves of a stage"]
    rows: dict[int, list] = {}
    for each in found:
        row = rows.setdefault(each["leaves"], [each["leaves"]])
        row += [f"{each[what].median:.0f}" for what in ("dispatched", "done")]
    for placement in PLACEMENTS:
        header += [f"{placement}: dispatched", "done"]
    return table(header, rows.values())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--leaves", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--stages", type=int, default=2, help="K, and devices")
    parser.add_argument("--chunk", type=int, default=1, help="T, batches of a call")
    parser.add_argument("--steps", type=int, default=300, help="samples")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if min(options.stages, options.chunk, options.steps) < 1:
        parser.error("--stages, --chunk and --steps must be at least 1")
    for leaves in options.leaves:
        if leaves < OTHER_LEAVES:
            parser.error(f"--leaves is {leaves}: at least {OTHER_LEAVES} are needed")
    return options


def main() -> None:
    options = parse()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", options.stages)
    setup = describe()
    found = [
        measure(leaves, options.stages, placement, options.chunk, options.steps)
        for leaves in options.leaves
        for placement in PLACEMENTS
    ]
    print(heading(setup))
    print(
        f"Microseconds a stage and batch, medians of {options.steps} samples; "
        f"{options.stages} stages, {options.chunk} batch(es) a call\n"
    )
    print(report(found))
    if options.output:
        asked = {name: getattr(options, name) for name in ("leaves", "stages", "chunk", "steps")}
        save(options.output, {"setup": setup, "options": asked, "found": found})


if __name__ == "__main__":
    main()
