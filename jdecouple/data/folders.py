"""Images in class folders, by name `folder:PATH`: any such set, and Tiny ImageNet as it is."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jdecouple.data import images
from jdecouple.data.splits import (
    CACHE_BYTES,
    Amount,
    DecodedSource,
    divide,
    held_out,
    stratified_order,
)

PREFIX = "folder:"
TEST_SHARE = 0.2  # of a folder that has no test images of its own
_VALIDATION = ("val", "validation")
_SPLITS = ("train", "test", *_VALIDATION)

Files = list[tuple[str, int]]  # path and label of every image


def sources(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    validation: Amount = None,
    image_size: int | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> tuple[dict[str, DecodedSource], Sequence[str], tuple[int, int, int]]:
    """Opens a folder of images; each is decoded at its first use.

    Label i is the i-th name of a class in sorted order. The folder holds either

    - `train/CLASS/...` and at least one of `test`, `val` (or `validation`), each with the same
      classes, or with its images in `images` and their classes in a file such as
      `val_annotations.txt`, whose lines begin with a file name, a tab and a class (Tiny ImageNet).
      A `test` of unlabelled images is passed over; a `val` without a labelled `test` is the test
      split, as with TFDS sets;
    - or `CLASS/...`, of which a fixed stratified fifth is the test split.

    Images may lie at any depth below their class, also in linked folders (`images.below`). They are
    turned as their EXIF data say; transparent ones are laid on white; of 16 bits the upper 8 are
    used. They are brought to one channel if all are greyscale, else to three; with `image_size`
    only one image of every class is asked for that.

    The heads of the files that are not trained on are read at once (without `image_size` those of
    all), so that a bad one does not end a run at its first evaluation. `validation` is that of
    `load`. A relative PATH begins at `data_dir`, by default the current folder.

    The rows of a source are in a fixed order that mixes the classes. Also returns the names of the
    classes and the image shape (H, W, C).

    Raises:
        ValueError: the folder is not laid out like that, an image cannot be read, or the images
            differ in size.
        FileNotFoundError: there is no such folder.
    """
    root = Path(data_dir or "").expanduser() / Path(name.removeprefix(PREFIX)).expanduser()
    if name == PREFIX or not root.is_dir():
        raise FileNotFoundError(f"data set {name!r}: there is no folder '{root}'")
    classes, splits = _splits(root)
    parts = divide(name, {split: len(files) for split, files in splits.items()}, validation)
    if image_size is None:
        paths = [path for files in splits.values() for path, _ in files]
    else:
        first_of_class = {label: path for path, label in reversed(splits["train"])}
        paths = [first_of_class[label] for label in sorted(first_of_class)]
        for split, rows in (parts["validation"], parts["test"]):
            for row in rows:
                images.head(splits[split][row][0])
    shape = _image_shape(paths, image_size)
    opened = {
        split: DecodedSource(
            _Images(files, shape, resize=image_size is not None),
            keys=("image", "label"),
            image_shape=shape,
            dtype=np.dtype(np.uint8),
            num_classes=len(classes),
            name=split,
            cache_bytes=cache_bytes,
        )
        for split, files in splits.items()
    }
    return opened, classes, shape


class _Images:
    """Files as `splits.Records`, decoded one by one."""

    def __init__(self, files: Files, shape: tuple[int, int, int], *, resize: bool):
        self._files, self._shape, self._resize = files, shape, resize

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        path, label = self._files[index]
        height, width, channels = self._shape
        image = images.decode(path, channels, (height, width) if self._resize else None)
        if image.shape != self._shape:
            raise ValueError(_other_size(path, image.shape, self._shape))
        return {"image": image, "label": label}

    def __getitems__(self, indices: Sequence[int], /) -> list[dict[str, Any]]:
        return [self[index] for index in indices]


def _splits(root: Path) -> tuple[list[str], dict[str, Files]]:
    """Names of the classes, and the files of every split in their fixed order."""
    if not _is_divided(root):
        classes = _class_names(root)
        files = _mixed(_in_classes(root, classes))
        kept, held = held_out(np.arange(len(files)), TEST_SHARE)
        if not len(held):
            raise ValueError(f"{len(files)} images in '{root}': too few to hold some out for tests")
        return classes, {"train": [files[i] for i in kept], "test": [files[i] for i in held]}
    classes = _class_names(root / "train")
    splits = {"train": _in_classes(root / "train", classes)}
    validation = next((name for name in _VALIDATION if (root / name).is_dir()), "val")
    for split, folder in (("test", root / "test"), ("validation", root / validation)):
        if folder.is_dir() and not _is_unlabelled(folder, classes):
            splits[split] = _labelled(folder, classes)
    if len(splits) == 1:
        raise ValueError(f"'{root}' has 'train', but neither 'test' nor 'val' with labelled images")
    return classes, {split: _mixed(files) for split, files in splits.items()}


def _is_divided(root: Path) -> bool:
    """Whether there is a split `train`; a class may have that name, too."""
    names = _subfolders(root)
    return "train" in names and (set(names) <= {*_SPLITS} or bool(_subfolders(root / "train")))


def _class_names(folder: Path) -> list[str]:
    names = _subfolders(folder)
    if len(names) < 2:
        raise ValueError(
            f"'{folder}' has {len(names)} class folders: at least 2 with images are needed "
            "(PATH/CLASS/*.png, or PATH/train/CLASS/*.png and PATH/test/CLASS/*.png)"
        )
    return names


def _in_classes(folder: Path, classes: Sequence[str]) -> Files:
    files = []
    for label, name in enumerate(classes):
        paths = images.below(folder / name)
        if not paths:
            raise ValueError(f"class folder '{folder / name}' holds no images")
        files += [(path, label) for path in paths]
    return files


def _labelled(folder: Path, classes: Sequence[str]) -> Files:
    """Files of a split other than train, whose classes must be the same."""
    if _annotations(folder).is_file():
        return _annotated(folder, classes)
    for name in sorted(set(_subfolders(folder)) ^ set(classes)):
        here, there = (folder.name, "train") if name not in classes else ("train", folder.name)
        raise ValueError(f"class {name!r} is in '{folder.with_name(here)}', but not in {there}")
    return _in_classes(folder, classes)


def _annotated(folder: Path, classes: Sequence[str]) -> Files:
    listing, labels = _annotations(folder), {name: label for label, name in enumerate(classes)}
    files = []
    try:
        lines = listing.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"'{listing}' is no text in UTF-8 ({error})") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        file, name, *_ = [*line.split("\t"), ""]
        if {"/", "\\"} & set(file) or file in ("", ".", ".."):
            raise ValueError(f"'{listing}', line {number}: {file!r} is no name of a file alone")
        path, name = folder / "images" / file, name.strip()
        if name not in labels:
            raise ValueError(f"'{listing}', line {number}: {name!r} is no class of 'train'")
        if not path.is_file():
            raise ValueError(f"'{listing}', line {number}: there is no file '{path}'")
        files.append((str(path), labels[name]))
    listed, present = set(dict(files)), {label for _, label in files}
    for image in images.below(folder / "images"):
        if image not in listed:
            raise ValueError(f"'{listing}' has no line for '{image}'")
    for name in classes:
        if labels[name] not in present:
            raise ValueError(f"'{listing}' has no image of class {name!r}")
    return sorted(files)


def _is_unlabelled(folder: Path, classes: Sequence[str]) -> bool:
    """Whether a split has images, but not in class folders, and no list of their classes."""
    bare = not set(_subfolders(folder)) - {"images"} and "images" not in classes
    return bare and not _annotations(folder).is_file()


def _annotations(folder: Path) -> Path:
    return folder / f"{folder.name}_annotations.txt"


def _subfolders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        # A link that leads to itself or nowhere is no folder.
        folders = [entry.name for entry in entries if os.path.isdir(entry.path)]
    return sorted(name for name in folders if not name.startswith("."))


def _mixed(files: Files) -> Files:
    """The files in a fixed order of which every part holds the classes in proportion."""
    return [files[i] for i in stratified_order(np.array([label for _, label in files]))]


def _image_shape(paths: Sequence[str], image_size: int | None) -> tuple[int, int, int]:
    """Reads what the heads of files say of their size and colours."""
    shape, is_grey = None, True
    for path in paths:
        height, width, grey = images.head(path)
        is_grey = is_grey and grey
        shape = shape or (height, width)
        if image_size is None and shape != (height, width):
            raise ValueError(_other_size(path, (height, width), shape))
    assert shape is not None
    height, width = (image_size, image_size) if image_size else shape
    return height, width, 1 if is_grey else 3


def _other_size(path: str, size: Sequence[int], others: Sequence[int]) -> str:
    return (
        f"{path!r} is {size[1]} x {size[0]} pixels, others are {others[1]} x {others[0]}: "
        "set data.image_size"
    )
