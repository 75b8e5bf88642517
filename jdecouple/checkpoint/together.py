"""Checkpoints that several processes write at once, each what it holds of every stage.

All of them see one directory. Every process writes an Orbax item a stage and a list of what is in
it, into a folder with a temporary name; when all have, the first writes the document and renames
the folder. So no array goes over the network, and none holds more than its own.

In an object store nothing can be renamed: they write into the folder itself, and the document,
which is there whole or not at all, comes last. A folder without one is no checkpoint. Orbax does so
too, with a file of its own, but takes no store other than ``gs://``.

Orbax's own manager does not fit: it makes the folders of those items alone that the first process
has, its arrays must be global (ours are one process's, which it refuses) or lie in NumPy (which it
writes on process 0 alone), and a process that fails leaves the others at its barrier.
"""

import contextlib
import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from orbax.checkpoint.multihost import get_barrier_sync_fn

from jdecouple._files import bring, children, is_stored, make_folder, replace
from jdecouple.checkpoint.document import (
    DOCUMENT,
    CheckpointError,
    Leaf,
    Piece,
    RefusedError,
    crc,
    empty,
    escaped,
    failure,
    info,
    read_info,
    spec,
    told,
)
from jdecouple.checkpoint.items import write_item
from jdecouple.checkpoint.orbax_setup import UNFINISHED, plain, quiet
from jdecouple.checkpoint.shelf import ITEMS, LISTS, discard

_PATIENCE = 24 * 3600  # seconds for the slowest disk; a process that has gone ends the wait at once


class LostError(Exception):
    """Another process has gone, so that its part will not come: no fault of a disk."""


class Part(NamedTuple):
    """A block of an array in host memory.

    Attributes:
        name: of the array.
        kind: dtype and shape of the array.
        stage: number of the stage that it belongs to.
        start: index of the block's first element in the array.
        block: the elements.
    """

    name: str
    kind: str
    stage: int
    start: tuple[int, ...]
    block: np.ndarray


def own_parts(arrays: Mapping[str, jax.Array], stage_of: Callable[[str], int]) -> list[Part]:
    """Copies of what this process is to write of arrays, by name; of equal blocks one is enough.

    Args:
        arrays: those of which it holds anything.
        stage_of: the stage of an array, by its name.
    """
    shards = [
        (name, array, shard)
        for name, array in arrays.items()
        for shard in array.addressable_shards
        if shard.replica_id == 0
    ]
    blocks = jax.device_get([shard.data for *_, shard in shards])  # may share the device's memory
    return [
        Part(
            name,
            spec(array),
            stage_of(name),
            tuple(axis.start or 0 for axis in shard.index),
            np.array(block, order="C"),
        )
        for (name, array, shard), block in zip(shards, blocks, strict=True)
    ]


def whole_parts(arrays: Mapping[str, Any]) -> list[Part]:
    """Copies of whole arrays, as parts of one stage."""
    on_host = jax.device_get(dict(arrays))  # may share the device's memory
    copies = {name: np.array(array, order="C") for name, array in on_host.items()}
    return [Part(name, spec(x), 0, (0,) * x.ndim, x) for name, x in copies.items()]


def merged(lists: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The arrays of a checkpoint, of lists of what each process has written.

    Raises:
        OSError: nobody has written a part of one.
    """
    found: dict[str, Any] = {}
    for each in lists:
        for name, (kind, pieces) in each.items():
            found.setdefault(name, [kind, []])[1].extend(pieces)
    for name, (kind, pieces) in found.items():
        sizes = (empty(Piece(*piece).kind).size for piece in pieces)
        if sum(sizes) != empty(kind).size:
            raise OSError(f"{name} was written in part")
    return found


class Together:
    """One process's side of the checkpoints that several write; each makes one.

    Args:
        directory: where the checkpoints live.
        index: number of this process; 0 commits.
        count: processes that write.
        token: the same for all, another one for every run.
    """

    def __init__(self, directory: Path, index: int, count: int, token: str):
        self.directory, self.index, self.count = directory, index, count
        self._token = token
        self._stored = is_stored(directory)
        # In a store, what this run is writing does not show in the name of the folder.
        self._mark = f".{token}" if self._stored else ""
        self._lists = f"{LISTS}{self._mark}"
        quiet()
        self._written = threading.Event()
        self._saving: Future[None] | None = None
        self._step: int | None = None

    def owns(self, path: Path) -> bool:
        """Whether a folder is one that this run may be writing."""
        within = children(path) if self._stored else []
        return any(each.name.endswith(self._token) for each in (path, *within))

    def holds(self, item: str) -> bool:
        """Whether an item is to be in the directory."""
        return True

    def save(
        self, step: int, parts: Sequence[Part], document: Mapping[str, Any] | None = None
    ) -> None:
        """Writes the parts of a step in the background; all processes call it.

        Args:
            step: of the checkpoint.
            parts: those of this process, which nobody changes.
            document: on the first process, what the checkpoint's document says beside its arrays.
        """
        self._step, saving = step, Future[None]()
        self._saving = saving
        self._written.clear()

        def run() -> None:
            try:
                self._save(step, parts, document)
                saving.set_result(None)
            except BaseException as error:
                saving.set_exception(error)

        # Nothing waits for it where a process ends early.
        threading.Thread(target=run, name="checkpoint", daemon=True).start()

    def is_saving_in_progress(self) -> bool:
        """Whether the last save goes on."""
        return self._saving is not None and not self._saving.done()

    def is_written(self, seconds: float) -> bool:
        """Whether all processes have written their parts; waits so long for them."""
        return self._saving is None or self._written.wait(seconds)

    def wait_until_finished(self) -> None:
        """Waits for the last save, and raises whatever has failed in it.

        On other processes than the first it ends when all have written, before the commit.
        """
        if self._saving is not None:
            self._saving.result()

    def wait(self) -> None:
        """Waits as `wait_until_finished` does; to be called on other processes than the first.

        Raises:
            CheckpointError: this process could not write its part.
            LostError: another one has gone.
        """
        try:
            self.wait_until_finished()
        except LostError:
            raise
        except Exception as error:
            assert self._step is not None
            message = f"{failure(self._step, self.directory)}: {told(error)}"
            raise CheckpointError(message) from error

    def close(self) -> None:
        """Leaves a save that is under way to itself."""

    def _save(self, step: int, parts: Sequence[Part], document: Mapping[str, Any] | None) -> None:
        end = "" if self._stored else f"{UNFINISHED}-{self._token}"
        folder = self.directory / f"{step}{end}"
        failed: Exception | None = None
        try:
            self._write(folder, parts)
            said: dict[str, Any] = {"leaves": self.listed(parts)}
        except Exception as error:
            failed, said = error, {"error": told(error)}
        with contextlib.suppress(OSError):  # what is missing counts as failed
            make_folder(folder / self._lists)
            own = folder / self._lists / str(self.index)
            replace(own, lambda path: path.write_text(json.dumps(info(said))))
        self._meet(step)
        self._written.set()
        try:
            if failed is not None:
                raise failed
            if document is not None:
                self._commit(step, folder, document)
        except BaseException:
            if document is not None:  # what they have written would keep a full disk full
                discard(folder)
            raise

    def _meet(self, step: int) -> None:
        """Waits until all processes have come here."""
        if self.count == 1:
            return
        try:
            key = f"jdecouple_{self._token}_{step}"
            get_barrier_sync_fn()(key=key, timeout_ms=1000 * _PATIENCE)
        except Exception as error:
            raise LostError(f"checkpoint {step}: not all processes have come") from error

    def _place(self, part: Part) -> tuple[str, str]:
        """The item of a part, and its key there."""
        whole = spec(part.block) == part.kind
        key = escaped(part.name if whole else f"{part.name}@{part.start}")
        return f"{ITEMS}{part.stage}.process_{self.index}{self._mark}", key

    def listed(self, parts: Sequence[Part]) -> dict[str, Leaf]:
        """What is where when these parts are written."""
        found: dict[str, Leaf] = {}
        for part in parts:
            piece = Piece(*self._place(part), spec(part.block), crc(part.block), part.start)
            found.setdefault(escaped(part.name), Leaf(part.kind, [])).pieces.append(piece)
        return found

    def _write(self, folder: Path, parts: Sequence[Part]) -> None:
        """Writes an item a stage."""
        by_item: dict[str, dict[str, np.ndarray]] = {}
        for part in parts:
            if part.block.size:  # Orbax takes no other
                item, key = self._place(part)
                by_item.setdefault(item, {})[key] = part.block
        make_folder(folder)
        for item, arrays in by_item.items():
            with self._being_written(folder, item) as place:
                write_item(place, arrays)

    @contextlib.contextmanager
    def _being_written(self, folder: Path, item: str) -> Iterator[epath.Path]:
        """Where Orbax can write an item, which is then brought to where it belongs."""
        if not self._stored:
            with plain(folder) as place:
                yield place / item
            return
        with tempfile.TemporaryDirectory() as scratch:
            yield epath.Path(scratch) / item
            bring(Path(scratch) / item, folder / item)

    def _commit(self, step: int, folder: Path, document: Mapping[str, Any]) -> None:
        """Makes a checkpoint of what all have written."""
        found = merged(self._said(folder, index) for index in range(self.count))
        discard(folder / self._lists)
        self._finish(step, folder, {**document, "leaves": found})

    def _finish(self, step: int, folder: Path, document: dict[str, Any]) -> None:
        """Writes the document, with which a folder is a checkpoint."""
        make_folder((folder / DOCUMENT).parent)
        text = json.dumps(info(document))
        replace(folder / DOCUMENT, lambda path: path.write_text(text))
        if not self._stored:
            os.rename(folder, self.directory / str(step))

    def _said(self, folder: Path, index: int) -> dict[str, Any]:
        try:
            said = read_info(folder / self._lists / str(index), "its list")
        except RefusedError as error:
            raise OSError(f"process {index} has not written its part: {error}") from error
        if "error" in said:
            raise OSError(f"process {index} has not written its part: {said['error']}")
        return said["leaves"]
