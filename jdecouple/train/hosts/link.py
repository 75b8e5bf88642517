"""One TCP connection between two processes: messages of JSON and NumPy arrays."""

import json
import socket
import struct
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

_LENGTH = struct.Struct("!Q")
_LONGEST = 2**30  # bytes of JSON; more is no message of this program


class Message(NamedTuple):
    """What crosses a link.

    Attributes:
        kind: says who is to take it.
        value: anything that JSON holds.
        arrays: NumPy arrays.
    """

    kind: str
    value: Any = None
    arrays: Sequence[np.ndarray] = ()


class Link:
    """A connection; any thread may send, one receives.

    Args:
        connection: a connected stream socket.

    Attributes:
        heard: grows with everything that arrives, in the middle of a message too.
    """

    def __init__(self, connection: socket.socket):
        self._socket = connection
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sending = threading.Lock()
        self.heard = 0

    @property
    def own_address(self) -> str:
        """Address of this end, without the port."""
        return self._socket.getsockname()[0].removeprefix("::ffff:")

    @property
    def other_address(self) -> str:
        """Address of the other end, without the port."""
        return self._socket.getpeername()[0].removeprefix("::ffff:")

    def send(self, message: Message, seconds: float = -1) -> None:
        """Sends a message in one piece.

        Args:
            message: the message.
            seconds: to wait for messages of other threads before it is dropped; -1 drops none.

        Raises:
            OSError: the connection has ended.
        """
        if self._sending.acquire(timeout=seconds):
            try:
                self._send(message)
            finally:
                self._sending.release()

    def _send(self, message: Message) -> None:
        arrays = [np.asarray(array, order="C") for array in message.arrays]
        specs = [[array.dtype.name, array.shape] for array in arrays]
        header = json.dumps([message.kind, message.value, specs]).encode()
        self._socket.sendall(_LENGTH.pack(len(header)) + header)
        for array in arrays:
            self._socket.sendall(_bytes(array))

    def receive(self) -> Message:
        """The next message.

        Raises:
            OSError: the connection has ended, or carries something else.
        """
        (length,) = _LENGTH.unpack(self._read(bytearray(_LENGTH.size)))
        if length > _LONGEST:
            raise OSError("no message of this program")
        try:
            kind, value, specs = json.loads(self._read(bytearray(length)))
            arrays = [np.empty(shape, jnp.dtype(dtype)) for dtype, shape in specs]
        except (ValueError, TypeError) as error:
            raise OSError("no message of this program") from error
        for array in arrays:
            self._read(_bytes(array))
        return Message(kind, value, arrays)

    def close(self) -> None:
        """Ends the connection."""
        self._socket.close()

    def _read(self, buffer: Any) -> Any:
        view = memoryview(buffer)
        while view:
            count = self._socket.recv_into(view)
            if not count:
                raise ConnectionResetError("the other end has closed the connection")
            self.heard += count
            view = view[count:]
        return buffer


def _bytes(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data
