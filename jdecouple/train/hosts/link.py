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
    """What crosses a link: its kind says who is to take it, `value` is anything in JSON."""

    kind: str
    value: Any = None
    arrays: Sequence[np.ndarray] = ()


class Link:
    """A connected stream socket; any thread may send, one receives.

    `heard` grows with everything that arrives, in the middle of a message too.
    """

    def __init__(self, connection: socket.socket):
        self._socket = connection
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sending = threading.Lock()
        self.heard = 0

    @property
    def addresses(self) -> tuple[str, str]:
        """Addresses of this end and of the other, without their ports."""
        near, far = self._socket.getsockname()[0], self._socket.getpeername()[0]
        return near.removeprefix("::ffff:"), far.removeprefix("::ffff:")

    def send(self, message: Message, seconds: float = -1) -> None:
        """Sends in one piece; drops what waits so many seconds for other threads, -1 for ever.

        Raises:
            OSError: the connection has ended.
        """
        arrays = [np.asarray(array, order="C") for array in message.arrays]
        specs = [[array.dtype.name, array.shape] for array in arrays]
        header = json.dumps([message.kind, message.value, specs]).encode()
        if self._sending.acquire(timeout=seconds):
            try:
                self._socket.sendall(_LENGTH.pack(len(header)) + header)
                for array in arrays:
                    self._socket.sendall(_bytes(array))
            finally:
                self._sending.release()

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
            buffers = [_bytes(array) for array in arrays]
        except (ValueError, TypeError, RecursionError, MemoryError) as error:
            raise OSError("no message of this program") from error
        for buffer in buffers:
            self._read(buffer)
        return Message(kind, value, arrays)

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
