"""Image sets that TensorFlow Datasets has prepared, read without TensorFlow."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from jdecouple.data.splits import CACHE_BYTES, DecodedSource, first_line

_PREPARE = (
    "import sys, tensorflow_datasets as tfds; "
    "tfds.builder(sys.argv[1], data_dir=sys.argv[2] or None, file_format='array_record')"
    ".download_and_prepare()"
)
_PREPARE_NEEDS = ("tensorflow", "importlib_resources")


def sources(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    download: bool = False,
    image_size: int | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> tuple[str, dict[str, DecodedSource], int, tuple[int, int, int]]:
    """Opens the splits of a prepared set.

    TFDS 4.9 writes a set only with TensorFlow (its image encoder and example serialiser call
    it), so preparing runs in a process of its own and never brings TensorFlow into this one.

    Args:
        name: a TFDS name, such as `cifar10` or `dataset/config:version`.
        data_dir: folder of prepared sets; None is TFDS's own (`~/tensorflow_datasets`).
        download: prepare the set (download included) where it is not prepared yet.
        image_size: resize to this many pixels a side; needed where images vary in size.
        cache_bytes: bound on the decoded images that one split keeps in memory.

    Returns:
        The set's plain name, its `train`, `validation` and `test` sources where it has them,
        the number of classes and the image shape (H, W, C).

    Raises:
        ValueError: the set is unknown, not prepared, or holds no images with class labels.
        FileNotFoundError: `data_dir` does not exist.
    """
    folder = None if data_dir is None else Path(data_dir).expanduser()
    if folder is not None and not folder.is_dir() and not download:
        raise FileNotFoundError(f"data_dir {str(folder)!r} does not exist")
    builder = _builder(name, folder)
    if not _is_readable(builder):
        if download:
            _prepare(name, folder)
            builder = _builder(name, folder)
        if not _is_readable(builder):
            raise ValueError(_not_prepared(name, builder, folder))
    image_key, label_key = _feature_keys(name, builder.info)
    feature = builder.info.features[image_key]
    dtype = np.dtype(feature.np_dtype)
    shape = _image_shape(name, feature.shape, dtype, image_size)
    num_classes = builder.info.features[label_key].num_classes
    opened = {
        split: DecodedSource(
            _open(name, builder, split),
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


def _builder(name: str, folder: Path | None) -> Any:
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(name, data_dir=None if folder is None else str(folder), try_gcs=False)
    except Exception as error:
        raise ValueError(
            f"data set {name!r} cannot be opened ({first_line(error)}); "
            "give 'digits', 'synthetic' or the name of a TFDS image set"
        ) from error


def _is_readable(builder: Any) -> bool:
    return builder.is_prepared() and builder.info.file_format.value == "array_record"


def _not_prepared(name: str, builder: Any, folder: Path | None) -> str:
    place = "" if folder is None else f"data_dir='{folder}', "
    command = (
        "import tensorflow_datasets as tfds; "
        f"tfds.builder('{name}', {place}file_format='array_record').download_and_prepare()"
    )
    needs = " ".join(_PREPARE_NEEDS)
    return (
        f"data set {name!r} is not prepared as array_record at '{builder.data_path}'; TFDS "
        f'prepares it only with TensorFlow: pip install {needs} && python -c "{command}"'
    )


def _prepare(name: str, folder: Path | None) -> None:
    missing = [module for module in _PREPARE_NEEDS if importlib.util.find_spec(module) is None]
    if missing:
        raise ValueError(
            f"data set {name!r} is not prepared, and TFDS prepares it only with TensorFlow: "
            f"pip install {' '.join(missing)}"
        )
    command = [sys.executable, "-c", _PREPARE, name, "" if folder is None else str(folder)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        reason = lines[-1] if lines else f"exit code {done.returncode}"
        raise ValueError(f"data set {name!r} could not be prepared ({reason})")


def _feature_keys(name: str, info: Any) -> tuple[str, str]:
    import tensorflow_datasets as tfds

    is_dict = isinstance(info.features, tfds.features.FeaturesDict)
    features = dict(info.features.items()) if is_dict else {}
    images = [key for key, value in features.items() if isinstance(value, tfds.features.Image)]
    labels = [key for key, value in features.items() if isinstance(value, tfds.features.ClassLabel)]
    if not images or not labels:
        raise ValueError(
            f"data set {name!r} has no image and class label; its features are {sorted(features)}"
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


def _open(name: str, builder: Any, split: str) -> Any:
    info = builder.info.splits[split]
    if not info.num_examples:
        raise ValueError(f"split {split!r} of data set {name!r} is empty")
    # array_record itself finds out only when it reads the first row of the shard.
    missing = [path for path in info.filepaths if not Path(path).is_file()]
    if missing:
        raise ValueError(f"split {split!r} of data set {name!r} lacks the file '{missing[0]}'")
    try:
        return builder.as_data_source(split)
    except Exception as error:
        raise ValueError(
            f"split {split!r} of data set {name!r} cannot be read ({first_line(error)})"
        ) from error
