"""The messages of the stage below, which a stage asks for in the order of the batches."""

import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jdecouple.train.elastic.folder import Place
from jdecouple.train.elastic.outbox import Hello, kept_alive
from jdecouple.train.errors import ConfigError
from jdecouple.train.hosts.handshake import SECONDS, OtherTokenError, introduce
from jdecouple.train.hosts.link import Link, Message

_AGAIN = 0.1  # seconds until the stage below is looked for again
_AHEAD = 2  # messages that are there before it is their turn


class Received(NamedTuple):
    """A message, or with None as its arrays the number of the first batch that does not come."""

    number: int
    arrays: Sequence[np.ndarray] | None


class Inbox:
    """Pulls messages from batch `first` on, in a thread; the stage below may go and come again.

    Args:
        first: number of the first batch that is wanted.
        find: where the stage below is now; None if that is not known.
        token: which both must know.
        hello: what this stage says of itself.
        config: of this stage, which must be that of the one below.

    Attributes:
        is_lost: whether the stage below has gone, or gets nothing itself.
    """

    def __init__(
        self,
        first: int,
        find: Callable[[], Place | None],
        token: bytes,
        hello: Hello,
        config: dict[str, Any],
    ):
        self._next, self._find, self._token, self._hello = first, find, token, hello
        self._config = config
        self._ready: queue.Queue[Received | ConfigError] = queue.Queue(_AHEAD)
        self.is_lost = True
        threading.Thread(target=self._pull, name="inbox", daemon=True).start()

    def get(self, seconds: float) -> Received | None:
        """The next message; None if none has come in time.

        Raises:
            ConfigError: the stage below is another run's.
        """
        try:
            found = self._ready.get(timeout=seconds)
        except queue.Empty:
            return None
        if isinstance(found, ConfigError):
            raise found
        return found

    def _pull(self) -> None:
        while True:
            try:
                if place := self._find():
                    ends = place.address, place.port
                    with socket.create_connection(ends, timeout=SECONDS) as connection:
                        introduce(connection, self._token, self._hello)
                        self._compare(place.config)
                        connection.settimeout(None)
                        if self._take_all(Link(kept_alive(connection))):
                            return
            except OtherTokenError as error:
                self._ready.put(ConfigError(f"the stage below: {error}"))
                return
            except ConfigError as error:
                self._ready.put(error)
                return
            except OSError:
                pass
            self.is_lost = True
            time.sleep(_AGAIN)

    def _compare(self, below: dict[str, Any]) -> None:
        for key, value in self._config.items():
            if below.get(key) != value:
                raise ConfigError(f"config.{key} is {value}, of the stage below {below.get(key)}")

    def _take_all(self, link: Link) -> bool:
        """Takes what comes over one connection; whether there will be no more."""
        while True:
            link.send(Message("want", self._next))
            while (message := link.receive()).kind == "starved":
                self.is_lost = True
            self.is_lost = False
            match message:
                case Message("carry", int(number), arrays) if number >= self._next:
                    self._next = number + 1
                    self._ready.put(Received(number, arrays))
                case Message("end", int(number)):
                    self._ready.put(Received(number, None))
                    return True
                case Message("refused", str(reason)):
                    raise ConfigError(f"the stage below refuses this one: {reason}")
                case _:
                    raise OSError("no message of this program")


def route_to(host: str, port: int) -> str:
    """The address under which this machine is seen from another one."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(found[0], socket.SOCK_DGRAM) as probe:  # of which nothing is sent
        probe.connect(found[4])
        return str(probe.getsockname()[0])
