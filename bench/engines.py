"""What one program for several batches saves, where dispatch decides: engine "spmd" against "mpmd".

    python bench/engines.py --output runs/engines.json

A perceptron of many small equal blocks trains by deinforeg in K stages. An arm is

    mpmd         `Trainer.step`: a call for every stage (on one device: one call for all)
    spmd, T = n  `Trainer.steps` with n batches: one call for all stages and n batches

    devices   each stage on a device of its own (devices that the CPU is made to look like)
    one       all stages on one device

A segment trains an arm on `--batches` batches that are on the devices already, and waits for them.
The arms of a placement take turns, segment by segment, so that a machine that slows down slows all
of them. The ratio is the median of the ratios to mpmd's segment of the same turn.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from common import Spread, describe, heading, save, table
from flax import nnx

import jdecouple as jd

PLACEMENTS = ("devices", "one")
NUM_CLASSES = 4
MPMD = "mpmd"


class Arm:
    """One way to train, and where it stands."""

    def __init__(self, options: argparse.Namespace, placement: str, group: int | None):
        rng = np.random.default_rng(0)
        batch = {
            "x": rng.normal(size=(options.batch, options.hidden)).astype(np.float32),
            "label": rng.integers(0, NUM_CLASSES, options.batch).astype(np.int32),
        }
        self.name = MPMD if group is None else f"spmd, T = {group}"
        self._group = group
        self._trainer = jd.Trainer(
            jd.models.mlp(
                NUM_CLASSES,
                input_size=options.hidden,
                hidden=options.hidden,
                depth=options.blocks,
                rngs=nnx.Rngs(0),
            ),
            jd.methods.get("deinforeg", projector="identity", mode="unmerge"),
            jd.optim.sgd(0.01),
            mesh=jd.make_mesh(options.stages if placement == "devices" else 1),
            num_stages=options.stages,
            example=batch,
            engine=MPMD if group is None else "spmd",
        )
        self._batch = self._trainer.put(batch)
        self._state = self._trainer.init()
        self.train(group or 1)

    def train(self, batches: int) -> float:
        """Trains and waits; seconds that it took."""
        trainer, state = self._trainer, self._state
        start = time.perf_counter()
        if self._group is None:
            for _ in range(batches):
                state, _ = trainer.step(state, self._batch)
        else:
            group = [self._batch] * self._group
            for _ in range(batches // self._group):
                state, _ = trainer.steps(state, group)
        trainer.wait(state)
        self._state = state
        return time.perf_counter() - start


def measure(options: argparse.Namespace, placement: str) -> list[dict[str, Any]]:
    """Examples a second of every arm, and their ratios to those of mpmd."""
    arms = [Arm(options, placement, group) for group in (None, *options.groups)]
    for arm in arms:
        arm.train(options.batches)
    rates: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for _ in range(options.segments):
        for arm in arms:
            seconds = arm.train(options.batches)
            rates[arm.name].append(options.batches * options.batch / seconds)
    return [
        {
            "placement": placement,
            "arm": name,
            "rate": Spread.of(found),
            "ratio": Spread.of(a / b for a, b in zip(found, rates[MPMD], strict=True)),
        }
        for name, found in rates.items()
    ]


def report(found: list[dict[str, Any]]) -> str:
    """The medians and ranges as a Markdown table."""
    header = ["stages on", "engine", "examples/s", "ratio to mpmd"]
    rows = (
        [each["placement"], each["arm"], each["rate"].show(0), each["ratio"].show(2)]
        for each in found
    )
    return table(header, rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--stages", type=int, default=4, help="K, and devices")
    parser.add_argument("--blocks", type=int, default=32, help="blocks of the net")
    parser.add_argument("--hidden", type=int, default=8, help="width of every block")
    parser.add_argument("--batch", type=int, default=8, help="examples in a batch")
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 8, 32], help="T")
    parser.add_argument("--batches", type=int, default=96, help="batches in a segment")
    parser.add_argument("--segments", type=int, default=9, help="segments of every arm")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    for name in ("stages", "hidden", "batch", "segments", "batches"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}: at least 1 is needed")
    if options.blocks < max(2, options.stages):
        parser.error(f"--blocks is {options.blocks}: at least 2, and one a stage, are needed")
    for group in options.groups:
        if group < 1 or options.batches % group:
            parser.error(f"--groups: {group} does not divide --batches {options.batches}")
    return options


def main() -> None:
    options = parse()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", options.stages)
    setup = describe()
    found = [each for placement in PLACEMENTS for each in measure(options, placement)]
    print(heading(setup))
    print(
        f"{options.blocks} blocks of width {options.hidden} in {options.stages} stages, batches of "
        f"{options.batch}; median (lowest to highest) of {options.segments} segments\n"
    )
    print(report(found))
    if options.output:
        names = ("stages", "blocks", "hidden", "batch", "groups", "batches", "segments")
        asked = {name: getattr(options, name) for name in names}
        save(options.output, {"setup": setup, "options": asked, "found": found})


if __name__ == "__main__":
    main()
