"""Files that are old or new, but never half written, and folders that files can be in."""

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from jdecouple._errors import first_line


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file beside `path` and renames it, so that `path` is old or new but never half.

    Nobody can tell the name of that file before, and a link in its place is never followed.

    Raises:
        OSError: It cannot be written, or is a device or a pipe; one line that names `path`.
    """
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}.tmp")
    with naming(path):
        if path.exists() and not (path.is_file() or path.is_dir()):  # as /dev/null, as root
            raise OSError("it is no regular file")
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        try:
            write(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())  # else a machine that stops may leave an empty file
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def new_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a folder beside `path` and renames it, so that `path` is whole or not there.

    An empty folder may be in its place. Nobody can tell the name of the one that is renamed before.

    Raises:
        OSError: It cannot be written; one line that names `path`.
    """
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}.tmp")
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        try:
            write(temporary)
            for written in temporary.rglob("*"):
                if written.is_file():
                    with written.open("rb") as file:
                        os.fsync(file.fileno())
            temporary.rename(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Names `path` in an OSError about what is written there."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise OSError(f"cannot write {path}: {reason}") from error


def local_folder(path: str | os.PathLike[str]) -> Path:
    """A folder of this machine's file system, the home folder for `~`.

    >>> local_folder("gs://bucket/run")
    Traceback (most recent call last):
    ValueError: 'gs://bucket/run' is no folder of this machine: a path without gs:// is needed

    Raises:
        ValueError: It is on another one, or the home folder is unknown.
    """
    if match := re.match(r"([A-Za-z][\w+.-]+):/", os.fspath(path)):
        raise ValueError(
            f"{os.fspath(path)!r} is no folder of this machine: a path without {match[1]}:// "
            "is needed"
        )
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{os.fspath(path)!r}: {first_line(error)}") from error
