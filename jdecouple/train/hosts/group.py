"""The processes of a run: what they tell one another, and how they end together.

Every process has a TCP connection to process 0, through which go the arrays of checkpoints, the
metrics, the agreement on the step to stop at, and a sign of life every second. A process that
fails says so; one that is killed, or whose machine has gone, is missed. Either way all others end
with one line, even those that wait inside XLA for what will never come.
"""

import contextlib
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jdecouple._errors import first_line
from jdecouple.train.hosts.link import Link, Message

LOST = 3  # exit code where another process has gone
SILENCE = 40.0  # seconds without a sign of life after which a process has gone
_PERIOD = 1.0  # seconds between signs of life
_FAREWELL = 30.0  # seconds for what is to be finished before an end
_GRACE = 3.0  # seconds in which the end of another process explains an error in this one


class MultiProcess:
    """One process of a run; every process calls the same methods.

    Made by `join` with links to the others by index (to all on process 0, and else only to 0) and
    the names of all machines; ended by `close`, or by `fail`.

    Attributes:
        count: processes in the run.
        first: whether this process reads and writes the workdir, and talks to the user.
    """

    def __init__(self, index: int, links: Mapping[int, Link], names: Sequence[str]):
        self.index, self.count, self.first = index, len(names), index == 0
        self._links, self._names = dict(links), names
        self._data: dict[int, queue.SimpleQueue[Message]] = {
            other: queue.SimpleQueue() for other in links
        }
        self._changed = threading.Condition()
        self._left: set[int] = set()  # processes that have nothing more to do
        self._begun = 0  # step that this process has begun, or may begin
        self._asked = self._querying = False
        self._limits: dict[int, int] = {}
        self._stop_at: int | None = None
        self._ending = threading.Lock()
        self._action: Callable[[], object] = lambda: None
        for other in links:
            threading.Thread(target=self._listen, args=(other,), daemon=True).start()
        if links:
            threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def collect(self, value: Any, arrays: Sequence[np.ndarray] = ()) -> list[Message]:
        """Brings JSON and arrays of all processes to the first, one message a process, in order.

        The others get an empty list and do not wait.
        """
        own = Message("data", value, arrays)
        if not self.first:
            self._send(0, own)
            return []
        return [own, *(self._data[other].get() for other in range(1, self.count))]

    def distribute(self, messages: Sequence[Message]) -> Message:
        """Gives each process its own of `messages`, which only the first's call must hold."""
        if not self.first:
            return self._data[0].get()
        for other in range(1, self.count):
            self._send(other, messages[other])
        return messages[0]

    def broadcast(self, value: Any) -> Any:
        """JSON of the first process, on all of them."""
        return self.distribute([Message("data", value)] * self.count).value

    def stops(self, step: int, requested: bool) -> bool:
        """Whether all processes are to stop after this step; to be asked after every step.

        One that has `requested` it is enough, and all stop after the furthest step that any has
        begun. Whoever wants to stop asks process 0, which asks all how far they have begun; from
        then on nobody begins another step until all know the furthest. They answer from a thread
        of their own, so that one that waits for a message is no hindrance.
        """
        if requested and not self._asked:
            self._asked = True
            if self.first:
                self._ask_all()
            else:
                self._send(0, Message("stop"))
        with self._changed:
            self._changed.wait_for(
                lambda: not self._querying or self._stop_at is not None or step < self._begun
            )
            if self._stop_at is not None and step >= self._stop_at:
                return True
            self._begun = max(self._begun, step + 1)
            return False

    def on_loss(self, action: Callable[[], object]) -> None:
        """What to finish, in this process, before it ends because another one has gone."""
        self._action = action

    def fail(self, error: object, code: int) -> None:
        """Tells the others that this process ends, why, and with which exit code they should."""
        line = f"process {self.index} ({self._names[self.index]}) failed: {error}"
        self._ending.acquire()  # for good: how the others end is no news
        self._tell_all(Message("end", [line, code]), _GRACE)

    def settle(self) -> None:
        """Waits for the loss of another process to show, and does not return if it does."""
        heard = [(link, link.heard) for link in self._links.values()]
        time.sleep(_GRACE)
        if any(link.heard == before for link, before in heard):
            time.sleep(SILENCE)

    def close(self) -> None:
        """Waits until all processes have come here, so that none is missed."""
        if self.first:
            with self._changed:
                self._changed.wait_for(lambda: len(self._left) == len(self._links))
            self._tell_all(Message("leave"), -1)
        else:
            self._send(0, Message("leave"))
            with self._changed:
                self._changed.wait_for(lambda: self._left)

    def _send(self, index: int, message: Message) -> None:
        try:
            self._links[index].send(message)
        except OSError:
            time.sleep(_GRACE)  # it may have said why
            self._lose(index)

    def _tell_all(self, message: Message, seconds: float, but: int | None = None) -> None:
        for index, link in self._links.items():
            if index != but:
                with contextlib.suppress(OSError):  # its listener notices
                    link.send(message, seconds)

    def _listen(self, index: int) -> None:
        """Takes what arrives from one process, for as long as it lives."""
        link = self._links[index]
        while True:
            try:
                message = link.receive()
            except OSError:
                if index not in self._left:
                    self._lose(index)
                return
            self._take(index, message)

    def _take(self, index: int, message: Message) -> None:
        match message:
            case Message("data"):
                self._data[index].put(message)
            case Message("end", [str(line), int(code)]) if 0 < code < 256:
                self._end(line, code, told_by=index)
            case Message("leave"):
                with self._changed:
                    self._left.add(index)
                    self._changed.notify_all()
            case Message("stop"):
                self._ask_all()
            case Message("how far"):
                with self._changed:
                    self._querying, begun = True, self._begun
                self._send(index, Message("so far", begun))
            case Message("so far", int(begun)):
                self._know(index, begun)
            case Message("until", int(step)):
                with self._changed:
                    self._stop_at = step
                    self._changed.notify_all()
            case Message("alive"):
                pass
            case _:  # no process of this program sends that
                self._lose(index)

    def _ask_all(self) -> None:
        with self._changed:
            if self._querying:
                return
            self._querying = True
            begun = self._begun
        for other in self._links:
            self._send(other, Message("how far"))
        self._know(0, begun)

    def _know(self, index: int, begun: int) -> None:
        with self._changed:
            self._limits[index] = begun
            if len(self._limits) < self.count:
                return
            stop_at = self._stop_at = max(self._limits.values())
            self._changed.notify_all()
        for other in self._links:
            self._send(other, Message("until", stop_at))

    def _watch(self) -> None:
        """Gives signs of life, and misses those of others."""
        silent = dict.fromkeys(self._links, 0.0)
        heard = dict.fromkeys(self._links, 0)
        while True:
            time.sleep(_PERIOD)
            for index, link in self._links.items():
                # No clock is read: a machine that has slept has not been waiting.
                silent[index] = silent[index] + _PERIOD if link.heard == heard[index] else 0.0
                heard[index] = link.heard
                if silent[index] > SILENCE and index not in self._left:
                    self._lose(index)
            self._tell_all(Message("alive"), 0)

    def _lose(self, index: int) -> None:
        line = (
            f"process {index} ({self._names[index]}) is lost: start all processes again, "
            "and the run continues from its last checkpoint"
        )
        self._end(line, LOST, told_by=index)

    def _end(self, line: str, code: int, told_by: int) -> None:
        """Ends this process, whatever its main thread is doing; does not return."""
        with self._ending:
            self._tell_all(Message("end", [line, code]), _GRACE, but=told_by)
            print(f"error: {first_line(line)}", file=sys.stderr, flush=True)
            farewell = threading.Thread(target=self._finish, daemon=True)
            farewell.start()
            farewell.join(_FAREWELL)
            os._exit(code)

    def _finish(self) -> None:
        with contextlib.suppress(Exception):  # the one line has been said
            self._action()


class SingleProcess(MultiProcess):
    """A run of one process, which has nobody to wait for."""

    def __init__(self) -> None:
        super().__init__(0, {}, [""])
