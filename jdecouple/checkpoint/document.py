"""The document of a checkpoint: what is in it, with the sums by which damage shows."""

import functools
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from jdecouple._errors import first_line

FORMAT = 1
escaped = functools.partial(quote, safe="")  # a name, as Orbax has it


class RefusedError(Exception):
    """Why one checkpoint is not used, in one line."""


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
    path = checkpoint / "info" / "metadata"
    if not path.is_file():
        raise RefusedError("not a checkpoint of this program (no info/metadata)")
    try:
        written = json.loads(path.read_bytes())
        document, checksum = written["document"], written["crc32"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RefusedError(f"info/metadata is damaged ({told(error)})") from error
    if checksum != _document_crc(document):
        raise RefusedError("info/metadata is damaged (checksum)")
    if document["format"] != FORMAT:
        raise RefusedError(f"format {document['format']}, this program reads {FORMAT}")
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


def told(error: Exception) -> str:
    """The kind of an error, and what it says first."""
    return f"{type(error).__name__}: {first_line(error)[:200]}"
