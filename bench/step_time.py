"""Time of a training step of several configurations, turn by turn.

    python bench/step_time.py --config 'configs/vision.py:{data},{model},{method}' --data cifar10 \
        --models vgg8 --methods deinforeg --set data.data_dir=DIR model.width=0.25 \
        --sweep method.head_pool 0 4 1 --output runs/step-time

The cells are those of bench/accuracy.py with the same flags; one process holds them all. A segment
trains a cell for `--steps` steps on one batch that is on the devices already, and waits for it.
The cells take turns. The ratio is that to the first cell's segment of the same turn.
"""

import functools
import sys

import accuracy
import numpy as np
import runner
from matrix import Cell
from runner import Columns, Spread
from worker import Repeated, timed

from jdecouple.train import report, run
from jdecouple.train.cli import parse

COLUMNS: Columns = {
    "cell": lambda result: result["cell"],
    "parameters": lambda result: f"{result['parameters']:,}",
    "ms a step": lambda result: result["ms"].show(),
    "ratio to the first": lambda result: result["ratio"].show(2),
}


def start(cell: Cell) -> tuple[Repeated, int]:
    config, _ = parse(["train.py", *cell.arguments, "--workdir", str(cell.folder)])
    built = run.build(config)
    batch = built.dataset.train.gather(np.arange(config.batch_size))
    return Repeated(built.trainer, batch), report.parameters(built.trainer)


def main() -> int:
    flags = accuracy.parser(__doc__)
    flags.add_argument("--steps", type=runner.count, default=10, help="steps of a segment")
    flags.add_argument("--segments", type=runner.count, default=7, help="segments of every cell")
    options = flags.parse_args()
    setup = runner.describe()
    try:
        cells = {cell.title: start(cell) for cell in accuracy.cells_of(options)}
        options.output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:  # a ConfigError among them
        flags.error(str(error))
    for training, _ in cells.values():
        training.run(1)  # compiles
    arms = {x: functools.partial(timed, cells[x][0], options.steps) for x in cells}
    segments_of = runner.turns(arms, options.segments)
    first, *_ = segments_of.values()
    results = [
        {
            "cell": title,
            "parameters": cells[title][1],
            "ms": Spread.of(segment["ms"] for segment in segments),
            "ratio": runner.ratios(segments, first),
        }
        for title, segments in segments_of.items()
    ]
    output = options.output / "step-time.json"
    runner.publish(setup, runner.columns(COLUMNS, results), output, results=results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
