"""Text sets that TensorFlow Datasets has prepared, read without TensorFlow."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from jdecouple.data import tfds_sets
from jdecouple.data.splits import Records, read
from jdecouple.data.texts import Texts

_ROWS_AT_ONCE = 4096
_HIDDEN = -1


def holds_texts(builder: Any) -> bool:
    """Whether a prepared set has texts and class labels, and no images."""
    keys = functools.partial(tfds_sets.keys, builder)
    return bool(keys("Text") and keys("ClassLabel")) and not keys("Image")


def holds_only_texts(builder: Any) -> bool:
    """Whether a prepared set has one text an example and nothing else."""
    return len(tfds_sets.features(builder)) == 1 == len(tfds_sets.keys(builder, "Text"))


def splits(name: str, builder: Any) -> tuple[dict[str, Texts], Sequence[str]]:
    """Reads all splits of the set that `tfds_sets.prepared` returned into memory.

    Several texts of an example are joined by a space: its title first, then the others in
    alphabetical order of their names. A test split whose labels are hidden (all -1, as in GLUE) is
    passed over. Also returns the names of the classes.
    """
    texts = sorted(tfds_sets.keys(builder, "Text"), key=lambda key: (key != "title", key))
    label = tfds_sets.keys(builder, "ClassLabel")[0]
    stored = {
        split: _read(records, split, texts, label)
        for split, records in tfds_sets.records(name, builder).items()
    }
    if "test" in stored and (stored["test"].labels == _HIDDEN).all():
        del stored["test"]
    return stored, builder.info.features[label].names


def _read(records: Records, split: str, keys: list[str], label: str) -> Texts:
    texts, labels = [], []
    for first in range(0, len(records), _ROWS_AT_ONCE):
        rows = np.arange(first, min(first + _ROWS_AT_ONCE, len(records)))
        for example in read(records, rows, split):
            texts.append(" ".join(example[key].decode("utf-8", "replace") for key in keys))
            labels.append(int(example[label]))
    return Texts(texts, np.array(labels, np.int64))
