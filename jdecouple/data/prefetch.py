"""A thread that reads and uploads batches while the devices compute."""

from __future__ import annotations

import collections
import copy
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from jdecouple._errors import require_int

Read = TypeVar("Read")
Placed = TypeVar("Placed")


class Prefetcher(Generic[Read, Placed]):
    """Iterates over `place(batch)` for the batches of an iterator, some ahead.

    A daemon thread calls `next(iterator)` and `place`; an error in either is raised by `next()`
    after the batches before it, as is the end of the iterator. From then on the iterator belongs
    to the prefetcher.

    Args:
        iterator: where batches come from; its `get_state()`, if any, makes `state`, and its
            `close()`, if any, is called when the prefetcher is closed.
        place: uploads a batch, e.g. by `jax.device_put`; runs in the thread.
        depth: placed batches that may be ready, at least 1.

    Attributes:
        state: the iterator's state just after the batch that `next()` returned last; batches read
            ahead do not count. None where the iterator has no `get_state()`.
        wait_seconds: seconds that `next()` has been blocked, all calls together.

    Raises:
        ValueError: `depth` is less than 1.
    """

    def __init__(self, iterator: Iterator[Read], place: Callable[[Read], Placed], depth: int = 2):
        require_int(1, depth=depth)
        self._iterator, self._place, self._depth = iterator, place, depth
        self._ready: collections.deque[tuple[Placed, Any]] = collections.deque()
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._closed = False
        self.wait_seconds = 0.0
        self.state = self._iterator_state()
        self._thread = threading.Thread(target=self._fill, name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Prefetcher[Read, Placed]:
        return self

    def __next__(self) -> Placed:
        """Returns the next placed batch.

        Raises:
            StopIteration: the iterator has ended.
            RuntimeError: the prefetcher is closed.
            Exception: whatever the iterator or `place` raised.
        """
        began = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._error or self._closed)
            self.wait_seconds += time.perf_counter() - began
            if self._closed:
                raise RuntimeError("the prefetcher is closed")
            if not self._ready:
                assert self._error is not None
                raise self._error
            placed, self.state = self._ready.popleft()
            self._changed.notify_all()
        return placed

    def close(self, timeout: float = 5.0) -> None:
        """Stops the thread and drops what it has read; may be called more than once.

        A thread that is inside the iterator or `place` stops when that call returns; it is
        waited for at most `timeout` seconds.
        """
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join(timeout)
        if not self._thread.is_alive() and hasattr(self._iterator, "close"):
            self._iterator.close()

    def __enter__(self) -> Prefetcher[Read, Placed]:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _iterator_state(self) -> Any:
        get_state = getattr(self._iterator, "get_state", None)
        # Copied because an iterator may hand out the dict that it goes on changing.
        return copy.deepcopy(get_state()) if get_state else None

    def _fill(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or len(self._ready) < self._depth)
                    if self._closed:
                        return
                batch = next(self._iterator)
                item = (self._place(batch), self._iterator_state())
                with self._changed:
                    if not self._closed:
                        self._ready.append(item)
                        self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()
