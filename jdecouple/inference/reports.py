"""What trained exits answer, as tables and pictures in a folder."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jdecouple._errors import require_int, require_type
from jdecouple._files import any_folder, make_folder, naming, replace
from jdecouple.inference import calibration, plots, rules, tables
from jdecouple.inference.logits import check_labels, check_logits, scaled
from jdecouple.inference.rules import Rule


def write_evaluation(
    folder: str | Path,
    logits: np.ndarray,
    labels: np.ndarray,
    *,
    class_names: Sequence[str] | None = None,
    exits: Sequence[int] | None = None,
    exit: int | None = None,
    rule: Rule | None = None,
    images: Any = None,
    worst: int = 24,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes what the exits answer to labelled examples.

    The folder, made if need be, gets ``exits.csv`` (accuracy, mean negative log likelihood and
    expected calibration error of each), ``confusion.csv`` and ``.png``, ``classes.csv`` (precision,
    recall, F1, support), ``worst.csv`` (the highest losses), ``worst.png`` for images, and
    ``evaluation.json``, which holds what is returned. Each appears whole or not at all.

    Args:
        folder: Where to.
        logits: Of all exits, `[exits, n, classes]`.
        labels: Classes `[n]`.
        class_names: Of every class; by default its number.
        exits: Number of every exit, such as `trainer.exits`; by default 0 and up.
        exit: That whose answers the matrix, the classes and the worst examples are of, one of
            `exits`; by default the last.
        rule: It chooses the exit of each example instead, and what logits are divided by.
        images: `[n, height, width]` or `[n, height, width, 1, 3 or 4]`, of 0 to 255 if uint8.
        worst: Number of examples with the highest losses.
        about: What tells later which network answered, such as its step: for JSON.

    Returns:
        What JSON can hold: what `about` holds, "examples", "answers" (of which exit or rule),
        "accuracy" and "loss" of these, "exits", "classes" and "worst" as rows, "confusion" as rows
        of counts, and with a rule "shares", the fraction of the examples that leaves at each exit.

    Raises:
        TypeError: Logits are no numbers, labels no integers, or the rule is none.
        ValueError: Shapes do not fit, or a value is not allowed; there is no example.
        OSError: The folder cannot be written.
    """
    require_int(1, worst=worst)
    logits = check_logits(logits, least=1)
    labels = check_labels(labels, logits)
    numbers = _exit_numbers(exits, len(logits))
    names = _class_names(class_names, logits.shape[-1])
    if images is not None:
        _check_images(images, len(labels))
    every = np.arange(len(labels))
    shares: dict[str, Any] = {}
    if rule is None:
        exit = numbers[-1] if exit is None else exit
        if exit not in numbers:
            raise ValueError(f"exit is {exit!r}: allowed are {', '.join(map(str, numbers))}")
        answers, title = logits[numbers.index(exit)], f"exit {exit}"
    elif exit is not None:
        raise ValueError(f"exit is {exit!r} and a rule is given: one of them is allowed")
    else:
        left = rules.exits(rule, logits)
        answers = scaled(logits, rule.temperatures)[left, every]
        title = f"rule {rule.name}"
        leaving = np.bincount(left, minlength=len(logits)) / len(labels)
        shares["shares"] = leaving.tolist()
    matrix = tables.confusion(answers.argmax(axis=-1), labels, len(names))
    (answered,) = tables.of_exits(answers[None], labels, numbers[-1:])
    content: dict[str, Any] = {
        **(about or {}),
        "examples": len(labels),
        "answers": title,
        "accuracy": answered["accuracy"],
        "loss": answered["loss"],
        **shares,
        "exits": tables.of_exits(logits, labels, numbers),
        "classes": tables.of_classes(matrix, names),
        "worst": tables.worst(answers, labels, names, worst),
        "confusion": matrix.tolist(),
    }
    path = _made(folder)
    write_json(path / "evaluation.json", content)
    for table in ("exits", "classes", "worst"):
        tables.write_csv(path / f"{table}.csv", content[table])
    counts = [[name, *row] for name, row in zip(names, content["confusion"], strict=True)]
    tables.write_lines(path / "confusion.csv", [["label \\ prediction", *names], *counts])
    plots.confusion(matrix, names, path / "confusion.png", f"{title}, {len(labels):,} examples")
    if images is not None:
        shown = content["worst"][: plots.MOST_IMAGES]
        plots.worst(
            shown, images, path / "worst.png", f"{title}, the highest losses: label → prediction"
        )
    return content


def write_calibration(
    folder: str | Path,
    rule: Rule,
    logits: np.ndarray,
    labels: np.ndarray,
    costs: Any,
    *,
    cost_name: str = "floating-point operations an example",
    exits: Sequence[int] | None = None,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes a rule, and what it answers and costs on labelled examples.

    The folder, made if need be, gets ``exits.json`` (under "rule" what `Rule.from_json` reads, and
    what `about` holds), ``calibration.csv`` (a row an exit), ``curves.csv`` and
    ``accuracy_cost.png`` (accuracy against mean cost of all rules, of each exit alone and of the
    mean of the logits so far), and ``calibration.json``, which holds what is returned. Each appears
    whole or not at all.

    Args:
        folder: Where to.
        rule: Such as `calibration.choose` returns.
        logits: Of all exits, `[exits, n, classes]`.
        labels: Classes `[n]`.
        costs: Of answering at each exit, that of the exits before it included, `[exits]`.
        cost_name: What a cost is, with its unit.
        exits: Number of every exit, such as `trainer.exits`; by default 0 and up.
        about: What tells later which network the rule is of, such as its step: for JSON.

    Returns:
        What JSON can hold: "rule"; "examples", their "accuracy" and mean "cost" under the rule;
        "cost_name"; "exits" as rows: cost, threshold, temperature, share of the examples that
        leaves, accuracy, and without and with the temperature ("scaled") mean negative log
        likelihood and expected calibration error; and "curves" as pairs of cost and accuracy.

    Raises:
        TypeError: The rule is none, logits or costs are no numbers, or labels no integers.
        ValueError: Shapes do not fit, or a value is not allowed; there is no example.
        OSError: The folder cannot be written.
    """
    found = calibration.outcome(rule, logits, labels, costs)
    logits = check_logits(logits)
    labels = check_labels(labels, logits)
    numbers = _exit_numbers(exits, len(logits))
    full = rule.for_exits(len(logits)).to_json()
    plain = tables.of_exits(logits, labels, numbers)
    heated = tables.of_exits(scaled(logits, full["temperatures"]), labels, numbers)
    curves = calibration.curves(
        logits, labels, costs, patience=rule.patience, temperatures=rule.temperatures
    )
    rows = [
        {
            **plain[k],
            "scaled_loss": heated[k]["loss"],
            "scaled_ece": heated[k]["ece"],
            "cost": float(curves["exits"][k, 0]),
            "threshold": full["thresholds"][k],
            "temperature": full["temperatures"][k],
            "share": float(found.shares[k]),
        }
        for k in range(len(logits))
    ]
    content: dict[str, Any] = {
        "rule": rule.to_json(),
        "examples": len(labels),
        "accuracy": found.accuracy,
        "cost": found.cost,
        "cost_name": cost_name,
        "exits": rows,
        "curves": {name: points.tolist() for name, points in curves.items()},
    }
    path = _made(folder)
    write_json(path / "exits.json", {"rule": content["rule"], **(about or {})})
    write_json(path / "calibration.json", content)
    points = [[name, *point] for name, curve in content["curves"].items() for point in curve]
    tables.write_lines(path / "curves.csv", [["name", "cost", "accuracy"], *points])
    tables.write_csv(path / "calibration.csv", rows)
    plots.accuracy_against_cost(
        curves,
        path / "accuracy_cost.png",
        cost_name=f"mean cost: {cost_name}",
        exits=numbers,
        chosen=(rule.name, found.cost, found.accuracy),
        title=f"{len(labels):,} examples, patience {rule.patience}",
    )
    return content


def _exit_numbers(exits: Sequence[int] | None, count: int) -> list[int]:
    numbers = [*range(count)] if exits is None else [*exits]
    if len(numbers) != count or len({*numbers}) < count:
        raise ValueError(f"exits are {numbers}: {count} different numbers are needed")
    require_int(0, **{f"exits[{k}]": number for k, number in enumerate(numbers)})
    return [*map(int, numbers)]


def _class_names(names: Sequence[str] | None, count: int) -> list[str]:
    given = [*map(str, range(count))] if names is None else [*names]
    if len(given) != count:
        raise ValueError(f"there are {len(given)} class names: {count} are needed")
    require_type(str, **{f"class_names[{k}]": name for k, name in enumerate(given)})
    return given


def _check_images(images: Any, count: int) -> None:
    shape = (len(images), *np.shape(images[0])) if len(images) else (0,)
    image = shape[1:]
    if shape[0] != count or not (len(image) == 2 or (len(image) == 3 and image[2] in (1, 3, 4))):
        raise ValueError(
            f"images have shape {list(shape)}: [{count}, height, width], with 1, 3 or 4 channels "
            "behind or none, is needed"
        )


def _made(folder: str | Path) -> Path:
    path = any_folder(folder)
    with naming(path):
        make_folder(path)
    return path


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON, atomically; OSError where it cannot."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    replace(path, lambda temporary: temporary.write_text(text))
