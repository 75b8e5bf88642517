"""Metrics as TensorBoard reads them."""

import time
from collections.abc import Mapping

# Its SummaryWriter hands events to a thread, and waits for ever once that has met a full disk.
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from jdecouple._files import is_stored
from jdecouple.train.tracking.writer import Start, finite


class TensorBoard:
    """Writes `tensorboard/` in the workdir: scalars called "train/loss", "test/exit_0/accuracy".

    Every start adds a file. It says that what earlier files hold from its own step on is void, and
    has the lines that metrics.jsonl holds of that step; all lines if it is the first file. It needs
    a workdir on this machine.
    """

    def __init__(self, start: Start):
        folder = start.workdir / "tensorboard"
        if is_stored(folder):
            raise ValueError(f"it cannot append to files in {start.workdir}")
        folder.mkdir(parents=True, exist_ok=True)
        first = (start.step or 0) if any(folder.glob("events.*")) else 0
        # The files are read in the order of their names, which begin with a second.
        self._file = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        self._add(Event(step=first, session_log=SessionLog(status=SessionLog.START)))
        for step, split, values in start.written():
            if step >= first:
                self.write(step, split, values)

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Adds the values that are finite, and brings them to the file."""
        pairs = finite(values).items()
        scalars = [Summary.Value(tag=f"{split}/{k}", simple_value=v) for k, v in pairs]
        self._add(Event(step=step, summary=Summary(value=scalars)))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self._file.write_event(event)
        self._file.flush()
