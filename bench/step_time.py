"""Time of a training step of several configurations, turn by turn.

    python bench/step_time.py --config 'configs/vision.py:{data},{model},{method}' --data cifar10 \
        --models vgg8 --methods deinforeg --set data.data_dir=DIR model.width=0.25 \
        --sweep method.head_pool 0 4 1 --output runs/step-time

The cells are those of bench/accuracy.py with the same flags; one process holds them all. A segment
trains a cell for `--steps` steps on one batch that is on the devices already, and waits for it. The
cells take turns, segment by segment, so that a machine that slows down slows all of them. The ratio
is the median of the ratios to the first cell's segment of the same turn.
"""

import sys
import time
from typing import Any

import accuracy
import numpy as np
from common import Spread, describe, heading, save, table
from matrix import Cell

from jdecouple.train import report, run
from jdecouple.train.cli import parse


class Arm:
    """A cell, and where its training stands."""

    def __init__(self, cell: Cell):
        config, _ = parse(["train.py", *cell.arguments, "--workdir", str(cell.folder)])
        built = run.build(config)
        self.title = cell.title
        self._trainer = built.trainer
        self._batch = built.trainer.put(built.dataset.train.gather(np.arange(config.batch_size)))
        self._state = built.trainer.init()
        self.parameters = report.parameters(built.trainer)

    def train(self, steps: int) -> float:
        """Trains and waits; seconds a step."""
        start = time.perf_counter()
        for _ in range(steps):
            self._state, _ = self._trainer.step(self._state, self._batch)
        self._trainer.wait(self._state)
        return (time.perf_counter() - start) / steps


def measure(arms: list[Arm], steps: int, segments: int) -> list[dict[str, Any]]:
    """Milliseconds a step of every arm, and their ratios to those of the first."""
    for arm in arms:
        arm.train(1)
    times = np.array([[arm.train(steps) for arm in arms] for _ in range(segments)])
    return [
        {
            "cell": arm.title,
            "parameters": arm.parameters,
            "ms": Spread.of(1000 * times[:, index]),
            "ratio": Spread.of(times[:, index] / times[:, 0]),
        }
        for index, arm in enumerate(arms)
    ]


def main() -> int:
    flags = accuracy.parser(__doc__)
    flags.add_argument("--steps", type=int, default=10, help="steps of a segment")
    flags.add_argument("--segments", type=int, default=7, help="segments of every cell")
    options = flags.parse_args()
    if min(options.steps, options.segments) < 1:
        flags.error("--steps and --segments must be at least 1")
    setup = describe()
    try:
        arms = [Arm(cell) for cell in accuracy.cells_of(options)]
        options.output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:  # a ConfigError among them
        flags.error(str(error))
    found = measure(arms, options.steps, options.segments)
    print(heading(setup))
    header = ["cell", "parameters", "ms a step", "ratio to the first"]
    rows = (
        [each["cell"], f"{each['parameters']:,}", each["ms"].show(1), each["ratio"].show(2)]
        for each in found
    )
    print(table(header, rows))
    save(options.output / "step-time.json", {"setup": setup, "found": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
