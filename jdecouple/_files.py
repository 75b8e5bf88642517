"""Files that are old or new, but never half written, and folders that files can be in.

A folder is one of this machine, a `pathlib.Path`, or one of an object store, such as
``gs://bucket/run``: an `etils.epath.Path`, which has the same methods. A store knows no folders, no
renaming and no appending, but an object is there whole or not at all, and an old one until then.
"""

import contextlib
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import Any, cast

from jdecouple._errors import first_line

_PACKAGES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs"}  # through which etils reaches them
_ELSEWHERE = re.compile(r"([A-Za-z][\w+.-]+):/+(.*)", re.DOTALL)
_CONFIGURED: list[str] = []


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file beside `path` and renames it, so that `path` is old or new but never half.

    Nobody can tell the name of that file before, and a link in its place is never followed. In a
    store it is written on this machine and then brought there.

    Raises:
        OSError: It cannot be written, or is a device or a pipe; one line that names `path`.
    """
    if is_stored(path):
        with naming(path), tempfile.TemporaryDirectory() as scratch:
            write(local := Path(scratch) / (path.name or "file"))
            bring(local, path)
        return
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


def any_folder(path: str | os.PathLike[str]) -> Path:
    """A folder of this machine, as `local_folder`, or of an object store.

    Raises:
        ValueError: it is none of these, or the store cannot be reached; in one line.
    """
    if is_stored(path):
        return cast(Path, path)
    match = _ELSEWHERE.match(os.fspath(path))
    if match is None:
        return local_folder(path)
    scheme, rest = match.groups()
    given = f"{scheme}://{rest}"
    if scheme not in _PACKAGES:
        known = ", ".join(f"{name}://" for name in _PACKAGES)
        raise ValueError(
            f"{os.fspath(path)!r} is no folder: one of this machine, or {known} is needed"
        )
    if not rest.strip("/"):
        raise ValueError(f"{given!r} names no bucket: {scheme}://BUCKET/FOLDER is needed")
    return _reached(given, scheme)


def _reached(given: str, scheme: str) -> Path:
    """A folder of a store, which has answered."""
    from etils import epath

    if scheme not in _CONFIGURED:  # other processes write there, too: no list may be kept
        with contextlib.suppress(ImportError):
            import fsspec

            for name in {"gs": ("gs", "gcs"), "az": ("az", "abfs")}.get(scheme, (scheme,)):
                fsspec.config.conf.setdefault(name, {}).setdefault("use_listings_cache", False)
        _CONFIGURED.append(scheme)
    path = epath.Path(given)
    try:
        exists(cast(Path, path))
    except ImportError as error:
        package = _PACKAGES[scheme]
        raise ValueError(f"{given!r} needs the package {package}: pip install {package}") from error
    except OSError as error:
        raise ValueError(f"{given!r} cannot be reached: {first_line(error)}") from error
    return cast(Path, path)


def is_stored(path: object) -> bool:
    """Whether a path is one of an object store, which `any_folder` has returned."""
    return isinstance(path, PurePath) and not isinstance(path, Path) and "://" in os.fspath(path)


def absolute(path: Path) -> Path:
    """The path from the root, links and all; one of a store is so already."""
    return path if is_stored(path) else path.absolute()


def resolved(path: Path) -> Path:
    """As `absolute`, but where links lead to."""
    return path if is_stored(path) else path.resolve()


def make_folder(path: Path) -> None:
    """Makes a folder, with those above it; in a store, which has none, that is nothing."""
    if not is_stored(path):
        path.mkdir(parents=True, exist_ok=True)


def exists(path: Path) -> bool:
    """Whether a file or a folder is there; OSError where a store does not say so.

    What stores themselves offer says no as well where the network is away.
    """
    if not is_stored(path):
        return path.exists()
    with _as_os_error(path):
        try:
            path.stat()
        except FileNotFoundError:
            return False
        return True


def children(folder: Path) -> list[Path]:
    """What is in a folder; nothing where it is not there."""
    with _as_os_error(folder):
        return [path for path in folder.iterdir() if path.name] if exists(folder) else []


def read_bytes(path: Path) -> bytes:
    """Content of a file; OSError if it cannot be read."""
    with _as_os_error(path):
        return path.read_bytes()


def size(path: Path) -> int:
    """Bytes of a file; OSError if there is none."""
    with _as_os_error(path):
        found: Any = path.stat()
        return found.length if is_stored(path) else found.st_size


def written_at(path: Path) -> float:
    """When a file was last written, in seconds since 1970."""
    found: Any = path.stat()
    return found.mtime if is_stored(path) else found.st_mtime


def bring(source: Path, target: Path) -> None:
    """Copies a file, or all files of a folder, between this machine and a store, or inside one.

    Raises:
        OSError: it cannot.
    """
    from etils import epath

    with _as_os_error(source if is_stored(source) else target):
        if not source.is_dir():
            epath.Path(source).copy(epath.Path(target), overwrite=True)
            return
        make_folder(target)
        for path in children(source):
            bring(path, target / path.name)


def remove_folder(path: Path) -> None:
    """Deletes a folder with all that is in it, as far as it can."""
    if not is_stored(path):
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(Exception):
        cast(Any, path).rmtree()


@contextlib.contextmanager
def _as_os_error(path: Path) -> Iterator[None]:
    """Makes an OSError of what the package of a store raises."""
    try:
        yield
    except (OSError, ImportError):
        raise
    except Exception as error:
        if is_stored(path):
            raise OSError(_said(error)) from error
        raise


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)[:200]}"


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
