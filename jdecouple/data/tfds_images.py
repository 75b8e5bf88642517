"""Image sets that TensorFlow Datasets has prepared, read without TensorFlow."""

from __future__ import annotations

from typing import Any

import numpy as np

from jdecouple.data import tfds_sets
from jdecouple.data.splits import CACHE_BYTES, DecodedSource


def sources(
    name: str,
    builder: Any,
    *,
    image_size: int | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> tuple[str, dict[str, DecodedSource], int, tuple[int, int, int]]:
    """Opens the splits of a prepared set.

    Args:
        name: what the set was asked for as, for messages.
        builder: what `tfds_sets.prepared` returned.
        image_size: resize to this many pixels a side; needed where images vary in size.
        cache_bytes: bound on the decoded images that one split keeps in memory.

    Returns:
        The set's plain name, its `train`, `validation` and `test` sources where it has them,
        the number of classes and the image shape (H, W, C).

    Raises:
        ValueError: the set holds no images with class labels.
    """
    image_key, label_key = _feature_keys(name, builder)
    feature = builder.info.features[image_key]
    dtype = np.dtype(feature.np_dtype)
    shape = _image_shape(name, feature.shape, dtype, image_size)
    num_classes = builder.info.features[label_key].num_classes
    opened = {
        split: DecodedSource(
            tfds_sets.records(name, builder, split),
            keys=(image_key, label_key),
            image_shape=shape,
            dtype=dtype,
            num_classes=num_classes,
            name=split,
            resize=image_size is not None,
            cache_bytes=cache_bytes,
        )
        for split in ("train", "validation", "test")
        if split in builder.info.splits
    }
    return builder.name, opened, num_classes, shape


def _feature_keys(name: str, builder: Any) -> tuple[str, str]:
    import tensorflow_datasets as tfds

    info, features = builder.info, tfds_sets.features(builder)
    images = [key for key, value in features.items() if isinstance(value, tfds.features.Image)]
    labels = [key for key, value in features.items() if isinstance(value, tfds.features.ClassLabel)]
    if not images or not labels:
        raise ValueError(
            f"data set {name!r} has no image and class label, and no text with one; its features "
            f"are {sorted(features)}"
        )
    preferred = info.supervised_keys if isinstance(info.supervised_keys, tuple) else ()
    return (
        next((key for key in preferred if key in images), images[0]),
        next((key for key in preferred if key in labels), labels[0]),
    )


def _image_shape(
    name: str, shape: tuple[int | None, ...], dtype: np.dtype, image_size: int | None
) -> tuple[int, int, int]:
    if dtype not in (np.uint8, np.float32):
        raise ValueError(f"data set {name!r} has {dtype} images; uint8 and float32 are read")
    height, width, channels = shape
    if channels not in (1, 3):
        raise ValueError(f"data set {name!r} has {channels} channels; 1 and 3 are read")
    if image_size is not None:
        if dtype != np.uint8:
            raise ValueError(f"image_size is for uint8 images; those of {name!r} are {dtype}")
        return image_size, image_size, channels
    if height is None or width is None:
        raise ValueError(f"the images of {name!r} vary in size: give image_size")
    return height, width, channels
