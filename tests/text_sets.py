"""Small sets of labelled texts: which words a text has tells its label."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from jdecouple import data
from jdecouple.train import config as configuration

GOOD = ("good", "fine", "great", "funny")
BAD = ("bad", "poor", "dull", "sad")
OTHERS = ("the", "a", "film", "plot", "of", "it", "is", "and")


def examples(count: int, *, num_classes: int = 2, longest: int = 12, seed: int = 0) -> list[tuple]:
    """(label, text) of so many examples, of 2 to `longest` words."""
    generator = np.random.default_rng(seed)
    found = []
    for row in range(count):
        label = row % num_classes
        telling = (GOOD, BAD)[label] if num_classes == 2 else (f"word{label}",)
        length = int(generator.integers(1, longest))
        words = [*generator.choice(OTHERS, length), generator.choice(telling)]
        found.append((label, " ".join(map(str, generator.permutation(words)))))
    return found


def write_csv(path: Path, rows: list, header: tuple[str, ...] = ()) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows] if header else rows)
    return path


def csv_set(folder: Path, train: int = 64, test: int = 16, **options) -> str:
    """Writes a set and returns its name."""
    write_csv(folder / "train.csv", examples(train, **options))
    write_csv(folder / "test.csv", examples(test, seed=1, **options))
    return f"csv:{folder}"


def tiny(name: str, **values: Any) -> ConfigDict:
    """Backpropagation on a set of texts in one stage; `model__hidden=8` sets model.hidden."""
    config = configuration.default()
    config.data.name = name
    config.data.buckets = (4, 8, 12)
    config.model.name = "lstm"
    config.model.hidden = 6
    config.model.depth = 1
    config.method.name = "bp"
    config.optimizer.schedule = "constant"
    config.batch_size = 8
    config.steps = 8
    config.eval_every = 4
    config.log_every = 1
    config.mesh.stages = 1
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in values.items()})
    return config


def everything(split):
    return split.gather(np.arange(len(split)))


def text(dataset, split, row):
    words = everything(getattr(dataset, split))["x"][row]
    return " ".join(dataset.words[number] for number in words if number)


def refused(said, name, kind=ValueError, **options):
    with pytest.raises(kind, match=said) as error:
        data.load(name, **options)
    assert "\n" not in str(error.value)
