"""One run a workdir in an object store: a lease, which its holder renews for as long as it lives.

An object `.lock` says who holds it, and how often that has been renewed. Who finds one watches it:
if it changes another run is alive, else that has gone. No clock is compared. Should two come
through at once, or should a holder have slept while another came, the one that no longer finds its
own name ends when it is to renew it.
"""

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from absl import logging

from jdecouple._errors import first_line
from jdecouple._files import read_bytes, replace
from jdecouple.train.config import ConfigError

PERIOD = 10.0  # seconds between renewals
PATIENCE = 35.0  # seconds without one after which a holder has gone
SETTLE = 1.0  # seconds for another one that came at the same time to write its name
_LOST = 1  # exit code of one that has lost it


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Context in which this process holds the lease of an object, which is gone at the end.

    Raises:
        ConfigError: another run holds it, or it cannot be written.
    """
    _await_end(path)
    own = {"host": socket.gethostname(), "pid": os.getpid(), "id": secrets.token_hex(8)}
    try:
        _write(path, own, 0)
    except OSError as error:
        raise ConfigError(first_line(error)) from error
    time.sleep(SETTLE)
    if not _is(found := _read(path), own):
        raise _in_use(path, found)
    ended = threading.Event()
    renewing = threading.Thread(target=_renew, args=(path, own, ended), daemon=True)
    renewing.start()
    try:
        yield
    finally:
        ended.set()
        renewing.join()
        with contextlib.suppress(Exception):
            if _is(_read(path), own):
                path.unlink()


def _await_end(path: Path) -> None:
    """Returns when nobody holds the lease; ConfigError if somebody does."""
    first = _read(path)
    if first is None or _is_dead(first):
        return
    logging.warning(
        "workdir %r was left by %s, or is in use: this takes %d seconds to see",
        *(str(path.parent), _name(first), PATIENCE),
    )
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        time.sleep(min(1.0, PATIENCE / 10))
        now = _read(path)
        if now is None:
            return
        if now != first:
            raise _in_use(path, now)


def _renew(path: Path, own: dict[str, Any], ended: threading.Event) -> None:
    count = 0
    while not ended.wait(PERIOD):
        count += 1
        with contextlib.suppress(OSError):  # as where the network is away for a moment
            found = _read(path)
            if found is not None and not _is(found, own):
                _end(path, found)
            if not ended.is_set():
                _write(path, own, count)


def _end(path: Path, found: Any) -> NoReturn:
    print(f"error: {first_line(_in_use(path, found))}", file=sys.stderr, flush=True)
    os._exit(_LOST)


def _write(path: Path, own: dict[str, Any], count: int) -> None:
    text = json.dumps(own | {"renewed": count}) + "\n"
    replace(path, lambda temporary: temporary.write_text(text))


def _read(path: Path) -> Any:
    """What the object says, in whatever form; None where there is none."""
    try:
        content = read_bytes(path)
    except FileNotFoundError:
        return None
    try:
        return json.loads(content)
    except ValueError:
        return content


def _is(found: Any, own: dict[str, Any]) -> bool:
    return isinstance(found, dict) and found.get("id") == own["id"]


def _is_dead(found: Any) -> bool:
    """Whether its holder was a process of this machine that has ended."""
    if not isinstance(found, dict) or found.get("host") != socket.gethostname():
        return False
    try:
        os.kill(int(found["pid"]), 0)
    except ProcessLookupError:
        return True
    except (KeyError, TypeError, ValueError, OverflowError, OSError):
        return False
    return False


def _name(found: Any) -> str:
    try:
        return f"process {int(found['pid'])} on {str(found['host'])[:100]!r}"
    except (KeyError, TypeError, ValueError):
        return "another run"


def _in_use(path: Path, found: Any) -> ConfigError:
    return ConfigError(
        f"workdir {str(path.parent)!r} is in use by another run, {_name(found)}: wait for its end, "
        "or choose another workdir"
    )
