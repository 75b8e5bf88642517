"""SIGTERM and Ctrl-C as a request to save and stop."""

import signal
import threading
from types import FrameType
from typing import Any


class Interrupt:
    """Context in which the first SIGTERM or SIGINT only sets `requested`.

    A second one interrupts at once. Outside the main thread, where Python allows no handlers,
    nothing is changed.

    Attributes:
        requested: whether the run should save and stop.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
