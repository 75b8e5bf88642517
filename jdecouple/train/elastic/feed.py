"""Where a stage's batches come from: the data for the first, the stage below for the others."""

import collections
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jdecouple import data
from jdecouple.methods.routes import Carry
from jdecouple.pipeline.mpmd.one_stage import OneStage
from jdecouple.train.elastic.inbox import Inbox
from jdecouple.train.run import Run

_GLANCE = 0.1  # seconds until one that waits looks around
FAREWELL = 30.0  # seconds after a signal in which the stage below must have said where to stop


class Batch(NamedTuple):
    """A batch for a stage.

    Attributes:
        number: of the batch, from 0.
        carries: one a microbatch, on the stage's devices.
        is_new: whether it is trained on for the first time.
    """

    number: int
    carries: Sequence[Carry]
    is_new: bool = True


class Reader:
    """Reads the batches of a run from a step on; stops after a batch once it is asked to."""

    def __init__(self, run: Run, step: int, asked: Callable[[], bool]):
        config = run.config
        batches = data.train_batches(
            run.dataset.train, config.batch_size, seed=config.seed, start=step
        )
        self._prefetcher: Any = data.Prefetcher(batches, run.trainer.put)
        self._numbers, self._asked = itertools.count(step), asked

    def next(self) -> Batch | int:
        """The next batch, or the number of the first that will not come."""
        number = next(self._numbers)
        return number if self._asked() else Batch(number, next(self._prefetcher).parts)

    def close(self) -> None:
        """Ends its threads."""
        self._prefetcher.close()


class Receiver:
    """Receives batches from the stage below.

    Args:
        inbox: whence.
        stage: takes them to its devices.
        memory: how many of the last messages are trained on once more each time that the stage
            below is lost, the oldest first; 0: it waits.
        asked: whether to stop: where the stage below does, or after some seconds.
        starve: called when that is so.
        tell: told in a line when it waits and goes on.
    """

    def __init__(
        self,
        inbox: Inbox,
        stage: OneStage,
        memory: int,
        asked: Callable[[], bool],
        starve: Callable[[], None],
        tell: Callable[[str], None],
    ):
        self._inbox, self._stage, self._asked = inbox, stage, asked
        self._starve, self._tell = starve, tell
        self._recent: collections.deque = collections.deque(maxlen=memory)
        self._again: list | None = None  # what is left of the recent ones in this loss
        self._until: float | None = None
        self._came = False

    def next(self) -> Batch | int | None:
        """The next batch, or the number of the first that will not come; None: it is not known."""
        while True:
            lost = self._inbox.is_lost
            if found := self._inbox.get(0.0 if self._again else _GLANCE):
                if self._again is not None:
                    self._tell(f"the stage below is back, with step {found.number + 1}")
                    self._again = None
                if found.arrays is None:
                    return found.number
                self._came = True
                self._recent.append(found)
                return Batch(found.number, self._stage.receive(found.arrays))
            if self._asked():
                self._until = self._until or time.monotonic() + FAREWELL
                if time.monotonic() > self._until:
                    return None
            if not lost or not self._came:
                continue
            if self._again is None:
                self._again = list(self._recent)
                self._tell("the stage below is lost: " + ("replays" if self._again else "waits"))
                self._starve()
            if self._again and not self._asked():
                old = self._again.pop(0)
                return Batch(old.number, self._stage.receive(old.arrays), is_new=False)

    def close(self) -> None:
        """Nothing: what it waits for ends with the process."""
