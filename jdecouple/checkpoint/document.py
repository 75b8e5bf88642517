"""The document of a checkpoint: what is in it, with the sums by which damage shows."""

import functools
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import numpy as np

from jdecouple._errors import OneLine, first_line

FORMAT = 1  # all arrays are in one item, each whole
BY_STAGE = 2  # several processes have written them, into an item a stage
STATE = "state"  # that one item
DOCUMENT = "info/metadata"  # in the folder of a checkpoint
escaped = functools.partial(quote, safe="")  # a name, as Orbax has it


class CheckpointError(OneLine, ValueError):
    """A checkpoint cannot be written, or none of those present can be used."""


class RefusedError(Exception):
    """Why one checkpoint is not used, in one line."""


class Piece(NamedTuple):
    """A block of an array as a checkpoint holds it, most often the whole.

    Attributes:
        item: folder of the checkpoint in which it is, where it has elements.
        key: its name there.
        kind: its dtype and shape, as `spec` tells them.
        crc: checksum of its bytes.
        start: index of its first element in the array.
    """

    item: str
    key: str
    kind: str
    crc: int
    start: tuple[int, ...] = ()


class Leaf(NamedTuple):
    """An array of a checkpoint: dtype and shape, as `spec` tells them, and its pieces."""

    kind: str
    pieces: list[Piece]


def leaves(document: Mapping[str, Any]) -> dict[str, Leaf]:
    """The arrays of a checkpoint by name."""
    found = document["leaves"].items()
    if document["format"] == FORMAT:
        return {
            unquote(key): Leaf(kind, [Piece(STATE, key, kind, checksum)])
            for key, (kind, checksum) in found
        }
    return {
        unquote(name): Leaf(kind, [Piece(*piece) for piece in pieces])
        for name, (kind, pieces) in found
    }


def items(found: Mapping[str, Leaf]) -> set[str]:
    """The folders of a checkpoint in which it has these arrays."""
    pieces = (piece for leaf in found.values() for piece in leaf.pieces)
    return {piece.item for piece in pieces if empty(piece.kind).size}


def elsewhere(item: str, folders: Sequence[str]) -> str:
    """What is said of an item that another process has written to its own of these folders."""
    writer = int(item.partition(".process_")[2].partition(".")[0])
    return (
        f"{item} is not here: process {writer} wrote it to {folders[writer]}; start the same "
        "processes with config.checkpoint.apart, or bring it here by 'jdecouple gather'"
    )


def best(documents: Mapping[int, dict[str, Any]]) -> int | None:
    """Step of the highest metric, the earliest of equals."""
    scored = [(d["metric"], -step) for step, d in documents.items() if d["metric"] is not None]
    return -max(scored)[1] if scored else None


def score(extra: Any, metric: float | None) -> dict[str, Any]:
    """What of a document may be amended."""
    metric = None if metric is None or np.isnan(metric) else float(metric)
    return {"metric": metric, "extra": json.loads(json.dumps(extra))}


def info(document: dict[str, Any]) -> dict[str, Any]:
    """A document as it is written, with its checksum."""
    return {"document": document, "crc32": _document_crc(document)}


def read_document(checkpoint: Path) -> dict[str, Any]:
    """The document of a checkpoint's folder; RefusedError where there is no sound one."""
    path = checkpoint / DOCUMENT
    if not path.is_file():
        raise RefusedError(f"not a checkpoint of this program (no {DOCUMENT})")
    document = read_info(path, DOCUMENT)
    if document["format"] not in (FORMAT, BY_STAGE):
        read = f"{FORMAT} and {BY_STAGE}"
        raise RefusedError(f"format {document['format']}, this program reads {read}")
    return document


def read_info(path: Path, name: str) -> dict[str, Any]:
    """What `info` made, out of a file that errors call `name`; RefusedError if it is not sound."""
    try:
        written = json.loads(path.read_bytes())
        document, checksum = written["document"], written["crc32"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RefusedError(f"{name} is damaged ({told(error)})") from error
    if checksum != _document_crc(document):
        raise RefusedError(f"{name} is damaged (checksum)")
    return document


def spec(array: Any) -> str:
    """Dtype and shape of an array, such as "float32[3,4]"."""
    return f"{array.dtype.name}[{','.join(map(str, array.shape))}]"


def empty(kind: str) -> np.ndarray:
    """An array of a dtype and shape that `spec` tells."""
    dtype, _, shape = kind.rstrip("]").partition("[")
    return np.empty([int(size) for size in shape.split(",") if size], np.dtype(dtype))


def crc(array: np.ndarray) -> int:
    """Checksum of an array's bytes."""
    return zlib.crc32(array.reshape(-1).view(np.uint8).data)


def _document_crc(document: Any) -> int:
    return zlib.crc32(json.dumps(document, sort_keys=True).encode())


def failure(step: int, directory: Path) -> str:
    """What is said of a checkpoint that cannot be written."""
    return f"checkpoint {step} could not be written to {directory}"


def told(error: Exception) -> str:
    """The kind of an error, and what it says first."""
    return f"{type(error).__name__}: {first_line(error)[:200]}"
