"""The messages of a stage for the one above it, which asks for them."""

import collections
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jdecouple.train.hosts.handshake import accept
from jdecouple.train.hosts.link import Link, Message

PATIENCE = 300.0  # seconds in which the stage above must have come
_GLANCE = 0.1  # seconds until one that waits looks whether it still has to
_LONG = 1e6  # seconds for which nobody need come
# Seconds after which a machine that says nothing has gone: the first probe, between probes, probes.
_KEEP_ALIVE = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 40_000}

Hello = dict[str, Any]


class Outbox:
    """The last messages of a stage, each the arrays of a batch by its number.

    While the stage above is there, or may yet come, `put` waits until that has asked for all but
    the last `size`, so that none is lost; while it is not, the oldest make room.

    Args:
        size: messages that are held.
        first: number of the first batch that comes.
        address: at which it listens, at a free port.
        token: which the stage above must know.
        hello: what the stage above must say of itself.
        tell: told in a line when that comes and goes.
    """

    def __init__(
        self,
        size: int,
        first: int,
        address: str,
        token: bytes,
        hello: Hello,
        tell: Callable[[str], None],
    ):
        self._size, self._token, self._hello, self._tell = size, token, hello, tell
        self._held: collections.deque[tuple[int, Sequence[np.ndarray]]]
        self._held = collections.deque(maxlen=size)
        self._end: int | None = None
        self._starved = False
        self._asked: int | None = first  # which number the stage above wants; None without it
        self._visits, self._until = 0, time.monotonic() + PATIENCE
        self._changed = threading.Condition()
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._server = socket.create_server((address, 0), family=family)
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._listen, name="outbox", daemon=True).start()

    def put(self, number: int, message: Sequence[np.ndarray], hurries: Callable[[], bool]) -> None:
        """Adds the message of a batch; waits for the stage above unless it `hurries`."""
        with self._changed:
            while self._would_drop() and not hurries():
                self._changed.wait(_GLANCE)
                if not self._visits and time.monotonic() > self._until:
                    self._asked = None
                    self._tell("the stage above has not come: goes on")
            self._held.append((number, message))
            self._starved = False
            self._changed.notify_all()

    def _would_drop(self) -> bool:
        """Whether the next message takes the place of one that the stage above has yet to get."""
        full = len(self._held) == self._size
        return full and self._asked is not None and self._held[0][0] >= self._asked

    def starve(self) -> None:
        """Says that nothing new comes for now, since a stage further below is lost."""
        with self._changed:
            self._starved = True
            self._changed.notify_all()

    def end(self, number: int) -> None:
        """Says that no batch from `number` on will come."""
        with self._changed:
            self._end = number
            self._changed.notify_all()

    def _listen(self) -> None:
        while True:
            for connection, hello in accept(self._server, self._token, time.monotonic() + _LONG):
                link = Link(kept_alive(connection))
                if reason := _mismatch(self._hello, hello):
                    with contextlib.suppress(OSError):
                        link.send(Message("refused", reason))
                    connection.close()
                    continue
                threading.Thread(target=self._serve, args=(connection, link), daemon=True).start()

    def _serve(self, connection: socket.socket, link: Link) -> None:
        """Gives one that has come what it asks for, until it goes or comes anew."""
        with self._changed:
            visit = self._visits = self._visits + 1
        number: Any = None
        try:
            while True:
                kind, number, _ = link.receive()
                if kind != "want" or type(number) is not int or not self._give(visit, number, link):
                    return
        except OSError:
            pass
        finally:
            connection.close()
            with self._changed:
                gone = visit == self._visits
                if gone:
                    self._asked = None
                    self._changed.notify_all()
            if gone and number is not None and self._end is None:
                self._tell(f"the stage above is lost, which had come to step {number}: goes on")

    def _give(self, visit: int, number: int, link: Link) -> bool:
        """Sends the oldest message from a number on, once there is one; False to a former visit."""
        with self._changed:
            if self._asked is None and visit > 1 and visit == self._visits:
                self._tell(f"the stage above is back, at step {number}")
            self._asked = number if visit == self._visits else self._asked
            self._changed.notify_all()
        starving = False
        while True:
            with self._changed:
                found = next((pair for pair in self._held if pair[0] >= number), None)
                if visit != self._visits:
                    return False
                if found or self._end is not None:
                    break
                if self._starved == starving:
                    self._changed.wait()
                    continue
                starving = self._starved
            if starving:
                link.send(Message("starved"))
        link.send(Message("carry", *found) if found else Message("end", self._end))
        return True


def _mismatch(own: Hello, other: Hello) -> str | None:
    """Why another process does not belong above the stage that sends, if it does not."""
    for key, value in own.items():
        if other.get(key) != value:
            return f"it came with {key} = {other.get(key)}: {value} is expected"
    return None


def kept_alive(connection: socket.socket) -> socket.socket:
    """A connection that ends when the other machine has gone without a word."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEP_ALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection
