"""Small sets of labelled texts: which words a text has tells its label."""

import csv
from pathlib import Path

import numpy as np

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
