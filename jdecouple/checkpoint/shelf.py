"""The folder of a run's checkpoints, on this machine or in an object store, which cannot rename."""

import contextlib
import os
import secrets
import tempfile
from pathlib import Path

from jdecouple._files import (
    bring,
    children,
    exists,
    is_stored,
    make_folder,
    remove_folder,
    replace,
)
from jdecouple.checkpoint.document import DOCUMENT
from jdecouple.checkpoint.orbax_setup import UNFINISHED

_DELETED = ".deleted"  # begins the name of what is being deleted
ITEMS = "stage_"  # begins those of what several processes write
LISTS = "parts"


def prepare(directory: Path) -> None:
    """Makes the folder; OSError where nothing can be written there."""
    make_folder(directory)
    if not is_stored(directory):
        tempfile.TemporaryFile(dir=directory).close()
        return
    probe = directory / ".writable"
    replace(probe, Path.touch)
    probe.unlink(missing_ok=True)


def steps_in(directory: Path) -> set[int]:
    """Steps of the checkpoints; in a store, those that have their document."""
    names = [path.name for path in children(directory)]
    steps = {int(name) for name in names if name.isdecimal() and str(int(name)) == name}
    if is_stored(directory):
        return {step for step in steps if exists(directory / str(step) / DOCUMENT)}
    return steps


def delete(checkpoint: Path) -> None:
    """Deletes a checkpoint; renamed first, so that a kill never leaves half of one.

    In a store its document goes first, without which it is none.
    """
    if is_stored(checkpoint):
        discard(checkpoint)
        return
    doomed = checkpoint.with_name(f"{_DELETED}.{checkpoint.name}.{secrets.token_hex(8)}")
    os.rename(checkpoint, doomed)
    remove_folder(doomed)


def discard(folder: Path) -> None:
    """Deletes a folder that nobody needs, as far as it can."""
    if is_stored(folder):
        with contextlib.suppress(Exception):
            (folder / DOCUMENT).unlink(missing_ok=True)
    remove_folder(folder)


def move(checkpoint: Path, free: Path) -> None:
    """Moves a checkpoint; in a store it is copied, and only then deleted."""
    if not is_stored(checkpoint):
        os.rename(checkpoint, free)
        return
    bring(checkpoint, free)
    delete(checkpoint)


def unfinished(directory: Path) -> list[Path]:
    """What dead saves and deletions have left, or are at."""
    return [path for path in children(directory) if _is_unfinished(path)]


def _is_unfinished(path: Path) -> bool:
    if path.name.startswith(_DELETED) or UNFINISHED in path.name:
        return is_stored(path) or not path.is_symlink()
    if not (is_stored(path) and path.name.isdecimal()) or exists(path / DOCUMENT):
        return False
    return any(each.name.startswith((ITEMS, LISTS)) for each in children(path))
