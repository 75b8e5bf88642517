"""Keeps JAX from ending a process whose coordinator has gone.

JAX's client aborts the process, with a page of C++ messages, in the very moment in which its
connection to the coordination service breaks. Through a relay it does not see that, and the
watch of `jdecouple.train.hosts.group` ends the process in its own way.
"""

import contextlib
import socket
import threading
import time

_CHUNK = 1 << 16


def relay(host: str, port: int, seconds: float) -> str:
    """Starts to pass on to `host` what comes to a port of this machine; returns "address:port".

    For so many seconds it tries to reach the `port` of `host`.
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
    threading.Thread(target=_pass_on, args=(far, near), daemon=True).start()
    _pass_on(near, far)
    far.close()


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    """Reads to the end, also what a lost target no longer takes; JAX's end then stays open."""
    with contextlib.suppress(OSError):
        while chunk := source.recv(_CHUNK):
            with contextlib.suppress(OSError):
                target.sendall(chunk)
