"""Data sets that TensorFlow Datasets has prepared, opened without TensorFlow."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from logging import LogRecord
from pathlib import Path
from typing import Any

from absl import logging

from jdecouple._errors import did_you_mean, first_line
from jdecouple.data.splits import Records

_PREPARE = (
    "import sys, tensorflow_datasets as tfds; "
    "tfds.builder(sys.argv[1], data_dir=sys.argv[2] or None, file_format='array_record')"
    ".download_and_prepare()"
)
_PREPARE_NEEDS = ("tensorflow", "importlib_resources")
_FILES_AT_ONCE = 16


def prepared(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    download: bool = False,
    others: Iterable[str] = (),
) -> Any:
    """Opens a prepared set and returns its TFDS builder.

    TFDS 4.9 writes a set only with TensorFlow (its image encoder and example serialiser call
    it), so preparing runs in a process of its own and never brings TensorFlow into this one.
    `data_dir` None is TFDS's own folder of prepared sets, `~/tensorflow_datasets`. A name that is
    not known may be misspelt, as one of TFDS's or of the `others`.

    Raises:
        ValueError: the set is unknown or not prepared.
        FileNotFoundError: `data_dir` does not exist.
    """
    folder = None if data_dir is None else Path(data_dir).expanduser()
    if folder is not None and not folder.is_dir() and not download:
        raise FileNotFoundError(f"data_dir {str(folder)!r} does not exist")
    with _quiet():
        builder = _builder(name, folder, others)
        if download and not _is_readable(builder):
            _prepare(name, folder)
            builder = _builder(name, folder, others)
        if not _is_readable(builder):
            raise ValueError(_not_prepared(name, builder, folder))
    return builder


def unprepared_images(
    name: str, data_dir: str | os.PathLike[str] | None
) -> tuple[tuple[int | None, ...], int] | None:
    """Image shape and number of classes of a set of images that TFDS knows and has not prepared.

    TFDS tells them without the images; None of any other set.
    """
    folder = None if data_dir is None else Path(data_dir).expanduser()
    try:
        with _quiet():
            builder = _builder(name, folder, ())
    except ValueError:
        return None
    images, labels = (keys(builder, kind) for kind in ("Image", "ClassLabel"))
    if _is_readable(builder) or not images or not labels:
        return None
    known = builder.info.features
    return tuple(known[images[0]].shape), known[labels[0]].num_classes


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps TFDS from warning of a set that is not there, which is an error of its own."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def features(builder: Any) -> dict[str, Any]:
    """Returns the features of a set's examples by name; none if an example is no mapping."""
    import tensorflow_datasets as tfds

    is_dict = isinstance(builder.info.features, tfds.features.FeaturesDict)
    return dict(builder.info.features.items()) if is_dict else {}


def keys(builder: Any, kind: str) -> list[str]:
    """Returns the names of the features of one kind: "Image", "Text" or "ClassLabel"."""
    import tensorflow_datasets as tfds

    feature_type = getattr(tfds.features, kind)
    return [key for key, value in features(builder).items() if isinstance(value, feature_type)]


def records(name: str, builder: Any, decoders: Any = None) -> dict[str, Records]:
    """Opens those of the splits `train`, `validation` and `test` that a prepared set has.

    `decoders` are TFDS's, by the name of a feature.

    Raises ValueError where a split is empty, or its files are missing, cannot be read, or hold
    another number of examples than the set's metadata says.
    """
    logging.get_absl_logger().addFilter(_is_no_advice)
    opened = {}
    for split in ("train", "validation", "test"):
        if split not in builder.info.splits:
            continue
        info, label = builder.info.splits[split], f"split {split!r} of data set {name!r}"
        if not info.num_examples:
            raise ValueError(f"{label} is empty")
        # array_record itself finds out only when it reads the first row of the shard.
        missing = [path for path in info.filepaths if not Path(path).is_file()]
        if missing:
            raise ValueError(f"{label} lacks the file '{missing[0]}'")
        try:
            with ThreadPoolExecutor(_FILES_AT_ONCE) as threads:
                counts = list(threads.map(_count, info.filepaths))
            opened[split] = builder.as_data_source(split, decoders=decoders)
        except Exception as error:
            raise ValueError(f"{label} cannot be read ({first_line(error)})") from error
        for path, count, wanted in zip(info.filepaths, counts, info.shard_lengths, strict=True):
            if count != wanted:
                raise ValueError(
                    f"{label}: '{path}' holds {count} examples, but dataset_info.json says {wanted}"
                )
    return opened


def _count(path: str | os.PathLike[str]) -> int:
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(os.fspath(path), options="readahead_buffer_size:0")
    try:
        return int(reader.num_records())
    finally:
        reader.close()


def _is_no_advice(record: LogRecord) -> bool:
    """Filters out that TFDS would rather decode images with OpenCV, which nothing here needs."""
    return "OpenCV is not installed" not in str(record.msg)


def _builder(name: str, folder: Path | None, others: Iterable[str]) -> Any:
    import tensorflow_datasets as tfds

    where: dict[str, Any] = {"data_dir": folder and str(folder), "try_gcs": False}
    try:
        try:
            return tfds.builder(name, **where)
        except tfds.core.DatasetNotFoundError:  # TFDS knows some sets only after this import
            importlib.import_module("tensorflow_datasets.text")
            return tfds.builder(name, **where)
    except Exception as error:
        known = [*others, *tfds.list_builders(with_community_datasets=False)]
        raise ValueError(
            f"data set {name!r} cannot be opened ({first_line(error)}); "
            "give 'digits', 'synthetic', 'folder:', 'csv:' or 'parquet:' and a path, or a TFDS name"
            f"{did_you_mean(name, known)}"
        ) from error


def _is_readable(builder: Any) -> bool:
    return builder.is_prepared() and builder.info.file_format.value == "array_record"


def _not_prepared(name: str, builder: Any, folder: Path | None) -> str:
    data_dir = "" if folder is None else f"data_dir='{folder}', "
    command = (
        "import tensorflow_datasets as tfds; "
        f"tfds.builder('{name}', {data_dir}file_format='array_record').download_and_prepare()"
    )
    needs = " ".join(_PREPARE_NEEDS)
    return (
        f"data set {name!r} is not prepared as array_record at '{builder.data_path}' "
        "(data.data_dir names another folder, data.download=True prepares it); TFDS "
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
    process = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if process.returncode:
        lines = process.stderr.strip().splitlines()
        reason = lines[-1] if lines else f"exit code {process.returncode}"
        raise ValueError(f"data set {name!r} could not be prepared ({reason})")
