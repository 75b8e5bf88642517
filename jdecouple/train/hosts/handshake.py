"""How a process proves that it belongs to a run: by a token, which itself does not travel.

Process 0 sends a nonce. The other answers with a line: a MAC of the nonce and of its hello, and the
hello, a JSON object. Process 0 answers with a MAC of that line, so that each knows the other.
What follows is neither signed nor encrypted.
"""

import contextlib
import dataclasses
import hmac
import json
import secrets
import socket
import time
from collections.abc import Generator
from multiprocessing.connection import wait
from typing import Any

from absl import logging

from jdecouple.train.hosts.token import VARIABLE

SECONDS = 10.0  # for a whole handshake
_NONCE = 32  # bytes
_MAC = 64  # bytes
_LONGEST = 4096  # bytes of the line
_REFUSED = b"-" * _MAC
_MOST = 100  # unfinished handshakes; beyond that the oldest makes room


class OtherTokenError(Exception):
    """The other end does not know this process's token."""


@dataclasses.dataclass
class _Pending:
    nonce: bytes
    until: float
    line: bytes = b""


def accept(
    server: socket.socket, token: bytes, end: float
) -> Generator[tuple[socket.socket, dict[str, Any]], None, None]:
    """Yields the connections of those that know the token, with their hellos, until `end`.

    All others are closed. No single one is waited for, so that whoever is silent, slow or endless
    keeps nobody out.
    """
    pending: dict[socket.socket, _Pending] = {}
    server.setblocking(False)
    try:
        while (now := time.monotonic()) < end:
            until = min([end, *(its.until for its in pending.values())])
            ready = wait([server, *pending], max(0.0, until - now))
            for connection in [own for own in (server, *pending) if own in ready]:
                if connection is server:
                    _begin(server, pending)
                elif hello := _continue(connection, pending, token):
                    connection.setblocking(True)
                    yield connection, hello
            now = time.monotonic()
            late = [one for one, its in pending.items() if its.until <= now]
            for connection in late or [*pending][:-_MOST]:
                del pending[connection]
                connection.close()
    finally:
        for connection in pending:
            connection.close()


def introduce(connection: socket.socket, token: bytes, hello: dict[str, Any]) -> None:
    """Proves to process 0 that this process knows the token, and has it prove the same.

    Raises:
        OSError: the other end is no process 0, or is too slow.
        OtherTokenError: it does not know the token.
    """
    until = time.monotonic() + SECONDS
    nonce = _read(connection, _NONCE, until)
    body = json.dumps(hello | {"nonce": secrets.token_hex(_NONCE)}).encode()
    line = _mac(token, b"hello", nonce + body) + b" " + body + b"\n"
    connection.sendall(line)
    if not hmac.compare_digest(_read(connection, _MAC, until), _mac(token, b"answer", line)):
        raise OtherTokenError(f"it has another token: {VARIABLE} must be the same for all")


def _begin(server: socket.socket, pending: dict[socket.socket, _Pending]) -> None:
    with contextlib.suppress(OSError):  # it has gone again
        connection, _ = server.accept()
        its = _Pending(secrets.token_bytes(_NONCE), time.monotonic() + SECONDS)
        pending[connection] = its
        connection.setblocking(False)
        connection.send(its.nonce)


def _continue(
    connection: socket.socket, pending: dict[socket.socket, _Pending], token: bytes
) -> dict[str, Any] | None:
    """Takes what has arrived; the hello once it is whole and proved."""
    its = pending[connection]
    try:
        chunk = connection.recv(_LONGEST - len(its.line))
    except OSError:
        chunk = b""
    its.line += chunk
    if chunk and not its.line.endswith(b"\n"):
        return None
    del pending[connection]
    hello = _proved(its, token)
    answer = _REFUSED if hello is None else _mac(token, b"answer", its.line)
    try:
        connection.send(answer)
    except OSError:
        hello = None
    if hello is None:
        connection.close()
    return hello


def _proved(its: _Pending, token: bytes) -> dict[str, Any] | None:
    mac, _, body = its.line.removesuffix(b"\n").partition(b" ")
    if not hmac.compare_digest(mac, _mac(token, b"hello", its.nonce + body)):
        if body.startswith(b"{") and its.line.endswith(b"\n"):
            logging.log_first_n(
                logging.WARNING,
                "a process with another token is not let in: %s must be the same for all",
                1,
                VARIABLE,
            )
        return None
    with contextlib.suppress(ValueError, RecursionError):
        hello = json.loads(body)
        return hello if isinstance(hello, dict) else None
    return None


def _mac(token: bytes, purpose: bytes, content: bytes) -> bytes:
    return hmac.digest(token, purpose + content, "sha256").hex().encode()


def _read(connection: socket.socket, count: int, until: float) -> bytes:
    """So many bytes, in time."""
    found = b""
    while len(found) < count:
        connection.settimeout(max(0.001, until - time.monotonic()))
        chunk = connection.recv(count - len(found))
        if not chunk:
            raise ConnectionResetError("it closed the connection")
        found += chunk
    return found
