"""Texts as numbers of bytes or of pieces of words, for models that go on with a text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from jdecouple._errors import first_line

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Pieces

BOUNDARY = 0
"""The token before, between and behind documents; no text has it."""
BPE_SIZE = 4096
_BYTES = 256
_TEXTS_AT_ONCE = 1024


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Numbers of the pieces of a text, from 1 on.

    >>> Tokenizer().encode("né").tolist(), Tokenizer().size
    ([111, 196, 170], 257)

    Attributes:
        model: None for the bytes of UTF-8; else the JSON of a tokenizer of the library
            `tokenizers`, whose numbers are taken plus one.
    """

    model: str | None = None
    names: ClassVar[tuple[str, ...]] = ("bytes", "bpe")

    @classmethod
    def of(cls, name: str, texts: Sequence[bytes], size: int | None) -> Tokenizer:
        """The tokenizer of that name.

        Args:
            name: "bytes"; "bpe", byte pairs merged by how often they stand in `texts`; or the path
                of a `tokenizer.json`.
            texts: what byte pairs are counted in, in their order.
            size: numbers of "bpe", with that between documents; 4,096 if None.

        Raises:
            ValueError: no such name, a file that holds no tokenizer, or a size that is no use.
        """
        if size is not None and name != "bpe":
            raise ValueError(f"vocabulary_size is {size}: tokenizer 'bpe' alone takes it")
        if name == "bytes":
            return cls()
        if name == "bpe":
            return cls(_byte_pairs(texts, (size or BPE_SIZE) - 1))
        path = Path(name).expanduser()
        if not path.is_file():
            allowed = ", ".join(map(repr, cls.names))
            raise ValueError(f"tokenizer is {name!r}: allowed are {allowed} and a tokenizer.json")
        try:
            found = cls(path.read_text(encoding="utf-8"))
            _ = found.size
        except Exception as error:  # `tokenizers` raises bare ones
            raise ValueError(f"'{path}' holds no tokenizer: {first_line(error)}") from error
        return found

    @property
    def size(self) -> int:
        """How many numbers there are, with the one between documents."""
        return 1 + (_BYTES if self.model is None else self._pieces.get_vocab_size())

    def encode(self, text: str | bytes) -> np.ndarray:
        """The numbers of a text, int32 [n]."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str | bytes]) -> list[np.ndarray]:
        """The numbers of several texts; what is no UTF-8 has bytes, but no pieces of its own."""
        if self.model is None:
            raw = (text.encode() if isinstance(text, str) else text for text in texts)
            return [np.frombuffer(each, np.uint8).astype(np.int32) + 1 for each in raw]
        found = []
        for first in range(0, len(texts), _TEXTS_AT_ONCE):
            part = [
                text if isinstance(text, str) else text.decode("utf-8", "replace")
                for text in texts[first : first + _TEXTS_AT_ONCE]
            ]
            encodings = self._pieces.encode_batch_fast(part, add_special_tokens=False)
            found += [np.array(encoding.ids, np.int32) + 1 for encoding in encodings]
        return found

    def decode(self, numbers: Sequence[int] | np.ndarray) -> str:
        """The text of some numbers; without what lies between documents."""
        pieces = [int(number) - 1 for number in numbers if number != BOUNDARY]
        if self.model is None:
            return bytes(pieces).decode("utf-8", "replace")
        return self._pieces.decode(pieces, skip_special_tokens=False)

    @cached_property
    def _pieces(self) -> Pieces:
        from tokenizers import Tokenizer as Pieces

        assert self.model is not None
        return Pieces.from_str(self.model)


def _byte_pairs(texts: Sequence[bytes], size: int) -> str:
    from tokenizers import Tokenizer as Pieces
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if size < _BYTES:
        raise ValueError(f"vocabulary_size is {size + 1}: at least {_BYTES + 1} is needed for bpe")
    pieces = Pieces(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False, initial_alphabet=alphabet)
    pieces.train_from_iterator((text.decode("utf-8", "replace") for text in texts), trainer)
    return pieces.to_str()
