"""Checkpoints of processes that see no common folder: each has its stages in one of its own.

What the first process commits is a checkpoint as any other, but for the items of the others, which
lie in their folders. What belongs together is known by name, as an item's ends with the token of
the run that wrote it, and by the checksums in the document.

What another process writes has a temporary name, then `STEP-TOKEN` when it is whole, and `STEP`
when it has heard that the first has committed it. The first commits when all are whole, and they
delete only what it no longer has.
"""

import functools
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jdecouple._files import children, make_folder, new_folder
from jdecouple.checkpoint import shelf
from jdecouple.checkpoint.document import (
    CheckpointError,
    Leaf,
    RefusedError,
    elsewhere,
    items,
    leaves,
    read_document,
)
from jdecouple.checkpoint.orbax_setup import UNFINISHED
from jdecouple.checkpoint.stored import read_arrays
from jdecouple.checkpoint.together import Part, Together, merged

_PART = re.compile(r"(\d+)(-\w+)?")


class Apart(Together):
    """One process's side of such checkpoints.

    Args:
        folder: where the first has its checkpoints, on the machine of each.
        index: number of this process; 0 commits.
        count: processes that write.
        token: the same for all, another one for every run.

    Attributes:
        folders: on the first process, where each has its parts, in words.
        lists: on the first process, what each is about to write; set before `save`.
    """

    def __init__(self, folder: Path, index: int, count: int, token: str):
        super().__init__(folder_of(folder, index), index, count, token)
        self.folders: list[str] = []
        self.lists: Sequence[Mapping[str, Leaf]] = ()
        self._folder, self._mark = folder, f".{token}"
        if index:
            shelf.prepare(self.directory)

    def holds(self, item: str) -> bool:
        """Whether an item is to be in the directory of this process."""
        return f".process_{self.index}." in item

    def find(self, step: int, item: str) -> Path | None:
        """Where an item of a checkpoint lies on this machine, whichever process wrote it."""
        return find(step, item, all_folders(self._folder))

    def committed(self) -> list[int]:
        """Steps of which this process knows that the first has committed them."""
        return sorted(shelf.steps_in(self.directory))

    def settle(self, kept: Collection[int], *, clear: bool = True) -> None:
        """Learns which steps the first process has; with `clear`, nothing else stays."""
        if not self.index:
            return
        for path in children(self.directory):
            if not (match := _PART.fullmatch(path.name)):
                continue
            step, known = int(match[1]), self.directory / match[1]
            if step in kept and path != known and not known.exists():
                os.rename(path, known)
            elif clear and step not in kept:
                if path == known and step > max(kept, default=-1):
                    self._set_aside(path)  # as the first does with those that were refused
                else:
                    shelf.delete(path)
        for path in shelf.unfinished(self.directory) if clear else ():
            shelf.discard(path)

    def _set_aside(self, part: Path) -> None:
        aside = self.directory.with_name(f"{self.directory.name}_refused")
        make_folder(aside)
        os.rename(part, aside / f"{part.name}-{self._token}")

    def _save(self, step: int, parts: Sequence[Part], document: Mapping[str, Any] | None) -> None:
        folder = self.directory / f"{step}{UNFINISHED}-{self._token}"
        try:
            self._write(folder, parts)
            if document is None:
                os.rename(folder, self.directory / f"{step}-{self._token}")
            self._meet(step)  # a process that has failed never comes, and soon ends all
            self._written.set()
            if document is not None:
                own = {"folders": self.folders, "leaves": merged(self.lists)}
                self._finish(step, folder, {**document, **own})
        except BaseException:
            shelf.discard(folder)
            raise


def folder_of(folder: Path, index: int) -> Path:
    """The own folder of a process, beside that of the first, which is `folder`."""
    return folder.with_name(f"{folder.name}.process_{index}") if index else folder


def all_folders(folder: Path) -> list[Path]:
    """That of the first process, and those of others beside it."""
    others = sorted(folder.parent.glob(f"{folder.name}.process_*"))
    return [folder, *(path for path in others if path.name.rpartition("_")[2].isdecimal())]


def find(step: int, item: str, folders: Iterable[Path]) -> Path | None:
    """Where an item of a checkpoint lies; None if in no folder."""
    token = item.rpartition(".")[2]
    names = (f"{step}", f"{step}-{token}")
    places = (folder / name / item for folder in folders for name in names)
    return next((place for place in places if place.is_dir()), None)


def take_in(
    checkpoint: Path, item: str, found: Mapping[str, Leaf], write: Callable[[Path], object]
) -> None:
    """Brings an item into a folder of a checkpoint: whole and sound, or not at all.

    Args:
        checkpoint: the folder.
        item: its name.
        found: the arrays of the checkpoint.
        write: writes it into a folder, which is empty.

    Raises:
        RefusedError: it is damaged.
        OSError: it cannot be written.
    """

    def write_and_read(folder: Path) -> None:
        write(folder)
        pieces = {
            name: Leaf(leaf.kind, own)
            for name, leaf in found.items()
            if (own := [x._replace(item=folder.name) for x in leaf.pieces if x.item == item])
        }
        read_arrays(checkpoint, pieces)

    for left in checkpoint.glob(f".{item}.*.tmp"):  # by one that was killed
        shelf.discard(left)
    new_folder(checkpoint / item, write_and_read)


def gather(checkpoints: Path, folders: Sequence[Path], step: int) -> None:
    """Makes a checkpoint whole of folders of this machine, an item after the other.

    Raises:
        CheckpointError: an item is in none of them, or damaged.
    """
    checkpoint = checkpoints / str(step)
    try:
        document = read_document(checkpoint)
        found = leaves(document)
        for item in sorted(items(found)):
            if (checkpoint / item).is_dir():
                continue
            if (source := find(step, item, folders)) is None:
                raise RefusedError(elsewhere(item, document["folders"]))
            take_in(checkpoint, item, found, functools.partial(_copy, source))
    except (RefusedError, KeyError) as error:
        raise CheckpointError(f"checkpoint {step} in {checkpoints}: {error}") from error


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target, dirs_exist_ok=True)
