"""What a run says last, and how it goes on where its stdout or stderr is closed, full or gone."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

INTERRUPTED = "interrupted before anything new could be saved", 130


def refuse(line: str, code: int = 2) -> NoReturn:
    """Ends the process with one line on stderr."""
    print(f"error: {line}", file=sys.stderr)
    sys.exit(code)


@contextlib.contextmanager
def ends_at_once() -> Iterator[None]:
    """Context of imports, in which Ctrl-C ends the process with its line, and nothing is saved.

    A KeyboardInterrupt may come out of an import as an ImportError, or not at all. Where Ctrl-C is
    ignored, or outside the main thread, nothing is changed.
    """

    def end(*_: object) -> None:
        line, code = INTERRUPTED
        os.write(2, f"error: {line}\n".encode())
        os._exit(code)

    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not usual or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class Lasting:
    """A text stream like another one, except that what cannot be written is left out."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes `text` if it can, what the encoding lacks with backslashes."""
        with contextlib.suppress(OSError, ValueError):
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        """Flushes if it can."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def finish(self) -> None:
        """Flushes; drops what is left, so that Python does not fail with it when it ends."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)


@contextlib.contextmanager
def lasting() -> Iterator[None]:
    """Context, of a whole process, in which stdout and stderr are `Lasting`."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # else a file of the run would get the number, and what libraries print
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w") as null:
        sys.stdout, sys.stderr = (Lasting(null if stream is None else stream) for stream in before)
        try:
            yield
        finally:
            for stream in (sys.stdout, sys.stderr):
                getattr(stream, "finish", stream.flush)()
            sys.stdout, sys.stderr = before
