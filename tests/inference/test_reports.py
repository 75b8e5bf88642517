"""What exits answer, as tables and pictures."""

import csv
import json
import math
import os

import numpy as np
import pytest

from jdecouple.inference import calibration, plots, reports, rules, tables
from jdecouple.inference.rules import Rule

pytestmark = pytest.mark.usefixtures("drawn")

EXITS, COUNT, CLASSES = 3, 60, 4
RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, CLASSES - 1, COUNT)  # there is none of the last class
LOGITS = (2 * np.eye(CLASSES)[LABELS] + RNG.normal(size=(EXITS, COUNT, CLASSES))).astype(np.float32)
LOGITS[..., 1] -= 99  # which is never predicted
NAMES = ["cat", "dog, big", "$x^2", "ünï\ncode"]
COSTS = [1.0, 2.0, 3.0]
SLOW = pytest.mark.slow


def rows(path) -> list[dict]:
    with path.open(newline="", encoding="utf-8") as file:
        return [*csv.DictReader(file)]


def is_picture(path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 2000


# --- tables ---------------------------------------------------------------------------------------


def test_confusion_by_hand():
    matrix = tables.confusion(np.array([0, 1, 1, 0, 2]), np.array([0, 1, 0, 0, 1]), 3)
    assert matrix.tolist() == [[2, 1, 0], [0, 1, 1], [0, 0, 0]]


def test_classes_by_hand():
    """The last class was predicted once and is the label of none."""
    found = tables.of_classes(np.array([[2, 1, 0], [0, 1, 1], [0, 0, 0]]), ["a", "b", "c"])
    assert found == [
        {"class": "a", "precision": 1, "recall": 2 / 3, "f1": 4 / 5, "support": 3},
        {"class": "b", "precision": 1 / 2, "recall": 1 / 2, "f1": 1 / 2, "support": 2},
        {"class": "c", "precision": 0, "recall": None, "f1": 0, "support": 0},
    ]


@pytest.mark.slow
def test_classes_are_as_scikit_learn_has_them():
    from sklearn.metrics import precision_recall_fscore_support

    answers = LOGITS[0].argmax(-1)
    found = tables.of_classes(tables.confusion(answers, LABELS, CLASSES), NAMES)
    wanted = precision_recall_fscore_support(
        LABELS, answers, labels=range(CLASSES), zero_division=np.nan
    )
    for key, values in zip(("precision", "recall", "f1", "support"), wanted, strict=True):
        numbers = [math.nan if row[key] is None else row[key] for row in found]
        np.testing.assert_allclose(numbers, values, rtol=1e-12, err_msg=key)


def test_worst_by_hand():
    """Ties in the order of the examples; the probability is that of the prediction."""
    logits = np.array([[0, 0], [math.log(3), 0], [0, math.log(9)], [0, 0]], np.float32)
    found = tables.worst(logits, np.array([0, 0, 0, 1]), ["a", "b"], 3)
    assert [row["index"] for row in found] == [2, 0, 3]
    assert [(row["label"], row["prediction"]) for row in found] == [
        ("a", "b"),
        ("a", "a"),
        ("b", "a"),
    ]
    np.testing.assert_allclose([row["probability"] for row in found], [0.9, 0.5, 0.5], rtol=1e-6)
    losses = [-math.log(0.1), math.log(2), math.log(2)]
    np.testing.assert_allclose([row["loss"] for row in found], losses, rtol=1e-6)


def test_exits_by_hand():
    """Right with probability 3/4, and wrong with 9/10."""
    logits = np.array([[[math.log(3), 0], [0, math.log(9)]]], np.float32)
    (found,) = tables.of_exits(logits, np.array([0, 0]), [5])
    assert (found["exit"], found["accuracy"]) == (5, 0.5)
    loss = -(math.log(3 / 4) + math.log(1 / 10)) / 2
    np.testing.assert_allclose([found["loss"], found["ece"]], [loss, (0.25 + 0.9) / 2], rtol=1e-6)


# --- the folder -----------------------------------------------------------------------------------


def test_an_evaluation_in_a_folder(tmp_path):
    images = RNG.integers(0, 256, (COUNT, 6, 6, 3), np.uint8)
    folder = tmp_path / "new" / "evaluation"
    found = reports.write_evaluation(
        folder, LOGITS, LABELS, class_names=NAMES, exits=(1, 3, 5), images=images, worst=7
    )
    names = {path.name for path in folder.iterdir()}
    tables_written = {"exits.csv", "classes.csv", "worst.csv", "confusion.csv"}
    assert names == {*tables_written, "confusion.png", "worst.png", "evaluation.json"}
    assert json.loads((folder / "evaluation.json").read_text()) == found
    assert is_picture(folder / "confusion.png")
    assert is_picture(folder / "worst.png")
    assert found["answers"] == "exit 5"
    assert (
        found["accuracy"]
        == found["exits"][2]["accuracy"]
        == np.mean(LOGITS[2].argmax(-1) == LABELS)
    )
    assert [row["exit"] for row in rows(folder / "exits.csv")] == ["1", "3", "5"]
    assert len(rows(folder / "worst.csv")) == 7
    read = rows(folder / "classes.csv")
    assert [row["class"] for row in read] == NAMES
    assert (read[1]["precision"], read[3]["recall"]) == ("", "")
    counts = rows(folder / "confusion.csv")
    assert [[int(row[name]) for name in NAMES] for row in counts] == found["confusion"]
    assert np.sum(found["confusion"]) == COUNT


def test_an_evaluation_of_another_exit_and_of_a_rule(tmp_path):
    first = reports.write_evaluation(tmp_path, LOGITS, LABELS, exit=0)
    assert first["confusion"] == tables.confusion(LOGITS[0].argmax(-1), LABELS, CLASSES).tolist()
    assert not (tmp_path / "worst.png").exists()
    rule = Rule("confidence", 0.7)
    found = reports.write_evaluation(tmp_path, LOGITS, LABELS, rule=rule)
    wanted = calibration.outcome(rule, LOGITS, LABELS, COSTS)
    assert found["accuracy"] == wanted.accuracy
    assert found["shares"] == wanted.shares.tolist()


def test_a_calibration_in_a_folder(tmp_path):
    heat = calibration.temperatures(LOGITS, LABELS)
    rule = calibration.choose("margin", LOGITS, LABELS, COSTS, cost=2, temperatures=heat)
    found = reports.write_calibration(
        tmp_path, rule, LOGITS, LABELS, COSTS, exits=(0, 2, 4), about={"step": 9}
    )
    kept = json.loads((tmp_path / "exits.json").read_text())
    assert Rule.from_json(kept.pop("rule")) == rule
    assert kept == {"step": 9}
    assert json.loads((tmp_path / "calibration.json").read_text()) == found
    assert is_picture(tmp_path / "accuracy_cost.png")
    assert found["cost"] <= 2
    assert [row["exit"] for row in rows(tmp_path / "calibration.csv")] == ["0", "2", "4"]
    assert all(row["scaled_loss"] <= row["loss"] for row in found["exits"])
    assert {row["name"] for row in rows(tmp_path / "curves.csv")} == {
        *rules.NAMES,
        "exits",
        "ensemble",
    }


@pytest.mark.parametrize(
    "classes",
    [2, pytest.param(30, marks=SLOW), pytest.param(120, marks=SLOW)],
)
def test_a_confusion_matrix_of_any_size_is_drawn(tmp_path, classes):
    labels = np.arange(200) % classes
    matrix = tables.confusion(np.roll(labels, 7), labels, classes)
    names = [f"class number {k}, $of_many" for k in range(classes)]
    plots.confusion(matrix, names, tmp_path / "confusion.png", "exit 0")
    assert is_picture(tmp_path / "confusion.png")


@pytest.mark.parametrize("shape", [(5, 4), pytest.param((5, 4, 1), marks=SLOW), (5, 4, 4)])
def test_images_of_any_kind_are_drawn(tmp_path, shape):
    images = RNG.normal(size=(COUNT, *shape))
    worst = tables.worst(LOGITS[0], LABELS, NAMES, 8)
    plots.worst(worst, images, tmp_path / "worst.png", "exit 0")
    assert is_picture(tmp_path / "worst.png")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_names": NAMES[:2]}, "there are 2 class names: 4 are needed"),
        ({"class_names": [1, 2, 3, 4]}, r"class_names\[0\] is a int: a builtins str is needed"),
        ({"exits": (0, 1)}, r"exits are \[0, 1\]: 3 different numbers are needed"),
        ({"exit": 7}, "exit is 7: allowed are 0, 1, 2"),
        ({"exit": 1, "rule": Rule("margin", 1)}, "exit is 1 and a rule is given: one of them"),
        ({"rule": "margin"}, "rule is a str: a jdecouple Rule is needed"),
        ({"worst": 0}, "worst is 0: a whole number of at least 1 is needed"),
        ({"images": np.zeros((COUNT, 4))}, r"images have shape \[60, 4\]: \[60, height, width\]"),
        ({"images": np.zeros((9, 4, 4))}, r"images have shape \[9, 4, 4\]: \[60, height, width\]"),
    ],
)
def test_bad_arguments_get_one_line_and_write_nothing(tmp_path, options, message):
    with pytest.raises((TypeError, ValueError), match=message) as error:
        reports.write_evaluation(tmp_path / "out", LOGITS, LABELS, **options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write .*file") as error:
        reports.write_evaluation(tmp_path / "file", LOGITS, LABELS)
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["file"]
