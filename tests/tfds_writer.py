"""Writes small data sets in the layout of TFDS, without TensorFlow."""

import io
import json
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

_FEATURES = "tensorflow_datasets.core.features."


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, "PNG")
    return buffer.getvalue()


def write_image_set(
    data_dir: Path,
    name: str,
    splits: dict[str, tuple[list[bytes], list[int]]],
    *,
    num_classes: int,
    shape: tuple[int | None, int | None, int],
    version: str = "1.0.0",
    with_label: bool = True,
    file_format: str = "array_record",
) -> Path:
    """Writes encoded images and labels of each split as one shard; returns the set's folder."""
    features = {
        "image": {
            "image": {
                "dtype": "uint8",
                "encodingFormat": "png",
                "shape": {"dimensions": [str(-1 if size is None else size) for size in shape]},
            },
            "pythonClassName": _FEATURES + "image_feature.Image",
        }
    }
    if with_label:
        features["label"] = _class_label(num_classes)
    rows = {
        split: [
            {"image": image, **({"label": label} if with_label else {})}
            for image, label in zip(images, labels, strict=True)
        ]
        for split, (images, labels) in splits.items()
    }
    return _write(data_dir, name, features, rows, version, file_format)


def write_text_set(
    data_dir: Path,
    name: str,
    splits: dict[str, list[tuple]],
    *,
    columns: tuple[str, ...] = ("text",),
    num_classes: int = 2,
    version: str = "1.0.0",
) -> Path:
    """Writes (label, text, ...) of each split; returns the set's folder."""
    text = {"pythonClassName": _FEATURES + "text_feature.Text", "text": {}}
    features = {"label": _class_label(num_classes), **dict.fromkeys(columns, text)}
    rows = {
        split: [
            {"label": label, **dict(zip(columns, map(str.encode, texts), strict=True))}
            for label, *texts in examples
        ]
        for split, examples in splits.items()
    }
    return _write(data_dir, name, features, rows, version, "array_record")


def write_plain_texts(data_dir: Path, name: str, splits: dict[str, list[str]]) -> Path:
    """Writes texts without labels; returns the set's folder."""
    features = {"text": {"pythonClassName": _FEATURES + "text_feature.Text", "text": {}}}
    rows = {split: [{"text": text.encode()} for text in texts] for split, texts in splits.items()}
    return _write(data_dir, name, features, rows, "1.0.0", "array_record")


def _class_label(num_classes: int) -> dict:
    return {
        "classLabel": {"numClasses": str(num_classes)},
        "pythonClassName": _FEATURES + "class_label_feature.ClassLabel",
    }


def _write(
    data_dir: Path,
    name: str,
    features: dict[str, dict],
    splits: dict[str, list[dict[str, bytes | int]]],
    version: str,
    file_format: str,
) -> Path:
    folder = data_dir / name / version
    folder.mkdir(parents=True)
    name, _, config = name.partition("/")
    (folder / "features.json").write_text(
        json.dumps(
            {
                "featuresDict": {"features": features},
                "pythonClassName": _FEATURES + "features_dict.FeaturesDict",
            }
        )
    )
    for split, rows in splits.items():
        writer = ArrayRecordWriter(
            str(folder / f"{name}-{split}.array_record-00000-of-00001"), "group_size:1"
        )
        for row in rows:
            example = tf_example_pb2.Example()
            for key, value in row.items():
                feature = example.features.feature[key]
                values = feature.bytes_list if isinstance(value, bytes) else feature.int64_list
                values.value.append(value)
            writer.write(example.SerializeToString())
        writer.close()
    (folder / "dataset_info.json").write_text(
        json.dumps(
            {
                "name": name,
                **({"configName": config} if config else {}),
                "version": version,
                "fileFormat": file_format,
                "splits": [
                    {
                        "name": split,
                        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                        "numBytes": "1",
                        "shardLengths": [str(len(rows))],
                    }
                    for split, rows in splits.items()
                ],
            }
        )
    )
    return folder
