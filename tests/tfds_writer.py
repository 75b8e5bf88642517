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
    folder = data_dir / name / version
    folder.mkdir(parents=True)
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
        features["label"] = {
            "classLabel": {"numClasses": str(num_classes)},
            "pythonClassName": _FEATURES + "class_label_feature.ClassLabel",
        }
    (folder / "features.json").write_text(
        json.dumps(
            {
                "featuresDict": {"features": features},
                "pythonClassName": _FEATURES + "features_dict.FeaturesDict",
            }
        )
    )
    for split, (images, labels) in splits.items():
        writer = ArrayRecordWriter(
            str(folder / f"{name}-{split}.array_record-00000-of-00001"), "group_size:1"
        )
        for image, label in zip(images, labels, strict=True):
            example = tf_example_pb2.Example()
            example.features.feature["image"].bytes_list.value.append(image)
            if with_label:
                example.features.feature["label"].int64_list.value.append(label)
            writer.write(example.SerializeToString())
        writer.close()
    (folder / "dataset_info.json").write_text(
        json.dumps(
            {
                "name": name,
                "version": version,
                "fileFormat": file_format,
                "splits": [
                    {
                        "name": split,
                        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                        "numBytes": "1",
                        "shardLengths": [str(len(labels))],
                    }
                    for split, (_, labels) in splits.items()
                ],
            }
        )
    )
    return folder
