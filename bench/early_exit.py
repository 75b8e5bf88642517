"""Accuracy and time of early exit, beside all blocks and every exit alone, for a trained network.

    python bench/early_exit.py --workdir runs/c10 --output runs/early-exit.json

Thresholds of every rule are calibrated on the validation split, for at most `--accuracy_loss` less
than the last exit and the cheapest by measured time; then all rows predict the test split, turn by
turn, on one device. "x all" is the time of all blocks over that of a row, by neighbours in time.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import runner
from runner import Columns, Spread

import jdecouple as jd
from jdecouple.inference.rules import NAMES
from jdecouple.train.evaluation import dataset_of

ALL = "all blocks"
COLUMNS: Columns = {
    "row": lambda result: result["row"],
    "test accuracy": lambda result: f"{result['accuracy']:.2%}",
    "leave at each exit": lambda result: ", ".join(f"{x:.0%}" for x in result["shares"]),
    "ms": lambda result: result["ms"].show(),
    "x all": lambda result: result["speed"].show(2),
}


def rows_of(run: jd.inference.Run, options: Any, validation: Any) -> dict[str, Any]:
    """What `exit=` is for every row."""
    logits, labels = run.logits(validation)
    accuracy = float(np.mean(logits[-1].argmax(-1) == labels)) - options.accuracy_loss
    part = validation.gather(np.arange(min(len(validation), 8 * run.description.batch_size)))
    seconds = run.seconds(run.inputs.whole(part))
    rules = {
        name: run.calibrate(validation, accuracy=accuracy, rule=name, costs=seconds)
        for name in options.rules
    }
    return {ALL: run.exits[-1], **rules}


def arm(run: jd.inference.Run, x: np.ndarray, exit: Any) -> Callable[[], dict[str, Any]]:
    """Predicts everything once."""

    def predict() -> dict[str, Any]:
        began = time.perf_counter()
        found = run.predict(x, exit)
        return {"ms": 1e3 * (time.perf_counter() - began), "found": found}

    return predict


def main() -> int:
    flags = runner.flags(__doc__)
    flags.add_argument("--workdir", type=Path, required=True, help="what was trained")
    flags.add_argument("--data_dir", help="where the data are, if not where they were")
    flags.add_argument("--rules", nargs="+", choices=NAMES, default=NAMES)
    flags.add_argument("--accuracy_loss", type=runner.at_least(0), default=0.005)
    flags.add_argument("--repeats", type=runner.count, default=7, help="of every row")
    options = flags.parse_args()
    setup = runner.describe()
    try:
        run = jd.load(options.workdir)
        dataset = dataset_of(run, options.data_dir)
        rows = rows_of(run, options, dataset.validation)
    except (ValueError, OSError) as error:
        flags.error(str(error))
    test = dataset.test.gather(np.arange(len(dataset.test)))
    arms = {name: arm(run, run.inputs.whole(test), exit) for name, exit in rows.items()}
    for predict in arms.values():
        predict()  # compiles
    segments_of = runner.turns(arms, options.repeats)
    results = []
    for name, segments in segments_of.items():
        found = segments[-1]["found"]
        results.append(
            {
                "row": name,
                "accuracy": float(np.mean(found.labels == test["label"])),
                "shares": [float(np.mean(found.exit == exit)) for exit in run.exits],
                "ms": Spread.of(segment["ms"] for segment in segments),
                "speed": runner.ratios(segments_of[ALL], segments),
            }
        )
    runner.publish(setup, runner.columns(COLUMNS, results), options.output, results=results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
