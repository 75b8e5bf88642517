"""What is known of the inputs of a language model without the data set that it was trained on."""

from __future__ import annotations

import base64
import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from jdecouple.data.tokenizer import BOUNDARY, Tokenizer


@dataclasses.dataclass(frozen=True)
class TokenInputs:
    """Tokens of texts, of which every next one is to be told.

    >>> inputs = TokenInputs(context=6)
    >>> inputs.encode("abc")
    array([[ 0, 98, 99, 100, 0, 0]], dtype=int32)

    Attributes:
        context: tokens of a row.
        tokenizer: the JSON of a tokenizer, or None for bytes.
        digest: of the tokenizer and the documents that were trained on and held out; "" if it is
            not known.
    """

    kind: ClassVar[str] = "tokens"
    context: int
    tokenizer: str | None = None
    digest: str = ""

    @property
    def example(self) -> tuple[tuple[int, ...], str]:
        """Shape and dtype of one example."""
        return (self.context,), "int32"

    @property
    def label_shape(self) -> tuple[int, ...]:
        """Shape of the labels of one example."""
        return (self.context,)

    @cached_property
    def pieces(self) -> Tokenizer:
        """What makes numbers of texts, and texts of numbers."""
        return Tokenizer(self.tokenizer)

    def model_arguments(self) -> dict[str, Any]:
        """What a builder of `jdecouple.models` has to know."""
        return {"context": self.context}

    def method_arguments(self) -> dict[str, Any]:
        """What a method of `jdecouple.methods` may ask for of the inputs: nothing."""
        return {}

    def entries(self, x: Any) -> dict[str, Any]:
        """The batch of what `encode` returns."""
        return {"x": x}

    def whole(self, batch: Mapping[str, Any]) -> Any:
        """What `entries` made the batch of."""
        return batch["x"]

    def transform(self, name: str, **options: Any) -> None:
        """The augmentation of this name for the Trainer; ValueError but for "none"."""
        for key, value in options.items():
            raise ValueError(f"{key} is {value!r}: it is for images, but the data set holds tokens")
        if name != "none":
            raise ValueError(
                f"unknown augmentation {name!r}: allowed for the tokens of a data set is none"
            )

    def encode(self, items: Any) -> np.ndarray:
        """Brings texts to what the model reads.

        Args:
            items: a text, or several; or tokens, integers [length] or [n, length].

        Returns:
            The first tokens of each behind the one that begins a document, int32 [n, context].
            Tokens that are given as numbers stay as they are. Both are padded behind.

        Raises:
            TypeError: something that is neither.
            ValueError: nothing, or numbers of another shape or that are no tokens.
        """
        items = [items] if isinstance(items, str) else items
        if isinstance(items, list | tuple) and items and all(isinstance(x, str) for x in items):
            return self._encoded(items)
        try:
            array = np.asarray(items)
        except ValueError as error:
            raise TypeError("tokens cannot be read as an array: a text is needed") from error
        if array.dtype.kind not in "iu":
            raise TypeError(f"{type(items).__name__} is given: a text or several are needed")
        rows: np.ndarray = array[None] if array.ndim == 1 else array
        if rows.ndim != 2 or not rows.size or rows.shape[1] > self.context:
            raise ValueError(
                f"tokens are {array.dtype}{list(array.shape)}: integers [n, length] of at most "
                f"{self.context} are needed"
            )
        if not 0 <= rows.min() <= rows.max() < self.pieces.size:
            raise ValueError(
                f"tokens are from {rows.min()} to {rows.max()}: 0..{self.pieces.size - 1} is needed"
            )
        return np.pad(rows.astype(np.int32), ((0, 0), (0, self.context - rows.shape[1])))

    def _encoded(self, texts: Sequence[str]) -> np.ndarray:
        rows = np.full((len(texts), self.context), BOUNDARY, np.int32)
        for row, tokens in zip(rows, self.pieces.encode_all(texts), strict=True):
            room = row[1 : 1 + len(tokens)]
            room[:] = tokens[: len(room)]
        return rows

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads; the tokenizer is packed, as a checkpoint's info is read often."""
        packed = self.tokenizer and base64.b64encode(zlib.compress(self.tokenizer.encode()))
        sizes = {"context": self.context, "digest": self.digest}
        return {"kind": self.kind, "tokenizer": packed and packed.decode(), **sizes}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TokenInputs:
        """The inputs that `to_json` wrote, but for their kind."""
        packed = value["tokenizer"]
        tokenizer = packed and zlib.decompress(base64.b64decode(packed)).decode()
        return cls(**{**value, "tokenizer": tokenizer})
