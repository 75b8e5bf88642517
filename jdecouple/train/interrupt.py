"""Signals that ask a run to stop, which saves before it does."""

import signal
import threading
from types import FrameType


class Interrupt:
    """Context in which the first SIGTERM or SIGINT, and any SIGHUP, only sets `requested`.

    A second SIGTERM or SIGINT interrupts at once; of SIGHUP a lost terminal may send several. One
    that was ignored, as under nohup, stays so. Outside the main thread, where Python allows no
    handlers, nothing is changed.
    """

    requested = False
    _asked = False

    def __enter__(self) -> "Interrupt":
        main = threading.current_thread() is threading.main_thread()
        numbers = [signal.SIGTERM, signal.SIGINT] if main else []
        if main and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        self._previous = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGHUP:
            if self._asked:
                raise KeyboardInterrupt
            self._asked = True
        self.requested = True
