"""Text data sets: what was read of one, as numbers of words."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jdecouple._errors import require_int
from jdecouple.data.inputs import TextInputs
from jdecouple.data.splits import Amount, Dataset, Split, check_labels, divide
from jdecouple.data.vocabulary import Vocabulary, padded, word_vectors

MAX_LENGTH = 256
VOCABULARY_SIZE = 30_000


class Texts(NamedTuple):
    """The texts of one stored split and their labels, int64 [n]."""

    texts: Sequence[str]
    labels: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class TextDataset(Dataset):
    """Texts as numbers of words.

    Attributes:
        words: the word of every number; 0 is padding, 1 stands for unknown words.
        max_length: words of the longest text; shorter ones are padded to it.
        embeddings: initial vectors of the words, float32 [len(words), width], or None.
        parts: words of the parts that texts are cut into; () leaves them whole.
        clean: what is taken out of texts before they are split into words.
    """

    kind = "texts"
    words: tuple[str, ...]
    max_length: int
    embeddings: np.ndarray | None
    parts: tuple[int, ...] = ()
    clean: str = "none"

    @property
    def inputs(self) -> TextInputs:
        """See `Dataset.inputs`."""
        width = None if self.embeddings is None else self.embeddings.shape[1]
        return TextInputs(self.words, self.max_length, width, self.parts, self.clean)

    def model_arguments(self) -> dict[str, Any]:
        """See `Dataset.model_arguments`."""
        return super().model_arguments() | {"embeddings": self.embeddings}


class TextSource:
    """Texts of different lengths, cut at `max_length` words and padded where they are gathered.

    Raises:
        ValueError: no texts, or a label out of range; the example is named.
    """

    def __init__(
        self, texts: Texts, vocabulary: Vocabulary, max_length: int, num_classes: int, name: str
    ):
        if not len(texts.labels):
            raise ValueError(f"split {name!r} is empty")
        check_labels(texts.labels, num_classes, name, np.arange(len(texts.labels)))
        self._numbers, self.lengths = vocabulary.encode(texts.texts, max_length)
        self._starts = np.cumsum(self.lengths, dtype=np.int64) - self.lengths
        self._labels = texts.labels.astype(np.int32)
        self._max_length = max_length

    def __len__(self) -> int:
        return len(self._labels)

    def gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Words, int32 [n, max_length], and labels; see `splits.Source.gather`."""
        starts, lengths = self._starts[indices], self.lengths[indices]
        return padded(self._numbers, starts, lengths, self._max_length), self._labels[indices]


def dataset(
    name: str,
    stored: Mapping[str, Texts],
    class_names: Sequence[str],
    *,
    validation: Amount,
    seed: int,
    max_length: int | None,
    vocabulary_size: int | None,
    glove: str | os.PathLike[str] | None,
    parts: Sequence[int] | None = None,
    clean: str = "none",
) -> TextDataset:
    """Makes a data set of stored texts; its vocabulary is that of its training split alone."""
    lengths = _parts(parts, max_length)
    max_length = sum(lengths) or max_length or MAX_LENGTH
    sizes = {split: len(texts.labels) for split, texts in stored.items()}
    roles = divide(name, sizes, validation)
    split, rows = roles["train"]
    texts = (stored[split].texts[row] for row in rows)
    vocabulary = Vocabulary.of(texts, vocabulary_size or VOCABULARY_SIZE, clean)
    sources = {
        split: TextSource(stored[split], vocabulary, max_length, len(class_names), split)
        for split in sorted({split for split, _ in roles.values()})
    }
    return TextDataset(
        name,
        **{
            role: Split(role, sources[split], rows, parts=lengths)
            for role, (split, rows) in roles.items()
        },
        num_classes=len(class_names),
        class_names=tuple(class_names),
        words=vocabulary.words,
        max_length=max_length,
        embeddings=None if glove is None else word_vectors(glove, vocabulary.words, seed),
        parts=lengths,
        clean=clean,
    )


def _parts(parts: Sequence[int] | None, max_length: int | None) -> tuple[int, ...]:
    """Lengths of parts, checked; () without any."""
    if parts is None:
        return ()
    for length in parts:
        require_int(1, parts=length)
    if max_length not in (None, total := sum(parts)):
        raise ValueError(f"parts is {tuple(parts)}: max_length must be their sum, {total}, or None")
    return tuple(parts)
