"""Data sets for language models: documents as one stream of tokens, cut into rows."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jdecouple.data import corpora, tfds_sets
from jdecouple.data.splits import Amount, Dataset, Split, read
from jdecouple.data.token_inputs import TokenInputs
from jdecouple.data.tokenizer import BOUNDARY, Tokenizer

CONTEXT = 256
UNLABELLED = -1
_ROWS_AT_ONCE = 4096


@dataclasses.dataclass(frozen=True, eq=False)
class TokenDataset(Dataset):
    """Rows of tokens, each of which has the next one as its label.

    Attributes:
        context: tokens of a row.
        tokenizer: what makes tokens of texts; there are `num_classes` of them.
        digest: of all documents and the tokenizer.
        bytes_per_token: of every split by name: bytes of its documents over labels of its rows, by
            which a loss in nats a token becomes one in bits a byte.
    """

    kind = "tokens"
    context: int
    tokenizer: Tokenizer
    digest: str
    bytes_per_token: Mapping[str, float]

    @property
    def inputs(self) -> TokenInputs:
        """See `Dataset.inputs`."""
        return TokenInputs(self.context, self.tokenizer.model, self.digest)


class TokenSource:
    """Documents one after another as rows of `context` tokens, without a token twice.

    Before, between and behind the documents stands the token 0. A document may begin in one row and
    go on in the next. What fills no row at the end is padded (inputs 0, labels -1), or left out.
    """

    def __init__(self, documents: Sequence[np.ndarray], context: int, *, padded: bool = True):
        between = np.array([BOUNDARY], np.int32)
        parts = [part for document in documents for part in (between, document)]
        stream = np.concatenate([*parts, between]) if documents else between[:0]
        self.num_labels = max(len(stream) - 1, 0)
        rows = -(-self.num_labels // context) if padded else self.num_labels // context
        self._rows, self._context = rows, context
        end = np.full(max(rows * context + 1 - len(stream), 0), UNLABELLED, np.int32)
        self._stream = np.concatenate([stream, end])

    def __len__(self) -> int:
        return self._rows

    def gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and labels, both int32 [n, context]; see `splits.Source.gather`."""
        starts = np.asarray(indices, np.int64)[:, None] * self._context
        rows = self._stream[starts + np.arange(self._context + 1)]
        return np.maximum(rows[:, :-1], BOUNDARY), rows[:, 1:]


def dataset(
    name: str,
    stored: Mapping[str, Sequence[bytes]],
    *,
    validation: Amount,
    max_length: int | None,
    vocabulary_size: int | None,
    tokenizer: str,
) -> TokenDataset:
    """Makes a data set of stored documents; byte pairs are counted in its training split alone.

    Raises:
        ValueError: no tokenizer of that name, too few documents, or a training split of less than a
            row.
    """
    context = max_length or CONTEXT
    documents, digest = corpora.divided({k: list(v) for k, v in stored.items()}, validation)
    found = Tokenizer.of(tokenizer, documents["train"], vocabulary_size)
    digest = hashlib.sha256(f"{digest}{found.model}".encode()).hexdigest()[:16]
    splits: dict[str, Any] = {}
    sizes: dict[str, float] = {}
    for role, texts in documents.items():
        source = TokenSource(found.encode_all(texts), context, padded=role != "train")
        if not len(source) and role != "validation":
            raise ValueError(
                f"data set {name!r}: the {role} split has {source.num_labels} tokens: at least "
                f"{context} (max_length) are needed"
            )
        splits[role] = Split(role, source, np.arange(len(source)))
        sizes[role] = sum(map(len, texts)) / max(source.num_labels, 1)
    return TokenDataset(
        name,
        **splits,
        num_classes=found.size,
        context=context,
        tokenizer=found,
        digest=digest,
        bytes_per_token=sizes,
    )


def files(name: str, *, data_dir: Any, **options: Any) -> TokenDataset:
    """Files of text."""
    return dataset(name, corpora.from_files(name, data_dir), **options)


def standard_library(**options: Any) -> TokenDataset:
    """The sources of Python's standard library."""
    return dataset("stdlib", corpora.standard_library(), **options)


def topics(**options: Any) -> TokenDataset:
    """What `pydoc` says of Python, by topic."""
    return dataset("topics", corpora.topics(), **options)


def prepared(name: str, builder: Any, **options: Any) -> TokenDataset:
    """A set of TFDS that holds texts and no labels."""
    key = tfds_sets.keys(builder, "Text")[0]
    stored = {}
    for split, records in tfds_sets.records(name, builder).items():
        parts = range(0, len(records), _ROWS_AT_ONCE)
        rows = (np.arange(n, min(n + _ROWS_AT_ONCE, len(records))) for n in parts)
        stored[split] = [example[key] for part in rows for example in read(records, part, split)]
    return dataset(name, stored, **options)
