"""The loaders of the data sets that are built in; `loaders.load` calls them by name."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jdecouple._errors import require_int
from jdecouple.data import folders, tables, tfds_images
from jdecouple.data.images import resize_image
from jdecouple.data.inputs import Numbers
from jdecouple.data.splits import (
    Amount,
    ArraySource,
    Dataset,
    ImageDataset,
    Source,
    Split,
    divide,
    held_out,
    hold_out,
    stratified_order,
)
from jdecouple.data.texts import dataset as text_dataset

# Per-channel mean and standard deviation of the training images, scaled to 0..1.
Statistics = tuple[tuple[float, ...], tuple[float, ...]]
STATISTICS: dict[str, Statistics] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
}
_STATISTICS_ROWS = 1000
_STATISTICS_CHUNK = 64
_LEAST_STD = 1e-6
_DIGITS_TEST = 0.2
_SYNTHETIC_POOL_BYTES = 64 << 20


def digits(*, validation: Amount, image_size: int | None) -> Dataset:
    """scikit-learn's bundled images; a fixed stratified fifth is the test split."""
    values, labels = _bundled_digits()
    images = np.round(values * (255 / 16)).astype(np.uint8)[..., None]
    if image_size is not None:
        images = np.stack([resize_image(image, (image_size, image_size, 1)) for image in images])
    development, test = held_out(stratified_order(labels), _DIGITS_TEST)
    kept, held = hold_out(stratified_order(labels[development]), validation)
    rows = {"train": development[kept], "validation": development[held], "test": test}
    source = ArraySource(images, labels, num_classes=10, name="digits")
    splits: dict[str, Any] = {role: Split(role, source, rows[role]) for role in rows}
    mean, std = channel_statistics(splits["train"])
    shape = images.shape[1:]
    return ImageDataset("digits", **splits, num_classes=10, image_shape=shape, mean=mean, std=std)


def _bundled_digits() -> tuple[np.ndarray, np.ndarray]:
    """Images of 0 to 16 and their labels; importing scikit-learn would take 50 times as long."""
    package = importlib.util.find_spec("sklearn")
    for folder in (package and package.submodule_search_locations) or ():
        if (path := Path(folder) / "datasets" / "data" / "digits.csv.gz").is_file():
            table = np.loadtxt(path, delimiter=",")
            return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(int)
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return bunch.images, bunch.target


class _RandomSource:
    """Random images, repeated from a pool of bounded size, and random labels."""

    def __init__(self, size: int, shape: tuple[int, int, int], num_classes: int, seed: list[int]):
        generator = np.random.Generator(np.random.PCG64(seed))
        pool = min(size, max(1, _SYNTHETIC_POOL_BYTES // int(np.prod(shape))))
        self._images = generator.integers(0, 256, (pool, *shape), dtype=np.uint8)
        self._labels = generator.integers(0, num_classes, size, dtype=np.int32)

    def __len__(self) -> int:
        return len(self._labels)

    def gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `splits.Source.gather`."""
        return self._images[indices % len(self._images)], self._labels[indices]


def synthetic(
    *,
    validation: Amount,
    synthetic_size: int,
    image_size: int | None,
    channels: int,
    num_classes: int,
    seed: int,
) -> Dataset:
    """Random images and labels."""
    require_int(2, synthetic_size=synthetic_size, num_classes=num_classes)
    if channels not in (1, 3):
        raise ValueError(f"channels is {channels!r}: allowed are 1, 3")
    side = 32 if image_size is None else image_size
    shape = (side, side, channels)
    sizes = {"train": synthetic_size, "test": max(1, synthetic_size // 4)}
    stored = {
        split: _RandomSource(size, shape, num_classes, [seed, number])
        for number, (split, size) in enumerate(sizes.items())
    }
    statistics = (0.5,) * channels, (12**-0.5,) * channels
    return _images("synthetic", stored, Numbers(num_classes), shape, validation, statistics)


def folder(
    name: str, *, data_dir: Any, validation: Amount, image_size: int | None, cache_bytes: int
) -> Dataset:
    """Images in class folders."""
    opened = folders.sources(
        name,
        data_dir=data_dir,
        validation=validation,
        image_size=image_size,
        cache_bytes=cache_bytes,
    )
    return _images(name, *opened, validation)


def prepared_images(
    name: str, builder: Any, *, validation: Amount, image_size: int | None, cache_bytes: int
) -> Dataset:
    """A prepared TFDS set of images."""
    opened = tfds_images.sources(name, builder, image_size=image_size, cache_bytes=cache_bytes)
    statistics = STATISTICS.get(builder.name) if image_size is None else None
    return _images(name, *opened, validation, statistics)


def table(
    name: str,
    *,
    data_dir: Any,
    validation: Amount,
    seed: int,
    max_length: int | None,
    vocabulary_size: int | None,
    clean: str,
    glove: Any,
    label_column: str | None,
    text_columns: Sequence[str] | None,
    parts: Sequence[int] | None,
) -> Dataset:
    """Labelled texts in CSV or Parquet files."""
    options: dict[str, Any] = {"max_length": max_length, "vocabulary_size": vocabulary_size}
    options |= {"parts": parts, "clean": clean}
    stored, class_names = tables.splits(name, data_dir, label_column, text_columns)
    return text_dataset(
        name, stored, class_names, validation=validation, seed=seed, glove=glove, **options
    )


def _images(
    name: str,
    stored: Mapping[str, Source],
    class_names: Sequence[str],
    shape: tuple[int, int, int],
    validation: Amount,
    statistics: Statistics | None = None,
) -> Dataset:
    sizes = {split: len(source) for split, source in stored.items()}
    parts = divide(name, sizes, validation)
    splits = {role: Split(role, stored[split], rows) for role, (split, rows) in parts.items()}
    mean, std = statistics or channel_statistics(splits["train"])
    return ImageDataset(
        name,
        **splits,
        num_classes=len(class_names),
        class_names=class_names,
        image_shape=shape,
        mean=mean,
        std=std,
    )


def channel_statistics(split: Split, rows: int = _STATISTICS_ROWS) -> Statistics:
    """Mean and standard deviation per channel over the first `rows` images, scaled to 0..1.

    A channel that does not vary gets the standard deviation 1, so that it can be divided by.
    """
    rows = min(rows, len(split))
    pixels, total, squares = 0, np.zeros(()), np.zeros(())
    for first in range(0, rows, _STATISTICS_CHUNK):
        images = split.gather(np.arange(first, min(first + _STATISTICS_CHUNK, rows)))["x"]
        flat = images.reshape(-1, images.shape[-1]) / (255 if images.dtype == np.uint8 else 1)
        pixels += len(flat)
        total = total + flat.sum(axis=0, dtype=np.float64)
        squares = squares + np.square(flat).sum(axis=0, dtype=np.float64)
    means = total / pixels
    deviations = np.sqrt(np.maximum(squares / pixels - means**2, 0))
    return (
        tuple(float(mean) for mean in means),
        tuple(float(std) if std > _LEAST_STD else 1.0 for std in deviations),
    )
