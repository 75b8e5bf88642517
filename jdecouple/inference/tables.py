"""What a report counts, as rows of plain values; None stands where a figure has no value."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jdecouple._files import replace
from jdecouple.inference.calibration import expected_calibration_error
from jdecouple.inference.logits import log_probabilities, losses

Row = dict[str, Any]


def of_exits(logits: np.ndarray, labels: np.ndarray, exits: Sequence[int]) -> list[Row]:
    """Accuracy, mean negative log likelihood and expected calibration error of every exit.

    The logits `[exits, n, classes]` and the labels `[n]` are checked; `exits` are their numbers.
    """
    accuracies = (logits.argmax(axis=-1) == labels).mean(axis=1)
    means = losses(logits, labels).mean(axis=1)
    errors = expected_calibration_error(logits, labels)
    columns = zip(exits, accuracies, means, errors, strict=True)
    return [
        {"exit": exit, "accuracy": float(accuracy), "loss": float(loss), "ece": float(error)}
        for exit, accuracy, loss, error in columns
    ]


def confusion(predictions: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Number of examples `[classes, classes]` by label (row) and prediction (column).

    >>> confusion(np.array([1, 1, 0]), np.array([0, 1, 0]), 2)
    array([[1, 1], [0, 1]])
    """
    pairs = np.bincount(labels * classes + predictions, minlength=classes**2)
    return pairs.reshape(classes, classes)


def of_classes(matrix: np.ndarray, names: Sequence[str]) -> list[Row]:
    """Precision, recall, F1 and number of examples of every class of a confusion matrix.

    Of a class that was never predicted, the precision is None, and of one without examples the
    recall; F1 is None only where both are.
    """
    hits, predicted, support = np.diag(matrix), matrix.sum(axis=0), matrix.sum(axis=1)
    return [
        {
            "class": name,
            "precision": _ratio(hits[k], predicted[k]),
            "recall": _ratio(hits[k], support[k]),
            "f1": _ratio(2 * hits[k], predicted[k] + support[k]),
            "support": int(support[k]),
        }
        for k, name in enumerate(names)
    ]


def worst(logits: np.ndarray, labels: np.ndarray, names: Sequence[str], count: int) -> list[Row]:
    """The `count` examples with the highest loss, the worst first, of logits `[n, classes]`.

    The probability is that of the prediction.
    """
    loss = losses(logits[None], labels)[0]
    surest = np.exp(log_probabilities(logits).max(axis=-1))
    predictions = logits.argmax(axis=-1)
    return [
        {
            "index": int(i),
            "label": names[labels[i]],
            "prediction": names[predictions[i]],
            "probability": float(surest[i]),
            "loss": float(loss[i]),
        }
        for i in np.argsort(-loss, kind="stable")[:count]
    ]


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Writes rows of the same keys as CSV, atomically; None is an empty cell.

    Raises:
        OSError: It cannot be written.
    """
    write_lines(path, [[*rows[0]], *([*row.values()] for row in rows)])


def write_lines(path: Path, lines: Sequence[Sequence[Any]]) -> None:
    """Writes lines of cells as CSV, atomically.

    Raises:
        OSError: It cannot be written.
    """

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            csv.writer(file, lineterminator="\n").writerows(lines)

    replace(path, write)


def _ratio(part: int, whole: int) -> float | None:
    return float(part / whole) if whole else None
