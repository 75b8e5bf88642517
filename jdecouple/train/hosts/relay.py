"""Keeps JAX from ending a process whose coordinator has gone.

JAX's client aborts the process, with a page of C++ messages, in the very moment in which its
connection to the coordination service breaks. Through a relay it does not see that, and the
watch of `jdecouple.hosts.group` ends the process in its own way.
"""

import contextlib
import socket
import threading
import time

_CHUNK = 1 << 16


def relay(host: str, port: int, seconds: float) -> str:
    """Starts to pass on what comes to a port of this machine; returns that "address:port".

    Args:
        host: machine to pass it on to.
        port: its port.
        seconds: for how long to try to reach that.
    """
    server = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        while True:
            near, _ = server.accept()
            threading.Thread(target=_serve, args=(near, host, port, seconds), daemon=True).start()

    threading.Thread(target=accept, name="relay", daemon=True).start()
    return f"127.0.0.1:{server.getsockname()[1]}"


def _serve(near: socket.socket, host: str, port: int, seconds: float) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            far = socket.create_connection((host, port), timeout=5)
            break
        except OSError:
            if time.monotonic() > end:
                return
            time.sleep(0.1)
    far.settimeout(None)
    for connection in (near, far):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    threading.Thread(target=_return, args=(far, near), daemon=True).start()
    with contextlib.suppress(OSError):
        while chunk := near.recv(_CHUNK):
            with contextlib.suppress(OSError):  # what a lost coordinator would have got
                far.sendall(chunk)
    far.close()


def _return(far: socket.socket, near: socket.socket) -> None:
    """Passes answers back; JAX's end stays open when the other one closes."""
    with contextlib.suppress(OSError):
        while chunk := far.recv(_CHUNK):
            near.sendall(chunk)
