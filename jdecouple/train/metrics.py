"""Metrics of a run: `metrics.jsonl`, and progress on the console."""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tqdm
from absl import logging

from jdecouple._files import any_folder, is_stored, make_folder, naming, read_bytes, replace
from jdecouple.train import notebook

FILE_NAME = "metrics.jsonl"
SPLITS = ("train", "validation", "test")

_MOST = sys.float_info.max
_REST = 10.0  # seconds between two times that a store gets the lines

Line = dict[str, Any]


def clock(waited: float) -> np.ndarray:
    """[2], in seconds: the time, and how long has been waited for input until then."""
    return np.array([time.perf_counter(), waited])


class Interval:
    """The steps since the last line of the training metrics, from when `step` was done.

    Its `means`, how many steps were added, the sums of their metrics and how many values are not in
    a sum, are JSON; it goes on with those of an earlier process, where there are any.
    """

    def __init__(self, step: int, began: np.ndarray, means: dict[str, Any] | None = None):
        self._step, self._began = step, began
        self.means = means or {"count": 0, "sums": {}}

    def add(
        self, values: Mapping[str, Any], *, finite: bool = False, late: Collection[str] = ()
    ) -> None:
        """Counts the scalars of one step; a mean is over the steps that have its name.

        With `finite` those alone that are finite, as of a step that has changed nothing. Those
        named in `late` are nan where they are not there yet.
        """
        sums, before = self.means["sums"], self.means["count"]
        lacks = dict.fromkeys(sums.keys() - values.keys(), 1)
        lacks |= dict.fromkeys(values.keys() - sums.keys(), before)
        for name, steps in lacks.items() if before else ():  # as a run that goes on has other ones
            without = self.means.setdefault("without", {})
            without[name] = without.get(name, 0) + steps
        self.means["count"] += 1
        for name, value in values.items():
            if (name in late and math.isnan(value)) or (finite and not math.isfinite(value)):
                without = self.means.setdefault("without", {})
                without[name] = without.get(name, 0) + 1
                value = 0.0
            sums[name] = sums.get(name, 0.0) + float(value)

    def leave_out(self, seconds: float) -> None:
        """Takes the time of an evaluation out of the training speed."""
        self._began = self._began + np.array([seconds, 0])

    def end(self, step: int, now: np.ndarray, batch_size: int) -> dict[str, float]:
        """Returns means, examples_per_second and input_wait, a share of the time; begins anew."""
        without = self.means.get("without", {})
        counts = {name: self.means["count"] - without.get(name, 0) for name in self.means["sums"]}
        values = {name: x / counts[name] for name, x in self.means["sums"].items() if counts[name]}
        seconds, waited = (now - self._began).tolist()
        values["examples_per_second"] = (step - self._step) * batch_size / seconds
        values["input_wait"] = waited / seconds
        self._step, self._began = step, now
        self.means = {"count": 0, "sums": {}}
        return values


class MetricsWriter(contextlib.AbstractContextManager["MetricsWriter"]):
    """Appends one JSON object a line to ``metrics.jsonl`` and flushes it.

    To an object of a store nothing can be appended: there all lines are written anew every ten
    seconds, if there are new ones, and by `flush` and `close`.

    Args:
        workdir: directory of the run; created if missing.
        resume_step: step that the run goes on from. Lines of later steps and a half-written last
            line are dropped by an atomic rewrite, and damaged ones with a warning; all other lines
            keep their bytes. None: a new run, which starts with an empty file.
        evaluated: whether that step has been evaluated; if not, lines about that are dropped too.
        rows: lines that had been written until then, at least.

    Attributes:
        rows: lines that were written, in all; `lost` are those that were missing at the start.

    Raises:
        OSError: the file cannot be written; one line that names it.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        resume_step: int | None,
        evaluated: bool = True,
        rows: int = 0,
    ):
        self._path = path = any_folder(workdir) / FILE_NAME
        with naming(path):
            make_folder(path.parent)
            kept = b"" if resume_step is None else _until(_read(path), resume_step, evaluated)
        found = kept.count(b"\n")
        self.rows, self.lost = max(found, rows), max(0, rows - found)
        replace(path, lambda temporary: temporary.write_bytes(kept))
        self._file: Any = _Stored(path, kept) if is_stored(path) else None
        if self._file is None:
            with naming(path):
                # Unbuffered: what has failed once is not tried again by `close`.
                flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW
                self._file = os.fdopen(os.open(path, flags), "ab", buffering=0)

    def write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """Appends ``{"step": step, "split": split, **values}``.

        Values are numbers or scalar arrays; one that is not finite becomes null.

        Raises:
            ValueError: the split is unknown, or a value is named `step` or `split`.
            OSError: the disk is full, or the like; one line that names the file.
        """
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}: allowed are {', '.join(SPLITS)}")
        if clash := values.keys() & {"step", "split"}:
            raise ValueError(f"a metric may not be named {' or '.join(sorted(clash))}")
        numbers = {name: float(value) for name, value in values.items()}
        finite = {name: x if math.isfinite(x) else None for name, x in numbers.items()}
        line = {"step": int(step), "split": split, **finite}
        rest = json.dumps(line, allow_nan=False).encode() + b"\n"
        with naming(self._path):
            while rest:
                rest = rest[self._file.write(rest) :]
        self.rows += 1

    def flush(self) -> None:
        """Brings all lines to the file; OSError where that fails."""
        self._file.flush()

    def close(self) -> None:
        """Closes the file; may be called again."""
        self._file.close()

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(workdir: str | os.PathLike[str]) -> list[Line]:
    """Returns the lines of ``metrics.jsonl`` in order, without a half-written one; [] without file.

    Lines that hold no metrics are left out. Values that were not finite are None.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with MetricsWriter(folder, resume_step=None) as writer:
    ...         writer.write(10, "test", {"loss": 0.5, "accuracy": 0.75})
    ...     read_metrics(folder)
    [{'step': 10, 'split': 'test', 'loss': 0.5, 'accuracy': 0.75}]
    """
    return list(filter(None, map(_parse, _read(any_folder(workdir) / FILE_NAME).splitlines())))


class _Stored:
    """Lines of an object in a store, which appear there now and then, and by `flush`."""

    def __init__(self, path: Path, kept: bytes):
        self._path, self._lines = path, bytearray(kept)
        self._there, self._last = len(kept), time.monotonic()

    def write(self, line: bytes) -> int:
        """Adds a line."""
        self._lines += line
        if time.monotonic() - self._last >= _REST:
            self.flush()
        return len(line)

    def flush(self) -> None:
        """Writes the object anew if there are lines that it lacks."""
        if len(self._lines) > self._there:
            lines = bytes(self._lines)
            replace(self._path, lambda temporary: temporary.write_bytes(lines))
            self._there, self._last = len(lines), time.monotonic()

    def close(self) -> None:
        """As `flush`."""
        self.flush()


class Progress:
    """Progress on stderr: a bar on a terminal, else one plain line for each `update` with values.

    In a notebook it is a bar, too, below the cell.

    Throughput and time left count from the first `update`, so that compilation, of which the bar
    tells until then, is left out.
    Nothing is printed unless `enabled`, as on the first process; it begins at step `initial`.
    """

    def __init__(
        self, total_steps: int, initial: int, examples_per_step: int, enabled: bool = True
    ):
        self._total, self._examples, self._enabled = total_steps, examples_per_step, enabled
        self._first: tuple[int, float] | None = None
        self._shown: list[str] = []
        self._bar: Any = None
        in_notebook = notebook.is_active()
        if enabled and (in_notebook or (sys.stderr and sys.stderr.isatty())):
            self._bar = (notebook.bar_type() if in_notebook else tqdm.tqdm)(
                total=total_steps,
                initial=initial,
                miniters=1,
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}",
            )
            self._bar.set_postfix_str("compiling")  # which takes longer than many steps

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """Shows that `step` steps are done, and `values` in their order.

        The values are read here, so pass device arrays at intervals only. Without any, the last
        ones stay.
        """
        if not self._enabled:
            return
        self._shown = [_shown(name, x) for name, x in values.items()] or self._shown
        parts = [*self._speed(step), *self._shown]
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(parts), refresh=False)
            self._bar.update(step - self._bar.n)
        elif values:
            line = " | ".join([f"step {step}/{self._total}", *parts])
            print(line, file=sys.stderr, flush=True)

    def print(self, line: str) -> None:
        """Prints `line` on stdout, above the bar where there is one."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stdout)
        elif self._enabled:
            print(line, flush=True)

    def close(self) -> None:
        """Leaves the bar as it stands; may be called again."""
        if self._bar is not None:
            self._bar.close()

    def _speed(self, step: int) -> list[str]:
        now = time.perf_counter()
        first, began = self._first = self._first or (step, now)
        done, seconds = step - first, now - began
        if done <= 0 or seconds <= 0:
            return []
        left = tqdm.tqdm.format_interval((self._total - step) * seconds / done)
        return [f"{done * self._examples / seconds:,.0f} examples/s", f"{left} left"]


def _shown(name: str, value: Any) -> str:
    return f"{name} {value}" if isinstance(value, int | str) else f"{name} {float(value):.4g}"


def _read(path: Path) -> bytes:
    try:
        return read_bytes(path)
    except FileNotFoundError:
        return b""


def _parse(raw: bytes) -> Line | None:
    """The metrics on a line; None if there are none, as on a half-written or damaged line."""
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or type(line.get("step")) is not int:
        return None
    values = [value for name, value in line.items() if name not in ("step", "split")]
    numbers = all(x is None or (type(x) in (int, float) and abs(x) <= _MOST) for x in values)
    return line if numbers and line.get("split") in SPLITS else None


def _until(data: bytes, step: int, evaluated: bool) -> bytes:
    """Lines of steps up to `step`, byte for byte; if not `evaluated`, only "train" ones of it."""
    kept, damaged = [], []
    for number, raw in enumerate(data.splitlines(keepends=True), 1):
        line = _parse(raw)
        if line is None:
            damaged += [number] * raw.endswith(b"\n")  # else it was half written
        elif line["step"] <= step - (not evaluated and line["split"] != "train"):
            kept.append(raw.rstrip(b"\r\n") + b"\n")
    if damaged:
        logging.warning("%s: left out line %s", FILE_NAME, ", ".join(map(str, damaged)))
    return b"".join(kept)
