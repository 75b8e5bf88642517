"""Image sets that TensorFlow Datasets has prepared, read without TensorFlow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jdecouple.data import images, tfds_sets
from jdecouple.data.splits import CACHE_BYTES, DecodedSource


def sources(
    name: str, builder: Any, *, image_size: int | None = None, cache_bytes: int = CACHE_BYTES
) -> tuple[dict[str, DecodedSource], Sequence[str], tuple[int, int, int]]:
    """Opens the splits of the set that `tfds_sets.prepared` returned; ValueError without images.

    Also returns the names of the classes and the image shape (H, W, C).
    """
    import tensorflow_datasets as tfds

    image_keys, labels = (tfds_sets.keys(builder, kind) for kind in ("Image", "ClassLabel"))
    if not image_keys or not labels:
        raise ValueError(
            f"data set {name!r} has the features {sorted(tfds_sets.features(builder))}: an image "
            "and a class label, or a text and one, are needed"
        )
    supervised = builder.info.supervised_keys
    preferred = supervised if isinstance(supervised, tuple) else ()
    image_key = next((key for key in preferred if key in image_keys), image_keys[0])
    label_key = next((key for key in preferred if key in labels), labels[0])
    image, label = builder.info.features[image_key], builder.info.features[label_key]
    dtype = np.dtype(image.np_dtype)
    shape = _image_shape(name, image.shape, dtype, image_size)
    decoders = {key: tfds.decode.make_decoder()(_decode)() for key in image_keys}
    opened = {
        split: DecodedSource(
            records,
            keys=(image_key, label_key),
            image_shape=shape,
            dtype=dtype,
            num_classes=label.num_classes,
            name=split,
            resize=image_size is not None,
            cache_bytes=cache_bytes,
        )
        for split, records in tfds_sets.records(name, builder, decoders).items()
    }
    return opened, label.names, shape


def _decode(encoded: bytes, feature: Any) -> np.ndarray:
    """Decodes an image as TFDS does, which by itself opens whatever Pillow knows."""
    images.check(encoded)
    return feature.decode_example_np(encoded)


def _image_shape(
    name: str, shape: tuple[int | None, ...], dtype: np.dtype, image_size: int | None
) -> tuple[int, int, int]:
    height, width, channels = shape
    if dtype not in (np.uint8, np.float32):
        raise ValueError(f"data set {name!r} has {dtype} images: uint8 or float32 is needed")
    if channels not in (1, 3):
        raise ValueError(f"data set {name!r} has {channels} channels: 1 or 3 are needed")
    if image_size is not None:
        if dtype != np.uint8:
            raise ValueError(f"data set {name!r} has {dtype} images: image_size is for uint8")
        return image_size, image_size, channels
    if height is None or width is None:
        raise ValueError(f"the images of {name!r} vary in size: give image_size")
    return height, width, channels
