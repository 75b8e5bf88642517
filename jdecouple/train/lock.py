"""One run a workdir: a lock that the first process of a run holds, and that its death frees.

An object store has no locks; there a lease stands for it.
"""

import contextlib
import errno
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from absl import logging

from jdecouple._files import is_stored
from jdecouple.train import lease
from jdecouple.train.config import ConfigError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

FILE_NAME = ".lock"

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_held: set[int] = set()  # descriptors of this process


@contextlib.contextmanager
def only_run(workdir: Path) -> Iterator[None]:
    """Context in which no other run may use a workdir, which is made if missing.

    The file `.lock` there, gone at the end, holds the host and the number of the process. Where a
    file system or a platform has no locks, a warning says so and nothing is held.

    Raises:
        ConfigError: another run uses the workdir, or it cannot be written.
    """
    if is_stored(workdir):
        with lease.held(workdir / FILE_NAME):
            yield
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        held = _lock(workdir / FILE_NAME)
    except OSError as error:
        raise ConfigError(f"workdir {str(workdir)!r}: {error.strerror}") from error
    try:
        yield
    finally:
        if held in _held:  # not in a process that was forked meanwhile
            with contextlib.suppress(OSError):
                (workdir / FILE_NAME).unlink()
            _let_go(held)


def _lock(path: Path) -> int | None:
    """Descriptor of the locked file; None without locks."""
    if fcntl is None:
        _warn(path, "this platform has no locks")
        return None
    while True:
        # Not inherited by programs that this one starts, and no file that a link points to.
        held = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        _held.add(held)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = _owner(held)
            _let_go(held)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise ConfigError(
                    f"workdir {str(path.parent)!r} is in use by another run, {owner}: wait for its "
                    "end, or choose another workdir"
                ) from None
            if error.errno not in _NO_LOCKS:
                raise
            path.unlink(missing_ok=True)
            _warn(path, f"its file system has no locks ({error.strerror})")
            return None
        if _is_at(path, held):
            with contextlib.suppress(OSError):  # as on a full disk; the lock holds all the same
                os.truncate(held, 0)
                text = json.dumps({"host": socket.gethostname(), "pid": os.getpid()})
                os.write(held, f"{text}\n".encode())
            return held
        _let_go(held)  # its last holder has removed it since


def _let_go(held: int) -> None:
    _held.remove(held)
    os.close(held)


def _is_at(path: Path, held: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(held))
    except FileNotFoundError:
        return False


def _owner(held: int) -> str:
    try:
        owner = json.loads(os.pread(held, 1000, 0))
        return f"process {int(owner['pid'])} on {str(owner['host'])[:100]!r}"
    except (OSError, ValueError, KeyError, TypeError):  # it has only just begun
        return "which has not yet said where"


def _warn(path: Path, reason: str) -> None:
    workdir = str(path.parent)
    logging.warning("workdir %r is not locked, %s: let no other run use it", workdir, reason)


def _let_all_go() -> None:
    for held in [*_held]:
        _let_go(held)


if hasattr(os, "register_at_fork"):  # a forked process may outlive the run
    os.register_at_fork(after_in_child=_let_all_go)
