"""Text sets that TensorFlow Datasets has prepared, read without TensorFlow."""

from __future__ import annotations

from typing import Any

import numpy as np

from jdecouple.data import tfds_sets
from jdecouple.data.splits import read
from jdecouple.data.texts import Texts

_ROWS_AT_ONCE = 4096
_HIDDEN = -1


def holds_texts(builder: Any) -> bool:
    """Whether a prepared set has texts and class labels, and no images."""
    texts, labels = _keys(builder)
    return bool(texts and labels)


def splits(name: str, builder: Any) -> tuple[dict[str, Texts], int]:
    """Reads all splits of a prepared set into memory.

    Several texts of an example are joined by a space: its title first, then the others in
    alphabetical order of their names. A test split whose labels are hidden (all -1, as in GLUE) is
    passed over.

    Args:
        name: what the set was asked for as, for messages.
        builder: what `tfds_sets.prepared` returned.

    Returns:
        The `train`, `validation` and `test` splits where there are any, and the number of classes.

    Raises:
        ValueError: a split is empty or cannot be read.
    """
    texts, (label, *_) = _keys(builder)
    found = {
        split: _read(name, builder, split, texts, label)
        for split in ("train", "validation", "test")
        if split in builder.info.splits
    }
    if "test" in found and (found["test"].labels == _HIDDEN).all():
        del found["test"]
    return found, builder.info.features[label].num_classes


def _keys(builder: Any) -> tuple[list[str], list[str]]:
    """Names of the texts and of the class labels of an example; no texts where it has an image."""
    import tensorflow_datasets as tfds

    kinds = tfds.features
    found = tfds_sets.features(builder)
    if any(isinstance(value, kinds.Image) for value in found.values()):
        return [], []
    texts = [key for key, value in found.items() if isinstance(value, kinds.Text)]
    labels = [key for key, value in found.items() if isinstance(value, kinds.ClassLabel)]
    return sorted(texts, key=lambda key: (key != "title", key)), labels


def _read(name: str, builder: Any, split: str, texts: list[str], label: str) -> Texts:
    records = tfds_sets.records(name, builder, split)
    found, labels = [], []
    for first in range(0, len(records), _ROWS_AT_ONCE):
        rows = np.arange(first, min(first + _ROWS_AT_ONCE, len(records)))
        for example in read(records, rows, split):
            found.append(" ".join(example[key].decode("utf-8", "replace") for key in texts))
            labels.append(int(example[label]))
    return Texts(found, np.array(labels, np.int64))
