"""All writers of a run as one: metrics.jsonl, those that are configured, and callbacks."""

import contextlib
import functools
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from jdecouple._errors import first_line
from jdecouple.train.metrics import MetricsWriter, read_metrics
from jdecouple.train.resume import open_metrics
from jdecouple.train.run import Run
from jdecouple.train.tracking.table import chosen, factory, is_built_in
from jdecouple.train.tracking.writer import Callback, Start, TrackingError, Writer


class Writers(contextlib.AbstractContextManager["Writers"]):
    """Writes metrics.jsonl first, and then to each of the others.

    One of the package that fails is told of once and written to no more. One of the user's own ends
    the run, by a `TrackingError`.
    """

    def __init__(self, file: MetricsWriter):
        self._file = file
        self._others: dict[str, tuple[Writer, bool]] = {}

    @property
    def rows(self) -> int:
        """Lines of metrics.jsonl, see `MetricsWriter`."""
        return self._file.rows

    def flush(self) -> None:
        """Brings all lines of metrics.jsonl to where it is."""
        self._file.flush()

    def add(self, name: str, make: Callable[[], Writer], *, built_in: bool = False) -> None:
        """Adds what `make` returns, under a name of its own."""
        with self._guarded(name, "at the start", built_in):
            self._others[name] = make(), built_in

    def write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """Writes a line to all, as `MetricsWriter.write`."""
        self._file.write(step, split, values)
        for name, (writer, built_in) in list(self._others.items()):
            numbers = {metric: float(value) for metric, value in values.items()}
            with self._guarded(name, f"at step {step}", built_in):
                writer.write(step, split, numbers)

    def close(self) -> None:
        """Closes all, whatever one of them raises; may be called again."""
        failed: TrackingError | None = None
        with contextlib.closing(self._file):
            while self._others:
                name, (writer, built_in) = self._others.popitem()
                try:
                    with self._guarded(name, "at the end", built_in):
                        writer.close()
                except TrackingError as error:
                    failed = failed or error
        if failed is not None:
            raise failed

    def __exit__(self, kind: Any, *exception: object) -> None:
        try:
            self.close()
        except TrackingError as error:
            if kind is None:
                raise
            logging.warning("%s", error)  # the run has ended for another reason

    @contextlib.contextmanager
    def _guarded(self, name: str, when: str, built_in: bool) -> Iterator[None]:
        try:
            yield
        except TrackingError:
            raise
        except Exception as error:
            kind, text = type(error).__name__, first_line(error)
            what = f"{name} failed {when}: {kind}" + (f": {text}" if text != kind else "")
            if not built_in:
                frame = traceback.extract_tb(error.__traceback__)[-1]
                place = f"{Path(frame.filename).name}, line {frame.lineno}"
                raise TrackingError(f"{what} ({place})") from error
            logging.warning("%s; the run goes on without it", what)
            writer, _ = self._others.pop(name, (None, None))
            if writer is not None:
                with contextlib.suppress(Exception):
                    writer.close()


def open_writers(
    folder: Path,
    run: Run,
    step: int,
    start: Mapping[str, Any] | None,
    callbacks: Sequence[Callback] = (),
) -> Writers:
    """The writers from `step` on.

    Args:
        folder: the workdir.
        run: what is to be trained.
        step: where it begins.
        start: what the checkpoint of `step` says beside its arrays; None for a new run.
        callbacks: of the user, beside those that the configuration names.

    Raises:
        OSError: metrics.jsonl cannot be written.
        TrackingError: a writer of the user's own cannot begin.
    """
    writers = Writers(open_metrics(folder, run, step, start))
    with contextlib.ExitStack() as stack:
        stack.callback(writers.close)
        names = chosen(run.config.tracking)
        lines = read_metrics(folder) if names else ()
        begun = Start(run.config, folder, None if start is None else step, lines)
        for name in names:
            make = functools.partial(_made, name, begun)
            writers.add(name, make, built_in=is_built_in(name))
        for number, callback in enumerate(callbacks):
            label = getattr(callback, "__name__", type(callback).__name__)
            writers.add(f"callbacks[{number}] ({label})", functools.partial(_as_writer, callback))
        stack.pop_all()
    return writers


class _Function:
    """A function as a writer."""

    def __init__(self, function: Callable[[int, str, Mapping[str, float]], object]):
        self._function = function

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Calls the function."""
        self._function(step, split, values)

    def close(self) -> None:
        """Nothing is open."""


def _made(name: str, start: Start) -> Writer:
    return _as_writer(factory(name)(start))


def _as_writer(callback: Any) -> Writer:
    if isinstance(callback, Writer):
        return callback
    if callable(callback):
        return _Function(callback)
    raise TypeError(
        f"{callback!r} is given: a function of (step, split, values), or an object with write and "
        "close, is needed"
    )
