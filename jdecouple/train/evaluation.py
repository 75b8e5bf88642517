"""The commands that need the data set of a run, too: evaluate and calibrate."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jdecouple._errors import first_line, require_number
from jdecouple.data import Dataset, ImageInputs, Split, TokenDataset
from jdecouple.inference import calibration, cli, reports, tables
from jdecouple.inference.adaptive import require_exits
from jdecouple.inference.load import load
from jdecouple.inference.rules import NAMES
from jdecouple.inference.run import Run
from jdecouple.train import bits
from jdecouple.train import config as configuration
from jdecouple.train.errors import ConfigError, one_line
from jdecouple.train.parts import load_data

SPLITS = ("validation", "test", "train")
_MOST_IMAGE_BYTES = 1 << 30  # that the worst are drawn from
_MEASURED_BATCHES = 8


def evaluate(argv: Sequence[str]) -> None:
    """Measures a network on labelled examples of its data set.

    Prints the accuracy of every exit, and writes tables and pictures into a folder: exits.csv,
    confusion.csv and .png, classes.csv, worst.csv (and .png of images), evaluation.json. Of a
    language model it prints bits per byte; exits.csv and evaluation.json have perplexities, too.
    """
    parser = _parser("evaluate", evaluate, "test")
    parser.add_argument(
        "--exit",
        type=cli.exit_or("calibrated"),
        help="that of the tables and pictures, by default the last; a number or 'calibrated'",
    )
    parser.add_argument("--output", type=Path, help="a folder, by default WORKDIR/evaluation_SPLIT")
    given = parser.parse_args(argv)
    run, split, dataset = loaded(given.workdir, given.step, given.split, given.data_dir)
    folder = given.output or run.workdir / f"evaluation_{split.name}"
    if isinstance(dataset, TokenDataset):
        if given.exit is not None:
            raise ValueError("--exit is for networks that classify: all exits are measured")
        _measure(folder, run, split, dataset, given.batch_size)
        return
    logits, labels = run.logits(split, given.batch_size)
    calibrated = given.exit == "calibrated"
    answers = {"rule": cli.calibrated(run)} if calibrated else {"exit": given.exit}
    content = written(folder, run, split, logits, labels, **answers)
    print(f"{split.name} accuracy at step {run.step}, {content['examples']} examples")
    for row in content["exits"]:
        print(f"  exit {row['exit']}: {row['accuracy']:.2%}")
    if calibrated:
        print(f"  {content['answers']}: {content['accuracy']:.2%}")
    print(f"more in {folder}")


def calibrate(argv: Sequence[str]) -> None:
    """Chooses by which rule inputs leave early, on labelled examples of the data set.

    The rule is kept as exits.json in the workdir, where `predict --exit=calibrated` finds it.
    Tables, and a picture of accuracy against cost of all rules, are written into a folder.
    """
    parser = _parser("calibrate", calibrate, "validation")
    parser.add_argument(
        "--output", type=Path, help="the folder, by default WORKDIR/calibration_SPLIT"
    )
    parser.add_argument("--rule", choices=NAMES, default="confidence")
    parser.add_argument("--patience", type=int, default=1, help="exits in succession that are sure")
    wish = parser.add_mutually_exclusive_group(required=True)
    wish.add_argument("--accuracy", type=float, help="fraction of right answers that is wanted")
    wish.add_argument("--accuracy_loss", type=float, help="or what may be lost of the last exit's")
    wish.add_argument("--cost", type=float, help="or the mean cost, as a share of the last exit's")
    parser.add_argument(
        "--time", action="store_true", help="costs are seconds, measured here, not operations"
    )
    given = parser.parse_args(argv)
    if given.accuracy_loss is not None:
        require_number(accuracy_loss=given.accuracy_loss)
    run, split, _ = loaded(given.workdir, given.step, given.split, given.data_dir)
    run.require_classes()
    require_exits(run.predictor)
    logits, labels = run.logits(split, given.batch_size)
    unit, costs = ("time", _seconds(run, split)) if given.time else ("operations", run.costs)
    costs = costs / costs[-1]
    accuracy, last = given.accuracy, float(np.mean(logits[-1].argmax(-1) == labels))
    if given.accuracy_loss is not None:
        accuracy = max(0.0, last - given.accuracy_loss)
    heat = calibration.temperatures(logits, labels)
    rule = calibration.choose(
        *(given.rule, logits, labels, costs),
        accuracy=accuracy,
        cost=given.cost,
        patience=given.patience,
        temperatures=heat,
    )
    folder = given.output or run.workdir / f"calibration_{split.name}"
    name = f"{unit}, as a share of those of all blocks"
    about = {"step": run.step, "split": split.name}
    found = reports.write_calibration(
        *(folder, rule, logits, labels, costs), cost_name=name, exits=run.exits, about=about
    )
    path = run.workdir / cli.EXITS
    reports.write_json(path, {"rule": found["rule"], **about})
    accuracy, share = found["accuracy"], found["cost"]
    print(f"{split.name} accuracy {accuracy:.2%} with {share:.1%} of the {unit}")
    print(f"  with all {last:.2%}")
    for row in found["exits"]:
        print(
            f"  exit {row['exit']}: {row['share']:.1%} leave; expected calibration error "
            f"{row['ece']:.2%}, {row['scaled_ece']:.2%} with temperature {row['temperature']:.3g}"
        )
    print(f"the rule is in {path}, more in {folder}")


def _measure(
    folder: Path, run: Run, split: Split, dataset: TokenDataset, batch_size: int | None
) -> None:
    """Prints and writes what the exits of a language model reach on a split."""
    values = run.measure(split, batch_size)
    values |= bits.units(values, dataset, split.name)
    names = ("loss", "accuracy", "bits_per_byte", "perplexity")
    rows = [
        {"exit": exit, **{name: values[f"exit_{exit}/{name}"] for name in names}}
        for exit in run.exits
    ]
    folder.mkdir(parents=True, exist_ok=True)
    about = {"step": run.step, "split": split.name, "rows": len(split)}
    about["bytes_per_token"] = dataset.bytes_per_token[split.name]
    reports.write_json(folder / "evaluation.json", {**about, "exits": rows})
    tables.write_csv(folder / "exits.csv", rows)
    print(f"{split.name} bits per byte at step {run.step}, {len(split)} rows of tokens")
    for row in rows:
        said = f"perplexity {row['perplexity']:.2f}, accuracy {row['accuracy']:.2%}"
        print(f"  exit {row['exit']}: {row['bits_per_byte']:.4f} ({said})")
    print(f"more in {folder}")


def _parser(name: str, command: Callable[..., None], split: str) -> cli.Parser:
    parser = cli.Parser(name, command.__doc__)
    parser.add_argument("--split", choices=SPLITS, default=split, help=f"by default {split}")
    parser.add_argument("--data_dir", help="folder that now holds the data, if not that of before")
    return parser


def written(
    folder: Path, run: Run, split: Split, logits: np.ndarray, labels: np.ndarray, **answers: Any
) -> dict[str, Any]:
    """What `reports.write_evaluation` writes of a network's logits on a split, and returns."""
    return reports.write_evaluation(
        folder,
        logits,
        labels,
        class_names=run.class_names,
        exits=run.exits,
        images=_images_of(run, split),
        about={"step": run.step, "split": split.name},
        **answers,
    )


def loaded(
    workdir: str | Path, step: str | int, split: str, data_dir: str | None
) -> tuple[Run, Split, Dataset]:
    """The network of a checkpoint, as of `load`, and the examples of a split of its data set.

    Raises:
        ValueError, OSError: either cannot be loaded, or the split is empty.
    """
    run = load(workdir, step)
    dataset = dataset_of(run, data_dir)
    examples = getattr(dataset, split)
    if not len(examples):
        raise ConfigError(f"the {split} split is empty: choose another with --split")
    return run, examples, dataset


def dataset_of(run: Run, data_dir: str | None = None) -> Dataset:
    """The data set that a network was trained on, as its config.json says.

    Of an absolute PATH in its name, only the last part is looked for in `data_dir`.

    Raises:
        ConfigError: it cannot be loaded, or is no longer the same.
    """
    path = run.workdir / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))["config"]
        config = configuration.validate({**content, "optimizer": {}})  # it may be in another place
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ConfigError(
            f"'{path}' does not tell which data set was trained on: {reason}"
        ) from error
    if data_dir is not None:
        config.data.data_dir = data_dir
        kind, _, place = config.data.name.partition(":")
        if (path := Path(place).expanduser()).is_absolute():
            config.data.name = f"{kind}:{path.name}"
    with one_line(config.data, "config.data"):
        dataset = load_data(config)
    now, before = dataset.inputs, run.inputs
    if isinstance(now, ImageInputs) and isinstance(before, ImageInputs):
        now = dataclasses.replace(now, dtype=before.dtype)
    if now != before or dataset.class_names != run.description.class_names:
        raise ConfigError(
            f"data set {dataset.name!r} is no longer what was trained on: its classes or inputs "
            "are others"
        )
    return dataset


def _seconds(run: Run, split: Split) -> np.ndarray:
    """Seconds of an example up to every exit, measured on up to eight batches."""
    count = min(len(split), _MEASURED_BATCHES * run.description.batch_size)
    return run.seconds(run.inputs.whole(split.gather(np.arange(count))))


def _images_of(run: Run, split: Split) -> np.ndarray | None:
    """The images of a split, to draw some of; None of texts, or of too many."""
    shape, dtype = run.inputs.example
    size = len(split) * int(np.prod(shape)) * np.dtype(dtype).itemsize
    if run.inputs.kind != "images" or size > _MOST_IMAGE_BYTES:
        return None
    return split.gather(np.arange(len(split)))["x"]
