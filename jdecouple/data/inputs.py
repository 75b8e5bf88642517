"""What is known of a model's inputs without the data set that it was trained on."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from jdecouple._errors import first_line
from jdecouple.data import augment, images
from jdecouple.data.token_inputs import TokenInputs
from jdecouple.data.vocabulary import Vocabulary, padded

_ROUNDING = 1e-3  # beyond 0..1, as resizing leaves it


@dataclasses.dataclass(frozen=True)
class ImageInputs:
    """Images of one shape, and how they are normalised.

    >>> inputs = ImageInputs((8, 8, 1), mean=(0.5,), std=(0.25,))
    >>> inputs.encode(np.zeros((5, 8, 8), np.uint8)).shape
    (5, 8, 8, 1)

    Attributes:
        image_shape: (H, W, C).
        mean: per-channel mean of the images scaled to 0..1, length C.
        std: per-channel standard deviation on the same scale, length C.
        dtype: of the images that were trained on, "uint8" or "float32".
    """

    kind: ClassVar[str] = "images"
    label_shape: ClassVar[tuple[int, ...]] = ()
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: str = "uint8"

    @property
    def example(self) -> tuple[tuple[int, ...], str]:
        """Shape and dtype of one example."""
        return self.image_shape, self.dtype

    def model_arguments(self) -> dict[str, Any]:
        """What a builder of `jdecouple.models` has to know of the inputs."""
        height, _, channels = self.image_shape
        return {"image_size": height, "channels": channels}

    def method_arguments(self) -> dict[str, Any]:
        """What a method of `jdecouple.methods` may ask for of the inputs."""
        return {"image_mean": self.mean, "image_std": self.std}

    def entries(self, x: Any) -> dict[str, Any]:
        """The batch of what `encode` returns, or of its shapes."""
        return {"x": x}

    def whole(self, batch: Mapping[str, Any]) -> Any:
        """What `entries` made the batch of."""
        return batch["x"]

    def transform(self, name: str, **options: Any) -> Callable[..., Any]:
        """The augmentation of this name for the Trainer; ValueError if it does not fit.

        The options are those of `augment.get`.
        """
        found = augment.get(name, mean=self.mean, std=self.std, **options)
        padding, cutout = options.get("crop_padding"), options.get("cutout", 0)
        augment.require_fit(self.image_shape[:2], padding, cutout)
        return found

    def encode(self, items: Any) -> np.ndarray:
        """Brings images to what the model reads.

        Args:
            items: an array of one image [H, W, C] or several [n, H, W, C], of one channel also
                [H, W] or [n, H, W], uint8 or float; a Pillow image; the path of an image file, or
                of a folder with some at any depth; or a list of images. Files and Pillow images
                are turned, coloured and resized as those of `folder:` data sets, arrays are not.

        Returns:
            uint8, or float32 where an image or what was trained on is float, [n, H, W, C].

        Raises:
            TypeError: something that is no image.
            ValueError: a file that cannot be read, or an array of another shape or type, or with a
                pixel that is not finite, or not in 0..1 where uint8 images were trained on.
        """
        if isinstance(items, str | os.PathLike):
            items = image_paths(items)
        several = isinstance(items, list | tuple) and not _holds_numbers(items)
        parts = [*map(self._one, items)] if several else [self._one(items)]
        if not parts:
            raise ValueError("there are no images: at least one is needed")
        if len({part.dtype for part in parts}) > 1 or self.dtype != "uint8":
            parts = [*map(_to_unit, parts)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _one(self, item: Any) -> np.ndarray:
        from PIL import Image, ImageOps

        *size, channels = self.image_shape
        if isinstance(item, str | os.PathLike):
            return images.decode(os.fspath(item), channels, (size[0], size[1]))[None]
        if isinstance(item, Image.Image):
            upright = ImageOps.exif_transpose(item)
            return images.pixels(upright, channels, (size[0], size[1]))[None]
        array = _as_array(item, "an image")
        if channels == 1 and array.ndim in (2, 3) and array.shape != self.image_shape:
            array = array[..., None]
        if array.shape == self.image_shape:
            array = array[None]
        floating = np.issubdtype(array.dtype, np.floating)
        if array.shape[1:] != self.image_shape or not (floating or array.dtype == np.uint8):
            raise ValueError(
                f"images are {array.dtype}{list(array.shape)}: uint8, or float in 0..1, "
                f"[n, {', '.join(map(str, self.image_shape))}] is needed; files and Pillow images "
                "are resized"
            )
        if not array.size:
            raise ValueError("there are no images: at least one is needed")
        if floating:
            array = array.astype(np.float32, copy=False)
            low, high = float(array.min()), float(array.max())
            scaled = low >= -_ROUNDING and high <= 1 + _ROUNDING
            if not (np.isfinite([low, high]).all() and (scaled or self.dtype != "uint8")):
                raise ValueError(
                    f"float pixels are from {low:g} to {high:g}: 0..1 is needed, or uint8 images"
                )
        return array

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return {"kind": self.kind, **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class TextInputs:
    """Texts as numbers of words.

    >>> inputs = TextInputs(("[padding]", "[unknown]", "a", "film"), max_length=4)
    >>> inputs.encode("A good film")
    array([[2, 1, 3, 0]], dtype=int32)

    Attributes:
        words: the word of every number; 0 is padding, 1 stands for unknown words.
        max_length: words of the longest text; shorter ones are padded to it.
        embedding_width: width of the vectors that the words began with, if they were given.
        parts: words of the parts that texts are cut into, in all `max_length`; () for none.
        clean: what is taken out of a text before it is split into words, see `cleaning.cleaned`.
    """

    kind: ClassVar[str] = "texts"
    label_shape: ClassVar[tuple[int, ...]] = ()
    words: tuple[str, ...]
    max_length: int
    embedding_width: int | None = None
    parts: tuple[int, ...] = ()
    clean: str = "none"

    @property
    def example(self) -> tuple[tuple[int, ...], str]:
        """Shape and dtype of one example."""
        return (self.max_length,), "int32"

    def model_arguments(self) -> dict[str, Any]:
        """What a builder of `jdecouple.models` has to know; zeros where vectors were given."""
        width, size = self.embedding_width, len(self.words)
        embeddings = None if width is None else np.zeros((size, width), np.float32)
        return {
            "vocabulary_size": size,
            "max_length": max(self.parts, default=self.max_length),
            "embeddings": embeddings,
        }

    def method_arguments(self) -> dict[str, Any]:
        """What a method of `jdecouple.methods` may ask for of the inputs: nothing."""
        return {}

    def entries(self, x: Any) -> dict[str, Any]:
        """The batch of what `encode` returns: "x", and for further parts "x_1", ..."""
        return cut(x, self.parts)

    def whole(self, batch: Mapping[str, Any]) -> Any:
        """What `entries` made the batch of."""
        if not self.parts:
            return batch["x"]
        names = ("x", *(f"x_{number}" for number in range(1, len(self.parts))))
        return np.concatenate([np.asarray(batch[name]) for name in names], axis=1)

    def transform(self, name: str, **options: Any) -> None:
        """The augmentation of this name for the Trainer; ValueError but for "none"."""
        for key, value in options.items():
            raise ValueError(f"{key} is {value!r}: it is for images, but the data set holds texts")
        if name != "none":
            raise ValueError(
                f"unknown augmentation {name!r}: allowed for the texts of a data set is none"
            )

    def encode(self, items: Any) -> np.ndarray:
        """Brings texts to what the model reads.

        Args:
            items: a text, or several; or numbers of words, integers [length] or [n, length] of at
                most `max_length`.

        Returns:
            Numbers of the first `max_length` words, padded behind, int32 [n, max_length].

        Raises:
            TypeError: something that is neither.
            ValueError: no texts, or numbers of another shape or that no word has.
        """
        if isinstance(items, str):
            items = [items]
        elif not isinstance(items, list | tuple):
            items = _as_array(items, "a text")
            if items.dtype.kind not in "OU":
                return self._numbers(items)
            items = items.ravel().tolist()
        other = next((item for item in items if not isinstance(item, str)), "")
        if isinstance(other, int | np.integer | list | tuple | np.ndarray):
            return self._numbers(_as_array(items, "a text"))
        if not isinstance(other, str):
            raise TypeError(f"a text is a {type(other).__name__}: a str is needed")
        if not items:
            raise ValueError("there are no texts: at least one is needed")
        return self._words(items)

    def _words(self, texts: Sequence[str]) -> np.ndarray:
        numbers, lengths = self._vocabulary.encode(texts, self.max_length)
        starts = np.cumsum(lengths, dtype=np.int64) - lengths
        return padded(numbers, starts, lengths, self.max_length)

    def _numbers(self, array: np.ndarray) -> np.ndarray:
        rows = array[None] if array.ndim == 1 else array
        fits = rows.ndim == 2 and rows.size and rows.shape[1] <= self.max_length
        if not fits or not np.issubdtype(array.dtype, np.integer):
            raise ValueError(
                f"numbers of words are {array.dtype}{list(array.shape)}: integers [n, length] of "
                f"at most {self.max_length} words are needed"
            )
        if not 0 <= rows.min() <= rows.max() < len(self.words):
            raise ValueError(
                f"numbers of words are from {rows.min()} to {rows.max()}: 0..{len(self.words) - 1} "
                "is needed"
            )
        missing = self.max_length - rows.shape[1]
        return np.pad(rows.astype(np.int32), ((0, 0), (0, missing)))

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary(self.words[Vocabulary.RESERVED :], self.clean)

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads; the words are packed, as a checkpoint's info is read often."""
        packed = base64.b64encode(zlib.compress(json.dumps(self.words).encode())).decode()
        width = self.embedding_width
        sizes = {"max_length": self.max_length, "embedding_width": width, "parts": self.parts}
        return {"kind": self.kind, "words": packed, **sizes, "clean": self.clean}


Inputs = ImageInputs | TextInputs | TokenInputs


def cut(inputs: np.ndarray, parts: Sequence[int]) -> dict[str, np.ndarray]:
    """Inputs [n, length] as a batch's entries `x`, `x_1`, ... of these lengths in turn.

    >>> {name: x.tolist() for name, x in cut(np.array([[1, 2, 3, 4, 5]]), (2, 3)).items()}
    {'x': [[1, 2]], 'x_1': [[3, 4, 5]]}

    Without any lengths `x` is all.
    """
    if not parts:
        return {"x": inputs}
    pieces = np.split(inputs, np.cumsum(parts)[:-1], axis=1)
    return {f"x_{i}" if i else "x": piece for i, piece in enumerate(pieces)}


class Numbers(Sequence[str]):
    """Names of classes that have none: their numbers, however many there are.

    >>> Numbers(3) == ("0", "1", "2")
    True
    """

    def __init__(self, count: int):
        self._numbers = range(count)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        found = self._numbers[index]
        return tuple(map(str, found)) if isinstance(index, slice) else str(found)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Numbers):
            return len(self) == len(other)
        return isinstance(other, tuple) and len(self) == len(other) and tuple(self) == other

    __hash__ = None  # type: ignore[assignment]


def from_json(value: Mapping[str, Any]) -> Inputs:
    """The inputs that `to_json` wrote.

    >>> inputs = TextInputs(("[padding]", "[unknown]", "a"), max_length=4)
    >>> from_json(json.loads(json.dumps(inputs.to_json()))) == inputs
    True
    """
    fields: dict[str, Any] = {
        key: tuple(x) if isinstance(x, list) else x for key, x in value.items()
    }
    if (kind := fields.pop("kind")) == ImageInputs.kind:
        return ImageInputs(**fields)
    if kind == TokenInputs.kind:
        return TokenInputs.from_json(fields)
    words = json.loads(zlib.decompress(base64.b64decode(fields.pop("words"))))
    return TextInputs(tuple(words), **fields)


def image_paths(path: str | os.PathLike[str]) -> list[str]:
    """The image file of a path, or those of a folder at any depth; ValueError if it has none."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return [str(folder)]
    if not (found := images.below(folder)):
        raise ValueError(f"folder {str(folder)!r} holds no images")
    return found


def _to_unit(array: np.ndarray) -> np.ndarray:
    return array if array.dtype == np.float32 else array.astype(np.float32) / np.float32(255)


def _as_array(item: Any, what: str) -> np.ndarray:
    try:
        array = np.asarray(item)
    except Exception as error:  # tensors raise many kinds
        raise TypeError(f"{what} cannot be read as an array: {first_line(error)}") from error
    if array.dtype == object and not array.ndim:
        raise TypeError(f"{type(item).__name__} is given: {what} or several are needed")
    return array


def _holds_numbers(items: Any) -> bool:
    while isinstance(items, list | tuple) and items:
        items = items[0]
    return isinstance(items, int | float)
