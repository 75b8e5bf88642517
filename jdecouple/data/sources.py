"""Data sets by name: `digits`, `synthetic`, files and folders, TensorFlow Datasets."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from jdecouple.data import folders, tables, tfds_images, tfds_sets, tfds_texts
from jdecouple.data.noise import symmetric_label_noise
from jdecouple.data.splits import (
    CACHE_BYTES,
    ArraySource,
    Dataset,
    DecodedSource,
    ImageDataset,
    Split,
    fixed_order,
    held_out,
    resize_image,
    stratified_order,
)
from jdecouple.data.texts import Texts
from jdecouple.data.texts import dataset as text_dataset

# Per-channel mean and standard deviation of the training images, scaled to 0..1.
STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
}
_STATISTICS_ROWS = 1000
_STATISTICS_CHUNK = 64
_LEAST_STD = 1e-6
_DEFAULT_VALIDATION = 0.1
_DIGITS_TEST = 0.2
_SYNTHETIC_POOL_BYTES = 64 << 20


def load(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    validation: float | int | None = None,
    label_noise: float = 0.0,
    seed: int = 0,
    download: bool = False,
    image_size: int | None = None,
    synthetic_size: int = 4096,
    channels: int = 3,
    num_classes: int = 10,
    cache_bytes: int = CACHE_BYTES,
    max_length: int | None = None,
    vocabulary_size: int | None = None,
    glove: str | os.PathLike[str] | None = None,
) -> Dataset:
    """Loads a data set with its fixed training, validation and test splits.

    `digits` is scikit-learn's bundled set of 1,797 real 8x8 images; a fixed stratified fifth is
    the test split. `synthetic` is random, for benchmarks. `folder:PATH` is a folder of images in
    class folders, see `folders.sources`; `csv:PATH` and `parquet:PATH` are labelled texts, see
    `tables.splits`. Any other name is a set of images or texts of TensorFlow Datasets that is
    already prepared as `array_record`; reading it imports no TensorFlow. A TFDS set without a test
    split, or with hidden test labels, is tested on its own validation split.

    Texts become numbers of words, see `vocabulary.Vocabulary`, which is made of the training split
    alone (without what is held out of it).

    The splits depend on the data alone, never on `seed`; `seed` draws the label noise (training
    labels only), the synthetic images and the vectors of words without one. Normalisation
    statistics are known constants for the sets in `STATISTICS` (at their own size) and for
    `synthetic`, else those of the first 1,000 training images.

    Args:
        name: `digits`, `synthetic`, `folder:PATH`, `csv:PATH`, `parquet:PATH` or a TFDS name.
        data_dir: folder of the prepared TFDS sets; None is TFDS's own. PATH begins there.
        validation: training examples to hold out: a fraction in [0, 1) or a count. None is the
            set's own validation split where it has one besides a test split, else a tenth.
        label_noise: share of the training labels drawn anew, in [0, 1].
        seed: of all that is drawn; not negative.
        download: prepare a TFDS set that is not prepared yet; without it nothing is downloaded.
        image_size: resize images to this many pixels a side (shorter side, then centre crop);
            the size of the synthetic images (32 if None).
        synthetic_size: synthetic examples for training and validation together; the test split
            has a quarter as many.
        channels: channels of the synthetic images, 1 or 3.
        num_classes: classes of the synthetic set.
        cache_bytes: decoded TFDS images are kept in memory if those of a split need no more.
        max_length: words that are kept of a text; 256 if None.
        vocabulary_size: most words that are told apart, padding and the unknown word included;
            30,000 if None.
        glove: text file of word vectors, see `vocabulary.word_vectors`.

    Returns:
        The data set.

    Raises:
        ValueError: a bad argument, or a set that is unknown, not prepared, empty or without
            labels.
        FileNotFoundError: `data_dir` or the folder or file of a set does not exist.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"data set name {name!r} given; 'digits', 'synthetic' or a TFDS name")
    _check_whole("seed", seed, 0)
    if image_size is not None:
        _check_whole("image_size", image_size, 1)
    if max_length is not None:
        _check_whole("max_length", max_length, 1)
    if vocabulary_size is not None:
        _check_whole("vocabulary_size", vocabulary_size, 3)
    text_options = {"max_length": max_length, "vocabulary_size": vocabulary_size, "glove": glove}
    if name == "digits":
        dataset = _digits(validation, image_size)
    elif name == "synthetic":
        _check_whole("synthetic_size", synthetic_size, 2)
        _check_whole("num_classes", num_classes, 2)
        if channels not in (1, 3):
            raise ValueError(f"channels={channels!r} given; 1 or 3 wanted")
        side = 32 if image_size is None else image_size
        shape = (side, side, channels)
        dataset = _synthetic(validation, synthetic_size, shape, num_classes, seed)
    elif name.startswith(folders.PREFIX):
        opened = folders.sources(
            name, data_dir=data_dir, image_size=image_size, cache_bytes=cache_bytes
        )
        dataset = _images(name, validation, opened, image_size is None)
    elif tables.names_files(name):
        dataset = _texts(name, validation, tables.splits(name, data_dir), seed, text_options)
    else:
        builder = tfds_sets.prepared(name, data_dir=data_dir, download=download)
        if tfds_texts.holds_texts(builder):
            found = tfds_texts.splits(name, builder)
            dataset = _texts(name, validation, found, seed, text_options)
        else:
            opened = tfds_images.sources(
                name, builder, image_size=image_size, cache_bytes=cache_bytes
            )
            dataset = _images(name, validation, opened, image_size is None)
    of_others = {"image_size": image_size} if dataset.kind == "texts" else text_options
    for option, value in of_others.items():
        if value is not None:
            raise ValueError(f"{option}={value!r} given; data set {name!r} holds {dataset.kind}")
    return _with_label_noise(dataset, label_noise, seed)


def _digits(validation: float | int | None, image_size: int | None) -> Dataset:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    if image_size is not None:
        images = np.stack([resize_image(image, (image_size, image_size, 1)) for image in images])
    labels = bunch.target
    development, test = held_out(stratified_order(labels), _DIGITS_TEST)
    amount = _DEFAULT_VALIDATION if validation is None else validation
    kept, held = held_out(stratified_order(labels[development]), amount)
    source = ArraySource(images, labels, num_classes=10, name="digits")
    return _dataset(
        "digits",
        train=Split("train", source, development[kept]),
        validation=Split("validation", source, development[held]),
        test=Split("test", source, test),
        num_classes=10,
    )


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


def _synthetic(
    validation: float | int | None,
    size: int,
    shape: tuple[int, int, int],
    num_classes: int,
    seed: int,
) -> Dataset:
    source = _RandomSource(size, shape, num_classes, [seed, 0])
    test = _RandomSource(max(1, size // 4), shape, num_classes, [seed, 1])
    amount = _DEFAULT_VALIDATION if validation is None else validation
    kept, held = held_out(fixed_order(size), amount)
    return _dataset(
        "synthetic",
        train=Split("train", source, kept),
        validation=Split("validation", source, held),
        test=Split("test", test, np.arange(len(test))),
        num_classes=num_classes,
        statistics=((0.5,) * shape[-1], (12**-0.5,) * shape[-1]),
    )


def _images(
    name: str,
    validation: float | int | None,
    opened: tuple[str, dict[str, DecodedSource], int, tuple[int, int, int]],
    known_size: bool,
) -> Dataset:
    base, sources, num_classes, shape = opened
    parts = _divide(name, {split: len(source) for split, source in sources.items()}, validation)
    return _dataset(
        name,
        **{role: Split(role, sources[split], rows) for role, (split, rows) in parts.items()},
        num_classes=num_classes,
        image_shape=shape,
        statistics=STATISTICS.get(base) if known_size else None,
    )


def _texts(
    name: str,
    validation: float | int | None,
    found: tuple[dict[str, Texts], int],
    seed: int,
    options: Mapping[str, Any],
) -> Dataset:
    stored, num_classes = found
    parts = _divide(name, {split: len(each.labels) for split, each in stored.items()}, validation)
    return text_dataset(name, stored, parts, num_classes, seed=seed, **options)


def _divide(
    name: str, sizes: Mapping[str, int], validation: float | int | None
) -> dict[str, tuple[str, np.ndarray]]:
    """Says which rows make the training, validation and test splits.

    Args:
        name: of the data set, for messages.
        sizes: rows of those of "train", "validation" and "test" that are stored.
        validation: training rows to hold out; None is the stored validation split where there is
            one besides a test split, else a tenth. See `held_out`.

    Returns:
        For each of the three, the stored split that it is a part of, and the rows there. Without
        "test" the stored validation split is the test split.

    Raises:
        ValueError: "train" or both of the others are missing, or `validation` leaves nothing.
    """
    if "train" not in sizes or len(sizes) < 2:
        raise ValueError(
            f"data set {name!r} has the splits {sorted(sizes)}; "
            "'train' and 'test' (or 'validation') wanted"
        )
    test = "test" if "test" in sizes else "validation"
    if validation is None and test == "test" and "validation" in sizes:
        kept = np.arange(sizes["train"])
        own = ("validation", np.arange(sizes["validation"]))
    else:
        amount = _DEFAULT_VALIDATION if validation is None else validation
        kept, held = held_out(fixed_order(sizes["train"]), amount)
        own = ("train", held)
    return {"train": ("train", kept), "validation": own, "test": (test, np.arange(sizes[test]))}


def _dataset(
    name: str,
    *,
    train: Split,
    validation: Split,
    test: Split,
    num_classes: int,
    image_shape: tuple[int, int, int] | None = None,
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
) -> Dataset:
    if image_shape is None:
        height, width, channels = train.gather(np.arange(1))["x"].shape[1:]
        image_shape = (height, width, channels)
    mean, std = statistics or channel_statistics(train)
    return ImageDataset(name, train, validation, test, num_classes, image_shape, mean, std)


def channel_statistics(
    split: Split, rows: int = _STATISTICS_ROWS
) -> tuple[tuple[float, ...], tuple[float, ...]]:
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


def _with_label_noise(dataset: Dataset, fraction: float, seed: int) -> Dataset:
    overrides = symmetric_label_noise(len(dataset.train), dataset.num_classes, fraction, seed)
    if not (overrides >= 0).any():
        return dataset
    return dataclasses.replace(
        dataset, train=dataclasses.replace(dataset.train, overrides=overrides)
    )


def _check_whole(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} given; a whole number of at least {least} wanted")
