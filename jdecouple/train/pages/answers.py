"""What a run's network answers on a split: measured here, or taken from what was measured."""

import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jdecouple._errors import first_line
from jdecouple.inference import calibration
from jdecouple.train import evaluation
from jdecouple.train import report as closing
from jdecouple.train.pages.charts import Chart, Curve, categories
from jdecouple.train.pages.page import Fold, Note, Picture, Piece, Section, Table, Text
from jdecouple.train.pages.record import Record

_CLASSES_IN_TABLE = 15  # of a confusion matrix; of more it is a picture
_CONFUSED = 20  # pairs of classes that are listed beside a picture
_ALIKE = 0.005  # accuracies by batches of other sizes, or on another device
_CURVES = {"exits": "each exit alone", "ensemble": "mean of the logits so far"}
_SHARES = "operations, as a share of those of all blocks"


class Asked(NamedTuple):
    """What is to be measured, as the arguments of `jdecouple report` say."""

    split: str = "test"
    step: str | int = "best"
    data_dir: str | None = None
    batch_size: int | None = None
    evaluate: bool = True


class _Costs(NamedTuple):
    """Curves of `calibration.curves`; `chosen` is what calibrate wrote of its rule, if it did."""

    name: str
    curves: Mapping[str, Any]
    exits: Sequence[int]
    chosen: Mapping[str, Any] | None = None


def sections(record: Record, asked: Asked) -> list[Section]:
    """Accuracy of the exits, confusions, worst examples; accuracy against cost.

    What `evaluate` and `calibrate` have written in the workdir of the same step is taken, the rest
    is computed; where that cannot be, a note says why.
    """
    step = _step(record, asked.step)
    place = record.folder / f"evaluation_{asked.split}"
    answered = _kept(place / "evaluation.json", step)
    if answered and not _agrees(answered, record, asked.split, step):
        answered = None
    costs = _kept_costs(record.folder / f"calibration_{asked.split}", step)
    if costs and not _agrees(costs.chosen or {}, record, asked.split, step):
        costs = None
    why = "--noevaluate has left it out"
    with tempfile.TemporaryDirectory() as folder:
        complete = answered and (costs or len(answered["exits"]) == 1)
        if asked.evaluate and not complete:
            try:
                computed, curves = _computed(record, asked, Path(folder))
            except Exception as error:  # whatever is wrong with data or checkpoint
                why = first_line(error)
            else:
                costs = costs or curves
                if answered is None:
                    answered, place = computed, Path(folder)
        pieces: list[Piece] = [Note(f"The answers are not known: {why}.")]
        if answered is not None:
            pieces = _tried(_answers, answered, place, asked.split)
    against: list[Piece] = []
    if costs is not None:
        against = _tried(_against, costs)
    elif answered is not None and len(answered["exits"]) > 1:
        against = [Note(f"The costs are not known: {why}.")]
    return [
        Section(f"Answers on the {asked.split} split", pieces),
        Section("Accuracy against cost", against),
    ]


def _tried(make: Callable[..., list[Piece]], *given: Any) -> list[Piece]:
    """What is made of given content; a note where that is not what was written once."""
    try:
        return make(*given)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        return [Note(f"What was measured cannot be shown, as it is damaged: {first_line(error)}.")]


def _step(record: Record, asked: str | int) -> int | None:
    """The step of the checkpoint that is asked for."""
    if isinstance(asked, int):
        return asked
    last = max(record.steps, default=None)
    return record.best_step or last if asked == "best" else last


def _read(path: Path) -> Mapping[str, Any]:
    """The JSON object of a file; {} where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _kept(path: Path, step: int | None) -> Mapping[str, Any] | None:
    """What `evaluate` wrote, if it is of this step."""
    content = _read(path)
    needed = {"exits", "classes", "worst", "confusion", "answers", "examples"}
    whole = needed <= content.keys() and isinstance(content["exits"], list)
    return content if whole and content.get("step") == step else None


def _kept_costs(folder: Path, step: int | None) -> _Costs | None:
    """What `calibrate` wrote, if it is of this step."""
    content = _read(folder / "calibration.json")
    if _read(folder / "exits.json").get("step") != step or "curves" not in content:
        return None
    return _Costs(str(content.get("cost_name")), content["curves"], (), content)


def _agrees(content: Mapping[str, Any], record: Record, split: str, step: int | None) -> bool:
    """Whether the accuracies of exits are about those that training measured, where it did.

    Those of a network that was at this step before, or of other data, are not.
    """
    lines = [line for line in record.lines if (line["step"], line["split"]) == (step, split)]
    told = {name: x for line in lines for name, x in closing.exits(line).items()}
    rows = exits if isinstance(exits := content.get("exits"), list) else []
    known = ((row, told.get(f"exit_{row.get('exit')}")) for row in rows if isinstance(row, dict))
    pairs = [(row.get("accuracy"), accuracy) for row, accuracy in known if accuracy is not None]
    return all(isinstance(x, float) and abs(x - accuracy) <= _ALIKE for x, accuracy in pairs)


def _computed(
    record: Record, asked: Asked, folder: Path
) -> tuple[Mapping[str, Any], _Costs | None]:
    """The same, measured here; `folder` gets the pictures."""
    run, split, _ = evaluation.loaded(record.folder, asked.step, asked.split, asked.data_dir)
    run.require_classes()
    print(f"measuring step {run.step} on the {asked.split} split", file=sys.stderr)
    logits, labels = run.logits(split, asked.batch_size)
    content = evaluation.written(folder, run, split, logits, labels)
    if len(run.exits) == 1:
        return content, None
    curves = calibration.curves(logits, labels, run.costs / run.costs[-1])
    return content, _Costs(_SHARES, curves, run.exits)


def _answers(content: Mapping[str, Any], folder: Path, split: str) -> list[Piece]:
    columns = ["exit", "accuracy", "mean negative log likelihood", "expected calibration error"]
    exits = [
        (f"exit {row['exit']}", f"{row['accuracy']:.2%}", row["loss"], f"{row['ece']:.2%}")
        for row in content["exits"]
    ]
    pieces: list[Piece] = [
        Text(
            f"Measured with the checkpoint of step {content['step']:,} on {content['examples']:,} "
            f"examples. The confusions and the worst examples are those of {content['answers']}."
        ),
        Table(f"Every exit on the {split} split", columns, exits),
        *_confusions(content, folder),
    ]
    known = [
        (row["class"], *map(_percent, _rates(row)), row["support"]) for row in content["classes"]
    ]
    columns = ["class", "precision", "recall", "F1", "examples"]
    pieces.append(Fold("Every class", [Table("Precision, recall and F1", columns, known)]))
    return pieces + _worst(content["worst"], folder / "worst.png")


def _confusions(content: Mapping[str, Any], folder: Path) -> list[Piece]:
    names = [row["class"] for row in content["classes"]]
    counts = np.asarray(content["confusion"])
    if len(names) <= _CLASSES_IN_TABLE:
        shades = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        caption = "Examples by label (row) and prediction (column)"
        rows = [[name, *row] for name, row in zip(names, counts.tolist(), strict=True)]
        return [Table(caption, ["label", *names], rows, shades.tolist())]
    pieces: list[Piece] = []
    if (picture := folder / "confusion.png").is_file():
        alt = f"Confusion matrix of {len(names)} classes: labels down, predictions across."
        pieces.append(Picture(picture.read_bytes(), alt))
    apart = counts - np.diag(np.diag(counts))
    most = np.argsort(-apart, axis=None, kind="stable")[:_CONFUSED]
    pairs = [(*divmod(int(i), len(names)), int(apart.flat[i])) for i in most]
    rows = [[names[label], names[answer], count] for label, answer, count in pairs if count]
    caption = "What is most often taken for something else"
    return [*pieces, Table(caption, ["label", "prediction", "examples"], rows)]


def _worst(rows: Sequence[Mapping[str, Any]], picture: Path) -> list[Piece]:
    """The examples with the highest losses: as images where they are some, and as a table."""
    pieces: list[Piece] = []
    if picture.is_file():
        alt = f"The images of the highest losses, in the order of the table: {rows[0]['label']}"
        alt += f" taken for {rows[0]['prediction']} first."
        caption = "The highest losses: index, label, and what it was taken for"
        pieces.append(Picture(picture.read_bytes(), alt, caption))
    known = [
        (
            str(row["index"]),
            row["label"],
            row["prediction"],
            _percent(row["probability"]),
            row["loss"],
        )
        for row in rows
    ]
    columns = ["index", "label", "prediction", "its probability", "loss"]
    return [*pieces, Fold("The highest losses", [Table("The worst examples", columns, known)])]


def _against(costs: _Costs) -> list[Piece]:
    curves = []
    for (name, points), colour in zip(costs.curves.items(), categories(8), strict=False):
        means, accuracies = zip(*sorted(map(tuple, points)), strict=True)
        curves.append(Curve(_CURVES.get(name, f"rule {name}"), means, accuracies, colour))
    pieces: list[Piece] = [
        Text(
            "Where an input may leave at the first exit that is sure, most of the accuracy costs a "
            "part of the work. A rule is drawn for one threshold of all exits, from one that no "
            "input exceeds to one that all do."
        ),
        Chart("Accuracy", curves, x_label=f"mean cost: {costs.name}", percent=True),
    ]
    if costs.chosen is None:
        rows = [
            (f"exit {exit}", f"{cost:.1%}", f"{accuracy:.2%}")
            for exit, (cost, accuracy) in zip(costs.exits, costs.curves["exits"], strict=True)
        ]
        return [*pieces, Table("Each exit alone", ["exit", "cost", "accuracy"], rows)]
    chosen = costs.chosen
    said = f"calibrate chose the rule {chosen['rule']['name']}: {chosen['accuracy']:.2%} at a cost"
    columns = ["exit", "cost", "accuracy", "leave there", "threshold", "temperature"]
    columns += ["calibration error", "with the temperature"]
    rows = [
        (
            f"exit {row['exit']}",
            f"{row['cost']:.1%}",
            *map(_percent, (row["accuracy"], row["share"])),
            *(row["threshold"], row["temperature"]),
            *map(_percent, (row["ece"], row["scaled_ece"])),
        )
        for row in chosen["exits"]
    ]
    return [*pieces, Text(f"{said} of {chosen['cost']:.1%}."), Table("Calibrated", columns, rows)]


def _rates(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["precision"], row["recall"], row["f1"]


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{value:.2%}"
