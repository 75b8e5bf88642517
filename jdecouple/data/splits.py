"""Data sets and their splits: rows gathered by index, checked where they are read."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np

from jdecouple._errors import first_line
from jdecouple.data.images import resize_image
from jdecouple.data.inputs import ImageInputs, Inputs, Numbers, cut

CACHE_BYTES = 4 << 30
_FIXED_ORDER_SEED = 0
_DEFAULT_VALIDATION = 0.1

Amount = float | int | None  # of training examples to hold out: a fraction, a count


class Source(Protocol):
    """Rows by index: what a `Split` reads from."""

    def __len__(self) -> int:
        """Number of rows."""

    def gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and int32 labels [n] of `indices`.

        Inputs are images [n, H, W, C] (uint8, or float32 in 0..1) or words [n, length] (int32).
        """


class Records(Protocol):
    """Random access to examples on disk, as TFDS data sources give it."""

    def __len__(self) -> int:
        """Number of examples."""

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        """One decoded example."""

    def __getitems__(self, indices: Sequence[int], /) -> Sequence[Mapping[str, Any]]:
        """Several decoded examples, read together."""


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Some rows of a source, in a fixed order.

    Attributes:
        name: `train`, `validation` or `test`; used in error messages.
        source: where rows are read.
        indices: int64 [n], the rows of the source that belong to the split.
        overrides: int32 [n] or None; a value >= 0 replaces the label of that row (label noise).
        parts: lengths that a text is cut into, see `inputs.cut`; () leaves inputs whole.
    """

    name: str
    source: Source
    indices: np.ndarray
    overrides: np.ndarray | None = None
    parts: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.indices)

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Reads the examples at `indices`, integers [n] in any order, of this split.

        Returns:
            `x`, as of the source (or, cut into parts, `x`, `x_1`, ...), and `label`, int32 [n].

        Raises:
            ValueError: an example cannot be decoded, or a label or pixel is out of range.
        """
        inputs, labels = self.source.gather(self.indices[indices])
        if self.overrides is not None:
            replacements = self.overrides[indices]
            labels = np.where(replacements >= 0, replacements, labels)
        return {**cut(inputs, self.parts), "label": labels}

    @property
    def lengths(self) -> np.ndarray:
        """Words of every example, int [n].

        Raises:
            ValueError: the examples are no texts.
        """
        if not hasattr(self.source, "lengths"):
            raise ValueError(f"the {self.name} split has no lengths: its examples are no texts")
        return self.source.lengths[self.indices]


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset(abc.ABC):
    """A classification set with its fixed splits; `ImageDataset` or `texts.TextDataset`.

    Attributes:
        kind: what its examples are.
        name: the name it was loaded by.
        train: training split, label noise included.
        validation: split held out of the training examples (or the set's own).
        test: test split, never altered.
        num_classes: labels are 0..num_classes-1.
        class_names: what each label stands for; by default its number.

    Raises:
        ValueError: another number of names than of classes.
    """

    kind: ClassVar[str]
    name: str
    train: Split
    validation: Split
    test: Split
    num_classes: int
    class_names: Sequence[str] = dataclasses.field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        names = self.class_names or Numbers(self.num_classes)
        names = names if isinstance(names, Numbers) else tuple(map(str, names))
        if len(names) != self.num_classes:
            raise ValueError(
                f"data set {self.name!r} has {len(names)} class names: {self.num_classes} are "
                "needed"
            )
        object.__setattr__(self, "class_names", names)

    @property
    @abc.abstractmethod
    def inputs(self) -> Inputs:
        """What is known of the inputs without the examples."""

    def model_arguments(self) -> dict[str, Any]:
        """What a builder of `jdecouple.models` has to know of the inputs."""
        return self.inputs.model_arguments()

    def method_arguments(self) -> dict[str, Any]:
        """What a method of `jdecouple.methods` may ask for of the inputs."""
        return self.inputs.method_arguments()

    def transform(self, name: str, **options: Any) -> Callable[..., Any] | None:
        """The augmentation of this name for the Trainer; ValueError if it does not fit.

        The options are those of `augment.get`.
        """
        return self.inputs.transform(name, **options)


@dataclasses.dataclass(frozen=True, eq=False)
class ImageDataset(Dataset):
    """Images with their normalisation.

    Attributes:
        image_shape: (H, W, C).
        mean: per-channel mean of the images scaled to 0..1, length C.
        std: per-channel standard deviation on the same scale, length C.
    """

    kind = "images"
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def inputs(self) -> ImageInputs:
        """See `Dataset.inputs`; the dtype is taken for uint8."""
        return ImageInputs(self.image_shape, self.mean, self.std)


class ArraySource:
    """Images, uint8 or float (in 0..1) [n, H, W, C], and labels, integers [n], in memory.

    Raises:
        ValueError: a wrong shape or dtype, no rows, a label outside 0..num_classes-1 or a pixel
            that is not finite; the split, of that name, and the example are named.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, *, num_classes: int, name: str):
        images, labels = np.asarray(images), np.asarray(labels)
        if images.ndim != 4 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"split {name!r}: images are {images.shape} and labels {labels.shape}: "
                "[n, H, W, C] and [n] are needed"
            )
        if not len(images):
            raise ValueError(f"split {name!r} is empty")
        if not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"split {name!r}: labels are {labels.dtype}: integers are needed")
        check_labels(labels, num_classes, name, np.arange(len(labels)))
        if np.issubdtype(images.dtype, np.floating):
            images = images.astype(np.float32, copy=False)
            check_finite(images, name, np.arange(len(images)))
        elif images.dtype != np.uint8:
            raise ValueError(f"split {name!r}: images are {images.dtype}: uint8 or float is needed")
        self._images, self._labels = images, labels.astype(np.int32)

    def __len__(self) -> int:
        return len(self._labels)

    def gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Source.gather`."""
        return self._images[indices], self._labels[indices]


class DecodedSource:
    """Records that are decoded at first use and then kept, if they need at most `cache_bytes`.

    `keys` are the names of the image and the label in an example. Images are uint8 or float32 of
    `image_shape` (H, W, C), or are brought to it where `resize` is set; errors name the split.

    Rows are written once each, always with the same bytes, and marked only afterwards, so that
    threads may gather at the same time without a lock.
    """

    def __init__(
        self,
        records: Records,
        *,
        keys: tuple[str, str],
        image_shape: tuple[int, int, int],
        dtype: np.dtype,
        num_classes: int,
        name: str,
        resize: bool = False,
        cache_bytes: int = CACHE_BYTES,
    ):
        self._records, self._keys = records, keys
        self._shape, self._dtype = image_shape, np.dtype(dtype)
        self._num_classes, self._name, self._resize = num_classes, name, resize
        rows = len(records)
        self.cached = rows * int(np.prod(image_shape)) * self._dtype.itemsize <= cache_bytes
        if self.cached:
            self._images = np.empty((rows, *image_shape), self._dtype)
            self._labels = np.empty(rows, np.int32)
            self._ready = np.zeros(rows, bool)

    def __len__(self) -> int:
        return len(self._records)

    def gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Source.gather`."""
        indices = np.asarray(indices)
        if not self.cached:
            return self._decode(indices)
        missing = np.unique(indices[~self._ready[indices]])
        if missing.size:
            self._images[missing], self._labels[missing] = self._decode(missing)
            self._ready[missing] = True
        return self._images[indices], self._labels[indices]

    def _decode(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        images = np.empty((len(indices), *self._shape), self._dtype)
        labels = np.empty(len(indices), np.int64)
        for row, example in enumerate(read(self._records, indices, self._name)):
            image = np.asarray(example[self._keys[0]])
            images[row] = resize_image(image, self._shape) if self._resize else image
            labels[row] = example[self._keys[1]]
        check_labels(labels, self._num_classes, self._name, indices)
        if self._dtype != np.uint8:
            check_finite(images, self._name, indices)
        return images, labels.astype(np.int32)


def read(records: Records, indices: np.ndarray, name: str) -> Sequence[Mapping[str, Any]]:
    """Reads examples; ValueError with the number of one that cannot be decoded."""
    rows = [int(index) for index in indices]
    try:
        return records.__getitems__(rows)
    except Exception:
        for row in rows:
            try:
                records[row]
            except Exception as error:
                raise ValueError(
                    f"split {name!r}: example {row} cannot be read ({first_line(error)})"
                ) from error
        raise


def from_arrays(
    images: np.ndarray, labels: np.ndarray, *, num_classes: int, name: str = "train"
) -> Split:
    """Makes a split of arrays in memory; see `ArraySource` for shapes and errors.

    >>> images, labels = np.zeros((6, 8, 8, 1), np.uint8), np.arange(6) % 3
    >>> split = from_arrays(images, labels, num_classes=3)
    >>> split.gather(np.array([1, 5]))["label"]
    array([1, 2], dtype=int32)
    """
    source = ArraySource(images, labels, num_classes=num_classes, name=name)
    return Split(name, source, np.arange(len(source)))


def check_labels(labels: np.ndarray, num_classes: int, name: str, indices: np.ndarray) -> None:
    """Raises ValueError at the first label outside 0..num_classes-1, naming the example."""
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if wrong.size:
        raise ValueError(
            f"split {name!r}: example {indices[wrong[0]]} has label {labels[wrong[0]]}: "
            f"0..{num_classes - 1} is needed"
        )


def check_finite(images: np.ndarray, name: str, indices: np.ndarray) -> None:
    """Raises ValueError at the first image that holds a NaN or an infinity, naming it."""
    wrong = np.argwhere(~np.isfinite(images))
    if wrong.size:
        raise ValueError(
            f"split {name!r}: example {indices[wrong[0, 0]]} has a pixel that is "
            f"{images[tuple(wrong[0])]}: finite pixels are needed"
        )


def fixed_order(size: int) -> np.ndarray:
    """A permutation of 0..size-1 that depends on `size` alone.

    It sorts raw PCG64 output, whose stream NumPy guarantees across versions.
    """
    raw = np.random.PCG64(_FIXED_ORDER_SEED).random_raw(size)
    return np.argsort(raw, kind="stable")


def stratified_order(labels: np.ndarray) -> np.ndarray:
    """A fixed permutation of which every prefix holds the classes in proportion."""
    order = fixed_order(len(labels))
    shuffled = labels[order]
    position = np.empty(len(labels))
    for label in np.unique(labels):
        rows = np.flatnonzero(shuffled == label)
        position[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
    return order[np.argsort(position, kind="stable")]


def held_out(order: np.ndarray, amount: float | int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts the first part of a permutation off.

    The amount is a fraction in [0, 1) as float, or a number of rows as int; ValueError where it is
    neither or leaves nothing. Returns the rows that stay and those held out, sorted.
    """
    size = len(order)
    count = round(amount * size) if isinstance(amount, float) and 0 <= amount < 1 else amount
    if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count < size:
        raise ValueError(
            f"validation is {amount!r}: a fraction in [0, 1) or a count below {size} (the training "
            "examples) is needed"
        )
    return np.sort(order[count:]), np.sort(order[:count])


def divide(
    name: str, sizes: Mapping[str, int], validation: Amount
) -> dict[str, tuple[str, np.ndarray]]:
    """Says of which stored split and of which rows there each of the three splits is made.

    Of `sizes`, the rows of the stored splits, "train" is needed and one of the others. Without
    "test" the stored validation split is the test split. `validation` is that of `load`.
    """
    if "train" not in sizes or len(sizes) < 2:
        raise ValueError(
            f"the splits of data set {name!r} are {sorted(sizes)}: 'train' and 'test' (or "
            "'validation') are needed"
        )
    test = "test" if "test" in sizes else "validation"
    if validation is None and test == "test" and "validation" in sizes:
        kept = np.arange(sizes["train"])
        own = ("validation", np.arange(sizes["validation"]))
    else:
        kept, held = hold_out(fixed_order(sizes["train"]), validation)
        own = ("train", held)
    return {"train": ("train", kept), "validation": own, "test": (test, np.arange(sizes[test]))}


def hold_out(order: np.ndarray, validation: Amount) -> tuple[np.ndarray, np.ndarray]:
    """`held_out` for the option `validation` of `load`: without it a tenth."""
    return held_out(order, _DEFAULT_VALIDATION if validation is None else validation)
