"""Reads arrays of a checkpoint, of either format, and compares them with what was saved."""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from etils import epath

from jdecouple._files import bring, is_stored
from jdecouple.checkpoint.document import (
    Leaf,
    Piece,
    RefusedError,
    crc,
    elsewhere,
    empty,
    spec,
    told,
)
from jdecouple.checkpoint.items import read_item
from jdecouple.checkpoint.orbax_setup import plain


def read_arrays(
    checkpoint: Path, wanted: Mapping[str, Leaf], folders: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """Reads these arrays of a checkpoint's folder, and nothing of others.

    Args:
        checkpoint: that folder.
        wanted: the arrays.
        folders: where each process has its own, in which parts of the checkpoint may lie.

    Raises:
        RefusedError: one cannot be read, is not there, or is not what was saved.
    """
    by_item: dict[str, dict[str, np.ndarray]] = {}
    for leaf in wanted.values():
        for piece in leaf.pieces:
            by_item.setdefault(piece.item, {})[piece.key] = empty(piece.kind)
    for item, blocks in by_item.items():
        held = {key: block for key, block in blocks.items() if block.size}
        if not held:
            continue
        if folders and not (checkpoint / item).is_dir():
            raise RefusedError(elsewhere(item, folders))
        try:
            with _at_hand(checkpoint, item) as folder:
                blocks |= read_item(folder, held)
        except Exception as error:  # Orbax and TensorStore raise many kinds on damaged files.
            raise RefusedError(f"unreadable ({told(error)})") from error
    return {name: _joined(name, leaf, by_item) for name, leaf in wanted.items()}


@contextlib.contextmanager
def _at_hand(checkpoint: Path, item: str) -> Iterator[epath.Path]:
    """An item as Orbax can read it: out of a store it is brought here first."""
    if not is_stored(checkpoint):
        with plain(checkpoint) as place:
            yield place / item
        return
    with tempfile.TemporaryDirectory() as scratch:
        bring(checkpoint / item, Path(scratch) / "item")
        yield epath.Path(scratch) / "item"


def _joined(name: str, leaf: Leaf, by_item: Mapping[str, Mapping[str, np.ndarray]]) -> np.ndarray:
    found = [(piece, _checked(name, piece, by_item)) for piece in leaf.pieces]
    if len(found) == 1 and found[0][0].kind == leaf.kind:
        return found[0][1]
    whole = empty(leaf.kind)
    for piece, block in found:
        ends = zip(piece.start, block.shape, strict=True)
        whole[tuple(slice(start, start + size) for start, size in ends)] = block
    return whole


def _checked(
    name: str, piece: Piece, by_item: Mapping[str, Mapping[str, np.ndarray]]
) -> np.ndarray:
    block = by_item[piece.item][piece.key]
    if (spec(block), crc(block)) != (piece.kind, piece.crc):
        raise RefusedError(f"leaf {name} is corrupted")
    return block
